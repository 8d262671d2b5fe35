"""What fault tests share: a coordinator process to break, and what must hold after it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import psutil
from drive import Plan
from fakes import loss_of
from folders import TESTS
from optuna.trial import FrozenTrial, TrialState
from waiting import wait_until

from tuner.artifacts import ARTIFACT_PREFIX, CURVES_FILE, NETWORK_FILE, artifact_store
from tuner.search.attributes import NOTE_KEY, RESUMED_FROM_KEY, RESUMED_KEY, curve_of
from tuner.search.study import load
from tuner.search.tuned_study import FINISHED, TunedStudy
from tuner.storage.storage import Storage
from tuner.train import EPOCHS_KEY

#: The file that collects what users were told, for docs/faults.md; see benchmarks/faults.py.
STORY = "PYTEST_TUNER_STORY"
#: Lines of `drive` that stand for no words to a user, and Dask's own of a scheduler.
_SILENT = re.compile(r"epoch |ended |ready$|ending |\d{4}-\d\d-\d\d |\s|$")

PATIENCE = 90.0  # seconds that anything may take on a busy machine
_MARK = "PYTEST_TUNER_LAUNCH"


class Program:
    """A running Python program of ours; a context manager that ends it with all it started."""

    name = "program"

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.lines: list[str] = []
        self._mark = uuid.uuid4().hex
        self._changed = threading.Condition()
        paths = [environment.pop("PYTHONPATH", ""), str(TESTS.parent), str(TESTS)]
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), _MARK: self._mark}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        # A pipe, and no file: a full disk must not silence the coordinator.
        for line in self.process.stdout or ():
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        assert_gone(self.processes)
        self._reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()
        if story := os.environ.get(STORY):
            told = [line for line in self.lines if not _SILENT.match(line)]
            test = os.environ["PYTEST_CURRENT_TEST"]
            with Path(story).open("a") as file:
                file.write(json.dumps({"test": test, "who": self.name, "told": told}) + "\n")

    # --- what it says ---

    @property
    def said(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, words: str, *, count: int = 1, after: int = 0) -> int:
        """Waits until so many lines contain the words; returns how many lines there are."""

        def heard() -> bool:
            return sum(words in line for line in self.lines[after:]) >= count

        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while not heard():
                if self.process.poll() is not None and not self._reader.is_alive():
                    raise AssertionError(f"ended without {words!r}:\n{self.said}")
                if time.monotonic() > deadline:
                    raise AssertionError(f"{words!r} never came:\n{self.said}")
                self._changed.wait(0.05)
            return len(self.lines)

    def end(self) -> str:
        """Waits for its end; returns all that it said."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it never ended:\n{self.said}") from None
        self._reader.join(PATIENCE)
        return self.said

    # --- what is done to it ---

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def processes(self) -> list[psutil.Process]:
        """It and its descendants, those among them whose parents died, too."""
        return marked(_MARK, self._mark)


class Launch(Program):
    """A coordinator."""

    name = "launch"

    def __init__(self, plan: Plan, **environment: str) -> None:
        super().__init__("-m", "drive", json.dumps(asdict(plan)), **environment)
        self.plan = plan

    def worker_of(self, trial: int) -> int:
        """The process that trained the last epoch of a trial that was told."""
        (*_, last) = [line.split() for line in self.lines if line.startswith(f"epoch {trial} ")]
        return int(last[3])

    def held_worker(self, trial: int) -> int:
        """Waits until the trial has come to its hold; returns its worker's process."""
        wait_in(self, self.plan.held(trial).exists, f"trial {trial} did not come to its hold")
        return int(self.plan.held(trial).read_text())


class Tuner(Program):
    """The real command line."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        super().__init__("-m", "tuner", *arguments, **environment)
        self.name = arguments[0]


def scheduler(port: int, **environment: str) -> Program:
    """Somebody's Dask scheduler, as `dask scheduler` starts it."""
    started = Program(
        "-m", "distributed.cli.dask_scheduler",
        "--host", "127.0.0.1", "--port", str(port), "--no-dashboard", **environment,
    )  # fmt: skip
    started.wait_for("Scheduler at")
    return started


def worker(port: int) -> Tuner:
    """`tuner worker`, joined."""
    started = Tuner("worker", "--cluster", f"tcp://127.0.0.1:{port}")
    started.wait_for("Joined")
    return started


