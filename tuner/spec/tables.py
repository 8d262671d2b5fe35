"""The tables `[space]` and `[[known]]` of a study file, read with every mistake noted."""

from __future__ import annotations

import decimal
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from tuner.spec.architecture import KEYS, ModelConfig, misfits
from tuner.spec.bounds import tightest
from tuner.spec.hyperparameter import GREATEST, Hyperparameter, ParameterValue
from tuner.spec.limits import MAX_MISTAKES
from tuner.spec.mistakes import (
    Mistake,
    did_you_mean,
    one_of,
    same_value,
    shown,
    toml_value,
    without_the_quotes,
)
from tuner.spec.space import (
    BLOCK_KEYS,
    Choices,
    Dimension,
    Entry,
    Floats,
    Integers,
    SearchSpace,
    layer_keys,
    layer_number,
)
from tuner.spec.toml_lines import KeyPath


def read_space(table: object, mistakes: list[Mistake]) -> SearchSpace:
    """The space of a `[space]` table; where a key is mistaken, its default stands in."""
    if not isinstance(table, Mapping):
        mistakes.append(
            Mistake(
                path=("space",),
                value=table,
                message=f"must be a table ([space] with its keys below), not {shown(table)}",
            )
        )
        return SearchSpace.of({})
    entries: dict[str, Entry] = {}
    for name, value in table.items():
        path = ("space", name)
        if name in KEYS:
            if (entry := _read_entry(KEYS[name], value, path, mistakes)) is not None:
                entries[name] = entry
        elif layer_keys(name):
            _read_layer(entries, name, value, path, mistakes)
        else:
            mistakes.append(Mistake(path=path, value=value, message=_unknown_in_space(name)))
    space = SearchSpace.of(entries)
    mistaken = {mistake.path[:2] for mistake in mistakes}
    _check_layers_exist(table, space, mistaken, mistakes)
    return space


def _read_layer(
    entries: dict[str, Entry], layer: str, table: object, path: KeyPath, mistakes: list[Mistake]
) -> None:
    if not isinstance(table, Mapping):
        message = f"must be a table, such as {{ {layer_keys(layer)[0]} = ... }}, not {shown(table)}"
        mistakes.append(Mistake(path=path, value=table, message=message))
        return
    for name, value in table.items():
        if name in layer_keys(layer):
            if (entry := _read_entry(KEYS[name], value, (*path, name), mistakes)) is not None:
                entries[f"{layer}.{name}"] = entry
        else:
            message = _unknown_in_layer(layer, name)
            mistakes.append(Mistake(path=(*path, name), value=value, message=message))


def _check_layers_exist(
    table: Mapping[str, Any],
    space: SearchSpace,
    mistaken: set[KeyPath],
    mistakes: list[Mistake],
) -> None:
    for count, layer_kind in (("blocks", "block"), ("dense_layers", "dense")):
        if ("space", count) in mistaken:
            continue
        most = space.most(count)
        mistakes += [
            Mistake(
                path=("space", layer),
                value=table[layer],
                message=f"{count} can be at most {most}, so there is no {layer}; "
                f"remove this table or raise {count}",
                also=(("space", count),),
            )
            for layer in table
            if layer.startswith(layer_kind) and layer_number(layer) > most
        ]


def _unknown_in_space(name: str) -> str:
    if re.fullmatch(r"(block|dense)0\d*", name):
        return f"unknown key {shown(name)}; blocks and dense layers are counted from 1"
    layers = ("block1", "block2", "block3", "dense1", "dense2", "output")
    near = did_you_mean(name, [*KEYS, *layers])
    return f"unknown key {shown(name)} in [space]{near or _list_of(KEYS)}"


def _unknown_in_layer(layer: str, name: str) -> str:
    known = layer_keys(layer)
    if near := did_you_mean(name, known):
        return f"unknown key {shown(name)} in [space.{layer}]{near}"
    if name not in KEYS:
        return f"unknown key {shown(name)} in [space.{layer}]{_list_of(known)}"
    if KEYS[name].of_block or KEYS[name].of_dense:
        place = (
            "blocks ([space.block1])" if KEYS[name].of_block else "dense layers ([space.dense1])"
        )
        return f"{name} belongs to {place}, not to [space.{layer}]"
    return f"{name} is one for the whole network: write it in [space], not in [space.{layer}]"


