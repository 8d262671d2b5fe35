"""The first study file of a user: for a file of one's own, or a shipped one."""

from __future__ import annotations

import gzip
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from fakes import small_spec
from folders import STUDIES
from typer.testing import CliRunner

from tuner.cli.main import app
from tuner.cluster import timing
from tuner.data.prepare import prepare
from tuner.data.synthetic import synthetic_sequences
from tuner.errors import SetupError, TunerError
from tuner.search.proposal import space_for
from tuner.spec.architecture import misfits
from tuner.spec.bounds import sampled_configurations, tightest
from tuner.spec.precision import multiply_adds
from tuner.spec.reader import load_spec
from tuner.spec.spec import StudySpec
from tuner.spec.tables import read_space
from tuner.train import TrainingTime

Rows = Sequence[tuple[str, int]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> TrainingTime:
    """What `init` measures: with two workers, trials of 10 s to start and 2 s an epoch."""
    time = TrainingTime(epoch_seconds=2.0, start_seconds=10.0, networks=3, rows=256, workers=2)
    monkeypatch.setattr(timing, "measure", lambda *_, **__: time)
    return time


def init(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["init", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def checked(path: str) -> StudySpec:
    """The study of a file that `tuner check` accepts."""
    spec = load_spec(Path(path))
    prepare(spec.data, folder=spec.folder, artifacts=Path("artifacts"))
    return spec


def validate(path: Path) -> None:
    """Validates a study file by the schema that its first line names."""
    directive, name = path.read_text().splitlines()[0].split()
    assert directive == "#:schema"
    schema = json.loads((path.parent / name).read_text())
    jsonschema.validate(tomllib.loads(path.read_text()), schema)


def some_rows(count: int = 200) -> list[tuple[str, int]]:
    """Sequences of 19 to 198 residues, half of them soluble."""
    sequences, _ = synthetic_sequences()
    return [(sequence, number % 2) for number, sequence in enumerate(sequences[:count])]


def write_table(path: str, rows: Rows, header: str = "sid,fasta,solubility,partition") -> None:
    comma = "\t" if ".tsv" in path else ","
    lines = [header.replace(",", comma)]
    lines += [
        comma.join((f"p{number}", sequence, str(label), str(number % 4)))
        for number, (sequence, label) in enumerate(rows)
    ]
    text = "\n".join(lines) + "\n"
    Path(path).write_bytes(gzip.compress(text.encode()) if path.endswith(".gz") else text.encode())


# --- the shipped study files ---


def test_without_data_the_shipped_study_files_are_copied_and_none_is_replaced() -> None:
    mine = Path("studies/quickstart.toml")
    mine.parent.mkdir()
    mine.write_text("mine")
    assert f"{mine} exists, and is kept" in init()
    assert mine.read_text() == "mine"
    for shipped in STUDIES.glob("*.toml"):
        copied = Path("studies") / shipped.name
        assert copied == mine or copied.read_bytes() == shipped.read_bytes()


def test_a_study_file_names_its_schema() -> None:
    init()
    load_spec(Path("studies/quickstart.toml"))
    validate(Path("studies/quickstart.toml"))
    write_table("mine.csv", some_rows())
    init("mine.csv")
    validate(Path("mine.toml"))


def test_a_folder_that_cannot_be_made_is_named() -> None:
    Path("file").touch()
    with pytest.raises(TunerError, match=r"file/here.*name another folder with -o"):
        init("-o", "file/here")


# --- a study file for a source ---


@pytest.mark.parametrize("file", ["mine.csv", "mine.tsv", "mine.csv.gz"])
def test_a_table_as_it_comes_gets_a_study_file_that_check_accepts(file: str) -> None:
    write_table(file, some_rows())
    assert "mine.toml: 200 sequences, 50.0 % soluble, max_length" in init(file)
    spec = checked("mine.toml")
    assert (spec.name, spec.data.source) == ("mine", file)
    assert (spec.data.columns.sequence, spec.data.columns.label) == ("fasta", "solubility")
    assert (spec.data.truncate, spec.data.unknown, spec.data.conflicts) == (None, "error", "error")
    assert spec.training.class_weights == "none"
    assert "# Not read: sid, partition." in Path("mine.toml").read_text()


def test_a_column_that_may_name_a_split_is_offered_in_a_comment() -> None:
    write_table("mine.csv", [(one, at // 4 % 2) for at, (one, _) in enumerate(some_rows())])
    init("mine.csv")
    text = Path("mine.toml").read_text()
    offered = next(line for line in text.splitlines() if line.startswith("# split = "))
    assert 'validation = ["2"], test = ["3"]' in offered
    random = next(line for line in text.splitlines() if line.startswith("split = "))
    Path("mine.toml").write_text(text.replace(random, offered.removeprefix("# ")))
    assert checked("mine.toml").data.split.column == "partition"


def test_two_fasta_files_and_an_npz_file_are_sources_too() -> None:
    for name, label in (("soluble", 1), ("insoluble", 0)):
        records = [
            f">{n}\n{seq}\n" for n, (seq, is_one) in enumerate(some_rows()) if is_one == label
        ]
        Path(f"{name}.fasta").write_text("".join(records))
    init("insoluble.fasta", "soluble.fasta", "-o", "pair.toml")  # the names tell which is which
    source: Any = checked("pair.toml").data.source
    assert (source.soluble, source.insoluble) == ("soluble.fasta", "insoluble.fasta")
    tokens = np.random.default_rng(0).integers(1, 21, (100, 30))
    np.savez("tokens.npz", positives=tokens[:50], negatives=tokens[50:])
    init("tokens.npz")
    assert checked("tokens.toml").data.max_length == 30


def test_a_source_is_named_from_the_folder_of_the_study_file() -> None:
    write_table("my data.csv", some_rows())
    init("my data.csv", "-o", "studies/new.toml")
    assert checked("studies/new.toml").data.source == "../my data.csv"


def test_what_99_percent_do_not_need_is_cut_and_what_cannot_be_read_has_a_policy() -> None:
    rows = [(sequence[:50], label) for sequence, label in some_rows(400) if len(sequence) >= 50]
    longest, unknown, both = rows[0][0] * 4, rows[1][0][:40] + "X", rows[2][0]
    write_table("odd.csv", [*rows, (longest, 1), (unknown, 0), (both, 1 - rows[2][1])])
    init("odd.csv")
    spec = checked("odd.toml")
    assert (spec.data.max_length, spec.data.truncate) == (50, "end")
    assert (spec.data.unknown, spec.data.conflicts) == ("mask", "drop")
    text = Path("odd.toml").read_text()
    assert "1 sequence has letters that are not residues" in text
    assert "1 sequence is cut" in text


def test_conflicts_that_only_the_cut_makes_are_seen() -> None:
    rows = [(sequence[:50], label) for sequence, label in some_rows(400) if len(sequence) >= 50]
    write_table("cut.csv", [*rows, (rows[0][0] + "ACDEFGHIKLMNPQRSTVWY", 1 - rows[0][1])])
    init("cut.csv")
    assert checked("cut.toml").data.conflicts == "drop"


def test_a_little_more_length_is_taken_where_nothing_is_cut_then() -> None:
    rows = [(sequence[:50], label) for sequence, label in some_rows(400) if len(sequence) >= 50]
    write_table("near.csv", [*rows, (rows[0][0] + "ACDEFGHIK", 1)])
    init("near.csv")
    spec = checked("near.toml")
    assert (spec.data.max_length, spec.data.truncate) == (59, None)


def test_a_rare_class_counts_as_much_as_the_other() -> None:
    rows = [(sequence, int(number % 8 == 0)) for number, (sequence, _) in enumerate(some_rows())]
    write_table("rare.csv", rows)
    init("rare.csv")
    assert checked("rare.toml").training.class_weights == "balanced"
    assert "# 12.5 % of the sequences are soluble" in Path("rare.toml").read_text()


@pytest.mark.parametrize(
    ("header", "options", "error"),
    [
        ("sid,fasta,a,partition", ("--label-column", "b"), "no column 'b' among sid, fasta, a"),
        ("sid,fasta,a,partition", (), None),
        ("sid,a,b,c", (), None),
        ("p,ACDEFGHIKLMNPQRSTVWY,1,0", (), "mine.csv:1: the first line holds a row"),
    ],
)
def test_columns_are_told_by_what_stands_in_them(
    header: str, options: tuple[str, ...], error: str | None
) -> None:
    write_table("mine.csv", some_rows(), header)
    if error is None:
        init("mine.csv", *options)
        names = header.split(",")
        columns = checked("mine.toml").data.columns
        assert (columns.sequence, columns.label) == (names[1], names[2])
    else:
        with pytest.raises(TunerError, match=error):
            init("mine.csv", *options)


def test_columns_that_could_both_be_meant_have_to_be_named() -> None:
    lines = [f"{sequence},{label},{label}" for sequence, label in some_rows()]
    Path("two.csv").write_text("\n".join(["protein,expressed,secreted", *lines]))
    with pytest.raises(TunerError, match=r"expressed, secreted; name one with --label-column"):
        init("two.csv")
    init("two.csv", "--label-column", "Secreted")
    assert checked("two.toml").data.columns.label == "Secreted"


def test_of_columns_that_hold_the_same_the_one_with_a_usual_name_is_meant() -> None:
    lines = [f"{sequence},{number % 3 % 2},{label}"
             for number, (sequence, label) in enumerate(some_rows())]  # fmt: skip
    Path("two.csv").write_text("\n".join(["protein,is_test,Solubility", *lines]))
    init("two.csv")
    assert checked("two.toml").data.columns.label == "Solubility"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("none.csv",), "none.csv: does not exist"),
        (("notes.txt",), "name one table"),
        (("one.fasta",), "FASTA holds no labels; name two files"),
        (("a.csv", "b.csv"), "name one table"),
        (("semicolon.csv",), "separated by ';'"),
        (("few.csv",), "too few rows of label 1"),
    ],
)
def test_what_no_study_can_have_is_refused_and_nothing_is_written(
    folder: Path, files: tuple[str, ...], words: str
) -> None:
    write_table("few.csv", some_rows(12))
    Path("semicolon.csv").write_text("id;sequence;label\n1;ACDEF;1\n")
    before = sorted(folder.iterdir())
    with pytest.raises(TunerError, match=words):
        init(*files)
    assert sorted(folder.iterdir()) == before


def test_an_existing_study_file_is_replaced_only_by_force() -> None:
    write_table("mine.csv", some_rows())
    Path("mine.toml").write_text("mine")
    with pytest.raises(TunerError, match=r"exists; name another file with -o, or .* --force"):
        init("mine.csv")
    assert Path("mine.toml").read_text() == "mine"
    init("mine.csv", "--force")
    checked("mine.toml")


@pytest.mark.parametrize("name", ["~a", "a b", "new\nline", 'quo"te\\', "é"])
def test_a_file_of_any_name_gets_a_study_file(name: str) -> None:
    write_table(f"{name}.csv", some_rows())
    init(f"{name}.csv", "-o", "out.toml")
    checked("out.toml")


@pytest.mark.parametrize("output", ["mine.csv/x.toml", "folder.toml", f"{'x' * 300}.toml"])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(output: str) -> None:
    write_table("mine.csv", some_rows())
    Path("folder.toml").mkdir()
    with pytest.raises(TunerError, match=r"cannot be written .*; name another file with -o"):
        init("mine.csv", "-o", output)


# --- space and budget ---


@pytest.mark.parametrize("max_length", [1, 2, 6, 20, 64, 100, 5_000])
@pytest.mark.parametrize("rows", [20, 5_000, 50_000, 5_000_000])
def test_every_network_of_a_proposed_space_fits_the_sequences(rows: int, max_length: int) -> None:
    mistakes: list[Any] = []
    space = read_space(space_for(rows, max_length), mistakes)
    assert mistakes == []
    assert not misfits(tightest(space), max_length)


def test_more_rows_have_larger_networks() -> None:
    def largest(rows: int) -> int:
        configs = sampled_configurations(read_space(space_for(rows, 200), []))
        return max(multiply_adds(config, 200) for config in configs)

    assert largest(500) < largest(5_000) < largest(50_000)


def test_the_budget_is_what_was_measured(measured: TrainingTime) -> None:
    write_table("mine.csv", some_rows())
    init("mine.csv", "--hours", "0.2")
    spec = load_spec(Path("mine.toml"))
    # Two workers, nine tenths of whose time is training.
    seconds = 0.2 * 3600 * 2 * 0.9
    of_a_trial = 10.0 + 2.0 * spec.planned_epochs / spec.trials
    assert spec.trials <= seconds / of_a_trial < spec.trials + 5
    assert "an epoch takes 2 s, a trial 10 s to start" in Path("mine.toml").read_text()


def test_where_time_is_short_trials_are_short() -> None:
    write_table("mine.csv", some_rows())
    init("mine.csv", "--hours", "0.03")
    assert load_spec(Path("mine.toml")).training.max_epochs == 9


def test_without_tensorflow_the_usual_budget_is_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise SetupError("no TensorFlow")

    monkeypatch.setattr(timing, "measure", refuse)
    write_table("mine.csv", some_rows())
    init("mine.csv")
    assert load_spec(Path("mine.toml")).trials == 50
    assert "# Nothing was measured" in Path("mine.toml").read_text()


def test_networks_of_each_size_are_timed() -> None:
    configs = sampled_configurations(small_spec().space)
    chosen = timing.of_each_size(configs, 200, 3)
    sizes = [multiply_adds(config, 200) for config in chosen]
    every = sorted(multiply_adds(config, 200) for config in configs)
    assert sizes == [every[len(every) * part // 6] for part in (1, 3, 5)]
