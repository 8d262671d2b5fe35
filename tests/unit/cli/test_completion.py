"""What the shell is offered between two key strokes."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import make_study, small_spec
from typer.testing import CliRunner

from tuner.cli.main import app


def offered(line: str, **environment: str) -> list[str]:
    """What bash is told at the end of a line."""
    words = line.split(" ")
    asked = {"_TUNER_COMPLETE": "complete_bash", "COMP_WORDS": line}
    asked |= {"COMP_CWORD": str(len(words) - 1), **environment}
    done = CliRunner().invoke(app, [], prog_name="tuner", env=asked)
    assert (done.exit_code, done.stderr) == (0, "")
    return [line for line in done.stdout.splitlines() if line]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("storage")
    for name in ("small", "sma_", "other"):
        make_study(folder, small_spec(name=name)).storage.close()
    return f"sqlite:///{folder}/tuner.db"


@pytest.mark.parametrize("verb", ["status", "stop", "delete", "export", "report", "predict"])
def test_every_verb_that_takes_a_study_offers_their_names(verb: str, storage: str) -> None:
    assert offered(f"tuner {verb} sma", TUNER_STORAGE=storage) == ["sma_", "small"]


def test_the_storage_that_the_line_names_is_looked_at(storage: str) -> None:
    missing = "sqlite:///none.db"
    assert offered(f"tuner stop --storage {storage} o", TUNER_STORAGE=missing) == ["other"]


@pytest.mark.parametrize(
    "url",
    ["sqlite:///none.db", "sqlite:///no.txt", "no URL", "postgresql://nobody@127.0.0.1:1/none"],
)
def test_a_storage_that_cannot_be_read_offers_nothing_and_is_not_made(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("no.txt").write_text("no database")
    assert offered("tuner status ", TUNER_STORAGE=url) == []
    assert [path.name for path in tmp_path.iterdir()] == ["no.txt"]


def test_verbs_are_offered() -> None:
    assert "launch" in offered("tuner la")
