"""The command line: one function for each verb, and the one place that catches errors.

Modules are imported inside each verb: `--help`, `check`, `status` and `export` must not wait
for TensorFlow, and no verb for what it does not use.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from tuner import __version__
from tuner.artifacts import DEFAULT_EXPORT_FOLDER, DEFAULT_ROOT, DEFAULT_STORAGE_URL
from tuner.errors import ProblemsError, TunerError

if TYPE_CHECKING:
    from tuner.coordinator import Coordinator, Ending
    from tuner.data import Prepared
    from tuner.spec import StudySpec
    from tuner.storage import Storage
    from tuner.study import StudyStatus, TunedStudy

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tunes the network that predicts protein solubility; the test split stays sealed.",
)
data_app = typer.Typer(no_args_is_help=True, help="The data: download.")
app.add_typer(data_app, name="data")


SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="A study file, studies/*.toml.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The study's name.")]
StorageUrl = Annotated[
    str,
    typer.Option(
        "--storage",
        envvar="TUNER_STORAGE",
        metavar="URL",
        help="Where studies are kept: sqlite:///PATH.",
    ),
]
ArtifactsRoot = Annotated[
    Path,
    typer.Option(
        "--artifacts",
        envvar="TUNER_ARTIFACTS",
        metavar="DIR",
        help="Where checkpoints, weights and development data are kept.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides any key of the study file."),
]


def main() -> NoReturn:
    """Runs the command line and exits.

    0 done, 1 an error that the message explains, 2 wrong usage, 130 interrupted.
    """
    debug = "--debug" in sys.argv or bool(os.environ.get("TUNER_DEBUG"))
    if debug:
        sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, stream=sys.stderr)
    try:
        app()
    except KeyboardInterrupt:
        _complain("Interrupted.")
        sys.exit(130)
    except BrokenPipeError:  # `tuner status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug or not _is_explained(error):
            raise
        _complain(str(error))
        sys.exit(1)
    sys.exit(0)


def _is_explained(error: Exception) -> bool:
    """Whether the message is for the user: ours, or the database's in the middle of a study."""
    return isinstance(error, TunerError) or type(error).__name__ == "StorageInternalError"


def _complain(message: str) -> None:
    typer.secho(message, fg=typer.colors.RED if sys.stderr.isatty() else None, err=True)


def _note(message: str) -> None:
    typer.echo(message, err=True)


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2))


def _open(url: str, *, patience_seconds: float | None = 5.0) -> Storage:
    import optuna
    from stamina.instrumentation import set_on_retry_hooks

    from tuner.storage import Storage

    set_on_retry_hooks(())  # an outage is told in our words
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return Storage(url, patience_seconds=patience_seconds, say=_note)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _global_options(
    _show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    _debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, and the logs.")
    ] = False,
) -> None:
    pass


# --- check ---


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
) -> None:
    """Validates a study file and its data, and says what the study would do; trains nothing."""
    from tuner.spec import json_schema

    if schema:
        _print_json(json_schema())
        return
    if spec_path is None:
        raise typer.BadParameter("name a study file, for instance studies/quickstart.toml")
    try:
        spec, prepared = _load(spec_path, overrides or [], artifacts, quiet=as_json)
    except ProblemsError as error:
        if not as_json:
            raise
        _print_json(_invalid(spec_path, error))
        raise typer.Exit(1) from None
    from tuner.space import parameter_count_range

    low, high = parameter_count_range(spec.space, spec.data.max_length)
    document = {
        "study": spec.name,
        "valid": True,
        "errors": [],
        "brackets": [list(bracket) for bracket in spec.brackets],
        "rungs": list(spec.rungs),
        "max_epochs": spec.training.max_epochs,
        "planned_epochs": _planned_epochs(spec),
        "trials": spec.trials,
        "parameter_count": {"min": low, "max": high},
        "data": _data_document(prepared),
        "warnings": list(prepared.warnings),
        "spec_hash": spec.spec_hash,
        "spec": spec.to_document(),
    }
    if as_json:
        _print_json(document)
    else:
        _print_check(spec, document)


def _load(
    path: Path, overrides: list[str], artifacts: Path, *, quiet: bool = False
) -> tuple[StudySpec, Prepared]:
    from tuner.data import prepare
    from tuner.spec import load_spec

    spec = load_spec(path, overrides)
    prepared = prepare(spec.data, folder=spec.folder, artifacts=artifacts)
    for warning in prepared.warnings:
        _note(f"Warning: {warning}")
    if prepared.identity.synthetic and not quiet:
        _warn_synthetic()
    return spec, prepared


