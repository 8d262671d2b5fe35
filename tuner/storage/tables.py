"""The tables of ours beside Optuna's."""

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


def lock_for_writing(connection: sa.Connection) -> None:
    """Begins a transaction that reads before it writes: SQLite must take its lock at once."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def now(connection: sa.Connection) -> Any:
    """Seconds since the epoch, by the database's clock: coordinators' clocks may differ."""
    if connection.dialect.name == "sqlite":  # a file on this machine
        return sa.literal(time.time(), sa.Double)
    return sa.cast(sa.func.extract("epoch", sa.func.clock_timestamp()), sa.Double)
