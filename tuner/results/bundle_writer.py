"""Writes bundles: one network of a study, or several that predict together."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from tuner.artifacts import make_folder, publish
from tuner.commands import command
from tuner.data.rows import alphabet_of, decode_tokens, encode
from tuner.errors import TunerError
from tuner.metrics import THRESHOLD
from tuner.results.bundle import (
    CARD_FILE,
    DESCRIPTION_FILE,
    FORMAT,
    MODEL_FILE,
    ONNX_FILE,
    SUMS_FILE,
    Bundle,
    bundle_from,
    versions_in_words,
)
from tuner.results.choice import Chosen, choose_best
from tuner.results.export import ExportedConfig, config_of_trial, render
from tuner.search.confirmation import winner_in_words
from tuner.search.record import versions
from tuner.search.tuned_study import TunedStudy
from tuner.spec.architecture import parameter_count
from tuner.train import networks_in

PROBES = 5  #: sequences whose probabilities are kept, so that a reader can tell a wrong network


def bundle_of_study(tuned: TunedStudy) -> Bundle:
    """What `tuner export NAME --model` would write, to predict with; nothing is written.

    Raises:
        StudyError: No trial was trained to its end yet, or its weights were not kept.
        SetupError: TensorFlow is missing.
    """
    chosen = choose_best(tuned)
    contents, _ = _contents(tuned, chosen, configs_of(chosen), onnx=False)
    return bundle_from(contents, Path(tuned.name))


def configs_of(chosen: Chosen, *, data: Path | None = None) -> tuple[ExportedConfig, ...]:
    """The configurations of chosen networks, in their order; see `config_of_trial`."""
    return tuple(config_of_trial(chosen.study, number, data=data) for number in chosen.trials)


def bundle_name(tuned: TunedStudy, chosen: Chosen) -> str:
    """What a bundle is called where the user names no other file or folder."""
    which = "ensemble" if chosen.selection else f"trial-{chosen.trials[0]}"
    return f"{tuned.name}-{which}"


def write_bundle(
    tuned: TunedStudy,
    chosen: Chosen,
    configs: Sequence[ExportedConfig],
    output: Path,
    *,
    onnx: bool = False,
) -> dict[str, Any]:
    """Writes a bundle, whole or not at all.

    Args:
        tuned: The study.
        chosen: Its networks.
        configs: Their configurations, in the same order.
        output: A folder, new, empty or an earlier bundle; or a file whose name ends in .zip.
        onnx: Also write the network as ONNX, which needs the extra "onnx".

    Returns:
        What `bundle.json` holds.

    Raises:
        SetupError: TensorFlow, or what writes ONNX, is missing.
        TunerError: It cannot be written.
    """
    if output.suffix.lower() != ".zip":
        _require_replaceable(output)
    contents, description = _contents(tuned, chosen, configs, onnx=onnx)
    try:
        if output.suffix.lower() == ".zip":
            publish(output, _zipped(contents))
        else:
            _publish_folder(output, contents)
    except OSError as error:
        raise TunerError(
            f"{output}: the bundle cannot be written ({error.strerror or error}); name another "
            "folder or file with -o."
        ) from error
    return description


def _contents(
    tuned: TunedStudy, chosen: Chosen, configs: Sequence[ExportedConfig], *, onnx: bool
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of a bundle by name, and what `bundle.json` holds."""
    from tuner.network import combined  # noqa: PLC0415 - TensorFlow takes seconds to import

    max_length, unknown = tuned.record.data.max_length, tuned.record.spec.data.unknown
    networks = [
        combined.TrainedNetwork.unpacked(one.config, weights, share / len(its))
        for one, share in zip(chosen.networks, chosen.shares, strict=True)
        for its in [networks_in(one.weights)]
        for weights in its
    ]
    model = combined.combined_model(networks, max_length, unknown=unknown == "mask")
    probes = decode_tokens(chosen.development.validation_tokens[:PROBES])
    probed = combined.predicted(model, encode(probes, max_length, unknown))
    contents = {MODEL_FILE: combined.keras_bytes(model)}
    if onnx:
        contents[ONNX_FILE] = combined.onnx_bytes(model)
    for config in configs:
        contents[_study_file(config)] = render(config, "toml").encode()
    description = _description(tuned, chosen, configs) | {
        "probe": {"sequences": probes, "probabilities": [float(one) for one in probed]},
        "files": sorted([*contents, CARD_FILE]),
    }
    contents[DESCRIPTION_FILE] = f"{json.dumps(description, indent=2)}\n".encode()
    contents[CARD_FILE] = _card(description).encode()
    sums = (
        f"{hashlib.sha256(content).hexdigest()}  {name}\n"
        for name, content in sorted(contents.items())
    )
    contents[SUMS_FILE] = "".join(sums).encode()
    return contents, description


def _study_file(config: ExportedConfig) -> str:
    return f"trial-{config.trial}.toml"


