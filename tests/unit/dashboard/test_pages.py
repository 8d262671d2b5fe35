"""The pages under /tuner and the same as JSON: launch, stop, resume, export, report."""

from __future__ import annotations

import io
import json
import time
import tomllib
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from fakes import ready_sqlite
from finished_study import finished_study, write_rows
from lab import Browser, Lab, study_file, write_study_file
from typer.testing import CliRunner

from tuner.cli.main import app
from tuner.cli.progress import ProgressWatcher, status_details, status_table
from tuner.cli.terminal import terminal
from tuner.coordination import queue as orders
from tuner.errors import SpecError
from tuner.search.status import status
from tuner.search.study import load
from tuner.search.tuned_study import TunedStudy
from tuner.storage.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    with Storage(ready_sqlite(tmp_path)) as opened:
        yield opened


@pytest.fixture
def lab(storage: Storage, tmp_path: Path) -> Lab:
    write_study_file(tmp_path)
    return Lab(storage, tmp_path)


@pytest.fixture
def ada(lab: Lab) -> Browser:
    return lab.browser("ada")


@pytest.fixture
def tuned(storage: Storage, tmp_path: Path) -> TunedStudy:
    return finished_study(storage, tmp_path)


# --- launch, stop, resume ---


def test_a_launched_study_waits_in_the_queue_with_its_rows(lab: Lab, ada: Browser) -> None:
    answer = ada.post("/tuner/launch", data={"file": "tiny.toml", "name": "mine", "trials": "5"})
    assert (answer.status_code, answer.location) == (303, "/tuner/studies/mine")
    tuned = load(lab.storage, "mine", artifacts_root=lab.folders.artifacts)
    assert lab.storage.queue.study_ids() == (tuned.id,)
    assert tuned.budget == 5
    assert lab.storage.development.read(tuned.record.development_sha256)
    assert lab.storage.audit.entries()[0].detail.startswith("launched: Study mine is queued")


def test_stop_and_resume_take_it_out_of_the_queue_and_back(lab: Lab, ada: Browser) -> None:
    ada.post("/tuner/launch", data={"file": "tiny.toml"})
    assert ada.post("/tuner/studies/tiny/stop").location == "/tuner/studies/tiny"
    assert lab.storage.queue.study_ids() == ()
    assert "stopped" in ada.get("/tuner/studies/tiny").text
    document = ada.post("/tuner/api/studies/tiny/resume").json
    assert document["outcome"] == "queued"
    assert ada.post("/tuner/api/studies/tiny/resume").json["outcome"] == "queued already"
    assert ada.post("/tuner/api/studies/tiny/stop").json == {
        "study": "tiny", "asked": False, "dequeued": True,
    }  # fmt: skip


def test_a_running_study_is_asked_to_stop(lab: Lab, ada: Browser, tmp_path: Path) -> None:
    ada.post("/tuner/launch", data={"file": "tiny.toml"})
    tuned = load(lab.storage, "tiny", artifacts_root=lab.folders.artifacts)
    with Storage(ready_sqlite(tmp_path)) as coordinator:
        coordinator.lease.take(tuned.id)
        assert ada.get("/tuner/api/studies/tiny").json["state"] == "running"
        document = ada.post("/tuner/api/studies/tiny/resume").json
        assert document["outcome"] == "running"
        assert ada.post("/tuner/api/studies/tiny/stop").json["asked"] is True
        assert coordinator.lease.heartbeat() is True
        coordinator.lease.release()


def test_a_launch_with_another_budget_changes_nothing_of_a_study_that_runs(
    lab: Lab, ada: Browser, tmp_path: Path
) -> None:
    ada.post("/tuner/launch", data={"file": "tiny.toml", "trials": "30"})
    tuned = load(lab.storage, "tiny", artifacts_root=lab.folders.artifacts)
    with Storage(ready_sqlite(tmp_path)) as coordinator:
        lab.storage.queue.remove(tuned.id)  # it is driven by a launch of its own
        coordinator.lease.take(tuned.id)
        before = tuned.study.user_attrs
        for trials in ("5", "60"):
            page = ada.post("/tuner/launch", data={"file": "tiny.toml", "trials": trials})
            assert page.status_code == 409
            assert "is being run by process" in page.text
            document = {"file": "tiny.toml", "trials": int(trials)}
            answer = ada.post("/tuner/api/studies", json=document)
            assert answer.status_code == 409
            assert f"asks for {trials} trials" in answer.json["reason"]
        assert ada.post("/tuner/api/studies/tiny/resume").json["outcome"] == "running"
        assert tuned.study.user_attrs == before
        assert lab.storage.queue.study_ids() == ()
        coordinator.lease.release()


