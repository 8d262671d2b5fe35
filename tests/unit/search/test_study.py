from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
from fakes import IDENTITY, fake_train, make_study, small_spec
from optuna.trial import FrozenTrial, TrialState

from tuner.errors import StudyError, TrialEndedError
from tuner.search.attributes import ENDED_EARLY_KEY, RECORD_KEY
from tuner.search.hyperband import make_pruner
from tuner.search.objective import Objective
from tuner.search.status import status
from tuner.search.study import (
    create_or_resume,
    delete,
    find_name,
    find_or_create,
    list_names,
    load,
    study_name,
)
from tuner.search.tuned_study import TunedStudy
from tuner.spec.spec import NotifySettings, StopSettings, StudySpec
from tuner.storage.storage import Storage
from tuner.train import EpochResult


def again(tuned, spec, identity=IDENTITY):
    return create_or_resume(
        tuned.storage,
        spec,
        identity,
        development_sha256="c" * 64,
        artifacts_root=tuned.artifacts.folder.parent,
    )


def test_a_study_comes_back_as_it_was_made(tmp_path: Path) -> None:
    made = make_study(tmp_path)
    with Storage(made.storage.url) as storage:
        loaded = load(storage, "small", artifacts_root=tmp_path / "artifacts")
        assert loaded.record == made.record
        assert loaded.record.spec.spec_hash == small_spec().spec_hash
        assert loaded.artifacts == made.artifacts
        assert loaded.record.sampler == {
            "class": "TPESampler",
            "multivariate": False,
            "constant_liar": True,
        }
        assert loaded.record.pruner == {
            "class": "Hyperband", "min_epochs": 1, "eta": 3, "brackets": "in turn", "rungs": [1, 3],
        }  # fmt: skip
        assert loaded.record.versions["optuna"] == optuna.__version__
    made.storage.close()


def test_a_larger_budget_extends_the_study_and_another_spec_is_refused(tmp_path: Path) -> None:
    made = make_study(tmp_path)
    assert again(made, small_spec(trials=30)).budget == 30
    with pytest.raises(StudyError, match=r"training\.max_epochs \(9, now 27\)"):
        again(made, small_spec(training={"max_epochs": 27}))
    with pytest.raises(StudyError, match="other data"):
        again(made, small_spec(), replace(IDENTITY, split_id="d" * 64))
    made.storage.close()


