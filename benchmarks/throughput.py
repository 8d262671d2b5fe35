"""Epochs a second on the whole machine: `tuner launch` beside the plain script, in one run.

    .venv/bin/python -m pip install --no-deps optuna-integration
    TUNER_DATA_DIR=../shared/data .venv/bin/python benchmarks/throughput.py           # about 1 h
    TUNER_DATA_DIR=../shared/data .venv/bin/python benchmarks/throughput.py --cases a --repeats 1

One configuration is trained again and again, as trials of so many epochs without pruning, by 1 and
by 2 processes: three networks, and three who train them.

    tuner     `tuner launch`, a worker process for each, one thread each
    plain     benchmarks/plain_keras.py: what a user writes from the docs of Optuna and Keras
    prefetch  the same with the improvements that TensorFlow's guide to tf.data and Keras suggest

The rate is that of finished epochs from the first trial's start to the last one's end: building
and tracing the network counts, importing TensorFlow once a process does not. Runs of a case are
interleaved. `--quality` trains five seeds to the tenth epoch instead, and compares validation
losses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from machine import processor

from tuner.data import prepare
from tuner.objective import curve_of
from tuner.spec import StudySpec, load_spec, spec_from_document
from tuner.storage import Storage
from tuner.study import load

ROOT = Path(__file__).resolve().parent.parent
TYPICAL = {
    "embedding_dim": 32,
    "blocks": 2,
    "kernel_size": 7,
    "filters": 64,
    "normalization": "batch",
    "pool_size": 2,
    "conv_dropout": 0.1,
    "conv_l2": 1e-5,
    "head": "global_max",
    "dense_layers": 1,
    "units": 64,
    "dense_dropout": 0.2,
    "dense_l2": 1e-5,
    "learning_rate": 1e-3,
    "batch_size": 64,
    "block1": {"pool_size": 4},
}
LARGE = TYPICAL | {
    "blocks": 3,
    "kernel_size": 9,
    "filters": 128,
    "normalization": "none",
    "units": 128,
    "batch_size": 128,
}
WHO = ("tuner", "plain", "prefetch")


def spec_of(case: str, *, trials: int, epochs: int) -> StudySpec:
    """A study of one fixed configuration on the real data, split seed 1."""
    if case == "a":
        document = load_spec(ROOT / "studies/chapter-baseline.toml").to_document()
    else:
        document = {
            "data": {"source": "solubility", "split": {"seed": 1}},
            "sampler": {"kind": "random"},
            "space": {"b": TYPICAL, "c": LARGE}[case],
        }
    document |= {"name": case, "trials": trials}
    document["training"] = {"max_epochs": epochs, "patience": epochs, "precision": "auto"}
    return spec_from_document(document)


def config_of(spec: StudySpec) -> dict[str, Any]:
    return dataclasses.asdict(spec.space.suggest(optuna.create_study().ask()))


def tuner(spec: StudySpec, processes: int, folder: Path) -> list[dict[str, Any]]:
    """Trials as `tuner launch` trains them."""
    study = folder / "study.json"
    study.write_text(json.dumps(spec.to_document()))
    url = f"sqlite:///{folder}/tuner.db"
    command = [
        sys.executable, "-m", "tuner.cli", "launch", str(study), "--workers", str(processes),
        "--storage", url, "--artifacts", str(folder / "artifacts"),
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with Storage(url) as storage:
        trials = load(storage, spec.name, artifacts_root=folder / "artifacts").trials()
    return [
        {
            "began": trial.datetime_start.timestamp(),
            "ended": trial.datetime_complete.timestamp(),
            "validation_losses": [epoch.validation_loss for epoch in curve_of(trial)],
        }
        for trial in trials
    ]


def plain(
    spec: StudySpec, processes: int, folder: Path, rows: Path, *, prefetch: bool
) -> list[dict[str, Any]]:
    """Trials as the plain script trains them, in so many processes that share a database."""
    url = f"sqlite:///{folder}/plain.db"
    optuna.create_study(study_name="plain", storage=url)
    command = [
        sys.executable, str(ROOT / "benchmarks/plain_keras.py"),
        "--config", json.dumps(config_of(spec)), "--rows", str(rows),
        "--storage", url, "--study", "plain",
        "--trials", str(spec.trials // processes), "--epochs", str(spec.training.max_epochs),
    ]  # fmt: skip
    running = [
        subprocess.Popen(
            [*command, *(["--prefetch"] if prefetch else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(processes)
    ]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"plain_keras.py ended with {[p.returncode for p in running]}")
    return [json.loads(line) for lines in said for line in lines.splitlines()]


def measured(who: str, spec: StudySpec, processes: int, rows: Path) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if who == "tuner":
            return tuner(spec, processes, folder)
        return plain(spec, processes, folder, rows, prefetch=who == "prefetch")


def rate(trials: list[dict[str, Any]]) -> float:
    """Epochs a second, from the first start to the last end."""
    seconds = max(t["ended"] for t in trials) - min(t["began"] for t in trials)
    return sum(len(trial["validation_losses"]) for trial in trials) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=["a", "b", "c"], choices=["a", "b", "c"])
    parser.add_argument("--who", nargs="+", default=list(WHO), choices=WHO)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=3, help="of each trial")
    parser.add_argument("--trials", type=int, default=2, help="of each run and process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quality", action="store_true", help="five seeds to the tenth epoch")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if options.quality:
        options.epochs, options.trials, options.processes, options.repeats = 10, 5, [1], 1
    output = options.output or ROOT / "benchmarks/results" / (
        "throughput-quality.json" if options.quality else "throughput.json"
    )
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        spec = spec_of(case, trials=1, epochs=options.epochs)
        prepared = prepare(spec.data, folder=ROOT, artifacts=ROOT / "runs/artifacts")
        runs: dict[tuple[str, int], list[float]] = {}
        losses: dict[str, list[float]] = {}
        for _ in range(options.repeats):
            for processes in options.processes:
                spec = spec_of(case, trials=options.trials * processes, epochs=options.epochs)
                for who in options.who:
                    trials = measured(who, spec, processes, prepared.development_file)
                    runs.setdefault((who, processes), []).append(rate(trials))
                    losses.setdefault(who, []).extend(min(t["validation_losses"]) for t in trials)
                    told = {"case": case, "who": who, "processes": processes}
                    print(json.dumps(told | {"epochs_a_second": rate(trials)}), flush=True)
        for (who, processes), rates in runs.items():
            row: dict[str, Any] = {
                "case": case,
                "who": who,
                "processes": processes,
                "epochs_a_second": round(statistics.median(rates), 4),
                "spread": [round(min(rates), 4), round(max(rates), 4)],
                "runs": len(rates),
            }
            if options.quality:
                row["mean_best_validation_loss"] = round(statistics.mean(losses[who]), 4)
                row["best_validation_losses"] = [round(loss, 4) for loss in losses[who]]
            rows.append(row)
            print(json.dumps(row), flush=True)
        document = {
            "command": "benchmarks/throughput.py " + " ".join(sys.argv[1:]),
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": processor(),
            "epochs_a_trial": options.epochs,
            "rows": rows,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
