"""The Optuna dashboard and the tuner's own pages over one storage, behind one guard.

The guard asks of every request: is it for us (Host), from us (Origin), from whom (session), may
they (role), is it one of the changes that a study survives? Only then does Optuna's dashboard
or a page of ours see it. Whatever is not on a list here is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import math
import re
import signal
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

import optuna_dashboard
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError
from tornado.http1connection import HTTP1Connection
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerConnectionDelegate,
    HTTPServerRequest,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.netutil import is_valid_ip
from tornado.wsgi import WSGIContainer
from werkzeug.http import parse_cookie

from tuner import logs
from tuner.artifacts import artifact_store, dashboard_folder
from tuner.dashboard import pages
from tuner.dashboard.connections import MOST_OF_AN_ADDRESS, LimitedServer, raise_descriptor_limit
from tuner.dashboard.health import ALIVE, NO_DATABASE, READY, Health
from tuner.dashboard.optuna_requests import (
    DELETE_STUDY,
    Asked,
    Checks,
    ReadableStudies,
    Refused,
    Route,
    Uploads,
    find_route,
)
from tuner.dashboard.policy import (
    LOOPBACK_NAMES,
    READING,
    WRITING,
    Policy,
    Refusals,
    Sessions,
    Users,
    Visitor,
    allowed_hosts,
    is_loopback,
    networks,
)
from tuner.errors import StorageError, TunerError, counted
from tuner.search.attributes import RECORD_KEY
from tuner.search.study import delete as delete_study
from tuner.search.study import load
from tuner.storage.storage import Storage

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

#: Answers that many browsers ask for again and again are given out for a moment.
_LONGEST_KEPT_SECONDS = 10.0  #: what took long to answer is given out for up to so long
_KEPT_BYTES = 128 * 1024 * 1024  #: of all such answers together
_KEPT_ANSWERS = 256

_MAX_BODY_BYTES = 16 * 1024 * 1024
_MAX_HEADER_BYTES = 32 * 1024
#: Of a request without a session: a login's, which are the only ones that are answered.
_MAX_STRANGERS_BODY_BYTES = 64 * 1024
_LOOPBACK = ("127.0.0.0/8", "::1")
#: A browser that saw this asks in the clear no more, for so long.
_HSTS = f"max-age={365 * 24 * 3600}"
_IDLE_SECONDS = 75.0  #: a connection that sends no request, or takes so long over its headers
_BODY_SECONDS = 60.0  #: for the body of a request
_THREADS = 16  #: requests answered at once; the storage answers one at a time anyway
_LAST_SECONDS = 5.0  #: for requests that are being answered when the server ends
_CLOSE_SECONDS = 2.0

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


#: What is added to Optuna's page: the way to ours, and what hides the buttons that are refused.
_ADDED = (
    '<link rel="stylesheet" href="{root}/static/dashboard.css">'
    '<a href="{root}" id="tuner-pages" class="{role}">{text}</a></body>'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the dashboard is served."""

    host: str = "127.0.0.1"
    port: int = 8080  #: 0 takes a free one
    users_file: Path | None = None  #: None: no login, on a loopback address alone
    certificate: Path | None = None  #: PEM, with its key in `key`: the server speaks TLS itself
    key: Path | None = None
    behind_proxy: bool = False  #: a proxy that speaks TLS stands before it and says who asks
    proxies: Sequence[str] = ()  #: its addresses or networks; by default this machine's
    trust_network: bool = False  #: nobody listens on the way: plain HTTP although not loopback
    allow_hosts: Sequence[str] = ()  #: further names that browsers ask for
    places: pages.Places = field(default_factory=pages.Places)


def serve(
    storage: Storage, settings: Settings, *, say: Callable[[str], None] | None = None
) -> None:
    """Shows the dashboard until Ctrl-C or SIGTERM.

    Args:
        storage: What to show.
        settings: Where and to whom.
        say: Takes the lines about it; the log by default.

    Raises:
        TunerError: The settings do not fit together, or the port is taken.
    """
    say = say or _say
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with make_server(storage, settings) as server:
            say(f"The dashboard is on {server.url} ({server.login}; Ctrl-C ends it).")
            try:
                while True:
                    time.sleep(3600)
            except KeyboardInterrupt:
                say("The dashboard ended; studies go on.")
    finally:
        signal.signal(signal.SIGTERM, previous)