CHANGES = {
    "fewer trials": {"trials": 5},
    "more trials": {"trials": 60},
    "a stop rule": {"trials": 12, "stop": {"patience": 3}},
    "another stop rule and more trials": {"trials": 60, "stop": {"patience": 8}},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_a_launch_changes_nothing_of_a_study_that_another_process_runs(
    tmp_path: Path, database_url: str, changes: dict[str, object]
) -> None:
    made = make_study(tmp_path, url=database_url)
    made.study.set_user_attr(ENDED_EARLY_KEY, "no better trial")
    before = made.study.user_attrs
    with Storage(database_url) as running:
        running.lease.take(made.id)
        with pytest.raises(StudyError, match=r"is being run by process.*It runs to 12 trials"):
            again(made, small_spec(**changes))
        assert made.study.user_attrs == before
        assert again(made, small_spec()).budget == 12  # the same: nothing to refuse
        running.lease.release()
    running_no_more = again(made, small_spec(**changes))
    assert running_no_more.budget == changes["trials"]
    assert running_no_more.study.user_attrs[ENDED_EARLY_KEY] is None
    made.storage.close()


def test_a_study_that_stands_there_is_found_unchanged(tmp_path: Path) -> None:
    made = make_study(tmp_path, small_spec(stop={"patience": 3}))
    before = made.study.user_attrs
    arguments = {"development_sha256": "c" * 64, "artifacts_root": tmp_path / "artifacts"}
    found = find_or_create(made.storage, small_spec(trials=5), IDENTITY, **arguments)
    assert found.study.user_attrs == before
    assert (found.budget, found.stop) == (12, StopSettings(patience=3))
    made.storage.close()


def test_a_launch_may_change_who_is_told(tmp_path: Path) -> None:
    made = make_study(tmp_path, small_spec(notify={"on": ["failed"]}))
    assert made.notify == NotifySettings(on=["failed"])
    assert again(made, small_spec(notify={"url_env": "TUNER_NOTIFY_2"})).notify == NotifySettings(
        url_env="TUNER_NOTIFY_2"
    )
    before = made.study.user_attrs
    assert again(made, small_spec(notify={"url_env": "TUNER_NOTIFY_2"})).study.user_attrs == before
    assert again(made, small_spec()).notify is None
    with Storage(made.storage.url) as coordinator:
        coordinator.lease.take(made.id)
        with pytest.raises(StudyError, match=r"asks for \[notify\] \{"):
            again(made, small_spec(notify={}))
        coordinator.lease.release()
    made.storage.close()


def test_a_budget_below_what_is_finished_is_what_is_finished(tmp_path: Path) -> None:
    made = make_study(tmp_path, small_spec())
    for number in range(4):
        trial = made.study.ask()
        made.study.tell(trial, 0.5 + number, TrialState.COMPLETE)
    assert again(made, small_spec(trials=2)).budget == 4
    assert again(made, small_spec(trials=5)).budget == 5


def test_of_a_queued_study_that_runs_the_budget_is_raised_and_never_lowered(
    tmp_path: Path, database_url: str
) -> None:
    made = make_study(tmp_path, url=database_url)
    made.storage.queue.add(made.id)
    with Storage(database_url) as service:
        service.lease.take(made.id)
        assert again(made, small_spec(trials=30)).budget == 30
        with pytest.raises(StudyError, match="asks for 12 trials"):
            again(made, small_spec(trials=12))
        assert made.budget == 30
    made.storage.close()


def test_a_frozen_coordinator_that_comes_back_keeps_its_budget(
    tmp_path: Path, database_url: str
) -> None:
    made = make_study(tmp_path, url=database_url)
    with Storage(database_url) as frozen:
        frozen.lease.take(made.id)
        elsewhere = """'{"host": "elsewhere", "pid": 7}'"""
        made.storage._transactions.run(
            lambda c: c.exec_driver_sql(
                f"UPDATE tuner_lease SET holder = {elsewhere}, renewed_at = renewed_at - 3600"
            )
        )
        back = threading.Timer(0.3, frozen.lease.heartbeat)
        back.start()
        with pytest.raises(StudyError, match="is being run by process 7 on elsewhere"):
            again(made, small_spec(trials=5))
        back.join()
        assert made.budget == 12
    made.storage.close()


def test_equally_good_trials_are_ranked_by_their_numbers(tmp_path: Path) -> None:
    class Backwards:
        """Optuna promises no order."""

        def get_trials(self, **_: object) -> list[FrozenTrial]:
            return list(reversed(trials))

    losses = [0.7, 0.5, 0.6, 0.5, 0.5]
    trials = [optuna.create_trial(value=loss) for loss in losses]
    for number, trial in enumerate(trials):
        trial.number = number
    made = make_study(tmp_path)
    ranked = replace(made, study=Backwards()).ranked()
    assert [trial.number for trial in ranked] == [1, 3, 4, 2, 0]
    made.storage.close()


def test_a_reported_study_takes_no_more_trials(tmp_path: Path) -> None:
    made = make_study(tmp_path)
    made.storage.ledger.open(
        opened_at="", opened_by="", study="small", study_key=made.key, trial=0,
        config_hash="", spec_hash="", split_id=IDENTITY.split_id,
    )  # fmt: skip
    assert again(made, small_spec()).budget == 12
    with pytest.raises(StudyError, match="takes no more trials"):
        again(made, small_spec(trials=13))
    assert status(made).state == "reported"
    made.storage.close()


def test_a_fallback_to_synthetic_data_is_a_study_of_its_own() -> None:
    spec = small_spec(data={"source": "solubility", "fallback": "synthetic"})
    assert study_name(spec, IDENTITY) == "small-synthetic"
    assert study_name(spec, replace(IDENTITY, synthetic=False)) == "small"
    assert study_name(small_spec(), IDENTITY) == "small"


def test_known_configurations_are_the_first_trials(tmp_path: Path) -> None:
    made = make_study(tmp_path, small_spec(known=[{"learning_rate": 0.02}]))
    first = made.study.ask()
    assert made.record.spec.space.suggest(first).learning_rate == 0.02
    made.storage.close()


def test_a_study_whose_making_was_cut_off_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_arguments: object, **_more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("tuner.search.study.record_document", cut_off)
        with pytest.raises(KeyboardInterrupt):
            make_study(tmp_path, small_spec(known=[{"learning_rate": 0.02}]))
    made = make_study(tmp_path, small_spec(known=[{"learning_rate": 0.02}]))
    assert [trial.state for trial in made.trials()] == [TrialState.WAITING]
    made.storage.close()


def test_of_several_launches_that_make_a_study_at_once_all_get_the_same(
    tmp_path: Path, database_url: str
) -> None:
    Storage(database_url).close()
    together, made = threading.Barrier(6), []

    def make() -> None:
        together.wait()
        made.append(make_study(tmp_path, small_spec(known=[{"blocks": 2}]), url=database_url))

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(tuned.id, tuned.key) for tuned in made}) == 1
    assert len(made) == 6
    assert optuna.get_all_study_names(made[0].storage.optuna) == ["small"]
    assert [trial.state.name for trial in made[0].trials()] == ["WAITING"]
    for tuned in made:
        assert tuned.storage.optuna.get_study_name_from_id(tuned.id) == "small"
        tuned.storage.close()