def test_rows_that_another_study_keeps_sealed_are_told_where_one_is_launched_or_checked(
    lab: Lab, ada: Browser
) -> None:
    ada.post("/tuner/launch", data={"file": "tiny.toml"})
    write_study_file(lab.folder, "other")
    path = lab.folder / "studies" / "other.toml"
    path.write_text(path.read_text().replace("[training]", "split = { seed = 7 }\n[training]"))
    words = "test rows sealed; of these, this study has"
    checked = ada.post("/tuner/api/check", json={"file": "other.toml"}).json
    assert words in checked["warnings"][-1]
    page = ada.post("/tuner/launch", data={"file": "other.toml"})
    assert page.status_code == 200
    assert words.replace("'", "&#39;") in page.text
    assert words in ada.post("/tuner/api/studies", json={"file": "other.toml"}).json["warnings"][-1]
    assert ada.post("/tuner/launch", data={"file": "tiny.toml"}).status_code == 200  # and back


def test_the_same_verbs_as_json(ada: Browser) -> None:
    assert ada.get("/tuner/api/me").json == {"name": "ada", "role": "editor"}
    assert ada.get("/tuner/api/files").json == {"files": ["tiny.toml"]}
    check = ada.post("/tuner/api/check", json={"file": "tiny.toml", "trials": 8}).json
    assert (check["valid"], check["trials"]) == (True, 8)
    assert check["data"]["rows"]["test"] > 0
    assert ada.get("/tuner/api/studies").json == {"studies": []}
    answer = ada.post("/tuner/api/studies", json={"toml": study_file("sent")})
    assert (answer.status_code, answer.json["outcome"]) == (202, "queued")
    assert answer.json["synthetic"] is True
    assert [one["study"] for one in ada.get("/tuner/api/studies").json["studies"]] == ["sent"]
    assert ada.delete("/tuner/api/studies/sent").json == {"study": "sent", "deleted": True}
    assert ada.get("/tuner/api/studies/sent").status_code == 404
    actions = [one["action"] for one in ada.get("/tuner/api/log").json["changes"]]
    assert actions[:2] == ["DELETE /tuner/api/studies/sent", "POST /tuner/api/studies"]


def test_a_page_and_the_api_record_a_refusal_in_the_same_words(lab: Lab, ada: Browser) -> None:
    finished_study(lab.storage, lab.folder)
    with Storage(lab.storage.url) as coordinator:
        coordinator.lease.take(load(lab.storage, "demo", artifacts_root=lab.folders.artifacts).id)
        assert ada.post("/tuner/studies/demo/delete", data={"confirm": "demo"}).status_code == 409
        assert ada.delete("/tuner/api/studies/demo").status_code == 409
        coordinator.lease.release()
    by_api, by_page = (one.detail for one in lab.storage.audit.entries()[:2])
    assert by_api == by_page
    assert by_api.startswith("refused: ")