def make_server(
    storage: Storage, settings: Settings, *, scheduler_is_up: Callable[[], bool] | None = None
) -> DashboardServer:
    """A server that listens already; it answers within its `with` block.

    Args:
        storage: What to show.
        settings: Where and to whom.
        scheduler_is_up: As `tuner.dashboard.health.Health` has it.

    Raises:
        TunerError: See `serve`.
    """
    policy = make_policy(settings)
    context = _tls_context(settings)
    app = make_app(storage, policy, settings.places)
    health = Health(storage.look, scheduler_is_up=scheduler_is_up)
    try:
        return DashboardServer(app, settings, context, policy, health)
    except OSError as error:
        host, port = settings.host, settings.port
        if error.errno == errno.EADDRINUSE:
            raise TunerError(
                f"Port {port} on {host} is taken by another program; name another one "
                f"(--port {port + 1 if port < 65535 else 8080}), or --port 0 for any free one."
            ) from error
        raise TunerError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); name "
            "a port above 1023, or --port 0 for any free one."
        ) from error


def make_policy(settings: Settings) -> Policy:
    """Who may come in, from where.

    Raises:
        TunerError: Strangers could reach a dashboard that asks for no login, or could listen.
    """
    host = settings.host
    if not is_loopback(host):
        if settings.users_file is None:
            raise TunerError(
                f"--host {host}: whoever reaches that address would see and change every study, "
                "so it needs a login: `tuner dashboard add-user NAME --role editor` makes the "
                "users file. Without one, leave --host out and take an SSH tunnel "
                "(ssh -L 8080:127.0.0.1:8080 USER@MACHINE)."
            )
        if settings.certificate is None and not (settings.behind_proxy or settings.trust_network):
            raise TunerError(
                f"--host {host}: passwords would cross the network in the clear. Give a "
                "certificate (--tls-cert and --tls-key), or say what protects it: --behind-proxy "
                "(a proxy that speaks TLS stands before it), or --trust-network (nobody can "
                "listen on the way: a container whose port is published on 127.0.0.1)."
            )
    if settings.behind_proxy and settings.users_file is None:
        raise TunerError(
            "--behind-proxy: whoever reaches the proxy would see and change every study. "
            "`tuner dashboard add-user NAME --role editor` makes the users file."
        )
    if settings.proxies and not settings.behind_proxy:
        raise TunerError("--trust-proxy says where a proxy is: give --behind-proxy as well.")
    proxies = networks(settings.proxies or (_LOOPBACK if settings.behind_proxy else ()))
    if settings.behind_proxy and not settings.proxies and not is_loopback(host):
        raise TunerError(
            f"--host {host} --behind-proxy: name the proxy's address (--trust-proxy 10.0.0.2, or "
            "its network, 10.0.0.0/24). Only what comes from there is believed when it says who "
            "asks; the rest is refused, since it would come past the proxy, in the clear."
        )
    return Policy(
        users=None if settings.users_file is None else Users(settings.users_file),
        hosts=allowed_hosts(host, settings.allow_hosts),
        secure=settings.certificate is not None or settings.behind_proxy,
        proxies=proxies,
    )


def _tls_context(settings: Settings) -> ssl.SSLContext | None:
    certificate, key = settings.certificate, settings.key
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise TunerError("A certificate and its key go together: name both files.")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a callback, OpenSSL would ask the terminal for the password of a key.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:  # SSLError is an OSError
        reason = getattr(error, "strerror", None) or error
        raise TunerError(
            f"Certificate {certificate} with key {key}: {reason}. Both are PEM files, the key "
            "without a password."
        ) from error
    return context


# --- the guard ---


def make_app(
    storage: Storage, policy: Policy | None = None, places: pages.Places | None = None
) -> Guard:
    """Optuna's dashboard and the tuner's pages behind their guard, as a WSGI application."""
    policy, places = policy or Policy(), places or pages.Places()
    return Guard(storage, policy, places)


