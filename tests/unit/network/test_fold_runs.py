"""What a trial trains on: folds side by side, or validation rows of its own."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from small_training import CONFIG, DATA, PLAIN, curve

from tuner.data.development import DevelopmentData
from tuner.errors import TrialEndedError
from tuner.metrics import cross_entropy
from tuner.network.fold_runs import FoldRuns, FoldTensors, LocalTraining, open_run, tensors_of
from tuner.network.predict import logits
from tuner.network.training import TensorData, TrainingRun, packed, unpacked
from tuner.spec.spec import TrainingSettings
from tuner.train import VALIDATION_LOGITS, EpochResult, TrainingJob, networks_in

TOKENS = np.concatenate([DATA.training_tokens, DATA.validation_tokens])
LABELS = np.concatenate([DATA.training_labels, DATA.validation_labels])
FOLDS = (np.arange(len(LABELS)) % 3 // 2).astype(np.uint8)  # of 67 and 33 rows
WEIGHTS = np.random.default_rng(1).uniform(0.5, 2, len(LABELS)).astype(np.float32)


def development(**changes: Any) -> DevelopmentData:
    data = DevelopmentData(
        training_tokens=TOKENS,
        training_labels=LABELS,
        validation_tokens=TOKENS,
        validation_labels=LABELS,
        folds=FOLDS,
    )
    return dataclasses.replace(data, **changes)


@pytest.fixture(scope="module")
def tensors() -> FoldTensors:
    return FoldTensors(development())


def fold_job(config: Any = CONFIG, **settings: Any) -> TrainingJob:
    its = TrainingSettings(**{"max_epochs": 3, "patience": None} | settings)
    return TrainingJob(config=config, trial=7, seed=3, precision="float32", rungs=(), settings=its)


@pytest.fixture(scope="module")
def undisturbed(tensors: FoldTensors) -> FoldRuns:
    run = FoldRuns(tensors, fold_job())
    list(run.epochs())
    return run


def test_an_epoch_is_the_mean_over_the_folds(undisturbed: FoldRuns) -> None:
    assert [one.epoch for one in undisturbed.history] == [1, 2, 3]
    for number, epoch in enumerate(undisturbed.history):
        its = [run.history[number] for run in undisturbed._runs]
        assert epoch.fold_losses == tuple(one.validation_loss for one in its)
        assert epoch.validation_loss == pytest.approx(np.mean(epoch.fold_losses))
        assert epoch.seconds == pytest.approx(sum(one.seconds for one in its))
    assert len(set(undisturbed.history[0].fold_losses or ())) == 2


def test_a_resumed_trial_is_the_undisturbed_one(
    tensors: FoldTensors, undisturbed: FoldRuns
) -> None:
    first = FoldRuns(tensors, fold_job())
    list(itertools.islice(first.epochs(), 2))
    resumed = FoldRuns(tensors, fold_job(), checkpoint=first.checkpoint())
    assert curve(resumed.history) == curve(first.history)
    list(resumed.epochs())
    assert curve(resumed.history) == curve(undisturbed.history)
    for one, other in zip(
        networks_in(resumed.best_weights()), networks_in(undisturbed.best_weights()), strict=True
    ):
        ours, theirs = unpacked(one), unpacked(other)
        assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_fold_is_trained_as_by_itself() -> None:
    """The rows are shared: what a fold computes is what it computes with its own rows alone."""
    data = development(training_weights=WEIGHTS)
    job = fold_job(max_epochs=1, class_weights="balanced")
    (epoch,) = FoldRuns(FoldTensors(data), job).epochs()
    for fold in range(2):
        alone = TrainingRun(TensorData(data.of_fold(fold)), job, fold=fold)
        result, _ = alone.train_epoch()
        assert epoch.fold_losses is not None
        assert result.validation_loss == pytest.approx(epoch.fold_losses[fold], abs=1e-6)


def test_what_is_kept_predicts_each_row_without_having_seen_it(tensors: FoldTensors) -> None:
    run = FoldRuns(tensors, fold_job(PLAIN))
    list(run.epochs())
    kept = run.best_weights()
    recorded = unpacked(kept)[VALIDATION_LOGITS]
    losses = cross_entropy(LABELS, recorded.astype(np.float64))
    best = min(run.history, key=lambda epoch: epoch.validation_loss)
    for fold, network in enumerate(networks_in(kept)):
        inside = fold == FOLDS
        assert logits(PLAIN, network, TOKENS[inside]) == pytest.approx(recorded[inside], abs=1e-5)
        assert best.fold_losses is not None
        assert losses[inside].mean() == pytest.approx(best.fold_losses[fold], abs=1e-6)


def made_up(*means: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs with these mean losses; fold 0 is best at the first, whatever the mean."""

    def epoch_of(run: TrainingRun, epoch: int, _spent: float) -> tuple[EpochResult, np.ndarray]:
        loss = epoch / 10 if run._fold == 0 else 2 * means[epoch - 1] - epoch / 10
        embeddings = run._model.get_layer("embedding").embeddings
        embeddings.assign(np.full(embeddings.shape, epoch))
        rows = len(run._validation_labels)
        result = EpochResult(
            epoch=epoch, training_loss=0.5, training_accuracy=0.5, validation_loss=loss,
            validation_accuracy=0.5, seconds=1.0,
        )  # fmt: skip
        return result, np.full(rows, epoch, np.float32)

    monkeypatch.setattr(TrainingRun, "_epoch", epoch_of)


