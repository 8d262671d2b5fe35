"""What the fast layers save: each beside Keras' own, values and gradients, on one thread.

    .venv/bin/python benchmarks/layers.py              # about 2 minutes

A case is one layer in the middle of a network: it is run forward and its gradients towards
weights and inputs are taken (the convolution over the embedding has tokens for inputs, so there it
is the embedding's). Both sides run interleaved in one process; medians of CPU seconds, which other
processes disturb less than the clock. Whole networks: benchmarks/throughput.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from machine import processor

from tuner.network import fast_layers
from tuner.network.model import keras, tf
from tuner.network.training import configure_tensorflow

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 200  # residues


def token_convolution(channels: int, filters: int, width: int, batch: int, length: int) -> Any:
    tokens = tf.constant(np.random.default_rng(0).integers(0, 21, (batch, length)), tf.uint8)
    embedding = keras.layers.Embedding(21, channels)
    embedding.build((None, length))
    plain = keras.layers.Conv1D(filters, width, padding="same")
    plain.build((None, length, channels))
    fast = fast_layers.TokenConvolution(
        embedding, masking=True, filters=filters, kernel_size=width, padding="same"
    )
    fast.build((None, length))

    def embedded(x: Any, training: bool) -> Any:
        del training
        real = tf.expand_dims(x > 0, -1)
        return plain(tf.where(real, embedding(x), 0.0))

    return {
        "keras": (embedded, tokens, [plain, embedding]),
        "fast": (fast, tokens, [fast]),
    }


def normalization(channels: int, batch: int, length: int) -> Any:
    x = random_values(batch, length, channels)
    lengths = np.random.default_rng(0).integers(19, length, (batch, 1))
    mask = tf.constant(np.arange(length) < lengths)
    sides = {}
    for name, module in (("keras", keras.layers), ("fast", fast_layers)):
        layer = module.BatchNormalization()
        layer.build((None, length, channels))

        def call(x: Any, training: bool, layer: Any = layer) -> Any:
            return layer(x, training=training, mask=mask)

        sides[name] = (call, x, [layer])
    return sides


CASES: dict[str, Callable[[], Any]] = {
    "tokens, embedding 8 -> 64, width 7, batch 64": lambda: token_convolution(8, 64, 7, 64, LENGTH),
    "tokens, embedding 16 -> 64, width 7, batch 64": lambda: token_convolution(
        16, 64, 7, 64, LENGTH
    ),
    "tokens, embedding 32 -> 64, width 7, batch 64": lambda: token_convolution(
        32, 64, 7, 64, LENGTH
    ),
    "masked batch normalisation, 64 channels, batch 64": lambda: normalization(64, 64, LENGTH),
}


def random_values(*shape: int) -> Any:
    return tf.constant(np.random.default_rng(0).normal(size=shape), tf.float32)


def compiled(call: Any, x: Any, owners: Any) -> Callable[[], Any]:
    """A graph that computes the layer and its gradients."""
    layers = owners if isinstance(owners, list) else [owners]
    weights = [weight.value for layer in layers for weight in layer.trainable_weights]
    watched = x.dtype.is_floating

    @tf.function
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            if watched:
                tape.watch(x)
            y = call(x, training=True)
            total = tf.reduce_sum(y * y)
        gradients = tape.gradient(total, [*weights, x] if watched else weights)
        return [tf.reduce_sum(tf.convert_to_tensor(gradient)) for gradient in gradients]

    return lambda: step(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/layers.json")
    options = parser.parse_args()
    configure_tensorflow(1)
    rows = []
    for name, make in CASES.items():
        steps = {side: compiled(*parts) for side, parts in make().items()}
        seconds: dict[str, list[float]] = {side: [] for side in steps}
        for step in steps.values():
            step()
        for _ in range(options.repeats):
            for side, step in steps.items():
                began = time.process_time()
                for _ in range(5):
                    step()
                seconds[side].append((time.process_time() - began) / 5)
        row: dict[str, Any] = {"case": name}
        for side, times in seconds.items():
            row[f"{side}_ms"] = round(statistics.median(times) * 1e3, 2)
            row[f"{side}_spread_ms"] = [round(min(times) * 1e3, 2), round(max(times) * 1e3, 2)]
        row["ratio"] = round(row["keras_ms"] / row["fast_ms"], 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
    document = {
        "command": "benchmarks/layers.py",
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": processor(),
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
