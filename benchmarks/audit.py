"""Time and memory of `tuner data audit`: the real data, 200,000 sequences, variants of one protein.

    TUNER_DATA_DIR=../shared/data .venv/bin/python benchmarks/audit.py       # 10 minutes

The 200,000 sequences are made up: lengths and residues as in the synthetic set, a third of them
with a tag of 20 residues, a tenth in families of ten that differ at up to a third of their places.
The 30,000 variants of one protein differ from it at up to five places: each is near to each, so a
sample of them is compared.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from machine import processor

from tuner.data.rows import RESIDUES
from tuner.data.synthetic import synthetic_sequences

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/audit.json"
TAG = "MGSSHHHHHHSSGLVPRGSH"
MANY, VARIANTS = 200_000, 30_000
LETTERS = np.frombuffer(RESIDUES.encode(), dtype=np.uint8)


def mutated(
    sequence: npt.NDArray[np.uint8], places: int, draw: np.random.Generator
) -> npt.NDArray[np.uint8]:
    found = sequence.copy()
    found[draw.choice(len(found), places, replace=False)] = draw.choice(LETTERS, places)
    return found


def many() -> list[str]:
    draw = np.random.default_rng(0)
    made, _ = synthetic_sequences()
    lengths = draw.choice([len(one) for one in made], MANY)
    pool = np.frombuffer("".join(made).encode(), dtype=np.uint8)
    sequences: list[str] = []
    while len(sequences) < MANY:
        one = draw.choice(pool, min(int(lengths[len(sequences)]), 180))
        family = [one]
        if len(sequences) % 100 == 0:  # a tenth of the rows, once each family has its ten
            family += [mutated(one, int(draw.integers(len(one) // 3)), draw) for _ in range(9)]
        tag = TAG * (draw.random() < 1 / 3)
        sequences += [tag + member.tobytes().decode() for member in family]
    return sequences[:MANY]


def variants() -> list[str]:
    draw = np.random.default_rng(0)
    founder = draw.choice(LETTERS, 180)
    found: set[str] = set()
    while len(found) < VARIANTS:
        found.add(mutated(founder, int(draw.integers(1, 6)), draw).tobytes().decode())
    return sorted(found)


def study_file(folder: Path, name: str, sequences: list[str]) -> Path:
    labels = np.random.default_rng(1).integers(0, 2, len(sequences)).tolist()
    rows = dict(zip(sequences, labels, strict=True))
    lines = ["sequence,label", *(f"{sequence},{label}" for sequence, label in rows.items())]
    (folder / f"{name}.csv").write_text("\n".join(lines))
    path = folder / f"{name}.toml"
    text = f'name = "{name}"\ntrials = 3\n[data]\nsource = "{name}.csv"\n[space]\nblocks = 1\n'
    path.write_text(text)
    return path


def peak_megabytes(process: psutil.Popen, ended: threading.Event) -> list[float]:
    found = [0.0]

    def watch() -> None:
        while not ended.wait(0.05):
            try:
                found[0] = max(found[0], process.memory_info().rss / 1e6)
            except psutil.NoSuchProcess:
                return

    threading.Thread(target=watch, daemon=True).start()
    return found


def audited(path: Path, artifacts: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tuner", "data", "audit", str(path), "--json"]
    began, ended = time.monotonic(), threading.Event()
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    process = psutil.Popen(
        [*command, "--artifacts", str(artifacts)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    peak = peak_megabytes(process, ended)
    output, _ = process.communicate()
    ended.set()
    if process.returncode:
        raise SystemExit(f"{path}: the audit ended with {process.returncode}")
    seconds = time.monotonic() - began
    found = json.loads(output)
    twins = found["near_twins"]
    return {
        "study": found["study"],
        "rows": twins["rows"],
        "rows_compared": twins["rows_compared"],
        "seconds": round(seconds, 1),
        "processor_seconds": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used, 1),
        "peak_megabytes": round(peak[0]),
        "development_pairs": twins["development_pairs"],
        "opposite_labels": twins["opposite_labels"],
        "rows_with_twin_in_training": twins["rows_with_twin_in_training"],
        "shortcuts": {one["name"]: round(one["accuracy"], 4) for one in found["shortcuts"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["real", "many", "variants"])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = {
            "real": lambda: ROOT / "studies/quickstart.toml",
            "many": lambda: study_file(folder, "many", many()),
            "variants": lambda: study_file(folder, "variants", variants()),
        }
        for name, make in made.items():
            if options.only in (None, name):
                rows.append(audited(make(), folder / "artifacts"))
                print(json.dumps(rows[-1]), flush=True)
    if options.only is None:
        document = {
            "command": "benchmarks/audit.py",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": processor(),
            "rows": rows,
        }
        RESULTS.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
