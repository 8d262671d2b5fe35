"""A coordinator as a process of its own, with trainings that cost nothing: what fault tests break.

    python -m drive '{"url": "sqlite:///...", "folder": "..."}'

`faults.Launch` starts it. It writes a line for each epoch (trial, epoch, the worker's process),
one for each thing that a user would be told, and one for its end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
import stamina.instrumentation
from fakes import IDENTITY, FakeRun, small_spec
from optuna.trial import FrozenTrial

import tuner.cluster.training_task
import tuner.storage.engine
import tuner.storage.lease
from tuner.cli.terminal import stop_on_signals
from tuner.cluster.connection import Connection, local_connection, remote_connection
from tuner.cluster.messages import TrainingTask
from tuner.cluster.trainings import Cluster
from tuner.coordination.coordinator import Coordinator
from tuner.coordination.study_trainings import StudyTrainings
from tuner.errors import TunerError
from tuner.search.study import create_or_resume
from tuner.storage.storage import Storage
from tuner.train import EpochResult

Phase = Literal[
    "before the first report", "between reports", "at a rung", "while its checkpoint travels"
]

_HOLD_SECONDS = 120.0
_HEAVY = 64 << 20  # bytes: a checkpoint that takes a while to travel


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a coordinator process is to do; travels as JSON."""

    url: str
    folder: str  # of its artifacts, and of the files by which a test and a worker meet
    workers: int = 2
    cluster: str | None = None  # a scheduler's address; workers of its own where left out
    lease_seconds: float = 30.0
    silence_seconds: float = 30.0  # a database that says nothing for so long is given up
    checkpoint_seconds: float = 60.0  # between two checkpoints of a training
    weights_bytes: int = 7
    holds: dict[str, Phase] = field(default_factory=dict)  # trial number: where it waits, once
    rung: int = 1  # epoch of the hold "at a rung"
    spec: dict[str, Any] = field(default_factory=dict)

    def held(self, trial: int) -> Path:
        """Appears, with the worker's process id in it, when the trial has come to its hold."""
        return Path(self.folder) / f"held-{trial}"

    def go(self, trial: int) -> Path:
        """Lets the trial go on, where its coordinator holds it."""
        return Path(self.folder) / f"go-{trial}"

    def hold(self, trial: int, phase: Phase, process: int) -> bool:
        """Says that the trial has come to its hold; False where it has none there."""
        if self.holds.get(str(trial)) != phase or self.held(trial).exists():
            return False
        beside = self.held(trial).with_suffix(".new")
        beside.write_text(str(process))
        beside.rename(self.held(trial))
        return True

    def wait(self, trial: int) -> None:
        deadline = time.monotonic() + _HOLD_SECONDS
        while not self.go(trial).exists() and time.monotonic() < deadline:
            time.sleep(0.01)


class HeldRun(FakeRun):
    """Waits in a phase of the training, so that a test finds its worker there."""

    def __init__(self, plan: Plan, task: TrainingTask) -> None:
        super().__init__(task)
        self._plan = plan
        self._sending = False
        # Of this worker process: the coordinator's own copy says nothing here.
        tuner.cluster.training_task._CHECKPOINT_SECONDS = plan.checkpoint_seconds

    def _hold(self, phase: Phase) -> bool:
        return self._plan.hold(self._job.trial, phase, os.getpid())

    def epochs(self) -> Iterator[EpochResult]:
        if self._hold("before the first report"):
            self._plan.wait(self._job.trial)
        for result in super().epochs():
            if self._sending:  # a test that is slow must still find this worker on this trial
                self._sending = False
                self._plan.wait(self._job.trial)
            if result.epoch == 6 and self._hold("between reports"):
                self._plan.wait(self._job.trial)
            yield result

    def checkpoint(self) -> bytes:
        content = super().checkpoint()
        if self._hold("while its checkpoint travels"):
            self._sending = True
            return content + b" " * _HEAVY
        return content

    def best_weights(self) -> bytes:
        return super().best_weights().ljust(self._plan.weights_bytes)


class OpenHeld:
    """Opens a HeldRun; pickled to the workers."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __call__(self, task: TrainingTask) -> HeldRun:
        return HeldRun(self._plan, task)


class Tell:
    """A watcher that writes lines."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def epoch(self, trial: int, result: EpochResult) -> None:
        line(f"epoch {trial} {result.epoch} {result.seconds:.0f}")
        if result.epoch == self._plan.rung and self._plan.hold(
            trial, "at a rung", int(result.seconds)
        ):
            self._plan.wait(trial)

    def trial_ended(self, trial: FrozenTrial) -> None:
        line(f"ended {trial.number} {trial.state.name}")

    def say(self, message: str) -> None:
        line(message)

    def tick(self, running: int) -> None:
        pass


def line(words: str) -> None:
    # Several threads write: one call a line, so that none is torn.
    os.write(1, f"{words}\n".encode())


def main() -> None:
    plan = Plan(**json.loads(sys.argv[1]))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    stamina.instrumentation.set_on_retry_hooks(())
    tuner.storage.lease.LEASE_SECONDS = plan.lease_seconds
    tuner.storage.engine._SILENCE_SECONDS = plan.silence_seconds
    tuner.storage.engine._POSTGRESQL_17_SETTINGS["transaction_timeout"] = (
        f"{plan.lease_seconds:.0f}s"
    )
    try:
        drive(plan)
    except TunerError as error:
        line(f"error: {error}")
        sys.exit(1)


def drive(plan: Plan) -> None:
    with Storage(plan.url, patience_seconds=None, say=line) as storage:
        tuned = create_or_resume(
            storage,
            small_spec(**plan.spec),
            IDENTITY,
            development_sha256="c" * 64,
            artifacts_root=Path(plan.folder) / "artifacts",
        )
        storage.leases.refuse_if_live(tuned.id)
        with connection_of(plan) as connection:
            connection.require_workers()
            with Cluster(
                connection,
                StudyTrainings(tuned),
                development_file=Path("none.npz"),
                threads=1,
                open_run=OpenHeld(plan),
            ) as cluster:
                coordinator = Coordinator(tuned, cluster, Tell(plan))
                stop_on_signals(lambda: coordinator.stop("interrupted"))
                line("ready")
                line(f"ending {coordinator.run()}")


def connection_of(plan: Plan) -> AbstractContextManager[Connection]:
    if plan.cluster is None:
        return local_connection(plan.workers, say=line)
    return remote_connection(plan.cluster, say=line)


if __name__ == "__main__":
    # A worker unpickles what belongs to `drive`, and not to `__main__`.
    from drive import main as start

    signal.signal(signal.SIGINT, signal.default_int_handler)
    start()
