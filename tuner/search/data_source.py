"""Where a study's data lies today: where it was, in a moved project folder, or as named."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from tuner.data.solubility import SOLUBILITY_FILE
from tuner.data.sources import data_suffix, find_source, source_sha256
from tuner.data.sources import source_files as named_files
from tuner.errors import StudyError
from tuner.search.tuned_study import TunedStudy
from tuner.spec.spec import StudySpec


def renew_folder(tuned: TunedStudy, spec: StudySpec) -> TunedStudy:
    """The study with its study file where that was launched now: the folder may have moved.

    The data is the same there (`_refuse_another_study`), so its test rows are, too. The record in
    the storage follows with the other settings that a launch changes.
    """
    old = tuned.record.spec
    if (old.folder, old.data.source) == (spec.folder, spec.data.source):
        return tuned
    moved = old.model_copy(
        update={
            "folder": spec.folder,
            "data": old.data.model_copy(update={"source": spec.data.source}),
        }
    )
    record = dataclasses.replace(tuned.record, spec=moved)
    return dataclasses.replace(tuned, record=record)


def source_files(tuned: TunedStudy, given: Path | None = None) -> tuple[Path, ...]:
    """The files of the study's data, as `tuner.data.sources.source_files` orders them.

    Where they are not where the study file was, they are looked for by their content where that
    file lies if the whole project was moved: below the current folder, and above the artifacts.

    Args:
        tuned: The study.
        given: Where they are said to be: a file, or a folder.

    Returns:
        The files; as they were named, where they are not found. None of synthetic data, nor of the
        data set "solubility" where it lies neither at `given` nor in a folder that was moved.

    Raises:
        StudyError: `given` does not have them.
    """
    record, settings = tuned.record, tuned.record.spec.data
    if record.data.synthetic:
        if given is not None:
            raise StudyError(
                f"--data {given}: the data of study {tuned.name!r} is synthetic; leave it out."
            )
        return ()
    if given is not None:
        return _given_files(tuned, given)
    named = named_files(settings, record.spec.folder)
    if named and all(os.access(file, os.F_OK) for file in named):
        return named
    return find_source(settings, _moved_folders(tuned), record.data.sha256) or named


def _given_files(tuned: TunedStudy, given: Path) -> tuple[Path, ...]:
    """The files of the study's data at a place that the user names.

    Raises:
        StudyError: They are not there.
    """
    settings, sha256 = tuned.record.spec.data, tuned.record.data.sha256
    found: tuple[Path, ...] | None
    try:
        if given.is_dir():
            found = find_source(settings, [given.absolute()], sha256)
        else:
            _refuse_another_kind_of_file(tuned, given)
            found = (given.absolute(),) if source_sha256([given]) == sha256 else None
    except OSError as error:
        raise StudyError(f"--data {given}: {error.strerror or error}.") from error
    if found is None:
        raise StudyError(
            f"--data {given}: the data of study {tuned.name!r} is not there; it is "
            f"{tuned.record.data.source}, with sha256 {sha256}."
        )
    return found


def _refuse_another_kind_of_file(tuned: TunedStudy, given: Path) -> None:
    """The suffix says how a file is read, and a pair is two files.

    Raises:
        StudyError: The file cannot be the study's data.
    """
    named = named_files(tuned.record.spec.data, Path()) or (Path(SOLUBILITY_FILE),)
    suffix = data_suffix(named[0])
    if len(named) == 1 and data_suffix(given) == suffix:
        return
    what = (
        "the folder that holds the files"
        if len(named) > 1
        else f"a {suffix} file, or the folder that holds it"
    )
    raise StudyError(
        f"--data {given}: the data of study {tuned.name!r} is {tuned.record.data.source}; "
        f"name {what}."
    )


def _moved_folders(tuned: TunedStudy) -> Iterator[Path]:
    """Where the study file's folder may be now, if it was moved with all that is around it."""
    parts = tuned.record.spec.folder.parts[1:]
    root = tuned.artifacts.folder.parent.absolute()
    for base in (Path.cwd(), *root.parents[:2]):
        for first in range(len(parts) + 1):
            yield base.joinpath(*parts[first:])
