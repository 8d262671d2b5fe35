"""A storm: `kill -9` of workers at random moments, over a study of short real trials.

    .venv/bin/python benchmarks/storm.py               # 100 kills, 200 trials, 4 workers
    .venv/bin/python benchmarks/storm.py --kills 5 --trials 12 --workers 2

It starts a PostgreSQL of its own and the real command line. Each kill has its place in the study:
a number of finished trials, drawn at random, and a random moment after it. At the end it checks
that the budget is finished, that nothing was lost or doubled, and trains resumed trials again,
undisturbed: their curves must be equal bit for bit. Everything it knows stands in DIR/storm.json,
written anew after each kill.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from postgres import postgres_server  # noqa: E402 - it is beside the tests

from tuner.data.development import load_development  # noqa: E402
from tuner.data.synthetic import synthetic_sequences  # noqa: E402
from tuner.search.attributes import ENDED_KEY, RESUMED_KEY, curve_of  # noqa: E402
from tuner.search.study import load  # noqa: E402
from tuner.search.tuned_study import FINISHED, TunedStudy  # noqa: E402
from tuner.storage.storage import Storage  # noqa: E402
from tuner.train import TrainingJob  # noqa: E402

STUDY = """name = "storm"
trials = {trials}
seed = 7
[data]
source = "storm.csv"
[training]
max_epochs = {epochs}
patience = {epochs}
[hyperband]
[space]
embedding_dim = 8
blocks = {{ low = 1, high = 2 }}
filters = {{ choices = [8, 16] }}
conv_dropout = {{ low = 0.0, high = 0.3 }}
units = 16
dense_layers = 1
learning_rate = {{ low = 1e-3, high = 1e-2, log = true }}
optimizer = {{ choices = ["adam", "sgd", "rmsprop"] }}
batch_size = {{ choices = [16, 32] }}
"""
LONGEST_DELAY_SECONDS = 4.0  # between a kill's place in the study and the kill
LEAST_PAUSE_SECONDS = 1.0  # between two kills: some hit a worker that is just starting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=27)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--again", type=int, default=20, help="resumed trials to train again")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--folder", type=Path, default=Path("runs/storm"))
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_study(folder, options)
    drawn = {key: value for key, value in vars(options).items() if key != "folder"}
    log: dict[str, Any] = {"options": drawn, "kills": []}
    with postgres_server() as server:
        url = server.database()
        began = time.monotonic()
        with (folder / "launch.log").open("w") as output:
            launch = start(folder, url, options.workers, output)
            try:
                for kill in storm(launch, url, options):
                    log["kills"].append(kill)
                    save(folder, log)
                log["exit"] = launch.wait()
            finally:
                launch.kill()
                launch.wait()
        log["seconds"] = round(time.monotonic() - began, 1)
        log["left_behind"] = left_behind(folder)
        log["told"] = (folder / "launch.log").read_text().count("it resumes under its number")
        with Storage(url) as storage:
            tuned = load(storage, "storm", artifacts_root=folder / "artifacts")
            log |= count(tuned)
            save(folder, log)
            log["again"] = train_again(tuned, folder, options.again)
    log["passed"] = passed(log, options)
    save(folder, log)
    print(summary(log))
    sys.exit(0 if log["passed"] else 1)


def write_study(folder: Path, options: argparse.Namespace) -> None:
    sequences, labels = synthetic_sequences()
    with (folder / "storm.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sequence", "label"])
        writer.writerows(list(zip(sequences, labels, strict=True))[: options.rows])
    study = STUDY.format(trials=options.trials, epochs=options.epochs)
    (folder / "storm.toml").write_text(study)


def start(folder: Path, url: str, workers: int, output: Any) -> subprocess.Popen[bytes]:
    # The URL has a password: it travels in the environment, as users are told to do it.
    environment = {"PYTHONPATH": str(ROOT), "TUNER_STORAGE": url}
    return subprocess.Popen(
        [sys.executable, "-m", "tuner", "launch", "storm.toml", "--workers", str(workers),
         "--artifacts", "artifacts"],
        cwd=folder, env=os.environ | environment, stdout=output, stderr=output,
        start_new_session=True,
    )  # fmt: skip


def storm(
    launch: subprocess.Popen[bytes], url: str, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Kills workers; yields what is known of each kill."""
    chance = random.Random(options.seed)
    # Not among the last trials: a kill that comes late needs somebody to hit.
    places = sorted(chance.uniform(0, 0.9 * options.trials) for _ in range(options.kills))
    began = time.monotonic()
    for number, place in enumerate(places, 1):
        while finished(url) < int(place):
            if launch.poll() is not None:
                return
            time.sleep(0.5)
        time.sleep(LEAST_PAUSE_SECONDS + chance.uniform(0, LONGEST_DELAY_SECONDS))
        workers = worker_processes(launch)
        while not workers and launch.poll() is None:
            time.sleep(0.2)
            workers = worker_processes(launch)
        if not workers:
            return
        victim = chance.choice(workers)
        age = time.time() - victim.create_time()
        done = finished(url)
        victim.kill()
        kill = {
            "kill": number,
            "seconds": round(time.monotonic() - began, 1),
            "finished_trials": done,
            "worker_age_seconds": round(age, 1),
            "checkpoints": checkpoints(options.folder),
        }
        print(
            f"kill {number}/{options.kills} after {kill['seconds']} s: {done} trials finished",
            flush=True,
        )
        yield kill


def checkpoints(folder: Path) -> list[int]:
    """Trials that could go on from the middle, now."""
    found = folder.glob("artifacts/storm-*/checkpoints/*.npz")
    return sorted(int(path.stem) for path in found if path.stem.isdigit())


