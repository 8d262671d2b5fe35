"""The door to the test split: the ledger first, and nothing wasted that could be foreseen."""

from __future__ import annotations

import dataclasses
import getpass
import shutil
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from finished_study import WINNER, finished_study, storage_in, write_rows

from tuner.data import prepare as data
from tuner.data import solubility
from tuner.data.development import load_development
from tuner.data.identity import DataIdentity
from tuner.data.prepare import HeldOutRows
from tuner.data.synthetic import synthetic_sequences
from tuner.errors import DataError, StudyError
from tuner.results import heldout
from tuner.search import study
from tuner.search.data_source import source_files
from tuner.search.tuned_study import TunedStudy
from tuner.storage.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    with storage_in(tmp_path) as opened:
        yield opened


@pytest.fixture
def tuned(storage: Storage, tmp_path: Path) -> TunedStudy:
    return finished_study(storage, tmp_path)


def open_split(tuned: TunedStudy) -> tuple[int, HeldOutRows]:
    return heldout.open_test_split(tuned, trial=tuned.ranked()[0], config_hash="c" * 64)


def with_data(tuned: TunedStudy, *, synthetic: bool, **settings: Any) -> TunedStudy:
    """The study as if it had been made from other data."""
    record = tuned.record
    spec = record.spec.model_copy(update={"data": record.spec.data.model_copy(update=settings)})
    identity = dataclasses.replace(record.data, synthetic=synthetic)
    return dataclasses.replace(tuned, record=dataclasses.replace(record, spec=spec, data=identity))


def unavailable(*_: object) -> NoReturn:
    raise solubility.UnavailableError("no network")


