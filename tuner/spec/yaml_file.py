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
    line_of_many_digits,
)
from tuner.spec.toml_lines import KeyPath

SUFFIXES = (".json", ".yaml", ".yml")

#: libyaml's, where PyYAML has it: thirty times as fast.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
#: Whole numbers that mean the same to every reader: 010 is 8 to YAML 1.1, and 1:30 is 90.
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x_*[0-9a-fA-F][0-9a-fA-F_]*|0b_*[01][01_]*)")
#: What JSON allows between and in its values, and YAML does not, or counts as the end of a line.
_AS_YAML = str.maketrans("\t\x85\u2028\u2029", "    ")
#: JSON spells a letter beyond U+FFFF as two escapes, neither of which YAML allows.
_HALVES = re.compile(r"\\\\|\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


class SyntaxMistakeError(ValueError):
    """The text is no JSON or YAML, or not what a study file may be."""

    def __init__(self, message: str, line: int | None) -> None:
        self.line = line
        super().__init__(message)


def parse(text: str, suffix: str) -> tuple[dict[str, Any], Mapping[KeyPath, int]]:
    """The document of a text, and the line, from 1, of each key and list element.

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


def reads_as_text(number: str) -> bool:
    """Whether YAML takes an unquoted number for text, as PyYAML does with 1e-3 (but not 1.0e-3)."""
    return number.isascii() and isinstance(yaml.safe_load(number.strip()), str)


def written(number: float) -> str:
    """A number as YAML has it: 1.0e-05."""
    return yaml.safe_dump(number).partition("\n")[0]


# JSON.


class _KeyTwiceError(Exception):
    """A JSON object has a key twice."""


def _parse_json(text: str) -> tuple[Any, Mapping[KeyPath, int]]:
    def constant(name: str) -> NoReturn:
        line = text.count("\n", 0, text.find(name)) + 1
        raise SyntaxMistakeError(f"is not valid JSON: {name}; write a number", line)

    try:
        document = json.loads(text, object_pairs_hook=_object, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise SyntaxMistakeError(f"is not valid JSON: {error.msg}", error.lineno) from error
    except _KeyTwiceError as error:
        _lines_of_json(text)  # knows the line, in all but odd texts
        raise SyntaxMistakeError(f"{error}; remove one", None) from error
    except RecursionError as error:
        raise SyntaxMistakeError(TOO_DEEP, None) from error
    except SyntaxMistakeError:
        raise
    except ValueError as error:  # of int()
        raise SyntaxMistakeError(TOO_MANY_DIGITS, line_of_many_digits(text)) from error
    return document, _lines_of_json(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _KeyTwiceError(f"the key {_shown(twice)} stands twice")
    return table


def _lines_of_json(text: str) -> Mapping[KeyPath, int]:
    """JSON is read as YAML; where an odd text is none, its problems name no line."""
    visitor = _Visitor(plain_scalars=False)
    try:
        visitor.visit(_compose(_HALVES.sub(_whole, text.translate(_AS_YAML))), ())
    except (yaml.YAMLError, UnicodeEncodeError):
        return {}
    return visitor.lines


def _whole(escape: re.Match[str]) -> str:
    return escape[0] if escape[0] == r"\\" else r"\ufffd"


# YAML.


def _parse_yaml(text: str) -> tuple[Any, Mapping[KeyPath, int]]:
    visitor = _Visitor(plain_scalars=True)
    try:
        root = _compose(text)
        visitor.visit(root, ())
        document = None if root is None else yaml.SafeLoader("").construct_document(root)
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
    return _copied(document), visitor.lines


def _compose(text: str) -> yaml.Node | None:
    """The nodes of the one document of a text, after a look at its events: those are not nested.

    Raises:
        SyntaxMistakeError: It is nested too deeply, has too many values, tags, or is not alone.
        yaml.YAMLError: The syntax is wrong.
    """
    depth = values = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = 0 if event.start_mark is None else event.start_mark.line + 1
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        values += isinstance(event, yaml.NodeEvent)
        if documents > 1:
            raise SyntaxMistakeError(
                "holds more than one document; a study file is one: remove what follows ---", line
            )
        if depth > MAX_DEPTH:
            raise SyntaxMistakeError(TOO_DEEP, line)
        if values > 2 * MAX_VALUES:  # keys count here, too
            raise SyntaxMistakeError(TOO_MANY_VALUES, line)
        if tag := getattr(event, "tag", None):
            raise SyntaxMistakeError(
                f"has the tag {_shown(tag)}; a study file has none: remove it, and write text in "
                "quotes",
                line,
            )
    root: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    return root


class _Visitor:
    """Visits every node as often as aliases repeat it, and notes lines; a bomb ends at a limit."""

    def __init__(self, *, plain_scalars: bool) -> None:
        """Makes one.

        Args:
            plain_scalars: What stands without quotes is read by YAML's rules, and not by JSON's.
        """
        self.lines: dict[KeyPath, int] = {}
        self._plain_scalars = plain_scalars
        self._values = 0

    def visit(self, node: yaml.Node | None, path: KeyPath, line: int = 1, depth: int = 0) -> None:
        """Visits a node; `line` is that of the key that it stands behind, also as an alias."""
        if node is None:
            return
        self._values += 1
        if depth > MAX_DEPTH:
            raise SyntaxMistakeError(TOO_DEEP, line)
        if self._values > MAX_VALUES:
            raise SyntaxMistakeError(TOO_MANY_VALUES, line)
        if isinstance(node, yaml.MappingNode):
            self._visit_table(node, path, line, depth)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.lines.setdefault((*path, index), item.start_mark.line + 1)
                self.visit(item, (*path, index), line, depth + 1)
        elif self._plain_scalars and isinstance(node, yaml.ScalarNode):
            _refuse_surprises(node)

    def _visit_table(self, node: yaml.MappingNode, path: KeyPath, line: int, depth: int) -> None:
        if len(node.value) > MAX_KEYS:
            raise SyntaxMistakeError(TOO_MANY_KEYS, line)
        seen: set[str] = set()
        merged: list[tuple[int, yaml.Node]] = []
        for key, value in node.value:
            at = key.start_mark.line + 1
            if key.tag == f"{_TAG}merge":
                tables = value.value if isinstance(value, yaml.SequenceNode) else [value]
                merged += [(at, table) for table in tables]
                continue
            if key.tag != f"{_TAG}str":
                what = f"the key {_shown(key.value)} is" if key.id == "scalar" else "a key is"
                raise SyntaxMistakeError(f"{what} not text; write it in quotes", at)
            if key.value in seen:
                raise SyntaxMistakeError(
                    f"the key {_shown(key.value)} stands twice; remove one", at
                )
            seen.add(key.value)
            self.lines.setdefault((*path, key.value), at)
            # What is repeated stands above its alias.
            self.visit(value, (*path, key.value), max(line, at), depth + 1)
        for at, table in merged:  # after what the table itself has, whose lines stay
            self.visit(table, path, max(line, at), depth + 1)


def _refuse_surprises(node: yaml.ScalarNode) -> None:
    """Lets no value through that YAML 1.1 takes for what its writer did not mean.

    Raises:
        SyntaxMistakeError: It is such a value.
    """
    kind = node.tag.removeprefix(_TAG)
    if kind == "timestamp":
        message = f"{_shown(node.value)} is a date in YAML; write it in quotes"
    elif kind == "int" and len(node.value) > 4300:
        message = TOO_MANY_DIGITS
    elif (kind == "int" and not _INTEGER.fullmatch(node.value)) or (
        kind == "float" and ":" in node.value
    ):
        message = (
            f"{_shown(node.value)} is a number to another base in YAML; write it without leading "
            "zeros and colons, or as text in quotes"
        )
    else:
        return
    raise SyntaxMistakeError(message, node.start_mark.line + 1)


def _copied(value: Any) -> Any:
    """The value with nothing in it twice: to change one use of an alias must not change another."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _shown(text: str) -> str:
    short = text if len(text) <= 60 else f"{text[:56]} ..."
    printed = (letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in short)
    return f'"{"".join(printed)}"'
