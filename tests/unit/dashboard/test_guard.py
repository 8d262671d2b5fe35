"""The dashboard: who sees it, who may change what, and what an attacker gets."""

from __future__ import annotations

import base64
import contextlib
import html
import http.client
import io
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from fakes import ready_sqlite
from finished_study import finished_study
from lab import HOST, PASSWORDS, Browser, Lab, certificate, write_users
from optuna.artifacts import upload_artifact
from optuna.distributions import FloatDistribution
from waiting import wait_until

from tuner.artifacts import artifact_store
from tuner.dashboard import optuna_app, optuna_requests
from tuner.dashboard import server as web_server
from tuner.dashboard.policy import Policy
from tuner.dashboard.server import make_app, make_server, serve
from tuner.dashboard.settings import Folders, Settings
from tuner.dashboard.users import remove_user
from tuner.errors import TunerError
from tuner.search.tuned_study import TunedStudy
from tuner.storage.storage import Storage

COOKIE = "tuner_session_8080"  # of the port that HOST names

# What Optuna's dashboard offers that writes, and what editors may do of it.
REFUSED = [
    ("POST", "/api/studies"),
    ("POST", "/api/studies/1/rename"),
    ("POST", "/api/studies/1/rename/"),
    ("POST", "/api/trials/1/tell"),
    ("POST", "/api/trials/1/user-attrs"),
    ("POST", "/api/studies/1/preference"),
    ("PUT", "/api/studies/1/preference_feedback_component"),
    ("POST", "/api/studies/1/preference/x"),
    ("DELETE", "/api/studies/1/preference/x"),
    ("POST", "/api/studies/1/1/skip"),
    ("POST", "/incompatible-rdb-schema"),
    ("POST", "/api/llm/trial_filter_query"),
    ("POST", "/api/what-comes-next"),
]
ALLOWED = [
    ("PUT", "/api/studies/1/note"),
    ("PUT", "/api/studies/1/1/note"),
    ("POST", "/api/artifacts/1"),
    ("DELETE", "/api/studies/1"),
    ("DELETE", "/api/artifacts/1/00000000-0000-0000-0000-000000000000"),
    ("POST", "/tuner/launch"),
    ("POST", "/tuner/api/studies"),
    ("POST", "/tuner/api/check"),
    ("POST", "/tuner/studies/demo/stop"),
    ("POST", "/tuner/api/studies/demo/resume"),
    ("POST", "/tuner/studies/demo/delete"),
    ("DELETE", "/tuner/api/studies/demo"),
]


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    with Storage(ready_sqlite(tmp_path)) as opened:
        yield opened


@pytest.fixture
def tuned(storage: Storage, tmp_path: Path) -> TunedStudy:
    return finished_study(storage, tmp_path)


@pytest.fixture
def lab(storage: Storage, tuned: TunedStudy, tmp_path: Path) -> Lab:
    return Lab(storage, tmp_path)


@pytest.fixture
def local(storage: Storage, tuned: TunedStudy, tmp_path: Path) -> Browser:
    """A browser on this machine, where no login is asked for."""
    return Browser(make_app(storage, None, Folders(artifacts=tmp_path / "artifacts")))


def add_trials(storage: Storage, name: str, *, trials: int, parameters: int) -> int:
    names = [f"p{number}" for number in range(parameters)]
    study = optuna.create_study(study_name=name, storage=storage.optuna)
    for number in range(trials):
        study.add_trial(
            optuna.create_trial(
                params=dict.fromkeys(names, number / trials),
                distributions=dict.fromkeys(names, FloatDistribution(0, 1)),
                value=number,
            )
        )
    return study._study_id


# --- who sees it ---


def test_the_studies_of_the_storage_are_shown_with_a_way_to_the_pages(local: Browser) -> None:
    document = local.get("/api/studies").json
    assert [one["study_name"] for one in document["study_summaries"]] == ["demo"]
    page = local.get("/dashboard").text
    assert "<title>" in page
    assert '<a href="/tuner" id="tuner-pages" class="editor">launch and export</a></body>' in page
    assert local.get("/tuner/static/dashboard.css").mimetype == "text/css"
    assert local.get("/").location == "/dashboard"


def test_a_request_under_another_name_is_misdirected(local: Browser) -> None:
    for host in [
        "evil.example",
        "evil.example:8080",
        "127.0.0.1.evil.example",
        "",
        "192.0.2.1:8080",
        "a:b:c",
    ]:
        answer = local.get("/api/studies", headers={"Host": host})
        assert answer.status_code == 421
        assert "demo" not in answer.text


def test_every_name_of_this_machine_is_answered(local: Browser) -> None:
    for host in ["127.0.0.1", "localhost:9000", "LOCALHOST", "[::1]:8080"]:
        assert local.get("/api/studies", headers={"Host": host}).status_code == 200


def test_without_a_session_every_page_leads_to_the_login(lab: Lab) -> None:
    for path in [
        "/",
        "/dashboard",
        "/dashboard/studies/1",
        "/tuner",
        "/tuner/studies/demo",
        "/tuner/log",
        "/csv/1",
        "/artifacts/1/00",
        "/static/bundle.js",
        "/favicon.ico",
    ]:
        answer = lab.browser().get(path)
        assert answer.status_code == 303
        assert answer.location == f"/tuner/login?next={path}"
        assert "demo" not in answer.text


@pytest.mark.parametrize(
    "way",
    [
        "/tuner/static/../..",
        "/tuner/static/%2e%2e/%2e%2e",
        "/healthz/..",
        "/tuner/static//",
        "/tuner/login/..",
        "/tuner/static/x?/..",
    ],
)
def test_no_way_round_leads_from_what_is_public_to_what_is_not(lab: Lab, way: str) -> None:
    for path in ("/api/studies", "/dashboard", "/tuner/studies/demo", "/csv/1"):
        answer = lab.browser().get(f"{way}{path}")
        assert answer.status_code in (303, 401, 404)
        assert "demo" not in answer.text.replace("/tuner/studies/demo", "")


