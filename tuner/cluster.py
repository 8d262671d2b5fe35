"""Dask: the same `train`, with the epochs computed on a worker.

Two topics join a coordinator to its workers. On the *events* topic workers say what they
did: epochs and checkpoints, each with the attempt that they belong to. On the *orders* topic
the coordinator says how far each attempt may train, again and again, so that a lost message
costs seconds. The task's result repeats the whole curve, because events may be lost.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.resource_tracker
import queue
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import dask
from dask.system import CPU_COUNT
from distributed import Client, Future, KilledWorker, LocalCluster, get_client, get_worker

from tuner.artifacts import publish
from tuner.curves import EpochResult
from tuner.errors import (
    ClusterError,
    EndReason,
    TrainingPausedError,
    TrialEndedError,
    WorkerLostError,
)
from tuner.space import ModelConfig
from tuner.spec import TrainingSettings
from tuner.study import TunedStudy

_PULSE_SECONDS = 2.0  #: between two full sets of orders
_SILENCE_SECONDS = 60.0  #: a worker that heard no orders for this long saves and ends
_CHECKPOINT_SECONDS = 60.0  #: at most this long between two checkpoints
_RUNG_CHECKPOINT_SECONDS = 10.0  #: a rung passed sooner after the last one needs none
_NO_WORKERS_SECONDS = 10.0  #: without any worker for this long, a launch gives up
_SLOT = "slot"  #: the Dask resource: one training at a time for each


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTask:
    """One attempt at training one trial: all that a worker gets, beside the development file."""

    attempt: str  #: unique; messages of any other attempt are not believed
    events: str  #: topic on which the worker speaks
    orders: str  #: topic on which it listens
    config: ModelConfig
    seed: int
    trial: int
    rungs: tuple[int, ...]
    training: TrainingSettings
    precision: Literal["float32", "bfloat16"]
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
    """One trial's training on a worker: `tuner.training.TrainingRun`, or a cheap one in a test."""

    history: list[EpochResult]  #: of the checkpoint

    def epochs(self) -> Iterator[EpochResult]: ...

    def checkpoint(self) -> bytes: ...

    def best_weights(self) -> bytes: ...


OpenRun = Callable[[TrainingTask], Run]


# --- on the coordinator ---


