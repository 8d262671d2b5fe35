"""The ledger: every opening of a test split, who opened it, and what was found.

Entries are added and never changed: an opening is one, its report another. `tuner.storage.chain`
says how they are kept.

Why: `docs/decisions.md#why-does-the-ledger-know-a-study-by-a-key-and-not-by-its-id-or-name`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from tuner.errors import StorageError, TunerError, counted
from tuner.storage import chain
from tuner.storage.chain import Head, Kind, Link
from tuner.storage.tables import lock_for_writing, metadata
from tuner.storage.transactions import Transactions

# Rows outlive their study: deleting a study does not undo the opening of a test split.
table = sa.Table(
    "tuner_ledger",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("opened_at", sa.String(40), nullable=False),
    sa.Column("opened_by", sa.String(255), nullable=False),
    sa.Column("study", sa.String(512), nullable=False),
    # Not its id: SQLite gives that of a deleted study to the next one.
    sa.Column("study_key", sa.String(128), nullable=False, index=True),
    sa.Column("trial", sa.Integer, nullable=False),
    sa.Column("config_hash", sa.String(64), nullable=False),
    sa.Column("spec_hash", sa.String(64), nullable=False),
    sa.Column("split_id", sa.String(64), nullable=False, index=True),
    sa.Column("ensemble", sa.Text, nullable=True),  # JSON
    sa.Column("sequences_sha256", sa.String(64), nullable=True),
    sa.Column("look", sa.Integer, nullable=False),
    sa.Column("reason", sa.Text, nullable=True),
    sa.Column("chained_at", sa.String(40), nullable=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("previous", sa.String(64), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
)

reports = sa.Table(
    "tuner_ledger_report",
    metadata,
    sa.Column("entry", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("recorded_at", sa.String(40), nullable=True),
    sa.Column("report", sa.Text, nullable=False),  # JSON
    sa.Column("chained_at", sa.String(40), nullable=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("previous", sa.String(64), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
)

_APPEND_LOCK = 0x6C6564676572  #: "ledger": the key of PostgreSQL's advisory lock

_TABLES: Mapping[Kind, sa.Table] = {"opening": table, "report": reports}


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleMember:
    """A network of an ensemble that was evaluated."""

    trial: int  #: number of its trial
    share: float  #: of the mean probability, 0..1
    config_hash: str  #: SHA-256 of its configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """One opening of a test split, with what it found."""

    id: int
    opened_at: str  #: ISO 8601, UTC
    opened_by: str  #: user@host
    study: str  #: its name
    study_key: str  #: unique to the study, and never used again
    trial: int  #: number of the winning trial, whose network was evaluated
    config_hash: str  #: SHA-256 of the trial's configuration
    spec_hash: str  #: SHA-256 of the study's specification
    split_id: str  #: identity of the test split
    sequences_sha256: str | None  #: of which sequences the split holds; None where not known
    look: int  #: 1 for the first opening of these rows, 2 for the second
    reason: str | None  #: why it was opened again, in the user's words; None for the first look
    chained_at: str | None  #: when it was taken into the chain, if that was at an upgrade
    hash: str  #: of the opening, in the chain
    report: dict[str, Any] | None  #: what was found; None if the evaluation never finished
    #: What was evaluated beside the winner, the largest share first; () for nothing.
    ensemble: tuple[EnsembleMember, ...] = ()


class OpenedMeanwhileError(TunerError):
    """Another process opened the same test rows since they were looked up; nothing was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """The whole ledger, as it is in the database."""

    identity: str  #: of this ledger; "" where its row is missing
    begun_at: str  #: ISO 8601, UTC
    links: tuple[Link, ...]  #: by position

    @property
    def head(self) -> Head:
        if not self.links:
            return Head(ledger=self.identity, position=0, hash=self.identity)
        last = self.links[-1]
        return Head(ledger=self.identity, position=last.position, hash=last.hash)

    @property
    def openings(self) -> tuple[Link, ...]:
        return tuple(link for link in self.links if link.kind == "opening")


