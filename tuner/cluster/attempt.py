"""One attempt at training one trial, on a Dask worker.

Two topics join a coordinator to its workers. On the *events* topic workers say what they
did: epochs and checkpoints, each with the attempt that they belong to. On the *orders* topic
the coordinator says how far each attempt may train, again and again, so that a lost message
costs seconds. The task's result repeats the whole curve, because events may be lost.

A worker needs neither Optuna nor a database: nothing here imports them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import dask
import psutil
from distributed import Status, Worker, WorkerPlugin, get_client, get_worker

from tuner.cluster.processes import SAME_SIGNAL_SECONDS, THREADS_VARIABLE, UNFIT, silence_dask
from tuner.data.delivery import development_file
from tuner.errors import EndReason, SetupError, TrialEndedError, is_outage
from tuner.spec.precision import Precision
from tuner.spec.space import ModelConfig
from tuner.spec.spec import TrainingSettings
from tuner.train import EpochResult

_SILENCE_SECONDS = 60.0  #: a worker that heard no orders for this long saves and ends
_LOOK_SECONDS = 0.5  #: between two looks at whether the scheduler still wants an attempt
#: A checkpoint is sent at the end of the first epoch that ends so long after the one before: what
#: a killed worker costs is this time and one epoch at most. A run can be put down between epochs
#: only: in the middle of one, its sums and the state of each dropout would belong to it, too.
_CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTask:
    """One attempt at training one trial: all that a worker gets, beside the development file."""

    attempt: str  #: unique, and the key of the Dask task; no other attempt's messages are believed
    events: str  #: topic on which the worker speaks
    orders: str  #: topic on which it listens
    config: ModelConfig
    seed: int
    trial: int
    rungs: tuple[int, ...]
    training: TrainingSettings
    precision: Precision
    threads: int
    development_file: str
    development_sha256: str
    checkpoint: bytes | None
    train_until: int  #: the epoch after which the first verdict is awaited


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOutcome:
    """How an attempt ended."""

    ending: Literal["finished", "stopped", "paused"] | EndReason
    curve: tuple[EpochResult, ...]
    detail: str = ""
    best_weights: bytes | None = None  #: of a finished training
    checkpoint: bytes | None = None  #: of a paused one


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
    _give_back_on_leaving(worker)
    orders = _Orders.of(task.orders)
    orders.begin(task.attempt, task.train_until)
    in_flight = _InFlight(events=task.events, snapshot=task.checkpoint)
    _IN_FLIGHT[task.attempt] = in_flight

    def say(**message: Any) -> None:
        worker.log_event(task.events, {"attempt": task.attempt, **message})

    def is_unwanted() -> bool:
        # The scheduler takes a task back when its client is gone, for instance killed.
        known = worker.state.tasks.get(task.attempt)
        return known is None or known.state == "cancelled"

    # Dask starts a task again whose worker died; the coordinator tells by this that it did.
    say(started=uuid.uuid4().hex)
    curve: list[EpochResult] = []

    def note(result: EpochResult) -> None:
        curve.append(result)
        say(epoch=asdict(result))

    try:
        run, unusable = open_from_checkpoint(task, open_run)
        if unusable is not None:
            in_flight.snapshot = None
            say(unusable=unusable)
        # If this worker dies from now on, the trial may be why. (Dask adds a "worker" of its own.)
        say(opened=len(run.history), trained_by=f"{socket.gethostname()}, process {os.getpid()}")
        for result in run.history:
            note(result)
        saved_at = time.monotonic()
        epochs = run.epochs()
        while True:
            order = orders.wait(task.attempt, len(curve), is_unwanted)
            if order == "stop":
                return TrainingOutcome(ending="stopped", curve=tuple(curve))
            if order == "pause":
                return TrainingOutcome(
                    ending="paused", curve=tuple(curve), checkpoint=in_flight.snapshot
                )
            # A rung's verdict is in: who was pruned sends none.
            due = len(curve) in task.rungs or time.monotonic() - saved_at > _CHECKPOINT_SECONDS
            if due and in_flight.snapshot is not None:
                say(checkpoint=in_flight.snapshot)
                saved_at = time.monotonic()
            following = next(epochs, None)
            if following is None:
                break
            in_flight.snapshot = run.checkpoint()
            note(following)
    except TrialEndedError as end:
        return TrainingOutcome(ending=end.reason, detail=end.detail, curve=tuple(curve))
    except SetupError as error:
        _IN_FLIGHT.pop(task.attempt, None)
        worker.loop.add_callback(_leave_unfit, worker, task, str(error))
        return TrainingOutcome(ending="stopped", curve=())
    finally:
        orders.end(task.attempt)
        _IN_FLIGHT.pop(task.attempt, None)
    return TrainingOutcome(ending="finished", curve=tuple(curve), best_weights=run.best_weights())


def open_from_checkpoint(task: TrainingTask, open_run: OpenRun) -> tuple[Run, str | None]:
    """The task's training, begun anew where its checkpoint cannot be taken up.

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


