"""The searches of benchmarks/time_to_quality.py that a user would otherwise write.

Each tunes the plain network of plain_keras.py over the space below, as its documentation shows:

    median, hyperband   Optuna's tutorials "Efficient Optimization Algorithms" and "Easy
                        Parallelization" and its Keras example: TPE, MedianPruner or
                        HyperbandPruner, KerasPruningCallback, two processes on one SQLite file
    kerastuner          KerasTuner's "Getting started" with its Hyperband tuner, in one process
    ray                 Ray Tune's "Using Keras & TensorFlow with Tune", page on OptunaSearch:
                        ASHA, one core a trial

Data, early stopping (patience 8 on the validation loss) and 27 epochs at most are the same for all.
Every finished epoch is a JSON line in the file --log: time, trial, validation loss.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

PATIENCE = 8  # a study file's default
MAX_EPOCHS = 27


class Choose(Protocol):
    """How a library offers parameters."""

    def number(self, name: str, low: int, high: int, step: int = 1) -> int: ...

    def real(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def one_of(self, name: str, values: list[Any]) -> Any: ...


def suggest(choose: Choose) -> dict[str, Any]:
    """The space of time_to_quality.py's study, as a configuration for `plain_keras.build`."""
    blocks = [
        {
            "kernel_size": choose.number(f"block{n}.kernel_size", 3, 11, 2),
            "filters": choose.one_of(f"block{n}.filters", [16, 32, 64]),
            "padding": "same",
            "normalization": choose.one_of(f"block{n}.normalization", ["none", "batch"]),
            "activation": "relu",
            "pool_size": 4 if n == 1 else choose.number(f"block{n}.pool_size", 2, 4),
            "conv_dropout": choose.real(f"block{n}.conv_dropout", 0.0, 0.3),
            "conv_l2": choose.real(f"block{n}.conv_l2", 1e-6, 1e-2, log=True),
        }
        for n in range(1, choose.number("blocks", 1, 3) + 1)
    ]
    return {
        "embedding_dim": choose.one_of("embedding_dim", [8, 16, 32]),
        "blocks": blocks,
        "head": choose.one_of("head", ["global_max", "global_average"]),
        "dense": [
            {
                "units": choose.one_of("dense1.units", [32, 64, 128]),
                "activation": "relu",
                "dense_dropout": choose.real("dense1.dense_dropout", 0.05, 0.35),
                "dense_l2": choose.real("dense1.dense_l2", 1e-6, 1e-2, log=True),
            }
        ],
        "output_dropout": 0.0,
        "learning_rate": choose.real("learning_rate", 3e-4, 5e-3, log=True),
        "batch_size": choose.one_of("batch_size", [32, 64, 128]),
    }


class OfOptuna:
    def __init__(self, trial: Any) -> None:
        self._trial = trial

    def number(self, name: str, low: int, high: int, step: int = 1) -> int:
        return int(self._trial.suggest_int(name, low, high, step=step))

    def real(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._trial.suggest_float(name, low, high, log=log))

    def one_of(self, name: str, values: list[Any]) -> Any:
        return self._trial.suggest_categorical(name, values)


