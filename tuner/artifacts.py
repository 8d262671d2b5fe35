"""The one place that names files: development data, checkpoints, weights, reports."""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.errors import TunerError

if TYPE_CHECKING:
    from optuna.artifacts import FileSystemArtifactStore

DEFAULT_ROOT = Path("runs/artifacts")
DEFAULT_STORAGE_URL = "sqlite:///runs/tuner.db"
DEFAULT_EXPORT_FOLDER = Path("runs/export")
DEFAULT_USERS_FILE = Path("runs/users.json")
DEFAULT_STUDIES_FOLDER = Path("studies")


@dataclass(frozen=True, slots=True)
class StudyArtifacts:
    """The files of one study."""

    folder: Path

    def checkpoint(self, trial: int) -> Path:
        """Where a running trial goes on from; removed when the trial ends."""
        return self.folder / "checkpoints" / f"{trial}.npz"

    def weights(self, trial: int) -> Path:
        """The best weights of a finished trial, kept for the best trials only."""
        return self.folder / "weights" / f"{trial}.npz"

    @property
    def report_folder(self) -> Path:
        return self.folder / "report"

    def keep_weights(self, trials: set[int]) -> None:
        """Removes the weights of every trial but these."""
        for path in (self.folder / "weights").glob("*.npz"):
            if path.stem.isdigit() and int(path.stem) not in trials:
                path.unlink(missing_ok=True)

    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def artifact_store(root: Path) -> FileSystemArtifactStore:
    """Where Optuna's dashboard keeps what hangs on trials and studies.

    Raises:
        TunerError: The folder cannot be made.
    """
    from optuna.artifacts import FileSystemArtifactStore  # noqa: PLC0415 - workers have no Optuna

    folder = root / "dashboard"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TunerError(
            f"{folder}: {error.strerror or error}; choose another --artifacts."
        ) from error
    return FileSystemArtifactStore(folder)


def development_path(root: Path, sha256: str) -> Path:
    """Training and validation rows, named by their content: studies may share them."""
    return root / "development" / f"{sha256}.npz"


def study_folder_name(name: str) -> str:
    """A folder name of its own for a new study: two storages may share one artifacts root."""
    return f"{name}-{uuid.uuid4().hex[:8]}"


def publish(path: Path, content: bytes) -> None:
    """Writes a file whole: a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
