"""The learning curve of a trial, and the one signature of everything that trains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from tuner.spec.architecture import ModelConfig

#: Attributes of a trial: numbers that the dashboard sorts and draws by, and exports list.
PARAMETERS_KEY = "parameters"  # of the network
BEST_EPOCH_KEY = "best_epoch"  # the first with the lowest validation loss
ACCURACY_KEY = "validation_accuracy"  # of the best epoch, 0..1
ROC_AUC_KEY = "validation_roc_auc"  # of the best epoch, 0..1
EPOCHS_KEY = "epochs"  # trained
SECONDS_KEY = "training_seconds"  # of all epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochResult:
    """What one epoch brought. Losses: mean binary cross-entropy, nats, penalties left out."""

    epoch: int  #: completed epochs, counted from 1: Hyperband's resource
    training_loss: float  #: mean over the epoch's batches, with dropout active
    training_accuracy: float  #: fraction right, 0..1, over the same batches
    validation_loss: float
    validation_accuracy: float  #: fraction right at a threshold of 0.5, 0..1
    seconds: float  #: wall-clock time of the epoch, validation included
    #: Area under the ROC curve, 0..1; None where all rows have one label, and in curves of earlier
    #: versions.
    validation_roc_auc: float | None = None

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


def figures_of(curve: Sequence[EpochResult]) -> dict[str, float]:
    """What a training reached and cost, as attributes of its trial; what is unknown is left out."""
    figures: dict[str, float | None] = {
        EPOCHS_KEY: len(curve),
        SECONDS_KEY: sum(epoch.seconds for epoch in curve),
    }
    best = min(curve, key=lambda epoch: epoch.validation_loss, default=None)
    if best is not None:
        figures[BEST_EPOCH_KEY] = best.epoch
        figures[ACCURACY_KEY] = best.validation_accuracy
        figures[ROC_AUC_KEY] = best.validation_roc_auc
    # JSON has no NaN, which stands in a curve for what another version did not record.
    return {
        key: figure
        for key, figure in figures.items()
        if figure is not None and math.isfinite(figure)
    }


class Train(Protocol):
    """Trains one configuration: here (`tuner.network`) or on a worker (`tuner.cluster`)."""

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
