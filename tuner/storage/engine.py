"""The database below the storage: its URL, its tables, its connection, its outages.

SQLite and PostgreSQL. Every call runs on one thread (SQLite sees a single writer, and a
thousand slot threads share one connection) and is tried again while the database is away.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import optuna
import sqlalchemy as sa
import stamina
from sqlalchemy import event
from sqlalchemy.exc import DatabaseError, InterfaceError, OperationalError, SQLAlchemyError

from tuner.errors import StorageError
from tuner.storage.url import PSYCOPG_ARGUMENTS, is_sqlite, shown

OPENING_SECONDS = 10.0  #: longest patience with a database that never answered
_SAY_SO_AFTER_SECONDS = 2.0  #: an outage shorter than this is nobody's business
_RETRY_SECONDS = 2.0  #: longest pause between two tries
_SQLITE_BUSY_SECONDS = 30.0  #: how long a statement waits for another process's write lock
_STATEMENT_SECONDS = 20.0  #: PostgreSQL ends a statement after this long
_SILENCE_SECONDS = 30.0  #: a connection that answers nothing for this long is given up

# A process frozen inside a transaction must not hold its locks longer than its lease.
_POSTGRESQL_SETTINGS = {
    "statement_timeout": f"{_STATEMENT_SECONDS:.0f}s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "15s",
}
# Frozen in the middle of a batch it is not even idle: PostgreSQL waits for the rest.
_POSTGRESQL_17_SETTINGS = {"transaction_timeout": "30s"}


P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


# --- calls ---


class Calls:
    """Runs functions on the one storage thread, again and again while the database is away."""

    def __init__(self, patience_seconds: float | None, say: Callable[[str], None]) -> None:
        self.patience_seconds = patience_seconds
        self._say = say
        self._thread_id: int | None = None
        self._given_up = threading.Event()
        self._submitting = threading.Lock()
        self._executor = ThreadPoolExecutor(1, "storage", initializer=self._remember_thread)

    def _remember_thread(self) -> None:
        self._thread_id = threading.get_ident()

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        if threading.get_ident() == self._thread_id:  # a storage method that calls another
            return function(*args, **kwargs)
        return self.begin(lambda: function(*args, **kwargs)).result()

    def begin(self, call: Callable[[], R]) -> Future[R]:
        """Runs a function on the storage thread, however long the database is away."""
        return self.submit(lambda: self.persist(call))

    def submit(self, call: Callable[[], R]) -> Future[R]:
        """Runs a function on the storage thread, once; it calls `persist` where it may wait."""
        with self._submitting:
            return self._executor.submit(call)

    def persist(self, call: Callable[[], R]) -> R:
        """Tries a call until the database answers it; on the storage thread."""
        began, said = time.monotonic(), False
        for attempt in stamina.retry_context(
            on=self._is_worth_waiting,
            attempts=None,
            timeout=self.patience_seconds,
            wait_initial=0.1,
            wait_max=_RETRY_SECONDS,
        ):
            with attempt:
                if not said and time.monotonic() - began > _SAY_SO_AFTER_SECONDS:
                    said = True
                    self._say("The database does not answer; waiting for it, nothing is lost.")
                result = call()
        if said:
            self._say(f"The database is back after {time.monotonic() - began:.0f} s.")
        return result

    def _is_worth_waiting(self, error: Exception) -> bool:
        return not self._given_up.is_set() and is_outage(error)

    def give_up(self) -> None:
        """Ends the patience with an outage: every call that waits fails soon."""
        self._given_up.set()

    def close(self, last: Callable[[], None] = lambda: None) -> None:
        """Ends the storage thread; nothing runs on it after `last`."""
        with self._submitting:
            closing = self._executor.submit(last)
            self._executor.shutdown(wait=False)
        closing.result()
        self._executor.shutdown(wait=True)


def say_on_stderr(message: str) -> None:
    """Says a line where results do not go."""
    sys.stderr.write(f"{message}\n")


class Watchdog:
    """Ends a connection that answers nothing, so that its caller can try another.

    TCP notices a peer that is gone. It does not notice a path that swallows what is sent after
    the last acknowledgement: the statement would wait for ever.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._waiting: tuple[float, int] | None = None  # since when, and the socket
        self._closed = threading.Event()
        event.listen(engine, "before_cursor_execute", self._begin)
        event.listen(engine, "after_cursor_execute", self._progress)
        event.listen(engine, "commit", self._progress_of)
        event.listen(engine, "rollback", self._progress_of)
        event.listen(engine, "checkin", self._end)
        self._thread = threading.Thread(target=self._watch, name="database-watch", daemon=True)
        self._thread.start()

    def _begin(self, connection: sa.Connection, *_: object) -> None:
        self._progress_of(connection)

    def _progress(self, connection: sa.Connection, *_: object) -> None:
        self._progress_of(connection)

    def _progress_of(self, connection: sa.Connection) -> None:
        with contextlib.suppress(Exception):  # a connection that is closed has no socket
            driver: Any = connection.connection.driver_connection
            self._waiting = (time.monotonic(), driver.fileno())

    def _end(self, *_: object) -> None:
        self._waiting = None

    def _watch(self) -> None:
        while not self._closed.wait(1.0):
            waiting = self._waiting
            if waiting is not None and time.monotonic() - waiting[0] > _SILENCE_SECONDS:
                self._waiting = None
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(waiting[1])) as end:
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()


