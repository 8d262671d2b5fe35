"""How worker processes are started, by `launch` and by `worker` alike."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing.resource_tracker
import signal
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distributed import Worker

from tuner import logs
from tuner.cluster.steady import keep_steady
from tuner.commands import install_command
from tuner.errors import SetupError

keep_steady()  # coordinator, `tuner worker` and training processes alike import this module

SAME_SIGNAL_SECONDS = 0.5  #: a signal that comes so soon after the first is the same wish
SLOT = "slot"  #: the Dask resource: one training at a time for each
UNFIT = "This worker cannot train: "  #: begins the reason for which a worker leaves permanently
BFLOAT16 = "bfloat16"  #: the Dask resource of workers whose processor multiplies bfloat16
#: Flags of processors for which TensorFlow's oneDNN multiplies in bfloat16.
_FAST_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_PROCESSOR = Path("/proc/cpuinfo")
THREADS_VARIABLE = "TUNER_WORKER_THREADS"  #: set by `tuner worker --threads`; wins over the task's


#: Dask's settings for a process that trains. Dask has malloc give every 64 KB back to the system at
#: once; a training step takes and frees that hundreds of times, and each time the system clears
#: what it lends: small networks took 1.6 times as long.
TRAINING_SETTINGS = {
    f"distributed.nanny.pre-spawn-environ.{name}": str(threshold)
    for name, threshold in {
        "MALLOC_TRIM_THRESHOLD_": 1 << 30,  # bytes free at the end of the heap
        "MALLOC_MMAP_THRESHOLD_": 32 << 20,  # bytes of one block; the most that it can be
    }.items()
}


def require_training() -> None:
    """Looks whether this installation can train, without the seconds that an import takes.

    Raises:
        SetupError: TensorFlow or Keras is not installed.
    """
    missing = [name for name in ("tensorflow", "keras") if find_spec(name) is None]
    if missing:
        raise SetupError(
            f"This machine cannot train: {' and '.join(missing)} cannot be found here. Install the "
            f"extra cpu, `{install_command('cpu')}`, or gpu, `{install_command('gpu')}` (in the "
            "project's folder: `make setup`), or let the workers of a cluster train: --cluster "
            "ADDRESS."
        )


def training_environment(threads: int) -> dict[str, str]:
    """The environment of a process that trains with so many threads."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "TF_NUM_INTRAOP_THREADS": str(threads),
        "TF_NUM_INTEROP_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


@cache
def has_fast_bfloat16() -> bool:
    """Whether this machine's processor multiplies bfloat16 in hardware.

    What cannot be told (another system than Linux, another architecture) counts as no.
    """
    return not _FAST_FLAGS.isdisjoint(processor_facts().get("flags", "").split())


def processor_facts() -> dict[str, str]:
    """What Linux tells of the first processor, by name; {} on another system."""
    try:
        text = _PROCESSOR.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def training_resources(*, has_gpu: bool = False) -> dict[str, int]:
    """The Dask resources of a process that trains; what a GPU gains from bfloat16 is not known."""
    fast = has_fast_bfloat16() and not has_gpu
    return {SLOT: 1} | ({BFLOAT16: 1} if fast else {})


class WithoutHttp:
    """A Dask server that opens no HTTP port.

    Dask opens one for every scheduler and worker, with or without a dashboard. It asks for no
    certificate, and shows tasks, logs and addresses to every user of the machine.
    """

    def start_http_server(self, *_: object, **__: object) -> None:
        """Overrides `distributed.node.ServerNode.start_http_server`."""


class TrainingWorker(WithoutHttp, Worker):
    """The Dask worker of a training process."""

    def __init__(self, *args: Any, **options: Any) -> None:
        logs.set_up()
        super().__init__(*args, **options)


def is_dask_heard() -> bool:
    """Whether the user asked for logs."""
    return logs.level_asked() is not None


def silence_dask() -> None:
    """What matters we say ourselves; with --log-level or --debug, Dask speaks, too."""
    logs.adopt()
    if not is_dask_heard():
        # Dask gives some of its loggers a level of their own.
        for name in ["distributed", *logging.root.manager.loggerDict]:
            if name == "distributed" or name.startswith("distributed."):
                logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def children_deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C reaches the whole process group; only the process in charge may act on it.

    The signal mask is inherited: by the threads that start the worker processes, and by those.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # It would unblock the signal in whichever thread happens to start it.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
