"""What probes are answered: whether the process is alive, and whether it is ready to work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

ALIVE, READY = "/healthz", "/readyz"  #: paths that answer anyone, under any name of the host

NO_DATABASE = "The database is unavailable; it is asked again every few seconds. Nothing is lost."
NO_SCHEDULER = "The Dask scheduler is unavailable; studies wait for it. Nothing is lost."

_LOOK_SECONDS = 2.0  #: between two looks at the database
_SILENCE_SECONDS = 3.0  #: a look that takes longer finds the database unavailable
_CLOSE_SECONDS = 6.0  #: for the last look; a connection attempt ends after 5 s


class Health:
    """Asks the database on a thread of its own, so that no request has to wait for the answer.

    During an outage a request that waits for the database holds one of the few threads that
    answer requests. An outage that is known here is answered at once.
    """

    def __init__(
        self, look: Callable[[], object], *, scheduler_is_up: Callable[[], bool] | None = None
    ) -> None:
        """Knows of no outage yet.

        Args:
            look: Asks the database; raises an exception if it is unavailable.
            scheduler_is_up: Whether the scheduler is connected, without waiting; None: none is
                needed.
        """
        self._look = look
        self._scheduler_is_up = scheduler_is_up
        self._failed = False
        self._looking_since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="health", daemon=True)

    @property
    def outage(self) -> str | None:
        """Why no request can be answered; None if it can. Never waits."""
        since = self._looking_since
        is_silent = since is not None and time.monotonic() - since > _SILENCE_SECONDS
        return NO_DATABASE if self._failed or is_silent else None

    @property
    def unready(self) -> str | None:
        """Why studies do not proceed or cannot be shown; None if they do. Never waits."""
        if self.outage is not None:
            return self.outage
        if self._scheduler_is_up is not None and not self._scheduler_is_up():
            return NO_SCHEDULER
        return None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join(_CLOSE_SECONDS)

    def _keep_looking(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            self._looking_since = time.monotonic()
            try:
                self._look()
            except Exception:  # noqa: BLE001 - whatever it is, the database did not answer
                self._failed = True
            else:
                self._failed = False
            finally:
                self._looking_since = None
