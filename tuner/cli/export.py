"""export: configurations and trained networks of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tuner.artifacts import DEFAULT_EXPORT_FOLDER, DEFAULT_ROOT, DEFAULT_STORAGE_URL
from tuner.cli.app import app
from tuner.cli.options import ArtifactsRoot, AsJson, Name, SourcePath, StorageUrl
from tuner.cli.terminal import (
    open_storage,
    print_json,
    print_note,
    terminal,
    warn_of_synthetic_data,
)
from tuner.commands import command
from tuner.errors import counted

if TYPE_CHECKING:
    from tuner.results.choice import Chosen
    from tuner.results.export import ExportedConfig
    from tuner.results.runs import Watch
    from tuner.search.tuned_study import TunedStudy


@app.command(epilog="Example: tuner export quickstart --top 3 --format yaml -o best/")
def export(
    name: Name,
    top: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="K", help="Number of configurations, best first; 1 by default."
        ),
    ] = None,
    trial: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Number of one trial to export, in any state."),
    ] = None,
    form: Annotated[
        Literal["toml", "json", "yaml", "onnx"] | None,
        typer.Option(
            "--format",
            help="Format of the study files; by default that of the suffix of -o, else TOML. With "
            "--model, onnx writes the network as ONNX as well.",
        ),
    ] = None,
    trials: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Also write all trials as CSV.")
    ] = None,
    model: Annotated[
        bool,
        typer.Option(
            "--model",
            help="Write a bundle, a folder or a .zip file: the trained network for Keras, its "
            "study file, its figures and a model card. Without --top, --trial and --ensemble it "
            "is the best network, or several that together predict better.",
        ),
    ] = False,
    ensemble: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Write a bundle of the networks that predict best together, chosen in N picks "
            "from those that were kept.",
        ),
    ] = None,
    mlflow: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Write each trial as a run of an MLflow experiment: parameters, curves, files. "
            "URI of the tracking server, or sqlite:///FILE. Needs the extra mlflow.",
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write each trial's curves for TensorBoard."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="PATH", help="Folder, or file, to write to."),
    ] = None,
    data: SourcePath = None,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Writes the best configurations, each a study file, or the trained networks (--model)."""
    from tuner.results.export import write_trials
    from tuner.search.confirmation import winner_in_words
    from tuner.search.study import load

    if trial is not None and top is not None:
        raise typer.BadParameter("--top asks for the best trials, --trial for one by its number.")
    if ensemble is not None and (trial, top) != (None, None):
        raise typer.BadParameter("--ensemble chooses its networks itself; leave --top and --trial.")
    with_model = model or ensemble is not None
    if form is not None and with_model != (form == "onnx"):
        raise typer.BadParameter(
            "--format onnx needs --model; a bundle's study files are TOML, so leave --format out."
        )
    with open_storage(storage) as opened:
        tuned = load(opened, name, artifacts_root=artifacts)
        rows = None if trials is None else write_trials(tuned, trials)
        trackers = _export_to_trackers(tuned, mlflow, tensorboard, as_json=as_json)
        if trackers and not with_model and (top, trial, form, output) == (None, None, None, None):
            if as_json:
                print_json({"study": tuned.name, **trackers})
        elif with_model:
            _export_bundles(
                tuned,
                top=top,
                trial=trial,
                picks=ensemble,
                output=output,
                data=data,
                onnx=form == "onnx",
                as_json=as_json,
                more=trackers,
            )
        else:
            _export_configs(
                tuned,
                top=top or 1,
                trial=trial,
                form=form,
                output=output,
                data=data,
                as_json=as_json,
                more=trackers,
            )
        synthetic = tuned.record.data.synthetic
        if trial is None and tuned.ranked():
            print_note(winner_in_words(tuned))
    if as_json:
        return
    if synthetic:
        warn_of_synthetic_data()
    if rows is not None:
        typer.echo(f"{counted(rows, 'trial')} in all: {trials}")


def _export_to_trackers(
    tuned: TunedStudy, mlflow: str | None, tensorboard: Path | None, *, as_json: bool
) -> dict[str, Any]:
    """Writes to MLflow and for TensorBoard; returns what is printed of it as JSON."""
    import dataclasses

    found: dict[str, Any] = {}
    if mlflow is not None:
        from tuner.results.mlflow_export import export_to_mlflow

        written = export_to_mlflow(tuned, mlflow, watch=_with_progress(tuned))
        found["mlflow"] = dataclasses.asdict(written)
        if not as_json:
            typer.echo(
                f"MLflow, experiment {written.experiment}: {counted(written.written, 'new run')}, "
                f"{written.replaced} replaced, {written.unchanged} unchanged."
            )
    if tensorboard is not None:
        from tuner.results.tensorboard_export import export_to_tensorboard

        runs, has_hyperparameters = export_to_tensorboard(
            tuned, tensorboard, watch=_with_progress(tuned)
        )
        found["tensorboard"] = {
            "folder": str(tensorboard),
            "runs": runs,
            "hyperparameters": has_hyperparameters,
        }
        if not as_json:
            typer.echo(f"TensorBoard: {counted(runs, 'run')} in {tensorboard / tuned.name}.")
            if not has_hyperparameters:
                print_note("Without the package tensorboard, hyperparameters are left out.")
    return found