def _list_of(known: Iterable[str]) -> str:
    return f"; known are {', '.join(known)}"


def _read_entry(
    key: Hyperparameter, value: object, path: KeyPath, mistakes: list[Mistake]
) -> Entry | None:
    """What stands behind a key: a bare value, a range, choices; None where it is mistaken."""

    def mistaken(message: str, at: KeyPath = (), what: object = value) -> None:
        mistakes.append(Mistake(path=(*path, *at), value=what, message=message))

    if isinstance(value, list):
        mistaken(f"a searched value is a table: write {{ choices = {shown(value)} }}")
    elif not isinstance(value, Mapping):
        if key.allows(value):
            return value  # type: ignore[return-value]  # allowed values are of these types
        mistaken(must_be(key, value))
    elif "choices" in value:
        return _read_choices(key, value, path, mistakes)
    else:
        return _read_range(key, value, path, mistakes)
    return None


def _read_choices(
    key: Hyperparameter, table: Mapping[str, Any], path: KeyPath, mistakes: list[Mistake]
) -> Choices | None:
    before = len(mistakes)
    for name in table.keys() - {"choices"}:
        message = f"choices stand alone: remove {shown(name)}, or write a range without choices"
        mistakes.append(Mistake(path=(*path, name), value=table[name], message=message))
    choices, path = table["choices"], (*path, "choices")
    if not isinstance(choices, list) or not choices:
        message = f"must be a list of at least one value, not {shown(choices)}"
        mistakes.append(Mistake(path=path, value=choices, message=message))
        return None
    # As `same_value` compares, but not each with each: a file may list thousands.
    seen: dict[tuple[bool, ParameterValue], ParameterValue] = {}
    for index, choice in enumerate(choices):
        if not key.allows(choice):
            message = must_be(key, choice)
        elif (isinstance(choice, bool), choice) in seen:
            message = f"{shown(choice)} stands twice; remove one"
        else:
            seen[isinstance(choice, bool), choice] = choice
            continue
        mistakes.append(Mistake(path=(*path, index), value=choice, message=message))
        if _enough(mistakes, path):
            break
    return Choices(choices=tuple(seen.values())) if len(mistakes) == before else None


def _enough(mistakes: list[Mistake], path: KeyPath) -> bool:
    """Whether a list has more mistakes than anybody reads at once; then says that it is so."""
    if len(mistakes) < MAX_MISTAKES:
        return False
    message = f"{MAX_MISTAKES} mistakes were found up to here; correct them first"
    mistakes.append(Mistake(path=path, value=None, message=message))
    return True


_RANGE_KEYS = ("low", "high", "step", "log")
_MAX_STEPS = 10_000_000  #: with more of them a float no longer tells one step from the next


