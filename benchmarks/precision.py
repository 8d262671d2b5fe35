"""Where bfloat16 pays: training steps of many networks in both precisions, on one thread.

    .venv/bin/python benchmarks/precision.py             # about 10 minutes

The networks are drawn from studies/solubility.toml. Both precisions run interleaved in one process;
medians of CPU seconds a step, which other processes disturb less than the clock. From the rows the
rule is chosen that `tuner.spec.precision` has: the fewest multiply-adds a value from which a
network is computed in bfloat16, so that all networks together take the least time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from machine import processor

from tuner.data.development import DevelopmentData
from tuner.network.model import tf
from tuner.network.training import TensorData, TrainingRun, configure_tensorflow
from tuner.spec.architecture import ModelConfig, parameter_count
from tuner.spec.precision import multiply_adds_a_value
from tuner.spec.reader import load_spec
from tuner.spec.spec import TrainingSettings
from tuner.train import TrainingJob

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 200  # residues
SECONDS = 0.4  # of a measurement, about


def random_rows(rows: int) -> TensorData:
    """Sequences as long as the real ones; what they say does not change the time."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 21, (rows, LENGTH), dtype=np.uint8)
    tokens[np.arange(LENGTH) >= rng.integers(19, LENGTH, (rows, 1))] = 0
    labels = rng.integers(0, 2, rows, dtype=np.uint8)
    return TensorData(
        DevelopmentData(
            training_tokens=tokens,
            training_labels=labels,
            validation_tokens=tokens[:8],
            validation_labels=labels[:8],
        )
    )


def step_seconds(run: TrainingRun, rows: Any, steps: int) -> float:
    began = time.process_time()
    run._train_rows(rows[: steps * run._config.batch_size])
    return (time.process_time() - began) / steps


def measured(config: ModelConfig, data: TensorData, repeats: int) -> dict[str, float]:
    """Milliseconds a step in each precision."""
    runs = {
        precision: TrainingRun(
            data,
            TrainingJob(
                config=config,
                trial=0,
                seed=0,
                precision=precision,
                rungs=(),
                settings=TrainingSettings(max_epochs=1, patience=None, max_trial_seconds=1e9),
            ),
        )
        for precision in ("float32", "bfloat16")
    }
    rows = tf.range(data.training_rows)
    steps = {}
    for precision, run in runs.items():
        step_seconds(run, rows, 1)  # traces
        most = data.training_rows // config.batch_size
        steps[precision] = max(2, min(most, int(SECONDS / step_seconds(run, rows, 2))))
    taken: dict[str, list[float]] = {precision: [] for precision in runs}
    for _ in range(repeats):
        for precision, run in runs.items():
            taken[precision].append(step_seconds(run, rows, steps[precision]))
    return {precision: statistics.median(times) * 1e3 for precision, times in taken.items()}


def best_rule(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The threshold with the least time for as many rows of each network, and what it saves."""

    def total(threshold: float) -> float:
        return sum(
            row["bfloat16_ms" if row["multiply_adds_a_value"] >= threshold else "float32_ms"]
            / row["batch_size"]
            for row in rows
        )

    candidates = [0.0, *sorted(row["multiply_adds_a_value"] for row in rows), float("inf")]
    best = min(candidates, key=total)
    float32, ideal = total(float("inf")), 0.0
    for row in rows:
        ideal += min(row["bfloat16_ms"], row["float32_ms"]) / row["batch_size"]
    return {
        "bfloat16_from": best,
        "of_the_time_in_float32": round(total(best) / float32, 3),
        "all_in_bfloat16": round(total(0.0) / float32, 3),
        "each_in_its_better_one": round(ideal / float32, 3),
        "at": {str(one): round(total(one) / float32, 3) for one in (32, 48, 64, 80, 100, 150)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/precision.json")
    options = parser.parse_args()
    configure_tensorflow(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spec = load_spec(ROOT / "studies/solubility.toml")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    data = random_rows(4096)
    rows: list[dict[str, Any]] = []
    for _ in range(options.networks):
        config = spec.space.suggest(study.ask())
        taken = measured(config, data, options.repeats)
        row = {
            "multiply_adds_a_value": round(multiply_adds_a_value(config, LENGTH), 1),
            "parameters": parameter_count(config, LENGTH),
            "batch_size": config.batch_size,
            "blocks": len(config.blocks),
            "filters": config.blocks[0].filters,
            "kernel_size": config.blocks[0].kernel_size,
            "normalization": config.blocks[0].normalization,
            "activation": config.blocks[0].activation,
            **{f"{precision}_ms": round(ms, 3) for precision, ms in taken.items()},
            "gain": round(taken["float32"] / taken["bfloat16"], 2),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    rule = best_rule(rows)
    print(json.dumps(rule))
    document = {
        "command": f"benchmarks/precision.py --networks {options.networks}",
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": processor(),
        "tensorflow": tf.__version__,
        "rule": rule,
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
