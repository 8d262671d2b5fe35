"""The Optuna dashboard over the storage: on this machine only, and only to look.

There is no login yet, so it listens on the loopback interface, answers to no other name, and
lets nothing through that writes: Optuna's dashboard could rename a study (which breaks it),
delete it, or tell its trials.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import optuna_dashboard
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from tuner.artifacts import DEFAULT_ROOT, artifact_store
from tuner.errors import TunerError
from tuner.storage import Storage

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

LOOPBACK_HOSTS = ("127.0.0.1", "localhost")
#: Names under which a browser on this machine, or at the other end of an SSH tunnel, asks.
ALLOWED_HOSTS = frozenset(("127.0.0.1", "localhost", "[::1]"))

#: These plots draw every pair of parameters; the contour of 2,000 trials with 10 parameters was
#: answered with 4.46 GB after 107 s.
_PLOT_OF_PAIRS = re.compile(r"/api/studies/(\d+)/plot/(contour|rank)/*")
#: A contour needs about 20 bytes a cell.
_MAX_CELLS = 1_000_000


def serve(
    storage: Storage,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    artifacts_root: Path = DEFAULT_ROOT,
    say: Callable[[str], None] | None = None,
) -> None:
    """Shows the dashboard until Ctrl-C.

    Args:
        storage: What to show.
        host: A loopback address.
        port: 0 takes a free one.
        artifacts_root: Where the files are that hang on studies and trials.
        say: Takes the line with the URL; stderr by default.

    Raises:
        TunerError: The host is another machine's business, or the port is taken.
    """
    say = say or _say
    with make_server(storage, host=host, port=port, artifacts_root=artifacts_root) as server:
        say(f"The dashboard is on {server.url} (to look only; Ctrl-C ends it).")
        try:
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            say("The dashboard ended; studies go on.")


def make_server(
    storage: Storage,
    *,
    host: str,
    port: int,
    trust_network: bool = False,
    artifacts_root: Path = DEFAULT_ROOT,
) -> DashboardServer:
    """A server that listens already; `serve_forever` answers.

    Args:
        storage: What to show.
        host: A loopback address, unless `trust_network`.
        port: 0 takes a free one.
        trust_network: Somebody else sees to it that only this machine reaches the port.
        artifacts_root: Where the files are that hang on studies and trials.

    Raises:
        TunerError: See `serve`.
    """
    if host not in LOOPBACK_HOSTS and not trust_network:
        raise TunerError(
            f"--host {host}: the dashboard has no logins yet, so it listens on 127.0.0.1 alone. "
            "From another machine, take an SSH tunnel (ssh -L 8080:127.0.0.1:8080 USER@MACHINE) "
            "and open http://127.0.0.1:8080 there."
        )
    try:
        return DashboardServer(host, port, make_app(storage, ALLOWED_HOSTS, artifacts_root))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise TunerError(
                f"Port {port} on {host} is taken by another program; name another one "
                f"(--port {port + 1 if port < 65535 else 8080}), or --port 0 for any free one."
            ) from error
        raise TunerError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); name "
            "a port above 1023, or --port 0 for any free one."
        ) from error


def make_app(
    storage: Storage, hosts: Collection[str], artifacts_root: Path = DEFAULT_ROOT
) -> WSGIApplication:
    """Optuna's dashboard behind its guard, as a WSGI application.

    Args:
        storage: What to show.
        hosts: Names that the `Host` header may have, lower case, without a port. A page of
            somebody else's whose name was pointed at this machine (DNS rebinding) has another.
        artifacts_root: Where the files are that hang on studies and trials.
    """
    dashboard = optuna_dashboard.wsgi(storage.optuna, artifact_store=artifact_store(artifacts_root))

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/healthz":
            return _answer(start_response, "200 OK", "ok")
        if _host_of(environ) not in hosts:
            message = "This dashboard answers to 127.0.0.1 and localhost only."
            return _answer(start_response, "421 Misdirected Request", message)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            message = "This dashboard is only to look: use the `tuner` command to change things."
            return _answer(start_response, "403 Forbidden", message)
        plot = _PLOT_OF_PAIRS.fullmatch(path)
        if plot and _is_too_large(storage.optuna, int(plot[1])):
            message = (
                f"The {plot[2]} plot of this study would be too large to draw: it shows every "
                "pair of parameters. The other plots are there."
            )
            return _answer(start_response, "413 Content Too Large", message)
        # The dashboard fails on a request that does not say what encodings it takes.
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")
        return dashboard(environ, start_response)  # type: ignore[no-any-return]

    return app


class DashboardServer(ThreadingMixIn, WSGIServer):
    """One thread a request: a slow plot does not hold up the page."""

    daemon_threads = True

    def __init__(self, host: str, port: int, app: WSGIApplication) -> None:
        self._host = host
        super().__init__((host, port), _QuietHandler)
        self.set_app(app)

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self.server_port}/"

    def server_bind(self) -> None:
        # Python's own looks the host's name up, which takes seconds where there is no DNS.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self._host, int(self.server_address[1])
        self.setup_environ()


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """A line for every request is no help to anybody."""


def _is_too_large(storage: BaseStorage, study_id: int) -> bool:
    """Whether a plot of every pair of parameters would have too many cells."""
    try:
        trials = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,))
    except KeyError:
        return False  # no such study: the dashboard says so
    parameters = {name for trial in trials for name in trial.params}
    return (len(parameters) * len(trials)) ** 2 > _MAX_CELLS


def _host_of(environ: WSGIEnvironment) -> str:
    """The name in the Host header, lower case, without its port."""
    host = str(environ.get("HTTP_HOST", "")).lower()
    return re.sub(r":\d*$", "", host)


def _answer(start_response: StartResponse, status: str, message: str) -> Iterable[bytes]:
    body = f"{message}\n".encode()
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
    start_response(status, headers)
    return [body]


def _say(message: str) -> None:
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
