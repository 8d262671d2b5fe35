"""The networks that a study kept, tried on its validation rows before anything is made of them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from optuna.trial import FrozenTrial

from tuner.data.development import DevelopmentData, load_development
from tuner.errors import StudyError, counted, is_outage, reason_of
from tuner.metrics import Metrics, cross_entropy, measure
from tuner.results.ensemble import mean_logits
from tuner.search.development import study_development
from tuner.search.record import versions
from tuner.search.tuned_study import TunedStudy
from tuner.spec.architecture import ModelConfig
from tuner.train import VALIDATION_LOGITS, networks_in

#: (configuration, its trained weights, uint8 tokens [n, max_length]) -> logits [n]
Evaluate: TypeAlias = Callable[[ModelConfig, bytes, npt.NDArray[np.uint8]], npt.NDArray[np.float64]]

#: How far the kept weights' validation loss may be from the recorded one: nats, of a loss of 0.5
#: and below; as much for each 0.5 of a larger one, whose logits are large. A study in bfloat16
#: chose by coarser figures than those of the evaluation, which is in float32.
_LOSS_TOLERANCE = {"float32": 0.002, "bfloat16": 0.02}


_ZIP = b"PK"  #: begins an npz file


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptNetwork:
    """The trained network of a trial, with what it is worth on the validation rows.

    With folds these are its networks, which predict together; each row is validated by the one
    that did not train on it.
    """

    trial: FrozenTrial
    config: ModelConfig
    weights: bytes  #: what `TrainingRun.best_weights` returned
    logits: npt.NDArray[np.float64]  #: of the validation rows, [m]
    labels: npt.NDArray[np.uint8]  #: of the same rows, [m]: the trial may have rows of its own
    metrics: Metrics  #: of the validation rows


def read_kept_weights(tuned: TunedStudy, number: int) -> bytes:
    """The best weights of a trial, as npz.

    Raises:
        StudyError: They were not kept, or cannot be read now.
    """
    path = tuned.artifacts.weights(number)
    try:
        return path.read_bytes()
    except (OSError, MemoryError) as error:
        raise StudyError(
            f"{path}: {reason_of(error)}. Trial {number} is evaluated from the weights that were "
            "kept there, never trained again; only those of the best trials are kept. If the "
            "study ran with another artifacts folder, name that one (TUNER_ARTIFACTS)."
        ) from error


def read_development(tuned: TunedStudy) -> DevelopmentData:
    """The training and validation rows of a study.

    Raises:
        StudyError: Their file is missing, or cannot be read now.
    """
    try:
        return load_development(study_development(tuned))
    except (OSError, MemoryError) as error:
        raise StudyError(
            f"The training and validation rows of study {tuned.name!r} cannot be read "
            f"({reason_of(error)}), which says nothing about what is in them; once that is solved, "
            "try again."
        ) from error


def evaluate_kept(
    tuned: TunedStudy,
    trial: FrozenTrial,
    development: DevelopmentData,
    evaluate: Evaluate | None = None,
) -> KeptNetwork:
    """The network of a trial, evaluated on the validation rows; on its own, if it has some.

    Args:
        tuned: The study.
        trial: One whose weights were kept.
        development: The study's rows.
        evaluate: Predicts with trained weights; `tuner.network.predict.logits` by default.

    Raises:
        StudyError: The weights are missing, damaged, or do not have the validation loss that is
            recorded with the trial: they are of another trial or another version.
    """
    weights = read_kept_weights(tuned, trial.number)
    spec = tuned.record.spec
    config = spec.space.resolve(trial.params)
    if (seed := spec.data.split.reshuffle_seed) is not None:
        development = development.reshuffled(seed, spec.training.seeded_as(trial.number))
    path = tuned.artifacts.weights(trial.number)
    try:
        logits = _validation_logits(evaluate, config, weights, development)
        metrics = measure(development.validation_labels, logits)
        loss = _validation_loss(metrics.loss, logits, development)
    except (ValueError, KeyError, EOFError, OSError, MemoryError, zipfile.BadZipFile) as error:
        if is_outage(error):
            raise StudyError(
                f"Trial {trial.number} cannot be evaluated now ({reason_of(error)}); once that "
                "is solved, try again."
            ) from error
        raise StudyError(
            f"{path}: the network of trial {trial.number} cannot be made from these weights "
            f"({error}). Was the file damaged, or written by another version? Put a sound copy "
            "there."
        ) from error
    recorded = min(trial.intermediate_values.values(), default=0.0)
    recorded = recorded if trial.value is None else trial.value
    tolerance = _LOSS_TOLERANCE[tuned.precision_of(config)] * max(1.0, 2 * recorded)
    if abs(loss - recorded) > tolerance:
        raise StudyError(
            f"{path}: these weights have a validation loss of {loss:.4f}, but trial "
            f"{trial.number} is recorded with {recorded:.4f}. Are they another trial's, or "
            f"are the versions others than those of the study ({_changed_versions(tuned)})?"
        )
    return KeptNetwork(
        trial=trial,
        config=config,
        weights=weights,
        logits=logits,
        labels=development.validation_labels,
        metrics=metrics,
    )


def recorded_logits(
    tuned: TunedStudy, trial: FrozenTrial, development: DevelopmentData
) -> npt.NDArray[np.float64] | None:
    """The logits of the validation rows that a kept network predicted in training, float64 [m].

    None where they are not kept: by an earlier version, or in a file that is damaged.
    """
    try:
        # NumPy leaves a file that it opens itself, and that is damaged, open.
        with (
            tuned.artifacts.weights(trial.number).open("rb") as file,
            np.load(file, allow_pickle=False) as arrays,
        ):
            found = arrays[VALIDATION_LOGITS].astype(np.float64)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # of an earlier version; `evaluate_kept` says what is wrong with a damaged one
    return found if found.shape == development.validation_labels.shape else None


def predict_logits(
    evaluate: Evaluate | None,
    config: ModelConfig,
    weights: bytes,
    tokens: npt.NDArray[np.uint8],
) -> npt.NDArray[np.float64]:
    """The logits of tokens [n, max_length], float64 [n]; see `evaluate_kept`.

    The networks of several folds predict together: of the mean of their probabilities.
    """
    networks = networks_in(weights) if weights.startswith(_ZIP) else (weights,)
    found = [_of_network(evaluate, config, one, tokens) for one in networks]
    return found[0] if len(found) == 1 else mean_logits(found, [1 / len(found)] * len(found))


def _validation_logits(
    evaluate: Evaluate | None, config: ModelConfig, weights: bytes, development: DevelopmentData
) -> npt.NDArray[np.float64]:
    """The logits of the validation rows, [m]; with folds by the network that did not train on each.

    Raises:
        ValueError: The weights are of another number of folds.
    """
    if development.folds is None:
        return predict_logits(evaluate, config, weights, development.validation_tokens)
    networks = networks_in(weights)
    if len(networks) != development.fold_count:
        raise ValueError(
            f"{counted(len(networks), 'network')} of {counted(development.fold_count, 'fold')}"
        )
    logits = np.zeros(len(development.folds))
    for fold, network in enumerate(networks):
        inside = development.folds == fold
        tokens = development.validation_tokens[inside]
        logits[inside] = _of_network(evaluate, config, network, tokens)
    return logits


def _validation_loss(
    of_all: float, logits: npt.NDArray[np.float64], development: DevelopmentData
) -> float:
    """The validation loss that a trial is recorded with, nats: with folds the mean over them."""
    if development.folds is None:
        return of_all
    losses = cross_entropy(development.validation_labels, logits)
    folds = range(development.fold_count)
    return float(np.mean([losses[development.folds == fold].mean() for fold in folds]))


def _of_network(
    evaluate: Evaluate | None,
    config: ModelConfig,
    weights: bytes,
    tokens: npt.NDArray[np.uint8],
) -> npt.NDArray[np.float64]:
    if evaluate is None:
        # TensorFlow takes seconds to import, and a recorded report does not need it.
        from tuner.network.predict import logits  # noqa: PLC0415

        evaluate = logits
    return np.asarray(evaluate(config, weights, tokens), dtype=np.float64).reshape(-1)


def _changed_versions(tuned: TunedStudy) -> str:
    then, now = tuned.record.versions, versions()
    changed = [
        f"{package} {then.get(package, 'none')}, now {now.get(package, 'none')}"
        for package in dict.fromkeys([*then, *now])
        if then.get(package) != now.get(package)
    ]
    return "; ".join(changed) or "they are the same"
