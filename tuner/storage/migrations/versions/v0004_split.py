"""Which sequences a test split holds."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Adds a table."""
    op.create_table(
        "tuner_split",
        sa.Column("split_id", sa.String(64), primary_key=True),
        sa.Column("sequences", sa.LargeBinary, nullable=False),
    )
