"""What is said of trials, their ends and their times."""

from __future__ import annotations

from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from tuner.errors import counted
from tuner.search.attributes import (
    AUDITED_KEY,
    DETAIL_KEY,
    ENDED_KEY,
    NOTE_KEY,
    RESUMED_FROM_KEY,
    RESUMED_KEY,
)
from tuner.search.tuned_study import TunedStudy
from tuner.train import EpochResult


def describe_end(trial: FrozenTrial) -> str:
    """One line about a trial that ended."""
    value = "" if trial.value is None else f", validation loss {trial.value:.4f}"
    epochs = counted(trial.last_step or 0, "epoch")
    if reason := trial.user_attrs.get(ENDED_KEY):
        detail = trial.user_attrs.get(DETAIL_KEY, "")
        return f"Trial {trial.number} ended ({reason}: {detail}) after {epochs}{value}"
    return f"Trial {trial.number} {trial.state.name} after {epochs}{value}"


def notes(
    state: TrialState,
    curve: Sequence[EpochResult],
    *,
    max_epochs: int,
    eta: int | None,
    bracket: int | None,
    attributes: dict[str, object],
) -> dict[str, str]:
    """Why a trial ended, and from where it was resumed.

    What it reached and what it cost are numbers: see `tuner.search.objective.figures_of`.
    """
    said = _why(state, curve, max_epochs, eta, bracket, attributes)
    if (audited := attributes.get(AUDITED_KEY)) is not None:
        said += (
            f" Audited: Hyperband would have pruned it after epoch {audited}; it trained on to "
            "show what pruning throws away."
        )
    times = attributes.get(RESUMED_KEY)
    if isinstance(times, int) and times > 0:
        again = "once" if times == 1 else counted(times, "time")
        after = attributes.get(RESUMED_FROM_KEY)
        where = (
            f"its checkpoint after epoch {after}" if after else "the start, without a checkpoint"
        )
        said += f" Resumed {again}, the last time from {where}."
    return {NOTE_KEY: said}


def _why(
    state: TrialState,
    curve: Sequence[EpochResult],
    max_epochs: int,
    eta: int | None,
    bracket: int | None,
    attributes: dict[str, object],
) -> str:
    epochs = len(curve)
    if state == TrialState.COMPLETE:
        if epochs < max_epochs:
            return (
                f"Fully trained: its validation loss fell no more, so it ended after {epochs} of "
                f"at most {counted(max_epochs, 'epoch')}."
            )
        return f"Fully trained: {'' if max_epochs == 1 else 'all '}{counted(max_epochs, 'epoch')}."
    if state == TrialState.FAIL:
        return f"Failed: {attributes.get(DETAIL_KEY, 'no reason is known')}."
    reason = attributes.get(ENDED_KEY)
    if reason is not None:
        words = str(reason).replace("_", " ")
        return f"Ended early ({words}): {attributes.get(DETAIL_KEY, 'no detail is known')}."
    return (
        f"Pruned after epoch {epochs} of {max_epochs}, a rung of bracket {bracket}: not among the "
        f"best 1/{eta} that had come there. That saved "
        f"{counted(max_epochs - epochs, 'epoch')}."
    )


def ending(state: TrialState, attributes: dict[str, object]) -> str:
    """How a trial ended, in a few words."""
    if state == TrialState.COMPLETE:
        return "fully trained"
    if state == TrialState.RUNNING:
        return "in training"
    if state == TrialState.FAIL:
        return "failed"
    reason = attributes.get(ENDED_KEY)
    return "pruned" if reason is None else f"ended early ({str(reason).replace('_', ' ')})"


def train_again(tuned: TunedStudy, number: int) -> str:
    """The line that trains a trial's network again, bit for bit, as a study of its own."""
    file = f"{tuned.name}-trial-{number}.toml"
    export = tuned.command("export", tuned.name, "--trial", number, "-o", file)
    return f"{export} && {tuned.command('launch', file)}"


def duration(seconds: float) -> str:
    """Seconds in words: "40 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
