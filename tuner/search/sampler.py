"""The sampler: Optuna's TPE or random sampler, its draws a function of the trial's number alone.

Why: `docs/decisions.md#why-has-every-parameter-of-every-trial-a-random-generator-of-its-own`.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from tuner.search.pruning_audit import without_audit
from tuner.spec.spec import StudySpec


class PerTrialSampler(BaseSampler):
    """Samples every parameter of every trial from a generator of its own.

    Seeded by (study seed, trial number, parameter name), so that what a trial draws depends
    on the finished trials alone: not on how many workers there are, on who asks first, or on
    a coordinator that died between two parameters.
    """

    def __init__(
        self, make: Callable[[int], BaseSampler], seed: int, *, has_audit: bool = False
    ) -> None:
        self._make = make
        self._seed = seed
        self._has_audit = has_audit

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        if self._has_audit:
            study = _WithoutAudit(study.study_name, study._storage, study.sampler, study.pruner)
        entropy = [self._seed, trial.number, *param_name.encode()]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        return self._make(seed).sample_independent(study, trial, param_name, param_distribution)


class _WithoutAudit(optuna.Study):
    """A study that shows an audited trial as pruned where it would have been.

    So an audit changes no suggestion: what the sampler learns is what it learns without one.
    """

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy=deepcopy, states=None, use_cache=use_cache)
        shown = map(without_audit, trials)
        return [trial for trial in shown if states is None or trial.state in states]


def make_sampler(spec: StudySpec) -> PerTrialSampler:
    """The sampler of the study file, with the settings that were measured best."""
    if spec.sampler.kind == "random":
        return PerTrialSampler(lambda seed: RandomSampler(seed=seed), spec.seed)
    return PerTrialSampler(
        lambda seed: TPESampler(**TPE_SETTINGS, seed=seed),
        spec.seed,
        has_audit=spec.hyperband is not None and bool(spec.hyperband.audit),
    )


TPE_SETTINGS: dict[str, Any] = {"multivariate": False, "constant_liar": True}


def sampler_document(spec: StudySpec) -> dict[str, Any]:
    """The sampler's class and settings, as the record has them."""
    if spec.sampler.kind == "random":
        return {"class": "RandomSampler"}
    return {"class": "TPESampler", **TPE_SETTINGS}
