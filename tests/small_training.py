"""A training of a small network on random rows, and its curve."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from networks import block, dense, network

from tuner.data.development import DevelopmentData
from tuner.network.training import TensorData, TrainingRun
from tuner.spec.architecture import ModelConfig
from tuner.spec.spec import TrainingSettings
from tuner.train import EpochResult, TrainingJob

MAX_LENGTH = 24


ROWS, VALIDATION_ROWS = 70, 30  # 70 rows leave a last batch of 6 at batch size 16


CONFIG = network(
    block(filters=6, normalization="batch", conv_dropout=0.2, conv_l2=1e-3),
    embedding_dropout=0.1,
    head="global_max",
    dense=(dense(8, activation="swish", dense_dropout=0.1),),
    output_dropout=0.3,
    learning_rate=0.02,
    batch_size=16,
)


# Neither dropout nor batch normalisation: what is trained does not depend on their random numbers.
PLAIN = dataclasses.replace(
    CONFIG,
    embedding_dropout=0.0,
    blocks=(dataclasses.replace(CONFIG.blocks[0], normalization="none", conv_dropout=0.0),),
    dense=(dataclasses.replace(CONFIG.dense[0], dense_dropout=0.0),),
    output_dropout=0.0,
)


def development_data() -> DevelopmentData:
    """Random sequences; soluble are those with more lysine than leucine."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(1, 21, (ROWS + VALIDATION_ROWS, MAX_LENGTH)).astype(np.uint8)
    lengths = rng.integers(6, MAX_LENGTH + 1, len(tokens))
    tokens[np.arange(MAX_LENGTH) >= lengths[:, None]] = 0
    labels = ((tokens == 12).sum(1) > (tokens == 11).sum(1)).astype(np.uint8)
    return DevelopmentData(
        training_tokens=tokens[:ROWS],
        training_labels=labels[:ROWS],
        validation_tokens=tokens[ROWS:],
        validation_labels=labels[ROWS:],
    )


DATA = development_data()


def training_run(
    tensors: TensorData,
    config: ModelConfig = CONFIG,
    *,
    max_epochs: int = 4,
    patience: int | None = None,
    max_trial_seconds: float = 600.0,
    checkpoint: bytes | None = None,
    **changes: Any,
) -> TrainingRun:
    settings = TrainingSettings(
        max_epochs=max_epochs, patience=patience, max_trial_seconds=max_trial_seconds
    )
    job = TrainingJob(
        config=config, trial=7, seed=3, precision="float32", rungs=(), settings=settings
    )
    return TrainingRun(tensors, dataclasses.replace(job, **changes), checkpoint=checkpoint)


def curve(results: list[EpochResult]) -> list[EpochResult]:
    """The results without their times, which no two runs share."""
    return [dataclasses.replace(result, seconds=0.0) for result in results]
