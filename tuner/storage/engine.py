"""The database below the storage: its URL, its tables, its connection, its outages.

SQLite and PostgreSQL. Every call runs on one thread (SQLite sees a single writer, and a
thousand slot threads share one connection) and is tried again while the database is away.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar
from urllib.parse import parse_qsl

import optuna
import sqlalchemy as sa
import stamina
from filelock import FileLock
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event, orm
from sqlalchemy.exc import DatabaseError, InterfaceError, OperationalError, SQLAlchemyError

from tuner.artifacts import DEFAULT_STORAGE_URL, make_folder, new_file_mode
from tuner.commands import command, secret_options
from tuner.errors import LeaseLostError, StorageError, StorageMissingError
from tuner.spec.document import did_you_mean

SCHEMA_VERSION = 4
#: A file with the password of a PostgreSQL URL that has none: secrets stay out of argv.
PASSWORD_FILE_VARIABLE = "TUNER_STORAGE_PASSWORD_FILE"  # noqa: S105 - a name, no password

#: The trial attribute that marks a trial as a coordinator's; its value is the asking token.
COORDINATOR_KEY = "coordinator"

LEASE_LOST = (
    "Another coordinator took this study over, so this one stops; nothing it found since was "
    "written. `tuner status` shows who runs it."
)

OPENING_SECONDS = 10.0  #: longest patience with a database that never answered
_SAY_SO_AFTER_SECONDS = 2.0  #: an outage shorter than this is nobody's business
_RETRY_SECONDS = 2.0  #: longest pause between two tries
_SQLITE_BUSY_SECONDS = 30.0  #: how long a statement waits for another process's write lock
_STATEMENT_SECONDS = 20.0  #: PostgreSQL ends a statement after this long
_SILENCE_SECONDS = 30.0  #: a connection that answers nothing for this long is given up
_LONGEST_HOST = 253  #: letters of a host's name, RFC 1035
_LAST_PORT = 65535
_LONGEST_PASSWORD = 4096  #: bytes of a password file
_SCHEMA_LOCK = 0x74756E6572  #: "tuner": the key of PostgreSQL's advisory lock

_PSYCOPG_ARGUMENTS = {
    "application_name": "tuner",
    "connect_timeout": 5,
    # A peer that went away without a word is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # ms
}
# A process frozen inside a transaction must not hold its locks longer than its lease.
_POSTGRESQL_SETTINGS = {
    "statement_timeout": f"{_STATEMENT_SECONDS:.0f}s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "15s",
}
# Frozen in the middle of a batch it is not even idle: PostgreSQL waits for the rest.
_POSTGRESQL_17_SETTINGS = {"transaction_timeout": "30s"}

metadata = sa.MetaData()
schema = sa.Table("tuner_schema", metadata, sa.Column("version", sa.Integer, primary_key=True))
lease = sa.Table(
    "tuner_lease",
    metadata,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("token", sa.String(64), nullable=False),
    sa.Column("holder", sa.Text, nullable=False),  # JSON: host, pid, started
    sa.Column("renewed_at", sa.Double, nullable=False),  # seconds since the epoch
    sa.Column("stop_requested", sa.Boolean, nullable=False),
    # Batches that this coordinator wrote: one that is tried again is not written twice.
    sa.Column("batches", sa.Integer, nullable=False, server_default="0"),
)
# Rows outlive their study: deleting a study does not undo the opening of a test split.
ledger = sa.Table(
    "tuner_ledger",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("opened_at", sa.String(40), nullable=False),  # ISO 8601, UTC
    sa.Column("opened_by", sa.String(255), nullable=False),  # user@host
    sa.Column("study", sa.String(512), nullable=False),
    # Not its id: SQLite gives that of a deleted study to the next one.
    sa.Column("study_key", sa.String(128), nullable=False, index=True),
    sa.Column("trial", sa.Integer, nullable=False),
    sa.Column("config_hash", sa.String(64), nullable=False),
    sa.Column("spec_hash", sa.String(64), nullable=False),
    sa.Column("split_id", sa.String(64), nullable=False, index=True),
    sa.Column("report", sa.Text, nullable=True),  # JSON, once the evaluation is done
)
# What the search decided, in order. The order says what each decision saw: samplers look at
# the trials asked for and told before, pruners at the verdicts before.
decisions = sa.Table(
    "tuner_decisions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("study_id", sa.Integer, nullable=False, index=True),
    sa.Column("trial", sa.Integer, nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),  # ask, rung, tell
    sa.Column("epoch", sa.Integer, nullable=True),
    sa.Column("verdict", sa.String(16), nullable=True),  # go, prune; a trial state
)
# Studies that wait for the service, which drives them over its own cluster.
queue = sa.Table(
    "tuner_queue",
    metadata,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("queued_at", sa.Double, nullable=False),  # seconds since the epoch
)
# Training and validation rows of queued studies: the service may run on another machine.
development = sa.Table(
    "tuner_development",
    metadata,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
)

# Which sequences a test split holds, so that they are found in another study's splits. Rows
# outlive their study, as the ledger's do.
splits = sa.Table(
    "tuner_split",
    metadata,
    sa.Column("split_id", sa.String(64), primary_key=True),
    sa.Column("sequences", sa.LargeBinary, nullable=False),  # sorted SHA-256, 32 bytes each
)

# What was changed through the dashboard, and by whom. Rows outlive their study.
audit = sa.Table(
    "tuner_audit",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.String(40), nullable=False),  # ISO 8601, UTC
    sa.Column("who", sa.String(64), nullable=False),
    sa.Column("address", sa.String(64), nullable=False),
    sa.Column("action", sa.String(256), nullable=False),  # method and path
    sa.Column("detail", sa.Text, nullable=False),
    # What it was answered with; NULL while it is done, or where the server died meanwhile.
    sa.Column("status", sa.Integer, nullable=True),
)

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


# --- URLs ---


def parse_url(url: str) -> sa.URL:
    """The URL of a database that a study can live in, with its password where a file has it.

    Raises:
        StorageError: A study cannot live there, or a part of the URL cannot be used.
    """
    try:
        parsed = sa.make_url(url)
    except (SQLAlchemyError, ValueError):
        raise StorageError(
            f"--storage {mask(url)!r} is no database URL; write sqlite:///PATH, "
            f"like {DEFAULT_STORAGE_URL}, or postgresql://USER@HOST/DATABASE."
        ) from None
    backend = parsed.get_backend_name()
    if backend not in ("sqlite", "postgresql") or parsed.drivername not in (
        backend,
        "postgresql+psycopg",
    ):
        _refuse(
            parsed,
            "only SQLite and PostgreSQL are known; write sqlite:///PATH, "
            f"like {DEFAULT_STORAGE_URL}, or postgresql://USER@HOST/DATABASE",
        )
    options = _options(url)
    texts = (parsed.username, parsed.password, parsed.host, parsed.database, *sum(options, ()))
    if not all(_is_plain(text) for text in texts if text):
        _refuse(parsed, "it holds a NUL byte, or bytes that are not UTF-8; remove them", bare=True)
    if backend == "sqlite":
        _check_file(parsed, options)
        return parsed
    if not parsed.database:
        _refuse(parsed, "it names no database; write postgresql://USER@HOST/DATABASE")
    parsed = parsed.set(drivername="postgresql+psycopg")
    _check_server(parsed, options)
    return _with_password(parsed)


def _refuse(parsed: sa.URL, problem: str, *, bare: bool = False) -> NoReturn:
    # Without its options: one that is not known may be a secret, too.
    scheme = parsed.drivername.removesuffix("+psycopg")
    place = f"{scheme}://***" if bare else shown(parsed.set(query={}))
    raise StorageError(f"--storage {place}: {problem}.")


def _options(url: str) -> list[tuple[str, str]]:
    """What stands after the question mark, also what has no value: SQLAlchemy drops that."""
    # As SQLAlchemy reads it: a user or a password may hold a question mark.
    place = re.sub("^[^:/]*(:[^@]*)?@", "", url.partition("://")[2])
    return parse_qsl(place.partition("?")[2], keep_blank_values=True)


def _is_plain(text: str) -> bool:
    """Whether a database is given the text as it is: libpq stops at a NUL, and says nothing."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        return False


