"""What Alembic runs for each command: the revisions, in the transaction that its caller began."""

from alembic import context

attributes = context.config.attributes
context.configure(
    connection=attributes["connection"],
    version_table=attributes["version_table"],
    # Alembic takes SQLite's for none, since Python's driver begins no transaction before DDL;
    # the caller began one. Alembic begins and commits nothing by itself then.
    transactional_ddl=True,
)
context.run_migrations()
