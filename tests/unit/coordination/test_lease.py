from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from tuner.coordination.lease import LeaseKeeper
from tuner.errors import LeaseLostError, StorageError


class Database:
    """A storage whose heartbeats a test answers."""

    masked_url = "sqlite:///a.db"

    def __init__(self) -> None:
        self.heartbeats: list[Future[bool]] = []
        self.gave_up = 0
        self.error: Exception | None = None
        self.now = 50.0
        self.lease = self

    def begin_heartbeat(self) -> Future[bool]:
        self.heartbeats.append(Future())
        return self.heartbeats[-1]

    def give_up(self) -> None:
        self.gave_up += 1

    def release(self) -> None:
        if self.error is not None:
            raise self.error


def keeper_of(database: Any) -> LeaseKeeper:
    return LeaseKeeper(database, clock=lambda: database.now)


def test_one_heartbeat_a_second_and_never_two_at_once() -> None:
    database = Database()
    keeper = keeper_of(database)
    for seconds in (0.0, 0.5, 5.0):  # the first is not answered
        database.now += seconds
        assert not keeper.beat()
    assert len(database.heartbeats) == 1
    database.heartbeats[0].set_result(False)
    assert not keeper.beat()
    assert not keeper.beat()
    assert len(database.heartbeats) == 2
    database.heartbeats[1].set_result(True)  # somebody asked for a stop
    assert keeper.beat()
    assert not keeper.beat()
    assert len(database.heartbeats) == 2  # within the same second
    database.now += 1.0
    keeper.beat()
    assert len(database.heartbeats) == 3


def test_a_lost_lease_ends_the_run() -> None:
    database = Database()
    keeper = keeper_of(database)
    keeper.beat()
    database.heartbeats[0].set_exception(LeaseLostError("taken over"))
    with pytest.raises(LeaseLostError):
        keeper.beat()


def test_a_silent_database_is_given_up_only_once_the_study_is_to_stop() -> None:
    database = Database()
    keeper = keeper_of(database)
    keeper.beat()
    database.now += 3600.0
    keeper.beat()
    keeper.stop()
    database.now += 4.9
    keeper.stop()  # a second Ctrl-C does not begin the patience again
    keeper.beat()
    assert database.gave_up == 0
    database.now += 0.2
    with pytest.raises(StorageError, match=r"sqlite:///a\.db does not answer"):
        keeper.beat()
    assert database.gave_up == 1


@pytest.mark.parametrize(
    ("error", "has_failed", "told"),
    [
        (None, False, None),
        (StorageError("no answer"), False, "the study stopped without it"),
        (LeaseLostError("taken over"), False, "taken over"),
        (StorageError("no answer"), True, None),
        (LeaseLostError("taken over"), True, None),
    ],
)
def test_an_error_of_the_release_hides_no_other(
    error: Exception | None, has_failed: bool, told: str | None
) -> None:
    database = Database()
    database.error = error
    keeper = keeper_of(database)
    if told is None:
        keeper.release(has_failed=has_failed)
        return
    with pytest.raises((StorageError, LeaseLostError), match=told):
        keeper.release(has_failed=has_failed)
