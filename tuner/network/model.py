"""The network: `ModelConfig` -> `keras.Model`.

    tokens -> embedding -> dropout -> blocks -> head -> (dropout -> dense)* -> dropout -> logit

A block is convolution, normalisation, activation, residual sum, pooling, dropout. Blocks stand
one after another ("stacked"), or side by side, each with its own head ("parallel").

**Masking.** Token 0 pads a sequence at its end. With `masking`, what is computed at padding is
zeroed after the embedding and in every block, pooling and heads leave it out, and so do the
moments of batch normalisation and the activity penalty. A position is real if the first residue
of its window is ("same" padding: the centre). Keras' own masks are not used: Conv1D drops them.

An unknown residue that is masked is not padding, as what follows it is real; but its position is
left out just so, also in a network that does not mask padding.

The model is made of built-in layers and `keras.ops` alone, so a saved model loads without `tuner`.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tuner.network import fast_layers
from tuner.network.keras_setup import keras, layers, ops, set_keras, tf
from tuner.spec.architecture import (
    TOKENS,
    UNKNOWN_TOKEN,
    Activation,
    BlockConfig,
    DenseConfig,
    Head,
    ModelConfig,
    padded_length,
)
from tuner.spec.precision import Precision
from tuner.train import VALIDATION_LOGITS

__all__ = [
    "build_model",
    "keras",
    "load_weights",
    "logit_model",
    "named_weights",
    "set_keras",
    "tf",
    "unpack_weights",
]

#: Keras' own default, 0.99, still holds a third of its initial value after the 115 steps that one
#: epoch of 14,763 sequences has at batch size 128; Hyperband would prune for that.
BATCH_NORMALIZATION_MOMENTUM = 0.9

#: An embedding of fewer channels is faster convolved as it is (`benchmarks/layers.py`).
LEAST_TOKEN_CONVOLUTION = 16

#: Not infinity, as ONNX chooses by a product with 0 or 1, and 0 times infinity is not a number.
_FAR_BELOW = 1e30

Tensor: TypeAlias = Any  # a KerasTensor; Keras has no types
Weights: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Positions:
    """A sequence on its way through the network."""

    values: Tensor  #: [n, length, channels]; 0 at padding where masked
    real: Tensor | None  #: bool [n, length, 1], False where masked; None: nothing is
    gaps: bool = False  #: real positions may stand behind others; without, padding is at the end
    tokens: Tensor | None = None  #: uint8 [n, length], if `values` are their embedding as it is


def build_model(
    config: ModelConfig,
    max_length: int,
    *,
    seed: int = 0,
    precision: Precision = "float32",
    fast: bool = False,
    unknown: bool = False,
) -> keras.Model:
    """The network of `config`, with initial weights that follow from `seed`.

    Args:
        config: What to build.
        max_length: Length of a row of tokens, residues.
        seed: Each layer's initial weights derive from it and from the layer's name.
        precision: "bfloat16" computes in bfloat16 with float32 weights; the output is float32.
        fast: Of `tuner.network.fast_layers`, to be trained; else of Keras' own, to be kept.
        unknown: Tokens may be `UNKNOWN_TOKEN`, which is masked. The weights are the same.

    Returns:
        uint8 tokens [n, max_length] -> float32 soluble probability [n, 1]; the layer "logit" is
        the probability's logit, and `model.losses` are the penalties.
    """
    set_keras()
    kit = _FastLayers() if fast else _KerasLayers()
    return _Builder(config, max_length, seed, precision, kit, unknown=unknown).build()


def logit_model(model: keras.Model) -> keras.Model:
    """The same network (shared weights) with the float32 logit [n, 1] as its output."""
    return keras.Model(model.input, model.get_layer("logit").output)


def named_weights(model: keras.Model) -> dict[str, Weights]:
    """A copy of all weights, moving moments included: "block1_conv/kernel" -> array."""
    return {weight.path: weight.numpy() for weight in model.weights}


def unpack_weights(content: bytes) -> dict[str, Weights]:
    """The weights that `TrainingRun.best_weights` returned, by name, for `load_weights`.

    Raises:
        ValueError: They are damaged.
    """
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if name != VALIDATION_LOGITS}


def load_weights(model: keras.Model, weights: Mapping[str, Weights]) -> None:
    """Sets all weights of `model` to those of `named_weights`.

    Raises:
        ValueError: Names or shapes are those of another network.
    """
    expected = {weight.path: tuple(weight.shape) for weight in model.weights}
    given = {name: array.shape for name, array in weights.items()}
    if given != expected:
        differing = sorted(name for name, _ in given.items() ^ expected.items())
        raise ValueError(f"the weights are of another network: {', '.join(differing)} differ")
    for weight in model.weights:
        weight.assign(weights[weight.path])


class _KerasLayers:
    """The layers of a network that is kept: Keras' own."""

    batch_normalization: Any = layers.BatchNormalization
    dropout: Any = layers.Dropout
    pools_first = False  #: maximum pooling goes before an activation that never falls

    def convolved(
        self,
        positions: _Positions,
        embedding: layers.Embedding,
        settings: dict[str, Any],
        *,
        masking: bool,
    ) -> Tensor:
        """A convolution of positions whose tokens, where they have them, `embedding` embeds."""
        return layers.Conv1D(**settings)(positions.values)

    def activated(
        self, x: Tensor, activation: Activation, policy: keras.DTypePolicy, name: str
    ) -> Tensor:
        if activation == "swish":
            # Keras' own registers a gradient function with TensorFlow permanently, and with it
            # keeps the graph of every network in memory.
            return ops.multiply(x, ops.sigmoid(x))
        if activation == "gelu":
            # Keras' own takes the complementary error function, which ONNX does not have.
            return ops.multiply(x, ops.add(0.5, ops.multiply(0.5, ops.erf(x * math.sqrt(0.5)))))
        return layers.Activation(activation, dtype=x.dtype, name=name)(x)


