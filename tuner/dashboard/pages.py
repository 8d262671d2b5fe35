"""The tuner's own pages, /tuner: launch, stop, resume and export studies.

None of them opens the test split.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path, PurePath
from typing import Any, get_args

import tomli_w
from werkzeug.exceptions import (
    BadRequest,
    HTTPException,
    RequestEntityTooLarge,
    ServiceUnavailable,
)
from werkzeug.utils import send_from_directory
from werkzeug.wrappers import Response

from tuner.coordination import queue
from tuner.dashboard import verbs
from tuner.dashboard.http import ROOT
from tuner.dashboard.login import headers_of
from tuner.dashboard.predictor import PredictionAnswer, missing_package
from tuner.dashboard.web import Request, Routes, download, page, study_path, to_page
from tuner.errors import (
    DataError,
    Problem,
    SpecError,
    StorageError,
    StudyError,
    TunerError,
    ordinal,
)
from tuner.results.export import Format, best_configs, render
from tuner.results.prediction import writer_of
from tuner.search.check import brackets_in_words
from tuner.search.confirmation import winner_in_words
from tuner.search.pruning_audit import audit_in_words
from tuner.search.status import StudyStatus, status
from tuner.search.study import find_name, list_names
from tuner.search.tuned_study import TunedStudy
from tuner.spec.spec import StudySpec

#: A report brings its scripts along, so it runs in an origin of its own: no cookie, no request.
_REPORT_POLICY = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; frame-ancestors 'none'"
)

_STATIC = Path(__file__).parent / "static"

routes = Routes()


@routes.add("GET", "/")
def show_studies(request: Request) -> Response:
    return page(request, "studies", states=request.site.catalogue.states())


@routes.add("GET", "/log")
def show_log(request: Request) -> Response:
    request.require_editor("see who changed what")
    return page(request, "log", changes=request.site.storage.audit.entries(last=200))


@routes.add("GET", "/static/<file>")
def static(request: Request, file: str) -> Response:
    return send_from_directory(_STATIC, file, request.environ)


# --- one study ---


@routes.add("GET", "/studies/<name>")
def show_study(request: Request, name: str) -> Response:
    return _study_page(request, verbs.load_study(request, name))


def _study_page(request: Request, tuned: TunedStudy, *, said: str = "") -> Response:
    state = status(tuned)
    ranked = [(trial.number, trial.value, trial.last_step or 0) for trial in tuned.ranked()[:10]]
    return page(
        request,
        "study",
        one=state,
        facts=_facts(request, tuned, state),
        ranked=ranked,
        study_id=tuned.id,
        report_command=tuned.command("report", tuned.name),
        has_report=_report_file(tuned).is_file(),
        spec=tomli_w.dumps(tuned.record.spec.to_document()),
        said=said,
        **_prediction_limits(),
    )


def _facts(request: Request, tuned: TunedStudy, state: StudyStatus) -> tuple[tuple[str, str], ...]:
    """What identifies a study: headings and texts."""
    data, seal = tuned.record.data, _seal_in_words(request, tuned, state)
    split = tuned.record.spec.data.split.in_words
    rows = (
        f"{data.training_rows:,} training, {data.validation_rows:,} validation, "
        f"{data.test_rows:,} test rows ({seal})"
    )
    return (
        ("Made", f"{tuned.record.created_at[:19].replace('T', ' ')} UTC"),
        ("Data", f"{data.source}, sha256 {data.sha256[:12]}"),
        (
            "Split",
            f"{split}, identity {data.split_id[:12]}: {rows}",
        ),
        *((("Winner", winner_in_words(tuned)),) if state.best else ()),
        ("Study file", tuned.record.spec_hash[:12]),
        ("Epochs", f"{state.epochs_spent:,} spent, {state.epochs_saved:,} saved by pruning"),
        *(
            [("Pruning audit", audit_in_words(state.pruning_audit.to_document()))]
            if state.pruning_audit is not None
            else []
        ),
        ("On disk", f"{state.bytes_on_disk / 1e6:.1f} MB"),
    )


def _seal_in_words(request: Request, tuned: TunedStudy, state: StudyStatus) -> str:
    """Whether the study's test split was opened, and by whom."""
    if state.state == "reported":
        again = f": the {ordinal(state.look)} look at it" if state.look > 1 else ""
        return f"opened for the report{again}"
    opened = [
        entry
        for entry in request.site.storage.ledger.entries()
        if entry.split_id == tuned.record.data.split_id and entry.study_key != tuned.key
    ]
    if not opened:
        return "sealed"
    names = ", ".join(dict.fromkeys(entry.study for entry in opened))
    numbers = ", ".join(str(entry.id) for entry in opened)
    return f"opened before, for a report of {names}: ledger {numbers}"


