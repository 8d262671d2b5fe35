"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.data.given import PartReader
from tuner.data.labels import WORDS, LabelReader, plain_word, read_weight
from tuner.data.problems import (
    NO_FOLD,
    SEVERAL_LINES,
    SEVERAL_LINES_TSV,
    WRONG_FIELDS,
    Problems,
    Refused,
    listed,
)
from tuner.data.rows import Row
from tuner.data.text import (
    NOT_A_RESIDUE,
    SequenceReader,
    cell_sequence,
    cleaned,
    file_text,
    is_separator_line,
)
from tuner.errors import counted
from tuner.spec.spec import column_key

if TYPE_CHECKING:
    from tuner.spec.spec import ColumnSettings, SplitSettings

_LINE_END = re.compile(r"\r\n|\r|\n")
#: Python's own limit of 131,072 letters would refuse long text in a column that is ignored.
_LONGEST_FIELD = 2**31 - 1
#: What separates fields, and how it is called.
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "';'", "|": "'|'"}
#: Where the study file names a column that is not one of `[data.columns]`.
_NAMES_ANOTHER = {
    "part": "column in [data.split] names that of the split",
    "fold": "folds in [data.split] names that of the folds",
}
_REMEDIES = {",": "name it .csv", "\t": "name it .tsv"}


def csv_rows(
    file: str,
    content: bytes,
    delimiter: str,
    columns: ColumnSettings,
    split: SplitSettings,
    reader: SequenceReader,
) -> tuple[list[Row], list[str]]:
    """Rows of a CSV or TSV file with these columns, and warnings; other columns are ignored."""
    text = file_text(file, content, reader.problems)
    if text is None:
        return [], []
    table = _Table(file, delimiter, columns, split, reader)
    rows = table.rows(text)
    table.parts.check_names()
    return rows, table.labels.warnings()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    """A record of a CSV or TSV file: a line, or several where a quoted field has line breaks."""

    fields: list[str]  #: in the order of the columns
    line: int  #: the first, from 1
    last_line: int

    @property
    def place(self) -> str:
        if self.last_line == self.line:
            return f"line {self.line}"
        return f"lines {self.line} to {self.last_line}"


def _records(file: str, text: str, delimiter: str, problems: Problems) -> Iterator[_Record]:
    """The records of a CSV or TSV file that are not blank; ends at what cannot be read."""
    csv.field_size_limit(_LONGEST_FIELD)
    stream = io.StringIO(text, newline="")
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    last_line = 0
    try:
        for fields in reader:
            line, last_line = last_line + 1, reader.line_num
            # Spreadsheets save many rows of empty cells.
            if any(map(str.strip, fields)):
                yield _Record(fields=fields, line=line, last_line=last_line)
    except csv.Error as error:
        last = f"line {reader.line_num}" + ("" if stream.read(1) else ", the end of the file")
        message = (
            f"the record cannot be read as {delimiter!r}-separated text from here to {last} "
            f"({error}); check the quotes: close or remove the one that stands alone"
        )
        problems.add(file, message, line=last_line + 1)


