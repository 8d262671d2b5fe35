"""An audit lets a share of the trials to be pruned train on, and changes no other trial."""

from __future__ import annotations

from pathlib import Path

from fakes import FakeWorkers, Notes, make_study, small_spec
from optuna.trial import TrialState

from tuner.coordination.coordinator import Coordinator
from tuner.metrics import mid_p_interval
from tuner.search.attributes import AUDITED_KEY
from tuner.search.pruning_audit import audit_in_words, is_drawn, pruning_audit
from tuner.search.status import status
from tuner.search.tuned_study import TunedStudy


def searched(folder: Path, audit: float | None, trials: int = 60) -> TunedStudy:
    hyperband = {"min_epochs": 1, "eta": 3} | ({} if audit is None else {"audit": audit})
    tuned = make_study(folder, small_spec(trials=trials, hyperband=hyperband))
    # One slot, so that the order of the decisions is the same with an audit and without.
    assert Coordinator(tuned, FakeWorkers(1), Notes()).run() == "finished"
    return tuned


def test_an_audit_changes_nothing_but_the_trials_that_it_lets_train_on(tmp_path: Path) -> None:
    plain, audited = searched(tmp_path / "a", None), searched(tmp_path / "b", 0.3)
    marked = 0
    for before, after in zip(plain.trials(), audited.trials(), strict=True):
        assert after.params == before.params
        epoch = after.user_attrs.get(AUDITED_KEY)
        if epoch is None:
            assert (after.state, after.intermediate_values) == (
                before.state,
                before.intermediate_values,
            )
            assert before.state != TrialState.PRUNED or not is_drawn(
                audited.record.spec, after.number
            )
        else:
            marked += 1
            assert (before.state, before.last_step) == (TrialState.PRUNED, epoch)
            assert (after.state, after.last_step) == (TrialState.COMPLETE, 9)
            assert is_drawn(audited.record.spec, after.number)
            assert f"would have pruned it after epoch {epoch}" in after.user_attrs["note"]
    assert marked > 3
    assert plain.budget == audited.budget == 60  # audited trials are among those


def test_the_draw_is_the_share_that_was_asked_for() -> None:
    spec = small_spec(hyperband={"min_epochs": 1, "eta": 3, "audit": 0.05})
    drawn = [trial for trial in range(20_000) if is_drawn(spec, trial)]
    assert 900 < len(drawn) < 1100
    more = small_spec(hyperband={"min_epochs": 1, "eta": 3, "audit": 0.2})
    assert all(is_drawn(more, trial) for trial in drawn)  # a larger share adds to a smaller
    assert drawn != [
        trial for trial in range(20_000) if is_drawn(spec.model_copy(update={"seed": 9}), trial)
    ]


def test_status_says_how_often_pruning_was_wrong_and_by_how_much(tmp_path: Path) -> None:
    tuned = searched(tmp_path, 0.5)
    found = status(tuned).pruning_audit
    assert found is not None
    trials = tuned.trials(TrialState.COMPLETE)
    ran_on = [trial.value for trial in trials if AUDITED_KEY in trial.user_attrs]
    kept = sorted(trial.value for trial in trials if AUDITED_KEY not in trial.user_attrs)
    better = sum(value < kept[0] for value in ran_on)
    assert (found.audited, found.better) == (len(ran_on), better)
    assert found.better_ci95 == mid_p_interval(better, len(ran_on))
    assert found.among_best == sum(value < kept[9] for value in ran_on)
    assert found.largest_gain == max(0.0, kept[0] - min(ran_on))
    assert found.pruned == len(tuned.trials(TrialState.PRUNED))
    words = audit_in_words(found.to_document())
    assert words.startswith(f"Of {len(ran_on)} trials that pruning would have ended")
    assert f"{better} became better than the best that pruning kept" in words
    assert status(tuned).to_document()["pruning_audit"]["audited"] == len(ran_on)


def test_without_an_audit_nothing_is_said(tmp_path: Path) -> None:
    tuned = searched(tmp_path, None, trials=3)
    assert status(tuned).to_document()["pruning_audit"] is None
    spec = small_spec(hyperband={"min_epochs": 1, "eta": 3, "audit": 0.5})
    nothing_yet = pruning_audit(spec, [])
    assert nothing_yet is not None
    assert "nothing is known" in audit_in_words(nothing_yet.to_document())
