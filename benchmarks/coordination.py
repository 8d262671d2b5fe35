"""How many trials a second one coordinator sustains, next to plain Optuna.

    .venv/bin/python benchmarks/coordination.py                      # the whole table, ~40 min
    .venv/bin/python benchmarks/coordination.py --trials 0 1000 --databases sqlite

A trial: ask, every suggestion of studies/solubility.toml, 27 reports, a prune decision at each
rung, tell; its training costs nothing. The study already holds so many finished trials. "ours" is
our `Coordinator` with so many trials in flight, "optuna" as many processes as there
are cores, each running `study.optimize` with the same sampler settings, pruner and objective
against the same database, "memory" plain Optuna in one process without a database. Cells of one
row run one after the other, in a random order; each is repeated, and the median is shown.
`report_lag_seconds` is the longest that a report took until another connection saw
it in the database, looked at twice a second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import optuna
import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fakes import IDENTITY, FakeWorkers, Notes, epoch_result  # noqa: E402
from postgres import postgres_server  # noqa: E402

from tuner.coordination.coordinator import Coordinator  # noqa: E402
from tuner.search.objective import Objective  # noqa: E402
from tuner.search.study import create_or_resume  # noqa: E402
from tuner.spec.reader import load_spec, spec_from_document  # noqa: E402
from tuner.spec.spec import StudySpec  # noqa: E402
from tuner.storage.batch import Batch  # noqa: E402
from tuner.storage.engine import closed_engine  # noqa: E402
from tuner.storage.lease import COORDINATOR_KEY  # noqa: E402
from tuner.storage.private_optuna import models  # noqa: E402
from tuner.storage.storage import Storage  # noqa: E402
from tuner.storage.url import parse_url  # noqa: E402
from tuner.train import EpochResult, TrainingJob  # noqa: E402

EPOCHS = 27


def spec_of(name: str, sampler: str, trials: int) -> StudySpec:
    """The space and Hyperband of the real study, with another sampler and budget."""
    document = load_spec(ROOT / "studies" / "solubility.toml").to_document()
    document |= {"name": name, "trials": trials, "data": {"source": "synthetic"}}
    document["sampler"] = {"kind": sampler}
    document.pop("known", None)
    return spec_from_document(document)


def train(job: TrainingJob) -> Iterator[EpochResult]:
    """A training that costs nothing; each loss is the best so far, so no trial ends early."""
    for epoch in range(1, EPOCHS + 1):
        yield epoch_result(0.5 - 1e-9 * time.monotonic(), epoch)


# --- studies that already hold trials ---


def finished_trials(spec: StudySpec, count: int) -> list[FrozenTrial]:
    """What a study of so many trials has: sampled, reported, pruned at rungs, told."""
    study = optuna.create_study(
        study_name=spec.name,
        sampler=optuna.samplers.RandomSampler(seed=1),
        pruner=optuna.pruners.NopPruner(),
    )
    generator = np.random.default_rng(0)
    made = []
    for number in range(count):
        trial = study.ask()
        spec.space.suggest(trial)
        frozen = study._storage.get_trial(trial._trial_id)
        # As Hyperband leaves them: most stop at the first rungs, a few go to the end.
        end = int(generator.choice([1, 3, 9, EPOCHS], p=[0.5, 0.25, 0.13, 0.12]))
        level = 0.55 + generator.random() / 5
        reports = {epoch: level + 0.1 / epoch for epoch in range(1, end + 1)}
        rungs = {
            f"completed_rung_{rung}": reports[epoch]
            for rung, epoch in enumerate((1, 3, 9))
            if epoch <= end
        }
        made.append(
            optuna.trial.create_trial(
                state=TrialState.COMPLETE if end == EPOCHS else TrialState.PRUNED,
                value=reports[end],
                params=frozen.params,
                distributions=frozen.distributions,
                user_attrs={COORDINATOR_KEY: "before"},
                system_attrs=rungs,
                intermediate_values=reports,
            )
        )
        made[-1].number = number
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    return made


def fill(url: str, study_id: int, trials: list[FrozenTrial]) -> None:
    """Writes finished trials in bulk, with the coordinator's own statements."""
    if not trials:
        return
    table, batch = models.TrialModel.__table__, Batch()
    now = datetime.now(UTC).replace(tzinfo=None)
    with closed_engine(parse_url(url)) as engine, engine.begin() as connection:
        first = (connection.scalar(sa.select(sa.func.max(table.c.trial_id))) or 0) + 1
        rows = [
            {
                "trial_id": first + trial.number,
                "study_id": study_id,
                "number": trial.number,
                "state": trial.state,
                "datetime_start": now,
                "datetime_complete": now,
            }
            for trial in trials
        ]
        connection.execute(table.insert(), rows)
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql(
                "SELECT setval('trials_trial_id_seq', (SELECT max(trial_id) FROM trials))"
            )
        for trial in trials:
            its = first + trial.number
            for name, value in trial.params.items():
                distribution = trial.distributions[name]
                batch.set_param(its, name, distribution.to_internal_repr(value), distribution)
            for step, value in trial.intermediate_values.items():
                batch.set_intermediate_value(its, step, value)
            batch.set_value(its, 0, trial.value)
            for key, value in trial.user_attrs.items():
                batch.set_user_attr(its, key, value)
            for key, value in trial.system_attrs.items():
                batch.set_system_attr(its, key, value)
        batch.write(connection)


