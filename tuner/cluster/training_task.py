"""The Dask task that trains one trial: one attempt, on the side of its worker.

Two topics join a coordinator to its workers (`tuner.cluster.messages`). On the *events* topic
workers say what they did: epochs and checkpoints, each with the attempt that they belong to. On
the *orders* topic the coordinator says how far each attempt may train, again and again, so that a
lost message costs seconds. The task's result repeats the whole curve, because events may be lost.

A worker needs neither Optuna nor a database: nothing here imports them.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Protocol

from distributed import get_client, get_worker

from tuner.cluster.environment import environment
from tuner.cluster.leaving import IN_FLIGHT, InFlight, give_back_on_leaving, leave_unfit
from tuner.cluster.messages import (
    STOP,
    CheckpointSaved,
    CheckpointUnusable,
    EpochTrained,
    Opened,
    Orders,
    Started,
    TrainingOutcome,
    TrainingTask,
    WorkerMessage,
    from_wire,
    metadata_keys,
    to_wire,
)
from tuner.cluster.processes import THREADS_VARIABLE
from tuner.commands import install_command
from tuner.data.delivery import development_file
from tuner.errors import SetupError, TrialEndedError, is_outage
from tuner.every import Every
from tuner.train import EpochResult

_SILENCE_SECONDS = 60.0  #: a worker that heard no orders for this long saves and ends
_LOOK_SECONDS = 0.5  #: between two looks at whether the scheduler still wants an attempt
#: A checkpoint is sent at the end of the first epoch that ends so long after the one before: what
#: a killed worker costs is this time and one epoch at most. A run can be put down between epochs
#: only: in the middle of one, its sums and the state of each dropout would belong to it, too.
_CHECKPOINT_SECONDS = 60.0


class Run(Protocol):
    """One trial's training on a worker: a `TrainingRun`, or a cheap one in a test."""

    history: list[EpochResult]  #: of the checkpoint

    def epochs(self) -> Iterator[EpochResult]: ...

    def checkpoint(self) -> bytes: ...

    def best_weights(self) -> bytes: ...


OpenRun = Callable[[TrainingTask], Run]


def train_on_worker(task: TrainingTask, open_run: OpenRun) -> TrainingOutcome:
    """Trains one attempt on a Dask worker; see `tuner.cluster.trainings.Cluster.train`."""
    worker = get_worker()
    give_back_on_leaving(worker)
    permits = _Permits.of(task.orders)
    permits.begin(task.attempt, task.train_until)
    in_flight = InFlight(events=task.events, snapshot=task.checkpoint)
    IN_FLIGHT[task.attempt] = in_flight

    def say(message: WorkerMessage) -> None:
        worker.log_event(task.events, to_wire(message))

    def is_unwanted() -> bool:
        # The scheduler takes a task back when its client is gone, for instance killed.
        known = worker.state.tasks.get(task.attempt)
        return known is None or known.state == "cancelled"

    say(Started(attempt=task.attempt))
    curve: list[EpochResult] = []

    def note(result: EpochResult) -> None:
        curve.append(result)
        say(EpochTrained(attempt=task.attempt, result=result))

    try:
        run, unusable = open_from_checkpoint(task, open_run)
        if unusable is not None:
            in_flight.snapshot = None
            say(CheckpointUnusable(attempt=task.attempt, reason=unusable))
        process = f"{socket.gethostname()}, process {os.getpid()}"
        say(
            Opened(
                attempt=task.attempt,
                worker=process,
                after=len(run.history),
                environment=environment(_threads(task)),
            )
        )
        for result in run.history:
            note(result)
        pause = Every(_CHECKPOINT_SECONDS, at_once=False)
        epochs = run.epochs()
        while True:
            permit = permits.wait(task.attempt, len(curve), is_unwanted)
            if permit == "stop":
                return TrainingOutcome(ending="stopped", curve=tuple(curve))
            if permit == "pause":
                return TrainingOutcome(
                    ending="paused", curve=tuple(curve), checkpoint=in_flight.snapshot
                )
            # A rung's verdict is in: who was pruned sends none.
            due = len(curve) in task.job.rungs or pause.is_due()
            if due and in_flight.snapshot is not None:
                say(CheckpointSaved(attempt=task.attempt, content=in_flight.snapshot))
                pause.begin_pause()
            following = next(epochs, None)
            if following is None:
                break
            in_flight.snapshot = run.checkpoint()
            note(following)
    except TrialEndedError as end:
        return TrainingOutcome(ending=end.reason, detail=end.detail, curve=tuple(curve))
    except SetupError as error:
        IN_FLIGHT.pop(task.attempt, None)
        worker.loop.add_callback(leave_unfit, worker, task, str(error))
        return TrainingOutcome(ending="stopped", curve=())
    finally:
        permits.end(task.attempt)
        IN_FLIGHT.pop(task.attempt, None)
    return TrainingOutcome(ending="finished", curve=tuple(curve), best_weights=run.best_weights())


