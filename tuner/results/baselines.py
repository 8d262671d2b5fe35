"""What a searched network has to beat: models without a network, and networks of the literature.

All are fitted on the training rows of the study before the test split is opened, and evaluated on
the test rows in the same opening as the winner. They choose nothing.

Why: `docs/decisions.md#why-are-baselines-fitted-by-the-report`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tuner.artifacts import publish
from tuner.cluster.connection import default_workers
from tuner.cluster.timing import in_workers
from tuner.data.audit.shortcuts import fit_shortcuts
from tuner.data.development import DevelopmentData, load_development
from tuner.errors import TrialEndedError, counted
from tuner.metrics import Floats, measure
from tuner.results.comparison import paired_difference
from tuner.results.export import config_hash
from tuner.results.kept import predict_logits
from tuner.search.development import study_development
from tuner.search.tuned_study import TunedStudy
from tuner.spec.architecture import (
    BlockConfig,
    DenseConfig,
    ModelConfig,
    misfits,
    parameter_count,
)
from tuner.spec.reader import load_spec
from tuner.spec.spec import TrainingSettings
from tuner.train import TrainingJob

LINEAR = "linear model"  #: the baseline whose defeat is the least that a search has to show
_VERSION = 2  #: of what is kept; another version trains again
_SEED = 0
_MOST_SECONDS = 900.0  # of a network's training: the epochs that were finished count

Tokens = npt.NDArray[np.uint8]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A predictor that was fitted on the training rows."""

    name: str
    meaning: str  #: what it is
    predict: Callable[[Tokens], Floats]  #: tokens [n, max_length] -> logits [n]
    parameters: int | None = None  #: of a network
    epochs: int | None = None  #: that a network was trained, those without gain included


@dataclass(frozen=True, slots=True, kw_only=True)
class _Network:
    name: str
    meaning: str
    config: ModelConfig
    settings: TrainingSettings


def fit_baselines(tuned: TunedStudy, *, say: Say = lambda _: None) -> tuple[Baseline, ...]:
    """Fits all baselines on the training rows of a study.

    Networks are trained in processes of their own, one thread each, and their weights are kept
    under the artifacts root: other studies of the same rows and a second call find them.

    Args:
        tuned: The study.
        say: Takes a line before and after what takes long.

    Raises:
        SetupError: scikit-learn, SciPy or TensorFlow is missing, or a network cannot be trained.
        StudyError: The rows of the study cannot be read.
    """
    path, sha256 = study_development(tuned), tuned.record.development_sha256
    development = fitting_rows(load_development(path))
    shortcuts = fit_shortcuts(
        development.training_tokens,
        development.training_labels,
        development.training_weights,
        say=say,
    )
    simple = [
        Baseline(name=one.name, meaning=one.meaning, predict=one.predict) for one in shortcuts
    ]
    max_length = tuned.record.data.max_length
    networks = [one for one in _networks() if not misfits(one.config, max_length)]
    root = tuned.artifacts.folder.parent / "baselines" / sha256
    weights = _trained(networks, path, sha256, root, say)
    trained = [
        Baseline(
            name=network.name,
            meaning=network.meaning,
            predict=_predict_with(network.config, kept.weights),
            parameters=parameter_count(network.config, max_length),
            epochs=kept.epochs,
        )
        for network, kept in zip(networks, weights, strict=True)
        if kept is not None
    ]
    return (*simple, *trained)


def fitting_rows(development: DevelopmentData) -> DevelopmentData:
    """The rows on which baselines are fitted and validated: with folds, validated on the first."""
    return development if development.folds is None else development.of_fold(0)


def _predict_with(config: ModelConfig, weights: bytes) -> Callable[[Tokens], Floats]:
    return lambda tokens: predict_logits(None, config, weights, tokens)


# --- networks of the literature ---


def _networks() -> tuple[_Network, ...]:
    chapter = "of White's chapter on standard layers, 10 epochs, the best by validation loss"
    found = [
        _Network(
            name=f"chapter's {name}",
            meaning=f"the network {words}{chapter}",
            config=_example(f"chapter-{name}.toml"),
            settings=TrainingSettings(
                max_epochs=10, patience=None, max_trial_seconds=_MOST_SECONDS
            ),
        )
        for name, words in (
            ("baseline", ""),
            ("dropout", "with dropout "),
            ("l2", "with L2 penalties "),
        )
    ]
    deepsol = _Network(
        name="DeepSol S1's network",
        meaning=(
            "14 convolutions of 2 to 15 residues side by side, a global maximum of each, one dense "
            "layer (S. Khurana et al., 2018, DOI 10.1093/bioinformatics/bty166), trained on this "
            "study's rows until 2 epochs brought no better validation loss, 8 at most; without "
            "DeepSol's dropout of whole embedding channels, with one output for its two"
        ),
        config=deepsol_config(),
        settings=TrainingSettings(max_epochs=8, patience=2, max_trial_seconds=_MOST_SECONDS),
    )
    return (*found, deepsol)


def _example(name: str) -> ModelConfig:
    """The one configuration of a shipped study file."""
    with resources.as_file(resources.files("tuner") / "examples" / name) as path:
        return load_spec(path).space.resolve({})


