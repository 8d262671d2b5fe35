"""Whatever a user keeps for other work with Keras, the same network is trained, or none."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import ROOT
from small_training import CONFIG, DATA, curve, training_run

from tuner.cluster.training_task import open_training_run
from tuner.errors import SetupError
from tuner.network.keras_setup import keras, set_keras, tf
from tuner.network.model import build_model
from tuner.network.predict import logits
from tuner.network.training import TensorData, TrainingRun
from tuner.train import EpochResult

# Flattened, pooled, normalised: what each layer takes for its channels matters.
FLAT = dataclasses.replace(CONFIG, head="flatten")

CHANNELS_FIRST = {"image_data_format": "channels_first"}
OTHER_KERAS = CHANNELS_FIRST | {"floatx": "float16", "epsilon": 0.1, "backend": "jax"}


@pytest.fixture(scope="module")
def tensors() -> TensorData:
    return TensorData(DATA)


@pytest.fixture(scope="module")
def undisturbed(tensors: TensorData) -> TrainingRun:
    run = training_run(tensors, FLAT, max_epochs=1)
    list(run.epochs())
    return run


SCRIPT = """
import dataclasses, json
from tuner.network.training import TensorData, configure_tensorflow
import small_training as here
config = dataclasses.replace(here.CONFIG, head="flatten")
if {threads}: configure_tensorflow({threads})
run = here.training_run(TensorData(here.DATA), config, max_epochs=1)
print(json.dumps([dataclasses.asdict(result) for result in run.epochs()]))
"""


def trained_elsewhere(folder: Path, environment: dict[str, str]) -> list[EpochResult]:
    """The curve of FLAT in a process of its own, with that environment."""
    threads = tf.config.threading.get_intra_op_parallelism_threads()
    paths = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(threads=threads)],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"HOME": str(folder), "PYTHONPATH": paths} | environment,
    )
    assert done.returncode == 0, done.stderr
    return [EpochResult(**result) for result in json.loads(done.stdout)]


def write_keras_json(folder: Path, document: Any) -> None:
    folder.mkdir()
    (folder / "keras.json").write_text(json.dumps(document))


VARIABLES = {
    "KERAS_BACKEND": "jax",
    "KERAS_MAX_EPOCHS": "none",
    "TF_FUNCTION_JIT_COMPILE_DEFAULT": "1",
    "TF_USE_LEGACY_KERAS": "1",
}


def test_a_users_keras_json_and_variables_change_nothing(
    tmp_path: Path, undisturbed: TrainingRun
) -> None:
    write_keras_json(tmp_path / ".keras", OTHER_KERAS)
    assert curve(trained_elsewhere(tmp_path, VARIABLES)) == curve(undisturbed.history)


def test_a_keras_home_that_keras_cannot_read_changes_nothing_and_none_is_written(
    tmp_path: Path, undisturbed: TrainingRun
) -> None:
    write_keras_json(tmp_path / "home", [1])
    environment = {"KERAS_HOME": str(tmp_path / "home")}
    assert curve(trained_elsewhere(tmp_path, environment)) == curve(undisturbed.history)
    assert not (tmp_path / ".keras").exists()


def test_a_keras_that_was_imported_and_set_before_changes_nothing(
    tmp_path: Path, undisturbed: TrainingRun
) -> None:
    write_keras_json(tmp_path / ".keras", CHANNELS_FIRST)
    (tmp_path / "sitecustomize.py").write_text(
        "import keras\n"
        "keras.config.set_dtype_policy('mixed_float16')\n"
        "keras.config.set_floatx('float16')\n"
    )
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3"}
    assert curve(trained_elsewhere(tmp_path, environment)) == curve(undisturbed.history)


SETTINGS: dict[str, Callable[[], None]] = {
    "image_data_format": lambda: keras.config.set_image_data_format("channels_first"),
    "floatx": lambda: keras.config.set_floatx("float64"),
    "epsilon": lambda: keras.config.set_epsilon(0.1),
    "dtype policy": lambda: keras.config.set_dtype_policy("mixed_float16"),
    "eager functions": lambda: tf.config.run_functions_eagerly(True),
    "compiled functions": lambda: tf.config.optimizer.set_jit(True),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_set_after_the_import_changes_nothing(
    tensors: TensorData, undisturbed: TrainingRun, setting: str
) -> None:
    try:
        SETTINGS[setting]()
        run = training_run(tensors, FLAT, max_epochs=1)
        SETTINGS[setting]()  # as the next cell of a notebook might, before the first epoch
        assert curve(list(run.epochs())) == curve(undisturbed.history)
        SETTINGS[setting]()
        weights = run.best_weights()
        predicted = logits(FLAT, weights, DATA.validation_tokens)
    finally:
        set_keras()
    assert (predicted == logits(FLAT, weights, DATA.validation_tokens)).all()


def test_another_backend_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(SetupError, match=r"computes with 'jax'.*KERAS_BACKEND=tensorflow"):
        build_model(FLAT, 24)


def test_a_tensorflow_of_graphs_only_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf, "executing_eagerly", lambda: False)
    with pytest.raises(SetupError, match="does not run eagerly"):
        build_model(FLAT, 24)


BROKEN = {
    "missing": ("sys.modules['keras'] = None", r"ModuleNotFoundError: .*\). Install the extra cpu"),
    "damaged": (
        "sys.path.insert(0, '.'); open('keras.py', 'w').write('raise OSError(5, \"I/O\")')",
        r"OSError: .*I/O.*Uninstall them. Install the extra cpu",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_an_import_that_fails_is_one_clear_message(tmp_path: Path, how: str) -> None:
    spoil, message = BROKEN[how]
    code = (
        f"import sys; {spoil}\nfrom tuner.errors import SetupError\n"
        "try:\n    import tuner.network.predict\nexcept SetupError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stderr == ""
    assert re.search(message, done.stdout), done.stdout


def test_a_worker_with_half_an_installation_cannot_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("tuner.network.fold_runs.open_run")
    with pytest.raises(SetupError, match=r"open_run.*install the extra cpu, `pip"):
        open_training_run(None)  # type: ignore[arg-type]