def _check_file(parsed: sa.URL, options: list[tuple[str, str]]) -> None:
    if parsed.host or parsed.username is not None or parsed.port is not None:
        meant = "/".join(part for part in (parsed.host, parsed.database) if part)
        _refuse(
            parsed,
            f"the path stands after three slashes; write sqlite:///{meant}",
        )
    if not parsed.database or parsed.database == ":memory:":
        _refuse(
            parsed,
            f"a study must outlive its process; name a file, for instance {DEFAULT_STORAGE_URL}",
        )
    path = Path(parsed.database)
    if parsed.database.startswith("~") and not path.exists():
        _refuse(
            parsed,
            f"no shell replaces the ~ here, and {path.parts[0]!r} would be a folder of that name; "
            "write sqlite:////home/...",
        )
    for name, value in options:
        if name != "timeout":
            _refuse(
                parsed,
                f"SQLite has no option {name!r} here, only ?timeout=SECONDS (a question mark in a "
                "file's name is written %3F)",
            )
        if len(options) > 1 or not 0 < _number(value) < math.inf:
            _refuse(parsed, "timeout is one number of seconds above 0, for instance ?timeout=30")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _check_server(parsed: sa.URL, options: list[tuple[str, str]]) -> None:
    dialect = parsed.get_dialect()
    libpq: Any = dialect.import_dbapi()
    known = {option.keyword.decode() for option in libpq.pq.Conninfo.get_defaults()}
    for position, (name, value) in enumerate(options):
        if name not in known:
            hint = did_you_mean(name, known) or "; remove it"
            _refuse(parsed, f"libpq, which connects to PostgreSQL, has no option {name!r}{hint}")
        if not value:
            _refuse(parsed, f"its option {name!r} has no value; give it one, or leave it out")
        if name not in ("host", "port") and name in dict(options[:position]):
            _refuse(parsed, f"its option {name!r} stands twice; remove one")
    try:
        _, arguments = dialect().create_connect_args(parsed)
    except (SQLAlchemyError, ValueError):
        _refuse(
            parsed,
            "its hosts or ports cannot be read; several are written ?host=one:5432&host=two:5432",
        )
    for host in str(arguments.get("host", "")).split(","):
        if "@" in host[1:]:  # a first one marks a socket
            problem = "its host holds an @; in a user or a password, write @ as %40"
            _refuse(parsed, problem, bare=True)
        try:
            is_name = len(host.encode("idna")) <= _LONGEST_HOST or host.startswith("/")
        except UnicodeError:
            is_name = host.startswith("/")
        if not is_name:
            _refuse(
                parsed,
                f"{host[:80]!r} cannot be a host: the parts between its dots have 1 to 63 letters, "
                f"all of it at most {_LONGEST_HOST}",
                bare=True,
            )
    ports = [parsed.port, *str(arguments.get("port", "")).split(",")]
    for port in ports:
        if port not in (None, "") and not 0 < _number(str(port)) <= _LAST_PORT:
            _refuse(parsed, f"a port is a number from 1 to {_LAST_PORT}, not {port}")


