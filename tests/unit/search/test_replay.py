"""A search is derived again from its stored history, and what cannot be is named."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from fakes import FakeWorkers, Notes, make_study, small_spec
from optuna.distributions import FloatDistribution

from tuner.coordination.coordinator import Coordinator
from tuner.search.replay import SearchReplay, replay_search
from tuner.search.study import load
from tuner.search.tuned_study import TunedStudy
from tuner.storage.storage import Storage


def searched(folder: Path, *, slots: int = 4, **changes: Any) -> TunedStudy:
    """A study that workers trained at once, in whatever order they came."""
    tuned = make_study(folder, small_spec(**{"trials": 40, **changes}))
    assert Coordinator(tuned, FakeWorkers(slots), Notes()).run() == "finished"
    return tuned


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampler": {"kind": "random"}},
        {"hyperband": None},
        {"hyperband": {"min_epochs": 1, "eta": 3, "audit": 0.5}},
        {"known": [{"learning_rate": 1e-3}, {"blocks": 2}]},
    ],
    ids=["tpe", "random", "no pruning", "audit", "known"],
)
def test_a_search_by_four_workers_is_explained(tmp_path: Path, changes: dict[str, Any]) -> None:
    tuned = searched(tmp_path, **changes)
    before = [(trial.params, trial.system_attrs) for trial in tuned.trials()]
    found = replay_search(tuned)
    assert found.first_unexplained is None
    assert found.to_document()["explained"] is True
    assert (found.asks, found.ends) == (40, 40)
    assert found.explained_decisions == found.decisions
    assert [(trial.params, trial.system_attrs) for trial in tuned.trials()] == before


def test_a_search_that_other_programs_added_to_is_explained(tmp_path: Path) -> None:
    tuned = make_study(tmp_path, small_spec(trials=10))
    tuned.study.add_trial(
        optuna.create_trial(
            value=0.4,
            params={"learning_rate": 0.01},
            distributions={"learning_rate": FloatDistribution(1e-4, 1e-1, log=True)},
        )
    )
    assert Coordinator(tuned, FakeWorkers(2), Notes()).run() == "finished"
    found = replay_search(tuned)
    assert found.first_unexplained is None
    assert "1 trial of other programs" in found.notes[0]


PRUNED = "(SELECT min(trial_id) FROM trials WHERE state = 'PRUNED')"
COMPLETE = "(SELECT min(trial_id) FROM trials WHERE state = 'COMPLETE')"
#: What is changed with a database client, and what is said of it.
CHANGES = {
    "UPDATE trial_params SET param_value = 0.0123 "
    "WHERE trial_id = 31 AND param_name = 'learning_rate'": (
        "suggestion for trial 30: learning_rate is 0.0123, derived"
    ),
    f"UPDATE trial_values SET value = value - 0.1 WHERE trial_id = {COMPLETE}": "its value is",
    "UPDATE trial_intermediate_values SET intermediate_value = 0.1 "
    "WHERE trial_id = 1 AND step = 1": (
        "trial 0 at epoch 1: its value after epoch 1 is 0.1, and its curve's"
    ),
    "DELETE FROM trial_intermediate_values WHERE trial_id = 1 AND step = 1": (
        "its value after epoch 1 is not stored"
    ),
    "UPDATE tuner_decisions SET verdict = 'go' "
    "WHERE id = (SELECT min(id) FROM tuner_decisions WHERE verdict = 'prune')": (
        "stored is 'go', derived 'prune'"
    ),
    "DELETE FROM tuner_decisions "
    "WHERE id = (SELECT max(id) FROM tuner_decisions WHERE verdict = 'go')": (
        "no verdict on it is stored"
    ),
    "DELETE FROM tuner_decisions WHERE kind = 'ask' AND trial = 5": (
        "trial 5 at epoch 1: it was not asked for before"
    ),
    "DELETE FROM tuner_decisions "
    "WHERE id = (SELECT max(id) FROM tuner_decisions WHERE kind = 'tell')": (
        "and no decision ended it"
    ),
    "UPDATE tuner_decisions SET trial = 51 - trial "
    "WHERE kind = 'ask' AND trial IN (25, 26)": "26: trials before it were not asked for yet",
    f"UPDATE trials SET state = 'COMPLETE' WHERE trial_id = {PRUNED}": "decided was PRUNED",
    "UPDATE tuner_decisions SET verdict = 'COMPLETE' WHERE kind = 'tell' AND trial = "
    f"(SELECT number FROM trials WHERE trial_id = {PRUNED});"
    f"UPDATE trials SET state = 'COMPLETE' WHERE trial_id = {PRUNED}": (
        "which neither max_epochs nor patience explains"
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("made")
    tuned = searched(folder)
    tuned.storage.close()
    with closing(sqlite3.connect(folder / "tuner.db")) as connection:
        connection.execute("VACUUM")
    return (folder / "tuner.db").read_bytes()


@pytest.mark.parametrize(("sql", "words"), CHANGES.items(), ids=range(len(CHANGES)))
def test_a_changed_value_is_named(made: bytes, sql: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "tuner.db").write_bytes(made)
    with closing(sqlite3.connect(tmp_path / "tuner.db")) as connection, connection:
        connection.executescript(sql)
        assert connection.total_changes > 0
    assert words in said(tmp_path)


def said(folder: Path) -> str:
    with Storage(f"sqlite:///{folder}/tuner.db") as storage:
        found: SearchReplay = replay_search(load(storage, "small", artifacts_root=folder))
    assert not found.explained
    assert found.first_unexplained is not None
    return found.first_unexplained.in_words
