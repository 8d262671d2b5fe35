"""The configurations a study may try: `ModelConfig`, and the space they are sampled from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import product
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt

from tuner.errors import StudyError

ParameterValue: TypeAlias = int | float | str | bool
_Counts: TypeAlias = npt.NDArray[np.int64]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One hyperparameter that `[space]` knows: what it may be, and what it is when left out."""

    name: str
    meaning: str
    default: ParameterValue
    kind: Literal["integer", "number", "boolean", "choice"]
    choices: tuple[str, ...] = ()  #: the allowed values of a "choice"
    low: float = 0.0  #: smallest value
    high: float = 1e6  #: largest value
    open_low: bool = False  #: `low` itself is not allowed
    open_high: bool = False  #: `high` itself is not allowed
    of_block: bool = False  #: may be overridden in `[space.block1]`, ...
    of_dense: bool = False  #: may be overridden in `[space.dense1]`, ...
    each: bool = False  #: sampled anew for every block or dense layer

    def allows(self, value: object) -> bool:
        """Whether a configuration may hold `value`; a bool is no number, a number no bool."""
        if self.kind == "boolean":
            return isinstance(value, bool)
        if self.kind == "choice":
            return isinstance(value, str) and value in self.choices
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self.kind == "integer" and not isinstance(value, int):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def typed(self, value: ParameterValue) -> ParameterValue:
        """`value`, allowed, as this key holds it: 0 and 0.0 mean the same rate."""
        return float(value) if self.kind == "number" else value


def _whole(
    name: str, meaning: str, default: int, low: int = 1, high: int = 65_536, **places: Any
) -> Key:
    # The bound keeps a slip of the keyboard from asking for terabytes.
    return Key(
        name=name, meaning=meaning, default=default, kind="integer", low=low, high=high, **places
    )


def _rate(name: str, meaning: str, default: float, **places: Any) -> Key:
    return Key(
        name=name,
        meaning=meaning,
        default=default,
        kind="number",
        high=1.0,
        open_high=True,
        **places,
    )


def _penalty(name: str, meaning: str, **places: Any) -> Key:
    return Key(name=name, meaning=meaning, default=0.0, kind="number", **places)


def _choice(name: str, meaning: str, default: str, choices: object, **places: Any) -> Key:
    return Key(
        name=name,
        meaning=meaning,
        default=default,
        kind="choice",
        choices=get_args(choices),
        **places,
    )


_KEYS = (
    _whole("embedding_dim", "channels of the token embedding", 16),
    _rate("embedding_dropout", "dropout after the embedding", 0.0),
    Key(
        name="masking",
        meaning="zero padding throughout the network",
        default=True,
        kind="boolean",
    ),
    _choice("arrangement", "blocks one after another or side by side", "stacked", Arrangement),
    _whole("blocks", "number of blocks", 2, high=16),
    _whole("kernel_size", "convolution width, positions", 5, of_block=True, each=True),
    _whole("filters", "channels of the convolution", 32, of_block=True, each=True),
    _choice("padding", "padding of the convolution", "same", Padding, of_block=True),
    _choice(
        "normalization", "normalisation after the convolution", "none", Normalization, of_block=True
    ),
    _choice(
        "activation",
        "activation of blocks and hidden dense layers",
        "relu",
        Activation,
        of_block=True,
        of_dense=True,
    ),
    _choice("residual", "sum with the block's input", "none", Residual, of_block=True),
    _choice("pooling", "pooling that ends the block", "max", Pooling, of_block=True),
    _whole("pool_size", "window of the pooling, positions; 1 is none", 2, of_block=True, each=True),
    _rate("conv_dropout", "dropout that ends the block", 0.0, of_block=True),
    _choice("head", "how positions become one vector", "global_max", Head),
    _whole("dense_layers", "number of hidden dense layers", 1, low=0, high=16),
    _whole("units", "units of the hidden dense layer", 64, of_dense=True, each=True),
    _rate(
        "dense_dropout", "dropout before every dense layer, the output included", 0.2, of_dense=True
    ),
    _penalty("conv_l1", "L1 penalty on convolution kernels", of_block=True),
    _penalty("conv_l2", "L2 penalty on convolution kernels", of_block=True),
    _penalty("dense_l1", "L1 penalty on hidden dense kernels", of_dense=True),
    _penalty("dense_l2", "L2 penalty on hidden dense kernels", of_dense=True),
    _penalty("bias_l2", "L2 penalty on biases"),
    _penalty("activity_l2", "L2 penalty on layer outputs"),
    _choice("optimizer", "optimiser", "adam", OptimizerName),
    Key(
        name="learning_rate",
        meaning="learning rate of the optimiser",
        default=1e-3,
        kind="number",
        open_low=True,
    ),
    _whole("batch_size", "sequences a step", 64),
)