def test_after_the_login_one_is_where_one_wanted_to_be(lab: Lab) -> None:
    for path in ("/tuner/studies/l%C3%B6slich%2050%25%20%23x?a=%26&b=1", "/dashboard/studies/1"):
        browser = lab.browser()
        form = browser.get(browser.get(path).location).text
        there = html.unescape(re.findall(r'name="next" value="([^"]*)"', form)[0])
        assert there == path
        login = {"name": "ada", "password": PASSWORDS["ada"], "next": there}
        assert browser.post("/tuner/login", data=login).location == path


def test_without_a_session_the_interfaces_tell_nothing(lab: Lab) -> None:
    for path in [
        "/api/studies",
        "/api/studies/1",
        "/api/meta",
        "/tuner/api/studies",
        "/tuner/api/log",
        "/tuner/api/studies/demo/export",
        "/api/studies/1/plot/contour",
    ]:
        for cookies in ({}, {COOKIE: "guess"}, {COOKIE: ""}):
            browser = lab.browser()
            for name, value in cookies.items():
                browser.set_cookie(name, value, domain="127.0.0.1")
            answer = browser.get(path)
            assert answer.status_code == 401
            assert "demo" not in answer.text


def test_a_password_in_the_request_instead_of_a_session_opens_nothing(lab: Lab) -> None:
    basic = base64.b64encode(f"ada:{PASSWORDS['ada']}".encode()).decode()
    answer = lab.browser().get("/api/studies", headers={"Authorization": f"Basic {basic}"})
    assert answer.status_code == 401
    assert (
        lab.browser().get(f"/api/studies?name=ada&password={PASSWORDS['ada']}").status_code == 401
    )


def test_a_session_sees_studies_until_it_is_ended(lab: Lab) -> None:
    browser = lab.browser("vic")
    assert browser.get("/api/studies").status_code == 200
    cookie = browser.get_cookie(COOKIE, domain="127.0.0.1")
    assert cookie
    assert browser.post("/tuner/logout").location == "/tuner/login"
    # The server has forgotten it, whatever a browser kept.
    browser.set_cookie(COOKIE, cookie.value, domain="127.0.0.1")
    assert browser.get("/api/studies").status_code == 401


def test_a_user_who_is_removed_is_out_at_once(lab: Lab) -> None:
    browser = lab.browser("vic")
    assert browser.get("/api/studies").status_code == 200
    remove_user(lab.users_file, "vic")
    assert browser.get("/api/studies").status_code == 401


def test_the_cookie_is_for_this_site_alone_and_for_no_script(
    storage: Storage, tmp_path: Path
) -> None:
    for secure in (False, True):
        lab = Lab(storage, tmp_path, secure=secure)
        origin = {"Origin": f"http{'s' if secure else ''}://{HOST}"}
        login = {"name": "ada", "password": PASSWORDS["ada"]}
        answer = lab.browser().post("/tuner/login", data=login, headers=origin)
        cookie, *attributes = answer.headers["Set-Cookie"].split("; ")
        # Browsers take __Host- from this very host alone: no neighbour plants a session.
        assert cookie.startswith(f"{'__Host-' if secure else ''}{COOKIE}=")
        assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(attributes)
        assert ("Secure" in attributes) is secure
        assert not any(one.startswith("Domain") for one in attributes)
        session = {"Cookie": cookie}
        assert (
            Browser(lab.app, use_cookies=False).get("/tuner/api/me", headers=session).json["name"]
            == "ada"
        )
        for path in ("/tuner/api/logout", "/tuner/logout"):
            answer = Browser(lab.app, use_cookies=False).post(path, headers=origin | session)
            ended, *attributes = answer.headers["Set-Cookie"].split("; ")
            assert ended == f"{cookie.partition('=')[0]}="
            assert ("Secure" in attributes) is secure  # or browsers do not believe it
            answer = lab.browser().post("/tuner/login", data=login, headers=origin)
            session = {"Cookie": answer.headers["Set-Cookie"].partition(";")[0]}


def test_a_login_does_not_use_a_token_that_the_browser_brought(lab: Lab) -> None:
    browser = lab.browser()
    browser.set_cookie(COOKIE, "fixed", domain="127.0.0.1")
    browser.log_in("ada")
    cookie = browser.get_cookie(COOKIE, domain="127.0.0.1")
    assert cookie
    assert cookie.value != "fixed"


def test_a_wrong_password_and_an_unknown_user_are_answered_alike_and_limited(lab: Lab) -> None:
    def attempt(name: str, password: str) -> Any:
        return lab.browser().post("/tuner/login", data={"name": name, "password": password})

    wrong, unknown = attempt("ada", "x" * 12), attempt("eve", "x" * 12)
    assert wrong.status_code == unknown.status_code == 401
    assert wrong.text.replace("ada", "NAME") == unknown.text.replace("eve", "NAME")
    for _ in range(4):
        assert attempt("ada", "x" * 12).status_code == 401
    late = attempt("ada", PASSWORDS["ada"])
    assert late.status_code == 429
    assert 0 < int(late.headers["Retry-After"]) <= 60
    assert attempt("vic", PASSWORDS["vic"]).status_code == 303


def test_a_login_leads_to_no_other_site(lab: Lab) -> None:
    for there in [
        "https://evil.example",
        "//evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "javascript:alert(1)",
        "/\n/evil.example",
        "",
        "tuner",
    ]:
        data = {"name": "ada", "password": PASSWORDS["ada"], "next": there}
        assert lab.browser().post("/tuner/login", data=data).location == "/tuner"
        data["next"] = "/dashboard/studies/1"
        assert lab.browser().post("/tuner/login", data=data).location == "/dashboard/studies/1"


# --- who may change what ---


