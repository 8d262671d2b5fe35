"""Predictions through the dashboard: who may ask, how much, and what the answers are."""

from __future__ import annotations

import contextlib
import csv
import html
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import ready_sqlite
from finished_study import WINNER, finished_study
from lab import Browser, Lab, write_study_file

from tuner.dashboard import predictor, verbs
from tuner.dashboard.catalogue import Catalogue
from tuner.dashboard.predictor import (
    PredictionRequest,
    Predictor,
    PredictorUnavailableError,
    answer_requests,
)
from tuner.data.sequences import SequenceRecord
from tuner.errors import SetupError, StudyError
from tuner.results.bundle import Bundle, Member
from tuner.search.tuned_study import TunedStudy
from tuner.storage.storage import Storage


class FractionOfAlanine:
    """A network that needs no TensorFlow."""

    shares = np.ones(1, np.float32)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        return ((tokens == 1).sum(axis=1) / (tokens > 0).sum(axis=1))[:, np.newaxis]


def fake_bundle(tuned: TunedStudy) -> Bundle:
    description = {
        "study": tuned.name, "max_length": 200, "min_length": 3, "threshold": 0.5,
        "synthetic": tuned.record.data.synthetic,
    }  # fmt: skip
    config = tuned.record.spec.space.resolve(tuned.ranked()[0].params)
    member = Member(trial=tuned.ranked()[0].number, share=1.0, config=config, study_file="")
    return Bundle(description, [member], FractionOfAlanine())  # type: ignore[arg-type]


class InAThread:
    """Stands in for the process that predicts."""

    def __init__(self, load: Callable[[TunedStudy], Bundle] = fake_bundle) -> None:
        self.load = load
        self.loaded: list[str] = []
        self.started = 0
        self.kill: Callable[[], object] = lambda: None

    def __call__(self, connection: Connection) -> Any:
        self.started += 1

        def load(tuned: TunedStudy) -> Bundle:
            self.loaded.append(tuned.name)
            return self.load(tuned)

        def answer() -> None:
            with contextlib.suppress(SystemExit):
                answer_requests(connection, load)

        thread = threading.Thread(target=answer, daemon=True)
        thread.kill = self.kill  # type: ignore[attr-defined]
        thread.start()
        return thread


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lab")
    write_study_file(made)
    return made


@pytest.fixture(scope="module")
def storage(folder: Path) -> Iterator[Storage]:
    with Storage(ready_sqlite(folder)) as opened:
        yield opened


@pytest.fixture(scope="module")
def tuned(storage: Storage, folder: Path) -> TunedStudy:
    return finished_study(storage, folder)


@pytest.fixture
def process() -> InAThread:
    return InAThread()


@pytest.fixture
def lab(storage: Storage, tuned: TunedStudy, folder: Path, process: InAThread) -> Iterator[Lab]:
    made = Lab(storage, folder, predictor=Predictor(process))
    yield made
    made.app.close()


@pytest.fixture
def vic(lab: Lab) -> Browser:
    return lab.browser("vic")  # a viewer


FASTA = ">p1 the first\nAAAA\n>p2\nMMMMMMMMA\n>p1\nAAAX\n>\nAM\n"


def ask(browser: Browser, fasta: str = FASTA, study: str = "demo") -> Any:
    return browser.post("/tuner/api/predict", json={"study": study, "fasta": fasta})


def send(browser: Browser, fasta: str = FASTA, **fields: Any) -> Any:
    return browser.post("/tuner/predict", data={"study": "demo", "fasta": fasta, **fields})


# --- answers ---


