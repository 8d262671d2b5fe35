from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from networks import block, dense, network, sequences

from tuner.network.model import build_model, keras, logit_model, tf
from tuner.spec.architecture import (
    UNKNOWN_TOKEN,
    BlockConfig,
    layers_of,
    misfits,
    padded_length,
    parameter_count,
)

# The chapter's baseline: design.md section 4 and the chapter's own listing.
CHAPTER = network(
    block(kernel_size=5, filters=16, padding="valid", pool_size=4),
    block(kernel_size=3, filters=16, padding="valid", pool_size=2),
    block(kernel_size=3, filters=16, padding="valid", pool_size=2),
    embedding_dim=16,
    masking=False,
    head="flatten",
    dense=(dense(256), dense(64)),
    batch_size=16,
)


def with_random_weights(model: keras.Model) -> keras.Model:
    """All weights random, biases and moments too, so that what leaks from padding is seen.

    The first filters are negative everywhere, so that a 0 among them is seen too.
    """
    rng = np.random.default_rng(0)
    for weight in model.weights:
        values = rng.uniform(-1.0, 1.0, weight.shape)
        if weight.path.endswith("bias"):
            values += np.linspace(-4.0, 1.0, len(values))
        weight.assign(abs(values) if weight.path.endswith("variance") else values)
    return model


def logits(model: keras.Model, tokens: np.ndarray) -> np.ndarray:
    return logit_model(model)(tokens, training=False).numpy()[:, 0]


# Blocks of all kinds; two stacked ones of each padding leave remainders on 21 positions.
ALL_KINDS = [
    (
        block(
            padding=padding,
            pooling=pooling,
            normalization=normalization,
            residual=residual,
            activation=activation,
            kernel_size=5,
            pool_size=2,
        ),
        block(
            padding=padding,
            pooling=pooling,
            normalization=normalization,
            residual=residual,
            activation=activation,
            kernel_size=4,
            pool_size=3,
        ),
    )
    for padding, pooling, normalization, residual, activation in [
        ("same", "max", "none", "none", "tanh"),
        ("same", "average", "batch", "identity", "gelu"),
        ("same", "max", "layer", "projected", "relu"),
        ("valid", "max", "batch", "projected", "swish"),
        ("valid", "average", "layer", "none", "relu"),
        ("valid", "average", "none", "identity", "tanh"),
    ]
]


@pytest.mark.parametrize("arrangement", ["stacked", "parallel"])
@pytest.mark.parametrize("blocks", ALL_KINDS)
def test_with_a_global_head_the_output_does_not_change_with_max_length(
    blocks: tuple[BlockConfig, ...], arrangement: str
) -> None:
    config = network(*blocks, arrangement=arrangement)
    lengths = [21, 20, 17, 8, 1]  # the first fills the shortest max_length
    short = with_random_weights(build_model(config, 21))
    expected = logits(short, sequences(lengths, 21))
    assert len(set(expected)) == len(lengths)  # the network has something to say
    for max_length in (22, 23, 40):
        longer = build_model(config, max_length)
        longer.set_weights(short.get_weights())
        np.testing.assert_allclose(
            logits(longer, sequences(lengths, max_length)), expected, rtol=2e-5
        )


@pytest.mark.parametrize("arrangement", ["stacked", "parallel"])
@pytest.mark.parametrize("blocks", ALL_KINDS)
def test_with_a_flatten_head_the_embedding_of_padding_does_not_matter(
    blocks: tuple[BlockConfig, ...], arrangement: str
) -> None:
    config = network(*blocks, arrangement=arrangement, head="flatten")
    model = with_random_weights(build_model(config, 24))
    tokens = sequences([24, 20, 13, 1, 0], 24)
    expected = logits(model, tokens)
    assert len(set(expected)) == len(tokens)
    embedding = model.get_layer("embedding").embeddings
    for garbage in (1e6, np.nan):
        embedding.assign(np.vstack([np.full((1, 4), garbage), embedding.numpy()[1:]]))
        np.testing.assert_array_equal(logits(model, tokens), expected)


