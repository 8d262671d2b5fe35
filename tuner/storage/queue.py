"""The queue: studies that wait for the service, which runs them on its own cluster."""

from __future__ import annotations

import sqlalchemy as sa

from tuner.storage.tables import lock_for_writing, metadata, now
from tuner.storage.transactions import Transactions

table = sa.Table(
    "tuner_queue",
    metadata,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("queued_at", sa.Double, nullable=False),  # seconds since the epoch
)


class Queue:
    """The queue of one database."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    def add(self, study_id: int) -> bool:
        """Asks the service to run a study; False if it is in the queue already."""

        def insert(connection: sa.Connection) -> bool:
            lock_for_writing(connection)
            row = table.select().where(table.c.study_id == study_id)
            if connection.execute(row).first() is not None:
                return False
            connection.execute(table.insert().values(study_id=study_id, queued_at=now(connection)))
            return True

        return self._transactions.run(insert)

    def remove(self, study_id: int) -> bool:
        """Takes a study out of the queue; False if it was not in it."""
        delete = table.delete().where(table.c.study_id == study_id)
        return self._transactions.run(lambda connection: connection.execute(delete).rowcount == 1)

    def study_ids(self) -> tuple[int, ...]:
        """The studies in the queue, longest waiting first."""
        query = sa.select(table.c.study_id).order_by(table.c.queued_at, table.c.study_id)
        return self._transactions.run(lambda connection: tuple(connection.scalars(query)))
