"""Reads FASTA, CSV, TSV and NPZ files into rows."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.spec.spec import DataSettings, FastaPair, SplitPart
from tuner.data import solubility
from tuner.data.arrays import npz_rows
from tuner.data.problems import NO_ID, REPEATED_ID, Problems, shortened
from tuner.data.rows import Row, Source
from tuner.data.sources import data_suffix, resolved_path
from tuner.data.synthetic import synthetic_source
from tuner.data.tables import csv_rows
from tuner.data.text import SequenceReader, file_text, read_bytes
from tuner.spec.spec import SplitFiles

#: A line of a FASTA file of old programs.
_COMMENT = re.compile(r"(^|[\r\n]);")


def load_source(settings: DataSettings, folder: Path, problems: Problems) -> Source:
    """The rows of whatever `settings.source` names, each one checked by itself."""
    source = settings.source
    reader = SequenceReader(settings.unknown, problems)
    if isinstance(source, SplitFiles):
        return _load_split_files(source, settings, folder, reader)
    if not isinstance(source, str):
        return _load_fasta(source, folder, reader)
    if source == "synthetic":
        return synthetic_source()
    if source != "solubility":
        path = resolved_path(source, folder)
        return _load_file(source, path, source, settings, reader)
    try:
        path = solubility.locate(folder) or solubility.download_to()
    except solubility.UnavailableError as error:
        if settings.fallback != "synthetic":
            raise solubility.unavailable_error(error, folder) from None
        generated = synthetic_source()
        warning = (
            f'SYNTHETIC DATA: the data set "solubility" cannot be had ({error}), so this study '
            f"runs on {len(generated.rows):,} generated sequences; its figures say nothing about "
            "proteins"
        )
        return replace(generated, warnings=(warning,))
    return _load_file("solubility", path, str(path), settings, reader)


def _load_file(
    name: str, path: Path, file: str, settings: DataSettings, reader: SequenceReader
) -> Source:
    """One file with both labels: .npz, .csv or .tsv. `file` is its name in messages."""
    content, rows, of_labels = _read_file(path, file, settings, reader)
    if content:
        _check_labels(file, rows, reader.problems)
    return Source(
        name=name,
        synthetic=False,
        sha256=hashlib.sha256(content).hexdigest(),
        rows=tuple(rows),
        warnings=(*reader.warnings(), *of_labels),
    )


def _read_file(
    path: Path, file: str, settings: DataSettings, reader: SequenceReader
) -> tuple[bytes, list[Row], list[str]]:
    """The bytes, rows and warnings of one file; none of each, with a problem, if it has none."""
    content = read_bytes(path, file, reader.problems)
    if not content:
        return b"", [], []
    suffix = data_suffix(path)
    if suffix == ".npz":
        return content, npz_rows(file, content, reader), []
    delimiter = "\t" if suffix.startswith(".tsv") else ","
    rows, warnings = csv_rows(file, content, delimiter, settings.columns, settings.split, reader)
    return content, rows, warnings


def _load_split_files(
    files: SplitFiles, settings: DataSettings, folder: Path, reader: SequenceReader
) -> Source:
    """Three files, one for each part of the split."""
    digests = b""
    rows: list[Row] = []
    of_labels: list[str] = []
    named: dict[SplitPart, str] = {
        "training": files.training,
        "validation": files.validation,
        "test": files.test,
    }
    for part, file in named.items():
        content, its_rows, warnings = _read_file(
            resolved_path(file, folder), file, settings, reader
        )
        digests += hashlib.sha256(content).digest()
        rows += [replace(row, part=part) for row in its_rows]
        of_labels += warnings
    return Source(
        name=", ".join(named.values()),
        synthetic=False,
        sha256=hashlib.sha256(digests).hexdigest(),
        rows=tuple(rows),
        warnings=(*reader.warnings(), *dict.fromkeys(of_labels)),
    )


def _load_fasta(pair: FastaPair, folder: Path, reader: SequenceReader) -> Source:
    """Two FASTA files, one for each label."""
    digests = b""
    rows: list[Row] = []
    ids: list[set[str]] = []
    for file, label in ((pair.soluble, 1), (pair.insoluble, 0)):
        content = read_bytes(resolved_path(file, folder), file, reader.problems)
        digests += hashlib.sha256(content).digest()
        if content:
            file_rows, file_ids = _fasta_rows(file, content, label, reader)
            rows += file_rows
            ids.append(file_ids)
    warnings = reader.warnings()
    shared = set.intersection(*ids) if ids else set()
    if len(ids) == 2 and shared:
        warnings.append(
            f"{len(shared):,} ids stand in both FASTA files (as {shortened(min(shared))!r} does): "
            "taken as different proteins"
        )
    return Source(
        name=f"{pair.soluble}, {pair.insoluble}",
        synthetic=False,
        sha256=hashlib.sha256(digests).hexdigest(),
        rows=tuple(rows),
        warnings=tuple(warnings),
    )


def _check_labels(file: str, rows: Sequence[Row], problems: Problems) -> None:
    """Both labels must be there. Not asked where rows were refused: they may be the others."""
    labels = {row.label for row in rows}
    if problems or len(labels) == 2:
        return
    if not labels:
        problems.add(file, "holds no rows; a study needs soluble and insoluble sequences")
        return
    (label,) = labels
    problems.add(
        file,
        f"every row has label {label}; a classifier needs both, 1 (soluble) and 0 (insoluble)",
        key="label",
        value=str(label),
    )


def _fasta_rows(
    file: str, content: bytes, label: int, reader: SequenceReader
) -> tuple[list[Row], set[str]]:
    """Rows of a FASTA file, and their ids.

    dnaio lets empty and impossible records through and knows no lines: both are seen to here.
    """
    import dnaio  # noqa: PLC0415 - takes 0.1 s, and most sources are no FASTA

    rows: list[Row] = []
    line_of_id: dict[str, int] = {}
    problems = reader.problems
    text = file_text(file, content, problems)
    if text is None:
        return rows, set()
    text = _COMMENT.sub(r"\1#", text)  # the one kind that dnaio leaves out
    # dnaio decodes as the locale says and refuses what is not ASCII; here that is a bad residue.
    text = text.encode("ascii", "backslashreplace").decode()
    lines = [line.strip() for line in io.StringIO(text, newline=None)]
    headers = (number for number, line in enumerate(lines, start=1) if line.startswith(">"))
    records = dnaio.FastaReader(io.BytesIO(text.encode()))
    found = 0
    try:
        for line, record in zip(headers, records, strict=True):
            found += 1
            name = (record.name.split() or [""])[0]
            if not name:
                what = "a header without an id"
                problems.add_one(NO_ID, file, what, place=f"line {line}", line=line, key="id")
            elif line_of_id.setdefault(name, line) != line:
                shown, first = repr(shortened(name)), line_of_id[name]
                problems.add_one(
                    REPEATED_ID,
                    file,
                    f"id {shown} stands in line {first} already",
                    place=f"line {line}",
                    detail=f"{shown}, as in line {first}",
                    line=line,
                    key="id",
                    value=name,
                )
            subject = f"the sequence {shortened(name)!r}"
            sequence = reader.read(record.sequence, file, line, subject)
            if sequence is not None:
                rows.append(
                    Row(sequence=sequence, label=label, file=file, line=line, place=f"line {line}")
                )
    except dnaio.FastaFormatError as error:
        line = (error.line or 0) + 1
        message = "a FASTA record starts with a line >NAME; remove what stands before the first"
        problems.add(file, message, line=line, value=lines[line - 1])
    else:
        if not found:
            problems.add(file, "holds no records; each is a line >NAME with its residues below")
    return rows, set(line_of_id)
