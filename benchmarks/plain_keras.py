"""What a user writes without the tuner: the network in plain Keras, trained by `model.fit`.

The peer of benchmarks/throughput.py, which starts it; it knows nothing of the tuner.
Where each part comes from:

- the data as the text-book chapter has it: `tf.data` from tensors, `shuffle(1000)`, `batch`;
  with --prefetch also what TensorFlow's guide "Better performance with the tf.data API" adds,
  and `steps_per_execution` of Keras' `Model.compile`;
- the layers with the mask that the chapter's embedding makes (Keras' convolutions drop it);
- objective and pruning callback as Optuna's tutorial and its Keras example have them
  (optuna-integration, `KerasPruningCallback`), storage and parallel processes as its page "Easy
  Parallelization": several processes that share one database.

Prints a JSON line for each trial: number, seconds since the epoch at its start and end, and the
validation loss of each epoch.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import optuna
import tensorflow as tf
from keras import layers
from optuna_integration import KerasPruningCallback


def datasets(rows: Path, batch_size: int, *, prefetch: bool) -> tuple[Any, Any]:
    """Training and validation rows of a development file, as the chapter feeds them."""
    with np.load(rows) as saved:
        training, validation = (
            tf.data.Dataset.from_tensor_slices(
                (
                    saved[f"{split}_tokens"].astype("int64"),
                    saved[f"{split}_labels"].astype("int64")[:, None],
                )
            )
            for split in ("training", "validation")
        )
    training = training.shuffle(1000).batch(batch_size)
    validation = validation.batch(batch_size)
    if prefetch:
        training, validation = (part.prefetch(tf.data.AUTOTUNE) for part in (training, validation))
    return training, validation


def build(config: dict[str, Any], max_length: int) -> keras.Model:
    """The stacked network of a configuration (the fields of `ModelConfig`), uncompiled."""
    model = keras.Sequential([keras.Input((max_length,))])
    model.add(layers.Embedding(21, config["embedding_dim"], mask_zero=True))
    for block in config["blocks"]:
        model.add(
            layers.Conv1D(
                block["filters"],
                block["kernel_size"],
                padding=block["padding"],
                kernel_regularizer=regularizer(block["conv_l2"]),
            )
        )
        if block["normalization"] == "batch":
            model.add(layers.BatchNormalization())
        elif block["normalization"] == "layer":
            model.add(layers.LayerNormalization())
        model.add(layers.Activation(block["activation"]))
        model.add(layers.MaxPooling1D(block["pool_size"]))
        if block["conv_dropout"]:
            model.add(layers.Dropout(block["conv_dropout"]))
    head = {
        "flatten": layers.Flatten,
        "global_max": layers.GlobalMaxPooling1D,
        "global_average": layers.GlobalAveragePooling1D,
    }
    model.add(head[config["head"]]())
    for dense in config["dense"]:
        if dense["dense_dropout"]:
            model.add(layers.Dropout(dense["dense_dropout"]))
        model.add(
            layers.Dense(
                dense["units"],
                activation=dense["activation"],
                kernel_regularizer=regularizer(dense["dense_l2"]),
            )
        )
    if config["output_dropout"]:
        model.add(layers.Dropout(config["output_dropout"]))
    model.add(layers.Dense(1, activation="sigmoid"))
    return model


def regularizer(l2: float) -> Any:
    return keras.regularizers.L2(l2) if l2 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=json.loads, required=True, help="ModelConfig as JSON")
    parser.add_argument("--rows", type=Path, required=True, help="a development file")
    parser.add_argument("--storage", required=True)
    parser.add_argument("--study", required=True)
    parser.add_argument("--trials", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--prefetch", action="store_true", help="the tuned data pipeline")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    config = options.config

    def objective(trial: optuna.Trial) -> float:
        began = time.time()
        keras.backend.clear_session()
        keras.utils.set_random_seed(trial.number)
        training, validation = datasets(
            options.rows, config["batch_size"], prefetch=options.prefetch
        )
        model = build(config, training.element_spec[0].shape[1])
        model.compile(
            keras.optimizers.Adam(config["learning_rate"]),
            loss="binary_crossentropy",
            # `val_loss` holds the penalties; losses that are compared must not.
            metrics=["accuracy", keras.metrics.BinaryCrossentropy(name="cross_entropy")],
            steps_per_execution=32 if options.prefetch else 1,
        )
        result = model.fit(
            training,
            validation_data=validation,
            epochs=options.epochs,
            verbose=0,
            callbacks=[KerasPruningCallback(trial, "val_cross_entropy")],
        )
        losses = result.history["val_cross_entropy"]
        row = {"trial": trial.number, "began": began, "ended": time.time()}
        print(json.dumps(row | {"validation_losses": losses}), flush=True)
        return float(min(losses))

    study = optuna.create_study(
        study_name=options.study,
        storage=options.storage,
        load_if_exists=True,
        direction="minimize",
        pruner=optuna.pruners.NopPruner(),
    )
    study.optimize(objective, n_trials=options.trials)


if __name__ == "__main__":
    main()
