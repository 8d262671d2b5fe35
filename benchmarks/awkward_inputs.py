"""What `tuner check` and `tuner predict` make of awkward files; writes docs/awkward-inputs.md.

    .venv/bin/python benchmarks/awkward_inputs.py

Each case is a file that a user may have: some rows or records that are special, in front of 60
good ones. The command line is asked itself. The network behind `predict` is a stand-in, as what
it says of good records is not the question.
"""

from __future__ import annotations

import bz2
import collections
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tuner.cli import main as cli
from tuner.data import sequences, text
from tuner.data.synthetic import synthetic_sequences
from tuner.results.bundle import Bundle

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.bad_input import as_installed, in_a_cell  # noqa: E402 - found by the line above

PAGE = ROOT / "docs" / "awkward-inputs.md"
MAX_LENGTH = 200  #: residues
STUDY = f"""name = "awkward"
trials = 1
[data]
source = "rows.csv"
max_length = {MAX_LENGTH}
[space]
blocks = 1
"""
GOOD = list(zip(*[some[:60] for some in synthetic_sequences()], strict=True))
LONG = GOOD[0][0] * 3
#: Bytes that files may unpack to here, and letters of a line, in place of the real limits.
LIMIT = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A file, and what the study file says of it."""

    what: str
    name: str
    content: bytes
    data: tuple[tuple[str, str], ...] = ()  #: keys of [data] and their values, as TOML
    command: tuple[str, ...] = ()  #: options of `predict`


def rows_of(special: Sequence[tuple[Any, ...]], header: str, good: Sequence[Any]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header.split(","))
    writer.writerows([*special, *good])
    return file.getvalue()


def table(*special: tuple[Any, ...], header: str = "sequence,label") -> str:
    """A CSV file of special rows and the good ones; other columns of these are "x"."""
    columns = [name.strip().lower() for name in header.split(",")]
    names = {"fasta": "sequence", "solubility": "label", "soluble": "label"}
    good = []
    for number, (one, label) in enumerate(GOOD, start=1):
        cells = {"sequence": one, "label": label, "weight": 1, "id": f"p{number}"}
        cells["sid"] = cells["id"]
        good.append([cells.get(names.get(name, name), "x") for name in columns])
    return rows_of(special, header, good)


def with_labels(soluble: str, insoluble: str) -> str:
    good = [(one, soluble if label else insoluble) for one, label in GOOD]
    return rows_of([], "sequence,label", good)


def fasta(special: str = "", *, end: str = "\n") -> str:
    records = (f">p{n}\n{one[:60]}\n{one[60:]}\n" for n, (one, label) in enumerate(GOOD) if label)
    return (special + "".join(records)).replace("\n", end)


def case(
    what: str, content: str | bytes, name: str = "rows.csv", *command: str, **data: str
) -> Case:
    raw = content if isinstance(content, bytes) else content.encode()
    return Case(what=what, name=name, content=raw, data=tuple(data.items()), command=command)


MASK = '"mask"'
COLUMNS = '{ sequence = "fasta", label = "solubility" }'
WEIGHT = '{ weight = "weight" }'
UNKNOWN = ("MKXVBZJUO", 1), ("MK?V", 0)
WHOLE = gzip.compress(table().encode(), mtime=0)

FORMATS = (
    case("a plain CSV file", table()),
    case("with CRLF and a byte order mark",
         b"\xef\xbb\xbf" + table().replace("\n", "\r\n").encode()),
    case("lines that end in CR, of old Macintoshes", table().replace("\n", "\r")),
    case("upper-case column names with spaces, others before",
         table(header="ID, Note ,SEQUENCE, Label ").replace("SEQUENCE", " Sequence")),
    case("tabs in a .tsv file", table().replace(",", "\t"), "rows.tsv"),
    case("tabs in a .csv file", table().replace(",", "\t")),
    case("commas in a .tsv file", table(), "rows.tsv"),
    case('"sep=," before the header, for Excel', "sep=,\n" + table()),
    case('"sep=;" before the header, and semicolons', "sep=;\n" + table().replace(",", ";")),
    case("separated by semicolons", table().replace(",", ";")),
    case("separated by bars", table().replace(",", "|")),
    case("UTF-16, as Excel's \"Unicode text\"", table().encode("utf-16")),
    case("UTF-16 without a byte order mark", table().encode("utf-16-le")),
    case("Latin-1 in a column of notes",
         table(("MKVL", 1, "é"), header="sequence,label,note").encode("latin-1")),
    case("compressed with gzip", WHOLE, "rows.csv.gz"),
    case("compressed with gzip, and named .csv", WHOLE),
    case("a gzip file that was cut", WHOLE[:-20], "rows.csv.gz"),
    case("a gzip file with a wrong byte", WHOLE[:999] + b"\xff" + WHOLE[1000:], "rows.csv.gz"),
    case("compressed with gzip twice", gzip.compress(WHOLE, mtime=0), "rows.csv.gz"),
    case("a gzip file of nothing", gzip.compress(b"", mtime=0), "rows.csv.gz"),
    case("a gzip bomb (for this page the limit of both is 1 MiB)",
         gzip.compress(b"sequence,label\n" + b"A" * 2**22, mtime=0), "rows.csv.gz"),
    case("compressed with bzip2", bz2.compress(table().encode())),
    case("compressed with xz", lzma.compress(table().encode())),
    case("an Excel workbook named .csv", b"PK\x03\x04" + b"\0" * 26 + b"[Content_Types].xml"),
    case("an old Excel workbook named .csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
    case("a zip file named .csv", b"PK\x03\x04" + b"\0" * 26 + b"rows.csv"),
    case("a Parquet file named .csv", b"PAR1\x15\x04\x15"),
    case("a program named .csv", b"\x7fELF\x02\x01\x01\0\0\0"),
    case("an empty file", b""),
    case("a header alone", "sequence,label\n"),
    case("blank lines alone", "\n\n \n"),
    case("no header", table().partition("\n")[2]),
    case("the column twice", table(header="sequence,label,sequence")),
    case("columns of other names", table(header="sid,solubility,fasta,partition")),
    case("the same, named in the study file", table(header="sid,solubility,fasta,partition"),
         columns=COLUMNS),
)  # fmt: skip
ROWS = (
    case("a row with a cell too many", table(("MKVL", 1, "more"))),
    case("a row with a cell too few", table(("MKVL",))),
    case("rows of empty cells, as spreadsheets leave them", table(("", ""), ("", ""))),
    case("a quote that is never closed", table().replace("\n" + GOOD[50][0], '\n"' + GOOD[50][0])),
    case("two lone quotes that swallow rows",
         table(("MKVL", 1, "NOTE"), header="sequence,label,note")
         .replace("NOTE", '"a').replace(f"{GOOD[3][0]},{GOOD[3][1]},x", f'{GOOD[3][0]},1,b"')),
    case("a note of two lines in quotes",
         table(("MKVL", 1, "first\nsecond"), header="sequence,label,note")),
    case("an id twice", table(("p1", "MKVL", 1), header="id,sequence,label")),
    case("a byte that is zero", table(("MK\0VL", 1))),
    case("a line of notes before the header", "# made in 2020\n" + table()),
)  # fmt: skip
LETTERS = (
    case("an empty sequence", table(("", 1))),
    case("NA where the sequence is missing", table(("NA", 1), ("NaN", 0))),
    case("lower case", table(("mkvlaag", 1))),
    case("X B Z J U O ?", table(*UNKNOWN)),
    case("the same, masked", table(*UNKNOWN), unknown=MASK),
    case("X alone, masked", table(("XXXX", 1)), unknown=MASK),
    case("a digit, masked", table(("MK1XV", 1)), unknown=MASK),
    case("a letter that is not Latin, masked", table(("MKéV", 1)), unknown=MASK),
    case("a stop at the end", table(("MKVL*", 1), ("MKVA**", 0))),
    case("a stop inside", table(("MK*VL", 1))),
    case("gaps of an alignment", table(("--MKV-L..A*--", 1))),
    case("gaps alone", table(("----", 1))),
    case("spaces inside", table(("MKVLA AGIVG\u00a0L", 1))),
    case("a sequence over two lines in quotes", table(("MKVLA\nAGIVG", 1))),
    case("DNA", table(("ATGGCCATTGTAATGGGCCGCTGAAAGGGT", 1))),
    case("RNA", table(("AUGGCCAUUGUAAUGGGCCGCUGAAAGGGU", 1))),
    case("RNA, masked", table(("AUGGCCAUUGUAAUGGGCCGCUGAAAGGGU", 1)), unknown=MASK),
    case("one residue", table(("M", 1))),
    case("a sequence too long", table((LONG, 1))),
    case('the same, truncate = "end"', table((LONG, 1)), truncate='"end"'),
    case('the same, truncate = "start"', table((LONG, 1)), truncate='"start"'),
    case('the same, truncate = "middle"', table((LONG, 1)), truncate='"middle"'),
)  # fmt: skip
LABELS = (
    case("labels soluble and insoluble", with_labels("soluble", "Insoluble")),
    case("labels TRUE and FALSE", with_labels("TRUE", "FALSE")),
    case("labels yes and no", with_labels("yes", "no")),
    case("labels 1.0 and 0.0", with_labels("1.0", "0.0")),
    case("labels of two kinds", table(("MKVL", "yes"), ("MKVA", "no"))),
    case("a label that is none", table(("MKVL", 2))),
    case("a label that is missing", table(("MKVL", ""))),
    case("one label alone", with_labels("1", "1")),
    case("a sequence twice", table((GOOD[0][0], GOOD[0][1]))),
    case("a sequence with both labels", table((GOOD[0][0], 1 - GOOD[0][1]))),
    case('the same, conflicts = "drop"', table((GOOD[0][0], 1 - GOOD[0][1])), conflicts='"drop"'),
    case("weights", table(("MKVL", 1, 2.5), header="sequence,label,weight"), columns=WEIGHT),
    case("a weight of 0", table(("MKVL", 1, 0), header="sequence,label,weight"), columns=WEIGHT),
    case("a weight with a decimal comma",
         table(("MKVL", 1, "0,5"), header="sequence,label,weight"), columns=WEIGHT),
)  # fmt: skip
FASTA = tuple(
    case(f"FASTA: {what}", content, "soluble.fasta", **data)
    for what, content, data in (
        ("wrapped lines", fasta(), {}),
        ("CRLF and lower case", fasta(end="\r\n").lower(), {}),
        ("compressed with gzip", gzip.compress(fasta().encode(), mtime=0), {}),
        ("UTF-16", fasta().encode("utf-16"), {}),
        ("a header without an id", fasta(">\nMKVL\n"), {}),
        ("an id twice", fasta(">p0 again\nMKVL\n"), {}),
        ("a record without residues", fasta(">empty\n"), {}),
        ("text before the first header", fasta("proteins of 2020\n"), {}),
        ("lines that begin with ;", fasta(";made in 2020\n"), {}),
        ("FASTQ", "@r1\nMKVL\n+\nIIII\n", {}),
        ("an alignment, with stops", fasta(">a\nMK--V.L*\n>b\nMKAAV.L*\n"), {}),
        ("blocks of ten residues", fasta(">a\nMKVLAAGIVG LLLAACDEFG\nMKV\n"), {}),
        ("numbered lines, as in GenBank", fasta(">a\n1 mkvlaagivg llla\n"), {}),
        ("X, masked", fasta(">a\nMKXXVL\n"), {"unknown": MASK}),
    )
)  # fmt: skip
OTHERS = (
    Case(what="an npz file (predict reads text alone)", name="rows.npz", content=b""),
    Case(what="a folder", name="folder.csv", content=b""),
    Case(what="no such file", name="missing.csv", content=b""),
)
SECTIONS = {
    "Files": (*FORMATS, *OTHERS),
    "Rows": ROWS,
    "Sequences": LETTERS,
    "Labels and weights": LABELS,
    "FASTA": FASTA,
}


class StandIn:
    """Predicts one half for every sequence, with one network."""

    shares = np.ones(1, np.float32)

    def __call__(self, tokens: Any) -> Any:
        return np.full((len(tokens), 1), 0.5, np.float32)


def bundle_for(one: Case) -> Bundle:
    """What a study with this study file would have made."""
    settings = {key: value.strip('"') for key, value in one.data if key != "columns"}
    description = {
        "study": "awkward",
        "max_length": MAX_LENGTH,
        "min_length": 2,
        "threshold": 0.5,
        "synthetic": False,
        "sequence_column": "fasta" if one.data == (("columns", COLUMNS),) else "sequence",
        **settings,
    }
    return Bundle(description, [], StandIn())  # type: ignore[arg-type]


def put(one: Case, folder: Path) -> None:
    path = folder / one.name
    if one.name.startswith("folder"):
        path.mkdir()
    elif one.name.endswith(".npz"):
        of_label = [[row for row, label in GOOD if label == wanted] for wanted in (1, 0)]
        tokens = [np.ones((len(rows), 9), np.uint8) for rows in of_label]
        for array in tokens:
            array[:, 1:] = 1 + np.random.default_rng(len(array)).integers(0, 20, (len(array), 8))
        np.savez(path, positives=tokens[0], negatives=tokens[1])
    elif not one.name.startswith("missing"):
        path.write_bytes(one.content)


def type_in(arguments: Sequence[str], folder: Path) -> tuple[int | str, str, str]:
    """What `tuner` answers to these words: exit code, stdout and stderr."""
    out, said = io.StringIO(), io.StringIO()
    shell = {name: value for name, value in os.environ.items() if not name.startswith("TUNER_")}
    code: int | str = "none"
    with (
        contextlib.chdir(folder),
        mock.patch.multiple(sys, argv=["tuner", *arguments], stdout=out, stderr=said),
        as_installed(),
        mock.patch.dict(os.environ, {**shell, "COLUMNS": "400", "NO_COLOR": "1"}, clear=True),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if end.code is not None else 0
        except Exception as error:  # noqa: BLE001 - what a user would see a traceback of
            said.write(f"Traceback: {type(error).__name__}: {error}")
    return code, out.getvalue(), said.getvalue()


def checked(one: Case, folder: Path) -> str:
    """What `tuner check` says."""
    source = f'data.source="{one.name}"'
    if one.name.endswith(".fasta"):
        source = f'data.source={{ soluble = "{one.name}", insoluble = "insoluble.fasta" }}'
    settings = [source, *(f"data.{key}={value}" for key, value in one.data)]
    words = ["check", "study.toml", "--json", *(w for each in settings for w in ("--set", each))]
    code, out, said = type_in(words, folder)
    try:
        document = json.loads(out)
    except ValueError:
        return f"Traceback? {code} {said}"
    if code == 0:
        warnings = [each for each in document["warnings"] if "percentage points" not in each]
        return "; ".join(("accepted", *warnings))
    return " / ".join(
        ":".join(
            filter(None, (problem["file"], str(problem["line"] or ""), f" {problem['message']}"))
        )
        for problem in document["errors"]
    )


def predicted(one: Case, folder: Path) -> str:
    """What `tuner predict` says: how many have a probability, and how often each flag is there."""
    with mock.patch("tuner.cli.predict._bundle", return_value=bundle_for(one)):
        code, out, said = type_in(["predict", "bundle", one.name, *one.command], folder)
    if code != 0:
        return said.strip().replace("\n", " / ")
    rows = list(csv.DictReader(io.StringIO(out)))
    flags = collections.Counter(flag for row in rows for flag in row["flags"].split(";") if flag)
    count = sum(bool(row["probability"]) for row in rows)
    whole = (
        f"all {len(rows)} predicted" if count == len(rows) else f"{count} of {len(rows)} predicted"
    )
    listed = (f"{flag}" if n == 1 else f"{flag} ({n} times)" for flag, n in flags.items())
    return "; ".join((whole, *listed))


def make_page(folder: Path) -> str:
    """The page."""
    lines = [
        "# Awkward inputs",
        "",
        "Made by `.venv/bin/python benchmarks/awkward_inputs.py`; `test_awkward_inputs.py` makes",
        "it again and compares. Each file has 60 good sequences (FASTA: the soluble ones of them),",
        "and before them what is said. `check`: what `tuner check` says of it as the study's data.",
        "`predict`: what `tuner predict` makes of the same file with a network of such a study.",
        "Warnings of small splits are left out here. [Data](data.md) and",
        "[Bundles and predictions](predict.md) have the policies.",
    ]
    (folder / "study.toml").write_text(STUDY)
    good = (f">n{n}\n{one}\n" for n, (one, label) in enumerate(GOOD) if not label)
    (folder / "insoluble.fasta").write_text("".join(good))
    for section, cases in SECTIONS.items():
        lines += ["", f"## {section}", "", "| file | check | predict |", "| --- | --- | --- |"]
        for one in cases:
            put(one, folder)
            with (
                mock.patch.object(text, "MOST_UNPACKED", LIMIT),
                mock.patch.object(sequences, "LONGEST_RECORD", LIMIT),
            ):
                cells = (one.what, checked(one, folder), predicted(one, folder))
            shown = (in_a_cell(cell.replace(str(folder), "~")) for cell in cells)
            lines.append(f"| {' | '.join(shown)} |")
            if (folder / one.name).is_file():
                (folder / one.name).unlink()
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the page."""
    with tempfile.TemporaryDirectory() as name:
        page = make_page(Path(name))
    print(page, end="")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
