"""The chain of the ledger: what a hash covers, what the database refuses, what verification finds.

Every entry's hash covers its content and the hash of the entry before, so that the last hash, the
head, says all that the ledger held. Triggers refuse changes; who removes them is found by the
hashes, and who computes those anew by a head that was kept elsewhere.

Why: `docs/decisions.md#what-keeps-the-ledger-from-being-changed`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

import sqlalchemy as sa

from tuner.storage.tables import metadata

#: One row: the name of this ledger, which the first entry's hash covers. Two databases that share
#: an artifacts folder, and one that was made anew, have different ones.
identities = sa.Table(
    "tuner_ledger_identity",
    metadata,
    sa.Column("identity", sa.String(64), primary_key=True),
    sa.Column("begun_at", sa.String(40), nullable=False),
)

#: The tables that are only ever added to, and the column by which each knows a row.
APPEND_ONLY: Mapping[str, str] = {
    "tuner_ledger": "id",
    "tuner_ledger_report": "entry",
    "tuner_ledger_identity": "identity",
    "tuner_split": "split_id",
}

Kind: TypeAlias = Literal["opening", "report"]
Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One entry of the chain: an opening, or what it found."""

    kind: Kind
    position: Any  #: in the chain, counted from 1; no number only if it was edited
    previous: str  #: hash of the entry before; of the first, the ledger's identity
    hash: str
    content: Row  #: its columns, but for the hash


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The end of a chain: with it, what a ledger held can be compared later."""

    ledger: str  #: the ledger's identity
    position: int  #: of its last entry; 0 for none
    hash: str  #: of its last entry; the ledger's identity where there is none


def hash_of(kind: Kind, content: Row) -> str:
    """The SHA-256 of an entry's canonical content, the hash of the entry before included."""
    named = {"kind": kind, **content}
    text = json.dumps(named, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def name_ledger(connection: sa.Connection) -> str:
    """Names the ledger of a database that has none; returns its identity."""
    identity = secrets.token_hex(32)
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    connection.execute(identities.insert().values(identity=identity, begun_at=begun))
    return identity


# --- what the database refuses ---

_REFUSAL = "the ledger is append-only: what is written stays as it is"

_FUNCTION = "tuner_append_only"
_FUNCTION_BODY = f"""
BEGIN
  RAISE EXCEPTION '{_REFUSAL} (% of %)', TG_OP, TG_TABLE_NAME
    USING ERRCODE = 'integrity_constraint_violation';
END
"""
#: Of PostgreSQL's `pg_trigger.tgtype`: before, delete, update, truncate; for each statement.
_BEFORE_ANY_CHANGE = 2 | 8 | 16 | 32


def _sqlite_triggers() -> dict[str, str]:
    """The statements that make SQLite's triggers, by their names."""
    found = {}
    for table, key in APPEND_ONLY.items():
        # INSERT OR REPLACE deletes without a trigger of its own.
        for name, when in (
            ("update", f"UPDATE ON {table}"),
            ("delete", f"DELETE ON {table}"),
            (
                "replace",
                f"INSERT ON {table} WHEN EXISTS (SELECT 1 FROM {table} WHERE {key} = NEW.{key})",  # noqa: S608
            ),
        ):
            found[f"{table}_{name}"] = (
                f"CREATE TRIGGER {table}_{name} BEFORE {when} "
                f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
            )
    return found


def protect(connection: sa.Connection) -> None:
    """Sets up the triggers that are missing; those that are there stay."""
    if connection.dialect.name == "sqlite":
        there = set(_sqlite_found(connection))
        for name, statement in _sqlite_triggers().items():
            if name not in there:
                connection.exec_driver_sql(statement)
        return
    # A percent sign would be a parameter's.
    body = _FUNCTION_BODY.replace("%", "%%")
    connection.exec_driver_sql(
        f"CREATE OR REPLACE FUNCTION {_FUNCTION}() RETURNS trigger LANGUAGE plpgsql "
        f"AS $tuner${body}$tuner$"
    )
    there = {row.tgname for row in _postgres_found(connection)}
    for table in APPEND_ONLY:
        name = f"{table}_append_only"
        if name not in there:
            connection.exec_driver_sql(
                f"CREATE TRIGGER {name} BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
                f"FOR EACH STATEMENT EXECUTE FUNCTION {_FUNCTION}()"
            )
        # Also in a session that replays a replica's changes, where triggers are off.
        connection.exec_driver_sql(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {name}")


def missing_protection(connection: sa.Connection) -> Iterator[str]:
    """What is wrong with the triggers, a line each; nothing where all stand."""
    if connection.dialect.name == "sqlite":
        expected = _sqlite_triggers()
        found = _sqlite_found(connection)
        for name in expected.keys() - found.keys():
            yield _unprotected(name, "is missing")
        for name in found.keys() - expected.keys():
            yield f"trigger {name} is not the tuner's; remove it."
        for name in expected.keys() & found.keys():
            if found[name] != expected[name]:
                yield _unprotected(name, "was changed")
        return
    expected_names = {f"{table}_append_only" for table in APPEND_ONLY}
    rows = {row.tgname: row for row in _postgres_found(connection)}
    for name in sorted(expected_names - rows.keys()):
        yield _unprotected(name, "is missing")
    for name in sorted(rows.keys() - expected_names):
        yield f"trigger {name} is not the tuner's; remove it."
    for name in sorted(expected_names & rows.keys()):
        row = rows[name]
        if row.tgenabled != "A":
            yield _unprotected(name, "is disabled")
        elif (row.tgtype, row.proname, row.prosrc, row.has_condition) != (
            _BEFORE_ANY_CHANGE,
            _FUNCTION,
            _FUNCTION_BODY,
            False,
        ):
            yield _unprotected(name, "was changed")


def _unprotected(name: str, what: str) -> str:
    remedy = (
        "drop it, then `tuner storage init`" if what == "was changed" else "`tuner storage init`"
    )
    return (
        f"trigger {name} {what}, so entries could be changed without a refusal; {remedy} sets it "
        "up again."
    )


def _sqlite_found(connection: sa.Connection) -> dict[str, str]:
    query = sa.text("SELECT name, tbl_name, sql FROM sqlite_master WHERE type = 'trigger'")
    rows = connection.execute(query).all()
    return {row.name: row.sql for row in rows if row.tbl_name in APPEND_ONLY}


def _postgres_found(connection: sa.Connection) -> Sequence[Any]:
    query = sa.text(
        "SELECT t.tgname, t.tgenabled::text AS tgenabled, t.tgtype::int AS tgtype, p.proname, "
        "p.prosrc, t.tgqual IS NOT NULL OR t.tgattr::text <> '' AS has_condition "
        "FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_proc p ON p.oid = t.tgfoid "
        "WHERE NOT t.tgisinternal AND pg_table_is_visible(c.oid) AND c.relname = ANY(:tables)"
    )
    return connection.execute(query, {"tables": list(APPEND_ONLY)}).all()


# --- what verification finds ---


def broken_links(identity: str, links: Iterable[Link]) -> Iterator[str]:
    """What is wrong with a chain, a line each; nothing where it is whole."""
    previous, position = identity, 0
    for link in links:
        name = _name(link)
        if hash_of(link.kind, link.content) != link.hash:
            yield f"{name} was changed: its content does not have its hash."
        if link.position != position + 1:
            yield (
                f"{name} is at place {link.position!r} of the chain, where place {position + 1} "
                "is due: an entry was removed, or entries were reordered."
            )
        elif link.previous != previous:
            yield (
                f"{name} does not follow the entry before it: that one was changed, removed, "
                "inserted, or entries were reordered."
            )
        previous = link.hash
        position = link.position if isinstance(link.position, int) else position + 1


def _name(link: Link) -> str:
    if link.kind == "opening":
        return f"ledger entry {link.content['id']}"
    return f"the report of ledger entry {link.content['entry']}"