@pytest.mark.parametrize(
    "document",
    [
        {},
        [],
        {"file": "tiny.toml", "toml": "x"},
        {"file": 3},
        {"file": "tiny.toml", "trials": "5"},
        {"file": "tiny.toml", "trials": True},
        {"file": "tiny.toml", "name": 5},
        {"file": "tiny.toml", "set": "data.source=/etc/passwd"},
    ],
)
def test_a_document_that_is_none_is_refused(ada: Browser, document: object) -> None:
    for path in ("/tuner/api/studies", "/tuner/api/check"):
        assert ada.post(path, json=document).status_code == 400
    deep = "[" * 100_000
    kind = {"Content-Type": "application/json"}
    assert ada.post("/tuner/api/studies", data=deep, headers=kind).status_code == 400


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"toml": study_file() + "# \ud800"}, "not UTF-8 text"),
        ({"toml": study_file(), "name": "\udfff"}, "U+DFFF"),
        ({"file": "\ud83d"}, "not a study file of this server"),
        ({"file": "tiny.toml", "name": "a\ud83d"}, "U+D83D"),
    ],
)
def test_half_of_a_surrogate_pair_is_a_mistake_like_any_other(
    ada: Browser, document: dict[str, str], words: str
) -> None:
    for path in ("/tuner/api/check", "/tuner/api/studies"):
        answer = ada.post(path, json=document)
        assert answer.status_code == 422
        assert words in answer.text


def test_mistakes_are_told_as_tuner_check_tells_them(ada: Browser) -> None:
    text = study_file().replace("trials = 3", "trials = 0").replace("learning_rate", "lerning_rate")
    answer = ada.post("/tuner/api/studies", json={"toml": text})
    assert answer.status_code == 422
    assert [(one["file"], one["line"], one["key"]) for one in answer.json["errors"]] == [
        ("upload.toml", 2, "trials"),
        ("upload.toml", 8, "space.lerning_rate"),
    ]
    assert "did you mean 'learning_rate'" in answer.json["reason"].replace('"', "'")
    upload = {"upload": (io.BytesIO(text.encode()), "mine.toml"), "action": "launch"}
    page = ada.post("/tuner/launch", data=upload)
    assert page.status_code == 422
    assert "mine.toml:2: trials:" in page.text
    assert "/tmp" not in page.text


def test_a_mistake_in_a_field_is_told_by_the_field_and_several_are_told_apart(
    lab: Lab, ada: Browser
) -> None:
    data = {"file": "tiny.toml", "name": "bad name!/../x", "trials": "0"}
    page = ada.post("/tuner/launch", data=data)
    assert page.status_code == 422
    assert "Name: must not contain /, as " in page.text
    assert "does; remove it" in page.text
    assert "Trials: must be at least 1" in page.text
    assert "--set" not in page.text
    told = lab.storage.audit.entries()[0].detail
    assert told.startswith("refused: name: must not contain /")
    assert "remove it; trials: must be at least 1" in told
    answer = ada.post("/tuner/api/studies", json={"file": "tiny.toml", "trials": 0})
    assert [(one["file"], one["key"]) for one in answer.json["errors"]] == [("", "trials")]
    assert (
        ada.post(
            "/tuner/launch", data={"file": "tiny.toml", "name": "a name, with (other) signs!"}
        ).status_code
        == 303
    )


def test_markup_in_names_and_files_stays_text(ada: Browser) -> None:
    name = "<script>alert(1)</script>"
    for data in ({"file": name}, {"file": "tiny.toml", "name": name},
                 {"upload": (io.BytesIO(b"x = '" + name.encode()), f"{name}.toml")}):  # fmt: skip
        page = ada.post("/tuner/launch", data=data)
        assert page.status_code == 422
        assert "<script>alert" not in page.text
    assert "<script>alert" not in ada.get(f"/tuner/studies/{name}").text
    assert "<script>alert" not in ada.post("/tuner/login", data={"name": name}).text


def test_markup_of_the_terminal_in_a_name_stays_text(lab: Lab, ada: Browser) -> None:
    name = "[bold]x[red]"
    assert ada.post("/tuner/api/studies", json={"file": "tiny.toml", "name": name}).json["study"]
    now = status(load(lab.storage, name, artifacts_root=lab.folders.artifacts))
    now = replace(now, error=f"{name}: no such file x[/y]", ended_early=":smile: [/z]")
    console = terminal(width=200, record=True, file=io.StringIO())
    console.print(status_table([now]), status_details(now))
    ProgressWatcher(load(lab.storage, name, artifacts_root=lab.folders.artifacts), console).say(
        name
    )
    printed = console.export_text()
    assert printed.count(name) == 4
    assert "x[/y]" in printed
    assert ":smile: [/z]" in printed


# --- what an uploaded study file may make the server read ---


