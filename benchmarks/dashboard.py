"""How fast the dashboard answers, and what fifty browsers that poll it cost the training.

    python benchmarks/dashboard.py times     # 100, 2,000 and 10,000 trials, against Optuna's own
    python benchmarks/dashboard.py polls --seconds 60    # what 50 browsers take of the server
    python benchmarks/dashboard.py load      # a real study on 2 workers, with and without browsers
    python benchmarks/dashboard.py predictions    # by the networks of a small study

All write into benchmarks/results/dashboard.json. `load` takes three minutes of a machine on
which nothing else runs.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import psutil
import sqlalchemy as sa
from optuna.distributions import FloatDistribution, distribution_to_json
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from tuner.coordination import queue as orders
from tuner.search.attributes import CURVE_KEY, curve_of
from tuner.search.study import load as load_study
from tuner.storage.private_optuna import models
from tuner.storage.storage import Storage

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "dashboard.json"
TRIALS = (100, 2_000, 10_000)
PARAMETERS, EPOCHS = 10, 9
PLOTS = ("slice", "parallel_coordinate", "edf", "timeline", "contour", "rank")


def make_trials(storage: Storage, count: int) -> int:
    """A study with so many finished trials, written in bulk; its id."""
    study = optuna.create_study(study_name=f"with-{count}", storage=storage.optuna)
    began = datetime.now(UTC).replace(tzinfo=None) - timedelta(days=1)
    distribution = distribution_to_json(FloatDistribution(0, 1))
    engine = storage._rdb.engine
    with engine.begin() as connection:
        table = models.TrialModel.__table__
        first = (connection.scalar(sa.select(sa.func.max(table.c.trial_id))) or 0) + 1
        ids = range(first, first + count)
        states = [TrialState.PRUNED if n % 3 else TrialState.COMPLETE for n in range(count)]
        insert(connection, models.TrialModel, [
            {"trial_id": one, "number": n, "study_id": study._study_id, "state": states[n],
             "datetime_start": began + timedelta(seconds=n),
             "datetime_complete": began + timedelta(seconds=n + 30)}
            for n, one in enumerate(ids)])  # fmt: skip
        insert(connection, models.TrialValueModel, [
            {"trial_id": one, "objective": 0, "value": 0.6 + n % 97 / 1000,
             "value_type": models.TrialValueModel.TrialValueType.FINITE}
            for n, one in enumerate(ids) if states[n] == TrialState.COMPLETE])  # fmt: skip
        insert(connection, models.TrialParamModel, [
            {"trial_id": one, "param_name": f"p{p}", "param_value": (n * (p + 3) % 101) / 101,
             "distribution_json": distribution}
            for n, one in enumerate(ids) for p in range(PARAMETERS)])  # fmt: skip
        insert(connection, models.TrialIntermediateValueModel, [
            {"trial_id": one, "step": epoch, "intermediate_value": 0.7 - epoch / 100,
             "intermediate_value_type":
                 models.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE}
            for one in ids for epoch in range(1, EPOCHS + 1)])  # fmt: skip
        curve = [[e, 0.65, 0.6, 0.7 - e / 100, 0.6, 1.0] for e in range(1, EPOCHS + 1)]
        insert(connection, models.TrialUserAttributeModel, [
            {"trial_id": one, "key": CURVE_KEY, "value_json": json.dumps(curve)}
            for one in ids])  # fmt: skip
    return study._study_id


def insert(connection: sa.Connection, model: Any, rows: list[dict[str, Any]]) -> None:
    connection.execute(model.__table__.insert(), rows)


class Asker:
    """One browser's connection."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)

    def get(self, path: str) -> tuple[int, int, float]:
        """Status, bytes, milliseconds."""
        start = time.perf_counter()
        self.connection.request("GET", path)
        answer = self.connection.getresponse()
        size = len(answer.read())
        return answer.status, size, 1000 * (time.perf_counter() - start)