def _with_password(url: sa.URL) -> sa.URL:
    file = os.environ.get(PASSWORD_FILE_VARIABLE)
    if url.password is not None or "password" in url.query or not file:
        return url
    place = f"${PASSWORD_FILE_VARIABLE}: {file}"
    remedy = "it should name the file that holds the database's password"
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(_LONGEST_PASSWORD + 1)
    except OSError as error:
        raise StorageError(f"{place}: {error.strerror}; {remedy}.") from error
    problem = password = ""
    try:
        password = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:  # it carries what it could not read: nothing may be raised in here
        problem = "is not UTF-8 text"
    if len(content) > _LONGEST_PASSWORD:
        problem = f"has more than {_LONGEST_PASSWORD} bytes"
    elif len(password.splitlines()) > 1:
        problem = "has more than one line"
    elif not _is_plain(password):
        problem = "holds a NUL byte"
    elif not password:
        problem = problem or "is empty"
    if problem:
        raise StorageError(f"{place}: {problem}; {remedy}, and nothing else.")
    return url.set(password=password)


def shown(url: sa.URL) -> str:
    """The URL as its user writes it, without its password."""
    plain = url.set(drivername=url.drivername.removesuffix("+psycopg"))  # which we put there
    return plain.difference_update_query(secret_options(url)).render_as_string(hide_password=True)


