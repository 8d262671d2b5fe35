"""Rows that one study keeps sealed, or opened, and another one meets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_study import predict, tell
from optuna.trial import TrialState

from tuner.data import prepare as data
from tuner.data.development import DevelopmentData, development_hashes, load_development
from tuner.data.prepare import Prepared, prepare
from tuner.data.rows import RESIDUES, encode, hash_sequence
from tuner.data.split import split_rows
from tuner.data.synthetic import synthetic_sequences
from tuner.errors import StudyError
from tuner.results import report_page
from tuner.results.report import write_report
from tuner.search import overlap, study
from tuner.search.tuned_study import TunedStudy
from tuner.spec.reader import spec_from_document
from tuner.spec.spec import StudySpec
from tuner.storage.storage import Storage

Rows = list[tuple[str, int]]
SPLIT = {"seed": 1, "validation": 0.2, "test": 0.2}


@pytest.fixture
def storage(database_url: str) -> Iterator[Storage]:
    with Storage(database_url) as opened:
        yield opened


def rows(count: int = 200, *, first: int = 0) -> Rows:
    sequences, labels = synthetic_sequences()
    return list(zip(sequences, labels, strict=True))[first : first + count]


def write(folder: Path, name: str, content: Rows) -> None:
    lines = [f"{sequence},{label}" for sequence, label in content]
    (folder / name).write_text("\n".join(["sequence,label", *lines, ""]))


def launch(
    storage: Storage, folder: Path, name: str, source: str = "rows.csv", **changes: Any
) -> tuple[TunedStudy, tuple[str, ...]]:
    """The study, and what is said of it, as `tuner launch` does it."""
    spec, prepared = prepared_study(folder, name, source, **changes)
    tuned = made(storage, folder, spec, prepared)
    return tuned, overlap.enter(storage, spec, prepared)


def prepared_study(
    folder: Path, name: str, source: str = "rows.csv", **changes: Any
) -> tuple[StudySpec, Prepared]:
    document = {
        "name": name,
        "trials": 1,
        "data": {"source": source, "split": SPLIT} | changes,
        "space": {"blocks": 1, "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}},
    }
    spec = spec_from_document(document, folder=folder)
    return spec, prepare(spec.data, folder=folder, artifacts=folder / "artifacts")


def made(storage: Storage, folder: Path, spec: StudySpec, prepared: Prepared) -> TunedStudy:
    return study.create_or_resume(
        storage,
        spec,
        prepared.identity,
        development_sha256=prepared.development_sha256,
        artifacts_root=folder / "artifacts",
    )


def open_split(tuned: TunedStudy) -> int:
    """What a report does to the ledger."""
    return tuned.storage.ledger.open(
        opened_at="", opened_by="", study=tuned.name, study_key=tuned.key, trial=0,
        config_hash="", spec_hash="", split_id=tuned.record.data.split_id,
    )  # fmt: skip


def sequences_of(tuned: TunedStudy) -> dict[str, set[str]]:
    """Each split's sequences, uncut, by another way than hashes."""
    settings, folder = tuned.record.spec.data, tuned.record.spec.folder
    split = split_rows(data._read_source(settings, folder), settings.split)
    return {
        name: {row.whole or row.sequence for row in getattr(split, name)}
        for name in ("training", "validation", "test")
    }


def without_a_test_row(folder: Path) -> Rows:
    """The rows but for one that the split of `SPLIT` keeps sealed."""
    write(folder, "all.csv", rows())
    settings = prepared_study(folder, "all", "all.csv")[0].data
    split = split_rows(data._read_source(settings, folder), settings.split)
    sealed = split.test[0].sequence
    return [row for row in rows() if row[0] != sealed]


def lower_case_backwards(_: Path) -> Rows:
    return [(sequence.lower(), label) for sequence, label in reversed(rows())]


def other_labels(_: Path) -> Rows:
    return [(sequence, 1 - label) for sequence, label in rows()]


