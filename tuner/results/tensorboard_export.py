"""The trials of a study for TensorBoard: a folder of event files for each."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from tuner.artifacts import make_folder
from tuner.errors import TunerError
from tuner.results.runs import Run, Watch, runs_of
from tuner.search.tuned_study import TunedStudy


def export_to_tensorboard(
    tuned: TunedStudy, folder: Path, *, watch: Watch = iter
) -> tuple[int, bool]:
    """Writes `folder/STUDY/trial-N` for each trial; those of an earlier export are replaced.

    Args:
        tuned: The study.
        folder: Where to; it is made if it is missing.
        watch: Shows the progress.

    Returns:
        The number of trials, and whether their hyperparameters could be written.

    Raises:
        TunerError: It cannot be written.
        SetupError: TensorFlow is missing.
    """
    count, has_hyperparameters = 0, True
    try:
        for run in watch(runs_of(tuned)):
            place = folder / tuned.name / f"trial-{run.trial:04}"
            has_hyperparameters = _write(run, place) and has_hyperparameters
            count += 1
    except OSError as error:
        raise TunerError(
            f"{folder}: the curves cannot be written ({error.strerror or error}); name another "
            "folder."
        ) from error
    return count, has_hyperparameters


def _write(run: Run, place: Path) -> bool:
    """Writes one run: beside its place, and then there."""
    from tuner.network.summaries import write_run  # noqa: PLC0415 - TensorFlow takes seconds

    make_folder(place.parent, private=False)
    beside = place.with_name(f".{place.name}-{uuid.uuid4().hex}.new")
    try:
        has_hyperparameters = write_run(
            beside,
            [(epoch.epoch, values) for epoch, values in run.curve],
            texts={"study file": f"```toml\n{run.study_file}```", "note": run.note},
            hyperparameters=run.parameters,
        )
        if place.exists():
            shutil.rmtree(place)
        os.replace(beside, place)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return has_hyperparameters