def mask(url: str) -> str:
    """The URL without its password, also where it cannot be parsed."""
    try:
        return shown(sa.make_url(url))
    except (SQLAlchemyError, ValueError):
        scheme, separator, _ = url.partition("://")
        if "@" in url:  # where its password begins and ends cannot be said
            return f"{scheme}://***" if separator else "***"
        place, mark, _ = url.partition("?")
        return f"{place}?***" if mark else place


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


class _Watchdog:
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


# --- Optuna's tables ---


class FencedStorage(RDBStorage):
    """Optuna's storage on the one storage thread, with back-off and the lease's fence."""

    def __init__(self, url: sa.URL, calls: Calls) -> None:
        self._calls = calls
        self.token: str | None = None
        self.fenced_study: int | None = None
        super().__init__(
            url.render_as_string(hide_password=False),
            engine_kwargs=_engine_arguments(url),
            skip_table_creation=True,
            skip_compatibility_check=True,  # `open_database` does, and says what to do
        )
        _configure(self.engine)
        self._watchdog = None if is_sqlite(self.engine) else _Watchdog(self.engine)
        event.listen(self.scoped_session, "after_flush", _note_flush)
        event.listen(self.scoped_session, "do_orm_execute", _note_bulk_write)
        event.listen(self.scoped_session, "before_commit", self._refuse_a_stale_writer)

    def dispose(self) -> None:
        # SQLAlchemy holds who listens to a kind of session for ever.
        event.remove(self.scoped_session, "before_commit", self._refuse_a_stale_writer)
        self.remove_session()
        self.engine.dispose()
        if self._watchdog is not None:
            self._watchdog.close()

    def _refuse_a_stale_writer(self, session: orm.Session) -> None:
        session.flush()
        if session.info.pop("wrote", False) and self.token is not None:
            renew_lease(session.connection(), self.fenced_study, self.token)

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """Reads trials as Optuna does, but in six plain queries."""
        trials = models.TrialModel.__table__
        wanted = trials.c.trial_id > trial_id_greater_than
        if included_trial_ids:
            wanted |= trials.c.trial_id.in_(included_trial_ids)
        wanted &= trials.c.study_id == study_id
        if states is not None:
            wanted &= trials.c.state.in_([state for state in TrialState if state in states])
        with self.engine.connect() as connection:
            # One snapshot: a coordinator may write between two of the queries.
            sqlite = is_sqlite(self.engine)
            connection.exec_driver_sql(
                "BEGIN" if sqlite else "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"
            )
            return read_trials(connection, wanted)


def _on_the_storage_thread(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: FencedStorage, *args: Any, **kwargs: Any) -> Any:
        return self._calls.run(method, self, *args, **kwargs)

    return call


# Optuna's cache (`get_storage`) calls these six beside the public interface.
for _name in (
    *BaseStorage.__abstractmethods__,
    "_create_new_trial",
    "_get_trials",
    "_get_best_trial_id",
    "_set_trial_param",
    "_get_stale_trial_ids",
    "get_trial_id_from_study_id_trial_number",
):
    setattr(FencedStorage, _name, _on_the_storage_thread(getattr(FencedStorage, _name)))


