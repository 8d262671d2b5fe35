"""What a file of the user's holds, before a study file says how to read it."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tuner.data.files import load_source
from tuner.data.labels import WORDS, plain_word
from tuner.data.problems import Problems, shortened
from tuner.data.rows import UNKNOWN_RESIDUE, UNKNOWN_RESIDUES
from tuner.data.sources import data_suffix
from tuner.data.text import NOT_A_RESIDUE, cleaned, file_text, read_bytes
from tuner.spec.spec import ColumnSettings, DataSettings, FastaPair, column_key

_SAMPLED_ROWS = 1_000  #: by which columns are told
_MOST = 0.9  #: of the sampled rows, which in the column of labels have one, say
_NO_NAMES = WORDS.keys() - {"soluble", "insoluble"}  #: labels that no column of labels is called
_NO_NAME = 20  #: letters of a sequence that no column is called
_SPLIT_NAMES = ("split", "partition", "set", "subset", "fold", "group")  #: in lower case
_VALIDATION_NAMES = ("validation", "valid", "val", "dev", "development")  #: likewise
_TEST_NAMES = ("test", "testing", "holdout", "held-out")  #: likewise
_MOST_PARTS = 20  #: values of a column that names parts or groups
_SHORTEST = 5  #: residues; by shorter words no column of sequences is told


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitColumn:
    """A column that looks as if it named the parts of a split, or groups."""

    name: str
    values: tuple[str, ...]  #: of the rows looked at, in the order of their names; at least 3

    @property
    def validation(self) -> str:
        """The value that is called like the validation split, or else the last but one."""
        return (
            self._called(_VALIDATION_NAMES) or [one for one in self.values if one != self.test][-1]
        )

    @property
    def test(self) -> str:
        """The value that is called like the test split, or else the last."""
        return self._called(_TEST_NAMES) or self.values[-1]

    def _called(self, names: tuple[str, ...]) -> str | None:
        return next((value for value in self.values if value.lower() in names), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a source holds."""

    settings: DataSettings  #: files and columns, named from the current folder
    other_columns: tuple[str, ...]  #: of a table, those that are not read
    split_column: SplitColumn | None  #: that may name the parts of a split
    labels: Mapping[str, frozenset[int]]  #: of each different sequence; two are a conflict
    lengths: npt.NDArray[np.int64]  #: of the different sequences, residues, rising, [n]

    @property
    def rows(self) -> int:
        """Different sequences."""
        return len(self.labels)

    @property
    def soluble(self) -> float:
        """Share of the sequences with label 1; one with both counts half."""
        return sum(sum(found) / len(found) for found in self.labels.values()) / self.rows

    @property
    def unknown(self) -> int:
        """Sequences with letters that are not residues."""
        return sum(UNKNOWN_RESIDUE in sequence for sequence in self.labels)

    def conflicts(self, max_length: int) -> int:
        """Different sequences that have both labels, where they are cut at the end."""
        cut: dict[str, frozenset[int]] = {}
        for sequence, found in self.labels.items():
            begins = sequence[:max_length]
            cut[begins] = cut.get(begins, frozenset()) | found
        return sum(len(found) > 1 for found in cut.values())


def survey(
    files: Sequence[Path], *, sequence_column: str | None = None, label_column: str | None = None
) -> Survey:
    """Reads a source by the policies that accept most.

    Args:
        files: A table (.csv, .tsv, each also .gz), an npz file, or two FASTA files, the one of
            soluble sequences first.
        sequence_column: Of a table; found by what stands in it if it is not given.
        label_column: Likewise.

    Raises:
        DataError: It cannot be used; lists every problem found.
    """
    problems = Problems()
    source: str | FastaPair
    columns = ColumnSettings()
    other: tuple[str, ...] = ()
    split_column = None
    if len(files) == 2:
        source = FastaPair(soluble=str(files[0]), insoluble=str(files[1]))
    else:
        source = str(files[0])
        if data_suffix(files[0]) != ".npz":
            columns, other, split_column = _columns(
                files[0], sequence_column, label_column, problems
            )
            problems.raise_if_any()
    settings = DataSettings(source=source, columns=columns, unknown="mask")
    found = load_source(settings, Path(), problems)
    problems.raise_if_any()
    labels: dict[str, frozenset[int]] = {}
    for row in found.rows:
        labels[row.sequence] = labels.get(row.sequence, frozenset()) | {row.label}
    return Survey(
        settings=settings,
        other_columns=other,
        split_column=split_column,
        labels=labels,
        lengths=np.sort(np.fromiter(map(len, labels), np.int64, len(labels))),
    )


