"""The API under /tuner/api: the same as the pages, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from werkzeug.exceptions import BadRequest
from werkzeug.wrappers import Response

from tuner.coordination import queue
from tuner.dashboard import verbs
from tuner.dashboard.web import Request, Routes, json_answer
from tuner.errors import ProblemsError
from tuner.results.export import best_configs
from tuner.search.check import invalid_document
from tuner.search.status import status
from tuner.spec.spec import StudySpec

_UPLOAD = "upload.toml"  #: the name of a study file that came as text

routes = Routes()


@routes.add("GET", "/api/me")
def me(request: Request) -> Response:
    return json_answer({"name": request.visitor.name, "role": request.visitor.role})


@routes.add("GET", "/api/files")
def files(request: Request) -> Response:
    return json_answer({"files": queue.study_files(request.site.folders.studies)})


@routes.add("GET", "/api/log")
def log(request: Request) -> Response:
    request.require_editor("see who changed what")
    fields = ("id", "at", "who", "address", "action", "detail", "status")
    changes = request.site.storage.audit.entries(last=1000)
    return json_answer({"changes": [{key: getattr(one, key) for key in fields} for one in changes]})


@routes.add("GET", "/api/studies")
def studies(request: Request) -> Response:
    return json_answer({"studies": [one.to_document() for one in request.site.catalogue.states()]})


@routes.add("GET", "/api/studies/<name>")
def study(request: Request, name: str) -> Response:
    return json_answer(status(verbs.load_study(request, name)).to_document())


@routes.add("GET", "/api/studies/<name>/export")
def export(request: Request, name: str) -> Response:
    tuned = verbs.load_study(request, name)
    configs = [one.to_document() for one in best_configs(tuned, request.top())]
    return json_answer({"study": tuned.name, "configs": configs})


@routes.add("POST", "/api/check")
def check(request: Request) -> Response:
    document = request.document()
    try:
        return json_answer(verbs.check(request, _spec_of(request, document)))
    except ProblemsError as error:
        file = str(document.get("file") or _UPLOAD)
        return json_answer(invalid_document(file, error), 422)


@routes.add("POST", "/api/studies")
def launch(request: Request) -> Response:
    placed = verbs.launch(request, _spec_of(request, request.document()))
    document = placed.queued.to_document()
    more = {"warnings": placed.warnings, "synthetic": placed.synthetic}
    return json_answer(document | more, 202)


@routes.add("POST", "/api/studies/<name>/stop")
def stop(request: Request, name: str) -> Response:
    return json_answer(verbs.stop(request, name).to_document())


@routes.add("POST", "/api/studies/<name>/resume")
def resume(request: Request, name: str) -> Response:
    return json_answer(verbs.resume(request, name).to_document(), 202)


@routes.add("DELETE", "/api/studies/<name>")
def delete(request: Request, name: str) -> Response:
    verbs.delete(request, name)
    return json_answer({"study": name, "deleted": True})


@routes.add("POST", "/api/predict")
def predict(request: Request) -> Response:
    document = request.document()
    name, fasta = document.get("study"), document.get("fasta")
    if document.keys() != {"study", "fasta"} or not (
        isinstance(name, str) and isinstance(fasta, str)
    ):
        raise BadRequest('Send {"study": "NAME", "fasta": ">p1\\nMKVLAA..."}.')
    # JSON can spell half of a surrogate pair; what is not UTF-8 is reported with its line.
    answer = verbs.predict(request, name, fasta.encode("utf-8", "surrogatepass"))
    tally = answer.tally
    return json_answer(
        {
            "study": answer.study,
            "trials": list(answer.trials),
            "synthetic": answer.synthetic,
            "counts": {
                "records": tally.records,
                "soluble": tally.soluble,
                "unpredicted": tally.unpredicted,
                "flags": dict(tally.flags),
            },
            "predictions": [one.to_document() for one in answer.predictions],
        }
    )


def _spec_of(request: Request, document: Mapping[str, Any]) -> StudySpec:
    """The spec of {"file": ...} or {"toml": ...}; "name" and "trials" replace the file's.

    Raises:
        BadRequest: The document has another form.
        SpecError: The study file has mistakes.
    """
    unknown = document.keys() - {"file", "toml", "name", "trials"}
    file, text = document.get("file"), document.get("toml")
    name, trials = document.get("name"), document.get("trials")
    if unknown or (file is None) == (text is None):
        raise BadRequest(
            'Send {"file": "quickstart.toml"} or {"toml": "..."}, and "name" and "trials" '
            "where they are to be others."
        )
    if not isinstance(name, str | None) or not isinstance(text if file is None else file, str):
        raise BadRequest("file, toml and name are texts.")
    if isinstance(trials, bool) or not isinstance(trials, int | None):
        raise BadRequest("trials is a number.")
    folders, overrides = request.site.folders, queue.overrides_for(name, trials)
    if text is not None:
        # JSON can spell half of a surrogate pair; what is not UTF-8 is reported with its line.
        content = text.encode("utf-8", "surrogatepass")
        return queue.spec_of_an_upload(content, _UPLOAD, overrides, data_folder=folders.data)
    return queue.spec_of_a_file(folders.studies, str(file), overrides)
