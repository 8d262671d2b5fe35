"""Intervals of mean validation losses, over seeds and validation rows.

A mean is uncertain for two reasons: other seeds would have given other networks, and other rows
other losses. Rows are resampled for all configurations at once (paired bootstrap), so that what
makes a row hard for all of them cancels in a difference. Seeds are too few to be resampled: five
of them, resampled, have four fifths of their variance, and no tails. The deviation of their mean
is drawn from Student's t instead. `benchmarks/confirm_coverage.py` measures how often the
intervals hold.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RESAMPLES = 4_000
_LEVEL = 0.95
_AT_ONCE = 500  #: resamples, for constant memory

Floats = npt.NDArray[np.float64]


def resampled_deviations(
    losses: Floats, generator: np.random.Generator, resamples: int = RESAMPLES
) -> Floats:
    """How far mean losses might be from what they are expected to be.

    Args:
        losses: Of each configuration, seed and row, nats, [k, s, m]; at least two seeds.
        generator: Draws the resamples.
        resamples: How many.

    Returns:
        Deviations of the mean of each configuration, [resamples, k].
    """
    _, seeds, rows = losses.shape
    of_rows = losses.mean(axis=1)
    of_rows -= of_rows.mean(axis=1, keepdims=True)
    spread = _spread_of_seeds(losses) / np.sqrt(seeds)
    found: Floats = generator.standard_t(seeds - 1, (resamples, len(losses))) * spread
    for start in range(0, resamples, _AT_ONCE):
        part = slice(start, min(start + _AT_ONCE, resamples))
        drawn = generator.multinomial(rows, np.full(rows, 1 / rows), part.stop - part.start)
        found[part] += drawn @ of_rows.T / rows
    return found


def _spread_of_seeds(losses: Floats) -> Floats:
    """The standard deviation that seeds alone cause in mean losses, [k].

    What differs between seeds from row to row is left out: it is among the deviations of the rows.
    """
    _, seeds, rows = losses.shape
    of_seeds = losses.mean(axis=2)
    rest = losses - losses.mean(axis=1, keepdims=True)
    rest -= (of_seeds - of_seeds.mean(axis=1, keepdims=True))[:, :, np.newaxis]
    of_rest = (rest**2).sum(axis=(1, 2)) / ((seeds - 1) * (rows - 1))
    spread: Floats = np.sqrt(np.maximum(of_seeds.var(axis=1, ddof=1) - of_rest / rows, 0))
    return spread


def intervals(means: Floats, deviations: Floats) -> list[tuple[float, float]]:
    """The 95 % interval of each mean [k], by its deviations [resamples, k]."""
    outside = (1 - _LEVEL) / 2
    low, high = np.quantile(deviations, [1 - outside, outside], axis=0)
    return list(zip((means - low).tolist(), (means - high).tolist(), strict=True))


def tied_with_best(means: Floats, deviations: Floats) -> list[int]:
    """The configurations among which the truly best one is, with 95 % confidence.

    One is left out if it is further behind some other, in standard errors of their difference,
    than the largest of its resampled deviations from any other is in 95 % of the resamples.

    Args:
        means: Losses, [k].
        deviations: See `resampled_deviations`, [resamples, k].

    Returns:
        Their indices; that of the lowest mean is among them.
    """
    found = []
    for at, mean in enumerate(means):
        others = np.arange(len(means)) != at
        apart = deviations[:, [at]] - deviations[:, others]
        error = apart.std(axis=0)
        behind = mean - means[others]
        # Networks that are the same row by row have no error, and are tied if their means are.
        same = error == 0
        error[same] = 1.0
        limit = np.quantile((apart / error).max(axis=1, initial=0.0), _LEVEL)
        if (behind / error).max(initial=0.0) <= limit and not (behind[same] > 0).any():
            found.append(at)
    return found
