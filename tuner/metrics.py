"""How good predictions are, with 95 % intervals. Knows nothing of studies.

Predictions are logits, as they leave the network: a probability in float32 is 1 from a logit of 17
on, and says no more how sure a mistake was. The loss is the one that training counts,
`tf.nn.sigmoid_cross_entropy_with_logits`.

Each interval holds at the ends of its scale, too, where a bootstrap of rows without a mistake
knows of none (`METHODS`). They say how much another draw of as many proteins from the same
population would change the figure; not what another seed or another split of the data would.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from tuner.errors import counted

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]

DRAWS = 2_000  #: of the intervals of loss and MCC
CONFIDENCE = 0.95
THRESHOLD = 0.5  #: a higher probability, a logit above 0, counts as soluble
#: Rows that are added to what was seen, of each kind: the neutral prior of J. Kerman (2011), DOI
#: 10.1214/11-EJS648, whose intervals of a proportion hold near 0 and 1, too.
PRIOR_ROWS = 1 / 3
#: How the interval of each figure is made.
METHODS = {
    "loss": "Bayesian bootstrap of the rows and 1/3 of an average right and wrong row",
    "accuracy": "Wilson score interval",
    "mcc": "Dirichlet posterior of the confusion matrix, 1/3 of a row added to each cell",
    "roc_auc": "Newcombe's score interval with the variance of Hanley and McNeil (method 5)",
}
#: Rows from which on the standard error of an accuracy is 5 percentage points at most.
ENOUGH_ROWS = 100
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_CELLS_AT_ONCE = 2_000_000  # draws x rows in memory: 16 MB


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
            "method": dict(METHODS),
        }


def measure(labels: npt.NDArray[np.uint8], logits: Floats, *, draws: int = DRAWS) -> Metrics:
    """All figures of one set of predictions. The same input gives the same intervals.

    Args:
        labels: [n]; 1 is soluble, 0 insoluble; at least one.
        logits: [n]; of the probability of being soluble.
        draws: For the intervals of loss and MCC.

    Raises:
        ValueError: The arrays do not fit each other, are empty, or hold something else.
    """
    _check(labels, logits)
    n, soluble = len(labels), int(labels.sum())
    losses = cross_entropy(labels, logits)
    predicted, actual = logits > 0, labels == 1
    confusion = Confusion(
        true_positive=int((predicted & actual).sum()),
        false_positive=int((predicted & ~actual).sum()),
        false_negative=int((~predicted & actual).sum()),
        true_negative=int((~predicted & ~actual).sum()),
    )
    right = confusion.true_positive + confusion.true_negative
    counts = np.array(dataclasses.astuple(confusion), dtype=np.float64)
    auc = area_under_curve(labels, logits)
    return Metrics(
        n=n,
        loss=float(losses.mean()),
        loss_ci95=_loss_interval(losses, logits, draws),
        accuracy=right / n,
        accuracy_ci95=wilson_interval(right, n),
        mcc=float(_mcc(counts[np.newaxis])[0]),
        mcc_ci95=_mcc_interval(counts, draws),
        roc_auc=auc,
        roc_auc_ci95=None if auc is None else auc_interval(auc, soluble, n - soluble),
        majority_accuracy=float(max(labels.mean(), 1 - labels.mean())),
        confusion=confusion,
    )


def cross_entropy(labels: npt.NDArray[np.uint8], logits: Floats) -> Floats:
    """The binary cross-entropy of every row, nats [n]: log(1 + exp(-x)), x towards its label."""
    losses: Floats = np.logaddexp(0, np.where(labels == 1, -logits, logits))
    return losses


def small_split_warnings(validation_rows: int, test_rows: int) -> tuple[str, ...]:
    """A warning for each split on which chance is too large to choose or to judge by."""
    splits = (
        ("validation", validation_rows, "to choose among trials by"),
        ("test", test_rows, "to judge the winner by"),
    )
    return tuple(
        f"only {counted(rows, f'{name} row')}: an accuracy measured on them has a standard "
        f"error of up to {50 / rows**0.5:.1f} percentage points, too much {purpose} "
        f"({counted(ENOUGH_ROWS, 'row')}: {50 / ENOUGH_ROWS**0.5:.1f}). More data helps, "
        f"or a larger {name} part of split in [data]."
        for name, rows, purpose in splits
        if rows < ENOUGH_ROWS
    )


def wilson_interval(right: int, n: int) -> Interval:
    """The 95 % interval of a proportion `right / n` by E. B. Wilson (1927).

    DOI 10.1080/01621459.1927.10502953. It stays within 0..1 and holds for few rows too.
    """
    p = right / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * (p * (1 - p) / n + _Z**2 / (4 * n**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def mid_p_interval(right: int, n: int) -> Interval:
    """The 95 % interval of a proportion `right / n` by H. O. Lancaster's mid-P (1961).

    DOI 10.1080/01621459.1961.10482105: the exact interval of Clopper and Pearson with half of the
    probability of `right` itself. Of rare events it holds more often than Wilson's, and is as
    narrow (`benchmarks/pruning_audits.py`).
    """

    def probability(p: float, k: int) -> float:
        ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        return math.exp(ways + k * math.log(p) + (n - k) * math.log1p(-p))

    def beyond(p: float) -> float:
        """The probability of more than `right`, and half of that of `right`."""
        more = math.fsum(probability(p, k) for k in range(right + 1, n + 1))
        return more + probability(p, right) / 2

    low = 0.0 if right == 0 else _root(beyond, 0.025)
    high = 1.0 if right == n else _root(beyond, 0.975)
    return low, high


def _root(rising: Callable[[float], float], value: float) -> float:
    """Where a rising function of 0..1 reaches a value, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2


