"""Real worker processes over Dask, with trainings that cost nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from distributed import Client
from fakes import FakeRun, Notes, loss_of, make_study, small_spec
from optuna.trial import TrialState

from tuner.cluster import Cluster, _Orders, local_client
from tuner.coordinator import Coordinator
from tuner.errors import TrialEndedError
from tuner.objective import curve_of
from tuner.study import FINISHED, RESUMED_KEY, TunedStudy


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_client(2) as client:
        yield client


@contextmanager
def cluster_of(client: Client, tuned: TunedStudy, open_run=FakeRun) -> Iterator[Cluster]:
    with Cluster(
        client, tuned, development_file=Path("none.npz"), threads=1, open_run=open_run
    ) as cluster:
        yield cluster
    tuned.storage.close()


def assert_whole(tuned: TunedStudy, budget: int) -> None:
    """Exactly the budget, and every curve that of an undisturbed run."""
    trials = tuned.trials()
    assert len(trials) == len(tuned.trials(*FINISHED)) == budget
    for trial in trials:
        config = tuned.record.spec.space.resolve(trial.params)
        epochs = range(1, (trial.last_step or 0) + 1)
        assert sorted(trial.intermediate_values) == list(epochs)
        curve = [epoch.validation_loss for epoch in curve_of(trial)]
        assert curve == [loss_of(config, trial.number, epoch) for epoch in epochs]


def test_a_study_runs_on_workers_to_its_budget(tmp_path: Path, client: Client) -> None:
    tuned = make_study(tmp_path, small_spec(trials=20))
    with cluster_of(client, tuned) as cluster:
        assert cluster.slots() == 2
        Coordinator(tuned, cluster, Notes()).run()
        assert_whole(tuned, 20)
        best = tuned.ranked()[0]
        assert tuned.artifacts.weights(best.number).read_bytes() == b"weights"
        processes = {epoch.seconds for trial in tuned.trials() for epoch in curve_of(trial)}
        assert len(processes) == 2
        assert os.getpid() not in processes


def test_a_pruned_training_stops_on_its_worker(tmp_path: Path, client: Client) -> None:
    tuned = make_study(tmp_path, small_spec(seed=20))
    config = tuned.record.spec.space.resolve({"blocks": 1, "learning_rate": 1e-3})
    with cluster_of(client, tuned) as cluster:
        epochs = cluster.train(config, seed=20, trial=0, rungs=(1, 3))
        assert next(epochs).epoch == 1
        # The verdict of epoch 1 is awaited: nothing is trained ahead of it.
        time.sleep(0.3)
        epochs.close()
        again = cluster.train(config, seed=20, trial=0, rungs=(1, 3))
        assert [epoch.epoch for epoch in again] == list(range(1, 10))


def test_a_worker_waits_at_a_rung_for_the_verdict(tmp_path: Path, client: Client) -> None:
    tuned = make_study(tmp_path, small_spec(seed=1))
    config = tuned.record.spec.space.resolve({"blocks": 1, "learning_rate": 1e-3})
    with cluster_of(client, tuned) as cluster:
        epochs = cluster.train(config, seed=1, trial=0, rungs=(3,))
        assert next(epochs).epoch == 1
        (attempt,) = cluster._attempts.values()
        time.sleep(0.5)  # a hundred epochs' time
        assert attempt.inbox.qsize() == 2
        epochs.close()


class DivergingRun(FakeRun):
    def epochs(self):
        yield next(super().epochs())
        raise TrialEndedError("diverged", "epoch 2, training loss nan")


def test_how_a_trial_ended_on_its_worker_reaches_the_study(tmp_path: Path, client: Client) -> None:
    tuned = make_study(tmp_path, small_spec(trials=1))
    with cluster_of(client, tuned, DivergingRun) as cluster:
        Coordinator(tuned, cluster, Notes()).run()
        (trial,) = tuned.trials()
        assert trial.state == TrialState.PRUNED
        assert trial.user_attrs["ended_detail"] == "epoch 2, training loss nan"


def test_a_paused_study_resumes_from_its_checkpoints(tmp_path: Path, client: Client) -> None:
    tuned = make_study(tmp_path, small_spec(trials=4, seed=100, hyperband=None))
    with cluster_of(client, tuned) as cluster:
        coordinator: list[Coordinator] = []

        def stop(trial: int, result: object) -> None:
            coordinator[0].stop("interrupted")

        coordinator.append(Coordinator(tuned, cluster, Notes(stop)))
        coordinator[0].run()
        running = tuned.trials(TrialState.RUNNING)
        assert running
        assert all(tuned.artifacts.checkpoint(trial.number).exists() for trial in running)
        cluster._pausing = False
        Coordinator(tuned, cluster, Notes()).run()
        assert_whole(tuned, 4)
        resumed = [trial for trial in tuned.trials() if trial.user_attrs.get(RESUMED_KEY)]
        assert {trial.number for trial in resumed} == {trial.number for trial in running}
        assert not any((tuned.artifacts.folder / "checkpoints").iterdir())


def test_kill_9_of_workers_loses_no_trial_and_doubles_none(tmp_path: Path, client: Client) -> None:
    tuned = make_study(tmp_path, small_spec(trials=10, seed=60, hyperband=None))
    killed: list[int] = []

    def kill(trial: int, result) -> None:
        # The worker itself said that it trained this epoch: it is one of this test's own.
        if trial in (1, 4, 5) and result.epoch == 2 and trial not in killed:
            killed.append(trial)
            os.kill(int(result.seconds), signal.SIGKILL)

    notes = Notes(kill)
    with cluster_of(client, tuned) as cluster:
        Coordinator(tuned, cluster, notes).run()
        assert_whole(tuned, 10)
        resumed = {trial.number for trial in tuned.trials() if trial.user_attrs.get(RESUMED_KEY)}
    assert sorted(killed) == [1, 4, 5]
    assert resumed >= {1, 4, 5}
    assert any("its worker died; it goes on under its number" in line for line in notes.said)


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> _Orders:
    class Deaf:
        def subscribe_topic(self, topic: str, handler: object) -> None:
            pass

    monkeypatch.setattr("tuner.cluster.get_client", Deaf)
    heard = _Orders("topic")
    heard.begin("attempt", 3)
    return heard


def hear(orders: _Orders, attempts: dict[str, int], *, pause=False, complete=False) -> None:
    orders._hear((0.0, {"pause": pause, "attempts": attempts, "complete": complete}))


def test_between_rungs_a_worker_runs_ahead(orders: _Orders) -> None:
    assert orders.wait("attempt", 2) == "go"
    threading.Timer(0.1, hear, (orders, {"attempt": 9})).start()
    assert orders.wait("attempt", 3) == "go"


def test_an_attempt_that_complete_orders_do_not_name_stops(orders: _Orders) -> None:
    hear(orders, {"another": 9})
    assert orders.wait("attempt", 1) == "go"
    hear(orders, {"another": 9}, complete=True)
    assert orders.wait("attempt", 1) == "stop"


def test_a_worker_without_a_coordinator_saves_and_ends(
    orders: _Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.cluster._SILENCE_SECONDS", 0.2)
    assert orders.wait("attempt", 3) == "pause"
