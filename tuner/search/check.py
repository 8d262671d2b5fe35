"""What is said of a study file before its study runs, by `tuner check` and by the dashboard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

from tuner.data.audit.report import ShortAudit, short_audit
from tuner.data.prepare import Prepared
from tuner.errors import DataError, ProblemsError, SetupError, counted
from tuner.spec.bounds import parameter_counts
from tuner.spec.spec import StudySpec


def check_document(
    spec: StudySpec,
    prepared: Prepared,
    shared: Sequence[str],
    twins: ShortAudit | None = None,
) -> dict[str, Any]:
    """What the study of a valid study file would do, ready for JSON.

    Args:
        spec: The study file.
        prepared: Its data.
        shared: Warnings about rows that other studies keep sealed.
        twins: Near-twins among its rows, where they were counted.
    """
    return {
        "study": spec.name,
        "valid": True,
        "errors": [],
        "brackets": [list(bracket) for bracket in spec.brackets],
        "trials_of_brackets": list(spec.trials_of_brackets(spec.trials)),
        "rungs": list(spec.rungs),
        "max_epochs": spec.training.max_epochs,
        "planned_epochs": spec.planned_epochs,
        "trials": spec.trials,
        "searched": list(spec.space.parameters),
        "parameter_count": parameter_counts(spec.space, spec.data.max_length),
        "data": prepared.identity.check_document(),
        "split": spec.data.split.in_words,
        "near_twins": None if twins is None else twins.to_document(),
        "warnings": [*prepared.all_warnings, *shared],
        "spec_hash": spec.spec_hash,
        "spec": spec.to_document(),
    }


def count_near_twins(
    spec: StudySpec, prepared: Prepared, artifacts: Path, *, say: Callable[[str], object]
) -> ShortAudit | None:
    """Near-twins among a study's rows, where they can be counted in seconds and say something.

    Args:
        spec: The study file.
        prepared: Its data.
        artifacts: Where counts are kept.
        say: Is told why they were not counted.
    """
    if prepared.identity.synthetic:
        return None
    try:
        return short_audit(spec.data, prepared.identity, folder=spec.folder, artifacts=artifacts)
    except (SetupError, DataError) as error:
        say(f"Near-twins were not counted. {error}")
        return None


def invalid_document(file: str, error: ProblemsError) -> dict[str, Any]:
    """Every mistake of a study file or of its data, ready for JSON.

    Args:
        file: The study file's name; without its suffix it stands for the study's.
        error: Its mistakes.
    """
    return {"study": PurePath(file).stem, "valid": False, "errors": error.to_document()}


def brackets_in_words(spec: StudySpec) -> tuple[str, ...]:
    """How many trials each bracket of Hyperband has, and after which epochs it may prune them."""
    found = []
    for rungs, trials in zip(spec.brackets, spec.trials_of_brackets(spec.trials), strict=True):
        pruned = f"may be pruned after epoch {' or '.join(map(str, rungs))}"
        found.append(f"{counted(trials, 'trial')}, {pruned if rungs else 'never pruned'}")
    return tuple(found)
