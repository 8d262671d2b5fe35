"""How many lost workers a trial may cost, and how many failed trials a study.

Why: `docs/decisions.md#why-may-a-trial-lose-25-workers-before-they-train-but-only-five-that-did`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from optuna.trial import TrialState

from tuner.errors import WorkerDiedEarlyError, WorkerLeftError, WorkerLostError
from tuner.search.attributes import EARLY_LOSSES_KEY, LOSSES_KEY

POISON_LOSSES = 5  #: workers a trial may lose without a new epoch
POISON_EARLY_LOSSES = 25  #: the same, of workers that died before they began to train
FAILURES_IN_A_ROW = 10  #: failed trials after which the study stops: something is broken


@dataclass(frozen=True, slots=True)
class Losses:
    """Workers that a trial lost since its last new epoch."""

    training: int = 0  #: that died while they trained it
    early: int = 0  #: that died before they began

    @classmethod
    def of(cls, attributes: Mapping[str, object]) -> Self:
        """As a trial's attributes have them."""
        training, early = (attributes.get(key, 0) for key in (LOSSES_KEY, EARLY_LOSSES_KEY))
        return cls(int(str(training)), int(str(early)))

    def after(self, lost: WorkerLostError, *, progressed: bool) -> Losses:
        """With one more.

        Args:
            lost: How the worker was lost; one that left in good order does not count.
            progressed: The trial had a new epoch since the loss before.
        """
        if isinstance(lost, WorkerLeftError):
            return self
        if isinstance(lost, WorkerDiedEarlyError):
            early = 1 if progressed else self.early + 1
            return Losses(self.training, early)
        training = 1 if progressed else self.training + 1
        return Losses(training, self.early)

    @property
    def is_poison(self) -> bool:
        """Whether the trial has cost too many, and is to end."""
        return self.training >= POISON_LOSSES or self.early >= POISON_EARLY_LOSSES

    @property
    def most(self) -> int:
        """Losses of the kind that there are more of."""
        return max(self.training, self.early)

    def attributes(self) -> dict[str, int]:
        """As the trial's attributes store them."""
        counts = {LOSSES_KEY: self.training, EARLY_LOSSES_KEY: self.early}
        return {key: count for key, count in counts.items() if count}


@dataclass(frozen=True, slots=True)
class Failures:
    """Failed trials in a row."""

    in_a_row: int = 0  #: since the last trial that ended in another way

    def after(self, state: TrialState) -> Failures:
        """With one more trial that ended."""
        return Failures(self.in_a_row + 1 if state == TrialState.FAIL else 0)

    @property
    def are_too_many(self) -> bool:
        """Whether the study is to stop."""
        return self.in_a_row >= FAILURES_IN_A_ROW
