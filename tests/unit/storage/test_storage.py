"""The contract of every storage, and what is SQLite's or PostgreSQL's alone."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa
from postgres import Postgres
from waiting import wait_until

from tuner.errors import LeaseLostError, StorageError, StorageMissingError, StudyInUseError
from tuner.storage import engine as database
from tuner.storage.check import check_storage
from tuner.storage.decisions import Decision
from tuner.storage.engine import SilenceTimer, closed_engine
from tuner.storage.holder import LeaseHolder
from tuner.storage.storage import Storage
from tuner.storage.url import PASSWORD_FILE_VARIABLE, parse_url, shown


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
        # where the path of a SQLite file stands, and what may follow it
        ("sqlite://runs/tuner.db", "three slashes; write sqlite:///runs/tuner.db"),
        ("sqlite://tuner.db", "three slashes; write sqlite:///tuner.db"),
        ("sqlite://u:secret@host:1/tuner.db", "three slashes; write sqlite:///host/tuner.db"),
        ("sqlite:///~/tuner.db", "no shell replaces the ~"),
        ("sqlite:///tuner.db?timeout=abc", "timeout is one number of seconds above 0"),
        ("sqlite:///tuner.db?timeout=nan", "timeout is one number of seconds above 0"),
        ("sqlite:///tuner.db?timeout=-1", "timeout is one number of seconds above 0"),
        ("sqlite:///tuner.db?timeout=", "timeout is one number of seconds above 0"),
        ("sqlite:///tuner.db?timeout=1&timeout=2", "timeout is one number of seconds above 0"),
        ("sqlite:///tuner.db?cached_statements=x", "no option 'cached_statements'"),
        ("sqlite:///file:tuner.db?mode=ro&uri=true", "no option 'mode'"),
        ("sqlite:///what?.db", "written %3F"),
        ("sqlite:///tuner%00.db", "NUL byte"),
        ("sqlite:///tuner\udc80.db", "not UTF-8"),
        # the host and the port of a PostgreSQL
        ("postgresql://u:secret@a..b/db", "'a..b' cannot be a host"),
        (f"postgresql://u:secret@{'h' * 64}/db", "cannot be a host"),
        (f"postgresql://u:secret@{'h.' * 127}h/db", "cannot be a host"),
        ("postgresql://u@h/db?host=a..b&password=secret", "'a..b' cannot be a host"),
        ("postgresql://u:secret@h\udc80/db", "not UTF-8"),
        ("postgresql://u:sec@ret@127.0.0.1:1/db", "write @ as %40"),
        ("postgresql://u:secret@h:0/db", "a port is a number from 1 to 65535, not 0"),
        ("postgresql://u:secret@h:65536/db", "a port is a number from 1 to 65535, not 65536"),
        ("postgresql://u:secret@h:-1/db", "a port is a number from 1 to 65535, not -1"),
        ("postgresql://u@/db?host=h:70000&password=secret", "a port is a number"),
        ("postgresql://u:secret@h/db?port=abc", "hosts or ports cannot be read"),
        ("postgresql://u:secret@höst.invalid/db", "failed to resolve host 'höst.invalid'"),
        ("postgresql://u:secret@127.0.0.1:1/d%00b", "NUL byte"),
        # the options of its connection
        ("postgresql://u:secret@127.0.0.1:1/db?prepare_threshold=0", "'prepare_threshold'"),
        ("postgresql://u:secret@127.0.0.1:1/db?autocommit=1", "no option 'autocommit'"),
        ("postgresql://u:secret@127.0.0.1:1/db?ssl_mode=require", 'did you mean "sslmode"'),
        ("postgresql://u@127.0.0.1:1/db?password=secret&x=secret", "no option 'x'"),
        ("postgresql://u@127.0.0.1:1/db?pasword=secret", 'did you mean "password"'),
        ("postgresql://u:secret@127.0.0.1:1/db?connect_timeout=", "'connect_timeout' has no value"),
        ("postgresql://u:secret@127.0.0.1:1/db?sslmode", "'sslmode' has no value"),
        ("postgresql://u:se?ret@127.0.0.1:1/db?sslmode=", "'sslmode' has no value"),
        ("postgresql://u@127.0.0.1:1/db?sslmode=disable&sslmode=allow", "'sslmode' stands twice"),
        ("postgresql://u:secret@h:port/db?password=secret", "no database URL"),
        ("postgresql://u@h:port/db?password=secret", "no database URL"),
        ("secret@h", "no database URL"),
        ("mysql://u@h/db?password=secret", "only SQLite and PostgreSQL"),
    ],
)
def test_an_unusable_url_is_explained_without_its_password(
    url: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for look in (lambda: Storage(url, patience_seconds=0.1), lambda: described(url)):
        with pytest.raises(StorageError, match=re.escape(words)) as caught:
            look()
        assert not re.search("secret|se.?ret", str(caught.value))
        assert "psycopg:" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def described(url: str) -> None:
    """What `storage check` says of a database that cannot be reached."""
    check = check_storage(url)
    if not check.reachable:
        raise StorageError(check.detail)
    if "/proc/" in url:  # it only looks, and there is no file
        raise StorageError("folder that you may write")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("sslmode=foo", 'invalid sslmode value: "foo"'),
        ("channel_binding=foo", 'invalid channel_binding value: "foo"'),
        ("target_session_attrs=foo", 'invalid target_session_attrs value: "foo"'),
        ("keepalives=abc", 'invalid integer value "abc"'),
        ("connect_timeout=abc", "bad value for connect_timeout"),
        ("hostaddr=abc", "could not parse network address"),
        ("service=none", 'definition of service "none" not found'),
    ],
)
def test_an_options_bad_value_is_told_at_once(option: str, words: str) -> None:
    with pytest.raises(StorageError, match=words) as caught:  # else it would wait for an hour
        Storage(f"postgresql://u:secret@127.0.0.1:1/db?{option}", patience_seconds=3600.0)
    assert "its options" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_server_refuses_a_setting_of_the_url_at_once(postgres: Postgres) -> None:
    for setting in ("no_such_setting=1", "statement_timeout=abc"):
        url = f"{postgres.database()}?options=-c%20{setting}"
        with pytest.raises(StorageError, match=setting.partition("=")[0]):
            Storage(url, patience_seconds=3600.0)


def test_a_host_of_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "a..b")
    with pytest.raises(StorageError, match="Check the address"):
        Storage("postgresql://u@/db", patience_seconds=0.1)


def test_a_url_says_how_long_sqlite_waits_for_a_lock(tmp_path: Path) -> None:
    with Storage(f"sqlite:///{tmp_path}/tuner.db?timeout=0.25") as storage:
        connection = storage._rdb.engine.raw_connection()
        assert connection.cursor().execute("PRAGMA busy_timeout").fetchone() == (250,)
        connection.close()


@pytest.mark.parametrize(
    "name", ["[a].db", "a*b", "a?b.db", "a#b", "100%", "a%20b", "{x}", "ä 蛋", "'q\"", "n" * 250]
)
def test_a_file_may_have_any_name(name: str, tmp_path: Path) -> None:
    # A file's own journal has eight letters more: SQLite refuses what is longer than 247.
    name = name[:247]
    url = f"sqlite:///{tmp_path}/{name.replace('%', '%25').replace('?', '%3F')}"
    with Storage(url) as storage:
        new_study(storage)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert check_storage(url).is_right
    assert parse_url(shown(parse_url(url))) == parse_url(url)


def refuse_links(url: str, done: str) -> None:
    """Opens a database as on exFAT or an SMB share, and writes a study of its own."""

    def refuse(source: object, target: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    os.link = refuse
    with Storage(url) as storage:
        optuna.create_study(storage=storage.optuna, study_name=done)


def test_processes_open_a_database_at_once_where_hard_links_are_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/[a].db"
    context = multiprocessing.get_context("spawn")
    names = [f"study-{number}" for number in range(4)]
    openers = [context.Process(target=refuse_links, args=(url, name)) for name in names]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join()
    assert [opener.exitcode for opener in openers] == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["[a].db"]
    with Storage(url) as storage:  # no rename took the place of a database with a study in it
        assert sorted(optuna.get_all_study_names(storage.optuna)) == names


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_a_database_published_meanwhile_keeps_its_place_where_hard_links_are_refused(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuner.db"

    def another_was_first(source: object, target: object) -> None:
        monkeypatch.undo()
        open_first(path)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", another_was_first)
    with Storage(f"sqlite:///{path}") as storage:
        assert optuna.get_all_study_names(storage.optuna) == ["theirs"]
    assert [left.name for left in tmp_path.iterdir()] == ["tuner.db"]


def open_first(path: Path) -> None:
    with Storage(f"sqlite:///{path}") as storage:
        optuna.create_study(storage=storage.optuna, study_name="theirs")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"secret\xff\n", "is not UTF-8"),
        ("secret".encode("utf-16"), "is not UTF-8"),
        (b"secret\nmore\n", "more than one line"),
        (b"secret\rmore", "more than one line"),
        (b"sec\0ret", "NUL byte"),
        (b"secret" * 1000, "more than 4096 bytes"),
    ],
)
def test_a_password_file_that_cannot_be_used_is_told(
    content: bytes | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv(PASSWORD_FILE_VARIABLE, str(file))
    with pytest.raises(StorageError, match=words) as caught:
        Storage("postgresql://u@127.0.0.1:1/db", patience_seconds=0.1)
    assert str(file) in str(caught.value)
    assert PASSWORD_FILE_VARIABLE in str(caught.value)
    assert "secret" not in repr(caught.value.__context__)
    assert "secret" not in str(caught.value)


def test_a_folder_is_no_password_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD_FILE_VARIABLE, str(tmp_path))
    with pytest.raises(StorageError, match="Is a directory; it should name the file"):
        parse_url("postgresql://u@127.0.0.1:1/db")


@pytest.mark.parametrize("content", ["pass word", "pass word\n", "\ufeffpass word\r\n"])
def test_a_password_file_may_end_its_line(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "password"
    file.write_text(content, encoding="utf-8")
    monkeypatch.setenv(PASSWORD_FILE_VARIABLE, str(file))
    assert parse_url("postgresql://u@127.0.0.1:1/db").password == "pass word"


def test_who_only_reads_makes_nothing(empty_database_url: str, tmp_path: Path) -> None:
    with pytest.raises(StorageMissingError, match="holds no study"):
        Storage(empty_database_url, create=False)
    assert check_storage(empty_database_url).schema == "missing"
    assert list(tmp_path.iterdir()) == []
    open_and_close(empty_database_url)
    with Storage(empty_database_url, create=False) as storage:
        assert storage.queue.study_ids() == ()


def test_who_only_reads_leaves_anothers_database_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    plain = optuna.storages.RDBStorage(f"sqlite:///{path}")
    optuna.create_study(storage=plain, study_name="theirs")
    plain.remove_session()
    plain.engine.dispose()
    before = path.read_bytes()
    with pytest.raises(StorageMissingError, match="holds no study of the tuner"):
        Storage(f"sqlite:///{path}", create=False)
    assert check_storage(f"sqlite:///{path}").schema == "missing"
    assert path.read_bytes() == before


def test_who_opens_a_database_that_is_right_does_not_wait_for_who_writes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tuner.db"
    open_and_close(url)
    writer = sqlite3.connect(tmp_path / "tuner.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    with Storage(f"{url}?timeout=0.01", patience_seconds=0.1) as storage:
        assert storage.queue.study_ids() == ()
    writer.close()


def test_a_file_that_is_no_database_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "tuner.db"
    path.write_text("my thesis " * 200)
    with pytest.raises(StorageError, match="not a database"):
        Storage(f"sqlite:///{path}")
    assert path.read_text() == "my thesis " * 200


def test_tables_of_a_newer_optuna_are_refused(empty_database_url: str) -> None:
    open_and_close(empty_database_url)
    execute(empty_database_url, "UPDATE alembic_version SET version_num = 'v9.0.0'")
    assert check_storage(empty_database_url).schema == "newer"
    for upgrade in (False, True):
        with pytest.raises(StorageError, match="a newer Optuna"):
            Storage(empty_database_url, upgrade=upgrade)


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
        assert storage.ledger.entries() == ()


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


def test_who_gives_no_password_is_told_where_to_give_it(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGPASSWORD", raising=False)
    url = sa.make_url(postgres.database())._replace(password=None).render_as_string()
    with pytest.raises(StorageError, match=f"(?s)no password .*{PASSWORD_FILE_VARIABLE}"):
        Storage(url)
    assert PASSWORD_FILE_VARIABLE in check_storage(url).detail


def test_a_check_does_not_suggest_itself() -> None:
    url = "postgresql://u:secret@127.0.0.1:1/db"
    with pytest.raises(StorageError, match="tuner storage check"):
        Storage(url, patience_seconds=0.1)
    detail = check_storage(url).detail
    assert "that the server runs." in detail
    assert "storage check" not in detail


# --- lease ---


def test_only_one_coordinator_holds_the_lease_and_the_second_hears_who(database_url: str) -> None:
    with Storage(database_url) as one, Storage(database_url) as two:
        study = new_study(one)
        one.lease.take(study._study_id)
        with pytest.raises(StorageError, match="is being run by process"):
            two.lease.take(study._study_id)
        one.lease.release()
        two.lease.take(study._study_id)


def test_of_many_who_begin_at_once_one_gets_the_lease(database_url: str) -> None:
    with Storage(database_url) as first:
        study_id = new_study(first)._study_id
    storages = [Storage(database_url) for _ in range(6)]
    barrier, outcomes = threading.Barrier(6), []

    def take(storage: Storage) -> None:
        barrier.wait()
        try:
            outcomes.append(storage.lease.take(study_id))
        except StorageError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=take, args=(storage,)) for storage in storages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for storage in storages:
        storage.close()
    assert sorted("is being run by" in outcome for outcome in outcomes) == [False] + [True] * 5, (
        outcomes
    )


OF_ELSEWHERE = """UPDATE tuner_lease SET holder = '{"host": "elsewhere", "pid": 7}'"""


def test_a_lease_that_is_renewed_while_it_is_looked_at_is_in_use(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watched(_: float) -> None:
        raise AssertionError("it was watched, although it is as young as can be")

    with Storage(database_url) as first, Storage(database_url) as second:
        study_id = new_study(first)._study_id
        first.lease.take(study_id)
        execute(database_url, "UPDATE tuner_lease SET renewed_at = renewed_at + 0.5")
        monkeypatch.setattr("tuner.storage.lease.time.sleep", watched)
        with pytest.raises(StudyInUseError):
            second.lease.take(study_id)
        monkeypatch.undo()


@pytest.mark.parametrize("clock", ["-31", "+3600"])
def test_a_lapsed_lease_is_taken_over_and_its_holder_writes_nothing_more(
    database_url: str, clock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.storage.lease._LAST_LOOK_SECONDS", 0.6)
    with Storage(database_url) as one, Storage(database_url) as two:
        study = new_study(one)
        one.lease.take(study._study_id)
        execute(
            database_url, OF_ELSEWHERE, f"UPDATE tuner_lease SET renewed_at = renewed_at {clock}"
        )
        if clock == "+3600":  # the clock was set back: nothing to go by but our own waiting
            monkeypatch.setattr("tuner.storage.lease.LEASE_SECONDS", 0.6)
        two.lease.take(study._study_id)
        with pytest.raises(LeaseLostError):
            one.lease.heartbeat()


@pytest.mark.parametrize("clock", ["- 3600", "+ 3600"])
def test_who_renews_its_lease_is_alive_whatever_the_clock_says(
    database_url: str, clock: str
) -> None:
    with Storage(database_url) as one, Storage(database_url) as two:
        study = new_study(one)
        one.lease.take(study._study_id)
        jump = f"UPDATE tuner_lease SET renewed_at = renewed_at {clock}"
        execute(database_url, OF_ELSEWHERE, jump)
        renewal = threading.Timer(0.3, one.lease.heartbeat)
        renewal.start()
        with pytest.raises(StorageError, match="is being run by"):
            two.lease.take(study._study_id)
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
        storage.lease.take(study._study_id)
        assert time.monotonic() - began < 3.0


def take_and_die(url: str) -> None:
    storage = Storage(url)
    storage.lease.take(new_study(storage)._study_id)
    multiprocessing.process.os._exit(7)


def write_through(storage: Storage, write: Callable[[], object]) -> None:
    write()
    storage.flush()


def test_a_coordinator_that_was_replaced_writes_nothing_more(database_url: str) -> None:
    with Storage(database_url) as stale, Storage(database_url) as other:
        study = new_study(stale)
        stale.lease.take(study._study_id)
        trial = study.ask()
        stale.flush()
        entry = open_an_entry(stale)
        execute(database_url, "UPDATE tuner_lease SET token = 'another'")
        decision = Decision(trial=0, kind="ask", epoch=None, verdict=None)
        writes = [
            study.ask,
            lambda: study.set_user_attr("a", 1),
            stale.lease.heartbeat,
            lambda: open_an_entry(stale),
            lambda: stale.ledger.record_report(entry, {"accuracy": 0.5}),
            # From here on one batch fails, and with it everything after.
            lambda: trial.suggest_float("x", 0, 1),
            lambda: trial.report(0.5, 1),
            lambda: trial.set_user_attr("a", 1),
            lambda: stale.record_decision(decision),
            lambda: study.tell(trial, 0.5),
        ]
        for write in writes:
            with pytest.raises(LeaseLostError):
                write_through(stale, write)
        (kept,) = other.optuna.get_all_trials(study._study_id)
        assert kept.state == optuna.trial.TrialState.RUNNING
        assert not kept.params
        assert not kept.intermediate_values
        assert other.decisions.of(study._study_id) == ()
        assert [(row.id, row.report) for row in other.ledger.entries()] == [(entry, None)]


def open_an_entry(storage: Storage) -> int:
    return storage.ledger.open(
        opened_at="2026-01-01T00:00:00+00:00",
        opened_by="ada@lab",
        study="q",
        study_key="q-1",
        trial=3,
        config_hash="c",
        spec_hash="s",
        split_id="split",
    )


def test_a_lease_is_renewed_for_as_long_as_a_block_lasts(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.storage.held_lease._RENEWAL_SECONDS", 0.01)
    with Storage(database_url) as one, Storage(database_url) as two:
        study_id = new_study(one)._study_id

        def is_fresh() -> bool:
            lease = two.leases.of(study_id)
            return lease is not None and lease.age_seconds < 3000.0

        def fail_in_the_block() -> None:
            with one.lease.held(study_id):
                for _ in range(2):
                    execute(database_url, "UPDATE tuner_lease SET renewed_at = renewed_at - 3600")
                    wait_until(is_fresh)
                raise RuntimeError("in the block")

        with pytest.raises(RuntimeError, match="in the block"):
            fail_in_the_block()
        assert two.leases.of(study_id) is None
        assert "lease" not in {thread.name for thread in threading.enumerate()}


def test_a_block_whose_lease_is_lost_writes_nothing_more(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.storage.held_lease._RENEWAL_SECONDS", 0.01)
    with Storage(database_url) as one, Storage(database_url) as two:
        study_id = new_study(one)._study_id
        with one.lease.held(study_id):
            execute(database_url, "DELETE FROM tuner_lease")
            # The renewals end, and do not make a lease that is not there.
            wait_until(lambda: "lease" not in {each.name for each in threading.enumerate()})
            with pytest.raises(LeaseLostError):
                open_an_entry(one)
            with two.lease.held(study_id):
                assert two.leases.of(study_id) is not None
        assert two.ledger.entries() == ()


@pytest.mark.parametrize(("since", "certain"), [(0.0, True), (14.0, True), (16.0, False)])
def test_a_lease_is_certain_for_half_of_the_time_for_which_it_is_left_alone(
    database_url: str, since: float, certain: bool
) -> None:
    with Storage(database_url) as storage:
        assert storage.lease.is_certain()  # none was taken: nobody fences this process
        study_id = new_study(storage)._study_id
        storage.lease.take(study_id)
        storage.lease._certain_at -= since  # 30 s until somebody may take it over
        assert storage.lease.is_certain() is certain
        assert storage.lease.ensure()
        assert storage.lease.is_certain()
        storage.lease.heartbeat()
        storage.lease._certain_at -= since
        execute(database_url, "UPDATE tuner_lease SET token = 'another'")
        if certain:
            assert storage.lease.ensure()
        else:
            with pytest.raises(LeaseLostError):
                storage.lease.ensure()
            assert not storage.lease.is_certain()


def test_attributes_are_set_all_together_while_nobody_drives_the_study(database_url: str) -> None:
    with Storage(database_url) as one, Storage(database_url) as two:
        study = new_study(one)
        two.set_user_attrs_unless_live(study._study_id, {"trials": 5, "stop": None})
        two.set_user_attrs_unless_live(study._study_id, {"trials": 7})
        assert study.user_attrs == {"trials": 7, "stop": None}
        one.lease.take(study._study_id)
        with pytest.raises(StudyInUseError, match="is being run by"):
            two.set_user_attrs_unless_live(study._study_id, {"trials": 9, "more": 1})
        one.lease.release()
        assert study.user_attrs == {"trials": 7, "stop": None}


def test_a_coordinator_that_came_between_the_look_and_the_write_keeps_its_study(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Storage(database_url) as one, Storage(database_url) as two:
        study = new_study(one)
        look = two.leases.of

        def look_a_moment_too_early(study_id: int) -> object:
            seen = look(study_id)
            if one._rdb.fence.token is None:
                one.lease.take(study_id)
            return seen

        monkeypatch.setattr(two.leases, "of", look_a_moment_too_early)
        with pytest.raises(StudyInUseError):
            two.set_user_attrs_unless_live(study._study_id, {"trials": 9})
        assert study.user_attrs == {}


def test_a_process_id_that_another_process_has_by_now_is_no_holder() -> None:
    mine = LeaseHolder.this_process()
    assert not mine.is_known_dead()
    assert not dataclasses.replace(mine, started=mine.started + 0.5).is_known_dead()
    for seconds in (-3600.0, -1.5, 1.5, 3600.0):  # it began before this one, or after
        assert dataclasses.replace(mine, started=mine.started + seconds).is_known_dead()
    # Of another machine, or another boot of this one, nobody can tell.
    assert not dataclasses.replace(mine, machine="another", started=0.0).is_known_dead()


def test_the_lease_of_a_reused_process_id_is_taken_over_at_once(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Storage(database_url) as one, Storage(database_url) as two:
        study_id = new_study(one)._study_id
        dead = LeaseHolder.this_process()
        dead = dataclasses.replace(dead, started=dead.started - 60.0)
        with monkeypatch.context() as earlier:
            earlier.setattr(LeaseHolder, "this_process", lambda: dead)
            one.lease.take(study_id)
        assert not two.leases.request_stop(study_id)
        two.lease.take(study_id)
        with pytest.raises(LeaseLostError):
            one.lease.heartbeat()


def test_a_stop_request_reaches_the_coordinator_and_nobody_else(database_url: str) -> None:
    with Storage(database_url) as driving, Storage(database_url) as user:
        study = new_study(driving)
        assert user.leases.request_stop(study._study_id) is False
        driving.lease.take(study._study_id)
        assert driving.lease.heartbeat() is False
        assert user.leases.request_stop(study._study_id) is True
        assert driving.lease.heartbeat() is True


# --- outages ---


def test_a_write_lock_held_by_another_process_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.storage.engine._SQLITE_BUSY_SECONDS", 0.05)
    monkeypatch.setattr("tuner.storage.engine._SAY_SO_AFTER_SECONDS", 0.2)
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
    monkeypatch.setattr("tuner.storage.engine._SAY_SO_AFTER_SECONDS", 0.0)
    said: list[str] = []
    with Storage(postgres.database(), patience_seconds=None, say=said.append) as storage:
        study = new_study(storage)
        storage.lease.take(study._study_id)
        trial = study.ask()
        postgres.stop()
        trial.report(0.5, 1)  # taken into the next batch, which waits
        start = threading.Timer(1.0, postgres.start)
        start.start()
        storage.flush()
        start.join()
        assert storage.lease.heartbeat() is False
        storage.lease.release()
        assert study.trials[0].intermediate_values == {1: 0.5}
    assert "is back" in said[-1]


def test_who_gives_up_on_a_database_that_is_away_hears_why(postgres: Postgres) -> None:
    storage = Storage(postgres.database(), patience_seconds=None, say=lambda _: None)
    trial = (study := new_study(storage)).ask()
    storage.lease.take(study._study_id)
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


class Link:
    """What a driver's connection is to the timer: a socket's number."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)

    def fileno(self) -> int:
        return self.ours.fileno()

    def is_ended(self) -> bool:
        try:
            return self.theirs.recv(1) == b""
        except BlockingIOError:
            return False

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


