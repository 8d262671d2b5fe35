"""The dashboard in a real browser: log in, watch a study live, launch, stop, export, log out."""

from __future__ import annotations

import csv
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from browsers import headless
from fakes import ready_sqlite
from finished_study import finished_study, predict, study_with_networks
from lab import PASSWORDS, write_study_file, write_users
from optuna.artifacts import upload_artifact
from optuna.trial import TrialState
from optuna_dashboard import save_note
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from waiting import wait_until

from tuner.artifacts import artifact_store
from tuner.coordination.curve_drawing import draw_curves
from tuner.coordination.study_note import attach_page
from tuner.dashboard.server import DashboardServer, make_server
from tuner.dashboard.settings import Folders, Settings
from tuner.results.bundle_writer import bundle_of_study
from tuner.results.report import write_report
from tuner.search.attributes import AGAIN_KEY, CURVE_KEY
from tuner.search.study import load
from tuner.storage.storage import Storage

#: What on Optuna's page changes something, by the names under which `dashboard.css` hides it.
CHANGING = {
    "create": '[data-testid="AddBoxIcon"]',
    "rename": '[aria-label="rename study"]',
    "delete": '[aria-label="delete study"]',
    "fail": '[data-testid="StopCircleIcon"]',
    "note": '[data-testid="EditIcon"]',
    "remove file": '[aria-label="delete artifact"]',
    "upload": '[data-testid="UploadFileIcon"]',
}

SECONDS = 60  # longest wait for a page; the browser itself takes long on a busy machine


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DashboardServer]:
    write_study_file(tmp_path)
    folders = Folders(artifacts=tmp_path / "artifacts", studies=tmp_path / "studies")
    settings = Settings(port=0, users_file=write_users(tmp_path), folders=folders)
    with Storage(ready_sqlite(tmp_path)) as storage:
        finished_study(storage, tmp_path, trials=9)
        with make_server(storage, settings) as server:
            yield server


@pytest.fixture
def chrome(tmp_path: Path) -> Iterator[Chrome]:
    folder = tmp_path / "browser"
    folder.mkdir()
    with headless(folder) as browser:
        yield browser


def wait(chrome: Chrome, what: Callable[[Chrome], object]) -> None:
    def tried(browser: Chrome) -> bool:
        try:
            return bool(what(browser))
        except WebDriverException:  # the page changed meanwhile
            return False

    WebDriverWait(chrome, SECONDS, poll_frequency=0.1).until(
        tried, f"{chrome.current_url}: {text_of(chrome)[:600]}"
    )


def text_of(chrome: Chrome) -> str:
    return str(chrome.execute_script("return document.body.innerText"))


def shows(text: str) -> Callable[[Chrome], bool]:
    return lambda chrome: text in text_of(chrome)


def press(chrome: Chrome, text: str) -> None:
    buttons = chrome.find_elements(By.XPATH, f"//button[normalize-space()='{text}']")
    next(one for one in buttons if one.is_displayed()).click()


def log_in(chrome: Chrome, name: str, password: str) -> None:
    chrome.find_element(By.ID, "name").clear()
    chrome.find_element(By.ID, "name").send_keys(name)
    chrome.find_element(By.ID, "password").send_keys(password)
    press(chrome, "Log in")


def complaints(chrome: Chrome) -> list[str]:
    """What the console says: a policy that is too strict, a script that broke, a 404."""
    return [
        entry["message"]
        for entry in chrome.get_log("browser")
        if entry["level"] == "SEVERE" and "401" not in entry["message"]
    ]


