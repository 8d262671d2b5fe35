"""Inputs as they come: compressed, with other labels and columns, gaps, stops, unknown residues."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuner.data import text
from tuner.data.development import (
    DevelopmentData,
    balanced_weights,
    load_development,
    weights_of,
)
from tuner.data.prepare import Prepared, prepare
from tuner.data.problems import Problems
from tuner.data.rows import Row, decode_tokens, encode, find_unknown
from tuner.data.synthetic import synthetic_sequences
from tuner.data.text import SequenceReader
from tuner.errors import DataError
from tuner.spec.spec import ColumnSettings, DataSettings, FastaPair

ROWS = list(zip(*[some[:60] for some in synthetic_sequences()], strict=True))


def table(rows: list[tuple[Any, ...]], header: str = "sequence,label", delimiter: str = ",") -> str:
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows([header.split(","), *rows])
    return file.getvalue()


def prepared(folder: Path, source: Any, **changes: Any) -> Prepared:
    settings = DataSettings(source=source, **changes)
    return prepare(settings, folder=folder, artifacts=folder / "artifacts")


def plain(folder: Path) -> Prepared:
    (folder / "plain.csv").write_text(table(ROWS))
    return prepared(folder, "plain.csv")


def message_of(folder: Path, source: Any, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepared(folder, source, **changes)
    return str(caught.value)


def development(result: Prepared) -> DevelopmentData:
    return load_development(result.development_file)


# --- gzip ---


@pytest.mark.parametrize("name", ["rows.csv.gz", "rows.TSV.GZ", "rows.csv", "rows.tsv"])
def test_a_table_is_unpacked_whatever_its_name(tmp_path: Path, name: str) -> None:
    delimiter = "\t" if "tsv" in name.lower() else ","
    content = table(ROWS, delimiter=delimiter).encode()
    halves = [gzip.compress(part) for part in (content[:999], content[999:])]
    (tmp_path / name).write_bytes(b"".join(halves))  # as `cat a.gz b.gz` makes it
    result = prepared(tmp_path, name)
    assert (result.development_sha256, result.warnings) == (plain(tmp_path).development_sha256, ())


def test_fasta_is_unpacked(tmp_path: Path) -> None:
    for name, wanted in (("a.gz", 1), ("b.fasta.gz", 0)):
        records = (f">p{at}\n{one}\n" for at, (one, label) in enumerate(ROWS) if label == wanted)
        (tmp_path / name).write_bytes(gzip.compress("".join(records).encode()))
    result = prepared(tmp_path, FastaPair(soluble="a.gz", insoluble="b.fasta.gz"))
    assert result.development_sha256 == plain(tmp_path).development_sha256


def test_what_unpacks_to_too_much_or_not_at_all_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.csv.gz"
    whole = gzip.compress(table(ROWS).encode())
    for damaged in (whole[:-9], whole[:99] + b"\xff" + whole[100:], whole + b"more"):
        path.write_bytes(damaged)
        assert "is a gzip file that is damaged or was cut (" in message_of(tmp_path, path.name)
    monkeypatch.setattr(text, "MOST_UNPACKED", 1000)
    path.write_bytes(gzip.compress(b"A" * 1001))
    assert "unpacks to more than 1,000 bytes; if it is no" in message_of(tmp_path, path.name)


# --- columns and labels ---


def test_columns_have_the_names_of_the_study_file(tmp_path: Path) -> None:
    rows = [(f"p{at}", label, "label", one) for at, (one, label) in enumerate(ROWS)]
    (tmp_path / "rows.csv").write_text(table(rows, "sid, Solubility ,label,FASTA"))
    columns = ColumnSettings(sequence="fasta", label="solubility")
    result = prepared(tmp_path, "rows.csv", columns=columns)
    assert (result.development_sha256, result.warnings) == (plain(tmp_path).development_sha256, ())
    told = message_of(tmp_path, "rows.csv")
    assert "no column 'sequence' among sid, solubility, label, fasta; the first line" in told
    assert 'columns = { sequence = "..." }' in told


@pytest.mark.parametrize(
    ("soluble", "insoluble", "is_word"),
    [
        ("1", "0", False),
        ("1.0", "0.00", False),
        ("TRUE", "False", True),
        ("yes", "No", True),
        (" Soluble", "insoluble ", True),
    ],
)
def test_labels_are_numbers_or_words(
    tmp_path: Path, soluble: str, insoluble: str, is_word: bool
) -> None:
    rows = [(one, soluble if label else insoluble) for one, label in ROWS]
    (tmp_path / "rows.csv").write_text(table(rows))
    result = prepared(tmp_path, "rows.csv")
    assert result.development_sha256 == plain(tmp_path).development_sha256
    assert len(result.warnings) == is_word
    if is_word:
        told = f"60 labels are words: {soluble.strip().lower()} and {insoluble.strip().lower()} are"
        assert result.warnings[0] == f"{told} read as 1 and 0"


def test_1_and_1_0_are_the_same_label_and_a_word_is_of_another_kind(tmp_path: Path) -> None:
    rows = [("MKV", "1.0"), ("MKA", "0"), ("MKL", "true"), *ROWS]
    (tmp_path / "rows.csv").write_text(table(rows))
    told = message_of(tmp_path, "rows.csv")
    assert "'true' in line 4 is a label of another kind than '1.0' in line 2; write all" in told


@pytest.mark.parametrize("note", ["said yes\nand no", "yes,\nno", "kept, false\nor so"])
def test_words_in_a_note_are_no_labels_where_labels_are_numbers(tmp_path: Path, note: str) -> None:
    rows = [(one, "", label) for one, label in ROWS]
    rows[3] = (rows[3][0], note, rows[3][2])
    (tmp_path / "rows.csv").write_text(table(rows, "sequence,note,label"))
    assert prepared(tmp_path, "rows.csv").warnings == ()


def test_a_quote_swallows_no_rows_whose_labels_are_words(tmp_path: Path) -> None:
    rows = [(one, f"n{at}", "no") for at, (one, _) in enumerate(ROWS)]
    lines = table(rows, "sequence,note,label")
    lines = lines.replace(",n3,", ',"n3,').replace(",n6,", ',n6",')
    (tmp_path / "rows.csv").write_text(lines)
    assert "runs over lines 5 to 8, and may hold rows" in message_of(tmp_path, "rows.csv")
    # With a comma too many, a sequence and a label among the pieces tell.
    swallowed = f'{table(rows, "sequence,note,label")}MKV,"a,no\nMKL,more,b",no\n'
    (tmp_path / "rows.csv").write_text(swallowed)
    assert "runs over lines 62 to 63, and may hold rows" in message_of(tmp_path, "rows.csv")


# --- sequences ---

READ = [
    # as it stands there, and with unknown = "error" and "mask" what is read, or a part of the error
    ("MKV", "MKV", "MKV"),
    ("mkV", "MKV", "MKV"),
    ("MKV*", "MKV", "MKV"),
    ("MKV**", "MKV", "MKV"),
    ("M K\u00a0V", "MKV", "MKV"),
    ("--M-K..V--", "MKV", "MKV"),
    ("MKV*--", "MKV", "MKV"),
    ("MK*V", "residue 3 of it is '*'", "residue 3 of it is '*'"),
    ("M-KXV", "residue 4 of it is 'X'", "MKXV"),
    ("MBZJuo?K", "residue 2 of it is 'B', residue 3 is 'Z'", "MXXXXXXK"),
    ("MK1XV", "residue 3 of it is '1'", "residue 3 of it is '1', residue 4 is 'X'"),
    ("XX-B", "residues 1, 2 of it are 'X'", "remove it, or add its residues"),
    ("MKé", "residue 3 of it is 'é'", "residue 3 of it is 'é'"),
    ("AUGGCCAUUG", "translate RNA", "translate RNA"),
    ("GU", "translate RNA", "GX"),
    ("*", "it is empty", "it is empty"),
    ("-.-", "it is empty", "it is empty"),
]


@pytest.mark.parametrize("unknown", ["error", "mask"])
@pytest.mark.parametrize(("raw", "refusing", "masking"), READ)
def test_a_sequence_is_read_by_the_policy_or_refused(
    raw: str, refusing: str, masking: str, unknown: Any
) -> None:
    problems = Problems()
    found = SequenceReader(unknown, problems).read(raw, "f", 1, "it")
    expected = masking if unknown == "mask" else refusing
    if found is not None:
        assert (found, bool(problems)) == (expected, False)
        return
    with pytest.raises(DataError) as caught:
        problems.raise_if_any()
    assert expected in str(caught.value)


def test_what_was_accepted_is_counted() -> None:
    reader = SequenceReader("mask", Problems())
    for raw in ("mkv", "MK-V*", "M K V", "MXXK", "mbk", "MKV"):
        assert reader.read(raw, "f", 1, "it")
    assert reader.warnings() == [
        "2 sequences have lower-case residues: read as upper case",
        "1 sequence has spaces inside: removed",
        "1 sequence has gaps (- or .) of an alignment: removed",
        "1 sequence has a stop (*) at the end: removed",
        "2 sequences have unknown residues (X 2 times, B once): masked",
    ]


def test_unknown_residues_are_one_residue_in_every_format(tmp_path: Path) -> None:
    rows = [(one[:5] + "X" + one[6:], label) for one, label in ROWS]
    (tmp_path / "x.csv").write_text(table(rows))
    (tmp_path / "b.csv").write_text(table([(one.replace("X", "b"), label) for one, label in rows]))
    arrays = {
        name: encode([one for one, label in rows if label == wanted], 200, "mask")
        for name, wanted in (("positives", 1), ("negatives", 0))
    }
    np.savez(tmp_path / "x.npz", **arrays)
    results = [prepared(tmp_path, name, unknown="mask") for name in ("x.csv", "b.csv", "x.npz")]
    assert len({result.development_sha256 for result in results}) == 1
    found = development(results[0])
    assert (found.training_tokens[:, 5] == 21).all()
    assert {one[5] for one in decode_tokens(found.training_tokens)} == {"X"}
    assert results[2].warnings == ("60 sequences have unknown residues (X 60 times): masked",)
    assert "rows with impossible tokens: row 0 (token 21 at" in message_of(tmp_path, "x.npz")
    arrays["positives"][3, :9] = 21
    arrays["positives"][3, 9:] = 0
    np.savez(tmp_path / "x.npz", **arrays)
    told = message_of(tmp_path, "x.npz", unknown="mask")
    assert "row 3 (counted from 0) has unknown residues alone; remove it" in told


def test_sequences_that_differ_in_unknown_letters_alone_are_one(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(table([*ROWS, ("MKXV", 1), ("MKBV", 1)]))
    told = prepared(tmp_path, "rows.csv", unknown="mask").warnings
    assert told[1] == "1 row repeats an earlier sequence with the same label: left out"
    (tmp_path / "rows.csv").write_text(table([*ROWS, ("MKXV", 1), ("MKBV", 0)]))
    assert "the same sequence has label 1 in line 62" in message_of(
        tmp_path, "rows.csv", unknown="mask"
    )


def test_sequences_with_both_labels_are_dropped_where_the_study_file_says_so(
    tmp_path: Path,
) -> None:
    flipped = [(one, 1 - label) for one, label in ROWS[:3]]
    (tmp_path / "rows.csv").write_text(table([*ROWS, *flipped, *ROWS[2:5]]))
    assert 'conflicts = "drop" in [data]' in message_of(tmp_path, "rows.csv")
    result = prepared(tmp_path, "rows.csv", conflicts="drop")
    assert result.warnings == (
        "3 sequences have both labels: left out, 7 rows in all",
        "2 rows repeat an earlier sequence with the same label: left out",
    )
    (tmp_path / "rest.csv").write_text(table(ROWS[3:]))
    assert result.development_sha256 == prepared(tmp_path, "rest.csv").development_sha256


def test_a_cell_that_says_missing_has_no_sequence(tmp_path: Path) -> None:
    missing = [(one, 1) for one in ("NA", "nan", "N/A", "None", "null")]
    (tmp_path / "rows.csv").write_text(table([*ROWS, *missing]))
    assert "5 empty sequences: line 62" in message_of(tmp_path, "rows.csv")


def test_all_unknown_positions_are_found() -> None:
    assert list(find_unknown(["MKV", "XMB", "", "M", "é1"])) == [(1, [0, 2]), (4, [0, 1])]
    assert list(find_unknown([])) == []


# --- weights ---

WEIGHTED = ColumnSettings(weight="Sure")


def test_weights_are_those_of_the_training_rows_in_the_mean_1(tmp_path: Path) -> None:
    of_sequence = {one: 0.5 + at % 7 for at, (one, _) in enumerate(ROWS)}
    rows = [(one, label, of_sequence[one]) for one, label in ROWS]
    (tmp_path / "rows.csv").write_text(table([*rows, (*rows[0][:2], 99)], "sequence,label,sure"))
    result = prepared(tmp_path, "rows.csv", columns=WEIGHTED)
    assert result.warnings[0].endswith("left out, the weight of the first counts")
    found = development(result)
    weights = found.training_weights
    assert weights is not None
    assert weights.dtype == np.float32
    assert weights.mean() == pytest.approx(1)
    expected = np.array([of_sequence[one] for one in decode_tokens(found.training_tokens)])
    np.testing.assert_allclose(weights, expected / expected.mean(), rtol=1e-6)
    # Nothing else of the split or the rows depends on them.
    unweighted = plain(tmp_path)
    assert development(unweighted).training_weights is None
    assert unweighted.identity.split_id == result.identity.split_id
    np.testing.assert_array_equal(
        development(unweighted).training_tokens, development(result).training_tokens
    )


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "", "high", "0,5"])
def test_a_weight_is_a_finite_number_above_0(tmp_path: Path, weight: str) -> None:
    rows = [(one, label, 1) for one, label in ROWS]
    (tmp_path / "rows.csv").write_text(table([*rows, ("MKV", 1, weight)], "sequence,label,sure"))
    told = message_of(tmp_path, "rows.csv", columns=WEIGHTED)
    assert f"rows.csv:62: weight: {weight!r} is not a weight; write a finite number above 0" in told


def row(weight: float | None) -> Row:
    return Row(sequence="M", label=1, file="f", line=1, place="", weight=weight)


def test_large_weights_do_not_overflow() -> None:
    weights = weights_of([row(1e308), row(1e308), row(5e307)])
    assert weights is not None
    np.testing.assert_allclose(weights, [1.2, 1.2, 0.6], rtol=1e-6)
    assert weights_of([row(None)]) is None


def test_balanced_weights_give_both_labels_the_same_sum() -> None:
    labels = np.array([1, 1, 1, 0], np.float32)
    np.testing.assert_allclose(balanced_weights(labels), [2 / 3, 2 / 3, 2 / 3, 2])
    own = np.array([2, 1, 0.5, 0.5], np.float32)
    weights = balanced_weights(labels, own)
    assert weights[:3].sum() == pytest.approx(weights[3]) == pytest.approx(2)
    np.testing.assert_allclose(weights[:3] / weights[0], own[:3] / own[0])
