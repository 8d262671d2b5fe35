"""Keras' layers with the same weights and results, computed faster while a network is trained.

What takes the time of a training step on a CPU is moving memory and a few slow kernels, so:

- the convolution over the embedding is computed from the tokens: looking a token up and
  convolving is linear, so one small product makes a kernel over the 20 residues, and no gradient
  is needed at every position for the embedding;
- a convolution's gradient towards its input is a convolution again, and TensorFlow's forward
  kernel computes it in half the time of its backward one;
- the maximum over a window is one of its strided slices, and its gradient goes the way back (where
  TensorFlow computes by oneDNN its own kernel is faster, and taken);
- batch normalisation under a mask has a gradient of three sums, written out here;
- dropout needs no 32 random bits an element, and no more than a product either way;
- gelu and swish pass over the values as seldom as they can, and in float32: TensorFlow computes in
  bfloat16 by converting there and back in every pass.

`benchmarks/layers.py` measures each beside Keras' own. Exported networks have Keras' layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from tuner.network.keras_setup import layers, ops, tf
from tuner.network.private_tensorflow import HAS_ONEDNN, with_gradient
from tuner.spec.architecture import TOKENS

Tensor: TypeAlias = Any


class Convolution(layers.Conv1D):
    """Keras' `Conv1D` with stride 1, bias and no activation."""

    def call(self, inputs: Tensor) -> Tensor:
        return tf.nn.bias_add(self._convolved(inputs, self.kernel), self.bias)

    def _convolved(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        return _convolution(inputs, kernel, self.padding)


class TokenConvolution(Convolution):
    """A `Conv1D` over an embedding, computed from the tokens [n, length].

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

    def _convolved(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        first = self._first_token
        # A token below the first has no one in it: zeros.
        one_hot = tf.one_hot(tf.cast(inputs, tf.int32) - first, TOKENS - first, dtype=kernel.dtype)
        rows = ops.cast(self._embedding.embeddings, kernel.dtype)[first:]
        # [width, tokens, filters]: what each token adds at each place of the window.
        return _convolution(one_hot, tf.einsum("te,kef->ktf", rows, kernel), self.padding)


class MaximumPooling(layers.MaxPooling1D):
    """Keras' `MaxPooling1D` whose windows stand side by side."""

    def call(self, inputs: Tensor) -> Tensor:
        if HAS_ONEDNN:
            return super().call(inputs)
        (size,) = self.pool_size
        (pooled,) = with_gradient(functools.partial(_pooled, size=size), inputs)
        return pooled


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


def _convolution(inputs: Tensor, kernel: Tensor, padding: str) -> Tensor:
    """Positions [n, length, channels] * [width, channels, filters] -> [n, length, filters]."""
    width = kernel.shape[0]
    left = (width - 1) // 2 if padding == "same" else 0
    right = width - 1 - left if padding == "same" else 0

    def convolved(x: Tensor, w: Tensor) -> _Recipe:
        y = _correlated(x, w, left, right)

        def gradient(dy: Tensor) -> tuple[Tensor, Tensor]:
            turned = tf.transpose(tf.reverse(w, [0]), [0, 2, 1])
            dx = _correlated(dy, turned, width - 1 - left, width - 1 - right)
            return dx, _kernel_gradient(x, dy, w, padding)

        return [y], gradient

    (outputs,) = with_gradient(convolved, inputs, tf.convert_to_tensor(kernel))
    return outputs


def _correlated(x: Tensor, w: Tensor, left: int, right: int) -> Tensor:
    """A convolution with so many zeros on either side, in TensorFlow's two dimensions."""
    padding = [[0, 0], [0, 0], [left, right], [0, 0]]
    y = tf.nn.conv2d(tf.expand_dims(x, 1), tf.expand_dims(w, 0), 1, padding)
    return tf.squeeze(y, 1)


def _kernel_gradient(x: Tensor, dy: Tensor, w: Tensor, padding: str) -> Tensor:
    # oneDNN runs named paddings alone; an explicit one takes twice as long, in bfloat16 50 times.
    dw = tf.raw_ops.Conv2DBackpropFilter(
        input=tf.expand_dims(x, 1),
        filter_sizes=[1, *w.shape],
        out_backprop=tf.expand_dims(dy, 1),
        strides=[1, 1, 1, 1],
        padding=padding.upper(),
    )
    return tf.squeeze(dw, 0)


def _pooled(x: Tensor, size: int) -> _Recipe:
    """Positions [n, length, channels] -> their maxima [n, length // size, channels]."""
    windows, rest = divmod(x.shape[1], size)
    channels = x.shape[2]
    within = tf.reshape(x[:, : windows * size] if rest else x, [-1, windows, size, channels])
    best, *others = tf.unstack(within, axis=2)
    leads = []  # of each position over the best before it; equal ones do not lead, as in Keras
    for other in others:
        leads.append(other - best)
        best = tf.maximum(best, other)

    def gradient(dy: Tensor) -> tuple[Tensor]:
        shares: list[Tensor] = []
        for lead in reversed(leads):
            share = tf.raw_ops.ReluGrad(gradients=dy, features=lead)  # dy where it leads, else 0
            shares.insert(0, share)
            dy = dy - share
        dx = tf.reshape(tf.stack([dy, *shares], axis=2), [-1, windows * size, channels])
        return (tf.pad(dx, [[0, 0], [0, rest], [0, 0]]) if rest else dx,)

    return [best], gradient


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