def test_a_connection_is_ended_only_in_a_try_that_awaits_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(database, "_SILENCE_SECONDS", 0.05)
    idle, silent = Link(), Link()
    timer = SilenceTimer(sa.create_engine("sqlite://"))
    with timer.each_try():
        timer._begin(idle)  # it is answered, and the try ends
    wait_until(lambda: "database-silence" not in {one.name for one in threading.enumerate()})
    assert not idle.is_ended()
    with timer.each_try():
        timer._begin(silent)
        wait_until(silent.is_ended)
    timer.close()
    idle.close()
    silent.close()


def test_a_writer_frozen_in_the_middle_of_a_batch_does_not_keep_its_locks(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(database._POSTGRESQL_17_SETTINGS, "transaction_timeout", "1s")
    url = postgres.database()
    with Storage(url) as storage:
        storage.lease.take(new_study(storage)._study_id)
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
            assert storage.lease.heartbeat() is False
            pooled.invalidate()


# --- decisions, ledger, queue ---


def test_decisions_come_back_in_order(database_url: str) -> None:
    with Storage(database_url) as storage:
        taken = [
            Decision(trial=1, kind="ask", epoch=None, verdict=None),
            Decision(trial=0, kind="rung", epoch=3, verdict="prune"),
            Decision(trial=0, kind="tell", epoch=3, verdict="PRUNED"),
        ]
        study_id = new_study(storage)._study_id
        storage.lease.take(study_id)
        for decision in taken:
            storage.record_decision(decision)
        storage.flush()
        assert storage.decisions.of(study_id) == tuple(taken)
        assert storage.decisions.of(study_id + 1) == ()


def test_ledger_rows_outlive_their_study(database_url: str) -> None:
    with Storage(database_url) as storage:
        study = new_study(storage)
        entry = open_an_entry(storage)
        storage.ledger.record_report(entry, {"accuracy": 0.5})
        storage.forget(study._study_id)
        optuna.delete_study(study_name="q", storage=storage.optuna)
        (row,) = storage.ledger.entries(split_id="split")
        assert (row.opened_by, row.trial, row.report) == ("ada@lab", 3, {"accuracy": 0.5})
        assert storage.ledger.entries(split_id="another") == ()


def test_the_queue_keeps_its_order_and_takes_a_study_once(database_url: str) -> None:
    with Storage(database_url) as storage, Storage(database_url) as service:
        assert storage.queue.add(7) is True
        assert storage.queue.add(3) is True
        assert storage.queue.add(7) is False
        assert service.queue.study_ids() == (7, 3)
        assert service.queue.remove(7) is True
        assert service.queue.remove(7) is False
        assert storage.queue.study_ids() == (3,)
        storage.forget(3)
        assert storage.queue.study_ids() == ()


def test_development_rows_travel_through_the_database(database_url: str) -> None:
    with Storage(database_url) as storage, Storage(database_url) as service:
        assert service.development.read("a" * 64) is None
        storage.development.add("a" * 64, b"rows")
        storage.development.add("a" * 64, b"rows")
        assert service.development.read("a" * 64) == b"rows"
