"""data audit: near-twins and shortcuts of a source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.artifacts import DEFAULT_ROOT, publish, replaceable
from tuner.errors import TunerError, counted

if TYPE_CHECKING:
    from rich.table import Table

    from tuner.data.audit.report import Audit
from tuner.cli.app import data_app
from tuner.cli.options import ArtifactsRoot, AsJson, Overrides, SpecPath
from tuner.cli.terminal import print_json, print_note, terminal, warn_of_synthetic_data


@data_app.command("audit", epilog="Example: tuner data audit studies/solubility.toml --html a.html")
def data_audit(
    spec_path: SpecPath,
    overrides: Overrides = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write it as an HTML page.")
    ] = None,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Looks for near-twins within and across splits, and for shortcuts that need no network.

    Labels of the test split are not read. Takes seconds for 18,000 sequences, minutes for 200,000;
    needs the extra `audit`.
    """
    from tuner.data.audit.page import render
    from tuner.data.audit.report import audit, keep
    from tuner.spec.reader import load_spec

    spec = load_spec(spec_path, overrides or [])
    if html is not None:
        _refuse_unwritable(html)
    console = terminal(stderr=True)
    with console.status("") as status:
        found = audit(
            spec.data,
            folder=spec.folder,
            artifacts=artifacts,
            say=lambda line: status.update(line) if console.is_terminal else print_note(line),
            progress=lambda part: status.update(f"Comparing sequences: {100 * part:.0f} %"),
        )
    keep(found.twins, spec.data, found.identity, artifacts)
    if html is not None:
        try:
            publish(html, render(found, spec.name).encode())
        except OSError as error:
            raise _unwritable(html, error) from error
    if as_json:
        print_json({"study": spec.name, **found.to_document()})
        return
    if found.identity.synthetic:
        warn_of_synthetic_data()
    _print_audit(found)
    if html is not None:
        typer.echo(f"Read on in {html}.")


def _refuse_unwritable(path: Path) -> None:
    try:
        replaceable(path)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> TunerError:
    return TunerError(
        f"{error.filename or path}: cannot be written ({error.strerror or error}); name another "
        "file with --html."
    )


def _print_audit(found: Audit) -> None:
    from rich.table import Table

    from tuner.data.audit.page import band_in_words, findings

    console = terminal()
    for finding in findings(found):
        console.print(finding)
    document = found.to_document()
    bands = document["near_twins"]["bands"]
    table = Table(box=None, pad_edge=False, title="\nPairs by similarity", title_justify="left")
    table.add_column("similarity")
    for pair in bands[0]["pairs"]:
        table.add_column(pair, justify="right")
    for number, band in enumerate(bands):
        table.add_row(band_in_words(number), *(f"{count:,}" for count in band["pairs"].values()))
    console.print(table)
    table = Table(box=None, pad_edge=False, title="\nOn validation rows", title_justify="left")
    for column in ("model", "accuracy", "95 % interval", "loss, nats"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for one in found.shortcuts:
        low, high = one.validation.accuracy_ci95
        table.add_row(
            one.name,
            f"{100 * one.validation.accuracy:.1f} %",
            f"{100 * low:.1f} to {100 * high:.1f} %",
            f"{one.validation.loss:.4f}",
        )
    console.print(table)
    console.print(_splits_table(found))


def _splits_table(found: Audit) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title="\nSplits", title_justify="left")
    for column in ("split", "rows", "soluble", "median length", "low complexity", "unknown"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, one in found.censuses.items():
        table.add_row(
            split,
            f"{one.rows:,}",
            "sealed" if one.soluble is None else f"{100 * one.soluble:.1f} %",
            f"{one.length['median']:.0f}",
            f"{100 * one.low_complexity:.1f} %",
            counted(one.unknown_residues, "row"),
        )
    return table
