"""Was pruning right? A share of the trials that would be pruned is trained to its end.

Who is audited is drawn beforehand, from the study's seed and the trial's number. To the search an
audited trial is what it would have been, pruned at that rung: it takes nobody's place at later
rungs, and the sampler sees it as pruned. So the audit changes no other trial's fate.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from tuner.errors import counted
from tuner.metrics import mid_p_interval
from tuner.search.attributes import AUDITED_KEY, ENDED_KEY
from tuner.spec.spec import StudySpec

_TOP = 10  #: of the trials that pruning kept: those whose weights are kept, too


def is_drawn(spec: StudySpec, trial: int) -> bool:
    """Whether a trial is trained to its end, should it have to be pruned."""
    share = 0.0 if spec.hyperband is None else spec.hyperband.audit or 0.0
    if not share:
        return False
    entropy = [spec.seed, trial, *b"audit"]
    return bool(np.random.SeedSequence(entropy).generate_state(1)[0] / 2**32 < share)


def without_audit(trial: FrozenTrial) -> FrozenTrial:
    """An audited trial as it would be if it had been pruned; any other trial as it is."""
    epoch = trial.user_attrs.get(AUDITED_KEY)
    if epoch is None:
        return trial
    shown = copy.copy(trial)
    shown.state = TrialState.PRUNED
    shown.intermediate_values = {
        step: value for step, value in trial.intermediate_values.items() if step <= epoch
    }
    shown.values = [shown.intermediate_values[epoch]]
    # What it broke later, it had not broken then.
    shown.system_attrs = {}
    return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningAudit:
    """What audited trials became; all losses are validation losses, nats."""

    audited: int  #: trials that were to be pruned, trained on, and have ended
    pruned: int  #: that were pruned by a verdict
    best_kept: float | None  #: the lowest of the fully trained trials that were to be kept
    better: int  #: audited trials that ended below that
    better_ci95: tuple[float, float] | None  #: of the share of better ones, mid-P
    #: Audited trials that ended among the ten best that were kept; None where fewer were kept.
    among_best: int | None
    among_best_ci95: tuple[float, float] | None
    largest_gain: float  #: by how much the best audited trial is better than the best kept; 0: not
    median_distance: float | None  #: of audited trials to the best kept; positive is worse
    extra_epochs: int  #: that audited trials trained beyond their verdicts

    def to_document(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def pruning_audit(spec: StudySpec, trials: Sequence[FrozenTrial]) -> PruningAudit | None:
    """What the audit of a study found so far; None where there is none.

    Args:
        spec: The study file.
        trials: All of its trials.
    """
    if spec.hyperband is None or not spec.hyperband.audit:
        return None
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    audited = [trial for trial in ended if AUDITED_KEY in trial.user_attrs]
    kept = sorted(
        trial.value
        for trial in ended
        if trial.state == TrialState.COMPLETE
        and trial.value is not None
        and AUDITED_KEY not in trial.user_attrs
    )
    best = kept[0] if kept else math.inf
    tenth = kept[_TOP - 1] if len(kept) >= _TOP else -math.inf
    # What diverged on its way became nothing.
    reached = [
        trial.value if trial.state == TrialState.COMPLETE and trial.value is not None else math.inf
        for trial in audited
    ]
    better = sum(value < best for value in reached) if kept else 0
    among = sum(value < tenth for value in reached) if len(kept) >= _TOP else None
    finite = [value for value in reached if math.isfinite(value)]
    return PruningAudit(
        audited=len(audited),
        pruned=sum(
            trial.state == TrialState.PRUNED
            and AUDITED_KEY not in trial.user_attrs
            and ENDED_KEY not in trial.user_attrs
            for trial in ended
        ),
        best_kept=best if kept else None,
        better=better,
        better_ci95=mid_p_interval(better, len(audited)) if audited else None,
        among_best=among,
        among_best_ci95=mid_p_interval(among, len(audited))
        if audited and among is not None
        else None,
        largest_gain=max(0.0, best - min(finite)) if finite and kept else 0.0,
        median_distance=float(np.median(np.array(finite) - best)) if finite and kept else None,
        extra_epochs=sum(
            (trial.last_step or 0) - int(trial.user_attrs[AUDITED_KEY]) for trial in audited
        ),
    )


def audit_in_words(audit: Mapping[str, Any]) -> str:
    """What `PruningAudit.to_document` says, in a few sentences."""
    count = audit["audited"]
    if not count:
        return (
            "No trial that was to be pruned has been trained to its end yet, so nothing is known "
            "about what pruning throws away."
        )
    low, high = audit["better_ci95"]
    share = audit["better"] / count
    gain = f", by up to {audit['largest_gain']:.4f} nats" if audit["better"] else ""
    top, distance = audit["among_best"], audit["median_distance"]
    among = "" if top is None else f"; {top} would be among its ten best"
    median = "" if distance is None else f" Their median is {distance:+.4f} nats from that best."
    return (
        f"Of {counted(count, 'trial')} that pruning would have ended and that trained on, "
        f"{audit['better']} became better than the best that pruning kept{gain}: {share:.0%} "
        f"(95 % interval {low:.0%} to {high:.0%}){among}.{median} Pruning ended "
        f"{counted(audit['pruned'], 'other trial')}; the audit trained "
        f"{counted(audit['extra_epochs'], 'epoch')} more."
    )
