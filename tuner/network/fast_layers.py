"""Keras' layers with the same weights and results, computed faster in training and prediction.

TensorFlow's convolutions and pooling are as fast as they can be where it computes by oneDNN
(`tuner.network.keras_setup`). What else takes the time of a training step on a CPU is moving memory
and a few slow kernels, so:

- the convolution over the embedding is computed from the tokens: looking a token up and
  convolving is linear, so one small product makes a kernel over the 20 residues, and no gradient
  is needed at every position for the embedding;
- batch normalisation under a mask has a gradient of three sums, written out here;
- dropout needs no 32 random bits an element, and no more than a product either way;
- gelu and swish pass over the values as seldom as they can, and in float32: TensorFlow computes in
  bfloat16 by converting there and back in every pass.

`benchmarks/layers.py` measures each beside Keras' own. Exported networks have Keras' layers.

Why: `docs/decisions.md#why-are-networks-trained-with-layers-of-our-own-and-exported-with-keras`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from tuner.network.keras_setup import layers, ops, tf
from tuner.network.private_tensorflow import with_gradient
from tuner.spec.architecture import TOKENS

Tensor: TypeAlias = Any


class TokenConvolution(layers.Conv1D):
    """A `Conv1D` with stride 1 over an embedding, computed from the tokens [n, length].

    Token 0 counts as a vector of zeros if `masking`, else as its row of the embedding.
    """

    def __init__(self, embedding: layers.Embedding, *, masking: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self._embedding = embedding
        self._first_token = 1 if masking else 0
        self.input_spec = None  # tokens, where Keras expects vectors

    def build(self, input_shape: Sequence[int | None]) -> None:
        super().build((*input_shape, self._embedding.output_dim))
        self.input_spec = None

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> Any:
        return super().compute_output_shape((*input_shape[:2], self._embedding.output_dim))

    def call(self, inputs: Tensor) -> Tensor:
        kernel, first = ops.cast(self.kernel, self.compute_dtype), self._first_token
        # A token below the first has no one in it: zeros.
        one_hot = tf.one_hot(tf.cast(inputs, tf.int32) - first, TOKENS - first, dtype=kernel.dtype)
        rows = ops.cast(self._embedding.embeddings, kernel.dtype)[first:]
        # [width, tokens, filters]: what each token adds at each place of the window.
        of_tokens = tf.einsum("te,kef->ktf", rows, kernel)
        y = ops.conv(one_hot, of_tokens, padding=self.padding, dilation_rate=self.dilation_rate)
        return tf.nn.bias_add(y, ops.cast(self.bias, self.compute_dtype))


class Dropout(layers.Dropout):
    """Keras' `Dropout`; the rate is rounded to 1 / 65,536."""

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        if not training:
            return inputs
        # Two elements share a random number of 32 bits: drawing them is most of the work.
        shape = tf.shape(inputs)
        elements = math.prod(inputs.shape[1:])
        pairs = tf.random.stateless_uniform(
            [shape[0], (elements + 1) // 2],
            self.seed_generator.next(),
            minval=None,
            maxval=None,
            dtype=tf.uint32,
        )
        drawn = tf.reshape(tf.bitcast(pairs, tf.uint16), [shape[0], -1])[:, :elements]
        dropped = round(self.rate * 2**16)
        kept = tf.cast(tf.reshape(drawn, shape) >= dropped, inputs.dtype)
        return inputs * (kept * (2**16 / (2**16 - dropped)))


class BatchNormalization(layers.BatchNormalization):
    """Keras' own over the last axis; `mask` [n, length] leaves positions out of the moments."""

    def call(
        self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None
    ) -> Tensor:
        if not training:
            scale = self.gamma * tf.math.rsqrt(self.moving_variance + self.epsilon)
            shift = self.beta - self.moving_mean * scale
            return inputs * ops.cast(scale, inputs.dtype) + ops.cast(shift, inputs.dtype)
        values = tf.cast(inputs, tf.float32)
        weights = tf.ones(tf.shape(values)[:-1]) if mask is None else tf.cast(mask, tf.float32)
        outputs, mean, variance = _normalized(values, weights, self.gamma, self.beta, self.epsilon)
        for moving, moment in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + moment * (1.0 - self.momentum))
        return ops.cast(outputs, self.compute_dtype)


class SmoothActivation(layers.Layer):
    """Keras' activation "gelu" or "swish"."""

    def __init__(self, activation: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.supports_masking = True
        self._recipe = {"gelu": _gelu, "swish": _swish}[activation]

    def call(self, inputs: Tensor) -> Tensor:
        (outputs,) = with_gradient(self._recipe, inputs)
        return outputs


def _gelu(x: Tensor) -> _Recipe:
    v = tf.cast(x, tf.float32)
    share = 0.5 + 0.5 * tf.math.erf(v * math.sqrt(0.5))  # of a normal distribution below v

    def gradient(dy: Tensor) -> tuple[Tensor]:
        density = math.sqrt(0.5 / math.pi) * tf.exp(-0.5 * v * v)
        return (tf.cast(tf.cast(dy, tf.float32) * (share + v * density), x.dtype),)

    return [tf.cast(v * share, x.dtype)], gradient


def _swish(x: Tensor) -> _Recipe:
    v = tf.cast(x, tf.float32)
    share = tf.sigmoid(v)
    y = v * share

    def gradient(dy: Tensor) -> tuple[Tensor]:
        return (tf.cast(tf.cast(dy, tf.float32) * (share + y * (1.0 - share)), x.dtype),)

    return [tf.cast(y, x.dtype)], gradient


def _normalized(
    values: Tensor, weights: Tensor, gamma: Tensor, beta: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises values [n, length, channels] or [n, channels]; positions weigh 0 or 1.

    Returns:
        The normalised values, and mean and variance [channels] that they were normalised with.
    """
    shape, channels = tf.shape(values), values.shape[-1]

    def normalized(x: Tensor, scale: Tensor, shift: Tensor) -> _Recipe:
        x = tf.reshape(x, [-1, channels])
        row = tf.reshape(weights, [1, -1])
        count = tf.maximum(tf.reduce_sum(row), 1.0)
        mean = tf.matmul(row, x) / count  # a sum over rows is fastest as a product
        centred = x - mean
        variance = tf.matmul(row, centred * centred) / count
        slope = scale * tf.math.rsqrt(variance + epsilon)
        y = tf.reshape(centred * slope + shift, shape)

        def gradient(dy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dy = tf.reshape(dy, [-1, channels])
            everywhere = tf.ones_like(row)
            total = tf.matmul(everywhere, dy)
            along = tf.matmul(everywhere, dy * centred)
            pull = total / count + centred * (along / (count * (variance + epsilon)))
            dx = slope * (dy - tf.transpose(row) * pull)
            root = tf.math.rsqrt(variance + epsilon)
            return tf.reshape(dx, shape), (along * root)[0], total[0]

        return [y, mean[0], variance[0]], gradient

    scale, shift = tf.convert_to_tensor(gamma), tf.convert_to_tensor(beta)
    outputs, mean, variance = with_gradient(normalized, values, scale, shift)
    return outputs, mean, variance


#: Outputs, and from the gradients towards them those towards the inputs.
_Recipe: TypeAlias = tuple[list[Tensor], Callable[..., tuple[Tensor, ...]]]