# --- engine and schema ---


def engine_arguments(url: sa.URL) -> dict[str, Any]:
    """The arguments of `create_engine` for a URL."""
    if url.get_backend_name() == "sqlite":
        return {
            "connect_args": {"timeout": float(str(url.query.get("timeout", _SQLITE_BUSY_SECONDS)))}
        }
    # What the URL says (sslmode, connect_timeout, ...) goes before what we think.
    ours = {key: value for key, value in PSYCOPG_ARGUMENTS.items() if key not in url.query}
    return {"connect_args": ours}


def configure(engine: sa.Engine) -> None:
    """Sets what every connection of an engine needs."""
    event.listen(engine, "connect", _configure_sqlite if is_sqlite(engine) else _configure_server)


def _configure_sqlite(connection: Any, _record: object) -> None:
    # WAL: the dashboard reads while the coordinator writes. NORMAL keeps the file sound
    # through a crash of the process; only a power cut may lose the last commits.
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _configure_server(connection: Any, _record: object) -> None:
    settings = dict(_POSTGRESQL_SETTINGS)
    if connection.info.server_version >= 170_000:
        settings |= _POSTGRESQL_17_SETTINGS
    try:
        with connection.cursor() as cursor:
            for name, value in settings.items():
                cursor.execute(f"SET {name} = '{value}'")
        connection.commit()
    except BaseException:  # a server that goes away just now: nobody else knows of it yet
        connection.close()
        raise


@contextlib.contextmanager
def closed_engine(
    url: sa.URL, *, pooled: bool = False, configured: bool = True
) -> Iterator[sa.Engine]:
    """An engine for the length of a block.

    Args:
        url: Of the database.
        pooled: It keeps its connection between two uses.
        configured: With our settings of each connection, of which SQLite keeps one in its file.
    """
    pool = {} if pooled else {"poolclass": sa.NullPool}
    engine = sa.create_engine(url, **pool, **engine_arguments(url))
    if configured:
        configure(engine)
    try:
        yield engine
    finally:
        engine.dispose()


# --- errors ---

#: What errors say that no waiting ends: SQLite's, PostgreSQL's, and libpq's of an option's value.
_PERMANENT = re.compile(
    "no such table|no such column|readonly database|not a database|malformed|unable to open"
    "|authentication failed|no password supplied|does not exist|no pg_hba.conf entry"
    "|permission denied|invalid connection option"
    r"|invalid \w+ value|invalid port number|invalid value for parameter|bad value for"
    "|could not parse network address|definition of service|unrecognized configuration parameter"
)


def is_outage(error: BaseException) -> bool:
    """Whether waiting may help: locks, a full disk, a server that is away."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    if isinstance(cause, DatabaseError) and cause.connection_invalidated:
        return True  # PostgreSQL was stopped in the middle of a statement
    return isinstance(cause, OperationalError | InterfaceError) and not _PERMANENT.search(
        str(cause)
    )


@contextlib.contextmanager
def explained(url: sa.URL) -> Iterator[None]:
    """Turns the database's errors into ours."""
    masked = shown(url)
    remedy = (
        "Check that the path is right, readable and writable, and is a database of the tuner."
        if url.get_backend_name() == "sqlite"
        else "Check the address, its options, the user and the password, and that the server runs "
        "(`tuner storage check`)."
    )
    try:
        yield
    except (DatabaseError, InterfaceError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ if not isinstance(error, SQLAlchemyError) else error
        reason = str(getattr(cause, "orig", None) or cause or error).strip().rstrip(".")
        raise StorageError(f"{masked}: {reason}. {remedy}") from error
    except UnicodeError as error:  # a host of $PGHOST, say, that no name can be
        raise StorageError(f"{masked}: {error}. {remedy}") from error
    except OSError as error:
        raise StorageError(
            f"{masked}: {error.strerror or error}. Name a --storage in a folder that you may write."
        ) from error
