"""What `tuner.network.private_tensorflow` takes of TensorFlow is there, and nothing else is taken.

Where a test fails after an upgrade of TensorFlow, `record` has moved: search TensorFlow's
`custom_gradient.py` for what records an operation. If it is gone, `tf.custom_gradient` computes the
same, and a worker grows by the graphs of every trial.
"""

from __future__ import annotations

import re
from typing import Any

from folders import ROOT

from tuner.network.keras_setup import tf
from tuner.network.private_tensorflow import with_gradient


def test_a_recorded_gradient_is_the_one_that_the_tape_takes() -> None:
    def recipe(x: Any) -> Any:
        return [x * x], lambda dy: (dy * 100.0,)  # not the gradient of x * x

    @tf.function
    def in_a_graph(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            (y,) = with_gradient(recipe, x)
        return y, tape.gradient(y, x)

    y, gradient = in_a_graph(tf.constant(3.0))
    assert (float(y), float(gradient)) == (9.0, 100.0)


def test_private_names_of_tensorflow_and_keras_are_imported_in_one_place() -> None:
    private = re.compile(r"tensorflow\.python|keras\.src|tf\.__internal__")
    found = [
        path.name for path in (ROOT / "tuner").rglob("*.py") if private.search(path.read_text())
    ]
    assert found == ["private_tensorflow.py"]
