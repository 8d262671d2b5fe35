"""docs/awkward-inputs.md says what `tuner check` and `tuner predict` say."""

from __future__ import annotations

from pathlib import Path

from benchmarks import awkward_inputs


def test_the_page_is_what_its_program_writes(tmp_path: Path) -> None:
    page = awkward_inputs.PAGE.read_text(encoding="utf-8")
    made = awkward_inputs.make_page(tmp_path)
    assert page.splitlines() == made.splitlines(), (
        "what the user sees has changed: .venv/bin/python benchmarks/awkward_inputs.py"
    )
    assert "Traceback" not in made
    assert sum(map(len, awkward_inputs.SECTIONS.values())) >= 40
