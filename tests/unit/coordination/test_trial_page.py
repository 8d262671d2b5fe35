"""What is attached to a trial: curves, network, a note in plain words, the line that trains it."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import optuna
import pytest
from fakes import FakeWorkers, Notes, epoch_result, fake_train, make_study, small_spec
from fault_runs import assert_page_is_whole, attached, drawn_epochs
from optuna.trial import TrialState

from tuner.artifacts import ARTIFACT_PREFIX, CURVES_FILE, NETWORK_FILE, dashboard_folder
from tuner.coordination import trial_page
from tuner.coordination.coordinator import Coordinator
from tuner.coordination.curve_drawing import draw_curves
from tuner.coordination.trial_page import TrialPage
from tuner.coordination.words import notes, train_again
from tuner.errors import StudyError, TrialEndedError, WorkerLostError
from tuner.results.export import best_configs, config_of_trial, write_configs, write_trials
from tuner.search.attributes import (
    AGAIN_KEY,
    NOTE_KEY,
    PASSWORD_KEY,
    PRECISION_KEY,
    RESUMED_FROM_KEY,
    RESUMED_KEY,
)
from tuner.search.status import status
from tuner.search.study import delete
from tuner.search.tuned_study import TunedStudy
from tuner.spec.architecture import parameter_count
from tuner.spec.reader import load_spec
from tuner.storage.lease import COORDINATOR_KEY
from tuner.train import EpochResult

Make = Callable[..., TunedStudy]


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Make]:
    made: list[TunedStudy] = []

    def make(**changes: object) -> TunedStudy:
        made.append(make_study(tmp_path, small_spec(**changes)))
        return made[-1]

    yield make
    for one in made:
        one.storage.close()


def curve(*losses: float) -> list[EpochResult]:
    return [epoch_result(loss, epoch) for epoch, loss in enumerate(losses, start=1)]


def words(
    state: TrialState, *losses: float, bracket: int | None = 0, **attributes: object
) -> dict[str, str]:
    return notes(state, curve(*losses), max_epochs=9, eta=3, bracket=bracket, attributes=attributes)


def test_every_trial_has_its_page(study: Make) -> None:
    tuned = study(trials=12)
    Coordinator(tuned, FakeWorkers(), Notes()).run()
    states = set()
    for trial in tuned.trials():
        states.add(trial.state)
        assert_page_is_whole(tuned, trial)
        config = tuned.record.spec.space.resolve(trial.params)
        assert trial.user_attrs["parameters"] == parameter_count(config, 200)
        assert (trial.user_attrs["seed"], trial.user_attrs["as_trial"]) == (0, trial.number)
        assert trial.user_attrs["precision"] == "float32"
        *layers, all_of_them = csv.DictReader(attached(tuned, trial, NETWORK_FILE).splitlines())
        assert int(all_of_them["parameters"]) == parameter_count(config, 200)
        assert layers[0]["output shape"] == "200 x 16"
        assert sum(layer["layer"].endswith("_conv") for layer in layers) == len(config.blocks)
    assert states == {TrialState.COMPLETE, TrialState.PRUNED}


def test_a_pruned_trial_says_where_why_and_what_it_cost() -> None:
    assert words(TrialState.PRUNED, 0.9, 0.7, 0.8, bracket=1) == {
        NOTE_KEY: "Pruned after epoch 3 of 9, a rung of bracket 1: not among the best 1/3 that had "
        "come there. That saved 6 epochs.",
    }


def test_what_a_trial_reached_and_cost_are_numbers_in_attributes_csv_and_json(
    study: Make, tmp_path: Path
) -> None:
    def train(job):
        for result in fake_train(job):
            yield replace(result, validation_roc_auc=0.5 + result.epoch / 100, seconds=2.0)

    tuned = study(trials=12)
    Coordinator(tuned, FakeWorkers(1, train), Notes()).run()
    write_trials(tuned, tmp_path / "trials.csv")
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    for trial, row in zip(tuned.trials(), rows, strict=True):
        epochs = trial.last_step
        expected = {
            "epochs": epochs,
            "training_seconds": 2.0 * epochs,
            "best_epoch": epochs,  # of the stand-in, each epoch is better than the one before
            "validation_accuracy": 0.6,
            "validation_roc_auc": 0.5 + epochs / 100,
            "parameters": parameter_count(tuned.record.spec.space.resolve(trial.params), 200),
        }
        numbers = {
            key: value for key, value in trial.user_attrs.items() if isinstance(value, int | float)
        }
        assert numbers == {**expected, "seed": 0, "as_trial": trial.number}
        assert {key: float(row[key]) for key in expected} == expected
    best = json.loads(json.dumps(status(tuned).to_document()))["best"]
    exported = best_configs(tuned)[0].to_document()
    attributes = tuned.ranked()[0].user_attrs
    for key in ("validation_accuracy", "validation_roc_auc", "parameters"):
        assert best[key] == exported[key] == attributes[key]
    assert exported["provenance"]["validation_roc_auc"] == attributes["validation_roc_auc"]


def test_no_attribute_of_a_trial_has_a_number_in_words(study: Make) -> None:
    tuned = study(trials=2)
    Coordinator(tuned, FakeWorkers(1), Notes()).run()
    for trial in tuned.trials():
        words = {key for key, value in trial.user_attrs.items() if isinstance(value, str)}
        assert words == {COORDINATOR_KEY, NOTE_KEY, PRECISION_KEY, AGAIN_KEY}


def test_a_trial_of_an_earlier_version_has_blank_figures(study: Make, tmp_path: Path) -> None:
    tuned = study(trials=1)
    tuned.study.add_trial(optuna.trial.create_trial(value=0.5, intermediate_values={1: 0.5}))
    write_trials(tuned, tmp_path / "trials.csv")
    with (tmp_path / "trials.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["validation_loss"], row["validation_accuracy"], row["best_epoch"]) == (
        "0.5",
        "",
        "",
    )
    best = status(tuned).to_document()["best"]
    assert (best["validation_loss"], best["validation_accuracy"]) == (0.5, None)
    assert (best["validation_roc_auc"], best["parameters"]) == (None, None)


def test_the_value_has_a_name_also_in_a_study_of_an_earlier_version(study: Make) -> None:
    tuned = study(trials=1)
    assert tuned.study.metric_names is None
    Coordinator(tuned, FakeWorkers(1), Notes()).run()
    assert tuned.study.metric_names == ["validation loss (nats)"]


def test_a_trial_that_could_not_go_on_says_why() -> None:
    said = words(TrialState.PRUNED, ended="out_of_memory", ended_detail="building the network")
    assert said == {NOTE_KEY: "Ended early (out of memory): building the network."}
    failed = words(TrialState.FAIL, 0.5, ended_detail="ValueError: x")
    assert failed[NOTE_KEY] == "Failed: ValueError: x."


def test_a_trained_trial_says_whether_patience_ended_it() -> None:
    whole = words(TrialState.COMPLETE, *[0.5] * 9)
    assert whole[NOTE_KEY] == "Fully trained: all 9 epochs."
    patience = words(TrialState.COMPLETE, 0.5, 0.6)
    assert "ended after 2 of at most 9 epochs" in patience[NOTE_KEY]


def test_a_resumed_trial_says_from_where() -> None:
    resumed = {RESUMED_KEY: 2, RESUMED_FROM_KEY: 3}
    assert words(TrialState.COMPLETE, 0.5, 0.6, **resumed)[NOTE_KEY].endswith(
        "epochs. Resumed 2 times, the last time from its checkpoint after epoch 3."
    )
    once = words(TrialState.COMPLETE, 0.5, **{RESUMED_KEY: 1})[NOTE_KEY]
    assert once.endswith("Resumed once, the last time from the start, without a checkpoint.")
    assert "Resumed" not in words(TrialState.COMPLETE, 0.5)[NOTE_KEY]


def test_the_curve_of_a_trial_whose_worker_died_is_drawn_once_and_whole(study: Make) -> None:
    tuned = study(trials=1)
    deaths = [4]  # the epoch at which its worker dies, once

    def train(job):
        for result in fake_train(job):
            if result.epoch in deaths:
                deaths.clear()
                raise WorkerLostError("its worker died")
            yield result

    Coordinator(tuned, FakeWorkers(1, train), Notes()).run()
    (trial,) = tuned.trials()
    assert trial.user_attrs[RESUMED_KEY] == 1
    assert_page_is_whole(tuned, trial)


def test_a_running_trial_is_drawn_now_and_then(
    study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_page, "_DRAW_SECONDS", -1.0)
    tuned = study(trials=1)
    seen: list[str] = []

    def look(trial: int, result: EpochResult) -> None:
        if result.epoch > 1:
            seen.append(attached(tuned, tuned.trials()[trial], CURVES_FILE))

    Coordinator(tuned, FakeWorkers(1), Notes(look)).run()
    assert [drawn_epochs(drawing) for drawing in seen] == list(range(1, 9))
    assert "in training" in seen[-1]
    assert "fully trained" in attached(tuned, tuned.trials()[0], CURVES_FILE)


def test_a_coordinator_that_was_frozen_while_it_draws_replaces_no_drawing(
    study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one may have ended the trial meanwhile, and drawn all of its epochs."""
    monkeypatch.setattr(trial_page, "_DRAW_SECONDS", -1.0)
    tuned = study(trials=1)
    seen: list[int] = []

    def look(trial: int, result: EpochResult) -> None:
        if result.epoch > 1:
            seen.append(drawn_epochs(attached(tuned, tuned.trials()[trial], CURVES_FILE)))

    def draw(shown: list[EpochResult], *arguments: object, **names: object) -> str:
        if len(shown) >= 4:  # an hour passes while the process is frozen
            tuned.storage.lease._certain_at -= 3600.0
        return draw_curves(shown, *arguments, **names)

    monkeypatch.setattr(trial_page, "draw_curves", draw)
    coordinator = Coordinator(tuned, FakeWorkers(1), Notes(look))
    assert coordinator.run() == "finished"
    assert seen[:4] == [1, 2, 3, 3]
    # The last drawing waits until the lease is surely held.
    assert drawn_epochs(attached(tuned, tuned.trials()[0], CURVES_FILE)) == 9


