"""Near-twins: sequences so similar that one nearly tells the other's structure.

Labels are those of training and validation rows: no function here takes one of a test row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tuner.data.audit.kmers import (
    LEAST,
    MOST_PRODUCTS,
    Floats,
    KmerSets,
    Pairs,
    kmer_sets,
    sampled_rows,
    similar_pairs,
)
from tuner.data.development import DevelopmentData
from tuner.data.rows import Tokens

TWIN = 0.7  #: similarity from which on two sequences are near-twins
#: The lower end of each band of similarities; the last is that of equal sets.
BANDS = (LEAST, 0.5, TWIN, 0.8, 0.9, 1.0)
SPLITS = ("training", "validation", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class NearTwins:
    """How many pairs of rows are how similar, within and across splits."""

    rows: int  #: of all splits
    compared: int  #: rows that were compared with all others; fewer than `rows`: a sample
    #: Pairs by splits, (0 training, 1 validation, 2 test), and band of similarity: float64
    #: [3, 3, bands], symmetric; of a sample, what it lets expect of all.
    pairs: Floats
    #: Near-twins among training and validation rows with different labels; as `pairs`.
    opposite: float
    #: Of each split, the fraction of its rows with a near-twin in training, 0..1.
    twin_in_training: tuple[float, float, float]

    @property
    def is_exact(self) -> bool:
        return self.compared == self.rows

    @property
    def development_pairs(self) -> int:
        """Near-twins among training and validation rows."""
        return round(float(self._near[:2, :2][np.triu_indices(2)].sum()))

    @property
    def across_splits(self) -> int:
        """Near-twins of two splits."""
        return round(float(self._near[np.triu_indices(3, 1)].sum()))

    @property
    def opposite_labels(self) -> float | None:
        """The share of `development_pairs` with different labels, 0..1; None if there are none."""
        return self.opposite / self.development_pairs if self.development_pairs else None

    @property
    def _near(self) -> Floats:
        near: Floats = self.pairs[:, :, BANDS.index(TWIN) :].sum(axis=2)
        return near

    def to_document(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "similarity": "Jaccard index of the sets of 5-mers",
            "threshold": TWIN,
            "exact": self.is_exact,
            "rows": self.rows,
            "rows_compared": self.compared,
            "development_pairs": self.development_pairs,
            "opposite_labels": self.opposite_labels,
            "across_splits": self.across_splits,
            "rows_with_twin_in_training": dict(zip(SPLITS, self.twin_in_training, strict=True)),
            "bands": [
                {
                    "from": low,
                    "to": high,
                    "pairs": {
                        a if a == b else f"{a} and {b}": round(self.pairs[one, other, band])
                        for one, a in enumerate(SPLITS)
                        for other, b in enumerate(SPLITS[one:], start=one)
                    },
                }
                for band, (low, high) in enumerate(zip(BANDS, (*BANDS[1:], None), strict=True))
            ],
        }


def near_twins(
    development: DevelopmentData,
    test_tokens: Tokens,
    *,
    most_products: int = MOST_PRODUCTS,
    progress: Callable[[float], None] | None = None,
) -> NearTwins:
    """Compares every row with every other.

    Args:
        development: Training and validation rows.
        test_tokens: Sequences of the test split, uint8 [n, max_length]; their labels are no part
            of this.
        most_products: Of the comparison; if it takes more, a sample of rows is compared.
        progress: Takes the part that is done, 0..1.

    Raises:
        SetupError: SciPy is missing.
    """
    parts = (development.training_tokens, development.validation_tokens, test_tokens)
    sets = kmer_sets(np.concatenate(parts))
    rows = sampled_rows(sets, most_products)
    counts = _Counts(development, [len(part) for part in parts])
    for pairs in similar_pairs(sets, rows, progress=progress):
        counts.add(pairs)
    return counts.result(rows)


class _Counts:
    """Adds up pairs, each of which comes once for each of its rows that was compared."""

    def __init__(self, development: DevelopmentData, sizes: list[int]) -> None:
        # A development row's number is below the number of labels: test rows come last.
        self._labels = np.concatenate([development.training_labels, development.validation_labels])
        self._split = np.repeat(np.arange(3), sizes)
        self._pairs = np.zeros((3, 3, len(BANDS)))
        self._opposite = 0
        self._has_twin = np.zeros(sum(sizes), dtype=bool)

    def add(self, pairs: Pairs) -> None:
        split = self._split
        band = np.searchsorted(BANDS, pairs.similarity, side="right") - 1
        np.add.at(self._pairs, (split[pairs.first], split[pairs.second], band), 1)
        near = pairs.similarity >= TWIN
        first, second = pairs.first[near], pairs.second[near]
        self._has_twin[first[split[second] == 0]] = True
        known = (first < len(self._labels)) & (second < len(self._labels))
        self._opposite += int((self._labels[first[known]] != self._labels[second[known]]).sum())

    def result(self, rows: Any) -> NearTwins:
        scale = len(self._split) / len(rows)
        across = (self._pairs + self._pairs.transpose(1, 0, 2)) / 2
        within = np.eye(3, dtype=bool)
        across[within] /= 2
        compared = self._split[rows]
        shares = [
            float(self._has_twin[rows[compared == split]].mean())
            if (compared == split).any()
            else 0.0
            for split in range(3)
        ]
        return NearTwins(
            rows=len(self._split),
            compared=len(rows),
            pairs=across * scale,
            opposite=self._opposite / 2 * scale,
            twin_in_training=(shares[0], shares[1], shares[2]),
        )


def nearest_in_training(training_tokens: Tokens, tokens: Tokens) -> Floats:
    """The similarity of each row to the most similar training row, [n]; 0 where below `LEAST`.

    Args:
        training_tokens: uint8 [training rows, max_length].
        tokens: uint8 [n, max_length], of other rows.

    Raises:
        SetupError: SciPy is missing.
    """
    known = len(training_tokens)
    sets: KmerSets = kmer_sets(np.concatenate([training_tokens, tokens]))
    nearest = np.zeros(known + len(tokens))
    rows = np.arange(known, known + len(tokens))
    for pairs in similar_pairs(sets, rows, others=np.arange(known)):
        np.maximum.at(nearest, pairs.first, pairs.similarity)
    return nearest[known:]