def test_a_viewer_changes_nothing(lab: Lab) -> None:
    vic = lab.browser("vic")
    for method, path in REFUSED + ALLOWED:
        answer = vic.open(path, method=method, json={})
        assert answer.status_code == 403, path
        assert "vic is a viewer" in answer.text
    assert optuna.get_all_study_names(lab.storage.optuna) == ["demo"]
    recorded = [(one.action, one.status) for one in reversed(lab.storage.audit.entries())]
    refused = [(f"{method} {path.rstrip('/')}", 403) for method, path in REFUSED + ALLOWED]
    assert recorded == [("log in", 200), *refused]


def test_what_would_break_a_study_is_refused_to_an_editor_too(
    local: Browser, storage: Storage
) -> None:
    before = storage.optuna.get_all_trials(1)
    for method, path in REFUSED:
        answer = local.open(path, method=method, json={"study_name": "x", "state": "fail"})
        assert answer.status_code == 403, path
        assert "would break the study" in answer.text
    assert optuna.get_all_study_names(storage.optuna) == ["demo"]
    assert storage.optuna.get_all_trials(1) == before
    assert {one.status for one in storage.audit.entries()} <= {403}


def test_the_lists_here_hold_every_writing_route_of_optuna_s_dashboard(storage: Storage) -> None:
    import optuna_dashboard

    app = optuna_dashboard.wsgi(storage.optuna)
    routes = {(one.method, re.sub(r"<[^>]+>", "1", one.rule)) for one in app.routes}
    writing = {(method, rule) for method, rule in routes if method not in ("GET", "HEAD")}
    covered = {(method, re.sub(r"/[\dx-]+(?=/|$)", "/1", path)) for method, path in
               [*REFUSED, *ALLOWED]}  # fmt: skip
    covered |= {("POST", "/api/artifacts/1/1"), ("DELETE", "/api/artifacts/1/1/1")}
    known = {"generate_plotly_graph_query", "re_generate_plotly_graph_query"}
    left = {one for one in writing - covered if one[1].rpartition("/")[2] not in known}
    assert left == set(), "decide whether editors may do that"


@pytest.mark.parametrize("header", ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"])
def test_a_method_in_a_header_or_a_form_is_none(lab: Lab, local: Browser, header: str) -> None:
    for browser in (lab.browser("vic"), local):
        assert browser.get("/api/studies/1?_method=DELETE", headers={header: "DELETE"}).json
        form = {"_method": "DELETE"}
        answer = browser.post("/api/studies/1", data=form, headers={header: "DELETE"})
        assert answer.status_code == 403
        answer = browser.post("/tuner/api/studies/demo", data=form, headers={header: "DELETE"})
        assert answer.status_code in (403, 405)
    assert optuna.get_all_study_names(lab.storage.optuna) == ["demo"]


@pytest.mark.parametrize("method", ["OPTIONS", "PATCH", "TRACE", "CONNECT", "delete", "Post", "X"])
def test_no_other_method_is_taken(local: Browser, method: str) -> None:
    environ = {"REQUEST_METHOD": method, "HTTP_HOST": HOST, "PATH_INFO": "/api/studies/1"}
    started: list[str] = []
    app: Any = local.application
    body = b"".join(app(environ, lambda status, *_: started.append(status)))
    assert started == ["405 Method Not Allowed"]
    assert b"Use DELETE, GET" in body


def test_another_site_s_page_changes_nothing(lab: Lab, local: Browser) -> None:
    for headers in [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "https://127.0.0.1:8080"},
        {"Origin": None, "Sec-Fetch-Site": "cross-site"},
        {"Origin": f"http://{HOST}", "Sec-Fetch-Site": "same-site"},
    ]:
        for browser in (lab.browser("ada"), local):
            for method, path in (*ALLOWED, ("POST", "/tuner/logout")):
                answer = browser.open(path, method=method, json={}, headers=headers)
                assert answer.status_code == 403
                assert "another site" in answer.text
        login = {"name": "ada", "password": PASSWORDS["ada"]}
        assert lab.browser().post("/tuner/login", data=login, headers=headers).status_code == 403
        assert optuna.get_all_study_names(lab.storage.optuna) == ["demo"]


def test_a_form_of_another_site_cannot_pass_for_json(lab: Lab) -> None:
    browser = lab.browser("ada")
    answer = browser.post(
        "/tuner/api/studies", data='{"toml": ""}', headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 400
    assert "application/json" in answer.text


def test_an_editor_deletes_a_study_as_the_command_does(lab: Lab, tuned: TunedStudy) -> None:
    entry = lab.storage.ledger.open(
        opened_at="2026-01-01", opened_by="ada@lab", study="demo", study_key=tuned.key, trial=1,
        config_hash="c", spec_hash="s", split_id="i",
    )  # fmt: skip
    file = lab.folder / "note.txt"
    file.write_text("attached to the study")
    store = artifact_store(lab.folders.artifacts)
    for place in (tuned.study, tuned.study.ask()):
        upload_artifact(
            artifact_store=store, file_path=str(file), study_or_trial=place,
            storage=lab.storage.optuna,
        )  # fmt: skip
    lab.storage.optuna.set_study_system_attr(tuned.id, "artifacts:gone", "null")
    shown = lab.folders.artifacts / "dashboard"
    assert len(list(shown.iterdir())) == 2

    answer = lab.browser("ada").delete(f"/api/studies/{tuned.id}")
    assert answer.status_code == 204
    assert optuna.get_all_study_names(lab.storage.optuna) == []
    assert not tuned.artifacts.folder.exists()
    assert list(shown.iterdir()) == []
    assert [one.id for one in lab.storage.ledger.entries(study_key=tuned.key)] == [entry]
    assert lab.storage.audit.entries()[0].detail == "deleted demo with 6 trials"


@pytest.mark.parametrize(
    ("method", "path", "data"),
    [
        ("DELETE", "/api/studies/1", None),
        ("DELETE", "/tuner/api/studies/demo", None),
        ("POST", "/tuner/studies/demo/delete", {"confirm": "demo"}),
    ],
)
def test_a_study_that_runs_is_not_deleted(
    local: Browser, tuned: TunedStudy, tmp_path: Path, method: str, path: str, data: Any
) -> None:
    with Storage(ready_sqlite(tmp_path)) as coordinator:
        coordinator.lease.take(tuned.id)
        answer = local.open(path, method=method, data=data)
        assert answer.status_code == 409
        assert "is being run by process" in answer.text
        assert tuned.artifacts.folder.exists()
        coordinator.lease.release()
    assert local.open(path, method=method, data=data).status_code in (200, 204, 303)


def test_a_study_of_somebody_else_s_program_is_not_deleted(
    local: Browser, storage: Storage
) -> None:
    study_id = add_trials(storage, "foreign", trials=1, parameters=1)
    answer = local.delete(f"/api/studies/{study_id}")
    assert answer.status_code == 409
    assert "was not made by `tuner launch`" in answer.json["reason"]
    assert local.delete("/api/studies/999").status_code == 404


def test_every_change_is_recorded_with_who_when_what_and_how_it_ended(lab: Lab) -> None:
    ada = lab.browser("ada")
    note = {"version": 1, "body": "looks good"}
    address = {"REMOTE_ADDR": "192.0.2.9"}
    assert ada.put("/api/studies/1/note", json=note, environ_overrides=address).status_code == 204
    assert ada.put("/api/studies/1/note", json=note).status_code == 409
    assert ada.delete("/api/studies/77").status_code == 404
    newest = lab.storage.audit.entries()
    assert [(one.who, one.action, one.status) for one in newest[::-1]] == [
        ("ada", "log in", 200),
        ("ada", "PUT /api/studies/1/note", 204),
        ("ada", "PUT /api/studies/1/note", 409),
        ("ada", "DELETE /api/studies/77", 404),
    ]
    first = newest[2]
    assert (first.address, first.detail) == ("192.0.2.9", "demo")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first.at)