def area_under_curve(labels: npt.NDArray[np.uint8], scores: Floats) -> float | None:
    """The area under the ROC curve; None where all rows have one label.

    The chance that a soluble row has a higher score than an insoluble one, ties counting half
    (J. A. Hanley, B. J. McNeil, 1982, DOI 10.1148/radiology.143.1.7063747).
    """
    soluble, insoluble = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    if not len(soluble) or not len(insoluble):
        return None
    below = np.searchsorted(insoluble, soluble, side="left").sum()
    not_above = np.searchsorted(insoluble, soluble, side="right").sum()
    return float((int(below) + int(not_above)) / (2 * len(soluble) * len(insoluble)))


def auc_interval(auc: float, soluble: int, insoluble: int) -> Interval:
    """The 95 % interval of an area under the ROC curve by R. G. Newcombe (2006), method 5.

    DOI 10.1002/sim.2324: all areas that lie within 1.96 of their own standard errors, those of
    Hanley and McNeil with the mean number of rows of a label for both, as Wilson's interval has
    it for a proportion.

    Args:
        auc: The area.
        soluble: Rows of that label, at least one.
        insoluble: The same.
    """
    others = (soluble + insoluble) / 2 - 1

    def is_outside(area: float) -> bool:
        spread = 1 + others * ((1 - area) / (2 - area) + area / (1 + area))
        variance = area * (1 - area) * spread / (soluble * insoluble)
        return (auc - area) ** 2 > _Z**2 * variance

    def bound(end: float) -> float:
        inside, outside = auc, end
        for _ in range(60):  # halves the gap until it is below a float's resolution
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if is_outside(middle) else (middle, outside)
        return outside

    return bound(0.0), bound(1.0)


def roc_curve(
    labels: npt.NDArray[np.uint8], scores: Floats, *, points: int = 500
) -> tuple[tuple[float, float], ...]:
    """False and true positive rates at every threshold, from (0, 0) to (1, 1).

    Empty where all rows have one label. Of more than `points` corners an even choice is kept:
    the curve is for the eye, the area is computed exactly (`measure`).
    """
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return ()
    order = np.argsort(-scores, kind="stable")
    # A threshold can only lie between different scores.
    last_of_tie = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    true = np.concatenate([[0], np.cumsum(labels[order] == 1)[last_of_tie]]) / positives
    false = np.concatenate([[0], np.cumsum(labels[order] == 0)[last_of_tie]]) / negatives
    kept = np.unique(np.linspace(0, len(true) - 1, min(points, len(true))).round().astype(int))
    return tuple((float(false[at]), float(true[at])) for at in kept)


def _check(labels: npt.NDArray[np.uint8], logits: Floats) -> None:
    if labels.ndim != 1 or labels.shape != logits.shape or not len(labels):
        raise ValueError(f"labels {labels.shape} and logits {logits.shape} must both be [n], n > 0")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("a label is neither 0 nor 1")
    if not np.isfinite(logits).all():
        raise ValueError("a logit is not a finite number")


def _mcc(counts: Floats) -> Floats:
    """Matthews correlation coefficients [b] of confusion counts [b, 4], in `Confusion`'s order.

    B. W. Matthews (1975), DOI 10.1016/0005-2795(75)90109-9. Where a row or column of the
    matrix is empty the formula is 0/0; it counts as 0, what a guess is worth.
    """
    tp, fp, fn, tn = counts.T
    root = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    values: Floats = np.divide(tp * tn - fp * fn, root, out=np.zeros_like(root), where=root > 0)
    return values


def _mcc_interval(counts: Floats, draws: int) -> Interval:
    """Of matrices that may lie behind these counts [4]; all of -1..1 where one label is missing."""
    tp, fp, fn, tn = counts
    if not tp + fn or not tn + fp:
        return -1.0, 1.0
    cells = np.random.default_rng(0).standard_gamma(counts + PRIOR_ROWS, size=(draws, 4))
    return _middle(_mcc(cells), float(_mcc(counts[np.newaxis])[0]))


def _loss_interval(losses: Floats, logits: Floats, draws: int) -> Interval:
    """By the Bayesian bootstrap (D. B. Rubin, 1981, DOI 10.1214/aos/1176345338) of the losses [n].

    Rows without a mistake do not tell what one would cost; their logits do: a row of the other
    label. So a part of an average right row and of an average wrong one is drawn with them.
    """
    magnitudes = np.abs(logits)
    right, wrong = np.logaddexp(0, -magnitudes).mean(), np.logaddexp(0, magnitudes).mean()
    generator = np.random.default_rng(0)
    means = []
    at_once = max(1, _CELLS_AT_ONCE // len(losses))
    for start in range(0, draws, at_once):
        count = min(at_once, draws - start)
        rows = generator.standard_exponential((count, len(losses)))
        prior = generator.standard_gamma(PRIOR_ROWS, size=(count, 2))
        total = rows @ losses + prior @ (right, wrong)
        means.append(total / (rows.sum(axis=1) + prior.sum(axis=1)))
    return _middle(np.concatenate(means), float(losses.mean()))


def _middle(draws: Floats, figure: float) -> Interval:
    """The middle 95 % of the draws; a figure at the end of its scale is the interval's end."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, (tail, 1 - tail))
    return min(float(low), figure), max(float(high), figure)
