"""From here on Alembic counts: a tuner that counts by itself is told a number that it refuses."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Ends the old count, and removes what only the first version wrote."""
    # The second version left it where the first had made it, and read it no more.
    columns = sa.inspect(op.get_bind()).get_columns("tuner_decisions")
    if any(column["name"] == "seen" for column in columns):
        with op.batch_alter_table("tuner_decisions") as decisions:
            decisions.drop_column("seen")
    op.execute("UPDATE tuner_schema SET version = 5")
