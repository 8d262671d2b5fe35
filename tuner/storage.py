"""The database: Optuna's tables, made to survive outages, and three tables of our own.

Every call runs on one thread (SQLite sees a single writer, and a thousand slot threads
share one connection), is tried again while the database is away, and, once a coordinator
has taken its lease, commits only while that lease is still held.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

import optuna
import psutil
import sqlalchemy as sa
import stamina
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event, orm
from sqlalchemy.exc import DatabaseError, InterfaceError, OperationalError, SQLAlchemyError

from tuner.artifacts import DEFAULT_STORAGE_URL
from tuner.errors import LeaseLostError, StorageError

SCHEMA_VERSION = 1
LEASE_SECONDS = 30.0  #: a lease not renewed for this long may be taken over
_SQLITE_BUSY_SECONDS = 30.0  #: how long a statement waits for another process's write lock
_SAY_SO_AFTER_SECONDS = 2.0  #: an outage shorter than this is nobody's business

#: The trial attribute that marks a trial as a coordinator's; its value is the asking token.
COORDINATOR_KEY = "coordinator"

_metadata = sa.MetaData()
_schema = sa.Table("tuner_schema", _metadata, sa.Column("version", sa.Integer, primary_key=True))
_lease = sa.Table(
    "tuner_lease",
    _metadata,
    sa.Column("study_id", sa.Integer, primary_key=True),
    sa.Column("token", sa.String(64), nullable=False),
    sa.Column("holder", sa.Text, nullable=False),  # JSON: host, pid, started
    sa.Column("renewed_at", sa.Float, nullable=False),  # seconds since the epoch
    sa.Column("stop_requested", sa.Boolean, nullable=False),
)
# Rows outlive their study: deleting a study does not undo the opening of a test split.
_ledger = sa.Table(
    "tuner_ledger",
    _metadata,
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
# What the search decided, in order: enough to replay it (every tell before a row had
# been seen by it, and `seen` holds how far each running trial was).
_decisions = sa.Table(
    "tuner_decisions",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("study_id", sa.Integer, nullable=False, index=True),
    sa.Column("trial", sa.Integer, nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),  # ask, rung, tell
    sa.Column("epoch", sa.Integer, nullable=True),
    sa.Column("verdict", sa.String(16), nullable=True),  # go, prune; a trial state
    sa.Column("seen", sa.Text, nullable=True),  # JSON: {running trial: completed epochs}
)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseHolder:
    """Who drives a study."""

    host: str
    pid: int
    started: float  #: when that process began, seconds since the epoch: pids are used again

    @classmethod
    def this_process(cls) -> LeaseHolder:
        return cls(
            host=socket.gethostname(), pid=os.getpid(), started=psutil.Process().create_time()
        )

    def is_known_dead(self) -> bool:
        """True where the process ran on this machine and is gone; False where nobody can tell."""
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 1.0
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The lease row of a study, as last read."""

    token: str
    holder: LeaseHolder
    renewed_at: float  #: seconds since the epoch
    stop_requested: bool

    @property
    def is_live(self) -> bool:
        return time.time() - self.renewed_at < LEASE_SECONDS and not self.holder.is_known_dead()


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """One opening of a test split."""

    id: int
    opened_at: str
    opened_by: str
    study: str
    study_key: str  #: unique to the study, and never used again
    trial: int
    config_hash: str
    spec_hash: str
    split_id: str
    report: dict[str, Any] | None  #: None where the evaluation never finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One ask, rung verdict or tell."""

    trial: int
    kind: str
    epoch: int | None
    verdict: str | None
    seen: dict[int, int] | None  #: completed epochs of each running trial


class _FencedStorage(RDBStorage):
    """Optuna's storage on the one storage thread, with back-off and the lease's fence."""

    def __init__(self, url: str, calls: _Calls, *, create: bool) -> None:
        self._calls = calls
        self.token: str | None = None
        self.fenced_study: int | None = None
        super().__init__(
            url,
            engine_kwargs={"connect_args": {"timeout": _SQLITE_BUSY_SECONDS}},
            skip_table_creation=not create,
        )
        event.listen(self.engine, "connect", _configure_sqlite)
        event.listen(self.scoped_session, "after_flush", _note_flush)
        event.listen(self.scoped_session, "do_orm_execute", _note_bulk_write)
        event.listen(self.scoped_session, "before_commit", self._refuse_a_stale_writer)

    def _refuse_a_stale_writer(self, session: orm.Session) -> None:
        session.flush()
        if session.info.pop("wrote", False) and self.token is not None:
            renew_lease(session.connection(), self.fenced_study, self.token)

    def _create_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None = None
    ) -> FrozenTrial:
        # A coordinator's trial carries its mark from its first transaction on, so that one
        # whose coordinator died right after it is adopted, and nobody else's ever is.
        if template_trial is None and self.token is not None:
            template_trial = optuna.create_trial(
                state=TrialState.RUNNING, user_attrs={COORDINATOR_KEY: self.token}
            )
        return super()._create_new_trial(study_id, template_trial)