#: In the WSGI environment, behind a proxy: whether the request came through it.
_FROM_PROXY = "tuner.from_proxy"
#: In the WSGI environment: the file that is asked for is a page of the tuner's own.
_OWN_PAGE = "tuner.own_page"
#: In the WSGI environment: the request has its entry in the record of changes.
_RECORDED = "tuner.recorded"


class Guard:
    """What `make_app` makes."""

    def __init__(self, storage: Storage, policy: Policy, places: pages.Places) -> None:
        self._storage = storage
        self._policy = policy
        self._places = places
        self._sessions = None if policy.users is None else Sessions(policy.users)
        self._refusals = Refusals(storage.record_change)
        self._shown = _Shown(storage, places.artifacts)
        self._pages = pages.Pages(storage, policy, self._sessions, places, self._refusals)
        if policy.users is not None:
            for name, address in storage.login_places():
                policy.limit.remember(name, address)

    def may_send_much(self, environ: WSGIEnvironment) -> bool:
        """Whether a request may have a large body; its Cookie and Host headers say whose it is."""
        return self._visitor(environ) is not None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = _path(environ)
        answer = _Secured(start_response, path, environ, secure=self._policy.secure)
        try:
            body = self._answer(environ, answer, path)
            self._record_a_refusal(environ, answer, path)
            return body
        except Refused as refused:
            body = answer.refuse(refused)
            self._record_a_refusal(environ, answer, path, refused.message)
            return body
        except (StorageError, OSError) as error:
            return answer.refuse(Refused("503 Service Unavailable", str(error)))
        except (StorageInternalError, SQLAlchemyError):  # the driver's own words, with SQL
            return answer.refuse(Refused("503 Service Unavailable", NO_DATABASE))
        except TunerError as error:
            return answer.refuse(Refused("409 Conflict", str(error)))
        except Exception as error:  # noqa: BLE001 - a request without an answer hangs the browser
            what = f"{environ.get('REQUEST_METHOD')} {path!r}: {type(error).__name__}: {error}"
            logging.getLogger(logs.OURS).error(what)
            return answer.refuse(Refused("500 Internal Server Error", "Something broke here."))

    def _answer(self, environ: WSGIEnvironment, answer: _Secured, path: str) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        if not environ.get(_FROM_PROXY, True):
            raise Refused(
                "403 Forbidden",
                "This dashboard stands behind a proxy and answers to that alone; --trust-proxy "
                "names one more.",
            )
        if not self._policy.names_host(environ):
            raise Refused(
                "421 Misdirected Request",
                "This dashboard does not answer to that name; --allow-host gives it one more.",
            )
        if method not in READING | WRITING:
            allow = ", ".join(sorted(READING | WRITING))
            raise Refused("405 Method Not Allowed", f"Use {allow}.", [("Allow", allow)])
        if method in WRITING and not self._policy.is_same_origin(environ):
            raise Refused("403 Forbidden", "That came from another site's page.")
        if path in pages.PUBLIC or path.startswith(f"{pages.ROOT}/static/"):
            return self._pages(environ, answer)
        visitor = self._visitor(environ)
        if visitor is None:
            raise self._login_first(environ, path)
        environ[pages.VISITOR_KEY] = visitor
        if method in WRITING:
            return self._change(environ, answer, path, visitor)
        if pages.is_ours(path):
            return self._pages(environ, answer)
        found = find_route(method, path)
        if found is None:
            raise Refused("404 Not Found", "There is no such page.")
        return self._shown.read(environ, answer, path, self._shown.check(environ, *found))

    def _record_a_refusal(
        self, environ: WSGIEnvironment, answer: _Secured, path: str, detail: str = ""
    ) -> None:
        if answer.status != 403 or _RECORDED in environ:
            return
        visitor = environ.get(pages.VISITOR_KEY)
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

    def _login_first(self, environ: WSGIEnvironment, path: str) -> Refused:
        message = f"Log in first: {pages.ROOT}/login"
        if environ["REQUEST_METHOD"] in READING and not _is_api(path):
            query = environ.get("QUERY_STRING", "")
            # Quoted as it was asked for, then as a part of another address.
            asked = quote(path.encode("latin-1", "replace"))
            there = quote(asked + (f"?{query}" if query else ""), safe="/")
            return Refused("303 See Other", message, [("Location", f"{pages.LOGIN}?next={there}")])
        return Refused("401 Unauthorized", message)

    def _change(
        self, environ: WSGIEnvironment, answer: _Secured, path: str, visitor: Visitor
    ) -> Iterable[bytes]:
        """A request that changes something: only an editor's, only a known one, and recorded."""
        method = environ["REQUEST_METHOD"]
        if path in pages.LOGOUTS:
            return self._pages(environ, answer)
        if visitor.role != "editor":
            raise Refused(
                "403 Forbidden", f"{visitor.name} is a viewer: only an editor may change things."
            )
        ours, found = pages.is_ours(path), find_route(method, path)
        if not ours and found is None:
            raise Refused(
                "403 Forbidden",
                "The dashboard must not change that: it would break the study. Use the pages "
                f"under {pages.ROOT} or the `tuner` command.",
            )
        entry = self._storage.begin_change(
            who=visitor.name,
            address=str(environ.get("REMOTE_ADDR", "")),
            action=_action(environ, path),
        )
        environ[_RECORDED] = True
        detail, status = "", 500
        try:
            if found is None:
                body = list(self._pages(environ, answer))
                detail = str(environ.get(pages.DETAIL_KEY, ""))
            else:
                detail, body = self._change_a_study(environ, answer, *found)
            status = answer.status
        except Refused as refused:
            status, detail = int(refused.status[:3]), refused.message
            raise
        except StorageError as error:
            status, detail = 503, str(error)
            raise
        except TunerError as error:
            status, detail = 409, str(error)
            raise
        finally:
            self._shown.forget()
            self._storage.end_change(entry, status=status, detail=detail)
        return body

    def _change_a_study(
        self, environ: WSGIEnvironment, answer: _Secured, route: Route, parts: Mapping[str, str]
    ) -> tuple[str, list[bytes]]:
        """Does what Optuna's dashboard is asked for; what was changed, and the answer."""
        with (
            self._shown.uploads.one_at_a_time
            if route.method == "POST"
            else contextlib.nullcontext()
        ):
            asked = self._shown.check(environ, route, parts)
            assert asked.study is not None
            name = self._shown.name(asked.study)
            if route is DELETE_STUDY:
                return self._delete(name), answer.nothing()
            return name, self._shown.write(environ, answer)

    def _delete(self, name: str) -> str:
        """Deletes as `tuner delete` does: the ledger's rows stay, a running study is refused."""
        tuned = load(self._storage, name, artifacts_root=self._places.artifacts)
        trials = counted(len(tuned.trials()), "trial")
        delete_study(tuned)
        return f"deleted {name} with {trials}"


