"""Attempts at training, on the coordinator's side: what each was told and may do next."""

from __future__ import annotations

import contextlib
import queue
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from tuner.cluster.messages import (
    STOP,
    EpochTrained,
    LeaveReason,
    Left,
    Opened,
    Orders,
    Started,
    TrainingOutcome,
    WorkerMessage,
)
from tuner.errors import WorkerDiedEarlyError, WorkerLeftError, WorkerLostError
from tuner.every import Every
from tuner.train import EpochResult, TrainingJob

_PULSE_SECONDS = 2.0  #: between two complete orders
_JOIN_SECONDS = 5.0  #: for the thread that sends orders to end

_LEFT: dict[LeaveReason, tuple[type[WorkerLostError], str]] = {
    "asked": (WorkerLeftError, "its worker left and gave it back"),
    "unfit": (WorkerLeftError, "its worker cannot train and left"),
    "too large": (WorkerLostError, "its worker ran out of memory"),
}


class Attempt:
    """One attempt at training a job. Messages arrive on one thread and are read on another."""

    def __init__(self, job: TrainingJob) -> None:
        self.name = uuid.uuid4().hex  # no other attempt's messages are believed
        # Epochs after which a worker waits for a verdict; it waits for none after the last one.
        self._stations = (*sorted(job.rungs), job.settings.max_epochs + 1)
        self.train_until = self._stations[0]  # the epoch after which it waits to be told more
        self.is_started = False  # else it waits for a worker
        self._is_opened = False  # the network was built, and began to train
        self._epochs = 0  # that were taken from its messages
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive(self, message: WorkerMessage) -> None:
        """Takes in what its worker says."""
        if isinstance(message, Started):
            if self.is_started:  # Dask started it again on its own
                self.end(self.death())
            self.is_started = True
            return
        self._is_opened |= isinstance(message, Opened)
        self._inbox.put(message)
        if isinstance(message, Left):
            kind, what = _LEFT[message.reason]
            self.end(kind(what))

    def end(self, how: object) -> None:
        """Ends it after what was said so far: with its Dask future, or with an error."""
        self._inbox.put(how)

    def next(self, timeout: float) -> Any:
        """What its worker said next, or how it ended; `queue.Empty` after `timeout` seconds."""
        return self._inbox.get(timeout=timeout)

    def death(self) -> WorkerLostError:
        """What it means if its worker dies now: before it trained, that is no fault of the job."""
        if self._is_opened:
            return WorkerLostError("its worker died")
        return WorkerDiedEarlyError("its worker died before it trained")

    def new_epochs(self, message: WorkerMessage | TrainingOutcome) -> Iterator[EpochResult]:
        """The epochs of a message that follow on those before; the outcome fills any gap."""
        told: tuple[EpochResult, ...] = ()
        if isinstance(message, EpochTrained):
            told = (message.result,)
        elif isinstance(message, TrainingOutcome):
            told = message.curve
        for result in told:
            if result.epoch == self._epochs + 1:
                self._epochs += 1
                yield result

    def allow_more(self) -> bool:
        """Lets it train to the next rung; whether that is a change."""
        before, self.train_until = (
            self.train_until,
            next(epoch for epoch in self._stations if epoch > self._epochs),
        )
        return self.train_until > before


class Attempts:
    """The living attempts of a study: passes messages on, and says how far each may train.

    News is sent at once. Complete orders are sent again and again, so that one that was lost
    costs seconds, and workers know that their coordinator lives.
    """

    def __init__(self, send: Callable[[Orders], None], *, pausing: threading.Event) -> None:
        """Begins to send.

        Args:
            send: Sends orders; may fail.
            pausing: Whether every attempt is to save a checkpoint and end.
        """
        self._send = send
        self._pausing = pausing
        self._living: dict[str, Attempt] = {}
        self._news: dict[str, int] = {}  # of orders that were not sent yet, as `Orders.attempts`
        self._lock = threading.Lock()  # of the two above
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._pulse = threading.Thread(target=self._keep_sending, name="orders", daemon=True)
        self._pulse.start()

    def add(self, attempt: Attempt) -> None:
        with self._lock:
            self._living[attempt.name] = attempt

    def remove(self, attempt: Attempt) -> None:
        """Forgets it and stops it, if it trains."""
        with self._lock:
            self._living.pop(attempt.name, None)
            self._news[attempt.name] = STOP
        self._wake.set()

    def announce(self, attempt: Attempt) -> None:
        """Tells its worker at once that it may train on."""
        with self._lock:
            self._news[attempt.name] = attempt.train_until
        self._wake.set()

    def receive(self, message: WorkerMessage) -> None:
        with self._lock:
            attempt = self._living.get(message.attempt)
        if attempt is not None:  # else a worker that was given up still trains: not believed
            attempt.receive(message)

    def lose_all(self, error: Callable[[], WorkerLostError]) -> None:
        """Ends every attempt with an error of its own."""
        with self._lock:
            living = list(self._living.values())
        for attempt in living:
            attempt.end(error())

    def pause(self) -> None:
        """Ends every attempt with a checkpoint, soon; those that come, too."""
        self._pausing.set()
        self._wake.set()

    def close(self) -> None:
        """Sends the last orders."""
        self._closed.set()
        self.pause()
        self._pulse.join(timeout=_JOIN_SECONDS)

    def _keep_sending(self) -> None:
        pause = Every(_PULSE_SECONDS)  # between two complete orders
        while True:
            self._wake.wait(_PULSE_SECONDS)
            self._wake.clear()
            closed, pausing = self._closed.is_set(), self._pausing.is_set()
            complete = closed or pausing or pause.is_due()
            with self._lock:
                attempts, self._news = self._news, {}
                if complete:
                    attempts = {name: one.train_until for name, one in self._living.items()}
            if complete:
                pause.begin_pause()
            with contextlib.suppress(Exception):  # a scheduler that is away hears the next one
                self._send(Orders(pause=pausing, attempts=attempts, complete=complete))
            if closed:
                return
