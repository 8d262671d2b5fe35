"""Keeps the lease of a study while a coordinator runs, and never waits for the database."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from tuner.errors import StorageError, TunerError
from tuner.every import Every
from tuner.storage.storage import Storage

_HEARTBEAT_SECONDS = 1.0
_PATIENCE_AFTER_STOP_SECONDS = 5.0  #: with a database that is away, once the study is to stop


class LeaseKeeper:
    """Renews the lease that its coordinator took, about once a second."""

    def __init__(self, storage: Storage, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage = storage
        self._clock = clock
        self._pause = Every(_HEARTBEAT_SECONDS, clock=clock)
        self._heartbeat: Future[bool] | None = None  # that is awaited
        self._silent_since = 0.0  # when it began
        self._stopping_since: float | None = None

    def stop(self) -> None:
        """From now on a database that does not answer is given up after a few seconds."""
        if self._stopping_since is None:
            self._stopping_since = self._clock()

    def beat(self) -> bool:
        """Renews the lease if it is time; whether somebody asked the study to stop.

        Raises:
            LeaseLostError: Another coordinator took over.
            StorageError: The study is to stop, and the database does not answer.
        """
        if self._heartbeat is None:
            if self._pause.is_due():
                self._heartbeat = self._storage.lease.begin_heartbeat()
                self._silent_since = self._clock()
            return False
        if self._heartbeat.done():
            heartbeat, self._heartbeat = self._heartbeat, None
            return heartbeat.result()
        if self._stopping_since is not None:
            waited = self._clock() - max(self._silent_since, self._stopping_since)
            if waited > _PATIENCE_AFTER_STOP_SECONDS:
                self._storage.give_up()
                raise StorageError(self._stopped_without_it())
        return False

    def release(self, *, has_failed: bool) -> None:
        """Gives the lease back; if the database is unavailable, the lease lapses by itself.

        Args:
            has_failed: The study ended by an error, which is more to the point than one of this.

        Raises:
            StorageError: The database does not answer.
            TunerError: The lease could not be given back.
        """
        is_quiet = has_failed or sys.exc_info()[0] is not None
        patience = threading.Timer(_PATIENCE_AFTER_STOP_SECONDS, self._storage.give_up)
        patience.daemon = True
        if self._stopping_since is not None:
            patience.start()
        try:
            self._storage.lease.release()
        except StorageError as error:
            if not is_quiet:
                raise StorageError(self._stopped_without_it()) from error
        except TunerError:
            if not is_quiet:
                raise
        finally:
            patience.cancel()

    def _stopped_without_it(self) -> str:
        return (
            f"{self._storage.masked_url} does not answer, so the study stopped without it. "
            "Nothing that it holds is lost, and running trials keep their checkpoints: the same "
            "command resumes the study once the database is available again."
        )
