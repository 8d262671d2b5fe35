"""status, stop, delete, export, report; data and storage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.artifacts import (
    DEFAULT_ROOT,
    DEFAULT_STORAGE_URL,
    development_path,
)
from tuner.commands import command
from tuner.errors import StorageMissingError, StudyError, counted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tuner.search.status import StudyStatus
from tuner.cli.app import app, data_app, storage_app
from tuner.cli.completion import study_names
from tuner.cli.options import ArtifactsRoot, AsJson, Name, SourcePath, StorageUrl
from tuner.cli.terminal import (
    open_storage,
    print_json,
    print_note,
    terminal,
    warn_of_synthetic_data,
)


@app.command(epilog="Example: tuner status quickstart --watch")
def status(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", autocompletion=study_names)
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Refresh until the study is neither queued nor running.")
    ] = False,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Shows the progress of studies: trials by state, best value, epochs spent and saved, disk."""
    from tuner.cli.progress import status_details, status_table, watch_studies
    from tuner.search.confirmation import winner_in_words
    from tuner.search.status import status as read_status
    from tuner.search.study import list_names, load

    unreadable: set[str] = set()

    def look() -> list[StudyStatus]:
        if name:
            return [read_status(load(opened, name, artifacts_root=artifacts))]
        found = []
        for one in list_names(opened):
            try:
                found.append(read_status(load(opened, one, artifacts_root=artifacts)))
            except StudyError as error:  # of a later version, for example: the others are shown
                if one not in unreadable:
                    print_note(str(error))
                unreadable.add(one)
        return found

    def render(found: list[StudyStatus]) -> RenderableType:
        if as_json:
            documents = [one.to_document() for one in found]
            return json.dumps(documents[0] if name else documents, indent=2)
        if not found:
            launch = command(
                "launch", "studies/quickstart.toml", storage=storage, artifacts=artifacts
            )
            return f"No study yet. `{launch}` makes one."
        if not name:
            return status_table(found)
        tuned = load(opened, name, artifacts_root=artifacts)
        return status_details(found[0], winner_in_words(tuned) if tuned.ranked() else None)

    console = terminal()
    try:
        with open_storage(storage) as opened:
            if watch:
                watch_studies(look, render, console, in_place=console.is_terminal and not as_json)
            else:
                console.print(render(look()), soft_wrap=as_json)
    except StorageMissingError:
        if name:
            raise
        console.print(render([]))


@app.command(epilog="Example: tuner stop quickstart")
def stop(
    name: Name,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Stops a running or queued study. Its trials save a checkpoint; `launch` resumes it."""
    from tuner.coordination import queue
    from tuner.search.study import load

    with open_storage(storage) as opened:
        tuned = load(opened, name, artifacts_root=artifacts)
        stopped = queue.stop(tuned)
    if as_json:
        print_json(stopped.to_document())
    else:
        resumes = f" `{tuned.command('launch', 'STUDY.toml')}` resumes it."
        typer.echo(stopped.in_words + resumes * (stopped.dequeued and not stopped.asked))


@app.command(epilog="Example: tuner delete quickstart --yes")
def delete(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
) -> None:
    """Removes a study and its artifacts; its entries in the ledger stay."""
    from tuner.search.study import delete as delete_study
    from tuner.search.study import load

    with open_storage(storage) as opened:
        tuned = load(opened, name, artifacts_root=artifacts)
        if not yes:
            trials = counted(len(tuned.trials()), "trial")
            typer.confirm(f"Remove {name} with {trials} permanently?", abort=True)
        delete_study(tuned)
    typer.echo(f"Removed {name}.")
    rows = development_path(artifacts, tuned.record.development_sha256)
    if rows.is_file():
        typer.echo(f"Its training and validation rows stay, others may need them: {rows}")


@app.command(epilog="Example: tuner report quickstart -o report/")
def report(
    name: Name,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder to write to.")
    ] = None,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Open test rows that were opened before; every report then says so permanently.",
        ),
    ] = False,
    reason: Annotated[
        str | None,
        typer.Option(metavar="WHY", help="Why they are opened again; with --again."),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines/--no-baselines",
            help="Compare the winner with simple models and with networks of the literature, "
            "which takes minutes the first time for the same rows.",
        ),
    ] = True,
    data: SourcePath = None,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Opens the test split once, and writes the final report of a finished study."""
    from functools import partial

    from tuner.results.baselines import fit_baselines
    from tuner.results.report import write_report

    with open_storage(storage) as opened:
        written = write_report(
            opened,
            name,
            artifacts_root=artifacts,
            output=output,
            data=data,
            again=_reason(again=again, reason=reason),
            fit=partial(fit_baselines, say=print_note) if baselines else None,
        )
    if as_json:
        print_json(written.to_document())
        return
    if written.synthetic:
        warn_of_synthetic_data()
    typer.echo(written.summary())


_MAX_REASON = 500  #: characters


def _reason(*, again: bool, reason: str | None) -> str | None:
    """The reason for opening a test split again, in one line; None for a first look."""
    from tuner.storage.audit import one_line

    if not again:
        if reason is not None:
            raise typer.BadParameter("--reason says why rows are opened again; it needs --again.")
        return None
    said = one_line(reason or "")
    if not said:
        raise typer.BadParameter(
            'To open test rows again, say why: --again --reason "WHY". It is kept permanently.'
        )
    if len(said) > _MAX_REASON:
        raise typer.BadParameter(f"--reason is too long: {len(said)}, at most {_MAX_REASON}.")
    return said


@data_app.command("fetch", epilog="Example: tuner data fetch")
def data_fetch() -> None:
    """Downloads the solubility data into the user's cache, checked by its hash."""
    from tuner.data.solubility import fetch

    typer.echo(str(fetch()))


@storage_app.command("init", epilog="Example: tuner storage init --storage postgresql://lab@db/lab")
def storage_init(storage: StorageUrl = DEFAULT_STORAGE_URL) -> None:
    """Creates the schema, or upgrades an older one; sets up what of it is missing."""
    from tuner.storage.storage import Storage

    with Storage(storage, patience_seconds=60.0, say=print_note, upgrade=True) as opened:
        opened.ledger.protect()
        typer.echo(f"{opened.masked_url} is ready.")


@storage_app.command("check", epilog="Example: tuner storage check --json")
def storage_check(storage: StorageUrl = DEFAULT_STORAGE_URL, as_json: AsJson = False) -> None:
    """Checks whether the storage is reachable, its version, and its latency. Changes nothing."""
    import dataclasses

    from tuner.storage.check import check_storage

    check = check_storage(storage)
    if as_json:
        print_json(dataclasses.asdict(check))
    else:
        typer.echo(f"{check.url}: {'reachable' if check.reachable else 'NOT reachable'}")
        if check.schema is not None:
            typer.echo(f"schema: {check.schema}")
        if check.milliseconds is not None:
            typer.echo(
                f"a query takes {check.milliseconds:.2g} ms, "
                f"a write {check.commit_milliseconds:.2g} ms (medians of 20)"
            )
        if check.detail:
            typer.echo(check.detail)
    if not check.is_right:
        raise typer.Exit(1)