def deepsol_config() -> ModelConfig:
    """DeepSol S1's network, as far as the space has it."""

    def branch(width: int) -> BlockConfig:
        return BlockConfig(
            kernel_size=width,
            conv_dilation=1,
            filters=64 if width <= 8 else 128,
            padding="valid",
            normalization="none",
            activation="relu",
            residual="none",
            pooling="max",
            pool_size=1,
            conv_dropout=0.0,
            conv_l1=0.0,
            conv_l2=0.0,
        )

    hidden = DenseConfig(units=64, activation="relu", dense_dropout=0.0, dense_l1=0.0, dense_l2=0.0)
    return ModelConfig(
        embedding_dim=64,
        embedding_dropout=0.0,
        masking=False,
        arrangement="parallel",
        blocks=tuple(branch(width) for width in range(2, 16)),
        head="global_max",
        dense=(hidden,),
        output_dropout=0.2,
        bias_l2=0.0,
        activity_l2=0.0,
        optimizer="adam",
        learning_rate=1e-3,
        batch_size=64,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trained:
    weights: bytes  #: what `TrainingRun.best_weights` returned
    epochs: int


def _trained(
    networks: Sequence[_Network], path: Path, sha256: str, root: Path, say: Say
) -> list[_Trained | None]:
    """The weights of each network; None of one that finished no epoch."""
    files = {network.name: root / f"{_key(network)}.npz" for network in networks}
    found = {network.name: _kept(files[network.name]) for network in networks}
    missing = [network for network in networks if found[network.name] is None]
    if missing:
        say(
            f"Training {counted(len(missing), 'network')} of the literature on this study's "
            "training rows, which takes minutes, once for these rows (--no-baselines leaves "
            "all baselines out) ..."
        )
        with in_workers(min(len(missing), default_workers())) as submit:
            # The longest first.
            asked: dict[Future[Any], _Network] = {
                submit(_train, network.config, network.settings, path, sha256): network
                for network in reversed(missing)
            }
            for done in as_completed(asked):
                network, (content, epochs) = asked[done], done.result()
                say(f"Trained {network.name}: {counted(epochs, 'epoch')}.")
                if content is not None:
                    found[network.name] = _Trained(weights=content, epochs=epochs)
                    with contextlib.suppress(OSError):  # it is trained again next time
                        publish(files[network.name], _packed(content, epochs))
    return [found[network.name] for network in networks]


def _key(network: _Network) -> str:
    """Names what the weights of a network follow from, its rows aside."""
    known = [_VERSION, _SEED, config_hash(network.config), network.settings.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]


def _packed(weights: bytes, epochs: int) -> bytes:
    file = io.BytesIO()
    np.savez(file, weights=np.frombuffer(weights, np.uint8), epochs=epochs)
    return file.getvalue()


def _kept(file: Path) -> _Trained | None:
    """Weights that were kept; None where there are none. A damaged file counts as none."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            return _Trained(weights=arrays["weights"].tobytes(), epochs=int(arrays["epochs"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _train(
    config: ModelConfig, settings: TrainingSettings, path: Path, sha256: str
) -> tuple[bytes | None, int]:
    """Trains a network in this process: its best weights, None if no epoch was finished; epochs."""
    from tuner.network.training import (  # noqa: PLC0415 - TensorFlow, in a process of its own
        TensorData,
        TrainingRun,
        configure_tensorflow,
    )

    configure_tensorflow(threads=1)
    job = TrainingJob(
        config=config, trial=0, seed=_SEED, precision="float32", rungs=(), settings=settings
    )
    run = TrainingRun(TensorData(fitting_rows(load_development(path, sha256))), job)
    with contextlib.suppress(TrialEndedError):  # it diverged, or takes too long
        for _ in run.epochs():
            pass
    return (run.best_weights() if run.history else None), len(run.history)


# --- what they are worth ---


def baselines_document(
    baselines: Sequence[Baseline],
    development: DevelopmentData,
    tokens: Tokens,
    labels: Tokens,
    winner: Floats,
    ensemble: Floats | None,
) -> dict[str, Any]:
    """Each baseline on validation and test rows, and how much better the winner is.

    Args:
        baselines: What was fitted.
        development: The rows of the study.
        tokens: Of the test rows, [n, max_length].
        labels: Of the test rows, [n].
        winner: The winner's logits for them, [n].
        ensemble: The ensemble's, [n]; None if there is none.
    """
    development = fitting_rows(development)
    found: list[dict[str, Any]] = []
    for one in baselines:
        logits = one.predict(tokens)
        validation = measure(
            development.validation_labels, one.predict(development.validation_tokens)
        )
        found.append(
            {
                "name": one.name,
                "meaning": one.meaning,
                "parameters": one.parameters,
                "epochs": one.epochs,
                "validation": {"loss": validation.loss, "accuracy": validation.accuracy},
                "test": measure(labels, logits).to_document(),
                "winner_is_better_by": paired_difference(labels, winner, logits).to_document(),
                "ensemble_is_better_by": None
                if ensemble is None
                else paired_difference(labels, ensemble, logits).to_document(),
            }
        )
    linear = next((one for one in found if one["name"] == LINEAR), None)
    return {
        "models": found,
        "beats_linear": None if linear is None else _beats(linear["winner_is_better_by"]),
    }


def _beats(difference: dict[str, Any]) -> bool:
    """Whether both loss and accuracy are better by more than the interval."""
    return bool(difference["loss_ci95"][0] > 0 and difference["accuracy_ci95"][0] > 0)
