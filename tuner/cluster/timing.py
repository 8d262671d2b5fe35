"""What training the networks of a space costs on this machine: measured, with all workers busy."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from tuner.cluster.processes import (
    children_deaf_to_interrupts,
    has_fast_bfloat16,
    training_environment,
)
from tuner.data.development import DevelopmentData
from tuner.data.rows import RESIDUES, Tokens
from tuner.errors import SetupError, reason_of
from tuner.spec.architecture import ModelConfig
from tuner.spec.precision import BFLOAT16_FROM, multiply_adds, precision_by_size
from tuner.spec.spec import TrainingSettings
from tuner.train import TrainingJob, TrainingTime

TIMED_ROWS = 256  #: of training, on which each network is timed
_ROWS_A_VALIDATION_ROW = 8  #: of training, as in a split of 80, 10 and 10 %


def of_each_size(
    configs: Sequence[ModelConfig], max_length: int, count: int
) -> tuple[ModelConfig, ...]:
    """`count` of the configurations, spread evenly over those ordered by their multiply-adds."""
    ordered = sorted(configs, key=lambda config: multiply_adds(config, max_length))
    return tuple(ordered[len(ordered) * (2 * at + 1) // (2 * count)] for at in range(count))


def measure(
    configs: Sequence[ModelConfig],
    lengths: npt.NDArray[np.int64],
    *,
    max_length: int,
    rows: int,
    workers: int,
) -> TrainingTime:
    """Trains each network for two epochs on random sequences, in every worker, and times both.

    All workers train at once, since cores share caches, memory and sometimes arithmetic.

    Args:
        configs: The networks.
        lengths: Those of the data's sequences, residues, [n].
        max_length: Tokens in a row.
        rows: Of training, to which the time of an epoch is scaled.
        workers: Processes of one thread each.

    Raises:
        SetupError: They cannot be trained here.
    """
    with in_workers(workers) as submit:
        asked = [submit(_timed, configs, lengths, max_length) for _ in range(workers)]
        timed = np.array([one.result() for one in asked])  # [workers, networks, 2]
    start, epoch = timed.mean(axis=(0, 1))
    return TrainingTime(
        epoch_seconds=float(epoch) * rows / TIMED_ROWS,
        start_seconds=max(float(start), 0.0),
        networks=len(configs),
        rows=TIMED_ROWS,
        workers=workers,
    )


@contextlib.contextmanager
def in_workers(count: int) -> Iterator[Callable[..., Future[Any]]]:
    """Submits calls to a number of processes, whose threads are set as a worker's are.

    Raises:
        SetupError: A call failed.
    """
    before = dict(os.environ)
    os.environ.update(training_environment(threads=1) | {"TF_FORCE_GPU_ALLOW_GROWTH": "true"})
    try:
        with (
            ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool,
            _ended_with_us(),
        ):

            def submit(*call: Any) -> Future[Any]:
                with children_deaf_to_interrupts():  # the first call starts the processes
                    return pool.submit(*call)

            yield submit
    except SetupError:
        raise
    except Exception as error:  # whatever TensorFlow raises there, or a process that was killed
        raise SetupError(
            f"The networks cannot be trained here: {reason_of(error)}. `tuner launch` says more."
        ) from error
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _ended_with_us() -> Iterator[None]:
    """Ends the processes on Ctrl-C, instead of waiting for what they compute."""
    try:
        yield
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def _timed(
    configs: Sequence[ModelConfig], lengths: npt.NDArray[np.int64], max_length: int
) -> list[tuple[float, float]]:
    """Seconds that each network takes before its epochs, and for the second of two."""
    from tuner.network.fold_runs import LocalTraining  # noqa: PLC0415
    from tuner.network.training import configure_tensorflow  # noqa: PLC0415

    configure_tensorflow(threads=1)
    train = LocalTraining(_random_rows(lengths, max_length))
    settings = TrainingSettings(max_epochs=2, patience=None)
    bfloat16_from = BFLOAT16_FROM if has_fast_bfloat16() else None
    found = []
    # A process takes seconds for its first network that no later one takes: one is not counted.
    for config in (configs[0], *configs):
        job = TrainingJob(
            config=config,
            trial=0,
            seed=0,
            precision=precision_by_size(config, max_length, bfloat16_from),
            rungs=(),
            settings=settings,
        )
        began = time.monotonic()
        second = [epoch.seconds for epoch in train(job)][-1]
        # The first epoch builds the graphs.
        found.append((time.monotonic() - began - 2 * second, second))
    return found[1:]


def _random_rows(lengths: npt.NDArray[np.int64], max_length: int) -> DevelopmentData:
    """Rows of random residues whose lengths are drawn from `lengths`."""
    generator = np.random.default_rng(0)

    def rows(count: int) -> tuple[Tokens, Tokens]:
        drawn = np.minimum(generator.choice(lengths, count), max_length)
        tokens = generator.integers(1, len(RESIDUES) + 1, (count, max_length), np.uint8)
        tokens[np.arange(max_length) >= drawn[:, np.newaxis]] = 0
        return tokens, np.arange(count, dtype=np.uint8) % 2

    training, validation = rows(TIMED_ROWS), rows(TIMED_ROWS // _ROWS_A_VALIDATION_ROW)
    return DevelopmentData(
        training_tokens=training[0],
        training_labels=training[1],
        validation_tokens=validation[0],
        validation_labels=validation[1],
    )
