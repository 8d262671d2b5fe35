"""The table of faults: breaks real studies, writes docs/faults.md from what they said.

    .venv/bin/python benchmarks/faults.py                # about 10 minutes
    .venv/bin/python benchmarks/faults.py --away 8       # as long as in the suite

Each row is a test of tests/faults/test_faults.py. Databases are away for 60 s, or so long.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "test_faults.py"

HEAD = """# Faults

Made by `.venv/bin/python benchmarks/faults.py` from real runs: each row is a test of
`test_faults.py`, with real processes and trainings that cost nothing. Databases were away
for {away} s; the suite takes 5 s.

After each fault the test proves from the database: exactly the budget is finished, trial numbers
have no gap and no trial was told twice, every curve and every reported value is that of an
undisturbed run, no trial is RUNNING, the lease is free, no checkpoint is left, and no process of
the run lives. That is what "nothing" stands for. Real trainings, hit 100 times at random, are
compared bit for bit by `benchmarks/storm.py`.

Where a fault is not the thing itself, its row says what stands for it. The clock that jumps is
Python's, replaced in the processes of the run; the machine's is not set. A limit on the size of
files makes writes fail at a byte that the test chooses (EFBIG); the row with ENOSPC fills a real
file system, which needs the right to mount one. SQLite has no server that takes a lock from a
frozen process, so there the coordinator is frozen outside a transaction; frozen within one, it
keeps other launches out until it continues or ends (docs/decisions.md).

| what was done | on | what the user saw | lost |
| --- | --- | --- | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--away", type=int, default=60, help="seconds")
    away = parser.parse_args().away
    with tempfile.TemporaryDirectory() as folder:
        story, report = Path(folder) / "story.jsonl", Path(folder) / "report.xml"
        story.touch()
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=600",
             "-o", "session_timeout=3600", f"--junitxml={report}", str(TESTS)],
            cwd=ROOT,
            env=os.environ
            | {"PYTEST_TUNER_STORY": str(story), "PYTEST_TUNER_AWAY_SECONDS": str(away)},
            check=False,
        )  # fmt: skip
        told = stories(story)
        outcomes = results(report)
    rows = [row(name, done, told, outcomes) for name, done in faults().items()]
    (ROOT / "docs" / "faults.md").write_text(HEAD.format(away=away) + "\n".join(rows) + "\n")


def faults() -> dict[str, str]:
    """The tests, and what each of them does, in its own words."""
    found = {}
    for node in ast.parse(TESTS.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found[node.name] = " ".join((ast.get_docstring(node) or "").split()).removesuffix(".")
    return found


def stories(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Who said what in each test."""
    told = defaultdict(list)
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        name = entry["test"].split("::")[1].split(" ")[0].split("[")[0]
        told[name] += [(entry["who"], words) for words in entry["told"]]
    return told


def results(path: Path) -> dict[str, dict[str, bool]]:
    """For each test and each of its parameters, whether it passed."""
    passed: dict[str, dict[str, bool]] = defaultdict(dict)
    for case in ET.parse(path).iter("testcase"):
        name, _, parameters = case.attrib["name"].partition("[")
        if case.find("skipped") is not None:
            continue
        broken = case.find("failure") is not None or case.find("error") is not None
        passed[name][parameters.removesuffix("]")] = not broken
    return passed


def row(
    name: str,
    done: str,
    told: dict[str, list[tuple[str, str]]],
    outcomes: dict[str, dict[str, bool]],
) -> str:
    runs = outcomes.get(name, {})
    storages = [one for one in runs if one in ("sqlite", "postgresql")]
    uses_postgres = "postgres: Postgres" in source_of(name)
    storages = storages or (["postgresql"] if uses_postgres else ["sqlite"])
    variants = [one for one in runs if one and one not in storages]
    proper = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
    on = ", ".join(proper[one] for one in storages)
    broken = [parameters or "it" for parameters, passed in runs.items() if not passed]
    lost = f"FAILED: {', '.join(broken)}" if broken else "nothing" if runs else "not tried here"
    ways = f" ({' and '.join(variants)})" if variants else ""
    return f"| {done}{ways} | {on} | {' · '.join(saw(told[name]))} | {lost} |"


def source_of(name: str) -> str:
    text = TESTS.read_text()
    return next(
        ast.get_source_segment(text, node) or ""
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )


def saw(told: Iterable[tuple[str, str]]) -> list[str]:
    """Each message once, with what changes from run to run left out."""
    seen: dict[str, None] = {}
    for who, words in told:
        plain = re.sub(r"/\S*/(artifacts/small)-\w+", r"\1", words)
        plain = re.sub(r"/\S*/(?=\w+\.py:)", "", plain)
        plain = re.sub(r" at 0x[0-9a-f]+", "", plain)
        plain = re.sub(r"127\.0\.0\.1:\d+|(?<=process )\d+|(?<= on )[\w.-]+(?=; stop)", "…", plain)
        plain = re.sub(r"\b(Trial|had|after|be) \d+", r"\1 N", plain).replace("|", "/")
        if "resource_tracker" in plain:  # Python's own, of the process that was killed
            continue
        seen[f"{plain}" if who == "launch" else f"`tuner {who}`: {plain}"] = None
    return list(seen)


if __name__ == "__main__":
    main()
