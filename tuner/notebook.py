"""The interface for notebooks, also imported as `from tuner import ...`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import optuna

from tuner.artifacts import DEFAULT_ROOT, DEFAULT_STORAGE_URL
from tuner.data.development import load_development
from tuner.data.prepare import prepare
from tuner.results.bundle import Bundle, read_bundle
from tuner.search.hyperband import make_pruner
from tuner.search.objective import Objective
from tuner.search.sampler import make_sampler
from tuner.search.study import load
from tuner.search.tuned_study import TunedStudy
from tuner.spec.reader import load_spec
from tuner.spec.spec import StudySpec
from tuner.storage.storage import Storage


def load_study_file(path: str | Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Reads a study file.

    Args:
        path: A TOML, JSON or YAML file.
        overrides: What `--set` takes, such as "data.split.seed=2".

    Raises:
        SpecError: With all mistakes of the file and the overrides.
    """
    return load_spec(Path(path), overrides)


def load_bundle(path: str | Path) -> Bundle:
    """Reads a bundle that `tuner export NAME --model` wrote; its checksums are verified.

    `bundle.predict(["MKV...", ...])` gives float64 [n], the probability of each sequence of being
    soluble.

    Args:
        path: The folder, or the zip file.

    Raises:
        BundleError: It is not a bundle, damaged, or of a later version.
    """
    return read_bundle(Path(path))


def local_objective(spec: StudySpec, *, artifacts: str | Path = DEFAULT_ROOT) -> Objective:
    """An Optuna objective that trains in this process.

    Its value is the best validation loss (mean binary cross-entropy, nats). The data is read,
    checked and split first; the test rows are not loaded.

    Args:
        spec: The study file, from `load_study_file`.
        artifacts: The folder for the development file (training and validation rows).

    Raises:
        DataError: With all problems of the data.
    """
    from tuner.network.fold_runs import LocalTraining  # noqa: PLC0415 - TensorFlow takes seconds

    prepared = prepare(
        spec.data, folder=spec.folder, artifacts=Path(artifacts), sha256=spec.data_sha256
    )
    return Objective(spec, LocalTraining(load_development(prepared.development_file)))


def new_study(spec: StudySpec) -> optuna.Study:
    """A study in memory with the file's sampler and pruner, for `study.optimize`."""
    return optuna.create_study(
        study_name=spec.name, sampler=make_sampler(spec), pruner=make_pruner(spec)
    )


@contextlib.contextmanager
def open_study(
    name: str,
    *,
    storage: str = DEFAULT_STORAGE_URL,
    artifacts: str | Path = DEFAULT_ROOT,
) -> Iterator[TunedStudy]:
    """Opens a study that `tuner launch` made; a context manager.

    `tuned.study` is the Optuna study, `tuned.ranked()` the fully trained trials, best first.

    Args:
        name: The study's name.
        storage: The database's URL.
        artifacts: The artifacts root that the study was launched with.

    Raises:
        StudyError: The storage holds no study of this name.
        StorageError: The database cannot be reached, or its schema is another version's.
    """
    with Storage(storage, create=False) as opened:
        yield load(opened, name, artifacts_root=Path(artifacts))
