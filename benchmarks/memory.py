"""Resident memory of a training process over many trials of varied networks.

    .venv/bin/python benchmarks/memory.py                # 300 trials, about 10 minutes

`tuner launch` with one worker, random configurations of studies/solubility.toml, one epoch of 600
generated sequences each, so that networks change often. Read after each trial. The first trials
fill caches (TensorFlow's kernels, malloc's free lists, the largest network); growth is what comes
after trial 100: the slope of a line through the readings, and the rise of the mean from the trials
101-200 to 201-300.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
from machine import processor

from tuner.search.attributes import WORKER_KEY
from tuner.search.record import versions
from tuner.search.study import load
from tuner.search.tuned_study import FINISHED
from tuner.spec.reader import load_spec
from tuner.storage.storage import Storage

ROOT = Path(__file__).resolve().parent.parent
ROWS = 600


def write_rows(path: Path) -> None:
    rng = np.random.default_rng(0)
    residues = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    rows = [
        f"{''.join(rng.choice(residues, rng.integers(19, 200)))},{number % 2}"
        for number in range(ROWS)
    ]
    path.write_text("\n".join(["sequence,label", *rows]) + "\n")


def study_document(rows: Path, trials: int) -> dict[str, Any]:
    document = load_spec(ROOT / "studies/solubility.toml").to_document()
    del document["hyperband"], document["known"]
    document |= {"name": "memory", "trials": trials, "sampler": {"kind": "random"}}
    document["data"] = {"source": str(rows), "split": {"seed": 1}}
    document["training"] |= {"max_epochs": 1, "patience": 1}
    return document


def readings(folder: Path, trials: int) -> list[dict[str, float]]:
    """The worker's memory, MB, as each trial was found to have ended."""
    study = folder / "study.json"
    write_rows(folder / "rows.csv")
    study.write_text(json.dumps(study_document(folder / "rows.csv", trials)))
    url = f"sqlite:///{folder}/tuner.db"
    command = [
        sys.executable, "-m", "tuner", "launch", str(study), "--workers", "1",
        "--storage", url, "--artifacts", str(folder / "artifacts"),
    ]  # fmt: skip
    launch = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    found: list[dict[str, float]] = []
    while launch.poll() is None:
        time.sleep(0.25)
        try:
            with Storage(url) as storage:
                done = load(storage, "memory", artifacts_root=folder / "artifacts").trials(
                    *FINISHED
                )
        except Exception:  # noqa: BLE001 - there is no study yet
            continue
        if not done or (found and found[-1]["trials"] == len(done)):
            continue
        process = psutil.Process(int(done[-1].user_attrs[WORKER_KEY].rpartition(" ")[2]))
        try:
            resident = process.memory_info().rss / 1e6
        except psutil.NoSuchProcess:  # the last trial ended, and its worker with it
            break
        found.append({"trials": len(done), "resident_mb": round(resident, 1)})
        if len(done) % 20 == 0:
            print(json.dumps(found[-1]), flush=True)
    if launch.wait() != 0:
        raise SystemExit(f"the launch ended with {launch.returncode}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/memory.json")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        found = readings(Path(folder), options.trials)
    late = [one for one in found if one["trials"] > options.trials / 3]
    slope = np.polyfit([one["trials"] for one in late], [one["resident_mb"] for one in late], 1)[0]
    thirds = [
        [one["resident_mb"] for one in found if low < 3 * one["trials"] / options.trials <= low + 1]
        for low in range(3)
    ]
    document = {
        "command": f"benchmarks/memory.py --trials {options.trials}",
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": processor(),
        "versions": versions(),
        "mean_mb_by_thirds": [round(float(np.mean(third)), 1) for third in thirds],
        "most_mb": max(one["resident_mb"] for one in found),
        "mb_a_trial_after_the_first_third": round(float(slope), 3),
        "readings": found[:: max(1, len(found) // 60)],
    }
    print(json.dumps({key: document[key] for key in list(document)[4:7]}))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
