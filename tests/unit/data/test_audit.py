"""The audit: every near-twin, every shortcut, and no label of the test split."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tuner.cli.main import app
from tuner.data.audit import features, kmers, packages
from tuner.data.audit import report as audit_report
from tuner.data.audit.census import census
from tuner.data.audit.report import audit, short_audit
from tuner.data.audit.shortcuts import fit_shortcuts
from tuner.data.audit.twins import near_twins, nearest_in_training
from tuner.data.development import DevelopmentData
from tuner.data.prepare import AuditRows, prepare, read_for_audit
from tuner.data.rows import RESIDUES, Tokens, encode
from tuner.errors import SetupError
from tuner.spec.spec import DataSettings, SplitSettings

TAG = "MGSSHHHHHHSSGLVPRGSH"
WIDTH = 100


def random_sequences(count: int, *, seed: int = 0, tag: str = "") -> list[str]:
    draw = np.random.default_rng(seed)
    letters = np.array(list(RESIDUES))
    lengths = draw.integers(30, WIDTH - len(tag), count)
    return [tag + "".join(draw.choice(letters, length)) for length in lengths]


def families(count: int, *, seed: int = 0) -> list[str]:
    """Sequences of which many have a tag, and relatives that differ at 0 to 12 places."""
    draw = np.random.default_rng(seed)
    founders = random_sequences(count, seed=seed)
    founders += random_sequences(count, seed=seed + 1, tag=TAG)
    found = list(founders)
    for founder in founders:
        relative = list(founder)
        for place in draw.choice(len(founder), draw.integers(0, 13), replace=False):
            relative[place] = "W"
        found.append("".join(relative))
    return [*found, "AAAA", "AAAAAAAAAA", "AAAAAAA"]


def similarity(one: str, other: str) -> float:
    first, second = ({each[i : i + 5] for i in range(len(each) - 4)} for each in (one, other))
    return len(first & second) / max(len(first | second), 1)


def development(
    training: list[str], training_labels: list[int], validation: list[str], labels: list[int]
) -> DevelopmentData:
    return DevelopmentData(
        training_tokens=encode(training, WIDTH, "mask"),
        training_labels=np.array(training_labels, dtype=np.uint8),
        validation_tokens=encode(validation, WIDTH, "mask"),
        validation_labels=np.array(labels, dtype=np.uint8),
    )


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    """300 sequences whose first residue is M where they are soluble, and a twin of each tenth."""
    sequences = random_sequences(300)
    rows = [
        (("M" if number % 2 else "K") + one, number % 2) for number, one in enumerate(sequences)
    ]
    rows += [(f"{one}W", label) for one, label in rows[::10]]
    rows += rows[:3]
    lines = ["sequence,label", *(f"{sequence},{label}" for sequence, label in rows)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\ntrials = 3\n[data]\nsource = "rows.csv"\n[space]\nblocks = 1\n')
    return path


# --- near-twins ---


@pytest.mark.parametrize("frequent", [1_000, 10])  # the second leaves the tag out of the product
@pytest.mark.parametrize("at_once", [10_000_000, 1_000])  # the second in many blocks
def test_every_similar_pair_is_found_as_by_comparing_all(
    frequent: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmers, "_FREQUENT", frequent)
    monkeypatch.setattr(kmers, "_PRODUCTS_AT_ONCE", at_once)
    monkeypatch.setattr(features, "_CELLS_AT_ONCE", at_once)
    sequences = families(40)
    found = {}
    blocks = 0
    for pairs in kmers.similar_pairs(kmers.kmer_sets(encode(sequences, WIDTH))):
        blocks += 1
        for first, second, value in zip(
            pairs.first.tolist(), pairs.second.tolist(), pairs.similarity.tolist(), strict=True
        ):
            assert (first, second) not in found
            found[first, second] = value
    expected = {
        (first, second): value
        for first, one in enumerate(sequences)
        for second, other in enumerate(sequences)
        if first != second and (value := similarity(one, other)) >= kmers.LEAST
    }
    assert found == pytest.approx(expected)
    assert len(expected) > 80
    assert blocks == 1 or at_once == 1_000


def test_near_twins_are_counted_by_split_and_labels_by_development_rows() -> None:
    a, b, c, d, e = random_sequences(5)
    data = development([a, f"{a}W", b, c], [1, 0, 1, 1], [f"{b}W", d], [1, 0])
    found = near_twins(data, encode([f"{c}W", e], WIDTH))
    assert (found.development_pairs, found.across_splits) == (2, 2)
    assert found.opposite_labels == 0.5
    assert found.twin_in_training == (0.5, 0.5, 0.5)
    assert found.is_exact
    bands = found.to_document()["bands"]
    near = [band["pairs"] for band in bands if band["from"] >= 0.7]
    assert sum(pairs["training"] for pairs in near) == 1
    assert sum(pairs["training and validation"] for pairs in near) == 1
    assert sum(pairs["training and test"] for pairs in near) == 1


def test_of_thousands_of_relatives_a_sample_is_compared() -> None:
    draw = np.random.default_rng(0)
    (founder,) = random_sequences(1)
    variants = [
        founder[:place] + "W" + founder[place + 1 :]
        for place in draw.integers(10, len(founder) - 10, 600)
    ]
    data = development(variants[:400], [0, 1] * 200, variants[400:500], [0, 1] * 50)
    exact = near_twins(data, encode(variants[500:], WIDTH))
    sampled = near_twins(data, encode(variants[500:], WIDTH), most_products=3_000_000)
    assert exact.is_exact
    assert 50 < sampled.compared < 300
    assert sampled.development_pairs == pytest.approx(exact.development_pairs, rel=0.15)
    assert sampled.opposite_labels == pytest.approx(exact.opposite_labels, abs=0.05)
    assert sampled.across_splits == pytest.approx(exact.across_splits, rel=0.15)


def test_a_row_is_as_near_as_its_nearest_training_row() -> None:
    training, others = families(10), families(10, seed=5)[:5] + families(10)[3:6]
    found = nearest_in_training(encode(training, WIDTH), encode(others, WIDTH))
    expected = [max(similarity(one, other) for other in training) for one in others]
    assert found == pytest.approx([value if value >= kmers.LEAST else 0 for value in expected])


# --- the test split ---


def test_what_the_audit_reads_has_no_label_of_a_test_row(study_file: Path) -> None:
    settings = DataSettings(source="rows.csv", split=SplitSettings(seed=1))
    identity, rows = read_for_audit(settings, folder=study_file.parent)
    assert {field.name for field in dataclasses.fields(AuditRows)} == {
        *("development", "test_tokens", "left_out"),
    }
    labels = [
        len(getattr(rows.development, field.name))
        for field in dataclasses.fields(rows.development)
        if "labels" in field.name
    ]
    assert labels == [identity.training_rows, identity.validation_rows]
    assert len(rows.test_tokens) == identity.test_rows
    assert rows.left_out == 3


# --- shortcuts ---


def test_a_planted_shortcut_is_found_by_the_models_that_see_it() -> None:
    sequences = [
        ("M" if number % 2 else "K") + one for number, one in enumerate(random_sequences(600))
    ]
    tokens, labels = encode(sequences, WIDTH), np.arange(600, dtype=np.uint8) % 2
    fitted = {one.name: one for one in fit_shortcuts(tokens[:400], labels[:400])}
    right = {
        name: float(((one.predict(tokens[400:]) > 0) == labels[400:]).mean())
        for name, one in fitted.items()
    }
    assert list(right) == [
        *("majority class", "first residue", "both ends", "composition", "length"),
        *("linear model", "gradient boosting"),
    ]
    for name, accuracy in right.items():
        knows = name in ("first residue", "both ends", "linear model", "gradient boosting")
        assert accuracy > 0.9 if knows else accuracy < 0.75, name


def test_heavy_rows_pull_every_model() -> None:
    tokens, others = (
        encode(random_sequences(40), WIDTH),
        encode(random_sequences(40, seed=1), WIDTH),
    )
    labels = np.arange(40, dtype=np.uint8) % 2
    weights = np.where(labels == 1, 9.0, 1.0).astype(np.float32)
    plain, heavy = fit_shortcuts(tokens, labels), fit_shortcuts(tokens, labels, weights)
    for one, pulled in zip(plain, heavy, strict=True):
        assert pulled.predict(others).mean() > one.predict(others).mean() + 0.5, one.name


# --- the splits ---


@pytest.mark.parametrize(
    ("sequence", "simple", "runs", "unknown"),
    [
        ("MKTAYIAKQRQISFVKSHFSRQ", 0.0, {}, 0),
        ("MKTAYIAKQRAAAAAAGAAAAAAGAAA", 1.0, {"A": 1}, 0),
        ("MKTAYIAKQRGAGAGAGAGAGAGAGAG", 1.0, {}, 0),
        ("MKTAYIAKXRQISFVKSHFSRQ", 0.0, {}, 1),
        ("MAAAAAAAAA", 0.0, {"A": 1}, 0),  # too short for a window
        ("MAAAAA", 0.0, {}, 0),  # five in a row
    ],
)
def test_low_complexity_runs_and_unknown_residues_are_counted(
    sequence: str, simple: float, runs: dict[str, int], unknown: int
) -> None:
    found = census(encode([sequence], WIDTH, "mask"), None)
    assert (found.low_complexity, found.runs, found.unknown_residues) == (simple, runs, unknown)
    assert (found.soluble, found.starts_with_m) == (None, 1.0)
    assert found.length["median"] == len(sequence)
    assert sum(found.frequencies.values()) == pytest.approx(1)


# --- what is missing ---


@pytest.mark.parametrize(
    ("use", "names"),
    [
        (kmers.kmer_sets, "SciPy"),
        (lambda tokens: fit_shortcuts(tokens, np.zeros(1, np.uint8)), "scikit-learn"),
    ],
)
def test_without_the_extra_the_error_names_the_command_that_installs_it(
    use: Callable[[Tokens], object], names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(
        SetupError, match=rf"needs {names}.* `pip install 'protein-tuner\[audit\]'`"
    ):
        use(encode(["MKTAYIAK"], WIDTH))


# --- the verbs ---


def test_the_verb_prints_the_contract_and_writes_a_page(study_file: Path) -> None:
    page = study_file.parent / "audit.html"
    words = ["data", "audit", str(study_file), "--json", "--html", str(page)]
    done = CliRunner().invoke(app, [*words, "--artifacts", str(study_file.parent / "artifacts")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found["near_twins"]) >= {"development_pairs", "opposite_labels", "across_splits"}
    assert found["near_twins"]["opposite_labels"] == 0.0
    assert all(set(one) >= {"name", "accuracy", "loss"} for one in found["shortcuts"])
    assert found["splits"]["test"]["soluble"] is None
    assert found["repeated_rows_left_out"] == 3
    text = page.read_text(encoding="utf-8")
    assert "mine: audit of the data" in text
    assert "://" not in text.replace("default-src", "")


def test_a_page_that_cannot_be_written_is_told_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\ntrials = 3\n[data]\nsource = "none.csv"\n[space]\nblocks = 1\n')
    done = CliRunner().invoke(app, ["data", "audit", str(path), "--html", str(tmp_path)])
    assert "cannot be written" in str(done.exception)


def test_check_counts_near_twins_once(study_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, artifacts = study_file.parent, study_file.parent / "artifacts"
    words = ["check", str(study_file), "--artifacts", str(artifacts), "--json"]
    words += ["--storage", f"sqlite:///{folder}/none.db"]
    first = json.loads(CliRunner().invoke(app, words).stdout)["near_twins"]
    counted = near_twins
    monkeypatch.setattr(audit_report, "near_twins", None)  # is not called again
    assert json.loads(CliRunner().invoke(app, words).stdout)["near_twins"] == first
    monkeypatch.setattr(audit_report, "near_twins", counted)
    settings = DataSettings(source="rows.csv")
    whole = audit(settings, folder=folder)
    assert first["development_pairs"] == whole.twins.development_pairs > 20
    other = settings.model_copy(update={"split": SplitSettings(seed=1)})
    identity = prepare(other, folder=folder, artifacts=artifacts).identity
    again = short_audit(other, identity, folder=folder, artifacts=artifacts)
    assert again.to_document() != first


def test_check_goes_on_where_near_twins_cannot_be_counted(
    study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = importlib.util.find_spec("no_such_module")
    monkeypatch.setattr(packages, "find_spec", lambda name: missing)
    artifacts = study_file.parent / "artifacts"
    words = ["check", str(study_file), "--artifacts", str(artifacts), "--json"]
    done = CliRunner().invoke(app, [*words, "--storage", "sqlite:///none.db"])
    assert json.loads(done.stdout)["near_twins"] is None
    assert "pip install 'protein-tuner[audit]'" in done.stderr