@pytest.mark.parametrize("head", ["flatten", "global_both"])
@pytest.mark.parametrize("blocks", ALL_KINDS[1:4])
def test_a_sequence_without_residues_gives_a_number_in_training_too(
    blocks: tuple[BlockConfig, ...], head: str
) -> None:
    config = network(*blocks, head=head, activity_l2=0.1, dense=())
    model = build_model(config, 24)
    empty = np.zeros((2, 24), np.uint8)
    for training in (False, True):
        output = model(empty, training=training).numpy()
        # Nothing is left but the output's bias, which starts at 0; flatten sees zeros.
        np.testing.assert_array_equal(output, [[0.5], [0.5]])
        assert all(np.isfinite(float(loss)) for loss in model.losses)


def test_max_pooling_leaves_padding_out_even_where_all_values_are_negative() -> None:
    config = network(block(activation="tanh", pool_size=2), head="flatten", dense=())
    model = build_model(config, 4)
    pooled = keras.Model(model.input, model.get_layer("logit").input)
    model.get_layer("block1_conv").bias.assign([-2.0] * 4)  # every activation is near -1
    values = pooled(np.array([[1, 0, 0, 0]], np.uint8)).numpy().reshape(2, 4)
    assert (values[0] < -0.9).all()  # not max(-1, padding's 0)
    np.testing.assert_array_equal(values[1], 0)  # an empty window


def test_average_pooling_divides_by_the_residues_in_its_window() -> None:
    config = network(
        block(activation="tanh", pooling="average", pool_size=3), head="flatten", dense=()
    )
    model = build_model(config, 6)
    pooled = keras.Model(model.input, model.get_layer("logit").input)
    model.get_layer("block1_conv").bias.assign([-9.0] * 4)  # every activation is -1
    values = pooled(np.array([[1, 2, 0, 0, 0, 0]], np.uint8)).numpy().reshape(2, 4)
    np.testing.assert_allclose(values, [[-1.0] * 4, [0.0] * 4], rtol=1e-6)


def test_batch_normalisation_takes_its_moments_over_residues_only() -> None:
    config = network(block(normalization="batch", pool_size=1, kernel_size=1))
    moments = []
    for max_length in (6, 30):
        model = build_model(config, max_length)
        model(sequences([6, 3], max_length), training=True)
        norm = model.get_layer("block1_norm")
        moments.append(np.concatenate([norm.moving_mean, norm.moving_variance]))
    np.testing.assert_allclose(moments[0], moments[1], rtol=1e-5)


# Unknown residues.


@pytest.mark.parametrize("blocks", ALL_KINDS)
@pytest.mark.parametrize("head", ["flatten", "global_both"])
def test_masking_changes_nothing_where_no_residue_is_unknown(
    blocks: tuple[BlockConfig, ...], head: str
) -> None:
    config = network(*blocks, head=head)
    plain, masking = (
        with_random_weights(build_model(config, 24, unknown=unknown)) for unknown in (False, True)
    )
    assert [one.path for one in masking.weights] == [one.path for one in plain.weights]
    tokens = sequences([24, 20, 13, 1, 0], 24)
    np.testing.assert_allclose(logits(masking, tokens), logits(plain, tokens), rtol=1e-6)


