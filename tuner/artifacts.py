"""The one place that names files: development data, checkpoints, weights, reports."""

from __future__ import annotations

import contextlib
import errno
import json
import mimetypes
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tuner.errors import TunerError

if TYPE_CHECKING:
    from optuna.artifacts import FileSystemArtifactStore

DEFAULT_ROOT = Path("runs/artifacts")
DEFAULT_STORAGE_URL = "sqlite:///runs/tuner.db"
DEFAULT_EXPORT_FOLDER = Path("runs/export")
DEFAULT_USERS_FILE = Path("runs/users.json")
DEFAULT_STUDIES_FOLDER = Path("studies")
_UNFINISHED = ".new"  #: ends the name of a file that is being written

#: What is attached to each trial.
CURVES_FILE = "curves.svg"
NETWORK_FILE = "network.csv"

#: Begins the system attribute by which Optuna attaches a file to a study or a trial.
ARTIFACT_PREFIX = "artifacts:"
#: The same, and the one of files that older dashboards took.
ARTIFACT_PREFIXES = (ARTIFACT_PREFIX, f"dashboard:{ARTIFACT_PREFIX}")
_ATTACHED = uuid.UUID("6b1f1c5e-5d0e-4c57-9a35-0f8f0f4c1e02")  #: names the ids that are ours


def clusters_path(root: Path, key: str) -> Path:
    """Where the clusters of a set of sequences are kept."""
    return root / "clusters" / f"{key}.npz"


@dataclass(frozen=True, slots=True)
class StudyArtifacts:
    """The files of one study."""

    folder: Path
    _sizes: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    def checkpoint(self, trial: int) -> Path:
        """Where a running trial goes on from; removed when the trial ends."""
        return self.folder / "checkpoints" / f"{trial}.npz"

    def drop_checkpoint(self, trial: int) -> None:
        """Removes it; `tidy` removes what could not be."""
        _remove(self.checkpoint(trial))

    def weights(self, trial: int) -> Path:
        """The best weights of a finished trial, kept for the best trials only."""
        return self.folder / "weights" / f"{trial}.npz"

    @property
    def report_folder(self) -> Path:
        return self.folder / "report"

    def attach(
        self,
        name: str,
        content: bytes,
        *,
        trial: int | None = None,
        only_if: Callable[[], bool] | None = None,
    ) -> tuple[str, str]:
        """Writes a file that the dashboard shows with the study, or with one of its trials.

        The same name again replaces the file, also after a restart: its id follows from the
        study, the trial and the name. `only_if` is as `publish` has it.

        Returns:
            The system attribute of the study or the trial that attaches it: key and value.

        Raises:
            OSError: It cannot be written.
        """
        identity = self.identity(name, trial)
        publish(
            dashboard_folder(self.folder.parent) / identity, content, durable=False, only_if=only_if
        )
        mimetype, encoding = mimetypes.guess_type(name)
        described = {
            "artifact_id": identity,
            "filename": name,
            "mimetype": mimetype or "application/octet-stream",
            "encoding": encoding,
        }
        return f"{ARTIFACT_PREFIX}{identity}", json.dumps(described)

    def identity(self, name: str, trial: int | None) -> str:
        """The id that `attach` gives a file; those of other people's are random."""
        place = f"{self.folder.name}/{'study' if trial is None else trial}/{name}"
        return str(uuid.uuid5(_ATTACHED, place))

    def remove_pages(self, trials: Iterable[int]) -> None:
        """Removes what `attach` wrote for these trials, also where a crash left no attribute."""
        for trial in trials:
            for name in (CURVES_FILE, NETWORK_FILE):
                self.remove(self.identity(name, trial))

    def remove(self, identity: str) -> None:
        """Removes a file that `attach` wrote, or a user of the dashboard."""
        # What another program wrote into the database must not name a file elsewhere.
        if identity == Path(identity).name:
            (dashboard_folder(self.folder.parent) / identity).unlink(missing_ok=True)

    def keep_weights(self, trials: set[int]) -> None:
        """Removes the weights of every trial but these."""
        for path in (self.folder / "weights").glob("*.npz"):
            if path.stem.isdigit() and int(path.stem) not in trials:
                _remove(path)

    def tidy(self, open_trials: set[int]) -> None:
        """Removes what a coordinator that was killed left: for who holds the study's lease alone.

        Files that were being written, and checkpoints of trials that have ended since.
        """
        for folder in (self.folder / "checkpoints", self.folder / "weights"):
            for path in folder.glob(f".*{_UNFINISHED}"):
                _remove(path)
        for path in (self.folder / "checkpoints").glob("*.npz"):
            if path.stem.isdigit() and int(path.stem) not in open_trials:
                _remove(path)

    def bytes_on_disk(self, attached: Iterable[str] = ()) -> int:
        """What its own files take, and those with these ids that the dashboard shows.

        The latter are looked at once: there are thousands, and each is a few kilobytes.
        """
        folder = dashboard_folder(self.folder.parent)
        total = sum(map(_size, self.folder.rglob("*")))
        for identity in attached:
            if identity not in self._sizes:
                self._sizes[identity] = _size(folder / identity)
            total += self._sizes[identity]
        return total

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def dashboard_folder(root: Path) -> Path:
    """The files attached to studies and trials, named by their ids."""
    return root / "dashboard"


