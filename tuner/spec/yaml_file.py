"""Study files that `tuner export` wrote as JSON or YAML: their document, and the lines of keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import yaml

from tuner.spec.limits import (
    MAX_DEPTH,
    MAX_KEYS,
    MAX_VALUES,
    TOO_DEEP,
    TOO_MANY_DIGITS,
    TOO_MANY_KEYS,
    TOO_MANY_VALUES,
)
from tuner.spec.mistakes import shown
from tuner.spec.toml_lines import KeyPath

SUFFIXES = (".json", ".yaml", ".yml")

#: libyaml's, where PyYAML has it: thirty times as fast.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
#: Whole numbers that mean the same to every reader: 010 is 8 to YAML 1.1, and 1:30 is 90.
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x_*[0-9a-fA-F][0-9a-fA-F_]*|0b_*[01][01_]*)")


class SyntaxMistakeError(ValueError):
    """The text is no JSON or YAML, or not what a study file may be."""

    def __init__(self, message: str, line: int | None) -> None:
        self.line = line
        super().__init__(message)


def parse(text: str, suffix: str) -> tuple[dict[str, Any], Mapping[KeyPath, int]]:
    """The document of a text, and the line, from 1, of each key and list element of YAML.

    Args:
        text: The content of a file.
        suffix: The file's, which names the format.

    Raises:
        SyntaxMistakeError: With the line where one is known. A document that exceeds a limit of
            `tuner.spec.limits` is refused before anything is built of it.
    """
    document, lines = _parse_json(text) if suffix == ".json" else _parse_yaml(text)
    if not isinstance(document, dict):
        raise SyntaxMistakeError("holds no keys; a study file begins with name = ...", None)
    return document, lines


# JSON.


def _parse_json(text: str) -> tuple[Any, Mapping[KeyPath, int]]:
    def constant(name: str) -> NoReturn:
        line = text.count("\n", 0, text.find(name)) + 1
        raise SyntaxMistakeError(f"is not valid JSON: {name}; write a number", line)

    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=constant), {}
    except json.JSONDecodeError as error:
        raise SyntaxMistakeError(f"is not valid JSON: {error.msg}", error.lineno) from error
    except RecursionError as error:
        raise SyntaxMistakeError(TOO_DEEP, None) from error
    except SyntaxMistakeError:
        raise
    except ValueError as error:  # of int()
        raise SyntaxMistakeError(TOO_MANY_DIGITS, None) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise SyntaxMistakeError(f"the key {shown(key)} stands twice; remove one", None)
        table[key] = value
    return table


# YAML.


def _parse_yaml(text: str) -> tuple[Any, Mapping[KeyPath, int]]:
    lines: dict[KeyPath, int] = {}
    try:
        _check_events(text)
        root = yaml.compose(text, Loader=_Loader)
        return (None if root is None else _value(root, (), lines)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = error.problem or error.context or "it cannot be read"
        line = None if mark is None else mark.line + 1
        raise SyntaxMistakeError(f"is not valid YAML: {what}", line) from error
    except yaml.reader.ReaderError as error:
        code = error.character if isinstance(error.character, int) else ord(error.character)
        message = f"is not valid YAML: the character U+{code:04X} is not allowed; remove it"
        raise SyntaxMistakeError(message, None) from error
    except yaml.YAMLError as error:
        raise SyntaxMistakeError(f"is not valid YAML: {error}", None) from error
    except SyntaxMistakeError:
        raise
    except ValueError as error:  # a %YAML directive or an escape out of range
        what = str(error).partition("\n")[0]
        raise SyntaxMistakeError(f"is not valid YAML: {what}", None) from error


def _check_events(text: str) -> None:
    """Refuses what no export holds, before anything nested is built.

    Raises:
        SyntaxMistakeError: It is nested too deeply, has too many values, a tag, an alias (with
            which a short file can mean a very long one), or a second document.
        yaml.YAMLError: The syntax is wrong.
    """
    depth = values = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth -= isinstance(event, yaml.CollectionEndEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        values += isinstance(event, yaml.NodeEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            what = "holds more than one document; a study file is one: remove what follows ---"
        elif depth > MAX_DEPTH:
            what = TOO_DEEP
        elif values > 2 * MAX_VALUES:  # keys count here, too
            what = TOO_MANY_VALUES
        elif tag := getattr(event, "tag", None):
            what = f"has the tag {shown(tag)}; remove it, and write text in quotes"
        elif isinstance(event, yaml.AliasEvent):
            what = f"has the alias *{event.anchor}; write the value out"
        else:
            continue
        raise SyntaxMistakeError(what, event.start_mark.line + 1 if event.start_mark else None)


def _value(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    """What a node stands for; notes the lines of its keys and elements."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[*path, index] = item.start_mark.line + 1
        return [_value(item, (*path, index), lines) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        _refuse_surprises(node)
        return yaml.SafeLoader("").construct_object(node)
    if len(node.value) > MAX_KEYS:
        raise SyntaxMistakeError(TOO_MANY_KEYS, node.start_mark.line + 1)
    table: dict[str, Any] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag != f"{_TAG}str":
            what = f"the key {shown(key.value)} is" if key.id == "scalar" else "a key is"
            raise SyntaxMistakeError(f"{what} not text; write it in quotes", line)
        if key.value in table:
            raise SyntaxMistakeError(f"the key {shown(key.value)} stands twice; remove one", line)
        lines[*path, key.value] = line
        table[key.value] = _value(value, (*path, key.value), lines)
    return table


def _refuse_surprises(node: yaml.ScalarNode) -> None:
    """Lets no value through that YAML 1.1 takes for what its writer did not mean.

    Raises:
        SyntaxMistakeError: It is such a value.
    """
    kind = node.tag.removeprefix(_TAG)
    if kind == "timestamp":
        message = f"{shown(node.value)} is a date in YAML; write it in quotes"
    elif kind == "int" and len(node.value) > 4300:
        message = TOO_MANY_DIGITS
    elif (kind == "int" and not _INTEGER.fullmatch(node.value)) or (
        kind == "float" and ":" in node.value
    ):
        message = (
            f"{shown(node.value)} is a number to another base in YAML; write it without leading "
            "zeros and colons, or as text in quotes"
        )
    else:
        return
    raise SyntaxMistakeError(message, node.start_mark.line + 1)
