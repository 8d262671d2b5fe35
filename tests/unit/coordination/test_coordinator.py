from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from fakes import FakeWorkers, Notes, epoch_result, fake_train, make_study, small_spec
from optuna.trial import TrialState

from tuner.coordination.coordinator import Coordinator
from tuner.coordination.decisions import KEPT_WEIGHTS
from tuner.coordination.losses import FAILURES_IN_A_ROW, POISON_EARLY_LOSSES, POISON_LOSSES
from tuner.errors import (
    LeaseLostError,
    StorageError,
    StudyError,
    TrialEndedError,
    WorkerDiedEarlyError,
    WorkerLeftError,
    WorkerLostError,
)
from tuner.search.attributes import BUDGET_KEY, ENDED_KEY, RESUMED_KEY, curve_of
from tuner.search.status import status
from tuner.search.study import load
from tuner.search.tuned_study import FINISHED, TunedStudy
from tuner.spec.spec import StopSettings
from tuner.storage.storage import Storage
from tuner.train import Train


@pytest.fixture
def study(tmp_path: Path, database_url: str):
    made: list[TunedStudy] = []

    def make(**changes: object) -> TunedStudy:
        made.append(make_study(tmp_path, small_spec(**changes), url=database_url))
        return made[-1]

    yield make
    for one in made:
        one.storage.close()


Make = Callable[..., TunedStudy]


def steal_lease(storage: Storage) -> None:
    """What a process does that takes over."""
    steal = "UPDATE tuner_lease SET token = 'another'"
    storage._transactions.run(lambda connection: connection.exec_driver_sql(steal))


def finished(tuned: TunedStudy) -> int:
    return len(tuned.trials(*FINISHED))


@pytest.mark.parametrize("budget", [1, 7, 40])
@pytest.mark.parametrize("slots", [1, 2, 16])
def test_the_budget_is_exact(study: Make, budget: int, slots: int) -> None:
    tuned, workers, notes = study(trials=budget), FakeWorkers(slots), Notes()
    assert Coordinator(tuned, workers, notes).run() == "finished"
    assert len(tuned.trials()) == finished(tuned) == len(notes.ended) == budget
    assert workers.most_at_once <= slots


def test_a_finished_study_takes_no_more_trials(study: Make) -> None:
    tuned = study(trials=3)
    Coordinator(tuned, FakeWorkers(), Notes()).run()
    Coordinator(tuned, FakeWorkers(), Notes()).run()
    assert len(tuned.trials()) == 3


def test_one_worker_and_many_sample_the_same_random_trials(tmp_path: Path) -> None:
    def sampled(slots: int) -> list[dict[str, object]]:
        spec = small_spec(sampler={"kind": "random"}, hyperband=None)
        tuned = make_study(tmp_path / str(slots), spec)
        Coordinator(tuned, FakeWorkers(slots), Notes()).run()
        parameters = [trial.params for trial in tuned.trials()]
        tuned.storage.close()
        return parameters

    assert sampled(1) == sampled(8)


def test_the_search_of_one_worker_is_the_same_every_time(tmp_path: Path) -> None:
    def search(folder: Path) -> list[tuple[object, ...]]:
        tuned = make_study(folder, small_spec(trials=30))
        Coordinator(tuned, FakeWorkers(1), Notes()).run()
        found = [(trial.params, trial.state, trial.value) for trial in tuned.trials()]
        tuned.storage.close()
        return found

    assert search(tmp_path / "a") == search(tmp_path / "b")


def test_trials_of_a_dead_coordinator_go_on_under_their_number(study: Make) -> None:
    tuned = study(trials=5)
    tuned.storage.lease.take(tuned.id)
    dead = tuned.study.ask()
    config = tuned.record.spec.space.suggest(dead)
    dead.report(1.0, step=1)
    tuned.storage.lease.release()
    notes = Notes()
    Coordinator(tuned, FakeWorkers(), notes).run()
    trials = tuned.trials()
    assert len(trials) == finished(tuned) == 5
    assert tuned.record.spec.space.resolve(trials[0].params) == config
    assert trials[0].user_attrs[RESUMED_KEY] == 1
    assert trials[0].intermediate_values[1] == 1.0
    assert "Trial 0 resumes" in notes.said[0]