OTHERS: dict[str, tuple[Callable[[Path], Rows], dict[str, Any]]] = {
    "other fractions": (lambda _: rows(), {"split": SPLIT | {"validation": 0.35, "test": 0.05}}),
    "another seed": (lambda _: rows(), {"split": SPLIT | {"seed": 2}}),
    "one row dropped, another seed": (without_a_test_row, {"split": SPLIT | {"seed": 2}}),
    "more rows, another seed": (lambda _: rows(400), {"split": SPLIT | {"seed": 6}}),
    "half of the rows": (lambda _: rows(100), {"split": SPLIT | {"seed": 2}}),
    "lower case, backwards": (lower_case_backwards, {"split": SPLIT | {"seed": 3}}),
    "other labels": (other_labels, {"split": SPLIT | {"seed": 4}}),
    "cut": (lambda _: rows(), {"max_length": 90, "truncate": True, "split": SPLIT | {"seed": 5}}),
}


@pytest.mark.parametrize(("content", "changes"), OTHERS.values(), ids=OTHERS.keys())
def test_sealed_rows_that_enter_another_study_are_counted_and_its_name_is_told(
    storage: Storage,
    tmp_path: Path,
    content: Callable[[Path], Rows],
    changes: dict[str, Any],
) -> None:
    write(tmp_path, "rows.csv", rows())
    sealing, nothing = launch(storage, tmp_path, "first")
    assert nothing == ()
    write(tmp_path, "others.csv", content(tmp_path))
    entered, said = launch(storage, tmp_path, "second", "others.csv", **changes)
    sealed, splits = sequences_of(sealing)["test"], sequences_of(entered)
    shared = {name: len(sealed & sequences) for name, sequences in splits.items()}
    assert shared["validation"] > 0
    (words,) = said
    assert f"'first' keeps {len(sealed)} test rows sealed; of these, this study has" in words
    for name, count in shared.items():
        assert (f"{count} in its {name} split" in words) is (count > 0)


def test_a_launch_that_goes_on_says_it_again_and_a_look_writes_nothing(
    storage: Storage, tmp_path: Path
) -> None:
    write(tmp_path, "rows.csv", rows())
    launch(storage, tmp_path, "first")
    other = {"split": SPLIT | {"seed": 2}}
    spec, prepared = prepared_study(tmp_path, "second", **other)
    looked = overlap.warnings(storage, spec, prepared)
    assert len(looked) == 1
    assert prepared.identity.split_id not in storage.splits.all()
    assert launch(storage, tmp_path, "second", **other)[1] == looked
    assert launch(storage, tmp_path, "second", **other)[1] == looked


def test_a_study_over_rows_that_are_at_hand_already_is_told_the_same(
    storage: Storage, tmp_path: Path
) -> None:
    # The service reads no published source whose training and validation rows it has.
    write(tmp_path, "rows.csv", rows())
    write(tmp_path, "fewer.csv", without_a_test_row(tmp_path))
    open_split(launch(storage, tmp_path, "opened")[0])
    launch(storage, tmp_path, "sealed", split=SPLIT | {"seed": 2})
    launch(storage, tmp_path, "third", "fewer.csv")
    spec, prepared = prepared_study(tmp_path, "third", "fewer.csv")
    said = overlap.warnings(storage, spec, prepared)
    assert any("'sealed' keeps" in words for words in said)
    assert any("opened" in words and "in its test split" in words for words in said)
    assert overlap.warnings(storage, spec, replace(prepared, hashes=None)) == said


def test_nothing_is_said_of_the_same_split_of_other_rows_or_of_rows_that_both_seal(
    storage: Storage, tmp_path: Path
) -> None:
    write(tmp_path, "rows.csv", rows())
    write(tmp_path, "strange.csv", rows(200, first=1000))
    write(tmp_path, "fewer.csv", without_a_test_row(tmp_path))
    first, _ = launch(storage, tmp_path, "first")
    assert launch(storage, tmp_path, "same split")[1] == ()
    assert launch(storage, tmp_path, "other rows", "strange.csv")[1] == ()
    both, said = launch(storage, tmp_path, "fewer", "fewer.csv")
    assert said == ()
    assert len({tuned.record.data.split_id for tuned in (first, both)}) == 2


def test_rows_that_a_report_opened_are_told_though_another_row_was_dropped(
    storage: Storage, tmp_path: Path
) -> None:
    write(tmp_path, "rows.csv", rows())
    write(tmp_path, "fewer.csv", without_a_test_row(tmp_path))
    first, _ = launch(storage, tmp_path, "first")
    entry = open_split(first)
    second, said = launch(storage, tmp_path, "second", "fewer.csv")
    shared = len(sequences_of(first)["test"] & sequences_of(second)["test"])
    assert 30 < shared < first.record.data.test_rows
    (words,) = said
    rows_of_first = first.record.data.test_rows
    assert f"A report of 'first' opened {rows_of_first} test rows (ledger entry {entry})" in words
    assert f"{shared} in its test split" in words
    # Its own openings are no news to it; those of the same split by another study are.
    assert not any("opened" in words for words in launch(storage, tmp_path, "first")[1])
    said = launch(storage, tmp_path, "third")[1]
    assert any("opened" in words and "40 in its test split" in words for words in said)


