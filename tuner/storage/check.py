"""Looks at a database without changing it: reachable, right in version, how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from tuner.errors import StorageError
from tuner.storage.engine import closed_engine, explained
from tuner.storage.schema import SchemaState, schema_state
from tuner.storage.tables import (
    schema,
)
from tuner.storage.url import mask, parse_url, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageCheck:
    """What `tuner storage check` found."""

    url: str  #: without its password
    reachable: bool
    schema: SchemaState | None
    milliseconds: float | None  #: median of a round trip
    commit_milliseconds: float | None  #: median of a transaction that writes
    detail: str  #: what is wrong and what to do, or ""

    @property
    def is_right(self) -> bool:
        return self.reachable and self.schema == "current"


def check_storage(url: str) -> StorageCheck:
    """Looks at a database without changing it: reachable, right in version, how fast.

    Raises:
        StorageError: The URL is no usable one.
    """
    parsed = parse_url(url)
    try:
        with explained(parsed, by_check=True):
            return _look_at(parsed)
    except StorageError as error:
        return StorageCheck(
            url=mask(url),
            reachable=False,
            schema=None,
            milliseconds=None,
            commit_milliseconds=None,
            detail=str(error),
        )


def _look_at(parsed: sa.URL) -> StorageCheck:
    found: dict[str, Any] = {"milliseconds": None, "commit_milliseconds": None}
    state, detail = schema_state(parsed)
    if state == "current":
        with closed_engine(parsed, pooled=True) as engine, engine.connect() as connection:
            found["milliseconds"] = _median_milliseconds(
                lambda: connection.scalar(sa.select(schema.c.version))
            )
            connection.rollback()

            def commit() -> None:
                connection.execute(schema.update().values(version=schema.c.version))
                connection.commit()

            found["commit_milliseconds"] = _median_milliseconds(commit)
    return StorageCheck(
        url=shown(parsed),
        reachable=True,
        schema=state,
        detail=detail,
        **found,
    )


def _median_milliseconds(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(20):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1000
