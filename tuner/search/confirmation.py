"""The confirmation of a study: its best configurations, each trained again with fresh seeds.

It is a study of its own, named after the one that it confirms: so workers, budget, resumption and
the dashboard serve it as they serve any other. It has no pruning, and its trials are enqueued, one
for each configuration and seed.

Why: `docs/decisions.md#why-is-a-confirmation-a-study-of-its-own`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuner.artifacts import study_folder_name
from tuner.errors import StudyError, counted
from tuner.search.attributes import (
    BFLOAT16_FROM_KEY,
    BUDGET_KEY,
    CONFIRMS_KEY,
    OF_CONFIGURATION_KEY,
)
from tuner.search.hyperband import pruner_document
from tuner.search.record import StudyRecord, versions
from tuner.search.sampler import sampler_document
from tuner.search.study import create, find_name, load, refuse_a_reported_study
from tuner.search.tuned_study import FINISHED, TunedStudy
from tuner.spec.spec import SamplerSettings, StudySpec, derived_name
from tuner.spec.tables import read_known
from tuner.storage.lease import COORDINATOR_KEY

#: A configuration: the number of its trial in the search, or what a reference is called.
Label: TypeAlias = int | str
DEFAULT = "default"  #: the middle of each range
FIRST_KNOWN = "first known"  #: the first of `[[known]]`


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeated:
    """A configuration and its trainings."""

    label: Label
    trials: tuple[FrozenTrial, ...]  #: of the confirmation, one for each seed, that have ended
    seeds: int  #: as many as were asked for

    @property
    def values(self) -> tuple[float | None, ...]:
        """The validation losses, nats; None where a training could not go on (diverged, ...)."""
        return tuple(
            trial.value if trial.state == TrialState.COMPLETE else None for trial in self.trials
        )

    @property
    def mean(self) -> float | None:
        """Over all seeds; None where one is missing or has no value."""
        known = [value for value in self.values if value is not None]
        return statistics.fmean(known) if len(known) == self.seeds else None

    @property
    def best(self) -> FrozenTrial:
        """The training with the lowest validation loss; there must be one with a value."""
        return min(
            (trial for trial in self.trials if trial.state == TrialState.COMPLETE),
            key=lambda trial: (trial.value, trial.number),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """A confirmation, and how far it is."""

    searched: TunedStudy  #: the study that it confirms
    tuned: TunedStudy  #: the study of the trainings
    seeds: int  #: trainings of each configuration
    candidates: tuple[Repeated, ...]  #: the search's best first
    references: tuple[Repeated, ...]  #: what the winner is compared with
    #: Where a reference is one of the candidates: its name -> that one's label.
    also: Mapping[str, Label]

    @property
    def trainings(self) -> int:
        """How many there are to be."""
        return self.seeds * (len(self.candidates) + len(self.references))

    @property
    def is_complete(self) -> bool:
        """Whether every training has ended."""
        return all(len(one.trials) == one.seeds for one in (*self.candidates, *self.references))

    @property
    def is_current(self) -> bool:
        """Whether the best trials of the search are those that it has trained again."""
        labels = [one.label for one in self.candidates]
        best = self.searched.ranked()[: len(labels)]
        return sorted(labels, key=str) == sorted((trial.number for trial in best), key=str)

    @property
    def winner(self) -> Repeated | None:
        """The candidate with the lowest mean; None before the end, or if none has a mean."""
        if not self.is_complete:
            return None
        means = [(one.mean, place, one) for place, one in enumerate(self.candidates)]
        return min((one for one in means if one[0] is not None), default=(None, 0, None))[2]


def confirmation_of(tuned: TunedStudy) -> Confirmation | None:
    """The confirmation of a study; None where nobody has asked for one."""
    name = find_name(
        confirmation_name(tuned.name), optuna.get_all_study_names(tuned.storage.optuna)
    )
    if name is None:
        return None
    try:
        confirming = load(tuned.storage, name, artifacts_root=tuned.artifacts.folder.parent)
    except StudyError:  # made by other software, or by a later version
        return None
    plan = confirming.confirms
    return _read(tuned, confirming, plan) if plan and plan["key"] == tuned.key else None


def confirmed(tuned: TunedStudy) -> Confirmation | None:
    """The confirmation whose winner counts: complete, and of what is best now; else None."""
    found = confirmation_of(tuned)
    return found if found and found.is_current and found.winner is not None else None


def confirmed_means(tuned: TunedStudy) -> dict[int, float]:
    """The mean validation loss (nats) of each confirmed trial, by its number; none before that."""
    found = confirmed(tuned)
    candidates = found.candidates if found else ()
    return {int(one.label): one.mean for one in candidates if one.mean is not None}


def plan_confirmation(tuned: TunedStudy, *, top: int, seeds: int) -> Confirmation:
    """Makes the confirmation of a study, or extends the one that is there.

    Trainings that are there already stay, and count.

    Args:
        tuned: The study.
        top: How many of its best trials are trained again.
        seeds: How often each is.

    Raises:
        StudyError: It has no fully trained trial, is running, was reported, is a confirmation
            itself, or another study has the name of its confirmation.
    """
    _refuse(tuned)
    ranked = tuned.ranked()[:top]
    if not ranked:
        raise StudyError(
            f"Study {tuned.name!r} has no fully trained trial yet, so there is nothing to confirm; "
            "launch it again to resume it."
        )
    wanted: dict[Label, Mapping[str, Any]] = {trial.number: trial.params for trial in ranked}
    also: dict[str, Label] = {}
    for name, params in _references(tuned.record.spec).items():
        same = next((label for label, other in wanted.items() if dict(other) == params), None)
        if same is None:
            wanted[name] = params
        else:
            also[name] = same
    plan = {
        "study": tuned.name,
        "key": tuned.key,
        "seeds": seeds,
        "candidates": [trial.number for trial in ranked],
        "references": [label for label in wanted if isinstance(label, str)],
        "also": also,
    }
    confirming = _find_or_create(tuned, plan)
    _enqueue(confirming, wanted, seeds)
    return _read(tuned, confirming, plan)


def confirmation_name(study: str) -> str:
    """The name of the study that confirms `study`."""
    return derived_name(study, "confirm")


def _refuse(tuned: TunedStudy) -> None:
    if tuned.confirms:
        raise StudyError(
            f"Study {tuned.name!r} is the confirmation of {tuned.confirms['study']!r}; confirm "
            "that one."
        )
    refuse_a_reported_study(tuned)
    tuned.storage.leases.refuse_if_live(tuned.id)


def _references(spec: StudySpec) -> dict[str, Mapping[str, Any]]:
    """What a winner has to be better than, by its name."""
    found: dict[str, Mapping[str, Any]] = {DEFAULT: dict(read_known([{}], spec.space, [])[0])}
    if spec.known:
        found[FIRST_KNOWN] = dict(spec.known[0])
    return found


def _find_or_create(tuned: TunedStudy, plan: Mapping[str, Any]) -> TunedStudy:
    storage, root = tuned.storage, tuned.artifacts.folder.parent
    name = confirmation_name(tuned.name)
    if find_name(name, optuna.get_all_study_names(storage.optuna)) is None:
        create(storage, name, _record(tuned, name), attributes={CONFIRMS_KEY: dict(plan)})
    confirming = load(storage, name, artifacts_root=root)
    if not confirming.confirms or confirming.confirms["key"] != tuned.key:
        raise StudyError(
            f"Study {name!r} exists and is not the confirmation of {tuned.name!r} (a study of that "
            f"name that was deleted may have left it); `{tuned.command('delete', name)}` first."
        )
    storage.leases.refuse_if_live(confirming.id)
    # Decided by the search: the networks are to be those that it would have trained.
    precision = tuned.study.user_attrs
    if BFLOAT16_FROM_KEY in precision:
        confirming.study.set_user_attr(BFLOAT16_FROM_KEY, precision[BFLOAT16_FROM_KEY])
    confirming.study.set_user_attr(CONFIRMS_KEY, dict(plan))
    return confirming


def _record(tuned: TunedStudy, name: str) -> StudyRecord:
    """The record of the confirmation: the study's own, but for pruning, seed and what was known."""
    searched = tuned.record.spec
    # Another seed than the search has: no training of it is repeated.
    # All trainings are compared row by row, so they are validated on the same rows.
    split = searched.data.split.model_copy(update={"reshuffle": None})
    seed = int.from_bytes(hashlib.sha256(f"{tuned.key}:confirm".encode()).digest()[:4]) >> 1
    spec = searched.model_copy(
        update={
            "name": name,
            "trials": 1,
            "seed": seed,
            "data": searched.data.model_copy(update={"split": split}),
            "training": searched.training.model_copy(update={"as_trial": None}),
            "hyperband": None,
            "sampler": SamplerSettings(kind="random"),
            "stop": None,
            "notify": None,
            "confirm": None,
            "provenance": None,
            "known": (),
            "made_with_rungs": None,
        }
    )
    return dataclasses.replace(
        tuned.record,
        spec=spec,
        spec_hash=spec.spec_hash,
        sampler=sampler_document(spec),
        pruner=pruner_document(spec),
        versions=versions(),
        folder=study_folder_name(name),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _enqueue(confirming: TunedStudy, wanted: Mapping[Label, Mapping[str, Any]], seeds: int) -> None:
    """Enqueues what is missing, the first seed of all configurations first."""
    there = {label: len(_trainings(confirming.trials(), label)) for label in wanted}
    for repetition in range(seeds):
        for label, params in wanted.items():
            if there[label] <= repetition:
                enqueue_training(confirming.study, label, params)
    trials = confirming.trials()
    ended = sum(trial.state in FINISHED for trial in trials)
    open_trials = sum(not trial.state.is_finished() for trial in trials)
    confirming.study.set_user_attr(BUDGET_KEY, ended + open_trials)


def enqueue_training(study: optuna.Study, label: Label, params: Mapping[str, Any]) -> None:
    """Enqueues one more training of a configuration."""
    # Marked as ours from its first transaction on, as in `tuner.search.study.create`.
    attributes = {COORDINATOR_KEY: "confirm", OF_CONFIGURATION_KEY: label}
    study.enqueue_trial(dict(params), user_attrs=attributes)


def _trainings(trials: Sequence[FrozenTrial], label: Label) -> list[FrozenTrial]:
    """The trainings of a configuration, in their order; those that failed are left out."""
    return [
        trial
        for trial in trials
        if trial.user_attrs.get(OF_CONFIGURATION_KEY) == label and trial.state != TrialState.FAIL
    ]


def _read(tuned: TunedStudy, confirming: TunedStudy, plan: Mapping[str, Any]) -> Confirmation:
    trials, seeds = confirming.trials(), int(plan["seeds"])

    def repeated(label: Label) -> Repeated:
        ended = [trial for trial in _trainings(trials, label) if trial.state in FINISHED]
        return Repeated(label=label, trials=tuple(ended[:seeds]), seeds=seeds)

    return Confirmation(
        searched=tuned,
        tuned=confirming,
        seeds=seeds,
        candidates=tuple(map(repeated, plan["candidates"])),
        references=tuple(map(repeated, plan["references"])),
        also=dict(plan["also"]),
    )


def winner_in_words(tuned: TunedStudy, *, suggest: bool = True) -> str:
    """Whether the winner of a study was confirmed.

    Args:
        tuned: The study.
        suggest: With the command that confirms it; a file that leaves this machine has none.
    """
    if tuned.confirms:
        return f"This is the confirmation of {tuned.confirms['study']}."
    found = confirmation_of(tuned)
    if found is None:
        said, what = "The winner is that of one training on one validation split", "confirms it"
    elif not found.is_complete:
        said, what = "Its confirmation is not finished", "resumes it"
    elif not found.is_current:
        said, what = "The search continued after its confirmation", "confirms what is best now"
    elif found.winner is None:
        return "No configuration could be confirmed: each has a training that could not go on."
    else:
        mean, seeds = f"mean {found.winner.mean:.4f}", counted(found.seeds, "seed")
        return f"Confirmed: trial {found.winner.label}, {mean} of {seeds}."
    if not suggest:
        return f"{said}."
    return f"{said}; `{tuned.command('confirm', tuned.name)}` {what}."
