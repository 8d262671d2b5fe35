"""The lease of a study: which process runs it, and until when no other may.

Why: `docs/decisions.md#how-is-a-lease-judged-when-clocks-differ-or-jump`.
"""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from tuner.errors import LeaseLostError, StorageError, StudyInUseError
from tuner.storage.holder import LeaseHolder
from tuner.storage.tables import lock_for_writing, metadata, now
from tuner.storage.transactions import Transactions

#: The trial attribute that marks a trial as a coordinator's; its value is the asking token.
COORDINATOR_KEY = "coordinator"

LEASE_SECONDS = 30.0  #: a lease not renewed for this long may be taken over
#: A lease that was renewed while it was read is as much younger than the look at the clock.
_SAME_MOMENT_SECONDS = 1.0
_LAST_LOOK_SECONDS = 5.0  #: who renews it within this time is alive, whatever the clock says

_LEASE_LOST = (
    "Another coordinator took this study over, so this one stops; nothing it found since was "
    "written. `tuner status` shows who runs it."
)

table = sa.Table(
    "tuner_lease",
    metadata,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("token", sa.String(64), nullable=False),
    sa.Column("holder", sa.Text, nullable=False),  # JSON, the fields of a `LeaseHolder`
    sa.Column("renewed_at", sa.Double, nullable=False),
    sa.Column("stop_requested", sa.Boolean, nullable=False),
    # Batches that this coordinator wrote: one that is tried again is not written twice.
    sa.Column("batches", sa.Integer, nullable=False, server_default="0"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The lease row of a study, as last read."""

    token: str  #: unique to one taking of the lease
    holder: LeaseHolder
    renewed_at: float  #: seconds since the epoch, by the database's clock
    age_seconds: float  #: since then; below 0 if that clock was set back
    stop_requested: bool  #: somebody asked the coordinator to stop

    @property
    def is_live(self) -> bool:
        """Whether its holder may still run the study, as far as one look can tell."""
        return abs(self.age_seconds) < LEASE_SECONDS and not self.holder.is_known_dead()

    def is_same_renewal(self, other: Lease) -> bool:
        """Whether the lease was neither renewed nor taken over between two looks at it."""
        return (self.token, self.renewed_at) == (other.token, other.renewed_at)


@dataclass(slots=True)
class Fence:
    """The lease that this process took: no transaction that writes commits without it."""

    study_id: int | None = None  #: None if no lease was taken
    token: str | None = None  #: of the lease; None if none was taken

    def check(self, connection: sa.Connection) -> None:
        """Renews the lease in a transaction that is about to commit.

        Raises:
            LeaseLostError: It was taken over; the transaction must roll back.
        """
        if self.token is not None:
            renew(connection, self.study_id, self.token)


def renew(connection: sa.Connection, study_id: int | None, token: str) -> None:
    """Renews a lease: the transaction around it may commit only while the token is the study's.

    Raises:
        LeaseLostError: It is not; the transaction must roll back.
    """
    mine = (table.c.study_id == study_id) & (table.c.token == token)
    renewed = connection.execute(table.update().where(mine).values(renewed_at=now(connection)))
    if renewed.rowcount != 1:
        raise LeaseLostError(_LEASE_LOST)


def count_batch(connection: sa.Connection, study_id: int, token: str, batches: int) -> bool:
    """Renews a lease and counts one batch more; False if an earlier try counted this one.

    Args:
        connection: In the transaction that writes the batch.
        study_id: The study.
        token: Of its lease.
        batches: Batches that were written before this one.

    Raises:
        LeaseLostError: The lease was taken over; the transaction must roll back.
    """
    mine = (table.c.study_id == study_id) & (table.c.token == token)
    counted = connection.execute(
        table.update()
        .where(mine, table.c.batches == batches)
        .values(batches=batches + 1, renewed_at=now(connection))
    )
    if counted.rowcount == 1:
        return True
    if connection.scalar(sa.select(table.c.batches).where(mine)) != batches + 1:
        raise LeaseLostError(_LEASE_LOST)
    return False


def read(
    connection: sa.Connection, study_id: int | None, *, for_update: bool = False
) -> Lease | None:
    """The lease of a study as the database has it, or None."""
    query = sa.select(table, now(connection).label("now")).where(table.c.study_id == study_id)
    row = connection.execute(query.with_for_update() if for_update else query).first()
    if row is None:
        return None
    return Lease(
        token=row.token,
        holder=LeaseHolder(**json.loads(row.holder)),
        renewed_at=row.renewed_at,
        age_seconds=row.now - row.renewed_at,
        stop_requested=row.stop_requested,
    )


class Leases:
    """The leases of all studies in one database."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    def of(self, study_id: int) -> Lease | None:
        """The lease of a study; None if no process took it, or one gave it back."""
        return self._transactions.run(lambda connection: read(connection, study_id))

    def refuse_if_live(self, study_id: int) -> None:
        """Says early what taking the lease would say.

        Raises:
            StudyInUseError: A live coordinator holds the lease.
        """
        current = self.of(study_id)
        if current is not None and current.is_live:
            raise StudyInUseError(_in_use(current))

    def request_stop(self, study_id: int) -> bool:
        """Asks the study's coordinator to stop; False if none is alive."""

        def request(connection: sa.Connection) -> bool:
            current = read(connection, study_id)
            if current is None or not current.is_live:
                return False
            its = table.c.token == current.token
            connection.execute(table.update().where(its).values(stop_requested=True))
            return True

        return self._transactions.run(request)

    def take(self, study_id: int) -> str:
        """Takes the lease of a study for this process; returns its token.

        Raises:
            StudyInUseError: A live coordinator holds the lease; the message names it.
        """
        token = uuid.uuid4().hex
        values = {
            "study_id": study_id,
            "token": token,
            "holder": json.dumps(dataclasses.asdict(LeaseHolder.this_process())),
            "stop_requested": False,
            "batches": 0,
        }

        def take(connection: sa.Connection, current: Lease | None) -> None:
            whole = {**values, "renewed_at": now(connection)}
            if current is None:
                connection.execute(table.insert().values(whole))
            else:
                connection.execute(table.update().where(table.c.study_id == study_id).values(whole))

        self.unless_live(study_id, take, token=token)
        return token

    def give_back(self, token: str) -> None:
        """Removes a lease, so that the next coordinator need not wait."""
        delete = table.delete().where(table.c.token == token)
        self._transactions.run(lambda connection: connection.execute(delete))

    def unless_live(
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
        seen = self.of(study_id)
        if seen is not None and not seen.holder.is_known_dead():
            self._watch_whether_it_lapsed(study_id, seen)

        def write(connection: sa.Connection) -> Lease | None:
            lock_for_writing(connection)
            current = read(connection, study_id, for_update=True)
            if current is not None and current.token == token:
                return None  # an earlier try was committed, and only its answer was lost
            if current is not None and (seen is None or not current.is_same_renewal(seen)):
                return current
            work(connection, current)
            return None

        try:
            current = self._transactions.run(write)
        except StorageError as error:
            if token is None or not isinstance(error.__cause__, sa.exc.IntegrityError):
                raise
            current = self.of(study_id)  # two began at once, and the other was faster
        if current is not None:
            raise StudyInUseError(_in_use(current))

    def _watch_whether_it_lapsed(self, study_id: int, seen: Lease) -> None:
        """Clocks jump: whoever renews its lease while we look is alive, whatever its age says."""
        if -_SAME_MOMENT_SECONDS <= seen.age_seconds < LEASE_SECONDS:
            raise StudyInUseError(_in_use(seen))
        looking = _LAST_LOOK_SECONDS if seen.age_seconds > 0 else LEASE_SECONDS
        until = time.monotonic() + looking
        while time.monotonic() < until:
            time.sleep(0.5)
            current = self.of(study_id)
            if current is None:
                return
            if not current.is_same_renewal(seen):
                raise StudyInUseError(_in_use(current))


def _in_use(lease: Lease) -> str:
    """Who runs a study, in words for whom the lease is refused."""
    return (
        f"This study is being run by process {lease.holder.pid} on {lease.holder.host}; stop that "
        f"one first (tuner stop), or wait: its lease lapses {LEASE_SECONDS:.0f} s after it dies."
    )