class _Calls:
    """Runs functions on the one storage thread, again and again while the database is away."""

    def __init__(self, patience_seconds: float | None, say: Callable[[str], None]) -> None:
        self.patience_seconds = patience_seconds
        self._say = say
        self._thread_id: int | None = None
        self._executor = ThreadPoolExecutor(1, "storage", initializer=self._remember_thread)

    def _remember_thread(self) -> None:
        self._thread_id = threading.get_ident()

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        if threading.get_ident() == self._thread_id:  # a storage method that calls another
            return function(*args, **kwargs)
        return self._executor.submit(self._persist, lambda: function(*args, **kwargs)).result()

    def _persist(self, call: Callable[[], R]) -> R:
        began, said = time.monotonic(), False
        for attempt in stamina.retry_context(
            on=_is_outage,
            attempts=None,
            timeout=self.patience_seconds,
            wait_initial=0.1,
            wait_max=5.0,
        ):
            with attempt:
                if not said and time.monotonic() - began > _SAY_SO_AFTER_SECONDS:
                    said = True
                    self._say("The database does not answer; waiting for it, nothing is lost.")
                result = call()
        if said:
            self._say(f"The database is back after {time.monotonic() - began:.0f} s.")
        return result

    def close(self) -> None:
        self._executor.shutdown(wait=True)


def _on_the_storage_thread(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: _FencedStorage, *args: Any, **kwargs: Any) -> Any:
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
    setattr(_FencedStorage, _name, _on_the_storage_thread(getattr(_FencedStorage, _name)))


def _say_on_stderr(message: str) -> None:
    sys.stderr.write(f"{message}\n")


