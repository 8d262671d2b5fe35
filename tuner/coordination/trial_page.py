"""What hangs on a trial in the dashboard: its curves, its network, and a note in plain words.

The words and figures are user attributes, and the curves and the network files that Optuna's
dashboard shows with the trial. They are no Markdown notes, as Optuna knows them: those stand with
the study, and its dashboard reads all of them once for every trial.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Sequence
from html import escape

import optuna
from optuna.trial import TrialState

from tuner.artifacts import CURVES_FILE, NETWORK_FILE
from tuner.commands import password_hint
from tuner.errors import counted
from tuner.search.objective import DETAIL_KEY, ENDED_KEY
from tuner.search.study import RESUMED_FROM_KEY, RESUMED_KEY, TunedStudy
from tuner.spec.space import ModelConfig, layers_of
from tuner.train import EpochResult

#: Attributes of the trial, as its page and the table of trials show them.
NOTE_KEY = "note"
SEED_KEY = "seed"  # the study's
AS_TRIAL_KEY = "as_trial"  # weights, shuffling and dropout are those of this number
PRECISION_KEY = "precision"
AGAIN_KEY = "train_again"
PASSWORD_KEY = "train_again_password"  # noqa: S105 - how to give one, where the line needs that

_DRAW_SECONDS = 10.0  #: between two drawings of a trial that is being trained


class TrialPage:
    """The page of one trial that this process runs."""

    def __init__(self, tuned: TunedStudy, trial: optuna.Trial, config: ModelConfig) -> None:
        self._tuned = tuned
        self._trial = trial
        self._config = config
        self._curve: list[EpochResult] = []
        self._drawn_at = time.monotonic()

    def begin(self) -> None:
        """Hangs up what is known before the first epoch."""
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
        self._hang(NETWORK_FILE, network_table(self._config, max_length))

    def epoch(self, result: EpochResult, *, may_draw: Callable[[], bool]) -> None:
        """Takes in an epoch; one that was told before, by a lost worker, is replaced.

        Args:
            result: The epoch.
            may_draw: Whether no other coordinator can be drawing this trial by now.
        """
        del self._curve[result.epoch - 1 :]
        self._curve.append(result)
        if time.monotonic() - self._drawn_at > _DRAW_SECONDS:
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
            title=f"Trial {self._trial.number}: {_ending(state, self._attributes())}",
            max_epochs=spec.training.max_epochs,
            rungs=() if bracket is None else spec.brackets[bracket],
        )
        self._hang(CURVES_FILE, drawing, may_draw)
        self._drawn_at = time.monotonic()

    def _hang(self, name: str, text: str, only_if: Callable[[], bool] | None = None) -> None:
        number = self._trial.number
        try:
            key, value = self._tuned.artifacts.hang(
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


def _ending(state: TrialState, attributes: dict[str, object]) -> str:
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


# --- the drawing ---

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#c4560a", "#8a8f98"
_WIDTH, _HEIGHT = 900, 400
_PANEL = (360, 270)  #: width and height of a panel, pixels
_LEFT, _TOP = 70, 80  #: of the first panel
_NEXT = 445  #: pixels from one panel to the other
_DOTS = "".join(
    f'<marker id="{name}" markerWidth="3" markerHeight="3" refX="1.5" refY="1.5">'
    f'<circle cx="1.5" cy="1.5" r="1.5" fill="{colour}"/></marker>'
    for name, colour in (("t", _GREY), ("v", _BLUE))
)
_ASTRAY = 1.5  #: nats; a loss above this, more than twice a coin toss, would flatten the rest


def draw_curves(
    curve: Sequence[EpochResult],
    state: TrialState,
    *,
    title: str,
    max_epochs: int,
    rungs: Sequence[int],
) -> str:
    """Loss and accuracy by epoch, as an SVG file that loads nothing.

    Args:
        curve: The epochs so far.
        state: Of the trial; where it was pruned, its last epoch is marked.
        title: One line.
        max_epochs: The right end.
        rungs: Epochs after which the trial could be pruned.
    """
    losses = [loss for one in curve for loss in (one.training_loss, one.validation_loss)]
    rates = [rate for one in curve for rate in (one.training_accuracy, one.validation_accuracy)]
    lost = [loss for loss in losses if loss <= _ASTRAY] or [0.0, _ASTRAY]
    panels = (
        ("loss, nats", "training_loss", "validation_loss", lost),
        ("accuracy", "training_accuracy", "validation_accuracy", rates or [0.0, 1.0]),
    )
    drawn = [
        _panel(curve, state, name, keys, _room(values), _LEFT + number * _NEXT, max_epochs, rungs)
        for number, (name, *keys, values) in enumerate(panels)
    ]
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="system-ui, sans-serif" font-size="15" '
        'fill="#222">'
    )
    return "".join(
        [
            opening,
            _DOTS,
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
            f'<text x="{_LEFT}" y="28" font-size="19" font-weight="600">{escape(title)}</text>',
            _legend(state, bool(rungs)),
            *drawn,
            "</svg>\n",
        ]
    )


def _room(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.01
    return low - margin, high + margin


def _legend(state: TrialState, has_rungs: bool) -> str:
    entries = [
        (f'<line x2="24" stroke="{_GREY}" stroke-width="2.5"/>', "training"),
        (f'<line x2="24" stroke="{_BLUE}" stroke-width="2.5"/>', "validation"),
        (f'<circle cx="12" r="6" fill="none" stroke="{_ORANGE}" stroke-width="2.5"/>', "best"),
    ]
    if has_rungs:
        dashed = f'stroke="{_GREY}" stroke-dasharray="4 4"'
        entries.append((f'<line x1="12" x2="12" y1="-9" y2="9" {dashed}/>', "rung"))
    if state in (TrialState.PRUNED, TrialState.FAIL):
        entries.append((_cross(12, 0), "pruned" if state == TrialState.PRUNED else "failed"))
    return "".join(
        f'<g transform="translate({_LEFT + 125 * place} 53)">{mark}<text x="32" y="5">{word}</text>'
        "</g>"
        for place, (mark, word) in enumerate(entries)
    )


def _cross(x: float, y: float) -> str:
    return (
        f'<path d="M{x - 7:.1f} {y - 7:.1f}l14 14m0 -14l-14 14" stroke="{_ORANGE}" '
        'stroke-width="3" fill="none"/>'
    )


def _panel(
    curve: Sequence[EpochResult],
    state: TrialState,
    name: str,
    keys: Sequence[str],
    span: tuple[float, float],
    left: int,
    max_epochs: int,
    rungs: Sequence[int],
) -> str:
    width, height = _PANEL
    bottom = _TOP + height
    low, high = span

    def x(epoch: float) -> float:
        return left + width * epoch / max_epochs

    def y(value: float) -> float:
        # What went astray stays at the upper edge, where one sees that it did; so does a NaN.
        share = (value - low) / (high - low)
        return bottom - height * (min(1.0, share))

    parts = [
        f'<path d="M{left} {_TOP}V{bottom}H{left + width}" fill="none" stroke="#222"/>',
        f'<text x="{left}" y="{_HEIGHT - 8}" font-weight="600">{name}</text>',
        f'<text x="{left + width}" y="{_HEIGHT - 8}" text-anchor="end">epoch</text>',
    ]
    for tick in range(5):
        value = low + (high - low) * tick / 4
        parts.append(
            f'<text x="{left - 8}" y="{y(value) + 5:.1f}" text-anchor="end" fill="#555">'
            f"{value:.3g}</text>"
        )
        parts.append(f'<path d="M{left} {y(value):.1f}h{width}" stroke="#eee"/>')
    step = max(1, -(-max_epochs // 9))
    middle = f'y="{bottom + 20}" text-anchor="middle" fill="#555"'
    parts += [
        f'<text x="{x(epoch):.1f}" {middle}>{epoch}</text>'
        for epoch in range(0, max_epochs + 1, step)
    ]
    parts += [
        f'<path d="M{x(rung):.1f} {_TOP}V{bottom}" stroke="{_GREY}" stroke-dasharray="4 4"/>'
        for rung in rungs
    ]
    across = [f"{x(one.epoch):.1f}" for one in curve]
    for key, colour, dot in zip(keys, (_GREY, _BLUE), ("t", "v"), strict=True):
        points = "L".join(
            [
                f"{place} {y(getattr(one, key)):.1f}"
                for place, one in zip(across, curve, strict=True)
            ]
        )
        if points:
            dots = "".join(f' marker-{where}="url(#{dot})"' for where in ("start", "mid", "end"))
            parts.append(
                f'<path d="M{points}" fill="none" stroke="{colour}" stroke-width="2"{dots}/>'
            )
    if curve:
        best = min(curve, key=lambda one: one.validation_loss)
        parts.append(
            f'<circle cx="{x(best.epoch):.1f}" cy="{y(getattr(best, keys[1])):.1f}" r="7" '
            f'fill="none" stroke="{_ORANGE}" stroke-width="2.5"/>'
        )
        if state in (TrialState.PRUNED, TrialState.FAIL):
            parts.append(_cross(x(curve[-1].epoch), y(getattr(curve[-1], keys[1]))))
    else:
        place = f'x="{left + width / 2}" y="{_TOP + height / 2}" text-anchor="middle"'
        parts.append(f"<text {place}>no epoch was completed</text>")
    return "".join(parts)
