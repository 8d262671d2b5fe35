"""Transactions over our own tables: on the storage thread, tried again during an outage."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import TypeVar

import sqlalchemy as sa

from tuner.storage.engine import Calls, explained

R = TypeVar("R")


class Transactions:
    """Runs functions of a connection, each in a transaction of its own.

    A transaction that is tried again after a lost answer may have been committed before, so the
    function must bear to run twice.
    """

    def __init__(
        self, url: sa.URL, engine: sa.Engine, calls: Calls, fence: Callable[[sa.Connection], None]
    ) -> None:
        """Of one open database.

        Args:
            url: For messages.
            engine: Gives the connections.
            calls: Runs them on the storage thread.
            fence: Raises if the transaction of a connection must not commit.
        """
        self._url = url
        self._engine = engine
        self._calls = calls
        self._fence = fence

    def run(self, work: Callable[[sa.Connection], R], *, fenced: bool = False) -> R:
        """Runs a transaction and waits for it.

        Args:
            work: Is given the connection.
            fenced: It commits only while this process holds the lease that it took, if any.

        Raises:
            LeaseLostError: It is fenced, and another coordinator took over; nothing was written.
            StorageError: The database does not answer, or refuses.
        """
        with self.explained():
            return self._calls.run(lambda: self.once(work, fenced=fenced))

    def begin(self, work: Callable[[sa.Connection], R]) -> Future[R]:
        """Runs a fenced transaction without waiting for a database that is unavailable."""
        return self._calls.begin(lambda: self.once(work, fenced=True))

    def begin_call(self, call: Callable[[], R]) -> Future[R]:
        """Runs what has its own transactions on the storage thread, without waiting for it."""
        return self._calls.begin(call)

    def once(self, work: Callable[[sa.Connection], R], *, fenced: bool = False) -> R:
        """Runs a transaction once; on the storage thread."""
        with self._engine.begin() as connection:
            result = work(connection)
            if fenced:
                self._fence(connection)
            return result

    def explained(self) -> AbstractContextManager[None]:
        """A block that turns the database's errors into ours."""
        return explained(self._url)
