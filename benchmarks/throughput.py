"""Epochs a second on the whole machine: `tuner launch` beside the plain script, in one run.

    locks/install cpu compare       # optuna-integration
    TUNER_DATA_DIR=../shared/data .venv/bin/python benchmarks/throughput.py           # about 1 h
    TUNER_DATA_DIR=../shared/data .venv/bin/python benchmarks/throughput.py --cases a --repeats 1

One configuration is trained again and again, as trials of so many epochs without pruning, by 1 and
by 2 processes: three networks, and three who train them.

    tuner     `tuner launch`, a worker process for each, one thread each
    plain     benchmarks/plain_keras.py: what a user writes from the docs of Optuna and Keras
    prefetch  the same with the improvements that TensorFlow's guide to tf.data and Keras suggest

The first trial of each process is left out, since it may hold the import of TensorFlow; from its
end to the last one's end a process makes so many epochs a second, and the rates of all processes
are added up. Asking, building and tracing a network count. Runs of a case are interleaved.
`--quality` trains six seeds to the tenth epoch instead, and compares validation losses.

The share of the machine's peak is what a step's multiply-adds take at the speed of a large matrix
product in the same precision (2,048 x 2,048, one thread, the same run), as a part of the time that
the epoch took on one thread; of the tuner's runs with one process.
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

from tuner.cluster.processes import has_fast_bfloat16
from tuner.data.identity import DataIdentity
from tuner.data.prepare import prepare
from tuner.search.attributes import WORKER_KEY, curve_of
from tuner.search.record import versions
from tuner.search.study import load
from tuner.spec.architecture import ModelConfig
from tuner.spec.precision import BFLOAT16_FROM, multiply_adds, precision_by_size
from tuner.spec.reader import load_spec, spec_from_document
from tuner.spec.spec import StudySpec
from tuner.storage.storage import Storage

ROOT = Path(__file__).resolve().parent.parent
TYPICAL = {
    "masking": False,  # Keras' convolutions drop the mask
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
EPOCHS = {"a": 6, "b": 3, "c": 2}  # of a trial
PEAK = """
import json, time, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(1)
for dtype in ("float32", "bfloat16"):
    x = tf.cast(tf.random.normal((2048, 2048)), dtype)
    tf.matmul(x, x)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        tf.matmul(x, x).numpy()
        times.append(time.perf_counter() - began)
    print(json.dumps({dtype: 2048**3 / min(times) / 1e9}))
"""


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


def config_of(spec: StudySpec) -> ModelConfig:
    return spec.space.suggest(optuna.create_study().ask())


def tuner(spec: StudySpec, processes: int, folder: Path) -> list[dict[str, Any]]:
    """Trials as `tuner launch` trains them."""
    study = folder / "study.json"
    study.write_text(json.dumps(spec.to_document()))
    url = f"sqlite:///{folder}/tuner.db"
    command = [
        sys.executable, "-m", "tuner", "launch", str(study), "--workers", str(processes),
        "--storage", url, "--artifacts", str(folder / "artifacts"),
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with Storage(url) as storage:
        trials = load(storage, spec.name, artifacts_root=folder / "artifacts").trials()
    return [
        {
            "process": trial.user_attrs[WORKER_KEY],
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
        "--config", json.dumps(dataclasses.asdict(config_of(spec))), "--rows", str(rows),
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
    return [
        {"process": number} | json.loads(line)
        for number, lines in enumerate(said)
        for line in lines.splitlines()
    ]


def measured(who: str, spec: StudySpec, processes: int, rows: Path) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if who == "tuner":
            return tuner(spec, processes, folder)
        return plain(spec, processes, folder, rows, prefetch=who == "prefetch")


def rate(trials: list[dict[str, Any]]) -> float:
    """Epochs a second of all processes, each from the end of its first trial to its last one's."""
    total = 0.0
    for process in {trial["process"] for trial in trials}:
        first, *others = sorted(
            (trial for trial in trials if trial["process"] == process),
            key=lambda trial: float(trial["ended"]),
        )
        if others:
            epochs = sum(len(trial["validation_losses"]) for trial in others)
            total += epochs / (others[-1]["ended"] - first["ended"])
    return total


def measured_peak() -> dict[str, float]:
    """Giga multiply-adds a second of a large matrix product on one thread, by precision."""
    said = subprocess.run(
        [sys.executable, "-c", PEAK], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, float] = {}
    for line in said.splitlines():
        found |= json.loads(line)
    return {precision: round(speed, 1) for precision, speed in found.items()}


def share_of_the_peak(
    spec: StudySpec, data: DataIdentity, epochs_a_second: float, peak: dict[str, float]
) -> dict[str, Any]:
    """What an epoch needs, and how much of the peak it was done with.

    A training step takes three products where inference takes one: the output, and the gradients
    towards the weights and the inputs.
    """
    config = config_of(spec)
    rows = 3 * data.training_rows + data.validation_rows
    needs = multiply_adds(config, data.max_length) * rows / 1e9
    bfloat16_from = BFLOAT16_FROM if has_fast_bfloat16() else None
    precision = precision_by_size(config, data.max_length, bfloat16_from)
    return {
        "precision": precision,
        "giga_multiply_adds_an_epoch": round(needs, 1),
        "peak_giga_multiply_adds_a_second": peak[precision],
        "share_of_the_peak": round(needs * epochs_a_second / peak[precision], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=["a", "b", "c"], choices=["a", "b", "c"])
    parser.add_argument("--who", nargs="+", default=list(WHO), choices=WHO)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--trials", type=int, default=2, help="of each run and process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quality", action="store_true", help="six seeds to the tenth epoch")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if options.quality:
        options.trials, options.processes, options.repeats = 3, [2], 1
        options.who = ["tuner", "plain"]  # prefetching changes no loss
    output = options.output or ROOT / "benchmarks/results" / (
        "throughput-quality.json" if options.quality else "throughput.json"
    )
    rows: list[dict[str, Any]] = []
    if output.exists():  # the cases that are not measured now
        before = json.loads(output.read_text())["rows"]
        rows = [row for row in before if row["case"] not in options.cases]
    command = "benchmarks/throughput.py " + " ".join(sys.argv[1:])
    peak = measured_peak()
    for case in options.cases:
        epochs = 10 if options.quality else EPOCHS[case]
        spec = spec_of(case, trials=1, epochs=epochs)
        prepared = prepare(spec.data, folder=ROOT, artifacts=ROOT / "runs/artifacts")
        runs: dict[tuple[str, int], list[float]] = {}
        losses: dict[str, list[float]] = {}
        for _ in range(options.repeats):
            for processes in options.processes:
                spec = spec_of(case, trials=options.trials * processes, epochs=epochs)
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
                "command": command,
            }
            if options.quality:
                row["mean_best_validation_loss"] = round(statistics.mean(losses[who]), 4)
                row["best_validation_losses"] = [round(loss, 4) for loss in losses[who]]
            if who == "tuner" and processes == 1:
                row |= share_of_the_peak(spec, prepared.identity, row["epochs_a_second"], peak)
            rows.append(row)
            print(json.dumps(row), flush=True)
        document = {
            "command": command,
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": processor(),
            "versions": versions(),
            "epochs_a_trial": 10 if options.quality else EPOCHS,
            "rows": rows,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
