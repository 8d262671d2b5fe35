"""Confirmations: planned, driven like any study, resumed, and believed only while they hold."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import optuna
import pytest
from fakes import FakeWorkers, Notes, epoch_result, make_study, small_spec
from optuna.trial import TrialState

from tuner.coordination.coordinator import Coordinator
from tuner.errors import StudyError, TrialEndedError
from tuner.search.attributes import OF_CONFIGURATION_KEY
from tuner.search.confirmation import (
    DEFAULT,
    FIRST_KNOWN,
    Confirmation,
    confirmation_of,
    confirmed,
    confirmed_means,
    plan_confirmation,
    winner_in_words,
)
from tuner.search.study import delete, load
from tuner.search.tuned_study import TunedStudy
from tuner.train import EpochResult, Train, TrainingJob

KNOWN = [{"blocks": 1, "learning_rate": 0.02}]


def by_learning_rate(job: TrainingJob) -> Generator[EpochResult, None, None]:
    """The larger the learning rate the better, but for what the seed adds."""
    loss = 0.7 - job.config.learning_rate - (job.trial % 7) / 1e5
    yield epoch_result(loss, 1)


def run(tuned: TunedStudy, train: Train = by_learning_rate, **options: float) -> None:
    Coordinator(tuned, FakeWorkers(train=train), Notes()).run(**options)


@pytest.fixture
def searched(tmp_path: Path) -> TunedStudy:
    tuned = make_study(tmp_path, small_spec(trials=8, known=KNOWN, hyperband=None))
    run(tuned)
    return tuned


def driven(searched: TunedStudy, *, top: int = 3, seeds: int = 2) -> Confirmation:
    run(plan_confirmation(searched, top=top, seeds=seeds).tuned)
    found = confirmation_of(searched)
    assert found is not None
    return found


def labels(found: Confirmation) -> list[object]:
    trials = found.tuned.trials(TrialState.COMPLETE)
    return [trial.user_attrs[OF_CONFIGURATION_KEY] for trial in trials]


def test_the_best_are_trained_once_for_each_seed_and_the_lowest_mean_wins(
    searched: TunedStudy,
) -> None:
    found = driven(searched)
    best = [trial.number for trial in searched.ranked()[:3]]
    references = [DEFAULT] if 0 in best else [DEFAULT, FIRST_KNOWN]
    assert sorted(map(str, labels(found))) == sorted(map(str, 2 * [*best, *references]))
    assert found.is_complete
    assert found.is_current
    assert found.winner is not None
    means = confirmed_means(searched)
    assert set(means) == set(best)
    assert found.winner.label == min(means, key=means.__getitem__)
    assert "Confirmed: trial" in winner_in_words(searched)


def test_no_training_of_the_search_is_repeated_and_none_is_pruned(searched: TunedStudy) -> None:
    jobs: list[TrainingJob] = []

    def noted(job: TrainingJob) -> Generator[EpochResult, None, None]:
        jobs.append(job)
        yield from by_learning_rate(job)

    run(plan_confirmation(searched, top=2, seeds=3).tuned, noted)
    spec = searched.record.spec
    assert {job.seed for job in jobs} != {spec.seed}
    assert len({(job.seed, job.seeded_as) for job in jobs}) == len(jobs)
    assert {job.rungs for job in jobs} == {()}
    assert {job.settings.max_epochs for job in jobs} == {spec.training.max_epochs}


def test_all_trainings_are_validated_on_the_same_rows(tmp_path: Path) -> None:
    data = {"source": "rows.csv", "split": {"seed": 1, "reshuffle": True}}
    searched = make_study(tmp_path, small_spec(trials=4, hyperband=None, data=data))
    jobs: list[TrainingJob] = []

    def noted(job: TrainingJob) -> Generator[EpochResult, None, None]:
        jobs.append(job)
        yield from by_learning_rate(job)

    run(searched, noted)
    assert {job.reshuffle for job in jobs} == {1}
    jobs.clear()
    run(plan_confirmation(searched, top=2, seeds=2).tuned, noted)
    assert {job.reshuffle for job in jobs} == {None}


def test_more_configurations_and_seeds_keep_what_is_there(searched: TunedStudy) -> None:
    first = driven(searched, top=2, seeds=2)
    before = {trial.number for trial in first.tuned.trials(TrialState.COMPLETE)}
    assert plan_confirmation(searched, top=2, seeds=2).is_complete
    extended = driven(searched, top=4, seeds=3)
    assert extended.is_complete
    assert before < {trial.number for trial in extended.tuned.trials(TrialState.COMPLETE)}
    assert len(labels(extended)) == extended.trainings


def test_a_training_that_failed_is_trained_again(searched: TunedStudy) -> None:
    failed: list[int] = []

    def failing(job: TrainingJob) -> Generator[EpochResult, None, None]:
        if len(failed) < 2:
            failed.append(job.trial)
            raise OSError("the disk of this worker is full")
        yield from by_learning_rate(job)

    found = plan_confirmation(searched, top=2, seeds=2)
    run(found.tuned, failing)
    again = confirmation_of(searched)
    assert again is not None
    assert again.is_complete
    assert len(found.tuned.trials(TrialState.FAIL)) == 2


def test_a_configuration_that_diverges_with_one_seed_does_not_win(searched: TunedStudy) -> None:
    best = searched.ranked()[0].number

    def diverging(job: TrainingJob) -> Generator[EpochResult, None, None]:
        trial = found.tuned.trials()[job.trial]
        has_the_second_seed = job.trial >= found.trainings / found.seeds
        if trial.user_attrs[OF_CONFIGURATION_KEY] == best and has_the_second_seed:
            raise TrialEndedError("diverged", "epoch 1")
        yield from by_learning_rate(job)

    found = plan_confirmation(searched, top=2, seeds=2)
    run(found.tuned, diverging)
    again = confirmation_of(searched)
    assert again is not None
    first = again.candidates[0]
    assert first.label == best
    assert first.values[1] is None
    assert first.mean is None
    assert again.winner is again.candidates[1]


def test_a_confirmation_counts_only_while_it_is_of_what_is_best(searched: TunedStudy) -> None:
    assert "that of one training" in winner_in_words(searched)
    assert "tuner confirm" in winner_in_words(searched)
    assert "`" not in winner_in_words(searched, suggest=False)
    found = plan_confirmation(searched, top=2, seeds=2)
    assert confirmed(searched) is None
    assert "is not finished" in winner_in_words(searched)
    run(found.tuned)
    assert confirmed(searched) is not None
    params = {"blocks": 1, "learning_rate": 0.1}
    distributions = searched.ranked()[0].distributions
    trial = optuna.create_trial(value=0.1, params=params, distributions=distributions)
    searched.study.add_trial(trial)
    assert confirmed(searched) is None
    assert confirmed_means(searched) == {}
    assert "The search continued" in winner_in_words(searched)
    assert driven(searched, top=2).is_current


def test_a_confirmation_that_is_stopped_resumes(searched: TunedStudy) -> None:
    found = plan_confirmation(searched, top=2, seeds=2)
    run(found.tuned, timeout=0.0)
    assert not labels(found)
    assert driven(searched, top=2).is_complete


def test_what_cannot_be_confirmed_is_told(searched: TunedStudy, tmp_path: Path) -> None:
    found = plan_confirmation(searched, top=1, seeds=2)
    with pytest.raises(StudyError, match="is the confirmation of 'small'; confirm that one"):
        plan_confirmation(found.tuned, top=1, seeds=2)
    empty = make_study(tmp_path / "empty")
    with pytest.raises(StudyError, match="no fully trained trial yet"):
        plan_confirmation(empty, top=1, seeds=2)
    other = make_study(tmp_path, small_spec(name="other"))
    make_study(tmp_path, small_spec(name="other-confirm"))
    run(other)
    with pytest.raises(StudyError, match="is not the confirmation of 'other'"):
        plan_confirmation(other, top=1, seeds=2)
    assert confirmation_of(other) is None


def test_a_confirmation_goes_with_its_study(searched: TunedStudy) -> None:
    found = driven(searched)
    delete(searched)
    assert not found.tuned.artifacts.folder.exists()
    with pytest.raises(StudyError, match="holds no study 'small-confirm'"):
        load(searched.storage, found.tuned.name, artifacts_root=Path())


def test_a_reported_study_confirms_nothing_more(searched: TunedStudy) -> None:
    found = plan_confirmation(searched, top=1, seeds=2)
    searched.storage.ledger.open(
        opened_at="2026-01-01T00:00:00+00:00",
        opened_by="lab@host",
        study=searched.name,
        study_key=searched.key,
        trial=0,
        config_hash="0" * 64,
        spec_hash="0" * 64,
        split_id=searched.record.data.split_id,
    )
    for refused in (lambda: plan_confirmation(searched, top=1, seeds=2), lambda: run(found.tuned)):
        with pytest.raises(StudyError, match="study 'small' was opened by its report"):
            refused()


def test_settings_of_the_study_file_are_those_of_the_last_launch(tmp_path: Path) -> None:
    tuned = make_study(tmp_path, small_spec(confirm={"top": 3, "seeds": 4}))
    assert tuned.confirm is not None
    assert (tuned.confirm.top, tuned.confirm.seeds) == (3, 4)
    assert make_study(tmp_path, small_spec()).confirm is None
