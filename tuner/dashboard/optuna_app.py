"""Optuna's dashboard as an application: what it is given to read, and answers that are kept."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna_dashboard

from tuner.artifacts import artifact_store, dashboard_folder
from tuner.dashboard.http import OWN_PAGE, ROOT, VISITOR_KEY, RequestError, SecureResponse
from tuner.dashboard.optuna_requests import (
    CheckedRequest,
    Checks,
    ReadableStudies,
    Route,
    Uploads,
)
from tuner.every import Every
from tuner.search.attributes import RECORD_KEY
from tuner.storage.storage import Storage

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment

#: Answers that many browsers ask for again and again are given out for a moment.
_LONGEST_KEPT_SECONDS = 10.0  #: what took long to answer is given out for up to so long
_KEPT_BYTES = 128 * 1024 * 1024  #: of all such answers together
_KEPT_ANSWERS = 256


#: What is added to Optuna's page: the way to ours, and what hides the buttons that are refused.
_ADDED = (
    '<link rel="stylesheet" href="{root}/static/dashboard.css">'
    '<a href="{root}" id="tuner-pages" class="{role}">{text}</a></body>'
)


@dataclass(slots=True)
class _Kept:
    """One answer of Optuna's dashboard that is given out for a moment."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    until: float = 0.0
    status: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""


class OptunaDashboard:
    """Optuna's dashboard, asked once for what many browsers want at once.

    Fifty browsers that poll a study cost as much as one. Its caches, and Optuna's, know a study
    by its id, which SQLite gives again once a study is deleted: they begin anew whenever an id
    stands for another study than before.
    """

    def __init__(self, storage: Storage, artifacts: Path) -> None:
        self._storage = storage
        artifact_store(artifacts)  # makes the folder
        self.uploads = Uploads(dashboard_folder(artifacts))
        self._checks = Checks(storage.optuna, artifacts, self._is_study)
        self._lock = threading.Lock()
        self._pause = Every(1.0)  # between two looks for other studies
        self._identities: dict[int, tuple[str, str]] = {}
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
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
        self, environ: WSGIEnvironment, answer: SecureResponse, path: str, asked: CheckedRequest
    ) -> Iterable[bytes]:
        # The dashboard fails on a request that does not say what encodings it takes.
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")
        environ[OWN_PAGE] = asked.may_run_scripts
        seconds = asked.route.kept_seconds
        if path == "/":  # Optuna's own names scheme and host, which a proxy may have changed
            answer("302 Found", [("Location", "/dashboard"), ("Content-Length", "0")])
            return []
        if path.startswith("/dashboard") and environ["REQUEST_METHOD"] == "GET":
            return self._page_with_a_link(environ, answer)
        if not seconds or environ["REQUEST_METHOD"] != "GET":
            return self._pass(environ, answer)
        key = f"{path}?{asked.query}"
        kept = self._place_for(key)
        with kept.lock:  # the others wait for the one that asks
            if time.monotonic() >= kept.until:
                began = time.monotonic()
                self._ask(environ, kept)
                took = time.monotonic() - began
                if kept.status.startswith("200"):
                    # The larger the study, the longer: polls never take more than a fiftieth of
                    # a core. Optuna's dashboard keeps the trials of a large study as long.
                    longest = max(seconds, _LONGEST_KEPT_SECONDS)
                    kept.until = time.monotonic() + min(max(seconds, 50 * took), longest)
                self._make_room(key, kept)
            answer(kept.status, list(kept.headers))
            return [kept.body]

    def _page_with_a_link(
        self, environ: WSGIEnvironment, answer: SecureResponse
    ) -> Iterable[bytes]:
        """Optuna's one page, with the way to ours on it."""
        for header in ("HTTP_IF_MODIFIED_SINCE", "HTTP_IF_NONE_MATCH", "HTTP_RANGE"):
            environ.pop(header, None)
        page = _Kept()
        self._ask(environ, page)
        role = environ[VISITOR_KEY].role
        text = "launch and export" if role == "editor" else "progress and export"
        added = _ADDED.format(root=ROOT, role=role, text=text)
        body = page.body.replace(b"</body>", added.encode(), 1)
        other = ("content-length", "last-modified", "etag", "accept-ranges")
        headers = [(name, value) for name, value in page.headers if name.lower() not in other]
        answer(page.status, [*headers, ("Content-Length", str(len(body)))])
        return [body]

    def _ask(self, environ: WSGIEnvironment, kept: _Kept) -> None:
        def note(status: str, headers: list[tuple[str, str]], *_: object) -> None:
            kept.status, kept.headers = status, list(headers)

        chunks = self._app(environ, note)
        try:
            kept.body = b"".join(chunks)
        finally:
            if hasattr(chunks, "close"):
                chunks.close()
        if kept.status.startswith("500"):  # Optuna's dashboard says no more than that
            self._storage.look()

    def _place_for(self, key: str) -> _Kept:
        with self._lock:
            kept = self._kept.setdefault(key, _Kept())
            self._kept.move_to_end(key)
            return kept

    def _make_room(self, key: str, kept: _Kept) -> None:
        """Keeps the newest answers, as many and as large as may be, and no error."""
        with self._lock:
            if kept.until <= 0 and self._kept.get(key) is kept:
                del self._kept[key]
            size = sum(len(one.body) for one in self._kept.values())
            while size > _KEPT_BYTES or len(self._kept) > _KEPT_ANSWERS:
                size -= len(self._kept.popitem(last=False)[1].body)

    def _pass(self, environ: WSGIEnvironment, answer: SecureResponse) -> list[bytes]:
        passed = _Kept()
        self._ask(environ, passed)
        answer(passed.status, passed.headers)
        return [passed.body]

    def write(self, environ: WSGIEnvironment, answer: SecureResponse) -> list[bytes]:
        """What Optuna's dashboard answers to a change; a failed upload leaves no file."""
        with self.uploads.whole_or_nothing(lambda: answer.status < 400):
            return self._pass(environ, answer)

    def name(self, study_id: int) -> str:
        """The name of a study that there is."""
        return self._identities.get(study_id, ("", ""))[0]

    def forget(self) -> None:
        """Something was changed: the next answer shows it."""
        with self._lock:
            self._kept.clear()
            self._pause.end_pause()
            self._app = self._make()

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
                self._kept.clear()
                self._app = self._make()


def _key_of(attributes: dict[str, Any]) -> str:
    record = attributes.get(RECORD_KEY)
    return str(record.get("folder", "")) if isinstance(record, dict) else ""