# --- what is measured: trials a second ---


class Lag:
    """How long after an epoch its report stands in the database, for everybody to see."""

    def __init__(self, url: str) -> None:
        self.longest = 0.0  #: seconds
        self._url = parse_url(url)
        self._said: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def epoch(self) -> None:
        self._said.append(time.monotonic())

    def __enter__(self) -> Lag:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        table = models.TrialIntermediateValueModel.__table__
        count = sa.select(sa.func.count()).select_from(table)
        with closed_engine(self._url) as engine:
            before = None
            while not self._ended.wait(0.5):
                said = list(self._said)
                with engine.connect() as connection:
                    seen = connection.scalar(count)
                before = seen if before is None else before
                if seen - before < len(said):
                    waited = time.monotonic() - said[seen - before]
                    self.longest = max(self.longest, waited)


LAGS: dict[tuple[str, int], list[float]] = {}


def ours(url: str, sampler: str, before: list[FrozenTrial], slots: int, count: int) -> float:
    spec = spec_of(f"ours-{time.monotonic_ns()}", sampler, len(before) + count)
    with tempfile.TemporaryDirectory() as folder, Storage(url) as storage:
        tuned = create_or_resume(
            storage, spec, IDENTITY, development_sha256="c" * 64, artifacts_root=Path(folder)
        )
        fill(url, tuned.id, before)
        ends: list[float] = []
        notes = Notes()
        notes.trial_ended = lambda trial: ends.append(time.monotonic())  # type: ignore[method-assign]
        began: list[float] = []

        lag = Lag(url)

        def timed(job: TrainingJob) -> Iterator[EpochResult]:
            began.append(time.monotonic())
            for epoch in train(job):
                lag.epoch()
                yield epoch

        # Loading the study happens once a launch and is no part of a trial.
        coordinator = Coordinator(tuned, FakeWorkers(slots, timed), notes)
        with lag:
            coordinator.run()
        LAGS.setdefault((url, slots), []).append(lag.longest)
        assert len(ends) == count, (len(ends), count)
        return count / (max(ends) - min(began))