@contextmanager
def tuner(folder: Path, *arguments: str) -> Iterator[tuple[int, psutil.Process]]:
    """A `tuner` that serves a dashboard; gives its port, and its process."""
    log = folder / "tuner.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tuner", *arguments, "--port", "0"],
            cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=file, stdout=file,
        )  # fmt: skip
    try:
        while "http://127.0.0.1:" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        port = log.read_text().partition("http://127.0.0.1:")[2].partition("/")[0]
        yield int(port), psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def times(counts: list[int], plain: bool) -> dict[str, Any]:
    results = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "runs").mkdir()
            url = f"sqlite:///{folder}/runs/tuner.db"
            with Storage(url) as storage:
                study_id = make_trials(storage, count)
            with tuner(folder, "dashboard") as (port, _):
                results[str(count)] = of_one(Asker(port), study_id, count)
            if plain:
                results[str(count)]["one look at all trials, plain storage"] = uncached(
                    url, study_id
                )
        print(json.dumps({str(count): results[str(count)]}, indent=1), flush=True)
    return results


def of_one(asker: Asker, study_id: int, count: int) -> dict[str, Any]:
    detail = f"/api/studies/{study_id}"

    def timed(path: str, repeats: int = 1, pause: float = 0.0) -> dict[str, Any]:
        found = []
        for _ in range(repeats):
            time.sleep(pause)
            found.append(asker.get(path))
        print(count, path, found[-1], flush=True)
        return {"status": found[-1][0], "kB": round(found[-1][1] / 1000, 1),
                "ms": round(statistics.median(one[2] for one in found), 1)}  # fmt: skip

    calls = {
        "study, all trials, the first ever": timed(detail),
        "study, all trials, given out again": timed(detail, 5),
        "study, all trials, made anew": timed(detail, 3, 2.1),
        "poll: new trials only, given out again": timed(f"{detail}?after={count}", 5),
        "poll: new trials only, made anew": timed(f"{detail}?after={count}", 3, 2.1),
        "poll: trials read anew": timed(f"{detail}?after={count}", 2, 10.1),
        "list of studies": timed("/api/studies", 3, 2.1),
        "importances": timed(f"{detail}/param_importances"),
        "all trials as CSV": timed(f"/csv/{study_id}"),
        "page /tuner": timed("/tuner", 3, 2.1),
    }
    return calls | {f"plot {plot}": timed(f"{detail}/plot/{plot}") for plot in PLOTS}


def uncached(url: str, study_id: int) -> dict[str, Any]:
    """What one look at all trials costs with Optuna's plain storage, and with ours."""
    storage = RDBStorage(url)
    found = []
    for _ in range(2):
        start = time.perf_counter()
        storage.get_all_trials(study_id, deepcopy=False)
        found.append(1000 * (time.perf_counter() - start))
    storage.engine.dispose()
    with Storage(url) as ours:
        ours.optuna.get_all_trials(study_id, deepcopy=False)
        start = time.perf_counter()
        ours.optuna.get_all_trials(study_id, deepcopy=False)
        cached = 1000 * (time.perf_counter() - start)
    return {"ms": round(min(found), 1), "cached ms": round(cached, 2),
            "ratio": round(min(found) / cached)}  # fmt: skip


