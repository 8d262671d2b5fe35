"""What requests carry: declared types, what is attached, and requests made up at random."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import optuna_dashboard
import pytest
from fakes import ready_sqlite
from finished_study import finished_study
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import HOST, Browser, Lab, write_study_file
from optuna.trial import TrialState

from tuner.artifacts import dashboard_folder
from tuner.coordination import queue
from tuner.coordination.study_note import attach_page
from tuner.dashboard import answer_cache, optuna_data, optuna_requests
from tuner.dashboard.optuna_data import with_readable_notes
from tuner.dashboard.optuna_requests import ROUTES, find_route
from tuner.dashboard.predictor import Predictor
from tuner.errors import TunerError
from tuner.search import study
from tuner.search.tuned_study import TunedStudy
from tuner.storage.storage import Storage

NOTE = "/api/studies/1/note"
FILE = f"data:text/plain;base64,{base64.b64encode(b'12345').decode()}"


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    with Storage(ready_sqlite(tmp_path)) as opened:
        yield opened


@pytest.fixture
def tuned(storage: Storage, tmp_path: Path) -> TunedStudy:
    return finished_study(storage, tmp_path)


@pytest.fixture
def lab(storage: Storage, tuned: TunedStudy, tmp_path: Path) -> Lab:
    write_study_file(tmp_path)
    return Lab(storage, tmp_path)


@pytest.fixture
def ada(lab: Lab) -> Browser:
    return lab.browser("ada")


def running_trial(tuned: TunedStudy) -> int:
    """The id of a trial on which files may be attached."""
    return tuned.study.ask()._trial_id


def shows(browser: Browser) -> None:
    """The pages of the study that everybody looks at."""
    for path in ("/api/studies", "/api/studies/1", "/csv/1", "/tuner/studies/demo"):
        assert browser.get(path).status_code == 200, path


def attached(lab: Lab) -> list[Path]:
    return sorted(dashboard_folder(lab.folders.artifacts).iterdir())


# --- types ---


NO_NOTES = [
    {"version": 1, "body": ["a"]},
    {"version": 1, "body": {"a": 1}},
    {"version": 1, "body": 5},
    {"version": 1, "body": None},
    {"version": 1, "body": True},
    {"version": 1},
    {"version": True, "body": "a"},
    {"version": 1.0, "body": "a"},
    {"version": "1", "body": "a"},
    {"version": [1], "body": "a"},
    {"version": -1, "body": "a"},
    {"version": 10**30, "body": "a"},
    {"version": 1, "body": "\ud800"},
    {"body": "a"},
    {},
    [],
    [{"version": 1, "body": "a"}],
    "a",
    1,
    None,
]


def test_a_note_is_a_number_and_a_text(ada: Browser, lab: Lab) -> None:
    for document in NO_NOTES:
        for path in (NOTE, "/api/studies/1/2/note"):
            before = lab.storage.optuna.get_study_system_attrs(1)
            answer = ada.put(path, json=document)
            assert answer.status_code == 400, document
            assert answer.json["reason"]
            assert lab.storage.optuna.get_study_system_attrs(1) == before
        shows(ada)
    assert ada.put(NOTE, json={"version": 1, "body": "a"}).status_code == 204


def test_what_is_wrong_with_a_body_is_named(ada: Browser) -> None:
    reason = ada.put(NOTE, json={"version": "1", "body": ["a"]}).json["reason"]
    assert re.fullmatch(
        r"version: Input should be .*integer; body: Input should be .*string", reason
    )


def test_a_body_of_another_kind_is_refused(ada: Browser) -> None:
    note = json.dumps({"version": 1, "body": "a"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = ada.put(NOTE, data=note, headers={"Content-Type": kind})
        assert (answer.status_code, answer.json["reason"]) == (400, "Send application/json.")
    kind = "Application/JSON; charset=utf-8"
    assert ada.put(NOTE, data=note, headers={"Content-Type": kind}).status_code == 204


def test_what_a_body_brings_along_besides_is_left_out() -> None:
    sent = json.dumps({"version": 1, "body": "a", "x": 1}).encode()
    environ = {
        "CONTENT_TYPE": "application/json; charset=utf-8",
        "CONTENT_LENGTH": str(len(sent)),
        "wsgi.input": io.BytesIO(sent + b"more"),
    }
    route, _ = find_route("PUT", NOTE) or pytest.fail("no route")
    optuna_requests.Checks._check_body(environ, route)
    content = environ["wsgi.input"].read()
    assert json.loads(content) == {"version": 1, "body": "a"}
    assert environ["CONTENT_LENGTH"] == str(len(content))
    assert environ["CONTENT_TYPE"] == "application/json"


NO_UPLOADS = [
    {"file": ["a"]},
    {"file": None, "filename": "a.txt"},
    {"filename": "a.txt"},
    {"file": "no data URI"},
    {"file": "data:text/plain;base64"},
    {"file": "data:text/plain,plain"},
    {"file": "data:text/plain;base64,a"},
    {"file": "data:text/plain;base64,*#*!"},
    {"file": FILE, "filename": ["a"]},
    {"file": FILE, "filename": None},
    {"file": FILE, "filename": 5},
    {"file": FILE, "filename": "x" * 256},
    {"file": FILE, "filename": "a\r\nSet-Cookie: b.txt"},
    {"file": FILE, "filename": "\ud800.txt"},
    {"file": FILE, "filename": "data:made/up,y"},
]


def test_an_upload_is_a_file_with_a_name(ada: Browser, lab: Lab, tuned: TunedStudy) -> None:
    for document in NO_UPLOADS:
        for path in ("/api/artifacts/1", f"/api/artifacts/1/{running_trial(tuned)}"):
            answer = ada.post(path, json=document)
            assert answer.status_code == 400, document
            assert re.match("file|filename|Invalid JSON", answer.json["reason"])
        assert attached(lab) == []
        shows(ada)


def test_names_of_many_letters_hang_as_they_are(ada: Browser) -> None:
    for name in ("löslich 学.csv", "../../a.html", "a:b.txt", "", "no ending", ".hidden"):
        answer = ada.post("/api/artifacts/1", json={"file": FILE, "filename": name})
        assert answer.status_code == 201
        identity = answer.json["artifact_id"]
        assert {one["filename"] for one in answer.json["artifacts"]} >= {name}
        assert ada.get(f"/artifacts/1/{identity}").data == b"12345"


NO_IDS = [
    "-1",
    "00",
    "01",
    "1.0",
    "1e0",
    " 1",
    "+1",
    "٣",
    "\uff11",
    "²",
    "x",
    "2",
    "9" * 5000,
    "",
    "\x00",
]


def test_only_a_study_and_a_trial_that_there_are_have_routes(ada: Browser, lab: Lab) -> None:
    for number in NO_IDS:
        note, file = {"version": 1, "body": "a"}, {"file": FILE}
        before = lab.storage.optuna.get_study_system_attrs(1)
        answers = [ada.get(f"/api/studies/{number}/plot/slice"), ada.get(f"/csv/{number}"),
                   ada.get(f"/api/studies/{number}/param_importances"),
                   ada.put(f"/api/studies/{number}/note", json=note),
                   ada.post(f"/api/artifacts/{number}", json=file),
                   ada.post(f"/api/artifacts/{number}/1", json=file),
                   ada.delete(f"/api/artifacts/{number}/0-0")]  # fmt: skip
        if number not in ("2", ""):  # which a trial has, and which leaves the path of a study
            answers += [ada.put(f"/api/studies/1/{number}/note", json=note),
                        ada.post(f"/api/artifacts/1/{number}", json=file)]  # fmt: skip
        assert {answer.status_code for answer in answers} <= {403, 404}
        assert lab.storage.optuna.get_study_system_attrs(1) == before
        assert attached(lab) == []


def test_a_trial_of_another_study_is_none_of_this_one(ada: Browser, lab: Lab) -> None:
    other = optuna.create_study(study_name="other", storage=lab.storage.optuna)
    trial = other.ask()._trial_id
    note = {"version": 1, "body": "a"}
    assert ada.put(f"/api/studies/1/{trial}/note", json=note).status_code == 404
    assert ada.post(f"/api/artifacts/1/{trial}", json={"file": FILE}).status_code == 404
    assert ada.put(f"/api/studies/{other._study_id}/{trial}/note", json=note).status_code == 204
    assert attached(lab) == []


NO_COUNTS = [
    "after=-1",
    "after=x",
    "after=1.0",
    "after=٣",
    "after=1,2",
    "after=" + "9" * 5000,
    "after=%00",
]


def test_what_a_query_counts_from_is_a_number(ada: Browser) -> None:
    for query in NO_COUNTS:
        assert ada.get(f"/api/studies/1?{query}").status_code == 400, query
    assert ada.get("/api/studies/1?after=").status_code == 200
    assert ada.get("/api/studies/1?after=3").status_code == 200


def test_selected_trials_are_numbers(ada: Browser) -> None:
    assert len(ada.get("/csv/1?trial_ids=0,%202,0").text.splitlines()) == 3
    for wrong in ("x", "0;1", "-1", "1,,2", ",".join(["1"] * 10_001)):
        assert ada.get(f"/csv/1?trial_ids={wrong}").status_code == 400
    assert ada.get("/csv/1?trial_ids=999").status_code == 404


def test_plots_that_there_are_not_are_named(ada: Browser) -> None:
    for plot in ("x", "pareto_front", "", "%00"):
        assert ada.get(f"/api/studies/1/plot/{plot}").status_code == 404


NO_NUMBERS = ["0", "101", "-1", "x", "٣", "00001" + "0" * 5000, "1" * 5000]


def test_how_many_to_export_is_a_number(ada: Browser) -> None:
    for top in NO_NUMBERS:
        assert ada.get(f"/tuner/api/studies/demo/export?top={top}").status_code == 400


def test_half_of_a_surrogate_pair_is_no_name_and_no_password(ada: Browser) -> None:
    for name, password in (("\ud800", "x" * 12), ("ada", "\udfff" * 12)):
        answer = ada.post("/tuner/api/login", json={"name": name, "password": password})
        assert answer.status_code == 400
        assert "half of a surrogate pair" in answer.json["reason"]


def test_every_route_of_optuna_s_dashboard_is_declared_or_refused(storage: Storage) -> None:
    app = optuna_dashboard.wsgi(storage.optuna)
    refused = {"rename", "preference", "preference_feedback_component", "tell", "user-attrs",
               "skip", "incompatible-rdb-schema", "trial_filter_query",
               "generate_plotly_graph_query", "re_generate_plotly_graph_query"}  # fmt: skip
    left = set()
    for one in app.routes:
        path = re.sub(r"<[^>]+>", "1", one.rule).replace("/dashboard1", "/dashboard/1")
        if find_route(one.method, path) is None and not refused & set(path.split("/")):
            left.add((one.method, path))
    assert left == {("POST", "/api/studies")}, "decide who may do that, and what it may carry"
    assert {one.method for one in ROUTES} == {"GET", "PUT", "POST", "DELETE"}


# --- notes of an earlier version ---


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ({"note_ver": 1, "note_str:0": ["a", "<b>"]}, '["a", "<b>"]'),
        ({"note_ver": True, "note_str:0": "text"}, "text"),
        ({"note_ver": 1.0, "note_str:0": {"a": 1}}, '{"a": 1}'),
        ({"note_ver": [1], "note_str:0": "a", "note_str:1": ["c"]}, 'a["c"]'),
        ({"note_ver": 2, "note_str:0": 5}, "5"),
        ({"note_ver": 2, "note_str:0": None}, "null"),
        ({"note_ver": 2, **{f"note_str:{n}": str(n % 10) for n in range(12)}}, "012345678901"),
    ],
)
def test_a_note_that_an_earlier_version_broke_is_shown_as_text_and_can_be_written(
    ada: Browser, lab: Lab, stored: dict[str, Any], shown: str
) -> None:
    for key, value in stored.items():
        for prefix in ("dashboard:", "dashboard:2:"):
            lab.storage.optuna.set_study_system_attr(1, f"{prefix}{key}", value)
    shows(ada)

    def notes() -> list[dict[str, Any]]:
        document = ada.get("/api/studies/1").json
        return [document["note"], document["trials"][1]["note"]]

    assert [note["body"] for note in notes()] == [shown, shown]
    again = {"version": notes()[0]["version"] + 1, "body": "written again"}
    for path in (NOTE, "/api/studies/1/2/note"):
        assert ada.put(path, json=again).status_code == 204
    assert notes() == [again, again]


NO_VERSIONS = [True, 1.0, "x", [1], None, 1e300]


def test_a_broken_version_of_a_note_does_not_stop_the_overview(
    storage: Storage, tuned: TunedStudy
) -> None:
    for version in NO_VERSIONS:
        storage.optuna.set_study_system_attr(tuned.id, "dashboard:note_ver", version)
        storage.begin_note(tuned.id, "the overview").result()
        attributes = storage.optuna.get_study_system_attrs(tuned.id)
        assert isinstance(attributes["dashboard:note_ver"], int)
        assert attributes["dashboard:note_str:0"] == "the overview"


def test_attributes_that_are_no_notes_stay_as_they_are() -> None:
    others = {"dashboard:note_strange": [1], "note_ver": [1], "artifacts:1": "null", "x": None}
    assert with_readable_notes(others) == others


# --- what is attached to a study ---


def test_an_upload_to_nothing_leaves_nothing(ada: Browser, lab: Lab, tuned: TunedStudy) -> None:
    upload = {"file": FILE, "filename": "a.txt"}
    for path in ("/api/artifacts/7", "/api/artifacts/1/77", "/api/artifacts/7/1"):
        assert ada.post(path, json=upload).status_code == 404
    assert ada.post("/api/artifacts/1/1", json=upload).status_code == 400  # it is finished
    assert attached(lab) == []
    assert ada.post(f"/api/artifacts/1/{running_trial(tuned)}", json=upload).status_code == 201
    assert len(attached(lab)) == 1


def test_an_upload_that_fails_on_the_way_leaves_nothing(
    ada: Browser, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = {"file": FILE, "filename": "a.txt"}

    def broken(*_: object) -> None:
        raise KeyError("deleted a moment ago")

    with monkeypatch.context() as patched:
        patched.setattr(lab.storage.optuna, "set_study_system_attr", broken)
        assert ada.post("/api/artifacts/1", json=upload).status_code >= 400
    assert attached(lab) == []

    def full(*_: object) -> None:
        dashboard_folder(lab.folders.artifacts).joinpath("half").write_bytes(b"1")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(optuna_data.FileSystemArtifactStore, "write", full)
        answer = ada.post("/api/artifacts/1", json=upload)
    assert answer.status_code == 503
    assert "No space left on device" in answer.json["reason"]
    assert [one.name for one in attached(lab)] == ["half"]  # this test's own
    assert ada.post("/api/artifacts/1", json=upload).status_code == 201


@pytest.mark.parametrize("limit", ["MAX_UPLOADS", "MAX_UPLOAD_BYTES"])
def test_what_people_hang_on_a_study_and_its_trials_has_a_limit(
    ada: Browser, lab: Lab, tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    bytes_ = len(json.dumps({"file": FILE, "filename": "a.txt"})) * 3 // 4
    monkeypatch.setattr(optuna_requests, limit, 2 if limit == "MAX_UPLOADS" else 10 + bytes_)
    trial = running_trial(tuned)
    attach_page(tuned, "report.html", b"of the tuner's own, which counts for nobody" * 10)
    upload = {"file": FILE, "filename": "a.txt"}
    first = ada.post("/api/artifacts/1", json=upload).json["artifact_id"]
    second = ada.post(f"/api/artifacts/1/{trial}", json=upload)
    assert second.status_code == 201
    if limit == "MAX_UPLOAD_BYTES":
        assert ada.post("/api/artifacts/1", json=upload).status_code == 201
    for path in ("/api/artifacts/1", f"/api/artifacts/1/{trial}"):
        answer = ada.post(path, json=upload)
        assert answer.status_code == 413
        assert "Remove one first" in answer.json["reason"]
    assert ada.delete(f"/api/artifacts/1/{first}").status_code == 204
    assert ada.post("/api/artifacts/1", json=upload).status_code == 201


def test_of_two_uploads_at_once_one_takes_the_last_place(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna_requests, "MAX_UPLOADS", 1)
    both_write = threading.Barrier(2)
    write = optuna_data.FileSystemArtifactStore.write

    def write_beside_the_other(*given: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both_write.wait(0.5)  # the other one does not come: it waits for this one's end
        write(*given)

    monkeypatch.setattr(optuna_data.FileSystemArtifactStore, "write", write_beside_the_other)
    codes: list[int] = []

    def upload(browser: Browser) -> None:
        answer = browser.post("/api/artifacts/1", json={"file": FILE, "filename": "a.txt"})
        codes.append(answer.status_code)

    threads = [threading.Thread(target=upload, args=(lab.browser("ada"),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [201, 413]
    assert len(attached(lab)) == 1


def test_a_file_is_removed_only_where_it_hangs(ada: Browser, lab: Lab, tuned: TunedStudy) -> None:
    other = optuna.create_study(study_name="other", storage=lab.storage.optuna)._study_id
    trial = running_trial(tuned)
    upload = {"file": FILE, "filename": "a.txt"}
    on_study = ada.post("/api/artifacts/1", json=upload).json["artifact_id"]
    on_trial = ada.post(f"/api/artifacts/1/{trial}", json=upload).json["artifact_id"]
    for path in (f"{other}/{on_study}", f"{trial}/{on_study}", f"1/{trial}/{on_study}",
                 f"1/{on_trial}", f"1/1/{on_trial}", f"{other}/{trial}/{on_trial}"):  # fmt: skip
        assert ada.delete(f"/api/artifacts/{path}").status_code == 404, path
        assert ada.get(f"/artifacts/{path}").status_code == 404, path
    assert len(attached(lab)) == 2
    assert ada.delete(f"/api/artifacts/1/{on_study}").status_code == 204
    assert ada.delete(f"/api/artifacts/1/{trial}/{on_trial}").status_code == 204
    assert ada.delete(f"/api/artifacts/1/{on_study}").status_code == 404
    assert attached(lab) == []


def test_a_file_that_is_gone_is_not_found(ada: Browser, lab: Lab) -> None:
    upload = {"file": FILE, "filename": "a.txt"}
    identity = ada.post("/api/artifacts/1", json=upload).json["artifact_id"]
    attached(lab)[0].unlink()
    assert ada.get(f"/artifacts/1/{identity}").status_code == 404
    shows(ada)


UPLOADED_PAGES = ["a.html", "a.svg", "a.xhtml", "a.xml", "a.pdf", "report.html"]


def test_what_people_upload_is_an_attachment_that_runs_nothing(ada: Browser) -> None:
    for name in UPLOADED_PAGES:
        upload = {"file": FILE, "filename": name}
        identity = ada.post("/api/artifacts/1", json=upload).json["artifact_id"]
        headers = ada.get(f"/artifacts/1/{identity}").headers
        assert headers["Content-Disposition"] == "attachment"
        (policy,) = headers.getlist("Content-Security-Policy")
        assert policy.startswith("sandbox; default-src 'none'; script-src 'none';")


def test_the_tuner_s_own_page_runs_its_scripts_in_an_origin_of_its_own(
    ada: Browser, tuned: TunedStudy
) -> None:
    attach_page(tuned, "report.html", b"<script>1</script>")
    identity = tuned.artifacts.identity("report.html", None)
    headers = ada.get(f"/artifacts/1/{identity}").headers
    assert "Content-Disposition" not in headers
    (policy,) = headers.getlist("Content-Security-Policy")
    assert policy.startswith("sandbox allow-scripts; default-src 'none'")
    # A description that names another file makes nothing of somebody's own a page of ours.
    described = json.dumps({"artifact_id": identity, "filename": "x.html", "mimetype": "text/html"})
    tuned.storage.optuna.set_study_system_attr(tuned.id, f"artifacts:{identity}", described)
    assert ada.get(f"/artifacts/1/{identity}").headers["Content-Disposition"] == "attachment"


# --- answers that are kept ---


def test_what_a_query_says_besides_makes_no_other_answer(lab: Lab, ada: Browser) -> None:
    kept = lab.app._optuna._answers._entries
    bodies = {ada.get(f"/api/studies/1?after=2&x={n}").data for n in range(20)}
    bodies |= {ada.get(f"/api/studies/1?x={n}&after=2&after={n}").data for n in range(20)}
    assert len(bodies) == 1
    assert list(kept) == ["/api/studies/1?after=2"]
    for n in range(20):
        ada.get(f"/api/studies?{n}")
        ada.get(f"/api/studies/{n + 2}")
        ada.get(f"/api/studies/1/plot/{n}")
        ada.get(f"/api/studies/1/plot/edf?{n}")
    assert list(kept) == ["/api/studies/1?after=2", "/api/studies?", "/api/studies/1/plot/edf?"]


def test_of_a_query_the_dashboard_sees_what_its_answer_is_kept_by(lab: Lab) -> None:
    environ = {"REQUEST_METHOD": "GET", "QUERY_STRING": "x=1&after=%202&after=7"}
    route, parts = find_route("GET", "/api/studies/1") or pytest.fail("no route")
    asked = lab.app._optuna.check(environ, route, parts)
    assert environ["QUERY_STRING"] == asked.query == "after=2"


def test_an_answer_that_failed_is_not_kept(
    lab: Lab, ada: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object, start_response: Any) -> list[bytes]:
        start_response("500 Internal Server Error", [])
        return [b""]

    with monkeypatch.context() as patched:
        patched.setattr(lab.app._optuna, "_app", fail)
        assert ada.get("/api/studies").status_code == 500
    assert ada.get("/api/studies").status_code == 200


@pytest.mark.parametrize(("limit", "most"), [("_MAX_ANSWERS", 3), ("_MAX_BYTES", 5000)])
def test_kept_answers_have_a_number_and_a_size(
    lab: Lab, ada: Browser, monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    monkeypatch.setattr(answer_cache, limit, most)
    for n in range(10):
        assert ada.get(f"/api/studies/1?after={n}").status_code == 200
        kept = lab.app._optuna._answers._entries
        held = (
            len(kept)
            if limit == "_MAX_ANSWERS"
            else sum(len(one.answer.data) for one in kept.values())
        )
        assert held <= most


# --- requests made up at random ---


def routes(storage: Storage, lab: Lab) -> list[tuple[str, list[str]]]:
    """Method and path of every route, Optuna's and ours; a path by its parts, of which every
    second is the name of one to choose."""
    found = {(one.method, one.rule) for one in optuna_dashboard.wsgi(storage.optuna).routes}
    for one in lab.app._pages._routes.iter_rules():
        found |= {(method, f"/tuner{one.rule}") for method in one.methods}
    plain = sorted((method, re.sub(r"<(\w*)[^>]*>", r"<\1>", rule)) for method, rule in found)
    taken = [one for one in plain if find_route(one[0], re.sub("<.*?>", "1", one[1]))]
    plain += [*taken * 2, *[one for one in plain if one[0] in ("PUT", "POST")], ("GET", "/<x>/<x>")]
    return [(method, re.split("<(.*?)>", rule)) for method, rule in plain]


METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE"]
LETTERS = st.characters(codec="utf-8")
NUMBERS = ["1", "2", "6", "0", "-1", "01", "1.0", "٣", "²", "9" * 5000, str(2**63), "1e9"]
FITTING = {"study_id": b"1", "trial_id": b"6", "name": b"demo", "plot_type": b"edf"}
ODD = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(["slice", "contour", "pareto_front", "note", "..", "", "%", "%2e%2e", "%00"]),
    st.sampled_from(["\x00", "a/b", "\\", "\r\nX: y", "tiny.toml", "pages.js"]),
    st.text(LETTERS, max_size=8),
).map(lambda text: text.encode()) | st.sampled_from([b"\xff", b"\xed\xa0\x80", b"\xc0\xaf"])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.just("\ud800"),
    st.sampled_from([10**30, 1.5, float("nan"), float("inf"), -0.0]),
    st.sampled_from(
        ["", "demo", "ada", "1", "\ud800", "\x00", "tiny.toml", FILE, "data:,", "a.html"]
    ),
    st.text(LETTERS, max_size=8),
)
VALUES = st.recursive(
    LEAVES,
    lambda one: st.lists(one, max_size=2) | st.dictionaries(st.text(max_size=3), one, max_size=2),
    max_leaves=4,
)
KEYS = ["version", "body", "file", "filename", "toml", "name", "password", "trials", "next",
        "confirm", "action", "study", "fasta", "remove_associated_artifacts"]  # fmt: skip
NEXT = "the next version"
NOTES = st.fixed_dictionaries({"version": st.just(NEXT) | VALUES, "body": VALUES})
FITTING_DOCUMENTS = {
    "note": NOTES,
    "artifacts": st.fixed_dictionaries({"file": st.just(FILE), "filename": VALUES}),
    "login": st.fixed_dictionaries({"name": VALUES, "password": VALUES}),
    "check": st.fixed_dictionaries({"toml": VALUES}),
    "predict": st.fixed_dictionaries(
        {"study": st.just("demo") | VALUES, "fasta": st.just(">a\nMK") | VALUES}
    ),
    "studies": st.fixed_dictionaries({"file": st.just("tiny.toml"), "name": VALUES}),
}
DOCUMENTS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4) | VALUES
RAW = st.one_of(
    st.sampled_from([b"", b"null", b"[" * 5000, b'{"a":' * 5000, b"\xff\xfe", b"a=%ff&b"]),
    st.sampled_from([b'{"version": %s}' % (b"9" * 5000), b"--x\r\n\r\n", b"--x\r\nContent-"]),
    st.binary(max_size=12),
)
KINDS = st.sampled_from(
    ["application/json"] * 8
    + ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
       "multipart/form-data", "application/json; charset=\xff"]
)  # fmt: skip
QUERIES = st.one_of(
    st.just(""),
    st.tuples(
        st.sampled_from(["after", "trial_ids", "top", "format", "next", "x"]),
        st.sampled_from([*NUMBERS, "1,2", "toml", "%ff", "%00", "//evil", "&&=&", "%ed%a0%80"]),
    ).map("=".join),
    st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=12),
)


@pytest.mark.parametrize("role", ["ada", "vic", None])
def test_no_request_breaks_anything(
    lab: Lab,
    storage: Storage,
    tuned: TunedStudy,
    role: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every route, with every method, for every role, and parts, queries and bodies of any type."""

    def keep(*_: object, **__: object) -> None:
        raise TunerError("not in this test")

    monkeypatch.setattr(study, "delete", keep)  # it is looked at afterwards
    monkeypatch.setattr(queue, "place", keep)
    monkeypatch.setattr(queue, "prepare_here", keep)
    monkeypatch.setattr(Predictor, "predict", keep)
    known = routes(storage, lab)
    running_trial(tuned)
    watcher = lab.browser("ada")
    cookie = "" if role is None else lab.browser(role)._cookies
    if role is not None:
        cookie = "; ".join(f"{one.key}={one.value}" for one in cookie.values())

    @settings(
        max_examples=250,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        method, parts = data.draw(st.sampled_from(known))
        path = b"".join(
            data.draw(st.just(FITTING[part]) | ODD if part in FITTING else ODD)
            if number % 2
            else part.encode()
            for number, part in enumerate(parts)
        )
        fitting = next((key for key in FITTING_DOCUMENTS if key in parts[-1] + parts[0]), "note")
        document = data.draw(FITTING_DOCUMENTS[fitting] | DOCUMENTS)
        if isinstance(document, dict) and document.get("version") == NEXT:
            key = "dashboard:note_ver" if b"/6/" not in path else "dashboard:6:note_ver"
            document["version"] = storage.optuna.get_study_system_attrs(1).get(key, 0) + 1
        body = data.draw(st.just(json.dumps(document).encode()) | RAW)
        environ = {
            "REQUEST_METHOD": data.draw(st.sampled_from([method] * 8 + METHODS)),
            "PATH_INFO": path.decode("latin-1"),
            "QUERY_STRING": data.draw(QUERIES).encode().decode("latin-1"),
            "CONTENT_TYPE": data.draw(KINDS),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_HOST": HOST,
            "HTTP_COOKIE": cookie,
            "REMOTE_ADDR": "127.0.0.1",
            "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": "8080",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": io.StringIO(),
            "wsgi.url_scheme": "http",
        }
        started: list[tuple[str, Any]] = []
        chunks = lab.app(environ, lambda status, headers, *_: started.append((status, headers)))
        list(chunks)
        if hasattr(chunks, "close"):
            chunks.close()
        ((status, headers),) = started
        assert int(status[:3]) < 500, (status, environ)
        assert not any("\n" in value or "\r" in value for _, value in headers)
        if role is None:
            assert status[:1] != "2" or environ["PATH_INFO"].startswith(("/tuner/", "/healthz"))
        if environ["REQUEST_METHOD"] in ("POST", "PUT", "DELETE") and status[:1] == "2":
            shows(watcher)

    run()
    shows(watcher)
    assert watcher.get("/dashboard").status_code == 200
    assert all(one.state != TrialState.WAITING for one in tuned.trials())
    assert "Traceback" not in capsys.readouterr().err