def test_the_mean_decides_what_is_kept_and_when_patience_is_out(
    tensors: FoldTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(0.7, 0.6, 0.5, 0.55, 0.6, 0.4, monkeypatch=monkeypatch)
    run = FoldRuns(tensors, fold_job(max_epochs=9, patience=2))
    list(run.epochs())
    assert len(run.history) == 5
    assert (unpacked(run.best_weights())[VALIDATION_LOGITS] == 3).all()
    for network in networks_in(run.best_weights()):
        assert (unpacked(network)["embedding/embeddings"] == 3).all()


def test_the_time_of_a_trial_is_that_of_all_folds(tensors: FoldTensors) -> None:
    with pytest.raises(TrialEndedError, match="fold 1 of 2: epoch 1, 0 of 33 rows") as caught:
        list(FoldRuns(tensors, fold_job(max_trial_seconds=1e-9)).epochs())
    assert caught.value.reason == "over_time"


def test_a_checkpoint_of_other_folds_is_refused(tensors: FoldTensors) -> None:
    first = FoldRuns(tensors, fold_job())
    list(itertools.islice(first.epochs(), 1))
    three = FoldTensors(development(folds=(np.arange(len(FOLDS)) % 3).astype(np.uint8)))
    with pytest.raises(ValueError, match="another number of folds"):
        FoldRuns(three, fold_job(), checkpoint=first.checkpoint())
    saved = unpacked(first.checkpoint())
    saved["fold0"], saved["fold1"] = saved["fold1"], saved["fold0"]
    with pytest.raises(ValueError, match="of another run"):
        FoldRuns(tensors, fold_job(), checkpoint=packed(saved))
    with pytest.raises(KeyError):
        open_run(tensors_of(DATA), fold_job(), checkpoint=first.checkpoint())


def test_a_notebook_trains_folds_too() -> None:
    (epoch,) = LocalTraining(development())(fold_job(PLAIN, max_epochs=1))
    assert len(epoch.fold_losses or ()) == 2


# --- validation rows of a trial's own ---


def test_a_trial_that_reshuffles_validates_on_rows_of_its_own_and_resumes_on_them() -> None:
    tensors = tensors_of(DATA)
    job = dataclasses.replace(fold_job(), reshuffle=1)
    whole = open_run(tensors, job)
    list(whole.epochs())
    its = DATA.reshuffled(1, 7)
    found = logits(CONFIG, whole.best_weights(), its.validation_tokens)
    assert unpacked(whole.best_weights())[VALIDATION_LOGITS] == pytest.approx(found, abs=1e-5)
    first = open_run(tensors, job)
    list(itertools.islice(first.epochs(), 1))
    resumed = open_run(tensors, job, checkpoint=first.checkpoint())
    list(resumed.epochs())
    assert curve(resumed.history) == curve(whole.history)
    with pytest.raises(ValueError, match="of another run"):
        open_run(tensors, fold_job(), checkpoint=first.checkpoint())
