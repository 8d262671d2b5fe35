"""Greedy ensemble selection, and what it gains on rows that did not choose it."""

from __future__ import annotations

import numpy as np
import pytest

from tuner.results.ensemble import HALVINGS, mean_probability, select


def loss(probability: np.ndarray, labels: np.ndarray) -> float:
    right = np.where(labels == 1, probability, 1 - probability)
    return float(-np.log(right).mean())


def noisy_networks(networks: int, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [networks, rows] of one signal with each network's own noise, and labels."""
    generator = np.random.default_rng(seed)
    signal = generator.normal(size=rows)
    labels = (generator.uniform(size=rows) < 1 / (1 + np.exp(-signal))).astype(np.uint8)
    logits = signal + generator.normal(size=(networks, rows))
    return 1 / (1 + np.exp(-logits)), labels


def test_each_pick_is_the_one_with_which_the_mean_is_best() -> None:
    probabilities, labels = noisy_networks(4, 60)
    counts, best, chosen = np.zeros(4), np.inf, np.zeros(4)
    for _ in range(5):
        after = [
            loss((counts + np.eye(4)[one]) @ probabilities / (counts.sum() + 1), labels)
            for one in range(4)
        ]
        counts += np.eye(4)[int(np.argmin(after))]
        if min(after) < best:
            best, chosen = min(after), counts.copy()
    found = select(probabilities, labels, picks=5)
    assert found.counts == tuple(chosen.astype(int).tolist())
    assert found.selected_loss == pytest.approx(best)


def test_the_ensemble_ends_at_the_number_of_picks_that_is_best() -> None:
    labels = np.array([1, 0, 1, 0, 1, 0], np.uint8)
    good = np.where(labels == 1, 0.9, 0.1)
    found = select(np.stack([good, 1 - good]), labels, picks=10)
    # Ten picks of the good one are the same ensemble as one.
    assert found.members == ((0, 1.0),)
    assert found.counts == (1, 0)


def test_networks_with_independent_noise_gain_by_their_mean() -> None:
    probabilities, labels = noisy_networks(8, 2_000)
    found = select(probabilities, labels)
    assert found.cross_fitted is not None
    assert found.cross_fitted.gain > 0
    assert found.cross_fitted.gain == pytest.approx(
        found.cross_fitted.single_loss - found.cross_fitted.ensemble_loss
    )
    mean = mean_probability(probabilities, found.members)
    assert loss(mean, labels) == pytest.approx(found.selected_loss)
    assert loss(mean, labels) < min(loss(one, labels) for one in probabilities) - 0.02


def test_a_gain_that_is_chance_alone_is_not_believed() -> None:
    """Networks that know nothing: whatever is selected looks better than it is."""
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, 400).astype(np.uint8)
    found = select(generator.uniform(0.2, 0.8, size=(50, 400)), labels)
    assert found.cross_fitted is not None
    assert found.selected_loss < np.log(2)
    assert found.cross_fitted.ensemble_loss > np.log(2)
    assert found.cross_fitted.halvings == HALVINGS


def test_the_same_input_gives_the_same_selection() -> None:
    probabilities, labels = noisy_networks(5, 200)
    assert select(probabilities, labels) == select(probabilities, labels)


def test_too_few_rows_to_halve_give_no_estimate() -> None:
    labels = np.array([1, 0, 0], np.uint8)
    found = select(np.array([[0.9, 0.2, 0.1]]), labels)
    assert found.cross_fitted is None
    assert found.members == ((0, 1.0),)


def test_a_certain_network_that_is_wrong_has_a_finite_loss() -> None:
    labels = np.array([1, 0, 1, 0], np.uint8)
    found = select(np.array([[0.0, 1.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]]), labels)
    assert found.members == ((1, 1.0),)
    assert np.isfinite(select(np.array([[0.0, 1.0, 0.0, 1.0]]), labels).selected_loss)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 4)])
def test_nothing_to_choose_from_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="probabilities"):
        select(np.full(shape, 0.5), np.array([1, 0, 1], np.uint8))
