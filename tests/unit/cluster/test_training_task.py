"""A checkpoint that is none, with the real network; a training process that is asked to leave."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from fakes import small_job
from folders import ROOT

from tuner.cluster.messages import TrainingTask
from tuner.cluster.training_task import open_from_checkpoint
from tuner.data.development import DevelopmentData
from tuner.errors import SetupError, TrialEndedError
from tuner.network.training import TrainingRun


def task_of(checkpoint: bytes | None = None) -> TrainingTask:
    return TrainingTask(
        attempt="a",
        events="events",
        orders="orders",
        job=small_job(seed=1, rungs=()),
        threads=1,
        development_file="none",
        development_sha256="c" * 64,
        checkpoint=checkpoint,
        train_until=9,
    )


@pytest.fixture(scope="module")
def opened():
    """Opens real trainings, on a few rows of the synthetic kind."""
    from tuner.network.training import TensorData

    tokens = np.random.default_rng(1).integers(1, 21, (40, 200)).astype(np.uint8)
    labels = (np.arange(40) % 2).astype(np.uint8)
    data = TensorData(
        DevelopmentData(
            training_tokens=tokens[:32],
            training_labels=labels[:32],
            validation_tokens=tokens[32:],
            validation_labels=labels[32:],
        )
    )

    def open_run(task: TrainingTask) -> TrainingRun:
        return TrainingRun(data, task.job, checkpoint=task.checkpoint)

    return open_run


@pytest.fixture(scope="module")
def begun(opened) -> TrainingRun:
    """A training after its first epoch."""
    run = opened(task_of())
    next(run.epochs())
    return run


@pytest.fixture(scope="module")
def good(begun: TrainingRun) -> bytes:
    return begun.checkpoint()


def test_a_good_checkpoint_is_taken_up(opened, good: bytes) -> None:
    run, unusable = open_from_checkpoint(task_of(good), opened)
    assert unusable is None
    assert [result.epoch for result in run.history] == [1]


DAMAGES = {
    "nothing": lambda good: b"",
    "half of it": lambda good: good[: len(good) // 2],
    "all but its end": lambda good: good[:-10],
    "zeros, as after a power cut": lambda good: bytes(len(good)),
    "a flipped byte": lambda good: good[:300] + bytes([good[300] ^ 255]) + good[301:],
    "something else": lambda good: b"[]",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_cannot_be_read_is_told_and_the_trial_begins_anew(
    opened, begun: TrainingRun, good: bytes, damage: str
) -> None:
    run, unusable = open_from_checkpoint(task_of(DAMAGES[damage](good)), opened)
    assert unusable
    assert run.history == []
    assert next(run.epochs()).validation_loss == begun.history[0].validation_loss


def test_a_checkpoint_of_another_run_is_told_and_the_trial_begins_anew(opened, good: bytes) -> None:
    task = replace(task_of(good), job=small_job(seed=1, rungs=(), trial=1))
    run, unusable = open_from_checkpoint(task, opened)
    assert unusable is not None
    assert "the checkpoint is of another run" in unusable
    assert run.history == []


@pytest.mark.parametrize(
    "error",
    [
        TrialEndedError("out_of_memory", "building"),
        SetupError("no Keras"),
        FileNotFoundError(errno.ENOENT, "rows"),
        OSError(errno.EMFILE, "Too many open files"),
        PermissionError(errno.EACCES, "Permission denied"),
        MemoryError(),
        ValueError(),
    ],
)
def test_what_is_not_the_checkpoints_fault_is_not_blamed_on_it(error: Exception) -> None:
    opened: list[TrainingTask] = []

    def fail(task: TrainingTask):
        opened.append(task)
        raise error

    with pytest.raises(type(error)):
        open_from_checkpoint(task_of(b"fine"), fail)
    with pytest.raises(type(error)):
        open_from_checkpoint(task_of(None), fail)
    # Tried without it only where it might be to blame.
    assert len(opened) == (3 if isinstance(error, ValueError) else 2)


def test_a_damaged_head_that_asks_for_all_memory_is_damage_and_no_want_of_memory(
    opened, good: bytes
) -> None:
    # The first array's shape, in the text of its head.
    shape = good.index(b"'shape': (")
    damaged = good[: shape + 10] + b"9" + good[shape + 11 :]
    _, unusable = open_from_checkpoint(task_of(damaged), opened)
    assert unusable is not None
    assert "damaged" in unusable


def test_a_checkpoint_that_memory_has_no_room_for_is_not_blamed(
    opened, good: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.network.model import tf

    def exhausted(*_: object) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating a tensor")

    monkeypatch.setattr("tuner.network.training.load_weights", exhausted)
    with pytest.raises(MemoryError, match="OOM when allocating"):
        open_from_checkpoint(task_of(good), opened)


LEAVER = """
import asyncio
from types import SimpleNamespace
from tuner.cluster.leaving import GiveBack

class Worker:
    memory_manager = SimpleNamespace(memory_limit=0)

    async def close(self, **_how):
        print("leaving", flush=True)
        await asyncio.sleep(1.5)
        print("left", flush=True)
        gone.set()

async def work():
    GiveBack().setup(Worker())
    print("ready", flush=True)
    await gone.wait()

gone = asyncio.Event()
asyncio.run(work())
"""


@pytest.fixture
def leaver() -> Iterator[subprocess.Popen[str]]:
    """A process that hears signals as a training process does, and takes 1.5 s to leave."""
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVER],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "leaving\n"
    yield process
    process.kill()
    process.communicate()


def test_a_training_process_that_hears_a_signal_twice_at_once_leaves_in_peace(leaver) -> None:
    leaver.send_signal(signal.SIGTERM)
    assert leaver.communicate(timeout=30) == ("left\n", None)
    assert leaver.returncode == 0


def test_a_training_process_that_hears_a_second_signal_later_ends_at_once(leaver) -> None:
    time.sleep(0.7)
    leaver.send_signal(signal.SIGTERM)
    assert leaver.communicate(timeout=30) == ("", None)
    assert leaver.returncode == -signal.SIGTERM
