"""What the handlers of pages and of the API share: routes, the request, and answers.

A handler declares its route, takes the request and the parts of its path, and returns an answer:

    @routes.add("GET", "/studies/<name>")
    def show_study(request: Request, name: str) -> Response: ...
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import quote

import jinja2
from werkzeug import wrappers
from werkzeug.exceptions import BadRequest, Forbidden
from werkzeug.routing import Rule
from werkzeug.utils import redirect, send_file
from werkzeug.wrappers import Response

from tuner.coordination.queue import MAX_UPLOAD_BYTES
from tuner.dashboard.catalogue import Catalogue
from tuner.dashboard.http import DETAIL_KEY, ROOT, VISITOR_KEY
from tuner.dashboard.policy import Policy, Refusals
from tuner.dashboard.predictor import Predictor
from tuner.dashboard.sessions import Sessions, Visitor
from tuner.dashboard.settings import Folders
from tuner.errors import counted
from tuner.storage.storage import Storage

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment

MAX_TOP = 100  #: configurations in one export
#: The pages run one small script of ours and nothing else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

Method = Literal["GET", "POST", "DELETE"]
Handler = TypeVar("Handler", bound=Callable[..., Response])


class Routes:
    """The routes of one module, each declared above its handler; paths are below /tuner."""

    def __init__(self) -> None:
        self.rules: list[Rule] = []

    def add(self, method: Method, path: str) -> Callable[[Handler], Handler]:
        """Declares what a handler answers."""

        def declare(handler: Handler) -> Handler:
            self.rules.append(Rule(path, endpoint=handler, methods=[method]))
            return handler

        return declare


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What every handler works with."""

    storage: Storage  #: of the studies
    policy: Policy  #: who may do what, from where
    sessions: Sessions | None  #: of the users; None: no login is asked for
    folders: Folders  #: that are read and written
    refusals: Refusals  #: the record of failed logins
    catalogue: Catalogue  #: the studies, as read a moment ago
    predictor: Predictor  #: predicts by the studies' networks
    slots: Callable[[], int] | None  #: trainings that the workers run at once; None: it has none


class Request(wrappers.Request):
    """A request that the guard let through."""

    max_content_length = 4 * MAX_UPLOAD_BYTES

    def __init__(self, environ: WSGIEnvironment, site: Site) -> None:
        super().__init__(environ)
        self.site = site

    @property
    def visitor(self) -> Visitor:
        """Who sent it; there is one for every route that asks for a login."""
        visitor: Visitor = self.environ[VISITOR_KEY]
        return visitor

    def describe(self, detail: str) -> None:
        """Says what it changed or why not, in one line for the record of changes."""
        self.environ[DETAIL_KEY] = detail

    def require_editor(self, what: str) -> None:
        """Refuses a viewer.

        Args:
            what: What only editors may do, as in "launch studies".

        Raises:
            Forbidden: The visitor is a viewer.
        """
        if self.visitor.role != "editor":
            raise Forbidden(f"Only editors {what}.")

    def document(self) -> Mapping[str, Any]:
        """The JSON object in the body.

        Raises:
            BadRequest: There is none, or it has another content type: another site's form can
                send only those.
        """
        if self.mimetype != "application/json":
            raise BadRequest("Send application/json.")
        try:
            document = json.loads(self.get_data())
        except (ValueError, RecursionError):
            raise BadRequest("The body is not JSON.") from None
        if not isinstance(document, dict):
            raise BadRequest("The body is not a JSON object.")
        return document

    def top(self) -> int:
        """The number of configurations to export that the query asks for.

        Raises:
            BadRequest: It is not a number from 1 to `MAX_TOP`.
        """
        text = self.args.get("top", "1")
        if not (text.isascii() and text.isdigit() and len(text) < 5 and 1 <= int(text) <= MAX_TOP):
            raise BadRequest(f"top is a number from 1 to {MAX_TOP}.")
        return int(text)


# --- answers ---


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("tuner.dashboard"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "counted": counted,
    "segment": lambda name: quote(name, safe=""),
}


def page(request: Request, template: str, /, *, code: int = 200, **values: Any) -> Response:
    """A page made of `templates/<template>.html.jinja`."""
    text = _TEMPLATES.get_template(f"{template}.html.jinja").render(
        page=template,
        root=ROOT,
        visitor=request.environ.get(VISITOR_KEY),
        max_top=MAX_TOP,
        **values,
    )
    response = Response(text, code, content_type="text/html; charset=utf-8")
    response.headers["Content-Security-Policy"] = _POLICY
    return response


def json_answer(document: Any, code: int = 200) -> Response:
    """A JSON document."""
    text = json.dumps(document, indent=2)
    return Response(f"{text}\n", code, content_type="application/json")


def to_page(path: str) -> Response:
    """Sends the browser to another page of ours.

    The path is relative: the browser keeps the name and the proxy by which it reached us.
    """
    return redirect(path, 303)


def download(request: Request, content: bytes, name: str, kind: str) -> Response:
    """A file that the browser saves."""
    return send_file(
        io.BytesIO(content), request.environ, mimetype=kind, as_attachment=True, download_name=name
    )


def study_path(name: str) -> str:
    """The path of a study's page."""
    return f"{ROOT}/studies/{quote(name, safe='')}"
