"""One trial: sample a configuration, train it, report, prune. Ordinary Optuna."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import optuna

from tuner.errors import TrialEndedError
from tuner.search.attributes import CURVE_KEY, DETAIL_KEY, ENDED_KEY
from tuner.spec.architecture import ModelConfig, parameter_count
from tuner.spec.precision import Precision
from tuner.spec.spec import StudySpec
from tuner.train import (
    FOLD_LOSSES_KEY,
    PARAMETERS_KEY,
    EpochResult,
    Train,
    TrainingJob,
    best_epoch_of,
    curve_document,
    figures_of,
)


class Objective:
    """Trains one trial; `study.optimize(Objective(spec, train))` works as it is.

    The value is the best validation loss (nats, without penalties). Rungs compare the best
    so far, and the pruner is asked at rungs only.
    """

    def __init__(
        self,
        spec: StudySpec,
        train: Train,
        *,
        precision_of: Callable[[ModelConfig], Precision] | None = None,
    ) -> None:
        """Makes the objective of a study.

        Args:
            spec: The study file.
            train: Trains a configuration.
            precision_of: In which precision; if left out, the study file's, and float32 for "auto".
        """
        self._spec = spec
        self._train = train
        self._precision_of = precision_of or (lambda _: spec.training.precision_alone())

    def __call__(self, trial: optuna.Trial) -> float:
        """Runs the trial; one that was running before goes on where it was.

        Raises:
            optuna.TrialPruned: Hyperband stopped it, or it could not go on (diverged, out of
                memory, over time, workers lost). The latter violates the constraint "ended",
                so that the sampler learns to avoid such configurations.
        """
        spec = self._spec
        config = spec.space.suggest(trial)
        trial.set_user_attr(PARAMETERS_KEY, parameter_count(config, spec.data.max_length))
        reported = reported_epochs(trial)
        best = float("inf")
        curve: list[EpochResult] = []
        job = TrainingJob(
            config=config,
            trial=trial.number,
            seed=spec.seed,
            precision=self._precision_of(config),
            rungs=spec.rungs,
            settings=spec.training,
            reshuffle=spec.data.split.reshuffle_seed,
        )
        epochs = self._train(job)
        try:
            with contextlib.closing(epochs):  # a pruned trial's worker stops
                for epoch in epochs:
                    curve.append(epoch)
                    best = min(best, epoch.validation_loss)
                    if epoch.epoch > reported:
                        trial.report(best, step=epoch.epoch)
                    # The last epoch is no rung: a fully trained trial is COMPLETE, never PRUNED.
                    decided = epoch.epoch < reported
                    if epoch.epoch in spec.rungs and not decided and trial.should_prune():
                        raise optuna.TrialPruned
        except TrialEndedError as end:
            trial.set_user_attr(ENDED_KEY, end.reason)
            trial.set_user_attr(DETAIL_KEY, end.detail)
            trial.set_constraint(ENDED_KEY, 1.0)
            raise optuna.TrialPruned(str(end)) from end
        finally:
            trial.storage.set_trial_system_attr(trial._trial_id, CURVE_KEY, curve_document(curve))
            for key, figure in figures_of(curve).items():
                trial.set_user_attr(key, figure)
            best_epoch = best_epoch_of(curve)
            if best_epoch is not None and best_epoch.fold_losses is not None:
                trial.set_user_attr(FOLD_LOSSES_KEY, list(best_epoch.fold_losses))
        return best


def reported_epochs(trial: optuna.Trial) -> int:
    """The last epoch that the storage holds for this trial; 0 for a new one."""
    return trial.storage.get_trial(trial._trial_id).last_step or 0
