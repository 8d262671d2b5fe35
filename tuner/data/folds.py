"""Cross-validation: the fold of each development row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tuner.data.groups import divide_groups
from tuner.data.problems import Problems, shortened
from tuner.data.rows import Row
from tuner.errors import counted
from tuner.spec.spec import MAX_FOLDS, FoldColumn

if TYPE_CHECKING:
    from tuner.spec.spec import SplitSettings


def fold_numbers(
    name: str,
    rows: Sequence[Row],
    settings: SplitSettings,
    clusters: Sequence[int] | None,
    order: Callable[[Row], bytes],
) -> tuple[int, ...]:
    """The fold of each row, from 0, [n].

    A column's values are folds, in the order of their names. Otherwise rows are dealt out: within
    each label one to each fold in turn, by `order`, or whole clusters.

    Args:
        name: The source's, for messages.
        rows: The development rows.
        settings: The split, which has folds.
        clusters: The cluster of each row, for rule "homology".
        order: Bytes of chance for each row, which do not depend on the rows' order.

    Raises:
        DataError: A fold lacks a label, or there are too many folds, or one.
    """
    if isinstance(settings.folds, FoldColumn):
        names = _by_column(name, rows, settings.folds.column)
    elif settings.folds is None:
        raise ValueError("the split has no folds")
    elif clusters is None:
        names = _dealt(rows, settings.folds, order)
    else:
        names = _whole_clusters(rows, clusters, settings.folds, order)
    numbers = {fold: number for number, fold in enumerate(sorted(set(names), key=_natural))}
    _require_labels(name, rows, names)
    return tuple(numbers[fold] for fold in names)


def _natural(name: str) -> tuple[int, str]:
    """Numbers by what they count: 2 before 10."""
    return (int(name), "") if name.isdecimal() else (2**63, name)


def _dealt(rows: Sequence[Row], folds: int, order: Callable[[Row], bytes]) -> list[str]:
    names = [""] * len(rows)
    start = 0
    for label in (1, 0):
        its = [at for at, row in enumerate(rows) if row.label == label]
        its.sort(key=lambda at: order(rows[at]))
        for turn, at in enumerate(its, start=start):
            names[at] = str(turn % folds + 1)
        start += len(its)
    return names


def _whole_clusters(
    rows: Sequence[Row], clusters: Sequence[int], folds: int, order: Callable[[Row], bytes]
) -> list[str]:
    shares = {str(fold): 1 / folds for fold in range(1, folds + 1)}
    parts = divide_groups(rows, clusters, shares, order)
    fold_of = {row.sequence: fold for fold, its in parts.items() for row in its}
    return [fold_of[row.sequence] for row in rows]


def _by_column(name: str, rows: Sequence[Row], column: str) -> list[str]:
    names = [row.fold or "" for row in rows]
    found = len(set(names))
    if not 2 <= found <= MAX_FOLDS:
        problems = Problems()
        problems.add(
            name,
            f"the column {column!r} has {counted(found, 'different value')} among the training and "
            f"validation rows, and each would be a fold; name a column of 2 to {MAX_FOLDS} values, "
            "or write the number of folds: folds = 5",
            key=column,
        )
        problems.raise_if_any()
    return names


def _require_labels(name: str, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Each fold has to have both labels.

    Raises:
        DataError: One has not.
    """
    problems = Problems()
    counts = Counter(zip(names, (row.label for row in rows), strict=True))
    for fold in sorted(set(names), key=_natural):
        for label in (1, 0):
            if not counts[fold, label]:
                problems.add(
                    name,
                    f"fold {shortened(fold)!r} has no row of label {label}; each fold needs both "
                    "labels: write fewer folds, or add rows",
                    key="folds",
                    value=fold,
                )
    problems.raise_if_any()
