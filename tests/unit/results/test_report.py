"""The final report: opened once, honest about it, and readable."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import optuna
import optuna_dashboard
import pytest
from finished_study import (
    WINNER,
    finished_study,
    predict,
    storage_in,
    study_with_networks,
    tell,
    write_rows,
)
from optuna.trial import TrialState

from tuner.artifacts import ARTIFACT_PREFIX, artifact_store, dashboard_folder
from tuner.data import prepare as data
from tuner.data.development import load_development
from tuner.errors import StudyError, TunerError
from tuner.metrics import METHODS, Metrics, measure
from tuner.results import heldout, report_page
from tuner.results.bundle_writer import bundle_name, configs_of, write_bundle
from tuner.results.choice import choose_ensemble, choose_trial, predict_together
from tuner.results.export import config_hash
from tuner.results.report import Evaluate, Report, write_report
from tuner.search import study
from tuner.search.status import status
from tuner.search.tuned_study import TunedStudy
from tuner.spec.architecture import ModelConfig
from tuner.storage.held_lease import HeldLease
from tuner.storage.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    with storage_in(tmp_path) as opened:
        yield opened


@pytest.fixture
def tuned(storage: Storage, tmp_path: Path) -> TunedStudy:
    return finished_study(storage, tmp_path)


def reported(
    tuned: TunedStudy,
    output: Path | None = None,
    evaluate: Evaluate | None = predict,
    again: str | None = None,
) -> Report:
    root = tuned.artifacts.folder.parent
    return write_report(
        tuned.storage,
        tuned.name,
        artifacts_root=root,
        output=output,
        evaluate=evaluate,
        again=again,
    )


def expected_metrics(tuned: TunedStudy) -> Metrics:
    """What the winner is worth on the test split, by another way."""
    spec = tuned.record.spec
    _, rows = data.read_held_out(spec.data, folder=spec.folder)
    config = spec.space.resolve(tuned.trials()[WINNER].params)
    return measure(rows.labels, predict(config, b"weights of the winner", rows.tokens))


def test_the_report_hangs_on_the_study_and_its_overview_tells(tuned: TunedStudy) -> None:
    written = reported(tuned)
    reported(tuned)  # shown again: it is attached once
    attributes = tuned.storage.optuna.get_study_system_attrs(tuned.id)
    (described,) = [
        json.loads(value) for key, value in attributes.items() if key.startswith(ARTIFACT_PREFIX)
    ]
    assert (described["filename"], described["mimetype"]) == ("report.html", "text/html")
    root = tuned.artifacts.folder.parent
    with artifact_store(root).open_reader(described["artifact_id"]) as file:
        assert file.read() == written.html_file.read_bytes()
    overview = optuna_dashboard.get_note(tuned.study)
    assert overview.startswith("## demo\n\n**Reported** as of ")
    assert "takes no more trials" in overview
    study.delete(tuned)
    assert not list(dashboard_folder(root).iterdir())


def fail(*_: object, **__: object) -> NoReturn:
    raise AssertionError("it was called")


def test_reports_over_other_splits_of_the_same_data_stand_side_by_side(
    storage: Storage, tmp_path: Path
) -> None:
    first = finished_study(storage, tmp_path)
    assert reported(first).document["side_by_side"] == []
    data = {"source": "rows.csv", "split": {"seed": 2, "validation": 0.2, "test": 0.2}}
    second = finished_study(storage, tmp_path, name="other", data=data)
    written = reported(second)
    own, other = written.document["side_by_side"]
    assert (own["study"], own["split"]) == ("other", "random, seed 2")
    assert (other["study"], other["split"]) == ("demo", "random, seed 1")
    assert other["accuracy"] == expected_metrics(first).accuracy
    assert "Beside it: study 'demo' split the same data at random (seed 1)" in (written.summary())
    page = written.html_file.read_text()
    assert "<h2>Other splits of the same data</h2>" in page
    assert "<td>random, seed 1</td>" in page
    # The first report tells of the second when it is shown again; a third study on a split that
    # is there already is in the ledger alone.
    assert [row["study"] for row in reported(first).document["side_by_side"]] == ["demo", "other"]
    third = finished_study(storage, tmp_path, name="third", data=data)
    document = reported(third, again="the same split again").document
    assert [row["study"] for row in document["side_by_side"]] == ["third", "demo"]


# --- what is evaluated, and what comes out ---


def test_the_winner_is_evaluated_from_its_kept_weights_on_the_test_split(
    tuned: TunedStudy,
) -> None:
    calls: list[tuple[ModelConfig, bytes, int]] = []

    def evaluate(
        config: ModelConfig, weights: bytes, tokens: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.float64]:
        calls.append((config, weights, len(tokens)))
        return predict(config, weights, tokens)

    document = reported(tuned, evaluate=evaluate).to_document()
    winner = tuned.trials()[WINNER]
    config = tuned.record.spec.space.resolve(winner.params)
    identity = tuned.record.data
    # First the validation rows, as a rehearsal; then the test rows, once; then parts of them.
    assert calls[:2] == [
        (config, b"weights of the winner", identity.validation_rows),
        (config, b"weights of the winner", identity.test_rows),
    ]
    assert all(rows < identity.test_rows for _, _, rows in calls[2:])
    assert document["study"] == "demo"
    assert document["trial"] == WINNER
    assert document["synthetic"] is False
    assert document["validation_loss"] == winner.value
    assert document["validation"]["loss"] == pytest.approx(winner.value)
    expected = expected_metrics(tuned)
    assert document["test"] == expected.to_document()
    assert set(document["test"]) >= {
        *("n", "loss", "accuracy", "mcc", "roc_auc"),
        *("loss_ci95", "accuracy_ci95", "mcc_ci95", "roc_auc_ci95"),
    }
    assert sum(document["confusion_matrix"].values()) == identity.test_rows
    assert document["confusion_matrix"]["true_positive"] == expected.confusion.true_positive
    assert document["ledger"]["entry"] == document["ledger"]["openings"] == 1
    assert (
        tuned.storage.ledger.entries()[0].config_hash
        == document["config_hash"]
        == config_hash(config)
    )


def test_an_ensemble_is_evaluated_in_the_same_opening(storage: Storage, tmp_path: Path) -> None:
    tuned = study_with_networks(storage, tmp_path)
    ensemble = choose_ensemble(tuned)
    members = list(zip(ensemble.trials, ensemble.shares, strict=True))
    assert len(members) > 1
    written = reported(tuned, evaluate=None)
    (entry,) = tuned.storage.ledger.entries()
    assert [(one.trial, one.share) for one in entry.ensemble] == members
    spec = tuned.record.spec
    _, rows = data.read_held_out(spec.data, folder=spec.folder)
    expected = measure(rows.labels, predict_together(ensemble, rows.tokens))
    found = written.document["ensemble"]
    assert found["test"]["loss"] == pytest.approx(expected.loss)
    assert found["validation"]["loss"] == pytest.approx(ensemble.validation.loss)
    single = tuned.ranked()[0].number
    assert written.document["trial"] == single
    assert written.document["test"]["loss"] != pytest.approx(expected.loss, abs=1e-6)
    trials = ", ".join(map(str, ensemble.trials))
    assert f"The ensemble of trials {trials}" in written.summary()
    page = Page(written).text
    assert f"The ensemble of trials {trials}" in page
    assert f"{single}; together {trials}" in page
    # Its bundle has the figures, and so has the single network's, each its own.
    for chosen, figures in ((ensemble, found), (choose_trial(tuned, single), written.document)):
        output = tmp_path / bundle_name(tuned, chosen)
        described = write_bundle(tuned, chosen, configs_of(chosen), output)
        assert described["test"] == figures["test"]
        assert described["ledger"]["entry"] == entry.id


def test_the_json_file_holds_what_the_verb_prints(tuned: TunedStudy, tmp_path: Path) -> None:
    written = reported(tuned, tmp_path / "out" / "deep")
    document = written.to_document()
    assert document.pop("opened_now") is True
    assert document.pop("files") == {
        "json": str(tmp_path / "out" / "deep" / "report.json"),
        "html": str(tmp_path / "out" / "deep" / "report.html"),
    }
    assert json.loads(written.json_file.read_text(encoding="utf-8")) == document
    assert sorted(path.name for path in written.json_file.parent.iterdir()) == [
        "report.html",
        "report.json",
    ]


def test_the_report_goes_to_the_studys_own_folder_by_default(tuned: TunedStudy) -> None:
    assert reported(tuned).html_file == tuned.artifacts.report_folder / "report.html"


def test_the_summary_says_what_was_opened_and_where_to_read_on(tuned: TunedStudy) -> None:
    written = reported(tuned)
    summary = written.summary()
    assert f"Of {tuned.record.data.test_rows} proteins that the search had not seen" in summary
    assert "The test split was opened: ledger entry 1." in summary
    assert str(written.html_file) in summary
    assert "Warning: this test split" not in summary
    assert "Nothing was opened" in reported(tuned).summary()


def test_the_searchs_history_is_in_the_document(tuned: TunedStudy) -> None:
    document = reported(tuned).document
    best = tuned.trials()[WINNER].value
    assert best is not None
    rows = [tuple(row.values()) for row in document["history"]]
    assert rows == [
        (0, "COMPLETE", pytest.approx(best + 0.05), 9, None),
        (1, "COMPLETE", pytest.approx(best), 9, None),
        # Pruned after an epoch, 0.02 above where it was heading.
        (2, "PRUNED", pytest.approx(best + 0.12), 1, None),
        (3, "PRUNED", None, 0, "diverged"),
    ]
    assert document["trials"] == {"COMPLETE": 2, "PRUNED": 2, "FAIL": 1}


# --- once ---


def test_a_second_call_shows_the_recorded_report_and_opens_nothing(
    tuned: TunedStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reported(tuned)
    monkeypatch.setattr(heldout, "read_held_out", fail)
    (tmp_path / "rows.csv").unlink()
    tuned.artifacts.weights(WINNER).unlink()
    second = reported(tuned, tmp_path / "elsewhere", evaluate=fail)
    assert second.document == first.document
    assert (first.opened_now, second.opened_now) == (True, False)
    assert second.html_file.read_bytes() == first.html_file.read_bytes()
    assert len(tuned.storage.ledger.entries()) == 1


def test_an_opening_that_was_cut_off_counts_and_the_next_call_opens_again_and_says_so(
    tuned: TunedStudy,
) -> None:
    validation_rows = []

    def dies_on_the_test_rows(
        config: ModelConfig, weights: bytes, tokens: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.float64]:
        if validation_rows:
            raise KeyboardInterrupt
        validation_rows.append(len(tokens))
        return predict(config, weights, tokens)

    with pytest.raises(KeyboardInterrupt):
        reported(tuned, evaluate=dies_on_the_test_rows)
    (entry,) = tuned.storage.ledger.entries()
    assert entry.report is None
    written = reported(tuned)
    assert written.opened_now
    assert written.document["ledger"]["entry"] == written.document["ledger"]["openings"] == 2
    for text in (written.summary(), written.html_file.read_text(encoding="utf-8")):
        assert "this test split was opened 2 times in this storage" in text
        assert "Ledger entry 1: opened, but the evaluation was never recorded" in text


def test_openings_by_other_studies_are_counted_and_warned_about_in_a_report_shown_again(
    tuned: TunedStudy, tmp_path: Path
) -> None:
    assert not report_page.ledger_warnings(reported(tuned).document)
    rival = finished_study(tuned.storage, tmp_path, name="rival", seed=1)
    reported(rival, again="another search")
    again = reported(tuned).document["ledger"]
    assert (again["entry"], again["openings"]) == (1, 2)
    assert [row["study"] for row in again["rows"]] == ["demo", "rival"]
    (warning,) = report_page.ledger_warnings({"ledger": again})
    assert "this test split was opened 2 times" in warning
    look, _ = report_page.ledger_warnings(reported(rival).document)
    assert "2nd look at this test split. The reason that was given: another search." in look


def test_the_report_of_a_deleted_study_is_not_that_of_the_next_one_with_its_id(
    tuned: TunedStudy, tmp_path: Path
) -> None:
    reported(tuned)
    optuna.delete_study(study_name="demo", storage=tuned.storage.optuna)
    again = finished_study(tuned.storage, tmp_path)
    assert again.id == tuned.id  # SQLite gives the id again: what this test is about
    with pytest.raises(StudyError, match=r"was opened before: entry 1 .*--again --reason"):
        reported(again)
    written = reported(again, again="the first study was deleted")
    assert written.opened_now
    assert written.document["ledger"]["openings"] == 2


def test_a_reported_study_takes_no_more_trials(tuned: TunedStudy) -> None:
    reported(tuned)
    assert status(tuned).state == "reported"
    record = tuned.record
    with pytest.raises(StudyError, match="takes no more"):
        study.create_or_resume(
            tuned.storage,
            record.spec.model_copy(update={"trials": 5}),
            record.data,
            development_sha256=record.development_sha256,
            artifacts_root=tuned.artifacts.folder.parent,
        )


def test_no_coordinator_can_start_while_the_test_split_is_open(tuned: TunedStudy) -> None:
    refusals = []

    def evaluate(
        config: ModelConfig, weights: bytes, tokens: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.float64]:
        with Storage(tuned.storage.url) as other:
            with pytest.raises(TunerError, match="is being run by process"):
                other.lease.take(tuned.id)
            refusals.append(len(tokens))
        return predict(config, weights, tokens)

    reported(tuned, evaluate=evaluate)
    assert len(refusals) >= 2
    assert tuned.storage.leases.of(tuned.id) is None


@pytest.mark.parametrize(
    "meanwhile",
    [
        "UPDATE tuner_lease SET token = 'another'",  # a launch took over
        "DELETE FROM tuner_lease",  # and has ended
    ],
)
def test_a_report_that_was_frozen_and_replaced_opens_nothing(
    tuned: TunedStudy, meanwhile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heldout, "read_held_out", fail)

    def freeze(
        config: ModelConfig, weights: bytes, tokens: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.float64]:
        with Storage(tuned.storage.url) as other:
            other._transactions.run(lambda c: c.exec_driver_sql(meanwhile))
        return predict(config, weights, tokens)

    with pytest.raises(StudyError, match=r"took study 'demo' over.*Nothing was opened"):
        reported(tuned, evaluate=freeze)
    assert tuned.storage.ledger.entries() == ()


def test_a_report_that_loses_its_lease_once_the_split_is_open_records_nothing(
    tuned: TunedStudy,
) -> None:
    evaluated = []

    def freeze(
        config: ModelConfig, weights: bytes, tokens: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.float64]:
        evaluated.append(len(tokens))
        if len(evaluated) == 2:
            with Storage(tuned.storage.url) as other:
                other._transactions.run(lambda c: c.exec_driver_sql("DELETE FROM tuner_lease"))
        return predict(config, weights, tokens)

    with pytest.raises(StudyError, match=r"was opened \(ledger entry 1\).*`tuner report demo "):
        reported(tuned, evaluate=freeze)
    assert [row.report for row in tuned.storage.ledger.entries()] == [None]
    assert status(tuned).state == "reported"


def test_a_report_renews_its_lease_in_rehearsal_and_evaluation(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.storage.held_lease._RENEWAL_SECONDS", 0.01)
    renewed = []

    def takes_an_hour(
        config: ModelConfig, weights: bytes, tokens: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.float64]:
        with Storage(tuned.storage.url) as other:
            other._transactions.run(
                lambda c: c.exec_driver_sql("UPDATE tuner_lease SET renewed_at = renewed_at - 3600")
            )
            deadline = time.monotonic() + 60.0
            while other.leases.of(tuned.id).age_seconds > 3000.0 and time.monotonic() < deadline:
                time.sleep(0.01)
            renewed.append(other.leases.of(tuned.id).age_seconds < 3000.0)
        return predict(config, weights, tokens)

    reported(tuned, evaluate=takes_an_hour)
    assert len(renewed) >= 2
    assert all(renewed)


def before_the_lease(monkeypatch: pytest.MonkeyPatch, tuned: TunedStudy, do: Any) -> None:
    """Something happens once the report has looked, and before it holds the lease."""
    take = HeldLease.take

    def too_late(lease: HeldLease, study_id: int) -> str:
        monkeypatch.setattr(HeldLease, "take", take)
        do()
        return take(lease, study_id)

    monkeypatch.setattr(HeldLease, "take", too_late)


def test_of_two_reports_at_once_the_second_shows_what_the_first_recorded(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[Report] = []

    def report_in_another_process() -> None:
        with Storage(tuned.storage.url) as other:
            there = study.load(other, "demo", artifacts_root=tuned.artifacts.folder.parent)
            first.append(reported(there))

    before_the_lease(monkeypatch, tuned, report_in_another_process)
    second = reported(tuned, evaluate=fail)
    assert (first[0].opened_now, second.opened_now) == (True, False)
    assert second.document == first[0].document
    assert len(tuned.storage.ledger.entries()) == 1


def test_a_budget_that_was_raised_before_the_report_held_the_lease_is_seen(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_the_lease(monkeypatch, tuned, lambda: unfinished(tuned, Path()))
    with pytest.raises(StudyError, match="has finished 4 of its 5 trials"):
        reported(tuned)
    assert tuned.storage.ledger.entries() == ()


def test_many_reports_at_once_open_the_split_once(tuned: TunedStudy) -> None:
    root, barrier = tuned.artifacts.folder.parent, threading.Barrier(4)
    outcomes: list[bool | str] = []

    def report() -> None:
        with Storage(tuned.storage.url) as storage:
            barrier.wait()
            try:
                written = write_report(storage, "demo", artifacts_root=root, evaluate=predict)
                outcomes.append(written.opened_now)
            except TunerError as error:
                outcomes.append(str(error))

    threads = [threading.Thread(target=report) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(True) == len(tuned.storage.ledger.entries()) == 1
    assert all(one is False or "is being run by" in str(one) for one in outcomes if one is not True)


# --- what the figures should be read with ---


def test_small_splits_are_warned_of_in_words_page_and_document(tuned: TunedStudy) -> None:
    written = reported(tuned)
    warnings = written.document["warnings"]
    assert [warning.split(":")[1] for warning in warnings] == [
        " only 80 validation rows",
        " only 80 test rows",
    ]
    page = written.html_file.read_text(encoding="utf-8")
    for warning in warnings:
        assert warning in written.summary()
        assert f'<p class="warning">{warning}</p>' in page


@pytest.mark.parametrize(
    ("losses", "most", "warned"),
    [
        ([0.7, 0.6, 0.5], 3, True),
        ([0.5], 1, True),
        ([0.7, 0.5, 0.5], 3, False),  # the first of equal losses is the best
        ([0.7, 0.5, 0.6], 3, False),
        ([0.7, 0.6, 0.5], 9, False),  # it ended otherwise
        ([], 3, False),
        ([None, 0.5], 2, True),
    ],
)
def test_a_winner_that_still_improved_at_its_last_epoch_is_warned_of(
    tuned: TunedStudy, losses: list[float | None], most: int, warned: bool
) -> None:
    document = dict(reported(tuned).document)
    document["curve"] = [{"validation_loss": loss} for loss in losses]
    document["spec"] = {"training": {"max_epochs": most}}
    said = [each for each in report_page.warnings(document) if "still improving" in each]
    assert len(said) == warned
    if warned:
        assert f"at its last epoch, {len(losses)} of at most {most}" in said[0]


def test_the_page_says_how_each_interval_was_made(tuned: TunedStudy) -> None:
    written = reported(tuned)
    text = Page(written).text
    assert written.document["test"]["method"] == METHODS
    for method in METHODS.values():
        assert method in text


def test_a_report_that_an_earlier_version_recorded_is_shown_again(tuned: TunedStudy) -> None:
    document = reported(tuned).document
    old = {key: value for key, value in document.items() if key not in ("ensemble", "ledger")}
    for part in ("test", "validation"):
        old[part] = {key: value for key, value in old[part].items() if key != "method"}
    tuned.storage.lease.take(tuned.id)
    entry = heldout.open_test_split(tuned, trial=tuned.ranked()[0], config_hash="c" * 64)[0]
    tuned.storage.ledger.record_report(entry, {**old, "ledger": {"entry": entry}})
    tuned.storage.lease.release()
    again = reported(tuned, evaluate=fail)
    assert "percentiles of a bootstrap" in Page(again).text
    assert "ensemble" not in Page(again).text
    assert "method" not in again.document["test"]


# --- what is found out before anything is opened ---


def running(tuned: TunedStudy, _: Path) -> None:
    with Storage(tuned.storage.url) as other:
        other.lease.take(tuned.id)


def unfinished(tuned: TunedStudy, _: Path) -> None:
    tuned.study.set_user_attr(study.BUDGET_KEY, 5)


def without_weights(tuned: TunedStudy, _: Path) -> None:
    tuned.artifacts.weights(WINNER).unlink()


def with_a_better_trial_of_somebody_else(tuned: TunedStudy, _: Path) -> None:
    tell(tuned, 0.1, 0.05, epochs=9)


def without_development_file(tuned: TunedStudy, folder: Path) -> None:
    (folder / "artifacts" / "development" / f"{tuned.record.development_sha256}.npz").unlink()


def with_another_source(_: TunedStudy, folder: Path) -> None:
    write_rows(folder, rows=401)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (running, r"'demo' is being run by process \d+ on .*tuner stop demo"),
        (unfinished, r"has finished 4 of its 5 trials.*`tuner launch STUDY.toml .*--trials 4"),
        (without_weights, r"1\.npz: No such file.*never trained again.*TUNER_ARTIFACTS"),
        (with_a_better_trial_of_somebody_else, r"5\.npz: No such file"),
        (
            without_development_file,
            r"in the storage; `tuner launch STUDY.toml .*Nothing was opened",
        ),
        (with_another_source, r"rows\.csv: sha256 is .*the data changed since"),
    ],
)
def test_a_report_that_cannot_be_made_opens_nothing(
    tuned: TunedStudy,
    tmp_path: Path,
    spoil: Callable[[TunedStudy, Path], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heldout, "read_held_out", fail)
    spoil(tuned, tmp_path)
    with pytest.raises(StudyError, match=message):
        reported(tuned)
    assert tuned.storage.ledger.entries() == ()


def nonsense(*_: object) -> npt.NDArray[np.float64]:
    raise ValueError("layer 'conv1' expects (5, 16, 32), not (3, 16, 32)")


def not_a_number(
    config: ModelConfig, weights: bytes, tokens: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float64]:
    return np.full(len(tokens), np.nan)


def another_network(
    config: ModelConfig, weights: bytes, tokens: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float64]:
    return -predict(config, weights, tokens)


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (nonsense, r"cannot be made from these weights \(layer 'conv1' expects"),
        (not_a_number, r"cannot be made from these weights \(a logit is not a finite"),
        (another_network, r"these weights have a validation loss of 0\.\d+, but trial 1 is rec"),
    ],
)
def test_weights_that_are_not_the_winners_are_found_out_on_the_validation_split(
    tuned: TunedStudy, evaluate: Evaluate, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heldout, "read_held_out", fail)
    with pytest.raises(StudyError, match=message):
        reported(tuned, evaluate=evaluate)
    assert tuned.storage.ledger.entries() == ()
    assert tuned.storage.leases.of(tuned.id) is None


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_winner_with_large_logits_is_reported_by_the_loss_that_training_counted(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    # Training was in another precision: its losses are as coarse as the logits are large.
    rounding = {"float32": 1e-6, "bfloat16": 2**-8}[precision]

    def sure(
        config: ModelConfig, weights: bytes, tokens: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.float64]:
        return 1_000 * predict(config, weights, tokens)

    tuned = finished_study(storage, tmp_path, training={"max_epochs": 9, "precision": precision})
    development = load_development(
        data.prepare(
            tuned.record.spec.data, folder=tmp_path, artifacts=tmp_path / "artifacts"
        ).development_file
    )
    config = tuned.record.spec.space.resolve({"learning_rate": 0.01})
    logits = sure(config, b"weights of the winner", development.validation_tokens)
    towards = np.where(development.validation_labels == 1, logits, -logits)
    # As tf.nn.sigmoid_cross_entropy_with_logits documents it.
    losses = np.maximum(-towards, 0) + np.log1p(np.exp(-np.abs(towards)))
    counted = float(losses.mean())
    assert counted > 100
    trials = list(tuned.study.get_trials(deepcopy=True))
    trials[WINNER].value = trials[WINNER].values[0] = counted * (1 + rounding)
    monkeypatch.setattr(TunedStudy, "ranked", lambda _: [trials[WINNER]])
    document = reported(tuned, evaluate=sure).document
    assert document["validation"]["loss"] == pytest.approx(counted, rel=1e-4)


OUTAGES = [
    OSError(errno.EMFILE, "Too many open files"),
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EIO, "Input/output error"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUTAGES, ids=str)
@pytest.mark.parametrize("which", ["weights", "development"])
def test_a_file_that_cannot_be_opened_is_told_and_not_called_damaged(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch, which: str, error: Exception
) -> None:
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.parent.name == which:
            raise error
        return read_bytes(path)

    with monkeypatch.context() as refusing:
        refusing.setattr(Path, "read_bytes", refuse)
        with pytest.raises(StudyError, match="Nothing was opened") as told:
            reported(tuned)
    assert (getattr(error, "strerror", None) or "MemoryError") in str(told.value)
    assert "amaged" not in str(told.value)
    assert tuned.storage.ledger.entries() == ()
    assert reported(tuned).opened_now


@pytest.mark.parametrize("error", [OUTAGES[0], OUTAGES[-1]], ids=str)
@pytest.mark.parametrize(("calls", "opened"), [(0, 0), (1, 1)])
def test_an_evaluation_that_the_system_refuses_is_told(
    tuned: TunedStudy, error: Exception, calls: int, opened: int
) -> None:
    before: list[int] = []

    def refused(
        config: ModelConfig, weights: bytes, tokens: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.float64]:
        if len(before) == calls:
            raise error
        before.append(len(tokens))
        return predict(config, weights, tokens)

    with pytest.raises(
        StudyError, match=r"evaluated.*once that is solved, (report|try) again"
    ) as told:
        reported(tuned, evaluate=refused)
    assert "amaged" not in str(told.value)
    assert len(tuned.storage.ledger.entries()) == opened


def test_a_study_without_a_fully_trained_trial_has_no_winner(
    storage: Storage, tmp_path: Path
) -> None:
    tuned = finished_study(storage, tmp_path)
    other = finished_study(storage, tmp_path, name="pruned", trials=1)
    optuna.delete_study(study_name="pruned", storage=storage.optuna)
    other = study.create_or_resume(
        storage,
        other.record.spec,
        other.record.data,
        development_sha256=other.record.development_sha256,
        artifacts_root=tuned.artifacts.folder.parent,
    )
    tell(other, 0.6, 0.01, epochs=1, state=TrialState.PRUNED)
    with pytest.raises(StudyError, match=r"no fully trained trial .*larger budget \(--trials\)"):
        reported(other)
    assert storage.ledger.entries() == ()


def test_a_folder_that_cannot_be_written_is_found_out_before_anything_is_opened(
    tuned: TunedStudy, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TunerError, match=r"file: the report cannot be written there .*-o"):
        reported(tuned, tmp_path / "file")
    assert tuned.storage.ledger.entries() == ()


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_pipe_in_the_way_of_a_report_is_found_out_before_anything_is_opened(
    tuned: TunedStudy, tmp_path: Path, name: str
) -> None:
    (tmp_path / "report").mkdir()
    os.mkfifo(tmp_path / "report" / name)
    with pytest.raises(TunerError, match=rf"{name}: the report cannot be written there \(it"):
        reported(tuned, tmp_path / "report")
    assert tuned.storage.ledger.entries() == ()


def test_a_report_can_be_told_where_the_data_is_now(tuned: TunedStudy, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "rows.csv").rename(tmp_path / "there" / "rows.csv")
    (tmp_path / "there" / "rows.csv").rename(tmp_path / "there" / "copy.csv")
    with pytest.raises(StudyError, match=r"--data, then report again. Nothing was opened"):
        reported(tuned)
    root = tuned.artifacts.folder.parent
    written = write_report(
        tuned.storage,
        tuned.name,
        artifacts_root=root,
        data=tmp_path / "there" / "copy.csv",
        evaluate=predict,
    )
    assert written.opened_now
    assert len(tuned.storage.ledger.entries()) == 1


def test_a_disk_that_fills_up_loses_no_report(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as filling:
        filling.setattr("tuner.results.report.publish", full)
        with pytest.raises(TunerError, match=r"No space left.*recorded in the storage.*-o DIR"):
            reported(tuned)
    assert not reported(tuned, evaluate=fail).opened_now


def test_there_is_no_report_of_a_study_that_does_not_exist(
    storage: Storage, tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match="no study 'nobody'"):
        write_report(storage, "nobody", artifacts_root=tmp_path)


# --- the page ---


class Page(HTMLParser):
    """What a page shows, and what it would load."""

    def __init__(self, written: Report) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.scripts: list[str] = []
        self.feed(written.html_file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, text: str) -> None:
        if self._inside == "script":
            self.scripts.append(text)
        elif self._inside != "style":
            self.text = " ".join(f"{self.text} {text}".split())


def test_the_page_loads_nothing_and_holds_the_figures_library_once(tuned: TunedStudy) -> None:
    page = Page(reported(tuned))
    assert not [tags for tags in page.tags if {"src", "href", "srcset"} & set(tags[1])]
    (policy,) = [tag["content"] for _, tag in page.tags if "http-equiv" in tag]
    assert str(policy).startswith("default-src 'none'")
    assert sum("plotly.js v" in script[:200] for script in page.scripts) == 1
    figures = [tag["id"] for name, tag in page.tags if name == "div" and tag.get("id")]
    assert figures == ["roc", "reliability", "curves", "history"]


def test_the_page_shows_what_was_done_and_found(tuned: TunedStudy) -> None:
    written = reported(tuned)
    text = Page(written).text
    record, document = tuned.record, written.document
    for shown in (
        report_page.headline(document),
        report_page.gap_in_words(document),
        record.data.split_id,
        record.data.sha256,
        record.spec.spec_hash,
        "240 training, 80 validation, 80 test",
        "random, stratified by label, seed 1",
        "4 finished trials; there are 2 fully trained, 2 stopped early, 1 failed",
        "TPESampler (multivariate no, constant_liar yes)",
        "Hyperband (min_epochs 1, eta 3, brackets in turn, rungs [1, 3])",
        f"optuna {record.versions['optuna']}",
        "learning_rate 0.01",
        "This split was opened once in this storage.",
        "Whoever holds the source file can read the test rows",
        "deletes the count of openings",
    ):
        assert shown in text
    assert "SYNTHETIC" not in text
    matrix = document["confusion_matrix"]
    assert f"soluble {matrix['true_positive']} {matrix['false_negative']} insoluble" in text


def test_a_report_on_synthetic_data_says_so_first(storage: Storage, tmp_path: Path) -> None:
    made_up = {"source": "synthetic", "split": {"seed": 1}}
    written = reported(finished_study(storage, tmp_path, data=made_up))
    assert written.synthetic
    assert written.to_document()["synthetic"] is True
    assert "600 made-up proteins" in written.summary()
    assert re.match(r"Report: demo SYNTHETIC DATA The proteins of this", Page(written).text)


def test_names_from_the_storage_are_text_and_no_html(tuned: TunedStudy) -> None:
    tuned.storage.ledger.open(
        opened_at="2026-01-01T00:00:00+00:00",
        opened_by="<img src=x onerror=alert(1)>",
        study="<script>alert(1)</script>",
        study_key="another",
        trial=0,
        config_hash="",
        spec_hash="",
        split_id=tuned.record.data.split_id,
    )
    page = Page(reported(tuned, again="<b>why</b>"))
    assert "<b>why</b>" in page.text
    assert "<script>alert(1)</script>" in page.text
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "alert(1)" not in page.scripts
    assert "img" not in {tag for tag, _ in page.tags}


def figure(document: dict[str, Any], name: str) -> dict[str, Any]:
    """The traces of a figure, by their names in the legend."""
    make = {"history": report_page._history_figure, "curves": report_page._curves_figure}[name]
    html = str(make(document))
    start = html.index("[", html.index("Plotly.newPlot("))
    traces = json.JSONDecoder().raw_decode(html[start:])[0]
    return {trace["name"]: trace for trace in traces}


def points(trace: dict[str, Any]) -> list[tuple[int, float]]:
    return [(x, pytest.approx(y)) for x, y in zip(trace["x"], trace["y"], strict=True)]


def test_the_searchs_history_shows_each_trial_and_the_best_so_far() -> None:
    rows = [
        (0, "COMPLETE", 0.64),
        (1, "PRUNED", 0.66),
        (2, "COMPLETE", 0.60),
        (3, "PRUNED", None),
        (4, "COMPLETE", 0.61),
        (5, "PRUNED", 9.0),
    ]
    history = [
        {"trial": trial, "state": state, "validation_loss": loss, "epochs": 3, "ended": None}
        for trial, state, loss in rows
    ]
    document = {"history": history, "trial": 2}
    traces = figure(document, "history")
    assert points(traces["fully trained"]) == [(0, 0.64), (2, 0.60), (4, 0.61)]
    assert points(traces["stopped early, at the best loss it had"]) == [(1, 0.66), (5, 9.0)]
    assert points(traces["best so far"]) == [(0, 0.64), (2, 0.60), (4, 0.60)]
    assert points(traces["the winner"]) == [(2, 0.60)]
    assert report_page._history_outliers(document) == 1


def test_the_best_epoch_is_marked_in_the_learning_curves(tuned: TunedStudy) -> None:
    document = dict(reported(tuned).document)
    winner = tuned.trials()[WINNER]
    traces = figure(document, "curves")
    assert set(traces) == {
        "training loss",
        "validation loss",
        "best epoch (8): the weights that were kept",
    }
    assert points(traces["best epoch (8): the weights that were kept"]) == [(8, winner.value)]
    assert len(traces["validation loss"]["x"]) == 9
    assert report_page._curves_figure({"curve": []}) is None


@pytest.mark.parametrize(
    ("test_loss", "words"),
    [
        (0.64, "0.0400 higher than the validation loss of 0.6000 .* this one tells nothing"),
        (0.58, "0.0200 lower than .* this one tells nothing"),
        (0.70, "0.1000 higher than .* gaps of up to 0.0500 .*Expect the test figures"),
        (0.50, "0.1000 lower than .* the test rows are easier"),
    ],
)
def test_the_gap_is_judged_by_the_spread_of_both_splits(test_loss: float, words: str) -> None:
    document = {
        # Half-widths of 0.03 and 0.04 make one of 0.05 together.
        "test": {"loss": test_loss, "loss_ci95": [test_loss - 0.03, test_loss + 0.03]},
        "validation": {"loss_ci95": [0.56, 0.64]},
        "validation_loss": 0.6,
        "history": [{}] * 7,
    }
    assert re.search(words, report_page.gap_in_words(document))
    assert "chosen among 7" in report_page.gap_in_words(document)


def test_searched_values_are_marked_layer_by_layer() -> None:
    layer = {"kernel_size": 3, "conv_dropout": 0.25, "padding": "same"}
    document = {
        "config": {
            "masking": True,
            "output_dropout": 0.1,
            "blocks": [layer, layer],
            "dense": [],
        },
        "sampled": {"blocks": 2, "block2.kernel_size": 3, "conv_dropout": 0.25, "dense_dropout": 0},
    }
    network, blocks, dense = report_page.config_tables(document)
    assert network.rows == (
        ("blocks", ("2",), True),
        ("dense_layers", ("0",), False),
        ("masking", ("yes",), False),
        ("output_dropout", ("0.1",), True),
    )
    assert blocks.columns == ("block1", "block2")
    assert blocks.rows == (
        ("kernel_size", ("3", "3"), True),
        ("conv_dropout", ("0.25", "0.25"), True),
        ("padding", ("same", "same"), False),
    )
    assert dense.rows == ()


# --- what showing a recorded report does not wait for ---


@pytest.mark.parametrize(("module", "found"), [("keras", False), ("optuna", True)])
def test_the_report_is_imported_without_tensorflow(module: str, found: bool) -> None:
    code = f"import sys, tuner.results.report; sys.exit({module!r} in sys.modules)"
    # The probe can fail: it finds Optuna.
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == int(found)
