"""Hyperband as Optuna's pruner, with brackets that take turns as in the paper.

Why: `docs/decisions.md#why-is-hyperband-not-optunas-hyperbandpruner`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuner.search.attributes import AUDITED_KEY
from tuner.search.pruning_audit import is_drawn
from tuner.spec.spec import StudySpec

#: "audit": it would be pruned, and trains on to show what pruning throws away.
Verdict: TypeAlias = Literal["go", "prune", "audit"]


def make_pruner(spec: StudySpec) -> optuna.pruners.BasePruner:
    """Hyperband over completed epochs, or none."""
    if spec.hyperband is None:
        return optuna.pruners.NopPruner()
    return _Hyperband(
        spec.hyperband.eta,
        spec.brackets,
        spec.bracket_turns,
        is_audited=lambda trial: is_drawn(spec, trial),
    )


class _Hyperband(optuna.pruners.BasePruner):
    """Hyperband (arXiv:1603.06560) of Optuna's asynchronous successive halving.

    Optuna's `HyperbandPruner` draws a trial's bracket from a hash of the study's name and the
    trial's number. Here brackets take turns as in the paper (`bracket_turns`), so that
    a study's name changes nothing, and a budget has the shares that `tuner check` tells.
    """

    def __init__(
        self,
        eta: int,
        brackets: Sequence[Sequence[int]],
        turns: tuple[int, ...],
        *,
        is_audited: Callable[[int], bool],
    ) -> None:
        self._is_audited = is_audited
        self._eta = eta
        self._brackets = brackets
        self._turns = turns
        self._halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=eta)

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        # Not `trial.user_attrs`: Optuna shows a pruner those of the trial's begin.
        if AUDITED_KEY in study._storage.get_trial(trial._trial_id).user_attrs:
            return False  # it takes no other trial's place at a later rung
        prunes = self._prunes(study, trial)
        if prunes and self._is_audited(trial.number):
            study._storage.set_trial_user_attr(trial._trial_id, AUDITED_KEY, trial.last_step)
            return False
        return prunes

    def _prunes(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        bracket = self._turns[trial.number % len(self._turns)]
        epochs = trial.last_step or 0
        reached = sum(1 for rung in self._brackets[bracket] if rung <= epochs)
        if reached == 0:
            return False
        # Successive halving has its rungs after 1, eta, eta^2, ...: what it is shown is the value
        # after as many of those as the trial reached of the bracket's.
        shown = copy.copy(trial)
        step = self._eta ** (reached - 1)
        shown.intermediate_values = {step: trial.intermediate_values[epochs]}
        return self._halving.prune(_BracketStudy(study, self._turns, bracket), shown)


class _BracketStudy(optuna.Study):
    """A study that shows one bracket's trials alone, which is what successive halving compares."""

    def __init__(self, study: optuna.Study, turns: tuple[int, ...], bracket: int) -> None:
        super().__init__(study.study_name, study._storage, study.sampler, study.pruner)
        self._turns = turns
        self._bracket = bracket

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        # All of them, for a trial's place in the list is its number.
        trials = super().get_trials(deepcopy=deepcopy)
        return [
            trial
            for trial, bracket in zip(trials, itertools.cycle(self._turns))
            if bracket == self._bracket and (states is None or trial.state in states)
        ]


class RecordedPruner(optuna.pruners.BasePruner):
    """A pruner whose verdicts are taken one at a time, told, and never taken twice."""

    def __init__(
        self,
        inner: optuna.pruners.BasePruner,
        recorded: Mapping[tuple[int, int | None], Verdict],
        on_verdict: Callable[[FrozenTrial, Verdict], None],
        deciding: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Wraps a pruner.

        Args:
            inner: Who decides.
            recorded: Verdicts of earlier runs, by trial number and epoch.
            on_verdict: Hears each new one before it takes effect.
            deciding: Gives the block in which one verdict is taken.
        """
        self.inner = inner
        self._recorded = dict(recorded)
        self._on_verdict = on_verdict
        self._deciding = deciding

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        # Successive halving marks a rung as done when it decides: asked again, it would say go.
        rung = (trial.number, trial.last_step)
        if rung not in self._recorded:
            with self._deciding():
                self._recorded[rung] = verdict_of(self.inner, study, trial)
                self._on_verdict(trial, self._recorded[rung])
        return self._recorded[rung] == "prune"


def verdict_of(
    pruner: optuna.pruners.BasePruner, study: optuna.Study, trial: FrozenTrial
) -> Verdict:
    """What a pruner decides about a trial at a rung."""
    if pruner.prune(study, trial):
        return "prune"
    audited = study._storage.get_trial(trial._trial_id).user_attrs.get(AUDITED_KEY)
    return "go" if audited is None or audited != trial.last_step else "audit"


def pruner_document(spec: StudySpec) -> dict[str, Any]:
    """The pruner's class and settings, as the record has them."""
    if spec.hyperband is None:
        return {"class": "NopPruner"}
    return {
        "class": "Hyperband",
        **spec.hyperband.model_dump(exclude_none=True),
        "brackets": "in turn",
        "rungs": list(spec.rungs),
    }
