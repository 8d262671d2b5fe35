"""The space from which the configurations of a study are sampled."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, ClassVar, Protocol, TypeAlias, cast

from tuner.errors import StudyError
from tuner.spec.architecture import (
    KEYS,
    BlockConfig,
    DenseConfig,
    ModelConfig,
)
from tuner.spec.hyperparameter import ParameterValue
from tuner.spec.mistakes import same_value, toml_value

BLOCK_KEYS = tuple(key.name for key in KEYS.values() if key.of_block)
DENSE_KEYS = tuple(key.name for key in KEYS.values() if key.of_dense)
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


class _Range:
    """How whole and other numbers are written as dimensions."""

    __slots__ = ()
    no_step: ClassVar[int | None]  #: the step of one that leaves no number out
    low: float
    high: float
    step: float | None
    log: bool

    def to_document(self) -> dict[str, Any]:
        step = {} if self.step == self.no_step else {"step": self.step}
        return {"low": self.low, "high": self.high, **step, **({"log": True} if self.log else {})}

    def __str__(self) -> str:
        step = "" if self.step == self.no_step else f" in steps of {self.step}"
        return f"{self.low} .. {self.high}{step}{' (log)' * self.log}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Integers(_Range):
    """A searched whole number."""

    no_step = 1
    low: int  #: smallest value
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Floats(_Range):
    """A searched number."""

    no_step = None
    low: float  #: smallest value
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

        def layers(layer: type[Any], kind: str, count: str, keys: Sequence[str]) -> tuple[Any, ...]:
            return tuple(
                layer(**{key: value(key, f"{kind}{number}") for key in keys})
                for number in range(1, value(count) + 1)
            )

        made: Mapping[str, Callable[[], Any]] = {
            "blocks": lambda: layers(BlockConfig, "block", "blocks", BLOCK_KEYS),
            "dense": lambda: layers(DenseConfig, "dense", "dense_layers", DENSE_KEYS),
            "output_dropout": lambda: value("dense_dropout", "output"),
        }
        # In the order of the fields, which is that of sampling.
        names = (field.name for field in fields(ModelConfig))
        return ModelConfig(
            **{name: made[name]() if name in made else value(name) for name in names}
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
