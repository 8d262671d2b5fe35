"""Splits that the data names: a column, or three files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuner.data.development import DevelopmentData, load_development
from tuner.data.homology import Clusters
from tuner.data.prepare import Prepared, prepare, read_held_out
from tuner.data.rows import decode_tokens
from tuner.data.sources import file_names, find_source, source_sha256, with_files
from tuner.data.synthetic import synthetic_sequences
from tuner.errors import DataError
from tuner.spec.spec import DataSettings, SplitFiles

ALL_SEQUENCES, ALL_LABELS = (some[:60] for some in synthetic_sequences())
#: In turn: a third of the rows in each part.
PARTS = ["training", "validation", "test"] * 20
ROWS = list(zip(ALL_SEQUENCES, ALL_LABELS, PARTS, strict=True))
FILES = SplitFiles(training="training.csv", validation="validation.csv", test="test.tsv")
GIVEN = {"rule": "given", "column": "part"}

Rows = Sequence[tuple[str, Any, str]]


def write(folder: Path, name: str, rows: Rows, header: str = "sequence,label,part") -> None:
    with (folder / name).open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if name.endswith(".tsv") else ",")
        writer.writerows([header.split(","), *rows])


def settings(source: Any = "rows.csv", split: Any = None, **changes: Any) -> DataSettings:
    return DataSettings.model_validate({"source": source, "split": split or GIVEN} | changes)


def prepared(folder: Path, *args: Any, **kwargs: Any) -> Prepared:
    return prepare(settings(*args, **kwargs), folder=folder, artifacts=folder / "artifacts")


def sequences_of(rows: Rows, part: str) -> set[str]:
    return {sequence for sequence, _, its in rows if its == part}


def test_a_column_names_the_parts(tmp_path: Path) -> None:
    write(tmp_path, "rows.csv", ROWS)
    result = prepared(tmp_path)
    found = load_development(result.development_file)
    identity, held_out = read_held_out(settings(), folder=tmp_path)
    assert identity == result.identity
    for tokens, part in (
        (found.training_tokens, "training"),
        (found.validation_tokens, "validation"),
        (held_out.tokens, "test"),
    ):
        assert sorted(decode_tokens(tokens)) == sorted(sequences_of(ROWS, part))
    label_of = {sequence: label for sequence, label, _ in ROWS}
    expected = [label_of[one] for one in decode_tokens(held_out.tokens)]
    assert held_out.labels.tolist() == expected


def test_column_and_three_files_are_one_split_whatever_the_order(tmp_path: Path) -> None:
    write(tmp_path, "rows.csv", ROWS)
    column = prepared(tmp_path)
    for part, name in FILES:
        write(tmp_path, name, [row for row in reversed(ROWS) if row[2] == part])
    files = prepared(tmp_path, FILES.model_dump(), {"rule": "given"})
    assert files.development_sha256 == column.development_sha256
    assert files.identity.split_id == column.identity.split_id
    assert files.identity.source == "training.csv, validation.csv, test.tsv"
    paths = [tmp_path / name for name in file_names(settings(FILES, {"rule": "given"}))]
    assert files.identity.sha256 == source_sha256(paths)


def test_three_files_are_found_under_other_names(tmp_path: Path) -> None:
    files = FILES.model_copy(update={"test": "test.csv"})
    its = settings(files.model_dump(), {"rule": "given"})
    for number, name in enumerate(file_names(its)):
        (tmp_path / name).write_text(str(number))
    sha256 = source_sha256([tmp_path / name for name in file_names(its)])
    (tmp_path / "test.csv").rename(tmp_path / "another.csv")
    found = find_source(its, [tmp_path], sha256)
    assert found is not None
    assert [file.name for file in found] == ["training.csv", "validation.csv", "another.csv"]
    assert with_files(its, found).source == SplitFiles(
        training=str(found[0]), validation=str(found[1]), test=str(found[2])
    )


def test_values_may_be_groups_and_what_is_not_named_is_trained_on(tmp_path: Path) -> None:
    rows = [(one, label, str(at % 4)) for at, (one, label, _) in enumerate(ROWS)]
    write(tmp_path, "rows.csv", rows, header="sequence,label,Partition")
    named = {"rule": "given", "column": "partition", "validation": ["2"], "test": [3]}
    result = prepared(tmp_path, split=named)
    counts = result.identity
    assert (counts.training_rows, counts.validation_rows, counts.test_rows) == (30, 15, 15)
    held_out = read_held_out(settings(split=named), folder=tmp_path)[1]
    assert set(decode_tokens(held_out.tokens)) == sequences_of(rows, "3")


def test_parts_are_told_in_upper_and_lower_case_with_spaces_around(tmp_path: Path) -> None:
    write(tmp_path, "rows.csv", ROWS)
    shouted = [(one, label, f" {part.upper()} ") for one, label, part in ROWS]
    write(tmp_path, "other.csv", shouted)
    assert prepared(tmp_path, "other.csv").development_sha256 == (
        prepared(tmp_path).development_sha256
    )


def with_parts(**parts: str) -> list[tuple[str, Any, str]]:
    """The rows with other values where a part's name is a key."""
    return [(one, label, parts.get(part, part)) for one, label, part in ROWS]


