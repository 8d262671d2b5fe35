"""What a training is asked for and what it yields: the one signature of everything that trains."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from tuner.spec.architecture import ModelConfig
from tuner.spec.precision import Precision
from tuner.spec.spec import TrainingSettings

#: Attributes of a trial: numbers that the dashboard sorts and draws by, and exports list.
PARAMETERS_KEY = "parameters"  # of the network
BEST_EPOCH_KEY = "best_epoch"  # the first with the lowest validation loss
ACCURACY_KEY = "validation_accuracy"  # of the best epoch, 0..1
ROC_AUC_KEY = "validation_roc_auc"  # of the best epoch, 0..1
FOLD_LOSSES_KEY = "fold_losses"  # of the best epoch, a list: nats
EPOCHS_KEY = "epochs"  # trained
SECONDS_KEY = "training_seconds"  # of all epochs

#: In a file of trained weights, the logits of the validation rows that they give, float32 [m];
#: files of earlier versions have none.
VALIDATION_LOGITS = "validation_logits"


def fold_key(fold: int) -> str:
    """What a fold's network is called in a file of several."""
    return f"fold{fold}"


def weights_of_folds(weights: Sequence[bytes], logits: npt.NDArray[np.float32]) -> bytes:
    """The trained networks of all folds in one npz file.

    Args:
        weights: The npz file of each fold's network.
        logits: Of each development row, by the network that did not train on it, [n].
    """
    file = io.BytesIO()
    arrays: dict[str, Any] = {
        fold_key(fold): np.frombuffer(one, np.uint8) for fold, one in enumerate(weights)
    }
    arrays[VALIDATION_LOGITS] = logits
    np.savez(file, **arrays)
    return file.getvalue()


def networks_in(weights: bytes) -> tuple[bytes, ...]:
    """The npz files of the networks in kept weights: one for each fold; itself where it is one.

    Raises:
        ValueError, OSError, EOFError, zipfile.BadZipFile: It is damaged.
    """
    with np.load(io.BytesIO(weights), allow_pickle=False) as arrays:
        names = [fold_key(fold) for fold in range(len(arrays.files))]
        found = tuple(arrays[name].tobytes() for name in names if name in arrays.files)
    return found or (weights,)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingJob:
    """One training: the same job on the same data gives the same curve, wherever it runs."""

    config: ModelConfig  #: what to train
    trial: int  #: the trial's number in its study
    seed: int  #: the study's; weights, shuffling and dropout derive from it and from `seeded_as`
    precision: Precision  #: of the computation; weights, losses and the output are float32
    rungs: tuple[int, ...]  #: epochs after which it may be stopped; a remote training waits there
    settings: TrainingSettings  #: epochs, patience and time limit of each trial of its study
    #: The seed of validation rows that are drawn anew for the trial; None: those of the study.
    reshuffle: int | None = None

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
    #: The validation loss of each fold, whose mean is `validation_loss`; None without folds.
    fold_losses: tuple[float, ...] | None = None

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
        if known.get("fold_losses") is not None:
            known["fold_losses"] = tuple(known["fold_losses"])  # JSON has lists
        return cls(**missing | known)


#: What of a machine and its programs a training's last bits depend on, by name: versions,
#: processor, threads; `tuner.cluster.environment` looks.
Environment: TypeAlias = Mapping[str, str | int]

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
    document = {
        field.name: [getattr(epoch, field.name) for epoch in epochs]
        for field in dataclasses.fields(EpochResult)
    }
    if not any(document["fold_losses"]):
        del document["fold_losses"]
    return document


def mean_of_folds(epochs: Sequence[EpochResult]) -> EpochResult:
    """An epoch of all folds, in the mean; its seconds are those of all together."""

    def mean(values: Iterable[float]) -> float:
        return math.fsum(values) / len(epochs)

    areas = [one.validation_roc_auc for one in epochs if one.validation_roc_auc is not None]
    return EpochResult(
        epoch=epochs[0].epoch,
        training_loss=mean(one.training_loss for one in epochs),
        training_accuracy=mean(one.training_accuracy for one in epochs),
        validation_loss=mean(one.validation_loss for one in epochs),
        validation_accuracy=mean(one.validation_accuracy for one in epochs),
        validation_roc_auc=mean(areas) if len(areas) == len(epochs) else None,
        seconds=math.fsum(one.seconds for one in epochs),
        fold_losses=tuple(one.validation_loss for one in epochs),
    )


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


def best_epoch_of(curve: Sequence[EpochResult]) -> EpochResult | None:
    """The first epoch with the lowest validation loss; None of no epoch."""
    return min(curve, key=lambda epoch: epoch.validation_loss, default=None)


def figures_of(curve: Sequence[EpochResult]) -> dict[str, float]:
    """What a training reached and cost, as attributes of its trial; what is unknown is left out."""
    figures: dict[str, float | None] = {
        EPOCHS_KEY: len(curve),
        SECONDS_KEY: sum(epoch.seconds for epoch in curve),
    }
    best = best_epoch_of(curve)
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