def _with_progress(tuned: TunedStudy) -> Watch:
    """Shows on a terminal how many trials are written."""
    from rich.progress import track

    console = terminal(stderr=True)
    options: dict[str, Any] = {"console": console, "disable": not console.is_terminal}
    total = len(tuned.trials())
    return lambda runs: track(runs, "Trials", total, transient=True, **options)


def _export_configs(
    tuned: TunedStudy,
    *,
    top: int,
    trial: int | None,
    form: Any,
    output: Path | None,
    data: Path | None,
    as_json: bool,
    more: dict[str, Any],
) -> None:
    from tuner.results.export import best_configs, config_of_trial, write_configs

    configs = (
        best_configs(tuned, top, data=data)
        if trial is None
        else (config_of_trial(tuned, trial, data=data),)
    )
    paths: tuple[Path, ...] = ()
    if output is not None or not as_json:
        paths = write_configs(configs, output or DEFAULT_EXPORT_FOLDER, form)
    if as_json:
        documents = [one.to_document() for one in configs]
        print_json({"study": tuned.name, "configs": documents, **more})
        return
    for exported, path in zip(configs, paths, strict=True):
        typer.echo(f"{_in_words(exported)}: {path}")
    if len(configs) < top:
        were = counted(len(configs), "trial was", "trials were")
        typer.echo(f"Only {were} trained to the end.")


def _in_words(exported: ExportedConfig) -> str:
    rank = "Trial" if exported.rank is None else f"{exported.rank}. trial"
    loss = exported.validation_loss
    reached = "" if loss is None else f", validation loss {loss:.4f}"
    mean = exported.confirmed_mean
    confirmed = "" if mean is None else f"; confirmed mean {mean:.4f}"
    return f"{rank} {exported.trial}{reached} after {counted(exported.epochs, 'epoch')}{confirmed}"


def _export_bundles(
    tuned: TunedStudy,
    *,
    top: int | None,
    trial: int | None,
    picks: int | None,
    output: Path | None,
    data: Path | None,
    onnx: bool,
    as_json: bool,
    more: dict[str, Any],
) -> None:
    from tuner.results.bundle_writer import bundle_name, configs_of, write_bundle
    from tuner.results.choice import choose_best, choose_ensemble, choose_trial
    from tuner.results.export import best_configs

    if picks is not None:
        choices = [choose_ensemble(tuned, picks)]
    elif trial is not None:
        choices = [choose_trial(tuned, trial)]
    elif top is not None:
        choices = [choose_trial(tuned, one.trial) for one in best_configs(tuned, top)]
    else:
        choices = [choose_best(tuned)]
    wanted = [(chosen, configs_of(chosen, data=data)) for chosen in choices]
    names = [bundle_name(tuned, chosen) for chosen in choices]
    if output is None:
        places = [DEFAULT_EXPORT_FOLDER / name for name in names]
    elif len(wanted) == 1:
        places = [output]
    elif output.suffix.lower() == ".zip":
        raise typer.BadParameter(f"-o {output} is one bundle, and --top asks for {len(wanted)}.")
    else:
        places = [output / name for name in names]
    written = [
        write_bundle(tuned, chosen, configs, place, onnx=onnx)
        for (chosen, configs), place in zip(wanted, places, strict=True)
    ]
    if as_json:
        documents = [one.to_document() for _, configs in wanted for one in configs]
        bundles = [
            {"path": str(place), **description}
            for place, description in zip(places, written, strict=True)
        ]
        print_json({"study": tuned.name, "configs": documents, "bundles": bundles, **more})
        return
    for (chosen, configs), place in zip(wanted, places, strict=True):
        typer.echo(f"{_bundle_in_words(chosen, configs)}: {place}")
    typer.echo(f"Next: {command('predict', places[0], 'PROTEINS.fasta')}")


def _bundle_in_words(chosen: Chosen, configs: Sequence[ExportedConfig]) -> str:
    from tuner.results.choice import ensemble_in_words

    if chosen.selection is None:
        return _in_words(configs[0])
    return ensemble_in_words(chosen.study, chosen.trials, chosen.selection)
