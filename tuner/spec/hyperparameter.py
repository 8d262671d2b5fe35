"""What each hyperparameter declares about itself, beside the field that holds it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

ParameterValue: TypeAlias = int | float | str | bool
Kind: TypeAlias = Literal["integer", "number", "boolean", "choice"]

GREATEST = math.inf  #: for `Hyperparameter.shortens`


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameter:
    """What a hyperparameter may be, and what it is where the study file leaves it out."""

    meaning: str  #: with its unit; for the JSON schema
    default: ParameterValue  #: also what studies did that were made before there was `since`
    low: float = 0.0  #: smallest value
    high: float = 1e6  #: largest value
    open_low: bool = False  #: `low` itself is not allowed
    open_high: bool = False  #: `high` itself is not allowed
    each: bool = False  #: sampled separately for every block or dense layer
    shortens: ParameterValue | None = None  #: the value that leaves the fewest positions, if any
    since: int = 1  #: first format of study records that has it (`tuner.search.formats`)
    name: str = ""  #: in the study file; of its field where that has the same
    # What follows from the field.
    kind: Kind = "number"
    choices: tuple[str, ...] = ()  #: the allowed values of a "choice"
    of_block: bool = False  #: may be overridden in `[space.block1]`, ...
    of_dense: bool = False  #: may be overridden in `[space.dense1]`, ...

    def allows(self, value: object) -> bool:
        """Whether a configuration may hold `value`; a bool is not a number here."""
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
        """`value`, allowed, as this hyperparameter holds it: 0 and 0.0 mean the same rate."""
        return float(value) if self.kind == "number" else value


def whole(
    meaning: str, default: int, low: int = 1, high: int = 65_536, **rest: Any
) -> Hyperparameter:
    """A whole number."""
    # The bound keeps a slip of the keyboard from asking for terabytes.
    return Hyperparameter(meaning=meaning, default=default, low=low, high=high, **rest)


def rate(meaning: str, default: float = 0.0, **rest: Any) -> Hyperparameter:
    """A fraction below 1."""
    return Hyperparameter(meaning=meaning, default=default, high=1.0, open_high=True, **rest)


def penalty(meaning: str, **rest: Any) -> Hyperparameter:
    """The factor of a penalty, which is none by default."""
    return Hyperparameter(meaning=meaning, default=0.0, **rest)


def choice(meaning: str, default: str | bool, **rest: Any) -> Hyperparameter:
    """One of the words of its field's type, or true or false."""
    return Hyperparameter(meaning=meaning, default=default, **rest)


def declared_in(config: type) -> Iterator[Hyperparameter]:
    """The hyperparameters of a configuration's fields and of its layers', in their order."""
    for name, hint in get_type_hints(config, include_extras=True).items():
        for found in getattr(hint, "__metadata__", ()):
            kind, choices = _kind(hint.__origin__)
            yield dataclasses.replace(found, name=found.name or name, kind=kind, choices=choices)
        for part in get_args(getattr(hint, "__origin__", None)):
            if dataclasses.is_dataclass(part):
                yield from declared_in(part)  # type: ignore[arg-type]


def _kind(annotation: Any) -> tuple[Kind, tuple[str, ...]]:
    if get_origin(annotation) is Literal:
        return "choice", get_args(annotation)
    kinds: dict[Any, Kind] = {bool: "boolean", float: "number"}
    return kinds.get(annotation, "integer"), ()  # a tuple of layers is declared by their number