def artifact_store(root: Path) -> FileSystemArtifactStore:
    """Where Optuna's dashboard keeps what is attached to trials and studies.

    Raises:
        TunerError: The folder cannot be made.
    """
    from optuna.artifacts import FileSystemArtifactStore  # noqa: PLC0415 - workers have no Optuna

    class PrivateStore(FileSystemArtifactStore):
        def write(self, artifact_id: str, content_body: BinaryIO) -> None:
            _create(folder / artifact_id, None).close()  # Optuna's writes into what is there
            super().write(artifact_id, content_body)

    folder = dashboard_folder(root)
    try:
        make_folder(folder)
    except OSError as error:
        raise TunerError(
            f"{folder}: {error.strerror or error}; choose another --artifacts."
        ) from error
    return PrivateStore(folder)


def development_path(root: Path, sha256: str) -> Path:
    """Training and validation rows, named by their content: studies may share them."""
    return root / "development" / f"{sha256}.npz"


def kept_heads_folder(root: Path) -> Path:
    """Where the heads of ledgers are kept, a file for each ledger."""
    return root / "ledger"


def kept_heads_path(root: Path, ledger: str) -> Path:
    """The heads of one ledger, by its identity: a line for each entry, only ever added to."""
    return kept_heads_folder(root) / f"{ledger}.jsonl"


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Adds lines at the end of a file, on the disk when it returns.

    Raises:
        OSError: They cannot be written.
    """
    make_folder(path.parent)
    mode = new_file_mode(path.parent) or 0o600
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, mode)
    with os.fdopen(descriptor, "r+b") as file:
        # A line that was cut off by a crash stays one of its own.
        end = file.seek(0, os.SEEK_END)
        cut_off = end > 0 and (file.seek(end - 1), file.read(1))[1] != b"\n"
        file.write(b"\n" * cut_off + "".join(f"{line}\n" for line in lines).encode())
        file.flush()
        os.fsync(descriptor)


def _remove(path: Path) -> None:
    """Removes a file that is not needed any more; one that stays costs room, and no study."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    """Bytes of a file; 0 of a folder, or of what is not there (any more)."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def study_folder_name(name: str) -> str:
    """A folder name of its own for a new study: two storages may share one artifacts root."""
    return f"{name}-{uuid.uuid4().hex[:8]}"


def publish(
    path: Path,
    content: bytes,
    *,
    durable: bool = True,
    only_if: Callable[[], bool] | None = None,
) -> None:
    """Writes a file whole: a reader sees the old content or the new, never a part.

    Args:
        path: Where to.
        content: All of it.
        durable: See `publishing`.
        only_if: See `publishing`.

    Raises:
        OSError: It cannot be written; see `publishing`.
    """
    with publishing(path, durable=durable, only_if=only_if) as file:
        file.write(content)


@contextlib.contextmanager
def publishing(
    path: Path, *, durable: bool = True, only_if: Callable[[], bool] | None = None
) -> Iterator[BinaryIO]:
    """A block that writes a file; it is there, whole, when the block ends without an error.

    An existing file keeps its mode and, where this process may give files away, its owner; a
    symbolic link stays, and the file that it names is written. A new file is private where its
    folder is, and a folder that is missing is made private.

    Args:
        path: Where to.
        durable: Nor does a power cut leave a part: what is on the disk gets the name, and nothing
            else. That takes milliseconds of a disk, which a drawing is not worth.
        only_if: Asked last of all, so that a process that was frozen meanwhile does not replace
            what came since; False: the old content stays.

    Raises:
        OSError: It cannot be written; also where a folder, a pipe, a device or a socket has this
            name, which a file must never replace.
    """
    path, old = replaceable(path)
    beside = path.with_name(f".{uuid.uuid4().hex}{_UNFINISHED}")
    try:
        try:
            file = _create(beside, old)
        except FileNotFoundError:  # the first file of its folder
            make_folder(path.parent)
            file = _create(beside, old)
        with file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if only_if is None or only_if():
            os.replace(beside, path)
        else:
            beside.unlink()
    except BaseException:
        with contextlib.suppress(OSError):  # what failed first is what is told
            beside.unlink()
        raise
    if durable:
        _sync_folder(path.parent)


