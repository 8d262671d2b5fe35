from __future__ import annotations

import multiprocessing
import sqlite3
import threading
import time
from pathlib import Path

import optuna
import pytest

from tuner.errors import LeaseLostError, StorageError
from tuner.storage import LEASE_SECONDS, Decision, Storage


def url_in(folder: Path) -> str:
    return f"sqlite:///{folder}/tuner.db"


def new_study(storage: Storage) -> optuna.Study:
    return optuna.create_study(storage=storage.optuna, study_name="q")


def open_and_close(url: str) -> None:
    Storage(url).close()


def test_ten_processes_open_an_empty_database_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    openers = [context.Process(target=open_and_close, args=(url_in(tmp_path),)) for _ in range(10)]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join()
    assert [opener.exitcode for opener in openers] == [0] * 10
    assert [path.name for path in tmp_path.iterdir()] == ["tuner.db"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("runs/tuner.db", "no database URL"),
        ("sqlite://", "must outlive"),
        ("sqlite:///:memory:", "must outlive"),
        ("postgresql://u:secret@h/db", "only SQLite"),
        ("sqlite:////proc/none/tuner.db", "folder that you may write"),
    ],
)
def test_an_unusable_url_is_explained_without_its_password(url: str, words: str) -> None:
    with pytest.raises(StorageError, match=words) as caught:
        Storage(url)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "tuner.db"
    path.write_text("my thesis " * 200)
    with pytest.raises(StorageError, match="not a database"):
        Storage(url_in(tmp_path))
    assert path.read_text() == "my thesis " * 200


def test_a_schema_of_a_later_tuner_is_refused(tmp_path: Path) -> None:
    Storage(url_in(tmp_path)).close()
    with sqlite3.connect(tmp_path / "tuner.db") as connection:
        connection.execute("UPDATE tuner_schema SET version = 99")
    connection.close()
    with pytest.raises(StorageError, match="version 99"):
        Storage(url_in(tmp_path))


def test_a_plain_optuna_database_gets_our_tables_beside_its_own(tmp_path: Path) -> None:
    plain = optuna.storages.RDBStorage(url_in(tmp_path))
    optuna.create_study(storage=plain, study_name="theirs")
    plain.remove_session()
    plain.engine.dispose()
    with Storage(url_in(tmp_path)) as storage:
        assert [one.study_name for one in optuna.get_all_study_summaries(storage.optuna)] == [
            "theirs"
        ]
        assert storage.ledger() == ()


def test_only_one_coordinator_holds_the_lease_and_the_second_hears_who(tmp_path: Path) -> None:
    with Storage(url_in(tmp_path)) as one, Storage(url_in(tmp_path)) as two:
        study = new_study(one)
        one.take_lease(study._study_id)
        with pytest.raises(StorageError, match="is being run by process"):
            two.take_lease(study._study_id)
        one.release_lease()
        two.take_lease(study._study_id)


def test_a_lapsed_lease_may_be_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Storage(url_in(tmp_path)) as one, Storage(url_in(tmp_path)) as two:
        study = new_study(one)
        one.take_lease(study._study_id)
        later = time.time() + LEASE_SECONDS + 1
        monkeypatch.setattr("tuner.storage.time.time", lambda: later)
        two.take_lease(study._study_id)
        with pytest.raises(LeaseLostError):
            one.heartbeat()


def test_a_coordinator_that_was_replaced_writes_nothing_more(tmp_path: Path) -> None:
    with Storage(url_in(tmp_path)) as stale, Storage(url_in(tmp_path)) as other:
        study = new_study(stale)
        stale.take_lease(study._study_id)
        trial = study.ask()
        with sqlite3.connect(tmp_path / "tuner.db") as connection:
            connection.execute("UPDATE tuner_lease SET token = 'another'")
        connection.close()
        writes = [
            study.ask,
            lambda: trial.suggest_float("x", 0, 1),
            lambda: trial.report(0.5, 1),
            lambda: trial.set_user_attr("a", 1),
            lambda: study.set_user_attr("a", 1),
            lambda: study.tell(trial, 0.5),
            lambda: stale.record_decision(
                study._study_id, Decision(trial=0, kind="ask", epoch=None, verdict=None, seen=None)
            ),
        ]
        for write in writes:
            with pytest.raises(LeaseLostError):
                write()
        (kept,) = other.optuna.get_all_trials(study._study_id)
        assert kept.state == optuna.trial.TrialState.RUNNING
        assert not kept.params
        assert not kept.intermediate_values
        assert other.decisions(study._study_id) == ()


def test_a_stop_request_reaches_the_coordinator_and_nobody_else(tmp_path: Path) -> None:
    with Storage(url_in(tmp_path)) as driving, Storage(url_in(tmp_path)) as user:
        study = new_study(driving)
        assert user.request_stop(study._study_id) is False
        driving.take_lease(study._study_id)
        assert driving.heartbeat() is False
        assert user.request_stop(study._study_id) is True
        assert driving.heartbeat() is True


def test_a_write_lock_held_by_another_process_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.storage._SQLITE_BUSY_SECONDS", 0.05)
    monkeypatch.setattr("tuner.storage._SAY_SO_AFTER_SECONDS", 0.2)
    said: list[str] = []
    with Storage(url_in(tmp_path), patience_seconds=None, say=said.append) as storage:
        study = new_study(storage)
        trial = study.ask()
        blocker = sqlite3.connect(
            tmp_path / "tuner.db", isolation_level=None, check_same_thread=False
        )
        blocker.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(1.0, blocker.execute, ("ROLLBACK",))
        timer.start()
        trial.report(0.5, 1)
        timer.join()
        blocker.close()
        assert study.trials[0].intermediate_values == {1: 0.5}
    assert "waiting for it" in said[0]
    assert "is back" in said[-1]


def test_decisions_come_back_in_order(tmp_path: Path) -> None:
    with Storage(url_in(tmp_path)) as storage:
        taken = [
            Decision(trial=1, kind="ask", epoch=None, verdict=None, seen={0: 3}),
            Decision(trial=0, kind="rung", epoch=3, verdict="prune", seen={0: 3, 1: 0}),
            Decision(trial=0, kind="tell", epoch=3, verdict="PRUNED", seen=None),
        ]
        for decision in taken:
            storage.record_decision(7, decision)
        assert storage.decisions(7) == tuple(taken)
        assert storage.decisions(8) == ()


def test_ledger_rows_outlive_their_study(tmp_path: Path) -> None:
    with Storage(url_in(tmp_path)) as storage:
        study = new_study(storage)
        entry = storage.open_ledger_entry(
            opened_at="2026-01-01T00:00:00+00:00",
            opened_by="ada@lab",
            study="q",
            study_key="q-1",
            trial=3,
            config_hash="c",
            spec_hash="s",
            split_id="split",
        )
        storage.record_report(entry, {"accuracy": 0.5})
        storage.forget(study._study_id)
        optuna.delete_study(study_name="q", storage=storage.optuna)
        (row,) = storage.ledger(split_id="split")
        assert (row.opened_by, row.trial, row.report) == ("ada@lab", 3, {"accuracy": 0.5})
        assert storage.ledger(split_id="another") == ()
