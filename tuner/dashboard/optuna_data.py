"""What Optuna's dashboard is given: the files attached to studies, and notes that it can show."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage

from tuner.storage.dashboard_note import note_version
from tuner.storage.private_optuna import FrozenStudy

_NOTE_KEY = re.compile(r"dashboard:(?:[0-9]+:)?note_(ver|str:[0-9]+)")


class Uploads(FileSystemArtifactStore):
    """The files attached to studies; a file whose upload fails is removed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self._written = threading.local()
        self.one_at_a_time = threading.Lock()  #: else two uploads share the last place

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        self._written.identities.append(artifact_id)
        try:
            super().write(artifact_id, content_body)
        except OSError as error:
            self._written.error = error
            raise

    @contextmanager
    def whole_or_nothing(self, is_done: Callable[[], bool]) -> Iterator[None]:
        """A block that uploads; removes its files unless it is done at its end.

        Raises:
            OSError: A file could not be written, whatever was made of that on the way.
        """
        self._written.identities, self._written.error = [], None
        done = False
        try:
            yield
            done = is_done()
        finally:
            if not done:
                for identity in self._written.identities:
                    (self._folder / identity).unlink(missing_ok=True)
        if self._written.error is not None:
            raise self._written.error

    def remove(self, artifact_id: str) -> None:
        try:
            super().remove(artifact_id)
        except FileNotFoundError as error:
            raise ArtifactNotFound("not found") from error


@BaseStorage.register
class ReadableStudies:
    """Optuna's storage, with notes that are text whatever was stored as one.

    An older version stored notes of any type: Optuna's dashboard fails on every page of a study
    that has one.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_studies(self) -> list[FrozenStudy]:
        studies = self._storage.get_all_studies()
        for study in studies:
            study.system_attrs = with_readable_notes(study.system_attrs)
        return studies

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return with_readable_notes(self._storage.get_study_system_attrs(study_id))


def with_readable_notes(attributes: dict[str, Any]) -> dict[str, Any]:
    """A study's system attributes, whose notes have a number for a version, and pieces of text."""
    readable = dict(attributes)
    for key, value in attributes.items():
        found = _NOTE_KEY.fullmatch(key)
        if found and found[1] == "ver":
            readable[key] = note_version(value)
        elif found and not isinstance(value, str):
            readable[key] = json.dumps(value, ensure_ascii=False)
    return readable
