"""Rows: a sequence, its label and where it stands; tokens of sequences."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tuner.spec.architecture import UNKNOWN_TOKEN

if TYPE_CHECKING:
    from tuner.spec.spec import SplitPart, Truncate, Unknown

Tokens = npt.NDArray[np.uint8]

#: Token 1 is the first of these, token 20 the last; token 0 pads at the end.
RESIDUES = "ARNDCQEGHILKMFPSTWYV"
#: What IUPAC calls any, ambiguous and rare residues, and "?": what may be masked.
UNKNOWN_RESIDUES = "XBZJUO?"
#: What all of them are in a `Row`; its token is the one after the last residue.
UNKNOWN_RESIDUE = "X"


def hash_sequence(sequence: str) -> bytes:
    """The SHA-256 of a sequence, upper case: 32 bytes."""
    return hashlib.sha256(sequence.encode()).digest()


def alphabet_of(unknown: Unknown) -> str:
    """The letters of tokens 1, 2, ...: `RESIDUES`, and `UNKNOWN_RESIDUE` where it is masked."""
    return RESIDUES + UNKNOWN_RESIDUE if unknown == "mask" else RESIDUES


def truncated(sequence: str, length: int, cut: Truncate) -> str:
    """The sequence with at most `length` residues.

    "end" cuts at the end and keeps the first residues, "start" keeps the last ones, and "middle"
    keeps both ends: of an odd `length`, one more of the beginning.
    """
    surplus = len(sequence) - length
    if surplus <= 0:
        return sequence
    first = kept_first(length, cut)
    return sequence[:first] + sequence[first + surplus :]


def kept_first(length: int, cut: Truncate) -> int:
    """How many of the residues that `truncated` keeps are from the beginning."""
    return {"end": length, "start": 0, "middle": (length + 1) // 2}[cut]


def kept_in_words(length: int, cut: Truncate) -> str:
    """What `truncated` keeps: "first 200", "last 200", "first 100 and last 100"."""
    first = kept_first(length, cut)
    parts = {"first": first, "last": length - first}
    return " and ".join(f"{end} {count}" for end, count in parts.items() if count)


def encode(sequences: Sequence[str], max_length: int, unknown: Unknown = "error") -> Tokens:
    """Tokens, uint8 [n, max_length]; 0 pads at the end, 1-20 are `RESIDUES`.

    Lower case counts as upper case. With unknown = "mask", all `UNKNOWN_RESIDUES` are
    `UNKNOWN_TOKEN`.

    Raises:
        ValueError: A sequence is longer than `max_length` or holds something else.
    """
    longest = max(map(len, sequences), default=0)
    if longest > max_length:
        raise ValueError(f"{longest} residues do not fit into max_length = {max_length}")
    text = "".join([sequence.ljust(max_length, "\0") for sequence in sequences])
    if not text.isascii():
        foreign = next(letter for letter in text if not letter.isascii())
        raise ValueError(f"{foreign!r} is not one of {alphabet_of(unknown)}")
    tokens_of_codes = _tokens_of_codes(unknown)
    encoded = bytearray(text, "ascii").translate(tokens_of_codes)
    tokens = np.frombuffer(encoded, np.uint8).reshape(len(sequences), max_length)
    if np.count_nonzero(tokens) < sum(map(len, sequences)):
        letters = "".join(sequences)
        wrong = next(letter for letter in letters if not tokens_of_codes[ord(letter)])
        raise ValueError(f"{wrong!r} is not one of {alphabet_of(unknown)}")
    return tokens


def find_unknown(sequences: Sequence[str]) -> Iterator[tuple[int, list[int]]]:
    """The sequences with letters that are not residues: their index, and all such positions.

    Both count from 0. Lower case counts as upper case.
    """
    tokens = "".join(sequences).encode("ascii", "replace").translate(_tokens_of_codes("error"))
    if 0 not in tokens:
        return
    unknown = np.flatnonzero(np.frombuffer(tokens, np.uint8) == 0)
    ends = np.cumsum([len(sequence) for sequence in sequences])
    rows, first = np.unique(np.searchsorted(ends, unknown, "right"), return_index=True)
    for row, positions in zip(rows.tolist(), np.split(unknown, first[1:]), strict=True):
        yield row, (positions - (ends[row] - len(sequences[row]))).tolist()


def decode_tokens(tokens: Tokens) -> list[str]:
    """The sequences of tokens [n, max_length], without their padding."""
    letters = np.frombuffer(f" {alphabet_of('mask')}".encode(), dtype=np.uint8)[tokens]
    return [row.tobytes().decode().rstrip() for row in letters]


@functools.cache
def _tokens_of_codes(unknown: Unknown) -> bytes:
    """The token of each of 256 codes of letters; 0 for those that have none."""
    table = bytearray(256)
    for token, residue in enumerate(RESIDUES, start=1):
        table[ord(residue)] = table[ord(residue.lower())] = token
    if unknown == "mask":
        for letter in UNKNOWN_RESIDUES:
            table[ord(letter)] = table[ord(letter.lower())] = UNKNOWN_TOKEN
    return bytes(table)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One protein, and where it stands in the user's files."""

    sequence: str  #: upper case, only `RESIDUES`, and `UNKNOWN_RESIDUE` where that is masked
    label: int  #: 1 is soluble, 0 insoluble
    file: str
    line: int | None  #: 1-based; of the header in FASTA; None in npz
    place: str  #: for messages: "line 12", "row 3 of positives"
    whole: str | None = None  #: all of a sequence that was cut
    weight: float | None = None  #: what it counts in training, above 0; None: as much as others
    part: SplitPart | None = None  #: of a split that the data names
    fold: str | None = None  #: the value of the column of folds


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A source whose rows passed every check."""

    name: str  #: as `DataIdentity.source`
    synthetic: bool  #: generated, not measured
    sha256: str  #: hex; of what, `DataIdentity.sha256` says
    rows: tuple[Row, ...]  #: in the order of the files
    warnings: tuple[str, ...]  #: one sentence each
    loud: tuple[str, ...] = ()  #: those of `warnings` that put every result in doubt
    #: Rows that were left out since their sequence is there already, or has both labels.
    left_out: int = 0
