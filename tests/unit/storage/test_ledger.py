"""The ledger is only added to, and each entry is chained to the one before."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from tuner.cli.main import app
from tuner.results import seal
from tuner.storage import chain
from tuner.storage.ledger import Ledger, OpenedMeanwhileError
from tuner.storage.storage import Storage


def opened(storage: Storage, split_id: str = "split", **changes: Any) -> int:
    return storage.ledger.open(
        opened_at="2026-01-01T00:00:00+00:00",
        opened_by="ada@lab",
        study="q",
        study_key="q-1",
        trial=3,
        config_hash="c",
        spec_hash="s",
        split_id=split_id,
        **changes,
    )


def test_openings_and_reports_are_one_chain(database_url: str) -> None:
    with Storage(database_url) as storage:
        assert storage.ledger.chain().head.position == 0
        for split_id in ("a", "b", "a"):
            storage.ledger.record_report(opened(storage, split_id), {"found": split_id})
        opened(storage, "b", same_splits={"a"}, looks_elsewhere=2)
        found = storage.ledger.chain()
        assert [link.kind[0] for link in found.links] == ["o", "r", "o", "r", "o", "r", "o"]
        assert [link.previous for link in found.links] == [
            found.identity,
            *(link.hash for link in found.links[:-1]),
        ]
        assert [entry.look for entry in storage.ledger.entries()] == [1, 1, 2, 6]
        assert storage.ledger.problems() == ()


def test_many_who_write_at_once_make_one_chain(database_url: str) -> None:
    def write() -> None:
        with Storage(database_url) as storage:
            for _ in range(3):
                storage.ledger.record_report(opened(storage), {})

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Storage(database_url) as storage:
        assert storage.ledger.problems() == ()
        assert [entry.look for entry in storage.ledger.entries()] == list(range(1, 13))
        assert storage.ledger.chain().head.position == 24


def test_an_opening_whose_answer_was_lost_is_written_once(database_url: str) -> None:
    with Storage(database_url) as storage:
        run = storage.ledger._transactions.run

        class Twice:
            """The commit went through, its answer did not: the transaction is tried again."""

            def run(self, work: Callable[[sa.Connection], Any], *, fenced: bool = False) -> Any:
                run(work, fenced=fenced)
                return run(work, fenced=fenced)

        assert opened(storage) == 1
        ledger = storage.ledger
        storage.ledger = Ledger(Twice())  # type: ignore[arg-type]
        assert opened(storage) == 2
        assert [entry.id for entry in ledger.entries()] == [1, 2]


def test_rows_that_were_opened_meanwhile_are_not_opened(database_url: str) -> None:
    with Storage(database_url) as storage:
        opened(storage, "a", known_looks=0)
        with pytest.raises(OpenedMeanwhileError):
            opened(storage, "b", same_splits={"a"}, known_looks=0)
        assert len(storage.ledger.entries()) == 1


def test_storage_init_sets_missing_triggers_up_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tuner.db"
    artifacts = tmp_path / "artifacts"
    with Storage(url) as storage:
        opened(storage)
        seal.keep_heads(storage.ledger, artifacts)
    connection = sqlite3.connect(tmp_path / "tuner.db")
    for table in chain.APPEND_ONLY:
        connection.execute(f"DROP TRIGGER {table}_update")
    connection.close()
    verify = ["ledger", "verify", "--json", "--storage", url, "--artifacts", str(artifacts)]
    broken = CliRunner().invoke(app, verify)
    assert broken.exit_code == 1
    document = json.loads(broken.stdout)
    assert (document["valid"], document["entries"]) == (False, 1)
    assert len(document["problems"]) == len(chain.APPEND_ONLY)
    assert CliRunner().invoke(app, ["storage", "init", "--storage", url]).exit_code == 0
    mended = CliRunner().invoke(app, verify)
    assert mended.exit_code == 0
    document = json.loads(mended.stdout)
    assert (document["valid"], document["problems"], document["notes"]) == (True, [], [])
    assert document["head"]["position"] == 1


def test_a_line_of_the_heads_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    with Storage(f"sqlite:///{tmp_path}/tuner.db") as storage:
        opened(storage)
        opened(storage)
        seal.keep_heads(storage.ledger, tmp_path)
        (path,) = (tmp_path / "ledger").iterdir()
        path.write_bytes(path.read_bytes()[:-9])
        assert "No head beyond 1 of 2" in seal.verify(storage, tmp_path).notes[0]
        seal.keep_heads(storage.ledger, tmp_path)
        assert seal.verify(storage, tmp_path).notes == ()
        heads = [kept.head.position for kept in seal.kept_heads(tmp_path)]
        assert heads == [1, 2]
        assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "arguments", [["--again"], ["--reason", "x"], ["--again", "--reason", " "]]
)
def test_a_reason_belongs_to_another_look(arguments: list[str], tmp_path: Path) -> None:
    with Storage(f"sqlite:///{tmp_path}/tuner.db"):
        pass
    done = CliRunner().invoke(
        app, ["report", "q", *arguments, "--storage", f"sqlite:///{tmp_path}/tuner.db"]
    )
    assert done.exit_code == 2
