"""The version of our tables and of Optuna's: looked at, and created."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal

import sqlalchemy as sa
from filelock import FileLock
from optuna.storages import RDBStorage

from tuner.artifacts import new_file_mode
from tuner.commands import command
from tuner.errors import StorageError, StorageMissingError
from tuner.storage.engine import closed_engine, engine_arguments
from tuner.storage.tables import lease, lock_for_writing, metadata, schema
from tuner.storage.url import shown

SCHEMA_VERSION = 4


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


def is_current(connection: sa.Connection) -> bool:
    """Whether the tables are those of this version."""
    tables = sa.inspect(connection)
    if not tables.has_table(schema.name) or not tables.has_table("alembic_version"):
        return False
    return connection.scalar(sa.select(schema.c.version)) == SCHEMA_VERSION


#: "outdated": of an older tuner or Optuna; "newer": the other way round.
SchemaState = Literal["current", "missing", "outdated", "newer"]


def schema_state(url: sa.URL) -> tuple[SchemaState, str]:
    """Looks at the schema without changing it; the state, and what to do about it."""
    made_by_itself = f"`{init_command(url)}` makes it, and so does every other verb."
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        return "missing", f"There is no file yet; {made_by_itself}"
    with closed_engine(url, configured=False) as engine, engine.connect() as connection:
        tables = sa.inspect(connection)
        if not tables.has_table(schema.name) or not tables.has_table("alembic_version"):
            return "missing", f"It holds no tables of the tuner yet; {made_by_itself}"
        ours = connection.scalar(sa.select(schema.c.version)) or 0
        optunas = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    known = _optunas_versions()
    if ours > SCHEMA_VERSION or optunas not in known:
        return "newer", "A newer tuner wrote it: use that one, or another --storage."
    if ours < SCHEMA_VERSION or optunas != known[0]:
        return "outdated", f"`{init_command(url)}` brings it up to date; make a copy first."
    return "current", ""


def init_command(url: sa.URL) -> str:
    """The command that creates or upgrades the schema of a database."""
    return command("storage", "init", storage=shown(url))


def _optunas_versions() -> list[str]:
    """Optuna's schema versions, the latest first: the library's, whatever the database."""
    storage = RDBStorage("sqlite://")
    try:
        return list(storage.get_all_versions())
    finally:
        storage.remove_session()
        storage.engine.dispose()


def create_tables(engine: sa.Engine, url: sa.URL) -> None:
    """Optuna's tables and ours, where they are missing; ours of an earlier version get newer."""
    if not sa.inspect(engine).has_table("alembic_version"):
        _create_optunas_tables(url)
    with engine.begin() as connection:
        lock_for_writing(connection)
        had_lease = sa.inspect(connection).has_table(lease.name)
        metadata.create_all(connection)
        version = connection.scalar(sa.select(schema.c.version))
        if version is None:
            connection.execute(schema.insert().values(version=SCHEMA_VERSION))
        elif version > SCHEMA_VERSION:
            raise StorageError(
                f"{shown(url)}: its schema has version {version}, "
                f"this tuner knows {SCHEMA_VERSION}; use the tuner that wrote it, or another "
                "--storage."
            )
        elif version < SCHEMA_VERSION:
            if had_lease and version < 2:  # the one table that was changed; the others came new
                connection.exec_driver_sql(
                    "ALTER TABLE tuner_lease ADD COLUMN batches INTEGER NOT NULL DEFAULT 0"
                )
            connection.execute(schema.update().values(version=SCHEMA_VERSION))


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
        _create_optunas_tables(url)
        with closed_engine(url) as engine:
            create_tables(engine, url)
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
