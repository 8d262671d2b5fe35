"""confirm: the best configurations, trained again with fresh seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tuner.artifacts import DEFAULT_ROOT, DEFAULT_STORAGE_URL
from tuner.cli.app import app
from tuner.cli.driving import WorkersOf, drive
from tuner.cli.options import (
    ArtifactsRoot,
    AsJson,
    ClusterPlace,
    LogFormat,
    LogLevel,
    Name,
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
    open_storage,
    print_json,
    print_note,
    require_training,
    terminal,
    warn_of_synthetic_data,
)
from tuner.errors import counted

if TYPE_CHECKING:
    from rich.table import Table

    from tuner.coordination.coordinator import Ending
    from tuner.results.confirm import Comparison
    from tuner.search.tuned_study import TunedStudy


@app.command(epilog="Example: tuner confirm solubility --top 10 --seeds 5")
def confirm(
    name: Name,
    top: Annotated[
        int | None,
        typer.Option(
            min=1, max=1000, metavar="K", help="Number of the best configurations; by default 10."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=2, max=1000, metavar="S", help="Number of trainings of each; by default 5."
        ),
    ] = None,
    workers: Workers = None,
    threads: Threads = None,
    cluster: Annotated[str | None, ClusterPlace] = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Stop after this number of seconds."),
    ] = None,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
    _log_level: LogLevel = None,
    _log_format: LogFormat = None,
) -> None:
    """Trains the best configurations again with fresh seeds, and compares them.

    The winner is the configuration with the lowest mean validation loss; export, predict and
    report use its networks. The same command resumes what was stopped.
    """
    from tuner.search.study import load

    refuse_workers_with_cluster(cluster, workers)
    tls = cluster_tls(tls_ca, tls_cert, tls_key, cluster)
    workers_of = WorkersOf(
        connect=lambda say: connect_workers(cluster, tls, workers, threads or 1, say),
        threads=threads or 1,
    )
    with open_storage(storage, patience_seconds=None) as opened:
        tuned = load(opened, name, artifacts_root=artifacts)
        ending, found = run_confirmation(
            tuned,
            workers_of,
            top=top,
            seeds=seeds,
            timeout=timeout,
            as_json=as_json,
            local=cluster is None,
        )
        if found is not None and as_json:
            print_json(found.to_document())
        elif found is not None:
            print_comparison(found)
            if tuned.record.data.synthetic:
                warn_of_synthetic_data()
        else:
            print_note(f"Stopped ({ending}); nothing is lost. The same command resumes it.")
    if ending == "interrupted":
        raise typer.Exit(130)


def run_confirmation(
    tuned: TunedStudy,
    workers: WorkersOf,
    *,
    timeout: float | None,
    as_json: bool,
    local: bool,
    top: int | None = None,
    seeds: int | None = None,
) -> tuple[Ending, Comparison | None]:
    """Trains what is missing of a study's confirmation.

    Args:
        tuned: The study.
        workers: What trains.
        timeout: Seconds after which it is stopped.
        as_json: Progress is shown on stderr.
        local: The workers are on this machine.
        top: How many configurations; else as the study file says.
        seeds: Trainings of each; likewise.

    Returns:
        How that ended, and what was found; None for the latter if it was stopped.
    """
    from tuner.results.confirm import compare
    from tuner.search.confirmation import plan_confirmation
    from tuner.spec.spec import ConfirmSettings

    settings = tuned.confirm or ConfirmSettings()
    found = plan_confirmation(tuned, top=top or settings.top, seeds=seeds or settings.seeds)
    ending: Ending = "finished"
    if not found.is_complete:
        if local:
            require_training()
        configurations = counted(len(found.candidates), "configuration")
        references = [*(one.label for one in found.references)]
        beside = f" and {' and '.join(map(str, references))}" if references else ""
        print_note(
            f"Confirmation of {tuned.name}: the best {configurations}{beside}, "
            f"{counted(found.seeds, 'seed')} each."
        )
        ending = drive(found.tuned, workers, timeout=timeout, as_json=as_json)
        found = plan_confirmation(tuned, top=top or settings.top, seeds=seeds or settings.seeds)
    return ending, compare(found) if found.is_complete else None


def print_comparison(found: Comparison) -> None:
    """Shows what a confirmation found."""
    terminal().print(_table(found))
    for line in found.in_words():
        typer.echo(line)


def _table(found: Comparison) -> Table:
    from rich.table import Table

    from tuner.results.confirm import number_in_words, range_in_words

    table = Table(box=None, pad_edge=False)
    for heading in ("", "mean", "sd", "95 %", "behind the winner", "95 %", "search", "parameters"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for one in (*found.configs, *found.references):
        label = f"trial {one.label}" if isinstance(one.label, int) else one.label
        table.add_row(
            label + " *" * one.is_tied,
            number_in_words(one.mean),
            number_in_words(one.sd),
            range_in_words(one.interval),
            number_in_words(one.difference),
            range_in_words(one.difference_interval),
            number_in_words(one.searched_value),
            f"{one.parameters:,}" if one.parameters else "",
        )
    return table
