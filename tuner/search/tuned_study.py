"""A study with its record, its storage and its artifacts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tuner.artifacts import StudyArtifacts
from tuner.commands import command
from tuner.search.attributes import (
    BFLOAT16_FROM_KEY,
    BUDGET_KEY,
    CONFIRM_KEY,
    CONFIRMS_KEY,
    ENDED_EARLY_KEY,
    NOTIFY_KEY,
    STOP_KEY,
    VALUE_NAME,
)
from tuner.search.record import StudyRecord
from tuner.spec.architecture import ModelConfig
from tuner.spec.precision import BFLOAT16_FROM, Precision, precision_by_size
from tuner.spec.spec import ConfirmSettings, NotifySettings, StopSettings
from tuner.storage.storage import Storage

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedStudy:
    """An open study."""

    study: optuna.Study  #: with our sampler and pruner
    record: StudyRecord  #: what it was made of
    storage: Storage  #: the open database that holds it
    artifacts: StudyArtifacts  #: its files

    @property
    def name(self) -> str:
        return self.study.study_name

    @property
    def id(self) -> int:
        return self.study._study_id

    @property
    def key(self) -> str:
        """Unique to this study: the ledger knows it by this, also when its name is used again."""
        return self.record.folder

    @property
    def budget(self) -> int:
        return int(self.study.user_attrs[BUDGET_KEY])

    @property
    def stop(self) -> StopSettings | None:
        """When it ends before its budget."""
        document = self.study.user_attrs.get(STOP_KEY)
        return None if document is None else StopSettings(**document)

    @property
    def notify(self) -> NotifySettings | None:
        """Which webhook is notified of its end."""
        document = self.study.user_attrs.get(NOTIFY_KEY)
        return None if document is None else NotifySettings(**document)

    @property
    def confirm(self) -> ConfirmSettings | None:
        """What is confirmed at its end."""
        document = self.study.user_attrs.get(CONFIRM_KEY)
        return None if document is None else ConfirmSettings(**document)

    @property
    def confirms(self) -> Mapping[str, Any] | None:
        """Of a confirmation, which study it confirms; see `tuner.search.confirmation`."""
        found: Mapping[str, Any] | None = self.study.user_attrs.get(CONFIRMS_KEY)
        return found

    def end_early(self, trials: int, reason: str) -> None:
        """Lowers the budget to `trials`, so that for everybody the study is finished then."""
        self.study.set_user_attr(ENDED_EARLY_KEY, reason)
        self.study.set_user_attr(BUDGET_KEY, trials)

    def precision_of(self, config: ModelConfig) -> Precision:
        """In which precision the study trains this network."""
        asked = self.record.precision
        if asked != "auto":
            return asked
        fewest = self.study.user_attrs.get(BFLOAT16_FROM_KEY)
        return precision_by_size(config, self.record.data.max_length, fewest)

    def name_value(self) -> None:
        """Names a trial's value, for the dashboard's axes and Optuna's data frames."""
        if self.study.metric_names is None:
            with warnings.catch_warnings(
                action="ignore", category=optuna.exceptions.ExperimentalWarning
            ):
                self.study.set_metric_names([VALUE_NAME])

    def decide_precision(self, *, fast_bfloat16: bool) -> None:
        """Decides what "auto" means, once: also for who takes the study up on other machines.

        Args:
            fast_bfloat16: Every worker of this moment multiplies bfloat16 in hardware.
        """
        if self.record.precision == "auto" and BFLOAT16_FROM_KEY not in self.study.user_attrs:
            fewest = BFLOAT16_FROM if fast_bfloat16 else None
            self.study.set_user_attr(BFLOAT16_FROM_KEY, fewest)

    def command(self, *words: object) -> str:
        """A command that a message suggests, with the options that find this study."""
        return command(*words, storage=self.storage.url, artifacts=self.artifacts.folder.parent)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def ranked(self) -> list[FrozenTrial]:
        """Fully trained trials, best validation loss first; ties by number."""
        complete = [trial for trial in self.trials(TrialState.COMPLETE) if trial.value is not None]
        return sorted(complete, key=lambda trial: (trial.value, trial.number))
