"""The command line: one function for each verb, and the one place that catches errors.

Modules are imported inside each verb: `--help`, `check`, `status` and `export` must not wait
for TensorFlow, and no verb for what it does not use.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from tuner import __version__, logs
from tuner.artifacts import (
    DEFAULT_EXPORT_FOLDER,
    DEFAULT_ROOT,
    DEFAULT_STORAGE_URL,
    DEFAULT_STUDIES_FOLDER,
    DEFAULT_USERS_FILE,
    development_path,
)
from tuner.commands import command
from tuner.errors import ProblemsError, StorageMissingError, TunerError, counted

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from tuner.cluster.connection import Connection
    from tuner.cluster.scheduler import TlsFiles
    from tuner.coordination.coordinator import Ending
    from tuner.dashboard.settings import Settings
    from tuner.data.prepare import Prepared
    from tuner.search.status import StudyStatus
    from tuner.search.tuned_study import TunedStudy
    from tuner.spec.spec import StudySpec
    from tuner.storage.storage import Storage

logger = logging.getLogger(logs.OURS)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tunes the network that predicts protein solubility; the test split stays sealed.",
)
data_app = typer.Typer(no_args_is_help=True, help="The data: download.")
app.add_typer(data_app, name="data")
storage_app = typer.Typer(no_args_is_help=True, help="The database: make its schema, look at it.")
app.add_typer(storage_app, name="storage")
dashboard_app = typer.Typer(
    invoke_without_command=True, epilog="Example: tuner dashboard --port 8080"
)
app.add_typer(dashboard_app, name="dashboard")


SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="A study file, studies/*.toml.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The study's name.")]
StorageUrl = Annotated[
    str,
    typer.Option(
        "--storage",
        envvar="TUNER_STORAGE",
        metavar="URL",
        help="Where studies are kept: sqlite:///PATH or postgresql://USER@HOST/DATABASE.",
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
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Worker processes; one for each core by default."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of each training; 1 by default.")
]
ClusterPlace = typer.Option(
    "--cluster",
    metavar="ADDRESS|FILE",
    help="A Dask scheduler: tcp://host:8786, tls://host:8786, or the scheduler file it wrote.",
)
TlsCa = Annotated[
    Path | None,
    typer.Option("--tls-ca", metavar="FILE", help="Who signed the cluster's certificates, PEM."),
]
TlsCert = Annotated[
    Path | None, typer.Option("--tls-cert", metavar="FILE", help="This side's certificate, PEM.")
]
TlsKey = Annotated[
    Path | None, typer.Option("--tls-key", metavar="FILE", help="Its private key, PEM.")
]
Host = Annotated[str, typer.Option("--host", help="The dashboard's address.")]
Port = Annotated[
    int,
    typer.Option("--port", min=0, max=65535, help="The dashboard's port; 0 takes a free one."),
]
UsersFile = Annotated[
    Path | None,
    typer.Option(
        "--users",
        envvar="TUNER_USERS",
        metavar="FILE",
        help=f"Who may log in; {DEFAULT_USERS_FILE} where there is one.",
        show_default=False,
    ),
]
BehindProxy = Annotated[
    bool,
    typer.Option(
        "--behind-proxy", help="A proxy that speaks TLS stands before it, and names who asks."
    ),
]
TrustProxies = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-proxy",
        metavar="ADDRESS",
        help="Where that proxy is, an address or a network (10.0.0.0/24); repeatable. "
        "By default this machine.",
        show_default=False,
    ),
]
TrustNetwork = Annotated[
    bool,
    typer.Option(
        "--trust-network",
        help="Plain HTTP on another --host than loopback: nobody can listen on the way.",
    ),
]
AllowHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host", metavar="NAME", help="One more name that browsers may ask for; repeatable."
    ),
]
StudiesFolder = Annotated[
    Path,
    typer.Option(
        "--studies", metavar="DIR", help="The study files that the page offers to launch."
    ),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="DIR", help="The data files that an uploaded study file may name."
    ),
]
SourcePath = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="PATH", help="Where the study's data is now: its file, or its folder."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides any key of the study file."),
]


def _choose_log(variable: str) -> Callable[[str | None], str | None]:
    def choose(value: str | None) -> str | None:
        if value is not None:
            os.environ[variable] = value  # the processes that this one starts write the same log
            logs.set_up()
        return value

    return choose


LogLevel = Annotated[
    Literal["debug", "info", "warning", "error", "critical"] | None,
    typer.Option(
        "--log-level",
        callback=_choose_log(logs.LEVEL_VARIABLE),
        is_eager=True,
        help="Of the log on stderr, Dask's and Optuna's lines too; also $TUNER_LOG_LEVEL.",
    ),
]
LogFormat = Annotated[
    Literal["text", "json"] | None,
    typer.Option(
        "--log-format",
        callback=_choose_log(logs.FORMAT_VARIABLE),
        is_eager=True,
        help="json: one object a line; also $TUNER_LOG_FORMAT.",
    ),
]


def main() -> NoReturn:
    """Runs the command line and exits.

    0 done, 1 an error that the message explains, 2 wrong usage, 130 interrupted.
    """
    debug = "--debug" in sys.argv or bool(os.environ.get("TUNER_DEBUG"))
    if debug:
        sys.argv = [argument for argument in sys.argv if argument != "--debug"]
        os.environ[logs.LEVEL_VARIABLE] = "debug"
    # A name or a path that the output's encoding does not have is shown escaped, as on stderr.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        logs.set_up()
        try:
            app()
        finally:
            sys.stdout.flush()  # a full disk is told of here, and not on the way out
    except KeyboardInterrupt:
        _complain("Interrupted.")
        sys.exit(130)
    except Exception as error:
        _leave_stdout_if_it_takes_nothing()
        if isinstance(error, BrokenPipeError):  # `tuner status | head`
            sys.exit(1)
        message = _explanation(error)
        if message is None and logs.is_asked():
            logger.critical("%s: %s", type(error).__name__, error, exc_info=error)
            sys.exit(1)
        if debug or message is None:
            raise
        _complain(message)
        sys.exit(1)
    sys.exit(0)


def _leave_stdout_if_it_takes_nothing() -> None:
    """What was not printed would be tried again when Python ends, with a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explanation(error: Exception) -> str | None:
    """What to tell the user; None of an error that is a mistake of ours."""
    # Optuna's is the database's, in the middle of a study.
    if isinstance(error, TunerError) or type(error).__name__ == "StorageInternalError":
        return str(error)
    if isinstance(error, OSError):
        place = "the output" if error.filename is None else error.filename
        return f"{place}: {error.strerror or error}. With --debug it is told where that happened."
    return None