@routes.add("POST", "/studies/<name>/stop")
def stop(request: Request, name: str) -> Response:
    verbs.stop(request, name)
    return to_page(study_path(name))


@routes.add("POST", "/studies/<name>/resume")
def resume(request: Request, name: str) -> Response:
    verbs.resume(request, name)
    return to_page(study_path(name))


@routes.add("POST", "/studies/<name>/delete")
def delete(request: Request, name: str) -> Response:
    if find_name(request.form.get("confirm", ""), [name]) is None:
        raise BadRequest(f"To delete the study, write its name, {name}, into the field.")
    verbs.delete(request, name)
    return to_page(ROOT)


@routes.add("GET", "/studies/<name>/export")
def export(request: Request, name: str) -> Response:
    top, form = request.top(), _format(request)
    tuned = verbs.load_study(request, name)
    written = {
        f"{tuned.name}-{one.rank}-trial-{one.trial}.{form}": render(one, form).encode()
        for one in best_configs(tuned, top)
    }
    if len(written) == 1:
        ((file, content),) = written.items()
        return download(request, content, file, f"application/{form}")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, content in written.items():
            archive.writestr(file, content)
    name = f"{tuned.name}-best-{len(written)}.zip"
    return download(request, packed.getvalue(), name, "application/zip")


def _format(request: Request) -> Format:
    form = request.args.get("format", "toml")
    for known in get_args(Format):
        if form == known:
            return known  # type: ignore[no-any-return]
    raise BadRequest(f"format is {', '.join(get_args(Format))}.")


@routes.add("GET", "/studies/<name>/report")
def report(request: Request, name: str) -> Response:
    tuned = verbs.load_study(request, name)
    try:
        content = _report_file(tuned).read_bytes()
    except FileNotFoundError:
        text = (
            f"`{tuned.command('report', tuned.name)}` writes the final report of a finished "
            "study. It opens the test split, once, so there is no button for it."
        )
        return page(request, "message", code=404, title="No report here", text=text)
    response = Response(content, content_type="text/html; charset=utf-8")
    response.headers["Content-Security-Policy"] = _REPORT_POLICY
    return response


def _report_file(tuned: TunedStudy) -> Path:
    return tuned.artifacts.report_folder / "report.html"


# --- predicting ---


@routes.add("POST", "/predict")
def predict(request: Request) -> Response:
    tuned = verbs.load_study(request, request.form.get("study", ""))
    fasta, file = _sent_sequences(request)
    try:
        answer = verbs.predict(request, tuned.name, fasta, file=file)
    except (DataError, StudyError, RequestEntityTooLarge, ServiceUnavailable) as error:
        return _refused_prediction(request, tuned, fasta, error)
    if request.form.get("action") == "csv":
        return download(request, _as_csv(answer), f"{tuned.name}-predictions.csv", "text/csv")
    return _prediction_page(request, tuned, fasta, answer=answer)


def _sent_sequences(request: Request) -> tuple[bytes, str]:
    """The text of the form, or of the file that was sent with it; and what messages call it."""
    upload = request.files.get("upload")
    if upload is None or not upload.filename:
        # A form sends line ends of its own.
        return request.form.get("fasta", "").replace("\r\n", "\n").encode(), "Sequences"
    # One byte more than allowed, so that what is too long is seen to be.
    content = upload.stream.read(verbs.MAX_FASTA_BYTES + 1)
    name = PurePath(upload.filename.replace("\\", "/")).name
    return content, name[:100] or "Sequences"


def _refused_prediction(
    request: Request, tuned: TunedStudy, fasta: bytes, error: TunerError | HTTPException
) -> Response:
    if not isinstance(error, HTTPException):
        code = 422 if isinstance(error, DataError) else 409
        return _prediction_page(request, tuned, fasta, code=code, said=str(error))
    response = _prediction_page(
        request, tuned, fasta, code=error.code or 500, said=error.description or ""
    )
    response.headers.extend(headers_of(error))
    return response


