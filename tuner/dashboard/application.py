"""The WSGI application under /tuner: finds a request's handler, and answers errors.

It stands behind the guard (`guard`), which has looked at the host, the origin, the session and
the role of every request before, and records every change.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map
from werkzeug.wrappers import Response

from tuner.dashboard import api, login, pages, prometheus
from tuner.dashboard.http import DETAIL_KEY, QUESTIONS, ROOT, is_api
from tuner.dashboard.login import headers_of
from tuner.dashboard.web import Request, Site, json_answer, page
from tuner.errors import ProblemsError, StorageError, TunerError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

_CANNOT = "That cannot be done"  #: the heading of a page about an error


class Application:
    """Every page and every verb of the API that is the tuner's own."""

    def __init__(self, site: Site) -> None:
        self._site = site
        modules = (pages, login, api, prometheus)
        self._routes = Map(
            [rule.empty() for module in modules for rule in module.routes.rules],
            strict_slashes=False,
            merge_slashes=False,
            redirect_defaults=False,
        )

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = Request(environ, self._site)
        try:
            response = self._answer(request)
        finally:
            request.close()  # and the files that were uploaded with it
        if request.method not in ("GET", "HEAD") and request.path not in QUESTIONS:
            self._site.catalogue.forget()
        return response(environ, start_response)

    def _answer(self, request: Request) -> Response:
        adapter = self._routes.bind("tuner", path_info=request.path.removeprefix(ROOT) or "/")
        try:
            handler, parts = adapter.match(method=request.method)
            response: Response = handler(request, **parts)
        except HTTPException as error:
            reason = error.description or error.name
            response = _refusal(request, error.code or 500, reason, title=error.name)
            response.headers.extend(headers_of(error))
        except ProblemsError as error:  # of a study file, or of its data
            request.describe(f"refused: {'; '.join(map(str, error.problems))}")
            response = _refusal(request, 422, str(error), errors=error.to_document())
        except StorageError:
            raise
        except TunerError as error:
            response = _refusal(request, 409, str(error))
        return response


def _refusal(
    request: Request, code: int, reason: str, *, title: str = _CANNOT, **more: object
) -> Response:
    request.environ.setdefault(DETAIL_KEY, f"refused: {reason}")
    if is_api(request.path):
        return json_answer({"reason": reason, **more}, code)
    return page(request, "message", code=code, title=title, text=reason)