@dataclass(slots=True)
class _Kept:
    """One answer of Optuna's dashboard that is given out for a moment."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    until: float = 0.0
    status: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""


class _Shown:
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
        self._looked = 0.0
        self._identities: dict[int, tuple[str, str]] = {}
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._app = self._make()

    def _make(self) -> Any:
        studies = ReadableStudies(self._storage.optuna)
        return optuna_dashboard.wsgi(studies, artifact_store=self.uploads)

    def check(self, environ: WSGIEnvironment, route: Route, parts: Mapping[str, str]) -> Asked:
        """See `Checks.check`."""
        if route.method != "GET":
            self._looked = -math.inf  # what is changed is looked for now
        self._notice_other_studies()
        try:
            return self._checks.check(environ, route, parts)
        except KeyError:  # deleted a moment ago
            raise Refused("404 Not Found", "There is no such study (any more).") from None

    def _is_study(self, study_id: int) -> bool:
        if study_id not in self._identities:
            self._looked = -math.inf  # it may be younger than the last look
            self._notice_other_studies()
        return study_id in self._identities

    def read(
        self, environ: WSGIEnvironment, answer: _Secured, path: str, asked: Asked
    ) -> Iterable[bytes]:
        # The dashboard fails on a request that does not say what encodings it takes.
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")
        environ[_OWN_PAGE] = asked.may_run_scripts
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

    def _page_with_a_link(self, environ: WSGIEnvironment, answer: _Secured) -> Iterable[bytes]:
        """Optuna's one page, with the way to ours on it."""
        for header in ("HTTP_IF_MODIFIED_SINCE", "HTTP_IF_NONE_MATCH", "HTTP_RANGE"):
            environ.pop(header, None)
        page = _Kept()
        self._ask(environ, page)
        role = environ[pages.VISITOR_KEY].role
        text = "launch and export" if role == "editor" else "progress and export"
        added = _ADDED.format(root=pages.ROOT, role=role, text=text)
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

    def _pass(self, environ: WSGIEnvironment, answer: _Secured) -> list[bytes]:
        passed = _Kept()
        self._ask(environ, passed)
        answer(passed.status, passed.headers)
        return [passed.body]

    def write(self, environ: WSGIEnvironment, answer: _Secured) -> list[bytes]:
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
            self._looked = 0.0
            self._app = self._make()

    def _notice_other_studies(self) -> None:
        with self._lock:
            if time.monotonic() - self._looked < 1.0:
                return
            self._looked = time.monotonic()
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