def read_trials(connection: sa.Connection, wanted: sa.ColumnElement[bool]) -> list[FrozenTrial]:
    """The trials that a condition on Optuna's table of trials selects, by number."""
    trials = models.TrialModel.__table__

    def parts(model: Any) -> dict[int, list[Any]]:
        table = model.__table__
        query = sa.select(table).join(trials, trials.c.trial_id == table.c.trial_id).where(wanted)
        query = query.order_by(*table.primary_key.columns)
        found = defaultdict(list)
        for row in connection.execute(query):
            found[row.trial_id].append(row)
        return found

    rows = connection.execute(sa.select(trials).where(wanted).order_by(trials.c.number)).all()
    values = parts(models.TrialValueModel)
    params = parts(models.TrialParamModel)
    reports = parts(models.TrialIntermediateValueModel)
    user_attrs = parts(models.TrialUserAttributeModel)
    system_attrs = parts(models.TrialSystemAttributeModel)
    read_value = models.TrialValueModel.stored_repr_to_value
    read_report = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value
    found = []
    for row in rows:
        its = row.trial_id
        by_objective = sorted(values.get(its, ()), key=lambda value: value.objective)
        in_order = params.get(its, ())
        distributions = {
            param.param_name: _distribution(param.distribution_json) for param in in_order
        }
        found.append(
            FrozenTrial(
                number=row.number,
                state=row.state,
                value=None,
                values=[read_value(one.value, one.value_type) for one in by_objective] or None,
                datetime_start=_local_time(row.datetime_start),
                datetime_complete=_local_time(row.datetime_complete),
                params={
                    param.param_name: distributions[param.param_name].to_external_repr(
                        param.param_value
                    )
                    for param in in_order
                },
                distributions=distributions,
                user_attrs=_attributes(user_attrs.get(its, ())),
                system_attrs=_attributes(system_attrs.get(its, ())),
                intermediate_values={
                    one.step: read_report(one.intermediate_value, one.intermediate_value_type)
                    for one in reports.get(its, ())
                },
                trial_id=its,
            )
        )
    return found


def _attributes(rows: Collection[Any]) -> dict[str, Any]:
    return {row.key: json.loads(row.value_json) for row in rows}


@functools.lru_cache(maxsize=4096)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


def _local_time(utc: datetime | None) -> datetime | None:
    """Optuna's date-times: naive UTC in the database, naive local time in a trial."""
    return None if utc is None else utc.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


# --- engine and schema ---


def is_sqlite(engine: sa.Engine) -> bool:
    """Whether it is SQLite and not PostgreSQL."""
    return engine.dialect.name == "sqlite"