def _complain(message: str) -> None:
    if logs.is_asked():
        logger.error(message)
        return
    typer.secho(message, fg=typer.colors.RED if sys.stderr.isatty() else None, err=True)


def _note(message: str) -> None:
    if logs.is_asked():
        logger.info(message)
        return
    typer.echo(message, err=True)


def _log(message: str) -> None:
    """A line of the log of what runs for long."""
    logger.info(message)


#: Where there is no terminal, Rich takes 80 columns, and folds or cuts what is longer.
_PIPE_COLUMNS = 100_000


def terminal(*, stderr: bool = False, **options: Any) -> Console:
    """The console that shows tables and progress.

    What it prints is text: `[bold]` or `:smile:` in a name, a path or an error is no markup.
    Styles are `rich.text.Text`.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_COLUMNS
    defaults = {"stderr": stderr, "width": width, "markup": False, "emoji": False}
    return Console(highlight=False, **(defaults | options))


def _print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=2))


def _open(
    url: str,
    *,
    patience_seconds: float | None = 5.0,
    say: Callable[[str], None] = _note,
    create: bool = False,
) -> Storage:
    """Opens a storage; only a verb that puts something into it makes one that is not there."""
    import optuna
    from stamina.instrumentation import set_on_retry_hooks

    from tuner.storage.storage import Storage

    set_on_retry_hooks(())  # an outage is told in our words
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logs.adopt()
    return Storage(url, patience_seconds=patience_seconds, say=say, create=create)


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
    storage: StorageUrl = DEFAULT_STORAGE_URL,
) -> None:
    """Validates a study file and its data, and says what the study would do; trains nothing."""
    from tuner.spec.schema import json_schema

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
    from tuner.spec.bounds import parameter_count_range

    low, high = parameter_count_range(spec.space, spec.data.max_length)
    shared = _shared_rows(storage, spec, prepared)
    document = {
        "study": spec.name,
        "valid": True,
        "errors": [],
        "brackets": [list(bracket) for bracket in spec.brackets],
        "trials_of_brackets": list(spec.trials_of_brackets(spec.trials)),
        "rungs": list(spec.rungs),
        "max_epochs": spec.training.max_epochs,
        "planned_epochs": _planned_epochs(spec),
        "trials": spec.trials,
        "parameter_count": {"min": low, "max": high},
        "data": prepared.identity.check_document(),
        "warnings": [*prepared.all_warnings, *shared],
        "spec_hash": spec.spec_hash,
        "spec": spec.to_document(),
    }
    if as_json:
        _print_json(document)
    else:
        _print_check(spec, document)


def _shared_rows(storage: str, spec: StudySpec, prepared: Prepared) -> tuple[str, ...]:
    """Says which rows other studies keep sealed, if there is a storage to look at."""
    from tuner.errors import StorageError, StorageMissingError
    from tuner.search.overlap import warnings

    try:
        with _open(storage, patience_seconds=1.0, say=lambda _: None) as opened:
            shared = warnings(opened, spec, prepared)
    except StorageMissingError:
        return ()
    except StorageError as error:
        _note(f"Other studies could not be looked at for rows that they keep sealed: {error}")
        return ()
    for warning in shared:
        _warn(warning)
    return shared


def _load(
    path: Path, overrides: list[str], artifacts: Path, *, quiet: bool = False
) -> tuple[StudySpec, Prepared]:
    from tuner.data.prepare import prepare
    from tuner.spec.reader import load_spec

    spec = load_spec(path, overrides)
    prepared = prepare(spec.data, folder=spec.folder, artifacts=artifacts, sha256=spec.data_sha256)
    for warning in prepared.all_warnings:
        if warning in prepared.loud:
            _warn(warning)
        else:
            _note(f"Warning: {warning}")
    if prepared.identity.synthetic and not quiet:
        _warn_synthetic()
    return spec, prepared


def _warn_synthetic() -> None:
    _warn("SYNTHETIC DATA: the proteins of this study are made up. No result means anything.")


def _warn(text: str) -> None:
    if logs.is_asked():
        logger.warning(text)
        return
    line = "!" * 78
    typer.secho(f"{line}\n{text}\n{line}", fg=typer.colors.YELLOW, bold=True, err=True)


def _invalid(path: Path, error: ProblemsError) -> dict[str, Any]:
    return {
        "study": path.stem,
        "valid": False,
        "errors": error.to_document(),
    }


def _planned_epochs(spec: StudySpec) -> int:
    """Epochs the study is expected to train: at each rung the best 1/eta of a bracket go on.

    Early stopping and asynchronous promotion (a rung's first trials always pass) move it.
    """
    if spec.hyperband is None:
        return spec.trials * spec.training.max_epochs
    eta = spec.hyperband.eta
    total = 0.0
    for rungs, trials in zip(spec.brackets, spec.trials_of_brackets(spec.trials), strict=True):
        alive, before = float(trials), 0
        for rung in (*rungs, spec.training.max_epochs):
            total += alive * (rung - before)
            alive, before = alive / eta, rung
    return round(total)


def _print_check(spec: StudySpec, document: dict[str, Any]) -> None:
    import tomli_w
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
    table.add_row(
        "trials", f"{spec.trials}, at most {counted(spec.training.max_epochs, 'epoch')} each"
    )
    for bracket, trials in enumerate(spec.trials_of_brackets(spec.trials)):
        stops = ", ".join(map(str, spec.brackets[bracket])) or "never"
        table.add_row(
            f"bracket {bracket}",
            f"{counted(trials, 'trial')}; may stop one after epochs: {stops}",
        )
    table.add_row("epochs", f"about {document['planned_epochs']} planned, {full} without pruning")
    table.add_row("parameters", f"{count['min']:,} to {count['max']:,} in a network")
    table.add_row("searched", ", ".join(spec.space.parameters) or "nothing")
    console = terminal()
    console.print(table)
    console.print("\nThe whole study file, every default written out:\n", style="dim")
    typer.echo(tomli_w.dumps(spec.to_document()), nl=False)


# --- launch ---


@app.command(epilog="Example: tuner launch studies/quickstart.toml --workers 2")
def launch(
    spec_path: SpecPath,
    name: Annotated[str | None, typer.Option(help="Another name than the file's.")] = None,
    workers: Workers = None,
    threads: Threads = None,
    cluster: Annotated[str | None, ClusterPlace] = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
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
    detach: Annotated[
        bool, typer.Option("--detach", help="Queue it for `tuner serve`, and return at once.")
    ] = False,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
    _log_level: LogLevel = None,
    _log_format: LogFormat = None,
) -> None:
    """Creates a study, or takes it up where it stopped, and runs it to its budget."""
    if detach:
        here: dict[str, object] = {"--workers": workers, "--threads": threads}
        here |= {"--timeout": timeout, "--export": export_to, "--cluster": cluster}
        here |= {"--tls-ca": tls_ca, "--tls-cert": tls_cert, "--tls-key": tls_key}
        _refuse_with_detach(here)
    _refuse_two_places(cluster, workers)
    tls = _tls(tls_ca, tls_cert, tls_key, cluster)
    if cluster is None and not detach:
        _require_training()
    if export_to is not None:
        from tuner.results.export import require_writable_output

        require_writable_output(export_to)
    from tuner.coordination.queue import overrides_for

    given = [*(overrides or []), *overrides_for(name, trials)]
    spec, prepared = _load(spec_path, given, artifacts)
    from tuner.search.overlap import enter
    from tuner.search.status import status
    from tuner.search.study import create_or_resume, find_or_create

    with _open(storage, patience_seconds=None, create=True) as opened:
        # A study that stands there is changed by who holds its lease, and only then.
        made_from: dict[str, Any] = {
            "development_sha256": prepared.development_sha256,
            "artifacts_root": artifacts,
        }
        tuned = find_or_create(opened, spec, prepared.identity, **made_from)
        for warning in enter(opened, spec, prepared):
            _warn(warning)
        now = status(tuned)
        if detach or now.finished_trials >= spec.trials:
            tuned = create_or_resume(opened, spec, prepared.identity, **made_from)
        if detach:
            said = _queue(tuned)
            _note(said) if as_json else typer.echo(said)
            if as_json:
                _print_json(status(tuned).to_document())
            return
        ending: Ending = "finished"
        if now.finished_trials < spec.trials:
            ending = _run(
                tuned,
                spec,
                prepared,
                lambda say: _connect(cluster, tls, workers, threads or 1, say),
                threads or 1,
                timeout,
                as_json=as_json,
            )
        elif not as_json:
            _note(f"Study {now.study} is finished.")
        now = status(tuned)
        exported = None
        if export_to is not None and now.best is not None:
            exported = _export_best(tuned, export_to)
        if as_json:
            _print_json(now.to_document())
        else:
            _print_summary(tuned, now, ending, exported)
    if ending == "interrupted":
        raise typer.Exit(130)


def _refuse_two_places(cluster: str | None, workers: int | None) -> None:
    if cluster is not None and workers is not None:
        raise typer.BadParameter(
            "--workers starts workers on this machine, --cluster uses those of a scheduler; "
            "`tuner worker --cluster ...` adds one to it."
        )


def _require_training() -> None:
    """Ends a verb that trains on this machine before it makes anything, where it cannot."""
    from tuner.cluster.processes import require_training

    require_training()


def _refuse_with_detach(options: dict[str, object]) -> None:
    given = [option for option, value in options.items() if value is not None]
    if given:
        raise typer.BadParameter(
            f"{', '.join(given)} make no sense with --detach: the study runs in the service, on "
            "the service's workers (tuner serve --help), until `tuner stop` or its budget."
        )


def _queue(tuned: TunedStudy) -> str:
    """Puts a study into the service's queue, where it is not at work already; says what is so."""
    from tuner.coordination import queue as orders

    queued = orders.queue(tuned)
    if queued.outcome in ("finished", "running"):
        return queued.in_words
    suggested = {
        tuned.command("serve"): "drives it, where no service does so yet",
        tuned.command("status", tuned.name, "--watch"): "shows how far it is",
        tuned.command("stop", tuned.name): "takes it out of the queue",
    }
    return f"{queued.in_words}\n{_next(tuned, suggested)}"


def _next(tuned: TunedStudy, suggested: dict[str, str]) -> str:
    """Commands with what each does, a line each: a shell takes the whole line."""
    from tuner.commands import password_hint

    width = max(map(len, suggested))
    lines = [f"  {command:<{width}}  # {what}" for command, what in suggested.items()]
    hint = password_hint(tuned.storage.url)
    return "\n".join(["Next:", *lines, *([hint] if hint else [])])


def _tls(
    ca: Path | None, cert: Path | None, key: Path | None, cluster: str | None
) -> TlsFiles | None:
    """The certificates of a cluster; warns on stderr of one that everybody can reach."""
    from tuner.cluster.scheduler import exposure, scheduler_address, tls_files

    tls = tls_files(ca, cert, key)
    if cluster is not None:
        warning = exposure(scheduler_address(cluster, tls))
        if warning is not None:
            if logs.is_asked():
                logger.warning(warning)
            else:
                typer.secho(warning, fg=typer.colors.YELLOW, bold=True, err=True)
    elif tls is not None:
        raise typer.BadParameter("--tls-ca, --tls-cert and --tls-key belong to --cluster.")
    return tls


def _connect(
    cluster: str | None,
    tls: TlsFiles | None,
    workers: int | None,
    threads: int,
    say: Callable[[str], None],
) -> AbstractContextManager[Connection]:
    """To the workers of a scheduler, or to workers of this machine that are started for it."""
    from tuner.cluster.connection import default_workers, local_connection, remote_connection
    from tuner.dashboard.connections import raise_descriptor_limit

    raise_descriptor_limit()  # each worker and each connection costs some

    if cluster is not None:
        return remote_connection(cluster, tls=tls, say=say)
    return local_connection(workers or default_workers(), threads=threads, say=say)


def _run(
    tuned: TunedStudy,
    spec: StudySpec,
    prepared: Prepared,
    connect: Callable[[Callable[[str], None]], AbstractContextManager[Connection]],
    threads: int,
    timeout: float | None,
    *,
    as_json: bool,
) -> Ending:
    from tuner.cli.progress import ProgressWatcher
    from tuner.cluster.trainings import Cluster
    from tuner.coordination.coordinator import Coordinator

    data = prepared.identity
    console = terminal(stderr=as_json)
    watcher = ProgressWatcher(tuned, console)
    tuned.storage.refuse_if_run_elsewhere(tuned.id)
    with connect(watcher.say) as connection:
        connection.require_workers()
        count = connection.slots()
        watcher.say(
            f"Study {tuned.name}: {counted(spec.trials, 'trial')} on "
            f"{counted(count, 'worker')}; data {data.source}"
            f"{' (SYNTHETIC)' if data.synthetic else ''}, {data.training_rows} training and "
            f"{data.validation_rows} validation rows; split seed {data.split_seed}, "
            f"identity {data.split_id[:12]}."
        )
        with Cluster(
            connection, tuned, development_file=prepared.development_file, threads=threads
        ) as cluster:
            coordinator = Coordinator(tuned, cluster, watcher)
            _stop_on_signals(lambda: coordinator.stop("interrupted"))
            with watcher.showing():
                ending = coordinator.run(asked=spec, timeout=timeout)
    tuned.storage.dequeue(tuned.id)  # it was driven here, and not by the service
    return ending


def _stop_on_signals(stop_gracefully: Callable[[], None], *, has_log: bool = False) -> None:
    """Ctrl-C or SIGTERM once: running trials save and stay open. Twice: now."""
    from tuner.cluster.processes import SAME_SIGNAL_SECONDS

    asked_at: list[float] = []

    def say(message: str) -> None:
        is_log = has_log or logs.is_asked()
        os.write(2, logs.line(message) if is_log else f"\n{message}\n".encode())

    def stop(_number: int, _frame: FrameType | None) -> None:
        # One Ctrl-C may arrive twice (from the terminal, and from `make` or a wrapper).
        if not asked_at:
            asked_at.append(time.monotonic())
            stop_gracefully()
            say("Stopping: running trials save a checkpoint. Again: stop at once.")
        elif time.monotonic() - asked_at[0] > SAME_SIGNAL_SECONDS:
            say("Stopped at once. The same command goes on where it was.")
            raise KeyboardInterrupt  # the workers are ended on the way out

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def _export_best(tuned: TunedStudy, folder: Path) -> Path:
    from tuner.results.export import best_configs, write_configs

    return write_configs(best_configs(tuned), folder)[0]


def _print_summary(
    tuned: TunedStudy, now: StudyStatus, ending: Ending, exported: Path | None
) -> None:
    from tuner.cli.progress import status_details

    terminal().print(status_details(now))
    if tuned.record.data.synthetic:
        _warn_synthetic()
    if exported is not None:
        typer.echo(f"Best configuration: {exported}")
    if ending in ("interrupted", "timeout", "stopped"):
        typer.echo(f"Stopped ({ending}); nothing is lost. The same command goes on where it was.")
        return
    suggested = {
        tuned.command("export", tuned.name): "the best configurations",
        tuned.command("dashboard"): "every trial and its curves",
    }
    if now.state != "reported":
        suggested[tuned.command("report", tuned.name)] = "opens the test split, once"
    typer.echo(_next(tuned, suggested))


# --- worker ---


@app.command(epilog="Example: tuner worker --cluster tcp://10.0.0.5:8786 --lifetime 14000")
def worker(
    cluster: Annotated[str, ClusterPlace],
    workers: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Training processes; auto: one for each GPU, else one for each --threads cores.",
        ),
    ] = "1",
    threads: Annotated[int, typer.Option(min=1, help="Threads of each training.")] = 1,
    memory_limit: Annotated[
        str,
        typer.Option(
            metavar="SIZE|auto",
            help="Of each process, such as 4GB; one that needs more is ended and started again.",
        ),
    ] = "auto",
    lifetime: Annotated[
        float | None,
        typer.Option(
            min=1, metavar="SECONDS", help="Leave after so long: before a batch queue kills."
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
    """Trains for the studies of a Dask scheduler; any number of these may come and go."""
    from tuner.cluster.scheduler import SchedulerFileMissingError, tls_files
    from tuner.cluster.worker import WorkerSettings, serve

    _require_training()
    # Not isdigit(): a superscript two is a digit that int() does not read.
    if workers != "auto" and not re.fullmatch("[1-9][0-9]{0,3}", workers):
        raise typer.BadParameter("must be 1 to 9999, or auto", param_hint="--workers")
    try:
        tls = _tls(tls_ca, tls_cert, tls_key, cluster)
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
    serve(settings, say=_log)


# --- status, stop, delete ---


@app.command(epilog="Example: tuner status quickstart --watch")
def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow it until it is neither queued nor running.")
    ] = False,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Shows where studies stand: trials by state, best value, epochs spent and saved, disk."""
    from tuner.cli.progress import status_details, status_table, watch_studies
    from tuner.search.status import status as read_status
    from tuner.search.study import list_names, load

    def look() -> list[StudyStatus]:
        names = [name] if name else list_names(opened)
        return [read_status(load(opened, one, artifacts_root=artifacts)) for one in names]

    def shown(found: list[StudyStatus]) -> RenderableType:
        if as_json:
            documents = [one.to_document() for one in found]
            return json.dumps(documents[0] if name else documents, indent=2)
        if not found:
            launch = command(
                "launch", "studies/quickstart.toml", storage=storage, artifacts=artifacts
            )
            return f"No study yet. `{launch}` makes one."
        return status_details(found[0]) if name else status_table(found)

    console = terminal()
    try:
        with _open(storage) as opened:
            if watch:
                watch_studies(look, shown, console, in_place=console.is_terminal and not as_json)
            else:
                console.print(shown(look()), soft_wrap=as_json)
    except StorageMissingError:
        if name:
            raise
        console.print(shown([]))


@app.command(epilog="Example: tuner stop quickstart")
def stop(
    name: Name,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Stops a running or queued study: its trials save a checkpoint; `launch` goes on."""
    from tuner.coordination import queue as orders
    from tuner.search.study import load

    with _open(storage) as opened:
        tuned = load(opened, name, artifacts_root=artifacts)
        stopped = orders.stop(tuned)
    if as_json:
        _print_json(stopped.to_document())
    else:
        resumes = f" `{tuned.command('launch', 'STUDY.toml')}` resumes it."
        typer.echo(stopped.in_words + resumes * (stopped.dequeued and not stopped.asked))


@app.command(epilog="Example: tuner delete quickstart --yes")
def delete(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
) -> None:
    """Removes a study and its artifacts; the ledger keeps what it opened."""
    from tuner.search.study import delete as delete_study
    from tuner.search.study import load

    with _open(storage) as opened:
        tuned = load(opened, name, artifacts_root=artifacts)
        if not yes:
            trials = counted(len(tuned.trials()), "trial")
            typer.confirm(f"Remove {name} with {trials} for good?", abort=True)
        delete_study(tuned)
    typer.echo(f"Removed {name}.")
    rows = development_path(artifacts, tuned.record.development_sha256)
    if rows.is_file():
        typer.echo(f"Its training and validation rows stay, others may need them: {rows}")


# --- results ---


@app.command(epilog="Example: tuner export quickstart --top 3 --format yaml -o best/")
def export(
    name: Name,
    top: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="How many, best first; 1 by default.")
    ] = None,
    trial: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="This trial, whatever became of it."),
    ] = None,
    form: Annotated[
        Literal["toml", "json", "yaml"] | None,
        typer.Option("--format", help="Of the study files; by the suffix of -o, else toml."),
    ] = None,
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
    data: SourcePath = None,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Writes the best configurations (or one trial's), each a study file that trains it again."""
    from tuner.results.export import (
        best_configs,
        config_of_trial,
        write_configs,
        write_model,
        write_trials,
    )
    from tuner.search.study import load

    if trial is not None and top is not None:
        raise typer.BadParameter("--top asks for the best trials, --trial for one by its number.")
    with _open(storage) as opened:
        tuned = load(opened, name, artifacts_root=artifacts)
        rows = None if trials is None else write_trials(tuned, trials)
        wanted = top or 1
        configs = (
            best_configs(tuned, wanted, data=data)
            if trial is None
            else (config_of_trial(tuned, trial, data=data),)
        )
        paths: tuple[Path, ...] = ()
        if output is not None or not as_json:
            paths = write_configs(configs, output or DEFAULT_EXPORT_FOLDER, form)
        models = [path.with_suffix(".npz") for path in paths] if model else []
        for exported, path in zip(configs, models, strict=False):
            write_model(tuned, exported, path)
        synthetic = tuned.record.data.synthetic
    if as_json:
        _print_json({"study": tuned.name, "configs": [one.to_document() for one in configs]})
        return
    if synthetic:
        _warn_synthetic()
    for exported, path in zip(configs, paths, strict=True):
        rank = "Trial" if exported.rank is None else f"{exported.rank}. trial"
        loss = exported.validation_loss
        reached = "" if loss is None else f", validation loss {loss:.4f}"
        typer.echo(
            f"{rank} {exported.trial}{reached} after {counted(exported.epochs, 'epoch')}: {path}"
        )
    for path in models:
        typer.echo(f"   its network: {path}")
    if len(configs) < wanted:
        were = counted(len(configs), "trial was", "trials were")
        typer.echo(f"Only {were} trained to the end.")
    if rows is not None:
        typer.echo(f"{counted(rows, 'trial')} in all: {trials}")


@app.command(epilog="Example: tuner report quickstart -o report/")
def report(
    name: Name,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Where to write it.")
    ] = None,
    data: SourcePath = None,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Opens the test split, once, and writes the final report of a finished study."""
    from tuner.results.report import write_report

    with _open(storage) as opened:
        written = write_report(opened, name, artifacts_root=artifacts, output=output, data=data)
    if as_json:
        _print_json(written.to_document())
        return
    if written.synthetic:
        _warn_synthetic()
    typer.echo(written.summary())


# --- dashboard ---


@dashboard_app.callback()
def dashboard(
    context: typer.Context,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    users: UsersFile = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option("--tls-cert", metavar="FILE", help="The dashboard's certificate, PEM."),
    ] = None,
    tls_key: TlsKey = None,
    behind_proxy: BehindProxy = False,
    trust_proxy: TrustProxies = None,
    trust_network: TrustNetwork = False,
    allow_host: AllowHosts = None,
    studies: StudiesFolder = DEFAULT_STUDIES_FOLDER,
    data: DataFolder = None,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    _log_level: LogLevel = None,
    _log_format: LogFormat = None,
) -> None:
    """Shows studies in the Optuna dashboard, with the pages to launch and export under /tuner."""
    if context.invoked_subcommand is not None:
        return
    from tuner.dashboard.server import serve
    from tuner.dashboard.settings import make_policy

    settings = _dashboard_settings(
        host=host,
        port=port,
        users=users,
        certificate=tls_cert,
        key=tls_key,
        behind_proxy=behind_proxy,
        proxies=trust_proxy,
        trust_network=trust_network,
        allow_hosts=allow_host,
        studies=studies,
        data=data,
        artifacts=artifacts,
    )
    make_policy(settings)  # what is wrong is said before a database is opened
    with _open(storage, create=True) as opened:
        serve(opened, settings)


def _dashboard_settings(
    *,
    users: Path | None,
    proxies: list[str] | None,
    allow_hosts: list[str] | None,
    studies: Path,
    data: Path | None,
    artifacts: Path,
    **others: Any,
) -> Settings:
    from tuner.dashboard.pages import Places
    from tuner.dashboard.settings import Settings

    if users is None and DEFAULT_USERS_FILE.exists():
        users = DEFAULT_USERS_FILE
    return Settings(
        users_file=users,
        proxies=tuple(proxies or ()),
        allow_hosts=tuple(allow_hosts or ()),
        places=Places(artifacts=artifacts, studies=studies, data=data),
        **others,
    )


@dashboard_app.command("add-user", epilog="Example: tuner dashboard add-user ada --role editor")
def add_user(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits and . _ @ -")],
    role: Annotated[
        Literal["viewer", "editor"], typer.Option(help="A viewer looks, an editor changes.")
    ] = "viewer",
    password_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Its first line is the password; - is stdin. Asked for otherwise."
        ),
    ] = None,
    users: UsersFile = None,
) -> None:
    """Adds a user of the dashboard, or gives one a new password and role."""
    from tuner.dashboard.users import write_user

    path = users or DEFAULT_USERS_FILE
    fresh = write_user(path, name, role, _password(password_file))
    typer.echo(f"{'Added' if fresh else 'Changed'} {name}, {role}, in {path}.")


def _password(file: Path | None) -> str:
    if file is None:
        return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True))
    try:
        lines = (sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TunerError(f"--password-file {file}: {error}") from error
    return lines[0] if lines else ""


@dashboard_app.command("remove-user", epilog="Example: tuner dashboard remove-user ada")
def remove_user(
    name: Annotated[str, typer.Argument(metavar="NAME")], users: UsersFile = None
) -> None:
    """Removes a user of the dashboard; a running server ends that one's sessions at once."""
    from tuner.dashboard.users import remove_user as remove

    remove(users or DEFAULT_USERS_FILE, name)
    typer.echo(f"Removed {name}.")


@dashboard_app.command("users", epilog="Example: tuner dashboard users")
def list_users(users: UsersFile = None, as_json: AsJson = False) -> None:
    """Lists who may log in, and as what."""
    from tuner.dashboard.users import read_users

    found = {name: user.role for name, user in read_users(users or DEFAULT_USERS_FILE).items()}
    if as_json:
        _print_json(found)
        return
    for name, role in found.items():
        typer.echo(f"{name}\t{role}")


@dashboard_app.command("log", epilog="Example: tuner dashboard log --last 20")
def log(
    last: Annotated[int, typer.Option(min=1, help="So many.")] = 100,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    as_json: AsJson = False,
) -> None:
    """Shows who changed what through the dashboard, and when, newest first."""
    import dataclasses

    with _open(storage) as opened:
        changes = opened.changes(last=last)
    if as_json:
        _print_json([dataclasses.asdict(one) for one in changes])
        return
    for one in changes:
        status = "never answered" if one.status is None else one.status
        typer.echo(f"{one.at}  {one.who} ({one.address})  {one.action}  {status}  {one.detail}")


# --- serve ---


@app.command(epilog="Example: tuner serve --workers 2 --port 8080")
def serve(
    workers: Workers = None,
    threads: Threads = None,
    cluster: Annotated[str | None, ClusterPlace] = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    users: UsersFile = None,
    dashboard_tls_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The dashboard's certificate, PEM."),
    ] = None,
    dashboard_tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its private key, PEM.")
    ] = None,
    behind_proxy: BehindProxy = False,
    trust_proxy: TrustProxies = None,
    trust_network: TrustNetwork = False,
    allow_host: AllowHosts = None,
    studies: StudiesFolder = DEFAULT_STUDIES_FOLDER,
    data: DataFolder = None,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    _log_level: LogLevel = None,
    _log_format: LogFormat = None,
) -> None:
    """Drives every study that was launched with --detach, and shows the dashboard."""
    _refuse_two_places(cluster, workers)
    tls = _tls(tls_ca, tls_cert, tls_key, cluster)
    if cluster is None:
        _require_training()
    settings = _dashboard_settings(
        host=host,
        port=port,
        users=users,
        certificate=dashboard_tls_cert,
        key=dashboard_tls_key,
        behind_proxy=behind_proxy,
        proxies=trust_proxy,
        trust_network=trust_network,
        allow_hosts=allow_host,
        studies=studies,
        data=data,
        artifacts=artifacts,
    )
    from tuner.dashboard.server import make_server
    from tuner.dashboard.settings import make_policy

    make_policy(settings)  # what is wrong is said before a database is waited for
    connections: list[Connection] = []  # none until the workers are there
    # Until the service listens, SIGTERM ends it as Ctrl-C does: what was opened is closed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _open(
        storage, patience_seconds=None, say=_log, create=True
    ).close()  # waits for one that is not up yet
    with (
        # It gives up on a database that is away, so that a signal is heard meanwhile.
        _open(storage, patience_seconds=2.0, say=lambda _: None) as shown,
        make_server(
            shown, settings, scheduler_is_up=lambda: any(one.is_up for one in connections)
        ) as server,
    ):
        from tuner.cluster.trainings import Cluster
        from tuner.coordination.service import Service

        _log(f"Serving {shown.masked_url}; the dashboard is on {server.url} ({server.login})")
        with (
            _connect(cluster, tls, workers, threads or 1, _log) as connection,
            _open(storage, patience_seconds=2.0, say=lambda _: None) as queue,
        ):
            connections.append(connection)

            def open_workers(tuned: TunedStudy, file: Path) -> Cluster:
                return Cluster(connection, tuned, development_file=file, threads=threads or 1)

            service = Service(
                open_storage=lambda: _open(storage, patience_seconds=None, say=_log),
                open_workers=open_workers,
                slots=connection.slots,
                artifacts_root=artifacts,
                say=_log,
            )
            _stop_on_signals(service.stop, has_log=True)
            service.run(queue)


