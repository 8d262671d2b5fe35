"""What people do with studies; the pages and the API call the same functions.

Each says in the request what it changed, for the record of changes.
"""

from __future__ import annotations

from typing import Any

from werkzeug.exceptions import NotFound

from tuner.coordination import queue
from tuner.dashboard.web import Request
from tuner.errors import counted
from tuner.search import overlap, study
from tuner.search.check import check_document
from tuner.search.tuned_study import TunedStudy
from tuner.spec.spec import StudySpec


def load_study(request: Request, name: str) -> TunedStudy:
    """Opens a study.

    Raises:
        NotFound: There is no study of that name.
    """
    site = request.site
    found = study.find_name(name, study.list_names(site.storage))
    if found is None:
        raise NotFound(f"There is no study {name!r} (any more).")
    return study.load(site.storage, found, artifacts_root=site.folders.artifacts)


def check(request: Request, spec: StudySpec) -> dict[str, Any]:
    """What the study of a study file would do, as `tuner check --json` prints it.

    Raises:
        DataError: Its data cannot be used.
    """
    storage, artifacts = request.site.storage, request.site.folders.artifacts
    prepared = queue.prepare_here(storage, spec, artifacts_root=artifacts)
    request.describe(f"checked {spec.name}")
    return check_document(spec, prepared, overlap.warnings(storage, spec, prepared))


def launch(request: Request, spec: StudySpec) -> queue.PlaceResult:
    """Creates or resumes the study of a study file, and queues it.

    Raises:
        DataError: Its data cannot be used.
        StudyError: See `tuner.coordination.queue.place`.
    """
    site = request.site
    placed = queue.place(site.storage, spec, artifacts_root=site.folders.artifacts)
    request.describe(f"launched: {placed.queued.in_words}")
    return placed


def stop(request: Request, name: str) -> queue.StopResult:
    """Takes a study out of the queue and asks its coordinator to stop."""
    stopped = queue.stop(load_study(request, name))
    request.describe(stopped.in_words)
    return stopped


def resume(request: Request, name: str) -> queue.QueueResult:
    """Queues a study that was stopped.

    Raises:
        StudyError: See `tuner.coordination.queue.queue`.
    """
    queued = queue.queue(load_study(request, name))
    request.describe(queued.in_words)
    return queued


def delete(request: Request, name: str) -> None:
    """Deletes a study.

    Raises:
        StudyError: It is running.
    """
    request.describe(delete_study(load_study(request, name)))


def delete_study(tuned: TunedStudy) -> str:
    """Deletes as `tuner delete` does: the ledger's rows stay, a running study is refused.

    Returns:
        What was deleted, for the record of changes.

    Raises:
        StudyError: It is running.
    """
    trials = counted(len(tuned.trials()), "trial")
    study.delete(tuned)
    return f"deleted {tuned.name} with {trials}"