def _engine_arguments(url: sa.URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {
            "connect_args": {"timeout": float(str(url.query.get("timeout", _SQLITE_BUSY_SECONDS)))}
        }
    # What the URL says (sslmode, connect_timeout, ...) goes before what we think.
    ours = {key: value for key, value in _PSYCOPG_ARGUMENTS.items() if key not in url.query}
    return {"connect_args": ours}


def _configure(engine: sa.Engine) -> None:
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


def open_database(
    url: sa.URL, calls: Calls, *, upgrade: bool = False, create: bool = True
) -> FencedStorage:
    """Opens a database, and creates its schema where it is empty.

    Many processes may open an empty database at once, where `create_all` races: SQLite's file
    is published whole, PostgreSQL's tables are created under a lock.

    Args:
        url: Where it is.
        calls: Runs what the storage is asked.
        upgrade: Brings a schema of an older Optuna up to date.
        create: Makes what is missing: folder, file, tables.

    Raises:
        StorageMissingError: It holds no tables of the tuner, and none are to be made.
        StorageError: The schema is of another version.
    """
    if not create:
        _require_tables(url)
    if url.get_backend_name() == "sqlite":
        path = Path(str(url.database))
        if not path.exists():
            make_folder(path.parent)
            _publish_empty_database(path)
    with closed_engine(url) as engine, engine.connect() as connection:
        if upgrade or not _is_current(connection):
            connection.rollback()
            if not is_sqlite(engine):
                connection.execute(sa.select(sa.func.pg_advisory_lock(_SCHEMA_LOCK)))
                connection.commit()
            _create_tables(engine, url)
            # The lock ends with the connection.
    rdb = FencedStorage(url, calls)
    try:
        _check_optunas_version(rdb, url, upgrade=upgrade)
    except BaseException:
        rdb.dispose()
        raise
    return rdb


def _check_optunas_version(rdb: FencedStorage, url: sa.URL, *, upgrade: bool) -> None:
    version, known = rdb.get_current_version(), rdb.get_all_versions()
    if version not in known:
        raise StorageError(
            f"{shown(url)}: a newer Optuna made its tables ({version}, this one knows {known[0]}); "
            "use the tuner that wrote it, or another --storage."
        )
    if version == known[0]:
        return
    if not upgrade:
        raise StorageError(
            f"{shown(url)}: an older Optuna made its tables ({version}, this one needs "
            f"{known[0]}). `{_initialise(url)}` brings them up to date; make a copy first."
        )
    rdb.upgrade()


def _require_tables(url: sa.URL) -> None:
    """Looks whether the tuner's tables are there; a file that has none stays as it is.

    Raises:
        StorageMissingError: They are not.
    """
    launch = command("launch", "SPEC", storage=shown(url))
    remedy = f"`{launch}` makes one, --storage names another database"
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        raise StorageMissingError(f"{shown(url)} holds no study: there is no such file; {remedy}.")
    with closed_engine(url, configured=False) as engine:
        if not sa.inspect(engine).has_table(schema.name):
            raise StorageMissingError(f"{shown(url)} holds no study of the tuner; {remedy}.")


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
    engine = sa.create_engine(url, **pool, **_engine_arguments(url))
    if configured:
        _configure(engine)
    try:
        yield engine
    finally:
        engine.dispose()


def look_at(url: sa.URL) -> None:
    """Asks the database one question, on a connection of its own.

    Raises:
        StorageError: The file of an SQLite database is not there.
        SQLAlchemyError: No answer.
    """
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).is_file():
        raise StorageError(f"{shown(url)}: there is no such file (any more).")
    with closed_engine(url) as engine, engine.connect() as connection:
        connection.scalar(sa.select(schema.c.version))


def _is_current(connection: sa.Connection) -> bool:
    tables = sa.inspect(connection)
    if not tables.has_table(schema.name) or not tables.has_table("alembic_version"):
        return False
    return connection.scalar(sa.select(schema.c.version)) == SCHEMA_VERSION


#: "outdated": of an older tuner or Optuna; "newer": the other way round.
SchemaState = Literal["current", "missing", "outdated", "newer"]


def schema_state(url: sa.URL) -> tuple[SchemaState, str]:
    """Looks at the schema without changing it; the state, and what to do about it."""
    made_by_itself = f"`{_initialise(url)}` makes it, and so does every other verb."
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        return "missing", f"There is no file yet; {made_by_itself}"
    with closed_engine(url, configured=False) as engine, engine.connect() as connection:
        tables = sa.inspect(connection)
        if not tables.has_table(schema.name) or not tables.has_table("alembic_version"):
            return "missing", f"It holds no tables of the tuner yet; {made_by_itself}"
        ours = connection.scalar(sa.select(schema.c.version)) or 0
        optunas = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    known = _optunas_versions()
    if ours > SCHEMA_VERSION or optunas not in known:
        return "newer", "A newer tuner wrote it: use that one, or another --storage."
    if ours < SCHEMA_VERSION or optunas != known[0]:
        return "outdated", f"`{_initialise(url)}` brings it up to date; make a copy first."
    return "current", ""


def _initialise(url: sa.URL) -> str:
    return command("storage", "init", storage=shown(url))


