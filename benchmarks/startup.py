"""How long commands take to answer, and a launch to its first finished epoch.

    TUNER_DATA_DIR=../shared/data .venv/bin/python benchmarks/startup.py       # 3 minutes

A launch is of the quickstart study with its data prepared before, on two workers, in a storage of
its own; its first epoch's end is read from the database.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from machine import processor

from tuner.data.prepare import prepare
from tuner.search.record import versions
from tuner.search.study import load
from tuner.spec.reader import load_spec
from tuner.storage.storage import Storage

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "studies/quickstart.toml"
ARTIFACTS = ROOT / "runs/artifacts"


def tuner(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "tuner", *arguments]


def seconds_of(command: list[str]) -> float:
    began = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.monotonic() - began


def seconds_to_first_epoch(folder: Path) -> float:
    url = f"sqlite:///{folder}/tuner.db"
    Storage(url).close()
    began = time.time()
    launch = subprocess.Popen(
        tuner("launch", str(STUDY), "--storage", url, "--artifacts", str(ARTIFACTS)),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with Storage(url) as storage:
            while launch.poll() is None:
                time.sleep(0.05)
                if "quickstart" not in optuna.get_all_study_names(storage.optuna):
                    continue
                trials = load(storage, "quickstart", artifacts_root=ARTIFACTS).trials()
                if any(trial.intermediate_values for trial in trials):
                    return time.time() - began
        raise SystemExit("the launch ended before its first epoch")
    finally:
        launch.send_signal(signal.SIGINT)
        launch.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/startup.json")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    prepare(load_spec(STUDY).data, folder=ROOT, artifacts=ARTIFACTS)
    taken: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        url = f"sqlite:///{name}/tuner.db"
        Storage(url).close()
        commands = {
            "tuner --help": tuner("--help"),
            "tuner check studies/solubility.toml": tuner("check", "studies/solubility.toml"),
            "tuner status": tuner("status", "--storage", url),
        }
        for repeat in range(options.repeats):
            for what, command in commands.items():
                taken.setdefault(what, []).append(seconds_of(command))
            folder = Path(name) / str(repeat)
            folder.mkdir()
            what = "tuner launch studies/quickstart.toml, to the end of the first epoch"
            taken.setdefault(what, []).append(seconds_to_first_epoch(folder))
    rows: list[dict[str, Any]] = [
        {
            "what": what,
            "seconds": round(statistics.median(seconds), 2),
            "spread": [round(min(seconds), 2), round(max(seconds), 2)],
        }
        for what, seconds in taken.items()
    ]
    for row in rows:
        print(json.dumps(row))
    document = {
        "command": f"benchmarks/startup.py --repeats {options.repeats}",
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": processor(),
        "versions": versions(),
        "rows": rows,
    }
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
