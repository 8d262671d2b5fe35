"""Studies that earlier versions made: `tests/data/README.md` says how. Every verb takes them."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from folders import ROOT
from optuna.trial import FrozenTrial
from typer.testing import CliRunner, Result

from tuner.cli.main import app
from tuner.errors import TunerError
from tuner.search.attributes import RECORD_KEY, RESUMED_FROM_KEY
from tuner.search.formats import FORMAT
from tuner.search.study import list_names, load
from tuner.spec.reader import load_spec
from tuner.storage.storage import Storage

MADE = ROOT / "tests" / "data"
#: The last format has no folder before its last commit is known.
FOLDERS = sorted(path.name for path in MADE.glob("format*"))
NAMES = ["finished", "reported", "stopped"]


@pytest.fixture(params=FOLDERS)
def lab(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the studies of one format, upgraded, in a folder that is the current one."""
    lab = tmp_path / "lab"
    shutil.copytree(MADE / request.param, lab)
    monkeypatch.chdir(lab)
    upgraded = CliRunner().invoke(app, ["storage", "init", "--storage", WHERE[1]])
    assert upgraded.exit_code == 0, upgraded.exception
    return lab


WHERE = ("--storage", "sqlite:///tuner.db", "--artifacts", "artifacts")


def verb(*words: str) -> Result:
    """A verb in this process: one that trains nothing."""
    done = CliRunner().invoke(app, [*words, *WHERE])
    assert isinstance(done.exception, SystemExit | TunerError | None), done.exception
    return done


