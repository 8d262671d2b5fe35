"""In which precision a trial is computed: float32, or bfloat16 where that is faster.

`precision = "auto"` is decided once a study, before its first trial, by what its workers can, and
stored; which of its networks gain is then a rule over the configuration. Processors that multiply
bfloat16 in hardware do a convolution in half the time, but pass over values one by one no faster
than in float32: so it pays where many multiply-adds come on one value.

Why: `docs/decisions.md#when-is-a-network-computed-in-bfloat16`.
"""

from __future__ import annotations

from math import prod
from typing import Literal, TypeAlias

from tuner.spec.architecture import ModelConfig, layers_of

Precision: TypeAlias = Literal["float32", "bfloat16"]

#: Multiply-adds a value from which bfloat16 pays (`benchmarks/precision.py`).
BFLOAT16_FROM = 64.0


def multiply_adds(config: ModelConfig, max_length: int) -> int:
    """Multiply-adds of convolutions and dense layers that a sequence's output takes.

    Args:
        config: A configuration without `misfits`.
        max_length: Tokens in a row.
    """
    return sum(
        prod(layer.output[:-1]) * layer.parameters
        for layer in layers_of(config, max_length)
        if not layer.name.endswith(("embedding", "_norm"))  # these multiply no matrices
    )


def multiply_adds_a_value(config: ModelConfig, max_length: int) -> float:
    """The same for each value that passes between layers."""
    values = sum(prod(layer.output) for layer in layers_of(config, max_length))
    return multiply_adds(config, max_length) / values


def precision_by_size(
    config: ModelConfig, max_length: int, bfloat16_from: float | None
) -> Precision:
    """The rule: bfloat16 from so many multiply-adds a value; None for never."""
    if bfloat16_from is None or multiply_adds_a_value(config, max_length) < bfloat16_from:
        return "float32"
    return "bfloat16"