def _warn_synthetic() -> None:
    line = "!" * 78
    text = "SYNTHETIC DATA: the proteins of this study are made up. No result means anything."
    typer.secho(f"{line}\n{text}\n{line}", fg=typer.colors.YELLOW, bold=True, err=True)


def _invalid(path: Path, error: ProblemsError) -> dict[str, Any]:
    return {
        "study": path.stem,
        "valid": False,
        "errors": [
            {
                "file": problem.file,
                "line": problem.line,
                "key": problem.key,
                "value": problem.value,
                "message": problem.message,
            }
            for problem in error.problems
        ],
    }


def _data_document(prepared: Prepared) -> dict[str, Any]:
    identity = prepared.identity
    return {
        "source": identity.source,
        "synthetic": identity.synthetic,
        "sha256": identity.sha256,
        "split_id": identity.split_id,
        "rows": {
            "train": identity.training_rows,
            "validation": identity.validation_rows,
            "test": identity.test_rows,
        },
    }


def _planned_epochs(spec: StudySpec) -> int:
    """Epochs the study is expected to train: at each rung the best 1/eta of a bracket go on.

    Early stopping and asynchronous promotion (a rung's first trials always pass) move it.
    """
    if spec.hyperband is None:
        return spec.trials * spec.training.max_epochs
    eta = spec.hyperband.eta
    brackets = len(spec.brackets)
    # Optuna's shares of the trials, after the paper's n for each bracket.
    weights = [-(-brackets * eta ** (brackets - 1 - b) // (brackets - b)) for b in range(brackets)]
    total = 0.0
    for rungs, weight in zip(spec.brackets, weights, strict=True):
        alive, before = spec.trials * weight / sum(weights), 0
        for rung in (*rungs, spec.training.max_epochs):
            total += alive * (rung - before)
            alive, before = alive / eta, rung
    return round(total)


def _print_check(spec: StudySpec, document: dict[str, Any]) -> None:
    import tomli_w
    from rich.console import Console
    from rich.table import Table

    rows, count = document["data"]["rows"], document["parameter_count"]
    full = spec.trials * spec.training.max_epochs
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("study", f"{spec.name}, spec {spec.spec_hash[:12]}")
    table.add_row("data", f"{document['data']['source']}, sha256 {document['data']['sha256'][:12]}")
    table.add_row(
        "split",
        f"seed {spec.data.split.seed}: {rows['train']} training, {rows['validation']} validation, "
        f"{rows['test']} test rows (sealed), identity {document['data']['split_id'][:12]}",
    )
    table.add_row("trials", f"{spec.trials}, at most {spec.training.max_epochs} epochs each")
    for index, rungs in enumerate(spec.brackets):
        stops = ", ".join(map(str, rungs)) or "never"
        table.add_row(f"bracket {index}", f"may stop a trial after epochs: {stops}")
    table.add_row("epochs", f"about {document['planned_epochs']} planned, {full} without pruning")
    table.add_row("parameters", f"{count['min']:,} to {count['max']:,} in a network")
    table.add_row("searched", ", ".join(spec.space.parameters) or "nothing")
    console = Console()
    console.print(table, highlight=False)
    console.print("\nThe whole study file, every default written out:\n", style="dim")
    typer.echo(tomli_w.dumps(spec.to_document()), nl=False)


# --- launch ---


@app.command(epilog="Example: tuner launch studies/quickstart.toml --workers 2")
def launch(
    spec_path: SpecPath,
    name: Annotated[str | None, typer.Option(help="Another name than the file's.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; one for each core by default.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each worker.")] = 1,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Another budget than the file's.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Stop after so many seconds.")
    ] = None,
    overrides: Overrides = None,
    export_to: Annotated[
        Path | None,
        typer.Option("--export", metavar="DIR", help="Export the best configuration at the end."),
    ] = None,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Creates a study, or takes it up where it stopped, and runs it to its budget."""
    given = list(overrides or [])
    given += [] if name is None else [f"name={json.dumps(name)}"]
    given += [] if trials is None else [f"trials={trials}"]
    spec, prepared = _load(spec_path, given, artifacts)
    from tuner.study import create_or_resume, status

    with _open(storage, patience_seconds=None) as opened:
        tuned = create_or_resume(
            opened,
            spec,
            prepared.identity,
            development_sha256=prepared.development_sha256,
            artifacts_root=artifacts,
        )
        now = status(tuned)
        ending: Ending = "finished"
        if now.finished_trials < now.budget:
            ending = _run(tuned, prepared, workers, threads, timeout, as_json=as_json)
            now = status(tuned)
        elif not as_json:
            _note(f"Study {now.study} is finished.")
        exported = None
        if export_to is not None and now.best is not None:
            exported = _export_best(tuned, export_to)
        if as_json:
            _print_json(now.to_document())
        else:
            _print_summary(tuned, now, ending, exported, _again(storage))
    if ending == "interrupted":
        raise typer.Exit(130)


def _again(storage: str) -> str:
    """The option that finds the same storage again, where it is not the default."""
    known = storage == DEFAULT_STORAGE_URL or storage == os.environ.get("TUNER_STORAGE")
    if known:
        return ""
    from sqlalchemy import make_url

    return f" --storage {make_url(storage).render_as_string(hide_password=True)}"


def _run(
    tuned: TunedStudy,
    prepared: Prepared,
    workers: int | None,
    threads: int,
    timeout: float | None,
    *,
    as_json: bool,
) -> Ending:
    from rich.console import Console

    from tuner.cluster import Cluster, default_workers, local_client
    from tuner.coordinator import Coordinator
    from tuner.progress import ProgressWatcher
    from tuner.study import WORKERS_KEY

    count = workers or default_workers()
    data = prepared.identity
    console = Console(stderr=as_json, width=None if sys.stdout.isatty() else 200)
    watcher = ProgressWatcher(tuned, console)
    watcher.say(
        f"Study {tuned.name}: {tuned.budget} trials on {count} worker(s); data {data.source}"
        f"{' (SYNTHETIC)' if data.synthetic else ''}, {data.training_rows} training and "
        f"{data.validation_rows} validation rows; split seed {data.split_seed}, "
        f"identity {data.split_id[:12]}."
    )
    tuned.storage.refuse_if_run_elsewhere(tuned.id)
    with (
        local_client(count, threads=threads) as client,
        Cluster(
            client, tuned, development_file=prepared.development_file, threads=threads
        ) as cluster,
    ):
        tuned.study.set_user_attr(WORKERS_KEY, count)
        coordinator = Coordinator(tuned, cluster, watcher)
        _stop_on_signals(coordinator)
        with watcher.showing():
            return coordinator.run(timeout=timeout)


def _stop_on_signals(coordinator: Coordinator) -> None:
    """Ctrl-C or SIGTERM once: running trials save and stay open. Twice: now."""
    asked_at: list[float] = []

    def stop(_number: int, _frame: FrameType | None) -> None:
        # One Ctrl-C may arrive twice (from the terminal, and from `make` or a wrapper).
        if not asked_at:
            asked_at.append(time.monotonic())
            coordinator.stop("interrupted")
            os.write(2, b"\nStopping: running trials save a checkpoint. Again: stop at once.\n")
        elif time.monotonic() - asked_at[0] > 0.5:
            os.write(2, b"\nStopped at once. The same command goes on where it was.\n")
            raise KeyboardInterrupt  # the workers are ended on the way out

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def _export_best(tuned: TunedStudy, folder: Path) -> Path:
    from tuner.export import best_configs, write_configs

    return write_configs(best_configs(tuned), folder, "toml")[0]


def _print_summary(
    tuned: TunedStudy, now: StudyStatus, ending: Ending, exported: Path | None, again: str
) -> None:
    from rich.console import Console

    from tuner.progress import status_details

    console = Console()
    console.print(status_details(now), highlight=False)
    if tuned.record.data.synthetic:
        _warn_synthetic()
    if exported is not None:
        typer.echo(f"Best configuration: {exported}")
    if ending in ("interrupted", "timeout", "stopped"):
        typer.echo(f"Stopped ({ending}); nothing is lost. The same command goes on where it was.")
        return
    typer.echo(f"Next: tuner export {now.study}{again}      the best configurations")
    typer.echo(f"      tuner dashboard{again}               every trial and its curves")
    if now.state != "reported":
        typer.echo(f"      tuner report {now.study}{again}      opens the test split, once")


# --- status, stop, delete ---


@app.command(epilog="Example: tuner status quickstart --watch")
def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every 2 s.")] = False,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Shows where studies stand: trials by state, best value, epochs spent and saved, disk."""
    from rich.console import Console

    from tuner.progress import status_details, status_table
    from tuner.study import list_names, load
    from tuner.study import status as read_status

    with _open(storage) as opened:
        while True:
            names = [name] if name else list_names(opened)
            found = [read_status(load(opened, one, artifacts_root=artifacts)) for one in names]
            documents = [one.to_document() for one in found]
            if as_json:
                _print_json(documents[0] if name else documents)
            elif not found:
                typer.echo("No study yet. `tuner launch studies/quickstart.toml` makes one.")
            else:
                table = status_details(found[0]) if name else status_table(found)
                Console().print(table, highlight=False)
            if not watch:
                return
            time.sleep(2.0)


@app.command(epilog="Example: tuner stop quickstart")
def stop(
    name: Name,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Stops a running study: its trials save a checkpoint; `launch` goes on from there."""
    from tuner.study import load

    with _open(storage) as opened:
        tuned = load(opened, name, artifacts_root=artifacts)
        asked = opened.request_stop(tuned.id)
    if as_json:
        _print_json({"study": name, "asked": asked})
    elif asked:
        typer.echo(f"Asked {name} to stop: it ends after the epochs that are being trained.")
    else:
        typer.echo(f"{name} is not running: nothing to stop.")


@app.command(epilog="Example: tuner delete quickstart --yes")
def delete(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
) -> None:
    """Removes a study and its artifacts; the ledger keeps what it opened."""
    from tuner.study import delete as delete_study
    from tuner.study import load

    with _open(storage) as opened:
        tuned = load(opened, name, artifacts_root=artifacts)
        if not yes:
            typer.confirm(f"Remove {name} with {len(tuned.trials())} trials for good?", abort=True)
        delete_study(tuned)
    typer.echo(f"Removed {name}.")


# --- results ---


@app.command(epilog="Example: tuner export quickstart --top 3 --format yaml -o best/")
def export(
    name: Name,
    top: Annotated[int, typer.Option(min=1, metavar="K", help="How many, best first.")] = 1,
    form: Annotated[
        Literal["toml", "json", "yaml"], typer.Option("--format", help="Of the study files.")
    ] = "toml",
    trials: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Write all trials as CSV, too.")
    ] = None,
    model: Annotated[
        bool, typer.Option("--model", help="Write the trained networks, too.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="PATH", help="A folder, or one file."),
    ] = None,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Writes the best configurations, each a study file that trains its network again."""
    from tuner.export import best_configs, write_configs, write_model, write_trials
    from tuner.study import load

    with _open(storage) as opened:
        tuned = load(opened, name, artifacts_root=artifacts)
        rows = None if trials is None else write_trials(tuned, trials)
        configs = best_configs(tuned, top)
        paths: tuple[Path, ...] = ()
        if output is not None or not as_json:
            paths = write_configs(configs, output or DEFAULT_EXPORT_FOLDER, form)
        models = [path.with_suffix(".npz") for path in paths] if model else []
        for exported, path in zip(configs, models, strict=False):
            write_model(tuned, exported, path)
        synthetic = tuned.record.data.synthetic
    if as_json:
        _print_json({"study": name, "configs": [one.to_document() for one in configs]})
        return
    if synthetic:
        _warn_synthetic()
    for exported, path in zip(configs, paths, strict=True):
        typer.echo(
            f"{exported.rank}. trial {exported.trial}, validation loss "
            f"{exported.validation_loss:.4f} after {exported.epochs} epochs: {path}"
        )
    for path in models:
        typer.echo(f"   its network: {path}")
    if len(configs) < top:
        typer.echo(f"Only {len(configs)} trials were trained to their end.")
    if rows is not None:
        typer.echo(f"All {rows} trials: {trials}")


@app.command(epilog="Example: tuner report quickstart -o report/")
def report(
    name: Name,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Where to write it.")
    ] = None,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Opens the test split, once, and writes the final report of a finished study."""
    from tuner.report import write_report

    with _open(storage) as opened:
        written = write_report(opened, name, artifacts_root=artifacts, output=output)
    if as_json:
        _print_json(written.to_document())
        return
    if written.synthetic:
        _warn_synthetic()
    typer.echo(written.summary())


@app.command(epilog="Example: tuner dashboard --port 8080")
def dashboard(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
) -> None:
    """Shows the Optuna dashboard over the storage, on this machine only."""
    from tuner.dashboard import serve

    with _open(storage) as opened:
        serve(opened, host=host, port=port)


@data_app.command("fetch", epilog="Example: tuner data fetch")
def data_fetch() -> None:
    """Downloads the solubility data into the user's cache, checked by its hash."""
    from tuner.data import fetch

    typer.echo(str(fetch()))


if __name__ == "__main__":
    main()
