"""A worker that leaves gives its trials back, with what they have trained."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

import dask
import psutil
from distributed import Status, Worker, WorkerPlugin

from tuner.cluster.messages import LeaveReason, Left, TrainingTask, to_wire
from tuner.cluster.processes import SAME_SIGNAL_SECONDS, UNFIT, silence_dask


@dataclass(slots=True, kw_only=True)
class InFlight:
    """An attempt of this process."""

    events: str  #: topic on which to give it back
    snapshot: bytes | None  #: the checkpoint of its last completed epoch


IN_FLIGHT: dict[str, InFlight] = {}


class GiveBack(WorkerPlugin):
    """Gives the trials of a worker back when it leaves; a signal makes it leave.

    An epoch may take half a minute, and a batch queue kills sooner: so its end is not awaited.
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
        # First of all: how long there is is not known, and no other trial is to come here.
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


def leave_unfit(worker: Worker, task: TrainingTask, reason: str) -> None:
    """Leaves permanently and gives the trial back: the next one would fail here, too."""
    worker.status = Status.closing_gracefully  # first of all: no other trial is to come here
    message = Left(attempt=task.attempt, reason="unfit", detail=reason)
    worker.log_event(task.events, to_wire(message))
    leaving = worker.close(executor_wait=False, reason=f"{UNFIT}{reason}")
    _LEAVING.add(asyncio.get_running_loop().create_task(leaving))


def _give_back(worker: Worker) -> None:
    # Dask's nanny asks a process that takes too much memory to leave like any other.
    why: LeaveReason = "too large" if _is_too_large(worker) else "asked"
    for attempt in list(IN_FLIGHT):
        in_flight = IN_FLIGHT.pop(attempt, None)
        if in_flight is not None:
            message = Left(attempt=attempt, reason=why, checkpoint=in_flight.snapshot)
            worker.log_event(in_flight.events, to_wire(message))


def _is_too_large(worker: Worker) -> bool:
    limit_bytes = worker.memory_manager.memory_limit or 0
    fraction = dask.config.get("distributed.worker.memory.terminate") or 0
    # Just below the limit, too: it may have shrunk again since.
    most_bytes = 0.9 * fraction * limit_bytes
    return 0 < most_bytes < psutil.Process().memory_info().rss


_LEAVING: set[Any] = set()  #: a loop forgets tasks that nothing refers to


def give_back_on_leaving(worker: Worker) -> None:
    """Makes this worker give its trials back when it leaves; once a worker."""
    if GiveBack.name in worker.plugins:
        return
    plugin = GiveBack()
    worker.loop.add_callback(functools.partial(worker.plugin_add, plugin, GiveBack.name))
    plugin.ready.wait(timeout=5.0)