class _Secured:
    """A `start_response` that adds the security headers, and remembers the status."""

    def __init__(
        self, start_response: StartResponse, path: str, environ: WSGIEnvironment, *, secure: bool
    ) -> None:
        self._start = start_response
        self._path = path
        self._environ = environ
        host = re.sub(r":\d+$", "", str(environ.get("HTTP_HOST", "")).lower())
        # For "localhost" it would hold for every other program's port of this machine, too.
        self._sends_hsts = secure and host not in LOOPBACK_NAMES
        self.status = 0

    def __call__(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        self.status = int(status[:3])
        return self._start(status, [*self._kept(headers), *self._added(headers)], exc_info)

    def _kept(self, headers: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        ours = pages.is_ours(self._path)
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

    def _added(self, headers: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        given = {name.lower() for name, _ in headers}
        yield "Server", "tuner"  # instead of Tornado's version
        yield "X-Content-Type-Options", "nosniff"
        yield "Referrer-Policy", "same-origin"
        yield "Cross-Origin-Opener-Policy", "same-origin"
        yield "Permissions-Policy", "camera=(), geolocation=(), microphone=()"
        if self._sends_hsts:
            yield "Strict-Transport-Security", _HSTS
        if self._path.startswith("/artifacts/"):
            own = self._environ.get(_OWN_PAGE, False)
            yield "Content-Security-Policy", _OWN_PAGE_POLICY if own else _OTHERS_PAGE_POLICY
            if not own and self.status == 200:
                yield "Content-Disposition", "attachment"
            yield "X-Frame-Options", "SAMEORIGIN"
        else:
            yield "X-Frame-Options", "DENY"
            yield "Cross-Origin-Resource-Policy", "same-origin"
            if not pages.is_ours(self._path) or "content-security-policy" not in given:
                yield "Content-Security-Policy", _DASHBOARD_POLICY
        static = self._path.startswith(("/static/", f"{pages.ROOT}/static/"))
        if not static and "cache-control" not in given:
            # What one user saw must not come out of a shared machine's cache.
            yield "Cache-Control", "no-store"

    def refuse(self, refused: Refused) -> Iterable[bytes]:
        if _is_api(self._path):
            body = json.dumps({"reason": refused.message})
            kind = "application/json"
        else:
            body, kind = f"{refused.message}\n", "text/plain; charset=utf-8"
        content = body.encode()
        headers = [("Content-Type", kind), ("Content-Length", str(len(content)))]
        self(refused.status, [*headers, *refused.headers])
        return [] if self._environ.get("REQUEST_METHOD") == "HEAD" else [content]

    def nothing(self) -> list[bytes]:
        """204: done, and nothing to say."""
        self("204 No Content", [])
        return []


def _path(environ: WSGIEnvironment) -> str:
    """The path as Optuna's dashboard sees it, which takes slashes off its end."""
    path = str(environ.get("PATH_INFO", "")).rstrip("/")
    environ["PATH_INFO"] = path or "/"
    return path or "/"


def _action(environ: WSGIEnvironment, path: str) -> str:
    """What a request asked for, as the record of changes has it."""
    text = path.encode("latin-1", "replace").decode("utf-8", "replace")
    return f"{environ['REQUEST_METHOD']} {text}"


def _is_api(path: str) -> bool:
    return path.startswith(("/api/", f"{pages.ROOT}/api/"))


def _say(message: str) -> None:
    logging.getLogger(logs.OURS).info(message)


# --- the server ---


class _Container(WSGIContainer):
    """Tornado's bridge to WSGI."""

    server: LimitedServer | None = None  #: whose requests are answered

    def __init__(self, app: WSGIApplication, executor: ThreadPoolExecutor, policy: Policy) -> None:
        super().__init__(app, executor)
        self._policy = policy

    def environ(self, request: HTTPServerRequest) -> dict[str, Any]:
        # Tornado takes the port out of the Host header without a look, and a request that fails
        # there is never answered. The guard judges the header itself.
        if not re.fullmatch(r"[^:]*|[^:]*:\d{1,5}|\[[0-9a-fA-F:]*\](:\d{1,5})?", request.host):
            request.host = "invalid"
        environ = super().environ(request)
        # Tornado has put the chunks together; nobody may take them for chunks again.
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        environ["CONTENT_LENGTH"] = str(len(request.body))
        if self._policy.proxies:
            environ[_FROM_PROXY] = self._policy.is_proxy(environ["REMOTE_ADDR"])
            said = environ.get("HTTP_X_REAL_IP") or environ.get("HTTP_X_FORWARDED_FOR", "")
            asks = said.rpartition(",")[2].strip()  # the last is the one that our proxy saw
            if environ[_FROM_PROXY] and is_valid_ip(asks):
                environ["REMOTE_ADDR"] = asks
        return environ

    async def handle_request(self, request: HTTPServerRequest) -> None:
        server, stream = self.server, getattr(request.connection, "stream", None)
        with server.answering(stream) if server and stream else contextlib.nullcontext():
            await super().handle_request(request)

    def _log(self, status_code: int, request: HTTPServerRequest) -> None:
        """A line for every request is no help to anybody."""


class _Reception(HTTPServerConnectionDelegate):
    """Looks at the head of each request before its body is read.

    Whoever has no session may send what a login needs. Bodies are held in memory: without this,
    60 strangers took 900 MB.
    """

    def __init__(self, app: Guard, container: _Container, health: Health) -> None:
        self._app = app
        self._container = container
        self._health = health

    def start_request(
        self, server_conn: object, request_conn: HTTPConnection
    ) -> HTTPMessageDelegate:
        return _Received(self._app, self._container, self._health, request_conn)


#: Of the answers that are given on the event loop.
_PHRASES = {200: "OK", 413: "Content Too Large", 503: "Service Unavailable"}


class _Received(HTTPMessageDelegate):
    """One request on its way in."""

    def __init__(
        self, app: Guard, container: _Container, health: Health, connection: HTTPConnection
    ) -> None:
        self._app = app
        self._container = container
        self._health = health
        self._connection = connection
        self._request: HTTPServerRequest | None = None
        self._body = bytearray()

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> None:
        assert isinstance(start_line, RequestStartLine)
        self._request = HTTPServerRequest(
            connection=self._connection, start_line=start_line, headers=headers
        )
        known = {"HTTP_COOKIE": headers.get("Cookie", ""), "HTTP_HOST": headers.get("Host", "")}
        if self._app.may_send_much(known):
            return
        length = headers.get("Content-Length", "")
        if length.isdecimal() and int(length[:20]) > _MAX_STRANGERS_BODY_BYTES:
            self._refuse()
        else:  # chunks do not say how long they are
            assert isinstance(self._connection, HTTP1Connection)
            self._connection.set_max_body_size(_MAX_STRANGERS_BODY_BYTES)

    def _refuse(self) -> None:
        limit = _MAX_STRANGERS_BODY_BYTES // 1024
        # Tornado closes a connection whose answer is whole before its request is.
        self._answer(413, f"Log in first to send more than {limit} KB.", Connection="close")

    def _answer(self, status: int, message: str, **headers: str) -> None:
        """Answers on the event loop, whatever the threads and the database do."""
        assert self._request is not None
        path = self._request.path
        kind, body = "text/plain; charset=utf-8", f"{message}\n"
        if _is_api(path) or status == 413:
            kind, body = "application/json", json.dumps({"reason": message})
        head = {
            "Content-Type": kind,
            "Content-Length": str(len(body.encode())),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Server": "tuner",
        }
        line = ResponseStartLine("HTTP/1.1", status, _PHRASES[status])
        sent = b"" if self._request.method == "HEAD" else body.encode()
        self._connection.write_headers(line, HTTPHeaders(head | headers), sent)
        self._connection.finish()

    def data_received(self, chunk: bytes) -> None:
        self._body += chunk

    def finish(self) -> None:
        assert self._request is not None
        path = self._request.path.rstrip("/")
        is_probe = path in (ALIVE, READY)
        problem = self._health.unready if path == READY else self._health.outage
        if path == ALIVE or (is_probe and problem is None):
            self._answer(200, "ok")
        elif problem is not None:
            self._answer(503, problem, **{"Retry-After": "5"})
        else:
            self._request.body = bytes(self._body)
            self._container(self._request)

    def on_connection_close(self) -> None:
        self._body.clear()


class DashboardServer:
    """Tornado's HTTP server on a thread of its own.

    Connections wait on one event loop, so that slow and silent ones, also in the middle of TLS'
    handshake, cost a socket and no thread; whole requests are answered by a few threads.
    """

    def __init__(
        self,
        app: Guard,
        settings: Settings,
        context: ssl.SSLContext | None,
        policy: Policy,
        health: Health,
    ) -> None:
        """Listens.

        Raises:
            OSError: It cannot listen there.
        """
        self._app = app
        self._context = context
        self._policy = policy
        self._health = health
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        self._socket = socket.create_server(
            (settings.host, settings.port), family=family, backlog=128
        )
        self._socket.setblocking(False)
        self.port = int(self._socket.getsockname()[1])
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"{'http' if context is None else 'https'}://{shown}:{self.port}/"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None
        self._ready = threading.Event()
        self._server: LimitedServer | None = None
        self._busy = 0
        self._count = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="dashboard")

    @property
    def login(self) -> str:
        """Who may come in, in words."""
        if self._policy.users is None:
            return "no login: whoever works on this machine may change things"
        return f"users of {self._policy.users.path}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        loop, ending = self._loop, self._ending
        if loop is not None and ending is not None:
            with contextlib.suppress(RuntimeError):  # it ended by itself
                loop.call_soon_threadsafe(ending.set)
        self._thread.join()
        self._socket.close()

    def _counted(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        with self._count:
            self._busy += 1
        try:
            return self._app(environ, start_response)
        finally:
            with self._count:
                self._busy -= 1

    def _run(self) -> None:
        with self._health, ThreadPoolExecutor(_THREADS, "dashboard") as executor:
            asyncio.run(self._answer_until_the_end(executor))

    async def _answer_until_the_end(self, executor: ThreadPoolExecutor) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        container = _Container(self._counted, executor, self._policy)
        container.server = self._server = server = LimitedServer(
            _Reception(self._app, container, self._health),
            ssl_options=self._context,
            max_header_size=_MAX_HEADER_BYTES,
            max_body_size=_MAX_BODY_BYTES,
            max_buffer_size=_MAX_BODY_BYTES + _MAX_HEADER_BYTES,
            idle_connection_timeout=_IDLE_SECONDS,
            body_timeout=_BODY_SECONDS,
        )
        server.limit(
            descriptors=raise_descriptor_limit(),
            say=_say,
            of_an_address=MOST_OF_AN_ADDRESS,
            is_shared=self._policy.is_proxy,
        )
        server.listen_on(self._socket)
        self._ready.set()
        await self._ending.wait()
        server.stop()
        last = time.monotonic() + _LAST_SECONDS
        while self._busy and time.monotonic() < last:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.05)  # what was answered just now is being written
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(server.close_all_connections(), _CLOSE_SECONDS)
