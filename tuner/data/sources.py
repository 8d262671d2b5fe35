"""Which files a study file names, and where they lie today."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.spec.spec import DataSettings
from tuner.data.rows import Source
from tuner.data.solubility import SOLUBILITY_FILE


def source_files(settings: DataSettings, folder: Path) -> tuple[Path, ...]:
    """The files that a study file in `folder` names as its source.

    One, two of a pair (soluble, insoluble) or three of a split (training, validation, test); none
    of "solubility" and "synthetic".
    """
    if settings.source in ("solubility", "synthetic"):
        return ()
    return tuple(resolved_path(name, folder) for name in file_names(settings))


def source_sha256(files: Sequence[Path]) -> str:
    """What `DataIdentity.sha256` is of these files: of the bytes, or of several files' digests.

    Raises:
        OSError: One cannot be read, or is not a regular file.
    """
    return _joint_sha256([_file_sha256(file) for file in files])


def find_source(
    settings: DataSettings, folders: Iterable[Path], sha256: str
) -> tuple[Path, ...] | None:
    """Files of this content, in the order of `source_files`; None where there are none.

    In each folder looked for as the study file names them, then by their last names, then under
    any names that end alike.

    Args:
        settings: The study file's `[data]`.
        folders: Where to look, the likeliest first.
        sha256: Their `source_sha256`.
    """
    names = file_names(settings)
    digest = functools.cache(_file_sha256)
    for folder in dict.fromkeys(folders):
        named = tuple(resolved_path(name, folder) for name in names)
        likely = (named, tuple(folder / file.name for file in named))
        for files in itertools.chain(likely, _alike(folder, names)):
            with contextlib.suppress(OSError):
                if _joint_sha256([digest(file) for file in files]) == sha256:
                    return files
    return None


def with_files(settings: DataSettings, files: Sequence[Path]) -> DataSettings:
    """The same settings with these files as the source."""
    paths = [str(file) for file in files]
    if isinstance(settings.source, str):
        return settings.model_copy(update={"source": paths[0]})
    named = settings.source.model_dump()
    several = settings.source.model_copy(update=dict(zip(named, paths, strict=True)))
    return settings.model_copy(update={"source": several})


def file_names(settings: DataSettings) -> tuple[str, ...]:
    """The source's files as the study file names them."""
    source = settings.source
    if isinstance(source, str):
        return (SOLUBILITY_FILE if source == "solubility" else source,)
    return tuple(source.model_dump().values())


def _alike(folder: Path, names: Sequence[str]) -> Iterator[tuple[Path, ...]]:
    """Files of the folder that may stand for those of these names, in every order of them."""
    suffixes = {data_suffix(PurePath(name)) for name in names}
    try:
        inside = sorted(path for path in folder.iterdir() if data_suffix(path) in suffixes)
    except OSError:
        return
    yield from itertools.permutations(inside, len(names))


def data_suffix(path: PurePath) -> str:
    """What the path ends in, in lower case: ".csv", and ".csv.gz" where it is compressed."""
    suffix = path.suffix.lower()
    return PurePath(path.stem).suffix.lower() + suffix if suffix == ".gz" else suffix


def _joint_sha256(digests: Sequence[bytes]) -> str:
    return (digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest()).hex()


def _file_sha256(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # reading a pipe might never end
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def beside_the_study_file(
    settings: DataSettings, folder: Path, sha256: str | None
) -> DataSettings | None:
    """The settings with files of the known content, where those that are named are missing."""
    named = source_files(settings, folder)
    if sha256 is None or all(os.access(file, os.F_OK) for file in named):
        return None
    found = find_source(settings, [folder], sha256)
    return None if found is None else with_files(settings, found)


def warn_of_another_source(
    there: DataSettings | None, source: Source, sha256: str | None
) -> Iterator[str]:
    """Warns where the data was found elsewhere, or is not what the study file names."""
    if there is not None:
        found = ", ".join(file_names(there))
        yield f"the data is not where the study file names it; {found} has the same sha256"
    elif sha256 is not None and not source.synthetic and source.sha256 != sha256:
        yield (
            f"{source.name} has sha256 {source.sha256[:12]}, but [provenance] of the study file "
            f"tells of {sha256[:12]}: these are other data than the configuration was found on"
        )


def resolved_path(name: str, folder: Path) -> Path:
    """A path of a study file; a relative one starts at its folder."""
    return folder / (Path(name).expanduser() if name.startswith("~/") else Path(name))


def name_from(folder: Path, file: Path, name: str) -> str:
    """How a study file in `folder` names `file`; `name`, if it were to lie beside it."""
    if not os.access(file, os.F_OK):
        return name  # it is looked for by its hash there
    try:
        # The file itself may be a link, which is to stay one.
        at = Path(os.path.realpath(file.parent)) / file.name
        relative = PurePath(os.path.relpath(at, os.path.realpath(folder))).as_posix()
        relative.encode()
    except ValueError:  # on another drive, or in a folder whose name is not Unicode
        return name
    return f"./{relative}" if relative.startswith("~") else relative
