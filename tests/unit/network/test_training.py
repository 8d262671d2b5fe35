from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from fakes import small_job
from folders import ROOT, TESTS
from small_training import (
    CONFIG,
    DATA,
    MAX_LENGTH,
    PLAIN,
    ROWS,
    curve,
    training_run,
)

from tuner.data.development import DevelopmentData
from tuner.errors import TrialEndedError
from tuner.metrics import cross_entropy
from tuner.network import training
from tuner.network.fold_runs import LocalTraining
from tuner.network.model import build_model, keras, load_weights, logit_model, tf
from tuner.network.predict import logits
from tuner.network.training import TensorData, TrainingRun
from tuner.spec.architecture import ModelConfig
from tuner.spec.spec import TrainingSettings
from tuner.train import VALIDATION_LOGITS, EpochResult


@pytest.fixture(scope="module")
def tensors() -> TensorData:
    return TensorData(DATA)


LOGITS = np.zeros(len(DATA.validation_labels), np.float32)


def replay(results: list[EpochResult], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets epochs have these results instead of training."""
    monkeypatch.setattr(TrainingRun, "_epoch", lambda run, epoch, _: (results[epoch - 1], LOGITS))


def made_up(*validation_losses: float) -> list[EpochResult]:
    return [
        EpochResult(
            epoch=epoch,
            training_loss=0.6,
            training_accuracy=0.5,
            validation_loss=loss,
            validation_accuracy=0.5,
            seconds=10.0,
        )
        for epoch, loss in enumerate(validation_losses, start=1)
    ]


@pytest.fixture(scope="module")
def undisturbed(tensors: TensorData) -> TrainingRun:
    """Four epochs of CONFIG, trained through."""
    run = training_run(tensors)
    assert [result.epoch for result in run.epochs()] == [1, 2, 3, 4]
    assert run.finished
    return run


def test_the_same_run_gives_the_same_curve_and_weights_bit_for_bit(
    tensors: TensorData, undisturbed: TrainingRun
) -> None:
    again = training_run(tensors)
    assert curve(list(again.epochs())) == curve(undisturbed.history)
    assert again.best_weights() == undisturbed.best_weights()


def test_seed_and_trial_each_change_the_curve(
    tensors: TensorData, undisturbed: TrainingRun
) -> None:
    for changes in ({"seed": 4}, {"trial": 8}):
        other = next(training_run(tensors, **changes).epochs())
        assert other.validation_loss != undisturbed.history[0].validation_loss


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_resumed_run_equals_an_undisturbed_one(
    tensors: TensorData, undisturbed: TrainingRun, epochs: int
) -> None:
    first = training_run(tensors)
    list(itertools.islice(first.epochs(), epochs))
    second = training_run(tensors, checkpoint=first.checkpoint())
    assert second.history == first.history
    assert [result.epoch for result in second.epochs()] == list(range(epochs + 1, 5))
    assert curve(second.history) == curve(undisturbed.history)
    assert second.best_weights() == undisturbed.best_weights()


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop", "sgd"])
def test_every_optimizers_state_is_in_the_checkpoint(tensors: TensorData, optimizer: str) -> None:
    config = dataclasses.replace(PLAIN, optimizer=optimizer)
    first = training_run(tensors, config, max_epochs=2)
    epochs = first.epochs()
    next(epochs)
    second = training_run(tensors, config, max_epochs=2, checkpoint=first.checkpoint())
    assert curve(list(second.epochs())) == curve(list(epochs))


def test_another_process_gives_the_same_curve(undisturbed: TrainingRun, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    script.write_text(
        "import dataclasses, json\n"
        "from small_training import DATA, training_run\n"
        "from tuner.network.training import TensorData, configure_tensorflow\n"
        f"if {threads}: configure_tensorflow({threads})\n"
        "run = training_run(TensorData(DATA), max_epochs=2)\n"
        "print(json.dumps([dataclasses.asdict(result) for result in run.epochs()]))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{TESTS}", "CUDA_VISIBLE_DEVICES": ""},
    )
    results = [EpochResult(**result) for result in json.loads(done.stdout)]
    assert curve(results) == curve(undisturbed.history[:2])
    assert done.stderr == ""  # TensorFlow is quiet


def test_a_checkpoint_of_another_run_is_refused(tensors: TensorData) -> None:
    checkpoint = training_run(tensors).checkpoint()
    with pytest.raises(ValueError, match=r'another run.*"trial": 7.*"trial": 8'):
        training_run(tensors, trial=8, checkpoint=checkpoint)


def test_a_checkpoint_whose_history_lacks_a_field_or_has_one_more_is_resumed(
    tensors: TensorData,
) -> None:
    first = training_run(tensors)
    next(first.epochs())
    saved = training.unpacked(first.checkpoint())
    history = json.loads(str(saved["history"]))
    history[0]["of_a_later_version"] = history[0].pop("training_accuracy")
    saved["history"] = np.array(json.dumps(history))
    second = training_run(tensors, checkpoint=training.packed(saved))
    assert second.history[0].validation_loss == first.history[0].validation_loss
    assert next(second.epochs()).epoch == 2


def with_identity(checkpoint: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The checkpoint of a version whose runs had another identity."""
    saved = training.unpacked(checkpoint)
    identity = json.loads(str(saved["run"]))
    change(identity)
    saved["run"] = np.array(json.dumps(identity))
    return training.packed(saved)


@pytest.mark.parametrize(
    "lack",
    [
        lambda identity: identity["config"].pop("masking"),
        lambda identity: identity["config"]["blocks"][0].pop("residual"),
        lambda identity: identity.pop("precision"),
    ],
)
def test_a_checkpoint_of_a_version_without_a_key_is_resumed(
    tensors: TensorData, lack: Callable[[dict[str, Any]], object]
) -> None:
    first = training_run(tensors)
    next(first.epochs())
    second = training_run(tensors, checkpoint=with_identity(first.checkpoint(), lack))
    assert len(second.history) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda identity: identity["config"].update(of_a_later_version=1),
        lambda identity: identity["config"]["blocks"][0].update(residual="add"),
        lambda identity: identity["config"]["blocks"].append(identity["config"]["blocks"][0]),
    ],
)
def test_a_checkpoint_with_a_key_that_is_unknown_or_differs_is_refused(
    tensors: TensorData, change: Callable[[dict[str, Any]], object]
) -> None:
    checkpoint = with_identity(training_run(tensors).checkpoint(), change)
    with pytest.raises(ValueError, match="of another run"):
        training_run(tensors, checkpoint=checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4},
        {"precision": "bfloat16"},
        {"config": dataclasses.replace(CONFIG, learning_rate=0.01)},  # the same shapes
        {"config": dataclasses.replace(CONFIG, bias_l2=1e-3)},
    ],
    ids=str,
)
def test_a_checkpoint_of_another_configuration_or_precision_is_refused(
    tensors: TensorData, changes: dict[str, Any]
) -> None:
    checkpoint = training_run(tensors).checkpoint()
    with pytest.raises(ValueError, match="of another run"):
        training_run(tensors, **changes, checkpoint=checkpoint)


