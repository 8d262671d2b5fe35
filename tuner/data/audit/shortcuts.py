"""Simple models: how far what needs no network gets.

They are fitted on training rows, and measured on rows that the caller chooses: validation rows in
the audit, also test rows in the report.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tuner.data.audit import features
from tuner.data.audit.packages import require_packages
from tuner.data.rows import Tokens
from tuner.errors import counted
from tuner.metrics import Floats, cross_entropy

#: A logit cannot be infinite where a label was never seen.
_PRIOR_ROWS = 1.0
#: Inverse strengths of the L2 penalty among which training rows choose.
_STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_HELD_OUT = 0.1  # of the training rows, to choose the strength by
_MAX_STEPS = 500
_FEW_ROWS = 200  # below them, trees are not stopped early: too few rows would decide

Labels: TypeAlias = npt.NDArray[np.uint8]
Weights: TypeAlias = npt.NDArray[np.float32]
Predict: TypeAlias = Callable[[Tokens], Floats]
Say: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortcut:
    """A fitted model."""

    name: str
    meaning: str  #: what it knows of a sequence
    predict: Predict  #: tokens [n, max_length] -> logits [n]


def fit_shortcuts(
    tokens: Tokens, labels: Labels, weights: Weights | None = None, *, say: Say | None = None
) -> tuple[Shortcut, ...]:
    """Fits all models on training rows. The same rows give the same models.

    Args:
        tokens: uint8 [n, max_length].
        labels: [n], 0 or 1, both of them.
        weights: What each row counts, [n]; None: all the same.
        say: Takes a line before each model that takes seconds.

    Raises:
        SetupError: scikit-learn is missing.
    """
    require_packages("Fitting simple models", "sklearn")
    rows = _Rows(tokens, labels, weights)
    fitted = [
        Shortcut(
            name="majority class",
            meaning="the frequency of the labels in training",
            predict=_constant(rows),
        )
    ]
    for name, meaning, columns in (
        ("first residue", "the first residue", features.first_residue),
        ("both ends", f"the first and the last {features.ENDS} residues", features.both_ends),
        ("composition", "how frequent each residue is", features.composition),
        ("length", "the number of residues", features.length),
    ):
        predict = _linear(rows, columns)
        fitted.append(Shortcut(name=name, meaning=meaning, predict=predict))
    known = "both ends, composition, pairs of neighbours and length"
    for name, meaning, fit in (
        ("linear model", f"logistic regression with an L2 penalty on {known}", _linear_on_all),
        ("gradient boosting", f"boosted trees on {known}", _boosted_trees),
    ):
        if say is not None:
            say(f"Fitting the {name} on {counted(len(labels), 'training row')} ...")
        fitted.append(Shortcut(name=name, meaning=meaning, predict=fit(rows)))
    return tuple(fitted)


def _one_thread() -> AbstractContextManager[object]:
    """A block in which the libraries use one thread.

    More wait for each other in loops: where other processes train, ten times as long.
    """
    from threadpoolctl import threadpool_limits  # noqa: PLC0415 - as scikit-learn, an extra

    limits: AbstractContextManager[object] = threadpool_limits(1)
    return limits


@dataclass(frozen=True, slots=True)
class _Rows:
    tokens: Tokens
    labels: Labels
    weights: Weights | None

    def part(self, rows: slice) -> _Rows:
        weights = None if self.weights is None else self.weights[rows]
        return _Rows(self.tokens[rows], self.labels[rows], weights)


def _constant(rows: _Rows) -> Predict:
    counts = np.bincount(rows.labels, weights=rows.weights, minlength=2) + _PRIOR_ROWS
    logit = float(np.log(counts[1] / counts[0]))
    return lambda tokens: np.full(len(tokens), logit)


def _linear_on_all(rows: _Rows) -> Predict:
    return _linear(rows, features.everything)


def _linear(rows: _Rows, columns: Callable[[Tokens], features.Features]) -> Predict:
    """Logistic regression on standardised features.

    Of several strengths of the penalty, the one is taken that is best on the last tenth of the
    training rows: by their hash, they are in a random order.
    """
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415 - takes a second

    scaler = StandardScaler(copy=False)
    known = scaler.fit_transform(columns(rows.tokens))
    model = _logistic_regression(_best_strength(rows, known), known, rows.labels, rows.weights)
    del known

    def predict(tokens: Tokens) -> Floats:
        logits: Floats = model.decision_function(scaler.transform(columns(tokens)))
        return logits.astype(np.float64)

    return predict


def _best_strength(rows: _Rows, known: features.Features) -> float:
    count = len(rows.labels) - round(_HELD_OUT * len(rows.labels))
    fit, held_out = rows.part(slice(count)), rows.part(slice(count, None))
    if len(np.unique(fit.labels)) < 2 or not len(held_out.labels):
        return _STRENGTHS[0]

    def loss(strength: float) -> float:
        model = _logistic_regression(strength, known[:count], fit.labels, fit.weights)
        logits = model.decision_function(known[count:]).astype(np.float64)
        return float(cross_entropy(held_out.labels, logits).mean())

    return min(_STRENGTHS, key=loss)


def _logistic_regression(
    strength: float, known: features.Features, labels: Labels, weights: Weights | None
) -> Any:
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415 - as above
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    with warnings.catch_warnings(), _one_thread():
        # Short of the optimum is as good a baseline: a weak penalty is not the best, either.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=strength, max_iter=_MAX_STEPS)
        return model.fit(known, labels, sample_weight=weights)


def _boosted_trees(rows: _Rows) -> Predict:
    from sklearn.ensemble import HistGradientBoostingClassifier  # noqa: PLC0415 - as above

    columns = features.everything_for_trees
    known = columns(rows.tokens)
    enough = len(rows.labels) >= _FEW_ROWS
    model = HistGradientBoostingClassifier(
        learning_rate=0.05,
        max_iter=500 if enough else 50,
        early_stopping=enough,
        validation_fraction=_HELD_OUT,
        n_iter_no_change=20,
        categorical_features=range(known.shape[1] - 2 * features.ENDS, known.shape[1]),
        random_state=0,
    )
    with _one_thread():
        model.fit(known, rows.labels, sample_weight=rows.weights)

    def predict(tokens: Tokens) -> Floats:
        with _one_thread():
            return np.asarray(model.decision_function(columns(tokens)), dtype=np.float64)

    return predict
