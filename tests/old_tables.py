"""The tuner's tables as earlier versions made them, with a row or two in each.

Copied from the code of those versions: what they were does not change with the tables of today.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from tuner.storage.engine import closed_engine
from tuner.storage.storage import Storage
from tuner.storage.tables import metadata
from tuner.storage.url import parse_url

VERSIONS = (1, 2, 3, 4, 5, 6)

ROWS: dict[str, list[dict[str, Any]]] = {
    "tuner_lease": [
        {
            "study_id": 7,
            "token": "a" * 32,
            "holder": '{"host": "h", "pid": 1, "started": 2.5}',
            "renewed_at": 1_763_000_000.25,
            "stop_requested": True,
            "batches": 12,
        }
    ],
    "tuner_ledger": [
        {
            "opened_at": f"2026-11-2{day}T10:00:00+00:00",
            "opened_by": "ann@lab",
            "study": "Löslichkeit",
            "study_key": f"key-{day}",
            "trial": day,
            "config_hash": "c" * 64,
            "spec_hash": "d" * 64,
            "split_id": "e" * 64,
            "report": report,
        }
        for day, report in ((2, None), (3, '{"accuracy": 0.5}'))
    ],
    "tuner_decisions": [
        {"study_id": 7, "trial": 0, "kind": "ask", "seen": "{}"},
        {
            "study_id": 7,
            "trial": 0,
            "kind": "rung",
            "epoch": 3,
            "verdict": "go",
            "seen": '{"0": 3}',
        },
    ],
    "tuner_queue": [{"study_id": 7, "queued_at": 1_763_000_000.5}],
    "tuner_development": [{"sha256": "f" * 64, "content": b"\x00rows\xff"}],
    "tuner_audit": [
        {
            "at": "2026-11-24T10:00:00+00:00",
            "who": "ann",
            "address": "127.0.0.1",
            "action": "POST /tuner/stop",
            "detail": "",
            "status": 200,
        }
    ],
    "tuner_split": [{"split_id": "e" * 64, "sequences": bytes(range(64))}],
}


def tables_of(version: int) -> sa.MetaData:
    """The tables of one version."""
    old = sa.MetaData()
    sa.Table("tuner_schema", old, sa.Column("version", sa.Integer, primary_key=True))
    lease = sa.Table(
        "tuner_lease",
        old,
        # In the first version PostgreSQL was not there yet.
        sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("token", sa.String(64), nullable=False),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("renewed_at", sa.Float if version == 1 else sa.Double, nullable=False),
        sa.Column("stop_requested", sa.Boolean, nullable=False),
    )
    ledger = sa.Table(
        "tuner_ledger",
        old,
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("opened_at", sa.String(40), nullable=False),
        sa.Column("opened_by", sa.String(255), nullable=False),
        sa.Column("study", sa.String(512), nullable=False),
        sa.Column("study_key", sa.String(128), nullable=False, index=True),
        sa.Column("trial", sa.Integer, nullable=False),
        sa.Column("config_hash", sa.String(64), nullable=False),
        sa.Column("spec_hash", sa.String(64), nullable=False),
        sa.Column("split_id", sa.String(64), nullable=False, index=True),
        sa.Column("report", sa.Text, nullable=True),
    )
    decisions = sa.Table(
        "tuner_decisions",
        old,
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("study_id", sa.Integer, nullable=False, index=True),
        sa.Column("trial", sa.Integer, nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("epoch", sa.Integer, nullable=True),
        sa.Column("verdict", sa.String(16), nullable=True),
    )
    if version == 1:
        decisions.append_column(sa.Column("seen", sa.Text, nullable=True))
    else:
        lease.append_column(sa.Column("batches", sa.Integer, nullable=False, server_default="0"))
        sa.Table(
            "tuner_queue",
            old,
            sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
            sa.Column("queued_at", sa.Double, nullable=False),
        )
        sa.Table(
            "tuner_development",
            old,
            sa.Column("sha256", sa.String(64), primary_key=True),
            sa.Column("content", sa.LargeBinary, nullable=False),
        )
    if version >= 3:
        sa.Table(
            "tuner_audit",
            old,
            sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
            sa.Column("at", sa.String(40), nullable=False),
            sa.Column("who", sa.String(64), nullable=False),
            sa.Column("address", sa.String(64), nullable=False),
            sa.Column("action", sa.String(256), nullable=False),
            sa.Column("detail", sa.Text, nullable=False),
            sa.Column("status", sa.Integer, nullable=True),
        )
    if version >= 4:
        sa.Table(
            "tuner_split",
            old,
            sa.Column("split_id", sa.String(64), primary_key=True),
            sa.Column("sequences", sa.LargeBinary, nullable=False),
        )
    if version >= 5:
        sa.Table(
            "tuner_alembic_version",
            old,
            sa.Column("version_num", sa.String(32), primary_key=True),
        )
    if version >= 6:
        ledger.append_column(sa.Column("ensemble", sa.Text, nullable=True))
    return old


def make_old_database(url: str, version: int) -> None:
    """Makes a database of an earlier version, with rows; Optuna's tables were those of today."""
    Storage(url).close()
    old = tables_of(version)
    with closed_engine(parse_url(url)) as engine, engine.begin() as connection:
        metadata.drop_all(connection)
        old.create_all(connection)
        connection.execute(old.tables["tuner_schema"].insert().values(version=version))
        if version >= 5:
            revisions = old.tables["tuner_alembic_version"]
            connection.execute(revisions.insert().values(version_num=f"{version:04}"))
        for name, rows in ROWS.items():
            if name in old.tables:
                table = old.tables[name]
                for row in rows:
                    has = {key: value for key, value in row.items() if key in table.columns}
                    connection.execute(table.insert().values(has))


def rows_of(url: str) -> dict[str, list[dict[str, Any]]]:
    """Every row of the tuner's tables, by table."""
    found = sa.MetaData()
    with closed_engine(parse_url(url), configured=False) as engine, engine.connect() as connection:
        found.reflect(connection, only=lambda name, _: name.startswith("tuner_"))
        return {
            table.name: [dict(row) for row in connection.execute(sa.select(table)).mappings()]
            for table in found.sorted_tables
        }


def structure_of(url: str) -> dict[str, Any]:
    """Columns, keys and indexes of every table, the tuner's and Optuna's."""
    with closed_engine(parse_url(url), configured=False) as engine:
        look = sa.inspect(engine)
        return {
            name: (
                # Two names of one type.
                {
                    column["name"]: (
                        str(column["type"]).replace("FLOAT", "DOUBLE"),
                        column["nullable"],
                        str(column["default"]).strip("'"),
                    )
                    for column in look.get_columns(name)
                },
                look.get_pk_constraint(name)["constrained_columns"],
                sorted((index["name"], index["column_names"]) for index in look.get_indexes(name)),
            )
            for name in look.get_table_names()
        }