def test_a_person_s_round_through_the_dashboard(
    server: DashboardServer, chrome: Chrome, tmp_path: Path
) -> None:
    # Whoever opens a page without a session is asked who they are, and led on to the page.
    chrome.get(f"{server.url}tuner/studies/demo")
    assert "/tuner/login?next=" in chrome.current_url
    log_in(chrome, "ada", "a wrong password")
    wait(chrome, shows("Wrong user name or password"))
    log_in(chrome, "ada", PASSWORDS["ada"])
    wait(chrome, lambda page: page.current_url.endswith("/tuner/studies/demo"))
    assert "ada (editor)" in text_of(chrome)

    # A value that a coordinator reports shows by itself.
    with Storage(ready_sqlite(tmp_path)) as coordinator:
        study = optuna.load_study(study_name="demo", storage=coordinator.optuna)
        trial = study.ask(
            {"learning_rate": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)}
        )
        trial.set_user_attr(CURVE_KEY, [[1, 0.2, 0.9, 0.125, 0.9, 1.0]])
        trial.report(0.125, step=1)
        chrome.execute_script("window.sameDocument = true")
        study.tell(trial, 0.125)
        wait(chrome, lambda page: "0.1250" in page.find_element(By.ID, "best").text)
        assert chrome.execute_script("return window.sameDocument") is True

        # Optuna's dashboard shows its trials and their curves, and follows a running one.
        chrome.find_element(By.PARTIAL_LINK_TEXT, "Every trial and its curves").click()
        wait(chrome, shows("demo"))
        wait(chrome, lambda page: page.find_elements(By.CSS_SELECTOR, ".js-plotly-plot"))
        running = study.ask(
            {"learning_rate": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)}
        )
        running.set_user_attr(CURVE_KEY, [[1, 0.1, 0.9, 0.0625, 0.9, 1.0]])
        running.report(0.0625, step=1)
        chrome.get(f"{server.url}dashboard/studies/1/trials?numbers={running.number}")
        wait(chrome, shows(f"Trial {running.number}"))
        wait(chrome, shows("0.0625"))
        study.tell(running, 0.0625)
    assert complaints(chrome) == []

    # Launch, stop, resume, stop.
    chrome.find_element(By.LINK_TEXT, "launch and export").click()
    wait(chrome, lambda page: page.find_element(By.LINK_TEXT, "Launch"))
    chrome.find_element(By.LINK_TEXT, "Launch").click()
    chrome.find_element(By.ID, "trials").send_keys("7")
    press(chrome, "Check only")
    wait(chrome, shows("tiny can be launched"))
    press(chrome, "Launch")
    wait(chrome, lambda page: page.current_url.endswith("/tuner/studies/tiny"))
    wait(chrome, shows("0 of 7"))
    press(chrome, "Stop")
    wait(chrome, lambda page: page.find_element(By.CSS_SELECTOR, ".state.stopped"))
    press(chrome, "Resume")
    wait(chrome, lambda page: page.find_element(By.CSS_SELECTOR, ".state.queued"))
    with Storage(ready_sqlite(tmp_path)) as service:
        assert len(service.queue.study_ids()) == 1
        # What can be downloaded shows by itself, too.
        assert "No trial is fully trained yet." in text_of(chrome)
        trained = optuna.create_trial(value=0.5, user_attrs={CURVE_KEY: []})
        optuna.load_study(study_name="tiny", storage=service.optuna).add_trial(trained)
        wait(chrome, shows("Best configurations"))
        assert "No trial is fully trained yet." not in text_of(chrome)
    press(chrome, "Stop")
    wait(chrome, lambda page: page.find_element(By.CSS_SELECTOR, ".state.stopped"))

    # Export.
    chrome.get(f"{server.url}tuner/studies/demo")
    press(chrome, "Download")
    file = tmp_path / "browser" / "demo-1-trial-6.toml"
    wait_until(
        lambda: file.exists() and not file.with_suffix(".toml.crdownload").exists(),
        lambda: list(file.parent.iterdir()),
    )
    assert tomllib.loads(file.read_text())["provenance"]["trial"] == 6

    # What was done is written down; then out, and the way back is closed.
    chrome.get(f"{server.url}tuner/log")
    assert re.search(r"ada\s+127\.0\.0\.1\s+POST /tuner/launch", text_of(chrome))
    assert complaints(chrome) == []
    press(chrome, "Log out")
    wait(chrome, lambda page: page.current_url.endswith("/tuner/login"))
    chrome.back()
    chrome.refresh()
    assert "Log in" in text_of(chrome)
    chrome.get(f"{server.url}dashboard")
    assert "/tuner/login" in chrome.current_url


def offered(chrome: Chrome) -> dict[str, bool]:
    """Buttons of Optuna's page that change something, and whether one can see them."""
    found = {name: chrome.find_elements(By.CSS_SELECTOR, one) for name, one in CHANGING.items()}
    return {name: any(one.is_displayed() for one in all_) for name, all_ in found.items() if all_}


