"""What the shell completes: names of studies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

from tuner.artifacts import DEFAULT_STORAGE_URL

_MOST_NAMES = 200
_CONNECT_SECONDS = 2  #: libpq's shortest


def study_names(context: typer.Context, incomplete: str) -> list[str]:
    """The studies whose names begin so; none if the storage cannot be read at once."""
    url = context.params.get("storage") or os.environ.get("TUNER_STORAGE") or DEFAULT_STORAGE_URL
    try:
        return _names(str(url), incomplete)
    except Exception:  # noqa: BLE001 - between two key strokes there is no place for a message
        return []


def _names(url: str, incomplete: str) -> list[str]:
    import sqlalchemy as sa

    from tuner.storage.url import parse_url

    parsed = parse_url(url)
    options: dict[str, Any] = {}
    if parsed.get_backend_name() == "sqlite":
        if not Path(parsed.database or "").is_file():  # SQLite would make it
            return []
    else:
        options |= {"connect_timeout": _CONNECT_SECONDS}
        options |= {"options": f"-c statement_timeout={_CONNECT_SECONDS}s"}
    name = sa.column("study_name", sa.String)
    query = sa.select(name).select_from(sa.table("studies")).order_by(name).limit(_MOST_NAMES)
    query = query.where(name.startswith(incomplete, autoescape=True))
    engine = sa.create_engine(parsed, connect_args=options, poolclass=sa.NullPool)
    with engine.connect() as connection:
        return list(connection.scalars(query))
