"""The Optuna dashboard and the tuner's own pages over one storage, behind one guard.

The guard checks of every request for which host it is (Host), from which page it comes (Origin),
who sent it (session), whether that user may send it (role), and, for Optuna's dashboard, whether
its route is on the list of those that cannot break a study. All else is refused.

Why: `docs/decisions.md#why-a-list-of-allowed-routes`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING
from urllib.parse import quote

from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.http import parse_cookie

from tuner import logs
from tuner.dashboard.application import Application
from tuner.dashboard.catalogue import Catalogue
from tuner.dashboard.health import NO_DATABASE
from tuner.dashboard.http import (
    DETAIL_KEY,
    FROM_PROXY,
    LOGIN,
    LOGOUTS,
    METRICS,
    PUBLIC,
    QUESTIONS,
    ROOT,
    VISITOR_KEY,
    RequestError,
    SecureResponse,
    is_api,
    is_ours,
    request_path,
)
from tuner.dashboard.login import Scrapers
from tuner.dashboard.optuna_app import OptunaDashboard
from tuner.dashboard.optuna_requests import DELETE_STUDY, Route, find_route
from tuner.dashboard.policy import READING, WRITING, Policy, Refusals
from tuner.dashboard.predictor import Predictor
from tuner.dashboard.sessions import Sessions, Visitor
from tuner.dashboard.settings import Folders
from tuner.dashboard.verbs import delete_study
from tuner.dashboard.web import Site
from tuner.errors import StorageError, TunerError
from tuner.search.study import load
from tuner.storage.storage import Storage

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

#: In the WSGI environment: the request has its entry in the record of changes.
_RECORDED = "tuner.recorded"


class Guard:
    """The WSGI application that decides about each request, and passes it on."""

    def __init__(
        self,
        storage: Storage,
        policy: Policy,
        folders: Folders,
        *,
        predictor: Predictor | None = None,
        slots: Callable[[], int] | None = None,
    ) -> None:
        self._storage = storage
        self._policy = policy
        self._predictor = predictor or Predictor()
        self._artifacts = folders.artifacts
        self._sessions = None if policy.users is None else Sessions(policy.users)
        self._refusals = Refusals(storage.audit.record)
        self._scrapers = None if policy.users is None else Scrapers(policy, self._refusals)
        self._optuna = OptunaDashboard(storage, folders.artifacts)
        site = Site(
            storage=storage,
            policy=policy,
            sessions=self._sessions,
            folders=folders,
            refusals=self._refusals,
            catalogue=Catalogue(storage, folders.artifacts),
            predictor=self._predictor,
            slots=slots,
        )
        self._pages = Application(site)
        if policy.users is not None:
            for name, address in storage.audit.logins():
                policy.limit.remember(name, address)

    def close(self) -> None:
        """Ends what was started for requests."""
        self._predictor.close()

    def may_send_much(self, environ: WSGIEnvironment) -> bool:
        """Whether a request may have a large body: it has a session, or no login is asked for.

        Args:
            environ: Needs no more than its Cookie and Host headers.
        """
        return self._visitor(environ) is not None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = request_path(environ)
        answer = SecureResponse(start_response, path, environ, secure=self._policy.secure)
        try:
            body = self._answer(environ, answer, path)
            self._record_a_refusal(environ, answer, path)
            return body
        except RequestError as error:
            body = answer.refuse(error)
            self._record_a_refusal(environ, answer, path, error.message)
            return body
        except (StorageError, OSError) as error:
            return answer.refuse(RequestError("503 Service Unavailable", str(error)))
        except (StorageInternalError, SQLAlchemyError):  # the driver's own words, with SQL
            return answer.refuse(RequestError("503 Service Unavailable", NO_DATABASE))
        except TunerError as error:
            return answer.refuse(RequestError("409 Conflict", str(error)))
        except Exception as error:  # noqa: BLE001 - else the browser would wait forever
            what = f"{environ.get('REQUEST_METHOD')} {path!r}: {type(error).__name__}: {error}"
            logging.getLogger(logs.OURS).error(what)
            return answer.refuse(RequestError("500 Internal Server Error", "Something broke here."))

    def _answer(
        self, environ: WSGIEnvironment, answer: SecureResponse, path: str
    ) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        if not environ.get(FROM_PROXY, True):
            raise RequestError(
                "403 Forbidden",
                "This dashboard stands behind a proxy and answers to that alone; --trust-proxy "
                "names one more.",
            )
        if not self._policy.names_host(environ):
            raise RequestError(
                "421 Misdirected Request",
                "This dashboard does not answer to that name; --allow-host gives it one more.",
            )
        if method not in READING | WRITING:
            allow = ", ".join(sorted(READING | WRITING))
            raise RequestError("405 Method Not Allowed", f"Use {allow}.", [("Allow", allow)])
        if method in WRITING and not self._policy.is_same_origin(environ):
            raise RequestError("403 Forbidden", "That came from another site's page.")
        if path in PUBLIC or path.startswith(f"{ROOT}/static/"):
            return self._pages(environ, answer)
        visitor = self._visitor(environ)
        if visitor is None and path == METRICS and self._scrapers is not None:
            visitor = self._scrapers.visitor(environ)
        if visitor is None:
            raise self._login_first(environ, path)
        environ[VISITOR_KEY] = visitor
        if method in WRITING and not (method == "POST" and path in QUESTIONS):
            return self._change(environ, answer, path, visitor)
        if is_ours(path):
            return self._pages(environ, answer)
        found = find_route(method, path)
        if found is None:
            raise RequestError("404 Not Found", "There is no such page.")
        return self._optuna.read(environ, answer, path, self._optuna.check(environ, *found))

    def _record_a_refusal(
        self, environ: WSGIEnvironment, answer: SecureResponse, path: str, detail: str = ""
    ) -> None:
        if answer.status != 403 or _RECORDED in environ:
            return
        visitor = environ.get(VISITOR_KEY)
        with contextlib.suppress(StorageError):  # refused all the same
            self._refusals.add(
                who="" if visitor is None else visitor.name,
                address=str(environ.get("REMOTE_ADDR", "")),
                action=_action(environ, path),
                status=answer.status,
                detail=detail,
            )

    def _visitor(self, environ: WSGIEnvironment) -> Visitor | None:
        if self._sessions is None:
            return Visitor(name=self._policy.local_name, role="editor", logged_in=False)
        token = parse_cookie(environ).get(self._policy.cookie(environ))
        return self._sessions.visitor(token) if token else None

    def _login_first(self, environ: WSGIEnvironment, path: str) -> RequestError:
        message = f"Log in first: {ROOT}/login"
        if environ["REQUEST_METHOD"] in READING and not is_api(path):
            query = environ.get("QUERY_STRING", "")
            # Quoted as it was asked for, then as a part of another address.
            asked = quote(path.encode("latin-1", "replace"))
            there = quote(asked + (f"?{query}" if query else ""), safe="/")
            return RequestError("303 See Other", message, [("Location", f"{LOGIN}?next={there}")])
        return RequestError("401 Unauthorized", message)

    def _change(
        self, environ: WSGIEnvironment, answer: SecureResponse, path: str, visitor: Visitor
    ) -> Iterable[bytes]:
        """A request that changes something: it needs an editor and a known route; is recorded."""
        method = environ["REQUEST_METHOD"]
        if path in LOGOUTS:
            return self._pages(environ, answer)
        if visitor.role != "editor":
            raise RequestError(
                "403 Forbidden", f"{visitor.name} is a viewer: only an editor may change things."
            )
        ours, found = is_ours(path), find_route(method, path)
        if not ours and found is None:
            raise RequestError(
                "403 Forbidden",
                "The dashboard must not change that: it would break the study. Use the pages "
                f"under {ROOT} or the `tuner` command.",
            )
        entry = self._storage.audit.record(
            who=visitor.name,
            address=str(environ.get("REMOTE_ADDR", "")),
            action=_action(environ, path),
        )
        environ[_RECORDED] = True
        detail, status = "", 500
        try:
            if found is None:
                body = list(self._pages(environ, answer))
                detail = str(environ.get(DETAIL_KEY, ""))
            else:
                detail, body = self._change_a_study(environ, answer, *found)
            status = answer.status
        except RequestError as error:
            status, detail = int(error.status[:3]), error.message
            raise
        except StorageError as error:
            status, detail = 503, str(error)
            raise
        except TunerError as error:
            status, detail = 409, str(error)
            raise
        finally:
            self._optuna.forget()
            self._storage.audit.complete(entry, status=status, detail=detail)
        return body

    def _change_a_study(
        self,
        environ: WSGIEnvironment,
        answer: SecureResponse,
        route: Route,
        parts: Mapping[str, str],
    ) -> tuple[str, list[bytes]]:
        """Lets Optuna's dashboard change a study.

        Returns:
            What was changed, for the record of changes, and the body of the answer.
        """
        with (
            self._optuna.uploads.one_at_a_time
            if route.method == "POST"
            else contextlib.nullcontext()
        ):
            asked = self._optuna.check(environ, route, parts)
            assert asked.study is not None
            name = self._optuna.name(asked.study)
            if route is DELETE_STUDY:
                tuned = load(self._storage, name, artifacts_root=self._artifacts)
                return delete_study(tuned), answer.no_content()
            return name, self._optuna.write(environ, answer)


def _action(environ: WSGIEnvironment, path: str) -> str:
    """Method and path of a request, for the record of changes."""
    text = path.encode("latin-1", "replace").decode("utf-8", "replace")
    return f"{environ['REQUEST_METHOD']} {text}"