def _read_range(
    key: Hyperparameter, table: Mapping[str, Any], path: KeyPath, mistakes: list[Mistake]
) -> Dimension | None:
    found: list[Mistake] = []

    def mistaken(name: str, message: str) -> None:
        at = (*path, name) if name in table else path
        also = () if name in table else tuple((*path, other) for other in table)
        found.append(Mistake(path=at, value=table.get(name, table), message=message, also=also))

    for name in table:
        if name not in _RANGE_KEYS:
            known = (*_RANGE_KEYS, "choices")
            near = did_you_mean(name, known) or _list_of(known)
            mistaken(name, f"unknown key {shown(name)} in the range of {key.name}{near}")
    if key.kind in ("boolean", "choice"):
        every: Sequence[object] = key.choices or (True, False)
        mistaken(
            "", f"{key.name} is no number: write {{ choices = {toml_value(every)} }} or a value"
        )
    elif not table.keys() & {"low", "high"}:
        mistaken("", "a searched value is { low = ..., high = ... } or { choices = [...] }")
    else:
        for name in ("low", "high"):
            if name not in table:
                mistaken(name, f"a range needs {name}: write {{ low = ..., high = ... }}")
            elif not key.allows(table[name]):
                mistaken(name, must_be(key, table[name]))
        _check_step_and_log(key, table, mistaken_at=mistaken)
    mistakes += found
    if found:
        return None
    low, high, step, log = table["low"], table["high"], table.get("step"), table.get("log", False)
    if low > high:
        message = f"low = {low} is above high = {high}; exchange them"
    elif log and low <= 0:
        message = f"log needs low above 0, not {low}; raise low or remove log"
    elif step is not None and (advice := _step_misfit(low, high, step)):
        message = advice
    elif key.kind == "integer":
        return Integers(low=low, high=high, step=1 if step is None else step, log=log)
    else:
        return Floats(
            low=float(low), high=float(high), step=None if step is None else float(step), log=log
        )
    also = tuple((*path, name) for name in table)
    mistakes.append(Mistake(path=path, value=table, message=message, also=also))
    return None


def _check_step_and_log(key: Hyperparameter, table: Mapping[str, Any], *, mistaken_at: Any) -> None:
    if "log" in table and not isinstance(table["log"], bool):
        mistaken_at("log", f"must be true or false, not {shown(table['log'])}")
    if "step" not in table:
        return
    step = table["step"]
    number = int if key.kind == "integer" else int | float
    if isinstance(step, bool) or not isinstance(step, number) or not 0 < step <= key.high:
        what = "a whole number of at least 1" if key.kind == "integer" else "a number above 0"
        mistaken_at("step", f"must be {what} and at most {int(key.high)}, not {shown(step)}")
    elif table.get("log") is True and not (key.kind == "integer" and step == 1):
        mistaken_at("step", "a logarithmic range has no step; remove step or log")


def _step_misfit(low: float, high: float, step: float) -> str:
    """What to say where steps from `low` do not meet `high`; '' where they do."""
    # Decimal, so that 0.3 is three steps of 0.1; with as many digits as floats can lie apart.
    with decimal.localcontext(prec=1000):
        first, last, width = (Decimal(str(value)) for value in (low, high, step))
        steps, rest = divmod(last - first, width)
        if steps > _MAX_STEPS:
            return (
                f"there are more than {_MAX_STEPS:,} steps of {step} from low = {low} to high = "
                f"{high}; raise step, or leave it out for any value"
            )
        if not rest:
            return ""
        below, above = (
            int(end) if end == int(end) else float(end)
            for end in (first + steps * width, first + (steps + 1) * width)
        )
        return (
            f"steps of {step} from low = {low} do not meet high = {high}; "
            f"write high = {below} or high = {above}"
        )


def must_be(key: Hyperparameter, value: object) -> str:
    """What to say of a value that `key` does not allow."""
    if key.kind == "choice":
        return one_of(key.choices, value)
    if key.kind == "boolean":
        what = "true or false"
    else:
        what = "a whole number" if key.kind == "integer" else "a number"
        what += f" above {key.low:g}" if key.open_low else f" of at least {key.low:g}"
        what += f" and below {key.high:g}" if key.open_high else f" and at most {int(key.high)}"
    return f"must be {what}, not {shown(value)}{without_the_quotes(value)}"


# Known configurations.


