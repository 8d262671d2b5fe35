"""The formats of a study's stored record, and what the keys that a record lacks mean.

A study outlives the version that made it. Each version reads the records of every format so far.
To add a key:
`docs/decisions.md#what-has-to-be-done-to-add-a-key-to-the-study-file-or-the-record`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from tuner.errors import TunerError
from tuner.spec.architecture import KEYS

FORMAT_KEY = "format"  #: in the record; format 1 had no such key

#: What is None is not written, by any version.
_NOT_WRITTEN: Mapping[str, Any] = {
    "spec.hyperband": None,
    "spec.hyperband.audit": None,
    "spec.stop": None,
    "spec.notify": None,
    "spec.confirm": None,
    "spec.provenance": None,
    "spec.data.fallback": None,
    "spec.data.truncate": None,
    "spec.data.columns.weight": None,
    "spec.data.split.column": None,
    "spec.data.split.training": None,
    "spec.data.split.identity": None,
    "spec.data.split.coverage": None,
    "spec.data.split.folds": None,
    "spec.data.split.reshuffle": None,
    "data.folds": None,
    "data.clusters": None,
    "data.mmseqs": None,
    "spec.training.as_trial": None,
}

#: By format, the keys that its records have first, and what versions before did without: dotted
#: key -> value. A key of an optional table ("spec.hyperband.eta") holds where the record has that
#: table. Hyperparameters say it themselves (`Hyperparameter.since`).
_ADDED: Mapping[int, Mapping[str, Any]] = {
    # Up to and including commit 5caba31, and until formats were counted. `pruner.rungs` may be
    # absent, too: see `tuner.search.record`.
    1: {},
    2: {},
    # `data.truncate` was true or false before, which is still read.
    4: {
        "spec.data.columns": {"sequence": "sequence", "label": "label"},
        "spec.data.unknown": "error",
        "spec.data.conflicts": "error",
        "spec.training.class_weights": "none",
    },
}
#: Of the records that this version stores.
FORMAT = max(*_ADDED, *(one.since for one in KEYS.values()))

#: For each format, what the keys that are absent from its records meant.
DEFAULTS_OF_FORMAT: Mapping[int, Mapping[str, Any]] = {
    number: {
        **_NOT_WRITTEN,
        **{key: value for of, keys in _ADDED.items() if of > number for key, value in keys.items()},
        **{f"spec.space.{name}": one.default for name, one in KEYS.items() if one.since > number},
    }
    for number in range(1, FORMAT + 1)
}

#: Defaults of earlier versions that are others today, by their key in the study file. Records have
#: the value written out.
EARLIER_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "training.patience": (5,),
}


def was_default(key: str, value: Any) -> bool:
    """Whether this value is what some earlier version did where a study file left the key out."""
    stored = f"spec.{key}"
    meant = [known[stored] for known in DEFAULTS_OF_FORMAT.values() if stored in known]
    return value in (*EARLIER_DEFAULTS.get(key, ()), *meant)


class RecordError(TunerError):
    """A stored record that this version cannot read; the message follows the study's name."""


def completed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A stored record with every key that a later format has.

    Raises:
        RecordError: It is of a later format.
    """
    its_format = document.get(FORMAT_KEY, 1)
    if type(its_format) is not int or its_format not in DEFAULTS_OF_FORMAT:
        raise RecordError(f"is stored in format {its_format!r}{_by_whom(document)}")
    complete: dict[str, Any] = copy.deepcopy(dict(document))
    for key, value in DEFAULTS_OF_FORMAT[its_format].items():
        *tables, name = key.split(".")
        table: Any = complete
        for part in tables:
            table = table.get(part) if isinstance(table, dict) else None
        if isinstance(table, dict):
            table.setdefault(name, value)
    return complete


def _by_whom(document: Mapping[str, Any]) -> str:
    """The end of a message about a record of a later version, with the remedy."""
    versions = document.get("versions")
    version = versions.get("tuner") if isinstance(versions, Mapping) else None
    by = f" by tuner {version}" if version else ""
    return (
        f"{by}, and this tuner reads formats up to {FORMAT}: upgrade tuner here to use the study. "
        "Nothing was changed."
    )
