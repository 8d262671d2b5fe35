"""TensorBoard's event files, by TensorFlow's own writer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tuner.network.keras_setup import tf


def write_run(
    folder: Path,
    scalars: Iterable[tuple[int, Mapping[str, float]]],
    *,
    texts: Mapping[str, str],
    hyperparameters: Mapping[str, Any],
) -> bool:
    """Writes one run.

    Args:
        folder: New or empty.
        scalars: For each step its values by name.
        texts: Markdown by name.
        hyperparameters: For the tab of that name, which needs the package `tensorboard`.

    Returns:
        Whether `tensorboard` is installed, so that the hyperparameters were written.

    Raises:
        OSError: It cannot be written.
    """
    # `tf.summary.scalar` and `text` do the same, but need `tensorboard`.
    scalar = _metadata("scalars", "DATA_CLASS_SCALAR")
    text = _metadata("text", "DATA_CLASS_TENSOR")
    try:
        writer = tf.summary.create_file_writer(str(folder))
        with writer.as_default():
            for step, values in scalars:
                for name, value in values.items():
                    tf.summary.write(name, tf.constant(value, tf.float32), step, scalar)
            for name, words in texts.items():
                tf.summary.write(name, tf.constant(words), 0, text)
            has_hyperparameters = _write_hyperparameters(hyperparameters)
        writer.close()
    except tf.errors.OpError as error:
        raise OSError(None, str(error.message)) from error
    return has_hyperparameters


def _metadata(plugin: str, kind: str) -> Any:
    """Which of TensorBoard's plugins shows a value."""
    made = tf.compat.v1.SummaryMetadata(data_class=kind)
    made.plugin_data.plugin_name = plugin
    return made


def _write_hyperparameters(values: Mapping[str, Any]) -> bool:
    try:
        from tensorboard.plugins.hparams import api  # noqa: PLC0415 - not everybody has it
    except ImportError:
        return False
    api.hparams(dict(values))
    return True
