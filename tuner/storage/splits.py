"""Which sequences a test split holds, so that they are found in another study's splits."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable

import sqlalchemy as sa

from tuner.errors import StorageError
from tuner.storage.tables import lock_for_writing, metadata
from tuner.storage.transactions import Transactions

_HASH_BYTES = 32  #: of a SHA-256

# Rows outlive their study, as the ledger's do.
table = sa.Table(
    "tuner_split",
    metadata,
    sa.Column("split_id", sa.String(64), primary_key=True),
    sa.Column("sequences", sa.LargeBinary, nullable=False),  # sorted SHA-256, 32 bytes each
)


def sequences_hash(hashes: Iterable[bytes]) -> str:
    """The SHA-256 of which sequences a split holds, as they are stored."""
    return hashlib.sha256(b"".join(sorted(hashes))).hexdigest()


class Splits:
    """The test splits in one database."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    def add(self, split_id: str, hashes: Collection[bytes]) -> None:
        """Stores which sequences a test split holds; it stays when its studies are deleted.

        Args:
            split_id: The split's identity.
            hashes: The SHA-256 of each sequence.
        """
        known = sa.select(table.c.split_id).where(table.c.split_id == split_id)
        content = b"".join(sorted(hashes))

        def insert(connection: sa.Connection) -> None:
            lock_for_writing(connection)
            if connection.execute(known).first() is None:
                connection.execute(table.insert().values(split_id=split_id, sequences=content))

        try:
            self._transactions.run(insert)
        except StorageError as error:
            # Two processes added it at once, and what they add is the same.
            if not isinstance(error.__cause__, sa.exc.IntegrityError):
                raise

    def all(self) -> dict[str, frozenset[bytes]]:
        """Which sequences each known test split holds, by the split's identity."""
        query = sa.select(table.c.split_id, table.c.sequences)
        rows = self._transactions.run(lambda connection: connection.execute(query).all())
        return {
            row.split_id: frozenset(
                bytes(row.sequences[start : start + _HASH_BYTES])
                for start in range(0, len(row.sequences), _HASH_BYTES)
            )
            for row in rows
        }
