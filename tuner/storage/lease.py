"""The lease: who runs a study, and until when nothing else may."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import sqlalchemy as sa

from tuner.errors import LeaseLostError
from tuner.storage.tables import (
    lease,
    now,
)

#: The trial attribute that marks a trial as a coordinator's; its value is the asking token.
COORDINATOR_KEY = "coordinator"

LEASE_SECONDS = 30.0  #: a lease not renewed for this long may be taken over

LEASE_LOST = (
    "Another coordinator took this study over, so this one stops; nothing it found since was "
    "written. `tuner status` shows who runs it."
)


def renew_lease(connection: sa.Connection, study_id: int | None, token: str) -> None:
    """The fence: the transaction around it may commit only while the token is the study's.

    Raises:
        LeaseLostError: It is not; the transaction must roll back.
    """
    renewed = connection.execute(
        lease.update()
        .where(lease.c.study_id == study_id, lease.c.token == token)
        .values(renewed_at=now(connection))
    )
    if renewed.rowcount != 1:
        raise LeaseLostError(LEASE_LOST)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseHolder:
    """Who drives a study."""

    host: str  #: for messages
    pid: int
    machine: str = ""  #: unlike the host's name, unique to where a pid means one process
    started: float = 0.0  #: when that process began, by a clock that never jumps: pids come again

    @classmethod
    def this_process(cls) -> LeaseHolder:
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_this_machine(),
            started=_started(os.getpid()),
        )

    def is_known_dead(self) -> bool:
        """True where the process ran on this machine and is gone; False where nobody can tell."""
        if self.machine != _this_machine():
            return False
        try:
            return abs(_started(self.pid) - self.started) > 1.0
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return True
        except (psutil.AccessDenied, PermissionError):
            return False


def seconds() -> float:
    """Seconds since some moment, by a clock that goes on while the machine is suspended."""
    clock: int | None = getattr(time, "CLOCK_BOOTTIME", None)  # Linux
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _this_machine() -> str:
    """This boot of this machine, and in it this container: there a pid means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> float:
    try:
        # Seconds since boot. psutil adds the boot's time, which moves when the clock is set.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return int(ticks) / os.sysconf("SC_CLK_TCK")
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            raise
        return float(psutil.Process(pid).create_time())


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The lease row of a study, as last read."""

    token: str
    holder: LeaseHolder
    renewed_at: float  #: seconds since the epoch, by the database's clock
    age_seconds: float  #: since then; below 0 where that clock was set back
    stop_requested: bool

    @property
    def is_live(self) -> bool:
        """Whether its holder may still drive the study, as far as one look can tell."""
        return abs(self.age_seconds) < LEASE_SECONDS and not self.holder.is_known_dead()


def in_use(lease: Lease) -> str:
    """Who runs a study, in words for whom the lease is refused."""
    return (
        f"This study is being run by process {lease.holder.pid} on {lease.holder.host}; stop that "
        f"one first (tuner stop), or wait: its lease lapses {LEASE_SECONDS:.0f} s after it dies."
    )


def read_lease(
    connection: sa.Connection, study_id: int | None, *, for_update: bool = False
) -> Lease | None:
    """The lease of a study as the database has it, or None."""
    query = sa.select(lease, now(connection).label("now")).where(lease.c.study_id == study_id)
    row = connection.execute(query.with_for_update() if for_update else query).first()
    if row is None:
        return None
    return Lease(
        token=row.token,
        holder=LeaseHolder(**json.loads(row.holder)),
        renewed_at=row.renewed_at,
        age_seconds=row.now - row.renewed_at,
        stop_requested=row.stop_requested,
    )