def read_known(
    tables: object, space: SearchSpace, mistakes: list[Mistake], mistaken: Set[str] = frozenset()
) -> tuple[Mapping[str, ParameterValue], ...]:
    """The `[[known]]` configurations, each with a value for every parameter it samples.

    Args:
        tables: What stands behind `known`.
        space: Where their values must lie.
        mistakes: Gets what is wrong.
        mistaken: Keys that `space` has wrong: what it says of them, and where a count is among
            them of what exists, is not held against a configuration.
    """
    if not isinstance(tables, list):
        message = f"must be a list of tables ([[known]]), not {shown(tables)}"
        mistakes.append(Mistake(path=("known",), value=tables, message=message))
        return ()
    read: list[Mapping[str, ParameterValue]] = []
    first: dict[frozenset[tuple[str, ParameterValue]], int] = {}  # a file may list thousands
    for index, table in enumerate(tables):
        path = ("known", index)
        if not isinstance(table, Mapping):
            message = f"must be a table, such as {{ learning_rate = 1e-3 }}, not {shown(table)}"
            mistakes.append(Mistake(path=path, value=table, message=message))
            continue
        if _enough(mistakes, path):
            break
        before = len(mistakes)
        configuration = _read_configuration(table, path, space, mistakes, mistaken=mistaken)
        earlier = first.setdefault(frozenset(configuration.items()), len(read))
        if earlier < len(read) and len(mistakes) == before:
            message = f"known configuration {index + 1} is the same as {earlier + 1}; remove one"
            mistakes.append(Mistake(path=path, value=table, message=message))
        read.append(configuration)
    return tuple(read)


#: Keys that decide which blocks and layers exist.
_COUNTS = frozenset(("blocks", "dense_layers"))


@dataclass(frozen=True, slots=True)
class _Named:
    """A value that a known configuration names."""

    path: KeyPath  #: where it is named
    value: ParameterValue  #: one that its hyperparameter allows


def _read_configuration(
    table: Mapping[str, Any],
    path: KeyPath,
    space: SearchSpace,
    mistakes: list[Mistake],
    *,
    mistaken: Set[str],
) -> Mapping[str, ParameterValue]:
    before = len(mistakes)
    named = {
        name: value
        for name, value in _names(table, path, space, mistakes).items()
        if name.rpartition(".")[2] not in mistaken
    }
    unsure = mistaken | {str(mistake.path[-1]) for mistake in mistakes[before:]}
    counts_are_known = not unsure & _COUNTS
    used: set[str] = set()
    outside: set[str] = set()
    configuration: dict[str, ParameterValue] = {}

    def pick(name: str, dimension: Dimension) -> ParameterValue:
        nonlocal counts_are_known
        # A shared name speaks for every block that is not named itself.
        by = name if name in named else name.rpartition(".")[2]
        value = dimension.middle
        if by in named:
            used.add(by)
            if dimension.contains(named[by].value):
                value = named[by].value
                value = float(value) if isinstance(dimension, Floats) else value
            else:
                counts_are_known &= by not in _COUNTS
                if by not in outside:
                    outside.add(by)
                    where = f"{name} is searched in" if name != by else "it is searched in"
                    message = f"{shown(named[by].value)} is not in the space: {where} {dimension}"
                    mistakes.append(
                        Mistake(path=named[by].path, value=named[by].value, message=message)
                    )
        configuration[name] = value
        return value

    config = space.resolve_with(pick)
    if counts_are_known:
        unused = [name for name in named if name not in used]
        mistakes += [
            Mistake(path=named[name].path, value=named[name].value, message=message)
            for name in unused
            if (message := _unused(name, named, space, config))
        ]
    return configuration


def _names(
    table: Mapping[str, Any], path: KeyPath, space: SearchSpace, mistakes: list[Mistake]
) -> dict[str, _Named]:
    """What `table` names, by dotted name: `block1.kernel_size` may be nested or one quoted key."""
    flat: dict[str, tuple[KeyPath, Any]] = {}
    for name, value in table.items():
        if isinstance(value, Mapping) and name not in KEYS:
            flat |= {f"{name}.{key}": ((*path, name, key), item) for key, item in value.items()}
        else:
            flat[name] = ((*path, name), value)
    named: dict[str, _Named] = {}
    for name, (at, value) in flat.items():
        layer, _, key = name.rpartition(".")
        if key not in (layer_keys(layer) if layer else KEYS):
            near = did_you_mean(name, [*space.parameters, *KEYS])
            message = f"unknown hyperparameter {shown(name)}{near or _list_of(KEYS)}"
        elif isinstance(value, Mapping | list):
            message = f"a known configuration has bare values, not {shown(value)}"
        elif not KEYS[key].allows(value):
            message = must_be(KEYS[key], value)
        else:
            named[name] = _Named(at, value)
            continue
        mistakes.append(Mistake(path=at, value=value, message=message))
    return named


