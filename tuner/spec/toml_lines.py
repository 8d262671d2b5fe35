"""Where each key of a TOML text stands: what `tomllib` does not tell."""

from __future__ import annotations

import bisect
import re
import tomllib
from collections.abc import Mapping
from typing import TypeAlias

#: The way to a value: table keys and array indices, `("known", 0, "block1", "kernel_size")`.
KeyPath: TypeAlias = tuple[str | int, ...]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|\'[^\']*\'')
_MULTILINE = re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}(?!")|\'\'\'.*?\'{3,5}(?!\')', re.DOTALL)
_SCALAR = re.compile(r"[^,\]}#\n]*")
_SPACE = re.compile(r"[ \t]*")
_SPACE_AND_COMMENTS = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")


def key_lines(text: str) -> Mapping[KeyPath, int]:
    """The line, from 1, on which each key, table and array element first stands.

    Args:
        text: A text that `tomllib.loads` accepts; what a scanner makes of any other is undefined.
    """
    return _Scanner(text).scan()


class _Scanner:
    """One pass over valid TOML; it looks at no value, so it has little to get wrong."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._lines: dict[KeyPath, int] = {}
        self._array_lengths: dict[KeyPath, int] = {}

    def scan(self) -> Mapping[KeyPath, int]:
        table: KeyPath = ()
        while self._skip(_SPACE_AND_COMMENTS) < len(self._text):
            table = self._header() if self._next("[") else self._pair(table)
        return self._lines

    def _header(self) -> KeyPath:
        """`[a.b]` or `[[a.b]]`; the path of the table that it opens."""
        start = self._at
        is_array = self._next("[[")
        self._at += 2 if is_array else 1
        keys = self._keys()
        self._at += 2 if is_array else 1
        path: KeyPath = ()
        for key in keys[:-1]:
            path = self._latest((*path, key))
        path = (*path, keys[-1])
        self._mark(path, start)
        if is_array:
            self._array_lengths[path] = self._array_lengths.get(path, 0) + 1
        path = self._latest(path)
        self._mark(path, start)
        return path

    def _latest(self, path: KeyPath) -> KeyPath:
        """A table's path; where it is an array of tables, that of its last one so far."""
        length = self._array_lengths.get(path)
        return path if length is None else (*path, length - 1)

    def _pair(self, table: KeyPath) -> KeyPath:
        """`key = value` within `table`, which it returns."""
        start = self._at
        path = (*table, *self._keys())
        self._mark(path, start)
        self._at += 1  # the =
        self._skip(_SPACE)
        self._value(path)
        return table

    def _keys(self) -> list[str]:
        """A key, its dotted parts apart."""
        keys: list[str] = []
        while True:
            self._skip(_SPACE)
            bare = _BARE_KEY.match(self._text, self._at)
            match = bare or _QUOTED.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            # The real parser knows the escapes.
            keys += [match[0]] if bare else tomllib.loads(f"{match[0]} = 0")
            self._skip(_SPACE)
            if not self._next("."):
                return keys
            self._at += 1

    def _value(self, path: KeyPath) -> None:
        if self._next("["):
            self._sequence(path, "]")
        elif self._next("{"):
            self._sequence(path, "}")
        elif self._next('"""') or self._next("'''"):
            self._skip(_MULTILINE)
        elif self._next('"') or self._next("'"):
            self._skip(_QUOTED)
        else:
            self._skip(_SCALAR)

    def _sequence(self, path: KeyPath, end: str) -> None:
        """An array or an inline table: elements or pairs, between them commas."""
        self._at += 1
        index = 0
        self._skip(_SPACE_AND_COMMENTS)
        while not self._next(end):
            if end == "}":
                self._pair(path)
            else:
                self._mark((*path, index), self._at)
                self._value((*path, index))
            index += 1
            self._skip(_SPACE_AND_COMMENTS)
            if self._next(","):
                self._at += 1
                self._skip(_SPACE_AND_COMMENTS)
        self._at += 1

    def _mark(self, path: KeyPath, start: int) -> None:
        """Notes the line of `path`, and of the tables on the way that have none yet."""
        line = bisect.bisect_left(self._newlines, start) + 1
        for length in range(1, len(path) + 1):
            self._lines.setdefault(path[:length], line)

    def _next(self, token: str) -> bool:
        return self._text.startswith(token, self._at)

    def _skip(self, pattern: re.Pattern[str]) -> int:
        match = pattern.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        return self._at
