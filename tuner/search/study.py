"""A study: its spec, sampler, pruner and identity, created once and loaded ever after."""

from __future__ import annotations

import contextlib
import time
import unicodedata
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from tuner.artifacts import ARTIFACT_PREFIXES, StudyArtifacts, study_folder_name
from tuner.commands import command
from tuner.data.identity import DataIdentity
from tuner.errors import StudyError, StudyInUseError, counted
from tuner.search.attributes import (
    BUDGET_KEY,
    CONFIRM_KEY,
    CONFIRMS_KEY,
    ENDED_EARLY_KEY,
    ERROR_KEY,
    NOTIFY_KEY,
    RECORD_KEY,
    STOP_KEY,
)
from tuner.search.data_source import renew_folder
from tuner.search.formats import RecordError, was_default
from tuner.search.hyperband import make_pruner, pruner_document
from tuner.search.record import (
    StudyRecord,
    moved_document,
    record_document,
    record_from_document,
    versions,
)
from tuner.search.sampler import make_sampler, sampler_document
from tuner.search.tuned_study import FINISHED, TunedStudy
from tuner.spec.spec import StudySpec
from tuner.storage.lease import COORDINATOR_KEY
from tuner.storage.storage import Storage

#: Begins the name of a study that is being made; no study file may give such a name.
_MAKING = ".making."
_MAKING_SECONDS = 3600.0  #: nobody takes that long to make one


def create_or_resume(
    storage: Storage,
    spec: StudySpec,
    data: DataIdentity,
    *,
    development_sha256: str,
    artifacts_root: Path,
) -> TunedStudy:
    """The study of this name with the budget and the stop rule of the study file.

    For who does not drive it: a coordinator calls `find_or_create`, and `take_settings` once it
    holds the lease.

    Raises:
        StudyError: See `find_or_create`; or it is being run, and not as the study file says.
    """
    tuned = find_or_create(
        storage,
        spec,
        data,
        development_sha256=development_sha256,
        artifacts_root=artifacts_root,
    )
    changes = _changed_settings(tuned, spec)
    # More trials for a study in the service's queue: whoever drives it hears of them.
    only_more = set(changes) == {BUDGET_KEY} and spec.trials > tuned.budget
    if only_more and tuned.id in storage.queue.study_ids():
        _set_attributes(tuned, changes)
    elif changes:
        try:
            storage.set_user_attrs_unless_live(tuned.id, changes)
        except StudyInUseError as error:
            raise StudyError(
                f"{error} It runs to {counted(tuned.budget, 'trial')}; this launch asks for "
                f"{_differing_settings(tuned, spec)}. Nothing was changed."
            ) from error
    return tuned


def find_or_create(
    storage: Storage,
    spec: StudySpec,
    data: DataIdentity,
    *,
    development_sha256: str,
    artifacts_root: Path,
) -> TunedStudy:
    """The study of this name: the one that stands there, unchanged, or a new one.

    Raises:
        StudyError: A study of this name was made from another study file or other data, is no
            study of the tuner, or was reported and should train more trials.
    """
    name = study_name(spec, data)
    if find_name(name, optuna.get_all_study_names(storage.optuna)) is None:
        # What is typed and what another system's file names are made of differ in the letters'
        # composition: new studies have one of them.
        name = unicodedata.normalize("NFC", name)
        create(storage, name, _new_record(name, spec, data, development_sha256))
    tuned = load(storage, name, artifacts_root=artifacts_root)
    _refuse_another_study(tuned, spec, data)
    _refuse_more_trials_after_the_report(tuned, spec.trials)
    return renew_folder(tuned, spec)


def take_settings(tuned: TunedStudy, spec: StudySpec) -> None:
    """Gives a study the budget and the stop rule of a study file: for who holds its lease."""
    _set_attributes(tuned, _changed_settings(tuned, spec))