class Cluster:
    """A Dask scheduler with its workers, and the trainings of one study on them."""

    def __init__(
        self,
        client: Client,
        tuned: TunedStudy,
        *,
        development_file: Path,
        threads: int,
        open_run: OpenRun | None = None,
    ) -> None:
        """Opens the trainings of one study.

        Args:
            client: Of the scheduler whose workers train.
            tuned: The study.
            development_file: Its training and validation rows.
            threads: Threads of each training.
            open_run: What a worker trains with; the network where left out. Pickled.
        """
        self._client = client
        self._tuned = tuned
        self._development_file = development_file
        self._threads = threads
        self._open_run = open_run or open_training_run
        topic = f"tuner-{uuid.uuid4().hex}"
        self._events, self._orders_topic = f"{topic}-events", f"{topic}-orders"
        self._attempts: dict[str, _Attempt] = {}
        self._lock = threading.Lock()
        self._pausing = False
        self._closed = threading.Event()
        client.subscribe_topic(self._events, self._hear)
        self._pulse = threading.Thread(target=self._keep_pulsing, name="orders", daemon=True)
        self._pulse.start()

    def slots(self) -> int:
        """How many trainings the workers of this moment run at once."""
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        return int(sum(worker["resources"].get(_SLOT, 0) for worker in workers))

    def pause(self) -> None:
        """Makes every running training save a checkpoint and end at its next epoch."""
        self._pausing = True
        with contextlib.suppress(Exception):  # the pulse says it again
            self._order({})

    def close(self) -> None:
        self._closed.set()
        self._pulse.join()
        with contextlib.suppress(Exception):  # the scheduler may be gone already
            self._client.unsubscribe_topic(self._events)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def train(
        self, config: ModelConfig, *, seed: int, trial: int, rungs: Sequence[int]
    ) -> Generator[EpochResult, None, None]:
        """Trains on a worker, from the trial's checkpoint where there is one.

        At a rung the worker waits until the next epoch is asked for; between rungs it runs
        ahead. Closing the generator stops it.

        Raises:
            TrialEndedError: The trial cannot go on.
            TrainingPausedError: `pause` was called; the checkpoint is written.
            WorkerLostError: The worker is gone; calling again goes on from the last checkpoint.
            ClusterError: No worker offers a slot.
        """
        max_epochs = self._tuned.record.spec.training.max_epochs
        # Epochs at which a worker waits to be told more; nobody waits after the last one.
        stations = (*sorted(rungs), max_epochs + 1)
        attempt = _Attempt(train_until=stations[0])
        future = self._submit(attempt, config, seed, trial, tuple(rungs))
        seen = 0
        try:
            for message in self._messages(attempt, future):
                if isinstance(message, bytes):
                    publish(self._tuned.artifacts.checkpoint(trial), message)
                    continue
                fresh = [message] if isinstance(message, EpochResult) else message.curve
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
            future.release()
            with contextlib.suppress(Exception):
                self._order({attempt.name: -1})

    def _submit(
        self,
        attempt: _Attempt,
        config: ModelConfig,
        seed: int,
        trial: int,
        rungs: tuple[int, ...],
    ) -> Future[Any]:
        record = self._tuned.record
        checkpoint = self._tuned.artifacts.checkpoint(trial)
        task = TrainingTask(
            attempt=attempt.name,
            events=self._events,
            orders=self._orders_topic,
            config=config,
            seed=seed,
            trial=record.spec.training.seeded_as(trial),
            rungs=rungs,
            training=record.spec.training,
            precision=record.precision,
            threads=self._threads,
            development_file=str(self._development_file.absolute()),
            development_sha256=record.development_sha256,
            checkpoint=checkpoint.read_bytes() if checkpoint.exists() else None,
            train_until=attempt.train_until,
        )
        with self._lock:
            self._attempts[attempt.name] = attempt
        future = self._client.submit(
            train_on_worker,
            task,
            self._open_run,
            key=attempt.name,
            pure=False,
            resources={_SLOT: 1},
        )
        future.add_done_callback(attempt.inbox.put)
        return future

    def _messages(
        self, attempt: _Attempt, future: Future[Any]
    ) -> Iterator[EpochResult | bytes | TrainingOutcome]:
        """What the attempt says, its outcome last."""
        waiting_since = time.monotonic()
        while True:
            try:
                message = attempt.inbox.get(timeout=1.0)
            except queue.Empty:
                if self.slots():
                    waiting_since = time.monotonic()
                elif time.monotonic() - waiting_since > _NO_WORKERS_SECONDS:
                    raise ClusterError(
                        f"No worker has offered a slot for {_NO_WORKERS_SECONDS:.0f} s. "
                        "Launch again with --workers 1 or more."
                    ) from None
                if not future.done():
                    continue
                message = future
            if not isinstance(message, Future):
                yield message
            elif message.status == "finished":
                yield message.result()
                return
            elif message.status in ("cancelled", "lost"):
                raise WorkerLostError("the cluster dropped its training")
            else:
                error = message.exception()
                if isinstance(error, KilledWorker):
                    raise WorkerLostError("its worker died")
                raise error

    def _conclude(self, outcome: TrainingOutcome, trial: int) -> None:
        artifacts = self._tuned.artifacts
        if outcome.ending == "paused":
            if outcome.checkpoint is not None:
                publish(artifacts.checkpoint(trial), outcome.checkpoint)
            raise TrainingPausedError
        if outcome.ending == "stopped":
            return
        if outcome.ending != "finished":
            raise TrialEndedError(outcome.ending, outcome.detail)
        if outcome.best_weights is not None:
            publish(artifacts.weights(trial), outcome.best_weights)

    def _allow(self, attempt: _Attempt, until: int) -> None:
        if until > attempt.train_until:
            attempt.train_until = until
            self._order({attempt.name: until})

    def _order(self, attempts: Mapping[str, int], *, complete: bool = False) -> None:
        """Tells workers how far each attempt may train; -1 stops it.

        Complete orders name every attempt that lives: one that is not named is to stop.
        """
        orders = {"pause": self._pausing, "attempts": dict(attempts), "complete": complete}
        self._client.log_event(self._orders_topic, orders)

    def _keep_pulsing(self) -> None:
        while not self._closed.wait(_PULSE_SECONDS):
            with self._lock:
                everything = {name: one.train_until for name, one in self._attempts.items()}
            # The scheduler keeps what was said on a topic; nobody will ask for it again.
            with contextlib.suppress(Exception):  # a scheduler that is away hears the next pulse
                self._order(everything, complete=True)
                self._client.run_on_scheduler(_forget, [self._events, self._orders_topic])

    def _hear(self, event: tuple[float, Mapping[str, Any]]) -> None:
        _, message = event
        with self._lock:
            attempt = self._attempts.get(message["attempt"])
        if attempt is None:  # a worker that was given up, and goes on: not believed
            return
        if "epoch" in message:
            attempt.inbox.put(EpochResult(**message["epoch"]))
        else:
            attempt.inbox.put(message["checkpoint"])


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """What the coordinator knows of one attempt."""

    train_until: int
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    inbox: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)


