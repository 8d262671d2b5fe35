"""How good predictions are, with 95 % intervals. Knows nothing of studies.

The interval of the accuracy is Wilson's; those of the loss, MCC and AUC are percentiles of a
bootstrap over rows (B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 13). They say how much another draw of as many proteins from the same population would
change the figure; not what another seed or another split of the data would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 2_000
CONFIDENCE = 0.95
THRESHOLD = 0.5  #: a higher probability counts as soluble
#: Probabilities are kept this far from 0 and 1, or one sure mistake makes the loss infinite;
#: Keras does the same (`keras.config.epsilon()`).
_EPSILON = 1e-7
_CELLS_AT_ONCE = 2_000_000  # resamples x rows in memory: 16 MB each array


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """Rows by label and prediction; soluble is positive."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Figures over one set of rows, each with its 95 % interval."""

    n: int  #: rows
    loss: float  #: mean binary cross-entropy, nats
    loss_ci95: Interval
    accuracy: float  #: fraction right, 0..1
    accuracy_ci95: Interval
    mcc: float  #: Matthews correlation coefficient, -1..1; 0 where it is undefined
    mcc_ci95: Interval
    roc_auc: float | None  #: 0..1; None where all rows have one label
    roc_auc_ci95: Interval | None
    majority_accuracy: float  #: of whoever always names the more frequent label
    confusion: Confusion

    def to_document(self) -> dict[str, Any]:
        """The figures as plain values, ready for JSON; without the confusion matrix."""
        return {
            "n": self.n,
            "loss": self.loss,
            "loss_ci95": list(self.loss_ci95),
            "accuracy": self.accuracy,
            "accuracy_ci95": list(self.accuracy_ci95),
            "mcc": self.mcc,
            "mcc_ci95": list(self.mcc_ci95),
            "roc_auc": self.roc_auc,
            "roc_auc_ci95": None if self.roc_auc_ci95 is None else list(self.roc_auc_ci95),
            "majority_accuracy": self.majority_accuracy,
        }


def measure(
    labels: npt.NDArray[np.uint8], probabilities: Floats, *, resamples: int = RESAMPLES
) -> Metrics:
    """All figures of one set of predictions. The same input gives the same intervals.

    Args:
        labels: [n]; 1 is soluble, 0 insoluble; at least one.
        probabilities: [n]; of being soluble, 0..1.
        resamples: Bootstrap resamples.

    Raises:
        ValueError: The arrays do not fit each other, are empty, or hold something else.
    """
    _check(labels, probabilities)
    n = len(labels)
    losses = cross_entropy(labels, probabilities)
    outcomes = _outcomes(labels, probabilities)
    counts = outcomes.sum(axis=0)
    right = int(counts[0] + counts[3])
    auc = float(_weighted_auc(labels, probabilities, np.ones((1, n)))[0])
    boot_losses, boot_mccs, boot_aucs = [], [], []
    for weights in _resampled(n, resamples):
        boot_losses.append(weights @ losses / n)
        boot_mccs.append(_mcc(weights @ outcomes))
        boot_aucs.append(_weighted_auc(labels, probabilities, weights))
    return Metrics(
        n=n,
        loss=float(losses.mean()),
        loss_ci95=_percentiles(np.concatenate(boot_losses)),
        accuracy=right / n,
        accuracy_ci95=wilson_interval(right, n),
        mcc=float(_mcc(counts[np.newaxis])[0]),
        mcc_ci95=_percentiles(np.concatenate(boot_mccs)),
        roc_auc=None if np.isnan(auc) else auc,
        roc_auc_ci95=None if np.isnan(auc) else _percentiles(np.concatenate(boot_aucs)),
        majority_accuracy=float(max(labels.mean(), 1 - labels.mean())),
        confusion=Confusion(
            true_positive=int(counts[0]),
            false_positive=int(counts[1]),
            false_negative=int(counts[2]),
            true_negative=int(counts[3]),
        ),
    )


def cross_entropy(labels: npt.NDArray[np.uint8], probabilities: Floats) -> Floats:
    """The binary cross-entropy of every row, nats [n]."""
    kept = np.clip(probabilities, _EPSILON, 1 - _EPSILON)
    return -np.log(np.where(labels == 1, kept, 1 - kept))


