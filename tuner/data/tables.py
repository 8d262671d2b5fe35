"""Rows of CSV and TSV files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tuner.data.problems import (
    SEVERAL_LINES,
    SEVERAL_LINES_TSV,
    WRONG_FIELDS,
    WRONG_LABEL,
    Problems,
    Refused,
    shortened,
)
from tuner.data.rows import Row
from tuner.data.text import NOT_A_RESIDUE, checked_sequence, file_text, lower_case_warnings
from tuner.errors import counted

_LINE_END = re.compile(r"\r\n|\r|\n")
#: Python's own limit of 131,072 letters would refuse long text in a column that is ignored.
_LONGEST_FIELD = 2**31 - 1


def csv_rows(
    file: str, content: bytes, delimiter: str, problems: Problems
) -> tuple[list[Row], list[str]]:
    """Rows of a CSV or TSV file with the columns `sequence` and `label`; others are ignored."""
    rows: list[Row] = []
    text = file_text(file, content, problems)
    if text is None:
        return rows, []
    lower_case = 0
    columns: list[str] = []
    for record in _records(file, text, delimiter, problems):
        if not columns:
            columns = [field.strip().lower() for field in record.fields]
            if _may_hold_rows(record, columns, file, delimiter, problems) or not _has_columns(
                file, record.line, columns, delimiter, problems
            ):
                break
        elif not _may_hold_rows(record, columns, file, delimiter, problems):
            row = _csv_row(record, columns, file, delimiter, problems)
            if row is not None:
                lower_case += row.sequence != record.fields[columns.index("sequence")].strip()
                rows.append(row)
    if not columns and not problems:
        problems.add(file, "holds no rows; the first line has to be: sequence,label")
    return rows, lower_case_warnings(lower_case)


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


def _csv_row(
    record: _Record, columns: Sequence[str], file: str, delimiter: str, problems: Problems
) -> Row | None:
    """The row of a record; None, with problems added, where it is not one."""
    fields, line, place = record.fields, record.line, record.place
    if len(fields) != len(columns):
        what = f"{counted(len(fields), 'field')} where the header names {len(columns)}"
        problems.add_one(
            WRONG_FIELDS,
            file,
            what if line == record.last_line else f"{what}, in {place}",
            place=place,
            detail=str(len(fields)),
            line=line,
            value=delimiter.join(fields),
        )
        return None
    raw = fields[columns.index("sequence")]
    label = fields[columns.index("label")].strip()
    sequence = checked_sequence(raw, file, line, "the sequence", problems)
    if label in ("0", "1"):
        if sequence is None:
            return None
        return Row(sequence=sequence, label=int(label), file=file, line=line, place=f"line {line}")
    shown = repr(shortened(label))
    problems.add_one(
        WRONG_LABEL,
        file,
        f"{shown} is no label",
        place=place,
        detail=shown,
        line=line,
        key="label",
        value=label,
        values={shown: 1},
    )
    if sequence is not None:
        problems.refused.append(Refused(file=file, line=line, place=place, sequence=sequence))
    return None


def _may_hold_rows(
    record: _Record, columns: Sequence[str], file: str, delimiter: str, problems: Problems
) -> bool:
    """Whether a record of several lines may have swallowed rows; adds the problem.

    A lone quote makes a field of all that follows up to the next lone quote: the rest of its row,
    whole rows, and the start of the row with that quote. If both stand in one column, what is left
    is a row with the right number of fields: the first row's sequence with the last row's label.

    In TSV a record is a line. In CSV a field may hold line breaks, so its text decides: it may not
    in the columns `sequence` and `label`, nor where it looks like rows.
    """
    if record.last_line == record.line:
        return False
    for at, text in enumerate(record.fields):
        if delimiter == "\t" and _LINE_END.search(text):
            kind, why = SEVERAL_LINES_TSV, "a TSV record is one line"
        elif _LINE_END.search(text.strip()) and (
            columns[at : at + 1] in (["sequence"], ["label"])
            or _looks_like_rows(text, at, columns, delimiter)
        ):
            kind, why = SEVERAL_LINES, "may hold rows of the file"
        else:
            continue
        problems.add_one(
            kind,
            file,
            f"a quoted field runs over {record.place}, and {why}",
            place=record.place,
            line=record.line,
            key="".join(columns[at : at + 1]),
            value=text,
        )
        return True
    return False


def _looks_like_rows(text: str, at: int, columns: Sequence[str], delimiter: str) -> bool:
    """Whether the text of a field, the one in column `at`, may be the swallowed part of rows.

    Cut at delimiters, it has a sequence and a label among its pieces. Or, as the sequences and
    labels of a file may be wrong: each of its lines has as many delimiters as swallowed rows, and
    where these have their sequence, a word or nothing, or where they have their label, 0 or 1.
    """
    first, *middle, last = (
        [piece.strip(' "') for piece in line.split(delimiter)] for line in _LINE_END.split(text)
    )
    middle = [line for line in middle if any(line)]
    pieces = [*first, *(piece for line in middle for piece in line), *last]
    if {"0", "1"} & set(pieces) and any(
        piece and not NOT_A_RESIDUE.search(piece) for piece in pieces
    ):
        return True
    width = len(columns)
    whole = all(len(line) == width for line in middle)
    if not (whole and len(first) == width - at and len(last) == at + 1):
        return False

    def swallowed(column: str) -> list[str]:
        """Its cells in the rest of the first row, the rows between, and the start of the last."""
        place = columns.index(column)
        cells = [line[place] for line in middle]
        if place > at:
            cells.append(first[place - at])
        if place < at:
            cells.append(last[place])
        return cells

    if not {"sequence", "label"} <= set(columns):  # of the header, whose end was swallowed, too
        return True
    words = [cell for cell in swallowed("sequence") if len(cell.split()) < 2]
    return bool(words) or bool({"0", "1"} & set(swallowed("label")))


def _has_columns(
    file: str, line: int, columns: Sequence[str], delimiter: str, problems: Problems
) -> bool:
    """Whether the header names `sequence` and `label`, each once."""
    header = delimiter.join(columns)
    usable = True
    for name in ("sequence", "label"):
        if columns.count(name) == 1:
            continue
        usable = False
        if name in columns:
            message = f"{columns.count(name)} columns are called {name!r}; rename all but one"
        else:
            message = (
                f"no column {name!r}; the first line must name the columns, separated by "
                f"{'tabs (.tsv)' if delimiter == chr(9) else 'commas (.csv)'}, as in "
                f"sequence{delimiter}label"
            )
        problems.add(file, message, line=line, key=name, value=header)
    return usable