class _Orders:
    """What this worker process heard from a coordinator."""

    _heard: ClassVar[dict[str, _Orders]] = {}

    @classmethod
    def of(cls, topic: str) -> _Orders:
        if topic not in cls._heard:
            cls._heard[topic] = cls(topic)
        return cls._heard[topic]

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
        _, orders = event
        with self._changed:
            self._heard_at = time.monotonic()
            self._pause = orders["pause"]
            for attempt in self._until:
                if orders["complete"] or attempt in orders["attempts"]:
                    self._until[attempt] = orders["attempts"].get(attempt, -1)
            self._changed.notify_all()

    def wait(
        self, attempt: str, epoch: int, is_unwanted: Callable[[], bool]
    ) -> Literal["go", "stop", "pause"]:
        """Waits at the end of an epoch until the attempt may go on, or may not."""
        with self._changed:
            while True:
                if self._until[attempt] < 0 or is_unwanted():
                    return "stop"
                if self._pause or time.monotonic() - self._heard_at > _SILENCE_SECONDS:
                    return "pause"
                if epoch < self._until[attempt]:
                    return "go"
                self._changed.wait(timeout=_LOOK_SECONDS)


# --- leaving ---


#: Why a worker gave a trial back: somebody wants its machine, or the trial its memory.
Leaving = Literal["asked", "too large"]


@dataclass(slots=True, kw_only=True)
class _InFlight:
    """An attempt of this process."""

    events: str  #: topic on which to give it back
    snapshot: bytes | None  #: the checkpoint of its last completed epoch


_IN_FLIGHT: dict[str, _InFlight] = {}


class GiveBack(WorkerPlugin):
    """Gives the trials of a worker back when it leaves; a signal makes it leave.

    An epoch may take half a minute, and a batch queue kills sooner: so nobody waits for its end.
    The checkpoint of the last completed epoch lies ready and is sent.
    """

    name = "tuner-give-back"

    def __init__(self) -> None:
        self.ready = threading.Event()

    def setup(self, worker: Worker) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            # Signals can be heard in a main thread alone. That is where a worker process has its
            # loop; a worker in a thread of somebody's program leaves signals to the program.
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, self._leave, worker, loop)
        self.ready.set()

    def teardown(self, worker: Worker) -> None:
        if worker.status.name in ("closing", "closing_gracefully", "closed"):
            _give_back(worker)

    @staticmethod
    def _leave(worker: Worker, loop: asyncio.AbstractEventLoop) -> None:
        silence_dask()  # it logs a thread that it need not wait for
        asked_at = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, GiveBack._leave_now, number, loop, asked_at)
        # First of all, for nobody knows how long there is; and no other trial is to come here.
        worker.status = Status.closing_gracefully
        _give_back(worker)
        leaving = worker.close(nanny=False, executor_wait=False, reason="asked to leave")
        _LEAVING.add(loop.create_task(leaving))

    @staticmethod
    def _leave_now(
        number: signal.Signals, loop: asyncio.AbstractEventLoop, asked_at: float
    ) -> None:
        # One wish may arrive twice: from a batch queue that signals every process of a job, and
        # from `tuner worker`. The trial must not be lost on its way for that.
        if time.monotonic() - asked_at > SAME_SIGNAL_SECONDS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _leave_unfit(worker: Worker, task: TrainingTask, reason: str) -> None:
    """Leaves permanently and gives the trial back: the next one would fail here, too."""
    worker.status = Status.closing_gracefully  # first of all: no other trial is to come here
    worker.log_event(task.events, {"attempt": task.attempt, "left": "unfit", "reason": reason})
    leaving = worker.close(executor_wait=False, reason=f"{UNFIT}{reason}")
    _LEAVING.add(asyncio.get_running_loop().create_task(leaving))


