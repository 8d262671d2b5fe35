"""The learning curves of a trial as an SVG drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from optuna.trial import TrialState

from tuner.train import EpochResult

if TYPE_CHECKING:
    import jinja2

_ASTRAY = 1.5  #: nats; a loss above this, more than twice a coin toss, would flatten the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Panel:
    """The place of one of the two figures in the drawing."""

    name: str  #: of its axis, with the unit
    key: Literal["loss", "accuracy"]  #: ends the names of the `EpochResult` fields that it shows
    left: int  #: pixels, like `right`, `top` and `bottom`
    max_epochs: int  #: at the right end
    span: tuple[float, float]  #: values at the bottom and at the top
    top: int = 80
    bottom: int = 350

    @property
    def right(self) -> int:
        return self.left + 360

    @property
    def ticks(self) -> list[float]:
        low, high = self.span
        return [low + (high - low) * tick / 4 for tick in range(5)]

    def x(self, epoch: int) -> float:
        return self.left + (self.right - self.left) * epoch / self.max_epochs

    def y(self, value: float) -> float:
        # What went astray stays at the upper edge, where one sees that it did; so does a NaN.
        low, high = self.span
        share = (value - low) / (high - low)
        return self.bottom - (self.bottom - self.top) * min(1.0, share)


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
    lost = _room([loss for loss in losses if loss <= _ASTRAY] or [0.0, _ASTRAY])
    right = _room(rates or [0.0, 1.0])
    return _template().render(
        curve=curve,
        best=min(curve, key=lambda one: one.validation_loss, default=None),
        cut={TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}.get(state),
        title=title,
        rungs=rungs,
        epochs=range(0, max_epochs + 1, max(1, -(-max_epochs // 9))),
        panels=(
            _Panel(name="loss, nats", key="loss", left=70, max_epochs=max_epochs, span=lost),
            _Panel(name="accuracy", key="accuracy", left=515, max_epochs=max_epochs, span=right),
        ),
    )


def _room(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.01
    return low - margin, high + margin


@cache
def _template() -> jinja2.Template:
    import jinja2  # noqa: PLC0415 - what draws nothing starts sooner

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tuner.coordination", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["px"] = "{:.1f}".format
    return environment.get_template("curves.svg.jinja")
