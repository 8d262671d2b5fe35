"""The learning curve of a trial, and the one signature of everything that trains."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tuner.space import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochResult:
    """What one epoch brought. Losses: mean binary cross-entropy, nats, penalties left out."""

    epoch: int  #: completed epochs, counted from 1: Hyperband's resource
    training_loss: float  #: mean over the epoch's batches, with dropout active
    training_accuracy: float  #: fraction right, 0..1, over the same batches
    validation_loss: float
    validation_accuracy: float  #: fraction right at a threshold of 0.5, 0..1
    seconds: float  #: wall-clock time of the epoch, validation included


class Train(Protocol):
    """Trains one configuration: here (`tuner.training`) or on a worker (`tuner.cluster`)."""

    def __call__(
        self, config: ModelConfig, *, seed: int, trial: int, rungs: Sequence[int]
    ) -> Generator[EpochResult, None, None]:
        """Yields each epoch as it completes; closing the iterator stops the training.

        Args:
            config: What to train.
            seed: The study's seed; weights, shuffling and dropout derive from it and `trial`.
            trial: The trial's number.
            rungs: Epochs after which the caller may stop; a remote training waits there.

        Raises:
            TrialEndedError: The trial cannot go on (diverged, out of memory, over time).
        """
        ...
