"""Trains one configuration: the loop, its checkpoints, and `train` in this process.

An epoch is a few calls of one TensorFlow graph over tensors in memory: it is handed shuffled row
numbers and gathers its batches itself, so that no Python runs between two steps.

Why: `docs/decisions.md#why-are-the-optimisers-updates-our-own`.
"""

from __future__ import annotations

import copy
import io
import json
import math
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tuner.data.development import DevelopmentData, balanced_weights, mean_1
from tuner.errors import TrialEndedError
from tuner.metrics import area_under_curve
from tuner.network.keras_setup import memory_errors
from tuner.network.model import (
    build_model,
    keras,
    load_weights,
    logit_model,
    named_weights,
    set_keras,
    tf,
)
from tuner.spec.architecture import UNKNOWN_TOKEN, ModelConfig
from tuner.spec.spec import TrainingSettings
from tuner.train import VALIDATION_LOGITS, EpochResult, TrainingJob, best_epoch_of

STEPS_A_CALL = 64  # between two looks at the clock; in between, no Python runs
VALIDATION_BATCH = 512  # sequences; large enough for the kernels, small enough for the cache
ADAMW_WEIGHT_DECAY = 0.004  # a step, times the learning rate; Keras' default
SGD_MOMENTUM = 0.9  # Keras' default is none, with which these networks hardly move


class TensorData:
    """The development rows as tensors in memory, made once a process and shared by its trials.

    Of each split: tokens, uint8 [n, max_length], and labels, float32 [n], 0 or 1. Of the training
    rows also what each counts, in the mean 1, or None where all count the same.
    """

    def __init__(self, data: DevelopmentData) -> None:
        with memory_errors():
            self.training_tokens = tf.constant(data.training_tokens, tf.uint8)
            self.training_labels = tf.constant(data.training_labels, tf.float32)
            self.validation_tokens = tf.constant(data.validation_tokens, tf.uint8)
            self.validation_labels = tf.constant(data.validation_labels, tf.float32)
        self.training_weights = data.training_weights
        self.data = data
        #: Of the training rows, those that are trained on; None: all. Others are of the fold.
        self.rows: npt.NDArray[np.int64] | None = None
        self.has_unknown = any(
            bool((tokens == UNKNOWN_TOKEN).any())
            for tokens in (data.training_tokens, data.validation_tokens)
        )

    @classmethod
    def of_folds(cls, data: DevelopmentData) -> list[TensorData]:
        """The rows of each fold to validate on, and the others to train on; one copy serves all."""
        whole = cls(data)
        found = []
        for fold in range(data.fold_count):
            its = data.of_fold(fold)
            tensors = copy.copy(whole)
            with memory_errors():
                tensors.validation_tokens = tf.constant(its.validation_tokens, tf.uint8)
                tensors.validation_labels = tf.constant(its.validation_labels, tf.float32)
            tensors.rows = np.flatnonzero(data.folds != fold)
            found.append(tensors)
        return found

    @property
    def training_rows(self) -> int:
        return int(self.training_tokens.shape[0]) if self.rows is None else len(self.rows)

    @property
    def max_length(self) -> int:
        return int(self.training_tokens.shape[1])


