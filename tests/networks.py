"""Small networks, written shortly."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tuner.spec.architecture import (
    BlockConfig,
    DenseConfig,
    ModelConfig,
)


def block(**changes: Any) -> BlockConfig:
    plain = BlockConfig(
        kernel_size=3,
        filters=4,
        padding="same",
        normalization="none",
        activation="relu",
        residual="none",
        pooling="max",
        pool_size=2,
        conv_dropout=0.0,
        conv_l1=0.0,
        conv_l2=0.0,
    )
    return dataclasses.replace(plain, **changes)


def dense(units: int, **changes: Any) -> DenseConfig:
    plain = DenseConfig(
        units=units, activation="relu", dense_dropout=0.0, dense_l1=0.0, dense_l2=0.0
    )
    return dataclasses.replace(plain, **changes)


def network(*blocks: BlockConfig, **changes: Any) -> ModelConfig:
    plain = ModelConfig(
        embedding_dim=4,
        embedding_dropout=0.0,
        masking=True,
        arrangement="stacked",
        blocks=blocks or (block(),),
        head="global_both",
        dense=(dense(5, activation="tanh"),),
        output_dropout=0.0,
        bias_l2=0.0,
        activity_l2=0.0,
        optimizer="adam",
        learning_rate=1e-3,
        batch_size=4,
    )
    return dataclasses.replace(plain, **changes)


def sequences(lengths: list[int], max_length: int) -> np.ndarray:
    """Random tokens, uint8 [n, max_length], padded at the end; a row's residues do not depend on
    `max_length`."""
    tokens = np.zeros((len(lengths), max_length), np.uint8)
    for row, length in enumerate(lengths):
        tokens[row, :length] = np.random.default_rng(row).integers(1, 21, length)
    return tokens
