"""What a report says beside its figures: baselines, calibration, where the winner is good."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished_study import finished_study, predict, storage_in

from tuner.data.audit import packages
from tuner.data.development import DevelopmentData
from tuner.data.rows import decode_tokens, encode
from tuner.errors import SetupError, StudyError
from tuner.metrics import cross_entropy
from tuner.results import analysis, baselines
from tuner.results.analysis_page import baselines_in_words
from tuner.results.baselines import Baseline, deepsol_config, fit_baselines
from tuner.results.calibration import calibration, fitted_temperature
from tuner.results.comparison import paired_difference
from tuner.results.report import Report, write_report
from tuner.results.subgroups import (
    best_rows,
    by_length,
    by_similarity,
    removed,
    without_ends,
    worth_of_ends,
)
from tuner.search.tuned_study import TunedStudy
from tuner.spec.architecture import DenseConfig, ModelConfig, misfits, parameter_count
from tuner.spec.spec import TrainingSettings

Drawn = tuple[np.ndarray[Any, np.dtype[np.uint8]], np.ndarray[Any, np.dtype[np.float64]]]


def drawn(rows: int, *, seed: int = 0, spread: float = 1.5) -> Drawn:
    """Labels that follow the probabilities of these logits."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, spread, rows)
    labels = (generator.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.uint8)
    return labels, logits


# --- calibration ---


def test_a_calibrated_network_is_off_by_what_chance_makes() -> None:
    labels, logits = drawn(20_000)
    found = calibration(labels, logits)
    assert found.error == pytest.approx(found.error_by_chance, abs=0.004)
    assert found.loss == pytest.approx(float(cross_entropy(labels, logits).mean()))
    for one in found.bins:
        assert one.low <= one.predicted <= one.high
    assert sum(one.rows for one in found.bins) == 20_000
    sure = calibration(labels, 4 * logits)
    assert sure.error > 5 * sure.error_by_chance
    assert sure.brier > found.brier


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 1.0), (3.0, 3.0), (0.25, 0.25)])
def test_the_temperature_takes_back_what_made_logits_too_large(
    factor: float, expected: float
) -> None:
    labels, logits = drawn(50_000)
    assert fitted_temperature(labels, factor * logits) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1 / 64), (-1.0, 64.0)])
def test_the_temperature_stays_within_its_limits(sign: float, expected: float) -> None:
    labels = np.array([0, 1, 0, 1], dtype=np.uint8)
    logits = sign * np.array([-1.0, 1.0, -2.0, 800.0])
    assert fitted_temperature(labels, logits) == expected


def test_a_row_in_the_last_bin_and_one_bin_alone_are_counted() -> None:
    found = calibration(np.array([1, 1], dtype=np.uint8), np.array([800.0, 900.0]))
    (one,) = found.bins
    assert (one.rows, one.predicted, one.soluble) == (2, 1.0, 1.0)
    assert (one.low, one.high) == (0.9, 1.0)
    assert found.error == found.brier == 0.0


# --- comparison ---


def test_intervals_of_a_paired_difference_hold() -> None:
    """95 % of them cover a true difference that is known from many rows."""
    _, many = drawn(1_000_000, seed=99)
    certain = 1 / (1 + np.exp(-many))

    def expected(scale: float) -> float:
        return float((np.logaddexp(0, scale * many) - certain * scale * many).mean())

    truth = expected(0.3) - expected(1.0)
    covered = 0
    for seed in range(200):
        labels, logits = drawn(400, seed=seed)
        found = paired_difference(labels, logits, 0.3 * logits, draws=400)
        covered += found.loss_ci95[0] <= truth <= found.loss_ci95[1]
    assert 180 <= covered <= 198


def test_of_two_equal_predictors_neither_is_better() -> None:
    labels, logits = drawn(300)
    found = paired_difference(labels, logits, logits)
    assert found.to_document() == {
        "loss": 0.0,
        "loss_ci95": [0.0, 0.0],
        "accuracy": 0.0,
        "accuracy_ci95": [0.0, 0.0],
    }


# --- where it is good ---


