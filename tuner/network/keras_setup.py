"""TensorFlow and Keras, imported here alone, and set by us alone.

What a user keeps for other work must neither change a curve nor end a training: a keras.json
(`~/.keras`, `$KERAS_HOME`), variables of the environment, or settings made in the same process
before or after. So both are imported without them, and `set_keras` sets what Keras reads while a
network is built or traced.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

from tuner.commands import install_command
from tuner.errors import SetupError

_PREFIXES = ("KERAS_", "TF_", "TF2_")
#: Variables with these beginnings stay: they say how the machine is used, not what is computed.
#: `TF_ENABLE_ONEDNN_OPTS` chooses among kernels.
_OF_THE_MACHINE = (
    "TF_CPP_",
    "TF_CUDA",
    "TF_CUDNN_",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_FORCE_GPU_ALLOW_GROWTH",
    "TF_GPU_",
    "TF_NUM_",
    "TF_ONEDNN_",
)


@contextmanager
def _undisturbed_import() -> Iterator[None]:
    """Keeps the user's settings away from an import, and TensorFlow's C++ from writing to stderr.

    Some lines cannot be switched off (TensorFlow 2.19 on, its issue 100442).

    Raises:
        SetupError: The import failed, whatever the reason.
    """
    # From here on nothing but what ends the process: what went wrong is raised as well, and oneDNN
    # calls it an error that it leaves an operation to another kernel.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # For as long as the process lives: TensorFlow reads some of them when they first matter.
    for name in list(os.environ):
        if name.startswith(_PREFIXES) and not name.startswith(_OF_THE_MACHINE):
            del os.environ[name]
    os.environ["KERAS_BACKEND"] = "tensorflow"
    if platform.machine() in ("x86_64", "AMD64"):
        # By itself TensorFlow does so with AVX-512 alone; with AVX2 it is faster, too.
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    # A folder that can be neither read nor made: Keras keeps to its defaults, and writes none.
    os.environ["KERAS_HOME"] = f"{os.devnull}{os.sep}keras"
    stderr, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip() or 'no reason given'}"
        # pip leaves what is damaged as it is.
        first = "" if isinstance(error, ModuleNotFoundError) else "Uninstall them. "
        raise SetupError(
            f"TensorFlow and Keras cannot be imported here ({reason.splitlines()[0][:300]}). "
            f"{first}Install the extra cpu, `{install_command('cpu')}`, or gpu, "
            f"`{install_command('gpu')}`, in this environment."
        ) from error
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nothing)
        del os.environ["KERAS_HOME"]


with _undisturbed_import():
    import keras
    import tensorflow as tf
    from keras import layers, ops

__all__ = ["keras", "layers", "memory_errors", "ops", "set_keras", "tf"]


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raises Python's MemoryError where TensorFlow has its own."""
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        raise MemoryError((str(error) or type(error).__name__).splitlines()[0]) from error


def set_keras() -> None:
    """Sets all that Keras keeps for the whole process and reads while a network is made.

    Called before a network is built and before its graphs are traced, as any code of the process
    may have set something else since.

    Raises:
        SetupError: Keras does not compute with TensorFlow, or TensorFlow not eagerly: something
            imported or set it before us, and that cannot be changed any more.
    """
    backend = keras.config.backend()
    if backend != "tensorflow":
        raise SetupError(
            f"Keras computes with {backend!r} in this process, and these networks need "
            "'tensorflow': something imported Keras before (in a notebook, an earlier cell; else "
            "sitecustomize). Import tuner first, or set KERAS_BACKEND=tensorflow there."
        )
    if not tf.executing_eagerly():
        raise SetupError(
            "TensorFlow does not run eagerly in this process: something imported it before with "
            "TF2_BEHAVIOR=0, or called disable_eager_execution or disable_v2_behavior. Leave that "
            "away where tuner runs."
        )
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")
    keras.config.set_dtype_policy("float32")  # of layers that name none; per thread
    tf.config.run_functions_eagerly(False)
    tf.config.optimizer.set_jit(False)


set_keras()
