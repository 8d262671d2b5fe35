"""Dask: the same `train`, with the epochs computed on a worker; its side is `attempt`.

A `Connection` is a scheduler and its workers, wherever they are; a `Cluster` the trainings of one
study on it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import queue
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import dask
from dask.system import CPU_COUNT
from distributed import Client, Future, KilledWorker, Nanny, Scheduler, Security, SpecCluster

from tuner.artifacts import publish
from tuner.cluster.attempt import (
    OpenRun,
    TrainingOutcome,
    TrainingTask,
    metadata_keys,
    open_training_run,
    train_on_worker,
)
from tuner.cluster.processes import (
    BFLOAT16,
    SLOT,
    TRAINING_SETTINGS,
    TrainingWorker,
    WithoutHttp,
    children_deaf_to_interrupts,
    is_dask_heard,
    silence_dask,
    training_environment,
    training_resources,
)
from tuner.cluster.scheduler import (
    SchedulerAwayError,
    TlsFiles,
    exposure,
    require_scheduler,
    worker_command,
)
from tuner.errors import (
    ClusterError,
    TrainingPausedError,
    TrialEndedError,
    WorkerDiedEarlyError,
    WorkerLeftError,
    WorkerLostError,
    counted,
    is_outage,
    reason_of,
)
from tuner.logs import about
from tuner.search.attributes import RESUMED_FROM_KEY, RESUMED_KEY, WORKER_KEY
from tuner.search.tuned_study import TunedStudy
from tuner.spec.space import ModelConfig
from tuner.train import EpochResult

__all__ = [
    "Cluster",
    "Connection",
    "TlsFiles",
    "default_workers",
    "local_connection",
    "remote_connection",
]

Say = Callable[[str], None]

_PULSE_SECONDS = 2.0  #: between two full sets of orders
_LOOK_SECONDS = 1.0  #: between two looks at the scheduler
_CONNECT_SECONDS = 5.0  #: for one attempt to reach a scheduler, and for the first one in all
_LONGEST_PAUSE_SECONDS = 3.0  #: between two attempts to reach a scheduler that went away
_SILENCE_SECONDS = 30.0  #: a scheduler that answers nothing for this long went away
_NO_WORKERS_SECONDS = 10.0  #: without any worker for this long, a launch does not begin
_WORKERS_GONE_SECONDS = 5.0  #: without any worker for this long, the user is told
_LOCAL_RESTART_SECONDS = 20.0  #: the same, where Dask starts them again by itself
_LOCAL_WORKERS_GONE_SECONDS = 60.0  #: workers of this machine come back within seconds, or never
_DISK_PAUSE_SECONDS = 5.0  #: between two attempts to read or write what the system refused
#: The disk is full, over its quota, or over the limit for one file.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Connection:
    """A Dask client that is replaced when its scheduler went away.

    A client that lost its scheduler comes back by itself to the same address only, and without its
    subscriptions. So it is closed, and a new one made: at whatever address the scheduler file
    names by then, with every topic subscribed again.
    """

    def __init__(
        self,
        open_client: Callable[[], Client],
        *,
        say: Say,
        join: str,
        are_local: bool = False,
    ) -> None:
        """Connects.

        Args:
            open_client: Makes a client; OSError or ClusterError where no scheduler answers.
            say: Tells the user, a line at a time.
            join: What the user can do to get a worker.
            are_local: The workers live and die with this process.
        """
        self._open_client = open_client
        self.say = say
        self._join = join
        self._are_local = are_local
        self._lock = threading.RLock()
        self._topics: dict[str, Callable[[Any], None]] = {}
        self._kept_short: set[str] = set()
        self._offers: dict[str, Path] = {}
        self._undelivered: set[str] = set()
        self._on_loss: list[Callable[[], None]] = []
        self._slots = 0
        self._has_fast_bfloat16 = False
        self._slots_seen_at = time.monotonic()
        self._are_workers_missed = False
        self._unfit: str | None = None  # why the last worker that could not train left
        self._closed = threading.Event()
        self._look_now = threading.Event()
        self._up = threading.Event()
        self._client = open_client()
        self._comm = self._client.scheduler_comm
        self._look()
        self._up.set()
        self._thread = threading.Thread(target=self._keep_looking, name="connection", daemon=True)
        self._thread.start()

    @property
    def client(self) -> Client:
        """The client of this moment; it may be cut off."""
        return self._client

    @property
    def is_up(self) -> bool:
        """Whether the scheduler is there, as far as is known."""
        return self._up.is_set()

    def wait_until_up(self, timeout: float) -> bool:
        return self._up.wait(timeout)

    def doubt(self) -> None:
        """The scheduler dropped a training: not up, until a look at it proves otherwise."""
        self._up.clear()
        self._look_now.set()

    def slots(self) -> int:
        """How many trainings the workers of this moment run at once, as of a second ago."""
        return self._slots if self.is_up else 0

    def has_fast_bfloat16(self) -> bool:
        """Whether every worker of this moment says that it is fast in bfloat16."""
        return self._has_fast_bfloat16

    def require_workers(self) -> None:
        """Waits until a worker offers a slot.

        Raises:
            ClusterError: None has for 10 s.
        """
        deadline = time.monotonic() + _NO_WORKERS_SECONDS
        while not self.slots():
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"No worker has offered a slot for {_NO_WORKERS_SECONDS:.0f} s. {self._join}"
                )
            time.sleep(0.1)

    @property
    def is_hopeless(self) -> bool:
        """No worker is left, and none will come by itself."""
        silence = time.monotonic() - self._slots_seen_at
        patience = _LOCAL_WORKERS_GONE_SECONDS if self._unfit is None else 0.0
        return self._are_local and not self._slots and silence > patience

    def why_hopeless(self) -> str:
        """What to tell the user then."""
        if self._unfit is not None:
            return f"No worker of this machine can train: {self._unfit}"
        return (
            f"No worker has offered a slot for {_LOCAL_WORKERS_GONE_SECONDS:.0f} s: they die as "
            "soon as they start. `tuner launch --debug` shows why."
        )

    def note_unfit(self, reason: str) -> None:
        """A worker cannot train at all, and left."""
        with self._lock:
            is_news, self._unfit = reason != self._unfit, reason
        if is_news:
            self.say(f"A worker cannot train and has left: {reason}")

    def subscribe(self, topic: str, handler: Callable[[Any], None]) -> None:
        """Hears a topic, on this client and all that follow it."""
        with self._lock:
            self._topics[topic] = handler
            with contextlib.suppress(Exception):  # the client that comes next subscribes, too
                self._client.subscribe_topic(topic, handler)

    def unsubscribe(self, topic: str) -> None:
        with self._lock:
            self._topics.pop(topic, None)
            with contextlib.suppress(Exception):  # the scheduler may be gone already
                self._client.unsubscribe_topic(topic)

    def keep_short(self, topics: Sequence[str]) -> None:
        """The scheduler keeps what is said on a topic, checkpoints too; from now on, not for long.

        Nobody will ask for it again.
        """
        with self._lock:
            self._kept_short |= set(topics)

    def drop(self, topics: Sequence[str]) -> None:
        """The end of `keep_short`."""
        with self._lock:
            self._kept_short -= set(topics)
        with contextlib.suppress(Exception):  # the scheduler may be gone already
            if self.is_up:
                self._client.run_on_scheduler(_glance(), tuple(topics))

    def offer(self, sha256: str, path: Path) -> None:
        """Leaves a file with the scheduler, for workers that do not see it by its path."""
        if self._are_local:
            return
        with self._lock:
            self._offers[sha256] = path
            self._undelivered.add(sha256)
            with contextlib.suppress(Exception):  # the next look delivers it, or the next client
                self._deliver(sha256, path)

    def on_loss(self, tell: Callable[[], None]) -> None:
        """`tell` is called, on a thread of ours, when the scheduler went away."""
        with self._lock:
            self._on_loss.append(tell)

    def off_loss(self, tell: Callable[[], None]) -> None:
        with self._lock:
            self._on_loss.remove(tell)

    def close(self) -> None:
        self._closed.set()
        self._look_now.set()
        self._thread.join(timeout=_CONNECT_SECONDS)
        self._close_client()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _deliver(self, sha256: str, path: Path) -> None:
        keys = metadata_keys(sha256)
        # Asked for by its length, so that the rows travel once.
        length = [*keys[:-1], f"{sha256} bytes"]
        if path.is_file() and self._client.get_metadata(length, default=None) is None:
            content = path.read_bytes()
            self._client.set_metadata(keys, content)
            self._client.set_metadata(length, len(content))
        self._undelivered.discard(sha256)

    def _deliver_the_rest(self) -> None:
        """Delivers what could not be read before, for want of descriptors for instance."""
        with self._lock:
            for sha256 in list(self._undelivered):
                with contextlib.suppress(OSError):
                    self._deliver(sha256, self._offers[sha256])

    def _keep_looking(self) -> None:
        while not self._closed.is_set():
            self._look_now.wait(_LOOK_SECONDS)
            self._look_now.clear()
            if self._closed.is_set():
                return
            try:
                if self._is_cut_off():
                    raise OSError("the client lost its scheduler")
                self._look()
                self._up.set()
                self._deliver_the_rest()
            except Exception as error:  # noqa: BLE001 - whatever it is, a new client is the answer
                if not self._closed.is_set():
                    self._replace_client(is_silent=isinstance(error, TimeoutError))
            self._tell_of_missing_workers()

    def _is_cut_off(self) -> bool:
        # A client that came back by itself has another comm, and no subscription.
        comm = self._client.scheduler_comm
        is_same = comm is self._comm and comm is not None and not comm.closed()
        return self._client.status != "running" or not is_same

    def _look(self) -> None:
        with self._lock:
            topics = tuple(self._kept_short)
        # A network may swallow what is sent: ask first in a way that has a limit.
        identity = self._client.scheduler.identity  # type: ignore[union-attr] # it is connected
        self._client.sync(identity, n_workers=0, callback_timeout=_SILENCE_SECONDS)
        glance = _glance()
        self._slots, self._has_fast_bfloat16 = self._client.run_on_scheduler(glance, topics)
        if self._slots:
            self._slots_seen_at = time.monotonic()

    def _tell_of_missing_workers(self) -> None:
        if self._slots and self._are_workers_missed:
            self._are_workers_missed = False
            self.say(f"Workers are back: {counted(self._slots, 'slot')}.")
        missed_for = time.monotonic() - self._slots_seen_at
        patience = _LOCAL_RESTART_SECONDS if self._are_local else _WORKERS_GONE_SECONDS
        if self._are_workers_missed or missed_for < patience or not self._on_loss:
            return
        self._are_workers_missed = True
        remedy = "It is being started again." if self._are_local else self._join
        self.say(f"No worker is left; the study waits for one. {remedy}")

    def _replace_client(self, *, is_silent: bool) -> None:
        self._up.clear()
        self._slots = 0
        for tell in list(self._on_loss):
            tell()
        if is_silent:  # and it may take long until a new client finds that, too
            self.say(
                "The scheduler is away; the study waits for it. (It has answered nothing for "
                f"{_SILENCE_SECONDS:.0f} s.)"
            )
        self._close_client()
        said = is_silent
        pause = 0.2
        while not self._closed.is_set():
            try:
                self._take(self._open_client())
            except Exception as error:  # noqa: BLE001 - it may go away again in the middle
                if not said:
                    said = True
                    self.say(f"The scheduler is away; the study waits for it. ({error})")
                self._closed.wait(pause)
                pause = min(_LONGEST_PAUSE_SECONDS, pause * 1.6)
                continue
            self.say("The scheduler is back; trials go on from their last checkpoints.")
            return

    def _take(self, client: Client) -> None:
        with self._lock:
            self._client = client
            self._comm = client.scheduler_comm
            try:
                for topic, handler in self._topics.items():
                    client.subscribe_topic(topic, handler)
                for sha256, path in self._offers.items():
                    self._deliver(sha256, path)
                self._look()
            except BaseException:
                self._close_client()
                raise
        # Workers look for their scheduler themselves: no word about them yet.
        self._slots_seen_at = time.monotonic()
        self._up.set()

    def _close_client(self) -> None:
        with contextlib.suppress(Exception):  # whatever is left of it ends with this process
            self._client.close(timeout=2)


def _glance() -> Callable[..., tuple[int, bool]]:
    """What a look at the scheduler runs there: the slots, and whether all are fast in bfloat16.

    A function in a function travels by value: a scheduler need not have the tuner installed.
    """
    slot, bfloat16 = SLOT, BFLOAT16

    def glance(topics: Sequence[str], dask_scheduler: Any) -> tuple[int, bool]:
        for topic in topics:
            dask_scheduler._broker.truncate(topic)  # noqa: SLF001 - it has no public name
        workers = dask_scheduler.workers.values()
        offers = [worker.resources for worker in workers if worker.status.name == "running"]
        offers = [resources for resources in offers if resources.get(slot)]
        slots = int(sum(resources[slot] for resources in offers))
        return slots, all(resources.get(bfloat16) for resources in offers)

    return glance


def _listening_on() -> Callable[..., list[str]]:
    """What asks a scheduler where it listens; by value, as `_glance`."""

    def listening_on(dask_scheduler: Any) -> list[str]:
        return [listener.listen_address for listener in dask_scheduler.listeners]

    return listening_on


class Cluster:
    """The trainings of one study on a connection; several studies may share one."""

    def __init__(
        self,
        connection: Connection,
        tuned: TunedStudy,
        *,
        development_file: Path,
        threads: int,
        open_run: OpenRun | None = None,
    ) -> None:
        """Opens the trainings of one study.

        Args:
            connection: To the scheduler whose workers train.
            tuned: The study.
            development_file: Its training and validation rows.
            threads: Threads of each training.
            open_run: What a worker trains with; the network where left out. Pickled.
        """
        self._connection = connection
        self._tuned = tuned
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
        connection.offer(tuned.record.development_sha256, development_file)
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
        self._pulse.join(timeout=_CONNECT_SECONDS)
        self._connection.off_loss(self._lose_everything)
        self._connection.unsubscribe(self._events)
        self._connection.drop(self._topics)

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
            WorkerLeftError: The same, but no fault of the trial's.
            ClusterError: No worker is left, and none will come.
        """
        max_epochs = self._tuned.record.spec.training.max_epochs
        # Epochs at which a worker waits to be told more; nobody waits after the last one.
        stations = (*sorted(rungs), max_epochs + 1)
        attempt = _Attempt(train_until=stations[0])
        future: Future[Any] | None = None
        seen = 0
        try:
            future = self._submit(attempt, config, seed, trial, tuple(rungs))
            for message in self._messages(attempt, future):
                if isinstance(message, bytes):
                    self._keep_checkpoint(trial, message)
                    continue
                if isinstance(message, _Opened):
                    self._note_worker(trial, message)
                    continue
                if isinstance(message, _Unusable):
                    self._drop_checkpoint(trial, message.reason)
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
                self._news[attempt.name] = -1
            self._wake.set()
            if future is not None:
                with contextlib.suppress(Exception):  # its client may be closed
                    future.release()

    def _submit(
        self,
        attempt: _Attempt,
        config: ModelConfig,
        seed: int,
        trial: int,
        rungs: tuple[int, ...],
    ) -> Future[Any]:
        record = self._tuned.record
        task = TrainingTask(
            attempt=attempt.name,
            events=self._events,
            orders=self._orders_topic,
            config=config,
            seed=seed,
            trial=record.spec.training.seeded_as(trial),
            rungs=rungs,
            training=record.spec.training,
            precision=self._tuned.precision_of(config),
            threads=self._threads,
            development_file=str(self._development_file.absolute()),
            development_sha256=record.development_sha256,
            checkpoint=self._read_checkpoint(trial),
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

    def _messages(
        self, attempt: _Attempt, future: Future[Any]
    ) -> Iterator[EpochResult | bytes | _Opened | _Unusable | TrainingOutcome]:
        """What the attempt says, its outcome last."""
        while True:
            try:
                message = attempt.inbox.get(timeout=1.0)
            except queue.Empty:
                if self._pausing and attempt.started is None:  # it waits for a worker
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

    def _note_worker(self, trial: int, opened: _Opened) -> None:
        """Writes down who trains the trial, and from where on."""
        trials = self._tuned.trials()
        if trial >= len(trials):  # a training by itself, of no trial
            return
        known = trials[trial]
        storage = self._tuned.storage.optuna
        storage.set_trial_user_attr(known._trial_id, WORKER_KEY, opened.worker)
        if known.user_attrs.get(RESUMED_KEY):
            storage.set_trial_user_attr(known._trial_id, RESUMED_FROM_KEY, opened.after)

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
        path = self._tuned.artifacts.checkpoint(trial)
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
                        f"Trial {trial} of {self._tuned.name}: {path} cannot be read "
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
        self._tuned.storage.renews_lease()
        self._tuned.artifacts.drop_checkpoint(trial)  # else the next one takes its place
        self._say(
            f"Trial {trial} of {self._tuned.name}: its checkpoint cannot be used and was removed "
            f"({reason.splitlines()[0][:200] if reason else 'no reason given'}). It trains again "
            "from epoch 1; what it reported stands.",
            trial,
        )

    def _say(self, message: str, trial: int | None = None) -> None:
        with about(study=self._tuned.name, trial=trial):
            self._connection.say(message)

    def _keep_checkpoint(self, trial: int, content: bytes) -> None:
        """Writes a checkpoint; one that the disk has no room for is missed by nobody but time."""
        try:
            self._publish(self._tuned.artifacts.checkpoint(trial), content)
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
                self._publish(self._tuned.artifacts.weights(trial), content)
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
        publish(path, content, only_if=self._tuned.storage.renews_lease)

    def _say_cannot_be_written(self, error: OSError) -> None:
        if not self._is_unwritable:
            self._is_unwritable = True
            remedy = " for room. Free some" if error.errno in _FULL else ""
            self._say(
                f"{self._tuned.artifacts.folder} cannot be written ({reason_of(error)}): "
                f"checkpoints are skipped, and finished trials wait{remedy}; nothing is lost."
            )

    def _allow(self, attempt: _Attempt, until: int) -> None:
        if until > attempt.train_until:
            attempt.train_until = until
            with self._lock:
                self._news[attempt.name] = until
            self._wake.set()

    def _keep_pulsing(self) -> None:
        """Tells workers how far each attempt may train; -1 stops it.

        Complete orders name every attempt that lives: one that is not named is to stop.
        """
        complete_at = 0.0
        while True:
            self._wake.wait(_PULSE_SECONDS)
            self._wake.clear()
            closed = self._closed.is_set()
            complete = closed or self._pausing or time.monotonic() >= complete_at
            with self._lock:
                orders, self._news = self._news, {}
                if complete:
                    orders = {name: one.train_until for name, one in self._attempts.items()}
            if complete:
                complete_at = time.monotonic() + _PULSE_SECONDS
            if self._connection.is_up:
                message = {"pause": self._pausing, "attempts": orders, "complete": complete}
                with contextlib.suppress(Exception):  # a scheduler that is away hears the next one
                    self._connection.client.log_event(self._orders_topic, message)
            if closed:
                return

    def _lose_everything(self) -> None:
        with self._lock:
            attempts = list(self._attempts.values())
        for attempt in attempts:
            attempt.inbox.put(WorkerLeftError(_SCHEDULER_WENT))

    def _hear(self, event: tuple[float, Mapping[str, Any]]) -> None:
        _, message = event
        with self._lock:
            attempt = self._attempts.get(message["attempt"])
        if attempt is None:  # a worker that was given up, and goes on: not believed
            return
        if "started" in message:
            if attempt.started is not None:  # Dask started it again on its own
                attempt.inbox.put(_death(attempt))
            attempt.started = message["started"]
        if "unusable" in message:
            attempt.inbox.put(_Unusable(message["unusable"]))
        if "opened" in message:
            attempt.opened = True
            attempt.inbox.put(_Opened(worker=message["trained_by"], after=message["opened"]))
        if "epoch" in message:
            attempt.inbox.put(EpochResult.from_document(message["epoch"]))
        if message.get("checkpoint") is not None:
            attempt.inbox.put(message["checkpoint"])
        if message.get("left") == "asked":
            attempt.inbox.put(WorkerLeftError("its worker left and gave it back"))
        elif message.get("left") == "unfit":
            self._connection.note_unfit(message["reason"])
            attempt.inbox.put(WorkerLeftError("its worker cannot train and left"))
        elif message.get("left") == "too large":
            attempt.inbox.put(WorkerLostError("its worker ran out of memory"))


_SCHEDULER_WENT = "its scheduler dropped it"


@dataclass(frozen=True, slots=True)
class _Unusable:
    """The checkpoint that an attempt was given cannot be taken up."""

    reason: str


@dataclass(slots=True, kw_only=True)
class _Attempt:
    """What the coordinator knows of one attempt."""

    train_until: int
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: str | None = None  #: by which run of its task
    opened: bool = False  #: the network was built, and began to train
    inbox: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    """A worker built the network."""

    worker: str
    after: int  #: the epoch of the checkpoint from which it goes on; 0 where there was none


def _death(attempt: _Attempt) -> WorkerLostError:
    if attempt.opened:
        return WorkerLostError("its worker died")
    return WorkerDiedEarlyError("its worker died before it trained")


def default_workers() -> int:
    """One worker for each core that this process may use."""
    return int(CPU_COUNT)


@contextlib.contextmanager
def local_connection(workers: int, *, threads: int = 1, say: Say) -> Iterator[Connection]:
    """Worker processes on this machine, gone when the block ends; no other process reaches them.

    Args:
        workers: Processes, one training each.
        threads: Threads of each training.
        say: Tells the user, a line at a time.
    """
    silence_dask()
    environment = training_environment(threads)
    settings: dict[str, Any] = TRAINING_SETTINGS | {
        # A task whose worker died comes back to us at once: the coordinator decides.
        "distributed.scheduler.allowed-failures": 0,
        "distributed.worker.daemon": True,
        # Messages, checkpoints among them, that the scheduler remembers for each connection.
        "distributed.admin.low-level-log-length": 100,
        # Dask takes a worker away for good that is not back so soon (15 s), as on a busy machine.
        "distributed.deploy.lost-worker-timeout": "1 day",
    }
    with (
        tempfile.TemporaryDirectory(prefix="tuner-workers-") as folder,
        dask.config.set(settings | {"temporary-directory": folder}),
    ):
        with children_deaf_to_interrupts():
            cluster = _local_cluster(workers, folder=folder, environment=environment)
            connection = Connection(
                lambda: Client(cluster),
                say=say,
                join="Launch again with --workers 1 or more.",
                are_local=True,
            )
        with cluster, connection:
            yield connection


class _LocalScheduler(WithoutHttp, Scheduler):
    """The scheduler in this process."""


def _local_cluster(workers: int, *, folder: str, environment: Mapping[str, str]) -> SpecCluster:
    """Worker processes and their scheduler, which talk to each other and this process alone.

    Every user of the machine reaches its loopback addresses, and Dask runs whatever code it is
    sent. So everything speaks TLS, with a certificate and key of this one run: they are in the
    memory of these processes, and reach a worker through the pipe that starts it.
    """
    security = Security.temporary()
    silent = False if is_dask_heard() else logging.CRITICAL
    common: dict[str, Any] = {"host": "127.0.0.1", "protocol": "tls://", "security": security}
    training = common | {
        "nthreads": 1,
        "memory_limit": 0,
        "resources": training_resources(),
        "local_directory": folder,
        "env": dict(environment),
        "silence_logs": silent or None,
        "worker_class": TrainingWorker,
    }
    return SpecCluster(
        scheduler={"cls": _LocalScheduler, "options": common},
        workers={number: {"cls": Nanny, "options": training} for number in range(workers)},
        security=security,
        silence_logs=silent,
    )


@contextlib.contextmanager
def remote_connection(
    cluster: str, *, tls: TlsFiles | None = None, say: Say
) -> Iterator[Connection]:
    """Workers of a scheduler that runs already; it and they go on when the block ends.

    Args:
        cluster: Its address (tcp://..., tls://...) or the scheduler file that it wrote.
        tls: What it asks of who connects.
        say: Tells the user, a line at a time.

    Raises:
        ClusterError: No scheduler answers there, or it cannot be spoken to.
    """
    silence_dask()
    warned_of: set[str] = set()

    def open_client() -> Client:
        address = require_scheduler(cluster, tls, patience_seconds=_CONNECT_SECONDS)
        try:
            client = Client(
                address,
                security=None if tls is None else tls.security(),
                timeout=_CONNECT_SECONDS,
                set_as_default=False,
            )
        except (OSError, ValueError, ImportError) as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ClusterError(f"The Dask scheduler at {address} went away: {reason}") from error
        if exposure(address) is None:  # else it was said when the address was given
            try:
                listening = client.run_on_scheduler(_listening_on())
            except BaseException:
                client.close(timeout=2)
                raise
            for warning in filter(None, map(exposure, listening)):
                if warning not in warned_of:
                    warned_of.add(warning)
                    say(warning)
        return client

    deadline = time.monotonic() + _CONNECT_SECONDS
    while time.monotonic() < deadline:  # it may be starting
        with contextlib.suppress(SchedulerAwayError):
            require_scheduler(cluster, tls, patience_seconds=_CONNECT_SECONDS)
            break
        time.sleep(0.2)
    join = f"Start one: {worker_command(cluster, tls)}"
    with Connection(open_client, say=say, join=join) as connection:
        yield connection