def _prediction_page(
    request: Request,
    tuned: TunedStudy,
    fasta: bytes,
    *,
    code: int = 200,
    said: str = "",
    answer: PredictionAnswer | None = None,
) -> Response:
    shown = fasta if len(fasta) <= verbs.MAX_FASTA_BYTES else b""
    return page(
        request,
        "predictions",
        code=code,
        study=tuned.name,
        fasta=shown.decode("utf-8", "replace"),
        said=said,
        answer=answer,
        **_prediction_limits(),
    )


def _prediction_limits() -> dict[str, Any]:
    """What the form for sequences says of itself."""
    return {
        "max_sequences": verbs.MAX_SEQUENCES,
        "max_kilobytes": verbs.MAX_FASTA_BYTES // 1024,
        "cannot_predict": missing_package(),
    }


def _as_csv(answer: PredictionAnswer) -> bytes:
    text = io.StringIO()
    write = writer_of("csv", text)
    for prediction in answer.predictions:
        write(prediction)
    return text.getvalue().encode()


# --- launching ---


@routes.add("GET", "/launch")
def show_launch(request: Request) -> Response:
    request.require_editor("launch studies")
    return _launch_page(request)


@routes.add("POST", "/launch")
def launch(request: Request) -> Response:
    try:
        spec = _spec_of_the_form(request)
        if request.form.get("action") == "check":
            return _check_page(request, spec)
        placed = verbs.launch(request, spec)
    except (SpecError, DataError) as error:
        request.describe(f"refused: {'; '.join(map(str, error.problems))}")
        problems = [_of_the_form(problem) for problem in error.problems]
        return _launch_page(request, 422, problems=problems)
    except StorageError:
        raise
    except TunerError as error:
        request.describe(f"refused: {error}")
        return _launch_page(request, 409, said=str(error))
    if placed.shared:  # to be read now: a redirection would lose it
        tuned = verbs.load_study(request, placed.queued.study)
        return _study_page(request, tuned, said=" ".join(placed.shared))
    return to_page(study_path(placed.queued.study))


def _spec_of_the_form(request: Request) -> StudySpec:
    """The study file that was chosen or sent, with what the form says instead.

    Raises:
        BadRequest: The number of trials is not a number.
        SpecError: The study file has mistakes.
    """
    form, upload, folders = request.form, request.files.get("upload"), request.site.folders
    overrides = queue.overrides_for(
        form.get("name", "").strip() or None, _trials(form.get("trials", "").strip())
    )
    if upload is not None and upload.filename:
        # One byte more than allowed, so that what is too long is seen to be.
        content = upload.stream.read(queue.MAX_UPLOAD_BYTES + 1)
        return queue.spec_of_an_upload(
            content, upload.filename, overrides, data_folder=folders.data
        )
    return queue.spec_of_a_file(folders.studies, form.get("file", ""), overrides)


def _trials(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 8):
        raise BadRequest("Trials is a number from 1.")
    return int(text)


def _check_page(request: Request, spec: StudySpec) -> Response:
    found = find_name(spec.name, list_names(request.site.storage))
    existing = None if found is None else status(verbs.load_study(request, found))
    check, brackets = verbs.check(request, spec), brackets_in_words(spec)
    return _launch_page(request, check=check, brackets=brackets, existing=existing)


def _launch_page(request: Request, code: int = 200, /, **more: Any) -> Response:
    """The form, as it was sent if it was."""
    folders = request.site.folders
    empty = {"problems": (), "said": "", "check": None, "brackets": (), "existing": None}
    return page(
        request,
        "launch",
        code=code,
        files=queue.study_files(folders.studies),
        folder=folders.studies.name or str(folders.studies),
        data_folder=folders.data is not None,
        kilobytes=queue.MAX_UPLOAD_BYTES // 1024,
        **{key: request.form.get(key, "") for key in ("file", "name", "trials")},
        **(empty | more),
    )


def _of_the_form(problem: Problem) -> str:
    """A mistake as the launch page says it: what is in no file stands in a field of the form."""
    text = str(problem)
    return text if problem.file else text[:1].upper() + text[1:]
