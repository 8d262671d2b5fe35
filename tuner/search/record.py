"""How a study is run, as it is stored with the study when it is created."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuner import __version__
from tuner.data.identity import DataIdentity
from tuner.errors import SpecError
from tuner.search.formats import FORMAT, FORMAT_KEY, RecordError, completed
from tuner.spec.reader import spec_from_document
from tuner.spec.schedule import rungs_counted_up
from tuner.spec.spec import StudySpec

#: Versions that are stored with a study and go into every export.
_RECORDED_PACKAGES = ("optuna", "keras", "numpy", "sqlalchemy", "distributed")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """What a study was made of: written at its creation, never changed."""

    spec: StudySpec  #: the study file
    spec_hash: str  #: as the version that made the study computed it: shown, never compared
    data: DataIdentity
    development_sha256: str  #: of the development file, under artifacts/development
    precision: Literal["auto", "float32", "bfloat16"]  #: see `TunedStudy.precision_of`
    sampler: Mapping[str, Any]  #: class and settings
    pruner: Mapping[str, Any]
    versions: Mapping[str, str]  #: by package, and of Python
    folder: str  #: of its artifacts, under the artifacts root
    created_at: str  #: ISO 8601, UTC


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"python": platform.python_version(), "tuner": __version__}
    for package in (*_RECORDED_PACKAGES, "tensorflow-cpu", "tensorflow"):
        try:
            found[package.removesuffix("-cpu")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def record_document(record: StudyRecord) -> dict[str, Any]:
    """What is stored of a new study's record: JSON, of this version's format."""
    fields = {
        field.name: getattr(record, field.name)
        for field in dataclasses.fields(record)
        if field.name not in ("spec", "data")
    }
    return {
        FORMAT_KEY: FORMAT,
        **fields,
        "spec": record.spec.to_document(),
        "spec_folder": str(record.spec.folder),
        "data": record.data.to_document(),
    }


#: The keys of a record, and of its data: `record_document` writes all of them.
_RECORD_KEYS = frozenset(field.name for field in dataclasses.fields(StudyRecord)) | {"spec_folder"}
_DATA_KEYS = frozenset(field.name for field in dataclasses.fields(DataIdentity))


def record_from_document(document: Mapping[str, Any]) -> StudyRecord:
    """The record that `record_document` stored, of this or an earlier format.

    Raises:
        RecordError: It is of a later format, or damaged.
    """
    fields = checked_record(document)
    folder = Path(fields.pop("spec_folder"))
    try:
        read = spec_from_document(fields.pop("spec"), folder=folder)
    except SpecError as error:
        raise RecordError(f"is stored with a study file that cannot be read: {error}") from error
    spec = _with_its_rungs(read, document["pruner"])
    return StudyRecord(spec=spec, data=DataIdentity.from_document(fields.pop("data")), **fields)


def checked_record(document: Mapping[str, Any]) -> dict[str, Any]:
    """A stored record, completed, with the keys that it must have and no others.

    Raises:
        RecordError: It is of a later format, or damaged.
    """
    fields = completed(document)
    fields.pop(FORMAT_KEY, None)
    _check_keys(fields, _RECORD_KEYS, "")
    for table in ("spec", "data", "pruner"):
        if not isinstance(fields[table], dict):
            raise RecordError(
                f"has a damaged record: {table} is {fields[table]!r}, and no table. Restore the "
                "storage from a copy, or launch the study under another name (--name)."
            )
    _check_keys(fields["data"], _DATA_KEYS, "data.")
    return fields


def _check_keys(table: Mapping[str, Any], known: frozenset[str], prefix: str) -> None:
    if unknown := [f"{prefix}{key}" for key in table if key not in known]:
        raise RecordError(
            f"is stored with keys that this tuner does not know ({', '.join(unknown)}), so a later "
            "version wrote them: upgrade tuner here to use the study. Nothing was changed."
        )
    if missing := sorted(f"{prefix}{key}" for key in known - table.keys()):
        raise RecordError(
            f"has a damaged record, without {', '.join(missing)}. Restore the storage from a copy, "
            "or launch the study under another name (--name)."
        )


def moved_document(document: Mapping[str, Any], spec: StudySpec) -> dict[str, Any]:
    """A stored record with study file and data where they lie now; all else as it was stored."""
    stored = document["spec"]
    data = {**stored["data"], "source": spec.to_document()["data"]["source"]}
    return {**document, "spec_folder": str(spec.folder), "spec": {**stored, "data": data}}


def _with_its_rungs(spec: StudySpec, pruner: Mapping[str, Any]) -> StudySpec:
    """The spec with the rungs that the study was made with.

    Its trials hold their values at those; compared at others, trials of two lengths would compete.
    """
    settings = spec.hyperband
    if settings is None:
        return spec
    earlier = rungs_counted_up(settings.min_epochs, spec.training.max_epochs, settings.eta)
    its_rungs = tuple(pruner.get("rungs", earlier))
    return (
        spec if its_rungs == spec.rungs else spec.model_copy(update={"made_with_rungs": its_rungs})
    )
