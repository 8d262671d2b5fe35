"""Reading a TOML file of the user's: its document, `--set`, and where each mistake stands.

Why: `docs/decisions.md#why-toml-and-json-and-yaml-only-for-exports`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import Any

from tuner.artifacts import DEFAULT_STUDIES_FOLDER
from tuner.errors import Problem, SpecError
from tuner.spec import yaml_file
from tuner.spec.limits import (
    MAX_FILE_BYTES,
    MAX_LINE,
    TOO_DEEP,
    TOO_LONG,
    excess,
)
from tuner.spec.mistakes import KeyLocations, did_you_mean, shown
from tuner.spec.toml_lines import KeyPath, key_lines


def read_file(
    path: Path, overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], KeyLocations, list[Problem]]:
    """The file's document with `overrides` written into it, and what is wrong with those.

    Raises:
        SpecError: The file cannot be read, or is no TOML (by its suffix: JSON, YAML).
    """
    text = _read_text(path)
    exported = path.suffix.lower() in yaml_file.SUFFIXES
    document, lines = _parse_exported(text, path) if exported else _parse(text, path)
    problems: list[Problem] = []
    overridden: list[KeyPath] = []
    for override in overrides:
        try:
            overridden.append(_override(document, override))
        except _BadOverrideError as error:
            problems.append(error.problem)
    return document, KeyLocations(str(path), lines, overridden), problems


def _read_text(path: Path) -> str:
    """The file's text.

    Raises:
        SpecError: It cannot be read as text.
    """

    def fail(message: str, line: int | None = None) -> SpecError:
        return SpecError([Problem(file=str(path), line=line, key="", value="", message=message)])

    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise fail(f"there is no such file{_near_file(path)}") from error
    except IsADirectoryError as error:
        raise fail("is a folder; name a study file in it") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise fail(f"cannot be read ({reason}); check the path and its permissions") from error
    if len(content) > MAX_FILE_BYTES:
        raise fail(f"is larger than {MAX_FILE_BYTES} bytes: no study file; name another")
    try:
        # Editors on Windows put a byte order mark at the beginning, and some a second one.
        return content.decode("utf-8").lstrip("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise fail("is not UTF-8 text from here on; save the file as UTF-8", line) from error


def _near_file(path: Path) -> str:
    try:
        beside = [
            str(other)
            for folder in (path.parent, path.parent / DEFAULT_STUDIES_FOLDER)
            for other in folder.glob("*.toml")
            if other.name != "pyproject.toml"
        ]
    except OSError:
        beside = []
    near = did_you_mean(str(path), beside) or did_you_mean(f"{path}.toml", beside)
    if not beside:
        return "; there are no study files (`tuner init` copies the shipped ones into studies/)"
    return near or f"; there are {', '.join(sorted(beside))}"


#: What `tomllib` says, and what to do about it.
_SYNTAX_REMEDIES = (
    ("Invalid value", 'text stands in "quotes", true and false in small letters'),
    ("Cannot overwrite", "this key stands twice; remove one"),
    ("Cannot declare", "this table stands twice; join both"),
    ("Cannot mutate", "this table is complete where it stands; write the key into it"),
    ("Expected '='", 'a line is "key = value" or "[table]"'),
    ("Unclosed array", "a list ends with ]"),
    ("Unclosed inline table", "a table in braces stands on one line and ends with }"),
    ('Expected "\'"', "a text ends with the quotes that it began with"),
    ("Unterminated string", "a text ends with the quotes that it began with, on the same line"),
    ("Expected newline", "one key a line; text stands in quotes"),
    ("Illegal character", "text stands in quotes, on one line"),
    ("Found invalid character", "remove it"),
    ("Invalid statement", 'a line is "key = value" or "[table]"'),
    ("Invalid initial character", "a key is made of letters, digits, - and _"),
)


def _parse_exported(text: str, path: Path) -> tuple[dict[str, Any], Mapping[KeyPath, int]]:
    """The document of a JSON or YAML file, and its lines.

    Raises:
        SpecError: The syntax is wrong.
    """
    try:
        document, lines = yaml_file.parse(text, path.suffix.lower())
    except yaml_file.SyntaxMistakeError as error:
        raise _unreadable(path, str(error), error.line) from error
    if message := excess(document):
        raise _unreadable(path, message)
    return document, lines


def _parse(text: str, path: Path) -> tuple[dict[str, Any], Mapping[KeyPath, int]]:
    """The TOML document, and its lines.

    Raises:
        SpecError: The syntax is wrong; only the first mistake can be told.
    """
    lines = text.split("\n")
    if long := next((number for number, one in enumerate(lines, 1) if len(one) > MAX_LINE), None):
        raise _unreadable(path, TOO_LONG, long, lines[long - 1])
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r" ?\(at (?:line (\d+), column \d+|end of document)\)$", str(error))
        what = str(error)[: place.start()] if place else str(error)
        remedy = next((remedy for start, remedy in _SYNTAX_REMEDIES if what.startswith(start)), "")
        message = f"is not valid TOML: {what}" + (f"; {remedy}" if remedy else "")
        line = int(place[1] or text.rstrip().count("\n") + 1) if place else None
        value = lines[line - 1].strip() if line and line <= len(lines) else ""
        raise _unreadable(path, message, line, value) from error
    except RecursionError as error:
        raise _unreadable(path, TOO_DEEP) from error
    if too_much := excess(document):
        raise _unreadable(path, too_much)
    return document, key_lines(text)


def _unreadable(path: Path, message: str, line: int | None = None, value: str = "") -> SpecError:
    problem = Problem(file=str(path), line=line, key="", value=value[:60], message=message)
    return SpecError([problem])


# Overrides.


class _BadOverrideError(Exception):
    """An override that cannot be read."""

    def __init__(self, override: str, message: str) -> None:
        key, _, value = override.partition("=")
        at = f"--set {key.strip()}".rstrip()
        at, value = (text if len(text) <= 200 else f"{text[:196]} ..." for text in (at, value))
        self.problem = Problem(file="", line=None, key=at, value=value, message=message)
        super().__init__(message)


def _override(document: dict[str, Any], override: str) -> KeyPath:
    """Writes one `--set key=value` into `document`; the path of what it wrote."""
    key, equals, text = (part.strip() for part in override.partition("="))
    if len(override) > MAX_LINE:
        message = f"has more than {MAX_LINE:,} characters; write it into the study file"
        raise _BadOverrideError(override, message)
    if not equals or not key or not text or not key.isprintable():
        raise _BadOverrideError(override, "write --set key=value, as in --set data.split.seed=1")
    try:
        names = _single_path(tomllib.loads(f"{key} = 0"))
    except (ValueError, RecursionError) as error:
        message = "is no key; write it as in --set data.split.seed=1"
        raise _BadOverrideError(override, message) from error
    value = _override_value(override, text)
    at: Any = document
    path: KeyPath = ()
    for name in names[:-1]:
        path = (*path, _index_in(at, name, override))
        at = at.setdefault(name, {}) if isinstance(at, dict) else at[path[-1]]
        if not isinstance(at, dict | list):
            dotted = ".".join(map(str, path))
            message = f"{dotted} is {shown(at)}, no table; set {dotted} as a whole"
            raise _BadOverrideError(override, message)
    last = _index_in(at, names[-1], override)
    at[last] = value
    return (*path, last)


def _single_path(table: dict[str, Any]) -> list[str]:
    """The keys on the way to the one value of `table`; a ValueError where there are more."""
    names: list[str] = []
    at: Any = table
    while isinstance(at, dict):
        ((name, at),) = at.items()
        names.append(name)
    return names


def _index_in(container: dict[str, Any] | list[Any], name: str, override: str) -> str | int:
    if isinstance(container, dict):
        return name
    # Not int() alone: it reads other digits than ours, and of thousands of them none.
    if re.fullmatch("[0-9]{1,6}", name) and int(name) < len(container):
        return int(name)
    message = f"is a list of {len(container)}; name an element by its number, from 0"
    raise _BadOverrideError(override, message)


def _override_value(override: str, text: str) -> Any:
    """The TOML value, or the text itself where it is none: `training.precision=bfloat16`."""
    try:
        table = tomllib.loads(f"value = {text}")
        if too_much := excess(table):
            raise _BadOverrideError(override, too_much)
    except (ValueError, RecursionError) as error:
        if text[0] in "[{\"'" or not text.isprintable():
            message = f"{shown(text)} is no TOML value: {str(error).partition(' (at')[0]}"
            raise _BadOverrideError(override, message) from error
        return text
    value = table.pop("value")
    if table:
        raise _BadOverrideError(override, "one key and one value each; write --set once more")
    # A study may be named 2026-01-31: no key takes a date.
    return text if isinstance(value, date | time) else value
