"""The contract of every storage, and what is SQLite's or PostgreSQL's alone."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa
from postgres import Postgres

from tuner import database
from tuner.database import PASSWORD_FILE_VARIABLE, closed_engine, parse_url
from tuner.errors import LeaseLostError, StorageError
from tuner.storage import Decision, Storage, check_storage


def new_study(storage: Storage) -> optuna.Study:
    return optuna.create_study(storage=storage.optuna, study_name="q")


def execute(url: str, *statements: str) -> None:
    """What another process does to the database."""
    with closed_engine(parse_url(url)) as engine, engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def open_and_close(url: str) -> None:
    Storage(url).close()


# --- schema ---


def test_ten_processes_open_an_empty_database_at_once(
    empty_database_url: str, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    openers = [
        context.Process(target=open_and_close, args=(empty_database_url,)) for _ in range(10)
    ]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join()
    assert [opener.exitcode for opener in openers] == [0] * 10
    assert [path.name for path in tmp_path.iterdir() if path.name != "tuner.db"] == []
    assert check_storage(empty_database_url).is_right


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("runs/tuner.db", "no database URL"),
        ("sqlite://", "must outlive"),
        ("sqlite:///:memory:", "must outlive"),
        ("mysql://u:secret@h/db", "only SQLite and PostgreSQL"),
        ("postgresql+psycopg2://u:secret@h/db", "only SQLite and PostgreSQL"),
        ("postgresql://u:secret@h", "names no database"),
        ("postgresql://u:secret@h:port/db", "no database URL"),
        ("postgresql://u:secret@127.0.0.1:1/db", "server runs"),
        ("sqlite:////proc/none/tuner.db", "folder that you may write"),
    ],
)
def test_an_unusable_url_is_explained_without_its_password(url: str, words: str) -> None:
    with pytest.raises(StorageError, match=words) as caught:
        Storage(url, patience_seconds=0.1)
    assert "secret" not in str(caught.value)
    assert "psycopg:" not in str(caught.value)


def test_a_file_that_is_no_database_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "tuner.db"
    path.write_text("my thesis " * 200)
    with pytest.raises(StorageError, match="not a database"):
        Storage(f"sqlite:///{path}")
    assert path.read_text() == "my thesis " * 200


def test_a_schema_of_a_later_tuner_is_refused(empty_database_url: str) -> None:
    open_and_close(empty_database_url)
    execute(empty_database_url, "UPDATE tuner_schema SET version = 99")
    assert check_storage(empty_database_url).schema == "newer"
    with pytest.raises(StorageError, match="version 99"):
        Storage(empty_database_url)


def test_a_database_of_an_earlier_schema_is_upgraded(empty_database_url: str) -> None:
    open_and_close(empty_database_url)
    execute(
        empty_database_url,
        "UPDATE tuner_schema SET version = 1",
        "ALTER TABLE tuner_lease DROP COLUMN batches",
        "DROP TABLE tuner_queue",
        "DROP TABLE tuner_development",
    )
    assert check_storage(empty_database_url).schema == "outdated"
    with Storage(empty_database_url) as storage:
        assert storage.queued() == ()
        storage.take_lease(new_study(storage)._study_id)
        storage.release_lease()
    assert check_storage(empty_database_url).schema == "current"


def test_tables_of_a_newer_optuna_are_refused(empty_database_url: str) -> None:
    open_and_close(empty_database_url)
    execute(empty_database_url, "UPDATE alembic_version SET version_num = 'v9.0.0'")
    assert check_storage(empty_database_url).schema == "newer"
    for upgrade in (False, True):
        with pytest.raises(StorageError, match="a newer Optuna"):
            Storage(empty_database_url, upgrade=upgrade)


def test_tables_of_an_older_optuna_are_refused_until_they_are_upgraded(
    empty_database_url: str,
) -> None:
    open_and_close(empty_database_url)
    execute(empty_database_url, "UPDATE alembic_version SET version_num = 'v3.0.0.d'")
    assert check_storage(empty_database_url).schema == "outdated"
    with pytest.raises(StorageError, match="tuner storage init"):
        Storage(empty_database_url)
    Storage(empty_database_url, upgrade=True).close()
    assert check_storage(empty_database_url).is_right


def test_a_plain_optuna_database_gets_our_tables_beside_its_own(empty_database_url: str) -> None:
    plain = optuna.storages.RDBStorage(
        parse_url(empty_database_url).render_as_string(hide_password=False)
    )
    optuna.create_study(storage=plain, study_name="theirs")
    plain.remove_session()
    plain.engine.dispose()
    assert check_storage(empty_database_url).schema == "missing"
    with Storage(empty_database_url) as storage:
        assert [one.study_name for one in optuna.get_all_study_summaries(storage.optuna)] == [
            "theirs"
        ]
        assert storage.ledger() == ()


def test_a_check_says_what_it_found_and_changes_nothing(
    empty_database_url: str, tmp_path: Path
) -> None:
    before = check_storage(empty_database_url)
    assert (before.reachable, before.schema, before.is_right) == (True, "missing", False)
    assert list(tmp_path.iterdir()) == []
    open_and_close(empty_database_url)
    after = check_storage(empty_database_url)
    assert after.is_right
    assert after.milliseconds > 0
    assert after.commit_milliseconds > 0
    assert "tuner:" not in after.url or ":***@" in after.url


def test_a_check_of_a_server_that_is_away_says_so() -> None:
    check = check_storage("postgresql://u:secret@127.0.0.1:1/db")
    assert (check.reachable, check.schema, check.is_right) == (False, None, False)
    assert "refused" in check.detail
    assert "secret" not in check.detail


def test_the_password_may_come_from_a_file(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = sa.make_url(postgres.database())
    secret = tmp_path / "password"
    secret.write_text(f"{url.password}\n")
    without = url._replace(password=None).render_as_string()
    monkeypatch.setenv(PASSWORD_FILE_VARIABLE, str(secret))
    open_and_close(without)
    secret.write_text("wrong")
    with pytest.raises(StorageError, match="authentication failed"):
        Storage(without)
    secret.unlink()
    with pytest.raises(StorageError, match=PASSWORD_FILE_VARIABLE):
        Storage(without)


# --- lease ---


def test_only_one_coordinator_holds_the_lease_and_the_second_hears_who(database_url: str) -> None:
    with Storage(database_url) as one, Storage(database_url) as two:
        study = new_study(one)
        one.take_lease(study._study_id)
        with pytest.raises(StorageError, match="is being run by process"):
            two.take_lease(study._study_id)
        one.release_lease()
        two.take_lease(study._study_id)


def test_of_many_who_begin_at_once_one_gets_the_lease(database_url: str) -> None:
    with Storage(database_url) as first:
        study_id = new_study(first)._study_id
    storages = [Storage(database_url) for _ in range(6)]
    barrier, outcomes = threading.Barrier(6), []

    def take(storage: Storage) -> None:
        barrier.wait()
        try:
            outcomes.append(storage.take_lease(study_id))
        except StorageError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=take, args=(storage,)) for storage in storages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for storage in storages:
        storage.close()
    assert sorted("is being run by" in outcome for outcome in outcomes) == [False] + [True] * 5


OF_ELSEWHERE = """UPDATE tuner_lease SET holder = '{"host": "elsewhere", "pid": 7}'"""


@pytest.mark.parametrize("clock", ["-31", "+3600"])
def test_a_lapsed_lease_is_taken_over_and_its_holder_writes_nothing_more(
    database_url: str, clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.storage._LAST_LOOK_SECONDS", 0.6)
    with Storage(database_url) as one, Storage(database_url) as two:
        study = new_study(one)
        one.take_lease(study._study_id)
        execute(
            database_url, OF_ELSEWHERE, f"UPDATE tuner_lease SET renewed_at = renewed_at {clock}"
        )
        if clock == "+3600":  # the clock was set back: nothing to go by but our own waiting
            monkeypatch.setattr("tuner.storage.LEASE_SECONDS", 0.6)
        two.take_lease(study._study_id)
        with pytest.raises(LeaseLostError):
            one.heartbeat()


@pytest.mark.parametrize("clock", ["- 3600", "+ 3600"])
def test_who_renews_its_lease_is_alive_whatever_the_clock_says(
    database_url: str, clock: str
) -> None:
    with Storage(database_url) as one, Storage(database_url) as two:
        study = new_study(one)
        one.take_lease(study._study_id)
        jump = f"UPDATE tuner_lease SET renewed_at = renewed_at {clock}"
        execute(database_url, OF_ELSEWHERE, jump)
        renewal = threading.Timer(0.3, one.heartbeat)
        renewal.start()
        with pytest.raises(StorageError, match="is being run by"):
            two.take_lease(study._study_id)
        renewal.join()


def test_a_dead_process_of_this_machine_holds_no_lease(database_url: str) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=take_and_die, args=(database_url,)
    )
    process.start()
    process.join()
    assert process.exitcode == 7
    with Storage(database_url) as storage:
        (study,) = optuna.get_all_study_summaries(storage.optuna)
        began = time.monotonic()
        storage.take_lease(study._study_id)
        assert time.monotonic() - began < 3.0


def take_and_die(url: str) -> None:
    storage = Storage(url)
    storage.take_lease(new_study(storage)._study_id)
    multiprocessing.process.os._exit(7)


def write_through(storage: Storage, write: Callable[[], object]) -> None:
    write()
    storage.flush()


def test_a_coordinator_that_was_replaced_writes_nothing_more(database_url: str) -> None:
    with Storage(database_url) as stale, Storage(database_url) as other:
        study = new_study(stale)
        stale.take_lease(study._study_id)
        trial = study.ask()
        stale.flush()
        execute(database_url, "UPDATE tuner_lease SET token = 'another'")
        decision = Decision(trial=0, kind="ask", epoch=None, verdict=None)
        writes = [
            study.ask,
            lambda: study.set_user_attr("a", 1),
            stale.heartbeat,
            # From here on one batch fails, and with it everything after.
            lambda: trial.suggest_float("x", 0, 1),
            lambda: trial.report(0.5, 1),
            lambda: trial.set_user_attr("a", 1),
            lambda: stale.record_decision(study._study_id, decision),
            lambda: study.tell(trial, 0.5),
        ]
        for write in writes:
            with pytest.raises(LeaseLostError):
                write_through(stale, write)
        (kept,) = other.optuna.get_all_trials(study._study_id)
        assert kept.state == optuna.trial.TrialState.RUNNING
        assert not kept.params
        assert not kept.intermediate_values
        assert other.decisions(study._study_id) == ()


def test_a_stop_request_reaches_the_coordinator_and_nobody_else(database_url: str) -> None:
    with Storage(database_url) as driving, Storage(database_url) as user:
        study = new_study(driving)
        assert user.request_stop(study._study_id) is False
        driving.take_lease(study._study_id)
        assert driving.heartbeat() is False
        assert user.request_stop(study._study_id) is True
        assert driving.heartbeat() is True


# --- outages ---


def test_a_write_lock_held_by_another_process_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.database._SQLITE_BUSY_SECONDS", 0.05)
    monkeypatch.setattr("tuner.database._SAY_SO_AFTER_SECONDS", 0.2)
    said: list[str] = []
    url = f"sqlite:///{tmp_path}/tuner.db"
    with Storage(url, patience_seconds=None, say=said.append) as storage:
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


def test_a_server_that_was_restarted_is_found_again(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.database._SAY_SO_AFTER_SECONDS", 0.0)
    said: list[str] = []
    with Storage(postgres.database(), patience_seconds=None, say=said.append) as storage:
        study = new_study(storage)
        storage.take_lease(study._study_id)
        trial = study.ask()
        postgres.stop()
        trial.report(0.5, 1)  # taken into the next batch, which waits
        start = threading.Timer(1.0, postgres.start)
        start.start()
        storage.flush()
        start.join()
        assert storage.heartbeat() is False
        storage.release_lease()
        assert study.trials[0].intermediate_values == {1: 0.5}
    assert "is back" in said[-1]


def test_who_gives_up_on_a_database_that_is_away_hears_why(postgres: Postgres) -> None:
    storage = Storage(postgres.database(), patience_seconds=None, say=lambda _: None)
    trial = (study := new_study(storage)).ask()
    storage.take_lease(study._study_id)
    postgres.stop()
    try:
        trial.report(0.5, 1)
        threading.Timer(0.5, storage.give_up).start()
        with pytest.raises(StorageError, match="server runs"):
            storage.flush()
    finally:
        postgres.start()
        storage.close()


def test_a_statement_that_is_never_answered_is_given_up(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    from proxy import Proxy

    monkeypatch.setattr(database, "_SILENCE_SECONDS", 0.5)
    with Proxy(postgres.port) as proxy:
        url = postgres.database(port=proxy.port)
        with Storage(url, patience_seconds=None, say=lambda _: None) as storage:
            study = new_study(storage)
            proxy.cut("blackhole")
            threading.Timer(1.0, proxy.heal).start()
            assert study.ask().number == 0


def test_a_writer_frozen_in_the_middle_of_a_batch_does_not_keep_its_locks(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(database._POSTGRESQL_17_SETTINGS, "transaction_timeout", "1s")
    url = postgres.database()
    with Storage(url) as storage:
        storage.take_lease(new_study(storage)._study_id)
        with closed_engine(parse_url(url)) as engine:
            pooled = engine.raw_connection()
            frozen = pooled.driver_connection
            frozen.pgconn.enter_pipeline_mode()
            for statement in (b"BEGIN", b"UPDATE tuner_lease SET batches = batches + 1"):
                frozen.pgconn.send_query_params(statement, None)
            frozen.pgconn.send_flush_request()
            while frozen.pgconn.flush():
                pass
            # The server waits for the rest of the batch, and calls that active.
            assert storage.heartbeat() is False
            pooled.invalidate()


# --- decisions, ledger, queue ---


def test_decisions_come_back_in_order(database_url: str) -> None:
    with Storage(database_url) as storage:
        taken = [
            Decision(trial=1, kind="ask", epoch=None, verdict=None),
            Decision(trial=0, kind="rung", epoch=3, verdict="prune"),
            Decision(trial=0, kind="tell", epoch=3, verdict="PRUNED"),
        ]
        for decision in taken:
            storage.record_decision(7, decision)
        assert storage.decisions(7) == tuple(taken)
        assert storage.decisions(8) == ()


def test_ledger_rows_outlive_their_study(database_url: str) -> None:
    with Storage(database_url) as storage:
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


def test_the_queue_keeps_its_order_and_takes_a_study_once(database_url: str) -> None:
    with Storage(database_url) as storage, Storage(database_url) as service:
        assert storage.enqueue(7) is True
        assert storage.enqueue(3) is True
        assert storage.enqueue(7) is False
        assert service.queued() == (7, 3)
        assert service.dequeue(7) is True
        assert service.dequeue(7) is False
        assert storage.queued() == (3,)
        storage.forget(3)
        assert storage.queued() == ()


def test_development_rows_travel_through_the_database(database_url: str) -> None:
    with Storage(database_url) as storage, Storage(database_url) as service:
        assert service.development("a" * 64) is None
        storage.keep_development("a" * 64, b"rows")
        storage.keep_development("a" * 64, b"rows")
        assert service.development("a" * 64) == b"rows"
