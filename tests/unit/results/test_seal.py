"""Who looked at a test split before, also where the ledger at hand does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
from finished_study import finished_study, predict, storage_in

from tuner.errors import StudyError, TunerError, ordinal
from tuner.results import seal
from tuner.results.report import Report, write_report
from tuner.search.tuned_study import TunedStudy
from tuner.storage.storage import Storage


def reported(tuned: TunedStudy, again: str | None = None) -> Report:
    root = tuned.artifacts.folder.parent
    return write_report(
        tuned.storage, tuned.name, artifacts_root=root, evaluate=predict, again=again
    )


def test_openings_that_only_the_artifacts_know_count(tmp_path: Path) -> None:
    with storage_in(tmp_path) as first:
        reported(finished_study(first, tmp_path))
    with Storage(f"sqlite:///{tmp_path}/another.db") as storage:
        tuned = finished_study(storage, tmp_path, name="second")
        with pytest.raises(StudyError, match=r"entry 1 \(not in this ledger, but kept"):
            reported(tuned)
        assert storage.ledger.entries() == ()
        written = reported(tuned, again="a new storage")
        assert written.document["ledger"]["look"] == 2
        (one,) = written.document["ledger"]["kept_elsewhere"]
        assert (one["study"], one["rows"]) == ("demo", tuned.record.data.test_rows)
        warning = "1 opening of this test split is not in this ledger, but kept with the artifacts"
        assert warning in written.summary()
        assert warning in written.html_file.read_text(encoding="utf-8")
        found = seal.verify(storage, tmp_path / "artifacts")
        assert found.valid
        assert "another ledger" in found.notes[0]


def test_a_first_look_needs_no_reason_and_takes_none(tmp_path: Path) -> None:
    with storage_in(tmp_path) as storage:
        tuned = finished_study(storage, tmp_path)
        with pytest.raises(StudyError, match="never opened, so this is the first look"):
            reported(tuned, again="why not")
        assert storage.ledger.entries() == ()


def test_each_report_holds_the_head_and_is_compared(tmp_path: Path) -> None:
    with storage_in(tmp_path) as storage:
        written = reported(finished_study(storage, tmp_path))
        head = storage.ledger.chain().head
        for file in (written.json_file, written.html_file):
            found = [one.head for one in seal.kept_heads(tmp_path / "none", [file])]
            assert found == [head]
        with pytest.raises(TunerError, match=r"rows\.csv: no report with the head of a ledger"):
            seal.verify(storage, tmp_path / "artifacts", [tmp_path / "rows.csv"])


def test_ordinals() -> None:
    numbers = {1: "1st", 2: "2nd", 3: "3rd", 4: "4th", 11: "11th", 12: "12th", 21: "21st"}
    assert {number: ordinal(number) for number in numbers} == numbers
