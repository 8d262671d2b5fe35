"""What a user sees who makes a mistake: asks the real command line, writes docs/bad-input.md.

    .venv/bin/python benchmarks/bad_input.py

Each case runs in a folder that holds a finished study and the user's files. After each, the
study's trials and the files must be what they were: "kept" in the table is that comparison.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import optuna

from tuner.cli import main as cli
from tuner.data.prepare import prepare
from tuner.data.synthetic import synthetic_sequences
from tuner.search.study import create_or_resume
from tuner.spec.reader import load_spec
from tuner.storage.storage import Storage

PAGE = Path(__file__).resolve().parent.parent / "docs" / "bad-input.md"
GOOD = """name = "good"
trials = 3
[data]
source = "good.csv"
[training]
max_epochs = 9
[hyperband]
[space]
blocks = 1
learning_rate = { low = 1e-4, high = 1e-2, log = true }
"""
CSV = "sequence,label\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    what: str
    arguments: tuple[str, ...]
    files: tuple[tuple[str, str | bytes], ...] = ()


def spec(what: str, text: str) -> Case:
    return Case(what=what, arguments=("check", "bad.toml"), files=(("bad.toml", text),))


def data(what: str, name: str, content: str | bytes) -> Case:
    override = f'data.source="{name}"'
    return Case(
        what=what, arguments=("check", "good.toml", "--set", override), files=((name, content),)
    )


def document(what: str, name: str, text: str | bytes) -> Case:
    """A study file in the format that its name says."""
    return Case(what=what, arguments=("check", name), files=((name, text),))


def changed(old: str, new: str) -> str:
    if old not in GOOD:
        raise ValueError(old)
    return GOOD.replace(old, new)


SPACE = "blocks = 1\n"
#: Nine lists of nine of the one before: 10^9 values in 400 bytes.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
YAML = "name: good\ntrials: 3\n"
DIGITS = "1" * 5000
#: Rows between two lone quotes of one column, which `csv` reads as one field.
SWALLOWED = 'sequence,note,label\nMKA,ok,0\nMKV,"open,1\nMKL,ok,0\nMKI,close",0\nMKP,ok,1\n'
#: A split that a column names.
PARTS = "sequence,label,part\n" + "".join(
    f"MK{'ACDEFGHIKL'[n % 10] * (n + 1)},{n % 2},{('training', 'validation', 'test')[n % 3]}\n"
    for n in range(30)
)
GIVEN = ("--set", 'data.split.rule="given"', "--set", 'data.split.column="part"', "--set")
SPECS = (
    spec("TOML that ends too soon", GOOD + "filters = { choices = [16, 32"),
    spec("the same key twice", GOOD + "blocks = 2\n"),
    spec("no `trials`", changed("trials = 3\n", "")),
    spec("trials = 0", changed("trials = 3", "trials = 0")),
    spec("trials as text", changed("trials = 3", 'trials = "3"')),
    spec("unknown key, nearly right", changed("trials = 3", "trails = 3")),
    spec("unknown key in [space]", changed(SPACE, SPACE + "kernal_size = 5\n")),
    spec("unknown value", changed(SPACE, SPACE + 'activation = "swsh"\n')),
    spec("low above high", changed(SPACE, SPACE + "filters = { low = 64, high = 16 }\n")),
    spec("log from 0", changed("low = 1e-4", "low = 0.0")),
    spec("a step that does not fit", changed(SPACE, SPACE + "filters = {low=3,high=8,step=2}\n")),
    spec("no choices", changed(SPACE, SPACE + "filters = { choices = [] }\n")),
    spec("a choice twice", changed(SPACE, SPACE + "filters = { choices = [16, 16] }\n")),
    spec("a rate of 1", changed(SPACE, SPACE + "dense_dropout = 1.0\n")),
    spec("a kernel too long for the pooling", changed(SPACE, "blocks = 3\npool_size = 9\n")),
    spec("a table for a block that never is", GOOD + "[space.block4]\npool_size = 2\n"),
    spec("brackets that cannot be: eta", changed("[hyperband]", "[hyperband]\neta = 1")),
    spec("brackets: min_epochs", changed("[hyperband]", "[hyperband]\nmin_epochs = 20")),
    spec("fractions that leave no training rows", changed('"good.csv"\n',
         '"good.csv"\nsplit = { validation = 0.5, test = 0.5 }\n')),
    spec("a split by a column that is not named", changed('"good.csv"\n',
         '"good.csv"\nsplit = { rule = "given" }\n')),
    spec("known configuration out of range", GOOD + "[[known]]\nlearning_rate = 0.5\n"),
    spec("known configuration of a block that is not", GOOD + "[[known]]\nblock2.filters = 3\n"),
    spec("not a number", changed("high = 1e-2", "high = nan")),
    spec("a name that is a path", changed('"good"', '"../good"')),
    spec("four mistakes at once", changed(SPACE, 'blocks = 0\nhead = "flaten"\nunits = -1\n')
         .replace("trials = 3", "trials = -3")),
    spec("a step of a float that is none", changed(SPACE, SPACE +
         "conv_l2 = { low = 0.0, high = 1.0, step = 1e-30 }\n")),
    spec("a number of 5,000 digits", changed("trials = 3", f"trials = {DIGITS}")),
    spec("brackets in brackets in brackets", GOOD + f"filters = {'[' * 5000}{']' * 5000}\n"),
    document("YAML whose aliases multiply", "bomb.yaml", YAML + BOMB),
    document("YAML whose alias holds itself", "self.yaml", YAML + "space: &s\n  blocks: *s\n"),
    document("YAML with a date", "date.yaml", YAML + "seed: 2026-13-45\n"),
    document("YAML with a number as a key", "key.yaml", YAML + "1: x\n"),
    document("YAML with a key twice", "twice.yaml", YAML + "trials: 5\n"),
    document("YAML that builds a Python object", "tag.yaml", YAML + "seed: !!python/object:x {}\n"),
    document("JSON with a key twice", "twice.json", '{"name": "a", "trials": 3, "trials": 5}'),
    document("JSON that is not a number", "nan.json", '{"name": "a", "trials": NaN}'),
    document("JSON in JSON in JSON", "deep.json", '{"a":' * 5000 + "1" + "}" * 5000),
    document("JSON with half of a character", "half.json", '{"name": "\\ud800", "trials": 3}'),
    Case(what="no such study file", arguments=("check", "goood.toml")),
    Case(what="a folder for a study file", arguments=("check", ".")),
    Case(what="a study file that is no text", arguments=("check", "x.toml"),
         files=(("x.toml", b"\xff\xfe\x00"),)),
    Case(what="--set with an unknown key", arguments=("check", "good.toml", "--set", "sed=1")),
    Case(what="--set with a bad value",
         arguments=("check", "good.toml", "--set", "data.split.seed=-1")),
)  # fmt: skip
DATA = (
    Case(what="no such data file",
         arguments=("check", "good.toml", "--set", 'data.source="gone.csv"')),
    data("a suffix that says nothing", "rows.xls", "x"),
    data("empty CSV", "empty.csv", ""),
    data("CSV without the columns", "columns.csv", "seq,soluble\nMKV,1\n"),
    data("CSV rows with a cell too many", "ragged.csv", CSV + "MKV,1,7\nMKA,0\n"),
    data("a residue that is none", "residue.csv", CSV + "MKV1,1\nMXA,0\n"),
    data("an empty sequence", "nothing.csv", CSV + ",1\nMKA,0\n"),
    data("a label that is none", "label.csv", CSV + "MKV,maybe\nMKA,0\n"),
    data("one sequence with both labels", "conflict.csv", CSV + "MKV,1\nMKV,0\n"),
    data("a quote that swallows rows", "quotes.csv", SWALLOWED),
    data("a quote that is never closed", "open.csv", CSV + '"MKV,1\nMKA,0\n'),
    data("a TSV record of two lines", "lines.tsv", CSV.replace(",", "\t") + '"MK\nV"\t1\n'),
    data("UTF-16 without a byte order mark", "utf16.csv", (CSV + "MKV,1\n").encode("utf-16-le")),
    data("190 labels that are words", "words.csv",
         CSV + "".join(f"MKV{'ACDEFGHIKL'[n % 10] * (n + 1)},{'ja' if n % 3 else 'nein'}\n"
                       for n in range(190))),
    data("RNA", "rna.csv", CSV + "AUGGCCAUUGUAAUGGGCC,1\nAUGGCUAUUGUAAUGGGCA,0\n"),
    data("a single class", "single.csv", CSV + "".join(f"MK{r},1\n" for r in "ACDEFGHIKLMNPQ")),
    data("too few rows", "few.csv", CSV + "MKV,1\nMKA,0\n"),
    data("a sequence too long", "long.csv", CSV + "M" * 201 + ",1\nMKA,0\n"),
    data("an npz that is none", "broken.npz", b"PK\x03\x04 no"),
    data("a CSV that is no text", "binary.csv", b"\xff\xfe\x00\x01"),
    Case(what="a split whose column has no row of a value",
         arguments=("check", "good.toml", *GIVEN, 'data.source="parts.csv"', "--set",
                    'data.split.test=["tset"]'), files=(("parts.csv", PARTS),)),
    Case(what="a sequence in two parts of a split",
         arguments=("check", "good.toml", *GIVEN, 'data.source="parts.csv"'),
         files=(("parts.csv", PARTS + "MKV,1,test\nMKV,1,training\n"),)),
    Case(what="FASTA without a header",
         arguments=("check", "good.toml", "--set",
                    'data.source={ soluble = "a.fasta", insoluble = "b.fasta" }'),
         files=(("a.fasta", "MKV\n>p\nMKA\n"), ("b.fasta", ">q\nMKL\n"))),
)  # fmt: skip
RUNS = (
    Case(what="a storage URL that is none",
         arguments=("status", "--storage", "tuner.db")),
    Case(what="a storage that is not known, with a password",
         arguments=("status", "--storage", "mysql://me:secret@host/db")),
    Case(what="a path after two slashes",
         arguments=("status", "--storage", "sqlite://runs/tuner.db")),
    Case(what="an option's value that is none",
         arguments=("status", "--storage", "sqlite:///runs/tuner.db?timeout=abc")),
    Case(what="an option that is not known, with a password",
         arguments=("status", "--storage", "postgresql://me:secret@host/db?prepare_threshold=0")),
    Case(what="a host that cannot be",
         arguments=("status", "--storage", "postgresql://me:secret@a..b/db")),
    Case(what="a port that cannot be",
         arguments=("status", "--storage", "postgresql://me:secret@host:70000/db")),
    Case(what="a storage that is not there",
         arguments=("status", "good", "--storage", "sqlite:///nowhere/tuner.db")),
    Case(what="a storage in memory", arguments=("status", "--storage", "sqlite://")),
    Case(what="a storage that is another file",
         arguments=("status", "--storage", "sqlite:///good.csv")),
    Case(what="a storage in a folder that cannot be",
         arguments=("launch", "good.toml", "--storage", "sqlite:////proc/no/tuner.db")),
    Case(what="artifacts where a file stands",
         arguments=("launch", "good.toml", "--artifacts", "good.csv")),
    Case(what="a study that is not", arguments=("export", "god")),
    Case(what="an export of a study without a trained trial", arguments=("export", "good")),
    Case(what="a report of a study that is not finished", arguments=("report", "good")),
    Case(what="the name of a study made from another file",
         arguments=("launch", "good.toml", "--set", "training.max_epochs=27")),
    Case(what="the name of a study made from other data",
         arguments=("launch", "good.toml", "--set", 'data.source="other/good.csv"')),
    Case(what="a study of plain Optuna", arguments=("status", "theirs")),
    Case(what="--name with a slash", arguments=("launch", "good.toml", "--name", "a/b")),
    Case(what="no workers", arguments=("launch", "good.toml", "--workers", "0")),
    Case(what="a dashboard for everybody", arguments=("dashboard", "--host", "0.0.0.0")),
    Case(what="deleting without saying yes", arguments=("delete", "good")),
    Case(what="workers that are no number", arguments=("launch", "good.toml", "--workers", "²")),
    Case(what="an export where a folder cannot be",
         arguments=("export", "good", "--trials", "/proc/none/trials.csv")),
    Case(what="a suffix and a format that differ",
         arguments=("export", "good", "--trial", "0", "--format", "toml", "-o", "best.yaml")),
    Case(what="a proxy that is a name",
         arguments=("dashboard", "--behind-proxy", "--trust-proxy", "proxy.lab",
                    "--users", "users.json"), files=(("users.json", ""),)),
    Case(what="a verb that is none", arguments=("lanch", "good.toml")),
    spec("the URL of a webhook in a study file",
         GOOD.replace("[space]", '[notify]\nurl = "https://hooks.example.org/t0ken"\n[space]')),
    spec("a webhook's URL for the name of its variable",
         GOOD.replace("[space]", '[notify]\nurl_env = "https://hooks.example.org/t0ken"\n[space]')),
    Case(what="a webhook without https://",
         arguments=("launch", "good.toml", "--notify", "hooks.example.org/t0ken")),
    Case(what="a webhook whose token would be sent in the clear",
         arguments=("launch", "good.toml", "--notify", "http://hooks.example.org/t0ken")),
)  # fmt: skip


def write_rows(path: Path, rows: list[tuple[str, int]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("sequence", "label"), *rows])


def prepare_folder(folder: Path) -> None:
    """A user's folder: a study file, its data, and a study with a trial that cost something."""
    rows = list(zip(*synthetic_sequences(), strict=True))
    write_rows(folder / "good.csv", rows[:200])
    write_rows(folder / "other" / "good.csv", rows[200:400])
    (folder / "good.toml").write_text(GOOD)
    spec = load_spec(folder / "good.toml")
    artifacts = folder / "runs" / "artifacts"
    prepared = prepare(spec.data, folder=spec.folder, artifacts=artifacts)
    with Storage(f"sqlite:///{folder}/runs/tuner.db") as storage:
        tuned = create_or_resume(
            storage,
            spec,
            prepared.identity,
            development_sha256=prepared.development_sha256,
            artifacts_root=artifacts,
        )
        trial = tuned.study.ask()
        spec.space.suggest(trial)
        trial.report(0.7, 1)
        tuned.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        optuna.create_study(storage=storage.optuna, study_name="theirs")