@data_app.command("fetch", epilog="Example: tuner data fetch")
def data_fetch() -> None:
    """Downloads the solubility data into the user's cache, checked by its hash."""
    from tuner.data.solubility import fetch

    typer.echo(str(fetch()))


@storage_app.command("init", epilog="Example: tuner storage init --storage postgresql://lab@db/lab")
def storage_init(storage: StorageUrl = DEFAULT_STORAGE_URL) -> None:
    """Creates the schema, or brings an older one up to date; where it is right, does nothing."""
    from tuner.storage.storage import Storage

    with Storage(storage, patience_seconds=60.0, say=_note, upgrade=True) as opened:
        typer.echo(f"{opened.masked_url} is ready.")


@storage_app.command("check", epilog="Example: tuner storage check --json")
def storage_check(storage: StorageUrl = DEFAULT_STORAGE_URL, as_json: AsJson = False) -> None:
    """Says whether the storage is reachable, right in version, and how fast; changes nothing."""
    import dataclasses

    from tuner.storage.check import check_storage

    check = check_storage(storage)
    if as_json:
        _print_json(dataclasses.asdict(check))
    else:
        typer.echo(f"{check.url}: {'reachable' if check.reachable else 'NOT reachable'}")
        if check.schema is not None:
            typer.echo(f"schema: {check.schema}")
        if check.milliseconds is not None:
            typer.echo(
                f"a question takes {check.milliseconds:.1f} ms, "
                f"a write {check.commit_milliseconds:.1f} ms (medians of 20)"
            )
        if check.detail:
            typer.echo(check.detail)
    if not check.is_right:
        raise typer.Exit(1)
