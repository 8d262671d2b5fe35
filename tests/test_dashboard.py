"""The dashboard: to look only, from this machine only."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
import sqlalchemy as sa
from fakes import ready_sqlite
from optuna.distributions import FloatDistribution

from tuner import dashboard
from tuner.artifacts import StudyArtifacts
from tuner.dashboard import ALLOWED_HOSTS, make_app, make_server, serve
from tuner.errors import TunerError
from tuner.storage import Storage


class Answer(NamedTuple):
    status: int
    body: str
    headers: dict[str, str]


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    with Storage(ready_sqlite(tmp_path)) as opened:
        optuna.create_study(storage=opened.optuna, study_name="demo")
        yield opened


def ask(
    storage: Storage, path: str, *, method: str = "GET", app: Any = None, **changes: Any
) -> Answer:
    """One request, without a socket."""
    environ: dict[str, Any] = {"HTTP_HOST": "127.0.0.1:8080"}
    setup_testing_defaults(environ)
    environ |= {"PATH_INFO": path, "REQUEST_METHOD": method, **changes}
    started: list[Any] = []

    def start_response(status: str, headers: list[tuple[str, str]], *_: object) -> None:
        started[:] = [int(status.split(maxsplit=1)[0]), dict(headers)]

    app = app or make_app(storage, ALLOWED_HOSTS)
    chunks: Any = app(environ, start_response)  # type: ignore[arg-type]
    body = b"".join(chunks)
    if hasattr(chunks, "close"):
        chunks.close()
    return Answer(started[0], body.decode(), started[1])


def add_trials(storage: Storage, *, trials: int, parameters: int) -> None:
    names = [f"p{number}" for number in range(parameters)]
    study = optuna.load_study(study_name="demo", storage=storage.optuna)
    for number in range(trials):
        study.add_trial(
            optuna.create_trial(
                params=dict.fromkeys(names, number / trials),
                distributions=dict.fromkeys(names, FloatDistribution(0, 1)),
                value=number,
            )
        )


def test_the_studies_of_the_storage_are_shown(storage: Storage) -> None:
    answer = ask(storage, "/api/studies")
    assert answer.status == 200
    assert [s["study_name"] for s in json.loads(answer.body)["study_summaries"]] == ["demo"]
    assert "<title>" in ask(storage, "/dashboard").body


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "", "192.0.2.1:8080"]
)
def test_a_request_under_another_name_is_misdirected(storage: Storage, host: str) -> None:
    answer = ask(storage, "/api/studies", HTTP_HOST=host)
    assert answer.status == 421
    assert "demo" not in answer.body


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9000", "LOCALHOST", "[::1]:8080"])
def test_every_name_of_this_machine_is_answered(storage: Storage, host: str) -> None:
    assert ask(storage, "/api/studies", HTTP_HOST=host).status == 200


def test_health_is_told_under_any_name(storage: Storage) -> None:
    assert ask(storage, "/healthz", HTTP_HOST="probe")[:2] == (200, "ok\n")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/api/studies/1"),
        ("POST", "/api/studies"),
        ("POST", "/api/studies/1/rename"),
        ("PUT", "/api/studies/1/note"),
        ("POST", "/api/trials/1/tell"),
        ("OPTIONS", "/api/studies"),
        ("delete", "/api/studies/1"),
    ],
)
def test_nothing_can_be_changed(storage: Storage, method: str, path: str) -> None:
    answer = ask(storage, path, method=method)
    assert answer.status == 403
    assert "only to look" in answer.body
    assert optuna.get_all_study_names(storage.optuna) == ["demo"]


def test_reading_writes_nothing(storage: Storage) -> None:
    add_trials(storage, trials=4, parameters=2)
    writes: list[str] = []

    def spy(_: object, __: object, statement: str, *___: object) -> None:
        if not statement.lstrip().upper().startswith(("SELECT", "PRAGMA", "BEGIN")):
            writes.append(statement)

    sa.event.listen(storage._rdb.engine, "before_cursor_execute", spy)
    paths = ["/api/meta", "/api/studies", "/csv/1"]
    paths += ["/api/studies/1", "/api/studies/1/param_importances"]
    plots = ("slice", "rank", "edf", "timeline", "contour", "parallel_coordinate")
    paths += [f"/api/studies/1/plot/{name}" for name in plots]
    for path in paths:
        assert ask(storage, path).status == 200, path
    assert writes == []
    # The spy can see: a write is one.
    optuna.create_study(storage=storage.optuna, study_name="other")
    assert writes


@pytest.mark.parametrize("plot", ["contour", "rank"])
def test_a_plot_of_too_many_pairs_is_refused_and_a_small_one_drawn(
    storage: Storage, plot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_trials(storage, trials=5, parameters=2)
    path = f"/api/studies/1/plot/{plot}"
    assert ask(storage, path).status == 200
    monkeypatch.setattr(dashboard, "_MAX_CELLS", 99)
    for spelling in (path, f"{path}/"):
        answer = ask(storage, spelling)
        assert answer.status == 413
        assert f"The {plot} plot of this study would be too large" in answer.body
    assert ask(storage, "/api/studies/1/plot/slice").status == 200


def test_the_limit_lets_the_contour_of_2000_trials_with_10_parameters_not_through() -> None:
    assert (2_000 * 10) ** 2 > dashboard._MAX_CELLS > (50 * 10) ** 2


def test_a_plot_of_no_study_is_not_mistaken_for_a_large_one(storage: Storage) -> None:
    assert not dashboard._is_too_large(storage.optuna, 77)


def test_a_client_that_names_no_encodings_gets_the_page_too(storage: Storage) -> None:
    script = re.search(r'src="(/static/[^"]+)"', ask(storage, "/dashboard").body)
    assert script
    assert ask(storage, script[1]).status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "", "example.org"])
def test_it_listens_on_this_machine_only(storage: Storage, host: str) -> None:
    with pytest.raises(TunerError, match=r"no logins yet.*ssh -L 8080:127\.0\.0\.1:8080"):
        serve(storage, host=host, port=0)


def test_a_port_that_is_taken_is_named_with_the_remedy(storage: Storage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TunerError, match=rf"Port {port} on 127\.0\.0\.1 is taken.*--port"):
            serve(storage, port=port)


def test_a_free_port_is_taken_told_and_answered_by_many_threads(storage: Storage) -> None:
    with make_server(storage, host="localhost", port=0) as server:
        assert server.url == f"http://localhost:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            # The first connection says nothing yet; the second must not wait for it.
            with socket.create_connection(("127.0.0.1", server.server_port)):
                connection = http.client.HTTPConnection("localhost", server.server_port, timeout=30)
                connection.request("GET", "/healthz")
                assert connection.getresponse().read() == b"ok\n"
                connection.close()
        finally:
            server.shutdown()
            thread.join()


def test_ctrl_c_ends_it_without_a_traceback(storage: Storage) -> None:
    code = (
        "import sys; from tuner.dashboard import serve; from tuner.storage import Storage\n"
        "with Storage(sys.argv[1]) as storage: serve(storage, port=0)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, storage.url], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        line = process.stderr.readline()
        address = re.search(r"http://(127\.0\.0\.1):(\d+)/", line)
        assert address, line
        connection = http.client.HTTPConnection(address[1], int(address[2]), timeout=30)
        connection.request("GET", "/api/studies")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 0
    assert rest == "The dashboard ended; studies go on.\n"


def test_what_hangs_on_a_study_is_served_and_nothing_beside_it(
    storage: Storage, tmp_path: Path
) -> None:
    artifacts = StudyArtifacts(tmp_path / "artifacts" / "demo-1")
    key, value = artifacts.hang("page.html", b"<p>page</p>")
    storage.optuna.set_study_system_attr(1, key, value)
    (tmp_path / "artifacts" / "secret").write_text("sealed")
    app = make_app(storage, ALLOWED_HOSTS, tmp_path / "artifacts")
    identity = json.loads(value)["artifact_id"]
    page = ask(storage, f"/artifacts/1/{identity}", app=app)
    assert (page.status, page.body) == (200, "<p>page</p>")
    assert page.headers["Content-Type"] == "text/html"
    for other in ("../secret", "..%2Fsecret", "secret", "abc-123", f"{identity}/../../secret"):
        assert ask(storage, f"/artifacts/1/{other}", app=app).status == 404
