"""Which kept networks predict best together, and what that gains on rows that did not choose them.

Greedy forward selection with replacement (R. Caruana, A. Niculescu-Mizil, G. Crew, A. Ksikes, 2004,
"Ensemble selection from libraries of models", DOI 10.1145/1015330.1015432): begin with nothing, and
add the network, again if need be, with which the mean of the probabilities has the lowest loss.

The loss of what was selected is too good on the rows that selected it, and so is that of the best
single network. So both are chosen on one half of the validation rows and measured on the other.

Why: `docs/decisions.md#why-is-an-ensemble-judged-by-halves`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.uint8]

PICKS = 10  #: of networks, by default; one may be picked several times
HALVINGS = 20  #: of the validation rows, at random: each gives two measurements
#: Keeps a probability's logarithm finite: float32 has no smaller distance from 1.
_LEAST = 2.0**-24
_SAME_LOSS = 1e-9  #: nats; a smaller difference is rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossFitted:
    """What a selection is worth on validation rows that did not choose it."""

    ensemble_loss: float  #: nats; mean over the halvings
    single_loss: float  #: nats; of the network that is best on the same half
    gain: float  #: nats; of the ensemble over the single network
    gain_sd: float  #: nats; standard deviation of the gain over the halvings
    halvings: int  #: how often the rows were halved

    def to_document(self) -> dict[str, Any]:
        return {
            "loss": self.ensemble_loss,
            "single_loss": self.single_loss,
            "gain": self.gain,
            "gain_sd": self.gain_sd,
            "halvings": self.halvings,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Networks and how often each was picked."""

    counts: tuple[int, ...]  #: of every candidate, in their order; 0: it has no part
    selected_loss: float  #: nats, on the rows that selected: too good to be believed
    cross_fitted: CrossFitted | None  #: None where there are too few rows to halve

    @property
    def members(self) -> tuple[tuple[int, float], ...]:
        """Index and share of each network that has a part, the largest share first."""
        picks = sum(self.counts)
        found = [(index, count / picks) for index, count in enumerate(self.counts) if count]
        return tuple(sorted(found, key=lambda member: (-member[1], member[0])))

    @property
    def is_better(self) -> bool:
        """Whether it gains, on rows that did not choose it, more than halvings vary."""
        crossed = self.cross_fitted
        return len(self.members) > 1 and crossed is not None and crossed.gain > crossed.gain_sd


def select(
    probabilities: Floats, labels: Labels, *, picks: int = PICKS, seed: int = 0
) -> Selection:
    """Chooses an ensemble, and estimates honestly what it gains. The same input gives the same.

    Args:
        probabilities: [networks, m]; of being soluble, on the validation rows.
        labels: [m]; 1 is soluble, 0 insoluble.
        picks: Of networks, at most; the ensemble ends at the number of picks that is best.
        seed: Of the halvings.

    Raises:
        ValueError: There is no network, or no row.
    """
    if not probabilities.size or probabilities.shape[1:] != labels.shape:
        raise ValueError(f"probabilities {probabilities.shape} and labels {labels.shape}")
    right = _of_the_label(probabilities, labels)
    counts = _greedy(right, picks)
    return Selection(
        counts=tuple(counts.tolist()),
        selected_loss=_loss(counts @ right / counts.sum()),
        cross_fitted=_cross_fitted(right, labels, picks, seed),
    )


def _of_the_label(probabilities: Floats, labels: Labels) -> Floats:
    """The probability that each network gives to the label of each row, [networks, m]."""
    bounded = np.clip(probabilities, _LEAST, 1 - _LEAST)
    right: Floats = np.where(labels == 1, bounded, 1 - bounded)
    return right


def _loss(right: Floats) -> float:
    return float(-np.log(right).mean())


def _greedy(right: Floats, picks: int) -> npt.NDArray[np.int64]:
    """How often each network is picked, [networks]."""
    total = np.zeros(right.shape[1])
    counts = np.zeros(len(right), np.int64)
    best_counts, best_loss = counts, np.inf
    for pick in range(1, picks + 1):
        losses = -np.log((total + right) / pick).mean(axis=1)
        chosen = int(losses.argmin())
        counts = counts.copy()
        counts[chosen] += 1
        total = total + right[chosen]
        if losses[chosen] < best_loss - _SAME_LOSS:
            best_counts, best_loss = counts, losses[chosen]
    return best_counts


def _cross_fitted(right: Floats, labels: Labels, picks: int, seed: int) -> CrossFitted | None:
    if min(np.count_nonzero(labels), np.count_nonzero(labels == 0)) < 2:
        return None
    generator = np.random.default_rng(seed)
    ensembles, singles = [], []
    for _ in range(HALVINGS):
        first = _half(labels, generator)
        for chooses in (first, ~first):
            measures = right[:, ~chooses]
            counts = _greedy(right[:, chooses], picks)
            ensembles.append(_loss(counts @ measures / counts.sum()))
            singles.append(_loss(measures[_best(right[:, chooses])]))
    gains = (np.array(singles) - np.array(ensembles)).reshape(HALVINGS, 2).mean(axis=1)
    return CrossFitted(
        ensemble_loss=float(np.mean(ensembles)),
        single_loss=float(np.mean(singles)),
        gain=float(gains.mean()),
        gain_sd=float(gains.std(ddof=1)),
        halvings=HALVINGS,
    )


def _best(right: Floats) -> int:
    return int((-np.log(right)).mean(axis=1).argmin())


def _half(labels: Labels, generator: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Half of the rows of each label, at random; bool [m]."""
    chosen = np.zeros(len(labels), bool)
    for label in (0, 1):
        rows = generator.permutation(np.flatnonzero(labels == label))
        chosen[rows[: len(rows) // 2]] = True
    return chosen


def mean_probability(probabilities: Floats, members: Sequence[tuple[int, float]]) -> Floats:
    """The weighted mean [m] of probabilities [networks, m]."""
    mean: Floats = np.einsum(
        "k,km->m", [share for _, share in members], probabilities[[index for index, _ in members]]
    )
    return mean


def mean_logits(logits: Sequence[Floats], shares: Sequence[float]) -> Floats:
    """The logits of the weighted mean of networks' probabilities.

    Args:
        logits: Of each network, float64 [n].
        shares: Of each network in the mean, 0..1; they add up to 1.

    Returns:
        float64 [n].
    """
    probabilities = np.stack([probability(one) for one in logits])
    return _logit(mean_probability(probabilities, list(enumerate(shares))))


def probability(logits: Floats) -> Floats:
    """Probabilities of logits, [n]."""
    # Not 1 / (1 + exp(-x)), which overflows at a logit of -710.
    found: Floats = np.exp(-np.logaddexp(0, -logits))
    return found


def _logit(probabilities: Floats) -> Floats:
    bounded = np.clip(probabilities, 2.0**-53, 1 - 2.0**-53)
    found: Floats = np.log(bounded) - np.log1p(-bounded)
    return found
