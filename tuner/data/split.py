"""The split: by the hash of the sequences, stratified by label, or as the data names it.

Why: `docs/decisions.md#when-is-a-split-too-small`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

if TYPE_CHECKING:
    from tuner.spec.spec import SplitSettings
from tuner.data.folds import fold_numbers
from tuner.data.groups import divide_groups
from tuner.data.homology import Clusters
from tuner.data.problems import Problems
from tuner.data.rows import Row, Source, hash_sequence
from tuner.errors import counted
from tuner.spec.spec import SplitPart

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

    training: tuple[Row, ...]  #: fit weights; with folds all development rows
    validation: tuple[Row, ...]  #: choose hyperparameters; with folds none
    test: tuple[Row, ...]  #: sealed until the report
    folds: tuple[int, ...] | None = None  #: the fold of each training row, from 0, [n]


def split_rows(source: Source, settings: SplitSettings, clusters: Clusters | None = None) -> Split:
    """Splits the rows by the rule of the study file.

    Args:
        source: The rows.
        settings: The rule.
        clusters: Of the rows, in their order; for rule "homology".

    Raises:
        DataError: A part has no rows of a label, or there are too few of it.
    """
    order = _order(settings.seed)
    if clusters is not None:
        parts = _by_clusters(source, settings, clusters)
    elif settings.rule == "given":
        parts = _given(source, settings)
    else:
        parts = _at_random(source, settings)
    # By hash over both labels: a reader that takes the rows in order meets the labels mixed.
    training, validation, test = (
        tuple(sorted(parts[part], key=order)) for part in get_args(SplitPart)
    )
    if settings.folds is None:
        return Split(training=training, validation=validation, test=test)
    development = tuple(sorted((*training, *validation), key=order))
    its_clusters = None
    if clusters is not None:
        cluster_of = dict(zip(_sequences(source.rows), clusters.numbers, strict=True))
        its_clusters = [cluster_of[row.sequence] for row in development]
    folds = fold_numbers(source.name, development, settings, its_clusters, order)
    return Split(training=development, validation=(), test=test, folds=folds)


def _sequences(rows: Sequence[Row]) -> list[str]:
    return [row.sequence for row in rows]


def _order(seed: int) -> Callable[[Row], bytes]:
    """By what rows are sorted: no file and no order of its rows decides it."""
    return lambda row: hashlib.sha256(f"{seed}:{row.sequence}".encode()).digest()


def _given(source: Source, settings: SplitSettings) -> dict[SplitPart, list[Row]]:
    """The rows of each part, as the data names it."""
    parts: dict[SplitPart, list[Row]] = {"training": [], "validation": [], "test": []}
    for row in source.rows:
        if row.part is not None:
            parts[row.part].append(row)
    remedy = (
        "add such rows to its file"
        if settings.column is None
        else f"name other values of the column {settings.column!r} in [data.split]"
    )
    _require_labels(source, parts, settings.column or "label", remedy)
    return parts


def _by_clusters(
    source: Source, settings: SplitSettings, clusters: Clusters
) -> dict[SplitPart, list[Row]]:
    """The rows of each part, no cluster in two of them."""
    shares: dict[SplitPart, float] = {
        "test": settings.test_fraction,
        "validation": settings.validation_fraction,
        "training": 1 - settings.test_fraction - settings.validation_fraction,
    }
    parts = divide_groups(source.rows, clusters.numbers, shares, _order(settings.seed))
    remedy = (
        f"the rows make {counted(clusters.count, 'cluster')}; add rows, or raise identity in "
        "[data.split] for more clusters"
    )
    _require_labels(source, parts, "label", remedy)
    return parts


def _require_labels(
    source: Source, parts: Mapping[SplitPart, Sequence[Row]], key: str, remedy: str
) -> None:
    """Each part has to have both labels, and the data ten rows of each.

    Raises:
        DataError: It has not.
    """
    problems = Problems()
    for part, rows in parts.items():
        for label in (1, 0):
            if not any(row.label == label for row in rows):
                problems.add(
                    source.name,
                    f"the {part} part has no row of label {label}, of "
                    f"{counted(len(rows), 'different row')}; each part needs both labels: {remedy}",
                    key=key,
                    value=part,
                )
    for label in (1, 0):
        rows = [row for row in source.rows if row.label == label]
        if len(rows) < MINIMUM_ROWS:
            problems.add(
                source.name,
                f"too few rows of label {label}: {counted(len(rows), 'different one')}; at least "
                f"{MINIMUM_ROWS} of each label are needed: add rows",
                key="label",
                value=str(label),
            )
    problems.raise_if_any()


def _at_random(source: Source, settings: SplitSettings) -> dict[SplitPart, list[Row]]:
    """The rows of each part, by their sequences alone.

    Within each label, rows are ordered by sha256("<split seed>:<sequence>"). The first `test`
    part of them is the test split, the next `validation` part the validation split, the rest
    the training split. Parts are rounded to whole rows, halves to the even number.
    """
    problems = Problems()
    parts: dict[SplitPart, list[Row]] = {"test": [], "validation": [], "training": []}
    order = _order(settings.seed)
    for label in (1, 0):
        ordered = sorted((row for row in source.rows if row.label == label), key=order)
        test = round(settings.test_fraction * len(ordered))
        validation = round(settings.validation_fraction * len(ordered))
        ends: dict[SplitPart, int] = {
            "test": test,
            "validation": test + validation,
            "training": len(ordered),
        }
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
    return parts


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