def _forget(topics: Sequence[str], dask_scheduler: Any) -> None:
    for topic in topics:
        dask_scheduler._broker.truncate(topic)  # noqa: SLF001 - it has no public name


def default_workers() -> int:
    """One worker for each core that this process may use."""
    return int(CPU_COUNT)


@contextlib.contextmanager
def local_client(workers: int, *, threads: int = 1) -> Iterator[Client]:
    """A client of a cluster of worker processes on this machine, gone when the block ends.

    Args:
        workers: Processes, one training each.
        threads: Threads of each training.
    """
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what matters we say ourselves
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "TF_NUM_INTRAOP_THREADS": str(threads),
        "TF_NUM_INTEROP_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    settings: dict[str, Any] = {
        # A task whose worker died comes back to us at once: the coordinator decides.
        "distributed.scheduler.allowed-failures": 0,
        "distributed.worker.daemon": True,
        "distributed.admin.log-length": 100,
    }
    with (
        tempfile.TemporaryDirectory(prefix="tuner-workers-") as folder,
        dask.config.set(settings | {"temporary-directory": folder}),
    ):
        with _children_deaf_to_interrupts():
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                memory_limit=0,
                host="127.0.0.1",
                dashboard_address=None,
                resources={_SLOT: 1},
                local_directory=folder,
                env=environment,
                silence_logs=logging.CRITICAL,
            )
            client = Client(cluster)
        with cluster, client:
            yield client


@contextlib.contextmanager
def _children_deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C reaches the whole process group; only the coordinator may act on it.

    The signal mask is inherited: by the threads that start the worker processes, and by those.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # It would unblock the signal in whichever thread happens to start it.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- on a worker ---


def train_on_worker(task: TrainingTask, open_run: OpenRun) -> TrainingOutcome:
    """Trains one attempt on a Dask worker; see `Cluster.train`."""
    orders = _Orders.of(task.orders)
    orders.begin(task.attempt, task.train_until)
    worker = get_worker()

    def say(**message: Any) -> None:
        worker.log_event(task.events, {"attempt": task.attempt, **message})

    curve: list[EpochResult] = []

    def note(result: EpochResult) -> None:
        curve.append(result)
        say(epoch=asdict(result))

    try:
        run = open_run(task)
        for result in run.history:
            note(result)
        saved_at = time.monotonic()
        epochs = run.epochs()
        while True:
            order = orders.wait(task.attempt, len(curve))
            if order == "stop":
                return TrainingOutcome(ending="stopped", curve=tuple(curve))
            if order == "pause":
                return TrainingOutcome(
                    ending="paused", curve=tuple(curve), checkpoint=run.checkpoint()
                )
            at_rung = len(curve) in task.rungs
            due = _RUNG_CHECKPOINT_SECONDS if at_rung else _CHECKPOINT_SECONDS
            if time.monotonic() - saved_at > due:
                say(checkpoint=run.checkpoint())
                saved_at = time.monotonic()
            following = next(epochs, None)
            if following is None:
                break
            note(following)
    except TrialEndedError as end:
        return TrainingOutcome(ending=end.reason, detail=end.detail, curve=tuple(curve))
    finally:
        orders.end(task.attempt)
    return TrainingOutcome(ending="finished", curve=tuple(curve), best_weights=run.best_weights())


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

    def wait(self, attempt: str, epoch: int) -> Literal["go", "stop", "pause"]:
        """Waits at the end of an epoch until the attempt may go on, or may not."""
        with self._changed:
            while True:
                silent = time.monotonic() - self._heard_at
                if self._pause or silent > _SILENCE_SECONDS:
                    return "pause"
                if self._until[attempt] < 0:
                    return "stop"
                if epoch < self._until[attempt]:
                    return "go"
                self._changed.wait(timeout=_SILENCE_SECONDS - silent + 0.1)


def open_training_run(task: TrainingTask) -> Run:
    """The real thing: TensorFlow is imported here, on a worker, and never by a coordinator."""
    from tuner.training import TrainingRun

    settings = task.training
    return TrainingRun(
        _development_data(task.development_file, task.development_sha256, task.threads),
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


def _development_data(path: str, sha256: str, threads: int) -> Any:
    """The development rows as tensors, made once for each worker process."""
    from tuner.data import load_development
    from tuner.training import TensorData, configure_tensorflow

    if sha256 not in _DATA:
        configure_tensorflow(threads)
        _DATA.clear()
        _DATA[sha256] = TensorData(load_development(Path(path), sha256))
    return _DATA[sha256]
