"""Splits that the data names: a column, or three files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuner.data.development import load_development
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
