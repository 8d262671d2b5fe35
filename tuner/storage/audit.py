"""The audit log: every change that was made through the web server."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from tuner.storage.tables import metadata
from tuner.storage.transactions import Transactions

LOG_IN = "log in"  #: the action of a login

_MAX_DETAIL = 2000  #: characters

# Rows outlive their study.
table = sa.Table(
    "tuner_audit",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("who", sa.String(64), nullable=False),
    sa.Column("address", sa.String(64), nullable=False),
    sa.Column("action", sa.String(256), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("status", sa.Integer, nullable=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One change through the dashboard."""

    id: int
    at: str  #: ISO 8601, UTC
    who: str  #: name of the user
    address: str  #: of the client
    action: str  #: method and path
    detail: str  #: what was changed, in words
    status: int | None  #: of the answer; None while it is made, or if the server died meanwhile


class AuditLog:
    """The audit log of one database."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    def record(
        self, *, who: str, address: str, action: str, detail: str = "", status: int | None = None
    ) -> int:
        """Writes an entry about a change, before it is made or after; returns the entry's id.

        Args:
            who: Name of the user.
            address: Of the client.
            action: Method and path of the request.
            detail: What was changed, in words.
            status: Of the answer; None if the change is about to be made.
        """
        insert = (
            table.insert()
            .values(
                at=datetime.now(UTC).isoformat(timespec="seconds"),
                who=one_line(who)[:64],
                address=one_line(address)[:64],
                action=one_line(action)[:256],
                detail=one_line(detail)[:_MAX_DETAIL],
                status=status,
            )
            .returning(table.c.id)
        )
        return self._transactions.run(lambda one: int(one.execute(insert).scalar_one()))

    def complete(self, entry: int, *, status: int, detail: str) -> None:
        """Writes into an entry how its change ended."""
        values = {"status": status, "detail": one_line(detail)[:_MAX_DETAIL]}
        update = table.update().where(table.c.id == entry).values(values)
        self._transactions.run(lambda connection: connection.execute(update))

    def entries(self, *, last: int = 100) -> tuple[AuditEntry, ...]:
        """The last changes through the dashboard, newest first."""
        query = sa.select(table).order_by(table.c.id.desc()).limit(last)
        rows = self._transactions.run(lambda one: one.execute(query).mappings().all())
        return tuple(AuditEntry(**row) for row in rows)

    def logins(self, *, last: int = 1000) -> tuple[tuple[str, str], ...]:
        """Users and addresses of the last successful logins to the dashboard, oldest first."""
        query = (
            sa.select(table.c.who, table.c.address)
            .where(table.c.action == LOG_IN, table.c.status == 200)
            .order_by(table.c.id.desc())
            .limit(last)
        )
        rows = self._transactions.run(lambda connection: connection.execute(query).all())
        return tuple((row.who, row.address) for row in reversed(rows))


def one_line(text: str) -> str:
    """Text without what forges a line, commands a terminal, or is not text to a database."""
    line = " ".join(text.split())
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in line)
