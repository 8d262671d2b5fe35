"""Which of a study's kept networks are used: the best one, or several that predict better together.

Validation rows alone decide; see `tuner.results.ensemble` for how, and for what the gain is worth.
Once a study was confirmed, its networks are those of the confirmation.

Why: `docs/decisions.md#why-are-validation-logits-kept-with-the-weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.trial import FrozenTrial

from tuner.data.development import DevelopmentData
from tuner.errors import StudyError, counted
from tuner.metrics import Metrics, measure
from tuner.results.ensemble import PICKS, Selection, mean_logits, probability, select
from tuner.results.export import require_ranked
from tuner.results.kept import (
    Evaluate,
    KeptNetwork,
    evaluate_kept,
    predict_logits,
    read_development,
    recorded_logits,
)
from tuner.search.confirmation import confirmed
from tuner.search.tuned_study import TunedStudy

Logits = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Networks that predict together, with what they are worth on the validation rows."""

    study: TunedStudy  #: whose trials they are: the study, or its confirmation
    networks: tuple[KeptNetwork, ...]  #: the largest share first
    shares: tuple[float, ...]  #: of the mean probability, in the same order
    validation: Metrics  #: of the mean
    selection: Selection | None  #: how an ensemble was chosen; None of a single network
    development: DevelopmentData

    @property
    def trials(self) -> list[int]:
        """The numbers of the networks' trials, in their order."""
        return [network.trial.number for network in self.networks]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """Networks that were selected from those that a study kept; they are not read yet."""

    study: TunedStudy  #: whose networks they are: the study, or its confirmation
    candidates: tuple[FrozenTrial, ...]  #: whose networks were kept, best first
    selection: Selection  #: of the candidates

    @property
    def trials(self) -> list[int]:
        """The numbers of the selected trials, the largest share first."""
        return [self.candidates[index].number for index, _ in self.selection.members]

    def to_document(self) -> dict[str, Any]:
        """What `tuner launch --json` prints of it."""
        crossed = self.selection.cross_fitted
        return {
            "study": self.study.name,
            "trials": self.trials,
            "shares": [share for _, share in self.selection.members],
            "cross_fitted": None if crossed is None else crossed.to_document(),
            "is_better": self.selection.is_better,
        }


def ensemble_in_words(study: TunedStudy, trials: Sequence[int], selection: Selection) -> str:
    """The selected networks of these trials, and what they are estimated to gain."""
    numbers = ", ".join(map(str, trials)) + (f" of {study.name}" if study.confirms else "")
    said = f"Ensemble of {counted(len(trials), 'network')} (trials {numbers})"
    crossed = selection.cross_fitted
    if crossed is None:
        return said
    return (
        f"{said}, cross-fitted validation loss {crossed.ensemble_loss:.4f}; the best single "
        f"network has {crossed.single_loss:.4f} (gain {crossed.gain:.4f}, standard deviation "
        f"{crossed.gain_sd:.4f} over {counted(crossed.halvings, 'halving')})"
    )


def recorded_ensemble(tuned: TunedStudy) -> Ensemble | None:
    """The ensemble of the kept networks, from what they predicted in training: no TensorFlow.

    Returns:
        None where fewer than two networks were kept, or one of an earlier version, which has no
        predictions beside it.

    Raises:
        StudyError: The study's rows cannot be read.
    """
    if not tuned.ranked():
        return None
    tuned, _ = _with_the_winner(tuned)
    kept = _kept_trials(tuned)
    if len(kept) < 2:
        return None
    development = read_development(tuned)
    logits = [recorded_logits(tuned, trial, development) for trial in kept]
    recorded = [one for one in logits if one is not None]
    return (
        _selected(tuned, kept, recorded, development, PICKS) if len(recorded) == len(kept) else None
    )


def choose_trial(tuned: TunedStudy, number: int, *, evaluate: Evaluate | None = None) -> Chosen:
    """The network of one trial.

    Raises:
        StudyError: There is no such trial, or its weights were not kept or do not fit it.
    """
    trial = next((one for one in tuned.trials() if one.number == number), None)
    if trial is None:
        raise StudyError(f"Study {tuned.name!r} has no trial {number}.")
    return _single(tuned, trial, read_development(tuned), evaluate)


def _single(
    tuned: TunedStudy,
    trial: FrozenTrial,
    development: DevelopmentData,
    evaluate: Evaluate | None,
) -> Chosen:
    kept = evaluate_kept(tuned, trial, development, evaluate)
    return Chosen(
        study=tuned,
        networks=(kept,),
        shares=(1.0,),
        validation=kept.metrics,
        selection=None,
        development=development,
    )


def choose_ensemble(
    tuned: TunedStudy, picks: int = PICKS, *, evaluate: Evaluate | None = None
) -> Chosen:
    """The kept networks that predict best together; see `tuner.results.ensemble`.

    Args:
        tuned: The study.
        picks: Of networks, at most; one may be picked several times.
        evaluate: Predicts with trained weights.

    Raises:
        StudyError: No weights were kept, or they do not fit their trials.
    """
    tuned, _ = _with_the_winner(tuned)
    development = read_development(tuned)
    return _read(tuned, _ensemble(tuned, development, picks, evaluate), development, evaluate)


