"""What the tables of ours share: one metadata, the schema's version, the database's clock.

Each concept defines its table beside its queries: `lease`, `ledger`, `decisions`, `queue`,
`development`, `splits`, `audit`. `schema` lists them.
"""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa

OPTUNAS_VERSION_TABLE = "alembic_version"

metadata = sa.MetaData()
# What Alembic counts; as Alembic makes it, and beside Optuna's own `alembic_version`.
revisions = sa.Table(
    "tuner_alembic_version",
    metadata,
    sa.Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="tuner_alembic_version_pkc"),
)
# The count before Alembic's. It stays at 5: a tuner that knows no more than 4 refuses the database.
schema = sa.Table("tuner_schema", metadata, sa.Column("version", sa.Integer, primary_key=True))


def lock_for_writing(connection: sa.Connection) -> None:
    """Begins a transaction that reads before it writes: SQLite must take its lock at once."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def now(connection: sa.Connection) -> Any:
    """Seconds since the epoch, by the database's clock: coordinators' clocks may differ."""
    if connection.dialect.name == "sqlite":  # a file on this machine
        return sa.literal(time.time(), sa.Double)
    return sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()), sa.Double)