def test_a_budget_that_was_lowered_is_not_exceeded_by_trials_left_open(study: Make) -> None:
    tuned = study(trials=3)
    tuned.storage.lease.take(tuned.id)
    for _ in range(3):
        tuned.record.spec.space.suggest(tuned.study.ask())
    tuned.storage.lease.release()
    tuned.study.set_user_attr(BUDGET_KEY, 2)
    Coordinator(tuned, FakeWorkers(4), Notes()).run()
    assert finished(tuned) == 2


def test_running_trials_of_somebody_else_are_left_alone(study: Make) -> None:
    tuned = study(trials=2)
    theirs = tuned.study.ask()
    Coordinator(tuned, FakeWorkers(), Notes()).run()
    states = {trial.number: trial.state for trial in tuned.trials()}
    assert states.pop(theirs.number) == TrialState.RUNNING
    assert len(states) == 2


def test_a_lost_worker_costs_the_trial_nothing(study: Make) -> None:
    deaths = iter([True, True, False])

    def train(job):
        for result in fake_train(job):
            yield result
            if job.trial == 0 and result.epoch == 2 and next(deaths, False):
                raise WorkerLostError("its worker died")

    tuned = study(trials=2, hyperband=None)
    Coordinator(tuned, FakeWorkers(1, train), Notes()).run()
    trials = tuned.trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    assert trials[0].user_attrs[RESUMED_KEY] == 2
    assert [epoch.epoch for epoch in curve_of(trials[0])] == list(range(1, 10))


@pytest.mark.parametrize(
    ("error", "most"),
    [(WorkerLostError, POISON_LOSSES), (WorkerDiedEarlyError, POISON_EARLY_LOSSES)],
)
def test_a_trial_that_kills_its_workers_ends_and_the_study_goes_on(
    study: Make, error: type[WorkerLostError], most: int
) -> None:
    attempts: list[int] = []

    def train(job):
        if job.trial == 0:
            attempts.append(job.trial)
            raise error("its worker died")
        yield from fake_train(job)

    tuned = study(trials=3)
    Coordinator(tuned, FakeWorkers(1, train), Notes()).run()
    poison = tuned.trials()[0]
    assert len(attempts) == most
    assert poison.state == TrialState.PRUNED
    assert poison.user_attrs[ENDED_KEY] == "worker_lost"
    assert poison.constraints == {ENDED_KEY: 1.0}
    assert finished(tuned) == 3


def test_a_trial_whose_workers_left_it_is_never_given_up(study: Make) -> None:
    tuned = study(trials=2)
    left: list[int] = []

    def leaving(job):
        if job.trial == 1 and len(left) < 2 * POISON_LOSSES:
            left.append(job.trial)
            raise WorkerLeftError("its worker left and gave it back")
        yield from fake_train(job)

    Coordinator(tuned, FakeWorkers(2, leaving), Notes()).run()
    assert len(left) == 2 * POISON_LOSSES
    assert finished(tuned) == 2
    assert all(ENDED_KEY not in trial.user_attrs for trial in tuned.trials())


def test_a_study_waits_for_workers_that_join_later(study: Make) -> None:
    tuned, workers = study(trials=3), FakeWorkers(slots=0)
    running = threading.Thread(target=Coordinator(tuned, workers, Notes()).run)
    running.start()
    running.join(0.3)
    assert running.is_alive()
    workers._slots = 2
    running.join(30)
    assert finished(tuned) == 3


def test_failed_trials_do_not_count_and_ten_in_a_row_stop_the_study(study: Make) -> None:
    def train(job):
        if job.trial != 1:
            raise RuntimeError("no space left on device")
        yield epoch_result(0.6, 1)

    tuned = study(trials=3)
    with pytest.raises(StudyError, match="no space left on device"):
        Coordinator(tuned, FakeWorkers(1, train), Notes()).run()
    states = [trial.state for trial in tuned.trials()]
    assert states.count(TrialState.FAIL) == FAILURES_IN_A_ROW + 1
    assert finished(tuned) == 1


@pytest.mark.parametrize("why", ["stopped", "interrupted"])
def test_a_stop_leaves_running_trials_open_and_the_next_run_finishes_them(
    study: Make, why: str
) -> None:
    tuned, workers = study(trials=6), FakeWorkers(2)
    coordinator: list[Coordinator] = []

    def stop_at_trial_2(trial: int, result: object) -> None:
        if trial == 2:
            coordinator[0].stop(why)

    coordinator.append(Coordinator(tuned, workers, Notes(stop_at_trial_2)))
    assert coordinator[0].run() == why
    assert 0 < finished(tuned) < 6
    assert Coordinator(tuned, FakeWorkers(2), Notes()).run() == "finished"
    assert len(tuned.trials()) == finished(tuned) == 6


