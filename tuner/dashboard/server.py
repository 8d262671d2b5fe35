"""The web server: limits of connections, bodies and times, TLS, and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tuner.dashboard.connections import MOST_OF_AN_ADDRESS, LimitedServer, raise_descriptor_limit
from tuner.dashboard.guard import Guard
from tuner.dashboard.health import Health
from tuner.dashboard.http import log_line
from tuner.dashboard.policy import Policy
from tuner.dashboard.predictor import Predictor
from tuner.dashboard.settings import Folders, Settings, make_policy
from tuner.dashboard.wsgi_bridge import ConnectionDelegate, Container
from tuner.errors import TunerError
from tuner.storage.storage import Storage

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

_MAX_BODY_BYTES = 16 * 1024 * 1024
_MAX_HEADER_BYTES = 32 * 1024
_IDLE_SECONDS = 75.0  #: until a connection without a request, or with half a header, is closed
_BODY_SECONDS = 60.0  #: for the body of a request
_THREADS = 16  #: requests answered at once; the storage answers one at a time anyway
_LAST_SECONDS = 5.0  #: for requests that are being answered when the server ends
_CLOSE_SECONDS = 2.0  #: for closing the connections when the server ends


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
    storage: Storage,
    settings: Settings,
    *,
    scheduler_is_up: Callable[[], bool] | None = None,
    slots: Callable[[], int] | None = None,
) -> DashboardServer:
    """A server that listens already; it answers within its `with` block.

    Args:
        storage: What to show.
        settings: Where and to whom.
        scheduler_is_up: As `tuner.dashboard.health.Health` has it.
        slots: How many trainings the workers run at once, without waiting; None: it has none.

    Raises:
        TunerError: See `serve`.
    """
    policy = make_policy(settings)
    context = _tls_context(settings)
    app = make_app(storage, policy, settings.folders, slots=slots)
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
    storage: Storage,
    policy: Policy | None = None,
    folders: Folders | None = None,
    *,
    predictor: Predictor | None = None,
    slots: Callable[[], int] | None = None,
) -> Guard:
    """Optuna's dashboard and the tuner's pages behind their guard, as a WSGI application."""
    return Guard(
        storage, policy or Policy(), folders or Folders(), predictor=predictor, slots=slots
    )


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
        """Who may log in, in words."""
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
        container = Container(self._counted, executor, self._policy)
        container.server = self._server = server = LimitedServer(
            ConnectionDelegate(self._app, container, self._health),
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
        self._app.close()  # a prediction may take longer than that
        await asyncio.sleep(0.05)  # what was answered just now is being written
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(server.close_all_connections(), _CLOSE_SECONDS)
