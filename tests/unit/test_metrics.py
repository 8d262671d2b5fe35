"""Loss, accuracy, MCC and AUC against brute force and published values, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner import metrics
from tuner.metrics import (
    Metrics,
    cross_entropy,
    measure,
    mid_p_interval,
    roc_curve,
    small_split_warnings,
    wilson_interval,
)

# Whole logits, so that ties and the threshold itself come up often.
Rows = list[tuple[int, float]]
ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(-4, 4).map(float)),
    min_size=1,
    max_size=30,
)


def measured(rows: Sequence[tuple[int, float]], *, draws: int = 20) -> Metrics:
    labels, logits = (np.array(column) for column in zip(*rows, strict=True))
    return measure(labels.astype(np.uint8), logits.astype(np.float64), draws=draws)


def drawn(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, n).astype(np.uint8)
    return labels, generator.normal(labels - 0.5, 1.0)


@given(ROWS)
def test_auc_is_the_share_of_pairs_in_the_right_order_ties_counting_half(rows: Rows) -> None:
    soluble = [logit for label, logit in rows if label == 1]
    insoluble = [logit for label, logit in rows if label == 0]
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
    predicted = [int(logit > 0) for _, logit in rows]
    if len(set(labels)) == 2 and len(set(predicted)) == 2:
        assert measured(rows).mcc == pytest.approx(np.corrcoef(labels, predicted)[0, 1])
    else:
        assert measured(rows).mcc == 0


@given(ROWS)
def test_accuracy_and_confusion_matrix_count_the_rows(rows: Rows) -> None:
    found = measured(rows)
    right = sum((logit > 0) == (label == 1) for label, logit in rows)
    confusion = found.confusion
    assert found.accuracy == right / len(rows)
    assert confusion.true_positive + confusion.true_negative == right
    assert confusion.true_positive + confusion.false_negative == sum(label for label, _ in rows)
    assert confusion.true_positive + confusion.false_positive == sum(x > 0 for _, x in rows)
    low, high = found.accuracy_ci95
    assert 0 <= low <= found.accuracy <= high <= 1


@given(ROWS)
def test_the_roc_curve_encloses_the_auc(rows: Rows) -> None:
    labels = np.array([label for label, _ in rows], dtype=np.uint8)
    curve = roc_curve(labels, np.array([logit for _, logit in rows]))
    auc = measured(rows).roc_auc
    if auc is None:
        assert curve == ()
        return
    false, true = zip(*curve, strict=True)
    assert (curve[0], curve[-1]) == ((0, 0), (1, 1))
    assert np.trapezoid(true, false) == pytest.approx(auc)


def test_a_long_roc_curve_is_thinned_and_keeps_its_ends_and_shape() -> None:
    labels, logits = drawn(5_000, 1)
    curve = roc_curve(labels, logits, points=100)
    false, true = zip(*curve, strict=True)
    assert len(curve) == 100
    assert (curve[0], curve[-1]) == ((0, 0), (1, 1))
    auc = measure(labels, logits, draws=2).roc_auc
    assert np.trapezoid(true, false) == pytest.approx(auc, abs=1e-3)


def test_the_loss_is_the_mean_cross_entropy_in_nats() -> None:
    found = measured([(1, math.log(4)), (0, math.log(4)), (1, 0.0)])  # 0.8, 0.8 and 0.5
    assert found.loss == pytest.approx(-(math.log(0.8) + math.log(0.2) + math.log(0.5)) / 3)
    assert found.majority_accuracy == pytest.approx(2 / 3)


def test_a_sure_mistake_costs_its_logit_however_large() -> None:
    losses = cross_entropy(np.array([1, 0, 1], np.uint8), np.array([-800.0, 1e30, 800.0]))
    assert losses.tolist() == [800.0, 1e30, 0.0]


def test_mid_p_intervals_hold_for_rare_events() -> None:
    low, high = mid_p_interval(0, 10)
    assert (low, high) == (0.0, pytest.approx(1 - 0.05**0.1))  # by hand: (1 - p)^10 = 0.05
    assert mid_p_interval(10, 10) == (pytest.approx(0.05**0.1), 1.0)
    low, high = mid_p_interval(5, 10)
    assert low == pytest.approx(1 - high)
    intervals = [mid_p_interval(right, 16) for right in range(17)]
    for p in np.linspace(0.005, 0.5, 50):
        held = sum(
            math.comb(16, right) * p**right * (1 - p) ** (16 - right)
            for right, (low, high) in enumerate(intervals)
            if low <= p <= high
        )
        assert held > 0.92
    assert mid_p_interval(3, 5000)[1] < 0.002


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


def test_intervals_agree_with_the_formulas_for_many_rows() -> None:
    labels, logits = drawn(2_000, 3)
    found = measure(labels, logits)
    spread = cross_entropy(labels, logits).std() / math.sqrt(2_000)
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


def test_drawing_in_parts_makes_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, logits = drawn(10, 5)
    whole = measure(labels, logits, draws=7)
    monkeypatch.setattr(metrics, "_CELLS_AT_ONCE", 25)
    in_parts = measure(labels, logits, draws=7)
    low, high = in_parts.loss_ci95
    assert low < in_parts.loss < high
    assert in_parts.mcc_ci95 == whole.mcc_ci95


COVERED = (0.9, 0.985)  #: of 95 %: few rows have few possible outcomes
REPETITIONS, DRAWS = 500, 400


def coverage(n: int, right: float, soluble: float = 0.5) -> dict[str, float]:
    """How often each interval holds the figure of the population behind `n` rows.

    Rows have a logit of 3 towards their label with the probability `right`, else as far away.
    """
    generator = np.random.default_rng([n, round(1000 * right), round(100 * soluble)])
    cells = np.array([soluble * right, (1 - soluble) * (1 - right)])
    cells = np.array([*cells, soluble * (1 - right), (1 - soluble) * right])
    truths = {
        "accuracy": right,
        "mcc": float(metrics._mcc(cells[np.newaxis])[0]),
        "loss": right * math.log1p(math.exp(-3)) + (1 - right) * math.log1p(math.exp(3)),
        "roc_auc": right,  # of two logits: the mean of both rates
    }
    hits, counted = dict.fromkeys(truths, 0), dict.fromkeys(truths, 0)
    for _ in range(REPETITIONS):
        labels = (generator.random(n) < soluble).astype(np.uint8)
        towards = np.where(generator.random(n) < right, 3.0, -3.0)
        found = measure(labels, np.where(labels == 1, towards, -towards), draws=DRAWS)
        for name, truth in truths.items():
            interval = getattr(found, f"{name}_ci95")
            if interval is not None:
                low, high = interval
                counted[name] += 1
                hits[name] += low - 1e-9 <= truth <= high + 1e-9
    return {name: hits[name] / counted[name] for name in truths}


@pytest.mark.parametrize("n", [27, 100])
@pytest.mark.parametrize("right", [0.5, 0.9, 0.99])
def test_intervals_cover_the_truth_in_95_of_100_sets_of_few_rows(n: int, right: float) -> None:
    covered = coverage(n, right)
    assert all(COVERED[0] <= share for share in covered.values()), covered
    exact = {name: share for name, share in covered.items() if name != "roc_auc"}
    assert all(share <= COVERED[1] for share in exact.values()), covered


@pytest.mark.parametrize("n", [5, 27, 100])
def test_intervals_of_a_perfect_score_hold_the_truth_and_more(n: int) -> None:
    assert set(coverage(n, 1.0).values()) == {1.0}


def test_27_rows_without_a_mistake_do_not_prove_a_perfect_network() -> None:
    labels = np.array([1] * 14 + [0] * 13, np.uint8)
    found = measure(labels, np.where(labels == 1, 4.0, -4.0))
    assert found.accuracy == found.mcc == found.roc_auc == 1.0
    for low, high in (found.accuracy_ci95, found.mcc_ci95, found.roc_auc_ci95):
        assert 0.7 < low < 0.95
        assert high == 1.0
    low, high = found.loss_ci95
    assert low <= found.loss == pytest.approx(math.log1p(math.exp(-4)))
    assert high > 10 * found.loss  # a mistake costs 4 nats
    assert set(found.to_document()["method"]) == {"loss", "accuracy", "mcc", "roc_auc"}


def test_the_worst_score_has_the_mirrored_intervals() -> None:
    labels = np.array([1] * 14 + [0] * 13, np.uint8)
    found = measure(labels, np.where(labels == 1, -4.0, 4.0))
    assert found.mcc == -1.0
    assert found.mcc_ci95[0] == -1.0
    assert found.roc_auc_ci95 == pytest.approx((0.0, 1 - metrics.auc_interval(1.0, 14, 13)[0]))


def test_rows_of_one_label_say_nothing_of_mcc_and_auc() -> None:
    found = measured([(1, 2.0), (1, -1.0), (1, 3.0)])
    assert (found.mcc, found.mcc_ci95) == (0.0, (-1.0, 1.0))
    assert (found.roc_auc, found.roc_auc_ci95) == (None, None)


def test_logits_that_differ_where_probabilities_of_float32_are_1_are_ranked() -> None:
    assert measured([(1, 40.0), (0, 20.0)]).roc_auc == 1.0


@pytest.mark.parametrize(("validation", "test", "said"), [(99, 100, 1), (100, 27, 1), (8, 3, 2)])
def test_splits_too_small_to_choose_or_to_judge_by_are_warned_of(
    validation: int, test: int, said: int
) -> None:
    warnings = small_split_warnings(validation, test)
    assert len(warnings) == said
    smaller = min(validation, test)
    # The standard error of a proportion is largest at a half.
    error = 100 * math.sqrt(0.25 / smaller)
    assert any(f"only {smaller} " in each and f" {error:.1f} percent" in each for each in warnings)


def test_the_same_predictions_give_the_same_intervals() -> None:
    labels, logits = drawn(200, 4)
    assert measure(labels, logits) == measure(labels, logits)


@pytest.mark.parametrize(
    ("labels", "logits", "message"),
    [
        ([], [], "n > 0"),
        ([1], [0.5, 0.5], "must both be"),
        ([2], [0.5], "neither 0 nor 1"),
        ([1], [math.inf], "finite"),
        ([1], [math.nan], "finite"),
    ],
)
def test_what_is_no_prediction_is_refused(
    labels: list[int], logits: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure(np.array(labels, np.uint8), np.array(logits, np.float64))
