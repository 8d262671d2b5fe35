"""Development rows on a worker's machine: found, cached, or fetched once for all its workers.

Why: `docs/decisions.md#how-do-development-rows-reach-a-worker`.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock

from tuner.artifacts import development_path, make_folder, new_file_mode, publish

_STARVED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
CACHE_VARIABLE = "TUNER_CACHE"  #: the folder of this machine's copies, instead of the user's cache


def development_file(path: str, sha256: str, fetch: Callable[[], bytes | None]) -> Path:
    """A file with the development rows.

    A file with another hash than the one asked for is never used: a damaged copy in the cache is
    fetched again.

    Args:
        path: Where the coordinator has it; other machines may not see that.
        sha256: Of the file's bytes.
        fetch: Brings the bytes; None where nobody has them.

    Raises:
        OSError: Nobody has the rows, or no folder can be written.
    """
    if _is_it(Path(path), sha256):
        return Path(path)
    copy = development_path(cache_folder(), sha256)
    if _is_it(copy, sha256):
        return copy
    make_folder(copy.parent)
    with one_process_at_a_time(copy.with_suffix(".lock")):
        if not _is_it(copy, sha256):  # another worker fetched it while this one waited
            content = fetch()
            if content is None or hashlib.sha256(content).hexdigest() != sha256:
                raise FileNotFoundError(
                    f"development rows {sha256[:12]} are neither at {path} nor in {copy.parent}, "
                    f"and the scheduler has {'none' if content is None else 'others'}"
                )
            publish(copy, content)
    return copy


def read_development(path: Path, sha256: str) -> bytes | None:
    """The bytes of a development file; None if it is missing or has another hash.

    Raises:
        OSError: It is there and cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return content if hashlib.sha256(content).hexdigest() == sha256 else None


def _is_it(path: Path, sha256: str) -> bool:
    try:
        return read_development(path, sha256) is not None
    except OSError as error:
        if error.errno in _STARVED:  # nothing is known of the file, nor could another be read
            raise
        return False


def cache_folder() -> Path:
    """`$TUNER_CACHE`, else the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else platformdirs.user_cache_path("tuner")


def one_process_at_a_time(lock: Path) -> FileLock:
    """A lock that ends with its process, whatever becomes of that."""
    return FileLock(lock, mode=new_file_mode(lock.parent, private=True) or 0o600)
