"""The first tables: lease, ledger, decisions.

The databases that have them were made before there were revisions, so they are marked with this
one by their number in `tuner_schema`; new ones are made whole. It is never run.
"""

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Refuses: nothing leads here from an empty database."""
    raise NotImplementedError("a new database is made by tuner.storage.schema")
