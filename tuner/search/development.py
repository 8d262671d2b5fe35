"""Where the training and validation rows of a study are: on this machine, or in the storage."""

from __future__ import annotations

from pathlib import Path

from tuner.artifacts import development_path, publish
from tuner.data.delivery import read_development
from tuner.errors import StudyError
from tuner.search.tuned_study import TunedStudy
from tuner.storage.storage import Storage


def find_development(storage: Storage, artifacts_root: Path, sha256: str) -> Path | None:
    """The development file of this hash, written from the storage where it is missing or damaged.

    Args:
        storage: Has the rows of every study that was queued.
        artifacts_root: The folder of all artifacts on this machine.
        sha256: Of the file's bytes.

    Returns:
        The file, whose bytes have the hash; None if they are neither there nor in the storage.

    Raises:
        OSError: The file cannot be read and is not in the storage, or cannot be written.
    """
    path = development_path(artifacts_root, sha256)
    unreadable = None
    try:
        if read_development(path, sha256) is not None:
            return path
    except OSError as error:
        unreadable = error
    content = storage.development.read(sha256)
    if content is not None:
        publish(path, content)
        return path
    if unreadable is not None:
        raise unreadable
    return None


def study_development(tuned: TunedStudy) -> Path:
    """The development file of a study, see `find_development`.

    Raises:
        StudyError: The rows are neither on this machine nor in the storage.
        OSError: See `find_development`.
    """
    root, sha256 = tuned.artifacts.folder.parent, tuned.record.development_sha256
    path = find_development(tuned.storage, root, sha256)
    if path is None:
        raise StudyError(
            f"The training and validation rows of study {tuned.name!r} are neither in "
            f"{development_path(root, sha256)} nor in the storage; "
            f"`{tuned.command('launch', 'STUDY.toml', '--detach')}`, with the study file, writes "
            "them again."
        )
    return path