def wilson_interval(right: int, n: int) -> Interval:
    """The 95 % interval of a proportion `right / n` by E. B. Wilson (1927).

    DOI 10.1080/01621459.1927.10502953. It stays within 0..1 and holds for few rows too.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    p = right / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def roc_curve(
    labels: npt.NDArray[np.uint8], probabilities: Floats, *, points: int = 500
) -> tuple[tuple[float, float], ...]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1).

    Empty where all rows have one label. Of more than `points` corners an even choice is kept:
    the curve is for the eye, the area is computed exactly (`measure`).
    """
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return ()
    order = np.argsort(-probabilities, kind="stable")
    # A threshold can only lie between different probabilities.
    last_of_tie = np.flatnonzero(np.diff(probabilities[order], append=-np.inf))
    true = np.concatenate([[0], np.cumsum(labels[order] == 1)[last_of_tie]]) / positives
    false = np.concatenate([[0], np.cumsum(labels[order] == 0)[last_of_tie]]) / negatives
    kept = np.unique(np.linspace(0, len(true) - 1, min(points, len(true))).round().astype(int))
    return tuple((float(false[at]), float(true[at])) for at in kept)


def _check(labels: npt.NDArray[np.uint8], probabilities: Floats) -> None:
    if labels.ndim != 1 or labels.shape != probabilities.shape or not len(labels):
        raise ValueError(
            f"labels {labels.shape} and probabilities {probabilities.shape} must both be [n], n > 0"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("a label is neither 0 nor 1")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():  # NaN fails both
        raise ValueError("a probability is not within 0..1")


def _outcomes(labels: npt.NDArray[np.uint8], probabilities: Floats) -> Floats:
    """One column each for true positive, false positive, false negative, true negative [n, 4]."""
    predicted, actual = probabilities > THRESHOLD, labels == 1
    columns = (
        predicted & actual,
        predicted & ~actual,
        ~predicted & actual,
        ~predicted & ~actual,
    )
    return np.stack(columns, axis=1).astype(np.float64)


def _mcc(counts: Floats) -> Floats:
    """Matthews correlation coefficients [b] of confusion counts [b, 4].

    B. W. Matthews (1975), DOI 10.1016/0005-2795(75)90109-9. Where a row or column of the
    matrix is empty the formula is 0/0; it counts as 0, what a guess is worth.
    """
    tp, fp, fn, tn = counts.T
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    root = np.sqrt(product)
    values: Floats = np.divide(tp * tn - fp * fn, root, out=np.zeros_like(root), where=root > 0)
    return values


def _weighted_auc(labels: npt.NDArray[np.uint8], probabilities: Floats, weights: Floats) -> Floats:
    """Areas under the ROC curve [b], each with row weights of its own [b, n].

    The chance that a soluble row has a higher probability than an insoluble one, ties counting
    half (J. A. Hanley, B. J. McNeil, 1982, DOI 10.1148/radiology.143.1.7063747); NaN where
    one label has no weight.
    """
    order = np.argsort(probabilities, kind="stable")
    starts = np.flatnonzero(np.diff(probabilities[order], prepend=-1.0))  # of equal ones
    ordered = weights[:, order]
    is_positive = labels[order] == 1
    positive = np.add.reduceat(ordered * is_positive, starts, axis=1)
    negative = np.add.reduceat(ordered * ~is_positive, starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    wins = (positive * (below + negative / 2)).sum(axis=1)
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    areas: Floats = np.divide(wins, pairs, out=np.full_like(wins, np.nan), where=pairs > 0)
    return areas


def _resampled(n: int, resamples: int) -> Iterator[Floats]:
    """How often each row is drawn in each resample [some, n], `resamples` in all."""
    generator = np.random.default_rng(0)
    at_once = max(1, _CELLS_AT_ONCE // n)
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        rows = generator.integers(0, n, size=(count, n)) + n * np.arange(count)[:, np.newaxis]
        drawn = np.bincount(rows.ravel(), minlength=count * n)
        yield drawn.reshape(count, n).astype(np.float64)


def _percentiles(values: Floats) -> Interval:
    """The middle 95 % of the values; resamples in which a figure is undefined are left out."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(values, (tail, 1 - tail))
    return float(low), float(high)