class _FastLayers(_KerasLayers):
    """The layers of a network that is trained: those of `fast_layers` where they are faster."""

    batch_normalization = fast_layers.BatchNormalization
    dropout = fast_layers.Dropout
    pools_first = True

    def convolved(
        self,
        positions: _Positions,
        embedding: layers.Embedding,
        settings: dict[str, Any],
        *,
        masking: bool,
    ) -> Tensor:
        if positions.tokens is None or embedding.output_dim < LEAST_TOKEN_CONVOLUTION:
            return super().convolved(positions, embedding, settings, masking=masking)
        convolution = fast_layers.TokenConvolution(embedding, masking=masking, **settings)
        return convolution(positions.tokens)

    def activated(
        self, x: Tensor, activation: Activation, policy: keras.DTypePolicy, name: str
    ) -> Tensor:
        if activation in ("gelu", "swish"):
            return fast_layers.SmoothActivation(activation, dtype=policy, name=name)(x)
        return super().activated(x, activation, policy, name)


class _Builder:
    """Makes layers that share the configuration, the seed and the dtype policy."""

    def __init__(
        self,
        config: ModelConfig,
        max_length: int,
        seed: int,
        precision: Precision,
        kit: _KerasLayers,
        *,
        unknown: bool,
    ) -> None:
        self._config = config
        self._unknown = unknown
        self._kit = kit
        self._max_length = max_length
        self._seed = seed
        # Per layer, never the global policy: several trials may share a process.
        self._policy = keras.DTypePolicy("mixed_bfloat16" if precision == "bfloat16" else "float32")
        self._float32 = keras.DTypePolicy("float32")

    def build(self) -> keras.Model:
        config = self._config
        tokens = keras.Input((self._max_length,), dtype="uint8", name="tokens")
        embedded = self._embedding(tokens)
        if config.arrangement == "stacked":
            positions = embedded
            for number, block in enumerate(config.blocks, start=1):
                positions = self._block(positions, block, f"block{number}")
            x = _head(positions, config.head)
        else:
            branches = [
                _head(self._block(embedded, block, f"block{number}"), config.head)
                for number, block in enumerate(config.blocks, start=1)
            ]
            x = branches[0] if len(branches) == 1 else ops.concatenate(branches, axis=-1)
        for number, dense in enumerate(config.dense, start=1):
            x = self._dense(x, dense, f"dense{number}")
        x = self._dropout(x, config.output_dropout, "output_dropout")
        logit = layers.Dense(
            1, kernel_initializer=self._glorot("logit"), dtype=self._float32, name="logit"
        )(x)
        probability = layers.Activation("sigmoid", dtype=self._float32, name="probability")(logit)
        return keras.Model(tokens, probability)

    def _embedding(self, tokens: Tensor) -> _Positions:
        """Tokens [n, max_length] -> positions [n, padded length, embedding_dim]."""
        config = self._config
        # Room at the end, so that no real residue falls off by valid windows or pooling
        # remainders; a flattened network cannot have it, its weights count positions.
        if extra := padded_length(config, self._max_length) - self._max_length:
            tokens = ops.pad(tokens, [[0, 0], [0, extra]])
        self._embed = layers.Embedding(
            TOKENS,
            config.embedding_dim,
            embeddings_initializer=keras.initializers.RandomUniform(
                -0.05, 0.05, seed=self._layer_seed("embedding")
            ),
            dtype=self._policy,
            name="embedding",
        )
        real = ops.expand_dims(ops.not_equal(tokens, 0), -1) if config.masking else None
        known = tokens
        if self._unknown:
            is_known = ops.not_equal(tokens, UNKNOWN_TOKEN)
            known = ops.where(is_known, tokens, ops.zeros_like(tokens))
            is_known = ops.expand_dims(is_known, -1)
            real = is_known if real is None else ops.logical_and(real, is_known)
        values = _zeroed(self._embed(known), real)
        return _Positions(
            self._dropout(values, config.embedding_dropout, "embedding_dropout"),
            real,
            gaps=self._unknown,
            tokens=tokens if config.embedding_dropout == 0.0 else None,
        )

    def _block(self, positions: _Positions, block: BlockConfig, name: str) -> _Positions:
        x = self._convolution(positions, block, name)
        length, gaps = x.shape[1], positions.gaps
        real = None if positions.real is None else positions.real[:, :length]
        if block.normalization == "batch":
            x = self._kit.batch_normalization(
                momentum=BATCH_NORMALIZATION_MOMENTUM, dtype=self._policy, name=f"{name}_norm"
            )(x, mask=None if real is None else ops.squeeze(real, -1))
        elif block.normalization == "layer":
            x = layers.LayerNormalization(dtype=self._policy, name=f"{name}_norm")(x)
        if self._kit.pools_first and self._may_pool_first(block):
            pooled = self._pooled(_Positions(x, real, gaps), block, name)
            pooled = replace(pooled, values=self._activated(pooled.values, block.activation, name))
        else:
            # All activations keep 0 at 0, and so do both residuals: zeroing once, here, undoes
            # what bias and normalisation put on padding.
            x = _zeroed(self._activated(x, block.activation, name), real)
            x = self._activity_penalty(x)
            x = self._residual(x, positions.values[:, :length], block, name)
            pooled = self._pooled(_Positions(x, real, gaps), block, name)
        values = self._dropout(pooled.values, block.conv_dropout, f"{name}_dropout")
        return _Positions(values, pooled.real, gaps)

    def _may_pool_first(self, block: BlockConfig) -> bool:
        """Whether the maximum of activations is the activation of the maximum."""
        return (
            block.pooling == "max"
            and block.pool_size > 1  # only then padding is left out
            and block.activation in ("relu", "tanh")  # they never fall
            and block.residual == "none"
            and self._config.activity_l2 == 0.0
        )

    def _convolution(self, positions: _Positions, block: BlockConfig, name: str) -> Tensor:
        settings: dict[str, Any] = {
            "filters": block.filters,
            "kernel_size": block.kernel_size,
            "dilation_rate": block.conv_dilation,
            "padding": block.padding,
            "kernel_initializer": self._glorot(f"{name}_conv"),
            "kernel_regularizer": _l1_l2(block.conv_l1, block.conv_l2),
            "bias_regularizer": _l1_l2(0.0, self._config.bias_l2),
            "dtype": self._policy,
            "name": f"{name}_conv",
        }
        masking = self._config.masking
        return self._kit.convolved(positions, self._embed, settings, masking=masking)

    def _pooled(self, positions: _Positions, block: BlockConfig, name: str) -> _Positions:
        """Positions [n, length, channels] -> [n, length // pool_size, channels]."""
        size, values, real = block.pool_size, positions.values, positions.real
        if size == 1:
            return positions
        maximum = block.pooling == "max"
        pooling = layers.MaxPooling1D if maximum else layers.AveragePooling1D
        pool = pooling(size, dtype=values.dtype, name=f"{name}_pool")
        if real is None:
            return _Positions(pool(values), None)
        if positions.gaps:
            windows = layers.MaxPooling1D(size, dtype=self._float32, name=f"{name}_pool_real")
            any_real = ops.greater(windows(ops.cast(real, "float32")), 0.5)
        else:
            # Padding is only at the end: a window holds a residue iff its first position does.
            any_real = real[:, : values.shape[1] // size * size : size]
        if maximum:
            pooled = _zeroed(pool(_without_padding(positions)), any_real)
        else:
            # The mean over the window, what is masked included as 0, times size / real positions.
            share = pool(ops.cast(real, values.dtype))
            pooled = ops.divide(pool(values), ops.maximum(share, 1 / size))
        return _Positions(pooled, any_real, positions.gaps)

    def _residual(self, x: Tensor, inputs: Tensor, block: BlockConfig, name: str) -> Tensor:
        """Adds the block's input [n, length, channels], as it is or through a 1x1 convolution."""
        if block.residual == "projected":
            inputs = layers.Conv1D(
                block.filters,
                1,
                use_bias=False,
                kernel_initializer=self._glorot(f"{name}_projection"),
                kernel_regularizer=_l1_l2(block.conv_l1, block.conv_l2),
                dtype=self._policy,
                name=f"{name}_projection",
            )(inputs)
        elif block.residual == "none" or inputs.shape[-1] != block.filters:
            return x
        return layers.Add(dtype=self._policy, name=f"{name}_residual")([x, inputs])

    def _dense(self, x: Tensor, dense: DenseConfig, name: str) -> Tensor:
        x = self._dropout(x, dense.dense_dropout, f"{name}_dropout")
        x = layers.Dense(
            dense.units,
            kernel_initializer=self._glorot(name),
            kernel_regularizer=_l1_l2(dense.dense_l1, dense.dense_l2),
            bias_regularizer=_l1_l2(0.0, self._config.bias_l2),
            dtype=self._policy,
            name=name,
        )(x)
        return self._activity_penalty(self._activated(x, dense.activation, name))

    def _activated(self, x: Tensor, activation: Activation, name: str) -> Tensor:
        return self._kit.activated(x, activation, self._policy, f"{name}_activation")

    def _activity_penalty(self, x: Tensor) -> Tensor:
        if self._config.activity_l2 == 0.0:
            return x
        # float32: a sum of squares over a whole batch has no place in bfloat16.
        penalised = layers.ActivityRegularization(l2=self._config.activity_l2, dtype=self._float32)
        return ops.cast(penalised(x), x.dtype)

    def _dropout(self, x: Tensor, rate: float, name: str) -> Tensor:
        if rate == 0.0:
            return x
        return self._kit.dropout(rate, seed=self._layer_seed(name), dtype=self._policy, name=name)(
            x
        )

    def _glorot(self, name: str) -> keras.Initializer:
        return keras.initializers.GlorotUniform(seed=self._layer_seed(name))

    def _layer_seed(self, name: str) -> int:
        """A seed for one layer, 31 bits, that does not depend on which other layers there are."""
        entropy = np.random.SeedSequence([self._seed, zlib.crc32(name.encode())])
        return int(entropy.generate_state(1)[0] >> 1)


def _l1_l2(l1: float, l2: float) -> keras.Regularizer | None:
    return keras.regularizers.L1L2(l1=l1, l2=l2) if l1 or l2 else None


def _zeroed(values: Tensor, real: Tensor | None) -> Tensor:
    """`values` [n, length, channels] with padding set to 0."""
    # Not a product: 0 times infinity is no 0.
    return values if real is None else ops.where(real, values, 0)


def _without_padding(positions: _Positions) -> Tensor:
    """The values far below all others at padding, where no maximum takes them."""
    # Unlike a choice, a difference has nothing to compute in the gradient; a sum is none, as Keras
    # takes one of as many positions as channels, in a batch of one, for that with a bias.
    below = ops.cast(ops.where(positions.real, 0.0, _FAR_BELOW), positions.values.dtype)
    return ops.subtract(positions.values, below)


def _head(positions: _Positions, head: Head) -> Tensor:
    """Positions [n, length, channels] -> [n, features]."""
    if head == "flatten":
        return layers.Flatten()(positions.values)
    parts = []
    if head in ("global_max", "global_both"):
        parts.append(_global_max(positions))
    if head in ("global_average", "global_both"):
        parts.append(_global_average(positions))
    return parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=-1)


def _global_max(positions: _Positions) -> Tensor:
    if positions.real is None:
        return ops.max(positions.values, axis=1)
    # Without gaps the first position is real unless there is no residue at all.
    any_real = ops.any(positions.real, axis=1) if positions.gaps else positions.real[:, 0]
    return ops.where(any_real, ops.max(_without_padding(positions), axis=1), 0)


def _global_average(positions: _Positions) -> Tensor:
    if positions.real is None:
        return ops.mean(positions.values, axis=1)
    # float32, as ops.mean does it: bfloat16 cannot count beyond 256.
    total = ops.sum(ops.cast(positions.values, "float32"), axis=1)
    count = ops.sum(ops.cast(positions.real, "float32"), axis=1)
    return ops.cast(ops.divide(total, ops.maximum(count, 1)), positions.values.dtype)