def test_what_was_opened_outlives_its_study_and_what_was_only_sealed_does_not(
    storage: Storage, tmp_path: Path
) -> None:
    write(tmp_path, "rows.csv", rows())
    opened, _ = launch(storage, tmp_path, "opened")
    sealed, _ = launch(storage, tmp_path, "sealed", split=SPLIT | {"seed": 2})
    open_split(opened)
    study.delete(opened)
    study.delete(sealed)
    (words,) = launch(storage, tmp_path, "next", split=SPLIT | {"seed": 3})[1]
    assert "A report of 'opened' opened" in words


def test_a_study_of_an_earlier_version_is_entered_where_its_data_is_at_hand(
    storage: Storage, tmp_path: Path
) -> None:
    write(tmp_path, "rows.csv", rows())
    write(tmp_path, "others.csv", rows(300))
    for name, source in (("same data", "rows.csv"), ("other data", "others.csv")):
        spec, prepared = prepared_study(tmp_path, name, source, max_length=250)
        made(storage, tmp_path, spec, prepared)  # and no more, as that version did
    assert storage.splits.all() == {}
    (words,) = launch(storage, tmp_path, "new", split=SPLIT | {"seed": 2})[1]
    assert "'same data' keeps" in words
    launch(storage, tmp_path, "other data", "others.csv", max_length=250)  # it goes on
    said = launch(storage, tmp_path, "new", split=SPLIT | {"seed": 2})[1]
    assert len(said) == 2
    assert any("'other data' keeps" in words for words in said)


def test_a_launch_keeps_its_split_from_the_rows_that_it_prepared(
    storage: Storage, tmp_path: Path
) -> None:
    write(tmp_path, "rows.csv", rows())
    spec, prepared = prepared_study(tmp_path, "first")
    tuned = made(storage, tmp_path, spec, prepared)
    hashes = {hash_sequence(sequence) for sequence in sequences_of(tuned)["test"]}
    (tmp_path / "rows.csv").unlink()  # what was read once need not be there a second time
    assert overlap.enter(storage, spec, prepared) == ()
    assert storage.splits.all() == {tuned.record.data.split_id: hashes}


def test_many_splits_are_counted_and_many_studies_of_one_are_not_all_named(
    storage: Storage, tmp_path: Path
) -> None:
    write(tmp_path, "rows.csv", rows())
    for name in "abcde":
        launch(storage, tmp_path, name)
    fewer = SPLIT | {"validation": 0.35, "test": 0.05}
    (words,) = launch(storage, tmp_path, "z", split=fewer)[1]
    assert "'a', 'b', 'c' and 2 more keep" in words
    for seed in range(2, 8):
        launch(storage, tmp_path, f"seed {seed}", split=SPLIT | {"seed": seed})
    said = launch(storage, tmp_path, "last", split=SPLIT | {"seed": 9})[1]
    assert len(said) == 6
    assert said[-1] == "The same of 3 more test splits."


