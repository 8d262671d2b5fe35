"""dashboard and serve."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tuner.artifacts import (
    DEFAULT_ROOT,
    DEFAULT_STORAGE_URL,
    DEFAULT_STUDIES_FOLDER,
    DEFAULT_USERS_FILE,
)
from tuner.errors import TunerError

if TYPE_CHECKING:
    from tuner.cluster.connection import Connection
    from tuner.dashboard.settings import Settings
    from tuner.search.tuned_study import TunedStudy
from tuner.cli.app import app, dashboard_app
from tuner.cli.options import (
    AllowHosts,
    ArtifactsRoot,
    AsJson,
    BehindProxy,
    ClusterPlace,
    DataFolder,
    Host,
    LogFormat,
    LogLevel,
    Port,
    StorageUrl,
    StudiesFolder,
    Threads,
    TlsCa,
    TlsCert,
    TlsKey,
    TrustNetwork,
    TrustProxies,
    UsersFile,
    Workers,
    cluster_tls,
    connect_workers,
    refuse_workers_with_cluster,
)
from tuner.cli.terminal import (
    log_line,
    open_storage,
    print_json,
    print_note,
    require_training,
    stop_on_signals,
)


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
    """Shows studies in the Optuna dashboard, with pages to launch, stop and export under /tuner."""
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
    make_policy(settings)  # mistakes are reported before a database is opened
    with open_storage(storage, create=True) as opened:
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
    from tuner.dashboard.settings import Folders, Settings

    if users is None and DEFAULT_USERS_FILE.exists():
        users = DEFAULT_USERS_FILE
    return Settings(
        users_file=users,
        proxies=tuple(proxies or ()),
        allow_hosts=tuple(allow_hosts or ()),
        folders=Folders(artifacts=artifacts, studies=studies, data=data),
        **others,
    )


@dashboard_app.command("add-user", epilog="Example: tuner dashboard add-user ada --role editor")
def add_user(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits and . _ @ -")],
    role: Annotated[
        Literal["viewer", "editor"],
        typer.Option(help="A viewer can read, an editor can also change."),
    ] = "viewer",
    password_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File whose first line is the password; - for stdin. By default you are asked.",
        ),
    ] = None,
    users: UsersFile = None,
) -> None:
    """Adds a user, or sets the password and role of an existing one."""
    from tuner.dashboard.users import write_user

    path = users or DEFAULT_USERS_FILE
    is_first = not path.exists()
    fresh = write_user(path, name, role, _password(password_file))
    typer.echo(f"{'Added' if fresh else 'Changed'} {name}, {role}, in {path}.")
    if is_first:
        print_note("A dashboard that runs without a login asks for one after its next start.")


def _password(file: Path | None) -> str:
    if file is None:
        if not sys.stdin.isatty():
            raise TunerError(
                "No password was given, and there is no terminal to ask for one: name a file "
                "whose first line it is (--password-file FILE; - is stdin)."
            )
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
    """Removes a user; a running server ends the user's sessions at once."""
    from tuner.dashboard.users import remove_user as remove

    remove(users or DEFAULT_USERS_FILE, name)
    typer.echo(f"Removed {name}.")


@dashboard_app.command("users", epilog="Example: tuner dashboard users")
def list_users(users: UsersFile = None, as_json: AsJson = False) -> None:
    """Lists the users and their roles."""
    from tuner.dashboard.users import read_users

    found = {name: user.role for name, user in read_users(users or DEFAULT_USERS_FILE).items()}
    if as_json:
        print_json(found)
        return
    for name, role in found.items():
        typer.echo(f"{name}\t{role}")


@dashboard_app.command("log", epilog="Example: tuner dashboard log --last 20")
def log(
    last: Annotated[int, typer.Option(min=1, help="Number of entries to show.")] = 100,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    as_json: AsJson = False,
) -> None:
    """Shows the changes made through the dashboard, newest first."""
    import dataclasses

    with open_storage(storage) as opened:
        changes = opened.audit.entries(last=last)
    if as_json:
        print_json([dataclasses.asdict(one) for one in changes])
        return
    for one in changes:
        status = "never answered" if one.status is None else one.status
        typer.echo(f"{one.at}  {one.who} ({one.address})  {one.action}  {status}  {one.detail}")


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
        Path | None, typer.Option(metavar="FILE", help="Private key of the certificate, PEM.")
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
    """Runs the studies that were launched with --detach, and shows the dashboard."""
    refuse_workers_with_cluster(cluster, workers)
    tls = cluster_tls(tls_ca, tls_cert, tls_key, cluster)
    if cluster is None:
        require_training()
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

    make_policy(settings)  # mistakes are reported before a database is waited for
    connections: list[Connection] = []  # none until the workers are there
    # Until the service listens, SIGTERM ends it as Ctrl-C does, and what was opened is closed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    open_storage(
        storage, patience_seconds=None, say=log_line, create=True
    ).close()  # waits until the database is there
    with (
        # It does not wait for an unavailable database: a signal must end it meanwhile.
        open_storage(storage, patience_seconds=2.0, say=lambda _: None) as own_storage,
        make_server(
            own_storage,
            settings,
            scheduler_is_up=lambda: any(one.is_up for one in connections),
            slots=lambda: sum(one.slots() for one in connections),
        ) as server,
    ):
        from tuner.cluster.trainings import Cluster
        from tuner.coordination.service import Service
        from tuner.coordination.study_trainings import StudyTrainings

        log_line(
            f"Serving {own_storage.masked_url}; the dashboard is on {server.url} ({server.login})"
        )
        with (
            connect_workers(cluster, tls, workers, threads or 1, log_line) as connection,
            open_storage(storage, patience_seconds=2.0, say=lambda _: None) as queue,
        ):
            connections.append(connection)

            def open_workers(tuned: TunedStudy, file: Path) -> Cluster:
                return Cluster(
                    connection,
                    StudyTrainings(tuned),
                    development_file=file,
                    threads=threads or 1,
                )

            service = Service(
                open_storage=lambda: open_storage(storage, patience_seconds=None, say=log_line),
                open_workers=open_workers,
                slots=connection.slots,
                artifacts_root=artifacts,
                say=log_line,
            )
            stop_on_signals(service.stop, has_log=True)
            service.run(queue)