@pytest.mark.parametrize("error", [WorkerLostError("dropped"), RuntimeError("client closed")])
def test_workers_that_a_stop_took_away_cost_their_trials_nothing(
    study: Make, error: Exception
) -> None:
    tuned = study(trials=2, hyperband=None)
    coordinator: list[Coordinator] = []

    def train(job):
        yield epoch_result(0.7, 1)
        coordinator[0].stop("interrupted")
        raise error

    coordinator.append(Coordinator(tuned, FakeWorkers(1, train), Notes()))
    assert coordinator[0].run() == "interrupted"
    assert [trial.state for trial in tuned.trials()] == [TrialState.RUNNING]
    assert RESUMED_KEY not in tuned.trials()[0].user_attrs
    Coordinator(tuned, FakeWorkers(2), Notes()).run()
    assert len(tuned.trials()) == finished(tuned) == 2


def test_tuner_stop_from_another_process_stops_the_study(study: Make) -> None:
    tuned = study(trials=500)
    asked = threading.Event()

    def ask(trial: int, result: object) -> None:
        if trial == 1 and not asked.is_set():
            asked.set()
            with Storage(tuned.storage.url) as other:
                other.leases.request_stop(tuned.id)

    assert Coordinator(tuned, FakeWorkers(2), Notes(ask)).run() == "stopped"
    assert finished(tuned) < 500
    assert tuned.storage.leases.of(tuned.id) is None


class FastWorkers(FakeWorkers):
    """Every trial has ended before the next slot is found free."""

    def __init__(self, train: Train = fake_train) -> None:
        super().__init__(1, train)
        self.coordinator: Coordinator | None = None

    def slots(self) -> int:
        if self.coordinator is not None:
            while self.coordinator.running:
                time.sleep(0.001)
        return 1


def test_ten_failures_are_noticed_where_trials_end_as_fast_as_they_start(study: Make) -> None:
    def train(job):
        raise RuntimeError("no GPU here")
        yield

    workers = FastWorkers(train)
    coordinator = Coordinator(study(trials=3), workers, Notes())
    workers.coordinator = coordinator
    with pytest.raises(StudyError, match="no GPU here"):
        coordinator.run()


def test_a_timeout_is_noticed_where_trials_end_as_fast_as_they_start(study: Make) -> None:
    workers = FastWorkers()
    coordinator = Coordinator(study(trials=100_000), workers, Notes())
    workers.coordinator = coordinator
    assert coordinator.run(timeout=0.2) == "timeout"


def test_a_timeout_stops_the_study(study: Make) -> None:
    assert Coordinator(study(trials=500), FakeWorkers(2), Notes()).run(timeout=0.2) == "timeout"


def test_a_second_coordinator_is_refused(study: Make) -> None:
    tuned = study()
    with Storage(tuned.storage.url) as other:
        other.lease.take(tuned.id)
        with pytest.raises(StorageError, match="is being run by"):
            Coordinator(tuned, FakeWorkers(), Notes()).run()


def test_budget_and_stop_rule_are_taken_once_the_lease_is_held(study: Make) -> None:
    tuned = study(trials=12, stop={"patience": 9})
    asked = small_spec(trials=2)
    with Storage(tuned.storage.url) as other:
        other.lease.take(tuned.id)
        with pytest.raises(StorageError, match="is being run by"):
            Coordinator(tuned, FakeWorkers(), Notes()).run(asked=asked)
        assert (tuned.budget, tuned.stop) == (12, StopSettings(patience=9))
        other.lease.release()
    assert Coordinator(tuned, FakeWorkers(), Notes()).run(asked=asked) == "finished"
    assert (tuned.budget, tuned.stop) == (2, None)
    assert finished(tuned) == 2


def test_a_replaced_coordinator_stops_and_writes_nothing(study: Make) -> None:
    tuned = study(trials=50)
    taken: list[int] = []

    def take_over(trial: int, result: object) -> None:
        if trial == 3 and not taken:
            taken.append(trial)
            with Storage(tuned.storage.url) as other:
                steal_lease(other)
                taken.append(len(other.optuna.get_all_trials(tuned.id)))

    with pytest.raises(LeaseLostError):
        Coordinator(tuned, FakeWorkers(1), Notes(take_over)).run()
    with Storage(tuned.storage.url) as other:
        fresh = load(other, "small", artifacts_root=tuned.artifacts.folder.parent)
        assert len(fresh.trials()) == taken[1]
        assert fresh.trials()[3].state == TrialState.RUNNING


