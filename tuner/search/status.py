"""How far a study has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from tuner.search.attributes import (
    ENDED_EARLY_KEY,
    ERROR_KEY,
    RESUMED_KEY,
    WORKERS_KEY,
)
from tuner.search.pruning_audit import PruningAudit, pruning_audit
from tuner.search.study import attached_files
from tuner.search.tuned_study import FINISHED, TunedStudy
from tuner.storage.ledger import LedgerEntry
from tuner.train import ACCURACY_KEY, PARAMETERS_KEY, ROC_AUC_KEY

State = Literal["queued", "running", "stopped", "finished", "reported"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyStatus:
    """Where a study stands; `to_document` is what `tuner status --json` prints."""

    study: str  #: its name
    state: State  #: what happens to it now
    budget: int  #: finished trials after which it ends
    counts: Mapping[str, int]  #: trials by state
    best: FrozenTrial | None
    epochs_spent: int  #: trained epochs of all trials
    epochs_saved: int  #: epochs that Hyperband's pruning left untrained
    workers: int
    resumed_trials: int  #: trials that were resumed at least once
    brackets: tuple[int, ...]  #: trials per bracket
    synthetic: bool
    bytes_on_disk: int  #: of its artifacts
    error: str | None  #: why the service gave it up
    ended_early: str | None  #: why it ended before the budget that was asked for
    pruning_audit: PruningAudit | None  #: None where the study file asks for none
    openings: tuple[LedgerEntry, ...]  #: of its test split by its own reports; () while sealed

    @property
    def look(self) -> int:
        """The number of its last look at its test rows, by whatever study; 0 while sealed."""
        return self.openings[-1].look if self.openings else 0

    @property
    def finished_trials(self) -> int:
        return sum(self.counts[state.name] for state in FINISHED)

    @property
    def trials_in_words(self) -> str:
        """The states that occur: "12 COMPLETE, 30 PRUNED, 2 RUNNING".

        To Optuna a trial is RUNNING until it is told, also while its study is not: then it is
        "to resume".
        """
        words = {"RUNNING": "RUNNING" if self.state == "running" else "to resume"}
        found = [f"{count} {words.get(name, name)}" for name, count in self.counts.items() if count]
        return ", ".join(found) or "none yet"

    def to_document(self) -> dict[str, Any]:
        best = None
        if self.best is not None:
            best = {
                "trial": self.best.number,
                "validation_loss": self.best.value,
                **figures_in(self.best),
                "sampled": self.best.params,
            }
        return {
            "study": self.study,
            "state": self.state,
            "budget": self.budget,
            "trials": dict(self.counts),
            "best": best,
            "epochs": {"spent": self.epochs_spent, "saved": self.epochs_saved},
            "workers": self.workers,
            "resumed_trials": self.resumed_trials,
            "brackets": list(self.brackets),
            "synthetic": self.synthetic,
            "bytes_on_disk": self.bytes_on_disk,
            "error": self.error,
            "ended_early": self.ended_early,
            "pruning_audit": self.pruning_audit and self.pruning_audit.to_document(),
            "ledger": {
                "entries": [entry.id for entry in self.openings],
                "look": self.look,
                "reason": self.openings[-1].reason if self.openings else None,
            },
        }


def status(tuned: TunedStudy, *, driven: bool = False) -> StudyStatus:
    """Reads where a study stands.

    Args:
        tuned: The study.
        driven: This process drives it: everything is in memory, and no database is asked; the
            thousands of small files that are attached to trials are not counted.
    """
    trials = tuned.trials()
    counts = {state.name: 0 for state in TrialState}
    for trial in trials:
        counts[trial.state.name] += 1
    finished = sum(counts[state.name] for state in FINISHED)
    # Who drives it holds its lease: no report opens meanwhile, and none did before.
    openings = () if driven else tuned.storage.ledger.entries(study_key=tuned.key)
    state: State
    if driven:
        state = "running"
    elif openings:
        state = "reported"
    elif (lease := tuned.storage.leases.of(tuned.id)) is not None and lease.is_live:
        state = "running"
    elif finished >= tuned.budget:
        state = "finished"
    else:
        state = "queued" if tuned.id in tuned.storage.queue.study_ids() else "stopped"
    attributes = tuned.study.user_attrs
    max_epochs = tuned.record.spec.training.max_epochs
    ranked = tuned.ranked()
    return StudyStatus(
        study=tuned.name,
        state=state,
        budget=tuned.budget,
        counts=counts,
        best=ranked[0] if ranked else None,
        epochs_spent=sum(trial.last_step or 0 for trial in trials),
        epochs_saved=sum(
            max_epochs - (trial.last_step or 0)
            for trial in trials
            if trial.state == TrialState.PRUNED and not _could_not_go_on(trial)
        ),
        workers=int(attributes.get(WORKERS_KEY, 0)) if state == "running" else 0,
        resumed_trials=sum(1 for trial in trials if trial.user_attrs.get(RESUMED_KEY)),
        brackets=tuned.record.spec.trials_of_brackets(len(trials)),
        synthetic=tuned.record.data.synthetic,
        bytes_on_disk=tuned.artifacts.bytes_on_disk(
            () if driven else attached_files(tuned, trials)
        ),
        error=attributes.get(ERROR_KEY),
        ended_early=attributes.get(ENDED_EARLY_KEY),
        pruning_audit=pruning_audit(tuned.record.spec, trials),
        openings=openings,
    )


def figures_in(trial: FrozenTrial) -> dict[str, float | None]:
    """Accuracy, ROC AUC and parameters among a trial's attributes; None where it has none.

    Trials of earlier versions have their parameters alone.
    """
    return {key: trial.user_attrs.get(key) for key in (ACCURACY_KEY, ROC_AUC_KEY, PARAMETERS_KEY)}


def _could_not_go_on(trial: FrozenTrial) -> bool:
    """Whether a pruned trial diverged or the like: Hyperband then saved nothing."""
    return any(violation > 0 for violation in trial.constraints.values())
