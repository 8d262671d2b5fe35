"""Networks of the fast layers compute what those of Keras' layers do, gradients included."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from networks import block, dense, network, sequences

from tuner.network.model import build_model, keras, logit_model, tf
from tuner.spec.architecture import UNKNOWN_TOKEN, ModelConfig

LENGTH = 40
#: Between them: every layer that is replaced, each way to pool and to pad, with what may disturb.
NETWORKS = {
    "tokens, pooled before a relu": network(
        block(kernel_size=5, pool_size=4),
        block(padding="valid", pool_size=3, activation="tanh"),
        embedding_dim=16,
    ),
    "even widths, dilated": network(
        block(kernel_size=4, conv_dilation=3),
        block(kernel_size=2, padding="valid"),
        embedding_dim=16,
    ),
    "not masked": network(
        block(kernel_size=5, pool_size=3, normalization="batch"), masking=False, embedding_dim=16
    ),
    "batch normalisation": network(
        block(normalization="batch", activation="gelu"),
        block(normalization="batch", pool_size=1),
        embedding_dim=16,
    ),
    "layer normalisation, swish, flat": network(
        block(normalization="layer", activation="swish"), head="flatten", embedding_dim=16
    ),
    "residuals and penalties": network(
        block(residual="projected", conv_l1=0.01, conv_l2=0.02),
        block(residual="identity", pooling="average"),
        embedding_dim=16,
        bias_l2=0.1,
        activity_l2=0.1,
    ),
    "side by side": network(
        block(kernel_size=3),
        block(kernel_size=7, normalization="batch"),
        arrangement="parallel",
        embedding_dim=16,
    ),
    "a small embedding": network(block(kernel_size=5), dense=(dense(3),)),
}


def calculated(
    config: ModelConfig, *, fast: bool, precision: Any = "float32", unknown: bool = False
) -> dict[str, Any]:
    """Logits of training and of inference, gradients and updated moments; by name."""
    model = build_model(config, LENGTH, seed=3, precision=precision, fast=fast, unknown=unknown)
    logits = logit_model(model)
    rng = np.random.default_rng(1)
    for weight in sorted(model.weights, key=lambda weight: weight.path):
        weight.assign(weight.numpy() + rng.normal(0, 0.1, weight.shape))
        if "variance" in weight.path:
            weight.assign(np.abs(weight.numpy()) + 0.5)
    tokens = sequences([40, 23, 7, 1, 31], LENGTH)
    if unknown:
        tokens[0, ::3] = tokens[1, 2:20] = tokens[4, :2] = UNKNOWN_TOKEN
    labels = tf.constant([0.0, 1.0, 1.0, 0.0, 1.0])
    found = {"inference": logits(tokens, training=False).numpy()}
    weights = {weight.path: weight.value for weight in logits.trainable_variables}
    with tf.GradientTape() as tape:
        trained = logits(tokens, training=True)
        losses = tf.nn.sigmoid_cross_entropy_with_logits(labels, trained[:, 0])
        objective = tf.add_n([tf.reduce_mean(losses), *logits.losses])
    gradients = tape.gradient(objective, weights)
    found |= {"training": trained.numpy(), "objective": objective.numpy()}
    found |= {f"d {path}": tf.convert_to_tensor(d).numpy() for path, d in gradients.items()}
    return found | {weight.path: weight.numpy() for weight in model.weights}


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS.keys())
def test_a_fast_network_trains_and_infers_as_keras_does(config: ModelConfig) -> None:
    kerass, fast = (calculated(config, fast=fast) for fast in (False, True))
    assert kerass.keys() == fast.keys()
    for name, expected in kerass.items():
        # A bias in front of a normalisation has no gradient but noise.
        np.testing.assert_allclose(fast[name], expected, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    "name", ["not masked", "batch normalisation", "residuals and penalties", "a small embedding"]
)
def test_a_fast_network_masks_unknown_residues_as_keras_does(name: str) -> None:
    kerass, fast = (calculated(NETWORKS[name], fast=fast, unknown=True) for fast in (False, True))
    for key, expected in kerass.items():
        np.testing.assert_allclose(fast[key], expected, rtol=1e-4, atol=2e-6, err_msg=key)


def test_a_fast_network_in_bfloat16_is_as_near_as_keras() -> None:
    config = dataclasses.replace(NETWORKS["batch normalisation"], masking=True)
    exact = calculated(config, fast=False)
    kerass, fast = (calculated(config, fast=f, precision="bfloat16") for f in (False, True))
    for name in ("training", "inference", "d embedding/embeddings", "d block2_conv/kernel"):
        error = np.abs(fast[name] - exact[name]).max()
        assert error <= 2 * np.abs(kerass[name] - exact[name]).max() + 1e-3, name


def test_the_fast_layers_take_the_place_of_keras_own() -> None:
    config = network(block(normalization="batch"), block(), embedding_dim=16)
    kinds = {
        layer.name: type(layer).__module__
        for layer in build_model(config, LENGTH, fast=True).layers
    }
    for name in ("block1_conv", "block1_norm"):
        assert kinds[name] == "tuner.network.fast_layers"
    plain = build_model(config, LENGTH)
    assert all(type(layer).__module__.startswith("keras") for layer in plain.layers)
    assert isinstance(plain, keras.Model)
