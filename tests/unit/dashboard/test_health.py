"""What probes and users are told while the database or the scheduler is unavailable."""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import optuna_dashboard
import pytest
import sqlalchemy as sa
import yaml
from fakes import ready_sqlite
from finished_study import finished_study
from folders import ROOT
from lab import Browser
from sqlalchemy.exc import InterfaceError, OperationalError
from waiting import wait_until

from tuner.dashboard import health
from tuner.dashboard import server as web_server
from tuner.dashboard.guard import Guard
from tuner.dashboard.health import NO_DATABASE, NO_SCHEDULER, Health
from tuner.dashboard.policy import Policy
from tuner.dashboard.server import make_app, make_server
from tuner.dashboard.settings import Folders, Settings
from tuner.errors import StorageError
from tuner.storage.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    with Storage(ready_sqlite(tmp_path), patience_seconds=0.01) as opened:
        yield opened


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_LOOK_SECONDS", 0.02)


def ask(port: int, path: str, method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, headers={"Origin": f"http://127.0.0.1:{port}"})
        answer = connection.getresponse()
        return answer.status, answer.read()


# --- what is known without asking ---


@pytest.mark.parametrize("error", [StorageError("refused"), OSError("no route"), ValueError()])
def test_an_outage_is_whatever_keeps_the_database_from_answering(
    looks_often: None, error: Exception
) -> None:
    failing = threading.Event()

    def look() -> None:
        if failing.is_set():
            raise error

    with Health(look) as known:
        assert (known.outage, known.unready) == (None, None)
        failing.set()
        wait_until(lambda: known.outage == NO_DATABASE == known.unready)
        failing.clear()
        wait_until(lambda: known.outage is None)


