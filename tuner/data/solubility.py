"""The solubility data set: found, downloaded and verified."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path

from tuner.artifacts import publish
from tuner.data.problems import Problems
from tuner.data.text import read_bytes
from tuner.errors import DataError, Problem

SOLUBILITY_URL = "https://github.com/whitead/dmol-book/raw/main/data/solubility.npz"
SOLUBILITY_SHA256 = "37b2e198e5d28a7468c67d7599c88f4ab4c37d8d2481be7fb314f40caeaf085d"
SOLUBILITY_FILE = "solubility.npz"
CONNECT_SECONDS = 5
READ_SECONDS = 30  # of silence in the middle of a download


class UnavailableError(Exception):
    """The data set "solubility" is nowhere to be found. The message is the reason."""


def locate(folder: Path | None = None) -> Path | None:
    """Where the data set "solubility" lies on this machine; None where it has to be downloaded.

    Looked for in `folder` (the study file's), in $TUNER_DATA_DIR, and in the user's cache, which
    keeps a copy of what was found: $TUNER_DATA_DIR is not set in the user's next terminal.

    Raises:
        DataError: A file is there but is not the published one. In the cache, which is
            ours, such a file counts as missing: the next download replaces it.
    """
    problems = Problems()
    for path in _given_paths(folder):
        if not os.path.lexists(path):
            continue
        content = read_bytes(path, str(path), problems)
        problems.raise_if_any()
        found = hashlib.sha256(content).hexdigest()
        if found != SOLUBILITY_SHA256:
            problems.add(
                str(path),
                f"sha256 is {found}, not {SOLUBILITY_SHA256}: this is not the published data "
                "set; remove the file, or name its path as source in [data] to use it as data of "
                "your own",
                key="data.source",
                value="solubility",
            )
            problems.raise_if_any()
        _keep_in_cache(content)
        return path
    cached = _cached_path()
    try:
        found = hashlib.sha256(cached.read_bytes()).hexdigest()
    except OSError:
        return None
    return cached if found == SOLUBILITY_SHA256 else None


def fetch() -> Path:
    """The data set "solubility", downloaded into the user's cache unless it is here already.

    Raises:
        DataError: It cannot be downloaded, or a file in $TUNER_DATA_DIR is not the published one.
    """
    try:
        return locate() or download_to()
    except UnavailableError as error:
        raise unavailable_error(error, None) from None


def _given_paths(folder: Path | None) -> list[Path]:
    """Where the user may have put the data set."""
    folders = [] if folder is None else [folder]
    if os.environ.get("TUNER_DATA_DIR"):
        folders.append(Path(os.environ["TUNER_DATA_DIR"]))
    return [each / SOLUBILITY_FILE for each in folders]


def _cached_path() -> Path:
    import platformdirs  # noqa: PLC0415 - workers do not need it

    return platformdirs.user_cache_path("tuner", appauthor=False) / SOLUBILITY_FILE


def _keep_in_cache(content: bytes) -> None:
    cached = _cached_path()
    with contextlib.suppress(OSError):  # a cache that cannot be written is only missed
        if not cached.exists() or cached.stat().st_size != len(content):
            publish(cached, content)


def download_to() -> Path:
    """Downloads the data set into the user's cache; whole and verified, or not at all."""
    import pooch  # noqa: PLC0415 - takes 0.2 s, and most runs download nothing

    target = _cached_path()
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it prints to stderr, which is ours
    try:
        pooch.retrieve(
            SOLUBILITY_URL,
            known_hash=f"sha256:{SOLUBILITY_SHA256}",
            fname=target.name,
            path=target.parent,
            downloader=pooch.HTTPDownloader(timeout=(CONNECT_SECONDS, READ_SECONDS)),
        )
    except OSError as error:  # those of requests are OSErrors too
        status = getattr(getattr(error, "response", None), "status_code", None)
        # The text of connection errors may hold a proxy's password: their names have to do.
        kind = type(error).__name__
        reason = f"HTTP status {status}" if status else f"{kind} {error.strerror or ''}".strip()
        raise UnavailableError(f"{SOLUBILITY_URL}: {reason}") from error
    except ValueError as error:
        raise UnavailableError(f"{SOLUBILITY_URL} sent another file (wrong sha256)") from error
    finally:
        logger.setLevel(level)
    return target


def unavailable_error(error: UnavailableError, folder: Path | None) -> DataError:
    """The error for a data set that cannot be found or downloaded, with the remedies."""
    looked = ", ".join(str(path) for path in (*_given_paths(folder), _cached_path()))
    message = (
        f'the data set "solubility" is not here (looked for {looked}) and cannot be downloaded '
        f"({error}); put {SOLUBILITY_FILE} into a folder and name that folder in TUNER_DATA_DIR, "
        'or set fallback = "synthetic" in [data] to try things out on generated data'
    )
    return DataError(
        [Problem(file="", line=None, key="data.source", value="solubility", message=message)]
    )