def _give_back(worker: Worker) -> None:
    # Dask's nanny asks a process that takes too much memory to leave like any other.
    why: Leaving = "too large" if _is_too_large(worker) else "asked"
    for attempt in list(_IN_FLIGHT):
        in_flight = _IN_FLIGHT.pop(attempt, None)
        if in_flight is not None:
            message = {"attempt": attempt, "left": why, "checkpoint": in_flight.snapshot}
            worker.log_event(in_flight.events, message)


def _is_too_large(worker: Worker) -> bool:
    limit_bytes = worker.memory_manager.memory_limit or 0
    fraction = dask.config.get("distributed.worker.memory.terminate") or 0
    # Just below the limit, too: it may have shrunk again since.
    most_bytes = 0.9 * fraction * limit_bytes
    return 0 < most_bytes < psutil.Process().memory_info().rss


_LEAVING: set[Any] = set()  #: a loop forgets tasks that nobody holds


def _give_back_on_leaving(worker: Worker) -> None:
    if GiveBack.name in worker.plugins:
        return
    plugin = GiveBack()
    worker.loop.add_callback(functools.partial(worker.plugin_add, plugin, GiveBack.name))
    plugin.ready.wait(timeout=5.0)


# --- the network ---


def open_training_run(task: TrainingTask) -> Run:
    """The real thing: TensorFlow is imported here, on a worker, and never by a coordinator."""
    try:
        from tuner.network.training import TrainingRun
    except ImportError as error:  # half an installation
        raise SetupError(f"{error}. Install the package again with its extra.") from error

    settings = task.training
    return TrainingRun(
        _development_data(task),
        task.config,
        seed=task.seed,
        trial=task.trial,
        max_epochs=settings.max_epochs,
        patience=settings.patience,
        precision=task.precision,
        max_trial_seconds=settings.max_trial_seconds,
        checkpoint=task.checkpoint,
    )


_DATA: dict[str, Any] = {}


def _development_data(task: TrainingTask) -> Any:
    """The development rows as tensors, made once for each worker process."""
    from tuner.data.prepare import load_development
    from tuner.network.training import TensorData, configure_tensorflow

    sha256 = task.development_sha256
    if sha256 not in _DATA:
        configure_tensorflow(int(os.environ.get(THREADS_VARIABLE, task.threads)))
        _DATA.clear()
        _DATA[sha256] = TensorData(load_development(find_development_file(task), sha256))
    return _DATA[sha256]


def find_development_file(task: TrainingTask) -> Any:
    """The development rows on this machine; fetched from the scheduler where they are nowhere."""

    def fetch() -> bytes | None:
        content = get_client().get_metadata(metadata_keys(task.development_sha256), default=None)
        return content if isinstance(content, bytes) else None

    return development_file(task.development_file, task.development_sha256, fetch)


def metadata_keys(sha256: str) -> list[str]:
    """Under which a coordinator leaves development rows on the scheduler."""
    return ["tuner-development", sha256]
