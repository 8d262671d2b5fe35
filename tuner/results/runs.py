"""The trials of a study as runs of an experiment tracker: MLflow, TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

from optuna.trial import TrialState

from tuner.results.export import configs_of, render
from tuner.search.attributes import NOTE_KEY, curve_of
from tuner.search.tuned_study import TunedStudy
from tuner.train import BEST_EPOCH_KEY, PARAMETERS_KEY, SECONDS_KEY, EpochResult

_CURVES = ("training_loss", "training_accuracy", "validation_loss", "validation_accuracy",
           "validation_roc_auc", "seconds")  # fmt: skip
_FIGURES = (BEST_EPOCH_KEY, PARAMETERS_KEY, SECONDS_KEY)


#: Takes the runs that are to be written, and gives each when it is its turn: to show progress.
Watch: TypeAlias = "Callable[[Iterator[Run]], Iterable[Run]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One trial."""

    trial: int  #: its number
    state: TrialState
    started: datetime | None  #: local time
    ended: datetime | None  #: local time; None while it is open
    parameters: Mapping[str, Any]  #: what was sampled, by its name in the study file
    curve: tuple[tuple[EpochResult, Mapping[str, float]], ...]  #: each epoch and its finite figures
    figures: Mapping[str, float]  #: best_validation_loss, best_epoch, parameters, training_seconds
    note: str  #: why it ended; "" if nothing is known
    study_file: str  #: TOML, which trains its network again

    @property
    def version(self) -> str:
        """Differs once the trial is further than it was: what is exported again."""
        return f"{self.state.name} after {len(self.curve)}"


def runs_of(tuned: TunedStudy) -> Iterator[Run]:
    """Every trial that was started, by number."""
    trials = [trial for trial in tuned.trials() if trial.state != TrialState.WAITING]
    for trial, config in zip(trials, configs_of(tuned, trials), strict=True):
        figures = {name: trial.user_attrs.get(name) for name in _FIGURES}
        figures["best_validation_loss"] = config.validation_loss
        yield Run(
            trial=trial.number,
            state=trial.state,
            started=trial.datetime_start,
            ended=trial.datetime_complete,
            parameters=trial.params,
            curve=tuple((epoch, _finite(_of_epoch(epoch))) for epoch in curve_of(trial)),
            figures=_finite(figures),
            note=str(trial.user_attrs.get(NOTE_KEY, "")),
            study_file=render(config, "toml"),
        )


def _of_epoch(epoch: EpochResult) -> Mapping[str, float | None]:
    return {name: getattr(epoch, name) for name in _CURVES}


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """Those that are numbers: a tracker draws no NaN."""
    return {
        name: float(value)
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    }
