"""Runs Alembic: brings tables up to date in a transaction that somebody else began and ends.

Its import costs a tenth of a second, so only who found a schema that is not current imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from tuner.storage.private_optuna import models
from tuner.storage.tables import OPTUNAS_VERSION_TABLE, revisions


@dataclass(frozen=True, slots=True, kw_only=True)
class Scripts:
    """Revisions that lead from one another."""

    folder: Path  #: one module a revision
    version_table: str  #: says which of them a database has


OURS = Scripts(
    folder=Path(__file__).with_name("migrations") / "versions", version_table=revisions.name
)
OPTUNAS = Scripts(
    folder=Path(models.__file__).parent / "alembic" / "versions",
    version_table=OPTUNAS_VERSION_TABLE,
)


def known(scripts: Scripts) -> Sequence[str]:
    """Every revision, the last one first."""
    directory = ScriptDirectory.from_config(_config(scripts))
    return [script.revision for script in directory.walk_revisions()]


def run(scripts: Scripts, connection: sa.Connection) -> None:
    """Brings tables to the last revision, on a connection that is in a transaction.

    Optuna's scripts run in our environment, not in Optuna's, which opens a connection of its own,
    commits each revision by itself on SQLite, and sets up the process's logging.
    """
    config = _config(scripts)
    config.attributes["connection"] = connection
    config.attributes["version_table"] = scripts.version_table
    command.upgrade(config, "head")
    if scripts is OPTUNAS:  # as `RDBStorage.upgrade` does
        connection.execute(
            sa.update(models.VersionInfoModel).values(
                schema_version=models.SCHEMA_VERSION, library_version=optuna.__version__
            )
        )


def _config(scripts: Scripts) -> Config:
    config = Config()
    config.set_main_option("script_location", "tuner.storage:migrations")
    config.set_main_option("path_separator", "newline")
    # A % in a path would be taken for the begin of a variable.
    config.set_main_option("version_locations", str(scripts.folder).replace("%", "%%"))
    return config
