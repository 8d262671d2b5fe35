"""The report in words, tables and figures, made from its document alone (`report.json`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tuner.errors import counted, ordinal
from tuner.metrics import DRAWS, THRESHOLD, small_split_warnings
from tuner.results.analysis_page import baselines_in_words, render_analysis
from tuner.results.confirm import number_in_words, range_in_words
from tuner.search.pruning_audit import audit_in_words
from tuner.spec.spec import SplitSettings

Document = Mapping[str, Any]

COIN_TOSS_LOSS = 0.693  # nats, ln 2: of whoever always says 0.5
_BLUE, _ORANGE, _GREY, _GREEN = "#1f5fa8", "#c4560a", "#8a8f98", "#1b7f4b"
_LISTED_STUDIES = 5  # that saw test rows; the rest are counted
_FEW = 15  # epochs or trials: each can have its tick
_WORDS_OF_STATE = {"COMPLETE": "fully trained", "PRUNED": "stopped early", "FAIL": "failed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One line of the table of test metrics, as text."""

    name: str  #: of the figure
    test: str  #: value with its unit
    interval: str  #: "low to high"
    validation: str
    meaning: str  #: what it measures, with its unit
    ensemble: str = ""  #: the ensemble's test figure with its interval; empty if there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigTable:
    """One part of the winner's configuration."""

    title: str  #: its heading
    columns: tuple[str, ...]  #: after that of the names; () for a single one without a heading
    rows: tuple[tuple[str, tuple[str, ...], bool], ...]  #: name, values, whether it was searched


def headline(document: Document) -> str:
    """The result in a sentence."""
    test = document["test"]
    low, high = test["accuracy_ci95"]
    made_up = "made-up " if document["synthetic"] else ""
    return (
        f"Of {test['n']:,} {made_up}proteins that the search had not seen, trial "
        f"{document['trial']} of study {document['study']} puts {_percent(test['accuracy'])} on "
        f"the right side (95 % interval {_percent(low)} to {_percent(high)}). Always naming the "
        f"more frequent label would be right for {_percent(test['majority_accuracy'])}."
    )


def confirmation_in_words(document: Document) -> list[str]:
    """Whether the winner was confirmed; nothing in reports of earlier versions."""
    return list(document.get("confirmation", {}).get("in_words", []))


def _confirmed_rows(document: Document) -> list[dict[str, Any]]:
    """The table of the configurations that were trained again; none without a confirmation."""
    confirmation = document.get("confirmation", {})
    found = [*confirmation.get("configs", []), *confirmation.get("references", [])]
    return [
        {
            "name": f"trial {one['trial']}{' *' * one['tied']}" if "trial" in one else one["name"],
            "cells": [
                (number_in_words(one["mean"]), "number"),
                (number_in_words(one["sd"]), "number"),
                (range_in_words(one["mean_ci95"]), "interval"),
                (number_in_words(one["difference"]), "number"),
                (range_in_words(one["difference_ci95"]), "interval"),
                (number_in_words(one["searched_value"]), "number"),
                (f"{one['parameters']:,}" if one["parameters"] else "", "number"),
            ],
        }
        for one in found
    ]


def ensemble_in_words(document: Document) -> str:
    """What the ensemble is worth beside the winner; nothing where none was evaluated."""
    ensemble = document.get("ensemble")  # reports of earlier versions have none
    if ensemble is None:
        return ""
    test = ensemble["test"]
    low, high = test["accuracy_ci95"]
    trials = ", ".join(str(network["trial"]) for network in ensemble["networks"])
    if network := document.get("confirmation", {}).get("network"):
        trials += f" of {network['study']}"
    said = (
        f"The ensemble of trials {trials}, evaluated in the same opening, puts "
        f"{_percent(test['accuracy'])} on the right side (95 % interval {_percent(low)} to "
        f"{_percent(high)}), with a loss of {test['loss']:.4f} nats."
    )
    crossed = ensemble["cross_fitted"]
    if crossed is None:
        return said
    used = "the ensemble is exported" if ensemble["is_better"] else "trial {trial} is exported"
    return (
        f"{said} On validation rows that did not choose it, its loss was "
        f"{crossed['loss']:.4f} against {crossed['single_loss']:.4f} of the best single network; "
        f"so {used.format(trial=document['trial'])} unless a command says otherwise."
    )