def train_nothing(results: list[EpochResult], monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs with these results, each of which marks weights and logits with its number."""

    def epoch_of(run: TrainingRun, epoch: int, _spent: float) -> tuple[EpochResult, np.ndarray]:
        embeddings = run._model.get_layer("embedding").embeddings
        embeddings.assign(np.full(embeddings.shape, epoch))
        return results[epoch - 1], np.full(len(DATA.validation_labels), epoch, np.float32)

    monkeypatch.setattr(TrainingRun, "_epoch", epoch_of)


def marked_by(run: TrainingRun) -> int:
    """The epoch whose weights and logits are kept as the best."""
    kept = training.unpacked(run.best_weights())
    epoch = int(kept["embedding/embeddings"][0, 0])
    assert (kept[VALIDATION_LOGITS] == epoch).all()
    return epoch


def test_of_equal_losses_the_weights_of_the_first_epoch_stay(
    tensors: TensorData, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_nothing(made_up(0.7, 0.6, 0.6, 0.6), monkeypatch)
    run = training_run(tensors)
    list(run.epochs())
    assert marked_by(run) == 2


@pytest.mark.parametrize(("after", "best"), [(3, 2), (4, 2), (5, 5)])
def test_best_weights_outlive_a_resumption_after_worse_epochs(
    tensors: TensorData, monkeypatch: pytest.MonkeyPatch, after: int, best: int
) -> None:
    train_nothing(made_up(0.7, 0.5, 0.6, 0.55, 0.4, 0.45), monkeypatch)
    first = training_run(tensors, max_epochs=after)
    list(first.epochs())
    resumed = training_run(tensors, max_epochs=after, checkpoint=first.checkpoint())
    assert resumed.finished
    assert marked_by(resumed) == best
    last = training_run(tensors, max_epochs=6, checkpoint=resumed.checkpoint())
    list(last.epochs())
    assert marked_by(last) == 5
    # What it trains on with is the last epoch, not the best one.
    assert int(training.unpacked(first.checkpoint())["weights/embedding/embeddings"][0, 0]) == (
        after
    )


def test_a_checkpoint_of_an_earlier_version_has_no_logits_and_is_resumed(
    tensors: TensorData, undisturbed: TrainingRun
) -> None:
    first = training_run(tensors)
    list(itertools.islice(first.epochs(), 2))
    saved = training.unpacked(first.checkpoint())
    del saved[VALIDATION_LOGITS]
    resumed = training_run(tensors, checkpoint=training.packed(saved))
    assert VALIDATION_LOGITS not in training.unpacked(resumed.best_weights())
    list(resumed.epochs())
    assert curve(resumed.history) == curve(undisturbed.history)


def test_it_learns_and_best_weights_are_those_of_the_best_epoch(
    tensors: TensorData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "VALIDATION_BATCH", 7)  # several batches, the last one short
    run = training_run(tensors, dataclasses.replace(PLAIN, learning_rate=0.05), max_epochs=8)
    best = min(run.epochs(), key=lambda result: result.validation_loss)
    assert best.epoch < 8
    assert best.validation_loss < 0.5
    predicted = logits(PLAIN, run.best_weights(), DATA.validation_tokens)
    assert predicted.dtype == np.float64
    recorded = training.unpacked(run.best_weights())[VALIDATION_LOGITS]
    np.testing.assert_allclose(recorded, predicted, rtol=1e-4, atol=1e-5)
    losses = cross_entropy(DATA.validation_labels, predicted)
    assert losses.mean() == pytest.approx(best.validation_loss, rel=1e-5)
    right = (predicted > 0) == (DATA.validation_labels == 1)
    assert right.mean() == pytest.approx(best.validation_accuracy)
    soluble = DATA.validation_labels == 1
    pairs = predicted[soluble][:, np.newaxis] - predicted[~soluble]
    expected = (pairs > 0).mean() + (pairs == 0).mean() / 2
    assert 0.5 < best.validation_roc_auc == pytest.approx(expected, abs=1e-6)


def test_the_evaluation_counts_losses_as_training_does_however_large_the_logits() -> None:
    values = np.array([-1e30, -1e6, -100.0, -17.0, -3.0, 0.0, 3.0, 16.0, 16.7, 88.0, 1e6, 1e30])
    for label in (0, 1):
        labels = np.full(len(values), label, np.uint8)
        in_training = tf.nn.sigmoid_cross_entropy_with_logits(
            tf.constant(labels, tf.float32), tf.constant(values, tf.float32)
        )
        np.testing.assert_allclose(
            cross_entropy(labels, values), in_training, rtol=1e-6, atol=1e-30
        )


def test_a_network_of_large_logits_has_its_validation_loss_again(tensors: TensorData) -> None:
    config = dataclasses.replace(PLAIN, learning_rate=30.0)
    run = training_run(tensors, config, max_epochs=1)
    (result,) = run.epochs()
    predicted = logits(config, run.best_weights(), DATA.validation_tokens)
    assert np.abs(predicted).max() > 100
    losses = cross_entropy(DATA.validation_labels, predicted)
    assert losses.mean() == pytest.approx(result.validation_loss, rel=1e-4)


def reference_epoch(
    config: ModelConfig,
    seed: int,
    trial: int,
    data: DevelopmentData = DATA,
    weights_of_rows: np.ndarray | None = None,
) -> tuple[keras.Model, float, float]:
    """The first epoch as Keras would train it, a step at a time: model, mean loss, accuracy."""
    unknown = bool((data.training_tokens == 21).any())
    seed_of_weights = training._derived_seed(seed, trial)
    model = build_model(config, MAX_LENGTH, seed=seed_of_weights, unknown=unknown)
    logits_of = logit_model(model)
    optimizer: Any = {
        "adam": keras.optimizers.Adam,
        "adamw": keras.optimizers.AdamW,
        "rmsprop": keras.optimizers.RMSprop,
        "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
    }[config.optimizer](config.learning_rate)
    loss_sum, right = 0.0, 0
    shuffled = np.random.default_rng([seed, trial, 1]).permutation(ROWS)
    for start in range(0, ROWS, config.batch_size):
        batch = shuffled[start : start + config.batch_size]
        labels = data.training_labels[batch].astype(np.float32)
        with tf.GradientTape() as tape:
            logits = logits_of(data.training_tokens[batch], training=True)[:, 0]
            each = keras.losses.binary_crossentropy(labels[:, None], logits[:, None], True)
            loss = tf.reduce_mean(each)
            counted = each if weights_of_rows is None else each * weights_of_rows[batch]
            objective = tf.reduce_mean(counted) + sum(logits_of.losses)
        weights = model.trainable_variables
        # Dense: of slices, Keras 3 adds up the squares where Adam squares the sum.
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(objective, weights)]
        optimizer.apply(gradients, weights)
        loss_sum += float(loss) * len(batch)
        right += int(((logits.numpy() > 0) == (labels == 1)).sum())
    return model, loss_sum / ROWS, right / ROWS


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop", "sgd"])
def test_an_epoch_is_what_keras_trains_step_by_step_last_batch_included(
    tensors: TensorData, optimizer: str
) -> None:
    # So the losses are free of penalties, and the penalties are in the gradients.
    block = dataclasses.replace(PLAIN.blocks[0], normalization="layer", conv_l2=0.1)
    config = dataclasses.replace(PLAIN, optimizer=optimizer, blocks=(block,))
    run = training_run(tensors, config, max_epochs=1)
    (result,) = run.epochs()
    model, loss, accuracy = reference_epoch(config, seed=3, trial=7)
    assert result.training_loss == pytest.approx(loss, rel=1e-5)
    assert result.training_accuracy == pytest.approx(accuracy)
    trained = training.unpacked(run.best_weights())
    for weight in model.weights:
        np.testing.assert_allclose(
            trained[weight.path], weight.numpy(), rtol=1e-3, atol=1e-5, err_msg=weight.path
        )


OWN_WEIGHTS = np.linspace(0.5, 1.5, ROWS).astype(np.float32)


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
@pytest.mark.parametrize("own", [None, OWN_WEIGHTS], ids=["equal", "weighted"])
def test_rows_count_in_the_objective_alone(own: np.ndarray | None, class_weights: Any) -> None:
    tokens = DATA.training_tokens.copy()
    tokens[::4, 2] = 21
    data = dataclasses.replace(DATA, training_weights=own, training_tokens=tokens)
    settings = TrainingSettings(max_epochs=1, patience=None, class_weights=class_weights)
    run = training_run(TensorData(data), PLAIN, settings=settings)
    (result,) = run.epochs()
    wanted = own
    if class_weights == "balanced":
        wanted = np.ones(ROWS, np.float32) if own is None else own.copy()
        for label in (0, 1):
            rows = data.training_labels == label
            wanted[rows] *= ROWS / 2 / wanted[rows].sum()
    model, loss, accuracy = reference_epoch(PLAIN, 3, 7, data, wanted)
    assert result.training_loss == pytest.approx(loss, rel=1e-5)
    assert result.training_accuracy == pytest.approx(accuracy)
    trained = training.unpacked(run.best_weights())
    for weight in model.weights:
        np.testing.assert_allclose(
            trained[weight.path], weight.numpy(), rtol=1e-3, atol=1e-5, err_msg=weight.path
        )
    found = logits(PLAIN, run.best_weights(), DATA.validation_tokens)
    losses = cross_entropy(DATA.validation_labels, found)
    assert result.validation_loss == pytest.approx(losses.mean(), rel=1e-5)


def test_a_checkpoint_knows_how_rows_count(tensors: TensorData, undisturbed: TrainingRun) -> None:
    checkpoint = undisturbed.checkpoint()
    balanced = TrainingSettings(max_epochs=4, patience=None, class_weights="balanced")
    with pytest.raises(ValueError, match="of another run"):
        training_run(tensors, settings=balanced, checkpoint=checkpoint)
    weighted = TensorData(dataclasses.replace(DATA, training_weights=OWN_WEIGHTS))
    with pytest.raises(ValueError, match="of another run"):
        training_run(weighted, checkpoint=checkpoint)
    assert training_run(tensors, checkpoint=checkpoint).finished


def test_bfloat16_trains_too(tensors: TensorData) -> None:
    config = dataclasses.replace(CONFIG, activity_l2=1e-3)
    (result,) = training_run(tensors, config, precision="bfloat16", max_epochs=1).epochs()
    assert 0.4 < result.validation_loss < 1.5


def test_patience_counts_epochs_without_a_strictly_lower_validation_loss(
    tensors: TensorData, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay(made_up(0.7, 0.6, 0.6, 0.61, 0.5), monkeypatch)
    patient = training_run(tensors, patience=3, max_epochs=5)
    assert len(list(patient.epochs())) == 5
    impatient = training_run(tensors, patience=2, max_epochs=5)
    assert len(list(impatient.epochs())) == 4
    assert impatient.finished
    resumed = training_run(tensors, patience=2, max_epochs=5, checkpoint=impatient.checkpoint())
    assert resumed.finished
    assert list(resumed.epochs()) == []


@pytest.mark.parametrize("learning_rate", [1e30, float("nan")])
def test_a_diverged_trial_ends_at_once_and_says_where(
    tensors: TensorData, learning_rate: float
) -> None:
    run = training_run(tensors, dataclasses.replace(CONFIG, learning_rate=learning_rate))
    with pytest.raises(TrialEndedError, match=r"diverged: epoch 1, training loss (nan|inf)"):
        list(run.epochs())
    steps = int(run._optimizer.variables[0])
    assert steps < ROWS / CONFIG.batch_size  # not at the end of the epoch
    assert run.history == []


def test_weights_that_are_no_numbers_are_found_where_the_losses_are_finite(
    tensors: TensorData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingRun, "_train_epoch", lambda *_: (0.6, 0.5))
    run = training_run(tensors)
    run._model.get_layer("embedding").embeddings[0].assign([np.nan] * 4)  # masked: no loss sees it
    with pytest.raises(TrialEndedError, match=r"diverged: epoch 1, validation loss 0\."):
        list(run.epochs())


@pytest.mark.parametrize(
    "error",
    [MemoryError(), tf.errors.ResourceExhaustedError(None, None, "OOM when allocating a tensor")],
)
def test_a_trial_that_runs_out_of_memory_ends(
    tensors: TensorData, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    run = training_run(tensors)
    monkeypatch.setattr(TrainingRun, "_train_epoch", fail)
    with pytest.raises(TrialEndedError, match=r"out_of_memory: epoch 1: (OOM|MemoryError)"):
        list(run.epochs())
    monkeypatch.setattr(training, "build_model", fail)
    with pytest.raises(TrialEndedError, match="out_of_memory: building the network: "):
        training_run(tensors)


def test_a_trial_over_its_time_ends_and_time_before_the_checkpoint_counts(
    tensors: TensorData, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        replay(made_up(0.7, 0.6), patch)  # 10 s each
        first = training_run(tensors)
        list(itertools.islice(first.epochs(), 2))
    second = training_run(tensors, checkpoint=first.checkpoint(), max_trial_seconds=19.9)
    with pytest.raises(TrialEndedError, match=r"over_time: epoch 3, 0 of 70 rows.*19\.9"):
        list(second.epochs())


def test_an_epoch_ends_in_its_middle_when_the_time_is_over(
    tensors: TensorData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "STEPS_A_CALL", 1)
    clock = itertools.count(start=0.0, step=10.0)
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    run = training_run(tensors, PLAIN, max_trial_seconds=25.0)
    with pytest.raises(TrialEndedError, match="over_time: epoch 1, 32 of 70 rows"):
        list(run.epochs())


def test_local_training_is_a_generator_of_epochs_that_can_be_closed() -> None:
    epochs = LocalTraining(DATA)(small_job(config=PLAIN))
    first = next(epochs)
    assert first.epoch == 1
    epochs.close()
    assert next(epochs, None) is None


def test_weights_of_another_network_are_refused(tensors: TensorData) -> None:
    weights = training_run(tensors, PLAIN).best_weights()
    with pytest.raises(ValueError, match="another network: block1_norm/beta"):
        logits(CONFIG, weights, DATA.validation_tokens)
    wider = dataclasses.replace(PLAIN, embedding_dim=5)
    with pytest.raises(ValueError, match="another network: block1_conv/kernel"):
        load_weights(build_model(wider, MAX_LENGTH), training.unpacked(weights))


def test_no_sequences_give_no_logits(tensors: TensorData) -> None:
    weights = training_run(tensors, PLAIN).best_weights()
    assert logits(PLAIN, weights, DATA.validation_tokens[:0]).shape == (0,)


def test_a_new_run_frees_the_graphs_of_the_one_before(tensors: TensorData) -> None:
    def graphs() -> int:
        return sum(type(thing).__name__.endswith("FuncGraph") for thing in gc.get_objects())

    training_run(tensors)  # what other tests left
    before = graphs()
    run = training_run(tensors, max_epochs=1)
    list(run.epochs())
    assert graphs() > before
    del run
    training_run(tensors)
    assert graphs() <= before


@pytest.mark.skipif(not hasattr(psutil, "heap_info"), reason="this system does not tell")
def test_runs_leave_nothing_on_the_heap(tensors: TensorData) -> None:
    def used() -> int:
        gc.collect()
        heap = psutil.heap_info()
        return heap.heap_used + heap.mmap_used

    for _ in range(5):  # fill what is kept once for all
        training_run(tensors)
    before = used()
    for _ in range(10):
        training_run(tensors)
    # TensorFlow kept 36 kB a variable: 150 kB a run of this network.
    assert used() - before < 10 * 36_000
