"""Where the keys of a TOML text stand: what `tomllib` does not tell."""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeAlias

#: The way to a value: table keys and array indices, `("known", 0, "block1", "kernel_size")`.
KeyPath: TypeAlias = tuple[str | int, ...]


def key_lines(text: str) -> Mapping[KeyPath, int]:
    """The line, from 1, on which each table and each key that begins a line first stands.

    What an inline table or a list holds counts to the line on which that begins. A text in triple
    quotes, or a list in a list, may have lines that look like keys: then a line may be wrong.

    Args:
        text: A text that `tomllib.loads` accepts.
    """
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    arrays: Counter[KeyPath] = Counter()  # how many tables each array of tables has so far

    def latest(path: KeyPath) -> KeyPath:
        return (*path, arrays[path] - 1) if path in arrays else path

    for number, line in enumerate(text.split("\n"), start=1):
        is_header = line.lstrip().startswith("[")
        try:
            keys, is_array = _path(line if is_header else f"{line.partition('=')[0]} = 0")
        except tomllib.TOMLDecodeError:
            continue  # within a value
        path: KeyPath = () if is_header else table
        for key in keys:
            path = (*latest(path), key)
            lines.setdefault(path, number)
        if is_header:
            arrays.update([path] * is_array)
            table = latest(path)
            lines.setdefault(table, number)
    return lines


def _path(line: str) -> tuple[list[str], bool]:
    """The keys on the way to the one value of a text; whether that is an array of tables."""
    keys: list[str] = []
    at: Any = tomllib.loads(line)
    while isinstance(at, dict) and at:
        ((key, at),) = at.items()
        keys.append(key)
    return keys, isinstance(at, list)