def metric_rows(document: Document) -> tuple[MetricRow, ...]:
    """Loss, accuracy, MCC and AUC on the test split, beside the validation split."""
    test, validation = document["test"], document["validation"]
    ensemble = document.get("ensemble")
    meanings = {
        "loss": f"mean binary cross-entropy, nats; {COIN_TOSS_LOSS} is a coin toss",
        "accuracy": f"fraction right at a probability of {THRESHOLD}",
        "mcc": "Matthews correlation; 1 perfect, 0 a guess",
        "roc_auc": "chance that a soluble protein ranks above an insoluble one; 0.5 a guess",
    }
    names = {"loss": "loss", "accuracy": "accuracy", "mcc": "MCC", "roc_auc": "ROC AUC"}
    rows = []
    for key, name in names.items():
        shown = _percent if key == "accuracy" else _number
        interval = test[f"{key}_ci95"]
        together = None if ensemble is None else ensemble["test"]
        rows.append(
            MetricRow(
                name=name,
                test=shown(test[key]),
                interval=" to ".join(map(shown, interval)) if interval else "none",
                validation=shown(validation[key]),
                meaning=meanings[key],
                ensemble="" if together is None else _with_interval(together, key, shown),
            )
        )
    return tuple(rows)


def _with_interval(figures: Mapping[str, Any], key: str, shown: Callable[[Any], str]) -> str:
    interval = figures[f"{key}_ci95"]
    ends = f" ({' to '.join(map(shown, interval))})" if interval else ""
    return f"{shown(figures[key])}{ends}"


def gap_in_words(document: Document) -> str:
    """How the test loss compares with the validation loss for which the winner was chosen."""
    test, validation_loss = document["test"], document["validation_loss"]
    gap = test["loss"] - validation_loss
    # Both losses are means over a draw of rows, so the gap's spread has both in it.
    by_chance = math.hypot(
        *(
            (high - low) / 2
            for low, high in (test["loss_ci95"], document["validation"]["loss_ci95"])
        )
    )
    start = (
        f"The test loss is {test['loss']:.4f} nats, {abs(gap):.4f} "
        f"{'higher' if gap > 0 else 'lower'} than the validation loss of {validation_loss:.4f} "
        f"for which this trial was chosen among {len(document['history'])}."
    )
    if abs(gap) <= by_chance:
        return (
            f"{start} The draw of the rows alone makes gaps of up to {by_chance:.4f} (95 %), so "
            "this one tells nothing."
        )
    if gap > 0:
        return (
            f"{start} The draw of the rows explains gaps of up to {by_chance:.4f} (95 %), not "
            "this one: the trial owes a part of its validation loss to having been chosen for "
            "it. Expect the test figures of new proteins."
        )
    return (
        f"{start} The draw of the rows explains gaps of up to {by_chance:.4f} (95 %), not this "
        "one: the test rows are easier than the validation rows."
    )


def warnings(document: Document) -> tuple[str, ...]:
    """What the figures should be read with; nothing in the best case."""
    data = document["data"]
    small = small_split_warnings(data["validation_rows"], data["test_rows"])
    return (
        *ledger_warnings(document),
        *(f"Warning: {warning}" for warning in small),
        *_still_improving(document),
    )


def _still_improving(document: Document) -> tuple[str, ...]:
    losses = [point["validation_loss"] for point in document["curve"]]
    known = [loss for loss in losses if loss is not None]
    most = document["spec"]["training"]["max_epochs"]
    if len(losses) < most or losses.index(min(known)) + 1 < len(losses):
        return ()
    warning = (
        f"Warning: the winner's validation loss was lowest at its last epoch, {len(losses)} of at "
        f"most {most}: it was still improving, and so may others have been. A study with more "
        "epochs (max_epochs) may find a better network."
    )
    return (warning,)


def intervals_in_words(document: Document) -> str:
    """How the intervals were made, each in its own way."""
    methods = document["test"].get("method")
    if methods is None:  # a report of an earlier version, shown again
        return "Accuracy: Wilson's interval; the others: percentiles of a bootstrap of the rows."
    names = {"loss": "loss", "accuracy": "accuracy", "mcc": "MCC", "roc_auc": "ROC AUC"}
    described = "; ".join(f"{names[key]}: {method}" for key, method in methods.items())
    return f"95 % intervals: {described} ({DRAWS:,} draws where any are made)."