class OfKerasTuner:
    def __init__(self, parameters: Any) -> None:
        self._parameters = parameters

    def number(self, name: str, low: int, high: int, step: int = 1) -> int:
        return int(self._parameters.Int(name, low, high, step=step))

    def real(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        sampling = "log" if log else "linear"
        return float(self._parameters.Float(name, low, high, sampling=sampling))

    def one_of(self, name: str, values: list[Any]) -> Any:
        return self._parameters.Choice(name, values)


class Given:
    """Answers with what was sampled."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def number(self, name: str, low: int, high: int, step: int = 1) -> int:
        return int(self._values[name])

    def real(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(self._values[name])

    def one_of(self, name: str, values: list[Any]) -> Any:
        return self._values[name]


def ray_space(trial: Any) -> None:
    """Stored by Ray with its search, so it must have a name."""
    suggest(OfOptuna(trial))


def append(log: Path, trial: str, loss: float) -> None:
    line = json.dumps({"at": time.time(), "trial": trial, "loss": loss}) + "\n"
    with log.open("a") as file:
        file.write(line)


def compiled(config: dict[str, Any], max_length: int) -> Any:
    import keras
    from plain_keras import build

    model = build(config, max_length)
    model.compile(
        keras.optimizers.Adam(config["learning_rate"]),
        loss="binary_crossentropy",
        metrics=["accuracy", keras.metrics.BinaryCrossentropy(name="cross_entropy")],
    )
    return model


def fit(
    config: dict[str, Any],
    rows: Path,
    on_epoch: Callable[[float], None],
    callbacks: list[Any],
) -> float:
    """Trains one network; the best validation loss."""
    import keras
    from plain_keras import datasets

    training, validation = datasets(rows, config["batch_size"], prefetch=True)
    model = compiled(config, training.element_spec[0].shape[1])
    told = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: on_epoch(float(logs["val_cross_entropy"]))
    )
    stopping = keras.callbacks.EarlyStopping("val_cross_entropy", mode="min", patience=PATIENCE)
    history = model.fit(
        training,
        validation_data=validation,
        epochs=MAX_EPOCHS,
        verbose=0,
        callbacks=[told, stopping, *callbacks],
    )
    return float(min(history.history["val_cross_entropy"]))


def by_optuna(options: argparse.Namespace) -> None:
    import keras
    import optuna
    from optuna_integration import KerasPruningCallback

    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def objective(trial: optuna.Trial) -> float:
        keras.backend.clear_session()
        keras.utils.set_random_seed(1000 * options.seed + trial.number)
        return fit(
            suggest(OfOptuna(trial)),
            options.rows,
            lambda loss: append(options.log, str(trial.number), loss),
            [KerasPruningCallback(trial, "val_cross_entropy")],
        )

    storage = f"sqlite:///{options.folder}/optuna.db"
    pruner = {
        "median": optuna.pruners.MedianPruner(),
        "hyperband": optuna.pruners.HyperbandPruner(
            min_resource=1, max_resource=MAX_EPOCHS, reduction_factor=3
        ),
    }[options.who]
    study = optuna.create_study(
        study_name="peer",
        storage=storage,
        load_if_exists=True,
        direction="minimize",
        sampler=optuna.samplers.TPESampler(seed=2 * options.seed + options.worker),
        pruner=pruner,
    )
    study.optimize(objective, timeout=options.seconds)


def by_kerastuner(options: argparse.Namespace) -> None:
    import keras
    import keras_tuner
    from plain_keras import datasets

    max_length = datasets(options.rows, 32, prefetch=True)[0].element_spec[0].shape[1]

    class Network(keras_tuner.HyperModel):
        trained = 0

        def build(self, hp: Any) -> Any:
            return compiled(suggest(OfKerasTuner(hp)), max_length)

        def fit(self, hp: Any, model: Any, *arguments: Any, **named: Any) -> Any:
            training, validation = datasets(options.rows, hp.get("batch_size"), prefetch=True)
            self.trained += 1
            trial = str(self.trained)
            log = keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: append(
                    options.log, trial, float(logs["val_cross_entropy"])
                )
            )
            named["callbacks"] = [*named["callbacks"], log]
            return model.fit(training, validation_data=validation, **named)

    tuner = keras_tuner.Hyperband(
        Network(),
        objective=keras_tuner.Objective("val_cross_entropy", "min"),
        max_epochs=MAX_EPOCHS,
        factor=3,
        hyperband_iterations=100,
        seed=options.seed,
        directory=options.folder,
        project_name="peer",
    )
    stopping = keras.callbacks.EarlyStopping("val_cross_entropy", mode="min", patience=PATIENCE)
    tuner.search(callbacks=[stopping], verbose=0)


def by_ray(options: argparse.Namespace) -> None:
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    here = str(Path(__file__).resolve().parent)

    def trainable(values: dict[str, Any]) -> None:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        trial = tune.get_context().get_trial_id()

        def told(loss: float) -> None:
            append(options.log, trial, loss)
            tune.report({"loss": loss})

        fit(suggest(Given(values)), options.rows, told, [])

    ray.init(
        num_cpus=options.cores,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": here, "TF_CPP_MIN_LOG_LEVEL": "3"}},
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            scheduler=ASHAScheduler(max_t=MAX_EPOCHS, grace_period=1, reduction_factor=3),
            search_alg=OptunaSearch(space=ray_space, metric="loss", mode="min", seed=options.seed),
            num_samples=-1,
            time_budget_s=options.seconds,
            max_concurrent_trials=options.cores,
        ),
        run_config=tune.RunConfig(storage_path=str(options.folder), verbose=0),
    )
    tuner.fit()


SEARCHES = {"median": by_optuna, "hyperband": by_optuna, "kerastuner": by_kerastuner, "ray": by_ray}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("who", choices=SEARCHES)
    parser.add_argument("--rows", type=Path, required=True, help="a development file")
    parser.add_argument("--folder", type=Path, required=True, help="for what it keeps")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--worker", type=int, help="which of Optuna's processes this one is")
    options = parser.parse_args()
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    if SEARCHES[options.who] is by_optuna and options.worker is None:
        import optuna

        optuna.storages.RDBStorage(f"sqlite:///{options.folder}/optuna.db")  # makes the tables
        running = [
            subprocess.Popen([*sys.orig_argv, "--worker", str(worker)])
            for worker in range(options.cores)
        ]
        for process in running:
            process.wait()
    else:
        SEARCHES[options.who](options)


if __name__ == "__main__":
    main()
