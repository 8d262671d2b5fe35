"""What a training is asked for and what it yields: the one signature of everything that trains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from tuner.spec.architecture import ModelConfig
from tuner.spec.precision import Precision
from tuner.spec.spec import TrainingSettings

#: Attributes of a trial: numbers that the dashboard sorts and draws by, and exports list.
PARAMETERS_KEY = "parameters"  # of the network
BEST_EPOCH_KEY = "best_epoch"  # the first with the lowest validation loss
ACCURACY_KEY = "validation_accuracy"  # of the best epoch, 0..1
ROC_AUC_KEY = "validation_roc_auc"  # of the best epoch, 0..1
EPOCHS_KEY = "epochs"  # trained
SECONDS_KEY = "training_seconds"  # of all epochs

#: In a file of trained weights, the logits of the validation rows that they give, float32 [m];
#: files of earlier versions have none.
VALIDATION_LOGITS = "validation_logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """One training: the same job on the same data gives the same curve, wherever it runs."""

    config: ModelConfig  #: what to train
    trial: int  #: the trial's number in its study
    seed: int  #: the study's; weights, shuffling and dropout derive from it and from `seeded_as`
    precision: Precision  #: of the computation; weights, losses and the output are float32
    rungs: tuple[int, ...]  #: epochs after which it may be stopped; a remote training waits there
    settings: TrainingSettings  #: epochs, patience and time limit of each trial of its study

    @property
    def seeded_as(self) -> int:
        """The trial number that weights, shuffling and dropout derive from."""
        return self.settings.seeded_as(self.trial)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTime:
    """What training costs on one machine, in the mean over small to large networks of a space."""

    epoch_seconds: float  #: of all rows, validation included
    start_seconds: float  #: of a trial: building the network and its graphs
    networks: int  #: that were timed
    rows: int  #: on which they were
    workers: int  #: processes that trained at once, of one thread each


class Train(Protocol):
    """Trains a job: here (`tuner.network`) or on a worker (`tuner.cluster`)."""

    def __call__(self, job: TrainingJob) -> Generator[EpochResult, None, None]:
        """Yields each epoch as it completes; closing the iterator stops the training.

        Raises:
            TrialEndedError: The trial cannot go on (diverged, out of memory, over time).
        """
        ...
