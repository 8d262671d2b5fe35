"""Test rows that several studies share: sealed in one of them, and something else in another.

A split's identity changes with each row, seed and fraction, while most of its sequences stay. So
splits are compared by the hashes of their sequences, which outlive their studies. Labels are not
read, and no test row leaves `tuner.data.prepare`.

Why: `docs/decisions.md#why-is-a-shared-test-row-warned-of-and-not-refused`.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tuner.data.development import development_hashes, load_development
from tuner.data.identity import DataIdentity
from tuner.data.prepare import Prepared, read_hashes
from tuner.data.split import SplitHashes
from tuner.errors import DataError, counted
from tuner.search.attributes import RECORD_KEY
from tuner.search.development import find_development
from tuner.search.formats import RecordError
from tuner.search.record import checked_record
from tuner.search.study import list_names, study_name
from tuner.search.tuned_study import TunedStudy
from tuner.spec.spec import DataSettings, StudySpec
from tuner.storage.ledger import LedgerEntry
from tuner.storage.storage import Storage

_LISTED_SPLITS = 5  #: of which a launch warns; the rest are counted
_LISTED_NAMES = 3  #: of the studies that share a split


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRows:
    """Rows of a study that are in another study's test split."""

    studies: tuple[str, ...]  #: that keep the split sealed, or whose report opened it
    entries: tuple[int, ...]  #: of the ledger, that opened it; () while it is sealed
    rows: int  #: of that split
    training: int  #: of those, in the training split of the study
    validation: int
    test: int  #: in its own test split

    @property
    def in_words(self) -> str:
        names = ", ".join(map(repr, self.studies[:_LISTED_NAMES]))
        if len(self.studies) > _LISTED_NAMES:
            names += f" and {len(self.studies) - _LISTED_NAMES} more"
        counts = {"training": self.training, "validation": self.validation, "test": self.test}
        *others, last = (
            f"{count:,} in its {name} split" for name, count in counts.items() if count
        )
        places = f"this study has {' and '.join(filter(None, (', '.join(others), last)))}"
        rows = counted(self.rows, "test row")
        if self.entries:
            plural = "entry" if len(self.entries) == 1 else "entries"
            return (
                f"A report of {names} opened {rows} (ledger {plural} "
                f"{', '.join(map(str, self.entries))}); of these, {places}. What was learned from "
                "that report may be in this study, so its own report is not about unseen rows."
            )
        return (
            f"{names} keep{'s' * (len(self.studies) == 1)} {rows} sealed; of these, {places}. "
            f"This search uses {self.training + self.validation:,} of them. If its results are "
            "used there, that study's report is not about unseen rows. The same seed and "
            "fractions in [data] split keep the same rows sealed."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedRows:
    """Test rows of a study that another study trained on or chose by."""

    study: str  #: the other study's name
    training: int  #: rows of the test split in its training split
    validation: int  #: the same in its validation split


def enter(storage: Storage, spec: StudySpec, prepared: Prepared) -> tuple[str, ...]:
    """Keeps which sequences a study's test split holds; the warnings are those of `warnings`."""
    if prepared.hashes is not None:
        storage.splits.add(prepared.identity.split_id, prepared.hashes.test)
    _enter_earlier_studies(storage, spec, prepared)
    return warnings(storage, spec, prepared)


def warnings(storage: Storage, spec: StudySpec, prepared: Prepared) -> tuple[str, ...]:
    """What is to be said of rows that other studies keep sealed, or that a report opened.

    Args:
        storage: Where the other studies are.
        spec: The study file.
        prepared: Its data.
    """
    name = study_name(spec, prepared.identity)
    hashes = prepared.hashes
    if hashes is None:
        if spec.data.truncate:  # the whole sequences are not here
            return ()
        hashes = development_hashes(load_development(prepared.development_file))
    found = [one for one in _shared(storage, name, prepared.identity, hashes) if _matters(one)]
    found.sort(key=lambda one: (one.validation + one.training, one.test), reverse=True)
    said = [one.in_words for one in found[:_LISTED_SPLITS]]
    if len(found) > _LISTED_SPLITS:
        more = counted(len(found) - _LISTED_SPLITS, "more test split")
        said.append(f"The same of {more}.")
    return tuple(said)


def _matters(shared: SharedRows) -> bool:
    """Two studies may seal the same rows; that harms neither until one of them opens them."""
    return bool(shared.training or shared.validation or (shared.entries and shared.test))


def _shared(
    storage: Storage, name: str, identity: DataIdentity, hashes: SplitHashes
) -> Iterator[SharedRows]:
    splits = storage.splits.all()
    test = hashes.test or splits.get(identity.split_id, frozenset())
    studies: dict[str, list[str]] = defaultdict(list)  # by split
    own_key = None
    for other, document in _records(storage).items():
        if document["data"]["split_id"] != identity.split_id:
            studies[document["data"]["split_id"]].append(other)
        elif other == name:
            own_key = document["folder"]
    openings: dict[str, list[LedgerEntry]] = defaultdict(list)
    for entry in storage.ledger.entries():
        if entry.study_key != own_key:
            openings[entry.split_id].append(entry)
    for split_id, sequences in splits.items():
        opened = openings[split_id]
        names = [entry.study for entry in opened] or studies[split_id]
        if names:
            yield SharedRows(
                studies=tuple(dict.fromkeys(names)),
                entries=tuple(entry.id for entry in opened),
                rows=len(sequences),
                training=len(sequences & hashes.training),
                validation=len(sequences & hashes.validation),
                test=len(sequences & test),
            )


def _records(storage: Storage) -> dict[str, Mapping[str, Any]]:
    """The stored records of the tuner's studies, by name; those of a later version left out."""
    names = set(list_names(storage))
    found: dict[str, Mapping[str, Any]] = {}
    for known in storage.optuna.get_all_studies():
        if known.study_name in names:
            with contextlib.suppress(RecordError):
                found[known.study_name] = checked_record(known.user_attrs[RECORD_KEY])
    return found


def _enter_earlier_studies(storage: Storage, spec: StudySpec, prepared: Prepared) -> None:
    """Keeps the test splits of studies that an earlier version made from the data at hand."""
    if prepared.hashes is None:
        return
    known = set(storage.splits.all())
    for document in _records(storage).values():
        data, settings = document["data"], document["spec"]["data"]
        if data["split_id"] in known or data["sha256"] != prepared.identity.sha256:
            continue
        known.add(data["split_id"])
        its = {"source": spec.data.source, "max_length": data["max_length"]}
        try:
            stored = DataSettings.model_validate(settings).model_copy(update=its)
            artifacts = prepared.development_file.parent.parent
            identity, hashes = read_hashes(stored, folder=spec.folder, artifacts=artifacts)
        except (DataError, ValidationError):
            continue  # cannot be read so today: it is entered when it is launched itself
        if identity.split_id == data["split_id"]:
            storage.splits.add(identity.split_id, hashes.test)


def openings(storage: Storage, split_id: str) -> tuple[tuple[LedgerEntry, int], ...]:
    """The openings of a test split's rows, oldest first, each with how many of them it opened.

    Args:
        storage: Where they are recorded.
        split_id: The split's identity. Of one whose sequences are not known only the openings of
            the very same split are found, with 0 rows.
    """
    splits = storage.splits.all()
    own = splits.get(split_id, frozenset())
    found = []
    for entry in storage.ledger.entries():
        shared = len(own & splits.get(entry.split_id, frozenset()))
        if shared or entry.split_id == split_id:
            found.append((entry, shared))
    return tuple(found)


def used_elsewhere(tuned: TunedStudy) -> tuple[UsedRows, ...]:
    """Other studies of the storage that trained on test rows of this one, or chose by them.

    Only those whose development file is under the same artifacts or in the storage can be looked
    at; cut sequences are not found.
    """
    test = tuned.storage.splits.all().get(tuned.record.data.split_id, frozenset())
    root = tuned.artifacts.folder.parent
    found = []
    for name, document in _records(tuned.storage).items():
        if document["data"]["split_id"] == tuned.record.data.split_id:
            continue
        path = find_development(tuned.storage, root, document["development_sha256"])
        if path is None:
            continue
        hashes = development_hashes(load_development(path))
        used = UsedRows(
            study=name,
            training=len(test & hashes.training),
            validation=len(test & hashes.validation),
        )
        if used.training or used.validation:
            found.append(used)
    return tuple(found)
