"""From Tornado's requests to WSGI: what is refused or answered before an application is asked.

A body that a client without a session may not send is refused before it is read. Probes, and
every request during an outage, are answered on the event loop, whatever the threads do.
"""

from __future__ import annotations

import contextlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

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

from tuner.dashboard.connections import LimitedServer
from tuner.dashboard.guard import Guard
from tuner.dashboard.health import ALIVE, READY, Health
from tuner.dashboard.http import FROM_PROXY, is_api
from tuner.dashboard.policy import Policy

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

#: Of a request without a session: the only ones that are answered are logins.
_MAX_LOGIN_BODY_BYTES = 64 * 1024


class Container(WSGIContainer):
    """Tornado's bridge to WSGI, which also believes a proxy that the policy names."""

    server: LimitedServer | None = None  #: whose requests are answered; None in tests

    def __init__(self, app: WSGIApplication, executor: ThreadPoolExecutor, policy: Policy) -> None:
        super().__init__(app, executor)
        self._policy = policy

    def environ(self, request: HTTPServerRequest) -> dict[str, Any]:
        # Tornado does not check the port in the Host header, and a request that fails there is
        # never answered. The guard judges the header itself.
        if not re.fullmatch(r"[^:]*|[^:]*:\d{1,5}|\[[0-9a-fA-F:]*\](:\d{1,5})?", request.host):
            request.host = "invalid"
        environ = super().environ(request)
        # Tornado has joined the chunks: the application must not expect them.
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
        """Logs nothing: a line for every request would hide the others."""


class ConnectionDelegate(HTTPServerConnectionDelegate):
    """Checks the head of each request before its body is read.

    A client without a session may send what a login needs. Bodies are held in memory: without
    this, 60 such clients took 900 MB.
    """

    def __init__(self, app: Guard, container: Container, health: Health) -> None:
        self._app = app
        self._container = container
        self._health = health

    def start_request(
        self, server_conn: object, request_conn: HTTPConnection
    ) -> HTTPMessageDelegate:
        return _RequestDelegate(self._app, self._container, self._health, request_conn)


#: Reasons of the answers that are given on the event loop, by status.
_PHRASES = {200: "OK", 413: "Content Too Large", 503: "Service Unavailable"}


class _RequestDelegate(HTTPMessageDelegate):
    """One request on its way in."""

    def __init__(
        self, app: Guard, container: Container, health: Health, connection: HTTPConnection
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
        if length.isdecimal() and int(length[:20]) > _MAX_LOGIN_BODY_BYTES:
            self._refuse()
        else:  # chunks do not say how long they are
            assert isinstance(self._connection, HTTP1Connection)
            self._connection.set_max_body_size(_MAX_LOGIN_BODY_BYTES)

    def _refuse(self) -> None:
        limit = _MAX_LOGIN_BODY_BYTES // 1024
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
