from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Sequence

import optuna
import pytest
from fakes import epoch_result, fake_train, small_spec
from optuna.trial import TrialState

from tuner.errors import TrialEndedError
from tuner.search.attributes import CURVE_KEY, ENDED_KEY, curve_of
from tuner.search.hyperband import make_pruner
from tuner.search.objective import Objective
from tuner.search.sampler import PerTrialSampler, make_sampler
from tuner.train import EpochResult, TrainingJob, figures_of, mean_of_folds


def plain_study(**changes: object) -> tuple[optuna.Study, Objective]:
    spec = small_spec(**changes)
    study = optuna.create_study(
        study_name="small", sampler=make_sampler(spec), pruner=make_pruner(spec)
    )
    return study, Objective(spec, fake_train)


def train_of(losses: Sequence[float]):
    def train(job: TrainingJob) -> Generator[EpochResult, None, None]:
        for epoch, loss in enumerate(losses, start=1):
            yield epoch_result(loss, epoch)

    return train


class AlwaysPrune(optuna.pruners.BasePruner):
    def __init__(self) -> None:
        self.asked_at: list[int] = []

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        assert trial.last_step is not None
        self.asked_at.append(trial.last_step)
        return False


def test_the_objective_runs_in_plain_study_optimize() -> None:
    study, objective = plain_study()
    study.optimize(objective, n_trials=20)
    states = [trial.state for trial in study.trials]
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(curve_of(trial) for trial in study.trials)


def test_the_value_is_the_best_validation_loss_and_rungs_compare_the_best_so_far() -> None:
    spec = small_spec(hyperband=None)
    study = optuna.create_study()
    study.optimize(Objective(spec, train_of([0.7, 0.5, 0.6])), n_trials=1)
    (trial,) = study.trials
    assert trial.value == 0.5
    assert trial.intermediate_values == {1: 0.7, 2: 0.5, 3: 0.5}
    assert [epoch.validation_loss for epoch in curve_of(trial)] == [0.7, 0.5, 0.6]


def test_a_trial_stores_its_curve_by_name_and_one_by_position_is_read() -> None:
    study, objective = plain_study()
    study.optimize(objective, n_trials=1)
    (trial,) = study.trials
    stored = trial.system_attrs[CURVE_KEY]
    assert stored["epoch"] == list(range(1, 10))
    whole = curve_of(trial)
    rows = [dataclasses.astuple(epoch)[:6] for epoch in whole]
    # Earlier versions: rows, which began among the user's attributes.
    trial.system_attrs[CURVE_KEY] = rows
    assert curve_of(trial) == whole
    trial.user_attrs[CURVE_KEY] = trial.system_attrs.pop(CURVE_KEY)
    assert curve_of(trial) == whole


def test_the_figures_are_those_of_the_first_best_epoch_and_what_is_unknown_is_left_out() -> None:
    curve = [epoch_result(loss, epoch) for epoch, loss in enumerate([0.7, 0.5, 0.5], start=1)]
    curve[1] = dataclasses.replace(curve[1], validation_accuracy=0.8, validation_roc_auc=0.9)
    assert figures_of(curve) == {
        "epochs": 3,
        "training_seconds": pytest.approx(0.003),
        "best_epoch": 2,
        "validation_accuracy": 0.8,
        "validation_roc_auc": 0.9,
    }
    unknown = dataclasses.replace(curve[0], validation_accuracy=math.nan, seconds=math.nan)
    assert figures_of([unknown]) == {"epochs": 1, "best_epoch": 1}
    assert figures_of([]) == {"epochs": 0, "training_seconds": 0}


def test_a_trial_of_a_notebook_has_its_figures_as_numbers() -> None:
    study, objective = plain_study()
    study.optimize(objective, n_trials=1)
    attributes = study.trials[0].user_attrs
    assert {"parameters", "epochs", "best_epoch", "validation_accuracy"} <= set(attributes)
    assert all(isinstance(value, int | float) for value in attributes.values())


@pytest.mark.parametrize(("split", "seed"), [({}, None), ({"seed": 4, "reshuffle": True}, 4)])
def test_a_job_says_whether_its_validation_rows_are_drawn_anew(
    split: dict[str, object], seed: int | None
) -> None:
    jobs: list[TrainingJob] = []

    def train(job: TrainingJob) -> Generator[EpochResult, None, None]:
        jobs.append(job)
        yield epoch_result(0.5, 1)

    spec = small_spec(data={"source": "rows.csv", "split": split})
    optuna.create_study().optimize(Objective(spec, train), n_trials=1)
    assert jobs[0].reshuffle == seed