def verb_that_computes(lab: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tuner", *words, *WHERE],
        cwd=lab,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def stored(lab: Path) -> dict[str, dict[str, Any]]:
    """The records as they are in the database, by the study's name."""
    query = (
        "SELECT study_name, value_json FROM study_user_attributes "
        "JOIN studies USING (study_id) WHERE key = ?"
    )
    at = f"file:{lab / 'tuner.db'}?mode=ro"
    with closing(sqlite3.connect(at, uri=True)) as database:
        return {name: json.loads(text) for name, text in database.execute(query, [RECORD_KEY])}


def trials(lab: Path, name: str) -> list[FrozenTrial]:
    with Storage(f"sqlite:///{lab}/tuner.db") as storage:
        return load(storage, name, artifacts_root=lab / "artifacts").trials()


def test_each_earlier_format_has_studies_to_test() -> None:
    assert set(FOLDERS) >= {f"format{number}" for number in range(1, FORMAT)}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_of_its_format_and_of_no_machine(folder: str) -> None:
    records = stored(MADE / folder)
    assert sorted(records) == NAMES
    assert {f"format{record.get('format', 1)}" for record in records.values()} == {folder}
    assert {record["spec_folder"] for record in records.values()} == {"/tmp/study"}


def test_an_upgrade_of_the_tables_leaves_the_records(lab: Path) -> None:
    records = stored(lab)
    (number,) = {record.get("format", 1) for record in records.values()}
    assert records == stored(MADE / f"format{number}")


def test_status_shows_the_studies(lab: Path) -> None:
    found = {one["study"]: one for one in json.loads(verb("status", "--json").stdout)}
    assert {name: one["state"] for name, one in found.items()} == dict(
        zip(NAMES, ["finished", "reported", "stopped"], strict=True)
    )
    assert found["finished"]["trials"]["COMPLETE"] == found["finished"]["budget"] == 3
    assert found["stopped"]["trials"]["RUNNING"] == 1
    shown = verb("status", "finished")
    assert shown.exit_code == 0
    assert "validation loss 0." in shown.stdout


@pytest.mark.parametrize("name", ["finished", "reported"])
def test_a_launch_finds_the_finished_study_and_leaves_its_record(lab: Path, name: str) -> None:
    before = stored(lab)
    done = verb("launch", f"{name}.toml", "--json")
    assert done.exit_code == 0, done.stderr
    after = json.loads(done.stdout)
    assert (after["study"], after["state"]) == (name, name)
    assert list(stored(lab)) == list(before)
    assert stored(lab)[name] == {**before[name], "spec_folder": str(lab)}


def test_a_launch_of_another_study_file_is_refused_with_the_differing_key(lab: Path) -> None:
    before = stored(lab)
    done = verb("launch", "finished.toml", "--set", "training.max_epochs=9")
    assert done.exit_code == 1
    assert "what differs: training.max_epochs (3, now 9)." in str(done.exception)
    assert stored(lab) == before


def test_a_launch_resumes_the_stopped_study_from_its_checkpoint(lab: Path) -> None:
    whole, halved = trials(lab, "stopped")
    assert 3 <= len(halved.intermediate_values) < 20
    after = json.loads(
        verb_that_computes(lab, "launch", "stopped.toml", "--workers", "1", "--json")
    )
    assert (after["state"], after["trials"]["COMPLETE"]) == ("finished", 2)
    same, resumed = trials(lab, "stopped")
    assert (same.value, same.params) == (whole.value, whole.params)
    assert resumed.params == halved.params
    assert resumed.user_attrs[RESUMED_FROM_KEY] == max(halved.intermediate_values)
    assert len(resumed.intermediate_values) == 20
    assert resumed.intermediate_values.items() >= halved.intermediate_values.items()


def test_a_finished_study_is_exported_with_the_hash_that_it_was_made_with(lab: Path) -> None:
    done = verb("export", "finished", "--top", "2", "-o", "best")
    assert done.exit_code == 0, done.stderr
    files = sorted((lab / "best").iterdir())
    assert len(files) == 2
    spec = load_spec(files[0])
    assert spec.training.max_epochs == 3
    assert spec.provenance is not None
    assert spec.provenance["spec_hash"] == stored(lab)["finished"]["spec_hash"]
    done = verb("export", "finished", "--trials", "trials.csv")
    assert done.exit_code == 0, done.stderr
    assert len((lab / "trials.csv").read_text().splitlines()) == 1 + 3


def test_a_finished_study_becomes_a_bundle(lab: Path) -> None:
    exported = json.loads(verb_that_computes(lab, "export", "finished", "--model", "--json"))
    (bundle,) = exported["bundles"]
    assert bundle["spec_hash"] == stored(lab)["finished"]["spec_hash"]
    assert bundle["validation"]["loss"] == pytest.approx(
        exported["configs"][0]["validation_loss"], abs=1e-4
    )


def test_a_finished_study_is_reported_and_a_reported_one_is_not_again(lab: Path) -> None:
    # The two studies are of one split, and a look at it is in the ledger of the earlier version.
    again = ("--no-baselines", "--again", "--reason", "another search")
    written = json.loads(verb_that_computes(lab, "report", "finished", *again, "--json"))
    assert written["ledger"]["look"] == 2
    assert written["spec_hash"] == stored(lab)["finished"]["spec_hash"]
    assert written["test"]["n"] == 48
    again = verb("report", "reported")
    assert again.exit_code == 0, again.stderr
    with Storage(f"sqlite:///{lab}/tuner.db") as storage:
        opened = [entry.study for entry in storage.ledger.entries()]
    assert opened == ["reported", "finished"]
    more = verb("launch", "reported.toml", "--trials", "5")
    assert "opened by its report, so it takes no more trials" in str(more.exception)


def test_the_studies_are_deleted_with_their_files(lab: Path) -> None:
    for name in NAMES:
        assert verb("delete", name, "--yes").exit_code == 0
    with Storage(f"sqlite:///{lab}/tuner.db") as storage:
        assert list_names(storage) == []
        assert [entry.study for entry in storage.ledger.entries()] == ["reported"]
    left = [path.name for path in (lab / "artifacts").iterdir()]
    assert sorted(left) == ["dashboard", "development"]
    assert list((lab / "artifacts" / "dashboard").iterdir()) == []
