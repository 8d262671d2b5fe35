"""The network that a configuration describes, by arithmetic: its layers, lengths and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Padding = Literal["same", "valid"]
Normalization = Literal["none", "batch", "layer"]
Activation = Literal["relu", "tanh", "gelu", "swish"]
Residual = Literal["none", "identity", "projected"]
Pooling = Literal["max", "average"]
Arrangement = Literal["stacked", "parallel"]
Head = Literal["flatten", "global_max", "global_average", "global_both"]
OptimizerName = Literal["adam", "adamw", "rmsprop", "sgd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockConfig:
    """One block: convolution, normalisation, activation, residual sum, pooling, dropout."""

    kernel_size: int  #: convolution width, residues (after pooling: positions)
    filters: int  #: output channels of the convolution
    padding: Padding  #: "same" keeps the length, "valid" shortens it by kernel_size - 1
    normalization: Normalization
    activation: Activation
    residual: Residual  #: "identity" adds the block's input where channels and length agree
    pooling: Pooling
    pool_size: int  #: window and stride of the pooling, positions; 1 is no pooling
    conv_dropout: float  #: rate of the dropout that ends the block, 0..1
    conv_l1: float  #: L1 penalty on the convolution's kernel
    conv_l2: float  #: L2 penalty on the convolution's kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseConfig:
    """One hidden dense layer with the dropout that stands before it."""

    units: int
    activation: Activation
    dense_dropout: float  #: rate of the dropout before the layer, 0..1
    dense_l1: float  #: L1 penalty on the kernel
    dense_l2: float  #: L2 penalty on the kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One resolved architecture with its training settings: what a trial trains."""

    embedding_dim: int  #: channels of the token embedding (21 tokens, 0 is padding)
    embedding_dropout: float  #: rate of the dropout after the embedding, 0..1
    masking: bool  #: zero padding throughout the network (see `tuner.network.model`)
    arrangement: Arrangement  #: blocks one after another, or side by side with a head each
    blocks: tuple[BlockConfig, ...]  #: at least one
    head: Head  #: how positions become one vector
    dense: tuple[DenseConfig, ...]  #: hidden dense layers, none or more
    output_dropout: float  #: rate of the dropout before the output layer, 0..1
    bias_l2: float  #: L2 penalty on the biases of convolutions and hidden dense layers
    activity_l2: float  #: L2 penalty on their outputs: mean over the batch of the sum of squares
    optimizer: OptimizerName
    learning_rate: float
    batch_size: int  #: sequences a step


def _after_block(block: BlockConfig, length: int) -> int:
    if block.padding == "valid":
        length -= block.kernel_size - 1
    return length // block.pool_size


def positions_after_blocks(config: ModelConfig, length: int) -> tuple[int, ...]:
    """Positions that each block leaves of an embedding of `length` positions.

    "same" padding keeps the length, "valid" leaves length - kernel_size + 1; pooling drops what
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
            length += block.kernel_size - 1
    return length


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """A block for which too few positions are left."""

    block: int  #: its number, from 1
    key: Literal["kernel_size", "pool_size"]  #: what is too large
    size: int  #: how large it is
    positions: int  #: what is left for it


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
            convolved -= block.kernel_size - 1
        if block.kernel_size > length:
            found.append(
                Misfit(block=number, key="kernel_size", size=block.kernel_size, positions=length)
            )
        elif block.pool_size > convolved:
            found.append(
                Misfit(block=number, key="pool_size", size=block.pool_size, positions=convolved)
            )
        elif config.arrangement == "stacked":
            length = -(-convolved // block.pool_size) if pads else convolved // block.pool_size
            continue
        if config.arrangement == "stacked":
            break
    return tuple(found)


TOKENS = 21  #: padding and the 20 residues
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
    convolved = length - (block.kernel_size - 1 if block.padding == "valid" else 0)
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
