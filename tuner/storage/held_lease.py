"""The lease that this process holds, and with it the study in memory: taken, renewed, released."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import sqlalchemy as sa

from tuner.errors import LeaseLostError, StorageError
from tuner.storage import lease
from tuner.storage.lease import Fence, Leases
from tuner.storage.study_router import StudyRouter
from tuner.storage.tables import lock_for_writing
from tuner.storage.transactions import Transactions

_RENEWAL_SECONDS = 1.0  #: between two renewals of a lease that `HeldLease.held` keeps


class HeldLease:
    """At most one lease; while it is held, every write of this storage is fenced by it."""

    def __init__(
        self, leases: Leases, fence: Fence, router: StudyRouter, transactions: Transactions
    ) -> None:
        self._leases = leases
        self._fence = fence
        self._router = router
        self._transactions = transactions
        # When the lease was certainly this process's, last; infinity if none was taken.
        self._certain_at = math.inf

    def take(self, study_id: int) -> str:
        """Makes this process the study's coordinator, and reads the study into memory.

        Returns:
            The token of the lease.

        Raises:
            StudyInUseError: A live coordinator holds the lease; the message names it.
        """
        began = _seconds()
        token = self._leases.take(study_id)
        self._certain_at = began
        self._fence.study_id, self._fence.token = study_id, token
        with self._transactions.explained():
            self._router.hold(study_id, token)
        return token

    def release(self) -> None:
        """Writes what is open and gives the lease back; without one, does nothing.

        Raises:
            LeaseLostError: Another coordinator took over.
            StorageError: The database does not answer.
        """
        token = self._fence.token
        if token is None:
            return
        try:
            with self._transactions.explained():
                self._router.release()
        finally:
            self._fence.study_id = self._fence.token = None
            self._certain_at = math.inf
        self._leases.give_back(token)

    @contextlib.contextmanager
    def held(self, study_id: int) -> Iterator[None]:
        """A block in which this process holds a study's lease and keeps renewing it.

        For what has no loop of its own, as a coordinator has. A process that was frozen in the
        block may lose the lease all the same: then every write that is fenced is refused.

        Raises:
            StudyInUseError: A live coordinator holds the lease.
        """
        self.take(study_id)
        ended = threading.Event()
        renewal = threading.Thread(
            target=self._keep_renewing, args=(ended,), name="lease", daemon=True
        )
        try:
            renewal.start()
            yield
        finally:
            ended.set()
            renewal.join()
            self.release()

    def _keep_renewing(self, ended: threading.Event) -> None:
        while not ended.wait(_RENEWAL_SECONDS):
            try:
                self.heartbeat()
            except LeaseLostError:
                return
            except StorageError:
                continue  # the database is unavailable: the lease lapses, or is renewed in time

    def is_certain(self) -> bool:
        """Whether no other process can have taken the study over: no row fences a file.

        It is certain for half of the time after which a lease lapses, and True for a process
        that took none.
        """
        return _seconds() - self._certain_at < lease.LEASE_SECONDS / 2

    def ensure(self) -> bool:
        """Makes sure that the lease is held, with a heartbeat if it is not certain; True.

        Raises:
            LeaseLostError: Another coordinator took over.
        """
        if not self.is_certain():
            self.heartbeat()
        return True

    def heartbeat(self) -> bool:
        """Renews the lease; True if somebody asked this coordinator to stop.

        Raises:
            LeaseLostError: Another coordinator took over.
        """
        with self._transactions.explained():
            return self.begin_heartbeat().result()

    def begin_heartbeat(self) -> Future[bool]:
        """The same without waiting for a database that is unavailable."""

        def beat(connection: sa.Connection) -> bool:
            lock_for_writing(connection)
            study = self._router.in_memory
            if study is not None:
                study.look_at_others(connection)
            current = lease.read(connection, self._fence.study_id)
            return current is not None and current.stop_requested

        def renew() -> bool:
            began = _seconds()
            stop_requested = self._transactions.once(beat, fenced=True)
            self._certain_at = began
            return stop_requested

        return self._transactions.begin_call(renew)


def _seconds() -> float:
    """Seconds since some moment, by a clock that also counts while the machine is suspended."""
    clock: int | None = getattr(time, "CLOCK_BOOTTIME", None)  # Linux
    return time.monotonic() if clock is None else time.clock_gettime(clock)
