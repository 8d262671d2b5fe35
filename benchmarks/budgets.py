"""Budgets of 1, 7 and 100 with 1, 2 and 16 workers, on both databases: exact, every time.

    .venv/bin/python benchmarks/budgets.py             # 20 runs each, about 6 minutes
    .venv/bin/python benchmarks/budgets.py --runs 3

The objective is cheap: learning curves by arithmetic, in the coordinator's own threads. After
each run the database is read by another connection: the budget's finished trials, their numbers
0, 1, 2, ... once each, and not one trial more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import optuna  # noqa: E402
from fakes import FakeWorkers, Notes, make_study, small_spec  # noqa: E402
from postgres import postgres_server  # noqa: E402

from tuner.coordination.coordinator import Coordinator  # noqa: E402
from tuner.search.tuned_study import FINISHED  # noqa: E402
from tuner.storage.storage import Storage  # noqa: E402

BUDGETS = (1, 7, 100)
WORKERS = (1, 2, 16)


def run_once(url: str, folder: Path, budget: int, workers: int, run: int) -> bool:
    """Whether a study of its own had exactly its budget, and nothing else."""
    name = f"b{budget}-w{workers}-{run}"
    tuned = make_study(folder, small_spec(name=name, trials=budget, seed=run), url=url)
    Coordinator(tuned, FakeWorkers(workers), Notes()).run()
    tuned.storage.close()
    with Storage(url) as other:
        trials = optuna.load_study(study_name=name, storage=other.optuna).trials
    finished = [trial.number for trial in trials if trial.state in FINISHED]
    return finished == list(range(budget)) and len(trials) == budget


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/budgets.json")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = []
    with tempfile.TemporaryDirectory() as folder, postgres_server() as server:
        for database in ("sqlite", "postgresql"):
            for budget in BUDGETS:
                for workers in WORKERS:
                    here = Path(folder) / f"{database}-{budget}-{workers}"
                    here.mkdir()
                    url = f"sqlite:///{here}/tuner.db"
                    url = url if database == "sqlite" else server.database()
                    began = time.monotonic()
                    exact = sum(
                        run_once(url, here, budget, workers, run) for run in range(options.runs)
                    )
                    rows.append(
                        {
                            "database": database,
                            "budget": budget,
                            "workers": workers,
                            "runs": options.runs,
                            "exact": exact,
                            "seconds": round(time.monotonic() - began, 1),
                        }
                    )
                    print(json.dumps(rows[-1]), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(row["exact"] != row["runs"] for row in rows))


if __name__ == "__main__":
    main()
