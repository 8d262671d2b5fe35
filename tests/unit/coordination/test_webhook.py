"""Webhooks: what they are told, how often it is tried, and that no token is shown."""

from __future__ import annotations

import json
import threading
import urllib.error
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeWorkers, Notes, make_study, small_spec
from hooks import webhook as webhook_server
from waiting import wait_until

from tuner.coordination import webhook
from tuner.coordination.coordinator import Coordinator, Ending
from tuner.coordination.webhook import EVENTS, Notifier, Webhook, webhook_of
from tuner.errors import LeaseLostError, StudyError, StudyInUseError, TunerError
from tuner.search.status import status
from tuner.search.tuned_study import TunedStudy
from tuner.spec.spec import NotifySettings

URL = "https://hooks.example.org/secret-token"
HOOK = Webhook(url=URL, events=frozenset(EVENTS))


@pytest.fixture
def tuned(tmp_path: Path) -> Iterator[TunedStudy]:
    made = make_study(tmp_path, small_spec(trials=3))
    Coordinator(made, FakeWorkers(), Notes()).run()
    yield made
    made.storage.close()


class Hook:
    """Remembers what was posted; fails as long as there are errors to raise."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.tries = 0
        self.posted: list[dict[str, Any]] = []

    def __call__(self, url: str, body: bytes) -> None:
        assert url == URL
        self.tries += 1
        if self.errors:
            raise self.errors.pop(0)
        self.posted.append(json.loads(body))


def http_error(code: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError(URL, code, "said by the server", Message(), None)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(webhook, "_LONGEST_PAUSE_SECONDS", 0.001)


# --- what is told ---


def test_the_status_and_what_happened_are_posted(tuned: TunedStudy) -> None:
    hook, said = Hook(), list[str]()
    with Notifier(said.append, post=hook) as notifier:
        notifier.notify(tuned, HOOK, "finished")
    (document,) = hook.posted
    expected = json.loads(json.dumps(status(tuned).to_document()))
    assert {key: document[key] for key in expected} == expected
    assert (document["event"], document["reason"]) == ("finished", None)
    assert document["at"].endswith("+00:00")
    best = tuned.ranked()[0]
    assert document["text"] == (
        f"Study small finished: 3 of 3 trials, best validation loss {best.value:.4f} "
        f"(trial {best.number})."
    )
    assert said == ["Study small: notification (finished) sent to hooks.example.org."]


RAISED = [
    (StudyError("ten failed"), ["failed"], "ten failed"),
    (ZeroDivisionError("a bug"), ["failed"], "ZeroDivisionError: a bug"),
    (StudyInUseError("elsewhere"), [], None),
    (LeaseLostError("taken over"), [], None),
]
ENDED: list[tuple[Ending, list[str], str | None]] = [
    ("finished", ["finished"], None),
    ("timeout", ["stopped"], "timeout"),
    ("interrupted", ["stopped"], "interrupted"),
    ("stopped", ["stopped"], "stopped"),
]


@pytest.mark.parametrize(("result", "events", "reason"), [*RAISED, *ENDED])
def test_how_a_run_ends_is_told(
    tuned: TunedStudy, result: Ending | Exception, events: list[str], reason: str | None
) -> None:
    hook = Hook()

    def run() -> Ending:
        if isinstance(result, Exception):
            raise result
        return result

    with Notifier(lambda _: None, post=hook) as notifier:
        if isinstance(result, Exception):
            with pytest.raises(type(result)):
                notifier.run(tuned, HOOK, run)
        else:
            assert notifier.run(tuned, HOOK, run) == result
        notifier.run(tuned, None, lambda: "finished")  # has no webhook
    assert [one["event"] for one in hook.posted] == events
    assert [one["reason"] for one in hook.posted] == [reason] * len(events)


def test_events_that_were_not_asked_for_are_not_told(tuned: TunedStudy) -> None:
    hook = Hook()
    only = Webhook(url=URL, events=frozenset(["failed"]))
    with Notifier(lambda _: None, post=hook) as notifier:
        for event in EVENTS:
            notifier.notify(tuned, only, event)
    assert [one["event"] for one in hook.posted] == ["failed"]


def test_a_status_that_cannot_be_read_is_left_out(tuned: TunedStudy) -> None:
    hook = Hook()
    name = tuned.name
    tuned.storage.optuna.delete_study(tuned.id)
    lost = type("Lost", (), {"name": name})
    with Notifier(lambda _: None, post=hook) as notifier:
        notifier.notify(lost, HOOK, "failed", "gone")  # type: ignore[arg-type]
    assert hook.posted[0].keys() == {"event", "study", "reason", "at", "text"}


# --- tries ---


@pytest.mark.parametrize(
    "error",
    [http_error(500), http_error(503), http_error(429), OSError("refused"), TimeoutError()],
)
def test_what_may_succeed_later_is_tried_again(tuned: TunedStudy, error: Exception) -> None:
    hook, said = Hook(error, error), list[str]()
    with Notifier(said.append, post=hook) as notifier:
        notifier.notify(tuned, HOOK, "stopped")
    assert (hook.tries, len(hook.posted)) == (3, 1)
    assert "notification (stopped) sent to hooks.example.org" in said[0]


@pytest.mark.parametrize("error", [http_error(404), http_error(302), ValueError(URL)])
def test_what_never_will_is_said_once_without_the_token(
    tuned: TunedStudy, error: Exception
) -> None:
    hook, said = Hook(error, error), list[str]()
    with Notifier(said.append, post=hook) as notifier:
        notifier.notify(tuned, HOOK, "finished")
    assert hook.tries == 1
    assert "no notification (finished) was sent to hooks.example.org: " in said[0]
    assert "secret-token" not in said[0] + repr(HOOK)


def test_a_webhook_that_is_silent_delays_the_end_no_longer_than_that(
    tuned: TunedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "_LAST_SECONDS", 0.01)
    answers, said = threading.Event(), list[str]()
    with Notifier(said.append, post=lambda url, body: answers.wait() and None) as notifier:
        notifier.notify(tuned, HOOK, "finished")
    assert said == ["No notification was sent to hooks.example.org: no answer in 0.01 s."]
    answers.set()
    wait_until(lambda: not any(thread.is_alive() for thread in notifier._sending))


def test_json_goes_over_http_and_no_redirection_is_followed(tuned: TunedStudy) -> None:
    said: list[str] = []
    with webhook_server() as hook, Notifier(said.append) as notifier:
        for path in ("hook", "moved"):
            there = Webhook(url=hook.url + path, events=frozenset(EVENTS))
            notifier.notify(tuned, there, "finished")
    assert sorted(hook.paths) == ["/hook", "/moved"]
    assert [one["event"] for one in hook.posted] == ["finished", "finished"]
    assert any("it answers 302" in line for line in said)


# --- where ---


def test_the_option_comes_before_the_variable_that_the_study_names() -> None:
    environ = {"TUNER_NOTIFY": "https://a.example/1", "TUNER_NOTIFY_LAB": "https://b.example/2"}
    lab = NotifySettings(url_env="TUNER_NOTIFY_LAB", on=["failed"])
    found = webhook_of(None, environ=environ, say=pytest.fail)
    assert found == Webhook(url="https://a.example/1", events=frozenset(EVENTS))
    found = webhook_of(lab, environ=environ, say=pytest.fail)
    assert found == Webhook(url="https://b.example/2", events=frozenset(["failed"]))
    found = webhook_of(lab, given=URL, environ=environ, say=pytest.fail)
    assert found == Webhook(url=URL, events=frozenset(["failed"]))
    assert webhook_of(None, environ={}, say=pytest.fail) is None


def test_a_variable_that_is_not_set_is_warned_of() -> None:
    said: list[str] = []
    assert webhook_of(NotifySettings(), environ={}, say=said.append) is None
    assert "TUNER_NOTIFY is not set here" in said[0]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("hooks.example.org/secret", "does not hold a URL"),
        ("ftp://hooks.example.org/secret", "does not hold a URL"),
        ("https:///secret", "does not hold a URL"),
        ("https://hooks.example.org:secret/", "does not hold a URL"),
        ("https://[secret/", "does not hold a URL"),
        ("https://hooks.example.org/a secret", "does not hold a URL"),
        ("https://hooks.example.org/s\u00e9cret", "does not hold a URL"),
        ("https://user:secret@hooks.example.org/", "are not sent"),
        ("http://hooks.example.org/secret", "in the clear to hooks.example.org"),
        ("http://8.8.8.8/secret", "in the clear"),
        ("http://0.0.0.0/secret", "in the clear"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_and_not_repeated(url: str, words: str) -> None:
    with pytest.raises(TunerError, match=words) as refused:
        webhook_of(None, given=url, environ={}, say=pytest.fail)
    assert str(refused.value).startswith("--notify")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:9000", "localhost", "[::1]:80", "10.1.2.3", "192.168.0.9", "hook",
             "hook.tools.svc", "hook.corp.internal"],
)  # fmt: skip
def test_http_is_for_this_machine_and_private_networks(host: str) -> None:
    assert webhook_of(None, given=f"http://{host}/x", environ={}, say=pytest.fail)
