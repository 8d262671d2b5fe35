"""Study files that `tuner export` wrote as JSON or YAML: their document, and the lines of keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from tuner.toml_lines import KeyPath

SUFFIXES = (".json", ".yaml", ".yml")


class SyntaxMistakeError(ValueError):
    """The text is no JSON or YAML, or no table of keys."""

    def __init__(self, message: str, line: int | None) -> None:
        self.line = line
        super().__init__(message)


def parse(text: str, suffix: str) -> dict[str, Any]:
    """The document of a text in the format that the file's suffix names.

    Raises:
        SyntaxMistakeError: With the line, from 1, where one is known.
    """
    try:
        document = json.loads(text) if suffix == ".json" else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise SyntaxMistakeError(f"is not valid JSON: {error.msg}", error.lineno) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        what = error.problem or "it cannot be read"
        line = None if mark is None else mark.line + 1
        raise SyntaxMistakeError(f"is not valid YAML: {what}", line) from error
    except yaml.YAMLError as error:
        raise SyntaxMistakeError(f"is not valid YAML: {error}", None) from error
    if not isinstance(document, dict):
        raise SyntaxMistakeError("holds no keys; a study file begins with name = ...", None)
    return document


def key_lines(text: str) -> Mapping[KeyPath, int]:
    """The line, from 1, on which each key and array element stands; JSON is read as YAML."""
    lines: dict[KeyPath, int] = {}

    def visit(node: yaml.Node | None, path: KeyPath) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                lines[*path, key.value] = key.start_mark.line + 1
                visit(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                lines[*path, index] = item.start_mark.line + 1
                visit(item, (*path, index))

    try:
        visit(yaml.compose(text, yaml.SafeLoader), ())
    except yaml.YAMLError:  # JSON with tabs is no YAML: its problems then name no line
        return {}
    return lines
