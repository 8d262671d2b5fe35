"""Reads text: bytes, encodings, and the residues of one sequence."""

from __future__ import annotations

import gzip
import io
import re
import string
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.data.problems import (
    EMPTY,
    NOTHING_KNOWN,
    RNA,
    SHOWN_POSITIONS,
    WRONG_RESIDUE,
    Kind,
    Problems,
    Refused,
    times,
)
from tuner.data.rows import RESIDUES, UNKNOWN_RESIDUE, UNKNOWN_RESIDUES
from tuner.errors import counted, reason_of

if TYPE_CHECKING:
    from tuner.spec.spec import Unknown

NUCLEOTIDES = "ACGTUN"  # letters of DNA and RNA; all but U are residues, too
ONLY_NUCLEOTIDES = re.compile(f"[{NUCLEOTIDES}]+", re.IGNORECASE | re.ASCII)
#: A shorter sequence of nucleotide letters alone may be a peptide.
NUCLEOTIDE_LENGTH = 10
NOT_A_RESIDUE = re.compile(f"[^{RESIDUES}{RESIDUES.lower()}]")
_MASK = str.maketrans(dict.fromkeys(UNKNOWN_RESIDUES, UNKNOWN_RESIDUE))
#: Of an alignment.
_GAPS = str.maketrans(dict.fromkeys("-."))
_REMOVED_AT_THE_END = f"*-.{string.whitespace}"
GZIP = b"\x1f\x8b"
#: Bytes that a compressed file may have when it is unpacked: a file of a few megabytes may hold
#: thousands of times as much, and all of it is held in memory.
MOST_UNPACKED = 2**30


def read_bytes(path: Path, file: str, problems: Problems, *, outages: bool = False) -> bytes:
    """The file's bytes; none, with a problem added, where there are none to be had.

    With `outages`, what keeps the system from reading it is raised as it is.
    """
    content = b""
    try:
        if path.is_dir():
            problems.add(file, "is a folder; name a file in it", value=file)
        elif not path.exists():
            problems.add(
                file,
                f"does not exist (looked for {path}); relative paths start at the study file's "
                "folder",
                value=file,
            )
        elif not path.is_file():  # reading a pipe or a device might never end
            problems.add(file, "is not a regular file; copy the data into one", value=file)
        else:
            content = path.read_bytes()
            if not content:
                problems.add(file, "is empty; was it copied or written to the end?", value=file)
    except OSError as error:
        if outages:
            raise
        problems.add(file, f"cannot be read: {error.strerror or error}", value=file)
    return content


def file_text(file: str, content: bytes, problems: Problems) -> str | None:
    """The file's text, unpacked and without byte order marks.

    None, with a problem added, if it has none.
    """
    if content.startswith(GZIP):
        unpacked = _unpacked(file, content, problems)
        if unpacked is None:
            return None
        content = unpacked
    foreign = foreign_format(content)
    if foreign is not None:
        problems.add(file, f"is {foreign}, not text; save it as CSV, TSV or FASTA", value=foreign)
        return None
    wide = wide_encoding(content)
    if wide is not None:
        problems.add(file, f"is not UTF-8 text but {wide}; save it as UTF-8", line=1, value=wide)
        return None
    try:
        if (zero := content.find(b"\0")) >= 0:
            line = content.count(b"\n", 0, zero) + 1
            problems.add(file, "is not text: it holds a zero byte; save it again", line=line)
            return None
        # Programs that take a mark for text put a second one before it.
        return content.decode("utf-8").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        problems.add(
            file,
            f"is not UTF-8 text (byte {error.object[error.start]:#04x}); save it as UTF-8",
            line=content.count(b"\n", 0, error.start) + 1,
            value=f"{error.object[error.start]:#04x}",
        )
        return None