def test_a_disk_without_room_for_a_page_costs_no_trial(
    study: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    tuned = study(trials=2)
    monkeypatch.setattr("tuner.artifacts.publish", full)
    assert Coordinator(tuned, FakeWorkers(1), Notes()).run() == "finished"
    for trial in tuned.trials():
        assert not [key for key in trial.system_attrs if key.startswith(ARTIFACT_PREFIX)]
        assert trial.user_attrs[NOTE_KEY]


def test_the_drawing_is_xml_that_holds_no_markup_of_others() -> None:
    drawing = draw_curves(
        curve(0.6, 0.5),
        TrialState.PRUNED,
        title='<script>alert("x")</script>',
        max_epochs=9,
        rungs=(1, 3),
    )
    tree = ET.fromstring(drawing)
    tags = {element.tag.partition("}")[2] for element in tree.iter()}
    assert tags <= {"svg", "rect", "marker", "text", "g", "line", "circle", "path"}
    assert "&lt;script&gt;" in drawing


def test_the_pruning_point_and_the_rungs_are_marked() -> None:
    def marks(state: TrialState, rungs: tuple[int, ...]) -> tuple[int, int]:
        drawing = draw_curves(curve(0.6, 0.5), state, title="", max_epochs=9, rungs=rungs)
        return drawing.count("l14 14"), len(
            re.findall('d="[^"]*" stroke="#8a8f98" stroke-d', drawing)
        )

    assert marks(TrialState.COMPLETE, ()) == (0, 0)
    # In each of two panels; the cross stands in the legend, too.
    assert marks(TrialState.PRUNED, (1, 3)) == (3, 4)


def test_a_loss_that_went_astray_does_not_flatten_the_curve() -> None:
    def height_of_first(*losses: float) -> str:
        drawing = draw_curves(curve(*losses), TrialState.COMPLETE, title="", max_epochs=3, rungs=())
        return re.findall(r'd="M([\d.]+ [\d.]+)L', drawing)[1]

    assert height_of_first(1e30, 0.6, 0.5).endswith(" 80.0")  # at the upper edge
    assert draw_curves([], TrialState.FAIL, title="", max_epochs=3, rungs=()).count("no epoch") == 2
    assert height_of_first(float("nan"), 1e30).endswith(" 80.0")


def test_the_line_that_trains_a_trial_again_exports_and_launches_it(
    study: Make, tmp_path: Path
) -> None:
    tuned = study(trials=12, name="a b's; touch x", stop={"patience": 100})
    Coordinator(tuned, FakeWorkers(), Notes()).run()
    pruned = next(trial for trial in tuned.trials() if trial.state == TrialState.PRUNED)
    export, _, launch = pruned.user_attrs[AGAIN_KEY].partition(" && ")
    assert pruned.user_attrs[AGAIN_KEY] == train_again(tuned, pruned.number)
    file = f"{tuned.name}-trial-{pruned.number}.toml"
    root = str(tuned.artifacts.folder.parent)
    option = ["--storage", tuned.storage.url, "--artifacts", root]
    number = str(pruned.number)
    assert shlex.split(export) == [
        *("tuner", "export", tuned.name, "--trial", number, "-o", file),
        *option,
    ]
    assert shlex.split(launch) == ["tuner", "launch", file, *option]
    (written,) = write_configs((config_of_trial(tuned, pruned.number),), tmp_path / file, "toml")
    again = load_spec(written)
    assert again.space.resolve({}) == tuned.record.spec.space.resolve(pruned.params)
    assert again.training.seeded_as(0) == pruned.number
    assert (again.hyperband, again.stop) == (None, None)


@pytest.mark.parametrize("query", ["", "?password=secret"])
def test_the_line_that_trains_a_trial_again_holds_no_password(study: Make, query: str) -> None:
    tuned = study(trials=1)
    url = f"postgresql+psycopg://ada:{'' if query else 'secret'}@db.example/lab{query}"
    tuned.storage.url, own = url, tuned.storage.url
    try:
        options = shlex.split(train_again(tuned, 0))
        # *** would be taken for the password, and $PGPASSWORD not be looked at.
        at = options.index("--storage")
        assert options[at + 1] == "postgresql://ada@db.example/lab"
        trial = tuned.study.ask()
        TrialPage(tuned, trial, tuned.record.spec.space.suggest(trial)).begin()
        assert "PGPASSWORD" in str(trial.user_attrs[PASSWORD_KEY])
        assert "secret" not in tuned.storage.masked_url
    finally:
        tuned.storage.url = own


def test_a_trial_that_ended_without_an_epoch_can_be_trained_again(study: Make) -> None:
    def diverge(job):
        raise TrialEndedError("diverged", "epoch 1")
        yield

    tuned = study(trials=1)
    Coordinator(tuned, FakeWorkers(1, diverge), Notes()).run()
    exported = config_of_trial(tuned, 0)
    assert (exported.validation_loss, exported.rank, exported.epochs) == (None, None, 0)
    assert "validation_loss" not in exported.provenance
    with pytest.raises(StudyError, match=r"has no trial 1; its trials are: 0 to 0"):
        config_of_trial(tuned, 1)
    tuned.study.enqueue_trial({})
    with pytest.raises(StudyError, match=r"Trial 1 .* waits to be started"):
        config_of_trial(tuned, 1)


def test_delete_takes_down_what_hangs_on_trials_of_this_study_alone(
    study: Make, tmp_path: Path
) -> None:
    tuned, other = study(trials=3), study(trials=1, name="other")
    Coordinator(other, FakeWorkers(1), Notes()).run()
    kept = set(dashboard_folder(tmp_path / "artifacts").iterdir())
    Coordinator(tuned, FakeWorkers(1), Notes()).run()
    # Written before a crash that left no attribute of it; and what is not of the dashboard.
    tuned.study.enqueue_trial({})
    tuned.artifacts.attach(CURVES_FILE, b"", trial=3)
    beside = tmp_path / "artifacts" / "development"
    beside.write_text("not the dashboard's")
    tuned.artifacts.remove("../development")
    assert beside.exists()
    assert len(list(dashboard_folder(tmp_path / "artifacts").iterdir())) == len(kept) + 2 * 3 + 1
    delete(tuned)
    assert set(dashboard_folder(tmp_path / "artifacts").iterdir()) == kept


def test_what_hangs_on_a_study_and_its_trials_counts_as_its_disk(
    study: Make, tmp_path: Path
) -> None:
    tuned = study(trials=3)
    assert status(tuned).bytes_on_disk == 0
    Coordinator(tuned, FakeWorkers(1), Notes()).run()
    key, value = tuned.artifacts.attach("report.html", b"x" * 1000)
    tuned.storage.optuna.set_study_system_attr(tuned.id, key, value)
    files = list(dashboard_folder(tmp_path / "artifacts").iterdir())
    assert len(files) == 3 * 2 + 1
    weights = sum(path.stat().st_size for path in tuned.artifacts.folder.rglob("*.npz"))
    expected = weights + sum(path.stat().st_size for path in files)
    assert status(tuned).bytes_on_disk == expected
    # A user takes the file down in the dashboard; the attribute stays behind, empty.
    tuned.artifacts.remove(key.partition(":")[2])
    tuned.storage.optuna.set_study_system_attr(tuned.id, key, "null")
    assert status(tuned).bytes_on_disk == expected - 1000


def test_a_drawing_takes_a_few_kilobytes() -> None:
    long = curve(*[0.7 - epoch / 1000 for epoch in range(81)])
    drawing = draw_curves(long, TrialState.COMPLETE, title="", max_epochs=81, rungs=(1, 3, 9))
    assert len(drawing) < 9_000