def test_the_best_rows_are_those_with_the_highest_probabilities() -> None:
    labels = np.array([1] * 8 + [0] * 2 + [1] * 2 + [0] * 88, dtype=np.uint8)
    logits = -np.arange(100.0)
    tenth, fifth = best_rows(labels, logits)
    assert (tenth["rows"], tenth["precision"], tenth["enrichment"]) == (10, 0.8, 8.0)
    assert (fifth["rows"], fifth["precision"], fifth["enrichment"]) == (20, 0.5, 5.0)
    assert tenth["precision_ci95"][0] < 0.8 < tenth["precision_ci95"][1]


def test_without_soluble_rows_there_is_no_enrichment() -> None:
    tenth, _ = best_rows(np.zeros(10, dtype=np.uint8), np.arange(10.0))
    assert (tenth["precision"], tenth["enrichment"]) == (0.0, None)


def test_groups_by_length_hold_every_row_once() -> None:
    sequences = ["M" * length for length in (*range(20, 60), *[60] * 5)]
    labels, logits = drawn(len(sequences))
    found = by_length(labels, logits, encode(sequences, 80))
    assert sum(group["rows"] for group in found) == len(sequences)
    assert [(group["from"], group["to"]) for group in found] == [
        *((20, 31), (32, 42), (43, 53), (54, 60)),
    ]


def test_groups_by_similarity_tell_near_twins_from_others() -> None:
    generator = np.random.default_rng(0)
    a, b, c = ("".join(generator.choice(list("ACDEFGHIKLMNPQRSTVWY"), 60)) for _ in range(3))
    tokens = encode([f"{a}W", c, b[:45] + c[:15], f"W{b}"], 80)
    labels = np.array([1, 0, 1, 0], dtype=np.uint8)
    logits = np.array([1.0, -1.0, -1.0, 1.0])
    found = by_similarity(labels, logits, tokens, encode([a, b], 80))
    assert [(group["from"], group["rows"], group["accuracy"]) for group in found] == [
        *((0.0, 1, 1.0), (0.3, 1, 0.0), (0.7, 2, 0.5)),
    ]


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ({"first": 2}, ["CDEF", "GHI"]),
        ({"last": 2}, ["ARCD", "KMG"]),
        ({"first": 1, "last": 1}, ["RCDE", "MGH"]),
        ({"middle": 2}, ["AREF", "KHI"]),
    ],
)
def test_residues_are_removed_where_it_was_asked(cut: dict[str, int], expected: list[str]) -> None:
    tokens = removed(encode(["ARCDEF", "KMGHI"], 10), **cut)
    assert decode_tokens(tokens) == expected


def test_a_network_that_reads_the_ends_loses_more_without_them() -> None:
    """It knows a tag at the beginning, and nothing else."""
    generator = np.random.default_rng(0)
    letters = list("ACDEFGHIKLMNPQRSTVWY")
    labels = np.arange(400, dtype=np.uint8) % 2
    bodies = ["".join(generator.choice(letters, 90)) for _ in labels]
    tags = {1: "HHHHHHHHHH", 0: "KKKKKKKKKK"}
    sequences = [tags[label] + body for label, body in zip(labels.tolist(), bodies, strict=True)]
    sequences[0] = "HHHHHHKKKK"  # too short, left out

    def reads_the_first(tokens: Any) -> Any:
        return np.where(tokens[:, 0] == encode(["H"], 1)[0, 0], 3.0, -3.0)

    found = without_ends(labels, encode(sequences, 120), reads_the_first)
    assert found is not None
    assert (found["rows"], found["accuracy"]) == (399, 1.0)
    accuracy = {one["removed"]: one["accuracy"] for one in found["variants"]}
    assert accuracy["last"] == accuracy["middle"] == 1.0
    assert accuracy["first"] == accuracy["both"] < 0.6
    assert found["ends_beyond_middle"]["accuracy_ci95"][0] > 0.3
    assert without_ends(labels[:1], encode(sequences[:1], 120), reads_the_first) is None