def test_two_that_keep_the_same_split_at_once_keep_it_once(database_url: str) -> None:
    hashes = {hash_sequence(sequence) for sequence in ("AR", "ND", "C")}
    barrier = threading.Barrier(4)
    failed: list[BaseException] = []

    def keep() -> None:
        with Storage(database_url) as storage:
            barrier.wait()
            try:
                storage.splits.add("s" * 64, hashes)
            except BaseException as error:  # noqa: BLE001
                failed.append(error)

    threads = [threading.Thread(target=keep) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with Storage(database_url) as storage:
        assert storage.splits.all() == {"s" * 64: hashes}


def test_tokens_are_hashed_as_the_sequences_that_they_are() -> None:
    tokens = encode(["ARND", RESIDUES, "C"], 25)
    labels = np.zeros(3, dtype=np.uint8)
    hashes = development_hashes(
        DevelopmentData(
            training_tokens=tokens,
            training_labels=labels,
            validation_tokens=tokens[:1],
            validation_labels=labels[:1],
        )
    )
    assert hashes.training == {hash_sequence(one) for one in ("ARND", RESIDUES, "C")}
    assert hashes.validation == {hash_sequence("ARND")}
    assert hashes.test == frozenset()


# --- the report ---


def finish(tuned: TunedStudy) -> None:
    """A winner with weights that give the loss which it is recorded with."""
    path = tuned.artifacts.folder.parent / "development"
    development = load_development(path / f"{tuned.record.development_sha256}.npz")
    config = tuned.record.spec.space.resolve({"learning_rate": 0.01})
    weights = b"weights of the winner"
    from tuner.metrics import cross_entropy

    probabilities = predict(config, weights, development.validation_tokens)
    loss = float(cross_entropy(development.validation_labels, probabilities).mean())
    tell(tuned, loss, 0.01, epochs=2, state=TrialState.COMPLETE)
    kept = tuned.artifacts.weights(0)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(weights)


def reported(tuned: TunedStudy, again: str | None = None) -> dict[str, Any]:
    root = tuned.artifacts.folder.parent
    written = write_report(
        tuned.storage, tuned.name, artifacts_root=root, evaluate=predict, again=again
    )
    return written.to_document() | {"summary": written.summary()}


def test_a_report_counts_the_openings_of_its_rows_by_whatever_split(
    storage: Storage, tmp_path: Path
) -> None:
    write(tmp_path, "rows.csv", rows())
    write(tmp_path, "fewer.csv", without_a_test_row(tmp_path))
    write(tmp_path, "strange.csv", rows(200, first=1000))
    first, _ = launch(storage, tmp_path, "first")
    second, _ = launch(storage, tmp_path, "second", "fewer.csv")
    strange, _ = launch(storage, tmp_path, "strange", "strange.csv")
    for tuned in (first, second, strange):
        finish(tuned)
    assert reported(first)["ledger"]["openings"] == 1
    assert reported(strange)["ledger"]["openings"] == 1
    with pytest.raises(StudyError, match=r"was opened before: entry 1 .* 39 of its rows"):
        reported(second)
    document = reported(second, again="one row less")
    shared = len(sequences_of(first)["test"] & sequences_of(second)["test"])
    own = second.record.data.test_rows
    assert document["ledger"]["openings"] == 2
    assert [(row["study"], row["shared_rows"]) for row in document["ledger"]["rows"]] == [
        ("first", shared),
        ("second", own),
    ]
    words = f"{shared} of {own} by study 'first', ledger entry 1"
    assert words in document["summary"]
    assert "opened 2 times in this storage" in document["summary"]
    assert reported(first)["ledger"]["openings"] == 2  # shown again, it knows of both


def test_a_report_tells_of_studies_that_looked_at_its_test_rows(
    storage: Storage, tmp_path: Path
) -> None:
    write(tmp_path, "rows.csv", rows())
    first, _ = launch(storage, tmp_path, "first")
    finish(first)
    other = {"split": SPLIT | {"validation": 0.35, "test": 0.05}}
    second, _ = launch(storage, tmp_path, "second", **other)
    document = reported(first)
    sealed, splits = sequences_of(first)["test"], sequences_of(second)
    counts = {name: len(sealed & splits[name]) for name in ("training", "validation")}
    assert document["ledger"]["used_elsewhere"] == [{"study": "second", **counts}]
    assert f"'second' had {counts['validation']} in its validation split" in document["summary"]
    study.delete(second)
    assert reported(first)["ledger"]["used_elsewhere"] == []


def test_a_report_enters_the_split_of_a_study_of_an_earlier_version(
    storage: Storage, tmp_path: Path
) -> None:
    write(tmp_path, "rows.csv", rows())
    spec, prepared = prepared_study(tmp_path, "old")
    old = made(storage, tmp_path, spec, prepared)
    finish(old)
    assert reported(old)["ledger"]["rows"][0]["shared_rows"] == 40
    assert storage.splits.all().keys() == {old.record.data.split_id}


def test_the_words_count_no_more_studies_than_they_can() -> None:
    used = [{"study": f"s{n}", "training": n, "validation": 0} for n in range(1, 9)]
    ledger = {"openings": 1, "rows": [], "test_rows": 9, "used_elsewhere": used}
    (words,) = report_page.ledger_warnings({"ledger": ledger})
    assert "'s5' had 5 in its training split; 3 more studies" in words