def _description(
    tuned: TunedStudy, chosen: Chosen, configs: Sequence[ExportedConfig]
) -> dict[str, Any]:
    record, selection = chosen.study.record, chosen.selection
    development = chosen.development
    folds = development.fold_count
    cross_fitted = None if selection is None else selection.cross_fitted
    return {
        "format": FORMAT,
        "study": tuned.name,
        "trained_in": chosen.study.name,
        "winner": winner_in_words(tuned, suggest=False),
        "trials": [config.trial for config in configs],
        "networks": [
            {
                "trial": config.trial,
                **({"fold": fold + 1} if folds else {}),
                "share": share / max(folds, 1),
                "study_file": _study_file(config),
                "train_again": command("launch", _study_file(config)),
                "validation_loss": config.validation_loss,
                "epochs": config.epochs,
                "parameters": parameter_count(config.config, record.data.max_length),
                "seed": record.spec.seed,
                "precision": chosen.study.precision_of(config.config),
                "config": dataclasses.asdict(config.config),
                "config_hash": config.provenance["config_hash"],
            }
            for config, share in zip(configs, chosen.shares, strict=True)
            for fold in range(max(folds, 1))
        ],
        "alphabet": alphabet_of(record.spec.data.unknown),
        "unknown": record.spec.data.unknown,
        "truncate": record.spec.data.truncate,
        "sequence_column": record.spec.data.columns.sequence,
        "max_length": record.data.max_length,
        "min_length": int(np.count_nonzero(development.training_tokens, axis=1).min()),
        "threshold": THRESHOLD,
        "validation": {
            **chosen.validation.to_document(),
            "selected_loss": None if selection is None else selection.selected_loss,
            "cross_fitted": None if cross_fitted is None else cross_fitted.to_document(),
        },
        **_reported(tuned, chosen),
        "synthetic": record.data.synthetic,
        "data": configs[0].provenance["data"],
        "split": record.spec.data.split.described,
        "development_sha256": record.development_sha256,
        "spec_hash": tuned.record.spec_hash,
        "versions": {"trained_with": dict(record.versions), "written_with": versions()},
        "study_created_at": record.created_at,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _reported(tuned: TunedStudy, chosen: Chosen) -> dict[str, Any]:
    """The figures on the test split, if the study's report evaluated these very networks."""
    weights = [hashlib.sha256(network.weights).hexdigest() for network in chosen.networks]
    members = list(zip(weights, chosen.shares, strict=True))
    for entry in reversed(tuned.storage.ledger.entries(study_key=tuned.key)):
        if entry.report is None:
            continue
        test = None
        together = entry.report.get("ensemble") or {"networks": []}
        if members == [(entry.report["weights_sha256"], 1.0)]:
            test = entry.report["test"]
        elif members == [(one["weights_sha256"], one["share"]) for one in together["networks"]]:
            test = together["test"]
        if test is not None:
            ledger = {
                "entry": entry.id,
                "opened_at": entry.opened_at,
                "opened_by": entry.opened_by,
                "split_id": entry.split_id,
                "look": entry.look,
                "reason": entry.reason,
                "hash": entry.hash,
            }
            return {"test": test, "ledger": ledger}
    return {"test": None, "ledger": None}


def _card(description: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        autoescape=False,  # noqa: S701 - Markdown, of figures and names that were checked
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = files("tuner.results").joinpath("model_card.md.jinja").read_text("utf-8")
    rows = [
        (name, *(_figure(description[rows], key) for rows in ("validation", "test")))
        for name, key in _FIGURES.items()
    ]
    trained_with = versions_in_words(description["versions"]["trained_with"])
    return environment.from_string(template).render(
        bundle=description, rows=rows, trained_with=trained_with
    )


#: What the card shows, by its key in `Metrics.to_document`.
_FIGURES = {
    "accuracy": "accuracy",
    "loss (nats)": "loss",
    "Matthews correlation": "mcc",
    "area under the ROC curve": "roc_auc",
}


def _figure(figures: Mapping[str, Any] | None, key: str) -> str:
    """A figure with its 95 % interval."""
    if figures is None:
        return "not opened"
    if figures[key] is None:
        return "-"
    shown = "{:.1%}" if key == "accuracy" else "{:.4f}"
    value, low, high = (shown.format(one) for one in (figures[key], *figures[f"{key}_ci95"]))
    return f"{value} ({low} to {high})"


def _require_replaceable(folder: Path) -> None:
    """Makes sure that a folder is missing, empty, or a bundle."""
    try:
        names = [one.name for one in folder.iterdir()]
    except FileNotFoundError:
        return
    except OSError as error:
        raise TunerError(
            f"{folder}: {error.strerror or error}; name another folder with -o."
        ) from error
    if names and DESCRIPTION_FILE not in names:
        raise TunerError(
            f"{folder} is not empty and not a bundle, so it is not replaced; name a new folder "
            "with -o, or a file that ends in .zip."
        )


def _publish_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes files into a folder of this name, which then has these and no others."""
    make_folder(folder.parent, private=False)
    target = Path(os.path.realpath(folder))
    beside = target.with_name(f".{target.name}-{uuid.uuid4().hex}.new")
    try:
        make_folder(beside, private=False)
        for name, content in contents.items():
            publish(beside / name, content)
        if target.is_dir():
            old = target.with_name(f".{target.name}-{uuid.uuid4().hex}.old")
            os.replace(target, old)
            try:
                os.replace(beside, target)
            except BaseException:
                os.replace(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _zipped(contents: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return content.getvalue()