class Storage:
    """One open database.

    Attributes:
        url: Where it is, as SQLAlchemy takes it.
        optuna: Its studies and trials, behind Optuna's cache.
    """

    def __init__(
        self,
        url: str,
        *,
        patience_seconds: float | None = 5.0,
        say: Callable[[str], None] = _say_on_stderr,
    ) -> None:
        """Opens the database and creates its schema where it is empty.

        Args:
            url: `sqlite:///PATH`.
            patience_seconds: How long a call is tried again during an outage; None for ever.
            say: Takes the lines about outages.

        Raises:
            StorageError: The URL is no usable one, or what stands there is no database of ours.
        """
        self.url = url
        path = sqlite_path(url)
        self._calls = _Calls(patience_seconds, say)
        try:
            with _explained(url):
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.exists():
                    _publish_empty_database(path)
                self._rdb = self._calls.run(_FencedStorage, url, self._calls, create=True)
                self._calls.run(self._create_our_tables)
        except BaseException:
            self._calls.close()
            raise
        self.optuna: BaseStorage = optuna.storages.get_storage(self._rdb)

    @property
    def masked_url(self) -> str:
        """The URL without its password."""
        return sa.make_url(self.url).render_as_string(hide_password=True)

    def _create_our_tables(self) -> None:
        with self._rdb.engine.begin() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            _metadata.create_all(connection)
            version = connection.scalar(sa.select(_schema.c.version))
            if version is None:
                connection.execute(_schema.insert().values(version=SCHEMA_VERSION))
            elif version != SCHEMA_VERSION:
                raise StorageError(
                    f"{self.masked_url}: its schema has version {version}, this tuner knows "
                    f"{SCHEMA_VERSION}; use the tuner that wrote it, or another --storage."
                )

    def close(self) -> None:
        """Ends the storage thread and its connections; the database stays as it is."""
        self._calls.run(self._dispose)
        self._calls.close()

    def _dispose(self) -> None:
        self._rdb.remove_session()
        self._rdb.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _transaction(self, work: Callable[[sa.Connection], R], *, fenced: bool = False) -> R:
        def once() -> R:
            with self._rdb.engine.begin() as connection:
                result = work(connection)
                if fenced and self._rdb.token is not None:
                    renew_lease(connection, self._rdb.fenced_study, self._rdb.token)
                return result

        with _explained(self.url):
            return self._calls.run(once)

    # --- lease ---

    def take_lease(self, study_id: int) -> str:
        """Makes this process the study's coordinator; every later write is fenced by the token.

        Raises:
            StorageError: A live coordinator holds the lease; the message names it.
        """
        token, holder = uuid.uuid4().hex, LeaseHolder.this_process()
        values = {
            "token": token,
            "holder": json.dumps(
                {"host": holder.host, "pid": holder.pid, "started": holder.started}
            ),
            "renewed_at": time.time(),
            "stop_requested": False,
        }

        def take(connection: sa.Connection) -> Lease | None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            current = _read_lease(connection, study_id)
            if current is not None and current.is_live:
                return current
            if current is None:
                connection.execute(_lease.insert().values(study_id=study_id, **values))
            else:
                connection.execute(
                    _lease.update().where(_lease.c.study_id == study_id).values(**values)
                )
            return None

        current = self._transaction(take)
        if current is not None:
            raise StorageError(_in_use(current))
        self._rdb.token, self._rdb.fenced_study = token, study_id
        return token

    def refuse_if_run_elsewhere(self, study_id: int) -> None:
        """Says early what `take_lease` would say.

        Raises:
            StorageError: A live coordinator holds the lease.
        """
        current = self.lease(study_id)
        if current is not None and current.is_live:
            raise StorageError(_in_use(current))

    def release_lease(self) -> None:
        """Gives the lease back, so that the next coordinator need not wait."""
        token = self._rdb.token
        if token is None:
            return
        self._rdb.token = self._rdb.fenced_study = None
        self._transaction(
            lambda connection: connection.execute(_lease.delete().where(_lease.c.token == token))
        )

    def heartbeat(self) -> bool:
        """Renews the lease; True when somebody asked this coordinator to stop.

        Raises:
            LeaseLostError: Another coordinator took over.
        """

        def beat(connection: sa.Connection) -> bool:
            lease = _read_lease(connection, self._rdb.fenced_study)
            return lease is not None and lease.stop_requested

        return self._transaction(beat, fenced=True)

    def lease(self, study_id: int) -> Lease | None:
        return self._transaction(lambda connection: _read_lease(connection, study_id))

    def request_stop(self, study_id: int) -> bool:
        """Asks the study's coordinator to stop; False where none is alive to hear it."""

        def request(connection: sa.Connection) -> bool:
            lease = _read_lease(connection, study_id)
            if lease is None or not lease.is_live:
                return False
            connection.execute(
                _lease.update().where(_lease.c.token == lease.token).values(stop_requested=True)
            )
            return True

        return self._transaction(request)

    def forget(self, study_id: int) -> None:
        """Removes what our tables hold about a study, its ledger rows excepted."""

        def remove(connection: sa.Connection) -> None:
            connection.execute(_lease.delete().where(_lease.c.study_id == study_id))
            connection.execute(_decisions.delete().where(_decisions.c.study_id == study_id))

        self._transaction(remove)

    # --- decisions ---

    def record_decision(self, study_id: int, decision: Decision) -> None:
        seen = None if decision.seen is None else json.dumps(decision.seen, sort_keys=True)
        self._transaction(
            lambda connection: connection.execute(
                _decisions.insert().values(
                    study_id=study_id,
                    trial=decision.trial,
                    kind=decision.kind,
                    epoch=decision.epoch,
                    verdict=decision.verdict,
                    seen=seen,
                )
            ),
            fenced=True,
        )

    def decisions(self, study_id: int) -> tuple[Decision, ...]:
        """All decisions of a study, in the order in which they were taken."""
        rows = self._transaction(
            lambda connection: connection.execute(
                sa.select(_decisions)
                .where(_decisions.c.study_id == study_id)
                .order_by(_decisions.c.id)
            ).all()
        )
        return tuple(
            Decision(
                trial=row.trial,
                kind=row.kind,
                epoch=row.epoch,
                verdict=row.verdict,
                seen=None
                if row.seen is None
                else {int(trial): epochs for trial, epochs in json.loads(row.seen).items()},
            )
            for row in rows
        )

    # --- ledger ---

    def open_ledger_entry(
        self,
        *,
        opened_at: str,
        opened_by: str,
        study: str,
        study_key: str,
        trial: int,
        config_hash: str,
        spec_hash: str,
        split_id: str,
    ) -> int:
        """Writes the row that must stand before a test row is read; returns its id."""
        values = {key: value for key, value in locals().items() if key != "self"}
        insert = _ledger.insert().values(**values).returning(_ledger.c.id)
        return self._transaction(lambda connection: int(connection.execute(insert).scalar_one()))

    def record_report(self, entry: int, report: dict[str, Any]) -> None:
        self._transaction(
            lambda connection: connection.execute(
                _ledger.update().where(_ledger.c.id == entry).values(report=json.dumps(report))
            )
        )

    def ledger(
        self, *, study_key: str | None = None, split_id: str | None = None
    ) -> tuple[LedgerEntry, ...]:
        """The openings of one study, of one split, or all, oldest first."""
        query = sa.select(_ledger).order_by(_ledger.c.id)
        if study_key is not None:
            query = query.where(_ledger.c.study_key == study_key)
        if split_id is not None:
            query = query.where(_ledger.c.split_id == split_id)
        rows = self._transaction(lambda connection: connection.execute(query).mappings().all())
        return tuple(
            LedgerEntry(**{**row, "report": json.loads(row["report"]) if row["report"] else None})
            for row in rows
        )


