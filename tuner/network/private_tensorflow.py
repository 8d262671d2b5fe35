"""What of TensorFlow is used that it does not promise to keep: here alone.

`tests/unit/network/test_private_tensorflow.py` says what to do where it has moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tuner.network.keras_setup  # noqa: F401 - first of all who import TensorFlow

from tensorflow.python.eager import record  # isort: skip


def with_gradient(
    recipe: Callable[..., tuple[list[Any], Callable[..., tuple[Any, ...]]]], *inputs: Any
) -> list[Any]:
    """The outputs of `recipe(*inputs)`, with its gradient for the tape.

    `tf.custom_gradient` also registers the gradient with TensorFlow permanently, and with it keeps
    the graph of every trial in memory.

    Args:
        recipe: Returns outputs, and what computes from the gradients towards them those towards
            the inputs.
        inputs: Tensors.
    """
    with record.stop_recording():
        outputs, gradient = recipe(*inputs)
    record.record_operation("tuner", outputs, list(inputs), gradient)
    return outputs
