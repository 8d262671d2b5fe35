"""Predictions for records of any number, in their order and in constant memory."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TextIO, TypeAlias

import numpy as np
import numpy.typing as npt

from tuner.data.rows import (
    UNKNOWN_RESIDUES,
    Tokens,
    find_unknown,
    kept_first,
    kept_in_words,
    truncated,
)
from tuner.data.sequences import SeenIds, SequenceRecord
from tuner.data.text import NUCLEOTIDE_LENGTH, NUCLEOTIDES, ONLY_NUCLEOTIDES, cleaned
from tuner.results.bundle import Bundle

COLUMNS = ("id", "probability", "label", "spread", "flags")
#: Records that are read before they are predicted: enough to find rows of like length.
CHUNK = 8_192
#: From this many residues on, a sequence of the letters of DNA and RNA alone is flagged.
_NUCLEOTIDES = 30
_NUCLEOTIDE_LETTERS = NUCLEOTIDES + NUCLEOTIDES.lower()

#: What begins the flags of records that are no good whatever their sequence.
_REFUSED = ("wrong_number_of_fields", "several_lines")

OutputFormat = Literal["csv", "tsv", "jsonl"]


class Prediction(NamedTuple):
    """What is said of one record."""

    record: SequenceRecord
    probability: float | None  #: of being soluble, 0..1; None if the record cannot be predicted
    label: int | None  #: 1 (soluble) if the probability is above the threshold, else 0
    spread: float | None  #: standard deviation over the networks; None if there is one network
    flags: tuple[str, ...]  #: see `docs/predict.md`

    def row(self) -> list[Any]:
        """The values of `COLUMNS`, as text where a table has text."""
        return [
            self.record.id,
            "" if self.probability is None else f"{self.probability:.6f}",
            "" if self.label is None else self.label,
            "" if self.spread is None else f"{self.spread:.6f}",
            ";".join(self.flags),
        ]

    def to_document(self) -> dict[str, Any]:
        """The same for JSON: null where there is no value, flags as a list."""
        return {
            "id": self.record.id,
            "probability": None if self.probability is None else round(self.probability, 6),
            "label": self.label,
            "spread": None if self.spread is None else round(self.spread, 6),
            "flags": list(self.flags),
        }


@dataclass(slots=True)
class Tally:
    """What was predicted so far."""

    records: int = 0
    soluble: int = 0  #: of them with label 1
    unpredicted: int = 0  #: of them without a probability
    flags: Counter[str] = field(default_factory=Counter)  #: records with each flag

    def count(self, prediction: Prediction) -> None:
        """Adds one."""
        self.records += 1
        self.soluble += prediction.label == 1
        self.unpredicted += prediction.probability is None
        if prediction.flags:  # what was done is said behind a colon
            self.flags.update(flag.partition(":")[0] for flag in prediction.flags)


def predict_records(
    bundle: Bundle, records: Iterable[SequenceRecord], *, chunk: int = CHUNK
) -> Iterator[Prediction]:
    """Predicts each record, in their order.

    A record that cannot be predicted has no probability, and flags that say why. While the
    networks compute one chunk, the next is read, and what was said of the last is taken.
    """
    seen = SeenIds()
    with ThreadPoolExecutor(1, "networks") as networks:
        waiting: tuple[_Chunk, Future[_Computed]] | None = None
        remaining = iter(records)
        while batch := list(itertools.islice(remaining, chunk)):
            ready = _prepared(batch, bundle, seen)
            computing = networks.submit(bundle.predict_tokens, ready.tokens)
            if waiting is not None:
                yield from _finished(*waiting, bundle)
            waiting = ready, computing
        if waiting is not None:
            yield from _finished(*waiting, bundle)


_Computed: TypeAlias = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """Records on their way."""

    records: list[SequenceRecord]
    flags: list[tuple[str, ...]]  #: of each record
    predicted: list[bool]  #: whether each record has a row of tokens
    tokens: Tokens  #: uint8 [rows, max_length]


def _prepared(records: list[SequenceRecord], bundle: Bundle, seen: SeenIds) -> _Chunk:
    flags = [record.flags for record in records]
    sequences = [record.sequence for record in records]
    unusual = _unusual(records, sequences, bundle)
    for at in unusual:
        sequences[at], more = _checked(records[at], bundle)
        flags[at] += more
    for number, positions in find_unknown([sequences[at] for at in unusual]):
        at = unusual[number]
        if _can_be_masked(sequences[at], positions, bundle):
            flags[at] += (f"unknown_residues:{len(positions)}_masked",)
        else:
            flags[at] += (_first_unknown(records[at], sequences[at], positions[0], bundle),)
            sequences[at] = ""
    for at in np.flatnonzero(seen.add([record.id for record in records])).tolist():
        if records[at].id:
            flags[at] += ("duplicate_id",)
    usable = [sequence for sequence in sequences if sequence]
    return _Chunk(
        records=records,
        flags=flags,
        predicted=[bool(sequence) for sequence in sequences],
        tokens=bundle.encode(usable),
    )


def _unusual(
    records: Sequence[SequenceRecord], sequences: Sequence[str], bundle: Bundle
) -> list[int]:
    """The records to look at one by one: others have nothing but residues, and nothing to say."""
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    unusual = (lengths < max(bundle.min_length, 1)) | (lengths > bundle.max_length)
    unusual[[at for at, record in enumerate(records) if record.flags]] = True
    unusual[[at for at, _ in find_unknown(sequences)]] = True
    unusual[[at for at, one in enumerate(sequences) if not one.strip(_NUCLEOTIDE_LETTERS)]] = True
    found: list[int] = np.flatnonzero(unusual).tolist()
    return found


def _can_be_masked(sequence: str, positions: list[int], bundle: Bundle) -> bool:
    return (
        bundle.unknown == "mask"
        and len(positions) < len(sequence)
        and all(sequence[position].upper() in UNKNOWN_RESIDUES for position in positions)
        # Not RNA, of which U is the only letter that is not a residue.
        and not (len(sequence) >= NUCLEOTIDE_LENGTH and ONLY_NUCLEOTIDES.fullmatch(sequence))
    )


def _first_unknown(record: SequenceRecord, sequence: str, position: int, bundle: Bundle) -> str:
    """The flag of a record that cannot be predicted for the letter at `position` of a sequence."""
    letter = sequence[position]
    if bundle.truncate is not None and position >= kept_first(bundle.max_length, bundle.truncate):
        position += len(cleaned(record.sequence)[0]) - len(sequence)
    return f"unknown_residues:{letter}_at_{position + 1}"


def _checked(record: SequenceRecord, bundle: Bundle) -> tuple[str, tuple[str, ...]]:
    """The sequence as the networks take it, "" if they cannot; and what there is to say of it."""
    if record.flags and any(flag.startswith(_REFUSED) for flag in record.flags):
        return "", ()
    sequence, removed = cleaned(record.sequence)
    flags = [f"{what}_removed" for what in removed]
    if not sequence:
        return "", (*flags, "empty")
    length = len(sequence)
    if length >= _NUCLEOTIDES and ONLY_NUCLEOTIDES.fullmatch(sequence):
        flags.append("looks_like_nucleotides")
    if length < bundle.min_length:
        flags.append("shorter_than_trained")
    elif length > bundle.max_length:
        cut = bundle.truncate or "end"
        sequence = truncated(sequence, bundle.max_length, cut)
        kept = kept_in_words(bundle.max_length, cut).replace(" ", "_")
        flags.append(f"longer_than_trained:{kept}_used")
    return sequence, tuple(flags)


def _finished(chunk: _Chunk, computing: Future[_Computed], bundle: Bundle) -> Iterator[Prediction]:
    threshold = bundle.threshold
    mean, spread = computing.result()
    means = iter(mean.tolist())
    spreads = itertools.repeat(None) if spread is None else iter(spread.tolist())
    for record, flags, predicted in zip(chunk.records, chunk.flags, chunk.predicted, strict=True):
        if predicted:
            probability = next(means)
            label = 1 if probability > threshold else 0
            yield Prediction(record, probability, label, next(spreads), flags)
        else:
            yield Prediction(record, None, None, None, flags)


def writer_of(form: OutputFormat, stream: TextIO) -> Callable[[Prediction], object]:
    """Writes predictions to a stream, a line each; a table begins with `COLUMNS`."""
    if form == "jsonl":
        return lambda prediction: stream.write(f"{json.dumps(prediction.to_document())}\n")
    table = csv.writer(stream, delimiter="\t" if form == "tsv" else ",", lineterminator="\n")
    table.writerow(COLUMNS)
    return lambda prediction: table.writerow(prediction.row())
