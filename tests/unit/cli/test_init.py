"""The first study file of a user: shipped ones, copied."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest
from folders import STUDIES
from typer.testing import CliRunner

from tuner.cli.main import app
from tuner.errors import TunerError
from tuner.spec.reader import load_spec


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["init", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_without_data_the_shipped_study_files_are_copied_and_none_is_replaced() -> None:
    mine = Path("studies/quickstart.toml")
    mine.parent.mkdir()
    mine.write_text("mine")
    assert f"{mine} exists, and is kept" in init()
    assert mine.read_text() == "mine"
    for shipped in STUDIES.glob("*.toml"):
        copied = Path("studies") / shipped.name
        assert copied == mine or copied.read_bytes() == shipped.read_bytes()


def test_the_first_line_of_a_copied_study_file_names_its_schema() -> None:
    init("-o", "here")
    for path in Path("here").glob("*.toml"):
        directive, name = path.read_text().splitlines()[0].split()
        assert directive == "#:schema"
        jsonschema.validate(
            tomllib.loads(path.read_text()), json.loads((Path("here") / name).read_text())
        )
        load_spec(path)


def test_a_folder_that_cannot_be_made_is_named() -> None:
    Path("file").touch()
    with pytest.raises(TunerError, match=r"file/here.*name another folder with -o"):
        init("-o", "file/here")
