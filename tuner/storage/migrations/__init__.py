"""How the tables of an older tuner become those of this one: an Alembic environment, run by code.

`tuner.storage.schema` runs it, with a connection in whose transaction all of it happens; there is
no alembic.ini. A change of a table takes three things in one commit:

- a module in `versions`, whose `down_revision` is the last one's;
- `REVISION` in `tuner.storage.schema`, which says the same without an import of Alembic;
- the table, beside its queries (`tuner.storage.lease` and others), from which a new database is
  made.

A revision never imports a table of today: it says what the tables were in its time.
"""
