"""Opens the test split: the ledger first, then the rows. Only the report may import this.

Why: `docs/decisions.md#why-can-the-seal-not-be-perfect`.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from optuna.trial import FrozenTrial

from tuner.data import solubility
from tuner.data.identity import DataIdentity
from tuner.data.prepare import HeldOutRows, read_hashes, read_held_out
from tuner.data.sources import source_sha256, with_files
from tuner.errors import StudyError
from tuner.results.seal import Look, keep_heads
from tuner.search.data_source import source_files
from tuner.search.tuned_study import TunedStudy
from tuner.spec.spec import DataSettings
from tuner.storage.ledger import EnsembleMember
from tuner.storage.splits import sequences_hash


def check_source(tuned: TunedStudy, given: Path | None = None) -> DataSettings:
    """Makes sure that the study's source is there and has not changed.

    Its bytes are hashed, no row is read: an opening that would fail is so found before it
    stands in the ledger.

    Args:
        tuned: The study.
        given: Where its source is said to be, see `tuner.search.data_source.source_files`.

    Returns:
        The study's data settings with the source as it was found, for `open_test_split`.

    Raises:
        DataError: The data set "solubility" is nowhere to be found.
        StudyError: The source is missing or another one.
    """
    settings, folder = _settings(tuned), tuned.record.spec.folder
    if settings.source == "solubility" and given is None and solubility.locate(folder) is not None:
        return settings
    files = source_files(tuned, given)
    if not files:
        if settings.source == "solubility":
            solubility.fetch()
        return settings  # or generated, not read
    try:
        found = source_sha256(files)
    except OSError as error:
        raise StudyError(
            f"{error.filename}: {error.strerror or error}. Study {tuned.name!r} was made from this "
            "file, and its test split is read from there: put it back, or name the file or its "
            "folder with --data, then report again. Nothing was opened."
        ) from error
    _compare(tuned, "sha256", tuned.record.data.sha256, found)
    return with_files(settings, files)


def know_sequences(tuned: TunedStudy, settings: DataSettings) -> None:
    """Stores which sequences the split holds, where a study's launch did not; no label is read.

    So that earlier openings of most of these rows are found before they are opened again.

    Raises:
        DataError: The source cannot be read.
        StudyError: It is no longer the study's.
    """
    if tuned.record.data.split_id in tuned.storage.splits.all():
        return
    identity, hashes = read_hashes(
        settings, folder=tuned.record.spec.folder, artifacts=tuned.artifacts.folder.parent
    )
    _require_same(tuned, identity)
    tuned.storage.splits.add(identity.split_id, hashes.test)


def open_test_split(
    tuned: TunedStudy,
    *,
    trial: FrozenTrial,
    config_hash: str,
    ensemble: Sequence[EnsembleMember] = (),
    settings: DataSettings | None = None,
    looks: Sequence[Look] | None = None,
    reason: str | None = None,
) -> tuple[int, HeldOutRows]:
    """Writes the ledger row, then reads the test rows.

    Args:
        tuned: The study whose split is opened.
        trial: The trial that will be evaluated on it, chosen before.
        config_hash: The sha256 of its configuration.
        ensemble: The networks that will be evaluated together beside it, chosen before.
        settings: What `check_source` found; as the study file has them where that was not asked.
        looks: The earlier openings of these rows, none of which may be added meanwhile; None: not
            compared.
        reason: Why they are opened again, if they are.

    Returns:
        The ledger entry's id, and the rows.

    Raises:
        DataError: The source cannot be read. The opening stays in the ledger.
        StudyError: The source is no longer the study's. The opening stays in the ledger.
        OpenedMeanwhileError: There are more openings than `looks`. Nothing was opened.
        OSError: The head of the ledger cannot be kept. The opening stays in the ledger.
    """
    record = tuned.record
    known = tuned.storage.splits.all().get(record.data.split_id)
    here = [look for look in looks or () if look.ledger is None]
    entry = tuned.storage.ledger.open(
        opened_at=datetime.now(UTC).isoformat(timespec="seconds"),
        opened_by=_who(),
        study=tuned.name,
        study_key=tuned.key,
        trial=trial.number,
        config_hash=config_hash,
        spec_hash=record.spec_hash,
        split_id=record.data.split_id,
        ensemble=ensemble,
        sequences_sha256=None if known is None else sequences_hash(known),
        reason=reason,
        same_splits={look.split_id for look in here},
        known_looks=None if looks is None else len(here),
        looks_elsewhere=len(looks or ()) - len(here),
    )
    keep_heads(tuned.storage.ledger, tuned.artifacts.folder.parent)
    identity, rows = read_held_out(
        settings or _settings(tuned),
        folder=record.spec.folder,
        artifacts=tuned.artifacts.folder.parent,
    )
    _require_same(tuned, identity)
    # For studies of an earlier version, which did not keep it when they were launched.
    tuned.storage.splits.add(identity.split_id, rows.hashes)
    return entry, rows


def _settings(tuned: TunedStudy) -> DataSettings:
    """The study's data, and no other: what it fell back to, or what it did not need to."""
    settings = tuned.record.spec.data
    if tuned.record.data.synthetic:
        return settings.model_copy(update={"source": "synthetic", "fallback": None})
    return settings.model_copy(update={"fallback": None})


def _require_same(tuned: TunedStudy, found: DataIdentity) -> None:
    _compare(tuned, "sha256", tuned.record.data.sha256, found.sha256)
    _compare(tuned, "split_id", tuned.record.data.split_id, found.split_id)


def _compare(tuned: TunedStudy, field: str, recorded: str, found: str) -> None:
    if recorded != found:
        raise StudyError(
            f"{tuned.record.data.source}: {field} is {found[:12]}, but study {tuned.name!r} was "
            f"made from {recorded[:12]}: the data changed since. Put the old file back where it "
            "was, name a copy of it with --data, or launch a new study on the new one (--name)."
        )


def _who() -> str:
    """user@host; a container may run as a number without a name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"[:255]
