"""Best validation loss against the clock: ours beside the searches a user would otherwise write.

    locks/install cpu compare       # KerasTuner, Ray Tune, optuna-integration
    TUNER_DATA_DIR=../shared/data .venv/bin/python benchmarks/time_to_quality.py --seeds 0 1

15 minutes each on both cores, one after the other, seed by seed; 75 minutes a seed. Each run is
added to benchmarks/results/time_to_quality.json as it ends, and what stands there is not run again
unless with another patience: a call that was cut is simply repeated. Same rows, same split (seed
1), the same space, patience and number of epochs, see peer_search.py. Time counts from the start of
the command, imports included; a loss counts when its epoch has ended, whoever's trial it is, and
has no penalties in it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from machine import processor
from peer_search import MAX_EPOCHS, PATIENCE

from tuner.data.prepare import prepare
from tuner.search.attributes import curve_of
from tuner.search.record import versions
from tuner.search.study import load
from tuner.spec.reader import spec_from_document
from tuner.spec.spec import StudySpec
from tuner.storage.storage import Storage

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/time_to_quality.json"
WHO = ("tuner", "median", "hyperband", "kerastuner", "ray")
_LEAVE_SECONDS = 30.0


def study_of(seed: int) -> StudySpec:
    """The space of `peer_search.suggest`, with the defaults of a study file for the rest."""
    of_each_block = {
        "normalization": {"choices": ["none", "batch"]},
        "conv_dropout": {"low": 0.0, "high": 0.3},
        "conv_l2": {"low": 1e-6, "high": 1e-2, "log": True},
    }
    document = {
        "name": "quality",
        "trials": 100_000,  # the time ends it
        "seed": seed,
        "data": {"source": "solubility", "split": {"seed": 1}},
        "training": {"patience": PATIENCE, "max_epochs": MAX_EPOCHS},
        "hyperband": {"min_epochs": 1, "eta": 3},
        "space": {
            "masking": False,  # Keras' convolutions drop the mask
            "embedding_dim": {"choices": [8, 16, 32]},
            "blocks": {"low": 1, "high": 3},
            "kernel_size": {"low": 3, "high": 11, "step": 2},
            "filters": {"choices": [16, 32, 64]},
            "activation": "relu",
            "pool_size": {"low": 2, "high": 4},
            "head": {"choices": ["global_max", "global_average"]},
            "dense_layers": 1,
            "units": {"choices": [32, 64, 128]},
            "dense1": {
                "dense_dropout": {"low": 0.05, "high": 0.35},
                "dense_l2": {"low": 1e-6, "high": 1e-2, "log": True},
            },
            "output": {"dense_dropout": 0.0},
            "learning_rate": {"low": 3e-4, "high": 5e-3, "log": True},
            "batch_size": {"choices": [32, 64, 128]},
            "block1": {"pool_size": 4, **of_each_block},
            "block2": of_each_block,
            "block3": of_each_block,
        },
    }
    return spec_from_document(document)


Epoch = tuple[float, float]  # (seconds after the start, validation loss)


def of_tuner(seed: int, seconds: float, folder: Path) -> tuple[list[Epoch], int]:
    spec = study_of(seed)
    (folder / "study.json").write_text(json.dumps(spec.to_document()))
    url = f"sqlite:///{folder}/tuner.db"
    command = [
        sys.executable, "-m", "tuner", "launch", str(folder / "study.json"),
        "--timeout", str(seconds), "--storage", url, "--artifacts", str(folder / "artifacts"),
    ]  # fmt: skip
    began = time.time()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    epochs = []
    with Storage(url) as storage:
        trials = load(storage, spec.name, artifacts_root=folder / "artifacts").trials()
    for trial in trials:
        # The last epoch's end is the trial's, or a moment before.
        if trial.datetime_complete is not None:
            at = trial.datetime_complete.timestamp() - began
            for epoch in reversed(curve_of(trial)):
                epochs.append((at, epoch.validation_loss))
                at -= epoch.seconds
    return epochs, len(trials)


def of_peer(who: str, seed: int, seconds: float, folder: Path) -> tuple[list[Epoch], int]:
    spec = study_of(seed)
    rows = prepare(spec.data, folder=ROOT, artifacts=ROOT / "runs/artifacts").development_file
    log = folder / "log.jsonl"
    command = [
        sys.executable, str(ROOT / "benchmarks/peer_search.py"), who, "--rows", str(rows),
        "--folder", str(folder), "--log", str(log), "--seconds", str(seconds), "--seed", str(seed),
    ]  # fmt: skip
    began = time.time()
    running = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        running.communicate(timeout=seconds + _LEAVE_SECONDS)
    except subprocess.TimeoutExpired:  # KerasTuner knows no limit of time
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not lines:
        raise SystemExit(f"{who} trained nothing")
    epochs = [(line["at"] - began, line["loss"]) for line in lines]
    return epochs, len({line["trial"] for line in lines})


def best_so_far(epochs: list[Epoch], seconds: float) -> list[list[float]]:
    """The steps of the best loss: [seconds, loss]."""
    steps: list[list[float]] = []
    for at, loss in sorted(epochs):
        if at <= seconds and (not steps or loss < steps[-1][1]):
            steps.append([round(at, 1), round(loss, 4)])
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--who", nargs="+", default=list(WHO), choices=WHO)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seconds = 60 * options.minutes
    runs: list[dict[str, Any]] = []
    if options.output.exists():
        runs = json.loads(options.output.read_text())["runs"]
    for seed in options.seeds:
        for who in options.who:
            asked = {
                "who": who,
                "seed": seed,
                "minutes": options.minutes,
                "machine": processor(),
                "patience": PATIENCE,
            }
            if any(asked.items() <= run.items() for run in runs):
                continue
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
                folder = Path(name)
                if who == "tuner":
                    epochs, trials = of_tuner(seed, seconds, folder)
                else:
                    epochs, trials = of_peer(who, seed, seconds, folder)
            run = asked | {
                "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "versions": versions(),
                "trials": trials,
                "epochs": sum(at <= seconds for at, _ in epochs),
                "best_so_far": best_so_far(epochs, seconds),
            }
            runs = [one for one in runs if (one["who"], one["seed"]) != (who, seed)] + [run]
            told = {key: run[key] for key in ("who", "seed", "trials", "epochs")}
            print(json.dumps(told | {"best": run["best_so_far"][-1]}), flush=True)
            options.output.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
