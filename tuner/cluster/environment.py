"""What of a machine and its programs a training's last bits depend on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from functools import cache

from tuner.cluster.processes import processor_facts
from tuner.train import Environment

#: Instructions that oneDNN and Eigen choose their kernels by, the widest last.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


def environment(threads: int) -> dict[str, str | int]:
    """What computes in this process: names, versions and numbers.

    Args:
        threads: Of one training.
    """
    found: dict[str, str | int] = {
        "python": platform.python_version(),
        **{name: version for name in ("tuner", "numpy", "keras") if (version := _version(name))},
        "tensorflow": _version("tensorflow") or _version("tensorflow-cpu") or "",
        "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", ""),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "instructions": _instructions(),
        "gpu": _gpus(),
        "threads": threads,
    }
    return found


def differences(stored: Environment, here: Environment) -> dict[str, tuple[object, object]]:
    """What two environments differ in: name, and both values; None where one lacks it."""
    names = sorted({*stored, *here} - {"from_epoch"})
    return {
        name: (stored.get(name), here.get(name))
        for name in names
        if stored.get(name) != here.get(name)
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def _processor() -> str:
    return processor_facts().get("model name") or platform.processor() or platform.machine()


@cache
def _instructions() -> str:
    flags = processor_facts().get("flags", "").split()
    return " ".join(name for name in _INSTRUCTIONS if name in flags)


def _gpus() -> str:
    """The names of the GPUs that TensorFlow sees; "" without one, or without TensorFlow."""
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is None:
        return ""
    devices = tensorflow.config.list_physical_devices("GPU")
    details = (tensorflow.config.experimental.get_device_details(one) for one in devices)
    return ", ".join(str(one.get("device_name", "GPU")) for one in details)
