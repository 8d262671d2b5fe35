"""check, launch and worker."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.artifacts import DEFAULT_ROOT, DEFAULT_STORAGE_URL
from tuner.commands import command
from tuner.errors import (
    ProblemsError,
    SetupError,
    StorageMissingError,
    StudyError,
    counted,
)

if TYPE_CHECKING:
    from tuner.coordination.coordinator import Ending
    from tuner.data.audit.report import ShortAudit
    from tuner.data.prepare import Prepared
    from tuner.results.choice import Ensemble
    from tuner.search.status import StudyStatus
    from tuner.search.tuned_study import TunedStudy
    from tuner.spec.spec import StudySpec
from tuner.cli.app import app
from tuner.cli.confirm import print_comparison, run_confirmation
from tuner.cli.driving import WorkersOf, drive
from tuner.cli.options import (
    ArtifactsRoot,
    AsJson,
    ClusterPlace,
    LogFormat,
    LogLevel,
    Overrides,
    SpecPath,
    StorageUrl,
    Threads,
    TlsCa,
    TlsCert,
    TlsKey,
    Workers,
    cluster_tls,
    connect_workers,
    refuse_workers_with_cluster,
)
from tuner.cli.terminal import (
    lines_of_commands,
    log_line,
    open_storage,
    print_json,
    print_note,
    print_warning,
    require_training,
    terminal,
    warn_of_synthetic_data,
)


@app.command(
    epilog="Example: tuner check studies/solubility.toml --set data.split.seed=1",
)
def check(
    spec_path: Annotated[Path | None, typer.Argument(metavar="SPEC")] = None,
    overrides: Overrides = None,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of study files.")
    ] = False,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
) -> None:
    """Validates a study file and its data, and shows what the study would do. Trains nothing."""
    from tuner.search.check import check_document, count_near_twins, invalid_document
    from tuner.spec.schema import json_schema

    if schema:
        print_json(json_schema())
        return
    if spec_path is None:
        raise typer.BadParameter("name a study file, for instance studies/quickstart.toml")
    try:
        spec, prepared = _load(spec_path, overrides or [], artifacts, quiet=as_json)
    except ProblemsError as error:
        if not as_json:
            raise
        print_json(invalid_document(spec_path.name, error))
        raise typer.Exit(1) from None
    twins = count_near_twins(spec, prepared, artifacts, say=print_note)
    document = check_document(spec, prepared, _shared_rows(storage, spec, prepared), twins)
    if as_json:
        print_json(document)
    else:
        _print_check(spec, document, twins)


def _shared_rows(storage: str, spec: StudySpec, prepared: Prepared) -> tuple[str, ...]:
    """Warns of rows that other studies of the storage keep sealed; returns the warnings."""
    from tuner.errors import StorageError
    from tuner.search.overlap import warnings

    try:
        with open_storage(storage, patience_seconds=1.0, say=lambda _: None) as opened:
            shared = warnings(opened, spec, prepared)
    except StorageMissingError:
        return ()
    except StorageError as error:
        print_note(f"Other studies could not be looked at for rows that they keep sealed: {error}")
        return ()
    for warning in shared:
        print_warning(warning)
    return shared


def _load(
    path: Path, overrides: list[str], artifacts: Path, *, quiet: bool = False
) -> tuple[StudySpec, Prepared]:
    from tuner.data.prepare import prepare
    from tuner.spec.reader import load_spec

    spec = load_spec(path, overrides)
    prepared = prepare(
        spec.data, folder=spec.folder, artifacts=artifacts, sha256=spec.data_sha256, say=print_note
    )
    for warning in prepared.all_warnings:
        if warning in prepared.loud:
            print_warning(warning)
        else:
            print_note(f"Warning: {warning}")
    if prepared.identity.synthetic and not quiet:
        warn_of_synthetic_data()
    return spec, prepared


def _print_check(spec: StudySpec, document: dict[str, Any], twins: ShortAudit | None) -> None:
    import tomli_w
    from rich.table import Table

    from tuner.search.check import brackets_in_words

    rows, count = document["data"]["rows"], document["parameter_count"]
    full = spec.trials * spec.training.max_epochs
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("study", f"{spec.name}, spec {spec.spec_hash[:12]}")
    table.add_row("data", f"{document['data']['source']}, sha256 {document['data']['sha256'][:12]}")
    table.add_row(
        "split",
        f"{spec.data.split.in_words}: {rows['train']} training, {rows['validation']} validation, "
        f"{rows['test']} test rows (sealed), identity {document['data']['split_id'][:12]}",
    )
    if twins is not None:
        table.add_row("near-twins", twins.in_words())
    table.add_row(
        "trials", f"{spec.trials}, at most {counted(spec.training.max_epochs, 'epoch')} each"
    )
    for number, words in enumerate(brackets_in_words(spec)):
        table.add_row(f"bracket {number}", words)
    epochs = f"about {document['planned_epochs']} planned, {full} without pruning"
    if folds := document["data"].get("folds"):
        epochs += f", each of {counted(folds, 'fold')}"
    table.add_row("epochs", epochs)
    table.add_row(
        "parameters",
        f"{count['min']:,} to {count['max']:,} in a network, median {count['median']:,} (of "
        f"{counted(count['sampled'], 'sampled configuration')})",
    )
    table.add_row("searched", ", ".join(spec.space.parameters) or "nothing")
    console = terminal()
    console.print(table)
    console.print("\nThe whole study file, every default written out:\n", style="dim")
    typer.echo(tomli_w.dumps(spec.to_document()), nl=False)


@app.command(epilog="Example: tuner launch studies/quickstart.toml --workers 2")
def launch(
    spec_path: SpecPath,
    name: Annotated[
        str | None, typer.Option(help="Name of the study, in place of the file's.")
    ] = None,
    workers: Workers = None,
    threads: Threads = None,
    cluster: Annotated[str | None, ClusterPlace] = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Number of finished trials, in place of the file's.")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Stop after this number of seconds."),
    ] = None,
    overrides: Overrides = None,
    notify: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Webhook to which the status is POSTed as JSON when the study has finished, "
            "failed or stopped; by default $TUNER_NOTIFY.",
        ),
    ] = None,
    export_to: Annotated[
        Path | None,
        typer.Option(
            "--export",
            metavar="DIR",
            help="Export the best configuration and the trained network at the end.",
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Queue it for `tuner serve`, and return at once.")
    ] = False,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
    _log_level: LogLevel = None,
    _log_format: LogFormat = None,
) -> None:
    """Creates or resumes a study, and runs it to its budget."""
    if detach:
        here: dict[str, object] = {"--workers": workers, "--threads": threads}
        here |= {"--timeout": timeout, "--export": export_to, "--cluster": cluster}
        here |= {"--notify": notify}
        here |= {"--tls-ca": tls_ca, "--tls-cert": tls_cert, "--tls-key": tls_key}
        _refuse_with_detach(here)
    refuse_workers_with_cluster(cluster, workers)
    tls = cluster_tls(tls_ca, tls_cert, tls_key, cluster)
    if cluster is None and not detach:
        require_training()
    if export_to is not None:
        from tuner.results.export import require_writable_output

        require_writable_output(export_to)
    from tuner.coordination.queue import overrides_for

    given = [*(overrides or []), *overrides_for(name, trials)]
    spec, prepared = _load(spec_path, given, artifacts)
    from tuner.search.check import count_near_twins

    if (twins := count_near_twins(spec, prepared, artifacts, say=print_note)) is not None:
        print_note(f"{twins.in_words()}; see `{command('data', 'audit', spec_path)}`.")
    from tuner.coordination.webhook import Notifier, webhook_of
    from tuner.search.overlap import enter
    from tuner.search.status import status
    from tuner.search.study import create_or_resume, find_or_create

    webhook = None if detach else webhook_of(spec.notify, given=notify, say=print_note)
    with (
        open_storage(storage, patience_seconds=None, create=True) as opened,
        Notifier(print_note) as notifier,
    ):
        # An existing study is changed only by the process that holds its lease.
        made_from: dict[str, Any] = {
            "development_sha256": prepared.development_sha256,
            "artifacts_root": artifacts,
        }
        tuned = find_or_create(opened, spec, prepared.identity, **made_from)
        for warning in enter(opened, spec, prepared):
            print_warning(warning)
        now = status(tuned)
        if detach or now.finished_trials >= spec.trials:
            tuned = create_or_resume(opened, spec, prepared.identity, **made_from)
        if detach:
            said = _queue(tuned)
            print_note(said) if as_json else typer.echo(said)
            if as_json:
                print_json(status(tuned).to_document())
            return
        workers_of = WorkersOf(
            connect=lambda say: connect_workers(cluster, tls, workers, threads or 1, say),
            threads=threads or 1,
        )
        ending: Ending = "finished"
        if now.finished_trials < spec.trials:
            ending = notifier.run(
                tuned,
                webhook,
                lambda: drive(tuned, workers_of, timeout=timeout, as_json=as_json, asked=spec),
            )
        elif not as_json:
            print_note(f"Study {now.study} is finished.")
        confirmed = None
        if ending == "finished" and spec.confirm is not None:
            ending, confirmed = run_confirmation(
                tuned, workers_of, timeout=timeout, as_json=as_json, local=cluster is None
            )
        now = status(tuned)
        ensemble = _ensemble(tuned) if ending == "finished" else None
        exported: tuple[Path, Path | None] | None = None
        if export_to is not None and now.best is not None:
            exported = _export_best(tuned, export_to)
        if as_json:
            together = None if ensemble is None else ensemble.to_document()
            print_json(
                {
                    **now.to_document(),
                    "ensemble": together,
                    "confirmation": confirmed and confirmed.to_document(),
                }
            )
        else:
            _print_summary(tuned, now, ending, ensemble, exported)
            if confirmed is not None:
                print_comparison(confirmed)
    if ending == "interrupted":
        raise typer.Exit(130)


def _refuse_with_detach(options: dict[str, object]) -> None:
    given = [option for option, value in options.items() if value is not None]
    if given:
        raise typer.BadParameter(
            f"{', '.join(given)} make no sense with --detach: the study runs in the service, on "
            "the service's workers (tuner serve --help), until `tuner stop` or its budget."
        )


def _queue(tuned: TunedStudy) -> str:
    """Queues a study for the service, unless it is finished or running; says which."""
    from tuner.coordination import queue

    queued = queue.queue(tuned)
    if queued.outcome in ("finished", "running"):
        return queued.in_words
    suggested = {
        tuned.command("serve"): "drives it, where no service does so yet",
        tuned.command("status", tuned.name, "--watch"): "shows how far it is",
        tuned.command("stop", tuned.name): "takes it out of the queue",
    }
    return f"{queued.in_words}\n{lines_of_commands(tuned, suggested)}"


def _ensemble(tuned: TunedStudy) -> Ensemble | None:
    """The ensemble of the kept networks, where what they predicted in training can be read."""
    from tuner.results.choice import recorded_ensemble

    try:
        return recorded_ensemble(tuned)
    except StudyError as error:  # the study is finished all the same
        print_note(f"The ensemble of the kept networks is not known: {error}")
        return None


def _export_best(tuned: TunedStudy, folder: Path) -> tuple[Path, Path | None]:
    """Writes the best configuration, and the bundle of what predicts best; returns where.

    There is no bundle where TensorFlow is not installed: beside workers on other machines.
    """
    from tuner.results.export import best_configs, write_configs

    (path,) = write_configs(best_configs(tuned), folder)
    try:
        require_training()
    except SetupError as error:
        print_note(f"The trained network is not exported: {error}")
        return path, None
    from tuner.results.bundle_writer import bundle_name, configs_of, write_bundle
    from tuner.results.choice import choose_best

    chosen = choose_best(tuned)
    bundle = folder / bundle_name(tuned, chosen)
    write_bundle(tuned, chosen, configs_of(chosen), bundle)
    return path, bundle


def _print_summary(
    tuned: TunedStudy,
    now: StudyStatus,
    ending: Ending,
    ensemble: Ensemble | None,
    exported: tuple[Path, Path | None] | None,
) -> None:
    from tuner.cli.progress import status_details
    from tuner.results.choice import ensemble_in_words

    terminal().print(status_details(now))
    if ensemble is not None and len(ensemble.trials) > 1:
        typer.echo(f"{ensemble_in_words(ensemble.study, ensemble.trials, ensemble.selection)}.")
    if tuned.record.data.synthetic:
        warn_of_synthetic_data()
    config, bundle = exported or (None, None)
    if config is not None:
        typer.echo(f"Best configuration: {config}")
    if bundle is not None:
        typer.echo(f"Trained network: {bundle}")
    if ending in ("interrupted", "timeout", "stopped"):
        typer.echo(f"Stopped ({ending}); nothing is lost. The same command resumes the study.")
        return
    together = ensemble is not None and ensemble.selection.is_better
    network = "the ensemble" if together else "the best network"
    suggested = {
        tuned.command("predict", bundle or tuned.name, "PROTEINS.fasta"): f"predicts, by {network}",
        tuned.command("export", tuned.name): "the best configurations; --model: the network",
        tuned.command("dashboard"): "every trial and its curves",
    }
    if now.state != "reported":
        suggested[tuned.command("report", tuned.name)] = "opens the test split, once"
    typer.echo(lines_of_commands(tuned, suggested))


@app.command(epilog="Example: tuner worker --cluster tcp://10.0.0.5:8786 --lifetime 14000")
def worker(
    cluster: Annotated[str, ClusterPlace],
    workers: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Number of training processes; auto: one per GPU, else one per --threads cores.",
        ),
    ] = "1",
    threads: Annotated[int, typer.Option(min=1, help="Number of threads of each training.")] = 1,
    memory_limit: Annotated[
        str,
        typer.Option(
            metavar="SIZE|auto",
            help="Memory limit of each process, such as 4GB; one that exceeds it is restarted.",
        ),
    ] = "auto",
    lifetime: Annotated[
        float | None,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="Leave after this time, before the batch queue ends the job.",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="The address or network interface to listen on."),
    ] = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    _log_level: LogLevel = None,
    _log_format: LogFormat = None,
) -> None:
    """Trains for the studies of a Dask scheduler; workers may join and leave at any time."""
    from tuner.cluster.scheduler import SchedulerFileMissingError, tls_files
    from tuner.cluster.worker import WorkerSettings, serve

    require_training()
    # Not isdigit(): a superscript two is a digit that int() does not read.
    if workers != "auto" and not re.fullmatch("[1-9][0-9]{0,3}", workers):
        raise typer.BadParameter("must be 1 to 9999, or auto", param_hint="--workers")
    try:
        tls = cluster_tls(tls_ca, tls_cert, tls_key, cluster)
    except SchedulerFileMissingError:  # the worker may be up before its scheduler
        tls = tls_files(tls_ca, tls_cert, tls_key)
    settings = WorkerSettings(
        cluster=cluster,
        tls=tls,
        workers="auto" if workers == "auto" else int(workers),
        threads=threads,
        memory_limit=memory_limit,
        lifetime=lifetime,
        host=host,
    )
    serve(settings, say=log_line)
