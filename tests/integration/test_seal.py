"""docs/seal.md says what attempts to cheat the seal meet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from postgres import Postgres

from benchmarks import cheat_the_seal as cheat

REMEDY = "what an attempt meets has changed: .venv/bin/python benchmarks/cheat_the_seal.py"

Attempt = Callable[[cheat.Place], str]


@pytest.mark.parametrize(
    ("at", "what", "act"),
    [(at, *one) for at, one in enumerate(cheat.SQLITE, start=1)],
    ids=[act.__name__ for _, act in cheat.SQLITE],
)
def test_the_page_says_what_an_attempt_meets(at: int, what: str, act: Attempt) -> None:
    table = cheat.tables_of_the_page()[0].splitlines()
    assert cheat.row_of_the_table(at, what, cheat.attempt(act)) in table, REMEDY


def test_the_page_says_what_attempts_on_postgresql_meet(postgres: Postgres) -> None:
    table = cheat.tables_of_the_page()[1].splitlines()
    for at, (what, act) in enumerate(cheat.POSTGRES, start=1):
        met = cheat.attempt(act, postgres.database())
        assert cheat.row_of_the_table(at, what, met) in table, f"{REMEDY} --postgres"


def test_what_is_not_prevented_is_all_that_is_not_refused_found_or_counted() -> None:
    sqlite, postgres = cheat.tables_of_the_page()
    rows = [row for row in (sqlite + postgres).splitlines() if row[2:3].isdigit()]
    met = [row.rsplit(" | ", 1)[1] for row in rows]
    words = ("refused", "found", "counted", "noted", "nothing opened", "not prevented")
    assert all(one.startswith(words) for one in met)
    assert sum(one.startswith("not prevented") for one in met) == 3
