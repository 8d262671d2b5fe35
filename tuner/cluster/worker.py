"""What `tuner worker` runs: training processes for somebody else's scheduler.

This process trains nothing. It starts a Dask worker process for each training, starts it again
when it dies, pins it to a GPU, and waits for a scheduler that is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

import dask
import psutil
from dask.system import CPU_COUNT
from dask.utils import parse_bytes
from distributed import Nanny
from distributed.system import MEMORY_LIMIT

from tuner.cluster.gpus import gpus_for
from tuner.cluster.processes import (
    SAME_SIGNAL_SECONDS,
    THREADS_VARIABLE,
    TRAINING_SETTINGS,
    UNFIT,
    TrainingWorker,
    children_deaf_to_interrupts,
    is_dask_heard,
    silence_dask,
    training_environment,
    training_resources,
)
from tuner.cluster.scheduler import (
    SchedulerFileMissingError,
    TlsFiles,
    exposure,
    is_loopback,
    require_scheduler,
    scheduler_address,
)
from tuner.errors import ClusterError, counted
from tuner.logs import line

Say = Callable[[str], None]

_LONGEST_PAUSE_SECONDS = 3.0  #: between two attempts to reach a scheduler that is away
_LOOK_SECONDS = 0.25  #: between two looks at whether the worker processes still serve
_ANSWER_SECONDS = 3.0  #: for a scheduler to accept a connection, and to answer
_JOIN_SECONDS = 30.0  #: for a worker process to start and register
_LEAVE_SECONDS = 6.0  #: for a worker process to give its trial back and end
_LEAST_MEMORY = "100MB"  #: a training process that does nothing takes about as much
#: A worker that Dask pauses, or that spills, accepts trials and never trains them.
_DASK_SETTINGS = TRAINING_SETTINGS | {
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
    # The second look kills what the first one asked to leave: time enough to give a trial back.
    "distributed.worker.memory.monitor-interval": "1s",
    "distributed.worker.daemon": True,
    "distributed.worker.profile.enabled": False,
    "distributed.comm.timeouts.connect": "10s",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What a worker machine gives to a cluster."""

    cluster: str  #: address or scheduler file
    tls: TlsFiles | None = None  #: if the scheduler asks for certificates
    workers: int | Literal["auto"] = 1  #: processes; "auto": one for each GPU, else by the cores
    threads: int = 1  #: of each training
    memory_limit: str = "auto"  #: of each process, for instance "4GB"; "auto": its share
    lifetime: float | None = None  #: seconds, after which it leaves
    host: str | None = None  #: address or interface to listen on

    def __post_init__(self) -> None:
        self.memory_bytes(1)
        self._refuse_foreign_host()

    def memory_bytes(self, workers: int) -> int:
        """The limit of one process.

        Raises:
            ClusterError: What was asked for is not a size, or too small for any process.
        """
        if self.memory_limit == "auto":
            return int(MEMORY_LIMIT / workers)
        try:
            limit = int(parse_bytes(self.memory_limit))
        except (ValueError, OverflowError):
            raise ClusterError(
                f"--memory-limit {self.memory_limit}: no size; write for instance 4GB, or auto."
            ) from None
        if limit < parse_bytes(_LEAST_MEMORY):  # 0 is Dask's word for none, which we do not offer
            raise ClusterError(
                f"--memory-limit {self.memory_limit}: a training process takes {_LEAST_MEMORY} "
                "before it trains anything, and there is always a limit; write for instance 4GB, "
                "or auto."
            )
        return min(limit, sys.maxsize)  # Dask lowers it to what there is, but sends 64 bits

    def listen_on(self, scheduler: str) -> dict[str, str]:
        """Dask's name for `host`, or for what cannot be reached from beyond the scheduler's reach.

        Args:
            scheduler: Its address.
        """
        if self.host is not None:
            return {"interface" if self.host in psutil.net_if_addrs() else "host": self.host}
        if is_loopback(scheduler):  # left to Dask, the training process would listen everywhere
            return {"host": "[::1]" if urlsplit(scheduler).hostname == "::1" else "127.0.0.1"}
        return {}

    def _refuse_foreign_host(self) -> None:
        interfaces = psutil.net_if_addrs()
        if self.host is None or self.host in interfaces:
            return
        problem = "it is empty"
        try:
            found = socket.getaddrinfo(self.host.strip("[]"), 0, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            found, problem = [], str(error)
        for family, kind, protocol, _, place in found:
            try:
                with socket.socket(family, kind, protocol) as probe:
                    probe.bind(place)
            except OSError as error:
                problem = str(error)
            else:
                return
        raise ClusterError(
            f"--host {self.host}: neither an address of this machine ({problem}) nor one of its "
            f"network interfaces ({', '.join(interfaces)})."
        )


def serve(settings: WorkerSettings, *, say: Say) -> None:
    """Trains for a scheduler until a signal or the end of the lifetime.

    Raises:
        ClusterError: What was asked for cannot be: no scheduler address, no free GPU; or this
            installation cannot train.
    """
    silence_dask()
    with contextlib.suppress(SchedulerFileMissingError):  # it may come
        scheduler_address(settings.cluster, settings.tls)
    with (
        tempfile.TemporaryDirectory(prefix="tuner-workers-", ignore_cleanup_errors=True) as folder,
        dask.config.set(_DASK_SETTINGS | {"temporary-directory": folder}),
        gpus_for(settings.workers, os.environ) as gpus,
    ):
        cores = max(1, int(CPU_COUNT) // settings.threads)
        count = (len(gpus) or cores) if settings.workers == "auto" else settings.workers
        environments = _environments(count, settings.threads, gpus)
        with _children_deaf_to_interrupts_but_not_this_process():
            asyncio.run(_Host(settings, environments, folder, say).run())


@contextlib.contextmanager
def _children_deaf_to_interrupts_but_not_this_process() -> Iterator[None]:
    """Ctrl-C reaches the whole process group, and this process is to decide.

    Children inherit the mask of the thread that starts them, the main one. A thread that was
    started before, and does nothing else, hears the signal for it.
    """
    is_over = threading.Event()
    listener = threading.Thread(target=is_over.wait, name="interrupts", daemon=True)
    listener.start()
    try:
        with children_deaf_to_interrupts():
            yield
    finally:
        is_over.set()
        listener.join()


def _environments(count: int, threads: int, gpus: Sequence[str]) -> tuple[dict[str, str], ...]:
    common = training_environment(threads) | {
        THREADS_VARIABLE: str(threads),
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }
    if not gpus:
        return tuple(common for _ in range(count))
    return tuple(common | {"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus)


class _Nanny(Nanny):
    """Dask's own, which remembers why its worker left permanently."""

    unfit: str | None = None

    def close_gracefully(self, reason: str = "nanny-close-gracefully") -> None:
        if reason.startswith(UNFIT):
            self.unfit = reason
        super().close_gracefully(reason)


class _Host:
    """The worker processes of this machine, and their scheduler."""

    def __init__(
        self,
        settings: WorkerSettings,
        environments: Sequence[Mapping[str, str]],
        folder: str,
        say: Say,
    ) -> None:
        self._settings = settings
        self._environments = environments
        self._folder = folder
        self._say = say
        self._nannies: list[_Nanny] = []
        self._leave = asyncio.Event()
        self._why = ""
        self._asked_at = 0.0
        self._is_serving = False
        self._warnings: set[str] = set()  # those that were said

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_leave, number.name)
        if self._settings.lifetime is not None:
            loop.call_later(self._settings.lifetime, self._asked_to_leave, "its lifetime is over")
        serving = asyncio.create_task(self._keep_serving())
        leaving = asyncio.create_task(self._leave.wait())
        try:
            await asyncio.wait({serving, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                await serving
        finally:
            was_serving = self._is_serving
            for task in (serving, leaving):
                task.cancel()
            await asyncio.gather(serving, leaving, return_exceptions=True)
            await self._dismiss()
        became = (
            "its trials were given back and continue on other workers"
            if was_serving
            else "it had no scheduler, and trained nothing"
        )
        # A closed loop leaves signals to the system: one more would turn this end into a failure.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        self._say(f"Worker ended ({self._why}); {became}.")

    def _asked_to_leave(self, why: str) -> None:
        self._why = why
        self._asked_at = time.monotonic()
        self._leave.set()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_again, number)

    def _asked_again(self, number: signal.Signals) -> None:
        # One wish may arrive twice: `timeout` signals its child, then its whole group.
        if time.monotonic() - self._asked_at > SAME_SIGNAL_SECONDS:
            _end_now(number, self._folder)

    async def _keep_serving(self) -> None:
        """Joins the scheduler, and joins again whenever it went away."""
        is_first = True
        complaint = ""
        while True:
            address = await self._wait_for_scheduler()
            try:
                await self._join(address)
            except (OSError, RuntimeError, TimeoutError) as error:
                deepest = error.__cause__ or error  # Dask's own says that it failed, and not why
                reason = (str(deepest) or type(deepest).__name__).splitlines()[0]
                if reason != complaint:
                    complaint = reason
                    self._say(f"{address} does not take this worker: {reason}. It tries again.")
                await self._dismiss()
                await asyncio.sleep(_LONGEST_PAUSE_SECONDS)
                continue
            complaint = ""
            workers = counted(len(self._nannies), "worker")
            self._say(f"{'Joined' if is_first else 'Joined again:'} {address} with {workers}.")
            is_first = False
            self._is_serving = True
            alive_at = time.monotonic()
            while time.monotonic() - alive_at < _JOIN_SECONDS:
                if any(nanny.status.name not in ("running", "init") for nanny in self._nannies):
                    break  # their scheduler went away, or they cannot train
                if all(nanny.is_alive() for nanny in self._nannies):  # type: ignore[no-untyped-call]
                    alive_at = time.monotonic()
                await asyncio.sleep(_LOOK_SECONDS)
            unfit = next((nanny.unfit for nanny in self._nannies if nanny.unfit), None)
            # What they train now is not awaited.
            await self._dismiss()
            if unfit is not None:
                raise ClusterError(unfit)

    async def _wait_for_scheduler(self) -> str:
        complaint = ""
        pause = 0.2
        cluster, tls = self._settings.cluster, self._settings.tls
        while True:
            try:
                return await asyncio.to_thread(
                    require_scheduler, cluster, tls, patience_seconds=_ANSWER_SECONDS
                )
            except ClusterError as error:  # also: its file is not there yet, or not written whole
                reason = str(error).removesuffix(".")
            if reason != complaint:
                complaint = reason
                self._say(f"{reason}; this worker waits for it.")
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE_SECONDS, pause * 1.6)

    async def _join(self, address: str) -> None:
        settings = self._settings
        memory_bytes = settings.memory_bytes(len(self._environments))
        self._nannies = [
            _Nanny(
                address,
                nthreads=1,
                resources=training_resources(has_gpu="CUDA_VISIBLE_DEVICES" in environment),
                memory_limit=memory_bytes,
                local_directory=self._folder,
                security=None if settings.tls is None else settings.tls.security(),
                death_timeout=_JOIN_SECONDS,
                worker_class=TrainingWorker,
                silence_logs=None if is_dask_heard() else logging.CRITICAL,
                env=dict(environment),
                **settings.listen_on(address),
            )
            for environment in self._environments
        ]
        await asyncio.gather(*self._nannies)
        if settings.tls is None:
            await self._warn_of_exposure(address)

    async def _warn_of_exposure(self, address: str) -> None:
        """Says once what others can reach, whatever --cluster and --host look like."""
        if exposure(address) is not None and "://" in self._settings.cluster:
            return  # said when the address was given
        first = self._nannies[0]
        scheduler = await first.scheduler.identity(n_workers=0)
        listening = [listener.listen_address for listener in first.listeners]
        for kind, where in (
            *(("worker", place) for place in listening),
            ("scheduler", scheduler["address"]),
        ):
            warning = exposure(where)
            if warning is not None and kind not in self._warnings:
                self._warnings.add(kind)
                self._say(warning)

    async def _dismiss(self) -> None:
        """Ends the worker processes; each gives its trial back."""
        self._is_serving = False
        nannies, self._nannies = self._nannies, []
        for nanny in nannies:
            if nanny.status.name == "running":
                nanny.close_gracefully(reason="leaving")  # it is not to be started again
            if nanny.pid is not None:
                # It gives back and ends without waiting for the end of an epoch, as `close`
                # alone would.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(nanny.pid, signal.SIGTERM)
        closing = [nanny.close(timeout=_LEAVE_SECONDS) for nanny in nannies]
        await asyncio.gather(*closing, return_exceptions=True)


def _end_now(number: signal.Signals, folder: str) -> None:
    os.write(2, line("Ended at once; what was trained since the last checkpoint is trained again."))
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(128 + number)