def plain(url: str, sampler: str, before: list[FrozenTrial], count: int, processes: int) -> float:
    name = f"plain-{time.monotonic_ns()}"
    storage = optuna.storages.get_storage(sqlalchemy_url(url))
    study = optuna.create_study(study_name=name, storage=storage)
    fill(url, study._study_id, before)
    spawn = multiprocessing.get_context("spawn")
    ready, go = spawn.Barrier(processes + 1), spawn.Barrier(processes + 1)
    workers = [
        spawn.Process(
            target=plain_worker,
            args=(url, name, sampler, count // processes, seed, ready, go),
        )
        for seed in range(processes)
    ]
    for worker in workers:
        worker.start()
    ready.wait()
    go.wait()
    began = time.monotonic()
    for worker in workers:
        worker.join()
    seconds = time.monotonic() - began
    assert [worker.exitcode for worker in workers] == [0] * processes
    return processes * (count // processes) / seconds


def plain_worker(url, name, sampler, count, seed, ready, go) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spec = spec_of(name, sampler, 1)
    study = optuna.load_study(
        study_name=name,
        storage=sqlalchemy_url(url),
        sampler=plain_sampler(sampler, seed),
        pruner=plain_pruner(),
    )
    study.get_trials(deepcopy=False)  # a warm cache, as in the middle of a study
    ready.wait()
    go.wait()
    study.optimize(Objective(spec, train), n_trials=count)


def in_memory(sampler: str, before: list[FrozenTrial], count: int) -> float:
    name = f"memory-{time.monotonic_ns()}"
    spec = spec_of(name, sampler, 1)
    study = optuna.create_study(
        study_name=name, sampler=plain_sampler(sampler, 0), pruner=plain_pruner()
    )
    study.add_trials(before)
    began = time.monotonic()
    study.optimize(Objective(spec, train), n_trials=count)
    return count / (time.monotonic() - began)


def plain_sampler(kind: str, seed: int) -> optuna.samplers.BaseSampler:
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(multivariate=False, constant_liar=True, seed=seed)


def plain_pruner() -> optuna.pruners.BasePruner:
    return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=EPOCHS, reduction_factor=3)


def sqlalchemy_url(url: str) -> str:
    return parse_url(url).render_as_string(hide_password=False)


# --- the table ---


@contextmanager
def databases(wanted: list[str]) -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="coordination-") as folder:
        urls = {}
        if "sqlite" in wanted:
            urls["sqlite"] = f"sqlite:///{folder}/tuner.db"
        if "postgresql" not in wanted:
            yield urls
            return
        with postgres_server() as server:
            yield urls | {"postgresql": server.database()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[0, 1000, 5000, 20000])
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--samplers", nargs="+", default=["random", "tpe"])
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="aimed at, for each cell")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results/coordination.json"
    )
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    cores = len(os.sched_getaffinity(0))
    rows: list[dict[str, object]] = []
    shuffle = random.Random(0)
    for sampler in options.samplers:
        for held in options.trials:
            before = finished_trials(spec_of("before", sampler, 1), held)
            with databases(options.databases) as urls:
                cells = [("memory", "-", 1)]
                for database in urls:
                    cells += [(database, "optuna", cores)]
                    cells += [(database, "ours", slots) for slots in options.slots]
                measured: dict[tuple[str, str, int], list[float]] = {cell: [] for cell in cells}
                counts = dict.fromkeys(cells, 0)
                for _ in range(options.repeats):
                    shuffle.shuffle(cells)
                    for cell in cells:
                        database, who, slots = cell
                        count = counts[cell] or first_count(sampler, held, slots)
                        if who == "ours":
                            rate = ours(urls[database], sampler, before, slots, count)
                        elif who == "optuna":
                            rate = plain(urls[database], sampler, before, count, slots)
                        else:
                            rate = in_memory(sampler, before, count)
                        measured[cell].append(rate)
                        # Enough trials for the time aimed at, and for every slot to be used.
                        counts[cell] = min(2000, max(2 * slots, 8, int(rate * options.seconds)))
                for (database, who, slots), rates in sorted(measured.items()):
                    row = {
                        "sampler": sampler,
                        "trials_before": held,
                        "database": database,
                        "who": who,
                        "in_flight": slots,
                        "trials_a_second": round(statistics.median(rates), 2),
                        "least": round(min(rates), 2),
                        "most": round(max(rates), 2),
                        "repeats": len(rates),
                    }
                    if who == "ours":
                        row["report_lag_seconds"] = round(max(LAGS.pop((urls[database], slots))), 2)
                    rows.append(row)
                    print(json.dumps(row), flush=True)
            document = {
                "command": "benchmarks/coordination.py " + " ".join(sys.argv[1:]),
                "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": f"{platform.processor() or platform.machine()}, {cores} cores",
                "python": platform.python_version(),
                "optuna": optuna.__version__,
                "rows": rows,
            }
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(document, indent=1) + "\n")


def first_count(sampler: str, held: int, slots: int) -> int:
    slow = sampler == "tpe" and held > 500
    return max(2 * slots, 8) if slow else max(2 * slots, 40)


if __name__ == "__main__":
    main()
