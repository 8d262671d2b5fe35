"""Trained networks, one or a weighted mean of several, as one Keras model."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tuner.commands import install_command
from tuner.errors import SetupError
from tuner.network.keras_setup import keras, layers, memory_errors, set_keras, tf
from tuner.network.model import build_model, load_weights, named_weights, unpack_weights
from tuner.spec.architecture import ModelConfig

BATCH = 512  #: sequences that the networks compute at once
#: A batch of shorter rows is worth a graph of its own from this many rows on.
LEAST_ROWS_OF_A_WIDTH = 512
_WIDTHS = 4  #: of rows: at most this many graphs for each network

Tokens = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedNetwork:
    """A network and what it counts in a mean."""

    config: ModelConfig
    weights: Mapping[str, npt.NDArray[Any]]  #: see `tuner.network.model.named_weights`
    share: float = 1.0  #: of the mean, 0..1; those of all networks add up to 1

    @classmethod
    def unpacked(cls, config: ModelConfig, weights: bytes, share: float) -> TrainedNetwork:
        """A network with the weights that `TrainingRun.best_weights` returned.

        Raises:
            ValueError: They are damaged.
        """
        return cls(config=config, weights=unpack_weights(weights), share=share)


def combined_model(
    networks: Sequence[TrainedNetwork], max_length: int, *, unknown: bool = False
) -> keras.Model:
    """The networks as one model, of Keras' own layers alone.

    Args:
        networks: At least one.
        max_length: Length of a row of tokens, residues.
        unknown: Unknown residues are masked, see `build_model`.

    Returns:
        uint8 tokens [n, max_length] -> float32 soluble probability [n, 1]. Of several networks the
        layer "networks" has the probability of each, [n, networks].

    Raises:
        ValueError: Weights are those of another network.
        MemoryError: There is no room for them.
    """
    with memory_errors():
        models = [_trained(network, max_length, unknown) for network in networks]
        return models[0] if len(models) == 1 else _mean(models, [one.share for one in networks])


def untrained_model(
    configs: Sequence[ModelConfig], max_length: int, *, unknown: bool = False
) -> keras.Model:
    """The model of `combined_model` with other weights, to load those of a file into."""
    models = [build_model(config, max_length, unknown=unknown) for config in configs]
    return models[0] if len(models) == 1 else _mean(models, [1.0 / len(models)] * len(models))


def _trained(network: TrainedNetwork, max_length: int, unknown: bool) -> keras.Model:
    model = build_model(network.config, max_length, unknown=unknown)
    load_weights(model, network.weights)
    return model


def _mean(models: Sequence[keras.Model], shares: Sequence[float]) -> keras.Model:
    set_keras()
    tokens = keras.Input(models[0].input.shape[1:], dtype="uint8", name="tokens")
    each = layers.Concatenate(name="networks")(
        [
            keras.Model(model.input, model.output, name=_name(number))(tokens)
            for number, model in enumerate(models, start=1)
        ]
    )
    # A weighted mean is a dense layer without bias.
    mean = layers.Dense(1, use_bias=False, name="probability")
    model = keras.Model(tokens, mean(each))
    mean.kernel.assign(np.array(shares, np.float32)[:, np.newaxis])
    return model


def _name(number: int) -> str:
    """The name of a network, counted from 1, as a part of a model."""
    return f"network{number}"


def keras_bytes(model: keras.Model) -> bytes:
    """The model as a .keras file, which plain Keras loads."""
    with _scratch_file("model.keras") as path:
        model.save(path)
        return path.read_bytes()


def onnx_bytes(model: keras.Model) -> bytes:
    """The model as ONNX: input "tokens", uint8 [n, max_length]; output [n, 1].

    Raises:
        SetupError: What writes it is not installed.
    """
    try:
        import onnx  # noqa: F401, PLC0415 - an extra
        import tf2onnx  # noqa: F401, PLC0415
    except ImportError as error:
        raise SetupError(
            f"ONNX cannot be written here ({error}). Install the extra onnx: "
            f"`{install_command('onnx')}`."
        ) from error
    with _scratch_file("model.onnx") as path:
        model(np.zeros((1, model.input.shape[1]), np.uint8))  # Keras exports what was called
        with warnings.catch_warnings(action="ignore"):  # of Keras' own use of NumPy
            model.export(path, format="onnx", verbose=False)
        return path.read_bytes()


def model_from_keras_file(
    content: bytes, configs: Sequence[ModelConfig], max_length: int, *, unknown: bool = False
) -> keras.Model:
    """The model of these networks with the weights of a .keras file.

    What the file says of classes and functions is not looked at.

    Raises:
        ValueError: The file has the weights of other networks, or is damaged.
    """
    with memory_errors(), _scratch_file("model.keras") as path:
        path.write_bytes(content)
        model = untrained_model(configs, max_length, unknown=unknown)
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            model.load_weights(path)  # it warns of what it then raises an error for
        return model


def predicted(model: keras.Model, tokens: Tokens) -> Probabilities:
    """The model's probabilities, float32 [n]."""
    return np.concatenate(
        [
            model(tokens[start : start + BATCH], training=False).numpy()[:, 0]
            for start in range(0, len(tokens), BATCH)
        ]
    )