def renew_lease(connection: sa.Connection, study_id: int | None, token: str) -> None:
    """The fence: the transaction around it may commit only while the token is the study's.

    Raises:
        LeaseLostError: It is not; the transaction must roll back.
    """
    renewed = connection.execute(
        _lease.update()
        .where(_lease.c.study_id == study_id, _lease.c.token == token)
        .values(renewed_at=time.time())
    )
    if renewed.rowcount != 1:
        raise LeaseLostError(
            "Another coordinator took this study over, so this one stops; nothing it found since "
            "was written. `tuner status` shows who runs it."
        )


def sqlite_path(url: str) -> Path:
    """The file behind a `sqlite:///PATH` URL.

    Raises:
        StorageError: It is no such URL.
    """
    try:
        parsed = sa.make_url(url)
    except SQLAlchemyError:
        raise StorageError(
            f"--storage {url!r} is no database URL; write sqlite:///PATH, "
            f"like {DEFAULT_STORAGE_URL}."
        ) from None
    masked = parsed.render_as_string(hide_password=True)
    if parsed.get_backend_name() != "sqlite":
        raise StorageError(
            f"--storage {masked}: only SQLite is known so far; write sqlite:///PATH, "
            f"for instance {DEFAULT_STORAGE_URL}."
        )
    if not parsed.database or parsed.database == ":memory:":
        raise StorageError(
            f"--storage {masked}: a study must outlive its process; name a file, "
            f"for instance {DEFAULT_STORAGE_URL}."
        )
    return Path(parsed.database)


def _publish_empty_database(path: Path) -> None:
    """Creates the schema beside and links it into place whole.

    Many processes may open an empty database at once; `create_all` races there.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        storage = RDBStorage(f"sqlite:///{beside}")
        with storage.engine.begin() as connection:
            _metadata.create_all(connection)
            connection.execute(_schema.insert().values(version=SCHEMA_VERSION))
        with storage.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        storage.remove_session()
        storage.engine.dispose()
        with contextlib.suppress(FileExistsError):  # another process was first: use its file
            os.link(beside, path)
    finally:
        for leftover in path.parent.glob(f"{beside.name}*"):
            leftover.unlink(missing_ok=True)


def _in_use(lease: Lease) -> str:
    return (
        f"This study is being run by process {lease.holder.pid} on {lease.holder.host}; stop that "
        f"one first (tuner stop), or wait: its lease lapses {LEASE_SECONDS:.0f} s after it dies."
    )


def _read_lease(connection: sa.Connection, study_id: int | None) -> Lease | None:
    row = connection.execute(sa.select(_lease).where(_lease.c.study_id == study_id)).first()
    if row is None:
        return None
    return Lease(
        token=row.token,
        holder=LeaseHolder(**json.loads(row.holder)),
        renewed_at=row.renewed_at,
        stop_requested=row.stop_requested,
    )


def _configure_sqlite(connection: Any, _record: object) -> None:
    # WAL: the dashboard reads while the coordinator writes. NORMAL keeps the file sound
    # through a crash of the process; only a power cut may lose the last commits.
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _note_flush(session: orm.Session, _context: object) -> None:
    session.info["wrote"] = True


def _note_bulk_write(state: orm.ORMExecuteState) -> None:
    if state.is_insert or state.is_update or state.is_delete:
        state.session.info["wrote"] = True


_PERMANENT = (
    "no such table",
    "no such column",
    "readonly database",
    "not a database",
    "malformed",
    "unable to open",
)


def _is_outage(error: Exception) -> bool:
    """Whether waiting may help: locks, a full disk, a server that is away."""
    cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    return isinstance(cause, OperationalError | InterfaceError) and not any(
        words in str(cause) for words in _PERMANENT
    )


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turns the database's errors into ours."""
    masked = sa.make_url(url).render_as_string(hide_password=True)
    try:
        yield
    except (DatabaseError, InterfaceError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ if not isinstance(error, SQLAlchemyError) else error
        reason = getattr(cause, "orig", None) or cause or error
        raise StorageError(
            f"{masked}: {reason}. Check that the path is right, readable and writable, "
            "and is a database of the tuner."
        ) from error
    except OSError as error:
        raise StorageError(
            f"{masked}: {error.strerror or error}. Name a --storage in a folder that you may write."
        ) from error
    except RuntimeError as error:  # Optuna: the schema is of another version
        if "schema" not in str(error).lower() and "version" not in str(error).lower():
            raise
        raise StorageError(f"{masked}: {error}") from error
