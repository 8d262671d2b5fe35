"""Cross-validation of one configuration: a network for each fold, an epoch of each in turn.

So an epoch of the trial is one of every fold. Its losses are means over the folds: rungs compare
them as those of any trial, and the trial ends where their mean is best.

Why: `docs/decisions.md#why-do-the-folds-of-a-trial-train-side-by-side`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from tuner.data.development import DevelopmentData
from tuner.errors import TrialEndedError
from tuner.network.keras_setup import memory_errors
from tuner.network.training import (
    TensorData,
    TrainingRun,
    is_finished,
    packed,
    unpacked,
)
from tuner.train import (
    EpochResult,
    TrainingJob,
    fold_key,
    mean_of_folds,
    weights_of_folds,
)


class FoldTensors:
    """The development rows as tensors, and which of them are in which fold."""

    def __init__(self, data: DevelopmentData) -> None:
        """Takes data that has folds."""
        if data.folds is None:
            raise ValueError("the development rows have no folds")
        self.folds = TensorData.of_folds(data)
        self.fold_of_row = data.folds


class FoldRuns:
    """One trial's trainings over all folds: a run as `tuner.cluster.training_task` wants one."""

    history: list[EpochResult]  #: all epochs so far, means over the folds

    def __init__(
        self, data: FoldTensors, job: TrainingJob, *, checkpoint: bytes | None = None
    ) -> None:
        """Builds the networks; see `TrainingRun`."""
        self._data = data
        self._job = job
        saved = {} if checkpoint is None else unpacked(checkpoint)
        if saved and fold_key(len(data.folds) - 1) not in saved:
            raise ValueError("the checkpoint is of another number of folds")
        self._runs = [
            TrainingRun(
                tensors,
                job,
                checkpoint=saved[fold_key(fold)].tobytes() if saved else None,
                fold=fold,
            )
            for fold, tensors in enumerate(data.folds)
        ]
        self.history = []
        self._best = b"" if not saved else saved["best"].tobytes()
        if saved:
            with memory_errors():
                self.history = [
                    EpochResult.from_document(one) for one in json.loads(str(saved["history"]))
                ]
        if any(len(run.history) != len(self.history) for run in self._runs):
            raise ValueError("the checkpoint's folds are of different epochs")

    @property
    def finished(self) -> bool:
        """No epoch is left: `max_epochs` is reached, or patience with the mean ran out."""
        return is_finished(self.history, self._job.settings)

    def epochs(self) -> Iterator[EpochResult]:
        """Trains; yields each new epoch as it is complete on all folds.

        Raises:
            TrialEndedError: The trial cannot go on: a fold diverged, out of memory, over time.
        """
        while not self.finished:
            best = min((one.validation_loss for one in self.history), default=math.inf)
            spent = sum(one.seconds for one in self.history)
            results, logits = [], np.zeros(len(self._data.fold_of_row), np.float32)
            for fold, run in enumerate(self._runs):
                try:
                    result, its_logits = run.train_epoch(spent=spent)
                except TrialEndedError as end:
                    number = f"fold {fold + 1} of {len(self._runs)}"
                    raise TrialEndedError(end.reason, f"{number}: {end.detail}") from end
                results.append(result)
                logits[self._data.fold_of_row == fold] = its_logits
                spent += result.seconds
            mean = mean_of_folds(results)
            if mean.validation_loss < best:
                self._best = weights_of_folds([run.packed_weights() for run in self._runs], logits)
            self.history.append(mean)
            yield mean

    def best_weights(self) -> bytes:
        """The networks of the epoch with the lowest mean loss: `tuner.train.weights_of_folds`."""
        return self._best

    def checkpoint(self) -> bytes:
        """All that the rest of the training depends on, as npz; valid after any epoch."""
        arrays: dict[str, Any] = {
            fold_key(fold): np.frombuffer(run.checkpoint(), np.uint8)
            for fold, run in enumerate(self._runs)
        }
        arrays["best"] = np.frombuffer(self._best, np.uint8)
        arrays["history"] = np.array(json.dumps([asdict(result) for result in self.history]))
        return packed(arrays)


def tensors_of(data: DevelopmentData) -> TensorData | FoldTensors:
    """What trainings on development rows share."""
    return TensorData(data) if data.folds is None else FoldTensors(data)


def open_run(
    data: TensorData | FoldTensors, job: TrainingJob, *, checkpoint: bytes | None = None
) -> TrainingRun | FoldRuns:
    """The training of a trial, on validation rows of its own where the job asks for that.

    Args:
        data: What `tensors_of` returned.
        job: What to train, and how.
        checkpoint: One of the same run, where there is one.
    """
    if isinstance(data, FoldTensors):
        return FoldRuns(data, job, checkpoint=checkpoint)
    if job.reshuffle is not None:
        data = TensorData(data.data.reshuffled(job.reshuffle, job.seeded_as))
    return TrainingRun(data, job, checkpoint=checkpoint)


class LocalTraining:
    """`Train` in this process."""

    def __init__(self, data: DevelopmentData) -> None:
        self._data = tensors_of(data)

    def __call__(self, job: TrainingJob) -> Generator[EpochResult, None, None]:
        """See `tuner.train.Train`. Nothing runs ahead of the caller, so rungs do not matter."""
        yield from open_run(self._data, job).epochs()
