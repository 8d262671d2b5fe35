"""Studies that wait for the service, their rows, and the count of a coordinator's batches."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds a column to the lease, and two tables."""
    op.add_column(
        "tuner_lease", sa.Column("batches", sa.Integer, nullable=False, server_default="0")
    )
    op.create_table(
        "tuner_queue",
        sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("queued_at", sa.Double, nullable=False),
    )
    op.create_table(
        "tuner_development",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("content", sa.LargeBinary, nullable=False),
    )
