"""Records learning curves that policies can be replayed on: real trials, trained to the end.

    TUNER_DATA_DIR=../shared/data .venv/bin/python benchmarks/learning_curves.py --trials 40

Each call is a study of its own (`learning-curves-SEED`, in runs/): random configurations of
studies/solubility.toml without its largest networks, split seed 1, all epochs, no pruning and no
early stopping. A call that was cut goes on where it was, as long as runs/ is there: in a fresh
checkout take a seed that the table does not have. What finished is added to
benchmarks/results/learning_curves.json, a row a trial; benchmarks/search_policies.py reads it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
from machine import processor
from optuna.trial import TrialState

from tuner.search.attributes import curve_of
from tuner.search.study import load
from tuner.spec.reader import load_spec
from tuner.storage.storage import Storage

ROOT = Path(__file__).resolve().parent.parent
SOLUBILITY = ROOT / "studies/solubility.toml"
TABLE = ROOT / "benchmarks/results/learning_curves.json"
STORAGE = f"sqlite:///{ROOT}/runs/learning_curves.db"
ARTIFACTS = ROOT / "runs/artifacts"
MAX_EPOCHS = 27


def study_document(trials: int, seed: int) -> dict[str, Any]:
    document = load_spec(SOLUBILITY).to_document()
    del document["hyperband"], document["known"]
    document |= {
        "name": f"learning-curves-{seed}",
        "trials": trials,
        "seed": seed,
        "sampler": {"kind": "random"},
    }
    document["data"]["split"]["seed"] = 1
    document["training"] |= {"max_epochs": MAX_EPOCHS, "patience": "none"}
    document["space"] |= {
        "kernel_size": {"low": 3, "high": 9, "step": 2},
        "filters": {"choices": [16, 32, 64]},
        "batch_size": {"choices": [32, 64, 128]},
    }
    return document


def finished(name: str, seed: int) -> list[dict[str, Any]]:
    with Storage(STORAGE) as storage:
        tuned = load(storage, name, artifacts_root=ARTIFACTS)
        return [
            {
                "seed": seed,
                "trial": trial.number,
                "params": trial.params,
                "seconds_an_epoch": round(
                    statistics.median(epoch.seconds for epoch in curve_of(trial)), 2
                ),
                "validation_losses": [round(epoch.validation_loss, 4) for epoch in curve_of(trial)],
            }
            for trial in tuned.trials(TrialState.COMPLETE)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, help="seconds, after which it stops for now")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    document = study_document(options.trials, options.seed)
    file = ROOT / "runs" / f"{document['name']}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(document))
    launch = [
        sys.executable, "-m", "tuner", "launch", str(file),
        "--storage", STORAGE, "--artifacts", str(ARTIFACTS),
    ]  # fmt: skip
    if options.timeout is not None:
        launch += ["--timeout", str(options.timeout)]
    subprocess.run(launch, cwd=ROOT, check=True)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"rows": [], "machines": []}
    found = [*table["rows"], *finished(document["name"], options.seed)]
    of_trial = {(row["seed"], row["trial"]): row for row in found}
    rows = [of_trial[key] for key in sorted(of_trial)]
    table = {
        "made_by": "benchmarks/learning_curves.py",
        "machines": sorted({*table["machines"], processor()}),
        "space": document["space"],
        "rows": rows,
    }
    TABLE.write_text(
        json.dumps(table, separators=(",", ":")).replace('{"seed"', '\n{"seed"') + "\n"
    )
    print(f"{len(rows)} curves in {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