def choose_best(tuned: TunedStudy, *, evaluate: Evaluate | None = None) -> Chosen:
    """The ensemble where it is better than the best single network, else that network.

    Raises:
        StudyError: No trial was trained to its end yet, or no weights were kept, or they do not
            fit their trials.
    """
    tuned, best = _with_the_winner(tuned)
    development = read_development(tuned)
    if len(_kept_trials(tuned)) > 1:
        ensemble = _ensemble(tuned, development, PICKS, evaluate)
        if ensemble.selection.is_better:
            return _read(tuned, ensemble, development, evaluate)
    return _single(tuned, best, development, evaluate)


def choose_both(
    tuned: TunedStudy, *, evaluate: Evaluate | None = None
) -> tuple[Chosen, Chosen | None]:
    """The best single network, and the ensemble; None for the latter where one network is best.

    Args:
        tuned: A study with a fully trained trial.
        evaluate: Predicts with trained weights.

    Raises:
        StudyError: Weights were not kept, or do not fit their trials.
    """
    tuned, best = _with_the_winner(tuned)
    development = read_development(tuned)
    single = _single(tuned, best, development, evaluate)
    if len(_kept_trials(tuned)) < 2:
        return single, None
    ensemble = _ensemble(tuned, development, PICKS, evaluate)
    if len(ensemble.trials) < 2:
        return single, None
    return single, _read(tuned, ensemble, development, evaluate)


def predict_together(
    chosen: Chosen, tokens: npt.NDArray[np.uint8], evaluate: Evaluate | None = None
) -> Logits:
    """The logits of tokens [n, max_length] by chosen networks, float64 [n]."""
    logits = [
        predict_logits(evaluate, network.config, network.weights, tokens)
        for network in chosen.networks
    ]
    return logits[0] if len(logits) == 1 else mean_logits(logits, chosen.shares)


def _with_the_winner(tuned: TunedStudy) -> tuple[TunedStudy, FrozenTrial]:
    """The study whose networks are used, and the best trial of its: of the confirmed winner.

    Raises:
        StudyError: No trial was trained to its end yet.
    """
    found = confirmed(tuned)
    if found is None or found.winner is None:
        return tuned, require_ranked(tuned)[0]
    return found.tuned, found.winner.best


def _kept_trials(tuned: TunedStudy) -> tuple[FrozenTrial, ...]:
    """The trials whose networks were kept and may predict together, best first."""
    if tuned.record.spec.data.split.reshuffle:
        return ()
    return tuple(
        trial for trial in tuned.ranked() if tuned.artifacts.weights(trial.number).is_file()
    )


def _ensemble(
    tuned: TunedStudy, development: DevelopmentData, picks: int, evaluate: Evaluate | None
) -> Ensemble:
    kept = _kept_trials(tuned)
    if tuned.record.spec.data.split.reshuffle:
        raise StudyError(
            f"The trials of study {tuned.name!r} were validated on rows of their own (reshuffle), "
            "which others of them trained on: no rows can choose an ensemble. Name one trial "
            "(--trial)."
        )
    if not kept:
        raise StudyError(
            f"Study {tuned.name!r} has no kept weights in {tuned.artifacts.weights(0).parent}, so "
            "there is nothing to combine. If the study ran with another artifacts folder, name "
            "that one (TUNER_ARTIFACTS)."
        )
    logits = []
    for trial in kept:
        recorded = recorded_logits(tuned, trial, development)
        if recorded is None:
            recorded = evaluate_kept(tuned, trial, development, evaluate).logits
        logits.append(recorded)
    return _selected(tuned, kept, logits, development, picks)


def _selected(
    tuned: TunedStudy,
    candidates: tuple[FrozenTrial, ...],
    logits: list[Logits],
    development: DevelopmentData,
    picks: int,
) -> Ensemble:
    probabilities = np.stack([probability(one) for one in logits])
    selection = select(probabilities, development.validation_labels, picks=picks)
    return Ensemble(study=tuned, candidates=candidates, selection=selection)


def _read(
    tuned: TunedStudy,
    ensemble: Ensemble,
    development: DevelopmentData,
    evaluate: Evaluate | None,
) -> Chosen:
    """The networks of an ensemble, each evaluated on the validation rows."""
    members = ensemble.selection.members
    networks = tuple(
        evaluate_kept(tuned, ensemble.candidates[index], development, evaluate)
        for index, _ in members
    )
    shares = tuple(share for _, share in members)
    logits = mean_logits([network.logits for network in networks], shares)
    return Chosen(
        study=tuned,
        networks=networks,
        shares=shares,
        validation=measure(development.validation_labels, logits),
        selection=ensemble.selection,
        development=development,
    )
