"""Databases of earlier versions: upgraded by `tuner storage init`, whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from alembic import command
from folders import ROOT
from old_tables import ROWS, VERSIONS, make_old_database, rows_of, structure_of
from optuna.storages import RDBStorage
from postgres import Postgres
from sqlalchemy import event
from typer.testing import CliRunner

from tuner.cli.main import app
from tuner.errors import StorageError
from tuner.storage import schema, upgrade
from tuner.storage.check import check_storage
from tuner.storage.engine import closed_engine
from tuner.storage.storage import Storage
from tuner.storage.url import parse_url


def init(url: str) -> None:
    """What `tuner storage init` does."""
    Storage(url, patience_seconds=60.0, upgrade=True).close()


def state_of(url: str) -> dict[str, Any]:
    """All that an upgrade may change."""
    return {"rows": rows_of(url), "structure": structure_of(url)}


# --- each earlier version ---


@pytest.mark.parametrize("version", VERSIONS)
def test_an_earlier_version_is_upgraded_and_keeps_its_rows(
    empty_database_url: str, version: int
) -> None:
    init(empty_database_url)
    new = structure_of(empty_database_url)
    make_old_database(empty_database_url, version)
    before = rows_of(empty_database_url)
    assert structure_of(empty_database_url) != new
    assert check_storage(empty_database_url).schema == "outdated"
    init(empty_database_url)
    assert check_storage(empty_database_url).is_right
    assert structure_of(empty_database_url) == new
    after = rows_of(empty_database_url)
    for name, rows in before.items():
        if name not in ("tuner_schema", "tuner_alembic_version"):
            assert len(rows) == len(ROWS[name])
            kept = [{key: row[key] for key in row if key != "seen"} for row in rows]
            added: dict[str, Any] = {}
            if name == "tuner_lease" and version == 1:
                added = {"batches": 0}
            if name == "tuner_ledger":
                reports = {row["id"]: row["report"] for row in rows if row["report"]}
                its_reports = {row["entry"]: row["report"] for row in after["tuner_ledger_report"]}
                assert its_reports == reports
                kept = [{key: row[key] for key in row if key != "report"} for row in kept]
                found = [{key: row[key] for key in kept[0]} for row in after[name]]
                assert found == kept
                assert all(row["chained_at"] for row in after[name])
                continue
            assert after[name] == [row | added for row in kept]
    assert after["tuner_alembic_version"] == [{"version_num": schema.REVISION}]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_upgraded_database_can_be_worked_with(empty_database_url: str, version: int) -> None:
    make_old_database(empty_database_url, version)
    init(empty_database_url)
    with Storage(empty_database_url) as storage:
        study = optuna.create_study(storage=storage.optuna, study_name="new")
        storage.lease.take(study._study_id)
        storage.lease.release()
        assert len(storage.ledger.entries()) == 2
        assert len(storage.decisions.of(7)) == 2


def test_a_database_upgraded_by_a_tuner_without_revisions_keeps_nothing_of_the_first_version(
    empty_database_url: str,
) -> None:
    """Those tuners raised 1 to 4 and left the column that only the first version wrote."""
    init(empty_database_url)
    new = structure_of(empty_database_url)
    make_old_database(empty_database_url, 4)
    with closed_engine(parse_url(empty_database_url)) as engine, engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE tuner_decisions ADD COLUMN seen TEXT")
    init(empty_database_url)
    assert structure_of(empty_database_url) == new


# --- who refuses what ---


@pytest.mark.parametrize("version", VERSIONS)
def test_an_earlier_version_is_refused_with_the_remedy_and_left_as_it_is(
    empty_database_url: str, version: int
) -> None:
    make_old_database(empty_database_url, version)
    before = state_of(empty_database_url)
    for create in (False, True):
        with pytest.raises(StorageError, match=f"an older tuner .* 000{version}") as caught:
            Storage(empty_database_url, create=create)
        remedy = re.search("`(.*)`", str(caught.value))
        assert remedy
        words = shlex.split(remedy[1])
        assert words[:-1] == ["tuner", "storage", "init", "--storage"]
        password = parse_url(empty_database_url).password
        assert password is None or password not in str(caught.value)
        named = parse_url(words[-1])
        assert named == parse_url(empty_database_url)._replace(password=None)
    assert state_of(empty_database_url) == before


@pytest.mark.parametrize(
    "verb",
    [
        ("launch", str(ROOT / "studies" / "quickstart.toml"), "--detach"),
        ("serve", "--port", "0"),
        ("dashboard", "--port", "0"),
        ("status",),
        ("stop", "a"),
        ("delete", "a", "--yes"),
        ("export", "a"),
        ("report", "a"),
    ],
    ids=lambda verb: verb[0],
)
def test_every_verb_but_init_refuses_an_earlier_version(
    verb: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path}/a b.db"
    make_old_database(url, 3)
    before = state_of(url)
    refused = CliRunner().invoke(app, [*verb, "--storage", url])
    assert isinstance(refused.exception, StorageError)
    remedy = f"`tuner storage init --storage '{url}'` brings them up to date"
    assert remedy in str(refused.exception)
    assert state_of(url) == before


def test_storage_init_says_that_it_is_ready(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a b.db"
    make_old_database(url, 3)
    done = CliRunner().invoke(app, ["storage", "init", "--storage", url])
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{url} is ready.\n", "")
    assert check_storage(url).is_right


def test_a_later_version_is_refused_by_all(empty_database_url: str) -> None:
    init(empty_database_url)
    with closed_engine(parse_url(empty_database_url)) as engine, engine.begin() as connection:
        connection.exec_driver_sql("UPDATE tuner_alembic_version SET version_num = '0099'")
    before = state_of(empty_database_url)
    assert check_storage(empty_database_url).schema == "newer"
    for arguments in ({}, {"create": False}, {"upgrade": True}):
        with pytest.raises(StorageError, match=r"a newer tuner .*0099, this one knows 0007"):
            Storage(empty_database_url, **arguments)
    assert state_of(empty_database_url) == before


def test_a_tuner_without_revisions_refuses_what_this_one_made(empty_database_url: str) -> None:
    init(empty_database_url)
    assert rows_of(empty_database_url)["tuner_schema"] == [{"version": 5}]  # it knows 4 at most
    make_old_database(empty_database_url, 4)
    init(empty_database_url)
    assert rows_of(empty_database_url)["tuner_schema"] == [{"version": 5}]


# --- many at once, and killed ---


def test_many_processes_upgrade_a_database_at_once(empty_database_url: str) -> None:
    make_old_database(empty_database_url, 1)
    context = multiprocessing.get_context("spawn")
    inits = [context.Process(target=init, args=(empty_database_url,)) for _ in range(4)]
    for process in inits:
        process.start()
    for process in inits:
        process.join()
    assert [process.exitcode for process in inits] == [0] * 4
    assert check_storage(empty_database_url).is_right
    assert len(rows_of(empty_database_url)["tuner_ledger"]) == 2


def test_many_threads_upgrade_a_database_at_the_same_moment(empty_database_url: str) -> None:
    make_old_database(empty_database_url, 1)
    barrier, failed = threading.Barrier(4), []

    def together() -> None:
        barrier.wait()
        try:
            schema.make_current(parse_url(empty_database_url), upgrade=True)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=together) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert check_storage(empty_database_url).is_right


def init_and_die(url: str, begin_of_statement: str, count: int) -> None:
    """Upgrades, and is killed just before a statement; "COMMIT" is the last of all."""
    seen = 0

    def count_down(statement: str) -> None:
        nonlocal seen
        seen += statement.lstrip().startswith(begin_of_statement)
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(
        sa.Engine, "before_cursor_execute", lambda _c, _k, statement, *_: count_down(statement)
    )
    if begin_of_statement == "COMMIT":
        # Before the upgrade PostgreSQL's lock is committed, too: only what changed counts.
        changed = []
        event.listen(
            sa.Engine,
            "before_cursor_execute",
            lambda _c, _k, statement, *_: changed.append(statement.startswith("UPDATE")),
        )
        event.listen(sa.Engine, "commit", lambda _c: any(changed) and count_down("COMMIT"))
    init(url)


@pytest.mark.parametrize(
    ("statement", "count"),
    [
        ("CREATE TABLE tuner_development", 1),  # in the middle of a revision
        ("UPDATE tuner_alembic_version", 2),  # between what it does and the note that it is done
        ("UPDATE tuner_schema", 1),  # when all tables are there
        ("COMMIT", 1),
    ],
)
def test_an_upgrade_that_is_killed_leaves_the_earlier_version_whole(
    empty_database_url: str, statement: str, count: int
) -> None:
    make_old_database(empty_database_url, 1)
    before = state_of(empty_database_url)
    context = multiprocessing.get_context("spawn")
    killed = context.Process(target=init_and_die, args=(empty_database_url, statement, count))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert state_of(empty_database_url) == before
    assert check_storage(empty_database_url).schema == "outdated"
    init(empty_database_url)
    assert check_storage(empty_database_url).is_right


def test_an_upgrade_may_take_longer_than_a_study_s_statements(postgres: Postgres) -> None:
    url = postgres.database()
    make_old_database(url, 1)
    settings = sa.text("SELECT name, setting FROM pg_settings WHERE name ~ '_timeout$'")
    found = {}

    def look(connection: sa.Connection, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE tuner_schema"):
            found.update(connection.execute(settings).all())

    event.listen(sa.Engine, "before_cursor_execute", look)
    try:
        init(url)
    finally:
        event.remove(sa.Engine, "before_cursor_execute", look)
    assert (found["statement_timeout"], found.get("transaction_timeout", "0")) == ("0", "0")
    assert found["lock_timeout"] == "10000"  # who holds a table is told of


# --- Optuna's tables ---

OLDER_OPTUNA = "v3.0.0.c"


def make_both_old(url: str) -> None:
    """A database of an older tuner and an older Optuna, with a trial whose value is infinite."""
    make_old_database(url, 2)
    plain = RDBStorage(parse_url(url).render_as_string(hide_password=False))
    study = optuna.create_study(storage=plain, study_name="old")
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.report(0.5, 1)
    study.tell(trial, float("inf"))
    plain.remove_session()
    plain.engine.dispose()
    config = upgrade._config(upgrade.OPTUNAS)
    with closed_engine(parse_url(url)) as engine, engine.begin() as connection:
        config.attributes["connection"] = connection
        config.attributes["version_table"] = upgrade.OPTUNAS.version_table
        # Optuna's upgrade makes it and its downgrade looks for it, but new tables lack it.
        connection.exec_driver_sql("CREATE INDEX trials_study_id_key ON trials (study_id)")
        command.downgrade(config, OLDER_OPTUNA)
        connection.exec_driver_sql("UPDATE version_info SET library_version = '3.0.0'")


def test_tables_of_an_older_optuna_and_an_older_tuner_are_upgraded_together(
    empty_database_url: str,
) -> None:
    make_both_old(empty_database_url)
    before = state_of(empty_database_url)
    assert "value_type" not in before["structure"]["trial_values"][0]
    assert check_storage(empty_database_url).schema == "outdated"
    with pytest.raises(StorageError, match=r"tuner storage init"):
        Storage(empty_database_url)
    assert state_of(empty_database_url) == before
    init(empty_database_url)
    assert check_storage(empty_database_url).is_right
    with Storage(empty_database_url) as storage:
        (trial,) = optuna.load_study(storage=storage.optuna, study_name="old").trials
        assert (trial.value, trial.intermediate_values) == (float("inf"), {1: 0.5})
        assert set(trial.params) == {"x"}
    with closed_engine(parse_url(empty_database_url)) as engine, engine.connect() as connection:
        by = connection.exec_driver_sql("SELECT library_version FROM version_info").scalar()
    assert by == optuna.__version__


def test_an_upgrade_that_is_killed_leaves_optunas_tables_whole_too(empty_database_url: str) -> None:
    make_both_old(empty_database_url)
    before = state_of(empty_database_url)
    context = multiprocessing.get_context("spawn")
    # After Optuna's scripts, which commit their sessions, and before the first of ours.
    killed = context.Process(
        target=init_and_die, args=(empty_database_url, "UPDATE version_info", 1)
    )
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert state_of(empty_database_url) == before
    init(empty_database_url)
    assert check_storage(empty_database_url).is_right


def test_tables_of_an_older_optuna_get_none_of_ours_but_by_init(empty_database_url: str) -> None:
    make_both_old(empty_database_url)
    with closed_engine(parse_url(empty_database_url)) as engine, engine.begin() as connection:
        found = sa.MetaData()
        found.reflect(connection, only=lambda name, _: name.startswith("tuner_"))
        found.drop_all(connection)
    before = structure_of(empty_database_url)
    with pytest.raises(StorageError, match=rf"an older Optuna .*{OLDER_OPTUNA}.*storage init"):
        Storage(empty_database_url)
    assert structure_of(empty_database_url) == before
    init(empty_database_url)
    assert check_storage(empty_database_url).is_right


# --- what is said twice ---


def test_the_last_revisions_are_those_of_the_scripts(tmp_path: Path) -> None:
    ours = list(upgrade.known(upgrade.OURS))
    assert ours == [f"{number:04}" for number in range(len(ours), 0, -1)]
    assert ours[0] == schema.REVISION
    plain = RDBStorage(f"sqlite:///{tmp_path}/plain.db")
    assert upgrade.known(upgrade.OPTUNAS) == plain.get_all_versions()
    assert schema._optunas_revision() == plain.get_head_version()
    plain.remove_session()
    plain.engine.dispose()


def test_our_storage_sets_what_optunas_does(tmp_path: Path) -> None:
    """It does not call that one's `__init__`, which looks at the schema's version once more."""
    plain = RDBStorage(f"sqlite:///{tmp_path}/plain.db", skip_compatibility_check=True)
    with Storage(f"sqlite:///{tmp_path}/tuner.db") as storage:
        theirs = vars(plain).keys() - {"_version_manager"}
        assert theirs - vars(storage._rdb).keys() == set()
        for name in theirs - {"url", "engine", "engine_kwargs", "scoped_session"}:
            assert getattr(storage._rdb, name) == getattr(plain, name), name
    plain.remove_session()
    plain.engine.dispose()


@pytest.mark.parametrize(("state", "is_loaded"), [("current", False), ("outdated", True)])
def test_alembic_is_imported_only_for_a_schema_that_is_not_current(
    state: str, is_loaded: bool, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/tuner.db"
    make_old_database(url, 4)
    if state == "current":
        init(url)
    assert check_storage(url).schema == state
    code = (
        "import sys, tuner.cli.main\n"
        f"sys.argv = ['tuner', 'status', '--storage', {url!r}]\n"
        "try: tuner.cli.main.main()\n"
        "except SystemExit: pass\n"
        "print('alembic' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == str(is_loaded)