def open_from_checkpoint(task: TrainingTask, open_run: OpenRun) -> tuple[Run, str | None]:
    """The task's training, from epoch 1 if its checkpoint cannot be used.

    Returns:
        The training, and what is wrong with the checkpoint; None where nothing is.
    """
    try:
        return open_run(task), None
    except (TrialEndedError, SetupError):
        raise
    except Exception as error:
        if task.checkpoint is None or is_outage(error):  # no development rows; no memory
            raise
        # Half a file, another run's, one of an older version: each fails in a way of its own. It
        # is the checkpoint's fault where it works without.
        run = open_run(replace(task, checkpoint=None))
        return run, f"{type(error).__name__}: {error}"


# --- orders ---


class _Permits:
    """How far the attempts of this worker process may train, as a coordinator ordered."""

    _of_topics: ClassVar[dict[str, _Permits]] = {}

    @classmethod
    def of(cls, topic: str) -> _Permits:
        if topic not in cls._of_topics:
            cls._of_topics[topic] = cls(topic)
        return cls._of_topics[topic]

    def __init__(self, topic: str) -> None:
        self._changed = threading.Condition()
        self._until: dict[str, int] = {}
        self._pause = False
        self._heard_at = time.monotonic()
        get_client().subscribe_topic(topic, self._hear)

    def begin(self, attempt: str, until: int) -> None:
        with self._changed:
            self._until.setdefault(attempt, until)
            self._heard_at = time.monotonic()

    def end(self, attempt: str) -> None:
        with self._changed:
            self._until.pop(attempt, None)

    def _hear(self, event: tuple[float, Mapping[str, Any]]) -> None:
        _, document = event
        orders = from_wire(document)
        if isinstance(orders, Orders):
            self.receive(orders)

    def receive(self, orders: Orders) -> None:
        with self._changed:
            self._heard_at = time.monotonic()
            self._pause = orders.pause
            for attempt in self._until:
                if orders.complete or attempt in orders.attempts:
                    self._until[attempt] = orders.attempts.get(attempt, STOP)
            self._changed.notify_all()

    def wait(
        self, attempt: str, epoch: int, is_unwanted: Callable[[], bool]
    ) -> Literal["go", "stop", "pause"]:
        """Waits at the end of an epoch until the attempt may train on, or may not."""
        with self._changed:
            while True:
                if self._until[attempt] == STOP or is_unwanted():
                    return "stop"
                if self._pause or time.monotonic() - self._heard_at > _SILENCE_SECONDS:
                    return "pause"
                if epoch < self._until[attempt]:
                    return "go"
                self._changed.wait(timeout=_LOOK_SECONDS)


# --- the network ---


def open_training_run(task: TrainingTask) -> Run:
    """The real thing: TensorFlow is imported here, on a worker, and never by a coordinator."""
    try:
        from tuner.network.fold_runs import open_run
    except ImportError as error:  # half an installation
        raise SetupError(
            f"{error}. Uninstall TensorFlow and Keras, then install the extra cpu, "
            f"`{install_command('cpu')}`, or gpu, `{install_command('gpu')}`."
        ) from error

    return open_run(_development_data(task), task.job, checkpoint=task.checkpoint)


_DATA: dict[str, Any] = {}


def _development_data(task: TrainingTask) -> Any:
    """The development rows as tensors, made once for each worker process."""
    from tuner.data.development import load_development
    from tuner.network.fold_runs import tensors_of
    from tuner.network.training import configure_tensorflow

    sha256 = task.development_sha256
    if sha256 not in _DATA:
        configure_tensorflow(_threads(task))
        _DATA.clear()
        _DATA[sha256] = tensors_of(load_development(find_development_file(task), sha256))
    return _DATA[sha256]


def _threads(task: TrainingTask) -> int:
    return int(os.environ.get(THREADS_VARIABLE, task.threads))


def find_development_file(task: TrainingTask) -> Any:
    """The development rows on this machine; fetched from the scheduler where they are nowhere."""

    def fetch() -> bytes | None:
        content = get_client().get_metadata(metadata_keys(task.development_sha256), default=None)
        return content if isinstance(content, bytes) else None

    return development_file(task.development_file, task.development_sha256, fetch)