# --- columns ---


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A column that is looked for."""

    what: str  #: that stands in it, in the plural
    option: str  #: that names it
    names: tuple[str, ...]  #: usual ones, the likeliest first; in lower case
    is_one: Callable[[str], bool]  #: whether a field may be of this column


def _is_sequence(field: str) -> bool:
    letters = cleaned(field)[0].upper().translate(_WITHOUT_UNKNOWN)
    return len(letters) >= _SHORTEST and NOT_A_RESIDUE.search(letters) is None


def _is_label(field: str) -> bool:
    return plain_word(field) in WORDS


_WITHOUT_UNKNOWN = str.maketrans("", "", UNKNOWN_RESIDUES)
_SEQUENCES = _Wanted(
    what="sequences",
    option="--sequence-column",
    names=("sequence", "seq", "fasta", "protein", "protein_sequence", "aa_sequence"),
    is_one=_is_sequence,
)
_LABELS = _Wanted(
    what="labels (1 and 0, soluble and insoluble, true and false, yes and no)",
    option="--label-column",
    names=("label", "solubility", "soluble", "is_soluble", "class", "target", "y"),
    is_one=_is_label,
)


def _columns(
    path: Path, sequence_column: str | None, label_column: str | None, problems: Problems
) -> tuple[ColumnSettings, tuple[str, ...], SplitColumn | None]:
    """The columns of a table, those that are left, and which of these may name a split.

    Adds a problem where one is not found.
    """
    file = str(path)
    content = read_bytes(path, file, problems)
    text = file_text(file, content, problems) if content else None
    if text is None:
        return ColumnSettings(), (), None
    header, rows = _sample(text, "\t" if data_suffix(path).startswith(".tsv") else ",")
    if len(header) < 2:  # another delimiter, or no table: who reads the rows says so
        return ColumnSettings(), (), None
    sequence = _found(_SEQUENCES, sequence_column, header, rows, file, problems)
    label = _found(_LABELS, label_column, header, rows, file, problems)
    if sequence is None or label is None:
        return ColumnSettings(), (), None
    if plain_word(label) in _NO_NAMES or (len(sequence) >= _NO_NAME and _is_sequence(sequence)):
        message = "the first line holds a row; write a line with the names of the columns before it"
        problems.add(file, message, line=1, value=",".join(header))
    read = {column_key(sequence), column_key(label)}
    other = tuple(name for name in header if column_key(name) not in read)
    split = _split_column(other, header, rows)
    return ColumnSettings(sequence=sequence, label=label), other, split


def _split_column(
    names: Sequence[str], header: Sequence[str], rows: Sequence[Sequence[str]]
) -> SplitColumn | None:
    """The first of the columns that is called like a split and has few different values."""
    for name in names:
        if column_key(name) in _SPLIT_NAMES:
            at = header.index(name)
            values = tuple(sorted({fields[at].strip() for fields in rows} - {""}))
            if 3 <= len(values) <= _MOST_PARTS:
                return SplitColumn(name=name, values=values)
    return None


def _sample(text: str, delimiter: str) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, and the first rows that have a field for each."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        filled = (fields for fields in reader if any(map(str.strip, fields)))
        header = [name.strip() for name in next(filled, [])]
        sampled = itertools.islice(filled, _SAMPLED_ROWS)
        return header, [fields for fields in sampled if len(fields) == len(header)]
    except csv.Error:  # who reads the rows says where
        return [], []


def _found(
    wanted: _Wanted,
    named: str | None,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    file: str,
    problems: Problems,
) -> str | None:
    """The column's name; None, with a problem added, where it cannot be told."""
    listed = ", ".join(header)
    if named is not None:
        if column_key(named) in map(column_key, header):
            return named
        message = f"no column {named!r} among {shortened(listed)}; correct {wanted.option}"
        problems.add(file, message, line=1, value=named)
        return None
    fitting = [
        name
        for at, name in enumerate(header)
        if rows and sum(wanted.is_one(fields[at]) for fields in rows) >= _MOST * len(rows)
    ]
    if len(fitting) == 1:
        return fitting[0]
    by_name = {column_key(name): name for name in reversed(fitting)}
    for usual in wanted.names:
        if usual in by_name:
            return by_name[usual]
    why = f"several columns hold {wanted.what}: {', '.join(fitting)}"
    if not fitting:
        why = f"no column holds {wanted.what} among {shortened(listed)}"
    problems.add(file, f"{why}; name one with {wanted.option}", line=1, value=listed)
    return None