def _changed_settings(tuned: TunedStudy, spec: StudySpec) -> dict[str, Any]:
    """The study attributes by which a study differs from what a launch asks for."""
    asked: dict[str, Any] = {ERROR_KEY: None}
    trials = max(spec.trials, len(tuned.trials(*FINISHED)))  # what is finished was paid for
    if (tuned.budget, tuned.stop) != (trials, spec.stop):
        asked |= {
            BUDGET_KEY: trials,
            STOP_KEY: _tables(spec)[STOP_KEY],
            ENDED_EARLY_KEY: None,
        }
    asked |= {key: value for key, value in _tables(spec).items() if key != STOP_KEY}
    known = tuned.study.user_attrs
    folder, data = known[RECORD_KEY]["spec_folder"], known[RECORD_KEY]["spec"]["data"]
    if (folder, data["source"]) != (str(spec.folder), spec.to_document()["data"]["source"]):
        asked[RECORD_KEY] = moved_document(known[RECORD_KEY], spec)
    return {key: value for key, value in asked.items() if known.get(key) != value}


def _tables(spec: StudySpec) -> dict[str, Any]:
    """The tables of a study file that a later launch may change, as attributes of the study."""
    tables = {STOP_KEY: spec.stop, NOTIFY_KEY: spec.notify, CONFIRM_KEY: spec.confirm}
    return {key: table and table.model_dump() for key, table in tables.items()}


def _set_attributes(tuned: TunedStudy, attributes: Mapping[str, Any]) -> None:
    for key, value in attributes.items():
        tuned.study.set_user_attr(key, value)


def _differing_settings(tuned: TunedStudy, spec: StudySpec) -> str:
    """What a launch asks for, in words, where the study has something else."""
    differing = [] if tuned.budget == spec.trials else [f"{spec.trials} trials"]
    if tuned.stop != spec.stop:
        stop = spec.stop and spec.stop.model_dump()
        differing.append("no [stop]" if stop is None else f"[stop] {stop}")
    if tuned.notify != spec.notify:
        notify = spec.notify and spec.notify.model_dump()
        differing.append("no [notify]" if notify is None else f"[notify] {notify}")
    if tuned.confirm != spec.confirm:
        confirm = spec.confirm and spec.confirm.model_dump()
        differing.append("no [confirm]" if confirm is None else f"[confirm] {confirm}")
    known, source = tuned.study.user_attrs[RECORD_KEY], spec.to_document()["data"]["source"]
    if known["spec_folder"] != str(spec.folder):
        differing.append(f"the data from {spec.folder}")
    elif known["spec"]["data"]["source"] != source:
        differing.append(f"the data from {source}")
    return " and ".join(differing) or "the same"