def _unpacked(file: str, content: bytes, problems: Problems) -> bytes | None:
    """What a gzip file holds; None, with a problem added, if that cannot be had."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
            unpacked = packed.read(MOST_UNPACKED + 1)
    except (EOFError, OSError, zlib.error) as error:
        message = f"is a gzip file that is damaged or was cut ({reason_of(error)}); copy it again"
        problems.add(file, message)
        return None
    if len(unpacked) > MOST_UNPACKED:
        problems.add(
            file,
            f"unpacks to more than {MOST_UNPACKED:,} bytes; if it is not a mistake, unpack it "
            "(gunzip) and name the file that this makes",
        )
        return None
    if not unpacked:
        problems.add(file, "is a gzip file that holds nothing; was it written to the end?")
        return None
    return unpacked


_ZIP = b"PK\x03\x04"
#: What the first member of zip files of a kind is called.
_ZIP_FORMATS = {
    b"[Content_Types].xml": "an Excel workbook",
    b"mimetype": "an OpenDocument file",
    b".npy": "an npz file",
}
_ZIP_HEAD = 100  #: bytes, in which that name stands
#: First bytes of files that are often taken for text.
_FOREIGN_FORMATS = {
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    GZIP: "compressed with gzip twice",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PAR1": "a Parquet file",
    b"%PDF": "a PDF",
    b"\x93NUMPY": "a NumPy array",
}


def foreign_format(content: bytes) -> str | None:
    """What a file is that is not text, by its first bytes; None where that is not known."""
    if content.startswith(_ZIP):
        inside = (what for name, what in _ZIP_FORMATS.items() if name in content[:_ZIP_HEAD])
        return next(inside, "a zip file")
    found = (what for start, what in _FOREIGN_FORMATS.items() if content.startswith(start))
    return next(found, None)


#: The byte order mark, if any, and which of four bytes are zero in Latin letters.
_WIDE_ENCODINGS = (
    ("UTF-32", b"\xff\xfe\0\0", (1, 2, 3)),
    ("UTF-32", b"\0\0\xfe\xff", (0, 1, 2)),
    ("UTF-16", b"\xff\xfe", (1, 3)),
    ("UTF-16", b"\xfe\xff", (0, 2)),
)
_ENCODING_SAMPLE = 4_096  # bytes


def wide_encoding(content: bytes) -> str | None:
    """UTF-16 or UTF-32, by byte order mark or, without one, by where zero bytes stand."""
    sample = content[:_ENCODING_SAMPLE]
    for name, mark, zeros in _WIDE_ENCODINGS:
        places = [sample[place::4] for place in zeros]
        if sample.startswith(mark) or all(each.count(0) * 2 > len(each) for each in places):
            return name
    return None


#: What programs write into a table's cell that has no value, in lower case. Some are peptides, too.
_MISSING = frozenset(("na", "n/a", "nan", "null", "none"))


def cell_sequence(cell: str) -> str:
    """The sequence in a table's cell: none where that says that it is missing, as "NA" does."""
    return "" if cell.strip().lower() in _MISSING else cell


def is_separator_line(fields: Sequence[str]) -> bool:
    """Whether a record is the line "sep=," by which Excel is told what separates fields."""
    return len(fields) == 2 and fields[0].strip().lower() == "sep=" and not fields[1].strip()


def cleaned(raw: str) -> tuple[str, tuple[str, ...]]:
    """The letters of a sequence as it stands in a file, and what was removed from it.

    Removed are "spaces" inside, "gaps" (- and .) of an alignment, and the "stop" (*) at its end,
    as programs that translate genes write it.
    """
    sequence = raw.strip()
    if sequence.isalpha():
        return sequence, ()
    removed = []
    for what, rest in (
        ("spaces", "".join(sequence.split())),
        ("gaps", "".join(sequence.split()).translate(_GAPS)),
        ("stop", "".join(sequence.split()).translate(_GAPS).rstrip("*")),
    ):
        if rest != sequence:
            sequence = rest
            removed.append(what)
    return sequence, tuple(removed)


