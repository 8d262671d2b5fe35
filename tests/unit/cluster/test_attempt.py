"""What an attempt's messages mean to its coordinator, and how far it may train."""

from __future__ import annotations

import queue
import threading

import pytest
from fakes import epoch_result, small_job
from waiting import wait_until

from tuner.cluster.attempt import Attempt, Attempts
from tuner.cluster.messages import (
    STOP,
    CheckpointSaved,
    EpochTrained,
    LeaveReason,
    Left,
    Opened,
    Orders,
    Started,
    TrainingOutcome,
)
from tuner.errors import WorkerDiedEarlyError, WorkerLeftError, WorkerLostError


@pytest.fixture
def attempt() -> Attempt:
    return Attempt(small_job(rungs=(1, 3)))


def started(attempt: Attempt) -> Started:
    return Started(attempt=attempt.name)


def opened(attempt: Attempt) -> Opened:
    return Opened(attempt=attempt.name, worker="host, process 7", after=0)


def trained(attempt: Attempt, epoch: int) -> EpochTrained:
    return EpochTrained(attempt=attempt.name, result=epoch_result(0.5, epoch))


def test_a_death_is_the_jobs_fault_only_once_it_was_opened(attempt: Attempt) -> None:
    assert not attempt.is_started
    attempt.receive(started(attempt))
    assert attempt.is_started
    assert type(attempt.death()) is WorkerDiedEarlyError
    attempt.receive(opened(attempt))
    assert type(attempt.death()) is WorkerLostError


@pytest.mark.parametrize(
    ("trains", "error"), [(False, WorkerDiedEarlyError), (True, WorkerLostError)]
)
def test_an_attempt_that_dask_starts_again_has_lost_its_worker(
    attempt: Attempt, trains: bool, error: type[WorkerLostError]
) -> None:
    attempt.receive(started(attempt))
    if trains:
        attempt.receive(opened(attempt))
        assert attempt.next(0.0) == opened(attempt)
    with pytest.raises(queue.Empty):
        attempt.next(0.0)
    attempt.receive(started(attempt))
    assert type(attempt.next(0.0)) is error


@pytest.mark.parametrize(
    ("reason", "error"),
    [("asked", WorkerLeftError), ("unfit", WorkerLeftError), ("too large", WorkerLostError)],
)
def test_a_worker_that_left_is_heard_to_its_end(
    attempt: Attempt, reason: LeaveReason, error: type[WorkerLostError]
) -> None:
    left = Left(attempt=attempt.name, reason=reason, checkpoint=b"of the last epoch")
    attempt.receive(trained(attempt, 1))
    attempt.receive(left)
    assert [attempt.next(0.0), attempt.next(0.0)] == [trained(attempt, 1), left]
    assert type(attempt.next(0.0)) is error


def test_each_epoch_is_taken_once_and_the_outcome_fills_gaps(attempt: Attempt) -> None:
    curve = tuple(epoch_result(0.5, epoch) for epoch in range(1, 10))
    messages = [
        trained(attempt, 1),
        trained(attempt, 1),
        trained(attempt, 3),
        CheckpointSaved(attempt=attempt.name, content=b"c"),
        trained(attempt, 2),
        TrainingOutcome(ending="finished", curve=curve),
    ]
    taken = [[one.epoch for one in attempt.new_epochs(message)] for message in messages]
    assert taken == [[1], [], [], [], [2], [3, 4, 5, 6, 7, 8, 9]]


def test_an_attempt_waits_at_each_rung_and_never_at_its_end(attempt: Attempt) -> None:
    allowed = [attempt.train_until]
    changes = []
    for epoch in range(1, 10):
        list(attempt.new_epochs(trained(attempt, epoch)))
        changes.append(attempt.allow_more())
        allowed.append(attempt.train_until)
    assert allowed == [1, 3, 3, *[10] * 7]
    assert changes == [True, False, True, *[False] * 6]


# --- orders ---


class Sent:
    """Orders, as they are sent."""

    def __init__(self) -> None:
        self.orders: list[Orders] = []
        self.attempts = Attempts(self.orders.append, pausing=threading.Event())

    def wait_for(self, orders: Orders) -> None:
        wait_until(lambda: orders in self.orders, lambda: f"{self.orders}")


@pytest.fixture
def sent():
    made = Sent()
    yield made
    made.attempts.close()


def test_news_is_sent_and_the_living_are_named_again_and_again(
    monkeypatch: pytest.MonkeyPatch, attempt: Attempt
) -> None:
    monkeypatch.setattr("tuner.cluster.attempt._PULSE_SECONDS", 0.05)
    sent = Sent()
    sent.attempts.add(attempt)
    sent.wait_for(Orders(pause=False, attempts={attempt.name: 1}, complete=True))
    list(attempt.new_epochs(trained(attempt, 1)))
    attempt.allow_more()
    sent.attempts.announce(attempt)
    sent.wait_for(Orders(pause=False, attempts={attempt.name: 3}, complete=True))
    sent.attempts.remove(attempt)
    sent.wait_for(Orders(pause=False, attempts={}, complete=True))
    sent.attempts.close()


def test_an_attempt_that_was_removed_is_told_to_stop(sent: Sent, attempt: Attempt) -> None:
    sent.attempts.add(attempt)
    sent.attempts.announce(attempt)
    wait_until(lambda: bool(sent.orders))  # the first are complete
    sent.attempts.remove(attempt)
    sent.wait_for(Orders(pause=False, attempts={attempt.name: STOP}, complete=False))


def test_a_pause_reaches_every_attempt_and_stays(sent: Sent, attempt: Attempt) -> None:
    sent.attempts.add(attempt)
    sent.attempts.pause()
    sent.wait_for(Orders(pause=True, attempts={attempt.name: 1}, complete=True))
    sent.attempts.remove(attempt)
    sent.wait_for(Orders(pause=True, attempts={}, complete=True))


def test_messages_reach_the_attempt_that_they_name_while_it_lives(
    sent: Sent, attempt: Attempt
) -> None:
    other = Attempt(small_job())
    for one in (attempt, other):
        sent.attempts.add(one)
    sent.attempts.receive(trained(attempt, 1))
    assert attempt.next(0.0) == trained(attempt, 1)
    sent.attempts.remove(attempt)
    sent.attempts.receive(trained(attempt, 2))
    sent.attempts.lose_all(lambda: WorkerLeftError("its scheduler dropped it"))
    with pytest.raises(queue.Empty):
        attempt.next(0.0)
    assert isinstance(other.next(0.0), WorkerLeftError)


def test_orders_follow_on_those_that_could_not_be_sent(attempt: Attempt) -> None:
    tried: list[Orders] = []

    def send(orders: Orders) -> None:
        tried.append(orders)
        raise OSError("the scheduler is unavailable")

    attempts = Attempts(send, pausing=threading.Event())
    attempts.add(attempt)
    for count in (1, 2):
        attempts.announce(attempt)
        wait_until(lambda count=count: len(tried) >= count)
    attempts.close()
    assert len(tried) >= 3