def what_stands(folder: Path) -> tuple[object, ...]:
    """The studies with their trials, and the user's files."""
    with Storage(f"sqlite:///{folder}/runs/tuner.db") as storage:
        studies = [
            (one.study_name, [
                (trial.number, trial.state, trial.params, trial.intermediate_values)
                for trial in storage.optuna.get_all_trials(one._study_id)
            ])
            for one in optuna.get_all_study_summaries(storage.optuna)
        ]  # fmt: skip
    files = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and "runs" not in path.parts
    }
    return studies, files


def run(case: Case, folder: Path) -> tuple[int | str, str]:
    """Makes a mistake; the exit code, and what the user sees."""
    for name, content in case.files:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, said = type_in(case.arguments, folder)
    for name, _ in case.files:
        (folder / name).unlink()
    seen = " / ".join(line.strip(" │╭╮╰╯─") for line in said.splitlines())
    return code, seen.replace(str(folder), "~")


def type_in(arguments: Sequence[str], folder: Path) -> tuple[int | str, str]:
    """What `tuner` answers to these words; in this process, for a new one takes seconds."""
    said = io.StringIO()
    answer = {"argv": ["tuner", *arguments], "stdin": io.StringIO(), "stdout": io.StringIO()}
    shell = {name: text for name, text in os.environ.items() if not name.startswith("TUNER_")}
    shell |= {"COLUMNS": "400", "NO_COLOR": "1"}
    code: int | str = "none"
    with (
        contextlib.chdir(folder),
        mock.patch.multiple(sys, stderr=said, **answer),
        as_installed(),
        mock.patch.dict(os.environ, shell, clear=True),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if end.code is not None else 0
        except Exception as error:  # noqa: BLE001 - what a user would see a traceback of
            said.write(f"Traceback: {type(error).__name__}: {error}")
    return code, said.getvalue()


@contextlib.contextmanager
def as_installed() -> Iterator[None]:
    """The usage names `tuner` and not `python -m pytest`, or whatever runs this."""
    before, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = before


def make_page(folder: Path) -> tuple[str, list[str]]:
    """The page, and the mistakes that went wrong: no message, a traceback, something lost."""
    lines = [
        "# Bad input",
        "",
        "Made by `.venv/bin/python benchmarks/bad_input.py`. Each command ran in a folder with a",
        "study that had one finished trial; `kept`: its trials and the user's files were the same",
        "after it. `test_bad_input.py` makes the page again and compares. What a killed run",
        "leaves is tested in `test_cli.py` and `test_cluster.py`.",
        "",
        "| # | mistake | command | exit | what the user sees | kept |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    wrong = []
    prepare_folder(folder)
    stood = what_stands(folder)
    for number, case in enumerate((*SPECS, *DATA, *RUNS), start=1):
        code, seen = run(case, folder)
        before, stood = stood, what_stands(folder)
        kept = stood == before
        if code not in (1, 2) or not kept or "Traceback" in seen or not seen:
            wrong.append(case.what)
        command = shlex.join(("tuner", *case.arguments))
        cells = (number, case.what, f"`{in_a_cell(command)}`", code, in_a_cell(seen))
        row = (*map(str, cells), "yes" if kept else "NO")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n", wrong


def in_a_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        page, wrong = make_page(Path(name))
    print(page, end="")
    PAGE.write_text(page, encoding="utf-8")
    sys.exit(f"went wrong: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