def polls(browsers: int, every: float, seconds: float) -> dict[str, Any]:
    """What so many browsers take of a server over a study of 100 trials, without training."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "runs").mkdir()
        with Storage(f"sqlite:///{folder}/runs/tuner.db") as storage:
            study_id = make_trials(storage, 100)
        with tuner(folder, "dashboard") as (port, server):
            before = cpu_seconds(server)
            answers = poll(port, study_id, browsers, every, seconds)
            spent = (cpu_seconds(server) - before) / seconds
    times_ = sorted(one[2] for one in answers)
    return {
        "browsers": browsers,
        "poll_every_seconds": every,
        "seconds": seconds,
        "requests": len(answers),
        "failed": sum(one[0] != 200 for one in answers),
        "answer_ms": {"median": round(statistics.median(times_), 1), "max": round(times_[-1], 1)},
        "cores_taken": round(spent, 4),
        "of_all_cores_percent": round(100 * spent / (os.cpu_count() or 1), 2),
        "load_average": round(os.getloadavg()[0], 1),
    }


STUDY = """
name = "load"
trials = 2
[data]
source = "solubility"
split = { seed = 1 }
[training]
max_epochs = 2000
patience = "none"
max_trial_seconds = 100000.0
[space]
batch_size = 64
learning_rate = 1e-4
"""


def load(browsers: int, every: float, seconds: float, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "load.toml").write_text(STUDY)
        with tuner(folder, "serve", "--workers", "2") as (port, service):
            run = [sys.executable, "-m", "tuner", "launch", "load.toml", "--detach"]
            subprocess.run(run, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
                           capture_output=True)  # fmt: skip
            with Storage(f"sqlite:///{folder}/runs/tuner.db") as storage:
                return measure(storage, folder, port, service, browsers, every, seconds, rounds)


def measure(
    storage: Storage,
    folder: Path,
    port: int,
    service: psutil.Process,
    browsers: int,
    every: float,
    seconds: float,
    rounds: int,
) -> dict[str, Any]:
    tuned = load_study(storage, "load", artifacts_root=folder / "runs" / "artifacts")

    def reached() -> dict[int, int]:
        """Trial number -> its last epoch."""
        trials = storage.optuna.get_all_trials(tuned.id, deepcopy=False)
        return {trial.number: trial.last_step or 0 for trial in trials}

    while sum(epoch >= 3 for epoch in reached().values()) < 2:
        time.sleep(0.2)
    windows, answers = [], []
    for polling in (False, True) * rounds:
        before, start, cpu = reached(), time.monotonic(), cpu_seconds(service)
        if polling:
            answers += poll(port, tuned.id, browsers, every, seconds)
        else:
            time.sleep(seconds)
        lasted = time.monotonic() - start
        spent = (cpu_seconds(service) - cpu) / lasted
        windows.append((polling, lasted, spent, before, reached()))
        print("with browsers" if polling else "quiet", windows[-1][1:], flush=True)
    # What each epoch took stands in the curves, which a stopped trial leaves behind.
    orders.stop(tuned)
    while storage.leases.of(tuned.id) is not None:
        time.sleep(0.2)
    took = {
        (trial.number, epoch.epoch): epoch.seconds
        for trial in storage.optuna.get_all_trials(tuned.id, deepcopy=False)
        for epoch in curve_of(trial)
    }
    quiet, loaded = [], []
    for polling, lasted, spent, before, after in windows:
        new = [took[trial, epoch] for trial in after
               for epoch in range(before[trial] + 1, after[trial] + 1)]  # fmt: skip
        (loaded if polling else quiet).append({
            "seconds": round(lasted, 1), "epochs": len(new),
            "epoch_seconds": round(statistics.mean(new), 4) if new else None,
                "service_cores": round(spent, 4),
        })  # fmt: skip

    def mean(windows: list[dict[str, Any]], of: str) -> float:
        # On a machine so busy that no epoch ended in any window, there is nothing to compare.
        known = [one[of] for one in windows if one[of] is not None]
        return statistics.mean(known) if known else float("nan")

    slower = mean(loaded, "epoch_seconds") / mean(quiet, "epoch_seconds") - 1
    # Where every core trains, what the service takes is taken from the training: this bounds the
    # slow-down also on a machine that others use.
    taken = mean(loaded, "service_cores") - mean(quiet, "service_cores")
    times_ = sorted(one[2] for one in answers)
    return {
        "browsers": browsers,
        "poll_every_seconds": every,
        "seconds_with_browsers": round(sum(one["seconds"] for one in loaded), 1),
        "requests": len(answers),
        "failed": sum(one[0] != 200 for one in answers),
        "answer_ms": {"median": round(statistics.median(times_), 1),
                      "p99": round(times_[int(0.99 * len(times_))], 1),
                      "max": round(times_[-1], 1)},
        "quiet": quiet,
        "with_browsers": loaded,
        "slower_percent": None if math.isnan(slower) else round(100 * slower, 2),
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "cores_taken_by_the_browsers": round(taken, 4),
        "of_all_cores_percent": round(100 * taken / (os.cpu_count() or 1), 2),
    }  # fmt: skip


def cpu_seconds(process: psutil.Process) -> float:
    """What a process has used so far, its workers not counted."""
    used = process.cpu_times()
    return float(used.user + used.system)


def poll(
    port: int, study_id: int, browsers: int, every: float, seconds: float
) -> list[tuple[int, int, float]]:
    """So many browsers with a study open, each asking for news again and again."""
    answers: list[tuple[int, int, float]] = []
    end = time.monotonic() + seconds

    def browse(number: int) -> None:
        time.sleep(every * number / browsers)
        asker = Asker(port)
        while time.monotonic() < end:
            try:
                answers.append(asker.get(f"/api/studies/{study_id}?after=0"))
                answers.append(asker.get("/tuner/api/studies"))
            except OSError:
                answers.append((0, 0, 0.0))
                asker = Asker(port)
            time.sleep(max(0.0, min(every, end - time.monotonic())))

    threads = [threading.Thread(target=browse, args=(number,)) for number in range(browsers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


SMALL_STUDY = """
name = "small"
trials = 3
[data]
source = "synthetic"
[training]
max_epochs = 3
[space]
filters = 32
learning_rate = { low = 1e-3, high = 1e-2, log = true }
"""
SEQUENCES = 1_000  # the most that are predicted at once


def predictions() -> dict[str, Any]:
    """Seconds and memory of predictions, and what a page waits while TensorFlow is imported."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "small.toml").write_text(SMALL_STUDY)
        launch = [sys.executable, "-m", "tuner", "launch", "small.toml", "--workers", "1"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run(launch, cwd=folder, env=environment, capture_output=True, check=True)
        with tuner(folder, "dashboard") as (port, server):
            page = Asker(port)
            before = statistics.median(page.get("/tuner")[2] for _ in range(20))
            first, meanwhile = while_asking(lambda: page.get("/tuner")[2], lambda: ask(port, 1))
            one = [ask(port, 1) for _ in range(20)]
            most = [ask(port, SEQUENCES) for _ in range(5)]
            children = [child.memory_info().rss for child in server.children()]
            return {
                "first prediction, s": round(first, 1),
                "one sequence, ms": round(1000 * statistics.median(one)),
                f"{SEQUENCES} sequences of 200 residues, ms": round(1000 * statistics.median(most)),
                "memory of the process that predicts, MB": round(max(children) / 1e6),
                "memory of the server, MB": round(server.memory_info().rss / 1e6),
                "page /tuner before, median ms": round(before, 1),
                "page /tuner during the first prediction, median ms": round(
                    statistics.median(meanwhile), 1
                ),
                "page /tuner during the first prediction, longest ms": round(max(meanwhile), 1),
            }


def ask(port: int, sequences: int) -> float:
    """Seconds that a prediction takes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    letters = ("ACDEFGHIKLMNPQRSTVWY" * 11)[:220]
    fasta = "".join(f">p{n}\n{letters[n % 20 : n % 20 + 200]}\n" for n in range(sequences))
    body = json.dumps({"study": "small", "fasta": fasta})
    start = time.perf_counter()
    connection.request("POST", "/tuner/api/predict", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    document = json.load(answer)
    assert answer.status == 200, document
    assert document["counts"]["records"] == sequences
    return time.perf_counter() - start


def while_asking(look: Callable[[], float], wait: Callable[[], float]) -> tuple[float, list[float]]:
    """What `wait` returns, and what `look` returned every 0.1 s meanwhile."""
    found: list[float] = []
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(wait)
        while not waiting.done():
            found.append(look())
            time.sleep(0.1)
        return waiting.result(), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("times", "polls", "load", "predictions"))
    parser.add_argument("--browsers", type=int, default=50)
    parser.add_argument("--every", type=float, default=10.0, help="seconds; Optuna's default")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a window")
    parser.add_argument("--rounds", type=int, default=3, help="windows of each kind")
    parser.add_argument("--trials", type=int, nargs="+", default=list(TRIALS))
    parser.add_argument("--cached-only", action="store_true", help="skip the plain storage")
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if given.what == "times":
        found = times(given.trials, not given.cached_only)
    elif given.what == "polls":
        found = polls(given.browsers, given.every, given.seconds)
    elif given.what == "predictions":
        found = predictions()
    else:
        found = load(given.browsers, given.every, given.seconds, given.rounds)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    earlier = results.get("times", {}) if given.what == "times" else {}
    now = {"at": datetime.now(UTC).isoformat(timespec="minutes")}
    now["load_average"] = round(os.getloadavg()[1], 1)
    results[given.what] = {**earlier, **now, **found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
