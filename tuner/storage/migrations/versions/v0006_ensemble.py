"""Which networks an opening evaluated together, beside the winner."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Adds a column to the ledger."""
    op.add_column("tuner_ledger", sa.Column("ensemble", sa.Text, nullable=True))
