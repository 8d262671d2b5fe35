"""Sequences to predict: FASTA, CSV and TSV from files or a stream, gzip or not, one at a time.

What is wrong with one record is a flag of that record; only what keeps the rest of a file from
being read is an error.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from tuner.data.problems import listed, shortened
from tuner.data.text import (
    GZIP,
    cell_sequence,
    foreign_format,
    is_separator_line,
    wide_encoding,
)
from tuner.errors import DataError, Problem, reason_of

#: The columns that hold a record's id, the first that a table has; in lower case.
ID_COLUMNS = ("id", "name", "accession", "identifier", "sid")
SEQUENCE_COLUMN = "sequence"
#: Letters of one line, field or record. Without it memory would not be constant: a gzip file of a
#: few megabytes may hold a line of gigabytes. The longest protein known has 50,000 residues.
LONGEST_RECORD = 2**24
_SAMPLE_BYTES = 65_536  #: of a file's beginning, from which its format is told
_BLOCK = 65_536  #: letters that are read at once
_SPACE = re.compile(r"\s+")


class SequenceRecord(NamedTuple):
    """One record of a file."""

    file: str  #: as the user named it; "stdin" of the stream
    line: int  #: the record's first, from 1
    id: str  #: as it stands there; in a table without ids the number of the record, from 1
    sequence: str  #: as it stands there, without white space
    flags: tuple[str, ...] = ()  #: what is wrong with the record itself


def read_sequences(
    place: str | Path,
    stream: BinaryIO | None = None,
    *,
    sequence_column: str | None = None,
    id_column: str | None = None,
    usual_columns: Sequence[str] = (SEQUENCE_COLUMN,),
) -> Iterator[SequenceRecord]:
    """The records of a file, in their order.

    Args:
        place: The file; what a stream is called in messages.
        stream: What is read in place of a file.
        sequence_column: Of a table, the column of the sequences; by default the first of
            `usual_columns` that it has.
        id_column: Of a table, the column of the ids; the first of `ID_COLUMNS` by default.
        usual_columns: Of sequences.

    Raises:
        DataError: The file cannot be read to its end, or a table lacks a column.
    """
    file = str(place)
    try:
        with contextlib.ExitStack() as opened:
            raw = stream or opened.enter_context(Path(place).open("rb"))
            text = opened.enter_context(_as_text(file, raw, opened))
            lines = _limited(file, text)
            begun, first = _begun(file, lines)
            if first.startswith(">"):
                yield from _fasta(file, begun, text)
            else:
                everything = itertools.chain(begun, lines)
                columns = (sequence_column, id_column, usual_columns)
                yield from _table(file, everything, first, *columns)
    except (OSError, EOFError, zlib.error) as error:
        damaged = isinstance(error, EOFError | zlib.error | gzip.BadGzipFile)
        reason = reason_of(error)
        message = f"is damaged or was cut ({reason}); copy it again" if damaged else ""
        raise _error(file, message or f"cannot be read: {reason}") from error


def _error(file: str, message: str, *, line: int | None = None, value: str = "") -> DataError:
    problem = Problem(file=file, line=line, key="", value=shortened(value), message=message)
    return DataError([problem])


def _as_text(file: str, raw: BinaryIO, opened: contextlib.ExitStack) -> io.TextIOWrapper:
    """The text of a file, unpacked where it is gzip; `opened` closes what lies between.

    Raises:
        DataError: It is not text that can be read here.
    """

    def buffered(source: object) -> io.BufferedReader:
        return opened.enter_context(io.BufferedReader(cast("Any", source), _SAMPLE_BYTES))

    content = buffered(raw)
    if content.peek(2)[:2] == GZIP:
        content = buffered(gzip.GzipFile(fileobj=content))
    sample = content.peek(_SAMPLE_BYTES)
    if foreign := foreign_format(sample):
        message = f"is {foreign}, not text; name a FASTA, CSV or TSV file, or one of these as .gz"
        raise _error(file, message, value=foreign)
    if wide := wide_encoding(sample):
        raise _error(file, f"is not UTF-8 text but {wide}; save it as UTF-8", value=wide)
    if b"\0" in sample:
        raise _error(file, "is not text; name a FASTA, CSV or TSV file, or one of these as .gz")
    # What is not UTF-8 is written back as it was.
    return io.TextIOWrapper(content, "utf-8-sig", errors="surrogateescape", newline="")


def _limited(file: str, text: io.TextIOWrapper) -> Iterator[str]:
    """The lines of a file with their ends.

    Raises:
        DataError: One is too long.
    """
    for number in itertools.count(1):
        line = text.readline(LONGEST_RECORD)
        if not line:
            return
        if len(line) == LONGEST_RECORD:
            raise _too_long(file, "the line", number)
        yield line


def _too_long(file: str, what: str, line: int) -> DataError:
    return _error(
        file,
        f"{what} has more than {LONGEST_RECORD - 1:,} letters, which no protein has; is it a file "
        "of sequences?",
        line=line,
    )


def _begun(file: str, lines: Iterator[str]) -> tuple[list[str], str]:
    """The lines up to the first that is not blank, and that one, stripped.

    Comments, lines that begin with ; or #, stand before it only in FASTA.

    Raises:
        DataError: There is none.
    """
    begun, first = list[str](), ""
    for line in lines:
        begun.append(line)
        first = first or line.strip()
        if line.strip() and not line.startswith((";", "#")):
            return begun, line.strip() if line.startswith(">") else first
    raise _error(file, "holds no records; write >NAME lines (FASTA), or a header line (CSV, TSV)")


def _fasta(file: str, begun: Sequence[str], text: io.TextIOBase) -> Iterator[SequenceRecord]:
    """The records of a file, of which `begun` was read: the first ">" line and those before it."""
    for at, record in _split(file, begun, text):
        header, _, body = record.partition("\n")
        words, sequence = header.split(None, 1), body.replace("\n", "")
        if words and sequence.isalpha():
            yield SequenceRecord(file, at, words[0], sequence)
        else:
            yield from _with_other_lines(file, at, f">{record}".split("\n"))


def _split(file: str, begun: Sequence[str], text: io.TextIOBase) -> Iterator[tuple[int, str]]:
    """The line of each record, and its text from the name to where the next begins.

    Raises:
        DataError: One is too long.
    """
    ends = io.IncrementalNewlineDecoder(None, translate=True)  # of whatever kind, "\n" here
    at, rest, block = len(begun), "", begun[-1].lstrip()[1:]
    while block:
        rest += ends.decode(block)
        *whole, rest = rest.split("\n>")
        for record in whole:
            yield at, record
            at += record.count("\n") + 1
        if len(rest) >= LONGEST_RECORD:
            name = next(iter(rest[:_BLOCK].split()), "")
            raise _too_long(file, f"the record {shortened(name)!r}", at)
        block = text.read(_BLOCK)
    yield at, rest + ends.decode("", final=True)


def _with_other_lines(file: str, at: int, lines: Iterable[str]) -> Iterator[SequenceRecord]:
    """A record whose lines hold more than letters, and those that begin with a space and a >."""
    name, parts, spaces = "", list[str](), False

    def record() -> SequenceRecord:
        flags = (("no_id",) if not name else ()) + (("spaces_removed",) if spaces else ())
        return SequenceRecord(file=file, line=at, id=name, sequence="".join(parts), flags=flags)

    for number, line in enumerate(map(str.strip, lines), start=at):
        if line.startswith(">"):
            if number > at:
                yield record()
            name, at, spaces = next(iter(line[1:].split()), ""), number, False
            parts.clear()
        elif not line.startswith((";", "#")):
            parts.append(line if line.isalpha() else _SPACE.sub("", line))
            spaces = spaces or len(parts[-1]) < len(line)
    yield record()


def _table(
    file: str,
    lines: Iterable[str],
    header: str,
    sequence_column: str | None,
    id_column: str | None,
    usual_columns: Sequence[str],
) -> Iterator[SequenceRecord]:
    delimiter = "\t" if "\t" in header else ","
    csv.field_size_limit(LONGEST_RECORD)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    line, number, names = 1, 0, list[str]()
    sequence_at, id_at = 0, None
    try:
        for fields in reader:
            first_line, line = line, reader.line_num + 1
            if not any(map(str.strip, fields)):
                continue
            if not names and is_separator_line(fields):
                continue
            if not names:
                names = [field.strip().lower() for field in fields]
                usual = (one for one in usual_columns if one.strip().lower() in names)
                sequence_at, id_at = _columns(
                    file,
                    first_line,
                    names,
                    header,
                    sequence_column or next(usual, SEQUENCE_COLUMN),
                    id_column,
                )
                continue
            number += 1
            complete = len(fields) == len(names)
            its_id = str(number) if id_at is None or id_at >= len(fields) else fields[id_at].strip()
            sequence = fields[sequence_at] if sequence_at < len(fields) else ""
            flags = [] if complete else ["wrong_number_of_fields"]
            if line - first_line > 1 and _may_hold_rows(fields, len(names), sequence_at, delimiter):
                flags = [f"several_lines:{first_line}_to_{line - 1}"]
            if not its_id:
                flags.append("no_id")
            letters = _SPACE.sub("", cell_sequence(sequence))
            if letters and len(letters) < len(sequence.strip()):
                flags.append("spaces_removed")
            yield SequenceRecord(
                file=file, line=first_line, id=its_id, sequence=letters, flags=tuple(flags)
            )
    except csv.Error as error:
        raise _error(
            file,
            f"cannot be read as {delimiter!r}-separated text from here to line {reader.line_num} "
            f"({error}); check the quotes: close or remove the one that stands alone",
            line=line,
        ) from error


def _may_hold_rows(fields: Sequence[str], width: int, sequence_at: int, delimiter: str) -> bool:
    """Whether a record of several lines may have swallowed others, between two lone quotes.

    As `tuner.data.tables` has it, but for labels, which a table to predict does not need.
    """
    for at, text in enumerate(fields):
        lines = text.splitlines()
        if len(lines) < 2:
            continue
        if delimiter == "\t" or (at == sequence_at and len(text.strip().splitlines()) > 1):
            return True
        first, *middle, last = (line.split(delimiter) for line in lines)
        whole = all(len(line) == width for line in middle)
        if whole and (len(first), len(last)) == (width - at, at + 1):
            swallowed = [line[sequence_at] for line in middle]
            swallowed.append(first[sequence_at - at] if sequence_at > at else last[sequence_at])
            if any(len(cell.split()) < 2 for cell in swallowed):
                return True
    return False


def _columns(
    file: str,
    line: int,
    names: Sequence[str],
    header: str,
    sequence_column: str,
    id_column: str | None,
) -> tuple[int, int | None]:
    """Where sequence and id stand in a row; None for the latter if there are no ids."""

    def place(name: str, option: str) -> int:
        wanted = name.strip().lower()
        if names.count(wanted) == 1:
            return names.index(wanted)
        if wanted in names:
            message = f"{names.count(wanted)} columns are called {name!r}; rename all but one"
        elif len(names) == 1 and (other := next((one for one in ";|" if one in header), "")):
            message = f"is separated by {other!r}; save it with commas or tabs"
        else:
            message = (
                f"no column {name!r} among {listed(names)}; name it with {option}, "
                "or write FASTA (>NAME lines)"
            )
        raise _error(file, message, line=line, value=header)

    sequence_at = place(sequence_column, "--sequence-column")
    if id_column is not None:
        return sequence_at, place(id_column, "--id-column")
    known = [names.index(name) for name in ID_COLUMNS if name in names]
    return sequence_at, next(iter(known), None)


class SeenIds:
    """Which ids were there before, in eight bytes for each.

    By a hash of 64 bits: among a million different ids the chance that one is taken for a
    duplicate is 3e-8.
    """

    def __init__(self) -> None:
        self._known: list[npt.NDArray[np.int64]] = []  # sorted; each shorter than the one before

    def add(self, ids: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Adds ids; returns which of them, [n], stand before, in this call or an earlier one."""
        hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        found = np.zeros(len(ids), bool)
        found[1:] = ordered[1:] == ordered[:-1]
        new = ordered[~found]
        for known in self._known:
            at = np.minimum(np.searchsorted(known, ordered), len(known) - 1)
            found |= known[at] == ordered
        while self._known and len(self._known[-1]) <= len(new):
            new = np.union1d(self._known.pop(), new)
        if len(new):
            self._known.append(new)
        repeated = np.empty_like(found)
        repeated[order] = found
        return repeated
