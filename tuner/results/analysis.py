"""What a report says of the winner beside its figures: baselines, calibration, where it is good.

All of it is computed in the opening that the figures are from, and recorded with them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuner.data.prepare import HeldOutRows
from tuner.errors import SetupError, is_outage, reason_of
from tuner.metrics import Floats
from tuner.results.baselines import Baseline, Tokens, baselines_document
from tuner.results.calibration import calibration, fitted_temperature
from tuner.results.choice import Chosen, predict_together
from tuner.results.kept import Evaluate
from tuner.results.subgroups import best_rows, by_length, by_similarity, without_ends

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """The logits of the test rows, float64 [n]."""

    winner: Floats
    ensemble: Floats | None  #: of the networks that are evaluated together, if there are any


def analyse(
    single: Chosen,
    rows: HeldOutRows,
    predicted: Predicted,
    baselines: Sequence[Baseline] | None,
    *,
    evaluate: Evaluate | None = None,
) -> dict[str, Any]:
    """What `report.json` holds of it: `baselines`, `calibration` and so on.

    Args:
        single: The winner.
        rows: The test rows.
        predicted: What the winner and the ensemble make of them.
        baselines: What was fitted before they were read; None where that was left out.
        evaluate: Predicts with trained weights.

    Raises:
        OSError: A file cannot be read now.
        MemoryError: There is no room to compute it.
    """
    try:
        return _analysis(single, rows, predicted, baselines, evaluate)
    except Exception as error:  # what the opening was for, the figures, must be recorded
        if is_outage(error):
            raise
        logger.exception("The winner could not be analysed beyond its figures.")
        return {"analysis_failed": reason_of(error)}


def _analysis(
    single: Chosen,
    rows: HeldOutRows,
    predicted: Predicted,
    baselines: Sequence[Baseline] | None,
    evaluate: Evaluate | None,
) -> dict[str, Any]:
    def predict(tokens: Tokens) -> Floats:
        return predict_together(single, tokens, evaluate)

    logits, development = predicted.winner, single.development
    network = single.networks[0]
    temperature = fitted_temperature(network.labels, network.logits)
    try:
        similarity = by_similarity(rows.labels, logits, rows.tokens, development.training_tokens)
    except SetupError:  # SciPy is missing
        similarity = None
    return {
        "baselines": None
        if baselines is None
        else baselines_document(
            baselines, development, rows.tokens, rows.labels, logits, predicted.ensemble
        ),
        "calibration": {
            "test": calibration(rows.labels, logits).to_document(),
            "temperature": temperature,
            "test_with_temperature": calibration(rows.labels, logits / temperature).to_document(),
        },
        "best_rows": best_rows(rows.labels, logits),
        "by_length": by_length(rows.labels, logits, rows.tokens),
        "by_similarity": similarity,
        "ends": without_ends(rows.labels, rows.tokens, predict),
    }
