"""Sources, checks, split and seal: the same rows give the same split, and no test row gets out."""

from __future__ import annotations

import ast
import contextlib
import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuner.data import prepare as data
from tuner.data import solubility, synthetic
from tuner.data.development import DevelopmentData, load_development
from tuner.data.identity import DataIdentity
from tuner.data.prepare import Prepared, prepare, read_held_out
from tuner.data.rows import RESIDUES, encode, kept_in_words, truncated
from tuner.data.solubility import fetch, locate
from tuner.data.synthetic import synthetic_sequences
from tuner.errors import DataError, Problem, TunerError
from tuner.spec.spec import DataSettings, FastaPair, SplitSettings

REAL_FOLDER = os.environ.get("TUNER_DATA_DIR", "")
REAL_FILE = Path(REAL_FOLDER) / "solubility.npz"
needs_real_data = pytest.mark.skipif(
    not (REAL_FOLDER and REAL_FILE.is_file()), reason="TUNER_DATA_DIR does not hold the data set"
)

Rows = list[tuple[str, int]]
ALL_SEQUENCES, ALL_LABELS = synthetic_sequences()
ROWS: Rows = list(zip(ALL_SEQUENCES[:120], ALL_LABELS[:120], strict=True))


def data_settings(source: str | FastaPair, *, seed: int = 1, **changes: Any) -> DataSettings:
    return DataSettings(source=source, split=SplitSettings(seed=seed), **changes)


def prepared(folder: Path, source: str | FastaPair, *, seed: int = 1, **changes: Any) -> Prepared:
    wanted = data_settings(source, seed=seed, **changes)
    return prepare(wanted, folder=folder, artifacts=folder / "artifacts")


def problems_of(folder: Path, source: str | FastaPair, **changes: Any) -> list[Problem]:
    """What `prepare` says is wrong; it must leave nothing behind."""
    with pytest.raises(DataError) as caught:
        prepared(folder, source, **changes)
    assert not (folder / "artifacts").exists()
    return list(caught.value.problems)


def write_csv(path: Path, rows: Rows, *, delimiter: str = ",", end: str = "\n") -> None:
    lines = [f"{sequence}{delimiter}{label}" for sequence, label in rows]
    path.write_bytes(end.join([f"sequence{delimiter}label", *lines, ""]).encode())


def write_npz(path: Path, rows: Rows, *, width: int = 200, dtype: type = np.int64) -> None:
    arrays = [
        encode([sequence for sequence, label in rows if label == wanted], width).astype(dtype)
        for wanted in (1, 0)
    ]
    np.savez(path, positives=arrays[0], negatives=arrays[1])


def write_fasta(folder: Path, rows: Rows, *, wrap: int = 60) -> FastaPair:
    for name, wanted in (("soluble", 1), ("insoluble", 0)):
        records = []
        for number, (sequence, label) in enumerate(rows):
            if label == wanted:
                lines = [sequence[i : i + wrap] for i in range(0, len(sequence), wrap)]
                records.append(f">protein{number} of a test\n" + "\n".join(lines))
        (folder / f"{name}.fasta").write_text("\n".join(records) + "\n", encoding="utf-8")
    return FastaPair(soluble="soluble.fasta", insoluble="insoluble.fasta")


def decode(tokens: np.ndarray) -> list[str]:
    return ["".join(RESIDUES[token - 1] for token in row if token) for row in tokens]


def development_rows(development: DevelopmentData) -> Rows:
    tokens = np.concatenate([development.training_tokens, development.validation_tokens])
    labels = np.concatenate([development.training_labels, development.validation_labels])
    return list(zip(decode(tokens), labels.tolist(), strict=True))


# --- tokens --------------------------------------------------------------------------------------


def test_tokens_are_1_to_20_in_the_published_order_and_0_pads_at_the_end():
    tokens = encode([RESIDUES, "av"], 22)
    assert tokens.dtype == np.uint8
    assert tokens.tolist() == [[*range(1, 21), 0, 0], [1, 20, *[0] * 20]]


def test_no_sequences_encode_to_no_rows():
    assert encode([], 7).shape == (0, 7)