def marked(name: str, value: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value and process.status() != "zombie":
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def assert_gone(processes: Callable[[], list[psutil.Process]]) -> None:
    """No worker outlives its coordinator by more than the seconds that a process takes to end."""

    def left_behind() -> str:
        words = [f"{process.pid} {' '.join(process.cmdline())}" for process in processes()]
        for process in processes():
            process.kill()  # the mark in its environment proves that this launch started it
        return f"left behind: {words}"

    wait_until(lambda: not processes(), left_behind, pause=0.1)


def wait_in(launch: Launch, condition: Callable[[], object], otherwise: str) -> None:
    """Waits until a condition holds, while the launch runs."""
    wait_until(
        condition,
        lambda: f"{otherwise}:\n{launch.said}",
        seconds=PATIENCE,
        pause=0.001,
        alive=[launch.process],
    )


def assert_whole(plan: Plan) -> list[FrozenTrial]:
    """Exactly the budget, nothing lost, nothing twice, every curve that of an undisturbed run."""
    with Storage(plan.url) as storage:
        tuned = load(storage, "small", artifacts_root=Path(plan.folder) / "artifacts")
        trials = tuned.trials()
        numbers = [trial.number for trial in trials]
        assert numbers == list(range(tuned.budget)), numbers
        states = {trial.number: trial.state for trial in trials}
        assert all(state in FINISHED for state in states.values()), states
        for trial in trials:
            config = tuned.record.spec.space.resolve(trial.params)
            epochs = range(1, (trial.last_step or 0) + 1)
            assert epochs
            undisturbed = [loss_of(config, trial.number, epoch) for epoch in epochs]
            assert [epoch.validation_loss for epoch in curve_of(trial)] == undisturbed
            best_so_far = {epoch: min(undisturbed[:epoch]) for epoch in epochs}
            assert trial.intermediate_values == best_so_far
            assert_page_is_whole(tuned, trial)
            if trial.state == TrialState.COMPLETE:
                assert trial.value == min(undisturbed)
                assert len(epochs) == tuned.record.spec.training.max_epochs
        decisions = tuned.storage.decisions.of(tuned.id)
        for kind in ("ask", "tell"):
            decided = [decision.trial for decision in decisions if decision.kind == kind]
            assert len(decided) == len(set(decided)), (kind, decided)
        assert tuned.storage.leases.of(tuned.id) is None
        checkpoints = tuned.artifacts.folder / "checkpoints"
        assert not checkpoints.exists() or not list(checkpoints.iterdir())
        for best in tuned.ranked()[:10]:
            assert tuned.artifacts.weights(best.number).read_bytes().startswith(b"weights")
        return trials


def assert_page_is_whole(tuned: TunedStudy, trial: FrozenTrial) -> None:
    """What is attached to a trial tells of all its epochs, those before a crash included."""
    epochs = trial.last_step or 0
    note = trial.user_attrs[NOTE_KEY]
    assert trial.user_attrs[EPOCHS_KEY] == epochs
    assert note.startswith("Fully" if trial.state == TrialState.COMPLETE else "Pruned")
    if trial.user_attrs.get(RESUMED_KEY):
        assert "Resumed" in note
        if after := trial.user_attrs.get(RESUMED_FROM_KEY):
            assert note.endswith(f"from its checkpoint after epoch {after}.")
    assert drawn_epochs(attached(tuned, trial, CURVES_FILE)) == epochs
    assert attached(tuned, trial, NETWORK_FILE).startswith("layer,output shape,parameters\n")


def drawn_epochs(drawing: str) -> int:
    """How many points each of the four curves has; they have the same number."""
    (points,) = {
        points.count("L") + 1 for points in re.findall(r'd="M([^"]*)"[^>]* marker-', drawing)
    }
    return points


def attached(tuned: TunedStudy, trial: FrozenTrial, name: str) -> str:
    """The file of this name that is attached to a trial, found as the dashboard finds it."""
    described = [
        json.loads(value)
        for key, value in trial.system_attrs.items()
        if key.startswith(ARTIFACT_PREFIX)
    ]
    (identity,) = [one["artifact_id"] for one in described if one["filename"] == name]
    with artifact_store(tuned.artifacts.folder.parent).open_reader(identity) as file:
        return file.read().decode()


def open_trials(plan: Plan) -> set[int]:
    """Numbers of the trials that nobody has ended."""
    with Storage(plan.url) as storage:
        tuned = load(storage, "small", artifacts_root=Path(plan.folder) / "artifacts")
        return {trial.number for trial in tuned.trials(TrialState.RUNNING)}


def resumed(trials: list[FrozenTrial]) -> set[int]:
    return {trial.number for trial in trials if trial.user_attrs.get(RESUMED_KEY)}


def plan_for(url: str, folder: Path, **changes: Any) -> Plan:
    return Plan(url=url, folder=str(folder), **changes)


def trained_by(trial: FrozenTrial) -> list[int]:
    """The worker process of each epoch in a trial's curve."""
    return [int(epoch.seconds) for epoch in curve_of(trial)]
