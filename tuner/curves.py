"""The learning curve of a trial, and the one signature of everything that trains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

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

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """The epoch that `dataclasses.asdict` wrote, by this version or another.

        What another version left out has its default, or is not a number; what only another
        version knows is left out.
        """
        fields = dataclasses.fields(cls)
        missing = {
            one.name: math.nan
            for one in fields
            if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        }
        known = {one.name: document[one.name] for one in fields if one.name in document}
        return cls(**missing | known)


#: The fields of a row in a curve that an earlier version stored, by position.
_POSITIONS = (
    "epoch",
    "training_loss",
    "training_accuracy",
    "validation_loss",
    "validation_accuracy",
    "seconds",
)


def curve_document(curve: Iterable[EpochResult]) -> dict[str, list[Any]]:
    """A learning curve as plain values: for each field, by its name, the values of all epochs."""
    epochs = list(curve)
    return {
        field.name: [getattr(epoch, field.name) for epoch in epochs]
        for field in dataclasses.fields(EpochResult)
    }


def curve_from_document(
    document: Mapping[str, Sequence[Any]] | Sequence[Sequence[Any]],
) -> tuple[EpochResult, ...]:
    """The curve that `curve_document` wrote, or an earlier version: there a row for each epoch."""
    if isinstance(document, Mapping):
        rows = (
            dict(zip(document, row, strict=True)) for row in zip(*document.values(), strict=True)
        )
    else:
        rows = (dict(zip(_POSITIONS, row, strict=True)) for row in document)
    return tuple(map(EpochResult.from_document, rows))


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