@pytest.mark.parametrize("masking", [True, False])
@pytest.mark.parametrize("normalization", ["none", "batch", "layer"])
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_an_unknown_residue_takes_no_part(pooling: str, normalization: str, masking: bool) -> None:
    """Where no kernel sees neighbours, it is as if it were not there; but it keeps its place."""
    point = block(kernel_size=1, pool_size=1, pooling=pooling, normalization=normalization)
    config = network(point, masking=masking, activity_l2=0.1)
    known = sequences([9, 9], 9)
    among = np.full((2, 14), UNKNOWN_TOKEN, np.uint8)
    among[:, [1, 2, 4, 5, 6, 9, 10, 11, 13]] = known  # the first is unknown
    without, model = (
        with_random_weights(build_model(config, width, unknown=width > 9)) for width in (9, 14)
    )
    np.testing.assert_allclose(logits(model, among), logits(without, known), rtol=1e-5)
    for tokens, each in ((known, without), (among, model)):
        each(tokens, training=True)
    if normalization == "batch":
        for which in ("moving_mean", "moving_variance"):
            moments = [getattr(each.get_layer("block1_norm"), which) for each in (without, model)]
            np.testing.assert_allclose(*moments, rtol=1e-5)
    wide = network(block(kernel_size=3, pool_size=1), masking=masking)
    model = with_random_weights(build_model(wide, 14, unknown=True))
    apart = np.array([[1, 2] + [0] * 12, [1, 21, 2] + [0] * 11], np.uint8)
    assert abs(np.diff(logits(model, apart))) > 1e-3


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_a_window_is_real_if_any_of_its_residues_is_known(pooling: str) -> None:
    config = network(
        block(activation="tanh", pooling=pooling, pool_size=2, kernel_size=1),
        head="flatten",
        dense=(),
    )
    model = build_model(config, 8, unknown=True)
    pooled = keras.Model(model.input, model.get_layer("logit").input)
    model.get_layer("block1_conv").bias.assign([-9.0] * 4)  # every activation is -1
    tokens = np.array([[21, 2, 21, 21, 3, 21, 4, 0]], np.uint8)
    values = pooled(tokens).numpy().reshape(4, 4)
    np.testing.assert_allclose(values[:, 0], [-1.0, 0.0, -1.0, -1.0], rtol=1e-6)


@pytest.mark.parametrize("blocks", ALL_KINDS)
def test_the_embedding_of_no_token_reaches_an_unknown_residue(
    blocks: tuple[BlockConfig, ...],
) -> None:
    model = with_random_weights(build_model(network(*blocks), 24, unknown=True))
    tokens = sequences([24, 20, 13], 24)
    tokens[tokens == 20] = 1
    tokens[:, 3:6] = UNKNOWN_TOKEN
    expected = logits(model, tokens)
    embedding = model.get_layer("embedding").embeddings
    garbage = embedding.numpy()
    garbage[[0, 20]] = np.nan
    embedding.assign(garbage)
    np.testing.assert_array_equal(logits(model, tokens), expected)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_dilated_kernel_is_one_with_zeros_between_its_weights(padding: str, fast: bool) -> None:
    dilated = network(
        block(kernel_size=3, conv_dilation=4, padding=padding, normalization="batch"),
        block(kernel_size=2, conv_dilation=2, padding=padding),
        embedding_dim=16,
    )
    model = with_random_weights(build_model(dilated, 30, fast=fast))
    spans = [one.span for one in dilated.blocks]
    assert spans == [9, 3]
    wide = network(
        *(
            dataclasses.replace(one, kernel_size=one.span, conv_dilation=1)
            for one in dilated.blocks
        ),
        embedding_dim=16,
    )
    same = build_model(wide, 30)
    wider = {weight.path: weight for weight in same.weights}
    for weight in model.weights:
        values, its = weight.numpy(), wider[weight.path]
        if weight.path in ("block1_conv/kernel", "block2_conv/kernel"):
            values = np.zeros(its.shape)
            values[:: dilated.blocks[int(weight.path[5]) - 1].conv_dilation] = weight.numpy()
        its.assign(values)
    tokens = sequences([30, 17, 1], 30)
    np.testing.assert_allclose(logits(model, tokens), logits(same, tokens), rtol=1e-5)
    assert parameter_count(dilated, 30) == model.count_params()
    assert padded_length(dilated, 30) == padded_length(wide, 30)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_dilated_network_trains(precision: Any) -> None:
    config = network(block(kernel_size=3, conv_dilation=4), block(), embedding_dim=16)
    model = logit_model(build_model(config, 30, precision=precision, fast=True))
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(model(sequences([30, 17], 30), training=True))
    for gradient in tape.gradient(total, model.trainable_variables):
        assert np.isfinite(tf.convert_to_tensor(gradient).numpy()).all()


def test_a_dilated_kernel_has_to_fit() -> None:
    config = network(block(kernel_size=3, conv_dilation=4), masking=False)
    assert not misfits(config, 9)
    (misfit,) = misfits(config, 8)
    assert (misfit.key, misfit.span, misfit.positions) == ("kernel_size", 9, 8)