@pytest.mark.parametrize(
    "source",
    ["/etc/passwd.csv", "../users.csv", "rows.csv", "~/rows.csv", "data/../../rows.csv",
     "a\\rows.csv", "/dev/stdin.csv", "..csv"],
)  # fmt: skip
def test_an_uploaded_file_makes_the_server_read_no_file(
    ada: Browser, tmp_path: Path, source: str
) -> None:
    write_rows(tmp_path)
    (tmp_path / "studies" / "rows.csv").write_text("sequence,label\nAAAA,1\n")
    text = study_file(source=source)
    for path in ("/tuner/api/check", "/tuner/api/studies"):
        answer = ada.post(path, json={"toml": text})
        assert answer.status_code == 422
        (problem,) = answer.json["errors"]
        assert problem["key"] == "data.source"
        assert 'may name "solubility" or "synthetic"' in problem["message"]


def test_of_a_fasta_pair_both_files_are_looked_at(tmp_path: Path) -> None:
    (tmp_path / "a.fasta").write_text(">a\nMA\n")
    pair = '{ soluble = "a.fasta", insoluble = "/etc/passwd" }'
    text = study_file().replace('"synthetic"', pair)
    with pytest.raises(SpecError, match="by its name alone"):
        orders.spec_of_an_upload(text.encode(), "x.toml", (), data_folder=tmp_path)


def test_a_file_of_the_data_folder_is_read_and_a_link_out_of_it_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder)
    text = study_file(source="rows.csv").encode()
    spec = orders.spec_of_an_upload(text, "x.toml", (), data_folder=folder)
    assert spec.folder == folder
    (tmp_path / "outside.csv").write_text("secret")
    (folder / "link.csv").symlink_to(tmp_path / "outside.csv")
    (folder / "folder.csv").mkdir()
    for source in (
        "link.csv",
        "folder.csv",
        "missing.csv",
        "../outside.csv",
        "folder.csv/../rows.csv",
        str(folder / "rows.csv"),  # the answer must not tell where the folder is
    ):
        with pytest.raises(SpecError, match="by its name alone"):
            orders.spec_of_an_upload(
                study_file(source=source).encode(), "x.toml", (), data_folder=folder
            )


@pytest.mark.parametrize("name", ["../tiny.toml", "/etc/passwd", "studies/tiny.toml", "", "."])
def test_only_the_study_files_of_the_folder_are_launched(ada: Browser, name: str) -> None:
    answer = ada.post("/tuner/api/studies", json={"file": name})
    assert answer.status_code == 422
    assert "it has: tiny.toml" in answer.json["reason"]


def test_a_file_that_is_too_long_or_too_deep_is_refused(ada: Browser) -> None:
    long = b"# " + b"x" * orders.MAX_UPLOAD_BYTES
    page = ada.post("/tuner/launch", data={"upload": (io.BytesIO(long), "long.toml")})
    assert page.status_code == 422
    assert "a study file has at most" in page.text
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert ada.post("/tuner/launch", data=long * 8, headers=kind).status_code == 413
    megabyte = "x" * 4 * orders.MAX_UPLOAD_BYTES
    assert ada.post("/tuner/api/studies", json={"toml": megabyte}).status_code == 413
    head = b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\n'
    form = head + b"x" * 3 * orders.MAX_UPLOAD_BYTES + b"\r\n--x--\r\n"
    assert ada.post("/tuner/launch", data=form, headers=kind).status_code == 413
    deep = study_file() + "x = " + "[\n" * 50_000
    answer = ada.post("/tuner/api/studies", json={"toml": deep})
    assert answer.status_code == 422
    assert "nested too deeply" in answer.json["reason"]
    assert ada.post("/tuner/api/studies", json={"toml": "\0"}).status_code == 422