def test_a_coordinator_that_was_frozen_as_a_trial_ended_removes_no_file(
    study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = study(trials=3, hyperband=None)
    files = [tuned.artifacts.checkpoint(1), tuned.artifacts.weights(7)]  # of the next coordinator
    flush = tuned.storage.flush

    def flush_and_freeze() -> None:
        flush()
        told = [trial for trial in tuned.trials() if trial.state == TrialState.COMPLETE]
        if len(told) == 2:
            for file in files:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(b"new")
            tuned.storage.lease._certain_at -= 3600.0
            with Storage(tuned.storage.url) as other:
                steal_lease(other)

    monkeypatch.setattr(tuned.storage, "flush", flush_and_freeze)
    with pytest.raises(LeaseLostError):
        Coordinator(tuned, FakeWorkers(1), Notes()).run()
    assert [file.read_bytes() for file in files] == [b"new"] * 2


def test_only_the_best_weights_are_kept_and_no_checkpoint(study: Make) -> None:
    tuned = study(trials=KEPT_WEIGHTS + 5, hyperband=None)

    def train(job):
        yield from fake_train(job)
        for path in (tuned.artifacts.weights(job.trial), tuned.artifacts.checkpoint(job.trial)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"w")

    Coordinator(tuned, FakeWorkers(2, train), Notes()).run()
    kept = {int(path.stem) for path in (tuned.artifacts.folder / "weights").iterdir()}
    assert kept == {trial.number for trial in tuned.ranked()[:KEPT_WEIGHTS]}
    assert list((tuned.artifacts.folder / "checkpoints").iterdir()) == []


def test_what_a_killed_coordinator_was_writing_is_removed_when_the_lease_is_taken_over(
    study: Make,
) -> None:
    tuned = study(trials=2)
    Coordinator(tuned, FakeWorkers(), Notes()).run()
    tuned.study.set_user_attr(BUDGET_KEY, 3)
    tuned.storage.lease.take(tuned.id)
    tuned.record.spec.space.suggest(tuned.study.ask())
    tuned.storage.lease.release()
    folder = tuned.artifacts.folder
    kept = {"checkpoints/2.npz", "weights/0.npz", "report/.report.html.ab12.new", "notes.new"}
    left = {"checkpoints/.2.npz.ab12.new", "checkpoints/1.npz", "weights/.0.npz.ab12.new"}
    for name in kept | left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"some")
    found: set[str] = set()

    def look(trial: int, result: object) -> None:
        found.update(
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        )

    Coordinator(tuned, FakeWorkers(), Notes(look)).run()
    assert found == kept


def test_who_does_not_get_the_lease_removes_nothing(study: Make) -> None:
    tuned = study()
    half = tuned.artifacts.checkpoint(0).with_name(".0.npz.ab12.new")
    half.parent.mkdir(parents=True)
    half.write_bytes(b"some")
    with Storage(tuned.storage.url) as other:
        other.lease.take(tuned.id)
        with pytest.raises(StorageError, match="is being run by"):
            Coordinator(tuned, FakeWorkers(), Notes()).run()
    assert half.exists()


def test_every_decision_is_recorded_in_order(study: Make) -> None:
    tuned = study(trials=8)
    Coordinator(tuned, FakeWorkers(2), Notes()).run()
    decisions = tuned.storage.decisions.of(tuned.id)
    for trial in tuned.trials():
        mine = [decision for decision in decisions if decision.trial == trial.number]
        assert mine[0].kind == "ask"
        assert mine[-1].kind == "tell"
        assert mine[-1].verdict == trial.state.name
        rungs = [decision for decision in mine if decision.kind == "rung"]
        assert [one.epoch for one in rungs] == [r for r in (1, 3) if r <= (trial.last_step or 0)]
        pruned = [one.verdict for one in rungs] if rungs else []
        assert ("prune" in pruned) == (trial.state == TrialState.PRUNED)


def test_a_reported_study_trains_nothing_more_not_even_a_trial_left_open(study: Make) -> None:
    tuned = study(trials=3)
    tuned.storage.lease.take(tuned.id)
    tuned.record.spec.space.suggest(tuned.study.ask())
    tuned.storage.lease.release()
    tuned.storage.ledger.open(
        opened_at="", opened_by="", study="small", study_key=tuned.key, trial=0,
        config_hash="", spec_hash="", split_id="s",
    )  # fmt: skip
    with pytest.raises(StudyError, match="trains no more trials"):
        Coordinator(tuned, FakeWorkers(), Notes()).run()
    assert [trial.state for trial in tuned.trials()] == [TrialState.RUNNING]
    assert tuned.storage.leases.of(tuned.id) is None


