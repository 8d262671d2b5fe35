"""Loss, accuracy, MCC and AUC against brute force and published values, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner import metrics
from tuner.metrics import Metrics, cross_entropy, measure, roc_curve, wilson_interval

# Probabilities in eighths, so that ties and the threshold itself come up often.
Rows = list[tuple[int, float]]
ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 8).map(lambda eighths: eighths / 8)),
    min_size=1,
    max_size=30,
)


def measured(rows: Sequence[tuple[int, float]], *, resamples: int = 20) -> Metrics:
    labels, probabilities = (np.array(column) for column in zip(*rows, strict=True))
    return measure(labels.astype(np.uint8), probabilities.astype(np.float64), resamples=resamples)


def drawn(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, n).astype(np.uint8)
    return labels, np.clip(generator.normal(0.4 + 0.2 * labels, 0.2), 0.05, 0.95)


@given(ROWS)
def test_auc_is_the_share_of_pairs_in_the_right_order_ties_counting_half(rows: Rows) -> None:
    soluble = [probability for label, probability in rows if label == 1]
    insoluble = [probability for label, probability in rows if label == 0]
    wins = [(high > low) + (high == low) / 2 for high in soluble for low in insoluble]
    found = measured(rows)
    if wins:
        assert found.roc_auc == pytest.approx(sum(wins) / len(wins))
    else:
        assert found.roc_auc is None
        assert found.roc_auc_ci95 is None


@given(ROWS)
def test_mcc_is_the_correlation_of_labels_and_predictions_and_0_where_undefined(
    rows: Rows,
) -> None:
    labels = [label for label, _ in rows]
    predicted = [int(probability > 0.5) for _, probability in rows]
    if len(set(labels)) == 2 and len(set(predicted)) == 2:
        assert measured(rows).mcc == pytest.approx(np.corrcoef(labels, predicted)[0, 1])
    else:
        assert measured(rows).mcc == 0


@given(ROWS)
def test_accuracy_and_confusion_matrix_count_the_rows(rows: Rows) -> None:
    found = measured(rows)
    right = sum((probability > 0.5) == (label == 1) for label, probability in rows)
    confusion = found.confusion
    assert found.accuracy == right / len(rows)
    assert confusion.true_positive + confusion.true_negative == right
    assert confusion.true_positive + confusion.false_negative == sum(label for label, _ in rows)
    assert confusion.true_positive + confusion.false_positive == sum(p > 0.5 for _, p in rows)
    low, high = found.accuracy_ci95
    assert 0 <= low <= found.accuracy <= high <= 1


@given(ROWS)
def test_the_roc_curve_encloses_the_auc(rows: Rows) -> None:
    labels = np.array([label for label, _ in rows], dtype=np.uint8)
    curve = roc_curve(labels, np.array([probability for _, probability in rows]))
    auc = measured(rows).roc_auc
    if auc is None:
        assert curve == ()
        return
    false, true = zip(*curve, strict=True)
    assert (curve[0], curve[-1]) == ((0, 0), (1, 1))
    assert np.trapezoid(true, false) == pytest.approx(auc)


def test_a_long_roc_curve_is_thinned_and_keeps_its_ends_and_shape() -> None:
    labels, probabilities = drawn(5_000, 1)
    curve = roc_curve(labels, probabilities, points=100)
    false, true = zip(*curve, strict=True)
    assert len(curve) == 100
    assert (curve[0], curve[-1]) == ((0, 0), (1, 1))
    auc = measure(labels, probabilities, resamples=2).roc_auc
    assert np.trapezoid(true, false) == pytest.approx(auc, abs=1e-3)


def test_the_loss_is_the_mean_cross_entropy_in_nats() -> None:
    found = measured([(1, 0.8), (0, 0.8), (1, 0.5)])
    assert found.loss == pytest.approx(-(math.log(0.8) + math.log(0.2) + math.log(0.5)) / 3)
    assert found.majority_accuracy == pytest.approx(2 / 3)


def test_a_sure_mistake_costs_much_but_not_infinitely_much() -> None:
    losses = cross_entropy(np.array([1, 0], np.uint8), np.array([0.0, 1.0]))
    assert losses == pytest.approx([-math.log(1e-7)] * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("right", "n", "interval"),
    [
        # R 4: prop.test(8, 10, correct = FALSE) and prop.test(0, 10, correct = FALSE)
        (8, 10, (0.4901625, 0.9433178)),
        (0, 10, (0.0, 0.2775328)),
        (10, 10, (0.7224672, 1.0)),
        # R. G. Newcombe (1998), table I, method 3: 81 of 263 and 15 of 148.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
    ],
)
def test_wilson_intervals_are_the_published_ones(
    right: int, n: int, interval: tuple[float, float]
) -> None:
    assert wilson_interval(right, n) == pytest.approx(interval, abs=5e-5)


def test_a_resample_by_weights_is_a_resample_by_rows() -> None:
    labels, probabilities = drawn(50, 2)
    weights = next(metrics._resampled(50, 3))
    assert weights.sum(axis=1) == pytest.approx([50] * 3)
    areas = metrics._weighted_auc(labels, probabilities, weights)
    mccs = metrics._mcc(weights @ metrics._outcomes(labels, probabilities))
    for drawn_often, area, mcc in zip(weights.astype(int), areas, mccs, strict=True):
        rows = np.repeat(np.arange(50), drawn_often)
        again = measure(labels[rows], probabilities[rows], resamples=2)
        assert (again.roc_auc, again.mcc) == pytest.approx((area, mcc))


def test_bootstrap_intervals_agree_with_the_formulas_for_many_rows() -> None:
    labels, probabilities = drawn(2_000, 3)
    found = measure(labels, probabilities)
    spread = cross_entropy(labels, probabilities).std() / math.sqrt(2_000)
    low, high = found.loss_ci95
    assert (low, high) == pytest.approx(
        (found.loss - 1.96 * spread, found.loss + 1.96 * spread), abs=0.25 * spread
    )
    # J. A. Hanley, B. J. McNeil (1982), equation 1, with their Q1 and Q2.
    area, positives = found.roc_auc, int(labels.sum())
    assert area is not None
    assert found.roc_auc_ci95 is not None
    q1, q2, negatives = area / (2 - area), 2 * area**2 / (1 + area), 2_000 - positives
    variance = area * (1 - area) + (positives - 1) * (q1 - area**2)
    variance += (negatives - 1) * (q2 - area**2)
    half = 1.96 * math.sqrt(variance / (positives * negatives))
    low, high = found.roc_auc_ci95
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert low < area < high


def test_resampling_in_parts_makes_all_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_CELLS_AT_ONCE", 25)
    parts = list(metrics._resampled(10, 7))
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    assert all((part.sum(axis=1) == 10).all() for part in parts)


def test_the_same_predictions_give_the_same_intervals() -> None:
    labels, probabilities = drawn(200, 4)
    assert measure(labels, probabilities) == measure(labels, probabilities)


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        ([], [], "n > 0"),
        ([1], [0.5, 0.5], "must both be"),
        ([2], [0.5], "neither 0 nor 1"),
        ([1], [1.5], "within 0..1"),
        ([1], [math.nan], "within 0..1"),
    ],
)
def test_what_is_no_prediction_is_refused(
    labels: list[int], probabilities: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure(np.array(labels, np.uint8), np.array(probabilities, np.float64))