class _Table:
    """A CSV or TSV file that is read."""

    def __init__(
        self,
        file: str,
        delimiter: str,
        columns: ColumnSettings,
        split: SplitSettings,
        reader: SequenceReader,
    ) -> None:
        self._file = file
        self._delimiter = delimiter
        self._problems = reader.problems
        self._reader = reader
        self.labels = LabelReader(file, reader.problems)
        self.parts = PartReader(file, split, reader.problems)
        #: As they are compared; the last is None where no column has weights.
        self._sequence, self._label = column_key(columns.sequence), column_key(columns.label)
        self._weight = None if columns.weight is None else column_key(columns.weight)
        named = split.column_names
        self._part, self._fold = (
            None if key not in named else column_key(named[key]) for key in ("part", "fold")
        )
        self._columns: list[str] = []  # all that the file has, in their order

    @property
    def _wanted(self) -> dict[str, str]:
        """The columns that are read, by their key in the study file."""
        wanted = {
            "sequence": self._sequence,
            "label": self._label,
            "weight": self._weight,
            "part": self._part,
            "fold": self._fold,
        }
        return {key: name for key, name in wanted.items() if name is not None}

    def rows(self, text: str) -> list[Row]:
        """The rows of the file's text, up to what cannot be read."""
        rows: list[Row] = []
        for record in _records(self._file, text, self._delimiter, self._problems):
            if is_separator_line(record.fields):
                continue
            if not self._columns:
                self._columns = [column_key(field) for field in record.fields]
                if self._may_hold_rows(record) or not self._has_columns(record.line):
                    break
            elif not self._may_hold_rows(record):
                row = self._row(record)
                if row is not None:
                    rows.append(row)
        if not self._columns and not self._problems:
            named = self._delimiter.join(self._wanted.values())
            self._problems.add(self._file, f"holds no rows; the first line has to be: {named}")
        return rows

    def _row(self, record: _Record) -> Row | None:
        """The row of a record; None, with problems added, where it is not one."""
        fields, line, place = record.fields, record.line, record.place
        if len(fields) != len(self._columns):
            names = len(self._columns)
            what = f"{counted(len(fields), 'field')} where the header names {names}"
            self._problems.add_one(
                WRONG_FIELDS,
                self._file,
                what if line == record.last_line else f"{what}, in {place}",
                place=place,
                detail=str(len(fields)),
                line=line,
                value=self._delimiter.join(fields),
            )
            return None
        raw = cell_sequence(fields[self._columns.index(self._sequence)])
        sequence = self._reader.read(raw, self._file, line, "the sequence")
        label = self.labels.read(fields[self._columns.index(self._label)], line, place)
        weight = None
        if self._weight is not None:
            given = fields[self._columns.index(self._weight)]
            weight = read_weight(given, self._file, line, place, self._problems)
        part = None
        if self._part is not None:
            part = self.parts.read(fields[self._columns.index(self._part)], line, place)
        fold = None
        if self._fold is not None:
            fold = self._read_fold(fields[self._columns.index(self._fold)], line, place)
        if sequence is None:
            return None
        if (
            label is None
            or (weight is None and self._weight is not None)
            or (part is None and self._part is not None)
            or (fold is None and self._fold is not None)
        ):
            refused = Refused(file=self._file, line=line, place=place, sequence=sequence)
            self._problems.refused.append(refused)
            return None
        return Row(
            sequence=sequence,
            label=label,
            file=self._file,
            line=line,
            place=f"line {line}",
            weight=weight,
            part=part,
            fold=fold,
        )

    def _read_fold(self, text: str, line: int, place: str) -> str | None:
        """The name of a fold; None, with a problem added, where there is none."""
        if text.strip():
            return text.strip()
        self._problems.add_one(
            NO_FOLD,
            self._file,
            f"no value in the column {self._fold!r}",
            place=place,
            line=line,
            key=str(self._fold),
        )
        return None

    def _may_hold_rows(self, record: _Record) -> bool:
        """Whether a record of several lines may have swallowed rows; adds the problem.

        A lone quote makes a field of all that follows up to the next lone quote: the rest of its
        row, whole rows, and the start of the row with that quote. If both stand in one column, what
        is left is a row with the right number of fields: the first row's sequence with the last
        row's label.

        In TSV a record is a line. In CSV a field may hold line breaks, so its text decides: it may
        not in the columns that are read, nor where it looks like rows.
        """
        if record.last_line == record.line:
            return False
        for at, text in enumerate(record.fields):
            column = "".join(self._columns[at : at + 1])
            if self._delimiter == "\t" and _LINE_END.search(text):
                kind, why = SEVERAL_LINES_TSV, "a TSV record is one line"
            elif _LINE_END.search(text.strip()) and (
                column in self._wanted.values() or self._looks_like_rows(text, at)
            ):
                kind, why = SEVERAL_LINES, "may hold rows of the file"
            else:
                continue
            self._problems.add_one(
                kind,
                self._file,
                f"a quoted field runs over {record.place}, and {why}",
                place=record.place,
                line=record.line,
                key=column,
                value=text,
            )
            return True
        return False

    def _looks_like_rows(self, text: str, at: int) -> bool:
        """Whether the text of a field, the one in column `at`, may be the swallowed part of rows.

        Cut at delimiters, it has a sequence and a label among its pieces. Or, as the sequences and
        labels of a file may be wrong: each of its lines has as many delimiters as swallowed rows,
        and where these have their sequence, a word or nothing, or where they have their label, one.
        """
        first, *middle, last = (
            [piece.strip(' "') for piece in line.split(self._delimiter)]
            for line in _LINE_END.split(text)
        )
        middle = [line for line in middle if any(line)]
        pieces = [*first, *(piece for line in middle for piece in line), *last]
        labels = {piece for piece in pieces if plain_word(piece) in self.labels.known}
        # "yes" and "false" have the letters of residues, too.
        if labels and any(
            piece not in labels and piece and not NOT_A_RESIDUE.search(cleaned(piece)[0])
            for piece in pieces
        ):
            return True
        width = len(self._columns)
        whole = all(len(line) == width for line in middle)
        if not (whole and len(first) == width - at and len(last) == at + 1):
            return False

        def swallowed(column: str) -> list[str]:
            """Its cells in the rest of the first row, the rows between, the start of the last."""
            place = self._columns.index(column)
            cells = [line[place] for line in middle]
            if place > at:
                cells.append(first[place - at])
            if place < at:
                cells.append(last[place])
            return cells

        if not {self._sequence, self._label} <= set(self._columns):
            return True  # of the header, whose end was swallowed, too
        words = [cell for cell in swallowed(self._sequence) if len(cell.split()) < 2]
        return bool(words) or any(plain_word(cell) in WORDS for cell in swallowed(self._label))

    def _has_columns(self, line: int) -> bool:
        """Whether the header names each column that is read once."""
        header = self._delimiter.join(self._columns)
        other = self._other_delimiter(header)
        if other is not None:
            message = (
                f"is separated by {_DELIMITERS[other]}, not by {_DELIMITERS[self._delimiter]}; "
                + _REMEDIES.get(other, "save it with commas (.csv) or tabs (.tsv)")
            )
            self._problems.add(self._file, message, line=line, value=header)
            return False
        usable = True
        for key, name in self._wanted.items():
            if self._columns.count(name) == 1:
                continue
            usable = False
            if name in self._columns:
                count = self._columns.count(name)
                message = f"{count} columns are called {name!r}; rename all but one"
            else:
                message = (
                    f"no column {name!r} among {listed(self._columns)}; the first "
                    f"line must name the columns, separated by {_DELIMITERS[self._delimiter]}; "
                    + _NAMES_ANOTHER.get(
                        key, f'[data] may name another one: columns = {{ {key} = "..." }}'
                    )
                )
            self._problems.add(self._file, message, line=line, key=key, value=header)
        return usable

    def _other_delimiter(self, header: str) -> str | None:
        """What separates a header that has the columns, but not by the file's delimiter."""
        if len(self._columns) > 1 and any(name in self._columns for name in self._wanted.values()):
            return None
        for other in _DELIMITERS:
            names = {column_key(name.strip('" ')) for name in header.split(other)}
            if other != self._delimiter and (
                names & set(self._wanted.values()) or (len(self._columns) == 1 < len(names))
            ):
                return other
        return None