def ledger_warnings(document: Document) -> tuple[str, ...]:
    """What the ledger's count of openings means; nothing where there is only this one."""
    ledger = document["ledger"]
    warnings = []
    if ledger.get("problems"):
        first, *rest = ledger["problems"]
        more = f" ({counted(len(rest), 'more problem')})" if rest else ""
        warnings.append(
            f"Warning: the ledger of this storage is not whole, so its count of openings proves "
            f"nothing: {first}{more} `tuner ledger verify` says all."
        )
    if ledger.get("look", 1) > 1:
        warnings.append(
            f"Warning: these figures are of the {ordinal(ledger['look'])} look at this test split. "
            f"The reason that was given: {ledger['reason']}."
        )
    if elsewhere := ledger.get("kept_elsewhere"):
        entries = ", ".join(f"{one['entry']} ({one['study']!r})" for one in elsewhere)
        warnings.append(
            f"Warning: {counted(len(elsewhere), 'opening')} of this test split "
            f"{'is' if len(elsewhere) == 1 else 'are'} not in this ledger, but kept with the "
            f"artifacts: ledger entry {entries}. Another storage shares them, one was deleted, or "
            "an older copy of this one was restored."
        )
    if ledger["openings"] > 1:
        warnings.append(
            f"Warning: {_openings_in_words(ledger)} Each look at it that led to another study "
            "makes its figures a little too good; an untouched figure needs another split."
        )
    abandoned = [row["entry"] for row in ledger["rows"] if not row["evaluated"]]
    if abandoned:
        entries = ", ".join(map(str, abandoned))
        warnings.append(
            f"Ledger entry {entries}: opened, but the evaluation was never recorded (it was cut "
            "off, or is still going on). It counts as an opening all the same."
        )
    if used := ledger["used_elsewhere"]:
        warnings.append(
            "Warning: other studies of this storage saw some of these "
            f"{counted(ledger['test_rows'], 'test row')}: {_used_in_words(used)}. If anything that "
            "they found was used here, these figures are too good."
        )
    return tuple(warnings)


def _openings_in_words(ledger: Mapping[str, Any]) -> str:
    rows, openings = ledger["rows"], ledger["openings"]
    if all(row["shared_rows"] == ledger["test_rows"] for row in rows):
        return f"this test split was opened {counted(openings, 'time')} in this storage."
    others = "; ".join(
        f"{row['shared_rows']:,} of {ledger['test_rows']:,} by study {row['study']!r}, ledger "
        f"entry {row['entry']}"
        for row in rows
        if row["entry"] != ledger["entry"]
    )
    return (
        f"rows of this test split were opened {counted(openings, 'time')} in this storage (beside "
        f"this report: {others})."
    )


def _used_in_words(used: Sequence[Mapping[str, Any]]) -> str:
    said = []
    for one in used[:_LISTED_STUDIES]:
        counts = {"training": one["training"], "validation": one["validation"]}
        places = " and ".join(f"{n:,} in its {name} split" for name, n in counts.items() if n)
        said.append(f"{one['study']!r} had {places}")
    if len(used) > _LISTED_STUDIES:
        more = counted(len(used) - _LISTED_STUDIES, "more study", "more studies")
        said.append(f"{more} had some, too")
    return "; ".join(said)


def other_splits_in_words(document: Document) -> tuple[str, ...]:
    """A sentence for each other split of the same data that was reported."""
    return tuple(
        f"Beside it: study {row['study']!r} split the same data {_of_split(row)}; its test loss is "
        f"{row['loss']:.3f}, its test accuracy {_percent(row['accuracy'])} "
        f"({_interval_in_percent(row['accuracy_ci95'])}), its area under the ROC curve "
        f"{_number(row['roc_auc'])}."
        for row in document["side_by_side"][1:]
    )


def _of_split(row: Mapping[str, Any]) -> str:
    split = str(row["split"])
    return f"at random ({split.removeprefix('random, ')})" if split.startswith("random") else split


def _interval_in_percent(interval: Sequence[float]) -> str:
    low, high = interval
    return f"{100 * low:.1f} % to {100 * high:.1f} %"


