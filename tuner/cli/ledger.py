"""ledger verify: proves that the record of openings is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tuner.artifacts import DEFAULT_ROOT, DEFAULT_STORAGE_URL
from tuner.cli.app import ledger_app
from tuner.cli.options import ArtifactsRoot, AsJson, StorageUrl
from tuner.cli.terminal import open_storage, print_json
from tuner.errors import counted


@ledger_app.callback()
def _ledger() -> None:
    pass


@ledger_app.command("verify", epilog="Example: tuner ledger verify --report sent/report.html")
def verify(
    report: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A report.json or report.html that is kept elsewhere; may be repeated.",
        ),
    ] = None,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Proves the ledger whole, or says what was changed, removed or restored. Changes nothing."""
    from tuner.results import seal

    with open_storage(storage) as opened:
        found = seal.verify(opened, artifacts, report or ())
        url = opened.masked_url
    if as_json:
        print_json(found.to_document())
    else:
        whole = "is whole" if found.valid else "is NOT whole"
        typer.echo(
            f"The ledger of {url} {whole}: {counted(found.entries, 'entry', 'entries')}, "
            f"{counted(found.reports, 'report')}; head {found.head.position} "
            f"{found.head.hash}"
        )
        for problem in found.problems:
            typer.echo(f"Problem: {problem}")
        for note in found.notes:
            typer.echo(f"Note: {note}")
    if not found.valid:
        raise typer.Exit(1)
