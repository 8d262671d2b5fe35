"""Which process holds a lease, and whether it is known to be dead."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseHolder:
    """The process that runs a study."""

    host: str  #: its name, for messages
    pid: int  #: on that host
    machine: str = ""  #: unlike the host's name, unique to where a pid means one process
    started: float = 0.0  #: when that process began, in seconds since boot: pids are used again

    @classmethod
    def this_process(cls) -> LeaseHolder:
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_this_machine(),
            started=_started(os.getpid()),
        )

    def is_known_dead(self) -> bool:
        """True if the process ran on this machine and is gone; False if that cannot be told."""
        if self.machine != _this_machine():
            return False
        try:
            return abs(_started(self.pid) - self.started) > 1.0
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return True
        except (psutil.AccessDenied, PermissionError):
            return False


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