def test_what_was_left_of_a_making_long_ago_is_removed(tmp_path: Path) -> None:
    with Storage(f"sqlite:///{tmp_path}/tuner.db") as storage:
        for began in (1, int(time.time())):
            optuna.create_study(storage=storage.optuna, study_name=f".making.{began}.a")
        make_study(tmp_path).storage.close()
        names = optuna.get_all_study_names(storage.optuna)
        assert [name.split(".")[0] for name in sorted(names)] == ["", "small"]
        assert ".making.1.a" not in names
        assert list_names(storage) == ["small"]


def test_a_study_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    with Storage(f"sqlite:///{tmp_path}/tuner.db") as storage:
        optuna.create_study(storage=storage.optuna, study_name="theirs")
        assert list_names(storage) == []
        with pytest.raises(StudyError, match="was not made by"):
            load(storage, "theirs", artifacts_root=tmp_path)
        with pytest.raises(StudyError, match="holds no study 'mine'; it holds: theirs"):
            load(storage, "mine", artifacts_root=tmp_path)


def test_hyperband_prunes_the_trials_that_optunas_own_prunes() -> None:
    spec = small_spec(training={"max_epochs": 9}, hyperband={"min_epochs": 1, "eta": 3})

    class InTurn(optuna.pruners.HyperbandPruner):
        def _get_bracket_id(self, study: optuna.Study, trial: FrozenTrial) -> int:
            bracket = spec.bracket_of(trial.number)
            assert bracket is not None
            return bracket

    def lengths(pruner: optuna.pruners.BasePruner) -> list[int]:
        """How many epochs each of 60 trials lasts, eight of them at a time."""
        losses = np.random.default_rng(0).random((60, 9))
        study = optuna.create_study(pruner=pruner)
        running = [study.ask() for _ in range(8)]
        while running:
            trial = running.pop(0)
            for epoch in range(1, 10):
                trial.report(losses[trial.number, epoch - 1], epoch)
                if epoch in (1, 3) and trial.should_prune():
                    study.tell(trial, state=TrialState.PRUNED)
                    break
            else:
                study.tell(trial, losses[trial.number].min())
            if len(study.trials) < 60:
                running.append(study.ask())
        return [len(trial.intermediate_values) for trial in study.trials]

    ours = lengths(make_pruner(spec))
    assert ours == lengths(InTurn(min_resource=1, max_resource=9, reduction_factor=3))
    assert {1, 3, 9} == set(ours)


COMPOSED, DECOMPOSED = (
    "l\N{LATIN SMALL LETTER O WITH DIAERESIS}sung",
    "lo\N{COMBINING DIAERESIS}sung",
)


def test_names_that_differ_in_unicode_normalisation_alone_are_one(tmp_path: Path) -> None:
    made = make_study(tmp_path, small_spec(name=DECOMPOSED))
    assert made.name == COMPOSED
    assert made.artifacts.folder.name.startswith(f"{COMPOSED}-")
    for name in (COMPOSED, DECOMPOSED):
        assert again(made, small_spec(name=name)).id == made.id
        assert load(made.storage, name, artifacts_root=tmp_path).id == made.id
    assert list_names(made.storage) == [COMPOSED]
    with pytest.raises(StudyError, match="another study file"):
        again(made, small_spec(name=DECOMPOSED, training={"max_epochs": 27}))
    made.storage.close()