@pytest.mark.parametrize(
    "more",
    [
        "a." * 60_000 + "a = 1",  # `tomllib` alone took two minutes
        f"{'a' * 120}." * 2_000 + "a = 1",
        f"units = {{ choices = [{', '.join(map(str, range(1, 30_000)))}, 1] }}",
        "".join(f"[a{number}]\n" for number in range(20_000)),
        f"learning_rate = {'9' * 200_000}.0",
    ],
    ids=["long key", "long key of long parts", "choices", "tables", "digits"],
)
def test_a_small_file_does_not_keep_the_server_busy(ada: Browser, more: str) -> None:
    began = time.monotonic()
    answer = ada.post("/tuner/api/check", json={"toml": study_file() + more})
    assert answer.status_code == 422
    assert time.monotonic() - began < 20  # a second or two; all of them took a minute and more
    assert len(ada.get("/tuner/log").data) < 10_000


def test_a_service_without_the_data_set_takes_the_rows_of_an_earlier_study(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_data(*_: object, **__: object) -> None:
        raise AssertionError("it looked for the data set")

    finished_study(storage, tmp_path)
    earlier = load(storage, "demo", artifacts_root=tmp_path / "artifacts")
    # As if the study had been launched over the published data set.
    record = dict(earlier.study.user_attrs["tuner"])
    record["spec"] = json.loads(json.dumps(record["spec"]))
    record["spec"]["data"]["source"] = "solubility"
    earlier.study.set_user_attr("tuner", record)
    split = "{ seed = 1, validation = 0.2, test = 0.2 }"
    text = study_file("next", "solubility").replace("[training]", f"split = {split}\n[training]")
    spec = orders.spec_of_an_upload(text.encode(), "x.toml", (), data_folder=None)
    monkeypatch.setattr(orders, "prepare", no_data)
    placed = orders.place(storage, spec, artifacts_root=tmp_path / "artifacts")
    assert placed.queued.outcome == "queued"
    tuned = load(storage, "next", artifacts_root=tmp_path / "artifacts")
    assert tuned.record.data == earlier.record.data
    assert tuned.record.development_sha256 == earlier.record.development_sha256
    other = spec.model_copy(
        update={"data": spec.data.model_copy(update={"max_length": 100}), "name": "other"}
    )
    with pytest.raises(AssertionError, match="looked for"):
        orders.place(storage, other, artifacts_root=tmp_path / "artifacts")


# --- export and report ---


@pytest.mark.parametrize(
    ("form", "read"), [("toml", tomllib.loads), ("json", json.loads), ("yaml", yaml.safe_load)]
)
def test_the_best_configurations_come_in_every_format(
    lab: Lab, tuned: TunedStudy, form: str, read: object
) -> None:
    vic = lab.browser("vic")  # looking is enough
    answer = vic.get(f"/tuner/studies/demo/export?top=1&format={form}")
    assert answer.headers["Content-Disposition"] == f"attachment; filename=demo-1-trial-1.{form}"
    assert read(answer.text)["provenance"]["trial"] == 1
    packed = vic.get(f"/tuner/studies/demo/export?top=9&format={form}")
    with zipfile.ZipFile(io.BytesIO(packed.data)) as archive:
        assert archive.namelist() == [f"demo-1-trial-1.{form}", f"demo-2-trial-0.{form}"]
        assert read(archive.read(f"demo-2-trial-0.{form}").decode())["provenance"]["trial"] == 0
    assert [
        one["trial"] for one in vic.get("/tuner/api/studies/demo/export?top=2").json["configs"]
    ] == [1, 0]


@pytest.mark.parametrize(
    "query", ["top=0", "top=101", "top=-1", "top=x", "top=1e9", "format=exe", "format=../x"]
)
def test_an_export_that_makes_no_sense_is_refused(lab: Lab, tuned: TunedStudy, query: str) -> None:
    assert lab.browser("vic").get(f"/tuner/studies/demo/export?{query}").status_code == 400


def test_a_study_without_a_trained_trial_says_so(lab: Lab, ada: Browser) -> None:
    ada.post("/tuner/launch", data={"file": "tiny.toml"})
    answer = ada.get("/tuner/studies/tiny/export")
    assert answer.status_code == 409
    assert "no fully trained trial yet" in answer.text


def test_a_report_is_shown_in_an_origin_of_its_own_and_no_page_opens_the_test_split(
    lab: Lab, tuned: TunedStudy
) -> None:
    ada = lab.browser("ada")
    page = ada.get("/tuner/studies/demo/report")
    assert page.status_code == 404
    assert "there is no button for it" in page.text
    for method in ("POST", "PUT"):
        assert ada.open("/tuner/studies/demo/report", method=method).status_code == 405
        assert ada.open("/tuner/api/studies/demo/report", method=method).status_code == 404
    assert lab.storage.ledger.entries() == ()
    folder = tuned.artifacts.report_folder
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("<script>1</script>")
    page = lab.browser("vic").get("/tuner/studies/demo/report")
    assert page.text == "<script>1</script>"
    (policy,) = page.headers.getlist("Content-Security-Policy")
    assert policy.startswith("sandbox allow-scripts")
    assert "allow-same-origin" not in policy
    assert "default-src 'none'" in policy


def test_a_page_says_sealed_until_the_test_split_was_opened(lab: Lab, tuned: TunedStudy) -> None:
    vic = lab.browser("vic")
    assert "test rows (sealed)" in vic.get("/tuner/studies/demo").text
    lab.storage.ledger.open(
        opened_at="2026-01-01", opened_by="ada@lab", study="demo", study_key=tuned.key, trial=1,
        config_hash="c", spec_hash="s", split_id="i",
    )  # fmt: skip
    assert "test rows (opened for the report)" in vic.get("/tuner/studies/demo").text


def test_a_page_says_if_another_study_opened_the_same_split(lab: Lab, tuned: TunedStudy) -> None:
    vic = lab.browser("vic")
    split = tuned.record.data.split_id
    entries = (("first", "f", split), ("other", "o", "i"), ("first", "g", split))
    for study, key, its_split in entries:
        lab.storage.ledger.open(
            opened_at="", opened_by="", study=study, study_key=key, trial=0,
            config_hash="", spec_hash="", split_id=its_split,
        )  # fmt: skip
    page = vic.get("/tuner/studies/demo").text
    assert "test rows (opened before, for a report of first: ledger 1, 3)" in page


def test_a_report_is_suggested_once_the_study_is_finished(
    lab: Lab, ada: Browser, tuned: TunedStudy
) -> None:
    assert "tuner report demo" in ada.get("/tuner/studies/demo").text
    ada.post("/tuner/launch", data={"file": "tiny.toml"})
    page = ada.get("/tuner/studies/tiny").text
    assert "No final report yet." in page
    assert "tuner report" not in page
    made = load(lab.storage, "tiny", artifacts_root=lab.folders.artifacts).record.created_at
    assert made not in page
    assert f"<td>{made[:10]} {made[11:19]} UTC</td>" in page


def test_check_only_shows_what_tuner_check_shows(lab: Lab, ada: Browser) -> None:
    path = lab.folder / "studies" / "tiny.toml"
    path.write_text(path.read_text() + "[hyperband]\nmin_epochs = 1\neta = 3\n")
    order = {"file": "tiny.toml", "trials": "8", "action": "check"}
    page = ada.post("/tuner/launch", data=order).text
    document = ada.post("/tuner/api/check", json={"file": "tiny.toml", "trials": 8}).json
    many, few = document["trials_of_brackets"]
    assert many + few == 8
    assert many > few
    assert "tiny can be launched." in page
    assert f"{many} trials, may be pruned after epoch 1</td>" in page
    assert f"{few} trials, never pruned</td>" in page
    assert f"about {document['planned_epochs']} planned, 24 without pruning" in page
    assert f"identity {document['data']['split_id'][:12]}" in page
    ada.post("/tuner/launch", data=order | {"action": "launch"})
    page = ada.post("/tuner/launch", data=order).text
    assert "can be launched" not in page
    assert "exists already: it is queued, with 0 of 8 trials finished." in page


@pytest.mark.parametrize(
    ("change", "is_valid"),
    [
        (lambda text: text, True),
        (lambda text: text + "[hyperband]\nmin_epochs = 1\n", True),
        (lambda text: text.replace('"synthetic"', '"rows.csv"'), True),
        (lambda text: text.replace("[space]", "split = 1\n[spaec]"), False),
        (lambda text: text.replace("low = 1e-3", "low = 1"), False),
        (lambda text: text + "]", False),
        (lambda text: text.replace('"synthetic"', '"gone.csv"'), False),
        (lambda text: text.replace('"synthetic"', '"bad.csv"'), False),
        (lambda text: text.replace('"synthetic"', '{ soluble = "a.fasta", insoluble = 1 }'), False),
    ],
)
def test_the_api_checks_a_study_file_as_tuner_check_does(
    lab: Lab,
    ada: Browser,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[str], str],
    is_valid: bool,
) -> None:
    studies = lab.folder / "studies"
    monkeypatch.chdir(studies)
    write_rows(studies, rows=300)
    (studies / "bad.csv").write_text("sequence,label\nARND,1\nAR1D,yes\n")
    (studies / "other.toml").write_text(change(study_file("other")))
    (studies / "seven.toml").write_text(
        study_file("seven", "rows.csv").replace("[training]", "split = { seed = 7 }\n[training]")
    )
    assert ada.post("/tuner/api/studies", json={"file": "seven.toml"}).status_code == 202
    where = ["--storage", lab.storage.url, "--artifacts", str(lab.folders.artifacts)]
    printed = CliRunner().invoke(app, ["check", "other.toml", "--json", *where])
    answer = ada.post("/tuner/api/check", json={"file": "other.toml"})
    assert answer.json == json.loads(printed.stdout)
    assert (answer.json["study"], answer.json["valid"]) == ("other", is_valid)
    assert (answer.status_code, printed.exit_code) == ((200, 0) if is_valid else (422, 1))


