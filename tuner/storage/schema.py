"""The revisions of our tables and of Optuna's: looked at, created, brought up to date.

Why: `docs/decisions.md#how-are-the-tables-of-an-older-storage-upgraded`.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sqlalchemy as sa
from filelock import FileLock
from optuna.storages import RDBStorage

from tuner.artifacts import new_file_mode
from tuner.commands import command
from tuner.errors import StorageError, StorageMissingError
from tuner.storage import audit, chain, decisions, development, lease, ledger, queue, splits
from tuner.storage.engine import closed_engine, engine_arguments
from tuner.storage.private_optuna import models
from tuner.storage.tables import (
    OPTUNAS_VERSION_TABLE,
    lock_for_writing,
    metadata,
    revisions,
    schema,
)
from tuner.storage.url import is_sqlite, shown

#: The last revision in `tuner.storage.migrations`, known without an import of Alembic.
REVISION = "0007"
#: What `tuner_schema` says from 0005 on: a tuner that counts there knows 4 at most, and refuses it.
LAST_COUNT = 5

#: Every table of ours, as a new database has it.
_TABLES = [
    revisions,
    schema,
    lease.table,
    chain.identities,
    ledger.table,
    ledger.reports,
    decisions.table,
    queue.table,
    development.table,
    splits.table,
    audit.table,
]

SCHEMA_LOCK = 0x74756E6572  #: "tuner": the key of PostgreSQL's advisory lock


def require_tables(url: sa.URL) -> None:
    """Looks whether the tuner's tables are there; a file that has none stays as it is.

    Raises:
        StorageMissingError: They are not.
    """
    launch = command("launch", "SPEC", storage=shown(url))
    remedy = f"`{launch}` makes one, --storage names another database"
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        raise StorageMissingError(f"{shown(url)} holds no study: there is no such file; {remedy}.")
    with closed_engine(url, configured=False) as engine:
        if not sa.inspect(engine).has_table(schema.name):
            raise StorageMissingError(f"{shown(url)} holds no study of the tuner; {remedy}.")


def look_at(url: sa.URL) -> None:
    """Asks the database one question, on a connection of its own.

    Raises:
        StorageError: The file of an SQLite database is not there.
        SQLAlchemyError: No answer.
    """
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).is_file():
        raise StorageError(f"{shown(url)}: there is no such file (any more).")
    with closed_engine(url) as engine, engine.connect() as connection:
        connection.scalar(sa.select(schema.c.version))


#: "outdated": of an older tuner or Optuna; "newer": the other way round.
SchemaState = Literal["current", "missing", "outdated", "newer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a database holds."""

    optunas: str  #: the revision of Optuna's tables; "" where there are none
    ours: str  #: the revision of the tuner's tables; "" where there are none

    @property
    def is_current(self) -> bool:
        return self.optunas == _optunas_revision() and self.ours == REVISION

    def judged(self, url: sa.URL) -> tuple[SchemaState, str]:
        """The state of the schema; where that is "outdated" or "newer", why and what to do."""
        differ = [
            (whose, has, needs)
            for whose, has, needs in (
                ("Optuna", self.optunas, _optunas_revision()),
                ("tuner", self.ours, REVISION),
            )
            if has not in ("", needs)
        ]
        if not differ:
            return "current" if self.is_current else "missing", ""
        # Alembic takes a tenth of a second to import: none of that for a schema that is current.
        from tuner.storage import upgrade  # noqa: PLC0415

        known = {"Optuna": upgrade.OPTUNAS, "tuner": upgrade.OURS}
        for whose, has, needs in differ:
            if has not in upgrade.known(known[whose]):
                return "newer", (
                    f"a newer {whose} made its tables (version {has}, this one knows {needs}); "
                    "use the tuner that wrote it, or another --storage."
                )
        whose, has, needs = differ[-1]
        return "outdated", (
            f"an older {whose} made its tables (version {has}, this one needs {needs}). "
            f"`{init_command(url)}` brings them up to date; make a copy first."
        )


def find(connection: sa.Connection) -> Found:
    """Which tables a database holds, and of which revisions."""
    tables = sa.inspect(connection)
    optunas = ours = None
    if tables.has_table(OPTUNAS_VERSION_TABLE):
        optunas = connection.scalar(sa.select(_optunas_version.c.version_num))
    if tables.has_table(revisions.name):
        ours = connection.scalar(sa.select(revisions.c.version_num))
    elif tables.has_table(schema.name):  # of before there were revisions: 3 became 0003
        count = connection.scalar(sa.select(schema.c.version))
        ours = None if count is None else f"{count:04}"
    return Found(optunas=optunas or "", ours=ours or "")


_optunas_version = sa.table(OPTUNAS_VERSION_TABLE, sa.column("version_num", sa.String))


def schema_state(url: sa.URL) -> tuple[SchemaState, str]:
    """Looks at the schema without changing it; the state, and what to do about it."""
    made_by_itself = f"`{init_command(url)}` makes it, and so does `tuner launch`."
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        return "missing", f"There is no file yet; {made_by_itself}"
    with closed_engine(url, configured=False) as engine, engine.connect() as connection:
        state, reason = find(connection).judged(url)
    if state == "missing":
        return state, f"It holds no tables of the tuner yet; {made_by_itself}"
    return state, reason[:1].upper() + reason[1:]


