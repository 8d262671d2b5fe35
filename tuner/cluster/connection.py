"""A connection to a scheduler and its workers, local or remote."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import dask
from dask.system import CPU_COUNT
from distributed import Client, Nanny, Scheduler, Security, SpecCluster

from tuner.cluster.messages import metadata_keys
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
    counted,
)

Say = Callable[[str], None]


_LOOK_SECONDS = 1.0  #: between two looks at the scheduler
CONNECT_SECONDS = 5.0  #: for one attempt to reach a scheduler, and for the first one in all
_LONGEST_PAUSE_SECONDS = 3.0  #: between two attempts to reach a scheduler that went away
_SILENCE_SECONDS = 30.0  #: a scheduler that answers nothing for this long went away
_NO_WORKERS_SECONDS = 10.0  #: without any worker for this long, a launch does not begin
_WORKERS_GONE_SECONDS = 5.0  #: without any worker for this long, the user is told
_LOCAL_RESTART_SECONDS = 20.0  #: the same, where Dask starts them again by itself
_LOCAL_WORKERS_GONE_SECONDS = 60.0  #: workers of this machine come back within seconds, or never


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

        It is not asked for again.
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
        self._thread.join(timeout=CONNECT_SECONDS)
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
                "The scheduler is unavailable; the study waits for it. (It has answered nothing "
                f"for {_SILENCE_SECONDS:.0f} s.)"
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
                    self.say(f"The scheduler is unavailable; the study waits for it. ({error})")
                self._closed.wait(pause)
                pause = min(_LONGEST_PAUSE_SECONDS, pause * 1.6)
                continue
            self.say("The scheduler is back; trials resume from their last checkpoints.")
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
        # Dask removes a worker permanently that is not back in 15 s, as on a busy machine.
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
    """Workers of a scheduler that runs already; it and they stay when the block ends.

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
        address = require_scheduler(cluster, tls, patience_seconds=CONNECT_SECONDS)
        try:
            client = Client(
                address,
                security=None if tls is None else tls.security(),
                timeout=CONNECT_SECONDS,
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

    deadline = time.monotonic() + CONNECT_SECONDS
    while time.monotonic() < deadline:  # it may be starting
        with contextlib.suppress(SchedulerAwayError):
            require_scheduler(cluster, tls, patience_seconds=CONNECT_SECONDS)
            break
        time.sleep(0.2)
    join = f"Start one: {worker_command(cluster, tls)}"
    with Connection(open_client, say=say, join=join) as connection:
        yield connection
