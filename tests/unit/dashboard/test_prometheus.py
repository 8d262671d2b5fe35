"""What Prometheus reads, and who may read it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import ready_sqlite
from finished_study import finished_study
from lab import PASSWORDS, Browser, Lab, write_study_file
from prometheus_client.parser import text_string_to_metric_families

from tuner.dashboard.server import make_app
from tuner.dashboard.settings import Folders
from tuner.dashboard.users import remove_user, write_user
from tuner.search.status import status
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


def scrape(browser: Browser, name: str = "vic", password: str | None = None, **more: Any) -> Any:
    basic = base64.b64encode(f"{name}:{password or PASSWORDS[name]}".encode()).decode()
    return browser.get("/metrics", headers={"Authorization": f"Basic {basic}"}, **more)


LABELS = ("study", "state")


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Value by name and labels."""
    return {
        (sample.name, *(sample.labels[key] for key in LABELS if key in sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_studies_trials_epochs_queue_and_latency_are_told(lab: Lab, tmp_path: Path) -> None:
    tuned: TunedStudy = finished_study(lab.storage, tmp_path, trials=9)
    lab.browser("ada").post("/tuner/launch", data={"file": "tiny.toml"})
    answer = scrape(lab.browser())
    assert answer.status_code == 200
    assert answer.content_type.startswith("text/plain; version=0.0.4")
    found = samples(answer.text)
    assert {
        ("tuner_studies", "queued"): 1,
        ("tuner_studies", "stopped"): 1,
        ("tuner_studies", "running"): 0,
        ("tuner_studies", "finished"): 0,
        ("tuner_studies", "reported"): 0,
        ("tuner_studies_given_up",): 0,
        ("tuner_trials", "demo", "complete"): 2,
        ("tuner_trials", "demo", "pruned"): 2,
        ("tuner_trials", "demo", "fail"): 1,
        ("tuner_trials", "demo", "running"): 0,
        ("tuner_trials", "tiny", "complete"): 0,
        ("tuner_trials_budget", "demo"): 9,
        ("tuner_trials_budget", "tiny"): 3,
        ("tuner_epochs_total", "demo"): 21,
        ("tuner_epochs_saved", "demo"): status(tuned).epochs_saved,
        ("tuner_workers", "demo"): 0,
        ("tuner_best_validation_loss", "demo"): tuned.ranked()[0].value,
        ("tuner_queue_length",): 1,
    }.items() <= found.items()
    assert 0 < found["tuner_database_latency_seconds",] < 60
    assert ("tuner_best_validation_loss", "tiny") not in found
    assert ("tuner_slots",) not in found  # it has no workers


def test_without_users_it_is_open_to_this_machine_and_knows_the_workers(
    storage: Storage, tmp_path: Path
) -> None:
    app = make_app(storage, None, Folders(artifacts=tmp_path), slots=lambda: 7)
    found = samples(Browser(app).get("/metrics").text)
    assert found["tuner_slots",] == 7
    assert Browser(app).get("/metrics", headers={"Host": "evil.example"}).status_code == 421


def test_a_scrape_needs_a_session_or_a_password(lab: Lab) -> None:
    for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "Basic ?"}):
        answer = lab.browser().get("/metrics", headers=headers)
        assert answer.status_code == 401
        assert "tuner_" not in answer.text
    assert lab.browser("vic").get("/metrics").status_code == 200
    assert lab.browser("vic").post("/metrics").status_code == 403
    assert lab.browser("ada").post("/metrics").status_code == 405
    basic = base64.b64encode(f"vic:{PASSWORDS['vic']}".encode()).decode()
    for path in ("/tuner", "/tuner/api/studies", "/tuner/metrics", "/api/studies"):
        answer = lab.browser().get(path, headers={"Authorization": f"Basic {basic}"})
        assert answer.status_code in (303, 401)


def test_wrong_passwords_are_limited_and_recorded_as_those_of_a_login(lab: Lab) -> None:
    for _ in range(5):
        assert scrape(lab.browser(), password="a wrong one").status_code == 401
    refused = scrape(lab.browser())
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) > 0
    (last, *_) = lab.storage.audit.entries()
    assert (last.who, last.action, last.status) == ("vic", "GET /metrics", 429)


def test_a_password_is_hashed_once_until_it_changes(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    users, hashed = lab.policy.users, list[str]()
    assert users is not None
    check = users.check

    def counted_check(name: str, *more: str) -> object:
        hashed.append(name)
        return check(name, *more)

    monkeypatch.setattr(users, "check", counted_check)
    assert [scrape(lab.browser()).status_code for _ in range(3)] == [200] * 3
    assert hashed == ["vic"]
    write_user(lab.users_file, "vic", "viewer", "another password")
    assert scrape(lab.browser()).status_code == 401
    assert scrape(lab.browser(), password="another password").status_code == 200
    assert len(hashed) == 3
    remove_user(lab.users_file, "vic")
    assert scrape(lab.browser(), password="another password").status_code == 401
