"""init: a study file for one's own data, or the shipped ones."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.artifacts import DEFAULT_STUDIES_FOLDER, make_folder, publish, replaceable
from tuner.cli.app import app
from tuner.cli.terminal import print_note
from tuner.commands import command
from tuner.errors import SetupError, TunerError, counted

if TYPE_CHECKING:
    from tuner.data.survey import Survey
    from tuner.search.proposal import Budget

_TIMED_NETWORKS = 3


@app.command(epilog="Example: tuner init proteins.csv -o studies/proteins.toml")
def init(
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="DATA",
            help="A CSV, TSV or npz file, or two FASTA files: the soluble sequences first.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Study file to write, by default named like DATA; without DATA, the folder to "
            "copy to, by default studies.",
        ),
    ] = None,
    sequence_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column of the sequences in a table; else found."),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column of the labels in a table; else found."),
    ] = None,
    hours: Annotated[
        float, typer.Option(min=0.01, max=10_000, help="How long the study may take.")
    ] = 4.0,
    force: Annotated[bool, typer.Option("--force", help="Replace the study file.")] = False,
) -> None:
    """Writes a commented study file for DATA; without DATA, copies the shipped study files.

    A few networks are trained for some seconds to see what this machine can do in --hours. No
    file is replaced without --force, and of the shipped study files none at all.
    """
    if not data:
        if force or sequence_column or label_column:
            raise typer.BadParameter("only DATA takes --force, --sequence-column, --label-column.")
        _init_examples(output or DEFAULT_STUDIES_FOLDER)
        return
    data = _checked(data)
    path = output or Path(f"{_stem(data[0])}.toml")
    if path.suffix.lower() != ".toml":
        raise typer.BadParameter(f"-o {path} does not end in .toml, as a study file does.")
    _init_study(path, data, sequence_column, label_column, hours, force=force)


_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".npz")
_FASTA = (".fasta", ".fa", ".faa", ".fas", ".fsa")


def _stem(path: Path) -> str:
    return Path(path.name.removesuffix(".gz").removesuffix(".GZ")).stem


def _checked(data: list[Path]) -> list[Path]:
    """The files, of FASTA the soluble sequences first; others than a study can have are refused."""
    names = [path.name.lower() for path in data]
    is_fasta = [Path(name.removesuffix(".gz")).suffix in _FASTA for name in names]
    if is_fasta == [True]:
        raise TunerError(
            f"{data[0]}: FASTA holds no labels; name two files, the soluble sequences first "
            "(`tuner init soluble.fasta insoluble.fasta`), or a table with a column of labels."
        )
    if is_fasta == [True, True]:
        insoluble = [any(word in name for word in ("insol", "neg")) for name in names]
        ordered = data[::-1] if insoluble == [True, False] else data
        print_note(f"Soluble: {ordered[0]}. Insoluble: {ordered[1]}.")
        return ordered
    if len(data) != 1 or not names[0].endswith(_TABLES):
        raise TunerError(
            f"{', '.join(map(str, data))}: name one table ({', '.join(_TABLES)}), or two FASTA "
            f"files ({', '.join(_FASTA)}, also .gz)."
        )
    return data


# --- the shipped study files ---


def _init_examples(folder: Path) -> None:
    from importlib import resources

    try:
        make_folder(folder, private=False)
        with resources.as_file(resources.files("tuner") / "examples") as examples:
            for example in sorted(examples.glob("*.toml")):
                place = folder / example.name
                there = place.exists()
                if not there:
                    publish(place, example.read_bytes())
                typer.echo(f"{place}{' exists, and is kept' if there else ''}")
        _write_schema(folder)
    except OSError as error:
        raise _unwritable(folder, error, "folder") from error
    typer.echo(f"Next: {command('check', folder / 'quickstart.toml')}")


def _write_schema(folder: Path) -> None:
    """Writes the schema that the first line of a study file in `folder` names, for editors."""
    from tuner.spec.schema import SCHEMA_FILE, json_schema

    content = json.dumps(json_schema(), indent=2) + "\n"
    publish(folder / SCHEMA_FILE, content.encode())


def _unwritable(path: Path, error: OSError, what: str) -> TunerError:
    return TunerError(
        f"{error.filename or path}: cannot be written ({error.strerror or error}); name another "
        f"{what} with -o."
    )


# --- a study file for DATA ---


def _init_study(
    path: Path,
    data: list[Path],
    sequence_column: str | None,
    label_column: str | None,
    hours: float,
    *,
    force: bool,
) -> None:
    from tuner.data.prepare import prepare
    from tuner.data.survey import survey
    from tuner.search.proposal import proposed_spec, study_file

    try:
        _, there = replaceable(path)
    except OSError as error:
        raise _unwritable(path, error, "file") from error
    if there and not force:
        raise TunerError(f"{path} exists; name another file with -o, or replace it with --force.")
    found = survey(data, sequence_column=sequence_column, label_column=label_column)
    spec = proposed_spec(found, path)
    as_named = spec.data.model_copy(update={"source": found.settings.source})
    with tempfile.TemporaryDirectory() as scratch:  # what `check` would refuse is not written
        prepared = prepare(as_named, folder=Path(), artifacts=Path(scratch))
    budget = _budget(found, path, prepared.identity.training_rows, hours)
    try:
        content = study_file(found, path, budget).encode()
        make_folder(path.parent, private=False)
        publish(path, content)
        _write_schema(path.parent)
    except OSError as error:
        raise _unwritable(path, error, "file") from error
    for warning in prepared.all_warnings:
        print_note(f"Warning: {warning}")
    typer.echo(
        f"{path}: {counted(found.rows, 'sequence')}, {100 * found.soluble:.1f} % "
        f"soluble, max_length {spec.data.max_length}, {counted(budget.trials, 'trial')}"
        + (f" in about {budget.duration}." if budget.time else ".")
    )
    typer.echo(f"Next: {command('check', path)}")


def _budget(found: Survey, path: Path, rows: int, hours: float) -> Budget:
    """A budget by measurement; the usual one, with a note, where nothing can be trained."""
    from tuner.cluster.connection import default_workers
    from tuner.cluster.processes import require_training
    from tuner.cluster.timing import measure, of_each_size
    from tuner.search.proposal import UNMEASURED, budget_for, proposed_spec
    from tuner.spec.bounds import sampled_configurations

    spec = proposed_spec(found, path)
    max_length = spec.data.max_length
    configs = of_each_size(sampled_configurations(spec.space), max_length, _TIMED_NETWORKS)
    try:
        require_training()
        print_note(f"Training {counted(_TIMED_NETWORKS, 'network')} for a few seconds ...")
        time = measure(
            configs, found.lengths, max_length=max_length, rows=rows, workers=default_workers()
        )
    except SetupError as error:
        print_note(f"What this machine can do was not measured: {error}")
        return UNMEASURED
    return budget_for(found, path, time, hours)