SHARED = [*ROWS, (ROWS[0][0].lower(), ROWS[0][1], "test")]
ONE_LABEL = [(one, 1 if part == "test" else label, part) for one, label, part in ROWS]
EMPTY = [(*ROWS[0][:2], " "), *ROWS[1:]]
WRONG = {
    "an empty cell": (EMPTY, {}, "rows.csv:2: part: no value in the column 'part'; write which"),
    "no row of a part": (
        with_parts(test="tset"), {},
        "which test in [data.split] names; the column has 'training' 20 times, 'validation' 20 tim",
    ),
    "a value that no row has": (with_parts(training="a"), {"training": ["b", "A"]}, "value 'b'"),
    "an unknown value": (
        with_parts(training="x"), {"training": ["a"]},
        "20 values in the column of the split that no part of [data.split] names: line 2 ('x'), ",
    ),
    "no such column": (ROWS, {"column": "set"}, "no column 'set' among sequence, label, part"),
    "no row of a label": (
        ONE_LABEL, {},
        "the test part has no row of label 0, of 20 different rows; each part needs both labels",
    ),
    "a sequence in two parts": (
        SHARED, {},
        "line 62 is in the test part, but the same sequence is in the training part in line 2; re",
    ),
    "too few rows": (ROWS[:18], {}, "at least 10 of each label are needed"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "split", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_given_split_is_told(
    tmp_path: Path, rows: Rows, split: dict[str, Any], message: str
) -> None:
    write(tmp_path, "rows.csv", rows)
    with pytest.raises(DataError) as caught:
        prepared(tmp_path, split=GIVEN | split)
    assert message in str(caught.value)


@pytest.mark.parametrize("turned", [False, True])
def test_proteins_that_are_equal_as_they_are_cut_stay_in_the_part_that_judges(
    tmp_path: Path, turned: bool
) -> None:
    begins = ALL_SEQUENCES[0][:15]
    label = ROWS[0][1]
    alike = [
        (f"{begins}{'WYV'[at]}WWW", label, part)
        for at, part in enumerate(("training", "validation", "test"))
    ]
    rows = [*ROWS, *alike] if not turned else [*reversed(alike), *ROWS]
    write(tmp_path, "rows.csv", rows)
    result = prepared(tmp_path, max_length=15, truncate="end")
    (warning,) = [one for one in result.warnings if "two parts" in one]
    assert warning.startswith("1 sequence (its first 15 residues) is in two parts of the split, ")
    held_out = read_held_out(settings(max_length=15, truncate="end"), folder=tmp_path)[1]
    assert begins in decode_tokens(held_out.tokens)
    found = load_development(result.development_file)
    assert begins not in decode_tokens(found.training_tokens)
    assert begins not in decode_tokens(found.validation_tokens)


def test_a_part_without_a_label_names_its_file(tmp_path: Path) -> None:
    for part, name in FILES:
        rows = [row for row in ROWS if row[2] == part and (part != "test" or row[1] == 1)]
        write(tmp_path, name, rows)
    with pytest.raises(DataError, match=r"the test part has no row of label 0.*to its file"):
        prepared(tmp_path, FILES.model_dump(), {"rule": "given"})


def test_weights_are_those_of_the_training_rows(tmp_path: Path) -> None:
    weighted = [(*row, 3.0 if row[2] == "test" else 1.0) for row in ROWS]
    write(tmp_path, "rows.csv", weighted, header="sequence,label,part,weight")  # type: ignore[arg-type]
    result = prepared(tmp_path, columns={"weight": "weight"})
    weights = load_development(result.development_file).training_weights
    assert weights is not None
    assert np.unique(weights).tolist() == [1.0]


# --- folds ---

FOLDED = {"seed": 1, "test": 0.2}


def folds_of(result: Prepared) -> dict[str, int]:
    found = load_development(result.development_file)
    assert found.folds is not None
    assert found.validation_tokens is found.training_tokens
    return dict(zip(decode_tokens(found.training_tokens), found.folds.tolist(), strict=True))


def test_folds_are_dealt_out_to_all_but_the_test_rows(tmp_path: Path) -> None:
    write(tmp_path, "rows.csv", ROWS)
    result = prepared(tmp_path, split={**FOLDED, "folds": 4})
    without = prepared(tmp_path, split={**FOLDED, "validation": 0.3})
    assert result.identity.split_id == without.identity.split_id
    folds = folds_of(result)
    held_out = read_held_out(settings(split={**FOLDED, "folds": 4}), folder=tmp_path)[1]
    assert not folds.keys() & set(decode_tokens(held_out.tokens))
    assert len(folds) == 48
    label_of = {sequence: label for sequence, label, _ in ROWS}
    for label in (0, 1):
        counts = np.bincount([fold for one, fold in folds.items() if label_of[one] == label])
        assert len(counts) == 4
        assert counts.max() - counts.min() <= 1
    identity = result.identity
    assert (identity.folds, identity.training_rows, identity.validation_rows) == (4, 36, 12)
    assert identity.check_document()["folds"] == 4


def test_folds_follow_from_seed_and_sequences_alone(tmp_path: Path) -> None:
    write(tmp_path, "rows.csv", ROWS)
    write(tmp_path, "turned.tsv", ROWS[::-1])
    split = {**FOLDED, "folds": 3}
    first = prepared(tmp_path, split=split)
    assert prepared(tmp_path, "turned.tsv", split).development_sha256 == first.development_sha256
    other = prepared(tmp_path, split={**split, "seed": 2})
    assert folds_of(other) != folds_of(first)


def test_a_column_names_folds_and_its_test_group_is_in_none(tmp_path: Path) -> None:
    rows = [(one, label, str(at % 4 + 8)) for at, (one, label, _) in enumerate(ROWS)]
    write(tmp_path, "rows.csv", rows)
    named = {**GIVEN, "validation": ["9"], "test": ["11"], "folds": {"column": "part"}}
    folds = folds_of(prepared(tmp_path, split=named))
    number = {"8": 0, "9": 1, "10": 2}  # in their numbers' order
    assert folds == {one: number[part] for one, _, part in rows if part != "11"}


def test_a_sequence_in_two_groups_is_one_row_of_one_fold(tmp_path: Path) -> None:
    write(tmp_path, "rows.csv", [*ROWS, (ROWS[0][0], ROWS[0][1], "validation")])
    split = {**GIVEN, "folds": 3}
    assert len(folds_of(prepared(tmp_path, split=split))) == 40
    with pytest.raises(DataError, match="in the validation part, but the same sequence"):
        prepared(tmp_path)


def test_clusters_stay_whole_in_folds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clusters(sequences: Sequence[str], **_: Any) -> Clusters:
        numbers = tuple(ALL_SEQUENCES.index(one) // 2 for one in sequences)
        return Clusters(numbers=numbers, version="1")

    monkeypatch.setattr("tuner.data.prepare.cluster", clusters)
    write(tmp_path, "rows.csv", ROWS)
    folds = folds_of(prepared(tmp_path, split={"rule": "homology", "seed": 1, "folds": 3}))
    fold_of = {(ALL_SEQUENCES.index(one) // 2, fold) for one, fold in folds.items()}
    assert len(fold_of) == len({cluster for cluster, _ in fold_of}) == len(folds) / 2


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        (
            {"column": "part"},
            "'part' has [0-9]+ different values among the training and validation",
        ),
        ({"column": "sort"}, "no column 'sort' among sequence, label, part; .* folds in"),
        (20, "fold '[0-9]+' has no row of label"),
    ],
)
def test_what_is_wrong_with_folds_is_told(tmp_path: Path, folds: Any, message: str) -> None:
    write(tmp_path, "rows.csv", [(one, label, str(at)) for at, (one, label, _) in enumerate(ROWS)])
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, split={"validation": 0.1, "test": 0.5, "folds": folds})


def test_a_row_without_a_fold_is_told(tmp_path: Path) -> None:
    write(tmp_path, "rows.csv", EMPTY)
    with pytest.raises(DataError, match="no value in the column 'part'; write which fold"):
        prepared(tmp_path, split={**FOLDED, "folds": {"column": "part"}})


# --- validation rows that are drawn anew for each trial ---


def development() -> DevelopmentData:
    tokens = np.arange(100, dtype=np.uint8).reshape(50, 2)
    labels = (np.arange(50) % 3 == 0).astype(np.uint8)
    return DevelopmentData(
        training_tokens=tokens[10:],
        training_labels=labels[10:],
        validation_tokens=tokens[:10],
        validation_labels=labels[:10],
    )


def test_a_trial_draws_its_validation_rows_from_all_development_rows() -> None:
    data = development()
    drawn = [data.reshuffled(1, trial) for trial in range(60)]
    for one in drawn:
        tokens = np.concatenate([one.training_tokens, one.validation_tokens])
        assert np.array_equal(tokens[tokens[:, 0].argsort()].ravel(), np.arange(100))
        assert np.bincount(one.validation_labels).tolist() == [6, 4]
        assert np.array_equal(one.validation_labels, one.validation_tokens[:, 0] // 2 % 3 == 0)
        assert np.array_equal(one.training_labels, one.training_tokens[:, 0] // 2 % 3 == 0)
    assert len({one.validation_tokens.tobytes() for one in drawn}) == 60
    assert {row for one in drawn for row in one.validation_tokens[:, 0].tolist()} == {
        *range(0, 100, 2)
    }
    again = development().reshuffled(1, 7)
    assert np.array_equal(again.validation_tokens, drawn[7].validation_tokens)
    assert not np.array_equal(data.reshuffled(2, 7).validation_tokens, drawn[7].validation_tokens)


def test_a_study_that_reshuffles_has_the_development_file_of_one_that_does_not(
    tmp_path: Path,
) -> None:
    write(tmp_path, "rows.csv", ROWS)
    plain, reshuffled = (
        prepared(tmp_path, split={"seed": 1, "test": 0.2} | changes)
        for changes in ({}, {"reshuffle": True})
    )
    assert plain.development_sha256 == reshuffled.development_sha256
    assert plain.identity == reshuffled.identity
