"""Logits from a configuration and its trained weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tuner.network.keras_setup import memory_errors
from tuner.network.model import build_model, load_weights, logit_model, unpack_weights
from tuner.spec.architecture import UNKNOWN_TOKEN, ModelConfig

BATCH = 512  # sequences


def logits(
    config: ModelConfig, weights: bytes, tokens: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float64]:
    """The logit of the probability of being soluble, float64 [n]; computed in float32.

    Args:
        config: The network.
        weights: What `TrainingRun.best_weights` returned.
        tokens: uint8 [n, max_length]; with a flatten head, the length that it was trained with.
            Unknown residues in them are masked.

    Raises:
        ValueError: The weights are of another network.
        MemoryError: There is no room to compute them.
    """
    with memory_errors():
        unknown = bool((tokens == UNKNOWN_TOKEN).any())
        model = build_model(config, tokens.shape[1], unknown=unknown)
        load_weights(model, unpack_weights(weights))
        network = logit_model(model)
        batches = [tokens[start : start + BATCH] for start in range(0, len(tokens), BATCH)]
        predicted = [network(batch, training=False).numpy()[:, 0] for batch in batches]
    return np.concatenate([np.empty(0), *predicted])
