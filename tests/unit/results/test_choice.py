"""Which kept networks a study uses: what is recorded decides, and what is better is measured."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from finished_study import storage_in, study_with_networks

from tuner.errors import StudyError
from tuner.metrics import measure
from tuner.network.predict import logits
from tuner.results import choice
from tuner.results.choice import (
    choose_best,
    choose_ensemble,
    choose_trial,
    mean_logits,
    recorded_ensemble,
)
from tuner.results.ensemble import CrossFitted, Selection
from tuner.results.kept import evaluate_kept, read_development
from tuner.search.tuned_study import TunedStudy
from tuner.train import VALIDATION_LOGITS


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TunedStudy]:
    with storage_in(tmp_path_factory.mktemp("storage")) as storage:
        yield study_with_networks(storage, tmp_path_factory.mktemp("project"))


@pytest.fixture(autouse=True)
def same_weights(tuned: TunedStudy) -> Iterator[None]:
    """The kept weights as they were, after each test."""
    folder: Path = tuned.artifacts.folder / "weights"
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    yield
    for path, content in kept.items():
        path.write_bytes(content)


def without_logits(tuned: TunedStudy, number: int) -> None:
    """The weights of a trial as an earlier version kept them."""
    path = tuned.artifacts.weights(number)
    with np.load(path) as arrays:
        kept = {name: arrays[name] for name in arrays.files if name != VALIDATION_LOGITS}
    file = io.BytesIO()
    np.savez(file, **kept)
    path.write_bytes(file.getvalue())


def test_recorded_predictions_choose_as_the_networks_do(tuned: TunedStudy) -> None:
    recorded = recorded_ensemble(tuned)
    assert recorded is not None
    for number in range(3):
        without_logits(tuned, number)
    evaluated = choose_ensemble(tuned)
    assert recorded.trials == evaluated.trials
    assert evaluated.selection is not None
    assert recorded.selection.counts == evaluated.selection.counts
    assert recorded.selection.selected_loss == pytest.approx(evaluated.validation.loss, abs=1e-6)


def test_trials_with_validation_rows_of_their_own_make_no_ensemble(tmp_path: Path) -> None:
    split = {"seed": 1, "validation": 0.2, "test": 0.2, "reshuffle": True}
    with storage_in(tmp_path) as storage:
        data = {"source": "rows.csv", "split": split}
        own = study_with_networks(storage, tmp_path, data=data)
        assert recorded_ensemble(own) is None
        with pytest.raises(StudyError, match=r"on rows of their own \(reshuffle\)"):
            choose_ensemble(own)
        best, development = copy.copy(own.ranked()[0]), read_development(own)
        with pytest.raises(StudyError, match="these weights have a validation loss of"):
            choose_trial(own, best.number)  # recorded is that of the file's validation rows
        its = development.reshuffled(1, best.number)
        config = own.record.spec.space.resolve(best.params)
        weights = own.artifacts.weights(best.number).read_bytes()
        expected = measure(its.validation_labels, logits(config, weights, its.validation_tokens))
        best.value = expected.loss
        kept = evaluate_kept(own, best, development)
        assert kept.metrics == expected == measure(kept.labels, kept.logits)


def test_what_was_recorded_needs_no_network(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("a network was evaluated")

    monkeypatch.setattr(choice, "evaluate_kept", refused)
    assert recorded_ensemble(tuned) is not None


@pytest.mark.parametrize("damage", ["earlier version", "cut", "other rows", "single"])
def test_without_predictions_of_all_networks_nothing_is_estimated(
    tuned: TunedStudy, damage: str
) -> None:
    path = tuned.artifacts.weights(1)
    match damage:
        case "earlier version":
            without_logits(tuned, 1)
        case "cut":
            path.write_bytes(path.read_bytes()[:-40])
        case "other rows":
            with np.load(path) as arrays:
                kept = dict(arrays)
            kept[VALIDATION_LOGITS] = kept[VALIDATION_LOGITS][1:]
            np.savez(path, **kept)
        case "single":
            tuned.artifacts.weights(0).unlink()
            path.unlink()
    assert recorded_ensemble(tuned) is None


@pytest.mark.parametrize(
    ("counts", "gain", "gain_sd", "better"),
    [
        ((1, 2), 0.01, 0.002, True),
        ((1, 2), 0.002, 0.002, False),
        ((1, 2), -0.01, 0.002, False),
        ((0, 3), 0.01, 0.002, False),
        ((1, 2), None, None, False),
    ],
)
def test_an_ensemble_is_better_by_more_than_halvings_vary(
    counts: tuple[int, int], gain: float, gain_sd: float, better: bool
) -> None:
    crossed = gain is not None and CrossFitted(
        ensemble_loss=0.6, single_loss=0.6 + gain, gain=gain, gain_sd=gain_sd, halvings=20
    )
    selection = Selection(counts=counts, selected_loss=0.5, cross_fitted=crossed or None)
    assert selection.is_better is better


@pytest.mark.parametrize("better", [True, False])
def test_the_estimate_decides_what_is_used(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch, better: bool
) -> None:
    monkeypatch.setattr(Selection, "is_better", better)
    chosen = choose_best(tuned)
    expected = choose_ensemble(tuned).trials if better else [tuned.ranked()[0].number]
    assert chosen.trials == expected
    assert (chosen.selection is not None) is better


def test_the_only_kept_network_is_used(tuned: TunedStudy) -> None:
    best, *others = (trial.number for trial in tuned.ranked())
    for number in others:
        tuned.artifacts.weights(number).unlink()
    assert choose_best(tuned).trials == [best]


def test_a_study_without_a_trained_trial_has_nothing_to_use(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TunedStudy, "ranked", lambda _: [])
    with pytest.raises(StudyError, match="no fully trained trial yet"):
        choose_best(tuned)


def test_the_mean_is_of_probabilities(tuned: TunedStudy) -> None:
    logits = [np.array([-2.0, 3.0, 0.0]), np.array([1.0, 3.0, -700.0])]
    probabilities = 1 / (1 + np.exp(-np.stack(logits)))
    found = 1 / (1 + np.exp(-mean_logits(logits, (0.25, 0.75))))
    np.testing.assert_allclose(found, 0.25 * probabilities[0] + 0.75 * probabilities[1])
    labels = read_development(tuned).validation_labels
    chosen = choose_ensemble(tuned)
    mean = mean_logits([one.logits for one in chosen.networks], chosen.shares)
    assert measure(labels, mean).loss == chosen.validation.loss
