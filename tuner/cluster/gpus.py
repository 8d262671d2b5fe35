"""The GPUs of this machine, and which of them a worker process uses."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from tuner.errors import ClusterError, counted


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of this machine."""

    device: str  #: as CUDA_VISIBLE_DEVICES names it
    identity: str  #: the same whoever looks at it: its UUID where that is known


def visible_gpus(
    listing: str | None, devices: Sequence[str], visible: str | None
) -> tuple[Gpu, ...]:
    """The GPUs that this process may use.

    Args:
        listing: What `nvidia-smi --query-gpu=index,uuid --format=csv,noheader` printed.
        devices: Names in /dev, where that program is not there.
        visible: CUDA_VISIBLE_DEVICES; None where it is not set.
    """
    uuids: dict[str, str] = {}
    if listing is not None:
        for line in listing.splitlines():
            index, _, identity = line.partition(",")
            if index.strip().isdigit() and identity.strip():
                uuids[index.strip()] = identity.strip()
    else:
        found = [match[1] for name in devices if (match := re.fullmatch(r"nvidia(\d+)", name))]
        uuids = {index: f"index-{index}" for index in sorted(found, key=int)}
    if visible is None:
        return tuple(Gpu(index, identity) for index, identity in uuids.items())
    gpus = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdigit() and uuids and entry not in uuids:
            break  # as CUDA does: what follows an invalid entry is invisible
        if entry.isdigit():
            gpus.append(Gpu(entry, uuids.get(entry, f"index-{entry}")))
        elif entry.startswith(("GPU-", "MIG-")):
            # A UUID may be shortened.
            full = [identity for identity in uuids.values() if identity.startswith(entry)]
            gpus.append(Gpu(entry, full[0] if len(full) == 1 else entry))
        else:
            break
    return tuple(gpus)


@contextlib.contextmanager
def gpus_for(
    workers: int | Literal["auto"], environment: Mapping[str, str]
) -> Iterator[tuple[str, ...]]:
    """As many GPUs as there are workers, held against other `tuner worker` of this machine.

    Empty where there is no GPU.

    Raises:
        ClusterError: There are some, but too few of them are free.
    """
    seen = visible_gpus(
        _nvidia_smi(environment),
        [path.name for path in Path("/dev").glob("nvidia*")],
        environment.get("CUDA_VISIBLE_DEVICES"),
    )
    if not seen:
        yield ()
        return
    wanted = len(seen) if workers == "auto" else workers
    with contextlib.ExitStack() as held:
        taken: list[str] = []
        for gpu in seen:
            if len(taken) < wanted and (lock := _lock(gpu)) is not None:
                held.callback(lock.release)
                taken.append(gpu.device)
        if len(taken) < (1 if workers == "auto" else wanted):
            raise ClusterError(
                f"{counted(wanted, 'worker needs', 'workers need')} a GPU each, but {len(taken)} "
                f"of the {len(seen)} that CUDA_VISIBLE_DEVICES and the driver show are free: "
                "another `tuner worker` of this machine holds the rest. Ask for fewer (--workers), "
                "or train on the processor: CUDA_VISIBLE_DEVICES= tuner worker ..."
            )
        yield tuple(taken)


def _nvidia_smi(environment: Mapping[str, str]) -> str | None:
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603 - the driver's own program, found on the PATH
            [program, "--query-gpu=index,uuid", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _lock(gpu: Gpu) -> FileLock | None:
    """The GPU's lock, taken; None where another process holds it."""
    folder = Path(tempfile.gettempdir()) / f"tuner-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    name = hashlib.sha256(gpu.identity.encode()).hexdigest()[:16]
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock
