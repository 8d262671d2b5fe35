"""The analysis of a report in words, tables and a figure, from its document alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup

from tuner.commands import install_command
from tuner.results.baselines import LINEAR
from tuner.results.subgroups import worth_of_ends

Document = Mapping[str, Any]
Figure = Callable[..., Markup]

FAILED = "analysis_failed"  #: in place of an analysis: what went wrong
_BLUE, _ORANGE, _GREY = "#1f5fa8", "#c4560a", "#8a8f98"
_REMOVED = {
    "first": "the first",
    "last": "the last",
    "both": "both ends, each",
    "middle": "the middle",
}


def is_analysed(document: Document) -> bool:
    """Whether the report has an analysis; those of earlier versions have none."""
    return "calibration" in document


def baselines_in_words(document: Document) -> tuple[str, ...]:
    """How the winner compares with the linear baseline, in a sentence; nothing if not known."""
    baselines = document.get("baselines")
    if baselines is None or baselines["beats_linear"] is None:
        return ()
    linear = next(one for one in baselines["models"] if one["name"] == LINEAR)
    by = linear["winner_is_better_by"]
    verdict = "beats" if baselines["beats_linear"] else "does not beat"
    said = (
        f"Trial {document['trial']} {verdict} the linear baseline by more than the interval: its "
        f"test loss is {_by(by['loss'], 4, ' nats', 'lower', 'higher')} (95 % interval "
        f"{_ends(by['loss_ci95'], 4)}), its accuracy "
        f"{_by(100 * by['accuracy'], 1, ' points', 'higher', 'lower')} "
        f"({_ends([100 * end for end in by['accuracy_ci95']], 1)})."
    )
    return (said,)


def _by(value: float, digits: int, unit: str, better: str, worse: str) -> str:
    return f"{abs(value):.{digits}f}{unit} {better if value >= 0 else worse}"


def _ends(interval: list[float], digits: int) -> str:
    low, high = interval
    return f"{low:.{digits}f} to {high:.{digits}f}"


def analysis_in_words(document: Document) -> tuple[str, ...]:
    """What the terminal shows of the analysis, a sentence each."""
    if FAILED in document:
        return (_failed(document),)
    if not is_analysed(document):
        return ()
    best = document["best_rows"][0]
    said = [
        *baselines_in_words(document),
        f"Of the {100 * best['share']:.0f} % of the test rows that it likes best, "
        f"{_percent(best['precision'])} are soluble"
        + ("" if best["enrichment"] is None else f", an enrichment of {best['enrichment']:.2f}")
        + ".",
        calibration_in_words(document),
    ]
    return tuple(said)


def _failed(document: Document) -> str:
    return (
        f"The winner could not be analysed beyond its figures ({document[FAILED]}); the figures "
        "stand. Please report this as a bug."
    )


def calibration_in_words(document: Document) -> str:
    """How far probabilities can be taken at their word."""
    found = document["calibration"]
    test, mended = found["test"], found["test_with_temperature"]
    error, chance = "expected_calibration_error", "expected_calibration_error_by_chance"
    return (
        f"Its probabilities are off by {_percent(test[error])} in the mean (chance alone makes "
        f"{_percent(test[chance])}). With a temperature of {found['temperature']:.2f}, which was "
        f"fitted on validation rows, they are off by {_percent(mended[error])}."
    )


def render_analysis(document: Document, figure: Figure) -> Markup:
    """The sections of the page; empty for a report without an analysis.

    Args:
        document: `report.json`.
        figure: Makes a figure's HTML: figure, name, x and y titles.
    """
    if FAILED in document:
        return Markup("<p class='warning'>{}</p>").format(_failed(document))
    if not is_analysed(document):
        return Markup()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = _percent
    environment.filters["percents"] = lambda ends: f"{_percent(ends[0])} to {_percent(ends[1])}"
    environment.filters["points"] = lambda share: f"{100 * share:+.1f}"
    template = files("tuner.results").joinpath("analysis.html.jinja").read_text(encoding="utf-8")
    rendered = environment.from_string(template).render(
        report=document,
        baselines=baselines_in_words(document),
        calibration=calibration_in_words(document),
        reliability=_reliability(document, figure),
        ends=None if document["ends"] is None else worth_of_ends(document["ends"]),
        removed=_REMOVED,
        install=install_command("audit"),
        similarity_in_words=_similarity_in_words,
    )
    return Markup(rendered)  # noqa: S704 - made by a template that escapes


def _similarity_in_words(low: float, high: float | None) -> str:
    if high is None:
        return f"{low:g} or more: a near-twin"
    return f"{low:g} to {high:g}" if low else f"below {high:g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _reliability(document: Document, figure: Figure) -> Markup:
    drawn = go.Figure()
    drawn.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", name="calibrated", line={"color": _GREY, "dash": "dash"}
    )
    for key, name, colour in (
        ("test", "the winner", _BLUE),
        ("test_with_temperature", "with the temperature", _ORANGE),
    ):
        bins = document["calibration"][key]["bins"]
        drawn.add_scatter(
            x=[one["predicted"] for one in bins],
            y=[one["soluble"] for one in bins],
            customdata=[one["rows"] for one in bins],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [one["soluble_ci95"][1] - one["soluble"] for one in bins],
                "arrayminus": [one["soluble"] - one["soluble_ci95"][0] for one in bins],
                "thickness": 1,
            },
            mode="lines+markers",
            name=name,
            line={"color": colour},
            hovertemplate="%{x:.2f} predicted, %{y:.2f} soluble, %{customdata} rows<extra></extra>",
        )
    drawn.update_xaxes(range=[0, 1])
    drawn.update_yaxes(range=[0, 1])
    return figure(drawn, "reliability", x="probability of being soluble", y="soluble, fraction")