class SequenceReader:
    """Reads the sequences of a source by its policy, and counts what was accepted.

    What is not accepted is added to `problems`.
    """

    def __init__(self, unknown: Unknown, problems: Problems) -> None:
        """Takes what becomes of letters that are not residues."""
        self.problems = problems
        self.unknown = unknown
        self._accepted: Counter[str] = Counter()  # sequences
        self._masked: Counter[str] = Counter()  # letters

    def read(self, raw: str, file: str, line: int, subject: str) -> str | None:
        """The sequence in upper case, unknown residues as X; None where it is not one."""
        sequence, removed = cleaned(raw)
        if not sequence:
            what = f"{subject} is empty"
            self.problems.add_one(
                EMPTY, file, what, place=f"line {line}", line=line, key="sequence"
            )
            return None
        positions: dict[str, list[int]] = {}
        if NOT_A_RESIDUE.search(sequence):
            positions = self._wrong_letters(raw.strip())
        kind = None if not positions else self._refusal(sequence, positions)
        if kind is not None:
            self._refuse(kind, positions, raw.strip(), file, line, subject)
            refused = Refused(file=file, line=line, place=f"line {line}", sequence=sequence)
            self.problems.refused.append(refused)
            return None
        self._accepted.update([*removed, *["lower case"] * (not sequence.isupper())])
        if not positions:
            return sequence.upper()
        self.count_masked({letter.upper(): len(each) for letter, each in positions.items()})
        return sequence.upper().translate(_MASK)

    def count_masked(self, letters: dict[str, int]) -> None:
        """Counts a sequence in which unknown residues were masked."""
        self._accepted["unknown"] += 1
        self._masked.update(letters)

    def warnings(self) -> list[str]:
        """A sentence for each kind of thing that was accepted, with its number."""
        masked = ", ".join(f"{letter} {times(n)}" for letter, n in self._masked.most_common())
        sentences = {
            "lower case": "lower-case residues: read as upper case",
            "spaces": "spaces inside: removed",
            "gaps": "gaps (- or .) of an alignment: removed",
            "stop": "a stop (*) at the end: removed",
            "unknown": f"unknown residues ({masked}): masked",
        }
        return [
            f"{counted(self._accepted[what], 'sequence has', 'sequences have')} {sentence}"
            for what, sentence in sentences.items()
            if self._accepted[what]
        ]

    @staticmethod
    def _wrong_letters(raw: str) -> dict[str, list[int]]:
        """Where each letter stands, from 1, that is not a residue and was not removed."""
        positions: dict[str, list[int]] = {}
        for wrong in NOT_A_RESIDUE.finditer(raw.rstrip(_REMOVED_AT_THE_END)):
            if not wrong[0].isspace() and wrong[0] not in "-.":
                positions.setdefault(wrong[0], []).append(wrong.start() + 1)
        return positions

    def _refusal(self, sequence: str, positions: dict[str, list[int]]) -> Kind | None:
        """What is wrong with a sequence that has these letters; None where they are masked."""
        is_rna = bool(ONLY_NUCLEOTIDES.fullmatch(sequence))
        if self.unknown == "error" and is_rna:
            return RNA
        known = all(letter.upper() in UNKNOWN_RESIDUES for letter in positions)
        if self.unknown == "error" or not known:
            return WRONG_RESIDUE
        if is_rna and len(sequence) >= NUCLEOTIDE_LENGTH:
            return RNA
        alone = sum(map(len, positions.values())) == len(sequence)
        return NOTHING_KNOWN if alone else None

    def _refuse(
        self,
        kind: Kind,
        positions: dict[str, list[int]],
        raw: str,
        file: str,
        line: int,
        subject: str,
    ) -> None:
        first, *others = positions.items()
        rest = "".join(f", {_bad_letter(*other)}" for other in others)
        self.problems.add_one(
            kind,
            file,
            _bad_letter(*first, subject) + rest,
            place=f"line {line}",
            detail=_bad_letter(*first) + rest,
            line=line,
            key="sequence",
            value=raw[first[1][0] - 1 :],
            values={repr(letter): len(each) for letter, each in positions.items()},
        )


def _bad_letter(letter: str, positions: Sequence[int], subject: str = "") -> str:
    """Where a wrong letter stands: "residue 3 is 'X'", "residues 3, 5 and 900 more are 'X'"."""
    of = f" of {subject}" if subject else ""
    if len(positions) == 1:
        return f"residue {positions[0]:,}{of} is {letter!r}"
    listed = ", ".join(f"{position:,}" for position in positions[:SHOWN_POSITIONS])
    more = len(positions) - SHOWN_POSITIONS
    return f"residues {listed}{f' and {more:,} more' if more > 0 else ''}{of} are {letter!r}"