def render(document: Document) -> str:
    """The page: one HTML file that loads nothing from anywhere."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = files("tuner.results").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        report=document,
        look=ordinal(document["ledger"]["look"]),
        headline=headline(document),
        ensemble=ensemble_in_words(document),
        confirmation=confirmation_in_words(document),
        confirmed=_confirmed_rows(document),
        metrics=metric_rows(document),
        gap=gap_in_words(document),
        warnings=warnings(document),
        analysis=render_analysis(document, _figure),
        baselines=baselines_in_words(document),
        facts=_facts(document),
        tables=config_tables(document),
        intervals=intervals_in_words(document),
        plotlyjs=_plotlyjs(),
        roc=_roc_figure(document),
        curves=_curves_figure(document),
        history=_history_figure(document),
        above_history=_history_outliers(document),
    )


# --- tables ---


def _split_in_words(split: Mapping[str, Any]) -> str:
    described = SplitSettings.model_validate(split).described
    return described.replace("random, ", "random, stratified by label, ", 1)


def _facts(document: Document) -> tuple[tuple[str, str], ...]:
    """What was done: name and value."""
    data, spec = document["data"], document["spec"]
    split = spec["data"]["split"]
    trials = ", ".join(
        f"{count} {_WORDS_OF_STATE.get(state, state.lower())}"
        for state, count in document["trials"].items()
    )
    rows = f"{data['training_rows']:,} training, {data['validation_rows']:,} validation, "
    epochs = f"{document['epochs_spent']:,} trained, {document['epochs_saved']:,} saved by pruning"
    audit = document.get("pruning_audit")
    versions = document["versions"]
    now = document["evaluated_with"]
    changed = ", ".join(f"{name} {now[name]}" for name in now if now[name] != versions.get(name))
    return (
        ("Study", f"{document['study']}, made {document['created_at']}"),
        ("Data", data["source"] + (" (made up)" if data["synthetic"] else "")),
        ("Data, sha256", data["sha256"]),
        ("Rows", f"{rows}{data['test_rows']:,} test"),
        ("Split", _split_in_words(split)),
        ("Split identity", data["split_id"]),
        ("Budget", f"{counted(document['budget'], 'finished trial')}; there are {trials}"),
        ("Epochs", f"{epochs}; at most {spec['training']['max_epochs']} a trial"),
        *([("Was pruning right?", audit_in_words(audit))] if audit else []),
        ("Sampler", _settings(document["sampler"])),
        ("Pruner", _settings(document["pruner"])),
        ("Seed", f"{spec['seed']} (sampler, initial weights, shuffling, dropout)"),
        ("Precision", f"{document['precision']} in training, float32 in this evaluation"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        *((("Evaluated with", f"{changed}; the others are the same"),) if changed else ()),
        ("Study file, hash", document["spec_hash"]),
        ("Configuration, hash", document["config_hash"]),
        ("Weights, sha256", document["weights_sha256"]),
    )


def config_tables(document: Document) -> tuple[ConfigTable, ...]:
    """The winner's configuration: the network, its blocks, its dense layers."""
    config, sampled = document["config"], document["sampled"]
    whole = {key: value for key, value in config.items() if key not in ("blocks", "dense")}
    # What the study file counts or names otherwise than the configuration does.
    other_names = {"output_dropout": ("output.dense_dropout", "dense_dropout")}
    rows: list[tuple[str, tuple[str, ...], bool]] = [
        ("blocks", (str(len(config["blocks"])),), "blocks" in sampled),
        ("dense_layers", (str(len(config["dense"])),), "dense_layers" in sampled),
    ]
    for key, value in whole.items():
        names = other_names.get(key, (key,))
        rows.append((key, (_value(value),), any(name in sampled for name in names)))
    return (
        ConfigTable(title="Network and training", columns=(), rows=tuple(rows)),
        _layer_table("Blocks", "block", config["blocks"], sampled),
        _layer_table("Hidden dense layers", "dense", config["dense"], sampled),
    )


def _layer_table(
    title: str, prefix: str, layers: Sequence[Mapping[str, Any]], sampled: Mapping[str, Any]
) -> ConfigTable:
    numbered = [f"{prefix}{number}" for number in range(1, len(layers) + 1)]
    rows = []
    for key in layers[0] if layers else ():
        searched = key in sampled or any(f"{name}.{key}" in sampled for name in numbered)
        rows.append((key, tuple(_value(layer[key]) for layer in layers), searched))
    return ConfigTable(title=title, columns=tuple(numbered), rows=tuple(rows))


def _settings(settings: Mapping[str, Any]) -> str:
    rest = ", ".join(f"{key} {_value(value)}" for key, value in settings.items() if key != "class")
    return f"{settings['class']} ({rest})" if rest else str(settings["class"])


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


# --- figures ---


@functools.cache
def _plotlyjs() -> Markup:
    return Markup(get_plotlyjs())  # noqa: S704 - the library's own file


def _figure(figure: go.Figure, name: str, *, x: str, y: str) -> Markup:
    """A figure without its library, which the page holds once."""
    figure.update_layout(
        template="simple_white",
        xaxis_title=x,
        yaxis_title=y,
        font={"family": "system-ui, sans-serif", "size": 14},
        margin={"l": 70, "r": 20, "t": 20, "b": 60},
        height=400,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        include_mathjax=False,
        div_id=name,
        config={"displayModeBar": False, "responsive": True},
    )
    return Markup(html)  # noqa: S704 - holds numbers and our own words, and plotly escapes them


