"""How a study is run, as it is stored with the study when it is created."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuner.data.identity import DataIdentity
from tuner.spec.reader import spec_from_document
from tuner.spec.schedule import rungs_counted_up
from tuner.spec.spec import StudySpec

#: Versions that are stored with a study and go into every export.
_RECORDED_PACKAGES = ("tuner", "optuna", "keras", "numpy", "sqlalchemy", "distributed")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """What a study was made of: written at its creation, never changed."""

    spec: StudySpec
    data: DataIdentity
    development_sha256: str  #: of the development file, under artifacts/development
    precision: Literal["auto", "float32", "bfloat16"]  #: see `TunedStudy.precision_of`
    sampler: Mapping[str, Any]  #: class and settings
    pruner: Mapping[str, Any]
    versions: Mapping[str, str]
    folder: str  #: of its artifacts, under the artifacts root
    created_at: str  #: ISO 8601, UTC


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"python": platform.python_version()}
    for package in (*_RECORDED_PACKAGES, "tensorflow-cpu", "tensorflow"):
        try:
            found[package.removesuffix("-cpu")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def record_document(record: StudyRecord) -> dict[str, Any]:
    """What is stored of a record: JSON."""
    fields = {
        field.name: getattr(record, field.name)
        for field in dataclasses.fields(record)
        if field.name not in ("spec", "data")
    }
    return {
        **fields,
        "spec": record.spec.to_document(),
        "spec_hash": record.spec.spec_hash,
        "spec_folder": str(record.spec.folder),
        "data": record.data.to_document(),
    }


def record_from_document(document: Mapping[str, Any]) -> StudyRecord:
    """The record that `record_document` stored, by this or an earlier version."""
    fields = dict(document)
    fields.pop("spec_hash")
    folder = Path(fields.pop("spec_folder"))
    spec = _with_its_rungs(
        spec_from_document(fields.pop("spec"), folder=folder), document["pruner"]
    )
    return StudyRecord(spec=spec, data=DataIdentity.from_document(fields.pop("data")), **fields)


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
