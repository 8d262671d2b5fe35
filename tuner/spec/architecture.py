"""The network that a configuration describes, by arithmetic: its layers, lengths and parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal

from tuner.spec.hyperparameter import (
    GREATEST,
    Hyperparameter,
    choice,
    declared_in,
    penalty,
    rate,
    whole,
)

Padding = Literal["same", "valid"]
Normalization = Literal["none", "batch", "layer"]
Activation = Literal["relu", "tanh", "gelu", "swish"]
Residual = Literal["none", "identity", "projected"]
Pooling = Literal["max", "average"]
Arrangement = Literal["stacked", "parallel"]
Head = Literal["flatten", "global_max", "global_average", "global_both"]
OptimizerName = Literal["adam", "adamw", "rmsprop", "sgd"]

# The order of the fields is that of sampling, and of the study file.


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockConfig:
    """One block: convolution, normalisation, activation, residual sum, pooling, dropout."""

    kernel_size: Annotated[
        int, whole("convolution width, positions", 5, each=True, shortens=GREATEST)
    ]
    conv_dilation: Annotated[
        int,
        whole(
            "positions from one weight of the kernel to the next; 1 is no dilation",
            1,
            each=True,
            shortens=GREATEST,
            since=3,
        ),
    ]
    filters: Annotated[int, whole("channels of the convolution", 32, each=True)]
    padding: Annotated[Padding, choice("padding of the convolution", "same", shortens="valid")]
    normalization: Annotated[Normalization, choice("normalisation after the convolution", "none")]
    activation: Annotated[
        Activation, choice("activation of blocks and hidden dense layers", "relu")
    ]
    # "identity" adds the block's input where channels and length agree.
    residual: Annotated[Residual, choice("sum with the block's input", "none")]
    pooling: Annotated[Pooling, choice("pooling that ends the block", "max")]
    pool_size: Annotated[
        int,
        whole("window of the pooling, positions; 1 is none", 2, each=True, shortens=GREATEST),
    ]
    conv_dropout: Annotated[float, rate("dropout that ends the block")]
    conv_l1: Annotated[float, penalty("L1 penalty on convolution kernels")]
    conv_l2: Annotated[float, penalty("L2 penalty on convolution kernels")]

    @property
    def span(self) -> int:
        """Positions that the dilated kernel reaches over."""
        return (self.kernel_size - 1) * self.conv_dilation + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseConfig:
    """One hidden dense layer with the dropout that stands before it."""

    units: Annotated[int, whole("units of the hidden dense layer", 64, each=True)]
    activation: Activation  # declared by `BlockConfig`
    dense_dropout: Annotated[
        float, rate("dropout before every dense layer, the output included", 0.2)
    ]
    dense_l1: Annotated[float, penalty("L1 penalty on hidden dense kernels")]
    dense_l2: Annotated[float, penalty("L2 penalty on hidden dense kernels")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One resolved architecture with its training settings: what a trial trains."""

    embedding_dim: Annotated[int, whole("channels of the token embedding", 16)]
    embedding_dropout: Annotated[float, rate("dropout after the embedding")]
    masking: Annotated[
        bool, choice("zero padding throughout the network", default=True, shortens=False)
    ]
    arrangement: Annotated[
        Arrangement,
        choice("blocks one after another or side by side", "stacked", shortens="stacked"),
    ]
    blocks: Annotated[
        tuple[BlockConfig, ...], whole("number of blocks", 2, high=16, shortens=GREATEST)
    ]
    head: Annotated[
        Head, choice("how positions become one vector", "global_max", shortens="flatten")
    ]
    dense: Annotated[
        tuple[DenseConfig, ...],
        whole("number of hidden dense layers", 1, low=0, high=16, name="dense_layers"),
    ]
    output_dropout: float  # `dense_dropout` of [space.output]
    # Of convolutions and hidden dense layers; of outputs the mean over the batch of their squares.
    bias_l2: Annotated[float, penalty("L2 penalty on biases")]
    activity_l2: Annotated[float, penalty("L2 penalty on layer outputs")]
    optimizer: Annotated[OptimizerName, choice("optimiser", "adam")]
    learning_rate: Annotated[
        float, Hyperparameter(meaning="learning rate of the optimiser", default=1e-3, open_low=True)
    ]
    batch_size: Annotated[int, whole("sequences a step", 64)]


