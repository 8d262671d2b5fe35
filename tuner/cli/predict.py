"""predict: probabilities of new sequences."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tuner.artifacts import DEFAULT_ROOT, DEFAULT_STORAGE_URL, publishing
from tuner.cli.app import app
from tuner.cli.completion import study_names
from tuner.cli.options import ArtifactsRoot, StorageUrl
from tuner.cli.terminal import open_storage, print_note, terminal, warn_of_synthetic_data
from tuner.errors import TunerError, counted

if TYPE_CHECKING:
    from typing import TextIO

    from tuner.data.sequences import SequenceRecord
    from tuner.results.bundle import Bundle
    from tuner.results.prediction import OutputFormat, Tally

_FORMATS: dict[str, OutputFormat] = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl"}


@app.command(epilog="Example: tuner predict runs/export/best proteins.fasta -o predictions.csv")
def predict(
    source: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE|NAME",
            help="A bundle, or the name of a study.",
            autocompletion=study_names,
        ),
    ],
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="FASTA, CSV or TSV files, also .gz; - is stdin."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="File to write to; else stdout."),
    ] = None,
    form: Annotated[
        Literal["csv", "tsv", "jsonl"] | None,
        typer.Option(
            "--format", help="Format of the output; by default that of the suffix of -o, else CSV."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with an error at a record without a prediction.")
    ] = False,
    sequence_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column of the sequences in a table; else sequence, or that of the training.",
        ),
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column of the ids in a table; else id, name, ..."),
    ] = None,
    storage: StorageUrl = DEFAULT_STORAGE_URL,
    artifacts: ArtifactsRoot = DEFAULT_ROOT,
) -> None:
    """Predicts the solubility of new sequences; their order is kept, memory use is constant.

    Each record has an id, a probability, a label (1 is soluble), the spread over the networks of
    an ensemble, and flags. A record that cannot be predicted has no probability; its flags say why.
    """
    from tuner.data.sequences import SEQUENCE_COLUMN, read_sequences
    from tuner.results.prediction import Tally, predict_records, writer_of

    if inputs.count("-") > 1:
        raise typer.BadParameter("- is stdin, which is read once; name it once.")
    _refuse_input_as_output(inputs, output)
    signal.signal(signal.SIGTERM, _interrupt)
    bundle = _bundle(source, storage, artifacts)
    if bundle.synthetic:
        warn_of_synthetic_data()

    def records() -> Iterator[SequenceRecord]:
        for place in inputs:
            yield from read_sequences(
                "stdin" if place == "-" else place,
                sys.stdin.buffer if place == "-" else None,
                sequence_column=sequence_column,
                id_column=id_column,
                usual_columns=(SEQUENCE_COLUMN, bundle.sequence_column),
            )

    tally = Tally()
    began = time.monotonic()
    wanted = form or (_FORMATS.get(output.suffix.lower()) if output else None) or "csv"
    with _written(output) as stream, _progress(tally):
        write = writer_of(wanted, stream)
        for prediction in predict_records(bundle, records()):
            if strict and prediction.probability is None:
                record = prediction.record
                raise TunerError(
                    f"{record.file}:{record.line}: record {record.id!r} cannot be predicted "
                    f"({';'.join(prediction.flags)}). Correct or remove it, or leave --strict out: "
                    "then such records have no probability."
                    f"{' Nothing was written.' if output else ''}"
                )
            tally.count(prediction)
            write(prediction)
    print_note(_summary(tally, time.monotonic() - began, output))


def _bundle(source: str, storage: str, artifacts: Path) -> Bundle:
    """The bundle at a path, or the best network of a study of this name."""
    from tuner.results.bundle import read_bundle

    if Path(source).exists() or os.sep in source or source.lower().endswith(".zip"):
        return read_bundle(Path(source))
    from tuner.results.bundle_writer import bundle_of_study
    from tuner.search.confirmation import winner_in_words
    from tuner.search.study import load

    with open_storage(storage) as opened:
        tuned = load(opened, source, artifacts_root=artifacts)
        bundle = bundle_of_study(tuned)
        print_note(winner_in_words(tuned))
    return bundle


def _refuse_input_as_output(inputs: list[str], output: Path | None) -> None:
    if output is None or not output.exists():
        return
    for place in inputs:
        if place != "-" and Path(place).exists() and output.samefile(place):
            raise typer.BadParameter(f"-o {output} is one of the inputs; name another file.")


def _interrupt(_number: int, _frame: object) -> None:
    """Ends as Ctrl-C does, so that no half file stays."""
    raise KeyboardInterrupt


@contextlib.contextmanager
def _written(output: Path | None) -> Iterator[TextIO]:
    """Where predictions go: a file that is there whole or not at all, or stdout."""
    import io

    if output is None:
        yield sys.stdout
        return
    try:
        with publishing(output) as file:
            stream = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
            yield stream
            stream.flush()
            stream.detach()
    except OSError as error:
        if error.filename is not None and Path(error.filename).name != output.name:
            raise
        raise TunerError(
            f"{output}: cannot be written ({error.strerror or error}); name another file with -o."
        ) from error


@contextlib.contextmanager
def _progress(tally: Tally) -> Iterator[None]:
    """Shows on a terminal how many records were predicted, and how fast."""
    console = terminal(stderr=True)
    if not console.is_terminal:
        yield
        return
    from rich.live import Live

    began = time.monotonic()

    def line() -> str:
        rate = tally.records / max(time.monotonic() - began, 1e-9)
        return f"{counted(tally.records, 'sequence')}, {rate:,.0f} a second"

    with Live(get_renderable=line, console=console, refresh_per_second=4, transient=True):
        yield


def _summary(tally: Tally, seconds: float, output: Path | None) -> str:
    said = (
        f"{counted(tally.records, 'sequence')}, {tally.soluble:,} predicted as soluble, "
        f"{tally.records / max(seconds, 1e-9):,.0f} a second"
    )
    if tally.unpredicted:
        said += f"; {tally.unpredicted:,} without a prediction"
    if tally.flags:
        listed = ", ".join(f"{flag} {count:,}" for flag, count in tally.flags.most_common())
        said += f"; flags: {listed}"
    return said + (f". Written to {output}." if output else ".")
