"""Two predictors on the same rows: how much better is one, and is that more than chance?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tuner.metrics import CONFIDENCE, DRAWS, Floats, Interval, cross_entropy

_CELLS_AT_ONCE = 2_000_000  # draws x rows in memory: 16 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How much better one predictor is than another; positive is better."""

    loss: float  #: by which its mean loss is lower, nats
    loss_ci95: Interval
    accuracy: float  #: by which its fraction right is higher, -1..1
    accuracy_ci95: Interval

    def to_document(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "loss": self.loss,
            "loss_ci95": list(self.loss_ci95),
            "accuracy": self.accuracy,
            "accuracy_ci95": list(self.accuracy_ci95),
        }


def paired_difference(
    labels: npt.NDArray[np.uint8], logits: Floats, others: Floats, *, draws: int = DRAWS
) -> Difference:
    """The differences of loss and accuracy over the same rows, with paired intervals.

    By the Bayesian bootstrap of the rows (D. B. Rubin, 1981, DOI 10.1214/aos/1176345338): both
    predictors see the same draw, so what makes a row hard for both does not widen the interval.
    The same input gives the same intervals.

    Args:
        labels: [n]; 1 is soluble.
        logits: Of the predictor that may be better, [n].
        others: Of the other, [n].
        draws: Of the bootstrap.
    """
    gains = np.stack(
        [
            cross_entropy(labels, others) - cross_entropy(labels, logits),
            ((logits > 0) == (labels == 1)).astype(np.float64) - ((others > 0) == (labels == 1)),
        ],
        axis=1,
    )
    generator = np.random.default_rng(0)
    drawn = []
    at_once = max(1, _CELLS_AT_ONCE // len(labels))
    for start in range(0, draws, at_once):
        rows = generator.standard_exponential((min(at_once, draws - start), len(labels)))
        drawn.append(rows @ gains / rows.sum(axis=1, keepdims=True))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(drawn), (tail, 1 - tail), axis=0)
    loss, accuracy = gains.mean(axis=0)
    return Difference(
        loss=float(loss),
        loss_ci95=(float(low[0]), float(high[0])),
        accuracy=float(accuracy),
        accuracy_ci95=(float(low[1]), float(high[1])),
    )
