"""Sets of 5-mers as sparse matrices, and which rows have similar ones.

The similarity of two sequences is the Jaccard index of their sets of 5-mers: those that both have,
divided by those that either has. It needs no alignment, and all pairs above a similarity are found
exactly by products of sparse matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tuner.data.audit.features import row_blocks
from tuner.data.audit.packages import require_packages
from tuner.data.rows import Tokens
from tuner.spec.architecture import UNKNOWN_TOKEN

if TYPE_CHECKING:
    from scipy.sparse import csr_array

K = 5  # residues
LEAST = 0.3  #: similarity; pairs below it are not looked at
_LETTERS = UNKNOWN_TOKEN + 1
#: Rows that share a 5-mer, from which on it is compared apart: a tag that a tenth of all sequences
#: have would else make a tenth of all pairs candidates.
_FREQUENT = 1_000
#: How many times as many products there must be with them: candidates are compared in full then.
_WORTH_IT = 2
_PRODUCTS_AT_ONCE = 10_000_000  # of a block of rows with all: some 300 MB
_PAIRS_AT_ONCE = 200_000  # whose sets are compared in full
#: Products of one search, above which only a sample of the rows is compared: a minute or two.
MOST_PRODUCTS = 5_000_000_000

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class KmerSets:
    """The set of 5-mers of each row."""

    matrix: csr_array  #: int32 [n, 5-mers], 1 where a row has a 5-mer
    sizes: Integers  #: different 5-mers of each row, [n]; 0 of a sequence of fewer than 5 residues


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Some pairs of rows whose sets are similar."""

    first: Integers  #: row numbers, [m]
    second: Integers  #: row numbers, [m], never the same as `first`
    similarity: Floats  #: Jaccard index, at least `LEAST`, [m]


def kmer_sets(tokens: Tokens) -> KmerSets:
    """The 5-mers of sequences.

    Args:
        tokens: uint8 [n, max_length], padded at the end.

    Raises:
        SetupError: SciPy is missing.
    """
    require_packages("Comparing sequences", "scipy")
    from scipy.sparse import csr_array  # noqa: PLC0415 - only the audit needs SciPy

    parts = [_kmers(block) for block in row_blocks(tokens)]
    columns = np.concatenate([np.empty(0, np.int64), *(found for found, _ in parts)])
    sizes = np.concatenate([np.empty(0, np.int64), *(counts for _, counts in parts)])
    shape = (len(tokens), _LETTERS**K)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    matrix = csr_array((np.ones(len(columns), np.int32), columns, starts), shape=shape)
    return KmerSets(matrix=matrix, sizes=sizes)


def _kmers(tokens: Tokens) -> tuple[Integers, Integers]:
    """The different 5-mers of each row, row by row as numbers, and how many each row has."""
    windows = tokens.shape[1] - K + 1
    if windows < 1:
        return np.empty(0, np.int64), np.zeros(len(tokens), np.int64)
    code = np.zeros((len(tokens), windows), np.int64)
    for offset in range(K):
        code = code * _LETTERS + tokens[:, offset : offset + windows]
    # The last residue of a window is one: no padding in it.
    code[tokens[:, K - 1 :] == 0] = -1
    code.sort(axis=1)
    new = code >= 0
    new[:, 1:] &= code[:, 1:] != code[:, :-1]
    return code[new], new.sum(axis=1)


def similar_pairs(
    sets: KmerSets,
    rows: Integers | None = None,
    *,
    others: Integers | None = None,
    progress: Callable[[float], None] | None = None,
) -> Iterator[Pairs]:
    """All pairs of a row and another with a similarity of `LEAST` or more, in blocks of rows.

    Exact. 5-mers that very many rows have are left out of the product, where the rule of prefix
    filtering (R. J. Bayardo et al., 2007, DOI 10.1145/1242572.1242591) allows it: the rarest
    (1 - t) |x| + 1 of a set's members have at least one in common with every set of a similarity of
    t. The sets of candidates are then compared in full.

    Args:
        sets: Of all rows.
        rows: The first rows of pairs; by default all, so that each pair comes twice, once from
            either side.
        others: The second rows of pairs; by default all.
        progress: Takes the part that is done, 0..1.

    Yields:
        The pairs of a block of first rows.
    """
    rows = np.arange(len(sets.sizes)) if rows is None else rows
    light, left_out = _without_frequent(sets)
    products = _products(light)[rows]
    others = np.arange(len(sets.sizes)) if others is None else others
    columns = light[others].T.tocsr()
    ends = np.searchsorted(
        np.cumsum(products),
        np.arange(1, math.ceil(products.sum() / _PRODUCTS_AT_ONCE) + 1) * _PRODUCTS_AT_ONCE,
        side="left",
    )
    starts = np.unique(np.concatenate([[0], ends + 1, [len(rows)]]).clip(0, len(rows)))
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        yield _similar(sets, left_out, light, columns, rows[start:end], others)
        if progress is not None:
            progress(end / len(rows))