def _names(config: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(config))


#: Every hyperparameter by its key in `[space]`. The one place of their defaults.
KEYS: Mapping[str, Hyperparameter] = MappingProxyType(
    {
        one.name: dataclasses.replace(
            one,
            of_block=one.name in _names(BlockConfig),
            of_dense=one.name in _names(DenseConfig),
        )
        for one in declared_in(ModelConfig)
    }
)


def _after_block(block: BlockConfig, length: int) -> int:
    if block.padding == "valid":
        length -= block.span - 1
    return length // block.pool_size


def positions_after_blocks(config: ModelConfig, length: int) -> tuple[int, ...]:
    """Positions that each block leaves of an embedding of `length` positions.

    "same" padding keeps the length, "valid" leaves length - span + 1; pooling drops what
    does not fill its window. In parallel every block starts from the embedding.
    """
    left: list[int] = []
    for block in config.blocks:
        before = length if config.arrangement == "parallel" or not left else left[-1]
        left.append(_after_block(block, before))
    return tuple(left)


def _pads_at_the_end(config: ModelConfig) -> bool:
    # A flattened network cannot: its weights count positions. Without masking nothing tells the
    # added positions from residues.
    return config.masking and config.head != "flatten"


def padded_length(config: ModelConfig, max_length: int) -> int:
    """Length of the embedding, positions, such that no residue of `max_length` is dropped.

    Valid windows and remainders of pooling cut the end off. A masked network with a global head
    gets as much padding there as they take; any other network has `max_length`.
    """
    if not _pads_at_the_end(config):
        return max_length
    if config.arrangement == "parallel":
        return max(_padded(config.blocks[n : n + 1], max_length) for n in range(len(config.blocks)))
    return _padded(config.blocks, max_length)


