"""init: the shipped study files."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from tuner.artifacts import DEFAULT_STUDIES_FOLDER, make_folder, publish
from tuner.cli.app import app
from tuner.commands import command
from tuner.errors import TunerError


@app.command(epilog="Example: tuner init -o studies")
def init(
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Folder to write to; else studies."),
    ] = None,
) -> None:
    """Copies the shipped study files into studies/. A file that exists is kept."""
    _init_examples(output or DEFAULT_STUDIES_FOLDER)


def _init_examples(folder: Path) -> None:
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
        raise TunerError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); name "
            "another folder with -o."
        ) from error
    typer.echo(f"Next: {command('check', folder / 'quickstart.toml')}")


def _write_schema(folder: Path) -> None:
    """Writes the schema that the first line of a study file in `folder` names, for editors."""
    from tuner.spec.schema import SCHEMA_FILE, json_schema

    content = json.dumps(json_schema(), indent=2) + "\n"
    publish(folder / SCHEMA_FILE, content.encode())