#: Every hyperparameter by name, in the order of the study file. The one place of their defaults.
KEYS: Mapping[str, Key] = MappingProxyType({key.name: key for key in _KEYS})

BLOCK_KEYS = tuple(key.name for key in _KEYS if key.of_block)
DENSE_KEYS = tuple(key.name for key in _KEYS if key.of_dense)
OUTPUT_KEYS = ("dense_dropout",)

#: Six digits are more layers than any network has, and few enough for `int`.
_LAYER = re.compile(r"(block|dense)([1-9][0-9]{0,5})|output")


def layer_keys(layer: str) -> tuple[str, ...]:
    """What `[space.<layer>]` may override; nothing where `layer` names no layer."""
    match = _LAYER.fullmatch(layer)
    if match is None:
        return ()
    return {"block": BLOCK_KEYS, "dense": DENSE_KEYS, None: OUTPUT_KEYS}[match[1]]


def layer_number(layer: str) -> int:
    """3 for "block3" and "dense3"; 0 for "output"."""
    match = _LAYER.fullmatch(layer)
    return int(match[2] or 0) if match else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Integers:
    """A searched whole number."""

    low: int
    high: int  #: included
    step: int = 1  #: divides `high - low`
    log: bool = False  #: sample the logarithm evenly; then `step` is 1

    def contains(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int):
            return False
        return self.low <= value <= self.high and (value - self.low) % self.step == 0

    @property
    def middle(self) -> int:
        """The middle of the grid (of two, the lower); of a logarithmic one, the geometric mean."""
        if self.log:
            return round(math.sqrt(self.low) * math.sqrt(self.high))
        return self.low + (self.high - self.low) // self.step // 2 * self.step

    def suggest(self, trial: SuggestsParameters, name: str) -> ParameterValue:
        return trial.suggest_int(name, self.low, self.high, step=self.step, log=self.log)

    def to_document(self) -> dict[str, Any]:
        document: dict[str, Any] = {"low": self.low, "high": self.high}
        if self.step != 1:
            document["step"] = self.step
        return document | ({"log": True} if self.log else {})

    def __str__(self) -> str:
        return _range_text(self.low, self.high, self.step if self.step != 1 else None, self.log)


