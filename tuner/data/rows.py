"""Rows: a sequence, its label and where it stands; tokens of sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint8]

#: Token 1 is the first of these, token 20 the last; token 0 pads at the end.
RESIDUES = "ARNDCQEGHILKMFPSTWYV"


def hash_sequence(sequence: str) -> bytes:
    """The SHA-256 of a sequence, upper case: 32 bytes."""
    return hashlib.sha256(sequence.encode()).digest()


def encode(sequences: Sequence[str], max_length: int) -> Tokens:
    """Tokens, uint8 [n, max_length]; 0 pads at the end, 1-20 are `RESIDUES`.

    Lower case counts as upper case.

    Raises:
        ValueError: A sequence is longer than `max_length` or holds something else.
    """
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    if lengths.max(initial=0) > max_length:
        raise ValueError(f"{lengths.max()} residues do not fit into max_length = {max_length}")
    codes = np.frombuffer("".join(sequences).encode("ascii", "replace"), dtype=np.uint8)
    flat = _TOKEN_OF_CODE[codes]
    if not flat.all():
        raise ValueError(f"{chr(codes[flat.argmin()])!r} is not one of {RESIDUES}")
    tokens = np.zeros((len(sequences), max_length), dtype=np.uint8)
    tokens[np.arange(max_length) < lengths[:, np.newaxis]] = flat
    return tokens


def first_unknown(sequences: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The sequences with letters that are not residues: their index, and the first such position.

    Both count from 0. Lower case counts as upper case.
    """
    codes = np.frombuffer("".join(sequences).encode("ascii", "replace"), dtype=np.uint8)
    unknown = np.flatnonzero(_TOKEN_OF_CODE[codes] == 0)
    if len(unknown):
        ends = np.cumsum([len(sequence) for sequence in sequences])
        rows, first = np.unique(np.searchsorted(ends, unknown, "right"), return_index=True)
        starts = ends[rows] - [len(sequences[row]) for row in rows]
        yield from zip(rows.tolist(), (unknown[first] - starts).tolist(), strict=True)


def decode_tokens(tokens: Tokens) -> list[str]:
    """The sequences of tokens [n, max_length], without their padding."""
    letters = np.frombuffer(f" {RESIDUES}".encode(), dtype=np.uint8)[tokens]
    return [row.tobytes().decode().rstrip() for row in letters]


def _token_of_code() -> Tokens:
    """Token of each ASCII code, uint8 [256]; 0 where it is no residue."""
    table = np.zeros(256, dtype=np.uint8)
    for token, residue in enumerate(RESIDUES, start=1):
        table[ord(residue)] = table[ord(residue.lower())] = token
    return table


_TOKEN_OF_CODE = _token_of_code()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One protein, and where it stands in the user's files."""

    sequence: str  #: upper case, only `RESIDUES`
    label: int  #: 1 is soluble, 0 insoluble
    file: str
    line: int | None  #: 1-based; of the header in FASTA; None in npz
    place: str  #: for messages: "line 12", "row 3 of positives"
    whole: str | None = None  #: all of a sequence that was cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A source whose rows passed every check."""

    name: str  #: as `DataIdentity.source`
    synthetic: bool  #: generated, not measured
    sha256: str  #: hex; of what, `DataIdentity.sha256` says
    rows: tuple[Row, ...]  #: in the order of the files
    warnings: tuple[str, ...]  #: one sentence each
    loud: tuple[str, ...] = ()  #: those of `warnings` that put every result in doubt
