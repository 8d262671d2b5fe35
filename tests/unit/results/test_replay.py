"""A trial that is trained again is compared with its curve, bit for bit or within tolerances."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeWorkers, Notes, fake_train, make_study
from optuna.trial import TrialState

from tuner.cluster.environment import environment
from tuner.coordination.coordinator import Coordinator
from tuner.coordination.study_trainings import StudyTrainings
from tuner.errors import StudyError, TrialEndedError
from tuner.results.replay import OpenRun, replay
from tuner.search.attributes import ENVIRONMENTS_KEY
from tuner.search.tuned_study import TunedStudy
from tuner.train import Environment, EpochResult, TrainingJob


def made(folder: Path, *parts: tuple[int, Environment], ended: str | None = None) -> TunedStudy:
    """A study whose trials were trained here, or by other workers after some epochs."""
    tuned = make_study(folder)

    def train(job: TrainingJob) -> Generator[EpochResult, None, None]:
        for after, its_environment in parts or [(0, environment(2))]:
            StudyTrainings(tuned).note_worker(
                job.trial, worker="w", after=after, environment=its_environment
            )
        yield from itertools.islice(fake_train(job), None if ended is None else 2)
        if ended is not None:
            raise TrialEndedError(ended, "epoch 3")

    assert Coordinator(tuned, FakeWorkers(2, train), Notes()).run() == "finished"
    return tuned


@pytest.fixture
def tuned(tmp_path: Path) -> TunedStudy:
    return made(tmp_path)


def run(**changes: Any) -> OpenRun:
    """Trains as the study did, but for what is changed in the second epoch."""

    class Run:
        def __init__(self, job: TrainingJob) -> None:
            self._job = job

        def epochs(self) -> Iterator[EpochResult]:
            for result in fake_train(self._job):
                yield dataclasses.replace(result, **changes) if result.epoch == 2 else result

    def open_run(_: TunedStudy, job: TrainingJob, threads: int) -> Run:
        assert threads == 2
        assert job.settings.max_trial_seconds == math.inf
        return Run(job)

    return open_run


def numbers(tuned: TunedStudy, state: TrialState) -> list[int]:
    return [trial.number for trial in tuned.trials(state)]


def test_every_trial_is_the_same_again(tuned: TunedStudy) -> None:
    for trial in tuned.trials():
        seen: list[EpochResult] = []
        found = replay(tuned, trial.number, on_epoch=seen.append, open_run=run())
        assert (found.equal, found.is_exact, found.first_difference) == (True, True, None)
        # A pruned trial is trained as far as it was, and no further.
        assert found.epochs == trial.last_step == len(seen)
        assert found.to_document()["environment"] == {}


def test_the_first_difference_is_named(tuned: TunedStudy) -> None:
    number = numbers(tuned, TrialState.COMPLETE)[0]
    document = replay(tuned, number, open_run=run(validation_accuracy=0.6001)).to_document()
    assert document["equal"] is False  # on this very machine bits must agree
    assert document["first_difference"] == {
        "epoch": 2,
        "figure": "validation_accuracy",
        "stored": 0.6,
        "replayed": 0.6001,
    }


@pytest.mark.parametrize(("accuracy", "equal"), [(0.6001, True), (0.9, False)])
def test_elsewhere_a_curve_may_differ_within_tolerances(
    tmp_path: Path, accuracy: float, equal: bool
) -> None:
    tuned = made(tmp_path, (0, environment(2) | {"processor": "another"}))
    number = numbers(tuned, TrialState.COMPLETE)[0]
    found = replay(tuned, number, open_run=run(validation_accuracy=accuracy))
    assert found.equal is equal
    assert not found.is_exact
    assert found.to_document()["environment"].keys() == {"processor"}


def test_each_worker_of_a_resumed_trial_is_compared(tmp_path: Path) -> None:
    other = environment(2) | {"python": "3.1"}
    tuned = made(tmp_path, (0, environment(2)), (1, other), (4, other), (2, environment(2)))
    parts = tuned.trials()[0].system_attrs[ENVIRONMENTS_KEY]
    # What was trained after epoch 4 was trained again, from epoch 3 on.
    assert [part["from_epoch"] for part in parts] == [1, 2, 3]
    found = replay(tuned, 0, open_run=run())
    assert found.differs is not None
    assert found.differs["python"][0] == "3.1"


def test_a_trial_of_an_earlier_version_says_that_it_is_not_known_what_trained_it(
    tmp_path: Path,
) -> None:
    found = replay(made(tmp_path, (0, {"threads": 2})), 0, open_run=run())
    assert found.equal
    assert found.differs is not None


def test_a_curve_that_goes_on_or_ends_otherwise_is_a_difference(tuned: TunedStudy) -> None:
    number = numbers(tuned, TrialState.COMPLETE)[0]

    class Short:
        def epochs(self) -> Iterator[EpochResult]:
            yield from list(fake_train(job))[:-1]

    class Diverges(Short):
        def epochs(self) -> Iterator[EpochResult]:
            yield from super().epochs()
            raise TrialEndedError("diverged", "epoch 9")

    job: TrainingJob
    for kind, figure in ((Short, "epochs"), (Diverges, "ended")):

        def open_run(_: TunedStudy, its: TrainingJob, __: int, kind: type[Short] = kind) -> Short:
            nonlocal job
            job = its
            return kind()

        found = replay(tuned, number, open_run=open_run)
        assert found.first_difference is not None
        assert found.first_difference.figure == figure
        assert not found.equal


@pytest.mark.parametrize(("again", "equal"), [("diverged", True), ("over_time", False)])
def test_a_trial_that_diverged_diverges_again(tmp_path: Path, again: str, equal: bool) -> None:
    tuned = made(tmp_path, ended="diverged")

    class Ends:
        def __init__(self, job: TrainingJob) -> None:
            self._job = job

        def epochs(self) -> Iterator[EpochResult]:
            yield from itertools.islice(fake_train(self._job), 2)
            raise TrialEndedError(again, "epoch 3")

    # Of one that was not pruned at epoch 1 before.
    number = next(trial.number for trial in tuned.trials() if trial.last_step == 2)
    assert replay(tuned, number, open_run=lambda _, job, __: Ends(job)).equal is equal


@pytest.mark.parametrize(("number", "words"), [(99, "has no trial 99; it has 12 trials")])
def test_what_cannot_be_replayed_is_said(tuned: TunedStudy, number: int, words: str) -> None:
    with pytest.raises(StudyError, match=words):
        replay(tuned, number, open_run=run())
