"""The learning curves of a trial as an SVG drawing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from optuna.trial import TrialState

from tuner.train import EpochResult

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