def test_without_masking_padding_counts() -> None:
    config = network(masking=False)
    short, long = (build_model(config, length) for length in (12, 24))
    outputs = [logits(short, sequences([6], 12)), logits(long, sequences([6], 24))]
    assert outputs[0] != outputs[1]


def test_the_chapters_baseline_is_the_keras_network_that_it_lists() -> None:
    layers = keras.layers
    chapter = keras.Sequential(
        [
            layers.Input((200,)),
            layers.Embedding(21, 16),
            layers.Conv1D(16, 5, activation="relu"),
            layers.MaxPooling1D(4),
            layers.Conv1D(16, 3, activation="relu"),
            layers.MaxPooling1D(2),
            layers.Conv1D(16, 3, activation="relu"),
            layers.MaxPooling1D(2),
            layers.Flatten(),
            layers.Dense(256, activation="relu"),
            layers.Dense(64, activation="relu"),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    model = build_model(CHAPTER, 200)
    assert model.count_params() == 60_929
    chapter.set_weights(model.get_weights())
    tokens = sequences([200, 120, 30], 200)
    np.testing.assert_allclose(model(tokens), chapter(tokens.astype("int32")), rtol=1e-5)


def test_parameter_counts_by_arithmetic_are_those_of_keras() -> None:
    rng = np.random.default_rng(7)
    choose = rng.choice
    checked = 0
    while checked < 25:
        blocks = tuple(
            block(
                kernel_size=int(choose([1, 2, 3, 5])),
                conv_dilation=int(choose([1, 1, 2, 3])),
                filters=int(choose([1, 4, 6])),
                padding=str(choose(["same", "valid"])),
                normalization=str(choose(["none", "batch", "layer"])),
                residual=str(choose(["none", "identity", "projected"])),
                pooling=str(choose(["max", "average"])),
                pool_size=int(choose([1, 2, 3])),
            )
            for _ in range(choose([1, 2, 3]))
        )
        config = network(
            *blocks,
            embedding_dim=int(choose([4, 6])),
            masking=bool(choose([True, False])),
            arrangement=str(choose(["stacked", "parallel"])),
            head=str(choose(["flatten", "global_max", "global_average", "global_both"])),
            dense=tuple(dense(int(choose([3, 8]))) for _ in range(choose([0, 1, 2]))),
        )
        if misfits(config, 32):
            continue
        model = build_model(config, 32)
        assert model.count_params() == parameter_count(config, 32), config
        # Layer by layer, too: names, shapes and weights.
        *layers, logit = layers_of(config, 32)
        assert sum(one.parameters for one in (*layers, logit)) == parameter_count(config, 32)
        for one in (*layers, logit):
            if one.name == "head":  # several operations in Keras; the next dense layer sees it
                after = layers[layers.index(one) + 1 :] or [logit]
                assert model.get_layer(after[0].name).input.shape[1:] == one.output, config
                continue
            layer = model.get_layer(one.name)
            # Where padding is left out, average pooling also pools the mask.
            shapes = [node.outputs[0].shape[1:] for node in layer._inbound_nodes]
            assert one.output in shapes, config
            assert layer.count_params() == one.parameters, config
        told = {one.name for one in (*layers, logit)}
        assert {layer.name for layer in model.layers if layer.count_params()} <= told
        checked += 1


def test_a_block_is_convolution_normalisation_activation_residual_pooling_dropout() -> None:
    config = network(block(normalization="layer", residual="projected", conv_dropout=0.5))
    names = [operation.name for operation in build_model(config, 12).operations]
    order = ["conv", "norm", "activation", "residual", "pool", "dropout"]
    found = [names.index(f"block1_{station}") for station in order]
    assert found == sorted(found)


def test_an_identity_residual_adds_the_blocks_input_cropped_at_the_end() -> None:
    def activations(filters: int, residual: str) -> np.ndarray:
        config = network(
            block(padding="valid", pool_size=1, filters=filters, residual=residual),
            head="flatten",
            dense=(),
            masking=False,
        )
        model = build_model(config, 8)
        features = keras.Model(model.input, model.get_layer("logit").input)
        return features(sequences([8], 8)).numpy().reshape(6, filters)

    embedded = build_model(network(), 8).get_layer("embedding")(sequences([8], 8)).numpy()[0]
    np.testing.assert_allclose(
        activations(4, "identity") - activations(4, "none"), embedded[:6], atol=1e-6
    )
    np.testing.assert_array_equal(activations(5, "identity"), activations(5, "none"))


def test_penalties_are_those_that_the_configuration_names() -> None:
    config = network(
        block(residual="projected", conv_l1=0.1, conv_l2=0.2),
        dense=(dense(5, dense_l1=0.3, dense_l2=0.4),),
        bias_l2=0.5,
        activity_l2=0.6,
    )
    model = with_random_weights(build_model(config, 8))
    tokens = sequences([8, 3], 8)
    model(tokens)

    def penalty(l1: float, l2: float, *weights: Any) -> float:
        return sum(l1 * np.abs(w).sum() + l2 * np.square(w).sum() for w in map(np.asarray, weights))

    conv, hidden = model.get_layer("block1_conv"), model.get_layer("dense1")
    projection = model.get_layer("block1_projection")
    convolved = np.maximum(conv(model.get_layer("embedding")(tokens) * (tokens > 0)[..., None]), 0)
    convolved *= (tokens > 0)[..., None]  # padding is not penalised
    activated = np.maximum(keras.Model(model.input, hidden.output)(tokens), 0)
    expected = (
        penalty(0.1, 0.2, conv.kernel, projection.kernel)
        + penalty(0.3, 0.4, hidden.kernel)
        + penalty(0.0, 0.5, conv.bias, hidden.bias)
        + penalty(0.0, 0.6, convolved, activated) / len(tokens)
    )
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


def test_dropout_stands_before_every_dense_layer_and_where_else_the_configuration_has_it() -> None:
    config = network(
        block(conv_dropout=0.1),
        embedding_dropout=0.2,
        dense=(dense(5, dense_dropout=0.3), dense(6, dense_dropout=0.4)),
        output_dropout=0.5,
    )
    model = build_model(config, 8)
    dropouts = [layer for layer in model.layers if isinstance(layer, keras.layers.Dropout)]
    assert [layer.rate for layer in dropouts] == [0.2, 0.1, 0.3, 0.4, 0.5]
    inputs = [model.get_layer(name).input for name in ("dense1", "dense2", "logit")]
    assert [x is layer.output for x, layer in zip(inputs, dropouts[2:], strict=True)] == [True] * 3


def test_initial_weights_follow_from_the_seed_and_layers_differ() -> None:
    config = network(block(), block())
    first, again, other = (build_model(config, 8, seed=seed).get_weights() for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    kernels = [n for n, weight in enumerate(first) if weight.ndim > 1]
    assert all((first[n] != other[n]).any() for n in kernels)
    assert (first[kernels[1]] != first[kernels[2]]).any()  # both [3, 4, 4]


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32() -> None:
    config = network(*ALL_KINDS[1], activity_l2=0.1)
    tokens = sequences([20, 5], 24)
    half, single = (build_model(config, 24, precision=p) for p in ("bfloat16", "float32"))
    assert half.get_layer("block2_conv").compute_dtype == "bfloat16"
    assert half.get_layer("block2_conv").kernel.dtype == "float32"
    assert half.output.dtype == "float32"
    assert keras.config.dtype_policy().name == "float32"
    np.testing.assert_allclose(half(tokens), single(tokens), atol=0.01)


# Keras 3.15 with NumPy 2.4, while it saves.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_saved_model_loads_without_our_code(tmp_path: Path) -> None:
    config = network(
        *ALL_KINDS[1], *ALL_KINDS[3], arrangement="parallel", activity_l2=0.1, output_dropout=0.1
    )
    model = build_model(config, 24)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    tokens = sequences([24, 10], 24)
    np.testing.assert_array_equal(loaded(tokens), model(tokens))