def test_the_form_takes_no_other_number_of_trials_than_the_server(ada: Browser) -> None:
    assert 'name="trials" value="" type="number" min="1"' in ada.get("/tuner/launch").text


def test_a_study_is_deleted_only_where_its_name_is_written_down(
    lab: Lab, tuned: TunedStudy
) -> None:
    ada = lab.browser("ada")
    assert ada.post("/tuner/studies/demo/delete", data={"confirm": "dem"}).status_code == 400
    assert tuned.artifacts.folder.exists()
    assert ada.post("/tuner/studies/demo/delete", data={"confirm": "demo"}).status_code == 303
    assert not tuned.artifacts.folder.exists()


@pytest.mark.parametrize(
    ("name", "quoted"),
    [("löslich 50% & mehr #1", "l%C3%B6slich%2050%25"), ("\U0001f600 \U00020000", "%F0%9F%98%80")],
)
def test_names_with_other_letters_work_everywhere(
    lab: Lab, ada: Browser, name: str, quoted: str
) -> None:
    answer = ada.post("/tuner/launch", data={"file": "tiny.toml", "name": name})
    assert answer.status_code == 303
    assert ada.get(answer.location).status_code == 200
    assert quoted in ada.get("/tuner").text
    assert ada.get(f"/tuner/api/studies/{quote(name)}").json["study"] == name
    assert ada.post(f"{answer.location}/stop").status_code == 303
    assert lab.storage.queue.study_ids() == ()


def test_a_name_in_another_unicode_normalisation_is_the_same_study(lab: Lab, ada: Browser) -> None:
    composed, decomposed = (unicodedata.normalize(form, "lösung") for form in ("NFC", "NFD"))
    order = {"file": "tiny.toml", "name": decomposed}
    assert ada.post("/tuner/api/studies", json=order).json["study"] == composed
    assert ada.post("/tuner/api/studies", json=order).json["outcome"] == "queued already"
    page = f"/tuner/studies/{quote(decomposed)}"
    assert ada.get(page).status_code == 200
    assert ada.get(f"/tuner/api/studies/{quote(decomposed)}").json["study"] == composed
    assert ada.post(f"{page}/delete", data={"confirm": composed}).status_code == 303
    assert ada.get("/tuner/api/studies").json["studies"] == []


def test_a_viewer_sees_no_record_of_changes_and_no_form_to_launch(lab: Lab) -> None:
    vic = lab.browser("vic")
    for path in ("/tuner/log", "/tuner/api/log", "/tuner/launch"):
        assert vic.get(path).status_code == 403
