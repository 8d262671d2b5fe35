"""Bundles: written whole, verified when read, and the same network for whoever loads it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np
import onnxruntime
import pytest
from finished_study import storage_in, study_with_networks
from networks import block, network, sequences

from tuner import load_bundle
from tuner.data.rows import RESIDUES, encode
from tuner.data.synthetic import synthetic_sequences
from tuner.errors import BundleError, SetupError, StudyError, TunerError
from tuner.metrics import measure
from tuner.network import combined
from tuner.network.model import build_model
from tuner.network.predict import logits
from tuner.results import bundle_writer
from tuner.results.bundle import SUMS_FILE, Bundle, read_bundle
from tuner.results.bundle_writer import bundle_of_study, write_bundle
from tuner.results.choice import Chosen, choose_best, choose_ensemble, choose_trial
from tuner.results.ensemble import CrossFitted, Selection, probability
from tuner.results.export import config_of_trial
from tuner.results.kept import read_development, read_kept_weights
from tuner.search.tuned_study import TunedStudy
from tuner.spec.architecture import ModelConfig
from tuner.spec.reader import load_spec
from tuner.storage.storage import Storage

SEQUENCES = ["MKV" * 9, "ACDEFGHIKLMNPQRSTVWY" * 10, "W", "mkvlaag" * 20]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    with storage_in(tmp_path_factory.mktemp("storage")) as opened:
        yield opened


@pytest.fixture(scope="module")
def tuned(storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> TunedStudy:
    return study_with_networks(storage, tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def single(tuned: TunedStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tuned, tmp_path_factory.mktemp("single") / "bundle")


SHARES = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def ensemble(tuned: TunedStudy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble") / "bundle"
    singles = [choose_trial(tuned, number) for number in (2, 0, 1)]
    logits_of_each = np.stack([one.networks[0].logits for one in singles])
    mean = np.array(SHARES) @ (1 / (1 + np.exp(-logits_of_each)))
    labels = singles[0].development.validation_labels
    metrics = measure(labels, np.log(mean / (1 - mean)))
    crossed = CrossFitted(
        ensemble_loss=0.6, single_loss=0.625, gain=0.025, gain_sd=0.01, halvings=20
    )
    chosen = Chosen(
        study=tuned,
        networks=tuple(one.networks[0] for one in singles),
        shares=SHARES,
        validation=metrics,
        selection=Selection(counts=(3, 2, 5), selected_loss=metrics.loss, cross_fitted=crossed),
        development=singles[0].development,
    )
    configs = [config_of_trial(tuned, one.trial.number) for one in chosen.networks]
    write_bundle(tuned, chosen, configs, folder)
    return folder


def written(tuned: TunedStudy, output: Path) -> Path:
    number = tuned.ranked()[0].number
    write_bundle(tuned, choose_trial(tuned, number), [config_of_trial(tuned, number)], output)
    return output


def expected(tuned: TunedStudy, number: int) -> np.ndarray:
    """The probabilities of SEQUENCES by a trial's network, computed without a bundle."""
    config = config_of_trial(tuned, number).config
    found = logits(config, read_kept_weights(tuned, number), encode(SEQUENCES, 200))
    return 1 / (1 + np.exp(-found))


# --- what is in it ---


def test_it_predicts_what_its_network_does(tuned: TunedStudy, single: Path) -> None:
    wanted = expected(tuned, tuned.ranked()[0].number)
    assert load_bundle(single).predict(SEQUENCES) == pytest.approx(wanted, abs=1e-6)


def test_a_study_predicts_by_what_its_bundle_would_hold(tuned: TunedStudy) -> None:
    chosen = choose_best(tuned)
    assert len(chosen.networks) > 1
    each = np.stack([expected(tuned, number) for number in chosen.trials])
    found = bundle_of_study(tuned).predict(SEQUENCES)
    assert found == pytest.approx(np.array(chosen.shares) @ each, abs=1e-6)


def test_an_ensemble_predicts_the_weighted_mean_and_its_spread(
    tuned: TunedStudy, ensemble: Path
) -> None:
    bundle = load_bundle(ensemble)
    shares = np.array([member.share for member in bundle.members])
    each = np.stack([expected(tuned, member.trial) for member in bundle.members])
    assert tuple(shares) == SHARES
    mean, spread = bundle.predict_tokens(encode(SEQUENCES, 200))
    assert mean == pytest.approx(shares @ each, abs=1e-6)
    assert spread == pytest.approx(np.sqrt(shares @ (each - mean) ** 2), abs=1e-6)


