"""A study's training and validation rows, wherever they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from finished_study import finished_study, storage_in
from folders import ROOT

from tuner.artifacts import development_path
from tuner.coordination import queue
from tuner.errors import StudyError
from tuner.results.kept import read_development
from tuner.search.development import find_development, study_development
from tuner.search.overlap import used_elsewhere
from tuner.search.tuned_study import TunedStudy
from tuner.storage.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    with storage_in(tmp_path) as opened:
        yield opened


@pytest.fixture
def tuned(storage: Storage, tmp_path: Path) -> TunedStudy:
    return finished_study(storage, tmp_path, trials=9)  # a part of which is to be queued


def file_of(tuned: TunedStudy) -> Path:
    return development_path(tuned.artifacts.folder.parent, tuned.record.development_sha256)


SPOILS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "damaged": lambda path: path.write_bytes(b"half a fi"),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS.keys())
@pytest.mark.parametrize("read", [study_development, read_development, queue.queue])
def test_whoever_reads_the_rows_takes_them_from_the_storage_where_the_file_is_not_whole(
    tuned: TunedStudy, spoil: Callable[[Path], object], read: Callable[[TunedStudy], object]
) -> None:
    path, sha256 = file_of(tuned), tuned.record.development_sha256
    content = path.read_bytes()
    spoil(path)
    remedy = rf"demo' are neither in {re.escape(str(path))} nor in the storage; `tuner launch "
    with pytest.raises(StudyError, match=remedy):
        read(tuned)
    tuned.storage.development.add(sha256, content)
    read(tuned)
    assert path.read_bytes() == content


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS.keys())
def test_a_report_compares_its_test_rows_with_rows_that_only_the_storage_has(
    tuned: TunedStudy, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    split = {"seed": 2, "validation": 0.2, "test": 0.2}
    other = finished_study(
        tuned.storage, tmp_path, name="other", data={"source": "rows.csv", "split": split}
    )
    content = file_of(other).read_bytes()
    queue.place(tuned.storage, tuned.record.spec, artifacts_root=tmp_path / "artifacts")
    (before,) = used_elsewhere(tuned)
    spoil(file_of(other))
    assert used_elsewhere(tuned) == ()
    tuned.storage.development.add(other.record.development_sha256, content)
    assert used_elsewhere(tuned) == (before,)


def test_a_file_that_is_whole_is_not_asked_for_in_the_storage(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned.storage.development, "read", lambda _: pytest.fail("asked"))
    root, sha256 = tuned.artifacts.folder.parent, tuned.record.development_sha256
    assert find_development(tuned.storage, root, sha256) == file_of(tuned)


def test_no_other_module_looks_for_development_files() -> None:
    """One place says where they are on a coordinator's machine, one on a worker's."""
    lookups = {
        str(path.relative_to(ROOT / "tuner"))
        for path in (ROOT / "tuner").rglob("*.py")
        if "development_path" in path.read_text()
    }
    assert lookups == {
        "artifacts.py",  # its name
        "cli/studies.py",  # tells that it stays
        "data/delivery.py",  # a worker's
        "data/prepare.py",  # makes it
        "search/development.py",
    }
