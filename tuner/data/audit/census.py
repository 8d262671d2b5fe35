"""What each split holds: lengths, labels, unknown residues, stretches of low complexity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tuner.data.audit.features import lengths, row_blocks
from tuner.data.rows import RESIDUES, Tokens
from tuner.spec.architecture import UNKNOWN_TOKEN

WINDOW = 12  #: residues
#: Bits; below it a window is of low complexity: both as SEG has them (J. C. Wootton, S. Federhen,
#: 1993, DOI 10.1016/0097-8485(93)85006-X).
LOW_COMPLEXITY = 2.2
#: One residue so often in a row is a stretch of it: a chance of 1 in 2 million at a place.
RUN = 6
_QUANTILES = {"least": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "most": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """What a set of rows holds."""

    rows: int
    soluble: float | None  #: fraction of the rows, 0..1; None of the test split
    length: dict[str, float]  #: quantiles, residues
    starts_with_m: float  #: fraction of the rows
    unknown_residues: int  #: rows with one at least
    low_complexity: float  #: fraction of the rows with a window of low complexity
    runs: dict[str, int]  #: rows with `RUN` or more of a residue in a row, by the residue
    frequencies: dict[str, float]  #: of each residue among all residues, X the unknown ones

    def to_document(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "rows": self.rows,
            "soluble": self.soluble,
            "length": self.length,
            "starts_with_m": self.starts_with_m,
            "unknown_residues": self.unknown_residues,
            "low_complexity": self.low_complexity,
            "runs": self.runs,
            "frequencies": self.frequencies,
        }


def census(tokens: Tokens, labels: npt.NDArray[np.uint8] | None) -> Census:
    """Counts.

    Args:
        tokens: uint8 [n, max_length], at least one row.
        labels: [n], of rows that are not sealed; None of the test split.
    """
    size = lengths(tokens)
    counts = np.bincount(tokens.ravel(), minlength=UNKNOWN_TOKEN + 1)[1:]
    simple, runs = _simple_stretches(tokens)
    letters = f"{RESIDUES}X"
    frequent = sorted(np.flatnonzero(runs).tolist(), key=lambda place: -runs[place])
    return Census(
        rows=len(tokens),
        soluble=None if labels is None else float(labels.mean()),
        length={name: float(np.quantile(size, at)) for name, at in _QUANTILES.items()},
        starts_with_m=float((tokens[:, 0] == RESIDUES.index("M") + 1).mean()),
        unknown_residues=int((tokens == UNKNOWN_TOKEN).any(axis=1).sum()),
        low_complexity=float(simple.mean()),
        runs={letters[place]: int(runs[place]) for place in frequent},
        frequencies=dict(zip(letters, (counts / counts.sum()).tolist(), strict=True)),
    )


def _simple_stretches(tokens: Tokens) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Rows with a window of low complexity, bool [n]; how many have a run of each residue, [21]."""
    rows_with_run = np.zeros(UNKNOWN_TOKEN, dtype=np.int64)
    width = tokens.shape[1]
    tokens = np.pad(tokens, ((0, 0), (0, max(0, WINDOW - width))))
    count = np.arange(WINDOW + 1)
    # Of a window: log2(12) - sum of c log2(c) / 12 over its residues' counts c.
    part = np.array([0.0, *(count[1:] * np.log2(count[1:]) / WINDOW)])
    simple = []
    for rows in row_blocks(tokens):
        entropy = np.full((len(rows), rows.shape[1] - WINDOW + 1), np.log2(WINDOW))
        for token in range(1, UNKNOWN_TOKEN + 1):
            sums = np.zeros((len(rows), rows.shape[1] + 1), dtype=np.int32)
            np.cumsum(rows == token, axis=1, out=sums[:, 1:])
            entropy -= part[sums[:, WINDOW:] - sums[:, :-WINDOW]]
            run = (sums[:, RUN:] - sums[:, :-RUN] == RUN).any(axis=1)
            rows_with_run[token - 1] += int(run.sum())
        whole = rows[:, WINDOW - 1 :] > 0  # no padding in the window
        simple.append(((entropy < LOW_COMPLEXITY) & whole).any(axis=1))
    return np.concatenate(simple), rows_with_run
