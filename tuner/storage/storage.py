"""One open database: studies and trials behind Optuna's interface, and our own tables.

Leases, decisions, the ledger of opened test splits, the queue of the service. `database` has
what lies below, `driven` the study that a coordinator holds in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self, TypeVar

import sqlalchemy as sa
from optuna.storages._rdb import models

from tuner.errors import LeaseLostError, StorageError, StudyInUseError
from tuner.storage import lease as leases
from tuner.storage.audit import AuditEntry, one_line
from tuner.storage.engine import OPENING_SECONDS, Calls, explained, say_on_stderr
from tuner.storage.lease import (
    COORDINATOR_KEY,
    Lease,
    LeaseHolder,
    in_use,
    read_lease,
    renew_lease,
    seconds,
)
from tuner.storage.ledger import LedgerEntry
from tuner.storage.optuna_storage import FencedStorage, open_database
from tuner.storage.schema import look_at
from tuner.storage.tables import (
    audit,
    decisions,
    development,
    lease,
    ledger,
    lock_for_writing,
    now,
    queue,
    splits,
)
from tuner.storage.url import mask, parse_url
from tuner.storage.write_behind import DrivenStorage, upsert_attributes

__all__ = [
    "COORDINATOR_KEY",
    "AuditEntry",
    "Decision",
    "Lease",
    "LeaseHolder",
    "LedgerEntry",
    "Storage",
]

LOG_IN = "log in"  #: the action of a login in the record of changes

HASH_BYTES = 32  #: of a SHA-256
_RENEWAL_SECONDS = 1.0  #: between two renewals of a lease that `Storage.leased` holds
#: A lease that was renewed while it was read is as much younger than the look at the clock.
_SAME_MOMENT_SECONDS = 1.0
_LAST_LOOK_SECONDS = 5.0  #: who renews it within this time is alive, whatever the clock says

#: The system attributes that hold a study's note, as optuna_dashboard names them.
_NOTE_PREFIX = "dashboard:note_"
MOST_NOTE_VERSIONS = 2**53  #: browsers count exactly as far
_NOTE_VERSION, _NOTE_PIECE = "dashboard:note_ver", "dashboard:note_str:"

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One ask, rung verdict or tell."""

    trial: int
    kind: str
    epoch: int | None
    verdict: str | None


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
        say: Callable[[str], None] = say_on_stderr,
        upgrade: bool = False,
        create: bool = True,
    ) -> None:
        """Opens the database and creates its schema where it is empty.

        Args:
            url: `sqlite:///PATH` or `postgresql://USER@HOST/DATABASE`.
            patience_seconds: How long a call is tried again during an outage; None for ever
                (a database that never answered is given up after ten seconds all the same).
            say: Takes the lines about outages.
            upgrade: Brings a schema of an older tuner or Optuna up to date, which else is refused.
            create: Makes the schema, its file and that one's folder where they are missing.

        Raises:
            StorageMissingError: They are missing, and are not to be made.
            StorageError: The URL is no usable one, or what stands there is no database of ours.
        """
        self.url = url
        self._parsed = parse_url(url)
        opening = OPENING_SECONDS if patience_seconds is None else patience_seconds
        self._calls = Calls(opening, say)
        try:
            with explained(self._parsed):
                self._rdb: FencedStorage = self._calls.run(
                    open_database, self._parsed, self._calls, upgrade=upgrade, create=create
                )
        except BaseException:
            self._calls.close()
            raise
        self._calls.patience_seconds = patience_seconds
        self.optuna = DrivenStorage(self._rdb, self._calls)
        self._held_at = math.inf  # when the lease was certainly ours, last; inf: none was taken

    @property
    def masked_url(self) -> str:
        """The URL without its password."""
        return mask(self.url)

    def look(self) -> None:
        """Asks the database one question, beside whatever else waits for it.

        Raises:
            StorageError: It does not answer.
        """
        with explained(self._parsed):
            look_at(self._parsed)

    def close(self) -> None:
        """Ends the storage thread and its connections; the database stays as it is."""
        self._calls.close(self._rdb.dispose)

    def give_up(self) -> None:
        """Waits for a database that is away no longer: what waits for it fails with its error."""
        self._calls.give_up()

    def flush(self) -> None:
        """Waits until everything that was written so far is committed.

        Raises:
            LeaseLostError: Another coordinator took over.
            StorageError: The database is away, and `give_up` was called.
        """
        driven = self.optuna.driven
        if driven is not None:
            with explained(self._parsed):
                driven.flush()

    def together(self) -> AbstractContextManager[Any]:
        """A block whose writes to the driven study are committed together, or none of them."""
        driven = self.optuna.driven
        return contextlib.nullcontext() if driven is None else driven.together()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _transaction(self, work: Callable[[sa.Connection], R], *, fenced: bool = False) -> R:
        with explained(self._parsed):
            return self._calls.run(lambda: self._once(work, fenced=fenced))

    def _once(self, work: Callable[[sa.Connection], R], *, fenced: bool) -> R:
        with self._rdb.engine.begin() as connection:
            result = work(connection)
            if fenced and self._rdb.token is not None:
                renew_lease(connection, self._rdb.fenced_study, self._rdb.token)
            return result

    # --- lease ---

    def take_lease(self, study_id: int) -> str:
        """Makes this process the study's coordinator; every later write is fenced by the token.

        Raises:
            StudyInUseError: A live coordinator holds the lease; the message names it.
        """
        token, holder = uuid.uuid4().hex, LeaseHolder.this_process()
        values = {
            "token": token,
            "holder": json.dumps(dataclasses.asdict(holder)),
            "stop_requested": False,
            "batches": 0,
        }
        took_at = math.inf

        def take(connection: sa.Connection, current: Lease | None) -> None:
            nonlocal took_at
            took_at = seconds()
            whole = {"study_id": study_id, "renewed_at": now(connection), **values}
            if current is None:
                connection.execute(lease.insert().values(whole))
            else:
                connection.execute(lease.update().where(lease.c.study_id == study_id).values(whole))

        self._unless_driven(study_id, take, token=token)
        self._held_at = took_at
        self._rdb.token, self._rdb.fenced_study = token, study_id
        with explained(self._parsed):
            self.optuna.drive(study_id, token)
        return token

    def _unless_driven(
        self,
        study_id: int,
        work: Callable[[sa.Connection, Lease | None], object],
        *,
        token: str | None = None,
    ) -> None:
        """Writes to a study in one transaction, unless a live coordinator holds its lease.

        Args:
            study_id: The study.
            work: Writes; it is given the lease of a coordinator that died, or None.
            token: Of the lease that `work` takes, if it takes one.

        Raises:
            StudyInUseError: A live coordinator holds the lease; nothing was written.
        """
        seen = self.lease(study_id)
        if seen is not None and not seen.holder.is_known_dead():
            self._watch_whether_it_lapsed(study_id, seen)

        def write(connection: sa.Connection) -> Lease | None:
            lock_for_writing(connection)
            current = read_lease(connection, study_id, for_update=True)
            if current is not None and current.token == token:
                return None  # an earlier try went through, and only its answer was lost
            if current is not None and (
                seen is None or (current.token, current.renewed_at) != (seen.token, seen.renewed_at)
            ):
                return current
            work(connection, current)
            return None

        try:
            current = self._transaction(write)
        except StorageError as error:
            if token is None or not isinstance(error.__cause__, sa.exc.IntegrityError):
                raise
            current = self.lease(study_id)  # two began at once, and the other was faster
        if current is not None:
            raise StudyInUseError(in_use(current))

    @contextlib.contextmanager
    def leased(self, study_id: int) -> Iterator[None]:
        """A block in which this process holds a study's lease and renews it all the while.

        For what has no loop of its own, as a coordinator has. A process that was frozen in the
        block may lose the lease all the same: then every write that is fenced is refused.

        Raises:
            StudyInUseError: A live coordinator holds the lease.
        """
        self.take_lease(study_id)
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
            self.release_lease()

    def _keep_renewing(self, ended: threading.Event) -> None:
        while not ended.wait(_RENEWAL_SECONDS):
            try:
                self.heartbeat()
            except LeaseLostError:
                return
            except StorageError:
                continue  # the database is away: the lease lapses, or is renewed in time

    def holds_lease(self) -> bool:
        """Whether no other process can have taken the study over: no row fences a file.

        It is certain for half the time for which a lease is left alone, and True for a process
        that took none.
        """
        return seconds() - self._held_at < leases.LEASE_SECONDS / 2

    def renews_lease(self) -> bool:
        """The same, made sure of: waits for the database, and raises if the lease is lost.

        Raises:
            LeaseLostError: Another coordinator took over.
        """
        if not self.holds_lease():
            self.heartbeat()
        return True

    def _watch_whether_it_lapsed(self, study_id: int, seen: Lease) -> None:
        """Clocks jump: whoever renews its lease while we look is alive, whatever its age says."""
        if -_SAME_MOMENT_SECONDS <= seen.age_seconds < leases.LEASE_SECONDS:
            raise StudyInUseError(in_use(seen))
        looking = _LAST_LOOK_SECONDS if seen.age_seconds > 0 else leases.LEASE_SECONDS
        until = time.monotonic() + looking
        while time.monotonic() < until:
            time.sleep(0.5)
            current = self.lease(study_id)
            if current is None:
                return
            if (current.token, current.renewed_at) != (seen.token, seen.renewed_at):
                raise StudyInUseError(in_use(current))

    def refuse_if_run_elsewhere(self, study_id: int) -> None:
        """Says early what `take_lease` would say.

        Raises:
            StudyInUseError: A live coordinator holds the lease.
        """
        current = self.lease(study_id)
        if current is not None and current.is_live:
            raise StudyInUseError(in_use(current))

    def release_lease(self) -> None:
        """Gives the lease back, so that the next coordinator need not wait."""
        token = self._rdb.token
        if token is None:
            return
        try:
            with explained(self._parsed):
                self.optuna.release()
        finally:
            self._rdb.token = self._rdb.fenced_study = None
            self._held_at = math.inf
        self._transaction(
            lambda connection: connection.execute(lease.delete().where(lease.c.token == token))
        )

    def heartbeat(self) -> bool:
        """Renews the lease; True when somebody asked this coordinator to stop.

        Raises:
            LeaseLostError: Another coordinator took over.
        """
        with explained(self._parsed):
            return self.begin_heartbeat().result()

    def begin_heartbeat(self) -> Future[bool]:
        """The same without waiting for a database that is away."""

        def beat(connection: sa.Connection) -> bool:
            lock_for_writing(connection)
            if self.optuna.driven is not None:
                self.optuna.driven.look_at_others(connection)
            current = read_lease(connection, self._rdb.fenced_study)
            return current is not None and current.stop_requested

        def renew() -> bool:
            began = seconds()
            stop_requested = self._once(beat, fenced=True)
            self._held_at = began
            return stop_requested

        return self._calls.begin(renew)

    def begin_note(self, study_id: int, key: str, value: Any) -> None:
        """Sets an attribute of a study, without waiting for a database that is away."""
        self._calls.begin(lambda: self.optuna.set_study_user_attr(study_id, key, value))

    def begin_overview(self, study_id: int, markdown: str) -> Future[None]:
        """Replaces the note that Optuna's dashboard shows with a study; see `begin_note`."""
        table = models.StudySystemAttributeModel.__table__

        def write(connection: sa.Connection) -> None:
            lock_for_writing(connection)
            notes = (table.c.study_id == study_id) & table.c.key.startswith(_NOTE_PREFIX)
            query = sa.select(table.c.key, table.c.value_json).where(notes)
            known = {row.key: row.value_json for row in connection.execute(query)}
            version = note_version(json.loads(known.get(_NOTE_VERSION, "0"))) + 1
            # The dashboard, where somebody edits the note, writes it in pieces, and shows all.
            values = {key: "" for key in known if key.startswith(_NOTE_PIECE)}
            values |= {f"{_NOTE_PIECE}0": markdown}
            for key, value in {**values, _NOTE_VERSION: version}.items():
                row = (table.c.study_id == study_id) & (table.c.key == key)
                text = json.dumps(value)
                if key in known:
                    connection.execute(table.update().where(row).values(value_json=text))
                else:
                    connection.execute(
                        table.insert().values(study_id=study_id, key=key, value_json=text)
                    )

        return self._calls.begin(lambda: self._once(write, fenced=True))

    def lease(self, study_id: int) -> Lease | None:
        return self._transaction(lambda connection: read_lease(connection, study_id))

    def request_stop(self, study_id: int) -> bool:
        """Asks the study's coordinator to stop; False where none is alive to hear it."""

        def request(connection: sa.Connection) -> bool:
            current = read_lease(connection, study_id)
            if current is None or not current.is_live:
                return False
            connection.execute(
                lease.update().where(lease.c.token == current.token).values(stop_requested=True)
            )
            return True

        return self._transaction(request)

    def name_study(self, study_id: int, name: str) -> bool:
        """Gives a study its name; False where another study has it."""
        table = models.StudyModel.__table__
        rename = table.update().where(table.c.study_id == study_id).values(study_name=name)
        try:
            self._transaction(lambda connection: connection.execute(rename))
        except StorageError as error:
            if isinstance(error.__cause__, sa.exc.IntegrityError):
                return False
            raise
        self.optuna.forget_names()
        return True

    def set_undriven(self, study_id: int, attributes: Mapping[str, Any]) -> None:
        """Sets attributes of a study that no coordinator drives, all of them or none.

        Raises:
            StudyInUseError: A live coordinator holds the lease; nothing was written.
        """
        rows = {(study_id, key): json.dumps(value) for key, value in attributes.items()}
        model = models.StudyUserAttributeModel
        self._unless_driven(
            study_id, lambda connection, _: upsert_attributes(connection, model, "study_id", rows)
        )

    def forget(self, study_id: int) -> None:
        """Removes what our tables hold about a study, its ledger rows excepted."""

        def remove(connection: sa.Connection) -> None:
            connection.execute(lease.delete().where(lease.c.study_id == study_id))
            connection.execute(decisions.delete().where(decisions.c.study_id == study_id))
            connection.execute(queue.delete().where(queue.c.study_id == study_id))

        self._transaction(remove)

    # --- queue ---

    def enqueue(self, study_id: int) -> bool:
        """Asks the service to drive a study; False where it stands in the queue already."""

        def insert(connection: sa.Connection) -> bool:
            lock_for_writing(connection)
            row = queue.select().where(queue.c.study_id == study_id)
            if connection.execute(row).first() is not None:
                return False
            connection.execute(queue.insert().values(study_id=study_id, queued_at=now(connection)))
            return True

        return self._transaction(insert)

    def dequeue(self, study_id: int) -> bool:
        """Takes a study out of the queue; False where it was not in it."""
        remove = queue.delete().where(queue.c.study_id == study_id)
        return self._transaction(lambda connection: connection.execute(remove).rowcount == 1)

    def queued(self) -> tuple[int, ...]:
        """Ids of the studies in the queue, longest waiting first."""
        query = sa.select(queue.c.study_id).order_by(queue.c.queued_at, queue.c.study_id)
        return self._transaction(lambda connection: tuple(connection.scalars(query)))

    # --- development rows ---

    def keep_development(self, sha256: str, content: bytes) -> None:
        """Stores a development file for a service that may not see this machine's files."""

        def insert(connection: sa.Connection) -> None:
            _lock_development(connection)
            known = sa.select(development.c.sha256).where(development.c.sha256 == sha256)
            if connection.execute(known).first() is None:
                connection.execute(development.insert().values(sha256=sha256, content=content))

        self._transaction(insert)

    def development(self, sha256: str) -> bytes | None:
        """A development file that `keep_development` stored; None where it did not."""
        query = sa.select(development.c.content).where(development.c.sha256 == sha256)
        return self._transaction(lambda connection: connection.scalar(query))

    def drop_development(self, attribute: str, field: str) -> None:
        """Removes the development files that no study of this storage names.

        Args:
            attribute: The study attribute, an object, that names a study's development file.
            field: Where in it the file's hash stands.
        """
        attributes = models.StudyUserAttributeModel.__table__
        records = sa.select(attributes.c.value_json).where(attributes.c.key == attribute)

        def remove(connection: sa.Connection) -> None:
            _lock_development(connection)
            named = {json.loads(text).get(field) for text in connection.scalars(records)}
            connection.execute(development.delete().where(development.c.sha256.not_in(named)))

        self._transaction(remove)

    # --- test splits ---

    def keep_split(self, split_id: str, hashes: Collection[bytes]) -> None:
        """Stores which sequences a test split holds; it stays when its studies are deleted.

        Args:
            split_id: The split's identity.
            hashes: The SHA-256 of each sequence.
        """
        known = sa.select(splits.c.split_id).where(splits.c.split_id == split_id)
        content = b"".join(sorted(hashes))

        def insert(connection: sa.Connection) -> None:
            lock_for_writing(connection)
            if connection.execute(known).first() is None:
                connection.execute(splits.insert().values(split_id=split_id, sequences=content))

        try:
            self._transaction(insert)
        except StorageError as error:
            # Two kept it at once, and what they keep is the same.
            if not isinstance(error.__cause__, sa.exc.IntegrityError):
                raise

    def splits(self) -> dict[str, frozenset[bytes]]:
        """Which sequences each known test split holds, by the split's identity."""
        query = sa.select(splits.c.split_id, splits.c.sequences)
        rows = self._transaction(lambda connection: connection.execute(query).all())
        return {
            row.split_id: frozenset(
                bytes(row.sequences[start : start + HASH_BYTES])
                for start in range(0, len(row.sequences), HASH_BYTES)
            )
            for row in rows
        }

    # --- decisions ---

    def record_decision(self, study_id: int, decision: Decision) -> None:
        row = {"study_id": study_id, **dataclasses.asdict(decision)}
        driven = self.optuna.driven
        if driven is not None and driven.study_id == study_id:
            driven.record_decision(row)
            return
        insert = decisions.insert().values(row)
        self._transaction(lambda connection: connection.execute(insert), fenced=True)

    def decisions(self, study_id: int) -> tuple[Decision, ...]:
        """All decisions of a study, in the order in which they were taken."""
        query = (
            sa.select(*(decisions.c[field.name] for field in dataclasses.fields(Decision)))
            .where(decisions.c.study_id == study_id)
            .order_by(decisions.c.id)
        )
        rows = self._transaction(lambda connection: connection.execute(query).mappings().all())
        return tuple(Decision(**row) for row in rows)

    # --- audit ---

    def begin_change(self, *, who: str, address: str, action: str, detail: str = "") -> int:
        """Writes down a change before it is made; returns the entry's id."""
        return self.record_change(who=who, address=address, action=action, detail=detail)

    def record_change(
        self, *, who: str, address: str, action: str, detail: str = "", status: int | None = None
    ) -> int:
        """Writes down a change with how it ended, or None as its status; returns the entry's id."""
        insert = (
            audit.insert()
            .values(
                at=datetime.now(UTC).isoformat(timespec="seconds"),
                who=one_line(who)[:64],
                address=one_line(address)[:64],
                action=one_line(action)[:256],
                detail=one_line(detail)[:2000],
                status=status,
            )
            .returning(audit.c.id)
        )
        return self._transaction(lambda connection: int(connection.execute(insert).scalar_one()))

    def end_change(self, entry: int, *, status: int, detail: str) -> None:
        """Writes down how a change ended."""
        update = audit.update().where(audit.c.id == entry)
        values = {"status": status, "detail": one_line(detail)[:2000]}
        self._transaction(lambda connection: connection.execute(update.values(values)))

    def changes(self, *, last: int = 100) -> tuple[AuditEntry, ...]:
        """The last changes through the dashboard, newest first."""
        query = sa.select(audit).order_by(audit.c.id.desc()).limit(last)
        rows = self._transaction(lambda connection: connection.execute(query).mappings().all())
        return tuple(AuditEntry(**row) for row in rows)

    def login_places(self, *, last: int = 1000) -> tuple[tuple[str, str], ...]:
        """Users and addresses of the last successful logins to the dashboard, oldest first."""
        query = (
            sa.select(audit.c.who, audit.c.address)
            .where(audit.c.action == LOG_IN, audit.c.status == 200)
            .order_by(audit.c.id.desc())
            .limit(last)
        )
        rows = self._transaction(lambda connection: connection.execute(query).all())
        return tuple((row.who, row.address) for row in reversed(rows))

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
        """Writes the row that must stand before a test row is read; returns its id.

        Raises:
            LeaseLostError: Another process took the study over; nothing was written.
        """
        values = {key: value for key, value in locals().items() if key != "self"}
        insert = ledger.insert().values(**values).returning(ledger.c.id)
        return self._transaction(
            lambda connection: int(connection.execute(insert).scalar_one()), fenced=True
        )

    def record_report(self, entry: int, report: dict[str, Any]) -> None:
        """Writes what an opening found beside its entry.

        Raises:
            LeaseLostError: Another process took the study over; nothing was written.
        """
        update = ledger.update().where(ledger.c.id == entry).values(report=json.dumps(report))
        self._transaction(lambda connection: connection.execute(update), fenced=True)

    def ledger(
        self, *, study_key: str | None = None, split_id: str | None = None
    ) -> tuple[LedgerEntry, ...]:
        """The openings of one study, of one split, or all, oldest first."""
        query = sa.select(ledger).order_by(ledger.c.id)
        if study_key is not None:
            query = query.where(ledger.c.study_key == study_key)
        if split_id is not None:
            query = query.where(ledger.c.split_id == split_id)
        rows = self._transaction(lambda connection: connection.execute(query).mappings().all())
        return tuple(
            LedgerEntry(**{**row, "report": json.loads(row["report"]) if row["report"] else None})
            for row in rows
        )


def _lock_development(connection: sa.Connection) -> None:
    """Who keeps a file and who drops it do so one after the other.

    A study has its record before its file is kept: so who drops files sees the one or keeps the
    other waiting until it is done, and then the file is kept anew.
    """
    lock_for_writing(connection)
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("LOCK TABLE tuner_development IN SHARE ROW EXCLUSIVE MODE")


def note_version(stored: object) -> int:
    """The version of a note; 0 of one that an earlier dashboard stored as something else."""
    try:
        version = int(stored)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return 0
    return version if 0 <= version < MOST_NOTE_VERSIONS else 0
