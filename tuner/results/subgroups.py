"""Where predictions are good: among the best, by length, by similarity, without the ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tuner.data.audit.features import lengths
from tuner.data.audit.twins import TWIN, nearest_in_training
from tuner.data.rows import Tokens
from tuner.metrics import Floats, measure, wilson_interval
from tuner.results.comparison import paired_difference

SHARES = (0.1, 0.2)  #: of the rows, the best of which are looked at
END = 20  #: residues that are removed from an end: as many as a tag and its linker have
_REST = 20  #: residues that must be left
#: The lower ends of the bands of similarity to the nearest training row.
_SIMILARITIES = ((0.0, 0.3), (0.3, TWIN), (TWIN, None))

Labels = npt.NDArray[np.uint8]
Predict = Callable[[Tokens], Floats]


def best_rows(labels: Labels, logits: Floats) -> list[dict[str, Any]]:
    """Precision and enrichment among the rows with the highest probabilities.

    Enrichment is precision divided by the fraction of soluble rows: how many times as often as in
    a random draw.
    """
    order = np.argsort(-logits, kind="stable")
    soluble = float(labels.mean())
    found = []
    for share in SHARES:
        count = max(1, round(share * len(labels)))
        right = int(labels[order[:count]].sum())
        low, high = wilson_interval(right, count)
        found.append(
            {
                "share": share,
                "rows": count,
                "precision": right / count,
                "precision_ci95": [low, high],
                "enrichment": right / count / soluble if soluble else None,
                "enrichment_ci95": [low / soluble, high / soluble] if soluble else None,
            }
        )
    return found


def by_length(labels: Labels, logits: Floats, tokens: Tokens) -> list[dict[str, Any]]:
    """Loss and accuracy in four groups of about as many rows, from the shortest."""
    size = lengths(tokens)
    ends = np.unique(np.quantile(size, (0.25, 0.5, 0.75, 1)).astype(np.int64))
    group = np.searchsorted(ends, size)
    return [
        {
            "from": int(size[group == one].min()),
            "to": int(size[group == one].max()),
            **_figures(labels, logits, group == one),
        }
        for one in np.unique(group).tolist()
    ]


def by_similarity(
    labels: Labels, logits: Floats, tokens: Tokens, training_tokens: Tokens
) -> list[dict[str, Any]]:
    """Loss and accuracy by the similarity to the nearest training row.

    Raises:
        SetupError: SciPy is missing.
    """
    nearest = nearest_in_training(training_tokens, tokens)
    found = []
    for low, high in _SIMILARITIES:
        rows = (nearest >= low) & (nearest < (2 if high is None else high))
        if rows.any():
            found.append({"from": low, "to": high, **_figures(labels, logits, rows)})
    return found


def _figures(labels: Labels, logits: Floats, rows: npt.NDArray[np.bool_]) -> dict[str, Any]:
    found = measure(labels[rows], logits[rows])
    return {
        "rows": found.n,
        "soluble": float(labels[rows].mean()),
        "loss": found.loss,
        "loss_ci95": list(found.loss_ci95),
        "accuracy": found.accuracy,
        "accuracy_ci95": list(found.accuracy_ci95),
        "majority_accuracy": found.majority_accuracy,
    }


def without_ends(labels: Labels, tokens: Tokens, predict: Predict) -> dict[str, Any] | None:
    """What the network makes of sequences without their ends; None where all are too short.

    As a control the same number of residues is removed from the middle: what the ends are worth
    is what is lost beyond that.

    Args:
        labels: [n].
        tokens: uint8 [n, max_length].
        predict: The network.
    """
    rows = lengths(tokens) >= 2 * END + _REST
    if not rows.any():
        return None
    labels, tokens = labels[rows], tokens[rows]
    intact = predict(tokens)
    figures = measure(labels, intact)
    variants, predicted = [], {}
    for name, first, last, middle in (
        ("first", END, 0, 0),
        ("last", 0, END, 0),
        ("both", END, END, 0),
        ("middle", 0, 0, 2 * END),
    ):
        logits = predict(removed(tokens, first=first, last=last, middle=middle))
        predicted[name] = logits
        cut = measure(labels, logits)
        lost = paired_difference(labels, intact, logits)
        variants.append(
            {
                "removed": name,
                "residues": first + last + middle,
                "loss": cut.loss,
                "accuracy": cut.accuracy,
                "lost": lost.to_document(),
                "changed_sides": float(((logits > 0) != (intact > 0)).mean()),
            }
        )
    return {
        "rows": len(labels),
        "loss": figures.loss,
        "accuracy": figures.accuracy,
        "variants": variants,
        # How much more is lost without the ends than without the middle.
        "ends_beyond_middle": paired_difference(
            labels, predicted["middle"], predicted["both"]
        ).to_document(),
    }


def removed(tokens: Tokens, *, first: int = 0, last: int = 0, middle: int = 0) -> Tokens:
    """Sequences without some of their residues, padded at the end as before.

    Args:
        tokens: uint8 [n, max_length]; each row has more residues than are removed.
        first: Residues to remove from the beginning.
        last: From the end.
        middle: From the middle.
    """
    size = lengths(tokens)[:, np.newaxis]
    place = np.arange(tokens.shape[1])
    keep = (place >= first) & (place < size - last)
    start = (size - middle) // 2
    keep &= (place < start) | (place >= start + middle)
    order = np.argsort(~keep, axis=1, kind="stable")
    packed: Tokens = np.take_along_axis(np.where(keep, tokens, 0), order, axis=1).astype(np.uint8)
    return packed


def worth_of_ends(ends: dict[str, Any]) -> str:
    """What the removal of the ends tells, in a sentence."""
    more, lost = ends["ends_beyond_middle"], ends["variants"][2]["lost"]
    beyond = [what for what in ("loss", "accuracy") if more[f"{what}_ci95"][0] > 0]
    if beyond:
        return (
            "Without both ends it does worse than without as many residues of the middle, in "
            f"{' and '.join(beyond)} by more than the interval: part of what it knows is in the "
            "ends. Is it a tag?"
        )
    if lost["loss_ci95"][0] <= 0 and lost["accuracy_ci95"][0] <= 0:
        return "Without both ends it is as good within the interval: it does not need them."
    return (
        "Without both ends it loses no more, within the interval, than without as many residues "
        "of the middle: what it knows is not in the ends alone."
    )
