"""The log on stderr: one format, whoever speaks."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import optuna
import pytest
from clusters import TUNER_WORKER, program
from fakes import make_study, ready_sqlite
from ports import free_port
from rich.console import Console

from tuner import logs
from tuner.cli.progress import ProgressWatcher
from tuner.errors import TunerError
from tuner.logs import about

KEYS = {"ts", "level", "logger", "message", "study", "trial"}


@pytest.fixture(autouse=True)
def undone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logging is of the whole process: what a test sets up is taken back."""
    for variable in (logs.LEVEL_VARIABLE, logs.FORMAT_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    root = logging.getLogger()
    known = [one for one in root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    before = [(one, one.level, one.propagate, list(one.handlers)) for one in (root, *known)]
    yield
    logging.captureWarnings(False)
    for one, level, propagate, handlers in before:
        one.setLevel(level)
        one.propagate = propagate
        one.handlers[:] = handlers


def set_up(monkeypatch: pytest.MonkeyPatch, level: str = "", form: str = "") -> None:
    monkeypatch.setenv(logs.LEVEL_VARIABLE, level)
    monkeypatch.setenv(logs.FORMAT_VARIABLE, form)
    logs.set_up()


def speak() -> None:
    """A line of everybody's at every level; libraries bring handlers and levels of their own."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    noisy = logging.getLogger("distributed.scheduler")
    noisy.addHandler(logging.StreamHandler(sys.stderr))
    noisy.propagate = False
    noisy.setLevel(logging.INFO)
    logs.adopt()
    for name in ("tuner", "optuna.storages", "distributed.scheduler", "tornado.application"):
        for level in (logging.INFO, logging.ERROR):
            logging.getLogger(name).log(level, "%s at %s", name, level)


def test_every_library_s_lines_are_json_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    set_up(monkeypatch, "info", "json")
    speak()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("old", UserWarning, stacklevel=1)
    try:
        raise ValueError("in two\nlines")
    except ValueError:
        logging.getLogger("tuner").exception("broken\nin two")
    found = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert all(set(line) >= KEYS for line in found)
    assert all(datetime.fromisoformat(line["ts"]).tzinfo is not None for line in found)
    heard = [(line["logger"], line["level"]) for line in found]
    for name in ("tuner", "optuna.storages", "distributed.scheduler", "tornado.application"):
        assert heard.count((name, "info")) == 1
        assert (name, "error") in heard
    assert ("py.warnings", "warning") in heard
    assert found[-1]["message"] == "broken\nin two"
    assert found[-1]["traceback"].endswith("ValueError: in two\nlines")


def test_by_default_we_speak_and_of_others_errors_are_heard(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # a second time changes nothing
        set_up(monkeypatch)
    speak()
    lines = capfd.readouterr().err.splitlines()
    said = [line.split(" ", 1)[1] for line in lines]
    assert said == [
        "INFO tuner at 20",
        "ERROR tuner at 40",
        "ERROR optuna.storages: optuna.storages at 40",
        "ERROR tornado.application: tornado.application at 40",
    ]


def test_a_level_is_everybody_s(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    set_up(monkeypatch, "ERROR")
    speak()
    assert len(capfd.readouterr().err.splitlines()) == 4


def test_a_line_names_its_study_and_trial_on_its_own_thread_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    set_up(monkeypatch, form="json")
    say = logging.getLogger("tuner").info
    with about(study="demo"):
        with about(trial=0):
            say("inner")
            other = threading.Thread(target=say, args=("other",))
            other.start()
            other.join()
        say("outer")
    say("none")
    found = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(one["message"], one["study"], one["trial"]) for one in found] == [
        ("inner", "demo", 0),
        ("other", None, None),
        ("outer", "demo", None),
        ("none", None, None),
    ]


def test_a_record_is_one_entry_also_as_text(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    set_up(monkeypatch)
    with about(study="demo", trial=0):
        logging.getLogger("tuner").info("first\n2026-01-01T00:00:00 ERROR forged")
    first, second = capfd.readouterr().err.splitlines()
    assert first.endswith(" INFO study=demo trial=0 first")
    assert second.startswith("    ")


def test_a_signal_handler_s_line_has_the_same_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "json")
    assert json.loads(logs.line("Stopping"))["message"] == "Stopping"


@pytest.mark.parametrize("variable", [logs.LEVEL_VARIABLE, logs.FORMAT_VARIABLE])
def test_a_value_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "loud")
    with pytest.raises(TunerError, match=rf"\${variable} is 'loud'; it is one of "):
        logs.set_up()


def test_what_a_launch_says_is_in_the_log_where_one_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tuned = make_study(tmp_path)
    watcher = ProgressWatcher(tuned, Console())
    watcher.say("plain")
    assert capfd.readouterr() == ("plain\n", "")
    set_up(monkeypatch, form="json")
    watcher.say("logged")
    out, err = capfd.readouterr()
    assert (out, json.loads(err)["study"]) == ("", tuned.name)
    tuned.storage.close()


STUDY = """
name = "small"
trials = 1
[data]
source = "synthetic"
[space]
learning_rate = 0.001
"""


@pytest.mark.parametrize("verb", ["launch", "serve"])
def test_every_line_of_a_command_on_stderr_is_json(tmp_path: Path, verb: str) -> None:
    (tmp_path / "small.toml").write_text(STUDY)
    nothing_there = f"tcp://127.0.0.1:{free_port()}"
    words = ["small.toml"] if verb == "launch" else ["--port", "0"]
    where = ["--cluster", nothing_there, "--storage", ready_sqlite(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tuner", verb, *words, *where, "--log-format", "json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    found = [json.loads(line) for line in done.stderr.splitlines()]
    assert "No Dask scheduler answers at" in found[-1]["message"]
    assert found[-1]["level"] == "error"
    assert all(set(line) == KEYS for line in found)


@pytest.mark.parametrize("verb", ["worker", "dashboard"])
def test_every_line_of_what_runs_for_long_is_json(tmp_path: Path, verb: str) -> None:
    words = (*TUNER_WORKER, f"tcp://127.0.0.1:{free_port()}")
    if verb == "dashboard":
        words = ("-m", "tuner", verb, "--port", "0", "--storage", ready_sqlite(tmp_path))
    variables = {logs.FORMAT_VARIABLE: "json", "TUNER_ARTIFACTS": str(tmp_path / "artifacts")}
    with program(*words, environment=os.environ | variables) as running:
        running.says("this worker waits" if verb == "worker" else "The dashboard is on", timeout=90)
        running.signal(signal.SIGTERM)
        assert running.wait(60) == 0
        found = [json.loads(line) for line in running.lines]
    assert "ended" in found[-1]["message"]
    assert all(set(line) == KEYS for line in found)
