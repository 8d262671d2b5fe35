"""What simple models see of a sequence: its ends, its composition, its length."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from tuner.data.rows import Tokens
from tuner.spec.architecture import UNKNOWN_TOKEN

ENDS = 10  # residues at either end
_TOKENS = UNKNOWN_TOKEN + 1  # padding and unknown residues among them
#: Rows x width while residues are counted: a few arrays of 16 MB, however long sequences are.
_CELLS_AT_ONCE = 2_000_000

Features = npt.NDArray[np.float32]


def row_blocks(tokens: Tokens) -> Iterator[Tokens]:
    """The tokens [n, max_length] in blocks of rows that fit into memory."""
    rows = max(1, _CELLS_AT_ONCE // tokens.shape[1])
    return (tokens[start : start + rows] for start in range(0, len(tokens), rows))


def lengths(tokens: Tokens) -> npt.NDArray[np.int64]:
    """Residues of each row, [n]."""
    found: npt.NDArray[np.int64] = (tokens > 0).sum(axis=1)
    return found


def ends(tokens: Tokens) -> Tokens:
    """The first and the last 10 tokens of each row, [n, 20]; 0 where a sequence has fewer."""
    first = tokens[:, :ENDS]
    first = np.pad(first, ((0, 0), (0, ENDS - first.shape[1])))
    places = lengths(tokens)[:, np.newaxis] + np.arange(-ENDS, 0)
    last = np.where(places >= 0, np.take_along_axis(tokens, places.clip(0), axis=1), 0)
    return np.concatenate([first, last], axis=1).astype(np.uint8)


def composition(tokens: Tokens) -> Features:
    """The fraction of each residue in each row, [n, 21]; the last is that of unknown ones."""
    total = np.maximum(lengths(tokens), 1)
    counts = [(tokens == token).sum(axis=1) / total for token in range(1, _TOKENS)]
    return np.stack(counts, axis=1).astype(np.float32)


def dipeptides(tokens: Tokens) -> Features:
    """The fraction of each pair of neighbours in each row, [n, 441]."""
    wanted = _TOKENS - 1
    parts = []
    for block in row_blocks(tokens):
        part = block.astype(np.int64)
        pair = part[:, :-1] * _TOKENS + part[:, 1:]
        pair += np.arange(len(part))[:, np.newaxis] * _TOKENS**2
        counts = np.bincount(pair[part[:, 1:] > 0], minlength=len(part) * _TOKENS**2)
        table = counts.reshape(len(part), _TOKENS, _TOKENS)[:, 1:, 1:]
        total = np.maximum(lengths(block) - 1, 1)
        parts.append(
            (table.reshape(len(part), wanted**2) / total[:, np.newaxis]).astype(np.float32)
        )
    return np.concatenate([np.empty((0, wanted**2), np.float32), *parts])


def length(tokens: Tokens) -> Features:
    """Length, its square and its logarithm, [n, 3]."""
    residues = lengths(tokens).astype(np.float64)
    return np.stack([residues, residues**2, np.log1p(residues)], axis=1).astype(np.float32)


def _indicators(tokens: Tokens) -> Features:
    """A column for each place and token, [n, places x 21]."""
    places = tokens[:, :, np.newaxis] == np.arange(1, _TOKENS)
    columns: Features = places.reshape(len(tokens), -1).astype(np.float32)
    return columns


def first_residue(tokens: Tokens) -> Features:
    """A column for each residue that may be the first, [n, 21]."""
    return _indicators(tokens[:, :1])


def both_ends(tokens: Tokens) -> Features:
    """A column for each residue at each of the 20 places, [n, 420]."""
    return _indicators(ends(tokens))


def side_by_side(
    *parts: Callable[[Tokens], npt.NDArray[np.generic]],
) -> Callable[[Tokens], Features]:
    """The features of several functions, one beside the other."""

    def features(tokens: Tokens) -> Features:
        return np.concatenate([part(tokens).astype(np.float32) for part in parts], axis=1)

    return features


#: Ends as indicators, for a linear model.
everything = side_by_side(composition, dipeptides, length, both_ends)
#: Ends as categories, the last 20 columns, for trees.
everything_for_trees = side_by_side(composition, dipeptides, length, ends)