def test_a_database_that_is_silent_is_unavailable_too(
    looks_often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_SILENCE_SECONDS", 0.05)
    answers = threading.Event()
    with Health(answers.wait) as known:
        wait_until(lambda: known.outage == NO_DATABASE)
        answers.set()
        wait_until(lambda: known.outage is None)


def test_the_pause_between_two_looks_is_not_silence(
    looks_often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_SILENCE_SECONDS", 0.0)
    looked = threading.Event()
    with Health(looked.set) as known:
        assert looked.wait(60)
    assert known.outage is None


def test_a_scheduler_that_is_away_is_no_outage_of_the_pages() -> None:
    up: list[bool] = []
    known = Health(lambda: None, scheduler_is_up=lambda: any(up))
    assert (known.outage, known.unready) == (None, NO_SCHEDULER)
    up.append(True)
    assert known.unready is None


# --- what is answered ---


@contextlib.contextmanager
def served(storage: Storage, folder: Path, **more: Any) -> Iterator[int]:
    chosen = Settings(port=0, folders=Folders(artifacts=folder / "artifacts"))
    with make_server(storage, chosen, **more) as server:
        yield server.port


def routes(storage: Storage) -> Iterable[tuple[str, str]]:
    """Every route of Optuna's dashboard and of our pages."""
    for one in optuna_dashboard.wsgi(storage.optuna).routes:
        yield one.method, re.sub(r"<[^>]+>", "1", one.rule)
    for path in ("", "/log", "/login", "/studies/demo", "/studies/demo/export", "/api/studies"):
        yield "GET", f"/tuner{path}"
    for path in ("/api/studies/demo", "/api/studies/demo/export?top=1", "/api/files", "/api/log"):
        yield "GET", f"/tuner{path}"
    for path in ("/api/check", "/api/studies", "/api/login", "/api/studies/demo/stop", "/launch"):
        yield "POST", f"/tuner{path}"


def test_probes_answer_under_any_name_and_with_any_method(storage: Storage, tmp_path: Path) -> None:
    with served(storage, tmp_path) as port:
        for path in ("/healthz", "/readyz", "/readyz/", "/healthz?x=1"):
            assert ask(port, path) == (200, b"ok\n")
            assert ask(port, path, "HEAD") == (200, b"")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/readyz", headers={"Host": "probe"})
            assert connection.getresponse().status == 200


def test_during_an_outage_every_route_answers_503_with_a_reason(
    storage: Storage, tmp_path: Path, looks_often: None
) -> None:
    file, away = tmp_path / "tuner.db", tmp_path / "away.db"
    with served(storage, tmp_path) as port:
        assert ask(port, "/readyz")[0] == 200
        file.rename(away)
        wait_until(lambda: ask(port, "/readyz")[0] == 503)
        assert not file.exists()  # looking makes none
        for method, path in routes(storage):
            status, body = ask(port, path, method)
            assert (status, NO_DATABASE.encode() in body) == (503, True), (method, path, body)
        assert ask(port, "/api/studies")[1].startswith(b'{"reason": ')
        assert ask(port, "/healthz") == (200, b"ok\n")
        away.rename(file)
        wait_until(lambda: ask(port, "/readyz")[0] == 200)
        assert ask(port, "/api/studies")[0] == 200


@pytest.mark.parametrize("kind", [OperationalError, InterfaceError])
def test_an_outage_that_is_not_known_of_yet_is_no_500_either(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    finished_study(storage, tmp_path)
    app = make_app(storage, Policy(), Folders(artifacts=tmp_path / "artifacts"))
    browser = Browser(app)

    def fail(*_: object) -> None:
        raise kind("SELECT secret", {}, Exception("server closed the connection"))

    def refuse(_: Storage) -> None:
        raise StorageError("server closed the connection")

    monkeypatch.setattr(Storage, "look", refuse)
    monkeypatch.setattr(storage._calls, "patience_seconds", 0.01)  # for each of many routes
    sa.event.listen(storage._rdb.engine, "before_cursor_execute", fail)
    try:
        answers = {
            (method, path): browser.open(path, method=method) for method, path in routes(storage)
        }
    finally:
        sa.event.remove(storage._rdb.engine, "before_cursor_execute", fail)
    assert {one: found.text for one, found in answers.items() if found.status_code == 500} == {}
    unavailable = [one for one, found in answers.items() if found.status_code == 503]
    assert ("GET", "/api/studies") in unavailable
    assert ("GET", "/tuner/api/studies") in unavailable
    assert not [one for one in unavailable if "SELECT" in answers[one].text]
    assert browser.get("/api/studies").status_code == 200


def test_a_bug_of_the_dashboard_is_still_a_500(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(storage.optuna), "get_all_studies", lambda _: 1 / 0)
    browser = Browser(make_app(storage, Policy(), Folders(artifacts=tmp_path / "artifacts")))
    assert browser.get("/api/studies").status_code == 500


def test_probes_are_answered_while_every_thread_waits(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    waiting = threading.Semaphore(0)

    def wait(_: Guard, environ: object, start_response: Any) -> list[bytes]:
        waiting.release()
        go_on.wait(60)
        start_response("200 OK", [])
        return []

    monkeypatch.setattr(Guard, "__call__", wait)
    with served(storage, tmp_path) as port:
        asking = [threading.Thread(target=ask, args=(port, "/")) for _ in range(20)]
        for thread in asking:
            thread.start()
        try:
            for _ in range(web_server._THREADS):
                assert waiting.acquire(timeout=60)
            assert ask(port, "/healthz") == (200, b"ok\n")
            assert ask(port, "/readyz") == (200, b"ok\n")
        finally:
            go_on.set()
            for thread in asking:
                thread.join()


def test_a_service_without_its_scheduler_shows_its_pages_and_is_not_ready(
    storage: Storage, tmp_path: Path
) -> None:
    with served(storage, tmp_path, scheduler_is_up=lambda: False) as port:
        assert ask(port, "/readyz") == (503, f"{NO_SCHEDULER}\n".encode())
        assert ask(port, "/healthz")[0] == 200
        assert ask(port, "/api/studies")[0] == 200


def test_what_is_answered_without_the_pages_is_not_kept_and_says_when_to_ask_again(
    storage: Storage, tmp_path: Path
) -> None:
    with served(storage, tmp_path, scheduler_is_up=lambda: False) as port:
        for path, seconds in (("/readyz", "5"), ("/healthz", None)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            with contextlib.closing(connection):
                connection.request("GET", path)
                headers = connection.getresponse().headers
            assert headers["Retry-After"] == seconds
            assert headers["Cache-Control"] == "no-store"
            assert headers["X-Content-Type-Options"] == "nosniff"


# --- who asks which ---


def test_kubernetes_restarts_by_healthz_and_sends_requests_by_readyz() -> None:
    text = (ROOT / "docs/clusters/kubernetes.yaml").read_text(encoding="utf-8")
    (service,) = (
        container
        for one in yaml.safe_load_all(text)
        if one["kind"] == "Deployment"
        for container in one["spec"]["template"]["spec"]["containers"]
        if container["name"] == "service"
    )
    assert ":8080/readyz'" in service["readinessProbe"]["exec"]["command"][-1]
    assert ":8080/healthz'" in service["livenessProbe"]["exec"]["command"][-1]


def test_compose_shows_a_service_as_healthy_that_can_do_its_work() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    assert ":8080/readyz'" in compose["services"]["service"]["healthcheck"]["test"][-1]
