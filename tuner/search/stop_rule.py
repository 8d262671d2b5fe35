"""When a study ends before its budget, because no better configuration is to be expected.

Why: `docs/decisions.md#when-does-a-study-end-before-its-budget`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import datetime
from typing import cast

from optuna.trial import FrozenTrial, TrialState

from tuner.search.tuned_study import FINISHED
from tuner.spec.spec import StopSettings


class StopRule:
    """Counts the finished trials since the best validation loss last became better.

    The usual rule of early stopping, over trials in place of epochs, with Keras' meaning of
    `patience` and `min_delta`. A trial finishes with its verdict, pruned or fully trained; only the
    latter can be the best, and none counts before the first of them.
    """

    def __init__(self, settings: StopSettings, finished: Iterable[FrozenTrial]) -> None:
        """Takes up a study whose trials `finished`, COMPLETE or PRUNED, in any order."""
        self._settings = settings
        self._best = math.inf
        self._trial: int | None = None  # whose loss that is
        self._waited = 0
        for trial in in_order_of_end(finished):
            self.ended(trial)

    def ended(self, trial: FrozenTrial) -> None:
        """Takes in the next trial that ended."""
        if trial.state not in FINISHED:
            return
        loss = trial.value if trial.state == TrialState.COMPLETE else None
        if loss is not None and loss < self._best - self._settings.min_delta:
            self._best, self._trial, self._waited = loss, trial.number, 0
        elif self._trial is not None:
            self._waited += 1

    @property
    def ends_the_study(self) -> bool:
        return self._waited >= self._settings.patience

    def reason(self) -> str:
        """Why, for the user."""
        settings, waited = self._settings, self._waited
        better = f" by more than {settings.min_delta:g}" if settings.min_delta else ""
        return (
            f"{waited} finished trial{'s' * (waited != 1)} in a row did not improve on the "
            f"validation loss {self._best:.4f} of trial {self._trial}{better} "
            f"(stop.patience = {settings.patience})"
        )


def in_order_of_end(finished: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that have ended, in the order in which they did."""
    return sorted(finished, key=lambda trial: cast("datetime", trial.datetime_complete))
