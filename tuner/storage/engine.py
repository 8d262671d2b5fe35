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
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import optuna
import sqlalchemy as sa
import stamina
from sqlalchemy import event
from sqlalchemy.exc import DatabaseError, InterfaceError, OperationalError, SQLAlchemyError

from tuner.errors import StorageError
from tuner.storage.url import PASSWORD_FILE_VARIABLE, PSYCOPG_ARGUMENTS, is_sqlite, shown

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
        #: Makes the block in which each try runs.
        self.each_try: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
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
            wait_jitter=0.1,  # the default, 1 s, is ten times the first pause
        ):
            with attempt, self.each_try():
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


class SilenceTimer:
    """Ends the connection of a try that is not answered, so that it is tried on another one.

    TCP notices a peer that is gone. It does not notice a path that swallows what is sent after
    the last acknowledgement: the statement would wait for ever.

    To start a thread for each try would cost more than many a statement. So one that was started
    waits for the deadline of its try, then for that of the try which runs by then; it ends when
    it finds none, and the next try starts another.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._lock = threading.Lock()
        self._connection: Any = None  # the driver's, from which an answer is awaited
        self._deadline: float | None = None  # seconds, monotonic; None while nothing is awaited
        self._timer: threading.Timer | None = None
        event.listen(engine, "connect", self._begin, insert=True)  # before `configure` asks
        for sent in ("before_cursor_execute", "commit", "rollback"):
            event.listen(engine, sent, self._begin_of)
        event.listen(engine, "after_cursor_execute", self._end)

    @contextlib.contextmanager
    def each_try(self) -> Iterator[None]:
        """A block after which no connection is ended for what was sent in it."""
        try:
            yield
        finally:
            self._end()

    def _begin_of(self, connection: sa.Connection, *_: object) -> None:
        with contextlib.suppress(SQLAlchemyError):  # it is closed, or was invalidated
            self._begin(connection.connection.driver_connection)

    def _begin(self, connection: Any, *_: object) -> None:
        with self._lock:
            self._connection = connection
            self._deadline = time.monotonic() + _SILENCE_SECONDS
            if self._timer is None:
                self._start(_SILENCE_SECONDS)

    def _end(self, *_: object) -> None:
        with self._lock:
            self._connection = self._deadline = None

    def _start(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._look)
        self._timer.name, self._timer.daemon = "database-silence", True
        self._timer.start()

    def _look(self) -> None:
        with self._lock:
            self._timer = None
            if self._deadline is None:
                return
            left = self._deadline - time.monotonic()
            if left > 0:
                self._start(left)
                return
            self._deadline = None
            # Any error: the connection was closed meanwhile.
            with (
                contextlib.suppress(Exception),
                socket.socket(fileno=os.dup(self._connection.fileno())) as end,
            ):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the thread, if one waits; nothing is sent any more."""
        with self._lock:
            self._deadline = None
            timer = self._timer
        if timer is not None:
            timer.cancel()
            timer.join()


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
def explained(url: sa.URL, *, by_check: bool = False) -> Iterator[None]:
    """Turns the database's errors into ours.

    Args:
        url: Of the database, for the message.
        by_check: The command is `tuner storage check`, which is then not suggested.
    """
    masked = shown(url)

    def remedy(reason: str) -> str:
        if url.get_backend_name() == "sqlite":
            return (
                "Check that the path is right, readable and writable, and is a database of the "
                "tuner."
            )
        if "no password supplied" in reason:
            return (
                "Set PGPASSWORD, or name a file that holds the password in "
                f"{PASSWORD_FILE_VARIABLE}."
            )
        command = "" if by_check else " (`tuner storage check`)"
        return (
            "Check the address, its options, the user and the password, and that the server runs"
            f"{command}."
        )

    try:
        yield
    except (DatabaseError, InterfaceError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ if not isinstance(error, SQLAlchemyError) else error
        reason = str(getattr(cause, "orig", None) or cause or error).strip().rstrip(".")
        raise StorageError(f"{masked}: {reason}. {remedy(reason)}") from error
    except UnicodeError as error:  # a host of $PGHOST, say, that no name can be
        raise StorageError(f"{masked}: {error}. {remedy(str(error))}") from error
    except OSError as error:
        raise StorageError(
            f"{masked}: {error.strerror or error}. Name a --storage in a folder that you may write."
        ) from error
