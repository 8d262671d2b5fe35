"""Whether a probability of 0.8 means that 8 of 10 proteins are soluble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tuner.metrics import Floats, cross_entropy, wilson_interval

BINS = 10  #: of equal width
_DRAWS = 500  # of labels, to say what chance makes of the calibration error
_LIMIT = 64.0  # of the temperature and of its inverse

Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """The rows whose probability lies in one part of the scale."""

    low: float  #: probability, included
    high: float  #: excluded, but for 1
    rows: int
    predicted: float  #: mean probability of being soluble
    soluble: float  #: fraction that is
    soluble_ci95: tuple[float, float]  #: Wilson score interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How well probabilities of one set of rows fit what happened."""

    bins: tuple[Bin, ...]  #: those with rows, from the lowest
    brier: float  #: mean squared error of the probability, 0..1; 0.25 of whoever says 0.5
    #: Expected calibration error: mean distance of `predicted` from `soluble`, weighted by rows.
    error: float
    error_by_chance: float  #: its mean for a perfectly calibrated network of these probabilities
    loss: float  #: mean binary cross-entropy, nats

    def to_document(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "brier": self.brier,
            "expected_calibration_error": self.error,
            "expected_calibration_error_by_chance": self.error_by_chance,
            "loss": self.loss,
            "bins": [
                {
                    "low": one.low,
                    "high": one.high,
                    "rows": one.rows,
                    "predicted": one.predicted,
                    "soluble": one.soluble,
                    "soluble_ci95": list(one.soluble_ci95),
                }
                for one in self.bins
            ],
        }


def calibration(labels: Labels, logits: Floats) -> Calibration:
    """Reliability curve, Brier score and expected calibration error.

    M. P. Naeini et al., 2015, DOI 10.1609/aaai.v29i1.9602, with bins of equal width.

    Args:
        labels: [n]; 1 is soluble; at least one.
        logits: [n].
    """
    probability = np.exp(-np.logaddexp(0, -logits))
    place = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
    rows = np.bincount(place, minlength=BINS)
    predicted = np.bincount(place, weights=probability, minlength=BINS)
    soluble = np.bincount(place, weights=labels, minlength=BINS)
    bins = tuple(
        Bin(
            low=one / BINS,
            high=(one + 1) / BINS,
            rows=int(rows[one]),
            predicted=float(predicted[one] / rows[one]),
            soluble=float(soluble[one] / rows[one]),
            soluble_ci95=wilson_interval(int(soluble[one]), int(rows[one])),
        )
        for one in np.flatnonzero(rows).tolist()
    )
    generator = np.random.default_rng(0)
    by_chance = [
        np.abs(
            np.bincount(place, weights=generator.random(len(labels)) < probability, minlength=BINS)
            - predicted
        ).sum()
        for _ in range(_DRAWS)
    ]
    return Calibration(
        bins=bins,
        brier=float(np.mean((probability - labels) ** 2)),
        error=float(np.abs(soluble - predicted).sum() / len(labels)),
        error_by_chance=float(np.mean(by_chance) / len(labels)),
        loss=float(cross_entropy(labels, logits).mean()),
    )


def fitted_temperature(labels: Labels, logits: Floats) -> float:
    """The temperature by which logits are divided to have the lowest loss, 1/64 to 64.

    C. Guo et al., 2017, arXiv:1706.04599. The ranking of rows, and which side of 0.5 each is on,
    stay as they are.

    Args:
        labels: Of validation rows, [n].
        logits: Of the same rows, [n].
    """

    def slope(inverse: float) -> float:
        """Of the loss, which is convex in the inverse of the temperature."""
        scaled = np.clip(logits * inverse, -700, 700)
        return float(np.mean((1 / (1 + np.exp(-scaled)) - labels) * logits))

    low, high = 1 / _LIMIT, _LIMIT
    if slope(low) >= 0:
        return _LIMIT
    if slope(high) <= 0:
        return 1 / _LIMIT
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 2 / (low + high)
