"""The best configurations of a study, each as a study file that trains its network again."""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any, Literal

import tomli_w
import yaml
from optuna.trial import FrozenTrial, TrialState

from tuner.artifacts import publish, require_writable
from tuner.data.sources import name_from
from tuner.errors import StudyError, TunerError
from tuner.search.attributes import AUDITED_KEY, DETAIL_KEY, ENDED_KEY, RESUMED_KEY, curve_of
from tuner.search.confirmation import confirmed_means
from tuner.search.data_source import source_files
from tuner.search.record import StudyRecord
from tuner.search.status import figures_in
from tuner.search.tuned_study import TunedStudy
from tuner.spec.architecture import ModelConfig
from tuner.spec.schema import SCHEMA_LINE
from tuner.spec.space import space_of
from tuner.spec.spec import derived_name
from tuner.train import ACCURACY_KEY, BEST_EPOCH_KEY, PARAMETERS_KEY, ROC_AUC_KEY, SECONDS_KEY

Format = Literal["toml", "json", "yaml"]
#: By the suffix of a study file, as `tuner.spec.reader.load_spec` reads it.
_FORMATS: Mapping[str, Format] = {".toml": "toml", ".json": "json", ".yaml": "yaml", ".yml": "yaml"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedConfig:
    """The configuration of one trial."""

    rank: int | None  #: from 1, by validation loss; None of a trial that was asked for by number
    trial: int
    validation_loss: float | None  #: nats, of the best epoch; None where no epoch was completed
    confirmed_mean: float | None  #: of fresh seeds, nats; None where it was not confirmed
    epochs: int  #: completed epochs
    figures: Mapping[str, float | None]  #: see `tuner.search.status.figures_in`
    sampled: Mapping[str, Any]  #: what was searched, by its name in the study file
    config: ModelConfig
    provenance: Mapping[str, Any]  #: the file's table of that name
    document: Mapping[str, Any]  #: the study file, with its data beside it
    files: tuple[Path, ...]  #: its data on this machine; none of "solubility" and synthetic data

    def to_document(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "trial": self.trial,
            "validation_loss": self.validation_loss,
            "confirmed_mean": self.confirmed_mean,
            "epochs": self.epochs,
            **self.figures,
            "sampled": dict(self.sampled),
            "config": dataclasses.asdict(self.config),
            "provenance": dict(self.provenance),
        }

    def document_in(self, folder: Path) -> dict[str, Any]:
        """The study file for a folder: its data is named from there."""
        source = self.document["data"]["source"]
        named: str | dict[str, str]
        if isinstance(source, str):
            named = next((name_from(folder, file, source) for file in self.files), source)
        else:
            pair = zip(source.items(), self.files, strict=True)
            named = {key: name_from(folder, file, name) for (key, name), file in pair}
        return {**self.document, "data": {**self.document["data"], "source": named}}


def require_ranked(tuned: TunedStudy) -> list[FrozenTrial]:
    """Fully trained trials, best first: at least one.

    Raises:
        StudyError: No trial was trained to its end yet.
    """
    ranked = tuned.ranked()
    if not ranked:
        raise StudyError(
            f"Study {tuned.name!r} has no fully trained trial yet, so there is nothing to export; "
            "launch it again to resume it."
        )
    return ranked


def best_configs(
    tuned: TunedStudy, top: int = 1, *, data: Path | None = None
) -> tuple[ExportedConfig, ...]:
    """The `top` fully trained trials with the lowest validation loss, best first.

    Once the study was confirmed, its best trials come first, in the order of their means.

    Args:
        tuned: The study.
        top: How many.
        data: Where its data is, see `tuner.search.data_source.source_files`.

    Raises:
        StudyError: No trial was trained to its end yet, or the data is not at `data`.
    """
    ranked = require_ranked(tuned)
    files = _source_files(tuned, data)
    means = confirmed_means(tuned)
    ranked.sort(key=lambda trial: means.get(trial.number, math.inf))  # others stay behind them
    return tuple(
        replace(_exported(tuned, rank, trial, files), confirmed_mean=means.get(trial.number))
        for rank, trial in enumerate(ranked[:top], start=1)
    )


def config_of_trial(tuned: TunedStudy, number: int, *, data: Path | None = None) -> ExportedConfig:
    """The configuration of any trial, whatever became of it.

    Args:
        tuned: The study.
        number: Of the trial.
        data: Where the study's data is, see `tuner.search.data_source.source_files`.

    Raises:
        StudyError: There is no such trial, nothing was sampled for it yet, or the data is not at
            `data`.
    """
    trials = tuned.trials()
    trial = next((one for one in trials if one.number == number), None)
    if trial is None:
        known = f"0 to {len(trials) - 1}" if trials else "none yet"
        raise StudyError(f"Study {tuned.name!r} has no trial {number}; its trials are: {known}.")
    if trial.state == TrialState.WAITING:
        raise StudyError(
            f"Trial {number} of study {tuned.name!r} waits to be started, so its configuration "
            "is not sampled yet; launch the study to resume it."
        )
    return _exported(tuned, None, trial, _source_files(tuned, data))


def configs_of(tuned: TunedStudy, trials: Iterable[FrozenTrial]) -> Iterator[ExportedConfig]:
    """The configurations of trials that were started, in their order."""
    files = _source_files(tuned, None)
    for trial in trials:
        yield _exported(tuned, None, trial, files)


def config_hash(config: ModelConfig) -> str:
    """sha256 of a resolved configuration."""
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _source_files(tuned: TunedStudy, data: Path | None) -> tuple[Path, ...]:
    # The data set "solubility" is found by that name on every machine.
    if data is None and tuned.record.spec.data.source == "solubility":
        return ()
    return source_files(tuned, data)


def _exported(
    tuned: TunedStudy, rank: int | None, trial: FrozenTrial, files: tuple[Path, ...]
) -> ExportedConfig:
    record, spec = tuned.record, tuned.record.spec
    config = spec.space.resolve(trial.params)
    best = min(curve_of(trial), key=lambda epoch: epoch.validation_loss, default=None)
    reported = min(trial.intermediate_values.values(), default=None)
    loss = reported if trial.value is None else trial.value
    provenance = {
        "study": tuned.name,
        "trial": trial.number,
        "validation_loss": loss,
        "validation_accuracy": None if best is None else best.validation_accuracy,
        "validation_roc_auc": None if best is None else best.validation_roc_auc,
        "fold_losses": None if best is None or best.fold_losses is None else [*best.fold_losses],
        "best_epoch": None if best is None else best.epoch,
        "state": trial.state.name,
        "epochs": trial.last_step or 0,
        "seed": spec.seed,
        "spec_hash": record.spec_hash,
        "config_hash": config_hash(config),
        "precision": tuned.precision_of(config),
        # A path of this machine says nothing on another: the data is known by its hash.
        "data": {**record.data.to_document(), "source": _without_folders(record.data.source)},
        "development_sha256": record.development_sha256,
        "versions": dict(record.versions),
        "study_created_at": record.created_at,
        "synthetic": record.data.synthetic,
    }
    provenance = {key: value for key, value in provenance.items() if value is not None}
    return ExportedConfig(
        rank=rank,
        trial=trial.number,
        validation_loss=loss,
        confirmed_mean=None,
        epochs=trial.last_step or 0,
        figures=figures_in(trial),
        sampled=trial.params,
        config=config,
        provenance=provenance,
        document=_study_file(tuned, trial, config, provenance, files),
        files=files,
    )


def _study_file(
    tuned: TunedStudy,
    trial: FrozenTrial,
    config: ModelConfig,
    provenance: Mapping[str, Any],
    files: tuple[Path, ...],
) -> dict[str, Any]:
    """A study of one trial that trains this trial's network again, bit for bit."""
    record = tuned.record
    document = record.spec.to_document()
    for key in ("hyperband", "stop", "notify", "confirm", "known"):
        document.pop(key, None)
    document |= {
        "name": name_of_trial(tuned.name, trial.number),
        "trials": 1,
        "sampler": {"kind": "random"},
        "space": space_of(config),
        "provenance": dict(provenance),
    }
    document["training"] |= {
        "as_trial": record.spec.training.seeded_as(trial.number),
        "precision": tuned.precision_of(config),
    }
    document["data"].pop("fallback", None)
    document["data"]["source"] = _source(record, files)
    return document


def name_of_trial(study: str, number: int) -> str:
    """The name of the study that trains one trial of `study` again."""
    return derived_name(study, f"trial-{number}")


def _source(record: StudyRecord, files: tuple[Path, ...]) -> str | dict[str, str]:
    """The study file's `data.source` where the data lies beside it."""
    source = record.spec.data.source
    if record.data.synthetic:
        return "synthetic"
    if not files and isinstance(source, str):
        return source
    names = [file.name for file in files]
    if isinstance(source, str):
        return names[0]
    return dict(zip(source.model_dump(), names, strict=True))


def _without_folders(source: str) -> str:
    """What `DataIdentity.source` tells, without folders of this machine."""
    return ", ".join(
        PurePath(name).name if PurePath(name).is_absolute() or name.startswith("~/") else name
        for name in source.split(", ")
    )


def render(exported: ExportedConfig, form: Format, folder: Path | None = None) -> str:
    """The study file as text.

    Args:
        exported: The configuration.
        form: The file's format.
        folder: Where the file will lie; its data lies beside it where that is not known.
    """
    document = dict(exported.document) if folder is None else exported.document_in(folder)
    if form == "json":
        return json.dumps(document, indent=2) + "\n"
    if form == "yaml":
        return yaml.safe_dump(document, sort_keys=False)
    return SCHEMA_LINE + tomli_w.dumps(document)


def write_configs(
    configs: tuple[ExportedConfig, ...], output: Path, form: Format | None = None
) -> tuple[Path, ...]:
    """Writes one file for each configuration, each whole.

    Args:
        configs: What to write.
        output: A file (one configuration, and a name with a format's suffix) or a folder.
        form: The files' format; by the suffix of `output`, else TOML, where it is not given.

    Returns:
        The files, in the order of `configs`.

    Raises:
        StudyError: One file is named for several configurations, or for another format.
        TunerError: They cannot be written.
    """
    of_suffix = _format_of_file(output)
    if of_suffix is not None:
        if form not in (None, of_suffix):
            raise StudyError(
                f"-o {output} ends in {output.suffix}, so it is read as {of_suffix}, and --format "
                f"asks for {form}; leave --format out, or name a file that ends in .{form}."
            )
        form = of_suffix
        if len(configs) > 1:
            raise StudyError(
                f"-o {output} is one file, and --top asks for {len(configs)}; name a folder."
            )
        paths = [output]
    else:
        form = form or "toml"
        paths = [
            output / f"{one.provenance['study']}-{_rank(one)}trial-{one.trial}.{form}"
            for one in configs
        ]
    for path, exported in zip(paths, configs, strict=True):
        _write(path, render(exported, form, path.parent).encode(), exported.files)
    return tuple(paths)


def _format_of_file(output: Path) -> Format | None:
    """The format of the one file that `output` names; None where it names a folder.

    Raises:
        TunerError: It cannot be looked at.
    """
    try:
        return None if output.is_dir() else _FORMATS.get(output.suffix.lower())
    except OSError as error:
        raise _unwritable(output, error) from error


def require_writable_output(output: Path) -> None:
    """Makes sure that `write_configs` can write there, before hours are spent on a study.

    Raises:
        TunerError: It cannot.
    """
    try:
        if _format_of_file(output) is None:
            require_writable(output)
        else:
            require_writable(output.parent, output.name)
    except OSError as error:
        raise _unwritable(output, error) from error


def _unwritable(path: Path, error: OSError) -> TunerError:
    return TunerError(
        f"{path}: cannot be written ({error.strerror or error}); name another file or folder."
    )


def _write(path: Path, content: bytes, data: tuple[Path, ...]) -> None:
    """Publishes a file that the user asked for.

    Raises:
        TunerError: It cannot be written, or is the study's data.
    """
    try:
        if path.exists() and any(os.access(file, os.F_OK) and path.samefile(file) for file in data):
            raise OSError(errno.EEXIST, "it is the data of the study")
        publish(path, content)
    except OSError as error:
        raise _unwritable(path, error) from error


def _rank(exported: ExportedConfig) -> str:
    return "" if exported.rank is None else f"{exported.rank}-"


_FIGURES = (ACCURACY_KEY, ROC_AUC_KEY, BEST_EPOCH_KEY, PARAMETERS_KEY, SECONDS_KEY)


def write_trials(tuned: TunedStudy, path: Path) -> int:
    """Writes every trial as a row of a CSV file; returns how many.

    Columns: number, state, validation_loss (nats), epochs, bracket, ended, detail, resumed,
    audited_after_epoch (where it would have been pruned), started, ended_at, validation_accuracy
    and validation_roc_auc (0..1, of best_epoch), best_epoch, parameters, training_seconds, then one
    column for each sampled hyperparameter (`param.NAME`). What a trial of an earlier version does
    not have is blank.

    Raises:
        TunerError: The file cannot be written.
    """
    spec, trials = tuned.record.spec, tuned.trials()
    names = sorted({name for trial in trials for name in trial.params})
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        ["number", "state", "validation_loss", "epochs", "bracket", "ended", "detail", "resumed"]
        + [AUDITED_KEY, "started", "ended_at", *_FIGURES]
        + [f"param.{name}" for name in names]
    )
    for trial in trials:
        attrs = trial.user_attrs
        writer.writerow(
            [trial.number, trial.state.name, trial.value, trial.last_step or 0]
            + [spec.bracket_of(trial.number), attrs.get(ENDED_KEY), attrs.get(DETAIL_KEY)]
            + [
                attrs.get(RESUMED_KEY, 0),
                attrs.get(AUDITED_KEY),
                trial.datetime_start,
                trial.datetime_complete,
            ]
            + [attrs.get(name) for name in _FIGURES]
            + [trial.params.get(name) for name in names]
        )
    _write(path, text.getvalue().encode(), _source_files(tuned, None))
    return len(trials)
