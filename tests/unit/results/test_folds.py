"""Networks of cross-validation: validated by rows they did not see, and used together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from finished_study import storage_in, study_with_networks

from tuner.data.rows import decode_tokens
from tuner.errors import StudyError
from tuner.metrics import measure
from tuner.network.predict import logits
from tuner.results.bundle import read_bundle
from tuner.results.bundle_writer import configs_of, write_bundle
from tuner.results.choice import choose_ensemble, choose_trial, predict_together, recorded_ensemble
from tuner.results.ensemble import probability
from tuner.results.kept import evaluate_kept, read_development, read_kept_weights
from tuner.search.tuned_study import TunedStudy
from tuner.train import networks_in, weights_of_folds

SPLIT = {"seed": 1, "test": 0.2, "folds": 3}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TunedStudy]:
    with storage_in(tmp_path_factory.mktemp("storage")) as storage:
        data = {"source": "rows.csv", "split": SPLIT}
        yield study_with_networks(storage, tmp_path_factory.mktemp("project"), data=data)


def test_each_row_is_validated_by_the_network_that_did_not_train_on_it(tuned: TunedStudy) -> None:
    chosen, development = choose_trial(tuned, 1), read_development(tuned)
    (kept,) = chosen.networks
    assert development.folds is not None
    for fold, network in enumerate(networks_in(kept.weights)):
        inside = development.folds == fold
        its = logits(kept.config, network, development.training_tokens[inside])
        assert kept.logits[inside] == pytest.approx(its)
    assert kept.metrics == measure(development.training_labels, kept.logits)
    assert chosen.validation.n == len(development.folds)


def test_new_rows_are_predicted_by_the_networks_of_all_folds_together(tuned: TunedStudy) -> None:
    chosen, development = choose_trial(tuned, 1), read_development(tuned)
    tokens = development.training_tokens[:9]
    (kept,) = chosen.networks
    each = [probability(logits(kept.config, one, tokens)) for one in networks_in(kept.weights)]
    assert probability(predict_together(chosen, tokens)) == pytest.approx(np.mean(each, axis=0))


def test_a_bundle_has_the_networks_of_all_folds(tuned: TunedStudy, tmp_path: Path) -> None:
    chosen = choose_trial(tuned, 1)
    written = write_bundle(tuned, chosen, configs_of(chosen), tmp_path / "best")
    assert [(one["trial"], one["fold"]) for one in written["networks"]] == [(1, 1), (1, 2), (1, 3)]
    assert sum(one["share"] for one in written["networks"]) == pytest.approx(1)
    tokens = read_development(tuned).training_tokens[:9]
    together = probability(predict_together(chosen, tokens))
    found = read_bundle(tmp_path / "best").predict(decode_tokens(tokens))
    assert found == pytest.approx(together, abs=1e-6)
    card = (tmp_path / "best" / "README.md").read_text()
    assert "trial 1 fold 1 (33 %), trial 1 fold 2 (33 %), trial 1 fold 3 (33 %).\n" in card
    assert card.count("tuner launch trial-1.toml") == 1
    assert "They were cross-validated" in card


def test_an_ensemble_is_chosen_by_what_each_row_was_validated_with(tuned: TunedStudy) -> None:
    recorded, evaluated = recorded_ensemble(tuned), choose_ensemble(tuned)
    assert recorded is not None
    assert recorded.trials == evaluated.trials
    assert recorded.selection.selected_loss == pytest.approx(evaluated.validation.loss, abs=1e-6)


def test_networks_of_other_folds_are_refused(tuned: TunedStudy) -> None:
    trial, development = tuned.trials()[1], read_development(tuned)
    networks = networks_in(read_kept_weights(tuned, 1))
    path = tuned.artifacts.weights(1)
    before, none = path.read_bytes(), np.zeros(0, np.float32)
    try:
        path.write_bytes(weights_of_folds(networks[:2], none))
        with pytest.raises(StudyError, match="2 networks of 3 folds"):
            evaluate_kept(tuned, trial, development)
        path.write_bytes(weights_of_folds(networks[::-1], none))
        with pytest.raises(StudyError, match="is recorded with"):
            evaluate_kept(tuned, trial, development)
    finally:
        path.write_bytes(before)


def test_the_recorded_loss_is_the_mean_over_folds_of_any_size(tuned: TunedStudy) -> None:
    development = read_development(tuned)
    assert development.folds is not None
    uneven = np.minimum(np.arange(len(development.folds)) // 20, 2).astype(np.uint8)
    other = dataclasses.replace(development, folds=uneven)
    trial = tuned.trials()[1]
    with pytest.raises(StudyError, match="validation loss of") as caught:
        evaluate_kept(tuned, trial, other)
    networks = networks_in(read_kept_weights(tuned, 1))
    config = tuned.record.spec.space.resolve(trial.params)
    losses = [
        measure(
            other.training_labels[uneven == fold],
            logits(config, network, other.training_tokens[uneven == fold]),
        ).loss
        for fold, network in enumerate(networks)
    ]
    assert f"validation loss of {np.mean(losses):.4f}" in str(caught.value)
