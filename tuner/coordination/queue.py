"""Requests to the service: queue a study, stop it, and take a study file that somebody sends.

`tuner launch --detach`, `tuner stop` and the pages of the dashboard make the same requests.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Literal

import tomli_w

from tuner.data.prepare import Prepared, prepare
from tuner.errors import Problem, SpecError, StudyError, counted
from tuner.search.development import find_development, study_development
from tuner.search.overlap import enter
from tuner.search.study import (
    clear_error,
    create_or_resume,
    find_name,
    list_names,
    load,
    refuse_a_reported_study,
)
from tuner.search.tuned_study import FINISHED, TunedStudy
from tuner.spec.reader import load_spec
from tuner.spec.spec import StudySpec
from tuner.storage.holder import LeaseHolder
from tuner.storage.storage import Storage

MAX_UPLOAD_BYTES = 256 * 1024  #: a study file has two or three thousand

#: "running": a coordinator is at work on it already, "finished": its budget is reached.
Outcome = Literal["queued", "queued already", "running", "finished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueResult:
    """What became of a study that was to be queued."""

    study: str  #: its name
    outcome: Outcome  #: see there
    finished: int  #: trials
    budget: int  #: trials
    holder: LeaseHolder | None = None  #: who runs it, where it is running

    @property
    def in_words(self) -> str:
        if self.outcome == "finished":
            of = f"{self.finished} of {counted(self.budget, 'trial')}"
            return f"Study {self.study} is finished: {of}."
        if self.outcome == "running" and self.holder is not None:
            return (
                f"Study {self.study} is running already, in process {self.holder.pid} on "
                f"{self.holder.host}, to {counted(self.budget, 'trial')}."
            )
        return (
            f"Study {self.study} is {self.outcome}: {self.budget - self.finished} of "
            f"{counted(self.budget, 'trial')} to go."
        )

    def to_document(self) -> dict[str, Any]:
        return {
            "study": self.study,
            "outcome": self.outcome,
            "finished_trials": self.finished,
            "budget": self.budget,
            "message": self.in_words,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StopResult:
    """What became of a study that was to stop."""

    study: str  #: its name
    asked: bool  #: a coordinator heard it
    dequeued: bool  #: it was in the queue

    @property
    def in_words(self) -> str:
        if self.asked:
            left = ", and took it out of the queue" if self.dequeued else ""
            return (
                f"Asked {self.study} to stop{left}: it ends after the epochs that are being "
                "trained."
            )
        if self.dequeued:
            return f"Took {self.study} out of the queue; it was not running."
        return f"{self.study} is not running: nothing to stop."

    def to_document(self) -> dict[str, Any]:
        return {"study": self.study, "asked": self.asked, "dequeued": self.dequeued}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceResult:
    """A study file that became a queued study."""

    queued: QueueResult  #: what became of the study
    warnings: tuple[str, ...]  #: about its data
    shared: tuple[str, ...]  #: those of them about rows that other studies keep sealed
    synthetic: bool  #: its rows are made up


def queue(tuned: TunedStudy) -> QueueResult:
    """Puts a study into the service's queue, where it is not at work already.

    Raises:
        StudyError: Its test split was opened, or its rows are nowhere.
    """
    storage = tuned.storage
    finished, lease = len(tuned.trials(*FINISHED)), storage.leases.of(tuned.id)

    def found(outcome: Outcome, holder: LeaseHolder | None = None) -> QueueResult:
        return QueueResult(
            study=tuned.name,
            outcome=outcome,
            finished=finished,
            budget=tuned.budget,
            holder=holder,
        )

    if finished >= tuned.budget:
        return found("finished")
    refuse_a_reported_study(tuned)
    # A study that is about to stop is queued again behind that.
    if lease is not None and lease.is_live and not lease.stop_requested:
        return found("running", lease.holder)
    # The service may not see this machine's files.
    rows = study_development(tuned).read_bytes()
    storage.development.add(tuned.record.development_sha256, rows)
    clear_error(tuned)
    return found("queued" if storage.queue.add(tuned.id) else "queued already")


def stop(tuned: TunedStudy) -> StopResult:
    """Takes a study out of the queue and asks its coordinator to stop."""
    # In this order: a service that hears the second must not find it queued again.
    dequeued = tuned.storage.queue.remove(tuned.id)
    asked = tuned.storage.leases.request_stop(tuned.id)
    return StopResult(study=tuned.name, asked=asked, dequeued=dequeued)


def place(storage: Storage, spec: StudySpec, *, artifacts_root: Path) -> PlaceResult:
    """Creates the study of a study file, or resumes it, and queues it.

    Raises:
        DataError: Its data cannot be used.
        StudyError: Another study has its name, or see `queue`.
    """
    prepared = prepare_here(storage, spec, artifacts_root=artifacts_root)
    tuned = create_or_resume(
        storage,
        spec,
        prepared.identity,
        development_sha256=prepared.development_sha256,
        artifacts_root=artifacts_root,
    )
    shared = enter(storage, spec, prepared)
    return PlaceResult(
        queued=queue(tuned),
        warnings=(*prepared.all_warnings, *shared),
        shared=shared,
        synthetic=prepared.identity.synthetic,
    )


def prepare_here(storage: Storage, spec: StudySpec, *, artifacts_root: Path) -> Prepared:
    """The spec's data, checked and split; the rows of an earlier study where they are the same.

    A service in a container sees no data set, and should not: the test split is in it. An
    earlier study over the published data set and the same split has brought the rows to train
    on, and the data set cannot have changed: its hash is pinned.

    Raises:
        DataError: The data cannot be used.
    """
    if spec.data.source == "solubility":
        earlier = _rows_of_an_earlier_study(storage, spec, artifacts_root)
        if earlier is not None:
            return earlier
    return prepare(spec.data, folder=spec.folder, artifacts=artifacts_root, sha256=spec.data_sha256)


def _rows_of_an_earlier_study(
    storage: Storage, spec: StudySpec, artifacts_root: Path
) -> Prepared | None:
    wanted = spec.data.model_copy(update={"fallback": None})
    for name in list_names(storage):
        try:
            tuned = load(storage, name, artifacts_root=artifacts_root)
        except StudyError:  # deleted a moment ago
            continue
        record = tuned.record
        if record.data.synthetic:
            continue
        its = record.spec.data.model_copy(update={"fallback": None})
        sha256 = record.development_sha256
        if its == wanted and (file := find_development(storage, artifacts_root, sha256)):
            return Prepared(
                identity=record.data,
                development_file=file,
                development_sha256=sha256,
                warnings=(),
            )
    return None


# --- study files ---


def overrides_for(name: str | None, trials: int | None) -> list[str]:
    """What `--name` and `--trials` write into a study file."""
    given = [] if name is None else [tomli_w.dumps({"name": name}).strip()]
    return given + ([] if trials is None else [f"trials={trials}"])


def study_files(folder: Path) -> tuple[str, ...]:
    """The study files of a folder, by name; none if the folder does not exist."""
    return tuple(sorted(path.name for path in folder.glob("*.toml") if path.is_file()))


def spec_of_a_file(folder: Path, name: str, overrides: Sequence[str] = ()) -> StudySpec:
    """One of the folder's study files.

    Raises:
        SpecError: It is none of them, or has mistakes.
    """
    known = study_files(folder)
    found = find_name(name, known)
    if found is None:
        listed = ", ".join(known) or "none"
        raise _refused(name, "", name, f"is not a study file of this server; it has: {listed}")
    try:
        return load_spec(folder / found, overrides)
    except SpecError as error:
        raise _as_named(error, folder / found, name) from error


def spec_of_an_upload(
    content: bytes, name: str, overrides: Sequence[str], *, data_folder: Path | None
) -> StudySpec:
    """A study file that somebody sent. It may not make this machine read files of its choice.

    Args:
        content: TOML.
        name: Of the file, for messages.
        overrides: As of `load_spec`.
        data_folder: Its data files must lie directly in this folder; None: it may name none.

    Raises:
        SpecError: With all mistakes.
    """
    shown = PurePath(name.replace("\\", "/")).name[:100] or "upload.toml"
    if len(content) > MAX_UPLOAD_BYTES:
        raise _refused(
            shown, "", "", f"has {len(content)} bytes; a study file has at most {MAX_UPLOAD_BYTES}"
        )
    with tempfile.TemporaryDirectory(prefix="tuner-upload-") as folder:
        path = Path(folder) / "upload.toml"
        path.write_bytes(content)
        try:
            spec = load_spec(path, overrides)
        except SpecError as error:
            raise _as_named(error, path, shown) from error
    source = spec.data.source
    for file in [source] if isinstance(source, str) else source.model_dump().values():
        if file not in ("solubility", "synthetic"):
            _refuse_a_foreign_file(shown, file, data_folder)
    return spec.model_copy(update={"folder": (data_folder or Path("studies")).absolute()})


def _refuse_a_foreign_file(shown: str, file: str, data_folder: Path | None) -> None:
    allowed = 'an uploaded study file may name "solubility" or "synthetic"'
    if data_folder is None:
        raise _refused(
            shown,
            "data.source",
            file,
            f"{allowed}; for files of your own, the server is started with --data FOLDER",
        )
    root, path = data_folder.resolve(), (data_folder / file).resolve()
    # A link out of the folder is as foreign as a path out of it.
    if PurePath(file).name != file or path.parent != root or not path.is_file():
        raise _refused(
            shown,
            "data.source",
            file,
            f"{allowed}, or a file in the data folder of this server, by its name alone",
        )


def _refused(file: str, key: str, value: str, message: str) -> SpecError:
    return SpecError([Problem(file=file, line=None, key=key, value=value[:60], message=message)])


def _as_named(error: SpecError, path: Path, name: str) -> SpecError:
    """The same mistakes under the name that the user knows."""
    return SpecError(
        [
            replace(
                problem,
                file=name if problem.file == str(path) else problem.file,
                key=problem.key.removeprefix("--set "),  # the pages and the API have fields
            )
            for problem in error.problems
        ]
    )