def test_the_ledger_row_stands_before_a_test_row_is_read(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def read(*_: object, **__: object) -> NoReturn:
        # As another process sees it: committed, not merely begun.
        with Storage(tuned.storage.url) as other:
            seen.extend(other.ledger.entries())
        raise RuntimeError("the machine went down here")

    monkeypatch.setattr(heldout, "read_held_out", read)
    before = datetime.now(UTC).replace(microsecond=0)
    with pytest.raises(RuntimeError, match="went down"):
        open_split(tuned)
    (entry,) = seen
    assert tuned.storage.ledger.entries() == (entry,)
    assert before <= datetime.fromisoformat(entry.opened_at) <= datetime.now(UTC)
    assert entry.opened_by == f"{getpass.getuser()}@{socket.gethostname()}"
    assert (entry.study, entry.study_key, entry.trial) == ("demo", tuned.key, WINNER)
    assert entry.config_hash == "c" * 64
    assert entry.spec_hash == tuned.record.spec.spec_hash
    assert entry.split_id == tuned.record.data.split_id
    assert entry.report is None


def test_the_rows_are_those_of_the_studys_test_split(tuned: TunedStudy) -> None:
    entry, rows = open_split(tuned)
    assert entry == tuned.storage.ledger.entries()[0].id
    assert len(rows.labels) == len(rows.tokens) == tuned.record.data.test_rows
    development = load_development(
        tuned.artifacts.folder.parent / "development" / f"{tuned.record.development_sha256}.npz"
    )
    held_out = {row.tobytes() for row in rows.tokens}
    for tokens in (development.training_tokens, development.validation_tokens):
        assert not held_out & {row.tobytes() for row in np.asarray(tokens)}


def test_every_opening_has_a_row_of_its_own(tuned: TunedStudy) -> None:
    entries = [open_split(tuned)[0] for _ in range(2)]
    assert [row.id for row in tuned.storage.ledger.entries()] == entries == [1, 2]


@pytest.mark.parametrize("field", ["sha256", "split_id"])
def test_rows_of_another_identity_are_refused_and_the_opening_stays(
    tuned: TunedStudy, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = data.read_held_out

    def other_rows(*args: Any, **kwargs: Any) -> tuple[DataIdentity, HeldOutRows]:
        identity, rows = read(*args, **kwargs)
        return dataclasses.replace(identity, **{field: "f" * 64}), rows

    monkeypatch.setattr(heldout, "read_held_out", other_rows)
    with pytest.raises(StudyError, match=f"{field} is ffffffffffff, but study 'demo' was made"):
        open_split(tuned)
    assert len(tuned.storage.ledger.entries()) == 1


def test_a_source_that_changed_or_is_gone_is_found_before_anything_is_opened(
    tuned: TunedStudy, tmp_path: Path
) -> None:
    heldout.check_source(tuned)
    write_rows(tmp_path, rows=401)
    with pytest.raises(StudyError, match=r"rows\.csv: sha256 is .*: the data changed since"):
        heldout.check_source(tuned)
    (tmp_path / "rows.csv").unlink()
    with pytest.raises(StudyError, match=r"rows\.csv: No such file.*Nothing was opened"):
        heldout.check_source(tuned)
    (tmp_path / "rows.csv").mkdir()
    with pytest.raises(StudyError, match=r"rows\.csv: it is not a regular file"):
        heldout.check_source(tuned)
    assert tuned.storage.ledger.entries() == ()


def test_two_fasta_files_are_checked_together(storage: Storage, tmp_path: Path) -> None:
    sequences, labels = synthetic_sequences()
    for label, name in ((1, "soluble"), (0, "insoluble")):
        chosen = [s for s, known in zip(sequences, labels, strict=True) if known == label][:150]
        text = "".join(f">{at}\n{sequence}\n" for at, sequence in enumerate(chosen))
        (tmp_path / f"{name}.fasta").write_text(text)
    pair = {"soluble": "soluble.fasta", "insoluble": "insoluble.fasta"}
    tuned = finished_study(storage, tmp_path, data={"source": pair, "split": {"seed": 1}})
    heldout.check_source(tuned)
    assert len(open_split(tuned)[1].labels) == tuned.record.data.test_rows
    with (tmp_path / "insoluble.fasta").open("a") as file:
        file.write(">one more\nARND\n")
    with pytest.raises(StudyError, match="the data changed since"):
        heldout.check_source(tuned)


def test_a_study_that_fell_back_to_synthetic_data_never_looks_for_the_real(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as offline:
        offline.setattr(solubility, "locate", lambda *_: None)
        offline.setattr(solubility, "download_to", unavailable)
        source = {"source": "solubility", "fallback": "synthetic", "split": {"seed": 1}}
        tuned = finished_study(storage, tmp_path, data=source)
    assert (tuned.name, tuned.record.data.synthetic) == ("demo-synthetic", True)

    # Meanwhile the real data came to this machine.
    def real_data(*_: object) -> NoReturn:
        raise AssertionError("it was looked for")

    monkeypatch.setattr(solubility, "locate", real_data)
    monkeypatch.setattr(solubility, "download_to", real_data)
    heldout.check_source(tuned)
    assert len(open_split(tuned)[1].labels) == 600


def test_a_study_of_real_data_never_falls_back(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = with_data(tuned, synthetic=False, source="solubility", fallback="synthetic")
    monkeypatch.setattr(solubility, "locate", lambda *_: None)
    monkeypatch.setattr(solubility, "download_to", unavailable)
    with pytest.raises(DataError, match="is not here"):
        heldout.check_source(real)
    assert tuned.storage.ledger.entries() == ()
    with pytest.raises(DataError, match="is not here"):
        open_split(real)


def test_the_data_set_is_downloaded_before_the_ledger_is_written(
    tuned: TunedStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = with_data(tuned, synthetic=False, source="solubility")
    downloads: list[Path] = []
    monkeypatch.setattr(solubility, "locate", lambda *_: None)
    monkeypatch.setattr(solubility, "download_to", lambda: downloads.append(tmp_path) or tmp_path)
    heldout.check_source(real)
    assert downloads == [tmp_path]


def test_an_opener_without_a_name_is_still_written_down(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nameless() -> NoReturn:
        raise OSError("No username set in the environment")

    monkeypatch.setattr(getpass, "getuser", nameless)
    open_split(tuned)
    assert tuned.storage.ledger.entries()[0].opened_by.startswith("uid ")


# --- data that is elsewhere now ---


def moved(tuned: TunedStudy, root: Path) -> TunedStudy:
    return study.load(tuned.storage, tuned.name, artifacts_root=root)


@pytest.mark.parametrize("source", ["rows.csv", "../data/rows.csv", "data/rows.csv"])
@pytest.mark.parametrize("stand_in", ["the project", "elsewhere", "the project, alone"])
def test_a_project_that_was_moved_is_opened_where_it_is_now(
    storage: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    stand_in: str,
) -> None:
    project, now = tmp_path / "a" / "project", tmp_path / "b" / "renamed"
    folder = project / "studies"
    folder.mkdir(parents=True)
    (folder / source).parent.mkdir(exist_ok=True)
    write_rows((folder / source).parent)
    tuned = finished_study(storage, folder, data={"source": source, "split": {"seed": 1}})
    now.parent.mkdir()
    project.rename(now)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere" if stand_in == "elsewhere" else now)
    artifacts = now / "studies/artifacts"
    if stand_in == "the project":
        artifacts = Path("studies/artifacts")
    if stand_in == "the project, alone":  # its artifacts are on another disk
        artifacts = artifacts.rename(tmp_path / "elsewhere" / "artifacts")
    tuned = moved(tuned, artifacts)
    settings = heldout.check_source(tuned)
    _, rows = heldout.open_test_split(
        tuned, trial=tuned.ranked()[0], config_hash="c" * 64, settings=settings
    )
    assert len(rows.labels) == tuned.record.data.test_rows


def test_a_pair_of_which_one_file_is_left_is_looked_for_as_a_pair(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, now = tmp_path / "old", tmp_path / "now"
    old.mkdir()
    pair = {"soluble": "soluble.fasta", "insoluble": "insoluble.fasta"}
    sequences, labels = synthetic_sequences()
    for name, wanted in zip(pair.values(), (1, 0), strict=True):
        found = [one for one, label in zip(sequences, labels, strict=True) if label == wanted]
        lines = [f">{number}\n{one}\n" for number, one in enumerate(found[:200])]
        (old / name).write_text("".join(lines))
    tuned = finished_study(storage, old, data={"source": pair, "split": {"seed": 1}})
    shutil.copytree(old, now)
    monkeypatch.chdir(now)
    assert source_files(tuned) == tuple(old / name for name in pair.values())
    (old / "insoluble.fasta").unlink()
    assert source_files(tuned) == tuple(now / name for name in pair.values())


def test_other_data_of_the_same_name_is_not_taken_for_that_which_was_moved(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    tuned = finished_study(storage, tmp_path / "old")
    (tmp_path / "old" / "rows.csv").unlink()
    write_rows(tmp_path, rows=399)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match=r"old/rows\.csv: No such file.*--data"):
        heldout.check_source(tuned)


def test_the_data_can_be_named_as_a_file_or_as_its_folder(
    tuned: TunedStudy, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "rows.csv").rename(there / "old-rows.csv")
    for given in (there, there / "old-rows.csv"):
        settings = heldout.check_source(tuned, given)
        assert settings.source == str(there / "old-rows.csv")
    (there / "old-rows.txt").write_bytes((there / "old-rows.csv").read_bytes())
    with pytest.raises(StudyError, match=r"old-rows\.txt: .* name a \.csv file, or the folder"):
        heldout.check_source(tuned, there / "old-rows.txt")
    write_rows(there, rows=399)
    for given, told in (
        (there / "rows.csv", "is not there; it is rows.csv, with sha256"),
        (tmp_path / "artifacts", "is not there"),
        (there / "missing.csv", "No such file"),
    ):
        with pytest.raises(StudyError, match=told):
            heldout.check_source(tuned, given)
    assert tuned.storage.ledger.entries() == ()


def test_data_that_was_generated_cannot_be_named(tuned: TunedStudy, tmp_path: Path) -> None:
    synthetic = with_data(tuned, synthetic=True, source="synthetic")
    with pytest.raises(StudyError, match="is synthetic; leave it out"):
        heldout.check_source(synthetic, tmp_path)