def _new_record(
    name: str, spec: StudySpec, data: DataIdentity, development_sha256: str
) -> StudyRecord:
    return StudyRecord(
        spec=spec,
        spec_hash=spec.spec_hash,
        data=data,
        development_sha256=development_sha256,
        precision=spec.training.precision,
        sampler=sampler_document(spec),
        pruner=pruner_document(spec),
        versions=versions(),
        folder=study_folder_name(name),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def create(
    storage: Storage, name: str, record: StudyRecord, *, attributes: Mapping[str, Any] | None = None
) -> None:
    """Makes a study under a name of its own, and gives it the real one when it is whole.

    Several launches may do so at once: the first to finish is the study.

    Args:
        storage: Where.
        name: The real name.
        record: What it is made of.
        attributes: More attributes of the study.
    """
    _remove_what_was_cut_off(storage)
    study = optuna.create_study(
        storage=storage.optuna,
        study_name=f"{_MAKING}{int(time.time())}.{uuid.uuid4().hex[:8]}",
        direction="minimize",
    )
    spec = record.spec
    settings: dict[str, Any] = {BUDGET_KEY: spec.trials, **_tables(spec), **(attributes or {})}
    for key, value in settings.items():
        if value is not None:
            study.set_user_attr(key, value)
    for known in spec.known:
        # Marked as ours from its first transaction on: see database.COORDINATOR_KEY.
        study.enqueue_trial(dict(known), user_attrs={COORDINATOR_KEY: "known"})
    study.set_user_attr(RECORD_KEY, record_document(record))
    if not storage.rename_study(study._study_id, name):
        optuna.delete_study(study_name=study.study_name, storage=storage.optuna)


def _remove_what_was_cut_off(storage: Storage) -> None:
    """Removes studies whose making began long ago and never ended."""
    for name in optuna.get_all_study_names(storage.optuna):
        if name.startswith(_MAKING):
            began = int(name.removeprefix(_MAKING).partition(".")[0])
            if abs(time.time() - began) > _MAKING_SECONDS:
                with contextlib.suppress(KeyError):  # another launch removed it a moment ago
                    optuna.delete_study(study_name=name, storage=storage.optuna)


def study_name(spec: StudySpec, data: DataIdentity) -> str:
    """The name of the study in the storage.

    A fallback to synthetic data is another study, so that it never collides with a later
    one on the real data.
    """
    fell_back = data.synthetic and spec.data.source != "synthetic"
    return f"{spec.name}-synthetic" if fell_back else spec.name


def find_name(name: str, names: Collection[str]) -> str | None:
    """`name` if it is one of `names`, else the one that differs in Unicode normalisation alone."""
    if name in names:
        return name
    wanted = unicodedata.normalize("NFC", name)
    equal = (known for known in names if unicodedata.normalize("NFC", known) == wanted)
    return min(equal, default=None)


def load(storage: Storage, name: str, *, artifacts_root: Path) -> TunedStudy:
    """Opens a study that exists, by its name in any Unicode normalisation.

    Raises:
        StudyError: There is none of this name, it is no study of the tuner, or its record is of a
            later version.
    """
    names = [known.study_name for known in storage.optuna.get_all_studies()]
    found = find_name(name, names)
    if found is None:
        listed = ", ".join(sorted(names)) or "none yet"
        launch = command("launch", "SPEC", storage=storage.url, artifacts=artifacts_root)
        raise StudyError(
            f"{storage.masked_url} holds no study {name!r}; it holds: {listed}. "
            f"`{launch}` makes one."
        )
    study = optuna.load_study(study_name=found, storage=storage.optuna)
    document = study.user_attrs.get(RECORD_KEY)
    if document is None:
        raise StudyError(
            f"Study {name!r} in {storage.masked_url} was not made by `tuner launch`; give yours "
            "another name (--name)."
        )
    try:
        record = record_from_document(document)
    except RecordError as error:
        raise StudyError(f"Study {name!r} in {storage.masked_url} {error}") from error
    study.sampler, study.pruner = make_sampler(record.spec), make_pruner(record.spec)
    return TunedStudy(
        study=study,
        record=record,
        storage=storage,
        artifacts=StudyArtifacts(artifacts_root / record.folder),
    )


def delete(tuned: TunedStudy) -> None:
    """Removes a study, its confirmation and their artifacts; the ledger's rows stay.

    Development rows leave the storage with the last study that names them. Their file stays:
    another storage may share the artifacts' folder, and its studies may need it.

    Raises:
        StudyError: It is running.
    """
    lease = tuned.storage.leases.of(tuned.id)
    if lease is not None and lease.is_live:
        raise StudyError(
            f"Study {tuned.name!r} is being run by process {lease.holder.pid} on "
            f"{lease.holder.host}; `{tuned.command('stop', tuned.name)}` first."
        )
    for known in tuned.storage.optuna.get_all_studies():
        if (known.user_attrs.get(CONFIRMS_KEY) or {}).get("key") == tuned.key:
            root = tuned.artifacts.folder.parent
            delete(load(tuned.storage, known.study_name, artifacts_root=root))
    _remove_what_is_attached(tuned)
    tuned.artifacts.delete()
    tuned.storage.forget(tuned.id)
    optuna.delete_study(study_name=tuned.name, storage=tuned.storage.optuna)
    tuned.storage.development.remove_unused(RECORD_KEY, "development_sha256")


def _remove_what_is_attached(tuned: TunedStudy) -> None:
    """Removes the files that the dashboard shows with a study and its trials."""
    trials = tuned.trials()
    tuned.artifacts.remove_pages(trial.number for trial in trials)
    for identity in attached_files(tuned, trials):
        tuned.artifacts.remove(identity)


def attached_files(tuned: TunedStudy, trials: Iterable[FrozenTrial]) -> Iterator[str]:
    """The ids of the files that the dashboard shows with a study and its trials."""
    on_study = tuned.storage.optuna.get_study_system_attrs(tuned.id)
    for attributes in (on_study, *(trial.system_attrs for trial in trials)):
        for key, value in attributes.items():
            if key.startswith(ARTIFACT_PREFIXES) and value != "null":  # what was removed
                yield key.rpartition(":")[2]


def refuse_a_reported_study(tuned: TunedStudy) -> None:
    """A study whose test split was opened trains nothing more.

    Raises:
        StudyError: It is such a study.
    """
    searched = tuned.confirms or {"study": tuned.name, "key": tuned.key}
    if tuned.storage.ledger.entries(study_key=searched["key"]):
        raise StudyError(
            f"The test split of study {searched['study']!r} was opened by its report, so it "
            "trains no more trials. Start a new study (--name) with another split seed."
        )


def clear_error(tuned: TunedStudy) -> None:
    """Forgets why the service gave the study up: it was launched again."""
    if tuned.study.user_attrs.get(ERROR_KEY) is not None:
        tuned.study.set_user_attr(ERROR_KEY, None)


def list_names(storage: Storage) -> list[str]:
    """The studies of the tuner in this storage, by name."""
    # Not Optuna's summaries: they copy every trial of every study.
    return sorted(
        known.study_name
        for known in storage.optuna.get_all_studies()
        if RECORD_KEY in known.user_attrs and not known.study_name.startswith(_MAKING)
    )


def _refuse_another_study(tuned: TunedStudy, spec: StudySpec, data: DataIdentity) -> None:
    advice = (
        f"Give the new one another name (--name), or remove the old "
        f"(`{tuned.command('delete', tuned.name)}`)."
    )
    if keys := _differing_keys(tuned.record.spec, spec):
        raise StudyError(
            f"Study {tuned.name!r} exists and was made from another study file; what differs: "
            f"{', '.join(keys)}. {advice}"
        )
    for field in ("sha256", "split_id"):
        old, new = getattr(tuned.record.data, field), getattr(data, field)
        if old != new:
            raise StudyError(
                f"Study {tuned.name!r} exists and was made from other data ({field} {old[:12]}, "
                f"now {new[:12]}). {advice}"
            )


def _refuse_more_trials_after_the_report(tuned: TunedStudy, trials: int) -> None:
    if trials > tuned.budget and tuned.storage.ledger.entries(study_key=tuned.key):
        raise StudyError(
            f"The test split of study {tuned.name!r} was opened by its report, so it takes no more "
            f"trials (budget {tuned.budget}, asked for {trials}). Start a new study "
            "(--name) with another split seed."
        )


def _differing_keys(stored: StudySpec, asked: StudySpec) -> list[str]:
    """Dotted keys of study files in which a study and a launch differ, with both values.

    Never the hashes: another version may compute another one of the same file. A file that leaves
    a key out continues a study that has what an earlier version did then.
    """
    return [
        f"{key} ({before!r}, now {after!r})"
        for key, before, after in _differences(
            stored.identity_document(), asked.identity_document()
        )
        if not (was_default(key, before) and asked.leaves_out(key))
    ]


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Each dotted key whose values differ, and both; None stands for a key that is absent."""
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after
