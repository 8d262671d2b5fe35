"""What a result was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

#: Instructions that decide how fast a network trains.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def processor() -> str:
    """The processor's name, its cores that this process may use, and what it has of those above."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.processor() or platform.machine()}, {cores} cores"
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    told = {key.strip(): value.strip() for key, value in told.items()}
    has = [name for name in _INSTRUCTIONS if name in told.get("flags", "").split()]
    return f"{told.get('model name', platform.machine())}, {cores} cores ({', '.join(has)})"
