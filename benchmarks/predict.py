"""How fast `tuner predict` is beside `keras.Model.predict`, and how its memory grows.

    .venv/bin/python benchmarks/predict.py BUNDLE                      # 100,000 sequences, a minute
    .venv/bin/python benchmarks/predict.py BUNDLE --sequences 1000000

The sequences are random, with the lengths of the synthetic data set. All are measured in one run:
Keras over rows in memory, the networks of the bundle over the same rows, and the whole way from a
FASTA file to a CSV file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from machine import processor

from tuner.data.rows import RESIDUES, encode
from tuner.data.sequences import read_sequences
from tuner.data.synthetic import synthetic_sequences
from tuner.results.bundle import MODEL_FILE, read_bundle
from tuner.results.prediction import predict_records, writer_of

PART = 100_000  # sequences in memory at once


def random_sequences(count: int, max_length: int, seed: int) -> list[str]:
    """Sequences with the lengths of the synthetic data set."""
    lengths = np.array([len(sequence) for sequence in synthetic_sequences()[0]])
    generator = np.random.default_rng(seed)
    letters = np.frombuffer(RESIDUES.encode(), np.uint8)
    chosen = np.minimum(generator.choice(lengths, count), max_length)
    return [generator.choice(letters, length).tobytes().decode() for length in chosen]


def megabytes() -> float:
    return psutil.Process().memory_info().rss / 1e6


def measure(folder: Path, bundle_folder: Path, count: int) -> dict[str, Any]:
    bundle = read_bundle(bundle_folder)
    fasta, output = folder / "in.fasta", folder / "out.csv"
    with fasta.open("w") as file:
        for start in range(0, count, PART):
            part = random_sequences(min(PART, count - start), bundle.max_length, start)
            file.writelines(f">s{start + at}\n{one}\n" for at, one in enumerate(part))
    tokens = encode(random_sequences(min(PART, count), bundle.max_length, 0), bundle.max_length)

    import keras

    model = keras.saving.load_model(bundle_folder / MODEL_FILE)
    model.predict(tokens[:512], verbose=0)
    bundle.predict_tokens(tokens[:8_192])
    seconds: dict[str, list[float]] = {"keras": [], "networks": []}
    for _ in range(3):
        began = time.perf_counter()
        model.predict(tokens, batch_size=512, verbose=0)
        seconds["keras"].append(time.perf_counter() - began)
        began = time.perf_counter()
        bundle.predict_tokens(tokens)
        seconds["networks"].append(time.perf_counter() - began)
    keras_rate, network_rate = (len(tokens) / min(each) for each in seconds.values())

    memory = [megabytes()]
    began = time.perf_counter()
    with output.open("w") as stream:
        write = writer_of("csv", stream)
        for at, prediction in enumerate(predict_records(bundle, read_sequences(fasta))):
            write(prediction)
            if at % 50_000 == 0:
                memory.append(megabytes())
    whole = time.perf_counter() - began
    memory.append(megabytes())
    return {
        "processor": processor(),
        "sequences": count,
        "networks": len(bundle.members),
        "a second": {
            "keras.Model.predict": round(keras_rate),
            "networks alone": round(network_rate),
            "FASTA to CSV": round(count / whole),
        },
        "FASTA to CSV / keras.Model.predict": round(count / whole / keras_rate, 3),
        "FASTA to CSV / networks alone": round(count / whole / network_rate, 3),
        "seconds": round(whole, 1),
        "MB at the start, most, at the end": [
            round(memory[0]),
            round(max(memory)),
            round(memory[-1]),
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--sequences", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.bundle, arguments.sequences)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
