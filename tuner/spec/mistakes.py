"""Mistakes in a study file: where, what and how to correct them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from tuner.errors import Problem
from tuner.spec.toml_lines import KeyPath


def same_value(a: object, b: object) -> bool:
    """Equality as TOML sees it: `true` is not 1."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def toml_value(value: object) -> str:
    """A value as a study file would show it, for messages."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + " }"
    return str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """Something wrong in a study file, before it is known on which line."""

    path: KeyPath  #: where it is
    value: object  #: what stands there; None where nothing does
    message: str
    also: tuple[KeyPath, ...] = ()  #: other keys that have a part in it


def shown(value: object, width: int = 60) -> str:
    """A value as a message shows it: as TOML, on one line, shortened."""
    try:
        text = toml_value(value)
    except ValueError:  # Python refuses to write integers of more than 4300 digits
        return "a number of thousands of digits"
    return _shortened(text, width)


def _shortened(text: str, width: int = 200) -> str:
    """A text on one line, and no longer than `width`."""
    text = text if len(text) <= width else f"{text[: width - 4]} ..."
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """'; did you mean "swish"?', or '' where nothing is near."""
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower(), names, n=1, cutoff=0.6)
    return f"; did you mean {toml_value(names[near[0]])}?" if near else ""


def without_the_quotes(value: object) -> str:
    """A hint where `value` is a number written as text."""
    try:
        number = float(value if isinstance(value, str) else "no text")
    except ValueError:
        return ""
    # What PyYAML dumps is what every reader of YAML takes for a number.
    text = str(value).strip()
    if math.isfinite(number) and text.isascii() and isinstance(yaml.safe_load(text), str):
        in_yaml = yaml.safe_dump(int(number) if number.is_integer() else number).partition("\n")[0]
        return f" (write it without the quotes; in YAML as {in_yaml})"
    return " (write it without the quotes)"


def one_of(values: Sequence[str], value: object) -> str:
    """What to say of a value that is none of `values`."""
    listed = ", ".join(toml_value(item) for item in values)
    return f"must be one of {listed}, not {shown(value)}{did_you_mean(value, values)}"


@dataclass(frozen=True, slots=True)
class KeyLocations:
    """Where the keys of a document are, for messages."""

    file: str  #: path as it was given; "" of what is in no file
    lines: Mapping[KeyPath, int]  #: by path; none for what is no file
    overridden: Sequence[KeyPath]  #: what `--set` wrote

    def problem(self, mistake: Mistake) -> Problem:
        key = _shortened(".".join(map(str, mistake.path)))
        value = "" if mistake.value is None else shown(mistake.value)
        for path in (mistake.path, *mistake.also):
            if any(path[: len(written)] == written for written in self.overridden):
                at = f"--set {_shortened('.'.join(map(str, path)))}"
                prefix = "" if path == mistake.path else f"{key}: "
                return Problem(
                    file="", line=None, key=at, value=value, message=prefix + mistake.message
                )
        return Problem(
            file=self.file,
            line=self._line(mistake.path),
            key=key,
            value=value,
            message=mistake.message,
        )

    def _line(self, path: KeyPath) -> int | None:
        """The line of the key; of one that is missing, that of its table."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None