@dataclass(frozen=True, slots=True, kw_only=True)
class Floats:
    """A searched number."""

    low: float
    high: float  #: included
    step: float | None = None  #: divides `high - low`; None: any value
    log: bool = False  #: sample the logarithm evenly; then there is no step

    def contains(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not self.low <= value <= self.high:
            return False
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-8  # the tolerance Optuna has

    @property
    def middle(self) -> float:
        """The middle (on a grid, of two the lower); of a logarithmic range, the geometric mean."""
        if self.log:
            mean = math.sqrt(self.low) * math.sqrt(self.high)
            return min(max(mean, self.low), self.high)  # rounding may leave a narrow range
        if self.step is None:
            return self.low + (self.high - self.low) / 2
        # Decimal, so that the middle of 0.1 .. 0.5 by 0.1 is 0.3 and not 0.30000000000000004.
        low, high, step = (Decimal(str(value)) for value in (self.low, self.high, self.step))
        return float(low + (high - low) // step // 2 * step)

    def suggest(self, trial: SuggestsParameters, name: str) -> ParameterValue:
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def to_document(self) -> dict[str, Any]:
        document: dict[str, Any] = {"low": self.low, "high": self.high}
        if self.step is not None:
            document["step"] = self.step
        return document | ({"log": True} if self.log else {})

    def __str__(self) -> str:
        return _range_text(self.low, self.high, self.step, self.log)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """A hyperparameter searched among listed values."""

    choices: tuple[ParameterValue, ...]  #: at least one, no two the same

    def contains(self, value: object) -> bool:
        return any(same_value(value, choice) for choice in self.choices)

    @property
    def middle(self) -> ParameterValue:
        return self.choices[(len(self.choices) - 1) // 2]

    def suggest(self, trial: SuggestsParameters, name: str) -> ParameterValue:
        value: ParameterValue = trial.suggest_categorical(name, self.choices)
        return value

    def to_document(self) -> dict[str, Any]:
        return {"choices": list(self.choices)}

    def __str__(self) -> str:
        return "one of " + ", ".join(toml_value(choice) for choice in self.choices)


Dimension: TypeAlias = Integers | Floats | Choices
#: What stands behind a key of `[space]`: a bare value, or what it is searched in.
Entry: TypeAlias = ParameterValue | Dimension


def same_value(a: object, b: object) -> bool:
    """Equality as TOML sees it: `true` is not 1."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def toml_value(value: object) -> str:
    """A value as a study file would show it, for messages."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + " }"
    return str(value)


def _range_text(low: float, high: float, step: float | None, log: bool) -> str:
    return (
        f"{low} .. {high}" + (f" in steps of {step}" if step is not None else "") + " (log)" * log
    )


class SuggestsParameters(Protocol):
    """What `SearchSpace.suggest` needs of an `optuna.Trial`."""

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int: ...

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...

    def suggest_categorical(self, name: str, choices: Sequence[ParameterValue]) -> Any: ...


#: Chooses a value: told the sampled name ("block1.kernel_size") and what it is searched in.
Pick: TypeAlias = Callable[[str, Dimension], ParameterValue]


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """The configurations a study may try.

    What is sampled, and in which order, is written in `resolve_with` alone; sampling, replaying
    recorded parameters and naming all parameters are the same walk with another way to pick.
    """

    #: By dotted name: all of `KEYS`, then overrides ("block1.pool_size", "output.dense_dropout").
    entries: tuple[tuple[str, Entry], ...]

    @classmethod
    def of(cls, entries: Mapping[str, Entry]) -> SearchSpace:
        """The space in which `entries` (dotted names, valid) stand and the rest has its default.

        Two spaces that mean the same are equal: an override that changes nothing is left out.
        """
        shared = {name: _typed(name, entries.get(name, key.default)) for name, key in KEYS.items()}
        overrides: dict[str, Entry] = {}
        for dotted in sorted(entries.keys() - KEYS.keys(), key=_override_order):
            key = dotted.partition(".")[2]
            entry = _typed(key, entries[dotted])
            # A shared range is one parameter, the same range again a second one; but what each
            # block samples for itself, or a bare value, is nothing new.
            says_nothing = KEYS[key].each or not isinstance(entry, Integers | Floats | Choices)
            if not (says_nothing and entry == shared[key]):
                overrides[dotted] = entry
        return cls(tuple((shared | overrides).items()))

    def resolve_with(self, pick: Pick) -> ModelConfig:
        """The configuration that follows when every searched value is chosen by `pick`.

        `pick` is asked once for each parameter that exists under what was picked before, in this
        order: embedding, arrangement and number of blocks; block by block; head and number of
        dense layers; dense layer by dense layer and the output; penalties and optimiser. A
        parameter that blocks share is asked for at the first block that needs it.
        """
        entries = dict(self.entries)
        picked: dict[str, ParameterValue] = {}

        def value(key: str, layer: str = "") -> Any:
            name = f"{layer}.{key}" if layer else key
            overridden = name in entries
            entry = entries[name] if overridden else entries[key]
            if not isinstance(entry, Integers | Floats | Choices):
                return entry
            sampled = name if overridden or KEYS[key].each else key
            if sampled not in picked:
                picked[sampled] = pick(sampled, entry)
            return picked[sampled]

        def block(number: int) -> BlockConfig:
            return BlockConfig(**{key: value(key, f"block{number}") for key in BLOCK_KEYS})

        def dense(number: int) -> DenseConfig:
            return DenseConfig(**{key: value(key, f"dense{number}") for key in DENSE_KEYS})

        # Keyword arguments are evaluated as they stand: this is the order of sampling.
        return ModelConfig(
            embedding_dim=value("embedding_dim"),
            embedding_dropout=value("embedding_dropout"),
            masking=value("masking"),
            arrangement=value("arrangement"),
            blocks=tuple(block(number) for number in range(1, value("blocks") + 1)),
            head=value("head"),
            dense=tuple(dense(number) for number in range(1, value("dense_layers") + 1)),
            output_dropout=value("dense_dropout", "output"),
            bias_l2=value("bias_l2"),
            activity_l2=value("activity_l2"),
            optimizer=value("optimizer"),
            learning_rate=value("learning_rate"),
            batch_size=value("batch_size"),
        )

    def suggest(self, trial: SuggestsParameters) -> ModelConfig:
        """Samples a configuration; the order of the suggests is that of `resolve_with`."""
        return self.resolve_with(lambda name, dimension: dimension.suggest(trial, name))

    def resolve(self, sampled: Mapping[str, ParameterValue]) -> ModelConfig:
        """The configuration behind recorded parameters (`optuna.trial.FrozenTrial.params`).

        Raises:
            StudyError: They are not parameters of this space: one is missing, too many, or
                outside what it is searched in.
        """
        asked = set()

        def recorded(name: str, dimension: Dimension) -> ParameterValue:
            asked.add(name)
            if name not in sampled:
                raise StudyError(
                    f"the recorded parameters have no {name!r}, which this space samples; "
                    "they belong to another study file"
                )
            if not dimension.contains(sampled[name]):
                raise StudyError(
                    f"the recorded {name} = {toml_value(sampled[name])} is not in {dimension}; "
                    "it belongs to another study file"
                )
            return sampled[name]

        config = self.resolve_with(recorded)
        if unknown := sorted(sampled.keys() - asked):
            raise StudyError(
                f"the recorded parameters {', '.join(unknown)} do not exist in this space; "
                "they belong to another study file"
            )
        return config

    @property
    def parameters(self) -> Mapping[str, Dimension]:
        """Every name that can be sampled, in the order of sampling.

        Conditions are implied: the largest network has every parameter that a smaller one has.
        """
        found: dict[str, Dimension] = {}

        def largest(name: str, dimension: Dimension) -> ParameterValue:
            found[name] = dimension
            return _greatest(dimension) if name in ("blocks", "dense_layers") else dimension.middle

        self.resolve_with(largest)
        return found

    def most(self, key: str) -> int:
        """The largest that "blocks" or "dense_layers" can be."""
        entry = dict(self.entries)[key]
        return cast(
            int, _greatest(entry) if isinstance(entry, Integers | Floats | Choices) else entry
        )

    def to_document(self) -> dict[str, Any]:
        """The `[space]` table with every default written out."""
        document: dict[str, Any] = {}
        for name, entry in self.entries:
            shown = entry.to_document() if isinstance(entry, Integers | Floats | Choices) else entry
            layer, _, key = name.rpartition(".")
            (document.setdefault(layer, {}) if layer else document)[key] = shown
        return document


def _typed(key: str, entry: Entry) -> Entry:
    if isinstance(entry, Choices):
        return Choices(choices=tuple(KEYS[key].typed(choice) for choice in entry.choices))
    return entry if isinstance(entry, Integers | Floats) else KEYS[key].typed(entry)


def _override_order(dotted: str) -> tuple[str, int, int]:
    layer, _, key = dotted.partition(".")
    return layer.rstrip("0123456789"), layer_number(layer), list(KEYS).index(key)


def _values(entry: Entry) -> Sequence[ParameterValue]:
    """All values of an entry that is no `Floats`."""
    if isinstance(entry, Integers):
        return range(entry.low, entry.high + 1, entry.step)
    return entry.choices if isinstance(entry, Choices) else (cast(ParameterValue, entry),)


def _greatest(dimension: Dimension) -> ParameterValue:
    return max(dimension.choices) if isinstance(dimension, Choices) else dimension.high


def _least(dimension: Dimension) -> ParameterValue:
    return min(dimension.choices) if isinstance(dimension, Choices) else dimension.low


def space_of(config: ModelConfig) -> dict[str, Any]:
    """A `[space]` table of bare values that resolves to exactly `config`."""
    first_block, first_dense = config.blocks[0], config.dense[0] if config.dense else None
    space: dict[str, Any] = {}
    for name, key in KEYS.items():
        if name == "blocks":
            space[name] = len(config.blocks)
        elif name == "dense_layers":
            space[name] = len(config.dense)
        elif key.of_block:
            space[name] = getattr(first_block, name)
        elif name == "dense_dropout":
            space[name] = config.output_dropout
        elif key.of_dense:
            space[name] = getattr(first_dense, name) if first_dense else key.default
        else:
            space[name] = getattr(config, name)
    layers: list[tuple[str, BlockConfig | DenseConfig, tuple[str, ...]]] = [
        *((f"block{n}", block, BLOCK_KEYS) for n, block in enumerate(config.blocks, start=1)),
        *((f"dense{n}", dense, DENSE_KEYS) for n, dense in enumerate(config.dense, start=1)),
    ]
    for layer, values, keys in layers:
        own = {key: getattr(values, key) for key in keys if getattr(values, key) != space[key]}
        if own:
            space[layer] = own
    return space


# Length arithmetic: how many positions a block leaves of a sequence, and whether they suffice.


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


def tightest(space: SearchSpace) -> ModelConfig:
    """The configuration of `space` that leaves the fewest positions at every block.

    Fewer positions follow from larger kernels and pools, more blocks, "valid" padding, stacking,
    and a network that is not padded at its end; each is chosen by itself, so one configuration
    has them all.
    """
    prefers: Mapping[str, ParameterValue] = {
        "arrangement": "stacked",
        "padding": "valid",
        "masking": False,
        "head": "flatten",
    }

    def pick(name: str, dimension: Dimension) -> ParameterValue:
        key = name.rpartition(".")[2]
        if key in ("blocks", "kernel_size", "pool_size"):
            return _greatest(dimension)
        if key in prefers and dimension.contains(prefers[key]):
            return prefers[key]
        return dimension.middle

    return space.resolve_with(pick)


# Parameter counts.

TOKENS = 21  #: padding and the 20 residues
_NORMALIZATION_WEIGHTS = {"none": 0, "layer": 2, "batch": 4}  # per channel; batch: with moments


def _block_parameters(block: BlockConfig, channels: int) -> int:
    convolution = (block.kernel_size * channels + 1) * block.filters
    projection = channels * block.filters if block.residual == "projected" else 0
    return convolution + projection + _NORMALIZATION_WEIGHTS[block.normalization] * block.filters


def _dense_parameters(config: ModelConfig, features: int) -> int:
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
        count += _block_parameters(block, channels)
        if config.arrangement == "stacked":
            channels = block.filters
    return count + _dense_parameters(config, _features(config, max_length))


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
        weights = _NORMALIZATION_WEIGHTS[block.normalization] * block.filters
        found.append(Layer(name=f"{name}_norm", output=shape, parameters=weights))
    if block.residual == "projected":
        weights = channels * block.filters
        found.append(Layer(name=f"{name}_projection", output=shape, parameters=weights))
    if block.pool_size > 1:
        pooled = (left, block.filters)
        found.append(Layer(name=f"{name}_pool", output=pooled, parameters=0))
    return found


def parameter_count_range(space: SearchSpace, max_length: int) -> tuple[int, int]:
    """The smallest and the largest `parameter_count` in `space`, exact.

    Args:
        space: A space of which no configuration has `misfits`.
        max_length: Tokens in a row.
    """
    structures = _structures(space)
    smallest = min(_extreme_count(space, max_length, fixed, min) for fixed in structures)
    largest = max(_extreme_count(space, max_length, fixed, max) for fixed in structures)
    return smallest, largest


def _structures(space: SearchSpace) -> list[dict[str, ParameterValue]]:
    """All combinations of what the count neither only grows nor only falls with, but `blocks`."""
    entries = dict(space.entries)
    searched = {
        name: _values(entry)
        for name in ("head", "arrangement")
        if isinstance(entry := entries[name], Integers | Choices)
    }
    return [dict(zip(searched, values, strict=True)) for values in product(*searched.values())]


def _extreme_count(
    space: SearchSpace,
    max_length: int,
    fixed: Mapping[str, ParameterValue],
    extreme: Callable[..., Any],  #: `min` or `max`
) -> int:
    """The extreme count where the structure is `fixed`.

    The count grows with everything else but pooling, "valid" padding and the kernel's width. The
    first two only shorten what a flatten head sees. The kernel does both: longer ones cost
    weights and, where padding is "valid", leave fewer positions, so all of them are tried. So are
    all numbers of blocks: a smaller network is the beginning of the largest.
    """
    numbers = cast(Sequence[int], _values(dict(space.entries)["blocks"]))
    fixed = {**fixed, "blocks": max(numbers)}
    kernels: dict[str, Dimension] = {}
    cost: Mapping[str, Callable[[Any], int]] = {
        "pool_size": lambda size: -size,
        "padding": lambda padding: padding == "same",
        "normalization": _NORMALIZATION_WEIGHTS.__getitem__,
        "residual": lambda residual: residual == "projected",
    }

    def pick(name: str, dimension: Dimension) -> ParameterValue:
        key = name.rpartition(".")[2]
        if name in fixed:
            return fixed[name]
        if key == "kernel_size":
            kernels[name.partition(".")[0]] = dimension
        if key in cost and isinstance(dimension, Choices):
            return cast(ParameterValue, extreme(dimension.choices, key=cost[key]))
        ends = (_least(dimension), _greatest(dimension))
        return cast(ParameterValue, extreme(ends, key=cost.get(key)))

    config = space.resolve_with(pick)
    if config.head != "flatten":
        first = (replace(config, blocks=config.blocks[:number]) for number in numbers)
        return int(extreme(parameter_count(one, max_length) for one in first))
    stacked = config.arrangement == "stacked"
    per_feature = config.dense[0].units if config.dense else 1
    better, unreachable = (np.minimum, _FAR) if extreme is min else (np.maximum, -_FAR)
    start = np.full(max_length + 1, unreachable)
    start[max_length] = 0
    # Convolution weights by positions left: of the blocks so far, or in parallel of one alone.
    by_length, channels, beside = start, config.embedding_dim, 0
    counts: dict[int, int] = {}
    for number, block in enumerate(config.blocks, start=1):
        sizes = kernels.get(f"block{number}", block.kernel_size)
        later = config.blocks[number - 1 :] if stacked else (block,)
        after = _weights_after(
            by_length,
            block,
            channels,
            _kernels_to_try(sizes, math.prod(one.pool_size for one in later)),
            better,
        )
        (left,) = np.nonzero(np.abs(after) < _FAR)
        counts[number] = int(extreme(after[left] + left * (block.filters * per_feature)))
        if stacked:
            by_length, channels = after, block.filters
        else:
            counts[number] = beside = beside + counts[number]
    count = TOKENS * config.embedding_dim + _dense_parameters(config, 0)
    return count + int(extreme(counts[number] for number in numbers))


def _kernels_to_try(sizes: Entry, period: int) -> Sequence[int]:
    """The kernels among `sizes` that can give an extreme count.

    A kernel that is longer by the product of the pool sizes from its block on, the `period`,
    leaves exactly one position fewer at the end, so the count is linear in steps of it: of the
    kernels that are alike modulo the period the shortest and the longest are enough.
    """
    if isinstance(sizes, Integers):
        return range(sizes.low, sizes.high + 1, sizes.step)
    ends: dict[int, tuple[int, int]] = {}
    for size in cast(Sequence[int], _values(sizes)):
        low, high = ends.get(size % period, (size, size))
        ends[size % period] = min(low, size), max(high, size)
    return sorted({size for pair in ends.values() for size in pair})


_FAR = np.int64(2**61)  #: beyond any count; a length that no choice of kernels leaves has this


def _weights_after(
    before: _Counts,
    block: BlockConfig,
    channels: int,
    kernel_sizes: Sequence[int],
    better: np.ufunc,
) -> _Counts:
    """The extreme convolution weights of the blocks up to this one, by the positions left.

    With "valid" padding a kernel of k leaves m = L - k + 1 positions and costs b + a k weights, so
    that extreme(w[L] + b + a k) over all k is b - a (m - 1) + extreme(w[L] + a L): of a window of
    lengths, whose extremes take log(kernels) passes instead of one for each kernel.

    Args:
        before: The weights before this block, int64 [max_length + 1], by the positions left.
        block: Its `kernel_size` is not looked at.
        channels: Its input's.
        kernel_sizes: Those that it may have, rising.
        better: `np.minimum` or `np.maximum`.
    """
    unreachable = _FAR if better is np.minimum else -_FAR
    lengths = np.arange(len(before))
    slope = channels * block.filters
    base = _block_parameters(replace(block, kernel_size=0), channels)
    if block.padding == "same":
        ends = (slope * min(kernel_sizes), slope * max(kernel_sizes))
        after = before + base + better(*ends)
    else:
        rising = before + slope * lengths
        best = np.full_like(before, unreachable)
        for first, step, count in _progressions(kernel_sizes):
            best = better(best, _window(rising, first - 1, step, count, better, unreachable))
        after = best + base - slope * (lengths - 1)
    after[np.abs(after) > _FAR // 2] = unreachable
    padded = np.full(-(-len(after) // block.pool_size) * block.pool_size, unreachable)
    padded[: len(after)] = after
    pooled: _Counts = better.reduce(padded.reshape(-1, block.pool_size), axis=1)
    return pooled


def _window(
    values: _Counts, offset: int, step: int, count: int, better: np.ufunc, outside: np.int64
) -> _Counts:
    """For each i the extreme of values[i + offset + step j] with j = 0 .. count - 1."""

    def moved(array: _Counts, by: int) -> _Counts:
        found = np.full_like(array, outside)
        if by < len(array):
            found[: len(array) - by] = array[by:]
        return found

    best, width = moved(values, offset), 1
    while 2 * width <= count:
        best = better(best, moved(best, width * step))
        width *= 2
    widest: _Counts = better(best, moved(best, (count - width) * step))
    return widest


def _progressions(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Rising numbers as arithmetic progressions: first, step, how many."""
    if isinstance(numbers, range):
        yield numbers.start, numbers.step, len(numbers)
        return
    at = 0
    while at < len(numbers):
        end = min(at + 2, len(numbers))
        step = numbers[end - 1] - numbers[at] if end - at == 2 else 1
        while end < len(numbers) and numbers[end] - numbers[end - 1] == step:
            end += 1
        yield numbers[at], step, end - at
        at = end