@pytest.mark.parametrize(
    ("sequence", "complaint"),
    [("AXA", "'X' is not"), ("AéA", "'é' is not"), ("AAAA", "4 residues do not fit")],
)
def test_encode_refuses_what_it_cannot_represent(sequence: str, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        encode(["AA", sequence], 3)


# --- split and identity --------------------------------------------------------------------------


def test_a_file_keeps_split_and_development_file_in_every_format_and_order(tmp_path: Path):
    shuffled = ROWS.copy()
    random.Random(3).shuffle(shuffled)
    write_npz(tmp_path / "rows.npz", ROWS)
    write_npz(tmp_path / "narrow_reversed.npz", ROWS[::-1], width=198, dtype=np.uint8)
    write_csv(tmp_path / "rows.csv", ROWS)
    write_csv(tmp_path / "renamed, shuffled.CSV", shuffled, end="\r\n")
    write_csv(tmp_path / "rows.tsv", shuffled, delimiter="\t")
    write_csv(tmp_path / "lower.csv", [(sequence.lower(), label) for sequence, label in ROWS])
    sources = [
        *("rows.npz", "narrow_reversed.npz", "rows.csv", "renamed, shuffled.CSV", "rows.tsv"),
        *("lower.csv", write_fasta(tmp_path, shuffled)),
    ]
    results = [prepared(tmp_path, source) for source in sources]
    assert len({result.identity.split_id for result in results}) == 1
    assert len({result.development_sha256 for result in results}) == 1
    assert len({result.identity.sha256 for result in results}) == len(sources)
    held_out = [
        read_held_out(data_settings(source), folder=tmp_path)[1].tokens.tobytes()
        for source in sources
    ]
    assert len(set(held_out)) == 1


@settings(
    max_examples=15,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.permutations(ROWS[:40]),
    repeats=st.lists(st.sampled_from(ROWS[:40]), max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_order_and_repeats_never_move_a_row(tmp_path: Path, rows: Rows, repeats: Rows, seed: int):
    write_csv(tmp_path / "plain.csv", ROWS[:40])
    write_csv(tmp_path / "other.csv", [*rows, *repeats])
    plain = prepared(tmp_path, "plain.csv", seed=seed)
    other = prepared(tmp_path, "other.csv", seed=seed)
    assert other.identity.split_id == plain.identity.split_id
    assert other.development_sha256 == plain.development_sha256
    assert len(other.warnings) == bool(repeats)


def test_the_split_is_the_documented_one(tmp_path: Path):
    write_csv(tmp_path / "rows.csv", ROWS)
    expected = []
    for wanted in (1, 0):
        ordered = sorted(
            (sequence for sequence, label in ROWS if label == wanted),
            key=lambda sequence: hashlib.sha256(f"7:{sequence}".encode()).hexdigest(),
        )
        expected += ordered[: round(0.1 * len(ordered))]
    hashes = sorted(hashlib.sha256(sequence.encode()).hexdigest() for sequence in expected)

    identity, held_out = read_held_out(data_settings("rows.csv", seed=7), folder=tmp_path)
    assert sorted(decode(held_out.tokens)) == sorted(expected)
    assert identity.split_id == hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    assert identity == prepared(tmp_path, "rows.csv", seed=7).identity


def test_every_row_is_in_exactly_one_split_with_its_own_label(tmp_path: Path):
    write_csv(tmp_path / "rows.csv", ROWS)
    result = prepared(tmp_path, "rows.csv")
    development = load_development(result.development_file, result.development_sha256)
    _, held_out = read_held_out(data_settings("rows.csv"), folder=tmp_path)
    test_rows = list(zip(decode(held_out.tokens), held_out.labels.tolist(), strict=True))
    assert sorted([*development_rows(development), *test_rows]) == sorted(ROWS)

    identity = result.identity
    assert (identity.training_rows, identity.validation_rows, identity.test_rows) == (
        len(development.training_labels),
        len(development.validation_labels),
        len(held_out.labels),
    )
    for labels in (development.validation_labels, held_out.labels):
        expected = [round(0.1 * ALL_LABELS[:120].count(label)) for label in (0, 1)]
        assert np.bincount(labels).tolist() == expected


def test_half_a_row_goes_to_the_even_number(tmp_path: Path):
    # 25 and 35 rows of a label at 10 %: 2.5 gives 2, and 3.5 gives 4.
    soluble = [row for row in zip(ALL_SEQUENCES, ALL_LABELS, strict=True) if row[1] == 1][:25]
    insoluble = [row for row in zip(ALL_SEQUENCES, ALL_LABELS, strict=True) if row[1] == 0][:35]
    write_csv(tmp_path / "rows.csv", soluble + insoluble)
    _, held_out = read_held_out(data_settings("rows.csv"), folder=tmp_path)
    assert np.bincount(held_out.labels).tolist() == [4, 2]


def test_another_split_seed_gives_another_split(tmp_path: Path):
    write_csv(tmp_path / "rows.csv", ROWS)
    first, second = (prepared(tmp_path, "rows.csv", seed=seed) for seed in (1, 2))
    assert first.identity.split_id != second.identity.split_id
    assert first.development_sha256 != second.development_sha256
    assert (first.identity.split_seed, second.identity.split_seed) == (1, 2)


def test_fractions_are_those_of_the_study_file(tmp_path: Path):
    write_csv(tmp_path / "rows.csv", ROWS)
    wanted = DataSettings(source="rows.csv", split=SplitSettings(seed=1, validation=0.25, test=0.5))
    identity = prepare(wanted, folder=tmp_path, artifacts=tmp_path).identity
    assert (identity.training_rows, identity.validation_rows, identity.test_rows) == (30, 30, 60)


def test_a_split_without_rows_of_a_label_is_an_error(tmp_path: Path):
    write_csv(tmp_path / "rows.csv", ROWS)
    wanted = DataSettings(source="rows.csv", split=SplitSettings(validation=0.1, test=0.001))
    with pytest.raises(DataError) as caught:
        prepare(wanted, folder=tmp_path, artifacts=tmp_path)
    assert [problem.value for problem in caught.value.problems] == ["1", "0"]
    assert "different ones (0 test, " in str(caught.value)
    assert "add rows, or raise validation or test of split in [data]" in str(caught.value)


def test_a_wider_network_input_changes_neither_split_nor_rows(tmp_path: Path):
    write_csv(tmp_path / "rows.csv", ROWS)
    narrow, wide = (prepared(tmp_path, "rows.csv", max_length=n) for n in (200, 300))
    assert narrow.identity.split_id == wide.identity.split_id
    rows = [development_rows(load_development(each.development_file)) for each in (narrow, wide)]
    assert rows[0] == rows[1]
    assert load_development(wide.development_file).training_tokens.shape[1] == 300


def test_the_identity_survives_json(tmp_path: Path):
    write_csv(tmp_path / "rows.csv", ROWS)
    identity = prepared(tmp_path, "rows.csv").identity
    assert DataIdentity.from_document(json.loads(json.dumps(identity.to_document()))) == identity
    assert identity.source == "rows.csv"
    assert identity.sha256 == hashlib.sha256((tmp_path / "rows.csv").read_bytes()).hexdigest()
    assert not identity.synthetic


def test_a_fasta_pair_is_identified_by_both_digests(tmp_path: Path):
    pair = write_fasta(tmp_path, ROWS)
    identity = prepared(tmp_path, pair).identity
    digests = [
        hashlib.sha256((tmp_path / name).read_bytes()).digest()
        for name in ("soluble.fasta", "insoluble.fasta")
    ]
    assert identity.source == "soluble.fasta, insoluble.fasta"
    assert identity.sha256 == hashlib.sha256(b"".join(digests)).hexdigest()


# --- the seal ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_test_row_is_in_the_development_file(tmp_path: Path, seed: int):
    result = prepared(tmp_path, "synthetic", seed=seed)
    _, held_out = read_held_out(data_settings("synthetic", seed=seed), folder=tmp_path)
    test_sequences = set(decode(held_out.tokens))
    development = load_development(result.development_file)
    assert len(test_sequences) == result.identity.test_rows
    assert not test_sequences & {sequence for sequence, _ in development_rows(development)}

    # Nor in its bytes: the file holds the four arrays, uncompressed, and nothing else.
    content = result.development_file.read_bytes()
    assert not any(row.tobytes() in content for row in held_out.tokens)
    assert development.training_tokens[0].tobytes() in content
    with zipfile.ZipFile(result.development_file) as archive:
        assert archive.namelist() == [
            *("training_tokens.npy", "training_labels.npy"),
            *("validation_tokens.npy", "validation_labels.npy"),
        ]


def test_what_prepare_returns_holds_no_sequence(tmp_path: Path):
    write_csv(tmp_path / "rows.csv", ROWS)
    text = repr(prepared(tmp_path, "rows.csv"))
    assert not any(sequence in text for sequence, _ in ROWS)


def uses(source: str, name: str) -> bool:
    """Whether the code names it: as a variable, an attribute, an import or a text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id == name:
            return True
        if isinstance(node, ast.Attribute) and node.attr == name:
            return True
        if isinstance(node, ast.alias) and name in (node.name, node.asname):
            return True
        if isinstance(node, ast.Constant) and node.value == name:
            return True
    return False


def test_only_heldout_reads_the_held_out_split():
    package = Path(data.__file__).parent.parent
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if uses(path.read_text(encoding="utf-8"), "read_held_out")
    }
    assert users == {"results/heldout.py"}


@pytest.mark.parametrize(
    "code",
    [
        "from tuner.data.prepare import read_held_out",
        "from tuner import data\ndata.read_held_out(1)",
        "from tuner import data\ngetattr(data, 'read_held_out')",
    ],
)
def test_the_search_for_users_can_fail(code: str):
    assert uses(code, "read_held_out")


def test_the_development_file_is_named_by_its_content_and_is_the_same_every_time(tmp_path: Path):
    write_csv(tmp_path / "rows.csv", ROWS)
    first = prepared(tmp_path, "rows.csv")
    content = first.development_file.read_bytes()
    assert first.development_file.parent == tmp_path / "artifacts" / "development"
    assert first.development_file.name == f"{hashlib.sha256(content).hexdigest()}.npz"
    assert first.development_sha256 == first.development_file.stem

    untouched = first.development_file.stat().st_mtime_ns
    assert prepared(tmp_path, "rows.csv") == first
    assert first.development_file.stat().st_mtime_ns == untouched
    assert list(first.development_file.parent.iterdir()) == [first.development_file]


def test_a_damaged_development_file_is_refused_and_written_anew(tmp_path: Path):
    write_csv(tmp_path / "rows.csv", ROWS)
    result = prepared(tmp_path, "rows.csv")
    whole = result.development_file.read_bytes()
    result.development_file.write_bytes(whole[:-1] + b"!")
    with pytest.raises(DataError, match=r"sha256 is \w+, not \w+; launch the study again"):
        load_development(result.development_file, result.development_sha256)
    prepared(tmp_path, "rows.csv")
    assert result.development_file.read_bytes() == whole


@pytest.mark.parametrize("content", [b"no zip", b"PK\x05\x06" + b"\0" * 18])
def test_a_foreign_file_is_no_development_file(tmp_path: Path, content: bytes):
    (tmp_path / "foreign.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"foreign\.npz: is no development file"):
        load_development(tmp_path / "foreign.npz")


def test_a_missing_development_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.npz: does not exist"):
        load_development(tmp_path / "gone.npz")


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    write_csv(tmp_path / "rows.csv", ROWS)
    with pytest.raises(TunerError, match=r"cannot be written \(No space left on device\); free"):
        prepared(tmp_path, "rows.csv")
    assert list((tmp_path / "artifacts" / "development").iterdir()) == []


# --- checks: CSV and TSV -------------------------------------------------------------------------

GOOD = "".join(f"{sequence},{label}\n" for sequence, label in ROWS)
BAD_CSV: dict[str, tuple[str | bytes, list[tuple[int | None, str, str, str]]]] = {
    # name: (content, problems as (line, key, value, part of the message))
    "unknown residue X": (
        f"sequence,label\nMKX,1\n{GOOD}",
        [(2, "sequence", "X", "residue 3 of the sequence is 'X'; only ARNDCQEGHILKMFPSTWYV")],
    ),
    "ambiguous residue b": ("sequence,label\nMbK,1\n", [(2, "sequence", "bK", "is 'b'")]),
    "stop codon": ("sequence,label\nMK*L,1\n", [(2, "sequence", "*L", "residue 3 of")]),
    "nothing but gaps": ("sequence,label\n--,1\n", [(2, "sequence", "", "sequence is empty")]),
    "a digit behind a gap": ("sequence,label\nM-K 2*,1\n", [(2, "sequence", "2*", "residue 5 of")]),
    # Their upper case is the residue I and S: still no amino acids.
    "dotless i": ("sequence,label\nMK\u0131,1\n", [(2, "sequence", "\u0131", "is '\u0131'")]),
    "long s": ("sequence,label\nM\u017fK,1\n", [(2, "sequence", "\u017fK", "is '\u017f'")]),
    "NUL": ("sequence,label\nMK\0,1\n", [(2, "", "", "is not text: it holds a zero byte; save")]),
    "orders to a terminal": (
        "sequence\x1b[2J\nMK\n",
        [(1, "sequence", "", "among sequence?[2j; the first"), (1, "label", "", "sequence?[2j;")],
    ),
    "empty sequence": ("sequence,label\n  ,1\n", [(2, "sequence", "", "the sequence is empty")]),
    "too few fields": ("sequence,label\nMKL\n", [(2, "", "MKL", "1 field where the header")]),
    "too many fields": ("sequence,label\nMK,1,2\n", [(2, "", "MK,1,2", "3 fields where")]),
    "label 2": ("sequence,label\nMKL,2\n", [(2, "label", "2", "write 1 (soluble) or 0")]),
    "label in words": ("sequence,label\nMKL,maybe\n", [(2, "label", "maybe", "is not a label")]),
    "label as a float": ("sequence,label\nMKL,0.9\n", [(2, "label", "0.9", "is not a label")]),
    "label missing": ("sequence,label\nMKL,\n", [(2, "label", "", "'' is not a label")]),
    "both wrong": (
        "sequence,label\nMKZ,3\n",
        [(2, "sequence", "Z", "'Z'"), (2, "label", "3", "'3' is not a label")],
    ),
    "contradicting labels": (
        f"sequence,label\nMKLV,1\n{GOOD}mklv,0\nMKLV,1\n",
        [(123, "label", "0", "line 123 says 0, but the same sequence has label 1 in line 2")],
    ),
    "after blank lines and quoted line breaks": (
        '\nsequence,label,"a\nnote"\n\nMKL,1,"two\nlines"\n   \nMKX,1,x\n',
        [(8, "sequence", "X", "'X'")],
    ),
    "a wrong row of several lines": (
        'sequence,label,note\nMKL,1,\nMKX,1,"two\nlines"\n',
        [(3, "sequence", "X", "'X'")],
    ),
    "no label column": ("sequence,class\nMKL,1\n", [(1, "label", "sequence,class", "no column")]),
    "no header": (
        "MKL,1\nMKV,0\n",
        [(1, "sequence", "mkl,1", "among mkl, 1; the first line must"), (1, "label", "mkl,1", "")],
    ),
    "semicolons": (
        "sequence;label\nMKL;1\n",
        [(1, "", "sequence;label", "is separated by ';', not by commas; save it with commas")],
    ),
    "column twice": (
        "sequence,label,label\nMKL,1,0\n",
        [(1, "label", "sequence,label,label", "2 columns are called 'label'")],
    ),
    "open quote": ('sequence,label\n"MKL,1\nMKV,0\n', [(2, "", "", "check the quotes")]),
    "header only": ("sequence,label\n", [(None, "", "", "holds no rows; a study needs")]),
    "blank lines only": ("\n \n", [(None, "", "", "the first line has to be: sequence,label")]),
    "empty file": ("", [(None, "", "rows.csv", "is empty")]),
    "single class": (
        "sequence,label\n" + "".join(f"{sequence},1\n" for sequence, _ in ROWS),
        [(None, "label", "1", "every row has label 1; a classifier needs both")],
    ),
    "too few rows": (
        "sequence,label\n" + "".join(f"{'MK' * n},{n % 2}\n" for n in range(1, 20)),
        [(None, "label", "0", "too few rows of label 0: 9 different ones (1 test, 1 validation,")],
    ),
    "Latin-1": (
        "sequence,label,note\nMKL,1,x\nMKV,0,é\n".encode("latin-1"),
        [(3, "", "0xe9", "is not UTF-8 text (byte 0xe9); save it as UTF-8")],
    ),
    "UTF-16": (
        "sequence,label\nMKL,1\n".encode("utf-16"),
        [(1, "", "UTF-16", "is not UTF-8 text but UTF-16; save it as UTF-8")],
    ),
    "gzip that was cut": (b"\x1f\x8b\x08\x00", [(None, "", "", "is a gzip file that is damaged")]),
    "gzip of nothing": (gzip.compress(b""), [(None, "", "", "a gzip file that holds nothing")]),
    "gzip twice": (
        gzip.compress(gzip.compress(b"sequence,label\n")),
        [(None, "", "compressed with gzip twice", "is compressed with gzip twice, not text")],
    ),
    "a zip file": (b"PK\x03\x04\x14", [(None, "", "a zip file", "not text; save it as CSV, TSV")]),
    "an Excel workbook": (
        b"PK\x03\x04" + b"\0" * 26 + b"[Content_Types].xml",
        [(None, "", "an Excel workbook", "is an Excel workbook, not text")],
    ),
    "tabs in a .csv": (
        "sequence\tlabel\nMKL\t1\n",
        [(1, "", "sequence\tlabel", "is separated by tabs, not by commas; name it .tsv")],
    ),
    "labels of two kinds": (
        "sequence,label\nMKL,1\nMKV,no\nMKA,0.0\n",
        [(3, "label", "no", "'no' in line 3 is a label of another kind than '1' in line 2; write")],
    ),
}


def check_problems(
    found: list[Problem], file: str, expected: list[tuple[int | None, str, str, str]]
) -> None:
    assert len(found) == len(expected), found
    for problem, (line, key, value, message) in zip(found, expected, strict=True):
        assert (problem.file, problem.line, problem.key) == (file, line, key)
        assert value in problem.value
        assert message in problem.message
        assert re.search(r"[;:(?]", problem.message), "every message goes on to the remedy"


@pytest.mark.parametrize("case", BAD_CSV)
def test_a_bad_csv_file_is_refused_with_line_value_and_remedy(tmp_path: Path, case: str):
    content, expected = BAD_CSV[case]
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "rows.csv").write_bytes(content)
    check_problems(problems_of(tmp_path, "rows.csv"), "rows.csv", expected)


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_byte_order_mark_and_other_columns_do_not_matter(
    tmp_path: Path, delimiter: str, end: str, mark: bytes
):
    write_csv(tmp_path / "plain.csv", ROWS)
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
    writer.writerow([" Label", "note", "SEQUENCE"])
    note = "a,b\tc" if delimiter == "\t" else f"a,b\t{end}c"  # a TSV record is one line
    writer.writerows([[label, note, f" {each} "] for each, label in ROWS])
    name = "other.tsv" if delimiter == "\t" else "other.csv"
    (tmp_path / name).write_bytes(mark + file.getvalue().encode())
    other = prepared(tmp_path, name)
    assert other.development_sha256 == prepared(tmp_path, "plain.csv").development_sha256
    assert other.warnings == ()


def test_wrong_long_and_contradicting_rows_are_reported_together(tmp_path: Path):
    lines = ["sequence,label", "MKX,1", "MK,1", "MK,0", "M" * 201 + ",1"]
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    assert [problem.line for problem in problems_of(tmp_path, "rows.csv")] == [2, 5, 4]


def test_long_values_are_shortened(tmp_path: Path):
    (tmp_path / "rows.csv").write_text(f"sequence,label\nM{'B' * 150},1\n", encoding="utf-8")
    (found,) = problems_of(tmp_path, "rows.csv")
    assert found.value == "B" * 40 + "..."


# --- checks: quoted fields of several lines ------------------------------------------------------


def sequence_of(number: int) -> str:
    """A different sequence for each number, of residues that are no nucleotides."""
    return "MK" + "".join("DEFHIKLMPQ"[int(digit)] for digit in f"{number:04}")


def table(columns: str, *, delimiter: str = ",", end: str = "\n", rows: int = 40) -> list[str]:
    """The lines of a file with the named columns; every row has a note of its own."""
    names = columns.split()
    lines = [delimiter.join(names)]
    for number in range(rows):
        cells = {"sequence": sequence_of(number), "label": str(number % 2)}
        lines.append(delimiter.join(cells.get(name, f"n{number}") for name in names))
    return [line + end for line in lines]


COLUMNS = [
    *("sequence note label", "label note sequence", "note sequence label"),
    *("sequence label note", "note label other sequence", "sequence note other label"),
]


@pytest.mark.parametrize(("swallowed", "end"), [(1, "\n"), (2, "\r\n"), (7, "\r")])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_two_lone_quotes_never_swallow_rows(
    tmp_path: Path, name: str, columns: str, end: str, swallowed: int
):
    delimiter = "\t" if name.endswith("tsv") else ","
    lines = table(columns, delimiter=delimiter, end=end)
    for line, cell in ((4, '"n{}'), (4 + swallowed, 'n{}"')):
        lines[line] = lines[line].replace(f"n{line - 1}", cell.format(line - 1), 1)
    (tmp_path / name).write_bytes("".join(lines).encode())
    (found,) = problems_of(tmp_path, name)
    assert (found.line, found.key) == (5, "note")
    assert f"runs over lines 5 to {5 + swallowed}, and" in found.message
    assert "close or remove the quote" in found.message


WRONG_ROWS: dict[str, tuple[str, str]] = {
    # The rows at both quotes: their own mistakes must not hide that one swallows the other.
    "labels in words": ('MKL,"a,yes\n', 'MKV,b",0\n'),
    "no sequence": ('MKL,"a,yes\n', ',b",0\n'),
    "unknown residues": ('MKX,"a,1\n', 'MKZ,b",0\n'),
    "a row with commas in quotes": ('MKL,"a,1\n', 'MKV,""b, c"" d",0\n'),
    "blank lines between": ('MKL,"a,1\n\n\n', 'MKV,b",0\n'),
    "labels in quotes": ('MKL,"a,""1""\n', 'MKV,b",0\n'),
    "lower case and spaces": ('mkl,"a, 1 \n', ' mkv ,b",0\n'),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_wrong_rows_are_not_swallowed_either(tmp_path: Path, case: str):
    first, last = WRONG_ROWS[case]
    (tmp_path / "rows.csv").write_text(f"sequence,note,label\n{first}{last}", encoding="utf-8")
    (found,) = problems_of(tmp_path, "rows.csv")
    assert f"runs over lines 2 to {1 + (first + last).count(chr(10))}" in found.message


def test_a_header_swallows_no_rows(tmp_path: Path):
    lines = ["sequence,label,note\n", *(f"{sequence_of(n)},{n % 2},n\n" for n in range(40))]
    lines[0] = lines[0].replace("note", '"note')
    lines[7] = lines[7].replace(",n\n", ',n"\n')
    (tmp_path / "rows.csv").write_text("".join(lines), encoding="utf-8")
    (found,) = problems_of(tmp_path, "rows.csv")
    assert "runs over lines 1 to 8" in found.message


def test_a_quote_that_is_never_closed_is_told_with_both_lines(tmp_path: Path):
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        lines = table("sequence note label", delimiter=delimiter)
        lines[9] = lines[9].replace("n8", '"n8')
        (tmp_path / name).write_text("".join(lines), encoding="utf-8")
        (found,) = problems_of(tmp_path, name)
        assert found.line == 10
        assert "from here to line 41, the end of the file" in found.message
        assert "close or remove the one that stands alone" in found.message


TEXTS = [
    *("two\nlines", "a list:\n1 of 2\n\n2 of 2", "kept at 4, then cooled\nat -80, it is stable"),
    *("bought from X, Y, Z, and W,\nall in 2020", 'a ""word"", quoted\nthen more', "\ntrailing\n"),
    "0\n1",
]


@pytest.mark.parametrize("columns", COLUMNS)
def test_csv_fields_of_several_lines_of_text_are_read(tmp_path: Path, columns: str):
    lines = table(columns)
    (tmp_path / "plain.csv").write_text("".join(lines), encoding="utf-8")
    for line, text in enumerate(TEXTS, start=3):
        lines[line] = lines[line].replace(f"n{line - 1}", f'"{text}"', 1)
    (tmp_path / "rows.csv").write_text("".join(lines), encoding="utf-8")
    result = prepared(tmp_path, "rows.csv")
    assert result.development_sha256 == prepared(tmp_path, "plain.csv").development_sha256
    assert result.warnings == ()


def test_lines_are_counted_on_behind_a_field_of_several_lines(tmp_path: Path):
    lines = table("sequence note label", end="\r\n")
    lines[3] = lines[3].replace("n2", '"two\r\nlines"')
    lines[8] = lines[8].replace("MK", "MX")
    (tmp_path / "rows.csv").write_bytes("".join(lines).encode())
    (found,) = problems_of(tmp_path, "rows.csv")
    assert found.line == 10


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_quotes_inside_a_field_are_letters_of_it(tmp_path: Path, name: str):
    delimiter = "\t" if name.endswith("tsv") else ","
    lines = table("sequence note label", delimiter=delimiter)
    (tmp_path / f"plain_{name}").write_text("".join(lines), encoding="utf-8")
    for line, note in ((3, '5" primer'), (5, "3' end"), (7, 'a"')):
        lines[line] = lines[line].replace(f"n{line - 1}", note)
    (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    result = prepared(tmp_path, name)
    assert result.development_sha256 == prepared(tmp_path, f"plain_{name}").development_sha256


# --- checks: what spreadsheets and editors leave -------------------------------------------------


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_an_ignored_column_may_hold_any_length(tmp_path: Path, name: str):
    delimiter = "\t" if name.endswith("tsv") else ","
    lines = table("sequence note label", delimiter=delimiter)
    (tmp_path / f"plain_{name}").write_text("".join(lines), encoding="utf-8")
    lines[3] = lines[3].replace("n2", "long " * 50_000)
    (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    result = prepared(tmp_path, name)
    assert result.development_sha256 == prepared(tmp_path, f"plain_{name}").development_sha256


def test_a_sequence_of_any_length_is_read_and_told(tmp_path: Path):
    write_csv(tmp_path / "rows.csv", [*ROWS, ("MK" * 100_000, 1)])
    (found,) = problems_of(tmp_path, "rows.csv")
    assert "line 122 has 200,000 residues, max_length is 200" in found.message


@pytest.mark.parametrize("blank", ["{0}{0}", " {0}\xa0{0}", '""{0}""{0}""'])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_rows_of_empty_cells_are_left_out(tmp_path: Path, name: str, blank: str):
    delimiter = "\t" if name.endswith("tsv") else ","
    lines = table("sequence note label", delimiter=delimiter)
    (tmp_path / f"plain_{name}").write_text("".join(lines), encoding="utf-8")
    empty = blank.format(delimiter) + "\n"
    lines = [empty, *lines[:4], empty * 3, *lines[4:], empty * 1000]
    (tmp_path / name).write_text("".join(lines), encoding="utf-8")
    result = prepared(tmp_path, name)
    assert result.development_sha256 == prepared(tmp_path, f"plain_{name}").development_sha256


def test_a_row_with_a_note_alone_is_not_blank(tmp_path: Path):
    lines = table("sequence note label")
    (tmp_path / "rows.csv").write_text("".join([*lines, ",x,\n"]), encoding="utf-8")
    assert [(one.line, one.key) for one in problems_of(tmp_path, "rows.csv")] == [
        *((42, "sequence"), (42, "label")),
    ]


@pytest.mark.parametrize("marks", [1, 2, 3])
def test_several_byte_order_marks_do_not_matter(tmp_path: Path, marks: int):
    plain = prepared(tmp_path, write_fasta(tmp_path, ROWS)).development_sha256
    write_csv(tmp_path / "rows.csv", ROWS)
    for name in ("rows.csv", "soluble.fasta", "insoluble.fasta"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" * marks + content)
    assert prepared(tmp_path, "rows.csv").development_sha256 == plain
    pair = FastaPair(soluble="soluble.fasta", insoluble="insoluble.fasta")
    assert prepared(tmp_path, pair).development_sha256 == plain


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("mark", ["", "\ufeff", "\ufeff\ufeff"])
@pytest.mark.parametrize("width", [16, 32])
def test_utf_16_and_utf_32_are_named_with_and_without_a_mark(
    tmp_path: Path, encoding: str, mark: str, width: int
):
    pair = write_fasta(tmp_path, ROWS)
    write_csv(tmp_path / "rows.csv", ROWS)
    for name in ("rows.csv", "soluble.fasta"):
        text = mark + (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / name).write_bytes(text.encode(encoding.replace("16", str(width))))
    for source, file in (("rows.csv", "rows.csv"), (pair, "soluble.fasta")):
        (found,) = problems_of(tmp_path, source)
        assert (found.file, found.line, found.value) == (file, 1, f"UTF-{width}")
        assert found.message == f"is not UTF-8 text but UTF-{width}; save it as UTF-8"


# --- checks: DNA and RNA -------------------------------------------------------------------------


def dna_of(number: int) -> str:
    return "ATG" + "".join("ACGT"[number >> 2 * place & 3] for place in range(8))


@pytest.mark.parametrize("source", ["rows.csv", "rows.tsv", "rows.npz", "fasta"])
def test_dna_is_told_loudly_in_every_format(tmp_path: Path, source: str):
    rows = [(dna_of(number), number % 2) for number in range(40)]
    write_csv(tmp_path / "rows.csv", [(each.lower(), label) for each, label in rows])
    write_csv(tmp_path / "rows.tsv", rows, delimiter="\t")
    write_npz(tmp_path / "rows.npz", rows)
    result = prepared(tmp_path, write_fasta(tmp_path, rows) if source == "fasta" else source)
    (warning,) = result.loud
    assert warning.startswith("DNA, NOT PROTEINS? 40 of 40 sequences have only the letters ACGTUN")
    assert "translate them into proteins first" in warning
    assert result.warnings[0] == warning


def test_some_dna_among_proteins_is_told_and_short_peptides_are_not(tmp_path: Path):
    write_csv(tmp_path / "rows.csv", [*ROWS, ("GAGAGAGAG", 1)])
    assert prepared(tmp_path, "rows.csv").loud == ()
    write_csv(tmp_path / "rows.csv", [*ROWS, ("GAGAGAGAG", 1), ("ACGTNACGTN", 0)])
    (warning,) = prepared(tmp_path, "rows.csv").loud
    assert "1 of 122 sequences have" in warning
    assert "rows.csv, line 123: ACGTNACGTN" in warning


def test_dna_that_is_too_long_is_told_with_the_length(tmp_path: Path):
    write_csv(tmp_path / "rows.csv", [(dna_of(n) * 20, n % 2) for n in range(40)])
    long, dna = problems_of(tmp_path, "rows.csv")
    assert long.count == 40
    assert "set max_length = 220" in long.message
    assert dna.message.startswith("DNA, NOT PROTEINS? 40 of 40")


def test_rna_is_told_as_rna(tmp_path: Path):
    rows = [(dna_of(n).replace("T", "U"), n % 2) for n in range(40)]
    write_csv(tmp_path / "rows.csv", rows)
    found = problems_of(tmp_path, "rows.csv")[0]
    assert (found.line, found.count) == (2, 40)
    assert found.message.startswith("40 sequences that look like RNA (letters ACGTUN alone): line")
    assert "translate RNA into amino acids" in found.message


# --- checks: many problems of a kind -------------------------------------------------------------


def test_problems_of_a_kind_are_one_with_their_number_places_and_values(tmp_path: Path):
    words = ["ja"] * 170 + ["nein"] * 129 + ["maybe"]
    lines = [f"{sequence_of(number)},{word}" for number, word in enumerate(words)]
    (tmp_path / "rows.csv").write_text("\n".join(["sequence,label", *lines]), encoding="utf-8")
    (found,) = problems_of(tmp_path, "rows.csv")
    assert (found.line, found.key, found.value, found.count) == (2, "label", "ja", 300)
    assert found.message == (
        "300 labels that are neither 1 nor 0: line 2 ('ja'), line 3 ('ja'), line 4 ('ja'), line "
        "5 ('ja'), line 6 ('ja') and 295 more; in all 'ja' 170 times, 'nein' 129 times, 'maybe' "
        "once; write 1 (soluble) or 0 (insoluble); soluble/insoluble, true/false and yes/no can be "
        "used, too"
    )


def test_many_different_wrong_values_are_counted(tmp_path: Path):
    lines = [f"{sequence_of(number)},label{number}" for number in range(30)]
    (tmp_path / "rows.csv").write_text("\n".join(["sequence,label", *lines]), encoding="utf-8")
    (found,) = problems_of(tmp_path, "rows.csv")
    assert "'label9' once, and 20 others; write 1" in found.message


def test_all_wrong_residues_of_a_sequence_are_told(tmp_path: Path):
    (tmp_path / "rows.csv").write_text(f"sequence,label\nMXKB*X{'J' * 9},1\n{GOOD}")
    (found,) = problems_of(tmp_path, "rows.csv")
    assert found.message.startswith(
        "residues 2, 6 of the sequence are 'X', residue 4 is 'B', residue 5 is '*', residues 7, 8, "
        "9, 10, 11 and 4 more are 'J'; only ARNDCQEGHILKMFPSTWYV can be used"
    )
    assert found.value == "XKB*XJJJJJJJJJ"


def test_wrong_residues_of_many_sequences_are_counted_by_letter(tmp_path: Path):
    lines = [f"{sequence_of(number)}X{'B' if number == 7 else ''}X,1" for number in range(20)]
    (tmp_path / "rows.csv").write_text("\n".join(["sequence,label", *lines]), encoding="utf-8")
    (found,) = problems_of(tmp_path, "rows.csv")
    assert found.message.startswith(
        "20 sequences with letters that are not residues: line 2 (residues 7, 8 are 'X'), line 3 "
    )
    assert "and 15 more; in all 'X' 40 times, 'B' once; only ARND" in found.message


LENGTHS = {"rows.csv": "line 122 (250", "rows.npz": "row 5 of positives (250", "fasta": "(250"}


@pytest.mark.parametrize("source", LENGTHS)
def test_the_length_that_fits_is_that_of_all_sequences_of_all_files(tmp_path: Path, source: str):
    long = [("MK" * (125 + n // 2 % 5), n % 2) for n in range(190)]
    rows: Rows = [*ROWS, *long, ("KM" * 200, 0)]
    write_csv(tmp_path / "rows.csv", rows)
    write_npz(tmp_path / "rows.npz", rows, width=400)
    pair = write_fasta(tmp_path, rows)
    found = problems_of(tmp_path, pair if source == "fasta" else source)
    found = [problem for problem in found if "max_length" in problem.message]
    assert sum(problem.count for problem in found) == 191
    assert len(found) == (2 if source == "fasta" else 1)
    assert all("set max_length = 400 in [data]" in problem.message for problem in found)


def test_rows_with_another_mistake_count_for_the_length_that_fits(tmp_path: Path):
    lines = [f"{'MK' * 130},soluble", f"{'MK' * 140}X,1", f"{'MK' * 120},0"]
    (tmp_path / "rows.csv").write_text("\n".join(["sequence,label", *lines]), encoding="utf-8")
    found = {problem.key: problem for problem in problems_of(tmp_path, "rows.csv")[::-1]}
    long = problems_of(tmp_path, "rows.csv")[-1]
    assert set(found) == {"label", "sequence"}
    assert (long.line, long.count) == (2, 3)
    assert "line 2 (260 residues), line 3 (281 residues), line 4 (240 residues)" in long.message
    assert "set max_length = 281" in long.message


def test_every_kind_is_told_once_in_csv(tmp_path: Path):
    lines = ["sequence,note,label"]
    for number in range(6):
        good = sequence_of(number)
        lines += [f"{good}X,a,1", f",{number},1", f"{good},a", f"{good},a,x", f"{'MK' * 110},a,1"]
        lines += [f'{good},"a,1', f'{good},a",0', f"AC{'U' * 9},b,0", f"MKL,a,{number % 2}"]
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    found = problems_of(tmp_path, "rows.csv")
    assert [(one.line, one.key, one.count) for one in found] == [
        *((2, "sequence", 6), (3, "sequence", 6), (4, "", 6), (5, "label", 6)),
        *((7, "note", 6), (9, "sequence", 6), (6, "sequence", 6), (19, "label", 3)),
    ]


def test_every_kind_is_told_once_in_fasta(tmp_path: Path):
    pair = write_fasta(tmp_path, ROWS)
    records = [">a\nMKX\n", ">b\n\n", ">\nMKL\n"] * 6
    (tmp_path / "soluble.fasta").write_text("".join(records), encoding="utf-8")
    found = problems_of(tmp_path, pair)
    assert [(one.line, one.key, one.count) for one in found] == [
        *((1, "sequence", 6), (3, "sequence", 6), (5, "id", 6), (7, "id", 10)),
    ]
    assert "line 7 ('a', as in line 1), line 9 ('b', as in line 3)" in found[3].message


def test_every_kind_is_told_once_in_each_array(tmp_path: Path):
    arrays = good_arrays()
    for tokens in arrays.values():
        tokens[0:8, 3] = 0
        tokens[8:16, 2:14] = 21
        tokens[16:24] = 0
    np.savez(tmp_path / "rows.npz", **arrays)
    found = problems_of(tmp_path, "rows.npz")
    assert [(one.key, one.count) for one in found] == [
        *(("positives", 8), ("positives", 8), ("positives", 8)),
        *(("negatives", 8), ("negatives", 8), ("negatives", 8)),
    ]
    assert found[0].message == (
        "8 rows with padding (0) inside the sequence: row 0 (at position 3), row 1 (at position 3),"
        " row 2 (at position 3), row 3 (at position 3), row 4 (at position 3) and 3 more; padding "
        "stands at the end only"
    )


# --- checks: lengths and repeats -----------------------------------------------------------------


def test_a_long_sequence_is_an_error_that_names_the_length_needed(tmp_path: Path):
    write_csv(tmp_path / "rows.csv", [*ROWS, ("MK" * 130, 1), ("KM" * 150, 0)])
    (found,) = problems_of(tmp_path, "rows.csv")
    assert (found.line, found.key, found.count) == (122, "sequence", 2)
    assert found.message == (
        "2 sequences longer than max_length, which is 200: line 122 (260 residues), line 123 (300 "
        "residues); set max_length = 300 in [data] (the longest has that many), or truncate = "
        '"end" to keep its first residues ("start": its last, "middle": both ends)'
    )
    assert prepared(tmp_path, "rows.csv", max_length=300).warnings == ()


def test_a_long_sequence_is_cut_where_the_study_file_says_so(tmp_path: Path):
    write_csv(tmp_path / "long.csv", [*ROWS, ("MK" * 130, 1)])
    write_csv(tmp_path / "cut.csv", [*ROWS, ("MK" * 100, 1)])
    result = prepared(tmp_path, "long.csv", truncate="end")
    assert result.warnings == ("1 sequence was cut to the first 200 residues",)
    assert result.development_sha256 == prepared(tmp_path, "cut.csv").development_sha256


@pytest.mark.parametrize(
    ("cut", "length", "kept", "words"),
    [
        ("end", 5, "ARNDC", "first 5"),
        ("start", 5, "GHILK", "last 5"),
        ("middle", 5, "ARNLK", "first 3 and last 2"),
        ("middle", 4, "ARLK", "first 2 and last 2"),
        ("middle", 1, "A", "first 1"),
        ("start", 12, "ARNDCQEGHILK", "last 12"),
    ],
)
def test_a_cut_keeps_the_beginning_the_end_or_both(cut: Any, length: int, kept: str, words: str):
    assert truncated("ARNDCQEGHILK", length, cut) == kept
    assert kept_in_words(length, cut) == words


def test_sequences_that_differ_behind_the_cut_are_one(tmp_path: Path):
    start = "MKLV" * 50
    write_csv(tmp_path / "same.csv", [*ROWS, (f"{start}A", 1), (f"{start}R", 1)])
    warnings = prepared(tmp_path, "same.csv", truncate="end").warnings
    assert warnings[1].startswith("1 row repeats an earlier sequence (its first 200 residues)")

    write_csv(tmp_path / "other.csv", [*ROWS, (f"{start}A", 1), (f"{start}R", 0)])
    (tmp_path / "artifacts").rename(tmp_path / "before")
    (found,) = problems_of(tmp_path, "other.csv", truncate="end")
    assert "the same sequence (its first 200 residues) has label 1 in line 122" in found.message


def test_repeated_rows_are_kept_once_and_counted(tmp_path: Path):
    write_csv(tmp_path / "once.csv", ROWS)
    write_csv(tmp_path / "repeated.csv", [*ROWS, *ROWS[:7]])
    result = prepared(tmp_path, "repeated.csv")
    assert result.warnings == ("7 rows repeat an earlier sequence with the same label: left out",)
    assert result.development_sha256 == prepared(tmp_path, "once.csv").development_sha256


def test_lower_case_is_read_as_upper_case_and_counted(tmp_path: Path):
    rows = [(ROWS[0][0].lower(), ROWS[0][1]), *ROWS[1:]]
    write_csv(tmp_path / "rows.csv", rows)
    assert prepared(tmp_path, "rows.csv").warnings == (
        "1 sequence has lower-case residues: read as upper case",
    )


# --- checks: npz ---------------------------------------------------------------------------------


def good_arrays() -> dict[str, np.ndarray]:
    return {
        name: encode([sequence for sequence, label in ROWS if label == wanted], 200).astype(int)
        for name, wanted in (("positives", 1), ("negatives", 0))
    }


def with_value(row: int, position: int, value: int) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays["negatives"][row, position] = value

    return change


def replaced(**arrays: Any) -> Callable[[dict[str, Any]], None]:
    return lambda all_arrays: all_arrays.update(arrays)


BAD_ARRAYS: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str, str]] = {
    # name: (change of good arrays, key, value, part of the message)
    "token 21": (with_value(3, 5, 21), "negatives", "21", "row 3 (counted from 0) has token 21"),
    "token -1": (with_value(0, 0, -1), "negatives", "-1", "has token -1 at position 0"),
    "padding inside": (with_value(3, 5, 0), "negatives", "", "has padding (0) inside the"),
    "padding first": (with_value(3, 0, 0), "negatives", "0", "at position 0; padding stands at"),
    "empty sequence": (
        lambda arrays: arrays["positives"][2].fill(0),
        "positives",
        "0 0",
        "row 2 (counted from 0) is an empty sequence",
    ),
    "array missing": (lambda arrays: arrays.pop("positives"), "positives", "negatives", "no array"),
    "floats": (
        lambda arrays: arrays.update(positives=arrays["positives"] / 1),
        "positives",
        "float64",
        "has dtype float64; tokens are integers",
    ),
    "texts": (replaced(positives=np.array(["MKL"])), "positives", "<U3", "has dtype <U3"),
    "truth values": (replaced(positives=np.ones((9, 9), bool)), "positives", "bool", "dtype bool"),
    "one dimension": (replaced(positives=np.arange(9)), "positives", "(9,)", "has shape (9,)"),
    "three dimensions": (
        replaced(positives=np.ones((2, 2, 2), int)),
        "positives",
        "(2, 2, 2)",
        "has shape",
    ),
    "no rows": (
        replaced(positives=np.zeros((0, 200), int)),
        "label",
        "0",
        "every row has label 0; a classifier needs both",
    ),
    "contradicting labels": (
        lambda arrays: arrays["negatives"].__setitem__(0, arrays["positives"][0]),
        "label",
        "0",
        "row 0 of negatives says 0, but the same sequence has label 1 in row 0 of positives",
    ),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_a_bad_npz_file_is_refused_with_row_value_and_remedy(tmp_path: Path, case: str):
    change, key, value, message = BAD_ARRAYS[case]
    arrays = good_arrays()
    change(arrays)
    np.savez(tmp_path / "rows.npz", **arrays)
    check_problems(problems_of(tmp_path, "rows.npz")[:1], "rows.npz", [(None, key, value, message)])


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


def test_an_object_array_is_never_unpickled(tmp_path: Path):
    arrays = good_arrays()
    objects = np.empty((3, 2), dtype=object)
    objects[:] = Bomb(tmp_path / "exploded")
    np.savez(tmp_path / "rows.npz", positives=objects, negatives=arrays["negatives"])
    (found,) = problems_of(tmp_path, "rows.npz")
    assert "Object arrays cannot be loaded" in found.message
    assert not (tmp_path / "exploded").exists()
    with np.load(tmp_path / "rows.npz", allow_pickle=True) as proof:
        assert proof["positives"].shape == (3, 2)
    assert (tmp_path / "exploded").exists(), "the bomb would have gone off"


def broken_member(content: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("positives.npy", content)
        archive.writestr("negatives.npy", npy(good_arrays()["negatives"]))
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def whole_npz(tmp_path: Path) -> bytes:
    write_npz(tmp_path / "whole.npz", ROWS)
    return (tmp_path / "whole.npz").read_bytes()


def lying_header() -> bytes:
    header = npy(np.zeros((10, 10), np.int64))
    return header.replace(b"(10, 10), }      ", b"(%d, 10), }" % 10**7, 1)


NO_NPZ: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "text": (lambda _: b"sequence,label\nMKL,1\n", "is not an npz file"),
    "one array": (lambda _: npy(np.zeros((3, 3), int)), "is not an npz file"),
    "a pickle": (lambda _: b"\x80\x04K\x01.", "is not an npz file"),
    "cut": (lambda path: whole_npz(path)[:-30], "is not an npz file, or was cut"),
    "one bit flipped": (
        lambda path: whole_npz(path)[:5000] + b"\xff" + whole_npz(path)[5001:],
        "cannot be read (Bad CRC-32",
    ),
    "array cut": (
        lambda _: broken_member(npy(good_arrays()["positives"])[:999]),
        "cannot be read (",
    ),
    "no array inside": (lambda _: broken_member(b"hello"), "cannot be read ("),
    "empty member": (lambda _: broken_member(b""), "cannot be read ("),
    "header that lies": (lambda _: broken_member(lying_header()), "cannot be read ("),
    "bad header": (lambda _: broken_member(b"\x93NUMPY\x01\0\x05\0{[(,\n"), "cannot be read ("),
}


@pytest.mark.parametrize("case", NO_NPZ)
def test_what_is_no_whole_npz_file_is_refused(tmp_path: Path, case: str):
    make, message = NO_NPZ[case]
    (tmp_path / "rows.npz").write_bytes(make(tmp_path))
    (found,) = problems_of(tmp_path, "rows.npz")
    assert found.message.startswith(message)


def test_other_arrays_and_integer_types_do_not_matter(tmp_path: Path):
    write_npz(tmp_path / "plain.npz", ROWS)
    arrays = good_arrays()
    np.savez_compressed(
        tmp_path / "other.npz",
        note=np.array(["x"]),
        positives=arrays["positives"].astype(">i2"),
        negatives=np.asfortranarray(arrays["negatives"].astype(np.uint64)),
    )
    other = prepared(tmp_path, "other.npz")
    assert other.development_sha256 == prepared(tmp_path, "plain.npz").development_sha256


# --- checks: FASTA -------------------------------------------------------------------------------

BAD_FASTA: dict[str, tuple[str | bytes, list[tuple[int | None, str, str, str]]]] = {
    "unknown residue": (
        ">a\nMKL\n>b words\nMK\nLX\n",
        [(3, "sequence", "X", "residue 4 of the sequence 'b' is 'X'")],
    ),
    "empty sequence": (">a\n\n>b\nMKL\n", [(1, "sequence", "", "the sequence 'a' is empty")]),
    "empty last sequence": (">b\nMKL\n>a\n", [(3, "sequence", "", "the sequence 'a' is empty")]),
    "id twice": (
        ">a\nMKL\n\n>a other words\nMKV\n",
        [(4, "id", "a", "id 'a' stands in line 1 already; rename")],
    ),
    "no id": (">\nMKL\n", [(1, "id", "", "a header without an id; write >NAME")]),
    "garbage first": (
        "\nMKL\n>a\nMKL\n",
        [(2, "", "MKL", "a FASTA record starts with a line >NAME; remove what stands before")],
    ),
    "FASTQ": ("@a\nMKL\n+\nIII\n", [(1, "", "@a", "a FASTA record starts with")]),
    "blank": ("\n\n", [(None, "", "", "holds no records; each is a line >NAME")]),
    "not ASCII": (">ä\nMKä\n", [(1, "sequence", "", "residue 3 of the sequence")]),
    "not UTF-8": (b">a\nMK\xff\n", [(2, "", "0xff", "is not UTF-8 text")]),
    "empty file": (b"", [(None, "", "soluble.fasta", "is empty; was it")]),
    "gzip": (b"\x1f\x8b\x08\x00", [(None, "", "", "is a gzip file that is damaged")]),
}


@pytest.mark.parametrize("case", BAD_FASTA)
def test_a_bad_fasta_file_is_refused_with_line_value_and_remedy(tmp_path: Path, case: str):
    content, expected = BAD_FASTA[case]
    pair = write_fasta(tmp_path, ROWS)
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "soluble.fasta").write_bytes(content)
    check_problems(problems_of(tmp_path, pair), "soluble.fasta", expected)


def test_problems_of_both_fasta_files_are_reported(tmp_path: Path):
    (tmp_path / "a.fasta").write_text(">a\nMKX\n", encoding="utf-8")
    pair = FastaPair(soluble="a.fasta", insoluble="gone.fasta")
    assert [problem.file for problem in problems_of(tmp_path, pair)] == ["a.fasta", "gone.fasta"]


def test_a_protein_in_both_fasta_files_is_an_error_that_names_both_places(tmp_path: Path):
    pair = write_fasta(tmp_path, ROWS)
    soluble = (tmp_path / "soluble.fasta").read_text(encoding="utf-8")
    with (tmp_path / "insoluble.fasta").open("a", encoding="utf-8") as file:
        file.write(f">other\n{soluble.split('>')[1].partition(chr(10))[2]}")
    (found,) = problems_of(tmp_path, pair)
    assert found.file == "insoluble.fasta"
    assert "but the same sequence has label 1 in soluble.fasta, line 1;" in found.message


def test_an_id_in_both_fasta_files_is_counted_and_told(tmp_path: Path):
    write_fasta(tmp_path, ROWS)
    for name in ("soluble", "insoluble"):
        path = tmp_path / f"{name}.fasta"
        path.write_text(re.sub("protein[0-9]+", "same", path.read_text(), count=1))
    pair = FastaPair(soluble="soluble.fasta", insoluble="insoluble.fasta")
    assert prepared(tmp_path, pair).warnings == (
        "1 ids stand in both FASTA files (as 'same' does): taken as different proteins",
    )


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_fasta_line_ends_mark_comments_and_case_do_not_matter(tmp_path: Path, end: str):
    plain = prepared(tmp_path, write_fasta(tmp_path, ROWS))
    pair = write_fasta(tmp_path, [(each.lower(), label) for each, label in ROWS], wrap=7)
    for name in (pair.soluble, pair.insoluble):
        text = "# a comment\n;another\n\n" + (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", end).encode())
    other = prepared(tmp_path, pair)
    assert other.development_sha256 == plain.development_sha256
    assert other.warnings == ("120 sequences have lower-case residues: read as upper case",)


# --- foreign bytes -------------------------------------------------------------------------------


def alphabet(characters: str) -> st.SearchStrategy[bytes]:
    """Texts that come near to what the reader expects."""
    return st.text(alphabet=characters, max_size=60).map(lambda text: text.encode())


WHOLE = broken_member(npy(good_arrays()["positives"]), zipfile.ZIP_DEFLATED)


@st.composite
def damaged_npz(draw: st.DrawFn) -> bytes:
    """A whole npz file with up to three bytes changed, most of them where its structure is."""
    content = bytearray(WHOLE)
    ends = st.integers(0, 150) | st.integers(len(WHOLE) - 200, len(WHOLE) - 1)
    for position in draw(st.lists(ends | st.integers(0, len(WHOLE) - 1), min_size=1, max_size=3)):
        content[position] = draw(st.integers(0, 255))
    return bytes(content)


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("rows.csv", st.binary(max_size=60) | alphabet('sequence,label\n\r"MKX01;\0\u0131')),
        ("rows.npz", st.binary(max_size=60) | damaged_npz()),
        ("rows.fasta", st.binary(max_size=60) | alphabet(">#; \x0b\x1c\x85\u2028\xa0\n\rMKX")),
    ],
)
@given(examples=st.data())
def test_foreign_bytes_are_usable_rows_or_a_data_error(
    tmp_path: Path, name: str, contents: st.SearchStrategy[bytes], examples: st.DataObject
):
    (tmp_path / name).write_bytes(examples.draw(contents))
    source = FastaPair(soluble=name, insoluble=name) if name == "rows.fasta" else name
    with contextlib.suppress(DataError):
        prepared(tmp_path, source)


# --- places --------------------------------------------------------------------------------------


def test_relative_paths_start_at_the_study_files_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "study" / "rows").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    write_csv(tmp_path / "study" / "rows" / "mine.csv", ROWS)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert prepared(tmp_path / "study", "rows/mine.csv").identity.source == "rows/mine.csv"
    absolute = str(tmp_path / "study" / "rows" / "mine.csv")
    assert prepared(tmp_path / "elsewhere", absolute).identity.source == absolute
    monkeypatch.setenv("HOME", str(tmp_path / "study"))
    assert prepared(tmp_path / "elsewhere", "~/rows/mine.csv").identity.training_rows > 0


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path):
    (found,) = problems_of(tmp_path, "gone.csv")
    assert (found.file, found.value) == ("gone.csv", "gone.csv")
    assert found.message == (
        f"does not exist (looked for {tmp_path / 'gone.csv'}); relative paths start at the study "
        "file's folder"
    )


def test_a_folder_is_refused(tmp_path: Path):
    (tmp_path / "rows.csv").mkdir()
    (found,) = problems_of(tmp_path, "rows.csv")
    assert found.message == "is a folder; name a file in it"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "rows.csv")
    (found,) = problems_of(tmp_path, "rows.csv")
    assert "is not a regular file" in found.message


def test_an_unreadable_file_is_named_with_the_systems_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    write_csv(tmp_path / "rows.csv", ROWS)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    (found,) = problems_of(tmp_path, "rows.csv")
    assert found.message == "cannot be read: Permission denied"


# --- the published data set ----------------------------------------------------------------------


@pytest.fixture
def no_data_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no TUNER_DATA_DIR, no proxy; returns the cache's folder."""
    monkeypatch.delenv("TUNER_DATA_DIR", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    cache = tmp_path / "cache"
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: cache)
    # Port 9 of this machine: nobody listens, so nothing here ever reaches the network.
    monkeypatch.setattr(solubility, "SOLUBILITY_URL", "http://127.0.0.1:9/solubility.npz")
    return cache


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small file in the place of the published one."""
    write_npz(tmp_path / "published.npz", ROWS)
    content = (tmp_path / "published.npz").read_bytes()
    monkeypatch.setattr(solubility, "SOLUBILITY_SHA256", hashlib.sha256(content).hexdigest())
    return content


class Server(http.server.ThreadingHTTPServer):
    """Answers every request with `content`, of which it announces `announced` bytes."""

    content = b""
    announced = 0
    cache = Path()  #: where the download goes
    status = 200
    requests = 0


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(self.server.announced))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(no_data_here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.cache = no_data_here
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{running.server_address[1]}/solubility.npz"
        monkeypatch.setattr(solubility, "SOLUBILITY_URL", url)
        yield running
        running.shutdown()
        thread.join()


def test_the_data_set_is_downloaded_once_and_without_noise(
    no_data_here: Path,
    published: bytes,
    server: Server,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    server.content, server.announced = published, len(published)
    assert locate() is None
    identity = prepared(tmp_path, "solubility").identity
    assert identity.source == "solubility"
    assert identity.sha256 == solubility.SOLUBILITY_SHA256
    assert fetch() == locate() == no_data_here / "solubility.npz"
    assert prepared(tmp_path, "solubility").identity == identity
    assert server.requests == 1
    assert list(no_data_here.iterdir()) == [no_data_here / "solubility.npz"]
    assert capfd.readouterr() == ("", "")


BROKEN_ANSWERS = {
    "cut in the middle": (200, 0.5, "ChunkedEncodingError|ConnectionError|wrong sha256"),
    "not found": (404, 1, "HTTP status 404"),
    "another file": (200, 2, "sent another file \\(wrong sha256\\)"),
}


@pytest.mark.parametrize("case", BROKEN_ANSWERS)
def test_a_broken_download_leaves_nothing_behind_and_is_not_repeated(
    case: str,
    published: bytes,
    server: Server,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    status, part, reason = BROKEN_ANSWERS[case]
    server.status = status
    server.content = (published * 2)[: int(len(published) * part)]
    server.announced = max(len(published), len(server.content))
    with pytest.raises(DataError, match=reason):
        fetch()
    assert server.requests == 1
    assert list(server.cache.iterdir()) == []
    assert capfd.readouterr() == ("", "")

    result = prepared(tmp_path, "solubility", fallback="synthetic")
    assert result.identity.synthetic


def test_without_network_the_error_says_what_can_be_done(no_data_here: Path, tmp_path: Path):
    (found,) = problems_of(tmp_path, "solubility")
    assert (found.key, found.value) == ("data.source", "solubility")
    for part in (
        f"looked for {tmp_path / 'solubility.npz'}, {no_data_here / 'solubility.npz'}",
        "http://127.0.0.1:9/solubility.npz: ConnectionError",
        "name that folder in TUNER_DATA_DIR",
        'set fallback = "synthetic"',
    ):
        assert part in found.message
    with pytest.raises(DataError, match="cannot be downloaded"):
        fetch()


def test_the_download_gives_up_connecting_after_5_seconds(
    no_data_here: Path, monkeypatch: pytest.MonkeyPatch
):
    import requests

    seen: list[dict[str, Any]] = []

    def blackhole(*_: object, **options: Any) -> None:
        seen.append(options)
        raise requests.exceptions.ConnectTimeout("https://user:secret@proxy did not answer")

    monkeypatch.setattr(requests, "get", blackhole)
    with pytest.raises(DataError, match=r"solubility\.npz: ConnectTimeout\)") as caught:
        fetch()
    assert "secret" not in str(caught.value)
    assert [options["timeout"][0] for options in seen] == [5]


def test_the_fallback_is_marked_and_told_loudly(no_data_here: Path, tmp_path: Path):
    result = prepared(tmp_path, "solubility", fallback="synthetic")
    plain = prepared(tmp_path, "synthetic")
    assert result.identity == plain.identity
    assert result.identity.synthetic
    assert result.identity.source == "synthetic"
    assert result.development_sha256 == plain.development_sha256
    (warning,) = result.warnings
    assert warning.startswith('SYNTHETIC DATA: the data set "solubility" cannot be had (http')
    assert plain.warnings == ()


def test_the_fallback_is_not_for_files_of_the_user(no_data_here: Path, tmp_path: Path):
    (tmp_path / "broken.npz").write_bytes(b"PK")
    for source in ("gone.csv", "broken.npz"):
        problems_of(tmp_path, source, fallback="synthetic")


def test_the_data_set_is_looked_for_beside_the_study_then_in_the_data_dir_then_in_the_cache(
    no_data_here: Path, published: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folders = [tmp_path / "study", tmp_path / "shared", no_data_here]
    monkeypatch.setenv("TUNER_DATA_DIR", str(tmp_path / "shared"))
    assert locate(tmp_path / "study") is None
    for folder in reversed(folders):
        folder.mkdir()
        (folder / "solubility.npz").write_bytes(published)
        assert locate(tmp_path / "study") == folder / "solubility.npz"
    assert locate() == fetch() == tmp_path / "shared" / "solubility.npz"


@pytest.mark.parametrize("cached", [None, b"", b"half"])
def test_what_was_found_in_the_data_dir_is_found_again_in_another_terminal(
    cached: bytes | None,
    no_data_here: Path,
    published: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    if cached is not None:
        no_data_here.mkdir()
        (no_data_here / "solubility.npz").write_bytes(cached)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "solubility.npz").write_bytes(published)
    monkeypatch.setenv("TUNER_DATA_DIR", str(tmp_path / "shared"))
    first = prepared(tmp_path, "solubility", fallback="synthetic")
    monkeypatch.delenv("TUNER_DATA_DIR")
    again = prepared(tmp_path, "solubility", fallback="synthetic")
    assert again.identity == first.identity
    assert not again.identity.synthetic
    assert locate() == no_data_here / "solubility.npz"


def test_a_cache_that_cannot_be_written_is_only_missed(
    no_data_here: Path, published: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    no_data_here.write_text("a file where the cache's folder would be")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "solubility.npz").write_bytes(published)
    monkeypatch.setenv("TUNER_DATA_DIR", str(tmp_path / "shared"))
    assert locate() == tmp_path / "shared" / "solubility.npz"


@pytest.mark.parametrize("content", [b"another file", b""])
def test_another_file_in_the_data_dir_is_an_error_whatever_the_fallback(
    no_data_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
):
    monkeypatch.setenv("TUNER_DATA_DIR", str(tmp_path / "shared"))
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "solubility.npz").write_bytes(content)
    (found,) = problems_of(tmp_path, "solubility", fallback="synthetic")
    assert found.file == str(tmp_path / "shared" / "solubility.npz")
    assert "this is not the published data set" in found.message or "is empty" in found.message
    with pytest.raises(DataError):
        fetch()


def test_a_damaged_file_in_the_cache_is_replaced(
    no_data_here: Path, published: bytes, server: Server
):
    server.content, server.announced = published, len(published)
    no_data_here.mkdir()
    (no_data_here / "solubility.npz").write_bytes(b"damaged")
    assert locate() is None
    assert fetch().read_bytes() == published


# --- the real data set ---------------------------------------------------------------------------


@needs_real_data
def test_the_published_data_set_is_what_the_design_says(tmp_path: Path):
    result = prepared(tmp_path, "solubility", seed=1)
    identity = result.identity
    assert identity.sha256 == solubility.SOLUBILITY_SHA256
    assert (identity.training_rows, identity.validation_rows, identity.test_rows) == (
        *(14763, 1845, 1845),
    )
    # 8785 soluble and 9668 insoluble sequences, no repeats, in the proportions of both labels.
    assert result.warnings == ()
    development = load_development(result.development_file, result.development_sha256)
    assert np.bincount(development.training_labels).tolist() == [7734, 7029]
    assert np.bincount(development.validation_labels).tolist() == [967, 878]
    lengths = (development.training_tokens != 0).sum(axis=1)
    assert (lengths.min(), lengths.max()) == (19, 198)


@needs_real_data
def test_the_real_split_stays_the_one_that_figures_were_published_for(tmp_path: Path):
    identity = prepared(tmp_path, "solubility", seed=1).identity
    assert identity.split_id == "6ff12fa7e361cd287b90bb951750ccf88d6c4356efcfc3c5447ff9747904519c"


# --- the synthetic set ---------------------------------------------------------------------------


def test_the_synthetic_set_is_the_same_everywhere(tmp_path: Path):
    result = prepared(tmp_path, "synthetic")
    identity = result.identity
    assert identity.synthetic
    assert identity.sha256 == "0924fe5d7fdc17cd8f13c5e59df08425d8dc2f2f4366d27ebfec2336c5364507"
    assert identity.split_id == "23001107da506c21b52edafebad0c50130c156702586611fe24b7b1f031feef9"
    assert result.development_sha256 == (
        "a2bf35bca783036135882adf99bbb23c5f928a7cc7b642139146fe10503c3445"
    )
    assert (identity.training_rows, identity.validation_rows, identity.test_rows) == (
        *(4800, 600, 600),
    )


def test_the_synthetic_labels_follow_the_rule_but_for_the_noise():
    patch = re.compile(
        f"[{synthetic.SYNTHETIC_PATCH_RESIDUES}]{{{synthetic.SYNTHETIC_PATCH_LENGTH}}}"
    )
    soluble = np.array([not patch.search(sequence) for sequence in ALL_SEQUENCES])
    agreement = np.mean(soluble == ALL_LABELS)
    # 6,000 draws at 15 %: the standard error is 0.5 %.
    assert agreement == pytest.approx(synthetic.SYNTHETIC_BEST_ACCURACY, abs=0.01)
    noise = synthetic.SYNTHETIC_NOISE_PERCENT / 100
    entropy = -noise * np.log(noise) - (1 - noise) * np.log(1 - noise)
    assert entropy == pytest.approx(synthetic.SYNTHETIC_BEST_LOSS, abs=5e-5)


def test_the_synthetic_sequences_look_like_the_published_ones():
    lengths = np.array([len(sequence) for sequence in ALL_SEQUENCES])
    assert len(set(ALL_SEQUENCES)) == synthetic.SYNTHETIC_ROWS
    assert (lengths.min(), lengths.max()) == (19, 198)
    assert np.mean(lengths) == pytest.approx(139, abs=1)  # design.md, measured on the real file
    assert np.mean(ALL_LABELS) == pytest.approx(8785 / 18453, abs=0.02)
    counts = Counter("".join(ALL_SEQUENCES))
    assert set(counts) == set(RESIDUES)
    # UniProtKB/Swiss-Prot: 9.65 % leucine, 1.10 % tryptophan.
    assert counts["L"] / lengths.sum() == pytest.approx(0.0965, abs=0.003)
    assert counts["W"] / lengths.sum() == pytest.approx(0.0110, abs=0.001)


# --- imports -------------------------------------------------------------------------------------


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parent.parent.parent)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return set(run.stdout.split())


def test_a_worker_that_loads_its_rows_imports_no_downloader_and_no_fasta_reader():
    slow = {"pooch", "requests", "dnaio", "optuna", "sqlalchemy", "tensorflow"}
    assert not slow & imported_by("import tuner.data.prepare")
    assert "pooch" in imported_by("import pooch")