def test_the_losses_of_the_folds_are_kept_with_a_trial() -> None:
    def train(_: TrainingJob) -> Generator[EpochResult, None, None]:
        for epoch, losses in enumerate([(0.5, 0.9), (0.5, 0.7), (0.4, 0.9)], start=1):
            folds = [epoch_result(loss, epoch) for loss in losses]
            yield mean_of_folds(folds)

    study = optuna.create_study()
    study.optimize(Objective(small_spec(), train), n_trials=1)
    (trial,) = study.trials
    assert trial.value == pytest.approx(0.6)
    assert trial.user_attrs["fold_losses"] == [0.5, 0.7]
    assert [one.fold_losses for one in curve_of(trial)] == [(0.5, 0.9), (0.5, 0.7), (0.4, 0.9)]


def test_the_pruner_is_asked_after_epochs_1_3_and_9_and_never_at_the_last() -> None:
    # arXiv:1603.06560 with R = 27, eta = 3; a fully trained trial is COMPLETE.
    spec = small_spec(training={"max_epochs": 27}, hyperband={"min_epochs": 1, "eta": 3})
    pruner = AlwaysPrune()
    study = optuna.create_study(pruner=pruner)
    study.optimize(Objective(spec, train_of([0.6] * 27)), n_trials=1)
    assert pruner.asked_at == [1, 3, 9]
    assert study.trials[0].state == TrialState.COMPLETE


@pytest.mark.parametrize("reason", ["diverged", "out_of_memory", "over_time"])
def test_a_trial_that_cannot_go_on_is_pruned_with_a_violated_constraint(reason: str) -> None:
    def train(job):
        yield epoch_result(0.7, 1)
        raise TrialEndedError(reason, "epoch 2")

    study = optuna.create_study()
    study.optimize(Objective(small_spec(hyperband=None), train), n_trials=1)
    (trial,) = study.trials
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs[ENDED_KEY] == reason
    assert trial.constraints == {ENDED_KEY: 1.0}
    assert len(curve_of(trial)) == 1


def test_the_sampler_learns_to_avoid_what_diverges() -> None:
    def train(job):
        if job.config.learning_rate > 3e-3:
            raise TrialEndedError("diverged", "epoch 1")
        yield epoch_result(0.6, 1)

    study, _ = plain_study()
    study.optimize(Objective(small_spec(hyperband=None), train), n_trials=60)
    diverged = [trial.state == TrialState.PRUNED for trial in study.trials]
    # A random search would diverge half of the time: log-uniform on 1e-4 .. 1e-1.
    assert sum(diverged[:10]) >= 3
    assert sum(diverged[-20:]) <= 5


def test_a_pruned_training_is_closed() -> None:
    closed: list[bool] = []

    def train(job):
        try:
            yield epoch_result(0.7, 1)
            yield epoch_result(0.7, 2)
        finally:
            closed.append(True)

    class Prune(AlwaysPrune):
        def prune(self, study, trial) -> bool:
            return True

    study = optuna.create_study(pruner=Prune())
    study.optimize(Objective(small_spec(), train), n_trials=1)
    assert study.trials[0].state == TrialState.PRUNED
    assert closed == [True]


def test_a_trial_that_goes_on_keeps_its_reports_and_its_parameters() -> None:
    spec = small_spec(hyperband=None)
    study = optuna.create_study()
    trial = study.ask()
    spec.space.suggest(trial)
    trial.report(0.9, step=1)  # reported before the coordinator died
    again = optuna.Trial(study, trial._trial_id)
    value = Objective(spec, train_of([0.9, 0.8]))(again)
    study.tell(again, value)
    (kept,) = study.trials
    assert kept.intermediate_values == {1: 0.9, 2: 0.8}
    assert len(curve_of(kept)) == 2


def test_what_a_trial_samples_depends_on_seed_and_number_alone() -> None:
    spec = small_spec(sampler={"kind": "random"})

    def parameters(order: Sequence[int]) -> dict[int, dict[str, object]]:
        study = optuna.create_study(sampler=make_sampler(spec))
        trials = [study.ask() for _ in order]
        for number in order:
            spec.space.suggest(trials[number])
        return {trial.number: trial.params for trial in trials}

    forward, backward = parameters([0, 1, 2]), parameters([2, 1, 0])
    assert forward == backward
    assert len({str(one) for one in forward.values()}) == 3
    assert isinstance(make_sampler(spec), PerTrialSampler)


def test_a_training_is_asked_for_as_the_study_file_has_it() -> None:
    jobs: list[TrainingJob] = []

    def train(job: TrainingJob) -> Generator[EpochResult, None, None]:
        jobs.append(job)
        yield epoch_result(0.6, 1)

    spec = small_spec(seed=5, training={"max_epochs": 9, "precision": "auto"})
    study = optuna.create_study()
    study.optimize(Objective(spec, train), n_trials=1)
    study.optimize(Objective(spec, train, precision_of=lambda _: "bfloat16"), n_trials=1)
    as_asked = TrainingJob(
        config=spec.space.resolve(study.trials[0].params), trial=0, seed=5, precision="float32",
        rungs=(1, 3), settings=spec.training,
    )  # fmt: skip
    assert jobs[0] == as_asked
    assert (jobs[1].trial, jobs[1].precision) == (1, "bfloat16")
