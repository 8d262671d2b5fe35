"""The driven study: memory and database say the same, and nothing is written twice."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from fakes import FakeWorkers, Notes, epoch_result, loss_of, make_study, small_spec
from optuna.trial import FrozenTrial, TrialState

from tuner.coordination.coordinator import Coordinator
from tuner.errors import LeaseLostError, StorageError
from tuner.search.attributes import curve_of
from tuner.search.study import load
from tuner.search.tuned_study import FINISHED
from tuner.storage.storage import Storage


@pytest.fixture
def storage(database_url: str) -> Iterator[Storage]:
    with Storage(database_url, patience_seconds=None, say=lambda _: None) as opened:
        yield opened


@pytest.fixture
def study(storage: Storage) -> optuna.Study:
    made = optuna.create_study(storage=storage.optuna, study_name="q")
    storage.lease.take(made._study_id)
    return made


def in_the_database(url: str) -> list[FrozenTrial]:
    """What another process reads."""
    with Storage(url) as other:
        return optuna.load_study(study_name="q", storage=other.optuna).trials


def without_microseconds(trial: FrozenTrial) -> dict[str, object]:
    fields = {name.lstrip("_"): value for name, value in vars(trial).items()}
    for name in ("datetime_start", "datetime_complete"):
        if fields[name] is not None:
            fields[name] = fields[name].replace(microsecond=0, second=0)
    return fields


def in_some_order(trial: FrozenTrial) -> list[tuple[str, str]]:
    """Everything about a trial, attributes sorted: Optuna reads them in no set order."""
    fields = vars(trial).items()
    return [
        (name, repr(sorted(value.items()) if isinstance(value, dict) else value))
        for name, value in fields
    ]


def test_memory_and_database_say_the_same(storage: Storage, study: optuna.Study) -> None:
    study.enqueue_trial({"x": 0.25}, user_attrs={"why": "known"})
    storage.lease.heartbeat()  # takes it in
    for number in range(6):
        trial = study.ask()
        trial.suggest_float("x", 0.001, 1, log=True)
        trial.suggest_categorical("c", ["a", None, 3])
        trial.suggest_int("n", 1, 9, step=2)
        trial.set_user_attr("note", [number, {"deep": None}])
        trial.set_user_attr("note", "the last one stands")
        trial.storage.set_trial_system_attr(trial._trial_id, "s", 0.5)
        for step, value in enumerate([1.5, float("nan"), float("inf"), float("-inf")]):
            trial.report(value, step)
        if number == 5:
            continue  # stays RUNNING
        state = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL][number % 3]
        value = [0.5, float("inf")][number % 2] if state == TrialState.COMPLETE else None
        study.tell(trial, value, state)
    storage.flush()
    memory = [without_microseconds(trial) for trial in study.trials]
    assert repr(memory) == repr([without_microseconds(one) for one in in_the_database(storage.url)])
    assert memory[0]["params"]["x"] == 0.25
    assert [trial["state"].name for trial in memory] == [
        "COMPLETE", "PRUNED", "FAIL", "COMPLETE", "PRUNED", "RUNNING",
    ]  # fmt: skip


def test_our_reading_of_trials_is_optunas(storage: Storage, study: optuna.Study) -> None:
    test_memory_and_database_say_the_same(storage, study)
    storage.lease.release()
    parsed = storage._parsed.render_as_string(hide_password=False)
    plain = optuna.storages.RDBStorage(parsed)
    for states in (None, (TrialState.PRUNED, TrialState.RUNNING)):
        theirs = plain.get_all_trials(study._study_id, states=states)
        ours = storage.optuna.get_all_trials(study._study_id, states=states)
        assert [in_some_order(one) for one in theirs] == [in_some_order(one) for one in ours]
        assert len(ours) == (6 if states is None else 3)
    plain.remove_session()
    plain.engine.dispose()


def test_others_trials_and_attributes_are_heard_of(storage: Storage, study: optuna.Study) -> None:
    study.ask()
    with Storage(storage.url) as other:
        theirs = optuna.load_study(study_name="q", storage=other.optuna)
        theirs.enqueue_trial({"x": 0.5})
        running = theirs.ask()  # the one enqueued: their own optimize() runs it
        theirs.set_user_attr("trials", 7)
        storage.lease.heartbeat()
        assert study.user_attrs["trials"] == 7
        assert [trial.state.name for trial in study.trials] == ["RUNNING", "RUNNING"]
        running.suggest_float("x", 0, 1)
        theirs.tell(running, 0.5)
        # A trial of theirs in between, not heard of yet: numbers stay exact.
        theirs.add_trial(optuna.trial.create_trial(value=0.75))
    assert study.ask().number == 3
    storage.lease.heartbeat()
    assert [trial.value for trial in study.trials] == [None, 0.5, 0.75, None]


@contextmanager
def lost_answers(storage: Storage, commits: int) -> Iterator[list[int]]:
    """The next commits go through, and their answers get lost on the way."""
    lost: list[int] = []
    engine = storage._rdb.engine
    commit = engine.dialect.do_commit

    def commit_and_lose(connection: object) -> None:
        commit(connection)
        if len(lost) < commits:
            lost.append(1)
            raise sa.exc.OperationalError("COMMIT", {}, Exception("connection lost"))

    engine.dialect.do_commit = commit_and_lose
    try:
        yield lost
    finally:
        del engine.dialect.do_commit


def test_a_batch_whose_commit_was_not_answered_is_not_written_twice(
    storage: Storage, study: optuna.Study
) -> None:
    trial = study.ask()
    storage.flush()
    with lost_answers(storage, 1) as lost:
        trial.suggest_float("x", 0, 1)
        trial.report(0.5, 1)
        storage.flush()
        assert lost
    trial.report(0.25, 2)
    storage.flush()
    (kept,) = in_the_database(storage.url)
    assert kept.intermediate_values == {1: 0.5, 2: 0.25}


@pytest.mark.parametrize(
    ("counted", "fate"), [(1, "written"), (2, "known"), (0, "lost"), (3, "lost")]
)
def test_a_batch_is_written_by_its_number(
    storage: Storage, study: optuna.Study, counted: int, fate: str
) -> None:
    """One batch was written. The next is number 1; 2 says that it went through already."""
    trial = study.ask()
    trial.report(0.5, 1)
    storage.flush()
    with Storage(storage.url) as other:
        other._transactions.run(
            lambda c: c.exec_driver_sql(f"UPDATE tuner_lease SET batches = {counted}")
        )
    trial.report(0.25, 2)
    if fate == "lost":
        with pytest.raises(LeaseLostError):
            storage.flush()
    else:
        storage.flush()
    (kept,) = in_the_database(storage.url)
    assert kept.intermediate_values == ({1: 0.5, 2: 0.25} if fate == "written" else {1: 0.5})


def test_a_trial_whose_creation_was_not_answered_is_not_made_twice(
    storage: Storage, study: optuna.Study
) -> None:
    with lost_answers(storage, 2) as lost:
        assert [study.ask().number for _ in range(3)] == [0, 1, 2]
        assert len(lost) == 2
    assert len(in_the_database(storage.url)) == 3


def test_what_is_written_together_is_committed_together(
    storage: Storage, study: optuna.Study
) -> None:
    trial = study.ask()
    with storage.together():
        trial.report(0.5, 1)
        storage.flush()  # of everything else
        (before,) = in_the_database(storage.url)
        trial.set_user_attr("a", 1)
    storage.flush()
    (after,) = in_the_database(storage.url)
    assert (before.intermediate_values, before.user_attrs.get("a")) == ({}, None)
    assert (after.intermediate_values, after.user_attrs.get("a")) == ({1: 0.5}, 1)


def test_a_block_inside_another_is_committed_with_that_one(
    storage: Storage, study: optuna.Study
) -> None:
    trial = study.ask()
    with storage.together():
        trial.report(0.5, 1)
        with storage.together():
            trial.report(0.4, 2)
        storage.flush()
        (before,) = in_the_database(storage.url)
        trial.report(0.3, 3)
    storage.flush()
    (after,) = in_the_database(storage.url)
    assert before.intermediate_values == {}
    assert after.intermediate_values == {1: 0.5, 2: 0.4, 3: 0.3}


def test_a_verdict_that_was_committed_stands_though_its_coordinator_died(
    tmp_path: Path, database_url: str
) -> None:
    """Each trial is worse than the one before; the coordinator dies after the first verdict."""

    def train(job):
        for epoch in range(1, 10):
            yield epoch_result(0.5 + job.trial / 10, epoch)

    class CoordinatorDiesError(Exception):
        pass

    tuned = make_study(tmp_path, small_spec(trials=8), url=database_url)
    coordinator = Coordinator(tuned, FakeWorkers(1, train), Notes())

    decisions = coordinator._decisions
    decide = decisions.tell

    def tell(trial: optuna.Trial, state: TrialState, *rest: Any) -> FrozenTrial:
        if state == TrialState.PRUNED:
            raise CoordinatorDiesError
        return decide(trial, state, *rest)

    decisions.tell = tell  # type: ignore[method-assign]
    with pytest.raises(CoordinatorDiesError):
        coordinator.run()
    last = tuned.storage.decisions.of(tuned.id)[-1]
    assert (last.kind, last.verdict) == ("rung", "prune")
    tuned.storage.close()
    with Storage(database_url) as storage:
        again = load(storage, "small", artifacts_root=tmp_path / "artifacts")
        Coordinator(again, FakeWorkers(1, train), Notes()).run()
        pruned = again.trials()[last.trial]
        assert (pruned.state, pruned.last_step) == (TrialState.PRUNED, last.epoch)
        assert len(again.trials(*FINISHED)) == 8


def test_a_closed_storage_is_forgotten(tmp_path: Path) -> None:
    tuned = make_study(tmp_path, small_spec(trials=2))
    Coordinator(tuned, FakeWorkers(1), Notes()).run()
    tuned.storage.close()
    database = weakref.ref(tuned.storage._rdb)
    del tuned
    gc.collect()
    assert database() is None


def test_a_stop_is_heard_while_the_database_is_away(
    tmp_path: Path, postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.coordination.lease._PATIENCE_AFTER_STOP_SECONDS", 0.5)
    tuned = make_study(tmp_path, small_spec(trials=50), url=postgres.database())
    tuned.storage._calls.patience_seconds = None
    coordinator: list[Coordinator] = []

    def stop_the_server(trial: int, result: object) -> None:
        if trial == 3 and not stopped:
            stopped.append(trial)
            postgres.stop()
            coordinator[0].stop("interrupted")

    stopped: list[int] = []
    coordinator.append(Coordinator(tuned, FakeWorkers(2), Notes(stop_the_server)))
    try:
        with pytest.raises(StorageError, match="the same command resumes the study"):
            coordinator[0].run()
    finally:
        postgres.start()
    tuned.storage.close()
    with Storage(tuned.storage.url) as storage:
        again = load(storage, "small", artifacts_root=tmp_path / "artifacts")
        # The lease was not given back: who holds it is this very process.
        storage._transactions.run(lambda c: c.exec_driver_sql("DELETE FROM tuner_lease"))
        Coordinator(again, FakeWorkers(2), Notes()).run()
        assert len(again.trials()) == len(again.trials(*FINISHED)) == 50
        for trial in again.trials():
            config = again.record.spec.space.resolve(trial.params)
            curve = [(one.epoch, one.validation_loss) for one in curve_of(trial)]
            assert curve == [
                (epoch, loss_of(config, trial.number, epoch))
                for epoch in range(1, (trial.last_step or 0) + 1)
            ]
