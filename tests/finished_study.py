"""A finished study made by hand: real rows, real split, weights and predictions out of a hat."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from fakes import ready_sqlite
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from tuner.data.development import DevelopmentData, load_development
from tuner.data.prepare import prepare
from tuner.data.synthetic import synthetic_sequences
from tuner.metrics import cross_entropy
from tuner.search import study
from tuner.search.attributes import CURVE_KEY, DETAIL_KEY, ENDED_KEY
from tuner.search.tuned_study import TunedStudy
from tuner.spec.architecture import ModelConfig
from tuner.spec.reader import spec_from_document
from tuner.storage.storage import Storage
from tuner.train import VALIDATION_LOGITS, weights_of_folds

SPACE = {"blocks": 2, "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}}
LEARNING_RATE = FloatDistribution(1e-4, 1e-1, log=True)
WINNER = 1


def predict(
    config: ModelConfig, weights: bytes, tokens: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float64]:
    """Stands in for the network: logits that are some function of the residues, with ties."""
    assert weights == b"weights of the winner"
    assert config.learning_rate == 0.01
    probabilities = 0.2 + 0.6 * ((tokens.sum(axis=1) % 7) / 6)
    return np.log(probabilities / (1 - probabilities))


def storage_in(folder: Path) -> Storage:
    return Storage(ready_sqlite(folder))


def write_rows(folder: Path, *, rows: int = 400) -> None:
    sequences, labels = synthetic_sequences()
    lines = [f"{sequence},{label}" for sequence, label in zip(sequences, labels, strict=True)]
    (folder / "rows.csv").write_text("\n".join(["sequence,label", *lines[:rows], ""]))


def _created(
    storage: Storage, folder: Path, document: dict[str, Any]
) -> tuple[TunedStudy, DevelopmentData]:
    """A new study over the rows of `write_rows`, and its training and validation rows."""
    if not (folder / "rows.csv").exists():
        write_rows(folder)
    common = {
        "data": {"source": "rows.csv", "split": {"seed": 1, "validation": 0.2, "test": 0.2}},
        "hyperband": {"min_epochs": 1, "eta": 3},
    }
    spec = spec_from_document(common | document, folder=folder)
    artifacts = folder / "artifacts"
    prepared = prepare(spec.data, folder=folder, artifacts=artifacts)
    tuned = study.create_or_resume(
        storage,
        spec,
        prepared.identity,
        development_sha256=prepared.development_sha256,
        artifacts_root=artifacts,
    )
    return tuned, load_development(prepared.development_file)


def finished_study(storage: Storage, folder: Path, **changes: Any) -> TunedStudy:
    """Five trials: 0 and 1 fully trained (1 wins), 2 pruned, 3 diverged, 4 failed."""
    document = {
        "name": "demo",
        "trials": 4,
        "training": {"max_epochs": 9},
        "space": SPACE,
    }
    tuned, development = _created(storage, folder, document | changes)
    config = tuned.record.spec.space.resolve({"learning_rate": 0.01})
    logits = predict(config, b"weights of the winner", development.validation_tokens)
    best = float(cross_entropy(development.validation_labels, logits).mean())
    tell(tuned, best + 0.05, 0.05, epochs=9)
    tell(tuned, best, 0.01, epochs=9)
    tell(tuned, best + 0.1, 0.002, epochs=1, state=TrialState.PRUNED)
    tell(tuned, math.inf, 0.1, epochs=0, state=TrialState.PRUNED)
    tell(tuned, best, 0.001, epochs=2, state=TrialState.FAIL)
    kept = tuned.artifacts.weights(WINNER)
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"weights of the winner")
    return tuned


def tell(
    tuned: TunedStudy,
    best: float,
    learning_rate: float,
    *,
    epochs: int,
    state: TrialState = TrialState.COMPLETE,
) -> None:
    """A trial whose loss falls to `best` at its last epoch but one, then rises."""
    losses = [best + abs(epochs - 1 - epoch) / 50 for epoch in range(1, epochs + 1)]
    curve = [
        [epoch, loss - 0.05, 0.6, loss, 0.6, 1.0] for epoch, loss in enumerate(losses, start=1)
    ]
    attributes = {CURVE_KEY: curve}
    if not epochs:
        attributes |= {ENDED_KEY: "diverged", DETAIL_KEY: "epoch 1"}
    trial = optuna.create_trial(
        state=state,
        value=best if state == TrialState.COMPLETE else None,
        params={"learning_rate": learning_rate},
        distributions={"learning_rate": LEARNING_RATE},
        intermediate_values=dict(enumerate(np.minimum.accumulate(losses).tolist(), start=1))
        if losses
        else {},
        user_attrs=attributes,
    )
    tuned.study.add_trial(trial)


def study_with_networks(storage: Storage, folder: Path, **changes: Any) -> TunedStudy:
    """A finished study of three small networks that exist: their weights are kept, and fit.

    They are not trained but drawn at random, so each has a validation loss of its own.
    """
    from tuner.network.model import build_model, named_weights
    from tuner.network.predict import logits

    document = {
        "name": "nets",
        "trials": 3,
        "training": {"max_epochs": 9, "precision": "float32"},
        "space": {
            "embedding_dim": 4,
            "filters": 4,
            "units": 4,
            "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
        },
    }
    tuned, development = _created(storage, folder, document | changes)
    labels, tokens = development.validation_labels, development.validation_tokens
    folds = development.folds
    fold_of = np.zeros(len(labels)) if folds is None else folds
    config = tuned.record.spec.space.resolve({"learning_rate": 0.01})
    for number in range(3):
        noise = np.random.default_rng(15 + number)  # the three predict better together
        networks: list[bytes] = []
        predicted, losses = np.zeros(len(labels)), []
        for fold in sorted(set(fold_of.tolist())):
            inside = fold_of == fold
            model = build_model(config, tokens.shape[1], seed=number)
            weights = named_weights(model).items()
            kept = {name: one + noise.normal(0, 0.5, one.shape) for name, one in weights}
            networks.append(_npz(kept))
            predicted[inside] = logits(config, networks[-1], tokens[inside])
            losses.append(cross_entropy(labels, predicted)[inside].mean())
        tell(tuned, float(np.mean(losses)), 0.01, epochs=9)
        recorded = predicted.astype(np.float32)
        content = _npz({**kept, VALIDATION_LOGITS: recorded})
        if folds is not None:
            content = weights_of_folds(networks, recorded)
        tuned.artifacts.weights(number).parent.mkdir(parents=True, exist_ok=True)
        tuned.artifacts.weights(number).write_bytes(content)
    return tuned


def _npz(arrays: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()