def init_command(url: sa.URL) -> str:
    """The command that creates or upgrades the schema of a database."""
    return command("storage", "init", storage=shown(url))


@functools.cache
def _optunas_revision() -> str:
    """The last revision of Optuna's tables, as its scripts say: Alembic is slow to import."""
    last: set[str] = set()
    before: set[str] = set()
    for script in (Path(models.__file__).parent / "alembic" / "versions").glob("*.py"):
        text = script.read_text(encoding="utf-8")
        last.update(re.findall(r"^revision = [\"'](.+)[\"']", text, re.MULTILINE))
        before.update(re.findall(r"^down_revision = [\"'](.+)[\"']", text, re.MULTILINE))
    (revision,) = last - before  # one branch, as long as Optuna has one
    return revision


def make_current(url: sa.URL, *, upgrade: bool) -> None:
    """Creates Optuna's tables and ours where they are missing; upgrades older ones where asked to.

    What is there is upgraded in one transaction: a process that dies in the middle leaves all of
    it as it was. On PostgreSQL one process at a time does it, on SQLite the one that writes.

    Args:
        url: Of a database that is there.
        upgrade: Older tables may be changed.

    Raises:
        StorageError: The tables are newer, or older and are not to be changed.
    """
    with closed_engine(url) as engine, engine.connect() as connection:
        found = find(connection)
        if found.is_current:
            return
        _refuse(found, url, upgrade=upgrade)
        connection.rollback()
        if not is_sqlite(engine):
            connection.execute(sa.select(sa.func.pg_advisory_lock(SCHEMA_LOCK)))
            connection.commit()
        if not find(connection).optunas:
            _create_optunas_tables(url)
        connection.rollback()
        with connection.begin():
            lock_for_writing(connection)
            found = find(connection)  # another process may have been first
            _refuse(found, url, upgrade=upgrade)
            if not found.is_current:
                _change(connection, found)
        # The advisory lock ends with the connection.


def _refuse(found: Found, url: sa.URL, *, upgrade: bool) -> None:
    state, reason = found.judged(url)
    if state == "newer" or (state == "outdated" and not upgrade):
        raise StorageError(f"{shown(url)}: {reason}")


def _change(connection: sa.Connection, found: Found) -> None:
    """Creates what is missing and upgrades what is older, in the transaction of its caller."""
    if found.optunas != _optunas_revision() or found.ours not in ("", REVISION):
        # Imported where there is something to upgrade: it imports Alembic.
        from tuner.storage import upgrade  # noqa: PLC0415

        if not is_sqlite(connection.engine):
            # A large table takes longer than any statement of a study.
            limits = sa.table("pg_settings", sa.column("name", sa.String))
            connection.execute(
                sa.select(sa.func.set_config(limits.c.name, "0", True)).where(
                    limits.c.name.in_(["statement_timeout", "transaction_timeout"])
                )
            )
        if found.optunas != _optunas_revision():
            upgrade.run(upgrade.OPTUNAS, connection)
        if found.ours not in ("", REVISION):
            if not sa.inspect(connection).has_table(revisions.name):
                revisions.create(connection)
                connection.execute(revisions.insert().values(version_num=found.ours))
            upgrade.run(upgrade.OURS, connection)
    if not found.ours:
        metadata.create_all(connection, _TABLES)
        connection.execute(schema.insert().values(version=LAST_COUNT))
        connection.execute(revisions.insert().values(version_num=REVISION))
        chain.name_ledger(connection)
        chain.protect(connection)


def _create_optunas_tables(url: sa.URL) -> None:
    storage = RDBStorage(
        url.render_as_string(hide_password=False), engine_kwargs=engine_arguments(url)
    )
    storage.remove_session()
    storage.engine.dispose()


def publish_empty_database(path: Path) -> None:
    """Creates the schema beside, and gives the whole file its name unless another has it by then.

    Where the file system has no hard links (exFAT, most SMB shares), a rename does; it would take
    the place of a file that another process published and wrote to meanwhile, so a lock keeps
    others away between the look and the rename.
    """
    with tempfile.TemporaryDirectory(prefix=".tuner-new-", dir=path.parent) as folder:
        beside = Path(folder, "tuner.db")
        url = sa.URL.create("sqlite", database=str(beside))
        make_current(url, upgrade=False)
        # SQLite's journals get the mode of their database.
        beside.chmod(new_file_mode(path.parent, private=True) or 0o600)
        try:
            os.link(beside, path)
        except FileExistsError:  # another process was first: use its file
            pass
        except OSError:
            with FileLock(path.with_name(_PUBLISHING_LOCK), mode=0o600) as lock:
                if not path.exists():
                    beside.replace(path)
                # Who waits for it finds the database published, whatever file is locked.
                Path(lock.lock_file).unlink(missing_ok=True)


#: Beside a database that is being published where hard links are refused.
_PUBLISHING_LOCK = ".tuner-new.lock"
