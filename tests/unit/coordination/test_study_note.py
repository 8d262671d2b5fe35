"""The overview that stands with a study in the dashboard."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna_dashboard
import pytest
from fakes import IDENTITY, FakeWorkers, Notes, make_study, small_spec
from optuna.trial import TrialState
from optuna_dashboard._note import save_note_with_version
from waiting import wait_until

from tuner.coordination import study_note
from tuner.coordination.coordinator import Coordinator
from tuner.coordination.study_note import overview
from tuner.errors import LeaseLostError
from tuner.search.attributes import ERROR_KEY
from tuner.search.status import status
from tuner.search.tuned_study import TunedStudy
from tuner.train import EpochResult

Make = Callable[..., TunedStudy]


@pytest.fixture
def study(tmp_path: Path, database_url: str) -> Iterator[Make]:
    made: list[TunedStudy] = []

    def make(**changes: object) -> TunedStudy:
        made.append(make_study(tmp_path, small_spec(**changes), url=database_url))
        return made[-1]

    yield make
    for one in made:
        one.storage.close()


def shown(tuned: TunedStudy) -> str:
    """As the dashboard reads it."""
    return optuna_dashboard.get_note(tuned.study)


def test_a_finished_study_has_its_overview(study: Make) -> None:
    tuned = study(trials=12)
    Coordinator(tuned, FakeWorkers(), Notes()).run()
    now, said = status(tuned), shown(tuned)
    best = now.best
    assert best is not None
    assert said.startswith("## small\n\n**SYNTHETIC DATA")
    assert "**12 of 12 trials** (100%) are finished." in said
    assert "**Finished** as of 20" in said
    assert f"Trial {best.number}: **validation loss {best.value:.4f} nats**" in said
    assert f"| learning\\_rate | {best.params['learning_rate']:.4g} |" in said
    assert f"{now.epochs_spent} spent, {now.epochs_saved} saved by pruning" in said
    table = re.findall(r"^\| (\d) \| (.*?) \| (\d+) \| (\d+) \| (\d+) \|$", said, re.MULTILINE)
    assert [row[1] for row in table] == ["1, 3", "3", "none"]
    assert [int(row[2]) for row in table] == list(now.brackets)
    assert sum(int(row[3]) for row in table) == now.counts["COMPLETE"]
    assert sum(int(row[4]) for row in table) == now.counts["PRUNED"]
    assert f"`{IDENTITY.split_id[:16]}`" in said
    assert "tuner report small" in said
    assert best.user_attrs["train_again"] in said


def test_the_overview_is_fresh_while_the_study_runs(
    study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_note, "_OVERVIEW_SECONDS", 0.0)
    tuned = study(trials=3, hyperband=None)
    seen: list[str] = []

    def look(trial: int, result: EpochResult) -> None:
        # Only while a trial runs: its thread waits here for the overview that tells of the others.
        if result.epoch == 9:

            def is_told() -> bool:
                tuned.storage.flush()
                return f"**{trial} of 3 trials**" in shown(tuned)

            wait_until(is_told, lambda: shown(tuned))
            seen.append(shown(tuned))

    Coordinator(tuned, FakeWorkers(1), Notes(look)).run()
    assert len(seen) == 3
    assert all("**Running on 1 worker**" in note for note in seen)
    assert "tuner stop small" in seen[0]


def test_a_stopped_study_says_how_it_resumes(study: Make) -> None:
    tuned = study(trials=3)
    coordinators: list[Coordinator] = []
    stop = Notes(lambda *_: coordinators[0].stop("interrupted"))
    coordinators.append(Coordinator(tuned, FakeWorkers(1), stop))
    coordinators[0].run()
    assert "**Stopped** as of" in shown(tuned)
    assert "It resumes with its study file" in shown(tuned)
    assert "tuner launch STUDY.toml" in shown(tuned)


def test_a_study_that_ended_early_says_why(study: Make) -> None:
    tuned = study(trials=50, stop={"patience": 1, "min_delta": 1.0})
    Coordinator(tuned, FakeWorkers(1), Notes()).run()
    finished = status(tuned).finished_trials
    assert "**Finished** as of" in shown(tuned)
    assert f"**{finished} of {finished} trials**" in shown(tuned)
    assert "Ended early: 1 finished trial in a row did not improve on" in shown(tuned)


def test_only_who_holds_the_lease_writes_the_overview(study: Make) -> None:
    tuned = study(trials=3)
    tuned.storage.lease.take(tuned.id)
    tuned.storage.begin_note(tuned.id, "mine").result()
    tuned.storage._rdb.fence.token = "another's"
    with pytest.raises(LeaseLostError):
        tuned.storage.begin_note(tuned.id, "late").result()
    assert shown(tuned) == "mine"


def test_a_note_that_somebody_wrote_in_the_dashboard_is_replaced_whole(study: Make) -> None:
    tuned = study(trials=3)
    tuned.storage.begin_note(tuned.id, "first").result()
    long = "x" * 5000  # in three pieces
    save_note_with_version(tuned.storage.optuna, tuned.id, None, 2, long)
    assert shown(tuned) == long
    tuned.storage.begin_note(tuned.id, "second").result()
    assert shown(tuned) == "second"
    attributes = tuned.storage.optuna.get_study_system_attrs(tuned.id)
    assert attributes["dashboard:note_ver"] == 3


def test_what_users_name_has_no_meaning_in_markdown(study: Make) -> None:
    tuned = study(trials=1, name="![x](http:evil) `a` | b".replace(":", ";").replace("|", "1"))
    data = dataclasses.replace(IDENTITY, source="<img src=x>\n| [a](b) `c`")
    tuned = dataclasses.replace(tuned, record=dataclasses.replace(tuned.record, data=data))
    tuned.study.set_user_attr(ERROR_KEY, "<script> _x_\n# heading")
    said = overview(tuned, status(tuned), "stopped")
    assert r"## \!\[x\]\(http;evil\) \`a\` 1 b" in said
    assert r"| source | \<img src=x\> \| \[a\]\(b\) \`c\` |" in said
    assert r"The service gave it up: \<script\> \_x\_ \# heading" in said


def test_a_study_without_a_trained_trial_does_not_point_to_a_report(study: Make) -> None:
    tuned = study(trials=1)
    said = overview(tuned, status(tuned), "finished")
    assert "No trial was trained to its end yet." in said
    assert "tuner report" not in said
    assert [trial for trial in tuned.trials() if trial.state == TrialState.COMPLETE] == []