def test_optuna_s_page_offers_no_button_that_is_refused_and_wraps_its_lines(
    server: DashboardServer, chrome: Chrome, tmp_path: Path
) -> None:
    with Storage(ready_sqlite(tmp_path)) as coordinator:
        study = optuna.load_study(study_name="demo", storage=coordinator.optuna)
        running = study.ask()
        running.set_user_attr("note", "a sentence that goes on and on " * 30)
        file = tmp_path / "curves.svg"
        file.write_text(draw_curves([], TrialState.RUNNING, title="", max_epochs=9, rungs=()))
        upload_artifact(
            artifact_store=artifact_store(tmp_path / "artifacts"), file_path=str(file),
            study_or_trial=running, storage=coordinator.optuna,
        )  # fmt: skip
    trial = f"{server.url}dashboard/studies/1/trials?numbers={running.number}"
    # A button that Optuna renamed would be none of these, and would be missed here.
    for name, may in (("ada", True), ("vic", False)):
        chrome.get(f"{server.url}tuner")
        log_in(chrome, name, PASSWORDS[name])
        wait(chrome, shows(f"{name} ("))
        chrome.get(f"{server.url}dashboard")
        wait(chrome, shows("1. demo"))
        assert offered(chrome) == {"create": False, "rename": False, "delete": may}
        chrome.get(trial)
        wait(chrome, shows(f"Trial {running.number} ("))
        wait(chrome, shows("curves.svg"))
        changing = {"note": may, "remove file": may, "upload": may}
        assert offered(chrome) == {"fail": False, **changing}
        width = "return document.documentElement.scrollWidth - innerWidth"
        assert chrome.execute_script(width) <= 0
        drawing = chrome.find_element(By.CSS_SELECTOR, 'img[alt="curves.svg"]')
        assert drawing.size["width"] > 600
        assert complaints(chrome) == []
        chrome.get(f"{server.url}tuner")
        press(chrome, "Log out")
        wait(chrome, lambda page: page.find_element(By.ID, "password"))


def test_the_overview_of_a_study_fits_optuna_s_page(
    server: DashboardServer, chrome: Chrome, tmp_path: Path
) -> None:
    with Storage(ready_sqlite(tmp_path)) as storage:
        tuned = load(storage, "demo", artifacts_root=tmp_path / "artifacts")
        again = f"tuner export demo --trial 1 --storage sqlite:////{'long/' * 30}tuner.db"
        tuned.study.add_trial(
            optuna.create_trial(value=0.1, user_attrs={AGAIN_KEY: again, CURVE_KEY: []})
        )
        attach_page(tuned, "page.html", b"")
    chrome.get(f"{server.url}tuner")
    log_in(chrome, "vic", PASSWORDS["vic"])
    wait(chrome, shows("vic ("))
    chrome.get(f"{server.url}dashboard/studies/1/note")
    wait(chrome, shows("Data and split"))
    assert too_wide(chrome, 1280) <= 0


def too_wide(chrome: Chrome, width: int) -> int:
    """Pixels by which the page is wider than a window of this width."""
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert chrome.execute_script("return innerWidth") == width
    return int(chrome.execute_script("return document.documentElement.scrollWidth")) - width


def tallest_row(chrome: Chrome) -> int:
    """Pixels, of the rows of the page's first table."""
    rows = "[...document.querySelector('table').rows]"
    return int(chrome.execute_script(f"return Math.max(...{rows}.map(row => row.offsetHeight))"))


def test_our_pages_fit_a_phone(server: DashboardServer, chrome: Chrome, tmp_path: Path) -> None:
    with Storage(ready_sqlite(tmp_path)) as storage:
        finished_study(storage, tmp_path, name="full")
        write_report(storage, "full", artifacts_root=tmp_path / "artifacts", evaluate=predict)
        detail = "refused: " + "a sentence about a mistake in a study file; " * 8
        storage.audit.record(
            who="ada", address="127.0.0.1", action="POST /tuner/launch", status=422, detail=detail
        )
    chrome.get(f"{server.url}tuner")
    log_in(chrome, "ada", PASSWORDS["ada"])
    wait(chrome, shows("ada (editor)"))
    for path, tall in (
        ("", 70), ("/launch", None), ("/studies/demo", None), ("/log", 350),
        ("/studies/full/report", 80),
    ):  # fmt: skip
        chrome.get(f"{server.url}tuner{path}")
        assert too_wide(chrome, 390) <= 0, path
        assert tall is None or tallest_row(chrome) <= tall, path
    chrome.get(f"{server.url}tuner/launch")
    press(chrome, "Check only")
    wait(chrome, shows("tiny can be launched"))
    assert too_wide(chrome, 390) <= 0