def _padded(blocks: Sequence[BlockConfig], max_length: int) -> int:
    length = max_length
    for block in blocks:
        length = -(-length // block.pool_size)
    for block in reversed(blocks):
        length *= block.pool_size
        if block.padding == "valid":
            length += block.span - 1
    return length


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """A block for which too few positions are left."""

    block: int  #: its number, from 1
    key: Literal["kernel_size", "pool_size"]  #: what is too large
    size: int  #: its value
    span: int  #: positions that it needs
    positions: int  #: those that are left for it


def misfits(config: ModelConfig, max_length: int) -> tuple[Misfit, ...]:
    """Blocks whose kernel or pooling is longer than what the blocks before leave.

    With either padding: a "same" convolution wider than its input is mostly padding. Blocks
    after a stacked one that does not fit are not looked at; parallel ones all are.
    """
    found: list[Misfit] = []
    length = max_length
    for number, block in enumerate(config.blocks, start=1):
        if config.arrangement == "parallel":
            length = max_length
        pads = _pads_at_the_end(config)
        convolved = length
        if block.padding == "valid" and not pads:
            convolved -= block.span - 1
        if block.span > length:
            found.append(
                Misfit(
                    block=number,
                    key="kernel_size",
                    size=block.kernel_size,
                    span=block.span,
                    positions=length,
                )
            )
        elif block.pool_size > convolved:
            found.append(
                Misfit(
                    block=number,
                    key="pool_size",
                    size=block.pool_size,
                    span=block.pool_size,
                    positions=convolved,
                )
            )
        elif config.arrangement == "stacked":
            length = -(-convolved // block.pool_size) if pads else convolved // block.pool_size
            continue
        if config.arrangement == "stacked":
            break
    return tuple(found)


TOKENS = 21  #: padding and the 20 residues
#: Of an unknown residue that is masked. It has no row in the embedding, so networks that mask have
#: the weights of those that do not.
UNKNOWN_TOKEN = TOKENS
NORMALIZATION_WEIGHTS = {"none": 0, "layer": 2, "batch": 4}  # per channel; batch: with moments


def block_parameters(block: BlockConfig, channels: int) -> int:
    """Parameters of a block whose input has this number of channels."""
    convolution = (block.kernel_size * channels + 1) * block.filters
    projection = channels * block.filters if block.residual == "projected" else 0
    return convolution + projection + NORMALIZATION_WEIGHTS[block.normalization] * block.filters


def dense_parameters(config: ModelConfig, features: int) -> int:
    """Parameters of all dense layers, the output included, behind `features` inputs."""
    count = 0
    for dense in config.dense:
        count += (features + 1) * dense.units
        features = dense.units
    return count + features + 1


def _features(config: ModelConfig, max_length: int) -> int:
    """What the head, or in parallel all heads together, hand to the first dense layer."""
    if config.head == "flatten":
        per_block = [
            left * block.filters
            for left, block in zip(
                positions_after_blocks(config, max_length), config.blocks, strict=True
            )
        ]
    else:
        both = 2 if config.head == "global_both" else 1
        per_block = [both * block.filters for block in config.blocks]
    return sum(per_block) if config.arrangement == "parallel" else per_block[-1]


def parameter_count(config: ModelConfig, max_length: int) -> int:
    """Weights of the network by arithmetic, those included that no gradient changes.

    Equals `build_model(config, max_length).count_params()`.

    Args:
        config: A configuration without `misfits`.
        max_length: Tokens in a row; only a flatten head's count depends on it.
    """
    count = TOKENS * config.embedding_dim
    channels = config.embedding_dim
    for block in config.blocks:
        count += block_parameters(block, channels)
        if config.arrangement == "stacked":
            channels = block.filters
    return count + dense_parameters(config, _features(config, max_length))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer with weights, or one that changes the shape, as `build_model` makes it."""

    name: str  #: as Keras has it: "block1_conv"; "head" stands for all that reduces positions
    output: tuple[int, ...]  #: shape of one sequence's output: positions x channels, or features
    parameters: int  #: weights, those included that no gradient changes


def layers_of(config: ModelConfig, max_length: int) -> tuple[Layer, ...]:
    """The network layer by layer, by arithmetic; the parameters add up to `parameter_count`.

    Args:
        config: A configuration without `misfits`.
        max_length: Tokens in a row.
    """
    length = padded_length(config, max_length)
    dim = config.embedding_dim
    found = [Layer(name="embedding", output=(length, dim), parameters=TOKENS * dim)]
    before, channels = length, dim
    after = positions_after_blocks(config, length)
    for number, (block, left) in enumerate(zip(config.blocks, after, strict=True), start=1):
        if config.arrangement == "parallel":
            before, channels = length, dim
        found += _layers_of_block(block, f"block{number}", before, channels, left)
        before, channels = left, block.filters
    features = _features(config, max_length)
    found.append(Layer(name="head", output=(features,), parameters=0))
    for number, dense in enumerate(config.dense, start=1):
        weights = (features + 1) * dense.units
        found.append(Layer(name=f"dense{number}", output=(dense.units,), parameters=weights))
        features = dense.units
    return (*found, Layer(name="logit", output=(1,), parameters=features + 1))


def _layers_of_block(
    block: BlockConfig, name: str, length: int, channels: int, left: int
) -> list[Layer]:
    """A block that takes [length, channels] and leaves `left` positions."""
    convolved = length - (block.span - 1 if block.padding == "valid" else 0)
    shape = (convolved, block.filters)
    weights = (block.kernel_size * channels + 1) * block.filters
    found = [Layer(name=f"{name}_conv", output=shape, parameters=weights)]
    if block.normalization != "none":
        weights = NORMALIZATION_WEIGHTS[block.normalization] * block.filters
        found.append(Layer(name=f"{name}_norm", output=shape, parameters=weights))
    if block.residual == "projected":
        weights = channels * block.filters
        found.append(Layer(name=f"{name}_projection", output=shape, parameters=weights))
    if block.pool_size > 1:
        pooled = (left, block.filters)
        found.append(Layer(name=f"{name}_pool", output=pooled, parameters=0))
    return found