def test_studies_of_earlier_versions_are_found_in_either_normalisation(tmp_path: Path) -> None:
    made = make_study(tmp_path, small_spec(name="old"))
    assert made.storage.rename_study(made.id, DECOMPOSED)
    for name in (COMPOSED, DECOMPOSED):
        found = again(made, small_spec(name=name))
        assert (found.id, found.name) == (made.id, DECOMPOSED)
    # Where both were made, each is what it was.
    other = optuna.create_study(storage=made.storage.optuna, study_name=COMPOSED)
    other.set_user_attr(RECORD_KEY, made.study.user_attrs[RECORD_KEY])
    assert load(made.storage, COMPOSED, artifacts_root=tmp_path).id == other._study_id
    assert again(made, small_spec(name=DECOMPOSED)).id == made.id
    assert find_name("losung", [COMPOSED]) is None
    made.storage.close()


def trials_that_fell(made: TunedStudy, count: int) -> list[int]:
    """How many epochs each of `count` trials lasts; each is worse than the one before."""

    def worse(job):
        for epoch in range(1, 21):
            yield EpochResult(
                epoch=epoch, training_loss=1.0, training_accuracy=0.5,
                validation_loss=1.0 + job.trial,
                validation_accuracy=0.5, seconds=0.0,
            )  # fmt: skip

    made.study.optimize(Objective(made.record.spec, worse), n_trials=count)
    return [trial.last_step or 0 for trial in made.trials()]


FOUR = {"training": {"max_epochs": 20}, "hyperband": {"min_epochs": 1, "eta": 4}}


def test_trials_are_stopped_at_the_rungs_of_their_bracket_alone(tmp_path: Path) -> None:
    made = make_study(tmp_path, small_spec(**FOUR))
    turns = made.record.spec.bracket_turns
    fell = trials_that_fell(made, 2 * len(turns))
    second = list(zip(turns, fell[len(turns) :], strict=True))  # the first pass where alone
    assert set(second) == {(0, 1), (1, 5), (2, 20)}
    made.storage.close()


def test_a_study_keeps_the_rungs_that_it_was_made_with(tmp_path: Path) -> None:
    made = make_study(tmp_path, small_spec(**FOUR))
    document = made.study.user_attrs[RECORD_KEY]
    del document["pruner"]["rungs"]  # as studies were recorded when rungs were counted up
    made.study.set_user_attr(RECORD_KEY, document)
    resumed = again(made, small_spec(**FOUR))
    spec = resumed.record.spec
    assert spec.rungs == (1, 4, 16)
    assert spec.brackets == ((1, 4, 16), (4, 16), (16,))
    assert spec.bracket_turns == made.record.spec.bracket_turns
    assert spec.spec_hash == made.record.spec.spec_hash
    turns = spec.bracket_turns
    fell = trials_that_fell(resumed, 2 * len(turns))
    assert set(zip(turns, fell[len(turns) :], strict=True)) == {(0, 1), (1, 4), (2, 16)}
    made.storage.close()


def test_status_counts_what_was_spent_and_what_pruning_saved(tmp_path: Path) -> None:
    made = make_study(tmp_path)
    made.study.optimize(Objective(made.record.spec, fake_train), n_trials=12)
    now = status(made)
    trials = made.trials()
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert now.state == "finished"
    assert now.counts["PRUNED"] == len(pruned) > 0
    assert now.epochs_spent == sum(len(trial.intermediate_values) for trial in trials)
    assert now.epochs_saved == sum(9 - len(trial.intermediate_values) for trial in pruned)
    assert now.best is not None
    assert now.best.value == min(trial.value for trial in trials if trial not in pruned)
    assert now.brackets == (6, 4, 2)
    assert set(now.to_document()) >= {
        "study", "state", "budget", "trials", "best", "epochs", "workers", "resumed_trials",
    }  # fmt: skip
    made.storage.close()


def test_a_diverged_trial_saved_no_epochs(tmp_path: Path) -> None:
    def diverge(job):
        raise TrialEndedError("diverged", "epoch 1")
        yield

    made = make_study(tmp_path)
    made.study.optimize(Objective(made.record.spec, diverge), n_trials=1)
    assert status(made).counts["PRUNED"] == 1
    assert status(made).epochs_saved == 0
    made.storage.close()


def test_development_rows_leave_the_storage_with_the_last_study_that_names_them(
    tmp_path: Path, database_url: str
) -> None:
    a, b, other = (
        make_study(tmp_path, small_spec(name=name), url=database_url, development_sha256=sha256)
        for name, sha256 in (("a", "1" * 64), ("b", "1" * 64), ("other", "2" * 64))
    )
    for one in (a, b, other):
        one.storage.development.add(one.record.development_sha256, b"rows")

    def kept() -> list[str]:
        return [sha for sha in ("1" * 64, "2" * 64) if other.storage.development.read(sha)]

    delete(a)
    assert kept() == ["1" * 64, "2" * 64]
    delete(b)
    assert kept() == ["2" * 64]
    delete(other)
    assert kept() == []
    for one in (a, b, other):
        one.storage.close()


