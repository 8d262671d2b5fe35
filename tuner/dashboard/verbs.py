"""What people do with studies; the pages and the API call the same functions.

Each says in the request what it changed, for the record of changes.
"""

from __future__ import annotations

import io
import itertools
from typing import Any

from werkzeug.exceptions import NotFound, RequestEntityTooLarge, ServiceUnavailable

from tuner.coordination import queue
from tuner.dashboard.predictor import (
    RETRY_SECONDS,
    PredictionAnswer,
    PredictionRequest,
    PredictorUnavailableError,
    missing_package,
)
from tuner.dashboard.web import Request
from tuner.data.sequences import SequenceRecord, read_sequences
from tuner.errors import DataError, Problem, StudyError, counted
from tuner.search import overlap, study
from tuner.search.check import check_document, count_near_twins
from tuner.search.tuned_study import TunedStudy
from tuner.spec.spec import StudySpec

MAX_SEQUENCES = 1_000  #: that are predicted at once; more is for `tuner predict`
MAX_FASTA_BYTES = 400 * 1024  #: of them; what a form sends beside files is at most 500,000
_FASTA = "FASTA"  #: what messages call a text that came without a file


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
    twins = count_near_twins(spec, prepared, artifacts, say=lambda _: None)
    return check_document(spec, prepared, overlap.warnings(storage, spec, prepared), twins)


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


def predict(request: Request, name: str, fasta: bytes, *, file: str = _FASTA) -> PredictionAnswer:
    """Predicts by the best network of a study.

    Args:
        request: Changes nothing, so it is not recorded.
        name: The study's.
        fasta: The sequences.
        file: What messages call them.

    Raises:
        NotFound: There is no such study.
        StudyError: It has no network that can predict.
        DataError: The text is not FASTA.
        RequestEntityTooLarge: It is too long, or holds too many sequences.
        ServiceUnavailable: TensorFlow is missing, or busy with other predictions.
    """
    tuned = load_study(request, name)
    records = _records(fasta, file)
    if not tuned.ranked():
        raise StudyError(
            f"Study {tuned.name!r} has no fully trained trial yet, so there is no network to "
            "predict with."
        )
    if reason := missing_package():
        raise ServiceUnavailable(reason)
    site = request.site
    try:
        return site.predictor.predict(
            PredictionRequest(
                storage=site.storage.url,
                artifacts=site.folders.artifacts,
                study=tuned.name,
                records=records,
            )
        )
    except PredictorUnavailableError as error:
        raise ServiceUnavailable(str(error), retry_after=RETRY_SECONDS) from error


def _records(fasta: bytes, file: str) -> tuple[SequenceRecord, ...]:
    if len(fasta) > MAX_FASTA_BYTES:
        raise RequestEntityTooLarge(
            f"{len(fasta):,} bytes of FASTA are too much: at most {MAX_FASTA_BYTES:,} are "
            "predicted at once; `tuner predict` takes files of any size."
        )
    try:
        text = fasta.decode()
    except UnicodeDecodeError as error:
        line = fasta.count(b"\n", 0, error.start) + 1
        raise _malformed(file, line, "is not UTF-8 text") from error
    lines = text.removeprefix("\ufeff").splitlines()
    line, first = next(((at, one) for at, one in enumerate(lines, 1) if one.strip()), (1, ""))
    if not first.lstrip().startswith(">"):
        said = "holds no sequence" if not first else "is not FASTA"
        raise _malformed(file, line, f"{said}; write a line >NAME above each sequence", first)
    records = read_sequences(file, io.BytesIO(fasta))
    found = tuple(itertools.islice(records, MAX_SEQUENCES + 1))
    if len(found) > MAX_SEQUENCES:
        raise RequestEntityTooLarge(
            f"More than {counted(MAX_SEQUENCES, 'sequence')} are too many at once; "
            "`tuner predict` takes files of any size."
        )
    return found


def _malformed(file: str, line: int, message: str, value: str = "") -> DataError:
    return DataError([Problem(file=file, line=line, key="", value=value[:60], message=message)])
