"""Cheap stand-ins for training: learning curves by arithmetic, no TensorFlow."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from tuner.artifacts import publish
from tuner.cluster.messages import TrainingTask
from tuner.data.identity import DataIdentity
from tuner.errors import TrainingPausedError
from tuner.search.attributes import curve_of
from tuner.search.study import create_or_resume
from tuner.search.tuned_study import FINISHED, TunedStudy
from tuner.spec.architecture import ModelConfig
from tuner.spec.reader import spec_from_document
from tuner.spec.spec import StudySpec
from tuner.storage.storage import Storage
from tuner.train import EpochResult, Train, TrainingJob

if TYPE_CHECKING:  # worker processes import this file
    import pytest

IDENTITY = DataIdentity(
    source="synthetic",
    synthetic=True,
    sha256="a" * 64,
    split_id="b" * 64,
    split_seed=1,
    max_length=200,
    training_rows=8,
    validation_rows=1,
    test_rows=1,
)


def small_spec(**changes: object) -> StudySpec:
    """A study of nine epochs over a learning rate and a number of blocks; None leaves a key out."""
    document: dict[str, object] = {
        "name": "small",
        "trials": 12,
        "data": {"source": "synthetic"},
        "training": {"max_epochs": 9},
        "hyperband": {"min_epochs": 1, "eta": 3},
        "space": {
            "blocks": {"low": 1, "high": 2},
            "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
        },
    }
    document |= changes
    return spec_from_document({key: value for key, value in document.items() if value is not None})


@functools.cache
def _tables_of_sqlite() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        Storage(f"sqlite:///{folder}/tuner.db").close()
        return Path(folder, "tuner.db").read_bytes()


def ready_sqlite(folder: Path) -> str:
    """The URL of a SQLite database in a folder, with every table where it is new."""
    file = folder / "tuner.db"
    if not file.exists():
        file.write_bytes(_tables_of_sqlite())
    return f"sqlite:///{file}"


def make_study(
    folder: Path,
    spec: StudySpec | None = None,
    *,
    url: str | None = None,
    development_sha256: str = "c" * 64,
) -> TunedStudy:
    folder.mkdir(parents=True, exist_ok=True)
    return create_or_resume(
        Storage(url or ready_sqlite(folder)),
        spec or small_spec(),
        IDENTITY,
        development_sha256=development_sha256,
        artifacts_root=folder / "artifacts",
    )


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


def loss_of(config: ModelConfig, trial: int, epoch: int) -> float:
    """A validation loss that falls with the epoch, to a level that the configuration sets."""
    digest = hashlib.sha256(repr((asdict(config), trial)).encode()).digest()
    level = 0.5 + digest[0] / 1024
    return level + 0.2 / epoch


def epoch_result(loss: float, epoch: int) -> EpochResult:
    return EpochResult(
        epoch=epoch,
        training_loss=loss - 0.05,
        training_accuracy=0.7,
        validation_loss=loss,
        validation_accuracy=0.6,
        seconds=0.001,
    )


def small_job(spec: StudySpec | None = None, **changes: Any) -> TrainingJob:
    """Trial 0 of a small study, with other fields where they are given."""
    spec = spec or small_spec()
    job = TrainingJob(
        config=spec.space.resolve({"blocks": 1, "learning_rate": 1e-3}),
        trial=0,
        seed=spec.seed,
        precision="float32",
        rungs=spec.rungs,
        settings=spec.training,
    )
    return replace(job, **changes)


def fake_train(job: TrainingJob, *, epochs: int = 9) -> Generator[EpochResult, None, None]:
    for epoch in range(1, epochs + 1):
        yield epoch_result(loss_of(job.config, job.trial, epoch), epoch)


class FakeWorkers:
    """Trains in the coordinator's own threads."""

    def __init__(self, slots: int = 2, train: Train = fake_train) -> None:
        self._slots = slots
        self._train = train
        self.pausing = threading.Event()
        self.fast_bfloat16 = False
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()

    def slots(self) -> int:
        return self._slots

    def has_fast_bfloat16(self) -> bool:
        return self.fast_bfloat16

    def pause(self) -> None:
        self.pausing.set()

    def train(self, job: TrainingJob) -> Generator[EpochResult, None, None]:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            for result in self._train(job):
                if self.pausing.is_set():
                    raise TrainingPausedError
                yield result
        finally:
            with self._lock:
                self._now -= 1


class Notes:
    """A watcher that remembers."""

    def __init__(self, on_epoch: Callable[[int, EpochResult], None] | None = None) -> None:
        self.ended: list[FrozenTrial] = []
        self.said: list[str] = []
        self._on_epoch = on_epoch

    def epoch(self, trial: int, result: EpochResult) -> None:
        if self._on_epoch is not None:
            self._on_epoch(trial, result)

    def trial_ended(self, trial: FrozenTrial) -> None:
        self.ended.append(trial)

    def say(self, message: str) -> None:
        self.said.append(message)

    def tick(self, running: int) -> None:
        pass


class FakeRun:
    """A worker's training that takes no time worth naming; `study.seed` sets the pace.

    The seed is read as milliseconds an epoch, so that a test can catch a trial in the middle.
    """

    def __init__(self, task: TrainingTask) -> None:
        self._job = task.job
        self.history: list[EpochResult] = []
        if task.checkpoint is not None:
            self.history = [EpochResult(**row) for row in json.loads(task.checkpoint)]

    def epochs(self) -> Iterator[EpochResult]:
        for epoch in range(len(self.history) + 1, self._job.settings.max_epochs + 1):
            time.sleep(self._job.seed / 1000)
            result = epoch_result(loss_of(self._job.config, self._job.trial, epoch), epoch)
            # Which process trained the epoch: a field that no decision looks at.
            result = replace(result, seconds=float(os.getpid()))
            self.history.append(result)
            yield result

    def checkpoint(self) -> bytes:
        return json.dumps([asdict(result) for result in self.history]).encode()

    def best_weights(self) -> bytes:
        return b"weights"


def refuse_writes(
    monkeypatch: pytest.MonkeyPatch, kind: str, *, times: int, number: int = errno.ENOSPC
) -> list[Path]:
    """A coordinator cannot write files of a kind so many times; returns the attempts.

    Args:
        monkeypatch: Undoes it.
        kind: The folder's name, "weights" or "checkpoints".
        times: After which they can be written.
        number: Of the system's error; a full disk where left out.
    """
    attempts: list[Path] = []

    def write(path: Path, content: bytes, **options: Any) -> None:
        if path.parent.name == kind:
            attempts.append(path)
            if len(attempts) <= times:
                raise OSError(number, os.strerror(number))
        publish(path, content, **options)

    monkeypatch.setattr("tuner.cluster.trial_files.publish", write)
    monkeypatch.setattr("tuner.cluster.trial_files._RETRY_SECONDS", 0.01)
    return attempts