class TrainingRun:
    """One trial's training, which can be put down after any epoch and taken up elsewhere.

    The same job, thread count and machine give the same curve bit for bit, whether or not a
    checkpoint lies in between: initial weights follow from (seed, trial), shuffling from (seed,
    trial, epoch), each dropout from (seed, trial, epoch, number of the dropout layer); the trial
    is `TrainingJob.seeded_as`.
    """

    history: list[EpochResult]  #: all epochs so far, those before the checkpoint included

    def __init__(
        self,
        data: TensorData,
        job: TrainingJob,
        *,
        checkpoint: bytes | None = None,
        fold: int | None = None,
    ) -> None:
        """Builds the network; takes up `checkpoint`, one of the same run, where there is one.

        Args:
            data: What to train and validate on.
            job: What to train, and how; the caller stops it at rungs.
            checkpoint: What `checkpoint` returned.
            fold: Of cross-validation, from 0: each has weights and chance of its own.

        Raises:
            TrialEndedError: The network does not fit into memory.
            ValueError: The checkpoint is damaged, or of another run.
            MemoryError: There is no room to open it.
        """
        self._data = data
        self._validation_labels = data.validation_labels.numpy().astype(np.uint8)  # [m]
        self._job = job
        self._config = job.config
        self._fold = fold
        self._seeds = (job.seed, job.seeded_as, *([] if fold is None else [fold]))
        # What the trial before leaves: its graphs are cycles, 10 MB if they are not collected, and
        # TensorFlow caches 36 kB for each of Keras' variables.
        if not fold:  # those of other folds are of this trial
            keras.utils.clear_session(free_memory=True)
        with _out_of_memory_ends_the_trial("building the network"):
            self._model = build_model(
                job.config,
                data.max_length,
                seed=_derived_seed(*self._seeds),
                precision=job.precision,
                fast=True,
                unknown=data.has_unknown,
            )
            # None: the graph is what it was before rows had weights.
            self._row_weights = _row_weights(data, job.settings)
            self._logits = logit_model(self._model)
            self._optimizer = _Optimizer(job.config, self._model.trainable_variables)
        self.history = []
        self._best_weights = named_weights(self._model)
        #: Of the validation rows in the best epoch, float32 [m]; none before the first epoch, and
        #: where that is in a checkpoint of an earlier version.
        self._best_logits: dict[str, Any] = {}
        if checkpoint is not None:
            with memory_errors():
                self._resume(checkpoint)

    @property
    def finished(self) -> bool:
        """No epoch is left: `max_epochs` is reached, or patience ran out."""
        return is_finished(self.history, self._job.settings)

    def epochs(self) -> Iterator[EpochResult]:
        """Trains; yields each new epoch as it completes.

        Raises:
            TrialEndedError: The trial cannot go on: diverged, out of memory, over time.
        """
        while not self.finished:
            best = min((result.validation_loss for result in self.history), default=math.inf)
            result, logits = self.train_epoch()
            if result.validation_loss < best:
                self._best_weights = named_weights(self._model)
                self._best_logits = {VALIDATION_LOGITS: logits}
            yield result

    def train_epoch(
        self, *, spent: float | None = None
    ) -> tuple[EpochResult, npt.NDArray[np.float32]]:
        """Trains one epoch more, whether or not patience ran out, and enters it in `history`.

        Args:
            spent: Seconds that the trial took so far; those of `history` if left out.

        Returns:
            The epoch, and the logits of the validation rows, float32 [m].

        Raises:
            TrialEndedError: See `epochs`.
        """
        number = len(self.history) + 1
        if spent is None:
            spent = sum(past.seconds for past in self.history)
        with _out_of_memory_ends_the_trial(f"epoch {number}"):
            result, logits = self._epoch(number, spent)
        self.history.append(result)
        return result, logits

    def packed_weights(self) -> bytes:
        """The weights of the last epoch, as npz: name -> array."""
        return packed(named_weights(self._model))

    def best_weights(self) -> bytes:
        """The weights of the epoch with the lowest validation loss, as npz: name -> array.

        Beside them the logits that they give to the validation rows: `VALIDATION_LOGITS`.
        """
        return packed(self._best_weights | self._best_logits)

    def checkpoint(self) -> bytes:
        """All that the rest of the training depends on, as npz; valid after any epoch."""
        return packed(
            {f"weights/{name}": array for name, array in named_weights(self._model).items()}
            | {f"best/{name}": array for name, array in self._best_weights.items()}
            | self._best_logits
            | {f"optimizer/{n}": v.numpy() for n, v in enumerate(self._optimizer.variables)}
            | {
                "run": np.array(self._identity()),
                "history": np.array(json.dumps([asdict(result) for result in self.history])),
            }
        )

    # One epoch.

    def _epoch(self, epoch: int, spent: float) -> tuple[EpochResult, npt.NDArray[np.float32]]:
        """Trains epoch `epoch` (from 1) and validates: result, logits of the validation rows."""
        started = time.monotonic()
        deadline = started + self._job.settings.max_trial_seconds - spent
        training_loss, training_accuracy = self._train_epoch(epoch, deadline)
        validation_loss, validation_accuracy, weights_finite, logits = (
            x.numpy() for x in self._validate()
        )
        if not (weights_finite and math.isfinite(validation_loss)):
            raise TrialEndedError("diverged", f"epoch {epoch}, validation loss {validation_loss}")
        result = EpochResult(
            epoch=epoch,
            training_loss=training_loss,
            training_accuracy=training_accuracy,
            validation_loss=float(validation_loss),
            validation_accuracy=float(validation_accuracy),
            # One sort of the validation rows: 0.2 ms for 2,000, next to seconds of training.
            validation_roc_auc=area_under_curve(self._validation_labels, logits.astype(np.float64)),
            seconds=time.monotonic() - started,
        )
        return result, logits

    def _train_epoch(self, epoch: int, deadline: float) -> tuple[float, float]:
        """One pass over the training rows, newly shuffled; mean loss and accuracy."""
        self._seed_dropout(epoch)
        rows = self._data.training_rows
        shuffled = np.random.default_rng([*self._seeds, epoch]).permutation(rows)
        if self._data.rows is not None:
            shuffled = self._data.rows[shuffled]
        loss_sum = right = 0.0
        rows_a_call = STEPS_A_CALL * self._config.batch_size
        for start in range(0, rows, rows_a_call):
            if time.monotonic() > deadline:
                raise TrialEndedError(
                    "over_time",
                    f"epoch {epoch}, {start} of {rows} rows trained when "
                    f"max_trial_seconds = {self._job.settings.max_trial_seconds:g} were over",
                )
            part = tf.constant(shuffled[start : start + rows_a_call], tf.int32)
            part_loss_sum, part_right, objective = self._train_rows(part)
            if not math.isfinite(objective):
                raise TrialEndedError(
                    "diverged", f"epoch {epoch}, training loss {float(objective)}"
                )
            loss_sum += float(part_loss_sum)
            right += float(part_right)
        return loss_sum / rows, right / rows

    # Both graphs are traced once, when they are first used.

    @cached_property
    def _train_rows(self) -> Any:
        set_keras()
        rows = tf.TensorSpec([None], tf.int32)
        return tf.function(self._train_rows_in_graph).get_concrete_function(rows)

    @cached_property
    def _validate(self) -> Any:
        set_keras()
        return tf.function(self._validate_in_graph).get_concrete_function()

    def _train_rows_in_graph(self, rows: Any) -> Any:
        """Steps over the training rows that `rows`, int32 [n], names; the last batch may be short.

        Returns:
            The sum of the losses without penalties, the number of rows on the right side, and the
            last step's objective: the first that is not finite ends the loop.
        """
        data, batch_size = self._data, self._config.batch_size
        loss_sum = tf.zeros((), tf.float64)
        right = tf.zeros((), tf.float64)
        start = tf.zeros((), tf.int32)
        objective = tf.zeros(())
        while tf.math.is_finite(objective) & (start < len(rows)):
            batch = rows[start : start + batch_size]
            labels = tf.gather(data.training_labels, batch)
            weights = None if self._row_weights is None else tf.gather(self._row_weights, batch)
            tokens = tf.gather(data.training_tokens, batch)
            losses, logits, objective = self._step(tokens, labels, weights)
            loss_sum += tf.reduce_sum(tf.cast(losses, tf.float64))
            right += _right(logits, labels)
            start += batch_size
        return loss_sum, right, objective

    def _step(self, tokens: Any, labels: Any, weights: Any) -> Any:
        """Takes one optimiser step; returns losses [batch], logits [batch] and the objective.

        Only in the objective rows have `weights`, [batch] or None.
        """
        with tf.GradientTape() as tape:
            logits = self._logits(tokens, training=True)[:, 0]
            losses = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
            weighted = losses if weights is None else losses * weights
            objective = tf.add_n([tf.reduce_mean(weighted), *self._logits.losses])
        gradients = tape.gradient(objective, self._model.trainable_variables)
        # The embedding's comes as slices, one a residue; Adam wants the square of their sum (of
        # slices, Keras 3's optimizers take the sum of the squares).
        self._optimizer.apply([tf.convert_to_tensor(gradient) for gradient in gradients])
        return losses, logits, objective

    def _validate_in_graph(self) -> Any:
        """Validates over all rows.

        Returns:
            Mean loss without penalties, accuracy, whether all weights are finite, and the logits,
            float32 [m].
        """
        data = self._data
        loss_sum = tf.zeros((), tf.float64)
        right = tf.zeros((), tf.float64)
        all_logits = tf.TensorArray(tf.float32, 0, dynamic_size=True, infer_shape=False)
        for start in tf.range(0, len(data.validation_labels), VALIDATION_BATCH):
            labels = data.validation_labels[start : start + VALIDATION_BATCH]
            tokens = data.validation_tokens[start : start + VALIDATION_BATCH]
            logits = self._logits(tokens, training=False)[:, 0]
            losses = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
            loss_sum += tf.reduce_sum(tf.cast(losses, tf.float64))
            right += _right(logits, labels)
            all_logits = all_logits.write(start // VALIDATION_BATCH, logits)
        # A maximum may drop a NaN, so the losses alone do not tell.
        finite = tf.reduce_all(
            [tf.reduce_all(tf.math.is_finite(weight)) for weight in self._model.weights]
        )
        rows = tf.cast(len(data.validation_labels), tf.float64)
        return loss_sum / rows, right / rows, finite, all_logits.concat()

    def _seed_dropout(self, epoch: int) -> None:
        # Keras does not save the state of its seed generators; so each epoch sets it anew.
        dropouts = [
            layer for layer in self._model.layers if isinstance(layer, keras.layers.Dropout)
        ]
        for number, dropout in enumerate(dropouts, start=1):
            seed = _derived_seed(*self._seeds, epoch, number)
            dropout.seed_generator.state.assign([seed, 0])

    # Checkpoints.

    def _identity(self) -> str:
        """What a checkpoint must share with the run that takes it up."""
        # Not where there are none: checkpoints of earlier versions have neither.
        chosen = {"fold": self._fold, "reshuffle": self._job.reshuffle}
        return json.dumps(
            {key: value for key, value in chosen.items() if value is not None}
            | {
                "config": asdict(self._job.config),
                "seed": self._job.seed,
                "trial": self._job.seeded_as,
                "precision": self._job.precision,
                "shape": self._data.training_tokens.shape.as_list(),
                "class_weights": self._job.settings.class_weights,
                "weights": self._data.training_weights is not None,
            }
        )

    def _resume(self, checkpoint: bytes) -> None:
        saved = unpacked(checkpoint)
        if not _is_the_same_run(json.loads(str(saved["run"])), json.loads(self._identity())):
            raise ValueError(
                f"the checkpoint is of another run: {saved['run']}; this one is {self._identity()}"
            )
        self.history = [
            EpochResult.from_document(result) for result in json.loads(str(saved["history"]))
        ]
        load_weights(self._model, {name: saved[f"weights/{name}"] for name in self._best_weights})
        for number, variable in enumerate(self._optimizer.variables):
            variable.assign(saved[f"optimizer/{number}"])
        self._best_weights = {name: saved[f"best/{name}"] for name in self._best_weights}
        if VALIDATION_LOGITS in saved:
            self._best_logits = {VALIDATION_LOGITS: saved[VALIDATION_LOGITS]}


def _is_the_same_run(saved: Any, own: Any) -> bool:
    """Whether a checkpoint's identity is that of a run.

    What the checkpoint lacks came with a later version, and the study says for it what the version
    that wrote the checkpoint did (`tuner.search.formats`).
    """
    if isinstance(saved, dict) and isinstance(own, dict):
        return saved.keys() <= own.keys() and all(
            _is_the_same_run(value, own[key]) for key, value in saved.items()
        )
    if isinstance(saved, list) and isinstance(own, list):
        return len(saved) == len(own) and all(map(_is_the_same_run, saved, own))
    return bool(saved == own)


def is_finished(history: Sequence[EpochResult], settings: TrainingSettings) -> bool:
    """No epoch is left: `max_epochs` is reached, or patience ran out."""
    best = best_epoch_of(history)
    waited = 0 if best is None else len(history) - best.epoch
    return len(history) >= settings.max_epochs or (
        settings.patience is not None and waited >= settings.patience
    )


def configure_tensorflow(threads: int) -> None:
    """Sets the threads of one operation; once a process, before its first operation.

    One process per core with one thread each beats one process with many threads. With more than
    one, operations whose result depends on their threads' order are replaced or refused.
    """
    if tf.config.threading.get_intra_op_parallelism_threads() != threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    if threads > 1:
        tf.config.experimental.enable_op_determinism()


class _Optimizer:
    """Keras' update rules with Keras' defaults (SGD: momentum 0.9) in one kernel a weight.

    Keras' own `apply` takes a dozen small kernels a weight, and registers a gradient function with
    TensorFlow for good: that keeps the graph of every trial in memory.
    """

    def __init__(self, config: ModelConfig, weights: Sequence[Any]) -> None:
        self._name = config.optimizer
        self._rate = config.learning_rate
        # `weights` are Keras'; a kernel takes TensorFlow's variable in each.
        self._weights = [weight.value for weight in weights]
        slots = 1 if self._name == "sgd" else 2
        self._slots = [
            [tf.Variable(tf.zeros_like(weight)) for _ in range(slots)] for weight in self._weights
        ]
        self._steps = tf.Variable(0, dtype=tf.int64)

    @property
    def variables(self) -> list[Any]:
        """All state: steps taken, and the slots of each weight."""
        return [self._steps, *(slot for slots in self._slots for slot in slots)]

    def apply(self, gradients: Sequence[Any]) -> None:
        """Takes one step; `gradients` in the order of the weights."""
        steps = tf.cast(self._steps.assign_add(1), tf.float32)
        decay1, decay2 = tf.pow(0.9, steps), tf.pow(0.999, steps)
        for weight, slots, gradient in zip(self._weights, self._slots, gradients, strict=True):
            if self._name == "adamw":
                weight.assign_sub(weight * (self._rate * ADAMW_WEIGHT_DECAY))
            handles = [slot.handle for slot in slots]
            if self._name == "sgd":
                tf.raw_ops.ResourceApplyKerasMomentum(
                    var=weight.handle,
                    accum=handles[0],
                    lr=self._rate,
                    grad=gradient,
                    momentum=SGD_MOMENTUM,
                )
            elif self._name == "rmsprop":
                tf.raw_ops.ResourceApplyRMSProp(
                    var=weight.handle,
                    ms=handles[0],
                    mom=handles[1],
                    lr=self._rate,
                    rho=0.9,
                    momentum=0.0,
                    epsilon=1e-7,
                    grad=gradient,
                )
            else:
                tf.raw_ops.ResourceApplyAdam(
                    var=weight.handle,
                    m=handles[0],
                    v=handles[1],
                    beta1_power=decay1,
                    beta2_power=decay2,
                    lr=self._rate,
                    beta1=0.9,
                    beta2=0.999,
                    epsilon=1e-7,
                    grad=gradient,
                )


def _row_weights(data: TensorData, settings: TrainingSettings) -> Any:
    """What each training row counts, float32 [n]; None where all count the same.

    In the mean over the rows that are trained on it is 1; other rows count nothing.
    """
    weights = data.training_weights
    labels = data.training_labels.numpy()
    if data.rows is not None:
        labels = labels[data.rows]
        weights = None if weights is None else mean_1(weights[data.rows])
    if settings.class_weights == "balanced":
        weights = balanced_weights(labels, weights)
    if weights is not None and data.rows is not None:
        of_all = np.zeros(len(data.training_labels), np.float32)
        of_all[data.rows] = weights
        weights = of_all
    return None if weights is None else tf.constant(weights, tf.float32)


def _derived_seed(*entropy: int) -> int:
    """A seed of 31 bits that follows from all of `entropy`."""
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)


def _right(logits: Any, labels: Any) -> Any:
    """How many of the logits [n] are on their label's side of a probability of 0.5; float64."""
    return tf.reduce_sum(tf.cast((logits > 0) == (labels > 0.5), tf.float64))


@contextmanager
def _out_of_memory_ends_the_trial(where: str) -> Iterator[None]:
    try:
        with memory_errors():
            yield
    except MemoryError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TrialEndedError("out_of_memory", f"{where}: {reason}") from error


def packed(arrays: Mapping[str, Any]) -> bytes:
    """An npz file of arrays."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def unpacked(content: bytes) -> dict[str, Any]:
    """The arrays of an npz file, every member checked.

    Raises:
        ValueError: It is damaged.
    """
    # First of all: an array's damaged head may ask for more memory than there is.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} in it is damaged")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)