def test_a_viewer_is_answered_and_nothing_is_recorded_or_read_again(
    lab: Lab, vic: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = lab.storage.audit.entries()
    monkeypatch.setattr(Catalogue, "forget", lambda _: pytest.fail("it reads the studies again"))
    answer = ask(vic)
    assert answer.status_code == 200
    assert answer.json == {
        "study": "demo",
        "trials": [WINNER],
        "synthetic": False,
        "counts": {
            "records": 4, "soluble": 1, "unpredicted": 1,
            "flags": {
                "duplicate_id": 1, "unknown_residues": 1, "no_id": 1, "shorter_than_trained": 1,
            },
        },
        "predictions": [
            {"id": "p1", "probability": 1.0, "label": 1, "spread": None, "flags": []},
            {"id": "p2", "probability": 0.111111, "label": 0, "spread": None, "flags": []},
            {"id": "p1", "probability": None, "label": None, "spread": None,
             "flags": ["unknown_residues:X_at_4", "duplicate_id"]},
            {"id": "", "probability": 0.5, "label": 0, "spread": None,
             "flags": ["no_id", "shorter_than_trained"]},
        ],
    }  # fmt: skip
    assert lab.storage.audit.entries() == before


def test_the_page_shows_a_table_and_gives_the_same_as_csv(vic: Browser) -> None:
    assert 'action="/tuner/predict"' in vic.get("/tuner/studies/demo").text
    page = send(vic)
    assert page.status_code == 200
    assert "4 sequences, 1 predicted as soluble, 1 without a prediction" in page.text
    assert '<td class="number">0.1111</td><td>insoluble</td>' in page.text
    assert "unknown_residues:X_at_4; duplicate_id" in page.text
    assert html.escape(FASTA) in page.text  # to be sent again
    table = send(vic, action="csv")
    assert table.headers["Content-Disposition"] == "attachment; filename=demo-predictions.csv"
    rows = list(csv.DictReader(io.StringIO(table.text)))
    assert [row["probability"] for row in rows] == ["1.000000", "0.111111", "", "0.500000"]
    upload = {"upload": (io.BytesIO(FASTA.encode()), "mine.fasta"), "action": "csv"}
    assert send(vic, "", **upload).text == table.text


def test_markup_in_ids_and_files_stays_text(vic: Browser) -> None:
    script = "<script>alert(1)</script>"
    page = send(vic, f">{script}\nMKVAA\n>a\nMK{script}\n")
    assert page.status_code == 200
    broken = {"upload": (io.BytesIO(b"x"), f"{script}.fasta")}
    for text in (page.text, send(vic, "</textarea>" + script).text, send(vic, "", **broken).text):
        assert "<script>alert" not in text
        assert text.count("</textarea>") == 1


# --- refusals ---


@pytest.mark.parametrize(
    ("fasta", "status", "words"),
    [
        ("", 422, ":1: holds no sequence; write a line >NAME above each sequence"),
        ("\n \n", 422, ":1: holds no sequence"),
        ("\nMKVLAA\n", 422, ":2: is not FASTA; write a line >NAME above each sequence"),
        ("id,sequence\na,MKV\n", 422, ":1: is not FASTA"),
        (">a\nMK\0V\n", 422, "is not text"),
        (">a\nMKV\n>\ud83d\nMKV\n", 422, ":3: is not UTF-8 text"),
        (">a\nM\n" * 1_001, 413, "More than 1,000 sequences"),
        (f">a\n{'A' * verbs.MAX_FASTA_BYTES}", 413, "at most 409,600 are predicted at once"),
    ],
)
def test_what_is_no_fasta_or_too_much_is_refused_with_its_place(
    vic: Browser, process: InAThread, fasta: str, status: int, words: str
) -> None:
    answer = ask(vic, fasta)
    assert (answer.status_code, process.started) == (status, 0)
    assert words in answer.json["reason"]
    upload = {"upload": (io.BytesIO(fasta.encode("utf-8", "surrogatepass")), "mine.fasta")}
    page = send(vic, "", **upload)
    assert page.status_code == status
    if status == 422:
        assert f"mine.fasta{words[:3] if words.startswith(':') else ': '}" in page.text


@pytest.mark.parametrize(
    "document",
    [{}, [], {"study": "demo"}, {"fasta": FASTA}, {"study": "demo", "fasta": [FASTA]},
     {"study": 1, "fasta": FASTA}, {"study": "demo", "fasta": FASTA, "trial": 3}],
)  # fmt: skip
def test_a_document_that_is_none_is_refused(vic: Browser, document: object) -> None:
    assert vic.post("/tuner/api/predict", json=document).status_code == 400


def test_bodies_of_a_megabyte_are_refused_and_the_largest_allowed_is_answered(
    vic: Browser,
) -> None:
    assert ask(vic, ">" + "a" * 2**20).status_code == 413
    assert send(vic, ">" + "a" * 2**20).status_code == 413
    largest = "".join(f">{number}\n{'A' * 350}\n" for number in range(1_000))
    assert ask(vic, largest).status_code == 200
    assert send(vic, largest.replace("\n", "\r\n")).status_code == 200


def test_other_ways_to_the_same_paths_are_refused(lab: Lab, vic: Browser) -> None:
    for path in ("/tuner/api/predict", "/tuner/predict"):
        assert vic.get(path).status_code == 405
        assert vic.put(path).status_code == 403
        assert vic.delete(path).status_code == 403
        assert vic.post(f"/tuner/studies/..{path}").status_code == 403
        assert vic.post(path, headers={"Origin": "https://evil.example"}).status_code == 403
        assert lab.browser().post(path, json={"study": "demo", "fasta": FASTA}).status_code == 401
    form = {"data": '{"study": "demo"}', "headers": {"Content-Type": "text/plain"}}
    assert vic.post("/tuner/api/predict", **form).status_code == 400


def test_without_a_study_or_a_network_there_is_no_prediction(lab: Lab, vic: Browser) -> None:
    assert ask(vic, study="other").status_code == 404
    assert send(vic, study="other").status_code == 404
    lab.browser("ada").post("/tuner/api/studies", json={"file": "tiny.toml"})
    answer = ask(vic, study="tiny")
    assert answer.status_code == 409
    assert "no fully trained trial yet" in answer.json["reason"]
    assert 'action="/tuner/predict"' not in vic.get("/tuner/studies/tiny").text


def test_an_installation_without_tensorflow_says_so(
    vic: Browser, process: InAThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "find_spec", lambda name: None)
    answer = ask(vic)
    assert (answer.status_code, process.started) == (503, 0)
    assert "tensorflow and keras cannot be found" in answer.json["reason"]
    assert "protein-tuner[cpu]" in vic.get("/tuner/studies/demo").text


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (StudyError("no weights"), 409, "no weights"),
        (SetupError("no TensorFlow"), 503, "no TensorFlow"),
        (MemoryError(), 503, "there is no memory for it"),
        (ValueError("secret"), 503, "it failed"),
    ],
)
def test_an_error_of_the_process_is_an_answer_and_the_next_request_is_answered(
    vic: Browser, process: InAThread, error: Exception, status: int, words: str
) -> None:
    def fail(_: TunedStudy) -> Bundle:
        raise error

    process.load = fail
    for answer in (ask(vic), send(vic)):
        assert answer.status_code == status
        assert words in answer.text
        assert "secret" not in answer.text
        assert ("Retry-After" in answer.headers) == (status == 503)
    process.load = fake_bundle
    assert ask(vic).status_code == 200
    assert process.started == 1