def test_a_note_has_the_length_of_a_note(lab: Lab) -> None:
    ada = lab.browser("ada")
    for path in ("/api/studies/1/note", "/api/studies/1/1/note"):
        answer = ada.put(path, json={"version": 1, "body": "x" * 128 * 1024})
        assert answer.status_code == 413
        assert "at most 128 KB" in answer.json["reason"]
        assert ada.put(path, json={"version": 1, "body": "x" * 100_000}).status_code == 204


def test_a_record_is_one_line_in_the_letters_that_were_asked_for(lab: Lab) -> None:
    ada = lab.browser("ada")
    forged = "%0a2026-01-01%20%20bob%1b%5b31m%00%E2%80%AE%ff"
    assert ada.post(f"/tuner/studies/l%C3%B6slich{forged}/stop").status_code == 404
    newest = lab.storage.audit.entries()[0]
    there = "löslich 2026-01-01 bob\ufffd[31m\ufffd\ufffd\ufffd"
    assert newest.action == f"POST /tuner/studies/{there}/stop"
    assert newest.detail.isprintable()
    mistakes = {"upload": (io.BytesIO(b"x = 1\ny = 2\n"), "a\x1b[31m.toml")}
    assert ada.post("/tuner/launch", data=mistakes).status_code == 422
    detail = lab.storage.audit.entries()[0].detail
    assert detail.startswith("refused: a\ufffd[31m.toml:1: x: ")
    assert detail.isprintable()


