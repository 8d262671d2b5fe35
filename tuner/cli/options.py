"""Arguments and options that several verbs share."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tuner import logs
from tuner.artifacts import DEFAULT_USERS_FILE
from tuner.cli.completion import study_names
from tuner.cli.terminal import logger

if TYPE_CHECKING:
    from tuner.cluster.connection import Connection
    from tuner.cluster.scheduler import TlsFiles

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="A study file, studies/*.toml.")]
Name = Annotated[
    str,
    typer.Argument(metavar="NAME", help="The study's name.", autocompletion=study_names),
]
StorageUrl = Annotated[
    str,
    typer.Option(
        "--storage",
        envvar="TUNER_STORAGE",
        metavar="URL",
        help="URL of the database: sqlite:///PATH or postgresql://USER@HOST/DATABASE.",
    ),
]
ArtifactsRoot = Annotated[
    Path,
    typer.Option(
        "--artifacts",
        envvar="TUNER_ARTIFACTS",
        metavar="DIR",
        help="Folder for checkpoints, weights and development data.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, help="Number of worker processes; one for each core by default."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Number of threads of each training; 1 by default."),
]
ClusterPlace = typer.Option(
    "--cluster",
    metavar="ADDRESS|FILE",
    help="Dask scheduler: tcp://HOST:8786, tls://HOST:8786, or the scheduler file that it wrote.",
)
TlsCa = Annotated[
    Path | None,
    typer.Option("--tls-ca", metavar="FILE", help="Certificate authority of the cluster, PEM."),
]
TlsCert = Annotated[
    Path | None,
    typer.Option("--tls-cert", metavar="FILE", help="Certificate of this process, PEM."),
]
TlsKey = Annotated[
    Path | None,
    typer.Option("--tls-key", metavar="FILE", help="Private key of the certificate, PEM."),
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[
    int,
    typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 for any free one."),
]
UsersFile = Annotated[
    Path | None,
    typer.Option(
        "--users",
        envvar="TUNER_USERS",
        metavar="FILE",
        help=f"File with the users; {DEFAULT_USERS_FILE} if it exists.",
        show_default=False,
    ),
]
BehindProxy = Annotated[
    bool,
    typer.Option(
        "--behind-proxy",
        help="The server is behind a proxy that terminates TLS and forwards the client's address.",
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
        help="Allow plain HTTP on a --host other than loopback, in a network that you trust.",
    ),
]
AllowHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        metavar="NAME",
        help="Additional host name that requests may have; repeatable.",
    ),
]
StudiesFolder = Annotated[
    Path,
    typer.Option(
        "--studies", metavar="DIR", help="Folder with the study files that the page offers."
    ),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="DIR",
        help="Folder with the data files that an uploaded study file may name.",
    ),
]
SourcePath = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="PATH", help="Current place of the study's data: the file, or its folder."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides any key of the study file."),
]


def _choose_log(variable: str) -> Callable[[str | None], str | None]:
    def choose(value: str | None) -> str | None:
        if value is not None:
            os.environ[variable] = value  # child processes write the same log
            logs.set_up()
        return value

    return choose


LogLevel = Annotated[
    Literal["debug", "info", "warning", "error", "critical"] | None,
    typer.Option(
        "--log-level",
        callback=_choose_log(logs.LEVEL_VARIABLE),
        is_eager=True,
        help="Level of the log on stderr, which includes Dask's and Optuna's; also "
        "$TUNER_LOG_LEVEL.",
    ),
]
LogFormat = Annotated[
    Literal["text", "json"] | None,
    typer.Option(
        "--log-format",
        callback=_choose_log(logs.FORMAT_VARIABLE),
        is_eager=True,
        help="Format of the log; json is one object per line. Also $TUNER_LOG_FORMAT.",
    ),
]


def refuse_workers_with_cluster(cluster: str | None, workers: int | None) -> None:
    """Refuses `--workers` together with `--cluster`."""
    if cluster is not None and workers is not None:
        raise typer.BadParameter(
            "--workers starts workers on this machine, --cluster uses those of a scheduler; "
            "`tuner worker --cluster ...` adds one to it."
        )


def cluster_tls(
    ca: Path | None, cert: Path | None, key: Path | None, cluster: str | None
) -> TlsFiles | None:
    """The certificates for a cluster; warns on stderr of a cluster that anyone can reach."""
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


def connect_workers(
    cluster: str | None,
    tls: TlsFiles | None,
    workers: int | None,
    threads: int,
    say: Callable[[str], None],
) -> AbstractContextManager[Connection]:
    """Connects to the workers of a scheduler, or starts workers on this machine."""
    from tuner.cluster.connection import default_workers, local_connection, remote_connection
    from tuner.dashboard.connections import raise_descriptor_limit

    raise_descriptor_limit()  # each worker and each connection costs some
    if cluster is not None:
        return remote_connection(cluster, tls=tls, say=say)
    return local_connection(workers or default_workers(), threads=threads, say=say)