def test_a_viewer_predicts_sequences_and_downloads_the_table(
    server: DashboardServer, chrome: Chrome, tmp_path: Path
) -> None:
    sequences = {"one": "MKVLAAGIVGLLLAAC", "<b>two</b>": "MKVLAAX", "three" * 30: "ACDEFGHIKL"}
    with Storage(ready_sqlite(tmp_path)) as storage:
        expected = bundle_of_study(study_with_networks(storage, tmp_path))
    chrome.get(f"{server.url}tuner/studies/nets")
    log_in(chrome, "vic", PASSWORDS["vic"])
    wait(chrome, shows("Sequences as FASTA"))
    assert too_wide(chrome, 390) <= 0
    fasta = "".join(f">{name}\n{sequence}\n" for name, sequence in sequences.items())
    chrome.find_element(By.ID, "fasta").send_keys(fasta)
    press(chrome, "Predict")
    wait(chrome, shows("3 sequences, "))
    assert "<b>two</b>" in text_of(chrome)
    assert "unknown_residues:X_at_7" in text_of(chrome)
    assert too_wide(chrome, 390) <= 0
    press(chrome, "Download as CSV")
    file = tmp_path / "browser" / "nets-predictions.csv"
    wait_until(file.is_file)
    rows = list(csv.DictReader(file.read_text("utf-8").splitlines()))
    assert [row["id"] for row in rows] == list(sequences)
    (probability,) = expected.predict([sequences["one"]])
    assert float(rows[0]["probability"]) == pytest.approx(probability, abs=2e-6)
    assert complaints(chrome) == []


def test_a_note_brings_no_script_frame_or_form_into_the_page(
    server: DashboardServer, chrome: Chrome, tmp_path: Path
) -> None:
    note = """# a note
<script>window.ran = 1</script> <img src="x" onerror="window.ran = 2">
<svg onload="window.ran = 3"></svg> <iframe srcdoc="<script>parent.ran = 4</script>"></iframe>
<form action="/tuner/studies/demo/delete" method="post"><button>press</button></form>
<style>body { display: none }</style> <meta http-equiv="refresh" content="0;url=/tuner">

[one](javascript:window.ran=5) [two](data:text/html,<script>1</script>)
![three](javascript:window.ran=6) [last](https://example.org/)
"""
    with Storage(ready_sqlite(tmp_path)) as storage:
        save_note(optuna.load_study(study_name="demo", storage=storage.optuna), note)
    chrome.get(f"{server.url}tuner")
    log_in(chrome, "vic", PASSWORDS["vic"])
    wait(chrome, shows("vic ("))
    there = f"{server.url}dashboard/studies/1/note"
    chrome.get(there)
    wait(chrome, lambda page: page.find_elements(By.LINK_TEXT, "last"))
    assert "<script>window.ran = 1</script>" in text_of(chrome)  # it stays text
    for tag in ("script", "iframe", "form", "style", "meta"):
        assert not chrome.find_elements(By.CSS_SELECTOR, f"main {tag}"), tag
    links = {
        link.text: link.get_dom_attribute("href")
        for link in chrome.find_elements(By.CSS_SELECTOR, "main a")
    }
    assert links == {"one": "", "two": "", "last": "https://example.org/"}
    assert chrome.execute_script("return window.ran") is None
    assert chrome.current_url == there
    assert complaints(chrome) == []


def test_a_viewer_is_offered_nothing_to_press_and_a_file_s_mistakes_are_shown(
    server: DashboardServer, chrome: Chrome, tmp_path: Path
) -> None:
    chrome.get(f"{server.url}tuner")
    log_in(chrome, "vic", PASSWORDS["vic"])
    wait(chrome, shows("vic (viewer)"))
    wait(chrome, shows("demo"))
    buttons = [one.text for one in chrome.find_elements(By.TAG_NAME, "button")]
    assert buttons == ["Log out"]
    assert not chrome.find_elements(By.LINK_TEXT, "Launch")
    press(chrome, "Log out")
    wait(chrome, lambda page: page.find_element(By.ID, "password"))
    log_in(chrome, "ada", PASSWORDS["ada"])
    wait(chrome, shows("ada (editor)"))
    chrome.get(f"{server.url}tuner/launch")
    bad = tmp_path / "bad.toml"
    lines = ('name = "bad"', "trials = 0", "[data]", 'source = "x.csv"', "[space]", "blocs = 2")
    bad.write_text("\n".join(lines))
    chrome.find_element(By.ID, "upload").send_keys(str(bad))
    press(chrome, "Launch")
    wait(chrome, shows("bad.toml:2: trials:"))
    assert "bad.toml:6: space.blocs" in text_of(chrome)
