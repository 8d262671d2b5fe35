"""The web server: limits of connections, bodies and times, TLS, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import re
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

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

from tuner.dashboard.connections import MOST_OF_AN_ADDRESS, LimitedServer, raise_descriptor_limit
from tuner.dashboard.guard import Guard
from tuner.dashboard.health import ALIVE, READY, Health
from tuner.dashboard.http import FROM_PROXY, is_api, log_line
from tuner.dashboard.policy import Policy
from tuner.dashboard.settings import Folders, Settings, make_policy
from tuner.errors import TunerError
from tuner.storage.storage import Storage

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_MAX_BODY_BYTES = 16 * 1024 * 1024
_MAX_HEADER_BYTES = 32 * 1024
#: Of a request without a session: a login's, which are the only ones that are answered.
_MAX_STRANGERS_BODY_BYTES = 64 * 1024


_IDLE_SECONDS = 75.0  #: a connection that sends no request, or takes so long over its headers
_BODY_SECONDS = 60.0  #: for the body of a request
_THREADS = 16  #: requests answered at once; the storage answers one at a time anyway
_LAST_SECONDS = 5.0  #: for requests that are being answered when the server ends
_CLOSE_SECONDS = 2.0


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
    say = say or log_line
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with make_server(storage, settings) as server:
            say(f"The dashboard is on {server.url} ({server.login}; Ctrl-C ends it).")
            try:
                while True:
                    time.sleep(3600)
            except KeyboardInterrupt:
                say("The dashboard ended; studies continue.")
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
    app = make_app(storage, policy, settings.folders)
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


def make_app(
    storage: Storage, policy: Policy | None = None, folders: Folders | None = None
) -> Guard:
    """Optuna's dashboard and the tuner's pages behind their guard, as a WSGI application."""
    return Guard(storage, policy or Policy(), folders or Folders())


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
            environ[FROM_PROXY] = self._policy.is_proxy(environ["REMOTE_ADDR"])
            said = environ.get("HTTP_X_REAL_IP") or environ.get("HTTP_X_FORWARDED_FOR", "")
            asks = said.rpartition(",")[2].strip()  # the last is the one that our proxy saw
            if environ[FROM_PROXY] and is_valid_ip(asks):
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
        if is_api(path) or status == 413:
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
            say=log_line,
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