def replaceable(path: Path) -> tuple[Path, os.stat_result | None]:
    """The file that `publish` replaces, and what it is now; None where there is none yet.

    Raises:
        OSError: What has this name is not a regular file, so nothing may replace it.
    """
    try:
        old = path.stat()
    except FileNotFoundError:  # also the target of a symbolic link may be missing
        old = None
    if old is not None and not stat.S_ISREG(old.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return (Path(os.path.realpath(path)) if path.is_symlink() else path), old


#: A folder with both bits is shared on purpose: its group writes, and what is new is the group's.
_SHARED = stat.S_ISGID | stat.S_IWGRP


def make_folder(folder: Path, *, private: bool = True) -> None:
    """Makes a folder, and those above it that are missing; one that is there keeps its mode.

    Args:
        folder: The folder.
        private: For its owner alone (0700), also where the folder above is open to others. Below
            a folder that is shared on purpose (group-writable, with the set-group-id bit) it is
            for that group, too (2770).

    Raises:
        OSError: It cannot be made.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        above = _mode(one.parent)
        is_shared = above & _SHARED == _SHARED
        one.mkdir(0o700 if private or _is_private(above) else 0o777, exist_ok=True)
        if is_shared:
            one.chmod(0o2770)
    folder.mkdir(exist_ok=True)  # it may be a file


def new_file_mode(folder: Path, *, private: bool = False) -> int | None:
    """The mode of a file that is new in a folder; None where the umask decides.

    Args:
        folder: There already.
        private: For its owner alone wherever it is, unless the folder is shared on purpose.
    """
    mode = _mode(folder)
    if mode & _SHARED == _SHARED:
        return 0o660
    return 0o600 if private or _is_private(mode) else None


def _mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def _is_private(mode: int) -> bool:
    return os.name == "posix" and not mode & 0o077


def require_writable(folder: Path, *files: str) -> None:
    """Makes sure that files can be written into a folder, which is made where it is missing.

    Args:
        folder: The folder.
        files: Names in it that `publish` will write.

    Raises:
        OSError: They cannot.
    """
    make_folder(folder, private=False)
    with tempfile.TemporaryFile(dir=folder):
        pass
    for name in files:
        replaceable(folder / name)


def _create(beside: Path, old: os.stat_result | None) -> BinaryIO:
    """Opens a new file, with the owner and the mode of the one that it will replace.

    Raises:
        OSError: It cannot be made.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    new = new_file_mode(beside.parent) if old is None else 0o600
    descriptor = os.open(beside, flags, 0o666 if new is None else new)
    if old is None and new is not None and hasattr(os, "fchmod"):
        with contextlib.suppress(OSError):  # a file system without modes
            os.fchmod(descriptor, new)  # whatever the umask
    if old is not None and hasattr(os, "fchown"):
        mode = stat.S_IMODE(old.st_mode)
        made = os.fstat(descriptor)
        if (made.st_uid, made.st_gid) != (old.st_uid, old.st_gid):
            try:
                os.fchown(descriptor, old.st_uid, old.st_gid)
            except OSError:  # an ordinary user may give a file to a group of one's own only
                with contextlib.suppress(OSError):
                    os.fchown(descriptor, -1, old.st_gid)
        if os.fstat(descriptor).st_gid != old.st_gid:
            # What its group could do is not for another group: that one has what all others have.
            mode = (mode & ~0o070) | (mode & 0o007) << 3
        with contextlib.suppress(OSError):  # a file system without modes
            os.fchmod(descriptor, mode)
    return os.fdopen(descriptor, "wb")


def _sync_folder(folder: Path) -> None:
    """Writes a folder's names to the disk, where its system can do that."""
    # Without it a power cut may bring the old file back, whole: no reason to fail.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