# --- the process ---


def request(tuned: TunedStudy, sequence: str = "AAAM") -> PredictionRequest:
    return PredictionRequest(
        storage=tuned.storage.url,
        artifacts=tuned.artifacts.folder.parent,
        study=tuned.name,
        records=(SequenceRecord(file="f", line=1, id="a", sequence=sequence),),
    )


def test_networks_are_loaded_once_and_again_when_others_were_kept(
    storage: Storage, tuned: TunedStudy, folder: Path, process: InAThread
) -> None:
    tuned = finished_study(storage, folder, name="other")
    asked = Predictor(process)
    assert [asked.predict(request(tuned)).trials for _ in range(3)] == [(WINNER,)] * 3
    assert process.loaded == ["other"]
    better = tuned.study.ask()
    better.suggest_float("learning_rate", 1e-4, 1e-1, log=True)
    tuned.study.tell(better, 0.01)
    tuned.artifacts.weights(better.number).write_bytes(b"weights")
    assert asked.predict(request(tuned)).trials == (better.number,)
    assert process.loaded == ["other", "other"]
    asked.close()


def test_a_process_that_ended_is_started_again(tuned: TunedStudy, process: InAThread) -> None:
    def die(_: TunedStudy) -> Bundle:
        raise SystemExit

    process.load = die
    asked = Predictor(process)
    with pytest.raises(PredictorUnavailableError, match="ended"):
        asked.predict(request(tuned))
    assert process.started == 2
    process.load = fake_bundle
    assert asked.predict(request(tuned)).trials == (WINNER,)
    asked.close()
    with pytest.raises(PredictorUnavailableError, match="The server ends"):
        asked.predict(request(tuned))


def test_one_is_answered_a_few_wait_and_the_rest_is_refused(
    tuned: TunedStudy, process: InAThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, may_load = threading.Event(), threading.Event()

    def load(study: TunedStudy) -> Bundle:
        loading.set()
        may_load.wait()
        return fake_bundle(study)

    process.load = load
    asked = Predictor(process)
    monkeypatch.setattr(predictor, "_TURN_SECONDS", 0.05)
    first = threading.Thread(target=asked.predict, args=[request(tuned)])
    first.start()
    loading.wait()
    with pytest.raises(PredictorUnavailableError, match="takes long"):
        asked.predict(request(tuned))
    for _ in range(predictor._WAITING - 1):
        asked._places.acquire()
    with pytest.raises(PredictorUnavailableError, match="Too many"):
        asked.predict(request(tuned))
    may_load.set()
    first.join()
    asked.close()


def test_the_end_of_the_server_ends_a_prediction(tuned: TunedStudy, process: InAThread) -> None:
    loading, killed = threading.Event(), threading.Event()

    def load(_: TunedStudy) -> Bundle:
        loading.set()
        killed.wait()
        raise SystemExit

    process.load, process.kill = load, killed.set
    asked = Predictor(process)
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(asked.predict, request(tuned))
        loading.wait()
        asked.close()
        with pytest.raises(PredictorUnavailableError, match="The server ends"):
            waiting.result()
    assert process.started == 1


def test_a_prediction_that_takes_too_long_is_ended(
    tuned: TunedStudy, process: InAThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_load = threading.Event()
    process.load = lambda study: may_load.wait() and fake_bundle(study)
    monkeypatch.setattr(predictor, "_ANSWER_SECONDS", 0.05)
    threading.Timer(0.2, may_load.set).start()  # a thread cannot be killed
    with pytest.raises(PredictorUnavailableError, match="took longer"):
        Predictor(process).predict(request(tuned))