class Ledger:
    """The ledger of one database."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    def open(
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
        ensemble: Sequence[EnsembleMember] = (),
        sequences_sha256: str | None = None,
        reason: str | None = None,
        same_splits: Collection[str] = (),
        known_looks: int | None = None,
        looks_elsewhere: int = 0,
    ) -> int:
        """Writes the entry that must exist before a test row is read; returns its id.

        Args:
            opened_at: ISO 8601, UTC.
            opened_by: user@host.
            study: Its name.
            study_key: See `LedgerEntry`.
            trial: See `LedgerEntry`.
            config_hash: See `LedgerEntry`.
            spec_hash: See `LedgerEntry`.
            split_id: See `LedgerEntry`.
            ensemble: See `LedgerEntry`.
            sequences_sha256: See `LedgerEntry`.
            reason: Why it is opened again, if it is.
            same_splits: Identities of other splits that hold most of the same rows.
            known_looks: How many openings of these splits the caller knows; None: not compared.
            looks_elsewhere: How many are known from elsewhere, beside this ledger.

        Raises:
            LeaseLostError: Another process took the study over; nothing was written.
            OpenedMeanwhileError: There are more openings than the caller knows.
        """
        of_these_rows = table.c.split_id.in_({split_id, *same_splits})

        def content(connection: sa.Connection) -> dict[str, Any]:
            last = connection.scalar(sa.select(sa.func.max(table.c.id))) or 0
            looks = connection.scalar(
                sa.select(sa.func.count()).select_from(table).where(of_these_rows)
            )
            before = int(looks or 0)
            if known_looks is not None and before > known_looks:
                raise OpenedMeanwhileError("another process opened the same test rows just now")
            return {
                "id": last + 1,
                "opened_at": opened_at,
                "opened_by": opened_by,
                "study": study,
                "study_key": study_key,
                "trial": trial,
                "config_hash": config_hash,
                "spec_hash": spec_hash,
                "split_id": split_id,
                "ensemble": json.dumps([asdict(one) for one in ensemble]) if ensemble else None,
                "sequences_sha256": sequences_sha256,
                "look": before + looks_elsewhere + 1,
                "reason": reason,
            }

        return int(self._append("opening", content)["id"])

    def record_report(self, entry: int, report: dict[str, Any]) -> None:
        """Adds what an opening found.

        Raises:
            LeaseLostError: Another process took the study over; nothing was written.
        """
        values = {
            "entry": entry,
            "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "report": json.dumps(report),
        }
        self._append("report", lambda _: values)

    def _append(
        self, kind: Kind, content: Callable[[sa.Connection], dict[str, Any]]
    ) -> dict[str, Any]:
        """Adds an entry at the end of the chain; returns its columns."""
        tried: list[dict[str, Any]] = []

        def append(connection: sa.Connection) -> dict[str, Any]:
            _lock_the_end(connection)
            # The answer of an earlier try may have been lost on its way.
            for values in tried:
                its_hash = _TABLES[kind].c.hash == values["hash"]
                if connection.execute(sa.select(_TABLES[kind].c.hash).where(its_hash)).first():
                    return values
            head = _chain(connection).head
            values = {
                **content(connection),
                "chained_at": None,
                "position": head.position + 1,
                "previous": head.hash,
            }
            values["hash"] = chain.hash_of(kind, values)
            tried.append(values)
            insert = _TABLES[kind].insert().values(**values).returning(_TABLES[kind].c.hash)
            connection.execute(insert).scalar_one()
            return values

        return self._transactions.run(append, fenced=True)

    def chain(self) -> Chain:
        """The whole ledger, as it is in the database."""
        return self._transactions.run(_chain)

    def problems(self) -> tuple[str, ...]:
        """What is wrong with the ledger as far as the database alone can say; () if it is whole."""
        return self._transactions.run(lambda connection: tuple(_problems(connection)))

    def protect(self) -> None:
        """Sets up the triggers that are missing; where all stand, no right to do so is needed."""

        def protect(connection: sa.Connection) -> None:
            if any(chain.missing_protection(connection)):
                chain.protect(connection)

        self._transactions.run(protect)

    def entries(
        self, *, study_key: str | None = None, split_id: str | None = None
    ) -> tuple[LedgerEntry, ...]:
        """The openings of one study, of one split, or all, oldest first.

        Raises:
            StorageError: An entry is damaged.
        """
        query = (
            sa.select(table, reports.c.report)
            .outerjoin_from(table, reports, table.c.id == reports.c.entry)
            .order_by(table.c.id)
        )
        if study_key is not None:
            query = query.where(table.c.study_key == study_key)
        if split_id is not None:
            query = query.where(table.c.split_id == split_id)
        rows = self._transactions.run(lambda one: one.execute(query).mappings().all())
        return tuple(map(_entry, rows))


def _entry(row: sa.RowMapping) -> LedgerEntry:
    left_out = ("ensemble", "report", "position", "previous")
    try:
        members = json.loads(row["ensemble"]) if row["ensemble"] else []
        return LedgerEntry(
            **{key: value for key, value in row.items() if key not in left_out},
            report=json.loads(row["report"]) if row["report"] else None,
            ensemble=tuple(EnsembleMember(**member) for member in members),
        )
    except (TypeError, ValueError) as error:
        raise StorageError(
            f"Ledger entry {row['id']} is damaged ({error}); `tuner ledger verify` says what was "
            "changed."
        ) from error


def _lock_the_end(connection: sa.Connection) -> None:
    """Begins a transaction that alone may add to the chain, and survives a power cut."""
    if connection.dialect.name == "sqlite":
        # A study's epochs can be trained again; an opening cannot be closed again.
        connection.exec_driver_sql("PRAGMA synchronous=FULL")
        lock_for_writing(connection)
    else:
        # No lock of the table: a role that may only add to it has no right to one.
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_APPEND_LOCK)))


def _chain(connection: sa.Connection) -> Chain:
    links = []
    for kind, its_table in _TABLES.items():
        for row in connection.execute(sa.select(its_table)).mappings():
            content = {key: value for key, value in row.items() if key != "hash"}
            links.append(
                Link(
                    kind=kind,
                    position=row["position"],
                    previous=row["previous"],
                    hash=row["hash"],
                    content=content,
                )
            )
    begun = connection.execute(sa.select(chain.identities)).first()
    return Chain(
        identity="" if begun is None else begun.identity,
        begun_at="" if begun is None else begun.begun_at,
        links=tuple(sorted(links, key=_place)),
    )


def _place(link: Link) -> tuple[bool, Any, str]:
    """By position; what is no number, which only an edit leaves, comes last."""
    is_number = isinstance(link.position, int)
    return not is_number, link.position if is_number else 0, str(link.position)


def _problems(connection: sa.Connection) -> list[str]:
    there = set(sa.inspect(connection).get_table_names())
    if missing := [name for name in chain.APPEND_ONLY if name not in there]:
        return [f"table {name} is missing: restore the database from a copy." for name in missing]
    found = _chain(connection)
    problems = [*chain.missing_protection(connection)]
    identities = connection.scalar(sa.select(sa.func.count()).select_from(chain.identities))
    if identities != 1:
        problems.append(
            f"table {chain.identities.name} has {counted(int(identities or 0), 'row')}; one names "
            "the ledger."
        )
    problems += chain.broken_links(found.identity, found.links)
    openings = {link.content["id"] for link in found.openings}
    problems += [
        f"the report of ledger entry {link.content['entry']} belongs to no opening: that entry "
        "was removed."
        for link in found.links
        if link.kind == "report" and link.content["entry"] not in openings
    ]
    return problems