@contextlib.contextmanager
def _scratch_file(name: str) -> Iterator[Path]:
    """A file for Keras, which writes and reads files alone."""
    with tempfile.TemporaryDirectory(prefix="tuner-") as folder:
        yield Path(folder) / name


class Predictor:
    """The probabilities of each network of a model, fast over many rows.

    Networks have the layers that train fastest (`tuner.network.fast_layers`). Rows are computed at
    about their own length where padding takes no part in a network: masked, and without a flatten
    head. So the result is the same up to rounding.
    """

    def __init__(
        self,
        model: keras.Model,
        configs: Sequence[ModelConfig],
        max_length: int,
        *,
        unknown: bool = False,
    ) -> None:
        """Takes a model of `combined_model` apart.

        Args:
            model: The model, with its weights.
            configs: Of its networks, in their order.
            max_length: Length of a row that the model takes, residues.
            unknown: Whether the model masks unknown residues.
        """
        parts = (
            [model]
            if len(configs) == 1
            else [model.get_layer(_name(number)) for number in range(1, len(configs) + 1)]
        )
        self._networks = [
            (config, named_weights(part)) for config, part in zip(configs, parts, strict=True)
        ]
        self._unknown = unknown
        self._shares = (
            np.ones(1, np.float32)
            if len(configs) == 1
            else model.get_layer("probability").kernel.numpy()[:, 0]
        )
        may_be_cut = all(one.masking and one.head != "flatten" for one in configs)
        quarters = range(1, _WIDTHS + 1) if may_be_cut else (_WIDTHS,)
        self._widths = sorted({-(-max_length * quarter // _WIDTHS) for quarter in quarters})
        self._graphs: dict[int, Any] = {}

    @property
    def shares(self) -> Probabilities:
        """What each network counts in the mean, float32 [networks]."""
        return self._shares

    def __call__(self, tokens: Tokens) -> Probabilities:
        """The soluble probability by each network, float32 [n, networks].

        Args:
            tokens: uint8 [n, max_length]; 0 pads at the end, and nowhere else.

        Raises:
            MemoryError: There is no room to compute them.
        """
        found = np.empty((len(tokens), len(self._networks)), np.float32)
        lengths = np.count_nonzero(tokens, axis=1)
        lower = -1
        for width in self._widths:
            rows = np.flatnonzero((lengths > lower) & (lengths <= width))
            is_last = width == self._widths[-1]
            if not len(rows) or (not is_last and len(rows) < LEAST_ROWS_OF_A_WIDTH):
                continue  # with the next, longer ones
            lower = width
            graph = self._graph_of(width)
            with memory_errors():
                for start in range(0, len(rows), BATCH):
                    part = rows[start : start + BATCH]
                    found[part] = graph(tf.constant(tokens[part, :width])).numpy()
        return found

    def _graph_of(self, width: int) -> Any:
        if width not in self._graphs:
            models = []
            for config, weights in self._networks:
                # As in training: the same results from the same weights, up to rounding.
                model = build_model(config, width, fast=True, unknown=self._unknown)
                load_weights(model, weights)
                models.append(model)
            self._graphs[width] = tf.function(
                lambda tokens: tf.concat([one(tokens, training=False) for one in models], axis=1),
                input_signature=[tf.TensorSpec([None, width], tf.uint8)],
            )
        return self._graphs[width]
