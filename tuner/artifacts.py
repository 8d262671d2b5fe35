"""The one place that names files: development data, checkpoints, weights, reports."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ROOT = Path("runs/artifacts")
DEFAULT_STORAGE_URL = "sqlite:///runs/tuner.db"
DEFAULT_EXPORT_FOLDER = Path("runs/export")
_UNFINISHED = ".new"  #: ends the name of a file that is being written


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

    def tidy(self, open_trials: set[int]) -> None:
        """Removes what a coordinator that was killed left: for who holds the study's lease alone.

        Files that were being written, and checkpoints of trials that have ended since.
        """
        for folder in (self.folder / "checkpoints", self.folder / "weights"):
            for path in folder.glob(f".*{_UNFINISHED}"):
                path.unlink(missing_ok=True)
        for path in (self.folder / "checkpoints").glob("*.npz"):
            if path.stem.isdigit() and int(path.stem) not in open_trials:
                path.unlink(missing_ok=True)

    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def development_path(root: Path, sha256: str) -> Path:
    """Training and validation rows, named by their content: studies may share them."""
    return root / "development" / f"{sha256}.npz"


def study_folder_name(name: str) -> str:
    """A folder name of its own for a new study: two storages may share one artifacts root."""
    return f"{name}-{uuid.uuid4().hex[:8]}"


def publish(path: Path, content: bytes) -> None:
    """Writes a file whole: a reader sees the old content or the new, never a part.

    Nor does a power cut leave a part: what is on the disk gets the name, and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_UNFINISHED}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Writes a folder's names to the disk, where its system can do that."""
    # Without it a power cut may bring the old file back, whole: no reason to fail.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
