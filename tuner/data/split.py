"""The split: by the hash of the sequences, the seed and the fractions, stratified by label.

Why: `docs/decisions.md#when-is-a-split-too-small`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.spec.spec import SplitSettings
from tuner.data.problems import Problems
from tuner.data.rows import Row, Source, hash_sequence

MINIMUM_ROWS = 10  # of each label: below that a split of 10 % is a coin toss


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitHashes:
    """Which sequences are in which split, as the SHA-256 of each, in upper case and uncut.

    Enough to find them in another study's splits; labels are not in it.
    """

    training: frozenset[bytes]  #: 32 bytes each
    validation: frozenset[bytes]  #: the same
    test: frozenset[bytes]  #: the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The rows of each split, in the order of their hashes."""

    training: tuple[Row, ...]  #: fit weights
    validation: tuple[Row, ...]  #: choose hyperparameters
    test: tuple[Row, ...]  #: sealed until the report


def split_rows(source: Source, settings: SplitSettings) -> Split:
    """Splits the rows by their sequences alone.

    Within each label, rows are ordered by sha256("<split seed>:<sequence>"). The first `test`
    part of them is the test split, the next `validation` part the validation split, the rest
    the training split. Parts are rounded to whole rows, halves to the even number.

    Raises:
        DataError: Too few rows of a label.
    """
    problems = Problems()
    parts: dict[str, list[Row]] = {"test": [], "validation": [], "training": []}

    def order(row: Row) -> bytes:
        return hashlib.sha256(f"{settings.seed}:{row.sequence}".encode()).digest()

    for label in (1, 0):
        ordered = sorted((row for row in source.rows if row.label == label), key=order)
        test = round(settings.test * len(ordered))
        validation = round(settings.validation * len(ordered))
        ends = {"test": test, "validation": test + validation, "training": len(ordered)}
        start = 0
        counts = []
        for name, end in ends.items():
            parts[name] += ordered[start:end]
            counts.append(end - start)
            start = end
        if len(ordered) < MINIMUM_ROWS or min(counts) < 1:
            problems.add(
                source.name,
                f"too few rows of label {label}: {len(ordered)} different ones ({counts[0]} test, "
                f"{counts[1]} validation, {counts[2]} training); at least {MINIMUM_ROWS} of each "
                "label and one in each split are needed: add rows, or raise validation or test "
                "of split in [data]",
                key="label",
                value=str(label),
            )
    problems.raise_if_any()
    # By hash over both labels: a reader that takes the rows in order meets the labels mixed.
    return Split(**{name: tuple(sorted(rows, key=order)) for name, rows in parts.items()})


def hashes_of(split: Split) -> SplitHashes:
    """The hashes of the rows of each part."""
    return SplitHashes(
        **{
            name: frozenset(hash_sequence(row.whole or row.sequence) for row in rows)
            for name, rows in (
                ("training", split.training),
                ("validation", split.validation),
                ("test", split.test),
            )
        }
    )
