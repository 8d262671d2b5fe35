"""Dask: the same `train`, with the epochs computed on a worker; its side is `attempt`.

A `Connection` is a scheduler and its workers, wherever they are; a `Cluster` the trainings of one
study on it.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
import uuid
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from distributed import Future, KilledWorker

from tuner.artifacts import StudyArtifacts, publish
from tuner.cluster.attempt import OpenRun, open_training_run, train_on_worker
from tuner.cluster.connection import (
    CONNECT_SECONDS,
    Connection,
)
from tuner.cluster.messages import (
    STOP,
    CheckpointSaved,
    CheckpointUnusable,
    EpochTrained,
    LeaveReason,
    Left,
    Opened,
    Orders,
    Started,
    TrainingOutcome,
    TrainingTask,
    WorkerMessage,
    from_wire,
    to_wire,
)
from tuner.cluster.processes import (
    SLOT,
)
from tuner.errors import (
    ClusterError,
    TrainingPausedError,
    TrialEndedError,
    WorkerDiedEarlyError,
    WorkerLeftError,
    WorkerLostError,
    is_outage,
    reason_of,
)
from tuner.every import Every
from tuner.logs import about
from tuner.train import EpochResult, TrainingJob

_PULSE_SECONDS = 2.0  #: between two full sets of orders
_DISK_PAUSE_SECONDS = 5.0  #: between two attempts to read or write what the system refused
#: The disk is full, over its quota, or over the limit for one file.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class TrainedStudy(Protocol):
    """What trainings need of their study."""

    @property
    def name(self) -> str: ...

    @property
    def development_sha256(self) -> str:
        """Of the development file."""
        ...

    @property
    def artifacts(self) -> StudyArtifacts:
        """Where checkpoints and weights are kept."""
        ...

    def renews_lease(self) -> bool:
        """Whether this process still runs the study; raises LeaseLostError if another does."""
        ...

    def note_worker(self, trial: int, *, worker: str, after: int) -> None:
        """Notes who trains a trial, and after which epoch it resumed (0: from the start)."""
        ...


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
        self._events, self._orders_topic = f"{topic}-events", f"{topic}-orders"
        self._topics = (self._events, self._orders_topic)
        self._attempts: dict[str, _Attempt] = {}
        self._news: dict[str, int] = {}  # orders that were not sent yet
        self._lock = threading.Lock()
        self._pausing = False
        self._is_unwritable = False
        self._wake = threading.Event()
        self._closed = threading.Event()
        connection.subscribe(self._events, self._hear)
        connection.keep_short(self._topics)
        connection.on_loss(self._lose_everything)
        connection.offer(study.development_sha256, development_file)
        self._pulse = threading.Thread(target=self._keep_pulsing, name="orders", daemon=True)
        self._pulse.start()

    def slots(self) -> int:
        """How many trainings the workers of this moment run at once."""
        return self._connection.slots()

    def has_fast_bfloat16(self) -> bool:
        """Whether every worker of this moment is fast in bfloat16."""
        return self._connection.has_fast_bfloat16()

    def pause(self) -> None:
        """Makes every running training save a checkpoint and end at its next epoch."""
        self._pausing = True
        self._wake.set()

    def close(self) -> None:
        self._closed.set()
        self._wake.set()
        self._pulse.join(timeout=CONNECT_SECONDS)
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
            TrialEndedError: The trial cannot go on.
            TrainingPausedError: `pause` was called; the checkpoint is written.
            WorkerLostError: The worker is gone; calling again goes on from the last checkpoint.
            WorkerLeftError: The same, but no fault of the trial's.
            ClusterError: No worker is left, and none will come.
        """
        trial = job.trial
        # Epochs at which a worker waits to be told more; nobody waits after the last one.
        stations = (*sorted(job.rungs), job.settings.max_epochs + 1)
        attempt = _Attempt(train_until=stations[0])
        future: Future[Any] | None = None
        seen = 0
        try:
            future = self._submit(attempt, job)
            for message in self._messages(attempt, future):
                if isinstance(message, CheckpointSaved):
                    self._keep_checkpoint(trial, message.content)
                    continue
                if isinstance(message, Opened):
                    self._study.note_worker(trial, worker=message.worker, after=message.after)
                    continue
                if isinstance(message, CheckpointUnusable):
                    self._drop_checkpoint(trial, message.reason)
                    continue
                is_epoch = isinstance(message, EpochTrained)
                fresh = [message.result] if is_epoch else message.curve
                for result in fresh:
                    if result.epoch != seen + 1:  # told before, or a gap the outcome will fill
                        continue
                    seen = result.epoch
                    yield result
                    self._allow(attempt, next(s for s in stations if s > seen))
                if isinstance(message, TrainingOutcome):
                    self._conclude(message, trial)
                    return
        finally:
            with self._lock:
                self._attempts.pop(attempt.name, None)
                self._news[attempt.name] = STOP
            self._wake.set()
            if future is not None:
                with contextlib.suppress(Exception):  # its client may be closed
                    future.release()

    def _submit(self, attempt: _Attempt, job: TrainingJob) -> Future[Any]:
        task = TrainingTask(
            attempt=attempt.name,
            events=self._events,
            orders=self._orders_topic,
            job=job,
            threads=self._threads,
            development_file=str(self._development_file.absolute()),
            development_sha256=self._study.development_sha256,
            checkpoint=self._read_checkpoint(job.trial),
            train_until=attempt.train_until,
        )
        while not self._connection.wait_until_up(0.5):
            if self._pausing:
                raise TrainingPausedError
        # Before its client is looked up: so a scheduler that goes away now is noticed.
        with self._lock:
            self._attempts[attempt.name] = attempt
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
            raise WorkerLeftError(_SCHEDULER_WENT) from error
        future.add_done_callback(attempt.inbox.put)
        return future

    def _messages(self, attempt: _Attempt, future: Future[Any]) -> Iterator[Any]:
        """What the attempt says, its outcome last."""
        while True:
            try:
                message = attempt.inbox.get(timeout=1.0)
            except queue.Empty:
                if self._pausing and not attempt.started:  # it waits for a worker
                    raise TrainingPausedError from None
                if self._connection.is_hopeless:
                    raise ClusterError(self._connection.why_hopeless()) from None
                if not future.done():
                    continue
                message = future
            if isinstance(message, BaseException):
                raise message
            if not isinstance(message, Future):
                yield message
            elif message.status == "finished":
                yield message.result()
                return
            elif message.status in ("cancelled", "lost"):
                self._connection.doubt()
                raise WorkerLeftError(_SCHEDULER_WENT)
            else:
                error = message.exception()
                if isinstance(error, KilledWorker):
                    raise _death(attempt)
                if is_outage(error) and not isinstance(error, FileNotFoundError):
                    self._wait_for_the_system()
                    raise WorkerLeftError(
                        f"its worker was refused by its system ({reason_of(error)})"
                    ) from error
                raise error

    def _conclude(self, outcome: TrainingOutcome, trial: int) -> None:
        if outcome.ending == "paused":
            if outcome.checkpoint is not None:
                self._keep_checkpoint(trial, outcome.checkpoint)
            if self._pausing:
                raise TrainingPausedError
            raise WorkerLeftError("its worker heard nothing for a while")
        if outcome.ending == "stopped":
            # A verdict closes the generator, and nobody would be here: its worker gave it up.
            raise WorkerLeftError(_SCHEDULER_WENT)
        if outcome.ending != "finished":
            raise TrialEndedError(outcome.ending, outcome.detail)
        if outcome.best_weights is not None:
            self._keep_weights(trial, outcome.best_weights)

    def _read_checkpoint(self, trial: int) -> bytes | None:
        """The trial's checkpoint, however long it takes until it can be read; None without one.

        Raises:
            TrainingPausedError: The study is stopped meanwhile; the trial stays open.
        """
        path = self._study.artifacts.checkpoint(trial)
        is_told = False
        while True:
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None
            except (OSError, MemoryError) as error:
                if not is_told:
                    is_told = True
                    self._say(
                        f"Trial {trial} of {self._study.name}: {path} cannot be read "
                        f"({reason_of(error)}); the trial waits until it can. Nothing is lost. "
                        "Without that file it would train again from epoch 1.",
                        trial,
                    )
            self._wait_for_the_system()

    def _wait_for_the_system(self) -> None:
        """The pause before what the system refused is tried again.

        Raises:
            TrainingPausedError: The study is stopped; the trial stays open.
        """
        waited = 0.0
        while waited < _DISK_PAUSE_SECONDS:
            if self._pausing or self._closed.wait(0.2):
                raise TrainingPausedError
            waited += 0.2

    def _drop_checkpoint(self, trial: int, reason: str) -> None:
        """A checkpoint that cannot be used costs epochs, never its trial."""
        self._study.renews_lease()
        self._study.artifacts.drop_checkpoint(trial)  # else the next one takes its place
        self._say(
            f"Trial {trial} of {self._study.name}: its checkpoint cannot be used and was removed "
            f"({reason.splitlines()[0][:200] if reason else 'no reason given'}). It trains again "
            "from epoch 1; what it reported stands.",
            trial,
        )

    def _say(self, message: str, trial: int | None = None) -> None:
        with about(study=self._study.name, trial=trial):
            self._connection.say(message)

    def _keep_checkpoint(self, trial: int, content: bytes) -> None:
        """Writes a checkpoint; one that the disk has no room for is missed by nobody but time."""
        try:
            self._publish(self._study.artifacts.checkpoint(trial), content)
        except OSError as error:
            self._say_cannot_be_written(error)
        else:
            self._is_unwritable = False

    def _keep_weights(self, trial: int, content: bytes) -> None:
        """Writes the best weights, however long the disk takes to have room.

        Raises:
            TrainingPausedError: The study is stopped meanwhile; the trial stays open.
        """
        while True:
            try:
                self._publish(self._study.artifacts.weights(trial), content)
            except OSError as error:
                self._say_cannot_be_written(error)
            else:
                self._is_unwritable = False
                return
            self._wait_for_the_system()

    def _publish(self, path: Path, content: bytes) -> None:
        """Writes a file of the study's while this process certainly drives it.

        Raises:
            LeaseLostError: Another coordinator took over; its file, or none, stays as it is.
        """
        publish(path, content, only_if=self._study.renews_lease)

    def _say_cannot_be_written(self, error: OSError) -> None:
        if not self._is_unwritable:
            self._is_unwritable = True
            remedy = " for room. Free some" if error.errno in _FULL else ""
            self._say(
                f"{self._study.artifacts.folder} cannot be written ({reason_of(error)}): "
                f"checkpoints are skipped, and finished trials wait{remedy}; nothing is lost."
            )

    def _allow(self, attempt: _Attempt, until: int) -> None:
        if until > attempt.train_until:
            attempt.train_until = until
            with self._lock:
                self._news[attempt.name] = until
            self._wake.set()

    def _keep_pulsing(self) -> None:
        """Sends news at once, and complete orders again and again."""
        pause = Every(_PULSE_SECONDS)  # between two complete orders
        while True:
            self._wake.wait(_PULSE_SECONDS)
            self._wake.clear()
            closed = self._closed.is_set()
            complete = closed or self._pausing or pause.is_due()
            with self._lock:
                orders, self._news = self._news, {}
                if complete:
                    orders = {name: one.train_until for name, one in self._attempts.items()}
            if complete:
                pause.begin_pause()
            if self._connection.is_up:
                message = Orders(pause=self._pausing, attempts=orders, complete=complete)
                with contextlib.suppress(Exception):  # a scheduler that is away hears the next one
                    self._connection.client.log_event(self._orders_topic, to_wire(message))
            if closed:
                return

    def _lose_everything(self) -> None:
        with self._lock:
            attempts = list(self._attempts.values())
        for attempt in attempts:
            attempt.inbox.put(WorkerLeftError(_SCHEDULER_WENT))

    def _hear(self, event: tuple[float, Mapping[str, Any]]) -> None:
        _, document = event
        message = from_wire(document)
        if not isinstance(message, WorkerMessage):
            return
        with self._lock:
            attempt = self._attempts.get(message.attempt)
        if attempt is None:  # a worker that was given up, and goes on: not believed
            return
        if isinstance(message, Started):
            if attempt.started:  # Dask started it again on its own
                attempt.inbox.put(_death(attempt))
            attempt.started = True
        elif isinstance(message, Left):
            if message.checkpoint is not None:
                attempt.inbox.put(
                    CheckpointSaved(attempt=message.attempt, content=message.checkpoint)
                )
            if message.reason == "unfit":
                self._connection.note_unfit(message.detail)
            kind, what = _LEFT[message.reason]
            attempt.inbox.put(kind(what))
        else:
            if isinstance(message, Opened):
                attempt.opened = True
            attempt.inbox.put(message)


_SCHEDULER_WENT = "its scheduler dropped it"
_LEFT: Mapping[LeaveReason, tuple[type[WorkerLostError], str]] = {
    "asked": (WorkerLeftError, "its worker left and gave it back"),
    "unfit": (WorkerLeftError, "its worker cannot train and left"),
    "too large": (WorkerLostError, "its worker ran out of memory"),
}


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """What the coordinator knows of one attempt."""

    train_until: int
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: bool = False  #: a worker began its task
    opened: bool = False  #: the network was built, and began to train
    inbox: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)


def _death(attempt: _Attempt) -> WorkerLostError:
    if attempt.opened:
        return WorkerLostError("its worker died")
    return WorkerDiedEarlyError("its worker died before it trained")