def _roc_figure(document: Document) -> Markup | None:
    points = document["roc_curve"]
    if not points:
        return None
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", name="a guess", line={"color": _GREY, "dash": "dash"}
    )
    figure.add_scatter(
        x=[false for false, _ in points],
        y=[true for _, true in points],
        mode="lines",
        name="trial on the test split",
        line={"color": _BLUE, "shape": "linear", "width": 2},
    )
    figure.update_xaxes(range=[-0.01, 1.01])
    figure.update_yaxes(range=[-0.01, 1.01])
    return _figure(
        figure,
        "roc",
        x="insoluble taken for soluble, fraction",
        y="soluble found, fraction",
    )


def _curves_figure(document: Document) -> Markup | None:
    curve = document["curve"]
    if not curve:
        return None
    epochs = [point["epoch"] for point in curve]
    figure = go.Figure()
    for key, colour in (("training_loss", _GREY), ("validation_loss", _BLUE)):
        figure.add_scatter(
            x=epochs,
            y=[point[key] for point in curve],
            mode="lines+markers",
            name=key.replace("_", " "),
            line={"color": colour},
        )
    known = [point for point in curve if point["validation_loss"] is not None]
    best = min(known, key=lambda point: point["validation_loss"], default=None)
    if best is not None:
        figure.add_scatter(
            x=[best["epoch"]],
            y=[best["validation_loss"]],
            mode="markers",
            name=f"best epoch ({best['epoch']}): the weights that were kept",
            marker={"color": _ORANGE, "size": 14, "symbol": "star"},
        )
    figure.update_xaxes(rangemode="tozero", dtick=1 if len(epochs) <= _FEW else None)
    return _figure(figure, "curves", x="epoch", y="loss, nats")


def _history_figure(document: Document) -> Markup:
    history = [row for row in document["history"] if row["validation_loss"] is not None]
    complete = [row for row in history if row["state"] == "COMPLETE"]
    pruned = [row for row in history if row["state"] != "COMPLETE"]
    best_so_far: list[float] = []
    for row in complete:
        best_so_far.append(min([row["validation_loss"], *best_so_far[-1:]]))
    figure = go.Figure()
    for rows, name, marker in (
        (pruned, "stopped early, at the best loss it had", {"symbol": "x-thin", "color": _GREY}),
        (complete, "fully trained", {"symbol": "circle", "color": _BLUE}),
    ):
        figure.add_scatter(
            x=[row["trial"] for row in rows],
            y=[row["validation_loss"] for row in rows],
            customdata=[row["epochs"] for row in rows],
            mode="markers",
            name=name,
            marker={"size": 8, "line": {"width": 1.5, "color": marker["color"]}, **marker},
            hovertemplate="trial %{x}<br>%{y:.4f} nats<br>epochs: %{customdata}<extra></extra>",
        )
    figure.add_scatter(
        x=[row["trial"] for row in complete],
        y=best_so_far,
        mode="lines",
        name="best so far",
        line={"color": _GREEN, "shape": "hv"},
    )
    winner = [row for row in complete if row["trial"] == document["trial"]]
    figure.add_scatter(
        x=[row["trial"] for row in winner],
        y=[row["validation_loss"] for row in winner],
        mode="markers",
        name="the winner",
        marker={"color": _ORANGE, "size": 14, "symbol": "star"},
    )
    figure.update_xaxes(dtick=1 if len(document["history"]) <= _FEW else None)
    figure.update_yaxes(range=_history_range(document))
    return _figure(figure, "history", x="trial", y="validation loss, nats")


def _history_range(document: Document) -> tuple[float, float]:
    """The losses that the figure shows: one trial that went astray must not flatten it."""
    losses: dict[str, list[float]] = {"COMPLETE": [], "PRUNED": []}
    for row in document["history"]:
        if row["validation_loss"] is not None:
            losses[row["state"]].append(row["validation_loss"])
    everything = losses["COMPLETE"] + losses["PRUNED"]
    low = min(everything)
    high = min(max(everything), max(1.1 * COIN_TOSS_LOSS, *losses["COMPLETE"]))
    margin = 0.05 * (high - low) or 0.01
    return low - margin, high + margin


def _history_outliers(document: Document) -> int:
    """How many trials lie above the figure."""
    _, high = _history_range(document)
    losses = [row["validation_loss"] for row in document["history"]]
    return sum(loss is not None and loss > high for loss in losses)
