"""The configurations a study may try: `ModelConfig`, and the space they are sampled from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias, cast, get_args

from tuner.errors import StudyError
from tuner.spec.architecture import (
    Activation,
    Arrangement,
    BlockConfig,
    DenseConfig,
    Head,
    ModelConfig,
    Normalization,
    OptimizerName,
    Padding,
    Pooling,
    Residual,
)
from tuner.spec.mistakes import same_value, toml_value

ParameterValue: TypeAlias = int | float | str | bool


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
            return greatest(dimension) if name in ("blocks", "dense_layers") else dimension.middle

        self.resolve_with(largest)
        return found

    def most(self, key: str) -> int:
        """The largest that "blocks" or "dense_layers" can be."""
        entry = dict(self.entries)[key]
        return cast(
            int, greatest(entry) if isinstance(entry, Integers | Floats | Choices) else entry
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


def greatest(dimension: Dimension) -> ParameterValue:
    """The largest value of a dimension of numbers."""
    return max(dimension.choices) if isinstance(dimension, Choices) else dimension.high


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