@pytest.mark.parametrize(
    ("loss", "accuracy", "lost", "said"),
    [
        (0.01, 0.01, 0.1, "in loss and accuracy by more than the interval"),
        (0.01, -0.01, 0.1, "in loss by more than the interval"),
        (-0.01, 0.01, 0.1, "in accuracy by more than the interval"),
        (-0.01, 0.0, 0.1, "not in the ends alone"),
        (-0.01, 0.0, -0.1, "does not need them"),
    ],
)
def test_what_the_ends_are_worth_is_said_by_the_intervals(
    loss: float, accuracy: float, lost: float, said: str
) -> None:
    def lower_ends(loss: float, accuracy: float) -> dict[str, Any]:
        return {"loss_ci95": [loss, 1.0], "accuracy_ci95": [accuracy, 1.0]}

    variants = [{"lost": None}, {"lost": None}, {"lost": lower_ends(lost, lost)}]
    found = {"ends_beyond_middle": lower_ends(loss, accuracy), "variants": variants}
    assert said in worth_of_ends(found)


# --- the report ---


@pytest.fixture
def tuned(tmp_path: Path) -> Iterator[TunedStudy]:
    with storage_in(tmp_path) as storage:
        yield finished_study(storage, tmp_path)


def reported(tuned: TunedStudy, fit: Any = None) -> Report:
    root = tuned.artifacts.folder.parent
    return write_report(tuned.storage, tuned.name, artifacts_root=root, evaluate=predict, fit=fit)


def baseline(name: str, scale: float) -> Baseline:
    return Baseline(
        name=name,
        meaning="a stand-in",
        predict=lambda tokens: scale * ((tokens.sum(axis=1) % 5) - 2.0),
    )