@pytest.mark.parametrize("which", ["single", "ensemble"])
def test_plain_keras_loads_its_network(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    # No custom object is known to Keras: the module of ours that has some is not registered there.
    model = keras.saving.load_model(folder / "model.keras", custom_objects={}, safe_mode=True)
    assert model.input.dtype == "uint8"
    found = model.predict(encode(SEQUENCES, 200), verbose=0)
    assert found.shape == (4, 1)
    assert found[:, 0] == pytest.approx(load_bundle(folder).predict(SEQUENCES), abs=1e-6)
    assert "tuner" not in json.dumps(json.loads(model.to_json()))


def test_the_lines_of_its_card_work(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (single / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) == 6
    printed: list[float] = []
    monkeypatch.chdir(single)
    exec(code, {"print": printed.append})
    description = json.loads((single / "bundle.json").read_text())
    shown = description["probe"]["sequences"][0][:40]
    assert printed == [pytest.approx(load_bundle(single).predict([shown])[0], abs=1e-6)]


def test_what_it_says_of_itself(tuned: TunedStudy, single: Path) -> None:
    description = json.loads((single / "bundle.json").read_text())
    best = tuned.ranked()[0]
    assert description["format"] == 2
    assert (description["study"], description["trials"]) == ("nets", [best.number])
    assert (description["alphabet"], description["max_length"]) == (RESIDUES, 200)
    development = read_development(tuned)
    lengths = np.count_nonzero(development.training_tokens, axis=1)
    assert description["min_length"] == lengths.min()
    assert description["validation"]["loss"] == pytest.approx(best.value, abs=1e-6)
    assert description["validation"]["cross_fitted"] is None
    assert description["test"] is None
    assert description["ledger"] is None
    assert description["data"]["split_id"] == tuned.record.data.split_id
    assert description["networks"][0]["train_again"] == f"tuner launch trial-{best.number}.toml"


def test_what_an_ensemble_says_of_its_gain(ensemble: Path) -> None:
    validation = json.loads((ensemble / "bundle.json").read_text())["validation"]
    assert validation["cross_fitted"]["loss"] == 0.6
    assert validation["selected_loss"] == pytest.approx(validation["loss"], abs=1e-6)
    card = (ensemble / "README.md").read_text()
    assert "trial 2 (50 %), trial 0 (30 %), trial 1 (20 %)." in card
    assert "have a loss of 0.6000 on the other half" in card


def test_the_kept_networks_that_predict_best_together_are_chosen(tuned: TunedStudy) -> None:
    chosen = choose_ensemble(tuned, 10)
    assert chosen.selection is not None
    assert chosen.validation.loss == pytest.approx(chosen.selection.selected_loss, abs=1e-6)
    assert chosen.validation.loss <= tuned.ranked()[0].value + 1e-6
    assert sum(chosen.shares) == pytest.approx(1)


def test_its_study_files_train_its_networks_again(tuned: TunedStudy, ensemble: Path) -> None:
    bundle = load_bundle(ensemble)
    for member in bundle.members:
        spec = load_spec(ensemble / member.study_file)
        assert spec.space.resolve({}) == config_of_trial(tuned, member.trial).config
        assert spec.training.as_trial == member.trial


def test_a_report_of_the_same_network_is_told(tuned: TunedStudy, tmp_path: Path) -> None:
    # As another study, so that the other tests know of no report.
    tuned = dataclasses.replace(tuned, record=dataclasses.replace(tuned.record, folder="reported"))
    best, other = (trial.number for trial in tuned.ranked()[:2])
    entry = tuned.storage.ledger.open(
        opened_at="2026-01-01T00:00:00+00:00",
        opened_by="lab@host",
        study=tuned.name,
        study_key=tuned.key,
        trial=best,
        config_hash="0" * 64,
        spec_hash="0" * 64,
        split_id=tuned.record.data.split_id,
    )
    chosen = choose_trial(tuned, best)
    test = chosen.validation.to_document()
    weights = hashlib.sha256(chosen.networks[0].weights).hexdigest()
    tuned.storage.ledger.record_report(entry, {"test": test, "weights_sha256": weights})
    described = json.loads((written(tuned, tmp_path / "b") / "bundle.json").read_text())
    assert described["test"] == test
    assert described["ledger"]["entry"] == entry
    assert "not opened" not in (tmp_path / "b" / "README.md").read_text()
    another = write_bundle(
        tuned, choose_trial(tuned, other), [config_of_trial(tuned, other)], tmp_path / "other"
    )
    assert another["test"] is None


# --- ONNX ---

ONNX_PROGRAM = """
import sys
import numpy, onnxruntime
tokens = numpy.load("tokens.npy")
session = onnxruntime.InferenceSession("model.onnx")
numpy.save("found.npy", session.run(None, {"tokens": tokens})[0])
assert not {"tensorflow", "keras", "tuner"} & sys.modules.keys()
"""


@pytest.mark.parametrize(
    "config",
    [
        network(block(activation="gelu", normalization="batch"), head="global_both"),
        network(
            block(activation="swish", padding="valid", normalization="layer"),
            block(filters=6, residual="projected", pooling="average"),
            arrangement="stacked",
        ),
        network(block(), block(kernel_size=5), arrangement="parallel", masking=False),
        network(block(activation="tanh"), head="flatten", dense=()),
    ],
)
def test_onnx_predicts_the_same_without_tensorflow(config: ModelConfig, tmp_path: Path) -> None:
    model = build_model(config, 60, seed=3)
    tokens = sequences([1 + row % 60 for row in range(1_000)], 60)
    (tmp_path / "model.onnx").write_bytes(combined.onnx_bytes(model))
    np.save(tmp_path / "tokens.npy", tokens)
    subprocess.run([sys.executable, "-c", ONNX_PROGRAM], cwd=tmp_path, check=True, timeout=170)
    wanted = combined.predicted(model, tokens)
    assert wanted.std() > 1e-4
    assert np.load(tmp_path / "found.npy")[:, 0] == pytest.approx(wanted, abs=1e-5)


def test_a_bundle_may_hold_onnx(tuned: TunedStudy, tmp_path: Path) -> None:
    number = tuned.ranked()[0].number
    configs = [config_of_trial(tuned, number)]
    write_bundle(tuned, choose_trial(tuned, number), configs, tmp_path / "bundle", onnx=True)
    assert "model.onnx" in (tmp_path / "bundle" / SUMS_FILE).read_text()
    session = onnxruntime.InferenceSession(tmp_path / "bundle" / "model.onnx")
    (found,) = session.run(None, {"tokens": encode(SEQUENCES, 200)})
    assert found[:, 0] == pytest.approx(expected(tuned, number), abs=1e-5)


def test_a_network_that_masks_unknown_residues_does_so_wherever_it_is_loaded(
    storage: Storage, tmp_path: Path
) -> None:
    sequences_with_x = [f"{one[:9]}X{one[9:99]}" for one in synthetic_sequences()[0][:400]]
    rows = zip(sequences_with_x, synthetic_sequences()[1], strict=False)
    lines = ["sequence,label", *(f"{one},{label}" for one, label in rows)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    data = {"source": "rows.csv", "unknown": "mask", "truncate": "start", "split": {"seed": 1}}
    tuned = study_with_networks(storage, tmp_path, name="masked", data=data)
    number = tuned.ranked()[0].number
    folder = tmp_path / "bundle"
    configs = [config_of_trial(tuned, number)]
    write_bundle(tuned, choose_trial(tuned, number), configs, folder, onnx=True)
    description = json.loads((folder / "bundle.json").read_text())
    assert (description["alphabet"], description["unknown"]) == (f"{RESIDUES}X", "mask")
    assert "X" in description["probe"]["sequences"][0]
    bundle = load_bundle(folder)
    assert (bundle.unknown, bundle.truncate) == ("mask", "start")
    given = ["MKVLXAAG", "MKVLBAAGxx", "XMKVLAAG", "MKVLAAG", "W" + "X" * 99 + "W"]
    tokens = encode(given, 200, "mask")
    wanted = logits(configs[0].config, read_kept_weights(tuned, number), tokens)
    wanted = 1 / (1 + np.exp(-wanted))
    assert wanted[0] == pytest.approx(wanted[1])  # nothing known is behind its unknown end
    assert len(set(wanted.round(7))) == len(given) - 1
    assert bundle.predict(given) == pytest.approx(wanted, abs=1e-6)
    model = keras.saving.load_model(folder / "model.keras", custom_objects={}, safe_mode=True)
    assert model.predict(tokens, verbose=0)[:, 0] == pytest.approx(wanted, abs=1e-6)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (found,) = session.run(None, {"tokens": tokens})
    assert found[:, 0] == pytest.approx(wanted, abs=1e-5)


def test_a_bundle_of_format_1_is_read(single: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(single, folder)
    description = json.loads((folder / "bundle.json").read_text()) | {"format": 1}
    for key in ("unknown", "truncate", "sequence_column"):
        del description[key]
    resum(folder, "bundle.json", json.dumps(description).encode())
    bundle = load_bundle(folder)
    assert (bundle.unknown, bundle.truncate, bundle.sequence_column) == ("error", None, "sequence")
    assert bundle.predict(SEQUENCES) == pytest.approx(load_bundle(single).predict(SEQUENCES))


def test_without_the_extra_onnx_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(SetupError, match=r"pip install 'protein-tuner\[onnx\]'"):
        combined.onnx_bytes(build_model(network(), 20))


# --- sequences ---


def test_rows_of_like_length_are_the_same_up_to_rounding(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    tokens = np.zeros((300, 200), np.uint8)
    for row in tokens:
        length = int(generator.integers(1, 201))
        row[:length] = generator.integers(1, 21, length)
    whole, _ = load_bundle(single).predict_tokens(tokens)
    monkeypatch.setattr(combined, "LEAST_ROWS_OF_A_WIDTH", 1)
    bundle = load_bundle(single)
    cut, _ = bundle.predict_tokens(tokens)
    assert cut == pytest.approx(whole, abs=2e-6)
    assert sorted(bundle._predictor._graphs) == [50, 100, 150, 200]


def test_no_rows_have_no_predictions(single: Path, ensemble: Path) -> None:
    for folder in (single, ensemble):
        assert load_bundle(folder).predict([]).shape == (0,)


@pytest.mark.parametrize("sequence", ["", "M" * 201, "MKX", "MK*"])
def test_a_sequence_that_cannot_be_predicted_is_refused(single: Path, sequence: str) -> None:
    with pytest.raises(ValueError, match=r"empty|fit into|is not one of"):
        load_bundle(single).predict(["MKV", sequence])


# --- whole or not at all ---


def test_checksums_are_those_that_sha256sum_reads(single: Path) -> None:
    lines = (single / SUMS_FILE).read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    names = {path.name for path in single.iterdir()} - {SUMS_FILE}
    assert sums.keys() == names
    for name, digest in sums.items():
        assert hashlib.sha256((single / name).read_bytes()).hexdigest() == digest


def test_a_zip_file_has_the_same(tuned: TunedStudy, single: Path, tmp_path: Path) -> None:
    path = written(tuned, tmp_path / "new" / "bundle.ZIP")
    with zipfile.ZipFile(path) as archive:
        assert set(archive.namelist()) == {one.name for one in single.iterdir()}
    assert load_bundle(path).predict(SEQUENCES) == pytest.approx(
        load_bundle(single).predict(SEQUENCES)
    )


def test_an_earlier_bundle_is_replaced_as_a_whole(tuned: TunedStudy, tmp_path: Path) -> None:
    folder = written(tuned, tmp_path / "bundle")
    (folder / "model.onnx").write_bytes(b"of an earlier export")
    written(tuned, folder)
    assert not (folder / "model.onnx").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_of_other_files_is_never_replaced(tuned: TunedStudy, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(TunerError, match="is not empty and not a bundle"):
        written(tuned, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_write_that_fails_leaves_what_was_there(
    tuned: TunedStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tuned, tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    publish = bundle_writer.publish

    def full(path: Path, content: bytes) -> None:
        if path.name == "bundle.json":
            raise OSError(28, "No space left on device")
        publish(path, content)

    monkeypatch.setattr(bundle_writer, "publish", full)
    for output in (folder, tmp_path / "other"):
        with pytest.raises(TunerError, match=r"cannot be written \(No space left on device\)"):
            written(tuned, output)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


# --- what is not a bundle ---


def changed(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def later_format(folder: Path) -> None:
    description = json.loads((folder / "bundle.json").read_text()) | {"format": 99}
    resum(folder, "bundle.json", json.dumps(description).encode())


def other_network(folder: Path) -> None:
    """Weights of a network of other shapes, with a right checksum."""
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    other.save(folder / "model.keras")
    resum(folder, "model.keras", (folder / "model.keras").read_bytes())


def moved_weights(folder: Path) -> None:
    """The same shapes with other values, with a right checksum."""
    model = keras.saving.load_model(folder / "model.keras")
    model.layers[-2].bias.assign(model.layers[-2].bias + 1.0)
    model.save(folder / "model.keras")
    resum(folder, "model.keras", (folder / "model.keras").read_bytes())


def resum(folder: Path, name: str, content: bytes) -> None:
    old = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / name).write_bytes(content)
    lines = (folder / SUMS_FILE).read_text().splitlines()
    new = hashlib.sha256(content).hexdigest()
    lines = [f"{new}  {name}" if line.endswith(f"  {name}") else line for line in lines]
    (folder / SUMS_FILE).write_text("\n".join([*lines, ""]))
    assert old


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (changed("model.keras", b"half"), "model.keras was changed or damaged"),
        (changed("bundle.json", b"{}"), "bundle.json was changed or damaged"),
        (changed("README.md", b""), "README.md was changed or damaged"),
        (changed(SUMS_FILE, b"nonsense\n"), "has a line that is not a checksum"),
        (changed(SUMS_FILE, b""), "does not list bundle.json, model.keras"),
        (lambda folder: (folder / "model.keras").unlink(), "model.keras is missing"),
        (lambda folder: (folder / SUMS_FILE).unlink(), "is not a bundle"),
        (later_format, "format 99, and this version of tuner reads up to 2: upgrade"),
        (other_network, "does not have the weights of the networks"),
        (moved_weights, "does not predict what the bundle says of its own example sequences"),
    ],
)
def test_a_bundle_that_is_not_whole_is_refused(
    single: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(single, folder)
    spoil(folder)
    with pytest.raises(BundleError, match=message):
        read_bundle(folder)


def test_what_is_no_bundle_at_all_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("no zip file")
    for place in (tmp_path, tmp_path / "none", tmp_path / "text.zip"):
        with pytest.raises(BundleError, match=r"not a bundle|no such|be read as a bundle"):
            read_bundle(place)


def test_nothing_that_its_files_name_is_looked_up(single: Path, tmp_path: Path) -> None:
    """A network whose configuration names a function of Python's: it is read all the same."""
    folder = tmp_path / "copy"
    shutil.copytree(single, folder)
    spoiled = tmp_path / "spoiled.keras"
    with zipfile.ZipFile(folder / "model.keras") as old, zipfile.ZipFile(spoiled, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                content = b'{"module": "os", "class_name": "system", "config": "touch harm"}'
            new.writestr(name, content)
    resum(folder, "model.keras", spoiled.read_bytes())
    assert isinstance(read_bundle(folder), Bundle)


# --- what cannot be made one ---


def test_weights_that_were_not_kept_are_told_of(tuned: TunedStudy) -> None:
    path = tuned.artifacts.weights(2)
    content = path.read_bytes()
    try:
        path.unlink()
        with pytest.raises(StudyError, match="only those of the best trials are kept"):
            choose_trial(tuned, 2)
        path.write_bytes(content[:-40])
        with pytest.raises(StudyError, match="cannot be made from these weights"):
            choose_trial(tuned, 2)
        path.write_bytes(tuned.artifacts.weights(0).read_bytes())
        with pytest.raises(StudyError, match="recorded with"):
            choose_trial(tuned, 2)
    finally:
        path.write_bytes(content)
    with pytest.raises(StudyError, match="has no trial 9"):
        choose_trial(tuned, 9)


def test_logits_of_any_size_have_a_probability_without_a_warning() -> None:
    found = probability(np.array([-1e4, -800.0, 0.0, 800.0]))
    assert found.tolist() == [0.0, 0.0, 0.5, 1.0]


def test_a_study_without_kept_weights_has_no_ensemble(
    storage: Storage, tuned: TunedStudy, tmp_path: Path
) -> None:
    folder = tuned.artifacts.folder / "weights"
    moved = folder.rename(tmp_path / "weights")
    try:
        with pytest.raises(StudyError, match="nothing to combine"):
            choose_ensemble(tuned, 3)
    finally:
        moved.rename(folder)
