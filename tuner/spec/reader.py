"""Reads a study file into a `StudySpec`, or says every mistake in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import (
    ValidationError,
)
from pydantic_core import ErrorDetails

from tuner.errors import SpecError
from tuner.spec.architecture import KEYS
from tuner.spec.document import read_file
from tuner.spec.limits import excess, odd_text
from tuner.spec.mistakes import (
    KeyLocations,
    Mistake,
    did_you_mean,
    one_of,
    shown,
    without_the_quotes,
)
from tuner.spec.spec import (
    NOTIFY_VARIABLE,
    ColumnSettings,
    DataSettings,
    FastaPair,
    FoldColumn,
    HyperbandSettings,
    NotifySettings,
    SamplerSettings,
    Settings,
    SplitFiles,
    SplitSettings,
    StopSettings,
    StudySpec,
    TrainingSettings,
)
from tuner.spec.tables import LENGTH_KEYS, check_lengths, read_known, read_space
from tuner.spec.toml_lines import KeyPath


def load_spec(path: Path, overrides: Sequence[str] = ()) -> StudySpec:
    """The study file at `path`.

    Args:
        path: A TOML file; an exported one may be JSON or YAML, by its suffix.
        overrides: What `--set` was given: "key=value", the value as TOML ("data.split.seed=1",
            "space.filters={ choices = [16, 32] }"); what is no TOML value is text. Later ones
            win, and a table replaces a table.

    Raises:
        SpecError: With all mistakes of the file and the overrides.
    """
    document, locations, problems = read_file(path, overrides)
    spec, mistakes = _check(document, path.parent.absolute())
    found = map(locations.problem, mistakes)
    problems += sorted(found, key=lambda problem: (problem.line is None, problem.line))
    if problems or spec is None:
        raise SpecError(problems)
    return spec


def spec_from_document(document: Mapping[str, Any], *, folder: Path = Path()) -> StudySpec:
    """The spec behind `StudySpec.to_document`.

    Raises:
        SpecError: With all mistakes.
    """
    spec, mistakes = _check(document, folder)
    if spec is None:
        raise SpecError([KeyLocations("", {}, ()).problem(mistake) for mistake in mistakes])
    return spec


_EXAMPLES = {
    "name": 'name = "my-study"',
    "trials": "trials = 20",
    "data": '[data] with source = "solubility"',
    "source": 'source = "solubility"',
    "soluble": 'soluble = "soluble.fasta"',
    "insoluble": 'insoluble = "insoluble.fasta"',
}

#: Which keys stand in which table ("": at the top of the file).
_TABLES: Mapping[str, tuple[str, ...]] = {
    "": (*Settings.model_fields, "space", "known"),
    "data": tuple(DataSettings.model_fields),
    "data.split": tuple(SplitSettings.model_fields),
    "data.split.folds": tuple(FoldColumn.model_fields),
    "data.source": (*FastaPair.model_fields, *SplitFiles.model_fields),
    "data.columns": tuple(ColumnSettings.model_fields),
    "training": tuple(TrainingSettings.model_fields),
    "hyperband": tuple(HyperbandSettings.model_fields),
    "sampler": tuple(SamplerSettings.model_fields),
    "stop": tuple(StopSettings.model_fields),
    "notify": tuple(NotifySettings.model_fields),
    "space": tuple(KEYS),
}


def _check(document: Mapping[str, Any], folder: Path) -> tuple[StudySpec | None, Sequence[Mistake]]:
    """The spec, or None and what is wrong."""
    if message := excess(document):
        return None, [Mistake(path=(), value=None, message=message)]
    odd = [
        Mistake(path=path, value=value, message=text) for path, value, text in odd_text(document)
    ]
    if odd:
        return None, odd
    mistakes: list[Mistake] = []
    settings = None
    try:
        settings = Settings.model_validate(
            {key: value for key, value in document.items() if key not in ("space", "known")}
        )
    except ValidationError as error:
        mistakes += [_mistake(details) for details in error.errors(include_url=False)]
    mistakes += _check_hyperband(document, mistakes)
    in_space: list[Mistake] = []
    space = read_space(document.get("space", {}), in_space)
    mistaken = KEYS.keys() & {name for mistake in in_space for name in mistake.path}
    max_length = _valid(document, ("data", "max_length"), mistakes, DataSettings)
    if isinstance(max_length, int) and not mistaken & set(LENGTH_KEYS):
        check_lengths(space, max_length, in_space)
    mistakes += [_with_home(mistake) for mistake in in_space]
    known = read_known(document.get("known", []), space, mistakes, mistaken)
    if mistakes or settings is None:
        return None, mistakes
    given = {key: getattr(settings, key) for key in settings.model_fields_set}
    return StudySpec(**given, space=space, known=known, folder=folder), ()


def _valid(
    document: Mapping[str, Any], path: tuple[str, str], mistakes: Sequence[Mistake], table: Any
) -> Any:
    """The value at `path`, or its default; None where it is mistaken."""
    if any(mistake.path in (path[:1], path) for mistake in mistakes):
        return None
    return (document.get(path[0]) or {}).get(path[1], table.model_fields[path[1]].default)


def _check_hyperband(document: Mapping[str, Any], mistakes: Sequence[Mistake]) -> Iterator[Mistake]:
    if document.get("hyperband") is None:
        return
    min_epochs = _valid(document, ("hyperband", "min_epochs"), mistakes, HyperbandSettings)
    max_epochs = _valid(document, ("training", "max_epochs"), mistakes, TrainingSettings)
    if min_epochs is not None and max_epochs is not None and min_epochs > max_epochs:
        yield Mistake(
            path=("hyperband", "min_epochs"),
            value=min_epochs,
            message=f"min_epochs = {min_epochs} is above training.max_epochs = {max_epochs}, so "
            "there is no bracket; lower the one or raise the other",
            also=(("training", "max_epochs"),),
        )


def _mistake(error: ErrorDetails) -> Mistake:
    path = error["loc"]
    for union in (("data", "source"), ("data", "split", "folds")):
        if path[: len(union)] == union:  # without pydantic's tag of the union
            path = (*union, *path[len(union) + 1 :])
    # The URL of a webhook may hold a token: it is not repeated, wherever it stands.
    is_shown = error["type"] != "missing" and path[:1] != ("notify",)
    value = error["input"] if is_shown else None
    context = error.get("ctx", {})
    also = tuple((*path, key) for key in str(context.get("keys", "")).split())
    return Mistake(path=path, value=value, message=_message(error, path), also=also)


def _message(error: ErrorDetails, path: KeyPath) -> str:
    """What pydantic found, in our words: what must be, what is, what to write."""
    value, context, key = error["input"], error.get("ctx", {}), str(path[-1])
    if error["type"] == "mistake":
        return str(context["message"])
    if error["type"] == "missing":
        return f"is missing; write {_EXAMPLES.get(key, f'{key} = ...')}"
    if error["type"] == "extra_forbidden":
        return _unknown_key(path)
    if error["type"] == "literal_error":
        return one_of(re.findall("'([^']*)'", context["expected"]), value)
    what = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "text in quotes",
        "list_type": "a list",
        "model_type": f"a table ([{'.'.join(map(str, path))}])",
        "greater_than_equal": f"at least {context.get('ge')}",
        "greater_than": f"above {context.get('gt')}",
        "less_than_equal": f"at most {context.get('le')}",
        "less_than": f"below {context.get('lt')}",
    }.get(error["type"])
    if what is None:
        return f"{error['msg']}, not {shown(value)}"
    if key == "patience" and error["type"] == "int_type":
        what += ' or "none"'
    return f"must be {what}, not {shown(value)}{without_the_quotes(value)}"


def _unknown_key(path: KeyPath) -> str:
    table, name = ".".join(map(str, path[:-1])), str(path[-1])
    if (table, name) == ("notify", "url"):
        return (
            "a study file is stored, shown and exported, so it names no URL, which may hold a "
            f"token; set the environment variable {NOTIFY_VARIABLE}, or name another with url_env"
        )
    where = f" in [{table}]" if table else ""
    if home := _home(name, table):
        return f"unknown key {shown(name)}{where}; it belongs {home}"
    known = _TABLES[table]
    near = did_you_mean(name, known) or f"; known are {', '.join(known)}"
    return f"unknown key {shown(name)}{where}{near}"


def _home(name: str, table: str) -> str:
    """Where a key belongs that stands in the wrong table; '' where it is known nowhere else."""
    for other, keys in _TABLES.items():
        if name in keys and other != table:
            return f"in [{other}]" if other else "at the top of the file, before the first [table]"
    return ""


def _with_home(mistake: Mistake) -> Mistake:
    """The mistake; a key that TOML counts to [space] because it stands below it is sent home."""
    if len(mistake.path) != 2 or not mistake.message.startswith("unknown key"):
        return mistake
    name = str(mistake.path[1])
    home = _home(name, "space")
    message = f"unknown key {shown(name)} in [space]; it belongs {home}"
    return replace(mistake, message=message) if home else mistake