@pytest.mark.parametrize(("scale", "beats"), [(20.0, True), (0.05, False)])
def test_a_winner_that_does_not_beat_the_linear_baseline_is_reported_in_these_words(
    scale: float, beats: bool, tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    if beats:  # the fakes are as good as chance in accuracy
        monkeypatch.setattr(baselines, "_beats", lambda found: found["loss_ci95"][0] > 0)
    written = reported(tuned, lambda tuned: [baseline("linear model", scale)])
    document = json.loads(json.dumps(written.document))
    (linear,) = document["baselines"]["models"]
    assert document["baselines"]["beats_linear"] is beats
    words = "does not beat the linear baseline by more than the interval"
    (said,) = baselines_in_words(document)
    assert (words in said) is not beats
    assert said in written.summary()
    assert said.split(":")[0] in written.html_file.read_text(encoding="utf-8")
    assert linear["test"]["n"] == tuned.record.data.test_rows
    assert [entry.report is not None for entry in tuned.storage.ledger.entries()] == [True]


@pytest.mark.parametrize(
    ("loss", "accuracy", "beats"),
    [
        ([0.01, 0.03], [0.01, 0.05], True),
        ([0.01, 0.03], [-0.01, 0.05], False),
        ([-0.01, 0.03], [0.01, 0.05], False),
        ([0.0, 0.03], [0.01, 0.05], False),
    ],
)
def test_to_beat_is_to_be_better_in_loss_and_accuracy_beyond_the_interval(
    loss: list[float], accuracy: list[float], beats: bool
) -> None:
    assert baselines._beats({"loss_ci95": loss, "accuracy_ci95": accuracy}) is beats


def test_the_recorded_report_has_the_analysis_and_opens_nothing_again(tuned: TunedStudy) -> None:
    first = reported(tuned, lambda tuned: [baseline("linear model", 1.0)])
    again = reported(tuned, lambda tuned: pytest.fail("it was fitted again"))
    for key in ("baselines", "calibration", "best_rows", "by_length", "by_similarity", "ends"):
        assert again.document[key] == first.document[key], key
    assert not again.opened_now
    found = first.document["calibration"]
    assert found["temperature"] != pytest.approx(1.0, abs=0.01)
    assert found["test_with_temperature"]["loss"] != pytest.approx(found["test"]["loss"], abs=1e-4)


def test_without_baselines_the_report_says_so(tuned: TunedStudy) -> None:
    written = reported(tuned)
    assert written.document["baselines"] is None
    assert "Baselines were left out" in written.html_file.read_text(encoding="utf-8")


def test_baselines_that_cannot_be_fitted_leave_the_split_sealed(tuned: TunedStudy) -> None:
    def fit(tuned: TunedStudy) -> Any:
        raise SetupError("scikit-learn is missing: `pip install it`.")

    with pytest.raises(StudyError, match=r"pip install it.*--no-baselines.*Nothing was opened"):
        reported(tuned, fit)
    assert not tuned.storage.ledger.entries()


def test_an_analysis_that_fails_does_not_cost_the_figures(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(analysis, "by_length", fails)
    written = reported(tuned)
    assert written.document["analysis_failed"] == "a bug"
    assert written.document["test"]["n"] == tuned.record.data.test_rows
    assert "a bug" in written.html_file.read_text(encoding="utf-8")


def test_without_scipy_only_the_similarity_is_missing(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    written = reported(tuned)
    assert written.document["by_similarity"] is None
    assert written.document["by_length"]
    assert "protein-tuner[audit]" in written.html_file.read_text(encoding="utf-8")


# --- fitting ---


def test_deepsols_network_has_its_branches() -> None:
    config = deepsol_config()
    assert [block.kernel_size for block in config.blocks] == list(range(2, 16))
    assert [block.filters for block in config.blocks] == [64] * 7 + [128] * 7
    assert not misfits(config, 200)
    branches = sum((width * 64 + 1) * (64 if width <= 8 else 128) for width in range(2, 16))
    features = 7 * 64 + 7 * 128
    assert parameter_count(config, 200) == 21 * 64 + branches + (features + 1) * 64 + 65


def small_network() -> baselines._Network:
    shape = deepsol_config()
    config = ModelConfig(
        **{
            **{name: getattr(shape, name) for name in shape.__slots__},
            "embedding_dim": 4,
            "blocks": shape.blocks[:1],
            "dense": (
                DenseConfig(
                    units=4, activation="relu", dense_dropout=0.0, dense_l1=0.0, dense_l2=0.0
                ),
            ),
        }
    )
    settings = TrainingSettings(max_epochs=2, patience=None)
    return baselines._Network(name="a small one", meaning="", config=config, settings=settings)


def test_with_folds_baselines_are_fitted_on_all_but_the_first() -> None:
    tokens, labels = encode(["MKTAYIAK", "MKTA", "MK", "M"], 10), np.array([0, 1, 0, 1], np.uint8)
    rows = DevelopmentData(
        training_tokens=tokens,
        training_labels=labels,
        validation_tokens=tokens,
        validation_labels=labels,
        folds=np.array([1, 0, 0, 1], np.uint8),
    )
    found = baselines.fitting_rows(rows)
    assert decode_tokens(found.training_tokens) == ["MKTAYIAK", "M"]
    assert decode_tokens(found.validation_tokens) == ["MKTA", "MK"]


def test_networks_are_trained_once_for_the_same_rows(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "_networks", lambda: (small_network(),))
    said: list[str] = []
    first = fit_baselines(tuned, say=said.append)
    assert "Trained a small one: 2 epochs." in said
    tokens = encode(["MKTAYIAKQRQISFVKSHFSRQ" * 3], tuned.record.data.max_length)
    monkeypatch.setattr(baselines, "in_workers", None)  # nothing is trained again
    again = fit_baselines(tuned)
    assert [one.name for one in again] == [one.name for one in first]
    assert again[-1].predict(tokens) == pytest.approx(first[-1].predict(tokens))
    (kept,) = (tuned.artifacts.folder.parent / "baselines").rglob("*.npz")
    kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.raises(TypeError):  # it is damaged, so it would be trained
        fit_baselines(tuned)


def test_the_networks_of_the_chapter_are_those_of_its_study_files() -> None:
    found = {one.name: one.config for one in baselines._networks()}
    assert list(found) == [
        *("chapter's baseline", "chapter's dropout", "chapter's l2", "DeepSol S1's network"),
    ]
    assert parameter_count(found["chapter's baseline"], 200) == 60_929
