"""The ledger: every opening of a test split, and who opened it.

Why: `docs/decisions.md#why-does-the-ledger-know-a-study-by-a-key-and-not-by-its-id-or-name`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from tuner.storage.tables import metadata
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
    sa.Column("report", sa.Text, nullable=True),  # JSON
    sa.Column("ensemble", sa.Text, nullable=True),  # JSON
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleMember:
    """A network of an ensemble that was evaluated."""

    trial: int  #: number of its trial
    share: float  #: of the mean probability, 0..1
    config_hash: str  #: SHA-256 of its configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """One opening of a test split."""

    id: int
    opened_at: str  #: ISO 8601, UTC
    opened_by: str  #: user@host
    study: str  #: its name
    study_key: str  #: unique to the study, and never used again
    trial: int  #: number of the winning trial, whose network was evaluated
    config_hash: str  #: SHA-256 of the trial's configuration
    spec_hash: str  #: SHA-256 of the study's specification
    split_id: str  #: identity of the test split
    report: dict[str, Any] | None  #: what was found; None if the evaluation never finished
    #: What was evaluated beside the winner, the largest share first; () for nothing.
    ensemble: tuple[EnsembleMember, ...] = ()


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
    ) -> int:
        """Writes the entry that must exist before a test row is read; returns its id.

        Raises:
            LeaseLostError: Another process took the study over; nothing was written.
        """
        values = {key: value for key, value in locals().items() if key != "self"}
        values["ensemble"] = json.dumps([asdict(one) for one in ensemble]) if ensemble else None
        insert = table.insert().values(**values).returning(table.c.id)
        return self._transactions.run(
            lambda connection: int(connection.execute(insert).scalar_one()), fenced=True
        )

    def record_report(self, entry: int, report: dict[str, Any]) -> None:
        """Writes what an opening found into its entry.

        Raises:
            LeaseLostError: Another process took the study over; nothing was written.
        """
        update = table.update().where(table.c.id == entry).values(report=json.dumps(report))
        self._transactions.run(lambda connection: connection.execute(update), fenced=True)

    def entries(
        self, *, study_key: str | None = None, split_id: str | None = None
    ) -> tuple[LedgerEntry, ...]:
        """The openings of one study, of one split, or all, oldest first."""
        query = sa.select(table).order_by(table.c.id)
        if study_key is not None:
            query = query.where(table.c.study_key == study_key)
        if split_id is not None:
            query = query.where(table.c.split_id == split_id)
        rows = self._transactions.run(lambda one: one.execute(query).mappings().all())
        return tuple(map(_entry, rows))


def _entry(row: sa.RowMapping) -> LedgerEntry:
    members = json.loads(row["ensemble"]) if row["ensemble"] else []
    return LedgerEntry(
        **{
            **row,
            "report": json.loads(row["report"]) if row["report"] else None,
            "ensemble": tuple(EnsembleMember(**member) for member in members),
        }
    )