def test_no_record_no_change(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = lab.browser("ada")

    def away(**_: object) -> int:
        raise TunerError("the database is away")

    monkeypatch.setattr(lab.storage.audit, "record", away)
    assert ada.delete("/api/studies/1").status_code == 409
    assert optuna.get_all_study_names(lab.storage.optuna) == ["demo"]


# --- what pages and files may do in a browser ---


def test_every_answer_carries_the_headers_that_keep_other_sites_out(local: Browser) -> None:
    for path in ["/dashboard", "/tuner", "/tuner/launch", "/api/studies", "/csv/1"]:
        headers = local.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Server"] == "tuner"  # and of which version is nobody's business
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Referrer-Policy"] == "same-origin"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert "camera=()" in headers["Permissions-Policy"]
        assert headers["Cache-Control"] == "no-store"
        (policy,) = headers.getlist("Content-Security-Policy")
        assert "frame-ancestors 'none'" in policy
        script = re.search(r"script-src ([^;]*)", policy)
        assert script
        assert "unsafe-inline" not in script[1]
        if path.startswith("/tuner"):
            assert policy.startswith("default-src 'none'")
            assert "unsafe" not in policy
        assert "Access-Control-Allow-Origin" not in headers


def uploaded(browser: Browser, name: str, content: bytes) -> str:
    data = f"data:text/html;base64,{base64.b64encode(content).decode()}"
    answer = browser.post("/api/artifacts/1", json={"file": data, "filename": name})
    assert answer.status_code == 201, answer.text
    return answer.json["artifact_id"]


def test_an_uploaded_page_runs_nothing_and_has_an_origin_of_its_own(lab: Lab) -> None:
    ada = lab.browser("ada")
    script = b"<script>fetch('/api/studies/1', {method: 'DELETE'})</script>"
    identity = uploaded(ada, "../../evil.html", script)
    answer = ada.get(f"/artifacts/1/{identity}")
    assert answer.data == script
    (policy,) = answer.headers.getlist("Content-Security-Policy")
    assert policy.startswith("sandbox; default-src 'none'; script-src 'none'")
    assert "allow-same-origin" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "SAMEORIGIN"
    assert answer.headers["Cache-Control"] == "no-store"
    # Optuna sends *, for every site on the web to read.
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert not list(lab.folder.parent.rglob("evil.html"))
    assert lab.browser().get(f"/artifacts/1/{identity}").status_code == 303


SMUGGLED = (
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
)

NAMES = (
    ["../../users.json", "..%2f..%2fusers.json", "..%5c..%5cusers.json", "%2e%2e/users.json",
     "....//users.json", "/etc/passwd", "%00", "users.json", "%c0%ae%c0%ae%2fusers.json",
     "%EF%BC%8E%EF%BC%8E%EF%BC%8Fusers.json", "%252e%252e%252fusers.json", "..",
     "0/../../users.json", "00000000-0000-0000-0000-000000000000"]
)  # fmt: skip


def test_no_name_of_an_artifact_leads_out_of_its_folder(lab: Lab) -> None:
    ada = lab.browser("ada")
    uploaded(ada, "a.txt", b"a")
    for name in NAMES:
        no_way_out(lab, ada, name)


def no_way_out(lab: Lab, ada: Browser, name: str) -> None:
    for path in (f"/artifacts/1/{name}", f"/artifacts/1/1/{name}", f"/static/{name}",
                 f"/tuner/static/{name}", f"/tuner/studies/{name}/report"):  # fmt: skip
        answer = ada.get(path)
        assert answer.status_code in (303, 308, 403, 404), path
        assert "scrypt" not in answer.text
    for path in (f"/api/artifacts/1/{name}", f"/api/artifacts/1/1/{name}"):
        assert ada.delete(path).status_code in (403, 404, 405)
    assert lab.users_file.exists()


def test_an_artifact_is_only_what_the_study_says_it_has(lab: Lab) -> None:
    (artifact_store(lab.folders.artifacts)._base_path / "abc").write_text("not of this study")
    ada = lab.browser("ada")
    assert ada.get("/artifacts/1/abc").status_code == 404


@pytest.mark.parametrize("number", [str(2**63), str(-(2**63) - 1), "9" * 5000])
def test_a_number_beyond_any_id_is_not_found(local: Browser, number: str) -> None:
    reading = (f"/api/studies/{number}", f"/csv/{number}", f"/artifacts/{number}/a-1",
               f"/artifacts/1/{number}/a-1", f"/api/studies/{number}/plot/contour")  # fmt: skip
    assert {local.get(path).status_code for path in reading} == {404}
    assert local.delete(f"/api/studies/{number}").status_code == 404
    assert local.put(f"/api/studies/1/{number}/note", json={"version": 1}).status_code == 404


# --- what is shown ---


def test_reading_writes_nothing(local: Browser, storage: Storage) -> None:
    writes: list[str] = []

    def spy(_: object, __: object, statement: str, *___: object) -> None:
        if not statement.lstrip().upper().startswith(("SELECT", "PRAGMA", "BEGIN")):
            writes.append(statement)

    sa.event.listen(storage._rdb.engine, "before_cursor_execute", spy)
    paths = ["/api/meta", "/api/studies", "/csv/1", "/tuner", "/tuner/studies/demo", "/tuner/log"]
    paths += ["/api/studies/1", "/api/studies/1/param_importances"]
    paths += ["/tuner/api/studies", "/tuner/studies/demo/export?top=2", "/tuner/launch"]
    plots = ("slice", "rank", "edf", "timeline", "contour", "parallel_coordinate")
    paths += [f"/api/studies/1/plot/{name}" for name in plots]
    for path in paths:
        assert local.get(path).status_code == 200, path
    assert writes == []
    # The spy can see: a write is one.
    optuna.create_study(storage=storage.optuna, study_name="other")
    assert writes


@pytest.mark.parametrize("plot", ["contour", "rank"])
def test_a_plot_of_too_many_pairs_is_refused_and_a_small_one_drawn(
    local: Browser, storage: Storage, plot: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study_id = add_trials(storage, "pairs", trials=5, parameters=2)
    path = f"/api/studies/{study_id}/plot/{plot}"
    assert local.get(path).status_code == 200
    monkeypatch.setattr(optuna_requests, "_MAX_CELLS", 99)
    for spelling in (path, f"{path}/", f"{path}//"):
        answer = local.get(spelling)
        assert answer.status_code == 413
        assert f"The {plot} plot of this study would be too large" in answer.text
    assert local.get(f"/api/studies/{study_id}/plot/slice").status_code == 200


def test_the_limit_lets_the_contour_of_2000_trials_with_10_parameters_not_through() -> None:
    assert (2_000 * 10) ** 2 > optuna_requests._MAX_CELLS > (50 * 10) ** 2


def test_a_plot_of_no_study_is_not_mistaken_for_a_large_one(storage: Storage) -> None:
    assert not optuna_requests.is_too_large(storage.optuna, 77)


def test_a_client_that_names_no_encodings_gets_the_page_too(local: Browser) -> None:
    script = re.search(r'src="(/static/[^"]+)"', local.get("/dashboard").text)
    assert script
    assert local.get(script[1]).status_code == 200


def test_many_who_poll_a_study_are_answered_from_one_look(
    local: Browser, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    really = storage.optuna.get_all_trials

    def count(study_id: int, *args: Any, **kwargs: Any) -> Any:
        asked.append(study_id)
        return really(study_id, *args, **kwargs)

    monkeypatch.setattr(storage.optuna, "get_all_trials", count)
    answers = {local.get("/api/studies/1?after=0").data for _ in range(50)}
    assert len(answers) == 1
    assert 0 < len(asked) < 6


def test_a_new_value_is_shown_within_seconds_of_its_report(
    local: Browser, storage: Storage, tmp_path: Path
) -> None:
    with Storage(ready_sqlite(tmp_path)) as other:  # as a coordinator's is
        trial = optuna.load_study(study_name="demo", storage=other.optuna).ask()
        assert len(local.get("/api/studies/1").json["trials"]) in (5, 6)
        trial.report(0.125, step=1)
        # A moment; on a busy machine answers are kept longer.
        wait_until(lambda: "0.125" in local.get("/api/studies/1").text, pause=0.2)


def test_an_id_that_another_study_was_given_shows_that_study(
    local: Browser, storage: Storage, tuned: TunedStudy, tmp_path: Path
) -> None:
    before = local.get(f"/api/studies/{tuned.id}").json
    assert before["name"] == "demo"
    with Storage(ready_sqlite(tmp_path)) as other:  # SQLite gives the same ids again
        optuna.delete_study(study_name="demo", storage=other.optuna)
        assert add_trials(other, "next", trials=2, parameters=1) == tuned.id
    time.sleep(2.1)
    after = local.get(f"/api/studies/{tuned.id}").json
    assert after["name"] == "next"
    assert len(after["trials"]) == 2
    assert [one["name"] for one in after["trials"][0]["params"]] == ["p0"]


def test_an_error_of_ours_is_answered_without_its_inside(
    local: Browser, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(optuna_app.OptunaDashboard, "read", broken)
    answer = local.get("/api/studies")
    assert (answer.status_code, answer.json) == (500, {"reason": "Something broke here."})
    assert "a secret of the inside" in caplog.text


# --- the server ---


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_without_users_it_listens_on_this_machine_only(storage: Storage, host: str) -> None:
    for more in ({}, {"trust_network": True}, {"behind_proxy": True}):
        with pytest.raises(TunerError, match=r"add-user NAME.*ssh -L 8080:127\.0\.0\.1:8080"):
            serve(storage, Settings(host=host, port=0, **more))
    with pytest.raises(TunerError, match="whoever reaches the proxy"):
        serve(storage, Settings(port=0, behind_proxy=True))


def test_passwords_do_not_cross_a_network_in_the_clear(storage: Storage, tmp_path: Path) -> None:
    users = write_users(tmp_path)
    with pytest.raises(TunerError, match=r"in the clear.*--tls-cert.*--behind-proxy"):
        serve(storage, Settings(host="0.0.0.0", port=0, users_file=users))
    proxy = {"behind_proxy": True, "proxies": ["127.0.0.1"]}
    for more in ({"trust_network": True}, proxy):
        with make_server(
            storage, settings(tmp_path, host="0.0.0.0", users_file=users, **more)
        ) as server:
            assert get(server.port, "/api/studies")[0] == 401


def test_behind_a_proxy_only_the_proxy_is_answered(storage: Storage, tmp_path: Path) -> None:
    """Others would come past it, in the clear, and could say that they are anybody."""
    users = write_users(tmp_path)
    with pytest.raises(TunerError, match=r"name the proxy's address \(--trust-proxy"):
        serve(storage, Settings(host="0.0.0.0", port=0, users_file=users, behind_proxy=True))
    with pytest.raises(TunerError, match="give --behind-proxy as well"):
        serve(storage, Settings(port=0, users_file=users, proxies=["10.0.0.2"]))
    for text in ("proxy.lab", "10.0.0.2:80", "10.0.0.1/24", ""):
        wrong = Settings(port=0, users_file=users, behind_proxy=True, proxies=[text])
        with pytest.raises(TunerError, match=re.escape(f"--trust-proxy {text!r}")):
            serve(storage, wrong)
    elsewhere = settings(
        tmp_path, users_file=users, behind_proxy=True, proxies=["10.0.0.0/24", "2001:db8::1"]
    )
    with make_server(storage, elsewhere) as server:
        status, body = get(server.port, "/tuner/login", **{"X-Real-IP": "10.0.0.2"})
        assert (status, b"--trust-proxy" in body) == (403, True)
        assert get(server.port, "/healthz")[0] == 200
    assert storage.audit.entries()[0].address == "127.0.0.1"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_stranger_s_body_is_refused_before_it_is_read(
    storage: Storage, tmp_path: Path, chunked: bool
) -> None:
    """Held in memory, 60 bodies of 15 MB would take 900 MB."""
    body = b"x" * 300_000
    length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 15000000"
    head = b"POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" + length + b"\r\n%s\r\n"
    chosen = settings(tmp_path, users_file=write_users(tmp_path))
    with make_server(storage, chosen) as server:
        for path in (b"/tuner/login", b"/tuner/api/login", b"/api/artifacts/1", b"/healthz"):
            for cookie in (b"", b"Cookie: tuner_session_%d=guess\r\n" % server.port):
                with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
                    client.sendall(head % (path, server.port, cookie))
                    if chunked:
                        with contextlib.suppress(OSError):  # it closes in the middle
                            client.sendall(b"%x\r\n" % len(body) + body)
                    answer = client.recv(1000)  # although most of the body is still to come
                    assert answer.split(b" ")[1] == (b"400" if chunked else b"413"), answer
        token = server._app._sessions.begin("ada")
        session = b"Cookie: tuner_session_%d=%s\r\n" % (server.port, token.encode())
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
            client.settimeout(0.3)
            client.sendall(head % (b"/api/artifacts/1", server.port, session))
            with pytest.raises(TimeoutError):  # it waits for the body
                client.recv(1000)


def test_a_session_of_another_port_is_another_dashboard_s(lab: Lab) -> None:
    """A browser keeps the cookies of all ports of a host together."""
    browser = lab.browser("ada")
    other = "127.0.0.1:9090"
    there = {"Host": other, "Origin": f"http://{other}"}
    assert browser.get("/api/studies", headers=there).status_code == 401
    login = {"name": "vic", "password": PASSWORDS["vic"]}
    assert browser.post("/tuner/login", data=login, headers=there).status_code == 303
    assert browser.get("/tuner/api/me", headers=there).json["name"] == "vic"
    assert browser.get("/tuner/api/me").json["name"] == "ada"
    for secure, host, name in (
        (True, "tuner.example", "__Host-tuner_session_443"),
        (True, "tuner.example:8443", "__Host-tuner_session_8443"),
        (False, "[::1]", "tuner_session_80"),
        (False, "[::1]:81", "tuner_session_81"),
    ):
        assert Policy(secure=secure).cookie({"HTTP_HOST": host}) == name


def test_with_tls_browsers_are_told_to_ask_in_the_clear_no_more(
    storage: Storage, tmp_path: Path
) -> None:
    def sent(host: str, *, secure: bool) -> str | None:
        lab = Lab(storage, tmp_path, secure=secure, hosts={host, "localhost"})
        return (
            lab.browser()
            .get("/tuner/login", headers={"Host": host})
            .headers.get("Strict-Transport-Security")
        )

    assert sent("tuner.example", secure=True) == "max-age=31536000"
    assert sent("tuner.example", secure=False) is None
    # It would hold for every program on this machine that a browser reaches under that name.
    assert sent("localhost", secure=True) is None


def test_failed_logins_and_refusals_are_recorded(lab: Lab) -> None:
    def newest() -> tuple[str, str, int | None]:
        entry = lab.storage.audit.entries(last=1)[0]
        return entry.who, entry.action, entry.status

    def log_in(name: str) -> None:
        lab.browser().post("/tuner/api/login", json={"name": name, "password": "x" * 12})

    log_in("eve\x1b[31m\n")
    assert newest() == ("eve\N{REPLACEMENT CHARACTER}[31m", "log in", 401)
    for _ in range(6):
        log_in("ada")
    assert newest() == ("ada", "log in", 429)
    viewer = lab.browser("vic")
    viewer.put("/api/studies/1/note", json={"version": 1, "body": "x"})
    assert newest() == ("vic", "PUT /api/studies/1/note", 403)
    viewer.get("/tuner/api/log")
    assert newest() == ("vic", "GET /tuner/api/log", 403)
    viewer.post("/tuner/logout", headers={"Origin": "https://evil.example"})
    assert newest() == ("", "POST /tuner/logout", 403)
    before = len(lab.storage.audit.entries())
    for _ in range(200):  # a flood
        viewer.post("/tuner/api/studies", json={})
    assert len(lab.storage.audit.entries(last=1000)) <= before + 100


def test_where_a_user_has_logged_in_strangers_cannot_lock_the_user_out(
    lab: Lab, storage: Storage
) -> None:
    def log_in(address: str, password: str) -> int:
        place = {"REMOTE_ADDR": address}
        body = {"name": "ada", "password": password}
        return lab.browser().post("/tuner/api/login", json=body, environ_base=place).status_code

    assert log_in("192.0.2.1", PASSWORDS["ada"]) == 200
    lab.app = make_app(storage, Policy(users=lab.policy.users), lab.folders)  # a new process
    codes = {log_in(f"198.51.100.{number // 4}", "x" * 12) for number in range(80)}
    assert codes == {401, 429}
    assert log_in("198.51.100.200", PASSWORDS["ada"]) == 429
    assert log_in("192.0.2.1", PASSWORDS["ada"]) == 200


def test_passwords_that_wait_to_be_checked_hold_up_nobody_else(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen threads answer: were they all to wait for scrypt, so would every page."""
    goes_on = threading.Event()
    checking = threading.Semaphore(0)

    def check(*_: object) -> bool:
        checking.release()
        assert goes_on.wait(60)
        return False

    monkeypatch.setattr("tuner.dashboard.users.check_password_hash", check)
    chosen = settings(
        tmp_path, users_file=write_users(tmp_path), behind_proxy=True, proxies=["127.0.0.1"]
    )
    codes = []

    def log_in(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json", "X-Real-IP": f"192.0.2.{number}"}
            body = json.dumps({"name": f"user{number}", "password": "x" * 12})
            connection.request("POST", "/tuner/api/login", body, headers)
            answer = connection.getresponse()
            answer.read()
            codes.append((answer.status, answer.headers["Retry-After"]))

    with make_server(storage, chosen) as server:
        threads = [threading.Thread(target=log_in, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        checking.acquire(timeout=60)
        assert get(server.port, "/tuner/login")[0] == 200
        for thread in threads[:-1]:
            thread.join(0.01)
        goes_on.set()
        for thread in threads:
            thread.join(60)
    assert set(codes) == {(401, None), (503, "1")}
    assert codes.count((401, None)) >= 6


def settings(folder: Path, **changes: Any) -> Settings:
    return Settings(**{"port": 0, "folders": Folders(artifacts=folder / "artifacts")} | changes)


def get(port: int, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_a_port_that_is_taken_is_named_with_the_remedy(storage: Storage, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TunerError, match=rf"Port {port} on 127\.0\.0\.1 is taken.*--port"):
            serve(storage, settings(tmp_path, port=port))


def test_slow_and_silent_clients_hold_up_nobody(storage: Storage, tmp_path: Path) -> None:
    with make_server(storage, settings(tmp_path)) as server, contextlib.ExitStack() as held:
        for number in range(200):
            client = held.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            if number % 2:
                client.sendall(b"POST /tuner/login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")
        start = time.monotonic()
        assert get(server.port, "/healthz") == (200, b"ok\n")
        assert time.monotonic() - start < 2


def test_who_sends_nothing_or_a_byte_now_and_then_is_hung_up_on(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_server, "_IDLE_SECONDS", 0.5)
    monkeypatch.setattr(web_server, "_BODY_SECONDS", 0.5)
    begun = b"POST /tuner/login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n"
    with make_server(storage, settings(tmp_path)) as server:
        for sent in (b"", begun, begun + b"\r\nna"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
                client.sendall(sent)
                assert client.recv(1000) == b""


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /api/studies HTTP/1.1\r\nHost: a:b\r\n\r\n", b"421"),
        (b"GET /api/studies HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", b"4"),
        (b"GET /api/studies HTTP/1.1\r\n\r\n", b"4"),
        (b"POST /tuner/login HTTP/1.1\r\nHost: a\r\nContent-Length: 16777217\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 33_000 + b"\r\n\r\n", b""),
        (b"GET http://localhost/api/studies HTTP/1.1\r\nHost: evil\r\n\r\n", b"421"),
        (b"GET /api/studies HTTP/1.1\r\nHost: evil\r\nHost_: localhost\r\n\r\n", b"421"),
        (b"GET /api/studies HTTP/1.1\r\nHost: evil\r\nUpgrade: websocket\r\n\r\n", b"421"),
        (b"CONNECT evil:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"405"),
        (b"GET /api/studies HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b""),
        (SMUGGLED, b"4"),
    ],
)  # fmt: skip
def test_a_request_that_is_none_is_refused_and_the_next_one_answered(
    storage: Storage, tmp_path: Path, request_: bytes, status: bytes
) -> None:
    with make_server(storage, settings(tmp_path)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
            client.sendall(request_)
            with contextlib.suppress(ConnectionResetError):
                answer = client.recv(1000)
                assert not answer or answer.split(b" ")[1].startswith(status or b"4"), answer
        assert get(server.port, "/healthz")[0] == 200


def test_a_body_in_chunks_is_one_body_and_no_way_round_a_limit(
    storage: Storage, tuned: TunedStudy, tmp_path: Path
) -> None:
    def put(port: int, body: bytes) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            kind = {"Content-Type": "application/json"}
            chunks = iter([body[:100], body[100:]])
            connection.request("PUT", "/api/studies/1/note", chunks, kind, encode_chunked=True)
            return connection.getresponse().status

    long = json.dumps({"version": 1, "body": "x" * 200_000}).encode()
    with make_server(storage, settings(tmp_path)) as server:
        assert put(server.port, long) == 413
        # In chunks within the chunks, for whoever takes chunks apart once more.
        assert put(server.port, b"%x\r\n%s\r\n0\r\n\r\n" % (len(long), long)) == 413
        assert put(server.port, b'{"version": 1, "body": "' + b"x" * 200 + b'"}') == 204
    assert storage.optuna.get_study_system_attrs(1)["dashboard:note_str:0"] == "x" * 200


def test_it_speaks_tls_and_a_silent_handshake_holds_up_nobody(
    storage: Storage, tmp_path: Path
) -> None:
    cert, key = certificate(tmp_path)
    chosen = settings(tmp_path, certificate=cert, key=key, users_file=write_users(tmp_path))
    with make_server(storage, chosen) as server, contextlib.ExitStack() as held:
        assert server.url.startswith("https://127.0.0.1:")
        assert server._context
        # A library of today refuses the old ones by itself; on an older one this is what does.
        assert server._context.minimum_version == ssl.TLSVersion.TLSv1_2
        for _ in range(50):
            held.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        context = ssl.create_default_context(cafile=cert)
        connection = http.client.HTTPSConnection(
            "localhost", server.port, context=context, timeout=20
        )
        start = time.monotonic()
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"ok\n"
        assert time.monotonic() - start < 5
        body = f"name=ada&password={PASSWORDS['ada'].replace(' ', '+')}"
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        connection.request("POST", "/tuner/login", body, form)
        answer = connection.getresponse()
        answer.read()
        assert "; Secure" in str(answer.headers["Set-Cookie"])
        connection.close()
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with (
            socket.create_connection(("127.0.0.1", server.port)) as plain,
            pytest.raises((ssl.SSLError, ConnectionResetError)),
        ):
            old.wrap_socket(plain)


@pytest.mark.parametrize("missing", ["certificate", "key"])
def test_a_certificate_without_its_key_is_told(
    storage: Storage, tmp_path: Path, missing: str
) -> None:
    cert, key = certificate(tmp_path)
    files = {"certificate": cert, "key": key} | {missing: None}
    with pytest.raises(TunerError, match="go together"):
        serve(storage, settings(tmp_path, **files))
    swapped = settings(tmp_path, certificate=key, key=cert)
    with pytest.raises(TunerError, match="Both are PEM files"):
        serve(storage, swapped)


def test_only_a_proxy_that_was_named_says_who_asks(storage: Storage, tmp_path: Path) -> None:
    for proxies, expected in ((["127.0.0.1"], "192.0.2.77"), ([], "127.0.0.1")):
        chosen = settings(
            tmp_path,
            users_file=write_users(tmp_path),
            behind_proxy=bool(proxies),
            proxies=proxies,
        )
        with make_server(storage, chosen) as server:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            document = json.dumps({"name": "ada", "password": PASSWORDS["ada"]})
            kind = {"Content-Type": "application/json", "X-Real-Ip": "192.0.2.77"}
            connection.request("POST", "/tuner/api/login", document, kind)
            assert json.load(connection.getresponse()) == {"name": "ada", "role": "editor"}
            connection.close()
        assert storage.audit.entries()[0].address == expected


def test_a_request_that_is_being_answered_ends_before_the_server_does(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = threading.Event()

    def slow(*_: object) -> list[bytes]:
        entered.set()
        time.sleep(0.5)
        _[2]("200 OK", [])
        return [b"whole"]

    monkeypatch.setattr(optuna_app.OptunaDashboard, "read", slow)
    answers: list[tuple[int, bytes]] = []
    with make_server(storage, settings(tmp_path)) as server:
        asking = threading.Thread(target=lambda: answers.append(get(server.port, "/api/studies")))
        asking.start()
        assert entered.wait(10)
    asking.join()
    assert answers == [(200, b"whole")]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_without_a_traceback(
    storage: Storage, tmp_path: Path, how: signal.Signals
) -> None:
    code = (
        # A shell starts what it runs in the background with SIGINT ignored, and so these tests.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys, pathlib; from tuner import logs\n"
        "from tuner.dashboard.server import serve\n"
        "from tuner.dashboard.settings import Folders, Settings\n"
        "from tuner.storage.storage import Storage\n"
        "logs.set_up()\n"
        "with Storage(sys.argv[1]) as storage:\n"
        "    serve(storage, Settings(port=0, folders=Folders(artifacts=pathlib.Path(sys.argv[2]))))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, storage.url, str(tmp_path / "artifacts")],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        line = process.stderr.readline()
        address = re.search(r"http://127\.0\.0\.1:(\d+)/ \(no login", line)
        assert address, line
        assert get(int(address[1]), "/api/studies")[0] == 200
        process.send_signal(how)
        rest = process.stderr.read()
    assert process.returncode == 0
    assert rest.count("\n") == 1
    assert rest.endswith(" INFO The dashboard ended; studies continue.\n")
