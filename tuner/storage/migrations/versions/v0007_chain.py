"""The ledger becomes a chain that is only added to; a report is an entry of its own."""

import hashlib
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

from tuner.storage import chain

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Takes the entries of earlier versions into the chain: openings first, then their reports.

    Nothing proves that they were not changed before; `chained_at` says so of each.
    """
    connection = op.get_bind()
    op.create_table(
        "tuner_ledger_identity",
        sa.Column("identity", sa.String(64), primary_key=True),
        sa.Column("begun_at", sa.String(40), nullable=False),
    )
    op.create_table(
        "tuner_ledger_report",
        sa.Column("entry", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("recorded_at", sa.String(40), nullable=True),
        sa.Column("report", sa.Text, nullable=False),
        sa.Column("chained_at", sa.String(40), nullable=True),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("previous", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )
    for column in (
        sa.Column("sequences_sha256", sa.String(64)),
        sa.Column("look", sa.Integer),
        sa.Column("reason", sa.Text),
        sa.Column("chained_at", sa.String(40)),
        sa.Column("position", sa.Integer),
        sa.Column("previous", sa.String(64)),
        sa.Column("hash", sa.String(64)),
    ):
        op.add_column("tuner_ledger", column)
    _chain(connection, chain.name_ledger(connection))
    with op.batch_alter_table("tuner_ledger") as changed:
        changed.drop_column("report")
        for name, kind in (
            ("look", sa.Integer()),
            ("position", sa.Integer()),
            ("previous", sa.String(64)),
            ("hash", sa.String(64)),
        ):
            changed.alter_column(name, existing_type=kind, nullable=False)
    chain.protect(connection)


def _chain(connection: sa.Connection, identity: str) -> None:
    tables = sa.MetaData()
    tables.reflect(connection, only=["tuner_ledger", "tuner_ledger_report"])
    ledger, reports = tables.tables["tuner_ledger"], tables.tables["tuner_ledger_report"]
    rows = connection.execute(sa.select(ledger).order_by(ledger.c.id)).mappings().all()
    splits = sa.table("tuner_split", sa.column("split_id"), sa.column("sequences"))
    sequences = {
        row.split_id: hashlib.sha256(row.sequences).hexdigest()
        for row in connection.execute(sa.select(splits))
    }
    now = datetime.now(UTC).isoformat(timespec="seconds")
    place: dict[str, Any] = {"chained_at": now, "position": 1, "previous": identity}
    looks: dict[str, int] = {}
    for row in rows:
        looks[row["split_id"]] = looks.get(row["split_id"], 0) + 1
        known = sequences.get(row["split_id"])
        added = {"sequences_sha256": known, "look": looks[row["split_id"]], **place}
        content = {key: row[key] for key in row if key not in ("report", "hash")} | added
        its_hash = chain.hash_of("opening", content)
        connection.execute(
            ledger.update().where(ledger.c.id == row["id"]).values(hash=its_hash, **added)
        )
        place |= {"position": place["position"] + 1, "previous": its_hash}
    for row in rows:
        if row["report"] is None:
            continue
        content = {"entry": row["id"], "recorded_at": None, "report": row["report"], **place}
        its_hash = chain.hash_of("report", content)
        connection.execute(reports.insert().values(hash=its_hash, **content))
        place |= {"position": place["position"] + 1, "previous": its_hash}
