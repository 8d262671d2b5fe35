"""Development files of queued studies: the service may not see the files of this machine."""

from __future__ import annotations

import json

import sqlalchemy as sa

from tuner.storage.private_optuna import models
from tuner.storage.tables import lock_for_writing, metadata
from tuner.storage.transactions import Transactions

table = sa.Table(
    "tuner_development",
    metadata,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
)


class DevelopmentFiles:
    """The training and validation rows in one database, by the SHA-256 of their file."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    def add(self, sha256: str, content: bytes) -> None:
        """Stores a development file, unless it is stored already."""

        def insert(connection: sa.Connection) -> None:
            _lock(connection)
            known = sa.select(table.c.sha256).where(table.c.sha256 == sha256)
            if connection.execute(known).first() is None:
                connection.execute(table.insert().values(sha256=sha256, content=content))

        self._transactions.run(insert)

    def read(self, sha256: str) -> bytes | None:
        """A development file that was added; None if it was not."""
        query = sa.select(table.c.content).where(table.c.sha256 == sha256)
        return self._transactions.run(lambda connection: connection.scalar(query))

    def remove_unused(self, attribute: str, field: str) -> None:
        """Removes the development files that no study of this storage names.

        Args:
            attribute: The study attribute, an object, that names a study's development file.
            field: Where in it the file's hash is.
        """
        attributes = models.StudyUserAttributeModel.__table__
        records = sa.select(attributes.c.value_json).where(attributes.c.key == attribute)

        def remove(connection: sa.Connection) -> None:
            _lock(connection)
            named = {json.loads(text).get(field) for text in connection.scalars(records)}
            connection.execute(table.delete().where(table.c.sha256.not_in(named)))

        self._transactions.run(remove)


def _lock(connection: sa.Connection) -> None:
    """Whoever adds a file and whoever removes it do so one after the other.

    A study has its record before its file is added: so whoever removes files sees the record, or
    keeps the other waiting until it is done, and then the file is added again.
    """
    lock_for_writing(connection)
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("LOCK TABLE tuner_development IN SHARE ROW EXCLUSIVE MODE")
