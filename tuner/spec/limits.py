"""What the document of a study file may be, whether it is TOML, JSON, YAML or came by the API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tuner.spec.toml_lines import KeyPath

MAX_FILE_BYTES = 1_000_000
MAX_LINE = 1_000  #: characters of TOML: `tomllib` takes a second for a key of 5,000 parts
MAX_DEPTH = 32  #: values within values, and parts of a key such as `a.b.c`
MAX_VALUES = 50_000  #: in the whole file, tables and lists included
MAX_KEYS = 200  #: of one table; the largest, [space] with every block and layer, has about 60
MAX_MISTAKES = 100  #: in a list; what follows is looked at when those are corrected

TOO_DEEP = (
    "is nested too deeply for a study file; write fewer brackets in brackets, and keys of a few "
    "parts"
)
TOO_LONG = f"is a line of more than {MAX_LINE:,} characters; a list may have a line for each value"
TOO_MANY_VALUES = f"holds more than {MAX_VALUES} values, too many for a study file; remove some"
TOO_MANY_KEYS = f"has a table of more than {MAX_KEYS} keys, too many for a study file; remove some"
TOO_MANY_DIGITS = "holds a number of thousands of digits; shorten it"


def excess(document: object) -> str | None:
    """What of `document` exceeds a limit, in words that follow "study.toml: "; None if nothing.

    Nothing recursive may be called on a document before. A list that holds itself, as a YAML
    alias can make it, is nested too deeply.
    """
    level = [document]
    values = 0
    for _ in range(MAX_DEPTH):
        inside: list[object] = []
        for one in level:
            items = list(one.values() if isinstance(one, Mapping) else one)  # type: ignore[call-overload]
            values += len(items)
            if isinstance(one, Mapping) and len(items) > MAX_KEYS:
                return TOO_MANY_KEYS
            if values > MAX_VALUES:
                return TOO_MANY_VALUES
            inside += [item for item in items if isinstance(item, Mapping | list)]
        level = inside
        if not level:
            return None
    return TOO_DEEP


def odd_text(value: object, path: KeyPath = ()) -> Iterator[tuple[KeyPath, object, str]]:
    """Where a document that exceeds no limit holds what no study file can: path, value, message.

    Keys that are no text, and text that is no Unicode: half of a surrogate pair, as JSON's
    escapes can spell it and as an argument that is not UTF-8 becomes.
    """
    if isinstance(value, str) and (found := _surrogate(value)):
        yield path, value, f"holds {found}, which is half of a character; remove it"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from odd_text(item, (*path, index))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                yield (*path, str(key)), item, "is a key that is not text; write it in quotes"
            elif found := _surrogate(key):
                message = f"is a key that holds {found}, which is half of a character; remove it"
                yield (*path, ascii(key)[1:-1]), item, message
            else:
                yield from odd_text(item, (*path, key))


def _surrogate(text: str) -> str:
    return next((f"U+{ord(letter):04X}" for letter in text if "\ud800" <= letter <= "\udfff"), "")
