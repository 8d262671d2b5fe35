"""Checkpoints and weights: on a disk that refuses, and behind the lease that fences them."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import make_study, refuse_writes

from tuner.artifacts import publish
from tuner.cluster.trial_files import TrialFiles
from tuner.coordination.study_trainings import StudyTrainings
from tuner.errors import LeaseLostError, TrainingPausedError
from tuner.search.tuned_study import TunedStudy


class Desk:
    """The files of a study whose lease this process holds."""

    def __init__(self, tuned: TunedStudy) -> None:
        self.tuned = tuned
        self.said: list[str] = []
        self.pausing = threading.Event()
        self.files = TrialFiles(StudyTrainings(tuned), say=self.said.append, pausing=self.pausing)
        self.checkpoint = tuned.artifacts.checkpoint(0)
        self.weights = tuned.artifacts.weights(0)
        tuned.storage.lease.take(tuned.id)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr("tuner.cluster.trial_files._RETRY_SECONDS", 0.01)
    made = Desk(make_study(tmp_path))
    yield made
    made.tuned.storage.close()


def test_what_was_kept_is_read_again(desk: Desk) -> None:
    assert desk.files.read_checkpoint(0) is None
    desk.files.keep_checkpoint(0, b"of epoch 3")
    assert desk.files.read_checkpoint(0) == b"of epoch 3"
    desk.files.keep_weights(0, b"best")
    assert desk.weights.read_bytes() == b"best"
    assert desk.said == []


def test_weights_wait_for_room_and_checkpoints_do_not(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = refuse_writes(monkeypatch, "weights", times=3)
    desk.files.keep_weights(0, b"best")
    assert desk.weights.read_bytes() == b"best"
    assert len(attempts) == 4
    (line,) = desk.said  # not once for each
    assert "cannot be written (No space left on device): checkpoints are skipped" in line
    assert "wait for room. Free some; nothing is lost." in line
    refuse_writes(monkeypatch, "checkpoints", times=2, number=errno.EACCES)
    for content in (b"of epoch 1", b"of epoch 2"):
        desk.files.keep_checkpoint(0, content)
    assert not desk.checkpoint.exists()
    assert len(desk.said) == 2  # it could be written in between
    assert "finished trials wait; nothing is lost." in desk.said[1]
    desk.files.keep_checkpoint(0, b"of epoch 3")
    assert desk.checkpoint.read_bytes() == b"of epoch 3"


def test_a_pause_waits_for_no_disk(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_writes(monkeypatch, "weights", times=1000)
    desk.checkpoint.mkdir(parents=True)  # as it is, it will never be read
    desk.pausing.set()
    with pytest.raises(TrainingPausedError):
        desk.files.keep_weights(0, b"best")
    with pytest.raises(TrainingPausedError):
        desk.files.read_checkpoint(0)
    assert "cannot be read" in desk.said[-1]


CHANGES = {
    "a checkpoint": lambda files: files.keep_checkpoint(0, b"old"),
    "weights": lambda files: files.keep_weights(0, b"old"),
    "a checkpoint that is no good": lambda files: files.drop_checkpoint(0, "damaged"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("stands", [True, False])
def test_a_coordinator_that_was_frozen_and_replaced_changes_no_file(
    desk: Desk, change, stands: bool
) -> None:
    files = (desk.checkpoint, desk.weights)
    if stands:  # of the next coordinator; else it has ended the trial
        for file in files:
            publish(file, b"new")
    desk.tuned.storage.lease._certain_at -= 3600.0  # an hour passes
    desk.tuned.storage._transactions.run(
        lambda c: c.exec_driver_sql("UPDATE tuner_lease SET token = 'another'")
    )
    with pytest.raises(LeaseLostError):
        change(desk.files)
    assert [file.read_bytes() for file in files if file.exists()] == [b"new", b"new"] * stands
    assert [one for file in files for one in file.parent.glob(".*")] == []
    assert desk.said == []


def test_a_coordinator_that_slept_and_still_holds_its_lease_writes_its_files(desk: Desk) -> None:
    desk.tuned.storage.lease._certain_at -= 3600.0
    for change in CHANGES.values():
        change(desk.files)
    assert desk.weights.read_bytes() == b"old"
    assert not desk.checkpoint.exists()
    (line,) = desk.said
    assert line.startswith("Trial 0 of small: its checkpoint cannot be used and was removed (dam")


def test_a_coordinator_that_surely_holds_its_lease_asks_no_database_before_it_writes(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as away:
        away.setattr(desk.tuned.storage.lease, "heartbeat", pytest.fail)
        desk.files.keep_checkpoint(0, b"of a moment ago")
    assert desk.checkpoint.read_bytes() == b"of a moment ago"
