"""NPZ files: written alike everywhere, and checked before they are unpacked; their rows."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tuner.data.problems import (
    NO_TOKENS,
    NOTHING_KNOWN,
    PADDING_INSIDE,
    SHOWN_CHARACTERS,
    SHOWN_VALUES,
    WRONG_TOKEN,
    Problems,
    Refused,
    shortened,
)
from tuner.data.rows import RESIDUES, UNKNOWN_RESIDUE, Row
from tuner.data.text import SequenceReader
from tuner.spec.architecture import UNKNOWN_TOKEN

_ARRAYS = (("positives", 1), ("negatives", 0))


class DamagedError(Exception):
    """An npz file, or an array in it, that cannot be read. The message is the reason."""


def opened_archive(content: bytes) -> zipfile.ZipFile:
    """Opens an npz file; its members are checked when they are read."""
    try:
        return zipfile.ZipFile(io.BytesIO(content))
    except Exception as error:  # whatever foreign bytes make zipfile raise
        raise DamagedError(shortened(str(error) or type(error).__name__)) from error


def read_member(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    """An array of an npz file; KeyError if there is none of this name.

    Object arrays are refused: to unpickle is to run foreign code.
    """
    member = archive.getinfo(f"{name}.npy")
    try:
        with archive.open(member) as file:
            array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # zipfile, zlib, NumPy and tokenize (!), each in its own words
        raise DamagedError(shortened(str(error) or type(error).__name__)) from error
    return array


def npz_bytes(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """An npz file whose bytes depend on the arrays alone: no clock, no platform, no zlib."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # zipfile writes that of the running system
            info.external_attr = 0o600 << 16
            archive.writestr(info, member.getvalue())
    return content.getvalue()


def npz_rows(file: str, content: bytes, reader: SequenceReader) -> list[Row]:
    """Rows of an npz file with the token arrays `positives` and `negatives`."""
    rows: list[Row] = []
    try:
        archive = opened_archive(content)
    except DamagedError as error:
        message = f"is not an npz file, or was cut ({error}); write it with numpy.savez"
        reader.problems.add(file, message)
        return rows
    with archive:
        for name, label in _ARRAYS:
            tokens = _npz_tokens(archive, file, name, reader.problems)
            if tokens is not None:
                rows += _token_rows(tokens, file, name, label, reader)
    return rows


def _npz_tokens(
    archive: zipfile.ZipFile, file: str, name: str, problems: Problems
) -> npt.NDArray[np.integer[Any]] | None:
    """An array of integers [rows, width]; None, with a problem added, where it is none."""
    wanted = "tokens are integers [rows, width]: 0 pads at the end, 1-20 are the residues"
    try:
        array = read_member(archive, name)
    except KeyError:
        names = ", ".join(member.removesuffix(".npy") for member in archive.namelist())
        message = (
            f"no array {name!r}, only: {shortened(names) or 'none'}; it needs positives and "
            "negatives"
        )
        problems.add(file, message, key=name, value=names)
        return None
    except DamagedError as error:
        problems.add(file, f"cannot be read ({error}); {wanted}", key=name)
        return None
    if array.dtype.kind not in "iu":
        message = f"has dtype {array.dtype}; {wanted}"
        problems.add(file, message, key=name, value=str(array.dtype))
        return None
    if array.ndim != 2:
        message = f"has shape {array.shape}; {wanted}"
        problems.add(file, message, key=name, value=str(array.shape))
        return None
    return array


def _token_rows(
    tokens: npt.NDArray[np.integer[Any]], file: str, name: str, label: int, reader: SequenceReader
) -> list[Row]:
    """The rows of one array [rows, width], as sequences."""
    letter_of_token = np.frombuffer(f"-{RESIDUES}{UNKNOWN_RESIDUE}".encode(), dtype=np.uint8)
    last = UNKNOWN_TOKEN if reader.unknown == "mask" else len(RESIDUES)
    impossible = (tokens < 0) | (tokens > last)
    real = tokens != 0
    gap = real[:, 1:] & ~real[:, :-1]
    unknown = (tokens == UNKNOWN_TOKEN) & ~impossible
    nothing_known = (unknown == real).all(axis=1)  # an empty row among them
    bad = impossible.any(axis=1) | gap.any(axis=1) | nothing_known
    for row in np.flatnonzero(bad).tolist():
        values: dict[str, int] = {}
        if impossible[row].any():
            kind = WRONG_TOKEN
            wrong = np.flatnonzero(impossible[row])
            detail = "token " + ", ".join(
                f"{tokens[row, position]} at position {position}"
                for position in wrong[:SHOWN_VALUES]
            )
            if len(wrong) > SHOWN_VALUES:
                detail += f" and {len(wrong) - SHOWN_VALUES:,} more"
            values = Counter(f"token {token}" for token in tokens[row, wrong].tolist())
            what = f"has {detail}"
        elif gap[row].any():
            kind, detail = PADDING_INSIDE, f"at position {int((~real[row]).argmax())}"
            what = f"has padding (0) inside the sequence, {detail}"
        elif real[row].any():
            kind, detail, what = NOTHING_KNOWN, "", "has unknown residues alone"
        else:
            kind, detail, what = NO_TOKENS, "", "is an empty sequence"
        reader.problems.add_one(
            kind,
            file,
            f"row {row} (counted from 0) {what}",
            place=f"row {row}",
            detail=detail,
            key=name,
            value=" ".join(str(token) for token in tokens[row, :SHOWN_CHARACTERS]),
            values=values,
        )
        residues = letter_of_token[np.where(impossible[row], 0, tokens[row])]
        end = int(np.flatnonzero(real[row]).max(initial=-1)) + 1
        reader.problems.refused.append(
            Refused(
                file=file,
                line=None,
                place=f"row {row} of {name}",
                sequence=residues[:end].tobytes().decode(),
            )
        )
    good = np.flatnonzero(~bad)
    for count in unknown[good].sum(axis=1).tolist():
        if count:
            reader.count_masked({UNKNOWN_RESIDUE: count})
    letters = letter_of_token[tokens[good]]
    lengths = real[good].sum(axis=1)
    return [
        Row(
            sequence=residues[:length].tobytes().decode(),
            label=label,
            file=file,
            line=None,
            place=f"row {row} of {name}",
        )
        for row, residues, length in zip(good.tolist(), letters, lengths.tolist(), strict=True)
    ]
