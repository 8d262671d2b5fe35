"""Reads text: bytes, encodings, and the letters of one sequence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tuner.data.problems import EMPTY, RNA, SHOWN_POSITIONS, WRONG_RESIDUE, Problems, Refused
from tuner.data.rows import RESIDUES
from tuner.errors import counted

NUCLEOTIDES = "ACGTUN"  # letters of DNA and RNA; all but U are residues, too
ONLY_NUCLEOTIDES = re.compile(f"[{NUCLEOTIDES}]+", re.IGNORECASE | re.ASCII)
NOT_A_RESIDUE = re.compile(f"[^{RESIDUES}{RESIDUES.lower()}]")


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
    """The file's text, without byte order marks; None, with a problem added, if it is none."""
    if content.startswith(b"\x1f\x8b"):
        problems.add(file, "is compressed with gzip; unpack it first (gunzip)")
        return None
    wide = wide_encoding(content)
    if wide is not None:
        problems.add(file, f"is not UTF-8 text but {wide}; save it as UTF-8", line=1, value=wide)
        return None
    try:
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


def checked_sequence(
    raw: str, file: str, line: int, subject: str, problems: Problems
) -> str | None:
    """The sequence in upper case; None, with a problem added, where it is not one."""
    sequence = raw.strip()
    place = f"line {line}"
    if not sequence:
        what = f"{subject} is empty"
        problems.add_one(EMPTY, file, what, place=place, line=line, key="sequence")
        return None
    positions: dict[str, list[int]] = {}
    for wrong in NOT_A_RESIDUE.finditer(sequence):
        positions.setdefault(wrong[0], []).append(wrong.start() + 1)
    if not positions:
        return sequence.upper()
    first, *others = positions.items()
    rest = "".join(f", {_bad_letter(*other)}" for other in others)
    problems.add_one(
        RNA if ONLY_NUCLEOTIDES.fullmatch(sequence) else WRONG_RESIDUE,
        file,
        _bad_letter(*first, subject) + rest,
        place=place,
        detail=_bad_letter(*first) + rest,
        line=line,
        key="sequence",
        value=sequence[first[1][0] - 1 :],
        values={repr(letter): len(each) for letter, each in positions.items()},
    )
    problems.refused.append(Refused(file=file, line=line, place=place, sequence=sequence))
    return None


def _bad_letter(letter: str, positions: Sequence[int], subject: str = "") -> str:
    """Where a wrong letter stands: "residue 3 is 'X'", "residues 3, 5 and 900 more are 'X'"."""
    of = f" of {subject}" if subject else ""
    if len(positions) == 1:
        return f"residue {positions[0]:,}{of} is {letter!r}"
    listed = ", ".join(f"{position:,}" for position in positions[:SHOWN_POSITIONS])
    more = len(positions) - SHOWN_POSITIONS
    return f"residues {listed}{f' and {more:,} more' if more > 0 else ''}{of} are {letter!r}"


def lower_case_warnings(count: int) -> list[str]:
    """One warning if sequences hold lower-case letters."""
    have = counted(count, "sequence has", "sequences have")
    return [f"{have} lower-case residues: read as upper case"] if count else []
