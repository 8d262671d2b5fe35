"""What `export` writes: study files that come back, wherever they and their data are taken."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import tomli_w
from finished_study import WINNER, finished_study, storage_in, write_rows

from tuner.data.prepare import Prepared, prepare
from tuner.data.sources import source_files
from tuner.data.synthetic import synthetic_sequences
from tuner.errors import StudyError, TunerError
from tuner.results.export import (
    Format,
    best_configs,
    config_of_trial,
    name_of_trial,
    render,
    require_writable_output,
    write_configs,
    write_trials,
)
from tuner.search.study import load
from tuner.search.tuned_study import TunedStudy
from tuner.spec.reader import load_spec, spec_from_document
from tuner.spec.spec import name_problem
from tuner.storage.storage import Storage


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def storage(project: Path) -> Iterator[Storage]:
    with storage_in(project) as opened:
        yield opened


@pytest.fixture(scope="module")
def tuned(storage: Storage, project: Path) -> TunedStudy:
    return finished_study(storage, project)


def prepared(file: Path, artifacts: Path) -> Prepared:
    """What `check` and `launch` make of an exported file."""
    spec = load_spec(file)
    return prepare(spec.data, folder=spec.folder, artifacts=artifacts, sha256=spec.data_sha256)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- names ---


@pytest.mark.parametrize(
    "study",
    [
        *("n" * length for length in (1, 72, 73, 80)),
        *("é" * length for length in (53, 80)),
        "日本語" * 17,
        "\N{DNA DOUBLE HELIX}" * 40,
        f"{'n' * 70}. - -",
        f"{'n' * 80}-synthetic",
        "n" * 300,
    ],
)
def test_an_export_of_an_export_of_any_name_has_a_name_that_launch_takes(study: str) -> None:
    for number in (0, 7, 999_999):
        name = name_of_trial(study, number)
        assert name_problem(name) is None
        assert name.endswith(f"-trial-{number}")
        assert name_problem(name_of_trial(name, 0)) is None


def test_names_that_are_cut_stay_apart_and_the_others_are_as_before() -> None:
    assert name_of_trial("n" * 72, 0) == f"{'n' * 72}-trial-0"
    cut = {name_of_trial("n" * 79 + letter, 0) for letter in "abc"}
    assert len(cut) == 3


def test_an_export_of_an_export_is_the_same_network_and_has_no_pruning(
    storage: Storage, project: Path
) -> None:
    tuned = finished_study(
        storage,
        project,
        name="again",
        training={"max_epochs": 9, "as_trial": 7},
        stop={},
        notify={},
    )
    for number in (0, WINNER):
        document = config_of_trial(tuned, number).document
        assert document["training"]["as_trial"] == 7
        assert not {"hyperband", "stop", "notify", "known"} & document.keys()
        assert spec_from_document(document).rungs == ()


# --- where the data is ---


def absolute(project: Path) -> str:
    return str(project / "data" / "rows.csv")


@pytest.mark.parametrize(
    "source", ["rows.csv", "../data/rows.csv", "./../data/rows.csv", "~/rows.csv", absolute]
)
@pytest.mark.parametrize("output", ["best", "studies", "runs/export/best", "link"])
def test_an_export_finds_its_data_also_when_its_project_moves_and_names_no_path_of_this_machine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str | Callable[[Path], str],
    output: str,
) -> None:
    project = tmp_path / "project"
    for folder in ("studies", "data", "elsewhere/deep"):
        (project / folder).mkdir(parents=True)
    (project / "link").symlink_to("elsewhere/deep")
    monkeypatch.setenv("HOME", str(project / "data"))
    write_rows(project / "data")
    write_rows(project / "studies")
    written = source if isinstance(source, str) else source(project)
    with storage_in(project) as storage:
        tuned = finished_study(
            storage, project / "studies", data={"source": written, "split": {"seed": 1}}
        )
        (file,) = write_configs(best_configs(tuned), project / output)
    assert str(tmp_path) not in file.read_text()
    for name in ("project", "moved"):
        if name == "moved":
            project.rename(tmp_path / "moved")
            monkeypatch.setenv("HOME", str(tmp_path / "moved" / "data"))
        found = prepared(tmp_path / name / output / file.name, tmp_path / "artifacts")
        assert found.warnings == ()
        assert found.development_sha256 == tuned.record.development_sha256


def written_pair(folder: Path, name: str) -> dict[str, str]:
    """Two FASTA files in a folder, as a study file names them."""
    sequences, labels = synthetic_sequences()
    named = {}
    for kind, label in (("soluble", 1), ("insoluble", 0)):
        chosen = [s for s, known in zip(sequences, labels, strict=True) if known == label][:200]
        text = "".join(f">{kind}-{at}\n{sequence}\n" for at, sequence in enumerate(chosen))
        (folder / f"{kind}.fasta").write_text(text)
        named[kind] = name.replace("rows.csv", f"{kind}.fasta")
    return named


@pytest.mark.parametrize("keys", ["source", "source.soluble and source.insoluble"])
@pytest.mark.parametrize(
    "written",
    ["rows.csv", "./rows.csv", "~/rows.csv", "../data/rows.csv", "/rows.csv", "~odd/rows.csv"],
)
def test_each_path_of_a_study_file_names_the_same_file_when_it_was_exported_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, keys: str
) -> None:
    studies, home = tmp_path / "studies", tmp_path / "home"
    there = {
        "~": home,
        "..": tmp_path / "data",
        "": tmp_path / "absolute",
        "~odd": studies / "~odd",
    }
    for folder in (studies, tmp_path / "cwd", *there.values()):
        folder.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    folder = there.get(written.split("/", maxsplit=1)[0], studies)
    name = str(folder / "rows.csv") if written.startswith("/") else written
    write_rows(folder)
    source = name if keys == "source" else written_pair(folder, name)
    study_file = studies / "mine.toml"
    study_file.write_text(tomli_w.dumps({"name": "mine", "trials": 1, "data": {"source": source}}))
    read = load_spec(study_file)
    files = source_files(read.data, read.folder)
    assert all(file.is_file() for file in files)
    assert {file.resolve().parent for file in files} == {folder.resolve()}
    with storage_in(tmp_path) as storage:
        tuned = finished_study(storage, studies, data={"source": source, "split": {"seed": 1}})
        for output in (Path("best"), Path("../elsewhere/deep"), tmp_path / "whole"):
            monkeypatch.chdir(tmp_path / "cwd")
            exported, *_ = (one.absolute() for one in write_configs(best_configs(tuned), output))
            for cwd in (tmp_path / "cwd", home, Path("/")):
                monkeypatch.chdir(cwd)
                again = load_spec(exported)
                found = source_files(again.data, again.folder)
                assert [one.resolve() for one in found] == [one.resolve() for one in files]


def test_a_colleague_puts_the_data_beside_the_study_file_under_any_name(
    tuned: TunedStudy, project: Path, tmp_path: Path
) -> None:
    (file,) = write_configs(best_configs(tuned), tmp_path / "mine")
    theirs = tmp_path / "theirs" / "project"
    theirs.mkdir(parents=True)
    shutil.copy(file, theirs)
    with pytest.raises(TunerError, match=r"rows\.csv: does not exist"):
        prepared(theirs / file.name, tmp_path)
    write_rows(theirs, rows=300)
    (theirs / "rows.csv").rename(theirs / "an-older.csv")
    (theirs / "folder.csv").mkdir()
    os.mkfifo(theirs / "pipe.csv")
    with pytest.raises(TunerError, match=r"rows\.csv: does not exist"):
        prepared(theirs / file.name, tmp_path)
    shutil.copy(project / "rows.csv", theirs / "from the lab.CSV")
    found = prepared(theirs / file.name, tmp_path)
    assert found.identity.split_id == tuned.record.data.split_id
    assert found.development_sha256 == tuned.record.development_sha256
    (warning,) = found.warnings
    assert "from the lab.CSV has the same sha256" in warning


def test_two_fasta_files_are_found_beside_the_study_file_whatever_their_names(
    storage: Storage, tmp_path: Path
) -> None:
    sequences, labels = synthetic_sequences()
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir()
    theirs.mkdir()
    for label, name in ((1, "soluble"), (0, "insoluble")):
        chosen = [s for s, known in zip(sequences, labels, strict=True) if known == label][:150]
        text = "".join(f">{name}-{at}\n{sequence}\n" for at, sequence in enumerate(chosen))
        (mine / f"{name}.fasta").write_text(text)
        (theirs / f"{'a' if label == 0 else 'b'}.fasta").write_text(text)
    (theirs / "c.fasta").write_text(">1\nARND\n")
    pair = {"soluble": "soluble.fasta", "insoluble": "insoluble.fasta"}
    source = {"source": pair, "split": {"seed": 1}}
    tuned = finished_study(storage, mine, name="pair", data=source)
    (exported,) = best_configs(tuned)
    assert exported.document["data"]["source"] == pair
    (file,) = write_configs((exported,), theirs)
    named = load_spec(file).data.source
    assert cast("Any", named).model_dump() == {
        "soluble": "../mine/soluble.fasta", "insoluble": "../mine/insoluble.fasta",
    }  # fmt: skip
    assert prepared(file, tmp_path).warnings == ()
    shutil.rmtree(mine)
    assert prepared(file, tmp_path).development_sha256 == tuned.record.development_sha256


def test_other_data_than_a_configuration_was_found_on_is_warned_of(
    tuned: TunedStudy, tmp_path: Path
) -> None:
    (file,) = write_configs(best_configs(tuned), tmp_path)
    spec = load_spec(file)
    write_rows(tmp_path, rows=300)
    settings = spec.data.model_copy(update={"source": "rows.csv"})
    found = prepare(settings, folder=tmp_path, artifacts=tmp_path, sha256=spec.data_sha256)
    (warning,) = found.warnings
    assert "other data than the configuration was found on" in warning


@pytest.mark.parametrize("provenance", [{}, {"data": "rows.csv"}, {"data": {"sha256": 7}}])
def test_a_provenance_that_tells_no_hash_is_let_be(
    tuned: TunedStudy, provenance: dict[str, Any]
) -> None:
    spec = spec_from_document({**best_configs(tuned)[0].document, "provenance": provenance})
    assert spec.data_sha256 is None


def test_a_download_names_its_data_as_if_it_lay_beside_it(tuned: TunedStudy) -> None:
    (exported,) = best_configs(tuned)
    assert exported.document["data"]["source"] == "rows.csv"
    text = render(exported, "toml")
    assert 'source = "rows.csv"' in text
    assert text.startswith("#:schema ")


def test_an_export_can_be_told_where_the_data_is_now(
    tuned: TunedStudy, project: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "data" / "copy.csv"
    copy.parent.mkdir()
    shutil.copy(project / "rows.csv", copy)
    for given in (copy, copy.parent):
        (exported,) = best_configs(tuned, data=given)
        (file,) = write_configs((exported,), tmp_path / "best")
        assert load_spec(file).data.source == "../data/copy.csv"
    copy.write_text("sequence,label\nARND,1\n")
    for given in (copy, copy.parent, tmp_path / "missing", tmp_path / "missing.csv"):
        with pytest.raises(StudyError, match="--data"):
            config_of_trial(tuned, 0, data=given)


# --- where it goes ---


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("best.toml", "toml"), ("best.json", "json"), ("best.yaml", "yaml"), ("best.yml", "yaml"),
        ("best.YAML", "yaml"), ("v1.2.JSON", "json"),
    ],
)  # fmt: skip
def test_the_suffix_says_the_format_and_another_is_refused(
    tuned: TunedStudy, tmp_path: Path, name: str, form: Format
) -> None:
    configs, output = best_configs(tuned), tmp_path / name
    for given in (None, form):
        (file,) = write_configs(configs, output, given)
        assert file == output
        assert prepared(file, tmp_path).warnings == ()
    before = output.read_bytes()
    others: set[Format] = {"toml", "json", "yaml"}
    for other in others - {form}:
        with pytest.raises(StudyError, match=f"--format asks for {other}"):
            write_configs(configs, output, other)
    assert output.read_bytes() == before


@pytest.mark.parametrize("form", ["toml", "json", "yaml"])
def test_a_folder_takes_any_format_also_one_that_is_called_like_a_file(
    tuned: TunedStudy, tmp_path: Path, form: Format
) -> None:
    (tmp_path / "best.toml").mkdir()
    files = write_configs(best_configs(tuned, 2), tmp_path / "best.toml", form)
    assert [file.suffix for file in files] == [f".{form}"] * 2
    for file in files:
        assert prepared(file, tmp_path).warnings == ()


def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.toml")
    return folder / "pipe.toml"


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("in the way")
    return folder / "file" / "best.toml"


def where_nobody_writes(folder: Path) -> Path:
    return Path("/proc/tuner/best.toml")


def in_a_folder_that_takes_no_file(folder: Path) -> Path:
    return Path("/proc/best.toml")


def a_name_that_is_too_long(folder: Path) -> Path:
    return folder / f"{'n' * 300}.toml"


@pytest.mark.parametrize(
    "where",
    [
        a_pipe,
        below_a_file,
        where_nobody_writes,
        in_a_folder_that_takes_no_file,
        a_name_that_is_too_long,
    ],
)
def test_a_place_that_cannot_be_written_is_told_with_its_path(
    tuned: TunedStudy, tmp_path: Path, where: Callable[[Path], Path]
) -> None:
    output = where(tmp_path)
    told = rf"{output.name}: cannot be written .*name another"
    with pytest.raises(TunerError, match=told):
        write_configs(best_configs(tuned), output)
    with pytest.raises(TunerError, match=told):
        write_trials(tuned, output)
    with pytest.raises(TunerError, match=told):
        require_writable_output(output)
    assert not [path for path in tmp_path.iterdir() if path.name not in ("pipe.toml", "file")]


def test_a_place_that_can_be_written_is_found_out_without_leaving_a_file(tmp_path: Path) -> None:
    for output in (tmp_path / "folder", tmp_path / "best.yaml"):
        require_writable_output(output)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_an_export_never_replaces_the_data_of_its_study(
    tuned: TunedStudy, project: Path, tmp_path: Path
) -> None:
    before = sha256(project / "rows.csv")
    (tmp_path / "link.csv").symlink_to(project / "rows.csv")
    for path in (project / "rows.csv", tmp_path / "link.csv"):
        with pytest.raises(TunerError, match="it is the data of the study"):
            write_trials(tuned, path)
    assert sha256(project / "rows.csv") == before


def test_a_study_whose_data_is_gone_is_exported_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab").mkdir()
    with storage_in(tmp_path) as storage:
        made = finished_study(storage, tmp_path / "lab")
        (tmp_path / "lab" / "rows.csv").unlink()
        tuned = load(storage, made.name, artifacts_root=tmp_path / "lab" / "artifacts")
        (file,) = write_configs(best_configs(tuned), tmp_path / "best")
    assert load_spec(file).data.source == "rows.csv"
    write_rows(tmp_path / "best")
    assert prepared(file, tmp_path).development_sha256 == made.record.development_sha256