def _optunas_versions() -> list[str]:
    """Optuna's schema versions, the latest first: the library's, whatever the database."""
    storage = RDBStorage("sqlite://")
    try:
        return list(storage.get_all_versions())
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _create_tables(engine: sa.Engine, url: sa.URL) -> None:
    """Optuna's tables and ours, where they are missing; ours of an earlier version get newer."""
    if not sa.inspect(engine).has_table("alembic_version"):
        _create_optunas_tables(url)
    with engine.begin() as connection:
        lock_for_writing(connection)
        had_lease = sa.inspect(connection).has_table(lease.name)
        metadata.create_all(connection)
        version = connection.scalar(sa.select(schema.c.version))
        if version is None:
            connection.execute(schema.insert().values(version=SCHEMA_VERSION))
        elif version > SCHEMA_VERSION:
            raise StorageError(
                f"{shown(url)}: its schema has version {version}, "
                f"this tuner knows {SCHEMA_VERSION}; use the tuner that wrote it, or another "
                "--storage."
            )
        elif version < SCHEMA_VERSION:
            if had_lease and version < 2:  # the one table that was changed; the others came new
                connection.exec_driver_sql(
                    "ALTER TABLE tuner_lease ADD COLUMN batches INTEGER NOT NULL DEFAULT 0"
                )
            connection.execute(schema.update().values(version=SCHEMA_VERSION))


def _create_optunas_tables(url: sa.URL) -> None:
    storage = RDBStorage(
        url.render_as_string(hide_password=False), engine_kwargs=_engine_arguments(url)
    )
    storage.remove_session()
    storage.engine.dispose()


def _publish_empty_database(path: Path) -> None:
    """Creates the schema beside, and gives the whole file its name unless another has it by then.

    Where the file system has no hard links (exFAT, most SMB shares), a rename does; it would take
    the place of a file that another process published and wrote to meanwhile, so a lock keeps
    others away between the look and the rename.
    """
    with tempfile.TemporaryDirectory(prefix=".tuner-new-", dir=path.parent) as folder:
        beside = Path(folder, "tuner.db")
        url = sa.URL.create("sqlite", database=str(beside))
        _create_optunas_tables(url)
        with closed_engine(url) as engine:
            _create_tables(engine, url)
        # SQLite's journals get the mode of their database.
        beside.chmod(new_file_mode(path.parent, private=True) or 0o600)
        try:
            os.link(beside, path)
        except FileExistsError:  # another process was first: use its file
            pass
        except OSError:
            with FileLock(path.with_name(_PUBLISHING_LOCK), mode=0o600) as lock:
                if not path.exists():
                    beside.replace(path)
                # Who waits for it finds the database published, whatever file is locked.
                Path(lock.lock_file).unlink(missing_ok=True)


#: Beside a database that is being published where hard links are refused.
_PUBLISHING_LOCK = ".tuner-new.lock"


def lock_for_writing(connection: sa.Connection) -> None:
    """Begins a transaction that reads before it writes: SQLite must take its lock at once."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def now(connection: sa.Connection) -> Any:
    """Seconds since the epoch, by the database's clock: coordinators' clocks may differ."""
    if connection.dialect.name == "sqlite":  # a file on this machine
        return sa.literal(time.time(), sa.Double)
    return sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()), sa.Double)


def renew_lease(connection: sa.Connection, study_id: int | None, token: str) -> None:
    """The fence: the transaction around it may commit only while the token is the study's.

    Raises:
        LeaseLostError: It is not; the transaction must roll back.
    """
    renewed = connection.execute(
        lease.update()
        .where(lease.c.study_id == study_id, lease.c.token == token)
        .values(renewed_at=now(connection))
    )
    if renewed.rowcount != 1:
        raise LeaseLostError(LEASE_LOST)


def _note_flush(session: orm.Session, _context: object) -> None:
    session.info["wrote"] = True


def _note_bulk_write(state: orm.ORMExecuteState) -> None:
    if state.is_insert or state.is_update or state.is_delete:
        state.session.info["wrote"] = True


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