def _similar(
    sets: KmerSets,
    left_out: Integers,
    light: Any,
    columns: Any,
    rows: Integers,
    others: Integers,
) -> Pairs:
    shared = light[rows] @ columns
    # A set's members that both have are at least that part of it; of those that were left out of
    # either set, both may have all.
    counts = np.diff(shared.indptr)
    missing = np.repeat(LEAST * sets.sizes[rows] - left_out[rows] - 1e-6, counts)
    likely = np.flatnonzero(shared.data + left_out[others][shared.indices] >= missing)
    first = rows[np.searchsorted(shared.indptr, likely, side="right") - 1]
    second = others[shared.indices[likely]]
    likely, first, second = (one[first != second] for one in (likely, first, second))
    common = shared.data[likely].astype(np.int64)
    unsure = np.flatnonzero(left_out[first] + left_out[second])
    for start in range(0, len(unsure), _PAIRS_AT_ONCE):
        part = unsure[start : start + _PAIRS_AT_ONCE]
        both = sets.matrix[first[part]].multiply(sets.matrix[second[part]])
        common[part] = both.sum(axis=1)
    similarity = common / (sets.sizes[first] + sets.sizes[second] - common)
    found = similarity >= LEAST
    return Pairs(first=first[found], second=second[found], similarity=similarity[found])


def _without_frequent(sets: KmerSets) -> tuple[Any, Integers]:
    """The sets without their most frequent 5-mers, and how many were left out of each.

    Of a set of n, at most ceil(`LEAST` n) - 1, and none that is rare.
    """
    from scipy.sparse import csr_array  # noqa: PLC0415 - as above

    matrix = sets.matrix
    frequency = _frequencies(matrix)
    if frequency.max(initial=0) <= _FREQUENT:
        return matrix, np.zeros_like(sets.sizes)
    most = np.maximum(np.ceil(LEAST * sets.sizes - 1e-9).astype(np.int64) - 1, 0)
    of_row = np.repeat(np.arange(len(sets.sizes)), sets.sizes)
    frequent = np.flatnonzero(frequency[matrix.indices] > _FREQUENT)
    # The most frequent first within each row; the same order in all rows, ties included.
    order = np.lexsort(
        (matrix.indices[frequent], -frequency[matrix.indices[frequent]], of_row[frequent])
    )
    frequent = frequent[order]
    row = of_row[frequent]
    rank = np.arange(len(row)) - np.searchsorted(row, row, side="left")
    keep = np.ones(len(matrix.indices), dtype=bool)
    keep[frequent[rank < most[row]]] = False
    kept = np.bincount(of_row[keep], minlength=len(sets.sizes))
    starts = np.concatenate([[0], np.cumsum(kept)])
    light = csr_array((matrix.data[keep], matrix.indices[keep], starts), shape=matrix.shape)
    if _WORTH_IT * _products(light).sum() > _products(matrix).sum():
        return matrix, np.zeros_like(sets.sizes)
    return light, sets.sizes - kept


def _frequencies(matrix: Any) -> Integers:
    return np.bincount(matrix.indices, minlength=matrix.shape[1])


def _products(light: Any) -> Integers:
    """How many products each row's comparison with all rows takes, [n]."""
    of_row = np.repeat(np.arange(light.shape[0]), np.diff(light.indptr))
    weights = _frequencies(light)[light.indices]
    return np.bincount(of_row, weights=weights, minlength=light.shape[0]).astype(np.int64)


def sampled_rows(sets: KmerSets, most: int = MOST_PRODUCTS) -> Integers:
    """The rows to compare with all others: all of them, or a random sample if that takes too long.

    Thousands of variants of one protein are similar to each other, each pair of them.

    Args:
        sets: Of all rows.
        most: Products.

    Returns:
        Row numbers in ascending order; the same sets give the same.
    """
    products = _products(_without_frequent(sets)[0])
    if products.sum() <= most:
        return np.arange(len(sets.sizes))
    order = np.random.default_rng(0).permutation(len(sets.sizes))
    count = int(np.searchsorted(np.cumsum(products[order]), most))
    return np.sort(order[: max(count, 1)])
