"""How a study scales with its workers: real trials on 1 and 2, sleeping ones on 1 to 64.

    .venv/bin/python benchmarks/scaling.py             # about 15 minutes
    .venv/bin/python benchmarks/scaling.py --real 0 --workers 1 4 16

Real: the same study (random sampler, so the same configurations) on one worker process and on
two, with one thread each; its efficiency is what two workers do an hour, over twice what one
does. Sleeping: worker processes of a LocalCluster whose epochs are a sleep; a trial is 9 epochs
and Hyperband prunes. The ideal is the seconds slept divided by the workers; the efficiency is the
ideal over what it took, from the first trial's start to the last one's end. Everything a trial
needs is in it: ask, orders and events over Dask, reports, verdicts, tell.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import optuna  # noqa: E402
from fakes import FakeRun, Notes, make_study, small_spec  # noqa: E402

from tuner.cluster.connection import local_connection  # noqa: E402
from tuner.cluster.trainings import Cluster  # noqa: E402
from tuner.coordination.coordinator import Coordinator  # noqa: E402
from tuner.coordination.study_trainings import StudyTrainings  # noqa: E402
from tuner.search.attributes import curve_of  # noqa: E402


def sleeping(workers: int, epoch_ms: int) -> dict[str, object]:
    """One study of four trials for each worker, whose epochs sleep."""
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"  # the workers import fakes
    with tempfile.TemporaryDirectory() as folder:
        spec = small_spec(trials=4 * workers + 4, seed=epoch_ms, hyperband=None)
        tuned = make_study(Path(folder), spec)
        times: list[float] = []
        notes = Notes(lambda trial, result: times.append(time.monotonic()))
        with local_connection(workers, say=print) as connection:
            wait_for(lambda: connection.slots() == workers)
            with Cluster(
                connection,
                StudyTrainings(tuned),
                development_file=Path("none"),
                threads=1,
                open_run=FakeRun,
            ) as cluster:
                began = time.monotonic()
                Coordinator(tuned, cluster, notes).run()
                took = time.monotonic() - began
        epochs = sum(trial.last_step or 0 for trial in tuned.trials())
        tuned.storage.close()
    # The last round is not full: a perfect machine needs this many rounds of nine epochs.
    rounds = -(-(4 * workers + 4) // workers)
    ideal = rounds * 9 * epoch_ms / 1000
    return {
        "kind": "sleeping",
        "workers": workers,
        "trials": 4 * workers + 4,
        "epochs": epochs,
        "epoch_ms": epoch_ms,
        "seconds": round(took, 2),
        "ideal_seconds": round(ideal, 2),
        "efficiency": round(ideal / took, 3),
    }


def wait_for(condition) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the workers did not come up within 300 s")
        time.sleep(0.2)


def real(workers: int, trials: int) -> dict[str, object]:
    """The quickstart's networks through the command line, on synthetic data."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "tuner", "launch", str(ROOT / "studies/quickstart.toml"),
            "--workers", str(workers), "--trials", str(trials), "--json",
            "--set", "data.source=synthetic", "--set", "sampler.kind=random",
            "--storage", f"sqlite:///{folder}/tuner.db", "--artifacts", f"{folder}/artifacts",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        document = json.loads(done.stdout)
        # From the first trial's start to the last one's end: the start of the workers, with
        # TensorFlow's import, happens once a launch.
        storage = optuna.storages.RDBStorage(f"sqlite:///{folder}/tuner.db")
        found = optuna.load_study(study_name=document["study"], storage=storage).trials
        training = sum(epoch.seconds for trial in found for epoch in curve_of(trial))
        began = min(trial.datetime_start for trial in found)
        ended = max(trial.datetime_complete for trial in found)
        storage.remove_session()
        storage.engine.dispose()
    seconds = (ended - began).total_seconds()
    return {
        "kind": "real",
        "workers": workers,
        "trials": trials,
        "epochs": document["epochs"]["spent"],
        "seconds": round(seconds, 1),
        "epochs_a_second": round(document["epochs"]["spent"] / seconds, 3),
        "seconds_training": round(training, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--epoch-ms", type=int, default=500)
    parser.add_argument("--real", type=int, default=24, metavar="TRIALS")
    parser.add_argument("--repeats", type=int, default=2, help="of the real ones, interleaved")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/scaling.json")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = []
    if options.real:
        for _ in range(options.repeats):
            for workers in (1, 2):
                rows.append(real(workers, options.real))
                print(json.dumps(rows[-1]), flush=True)
        rate = {
            workers: sorted(row["epochs_a_second"] for row in rows if row["workers"] == workers)
            for workers in (1, 2)
        }
        middle = {workers: rates[len(rates) // 2] for workers, rates in rate.items()}
        rows.append({"kind": "real", "efficiency_of_2": round(middle[2] / 2 / middle[1], 3)})
        print(json.dumps(rows[-1]), flush=True)
    for workers in options.workers:
        rows.append(sleeping(workers, options.epoch_ms))
        print(json.dumps(rows[-1]), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