def test_rows_that_are_kept_while_others_are_dropped_are_not_lost(
    tmp_path: Path, database_url: str
) -> None:
    """A study comes with the same rows just when it is known that no study has them."""
    old = make_study(tmp_path, small_spec(name="old"), url=database_url)
    old.storage.development.add("c" * 64, b"rows")

    def come() -> None:
        new = make_study(tmp_path, small_spec(name="new"), url=database_url)
        new.storage.development.add("c" * 64, b"rows")
        new.storage.close()

    coming = threading.Thread(target=come)

    def let_it_come(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        if statement.startswith("DELETE FROM tuner_development"):
            coming.start()
            coming.join(1.0)  # it may not get through before this transaction has ended

    sa.event.listen(old.storage._rdb.engine, "before_cursor_execute", let_it_come)
    delete(old)
    coming.join()
    assert list_names(old.storage) == ["new"]
    assert old.storage.development.read("c" * 64) == b"rows"
    old.storage.close()


def test_delete_removes_trials_and_artifacts_but_never_ledger_rows(tmp_path: Path) -> None:
    made = make_study(tmp_path)
    made.artifacts.weights(0).parent.mkdir(parents=True)
    made.artifacts.weights(0).write_bytes(b"w")
    made.storage.ledger.open(
        opened_at="", opened_by="", study="small", study_key=made.key, trial=0,
        config_hash="", spec_hash="", split_id=IDENTITY.split_id,
    )  # fmt: skip
    made.storage.lease.take(made.id)
    with pytest.raises(StudyError, match="is being run"):
        delete(made)
    made.storage.lease.release()
    delete(made)
    assert list_names(made.storage) == []
    assert not made.artifacts.folder.exists()
    assert len(made.storage.ledger.entries(split_id=IDENTITY.split_id)) == 1
    made.storage.close()


# --- a folder that was moved ---


def in_a_folder(spec: StudySpec, folder: Path, source: str) -> StudySpec:
    settings = spec.data.model_copy(update={"source": source})
    return spec.model_copy(update={"folder": folder, "data": settings})


@pytest.mark.parametrize(
    ("folder", "source", "told"),
    [
        ("new/studies", "../data/rows.csv", "from .*/new/studies"),
        ("new", "rows.csv", "from .*/new"),
        ("old", "data/rows.csv", "from data/rows.csv"),
    ],
)
def test_a_launch_elsewhere_renews_where_the_study_file_and_its_data_are(
    tmp_path: Path, folder: str, source: str, told: str
) -> None:
    base = in_a_folder(small_spec(), tmp_path / "old", "rows.csv")
    made = make_study(tmp_path, base)
    moved = in_a_folder(base, tmp_path / folder, source)
    assert moved.spec_hash == base.spec_hash
    with Storage(made.storage.url) as running:
        running.lease.take(made.id)
        with pytest.raises(StudyError, match=rf"asks for the data {told}\."):
            again(made, moved)
        running.lease.release()
    assert load(made.storage, made.name, artifacts_root=tmp_path).record.spec == base
    renewed = again(made, moved)
    assert renewed.record.spec == moved
    loaded = load(made.storage, made.name, artifacts_root=tmp_path / "artifacts")
    assert loaded.record == renewed.record
    # Nothing else of what the study was made of has changed.
    assert replace(loaded.record, spec=base) == made.record
    made.storage.close()


@pytest.mark.parametrize("field", ["sha256", "split_id"])
def test_a_folder_with_other_data_is_not_renewed(tmp_path: Path, field: str) -> None:
    base = in_a_folder(small_spec(), tmp_path / "old", "rows.csv")
    made = make_study(tmp_path, base)
    with pytest.raises(StudyError, match=f"other data .{field}"):
        again(made, in_a_folder(base, tmp_path, "rows.csv"), replace(IDENTITY, **{field: "f" * 64}))
    with pytest.raises(StudyError, match="another study file"):
        again(made, in_a_folder(base, tmp_path, "others.csv"))
    loaded = load(made.storage, made.name, artifacts_root=tmp_path / "artifacts")
    assert loaded.record == made.record
    made.storage.close()