def test_enqueued_trials_of_the_user_are_run(study: Make) -> None:
    tuned = study(trials=2)
    tuned.study.enqueue_trial({"learning_rate": 0.05, "blocks": 1})
    Coordinator(tuned, FakeWorkers(1), Notes()).run()
    assert tuned.trials()[0].params["learning_rate"] == 0.05
    assert len(tuned.trials()) == 2
    assert isinstance(tuned.study, optuna.Study)


# The stop rule.


def falls_to_trial_10(job):
    yield epoch_result(0.7 - 0.01 * min(job.trial, 10), 1)


def creeps(job):
    yield epoch_result(0.7 - 0.0001 * job.trial, 1)


def stops(patience: int, min_delta: float = 0.0) -> dict[str, object]:
    return {
        "trials": 60,
        "hyperband": None,
        "stop": {"patience": patience, "min_delta": min_delta},
        "training": {"max_epochs": 1},
    }


@pytest.mark.parametrize("slots", [1, 4])
def test_a_study_ends_early_where_nothing_better_comes(study: Make, slots: int) -> None:
    tuned, notes = study(**stops(patience=5)), Notes()
    assert Coordinator(tuned, FakeWorkers(slots, falls_to_trial_10), notes).run() == "finished"
    assert 16 <= finished(tuned) <= 16 + 2 * slots - 2  # trials in flight are finished
    now = status(tuned)
    assert (now.state, now.budget) == ("finished", finished(tuned))
    assert now.counts["RUNNING"] == 0
    # Trials 10, 11, ... are equally good: the one that ended first is named.
    first = "10" if slots == 1 else "1[0-3]"
    reason = rf"did not improve on the validation loss 0\.6000 of trial {first} "
    assert re.search(reason, str(now.ended_early))
    assert f"ends after {finished(tuned)} of 60 trials" in notes.said[-1]


@pytest.mark.parametrize(("patience", "trials"), [(5, 6), (20, 60)])
def test_gains_below_min_delta_do_not_count_until_they_add_up(
    study: Make, patience: int, trials: int
) -> None:
    tuned = study(**stops(patience, min_delta=0.00095))
    Coordinator(tuned, FakeWorkers(1, creeps), Notes()).run()
    assert finished(tuned) == trials


def test_the_stop_rule_counts_on_after_a_restart(study: Make) -> None:
    tuned = study(**stops(patience=5))

    def stop_at_trial_13(trial: int, result: object) -> None:
        if trial == 13:
            coordinator.stop("stopped")

    coordinator = Coordinator(
        tuned, FakeWorkers(1, falls_to_trial_10), Notes(on_epoch=stop_at_trial_13)
    )
    assert coordinator.run() == "stopped"
    assert finished(tuned) < 16
    Coordinator(tuned, FakeWorkers(1, falls_to_trial_10), Notes()).run()
    assert finished(tuned) == 16


def test_pruned_trials_count_once_one_was_fully_trained(study: Make) -> None:
    def only_trial_7_is_trained(job):
        if job.trial != 7:
            raise TrialEndedError("diverged", "for the test")
        yield epoch_result(0.6, 1)

    tuned = study(**stops(patience=5))
    Coordinator(tuned, FakeWorkers(1, only_trial_7_is_trained), Notes()).run()
    assert finished(tuned) == 8 + 5


def test_another_launch_changes_the_stop_rule_and_the_study_goes_on(study: Make) -> None:
    tuned = study(**stops(patience=5))
    Coordinator(tuned, FakeWorkers(1, falls_to_trial_10), Notes()).run()
    same = study(**stops(patience=5))
    Coordinator(same, FakeWorkers(1, falls_to_trial_10), Notes()).run()
    assert finished(same) == status(same).budget == 16
    reason = status(same).ended_early
    assert reason is not None
    assert status(study(**stops(patience=5) | {"trials": 16})).ended_early == reason
    patient = study(**stops(patience=9))
    Coordinator(patient, FakeWorkers(1, falls_to_trial_10), Notes()).run()
    assert finished(patient) == 20
    endless = study(**stops(patience=9) | {"stop": None})
    assert status(endless).ended_early is None
    Coordinator(endless, FakeWorkers(1, falls_to_trial_10), Notes()).run()
    assert finished(endless) == 60