def _unused(name: str, named: Mapping[str, _Named], space: SearchSpace, config: ModelConfig) -> str:
    """Why a named value has no effect on `config`; '' where it says what is fixed anyhow."""
    value = named[name].value
    layer, _, key = name.rpartition(".")
    counts = {"block": ("blocks", len(config.blocks)), "dense": ("dense_layers", len(config.dense))}
    kind = layer.rstrip("0123456789")
    if kind in counts:
        count, number = counts[kind]
        if layer_number(layer) > number:
            can_be = layer_number(layer) <= space.most(count)
            remedy = f"name {count} = {layer_number(layer)}, or remove" if can_be else "remove"
            return (
                f"{layer} does not exist where {count} = {number}, as in this configuration; "
                f"{remedy} {name}"
            )
    entries = dict(space.entries)
    entry = entries[name] if name in entries else entries[key]
    if not isinstance(entry, Integers | Floats | Choices):
        if same_value(entry, KEYS[key].typed(value)):
            return ""
        return (
            f"{key} is fixed at {shown(entry)} in [space], not {shown(value)}; remove it here, or "
            "search it there"
        )
    if layer:
        return (
            f"{key} is one parameter for all layers: name {key}, or give [space.{layer}] a "
            f"{key} of its own"
        )
    layers = [f"block{n}" for n in range(1, len(config.blocks) + 1) if KEYS[key].of_block]
    layers += [f"dense{n}" for n in range(1, len(config.dense) + 1) if KEYS[key].of_dense]
    if not layers:
        return "there is no hidden dense layer where dense_layers = 0; remove it"
    # A shared name that no layer took: each is named itself, or fixed.
    for fixed in (f"{layer}.{key}" for layer in layers if f"{layer}.{key}" not in named):
        if not same_value(entries[fixed], KEYS[key].typed(value)):
            return f"{fixed} is fixed at {shown(entries[fixed])} in [space]; remove {key} here"
    return ""


# Lengths.


#: What decides how many positions are left, and what of it is lowered to have more.
LENGTH_KEYS = tuple(name for name, one in KEYS.items() if one.shortens is not None)
_LOWERED = [name for name in LENGTH_KEYS if KEYS[name].shortens == GREATEST]


def check_lengths(space: SearchSpace, max_length: int, mistakes: list[Mistake]) -> None:
    """Notes where some configuration has a kernel or pooling longer than what is left for it."""
    config = tightest(space)
    entries = dict(space.entries)
    stacked = config.arrangement == "stacked"
    for misfit in misfits(config, max_length):
        own = f"block{misfit.block}.{misfit.key}"
        path = ("space", *own.split(".")) if own in entries else ("space", misfit.key)
        left = f"{misfit.positions} position{'s' * (misfit.positions != 1)}"
        if (stacked and misfit.block > 1) or misfit.key == "pool_size":
            left += f" left of data.max_length = {max_length}"
        combination = [
            f"block {number}: "
            + ", ".join(
                f"{key} = {toml_value(getattr(block, key))}"
                for key in LENGTH_KEYS
                if key in BLOCK_KEYS
            )
            for number, block in enumerate(config.blocks[: misfit.block], start=1)
            if stacked or number == misfit.block
        ]
        if misfit.key == "kernel_size":
            trouble = f"a kernel of {misfit.span} positions in block {misfit.block} is longer than"
        else:
            trouble = f"a pool_size of {misfit.size} in block {misfit.block} leaves nothing of"
        mistakes.append(
            Mistake(
                path=path,
                value=misfit.size,
                message=f"{trouble} the {left} ({'; '.join(combination)}); "
                f"lower {', '.join(_LOWERED[:-1])} or {_LOWERED[-1]}, or raise data.max_length",
                also=(("data", "max_length"), *(("space", key) for key in LENGTH_KEYS)),
            )
        )
