"""The best configurations of a study, each as a study file that trains its network again."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tomli_w
import yaml
from optuna.trial import FrozenTrial, TrialState

from tuner.artifacts import publish
from tuner.errors import StudyError
from tuner.objective import DETAIL_KEY, ENDED_KEY, curve_of
from tuner.space import ModelConfig, space_of
from tuner.study import RESUMED_KEY, StudyRecord, TunedStudy

Format = Literal["toml", "json", "yaml"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedConfig:
    """The configuration of one trial."""

    rank: int | None  #: from 1, by validation loss; None of a trial that was asked for by number
    trial: int
    validation_loss: float | None  #: nats, of the best epoch; None where no epoch was completed
    epochs: int  #: completed epochs
    sampled: Mapping[str, Any]  #: what was searched, by its name in the study file
    config: ModelConfig
    provenance: Mapping[str, Any]
    document: Mapping[str, Any]  #: the study file

    def to_document(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "trial": self.trial,
            "validation_loss": self.validation_loss,
            "epochs": self.epochs,
            "sampled": dict(self.sampled),
            "config": dataclasses.asdict(self.config),
            "provenance": dict(self.provenance),
        }


def best_configs(tuned: TunedStudy, top: int = 1) -> tuple[ExportedConfig, ...]:
    """The `top` fully trained trials with the lowest validation loss, best first.

    Raises:
        StudyError: No trial was trained to its end yet.
    """
    ranked = tuned.ranked()
    if not ranked:
        raise StudyError(
            f"Study {tuned.name!r} has no fully trained trial yet, so there is nothing to export; "
            "launch it again to go on."
        )
    return tuple(_exported(tuned, rank, trial) for rank, trial in enumerate(ranked[:top], start=1))


def config_of_trial(tuned: TunedStudy, number: int) -> ExportedConfig:
    """The configuration of any trial, whatever became of it.

    Raises:
        StudyError: There is no such trial, or nothing was sampled for it yet.
    """
    trials = tuned.trials()
    trial = next((one for one in trials if one.number == number), None)
    if trial is None:
        known = f"0 to {len(trials) - 1}" if trials else "none yet"
        raise StudyError(f"Study {tuned.name!r} has no trial {number}; its trials are: {known}.")
    if trial.state == TrialState.WAITING:
        raise StudyError(
            f"Trial {number} of study {tuned.name!r} waits to be started, so its configuration "
            "is not sampled yet; launch the study to go on."
        )
    return _exported(tuned, None, trial)


def config_hash(config: ModelConfig) -> str:
    """sha256 of a resolved configuration."""
    text = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _exported(tuned: TunedStudy, rank: int | None, trial: FrozenTrial) -> ExportedConfig:
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
        "best_epoch": None if best is None else best.epoch,
        "state": trial.state.name,
        "epochs": trial.last_step or 0,
        "seed": spec.seed,
        "spec_hash": spec.spec_hash,
        "config_hash": config_hash(config),
        "precision": tuned.precision_of(config),
        "data": record.data.to_document(),
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
        epochs=trial.last_step or 0,
        sampled=trial.params,
        config=config,
        provenance=provenance,
        document=_study_file(tuned, trial, config, provenance),
    )


def _study_file(
    tuned: TunedStudy, trial: FrozenTrial, config: ModelConfig, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """A study of one trial that trains this trial's network again, bit for bit."""
    record = tuned.record
    document = record.spec.to_document()
    for key in ("hyperband", "stop", "known"):
        document.pop(key, None)
    document |= {
        "name": f"{tuned.name}-trial-{trial.number}",
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
    document["data"]["source"] = _source(record)
    return document


def _source(record: StudyRecord) -> str | dict[str, str]:
    """Where the exported file finds the data, wherever it is moved."""
    source, folder = record.spec.data.source, record.spec.folder
    if record.data.synthetic:
        return "synthetic"
    if source == "solubility":
        return source
    if isinstance(source, str):
        return str((folder / source).absolute())
    return {key: str((folder / value).absolute()) for key, value in source.model_dump().items()}


def render(exported: ExportedConfig, form: Format) -> str:
    """The study file as text."""
    if form == "json":
        return json.dumps(exported.document, indent=2) + "\n"
    if form == "yaml":
        return yaml.safe_dump(dict(exported.document), sort_keys=False)
    return tomli_w.dumps(exported.document)


def write_configs(
    configs: tuple[ExportedConfig, ...], output: Path, form: Format
) -> tuple[Path, ...]:
    """Writes one file for each configuration, each whole.

    Args:
        configs: What to write.
        output: A file (one configuration, and a name with the format's suffix) or a folder.
        form: The files' format.

    Returns:
        The files, in the order of `configs`.
    """
    if output.suffix in (".toml", ".json", ".yaml", ".yml"):
        if len(configs) > 1:
            raise StudyError(
                f"-o {output} is one file, and --top asks for {len(configs)}; name a folder."
            )
        paths = [output]
    else:
        paths = [
            output / f"{one.provenance['study']}-{_rank(one)}trial-{one.trial}.{form}"
            for one in configs
        ]
    for path, exported in zip(paths, configs, strict=True):
        publish(path, render(exported, form).encode())
    return tuple(paths)


def _rank(exported: ExportedConfig) -> str:
    return "" if exported.rank is None else f"{exported.rank}-"


def write_model(tuned: TunedStudy, exported: ExportedConfig, path: Path) -> None:
    """Writes the trained network: weights, configuration and provenance in one npz.

    Raises:
        StudyError: The weights of this trial were not kept.
    """
    kept = tuned.artifacts.weights(exported.trial)
    if not kept.exists():
        raise StudyError(
            f"The weights of trial {exported.trial} are not in {kept.parent}: only those of the "
            "best trials are kept. Ask for fewer (--top), or launch the exported study file."
        )
    with np.load(kept) as weights:
        arrays = {name: weights[name] for name in weights.files}
    description = json.dumps(
        {
            "config": dataclasses.asdict(exported.config),
            "max_length": tuned.record.data.max_length,
            "provenance": dict(exported.provenance),
        }
    )
    content = io.BytesIO()
    np.savez_compressed(content, tuner=np.array(description), **arrays)
    publish(path, content.getvalue())


def write_trials(tuned: TunedStudy, path: Path) -> int:
    """Writes every trial as a row of a CSV file; returns how many.

    Columns: number, state, validation_loss (nats), epochs, bracket, ended, detail, resumed,
    started, ended_at, then one column for each sampled hyperparameter (`param.NAME`).
    """
    spec, trials = tuned.record.spec, tuned.trials()
    names = sorted({name for trial in trials for name in trial.params})
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        ["number", "state", "validation_loss", "epochs", "bracket", "ended", "detail", "resumed"]
        + ["started", "ended_at"]
        + [f"param.{name}" for name in names]
    )
    for trial in trials:
        attrs = trial.user_attrs
        writer.writerow(
            [trial.number, trial.state.name, trial.value, trial.last_step or 0]
            + [spec.bracket_of(trial.number), attrs.get(ENDED_KEY), attrs.get(DETAIL_KEY)]
            + [attrs.get(RESUMED_KEY, 0), trial.datetime_start, trial.datetime_complete]
            + [trial.params.get(name) for name in names]
        )
    publish(path, text.getvalue().encode())
    return len(trials)
