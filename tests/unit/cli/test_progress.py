"""What the terminal shows of studies: their table, one in detail, and both again and again."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from fakes import make_study, small_spec
from folders import ROOT
from optuna.trial import TrialState
from rich.console import Console
from typer.testing import CliRunner

from tuner.cli.main import app
from tuner.cli.progress import status_details, status_table, watch_studies
from tuner.coordination.words import describe_end
from tuner.errors import counted
from tuner.search.attributes import ERROR_KEY, RESUMED_KEY
from tuner.search.status import StudyStatus, status
from tuner.search.tuned_study import TunedStudy
from tuner.spec.spec import MAX_NAME_LENGTH


@pytest.fixture
def tuned(tmp_path: Path) -> Iterator[TunedStudy]:
    tuned = make_study(tmp_path)
    yield tuned
    tuned.storage.close()


def text_of(*shown: object, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False)
    console.print(*shown)
    return console.file.getvalue()  # type: ignore[attr-defined]


# --- words ---


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 epochs"), (1, "1 epoch"), (2, "2 epochs"), (1200, "1,200 epochs")]
)
def test_a_count_has_its_noun_in_the_right_number(count: int, words: str) -> None:
    assert counted(count, "epoch") == words


def test_an_irregular_plural_is_given() -> None:
    assert counted(1, "study", "studies") == "1 study"
    assert counted(2, "study", "studies") == "2 studies"


def test_a_trial_of_one_epoch_ended_after_1_epoch() -> None:
    trial = optuna.create_trial(state=TrialState.COMPLETE, value=0.5, intermediate_values={1: 0.5})
    assert describe_end(trial) == "Trial -1 COMPLETE after 1 epoch, validation loss 0.5000"


def test_trials_of_a_study_that_is_not_running_are_not_running_either(tuned: TunedStudy) -> None:
    for _ in range(2):
        tuned.study.ask()
    now = status(tuned)
    assert now.state == "stopped"
    assert now.trials_in_words == "2 to resume"
    assert "RUNNING" not in text_of(status_details(now), status_table([now]))
    assert now.to_document()["trials"]["RUNNING"] == 2  # Optuna's word, for programs
    assert replace(now, state="running").trials_in_words == "2 RUNNING"
    assert replace(now, counts={}).trials_in_words == "none yet"


def test_a_resumed_trial_is_not_said_to_have_lost_a_worker(tuned: TunedStudy) -> None:
    tuned.study.ask().set_user_attr(RESUMED_KEY, 1)  # as after a Ctrl-C and another launch
    shown = text_of(status_details(status(tuned)))
    assert "1 resumed after an interruption" in shown
    assert "lost" not in shown


# --- width ---


def test_nothing_is_cut_in_a_pipe(tmp_path: Path) -> None:
    name = "n" * MAX_NAME_LENGTH
    tuned = make_study(tmp_path, small_spec(name=name))
    error = "the reason " * 40 + "at its end"
    tuned.study.set_user_attr(ERROR_KEY, error)
    tuned.storage.close()
    for arguments in (("status",), ("status", name)):
        shown = (
            CliRunner()
            .invoke(app, [*arguments, "--storage", tuned.storage.url], env={"COLUMNS": None})
            .stdout
        )
        assert name in shown
        assert "…" not in shown
    assert error in shown


def test_a_narrow_terminal_folds_a_table(tuned: TunedStudy) -> None:
    shown = text_of(
        status_table([replace(status(tuned), study="a-study-of-a-long-name")]), width=60
    )
    assert "…" not in shown


# --- watch ---


class Course:
    """What `look` finds, one after the other."""

    def __init__(self, now: StudyStatus, *states: str) -> None:
        self._now = now
        self._states = list(states)

    def __call__(self) -> list[StudyStatus]:
        return [replace(self._now, state=self._states.pop(0))]


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.cli.progress._WATCH_SECONDS", 0.0)


@pytest.mark.parametrize("last", ["finished", "reported", "stopped"])
def test_a_watch_ends_with_its_study(tuned: TunedStudy, last: str, no_pause: None) -> None:
    course = Course(status(tuned), "queued", "running", "running", last)
    console = Console(file=io.StringIO(), width=100)
    watch_studies(course, lambda found: found[0].state, console, in_place=False)
    # What did not change is not printed again.
    assert console.file.getvalue().split() == ["queued", "running", last]


def test_a_watch_of_many_ends_with_the_last_of_them(tuned: TunedStudy, no_pause: None) -> None:
    now = status(tuned)
    looks = iter([[replace(now, state="stopped"), replace(now, state="running")], [now, now]])
    watch_studies(lambda: next(looks), lambda _: "x", Console(file=io.StringIO()), in_place=False)
    assert next(looks, None) is None


def test_a_watch_on_a_terminal_writes_over_what_it_wrote(tuned: TunedStudy, no_pause: None) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    course = Course(status(tuned), "queued", "running", "finished")
    watch_studies(course, lambda found: f"{found[0].state}\nsecond line", console, in_place=True)
    written = console.file.getvalue()
    first, *redrawn = re.split(r"(?=queued|running|finished)", written)[1:]
    assert "second line" in first
    assert [part.split()[0] for part in redrawn][-1] == "finished"
    for before in (first, *redrawn[:-1]):  # one line up, and the line cleared, between two of them
        assert "\x1b[1A\x1b[2K" in before


def test_a_watch_in_a_pipe_is_read_while_the_study_runs_and_ends_with_it(tmp_path: Path) -> None:
    tuned = make_study(tmp_path)
    tuned.storage.lease.take(tuned.id)
    arguments = ("status", tuned.name, "--watch", "--storage", f"sqlite:///{tmp_path}/tuner.db")
    with subprocess.Popen(
        [sys.executable, "-m", "tuner", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline().split()[:2] == ["study", tuned.name]
        assert watching.stdout.readline().split() == ["state", "running"]
        tuned.storage.lease.release()
        rest = watching.stdout.read()
        assert re.search("^state +stopped *$", rest, re.MULTILINE)
        assert watching.wait(60) == 0
    tuned.storage.close()


def test_a_watch_of_a_study_that_failed_says_why_and_ends(tmp_path: Path) -> None:
    tuned = make_study(tmp_path)
    tuned.study.set_user_attr(ERROR_KEY, "10 trials in a row failed")
    tuned.storage.close()
    for name in ((tuned.name,), ()):
        done = CliRunner().invoke(app, ["status", *name, "--watch", "--storage", tuned.storage.url])
        assert done.exit_code == 0
        assert "stopped" in done.stdout
