"""Makes the studies of one stored format: `tests/data/README.md` says when, and how.

Run it with the checkout that writes the format on the path:

    PYTHONPATH=/path/to/checkout python tests/data/make_format.py tests/data/format1

It makes three small studies in a neutral folder, so that no path of the machine is stored, and
copies what the tests need: the study files, the rows, the database, the artifacts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

#: Where the studies are made; it is stored with them.
AT = Path("/tmp/study")
STORAGE = "sqlite:///tuner.db"
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
ROWS = 240
#: `python -m tuner` is younger than the first format.
MODULE = "tuner" if importlib.util.find_spec("tuner.__main__") else "tuner.cli"

STUDY = """\
name = "{name}"
trials = {trials}

[data]
source = "rows.csv"
max_length = 40
split = {{ seed = 1, validation = 0.2, test = 0.2 }}

[training]
max_epochs = {epochs}
patience = {patience}
precision = "float32"

{hyperband}
[space]
embedding_dim = 2
blocks = 1
kernel_size = 3
filters = {{ choices = [2, 4] }}
units = 4
batch_size = {batch_size}
learning_rate = {{ low = 1e-3, high = 1e-2, log = true }}

[[known]]
filters = 2
"""
HYPERBAND = "[hyperband]\nmin_epochs = 1\neta = 3\n"


def rows() -> str:
    """Sequences of up to 40 residues; those with many charged ones are called soluble."""
    draw = random.Random(1)
    lines = ["sequence,label"]
    for _ in range(ROWS):
        sequence = "".join(draw.choices(RESIDUES, k=draw.randint(12, 40)))
        charged = sum(sequence.count(residue) for residue in "DEKR")
        lines.append(f"{sequence},{int(charged > len(sequence) / 5)}")
    return "\n".join([*lines, ""])


def tuner(*words: str) -> list[str]:
    options = ["--storage", STORAGE, "--artifacts", "artifacts"]
    return [sys.executable, "-m", MODULE, *words, *options]


def run(*words: str) -> None:
    subprocess.run(tuner(*words), cwd=AT, check=True)


def write_study(name: str, **settings: object) -> None:
    (AT / f"{name}.toml").write_text(STUDY.format(name=name, **settings))


def stop_in_the_middle(name: str) -> None:
    """Launches a study, and stops it when its second trial has completed a few epochs."""
    launched = subprocess.Popen(tuner("launch", f"{name}.toml", "--workers", "1"), cwd=AT)
    epochs = (
        "SELECT COUNT(*) FROM trial_intermediate_values AS v JOIN trials AS t USING (trial_id) "
        "JOIN studies AS s USING (study_id) WHERE s.study_name = ? AND t.number = 1"
    )
    deadline = time.monotonic() + 300
    at = f"file:{AT / 'tuner.db'}?mode=ro"
    with contextlib.closing(sqlite3.connect(at, uri=True)) as database:
        while database.execute(epochs, [name]).fetchone()[0] < 3:
            if launched.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} was not caught in the middle of a trial")
            time.sleep(0.1)
    launched.send_signal(signal.SIGINT)
    launched.wait()
    if not list(AT.glob("artifacts/*/checkpoints/*")):
        raise SystemExit(f"{name} left no checkpoint")


def shorten_pages() -> None:
    """Replaces the pages of reports, 5 MB of drawing code each, by a line."""
    for path in (AT / "artifacts").rglob("*"):
        if path.is_file() and path.stat().st_size > 100_000:
            path.write_text("<!doctype html><title>The page of a report, left out</title>\n")


def main(folder: Path) -> None:
    AT.mkdir()
    try:
        (AT / "rows.csv").write_text(rows())
        quick = {"epochs": 3, "patience": 3, "hyperband": HYPERBAND, "batch_size": 32}
        write_study("finished", trials=3, **quick)
        write_study("reported", trials=2, **quick)
        write_study("stopped", trials=2, epochs=20, patience='"none"', hyperband="", batch_size=4)
        run("launch", "finished.toml", "--workers", "1")
        run("launch", "reported.toml", "--workers", "1")
        run("report", "reported")
        stop_in_the_middle("stopped")
        with contextlib.closing(sqlite3.connect(AT / "tuner.db")) as database:
            database.execute("PRAGMA journal_mode = DELETE")  # one file, also while it is read
            database.execute("VACUUM")
        shorten_pages()
        folder.mkdir(parents=True, exist_ok=True)
        for made in ("artifacts", "tuner.db", "rows.csv", *(f.name for f in AT.glob("*.toml"))):
            source, target = AT / made, folder / made
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    finally:
        shutil.rmtree(AT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
