"""What both applications share: paths, security headers of answers, and errors of requests."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tuner import logs
from tuner.dashboard.addresses import LOOPBACK_NAMES

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment


ROOT = "/tuner"  #: of the tuner's own pages
LOGIN = f"{ROOT}/login"
PUBLIC = frozenset((LOGIN, f"{ROOT}/api/login"))  #: paths that are answered without a session
LOGOUTS = frozenset((f"{ROOT}/logout", f"{ROOT}/api/logout"))
#: Paths to which a POST asks for something and changes nothing, so that viewers may send it.
QUESTIONS = frozenset((f"{ROOT}/predict", f"{ROOT}/api/predict"))

METRICS = "/metrics"  #: answers users with a session, and those who send name and password

VISITOR_KEY = "tuner.visitor"  #: in the WSGI environment: who asks
DETAIL_KEY = "tuner.detail"  #: in the WSGI environment: what was changed, for the record

#: A browser that saw this header uses HTTPS alone for a year.
_HSTS = f"max-age={365 * 24 * 3600}"
#: Optuna's dashboard draws with WebGL, which compiles functions, and styles its elements inline.
_DASHBOARD_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
#: A file is shown in an origin of its own: no cookie, no request, no frame of another site around
#: it. Scripts run in pages that the tuner wrote, and in no other.
SANDBOX_POLICY = (
    "sandbox{scripts}; default-src 'none'; script-src {sources}; "
    "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; media-src 'self'; "
    "frame-ancestors 'self'"
)
_OWN_PAGE_POLICY = SANDBOX_POLICY.format(
    scripts=" allow-scripts", sources="'unsafe-inline' 'unsafe-eval'"
)
_OTHERS_PAGE_POLICY = SANDBOX_POLICY.format(scripts="", sources="'none'")


#: In the WSGI environment, behind a proxy: whether the request came through it.
FROM_PROXY = "tuner.from_proxy"
#: In the WSGI environment: the requested file is a page that the tuner wrote.
OWN_PAGE = "tuner.own_page"


class RequestError(Exception):
    """Ends a request with a status and a reason."""

    def __init__(self, status: str, message: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, list(headers)


class SecureResponse:
    """A `start_response` that adds security headers, and remembers the status (0 before)."""

    def __init__(
        self, start_response: StartResponse, path: str, environ: WSGIEnvironment, *, secure: bool
    ) -> None:
        self._start = start_response
        self._path = path
        self._environ = environ
        host = re.sub(r":\d+$", "", str(environ.get("HTTP_HOST", "")).lower())
        # For "localhost" it would hold for every other port of this machine, too.
        self._sends_hsts = secure and host not in LOOPBACK_NAMES
        self.status = 0

    def __call__(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        self.status = int(status[:3])
        allowed, ours = self._allowed(headers), self._security_headers(headers)
        return self._start(status, [*allowed, *ours], exc_info)

    def _allowed(self, headers: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        ours = is_ours(self._path)
        for name, value in headers:
            lower = name.lower()
            # Optuna lets every site read the artifacts; its policy has no frame-ancestors.
            if lower.startswith("access-control-"):
                continue
            if lower == "content-security-policy" and not ours:
                continue
            if lower == "content-encodings":  # the dashboard's spelling
                continue
            yield name, value

    def _security_headers(self, headers: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        given = {name.lower() for name, _ in headers}
        yield "Server", "tuner"  # instead of Tornado's version
        yield "X-Content-Type-Options", "nosniff"
        yield "Referrer-Policy", "same-origin"
        yield "Cross-Origin-Opener-Policy", "same-origin"
        yield "Permissions-Policy", "camera=(), geolocation=(), microphone=()"
        if self._sends_hsts:
            yield "Strict-Transport-Security", _HSTS
        if self._path.startswith("/artifacts/"):
            own = self._environ.get(OWN_PAGE, False)
            yield "Content-Security-Policy", _OWN_PAGE_POLICY if own else _OTHERS_PAGE_POLICY
            if not own and self.status == 200:
                yield "Content-Disposition", "attachment"
            yield "X-Frame-Options", "SAMEORIGIN"
        else:
            yield "X-Frame-Options", "DENY"
            yield "Cross-Origin-Resource-Policy", "same-origin"
            if not is_ours(self._path) or "content-security-policy" not in given:
                yield "Content-Security-Policy", _DASHBOARD_POLICY
        static = self._path.startswith(("/static/", f"{ROOT}/static/"))
        if not static and "cache-control" not in given:
            # Another user of the same browser must not see it.
            yield "Cache-Control", "no-store"

    def refuse(self, error: RequestError) -> Iterable[bytes]:
        if is_api(self._path):
            body = json.dumps({"reason": error.message})
            kind = "application/json"
        else:
            body, kind = f"{error.message}\n", "text/plain; charset=utf-8"
        content = body.encode()
        headers = [("Content-Type", kind), ("Content-Length", str(len(content)))]
        self(error.status, [*headers, *error.headers])
        return [] if self._environ.get("REQUEST_METHOD") == "HEAD" else [content]

    def no_content(self) -> list[bytes]:
        """204: done, with an empty body."""
        self("204 No Content", [])
        return []


def request_path(environ: WSGIEnvironment) -> str:
    """The path as Optuna's dashboard sees it, which takes slashes off its end."""
    path = str(environ.get("PATH_INFO", "")).rstrip("/")
    environ["PATH_INFO"] = path or "/"
    return path or "/"


def is_ours(path: str) -> bool:
    """Whether a path is one of the tuner's own pages, and not of Optuna's dashboard."""
    return path in (ROOT, METRICS) or path.startswith(f"{ROOT}/")


def is_api(path: str) -> bool:
    """Whether a path is for programs: of one of the two APIs, Optuna's and ours, or the metrics."""
    return path == METRICS or path.startswith(("/api/", f"{ROOT}/api/"))


def log_line(message: str) -> None:
    """Writes a line to the log of the web server."""
    logging.getLogger(logs.OURS).info(message)
