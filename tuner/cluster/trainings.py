"""Dask: the same `train`, with the epochs computed on a worker; its side is `training_task`.

A `Connection` is a scheduler and its workers, wherever they are; a `Cluster` the trainings of one
study on it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import uuid
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from distributed import Future, KilledWorker

from tuner.cluster.attempt import Attempt, Attempts
from tuner.cluster.connection import Connection
from tuner.cluster.messages import (
    CheckpointSaved,
    CheckpointUnusable,
    Left,
    Opened,
    Orders,
    TrainingOutcome,
    TrainingTask,
    WorkerMessage,
    from_wire,
    to_wire,
)
from tuner.cluster.processes import SLOT
from tuner.cluster.trained_study import TrainedStudy
from tuner.cluster.training_task import OpenRun, open_training_run, train_on_worker
from tuner.cluster.trial_files import TrialFiles
from tuner.errors import (
    ClusterError,
    TrainingPausedError,
    TrialEndedError,
    WorkerLeftError,
    is_outage,
    reason_of,
)
from tuner.train import EpochResult, TrainingJob


class Cluster:
    """The trainings of one study on a connection; several studies may share one."""

    def __init__(
        self,
        connection: Connection,
        study: TrainedStudy,
        *,
        development_file: Path,
        threads: int,
        open_run: OpenRun | None = None,
    ) -> None:
        """Opens the trainings of one study.

        Args:
            connection: To the scheduler whose workers train.
            study: What is trained.
            development_file: Its training and validation rows.
            threads: Threads of each training.
            open_run: What a worker trains with; the network where left out. Pickled.
        """
        self._connection = connection
        self._study = study
        self._development_file = development_file
        self._threads = threads
        self._open_run = open_run or open_training_run
        topic = f"tuner-{uuid.uuid4().hex}"
        self._events, self._orders = self._topics = (f"{topic}-events", f"{topic}-orders")
        self._pausing = threading.Event()
        self._files = TrialFiles(study, say=connection.say, pausing=self._pausing)
        self._attempts = Attempts(self._send, pausing=self._pausing)
        connection.subscribe(self._events, self._hear)
        connection.keep_short(self._topics)
        connection.on_loss(self._lose_everything)
        connection.offer(study.development_sha256, development_file)

    def slots(self) -> int:
        """How many trainings the workers of this moment run at once."""
        return self._connection.slots()

    def has_fast_bfloat16(self) -> bool:
        """Whether every worker of this moment is fast in bfloat16."""
        return self._connection.has_fast_bfloat16()

    def pause(self) -> None:
        """Makes every running training save a checkpoint and end at its next epoch."""
        self._attempts.pause()

    def close(self) -> None:
        """Pauses what still trains, and hears no more of it."""
        self._attempts.close()
        self._connection.off_loss(self._lose_everything)
        self._connection.unsubscribe(self._events)
        self._connection.drop(self._topics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def train(self, job: TrainingJob) -> Generator[EpochResult, None, None]:
        """Trains on a worker, from the trial's checkpoint where there is one.

        At a rung the worker waits until the next epoch is asked for; between rungs it runs
        ahead. Closing the generator stops it.

        Raises:
            TrialEndedError: The trial cannot be trained any further.
            TrainingPausedError: `pause` was called; the checkpoint is written.
            WorkerLostError: The worker is gone; calling again resumes from the last checkpoint.
            WorkerLeftError: The same, but no fault of the trial's.
            ClusterError: No worker is left, and none will come.
        """
        attempt = Attempt(job)
        future: Future[Any] | None = None
        try:
            future = self._submit(attempt, job)
            for message in self._messages(attempt, future):
                for result in attempt.new_epochs(message):
                    yield result
                    if attempt.allow_more():
                        self._attempts.announce(attempt)
                self._act_on(message, job.trial)
        finally:
            self._attempts.remove(attempt)
            if future is not None:
                with contextlib.suppress(Exception):  # its client may be closed
                    future.release()

    def _submit(self, attempt: Attempt, job: TrainingJob) -> Future[Any]:
        task = TrainingTask(
            attempt=attempt.name,
            events=self._events,
            orders=self._orders,
            job=job,
            threads=self._threads,
            development_file=str(self._development_file.absolute()),
            development_sha256=self._study.development_sha256,
            checkpoint=self._files.read_checkpoint(job.trial),
            train_until=attempt.train_until,
        )
        while not self._connection.wait_until_up(0.5):
            if self._pausing.is_set():
                raise TrainingPausedError
        # Before its client is looked up: so a scheduler that goes away now is noticed.
        self._attempts.add(attempt)
        client = self._connection.client
        try:
            future = client.submit(
                train_on_worker,
                task,
                self._open_run,
                key=attempt.name,
                pure=False,
                resources={SLOT: 1},
            )
        except Exception as error:
            if client is self._connection.client and self._connection.is_up:
                raise
            raise _dropped() from error
        future.add_done_callback(attempt.end)
        return future

    def _messages(
        self, attempt: Attempt, future: Future[Any]
    ) -> Iterator[WorkerMessage | TrainingOutcome]:
        """What the attempt says, its outcome last."""
        while True:
            try:
                said = attempt.next(timeout=1.0)
            except queue.Empty:
                if self._pausing.is_set() and not attempt.is_started:
                    raise TrainingPausedError from None
                if self._connection.is_hopeless:
                    raise ClusterError(self._connection.why_hopeless()) from None
                if not future.done():
                    continue
                said = future
            if isinstance(said, BaseException):
                raise said
            if isinstance(said, Future):
                yield self._outcome(attempt, said)
                return
            yield said

    def _outcome(self, attempt: Attempt, future: Future[Any]) -> TrainingOutcome:
        """The result of an attempt's Dask task, or what became of that."""
        if future.status == "finished":
            outcome: TrainingOutcome = future.result()
            return outcome
        if future.status in ("cancelled", "lost"):
            self._connection.doubt()
            raise _dropped()
        error = future.exception()
        if isinstance(error, KilledWorker):
            raise attempt.death()
        if is_outage(error) and not isinstance(error, FileNotFoundError):
            self._files.wait_for_the_system()
            raise WorkerLeftError(
                f"its worker was refused by its system ({reason_of(error)})"
            ) from error
        raise error

    def _act_on(self, message: WorkerMessage | TrainingOutcome, trial: int) -> None:
        match message:
            case CheckpointSaved():
                self._files.keep_checkpoint(trial, message.content)
            case CheckpointUnusable():
                self._files.drop_checkpoint(trial, message.reason)
            case Opened():
                self._study.note_worker(
                    trial,
                    worker=message.worker,
                    after=message.after,
                    environment=message.environment,
                )
            case Left():
                if message.checkpoint is not None:
                    self._files.keep_checkpoint(trial, message.checkpoint)
                if message.reason == "unfit":
                    self._connection.note_unfit(message.detail)
            case TrainingOutcome():
                self._conclude(message, trial)

    def _conclude(self, outcome: TrainingOutcome, trial: int) -> None:
        if outcome.ending == "paused":
            if outcome.checkpoint is not None:
                self._files.keep_checkpoint(trial, outcome.checkpoint)
            if self._pausing.is_set():
                raise TrainingPausedError
            raise WorkerLeftError("its worker heard nothing for a while")
        if outcome.ending == "stopped":
            # A verdict closes the generator, so this is none: its worker gave it up.
            raise _dropped()
        if outcome.ending != "finished":
            raise TrialEndedError(outcome.ending, outcome.detail)
        if outcome.best_weights is not None:
            self._files.keep_weights(trial, outcome.best_weights)

    def _hear(self, event: tuple[float, Mapping[str, Any]]) -> None:
        _, document = event
        message = from_wire(document)
        if isinstance(message, WorkerMessage):
            self._attempts.receive(message)

    def _send(self, orders: Orders) -> None:
        if self._connection.is_up:
            self._connection.client.log_event(self._orders, to_wire(orders))

    def _lose_everything(self) -> None:
        self._attempts.lose_all(_dropped)


def _dropped() -> WorkerLeftError:
    return WorkerLeftError("its scheduler dropped it")
