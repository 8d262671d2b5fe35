"""Optuna's dashboard as an application: its requests checked, its answers cached."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna_dashboard
from werkzeug.wrappers import Response

from tuner.artifacts import artifact_store, dashboard_folder
from tuner.dashboard.answer_cache import AnswerCache
from tuner.dashboard.http import OWN_PAGE, ROOT, VISITOR_KEY, RequestError, SecureResponse
from tuner.dashboard.optuna_data import ReadableStudies, Uploads
from tuner.dashboard.optuna_requests import CheckedRequest, Checks, Route
from tuner.every import Every
from tuner.search.attributes import RECORD_KEY
from tuner.storage.storage import Storage

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment

#: What is added to Optuna's page: the way to ours, and what hides the buttons that are refused.
_ADDED = (
    '<link rel="stylesheet" href="{root}/static/dashboard.css">'
    '<a href="{root}" id="tuner-pages" class="{role}">{text}</a></body>'
)


class OptunaDashboard:
    """Optuna's dashboard over one storage, with cached answers.

    The caches, ours and Optuna's, know a study by its id, which SQLite gives again once a study
    is deleted: they are emptied when an id refers to another study than before.
    """

    def __init__(self, storage: Storage, artifacts: Path) -> None:
        self._storage = storage
        artifact_store(artifacts)  # makes the folder
        self.uploads = Uploads(dashboard_folder(artifacts))
        self._checks = Checks(storage.optuna, artifacts, self._is_study)
        self._lock = threading.Lock()
        self._pause = Every(1.0)  # between two looks for other studies
        self._identities: dict[int, tuple[str, str]] = {}
        self._answers = AnswerCache()
        self._app = self._make()

    def _make(self) -> Any:
        studies = ReadableStudies(self._storage.optuna)
        return optuna_dashboard.wsgi(studies, artifact_store=self.uploads)

    def check(
        self, environ: WSGIEnvironment, route: Route, parts: Mapping[str, str]
    ) -> CheckedRequest:
        """See `Checks.check`."""
        if route.method != "GET":
            self._pause.end_pause()  # what is changed is looked for now
        self._notice_other_studies()
        try:
            return self._checks.check(environ, route, parts)
        except KeyError:  # deleted a moment ago
            raise RequestError("404 Not Found", "There is no such study (any more).") from None

    def _is_study(self, study_id: int) -> bool:
        if study_id not in self._identities:
            self._pause.end_pause()  # it may be younger than the last look
            self._notice_other_studies()
        return study_id in self._identities

    def read(
        self, environ: WSGIEnvironment, start: SecureResponse, path: str, asked: CheckedRequest
    ) -> Iterable[bytes]:
        """What Optuna's dashboard answers to a request that only reads."""
        # The dashboard fails on a request that does not say what encodings it takes.
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")
        environ[OWN_PAGE] = asked.may_run_scripts
        if path == "/":  # Optuna's own names scheme and host, which a proxy may have changed
            start("302 Found", [("Location", "/dashboard"), ("Content-Length", "0")])
            return []
        if environ["REQUEST_METHOD"] == "GET" and path.startswith("/dashboard"):
            answer = self._page_with_a_link(environ)
        elif environ["REQUEST_METHOD"] == "GET" and (seconds := asked.route.cache_seconds):
            key = f"{path}?{asked.query}"
            answer = self._answers.get(key, seconds, lambda: self._ask(environ))
        else:
            answer = self._ask(environ)
        return answer(environ, start)

    def _page_with_a_link(self, environ: WSGIEnvironment) -> Response:
        """Optuna's one page, with the way to ours on it."""
        for header in ("HTTP_IF_MODIFIED_SINCE", "HTTP_IF_NONE_MATCH", "HTTP_RANGE"):
            environ.pop(header, None)
        page = self._ask(environ)
        role = environ[VISITOR_KEY].role
        text = "launch and export" if role == "editor" else "progress and export"
        added = _ADDED.format(root=ROOT, role=role, text=text)
        page.data = page.data.replace(b"</body>", added.encode(), 1)
        for header in ("Last-Modified", "ETag", "Accept-Ranges"):
            page.headers.pop(header, None)
        return page

    def _ask(self, environ: WSGIEnvironment) -> Response:
        answer = Response.from_app(self._app, environ, buffered=True)
        if answer.status_code == 500:  # Optuna's dashboard says no more than that
            self._storage.look()
        return answer

    def write(self, environ: WSGIEnvironment, start: SecureResponse) -> list[bytes]:
        """What Optuna's dashboard answers to a change; a failed upload leaves no file."""
        with self.uploads.whole_or_nothing(lambda: start.status < 400):
            return list(self._ask(environ)(environ, start))

    def name(self, study_id: int) -> str:
        """The name of a study that there is."""
        return self._identities.get(study_id, ("", ""))[0]

    def forget(self) -> None:
        """Something was changed: the next answer shows it."""
        with self._lock:
            self._pause.end_pause()
            self._app = self._make()  # before the answers are cleared: no old one may follow
            self._answers.clear()

    def _notice_other_studies(self) -> None:
        with self._lock:
            if not self._pause.is_due():
                return
            found = {
                one._study_id: (one.study_name, _key_of(one.user_attrs))
                for one in self._storage.optuna.get_all_studies()
            }
            known, self._identities = self._identities, found
            if any(found.get(study_id) != identity for study_id, identity in known.items()):
                self._storage.optuna.forget_names()
                self._app = self._make()
                self._answers.clear()


def _key_of(attributes: dict[str, Any]) -> str:
    record = attributes.get(RECORD_KEY)
    return str(record.get("folder", "")) if isinstance(record, dict) else ""