def finished(url: str) -> int:
    with psycopg.connect(url) as connection:
        try:
            row = connection.execute(
                "SELECT count(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED')"
            ).fetchone()
        except psycopg.errors.UndefinedTable:  # the launch has not made it yet
            return 0
    return 0 if row is None else int(row[0])


def worker_processes(launch: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that train, below the launch that this program started."""
    found = []
    try:
        for process in psutil.Process(launch.pid).children(recursive=True):
            line = " ".join(process.cmdline())
            if "spawn_main" in line and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    except psutil.NoSuchProcess:
        return []
    return sorted(found, key=lambda process: process.pid)


def left_behind(folder: Path) -> list[str]:
    """Processes that still run in the study's folder."""
    time.sleep(5)
    return [
        " ".join(process.info["cmdline"] or ())
        for process in psutil.process_iter(["cwd", "cmdline"])
        if process.info["cwd"] == str(folder.resolve()) and process.pid != os.getpid()
    ]


def count(tuned: TunedStudy) -> dict[str, Any]:
    trials = tuned.trials()
    tells = [one.trial for one in tuned.storage.decisions.of(tuned.id) if one.kind == "tell"]
    gaps = []
    for trial in trials:
        epochs = list(range(1, (trial.last_step or 0) + 1))
        whole = [epoch.epoch for epoch in curve_of(trial)] == epochs
        if not epochs or not whole or sorted(trial.intermediate_values) != epochs:
            gaps.append(trial.number)
    return {
        "trials": len(trials),
        "states": {
            name: sum(trial.state.name == name for trial in trials)
            for name in sorted({trial.state.name for trial in trials})
        },
        "finished": sum(trial.state in FINISHED for trial in trials),
        "lost": [n for n in range(tuned.budget) if n not in {trial.number for trial in trials}],
        "doubled": sorted({n for n in tells if tells.count(n) > 1}),
        "broken_curves": gaps,
        "given_up": [t.number for t in trials if t.user_attrs.get(ENDED_KEY) == "worker_lost"],
        "resumed": {
            trial.number: trial.user_attrs[RESUMED_KEY]
            for trial in trials
            if trial.user_attrs.get(RESUMED_KEY)
        },
        "checkpoints_left": len(list(tuned.artifacts.folder.glob("checkpoints/*"))),
    }


def train_again(tuned: TunedStudy, folder: Path, most: int) -> dict[str, Any]:
    """Trains resumed trials from their beginning, in this process, and compares the curves."""
    from tuner.artifacts import development_path
    from tuner.network.fold_runs import LocalTraining
    from tuner.network.training import configure_tensorflow

    configure_tensorflow(1)
    record = tuned.record
    file = development_path(folder / "artifacts", record.development_sha256)
    train = LocalTraining(load_development(file, record.development_sha256))
    resumed = [trial for trial in tuned.trials() if trial.user_attrs.get(RESUMED_KEY)]
    # The longest curves first: the more epochs, the more there is to go wrong.
    resumed.sort(key=lambda trial: (-(trial.last_step or 0), trial.number))
    different, epochs = [], 0
    for trial in resumed[:most]:
        config = record.spec.space.resolve(trial.params)
        curve = curve_of(trial)
        job = TrainingJob(
            config=config,
            trial=trial.number,
            seed=record.spec.seed,
            precision=tuned.precision_of(config),
            rungs=(),
            settings=record.spec.training,
        )
        again = train(job)
        for before, now in zip(curve, again, strict=False):
            epochs += 1
            if without_time(before) != without_time(now):
                different.append({"trial": trial.number, "epoch": before.epoch})
                break
        again.close()
        print(f"trial {trial.number} again: {len(curve)} epochs", flush=True)
    return {
        "trials": [trial.number for trial in resumed[:most]],
        "epochs": epochs,
        "different": different,
    }


def without_time(epoch: Any) -> tuple[Any, ...]:
    return dataclasses.astuple(dataclasses.replace(epoch, seconds=0.0))


def passed(log: dict[str, Any], options: argparse.Namespace) -> bool:
    nothing = ("lost", "doubled", "broken_curves", "given_up", "left_behind")
    return (
        log["exit"] == 0
        and len(log["kills"]) == options.kills
        and log["trials"] == log["finished"] == options.trials
        and not any(log[key] for key in nothing)
        and log["checkpoints_left"] == 0
        and bool(log["again"]["trials"])
        and not log["again"]["different"]
    )


def summary(log: dict[str, Any]) -> str:
    again = log["again"]
    with_checkpoint = sum(bool(kill["checkpoints"]) for kill in log["kills"])
    ends = "PASSED" if log["passed"] else "FAILED"
    sizes = {key: len(log[key]) for key in ("lost", "doubled", "broken_curves", "given_up")}
    return f"""{ends} in {log["seconds"]:.0f} s
{len(log["kills"])} workers killed, {with_checkpoint} of them while a checkpoint stood by;
the user was told {log["told"]} times that a trial goes on
{log["finished"]} of {log["trials"]} trials finished ({log["states"]}); {sizes}
{len(log["resumed"])} trials resumed, {sum(log["resumed"].values())} times in all
{len(again["trials"])} of them trained again, undisturbed: {again["epochs"]} epochs,
{len(again["different"])} curves differ
{len(log["left_behind"])} processes and {log["checkpoints_left"]} checkpoints left"""


def save(folder: Path, log: dict[str, Any]) -> None:
    beside = folder / ".storm.json.new"
    beside.write_text(json.dumps(log, indent=2, default=str))
    os.replace(beside, folder / "storm.json")


if __name__ == "__main__":
    main()
