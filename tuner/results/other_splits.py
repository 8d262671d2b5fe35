"""Reports over other splits of the same data, to be shown beside a study's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.search.tuned_study import TunedStudy
from tuner.spec.spec import SplitSettings


def reports_side_by_side(tuned: TunedStudy, own: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was recorded of this study and of others that split the same rows otherwise.

    Args:
        tuned: The study.
        own: Its report.

    Returns:
        A row for each, its own first, then in the order of their reports; none where no other was
        reported. Another study on the same split is no row: the ledger lists it.
    """
    others = [
        entry.report
        for entry in tuned.storage.ledger.entries()
        if entry.report is not None
        and entry.study_key != tuned.key
        and entry.report["data"]["sha256"] == own["data"]["sha256"]
        and _split(entry.report) != _split(own)
    ]
    return [_row(report) for report in (own, *others)] if others else []


def _split(report: Mapping[str, Any]) -> str:
    return SplitSettings.model_validate(report["spec"]["data"]["split"]).described


def _row(report: Mapping[str, Any]) -> dict[str, Any]:
    test, data = report["test"], report["data"]
    return {
        "study": report["study"],
        "split": _split(report),
        "trial": report["trial"],
        "training_rows": data["training_rows"],
        "validation_rows": data["validation_rows"],
        "test_rows": data["test_rows"],
        "validation_loss": report["validation_loss"],
        **{key: test[key] for key in _FIGURES},
        **{f"{key}_ci95": test[f"{key}_ci95"] for key in _FIGURES},
    }


_FIGURES = ("loss", "accuracy", "mcc", "roc_auc")
