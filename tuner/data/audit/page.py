"""The audit as an HTML page, which loads nothing from anywhere."""

from __future__ import annotations

import math
from importlib.resources import files

import jinja2

from tuner.data.audit.census import LOW_COMPLEXITY, RUN, WINDOW
from tuner.data.audit.report import Audit
from tuner.data.audit.twins import BANDS, SPLITS, TWIN
from tuner.errors import counted


def render(audit: Audit, name: str) -> str:
    """The page.

    Args:
        audit: What was found.
        name: Of the study.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    environment.filters["count"] = lambda number: f"{number:,.0f}"
    template = files("tuner.data.audit").joinpath("audit.html.jinja").read_text(encoding="utf-8")
    document = audit.to_document()
    return environment.from_string(template).render(
        name=name,
        audit=document,
        bands=[
            (band_in_words(number), band["pairs"])
            for number, band in enumerate(document["near_twins"]["bands"])
        ],
        splits=SPLITS,
        threshold=TWIN,
        findings=findings(audit),
        split_in_words=audit.split.described,
        coin_toss=round(math.log(2), 3),
        window=WINDOW,
        low_complexity=LOW_COMPLEXITY,
        run=RUN,
        residues=_residues(audit),
    )


def band_in_words(number: int) -> str:
    """A band of similarities, by its place in `BANDS`."""
    low = BANDS[number]
    return "the same set" if low == 1 else f"{low:g} to {BANDS[number + 1]:g}"


def _residues(audit: Audit) -> list[tuple[str, list[float]]]:
    """Each residue that occurs, with its share in each split; the most frequent first."""
    shares = [audit.censuses[split].frequencies for split in SPLITS]
    found = [(residue, [share[residue] for share in shares]) for residue in shares[0]]
    return sorted((one for one in found if any(one[1])), key=lambda one: one[1][0], reverse=True)


def findings(audit: Audit) -> tuple[str, ...]:
    """What matters most, a sentence each."""
    twins = audit.twins
    exact = "" if twins.is_exact else f"about (from a sample of {counted(twins.compared, 'row')}) "
    said = []
    if twins.development_pairs:
        share = twins.opposite_labels or 0.0
        said.append(
            f"{exact}{twins.development_pairs:,} pairs of training and validation rows are near-"
            f"twins; {100 * share:.1f} % of them carry opposite labels."
        )
    else:
        said.append("No two training and validation rows are near-twins.")
    _, validation, test = twins.twin_in_training
    said.append(
        f"{100 * validation:.1f} % of the validation rows and {100 * test:.1f} % of the test rows "
        f"have a near-twin in training."
        + (
            " The figures of this split are not those of new proteins: a split by homology keeps "
            "relatives together."
            if max(validation, test) > 0.01
            else ""
        )
    )
    majority, *others = audit.shortcuts
    best = min(others, key=lambda one: one.validation.loss)
    said.append(
        f"Of the models without a network, {best.name} has the lowest validation loss, "
        f"{best.validation.loss:.4f} nats, and is right for "
        f"{100 * best.validation.accuracy:.1f} % ({majority.name}: {majority.validation.loss:.4f} "
        f"nats, {100 * majority.validation.accuracy:.1f} %). A network has to beat that."
    )
    return tuple(one[0].upper() + one[1:] for one in said)
