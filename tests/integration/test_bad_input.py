"""docs/bad-input.md says what the program says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bad_input


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    return bad_input.make_page(tmp_path_factory.mktemp("user"))


def test_each_mistake_is_told_and_costs_nothing(made: tuple[str, list[str]]) -> None:
    assert made[1] == []


def test_the_page_is_what_its_program_writes(made: tuple[str, list[str]]) -> None:
    page = bad_input.PAGE.read_text(encoding="utf-8")
    assert page.splitlines() == made[0].splitlines(), (
        "what the user sees has changed: .venv/bin/python benchmarks/bad_input.py"
    )


def test_a_traceback_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("what nobody thought of")

    monkeypatch.setattr("tuner.cli.main.app", fails)
    case = bad_input.Case(what="", arguments=("status",))
    bad_input.prepare_folder(tmp_path)
    assert bad_input.run(case, tmp_path) == (
        "none",
        "Traceback: RuntimeError: what nobody thought of",
    )
