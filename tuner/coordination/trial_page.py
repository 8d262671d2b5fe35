"""What is attached to a trial in the dashboard: its curves, its network, and a note in plain words.

The words and figures are user attributes, and the curves and the network files that Optuna's
dashboard shows with the trial. They are no Markdown notes, as Optuna knows them: those stand with
the study, and its dashboard reads all of them once for every trial.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

import optuna
from optuna.trial import TrialState

from tuner.artifacts import CURVES_FILE, NETWORK_FILE
from tuner.commands import password_hint
from tuner.coordination.curve_drawing import draw_curves
from tuner.coordination.words import ending, notes, train_again
from tuner.every import Every
from tuner.search.attributes import (
    AGAIN_KEY,
    AS_TRIAL_KEY,
    NOTE_KEY,
    PASSWORD_KEY,
    PRECISION_KEY,
    SEED_KEY,
)
from tuner.search.tuned_study import TunedStudy
from tuner.spec.architecture import ModelConfig, layers_of
from tuner.train import EpochResult

_DRAW_SECONDS = 10.0  #: between two drawings of a trial that is being trained


class TrialPage:
    """The page of one trial that this process runs."""

    def __init__(self, tuned: TunedStudy, trial: optuna.Trial, config: ModelConfig) -> None:
        self._tuned = tuned
        self._trial = trial
        self._config = config
        self._curve: list[EpochResult] = []
        self._pause = Every(_DRAW_SECONDS, at_once=False)

    def begin(self) -> None:
        """Writes what is known before the first epoch."""
        record, number = self._tuned.record, self._trial.number
        max_length = record.data.max_length
        known = {
            NOTE_KEY: "In training.",
            SEED_KEY: record.spec.seed,
            AS_TRIAL_KEY: record.spec.training.seeded_as(number),
            PRECISION_KEY: self._tuned.precision_of(self._config),
            AGAIN_KEY: train_again(self._tuned, number),
        }
        if hint := password_hint(self._tuned.storage.url):
            known[PASSWORD_KEY] = hint
        attributes = self._attributes()
        for key, value in known.items():
            if attributes.get(key) != value:
                self._trial.set_user_attr(key, value)
        self._attach(NETWORK_FILE, network_table(self._config, max_length))

    def epoch(self, result: EpochResult, *, may_draw: Callable[[], bool]) -> None:
        """Takes in an epoch; one that was told before, by a lost worker, is replaced.

        Args:
            result: The epoch.
            may_draw: Whether no other coordinator can be drawing this trial by now.
        """
        del self._curve[result.epoch - 1 :]
        self._curve.append(result)
        if self._pause.is_due():
            self._draw(TrialState.RUNNING, may_draw)

    def end(self, state: TrialState, *, may_draw: Callable[[], bool]) -> dict[str, str]:
        """Draws the whole curve; returns the attributes to write with the trial's end."""
        self._draw(state, may_draw)
        spec = self._tuned.record.spec
        return notes(
            state,
            self._curve,
            max_epochs=spec.training.max_epochs,
            eta=None if spec.hyperband is None else spec.hyperband.eta,
            bracket=spec.bracket_of(self._trial.number),
            attributes=self._attributes(),
        )

    def _draw(self, state: TrialState, may_draw: Callable[[], bool]) -> None:
        spec = self._tuned.record.spec
        bracket = spec.bracket_of(self._trial.number)
        drawing = draw_curves(
            self._curve,
            state,
            title=f"Trial {self._trial.number}: {ending(state, self._attributes())}",
            max_epochs=spec.training.max_epochs,
            rungs=() if bracket is None else spec.brackets[bracket],
        )
        self._attach(CURVES_FILE, drawing, may_draw)
        self._pause.begin_pause()

    def _attach(self, name: str, text: str, only_if: Callable[[], bool] | None = None) -> None:
        number = self._trial.number
        try:
            key, value = self._tuned.artifacts.attach(
                name, text.encode(), trial=number, only_if=only_if
            )
        except OSError:  # a full disk must not cost the trial, and it is told of elsewhere
            return
        storage, trial_id = self._trial.storage, self._trial._trial_id
        if key not in storage.get_trial(trial_id).system_attrs:
            storage.set_trial_system_attr(trial_id, key, value)

    def _attributes(self) -> dict[str, object]:
        # Not `self._trial.user_attrs`, which copies the whole curve each time.
        return self._trial.storage.get_trial(self._trial._trial_id).user_attrs


# --- words ---


def network_table(config: ModelConfig, max_length: int) -> str:
    """The network as CSV, a layer a row, which the dashboard shows as a table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "output shape", "parameters"])
    layers = layers_of(config, max_length)
    for layer in layers:
        writer.writerow([layer.name, " x ".join(map(str, layer.output)), layer.parameters])
    writer.writerow(["all", "", sum(layer.parameters for layer in layers)])
    return text.getvalue()
