"""What a confirmation says: which configuration is best, and which cannot be told from it.

Why: `docs/decisions.md#how-does-a-confirmation-compare-configurations`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from tuner.errors import StudyError, counted
from tuner.metrics import cross_entropy
from tuner.results.kept import Evaluate, evaluate_kept, read_development, recorded_logits
from tuner.results.resampling import Floats, intervals, resampled_deviations, tied_with_best
from tuner.search.confirmation import Confirmation, Label, Repeated
from tuner.train import PARAMETERS_KEY

_SEED = 0  #: of the resampling: the same trainings give the same intervals

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One configuration; losses in nats. All from `mean` on is None where a seed has no value."""

    label: Label  #: number of its trial in the search, or the name of a reference
    searched_value: float | None  #: validation loss of that trial; None of a reference
    parameters: int | None  #: weights of its network
    values: tuple[float | None, ...]  #: of each seed; None where a training could not go on
    is_tied: bool = False  #: whether it cannot be told from the winner
    mean: float | None = None
    sd: float | None = None  #: of the seeds
    interval: Interval | None = None  #: of the mean, 95 %
    difference: float | None = None  #: its mean - the winner's
    difference_interval: Interval | None = None  #: 95 %; None of the winner, too

    def to_document(self) -> dict[str, Any]:
        """What `tuner confirm --json` prints of it."""
        return {
            "trial" if isinstance(self.label, int) else "name": self.label,
            "searched_value": self.searched_value,
            "parameters": self.parameters,
            "values": list(self.values),
            "tied": self.is_tied,
            "mean": self.mean,
            "sd": self.sd,
            "mean_ci95": self.interval and list(self.interval),
            "difference": self.difference,
            "difference_ci95": self.difference_interval and list(self.difference_interval),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a confirmation found; losses in nats."""

    study: str  #: that was confirmed
    confirmation: str  #: the study of the trainings
    seeds: int
    configs: tuple[Compared, ...]  #: the winner first, those without a mean last
    references: tuple[Compared, ...]  #: what the winner should be better than
    searched_best: Label  #: trial of the search that had the lowest value

    @property
    def winner(self) -> Compared:
        return self.configs[0]

    @property
    def tied(self) -> tuple[Compared, ...]:
        """The configurations among which the best one is, with 95 % confidence."""
        return tuple(one for one in self.configs if one.is_tied)

    @property
    def smallest_tied(self) -> Compared:
        """Of those, the network with the fewest weights."""
        return min(self.tied, key=lambda one: one.parameters or 0)

    @property
    def optimism(self) -> float | None:
        """What the search's best value promised too much: its configuration's mean - that value."""
        best = next(one for one in self.configs if one.label == self.searched_best)
        if best.mean is None or best.searched_value is None:
            return None
        return best.mean - best.searched_value

    def in_words(self) -> list[str]:
        """What was found, a sentence or two each."""
        winner = self.winner
        spread = f"seeds' sd {number_in_words(winner.sd)}"
        mean = number_in_words(winner.mean)
        seeds = counted(self.seeds, "seed")
        said = [
            f"Winner: trial {winner.label}, mean validation loss {mean} over {seeds} ({spread})."
        ]
        if others := [str(one.label) for one in self.tied if one is not winner]:
            smallest = self.smallest_tied
            said.append(
                f"* Cannot be told from it with 95 % confidence: trials {', '.join(others)}. The "
                f"smallest network of these is trial {smallest.label} "
                f"({smallest.parameters or 0:,} parameters)."
            )
        if self.optimism is not None:
            said.append(
                f"Optimism of the search: its best value is that of trial {self.searched_best}; "
                f"the mean of that configuration is {self.optimism:+.4f} from it ({spread})."
            )
        references = [one for one in self.references if one.difference is not None]
        return said + [_against(one, spread) for one in references]

    def to_document(self) -> dict[str, Any]:
        """What `tuner confirm --json` prints."""
        return {
            "study": self.study,
            "confirmation": self.confirmation,
            "seeds": self.seeds,
            "winner": self.winner.label,
            "tied": [one.label for one in self.tied],
            "smallest_tied": self.smallest_tied.label,
            "optimism": self.optimism,
            "configs": [one.to_document() for one in self.configs],
            "references": [one.to_document() for one in self.references],
        }


def compare(found: Confirmation, *, evaluate: Evaluate | None = None) -> Comparison:
    """Compares the configurations of a confirmation that is complete.

    Args:
        found: The confirmation.
        evaluate: Predicts with trained weights, where what they predicted in training is lost.

    Raises:
        StudyError: It is not complete, no configuration has a mean, or weights are missing.
    """
    winner = _winner(found)
    known = [one for one in (*found.candidates, *found.references) if one.mean is not None]
    losses = _row_losses(found, known, evaluate)
    means = np.array([one.mean for one in known])
    deviations = resampled_deviations(losses, np.random.default_rng(_SEED))
    best = known.index(winner)
    candidates = [at for at, one in enumerate(known) if one in found.candidates]
    tied = tied_with_best(means[candidates], deviations[:, candidates])
    is_tied = {known[candidates[at]].label for at in tied}
    of_means = intervals(means, deviations)
    behind = means - means[best]
    of_differences = intervals(behind, deviations - deviations[:, [best]])
    trials: dict[Label, FrozenTrial] = {one.number: one for one in found.searched.ranked()}

    def compared(one: Repeated, label: Label) -> Compared:
        searched = trials.get(one.label) if isinstance(label, int) else None
        its = Compared(
            label=label,
            searched_value=None if searched is None else searched.value,
            parameters=one.trials[0].user_attrs.get(PARAMETERS_KEY),
            values=one.values,
        )
        if one not in known:
            return its
        at = known.index(one)
        return replace(
            its,
            is_tied=label in is_tied,
            mean=one.mean,
            sd=statistics.stdev(value for value in one.values if value is not None),
            interval=of_means[at],
            difference=float(behind[at]),
            difference_interval=None if at == best else of_differences[at],
        )

    ranked = sorted(found.candidates, key=lambda one: (one.mean is None, one.mean or 0.0))
    references = {one.label: one for one in found.references}
    for name, label in found.also.items():
        references[name] = next(one for one in found.candidates if one.label == label)
    return Comparison(
        study=found.searched.name,
        confirmation=found.tuned.name,
        seeds=found.seeds,
        configs=tuple(compared(one, one.label) for one in ranked),
        references=tuple(compared(one, name) for name, one in references.items()),
        searched_best=found.candidates[0].label,
    )


def _winner(found: Confirmation) -> Repeated:
    if found.winner is not None:
        return found.winner
    study = found.searched.name
    if found.is_complete:
        raise StudyError(
            f"The confirmation of study {study!r} has no winner: each configuration has a training "
            "that could not go on (diverged, out of memory, over time). "
            f"`{found.tuned.command('status', found.tuned.name)}` shows them."
        )
    ended = sum(len(one.trials) for one in (*found.candidates, *found.references))
    raise StudyError(
        f"The confirmation of study {study!r} is not finished ({ended} of "
        f"{counted(found.trainings, 'training')}); `{found.searched.command('confirm', study)}` "
        "resumes it."
    )


def _row_losses(
    found: Confirmation, repeated: Sequence[Repeated], evaluate: Evaluate | None
) -> Floats:
    """The losses of the validation rows, nats, [configurations, seeds, rows]."""
    development = read_development(found.tuned)
    labels = development.validation_labels

    def losses(trial: FrozenTrial) -> Floats:
        logits = recorded_logits(found.tuned, trial, development)
        if logits is None:
            logits = evaluate_kept(found.tuned, trial, development, evaluate).logits
        return cross_entropy(labels, logits)

    return np.stack([np.stack([losses(trial) for trial in one.trials]) for one in repeated])


def _against(reference: Compared, spread: str) -> str:
    """Whether the winner is better than a reference."""
    name = f"the {reference.label} configuration"
    if reference.difference_interval is None:
        return f"The winner is {name}: the search found nothing better."
    is_better = reference.difference_interval[0] > 0
    return (
        f"The winner is {'better than' if is_better else 'NOT shown to be better than'} {name}: "
        f"that one is {reference.difference:+.4f} from it "
        f"({range_in_words(reference.difference_interval)}; {spread})."
    )


def number_in_words(value: float | None) -> str:
    """A loss as tables have it; blank for None."""
    return "" if value is None else f"{value:.4f}"


def range_in_words(interval: Sequence[float] | None) -> str:
    """An interval as tables have it; blank for None."""
    return "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
