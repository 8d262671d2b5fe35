"""Small networks, written shortly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from tuner.spec.architecture import KEYS, BlockConfig, DenseConfig, ModelConfig
from tuner.spec.space import BLOCK_KEYS, DENSE_KEYS, SearchSpace


def _default(keys: Iterable[str]) -> dict[str, Any]:
    return {key: KEYS[key].default for key in keys}


def block(**changes: Any) -> BlockConfig:
    return BlockConfig(**{**_default(BLOCK_KEYS), "kernel_size": 3, "filters": 4, **changes})


def dense(units: int, **changes: Any) -> DenseConfig:
    return DenseConfig(**{**_default(DENSE_KEYS), "dense_dropout": 0.0, "units": units, **changes})


def network(*blocks: BlockConfig, **changes: Any) -> ModelConfig:
    plain = SearchSpace.of({"embedding_dim": 4, "head": "global_both", "batch_size": 4}).resolve({})
    small: dict[str, Any] = {
        "blocks": blocks or (block(),),
        "dense": (dense(5, activation="tanh"),),
        "output_dropout": 0.0,
    }
    return dataclasses.replace(plain, **{**small, **changes})


def sequences(lengths: list[int], max_length: int) -> np.ndarray:
    """Random tokens, uint8 [n, max_length], padded at the end; a row's residues do not depend on
    `max_length`."""
    tokens = np.zeros((len(lengths), max_length), np.uint8)
    for row, length in enumerate(lengths):
        tokens[row, :length] = np.random.default_rng(row).integers(1, 21, length)
    return tokens
