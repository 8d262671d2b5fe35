"""Replays a distributed study, and copies of it in which a stored value was changed.

    .venv/bin/python benchmarks/replays.py FOLDER [--workers 4] [--trials 20]

FOLDER keeps the study (real data, split seed 1) and its changed copies. Trains 20 trials again in
one process, bit for bit; derives the search again; changes one stored value at a time in a copy of
the database, and says what `--search` names. With --other, TensorFlow computes without oneDNN, as
another machine might: by how much curves then differ. Writes results/replays.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna

from tuner.results.replay import TOLERANCES, replay
from tuner.search.attributes import curve_of
from tuner.search.replay import replay_search
from tuner.search.study import load
from tuner.storage.storage import Storage

RESULTS = Path(__file__).resolve().parent / "results" / "replays.json"
STUDY = """name = "replayed"
trials = 40
[data]
source = "solubility"
split = { rule = "random", seed = 1, validation = 0.1, test = 0.8 }
[training]
max_epochs = 9
precision = "float32"
[hyperband]
[space]
blocks = { low = 1, high = 2 }
embedding_dim = { choices = [4, 8] }
filters = { choices = [8, 16] }
kernel_size = { low = 3, high = 7, step = 2 }
units = { choices = [8, 16] }
head = { choices = ["global_max", "global_average", "flatten"] }
normalization = { choices = ["none", "batch"] }
conv_dropout = { low = 0.0, high = 0.3 }
dense_dropout = { low = 0.05, high = 0.35 }
learning_rate = { low = 3e-4, high = 1e-2, log = true }
batch_size = { choices = [64, 128] }
"""
OF_THE_SIXTH = "(SELECT trial_id FROM trials WHERE number = 5)"
#: One stored value each, changed with any database client.
CHANGES: dict[str, str] = {
    "a sampled value": "UPDATE trial_params SET param_value = param_value * 1.01 WHERE trial_id = "
    "(SELECT trial_id FROM trials WHERE number = 30) AND param_name = 'learning_rate'",
    "a trial's value": "UPDATE trial_values SET value = value - 0.01 WHERE trial_value_id = "
    "(SELECT max(trial_value_id) FROM trial_values)",
    "a value after an epoch": "UPDATE trial_intermediate_values SET intermediate_value = "
    f"intermediate_value - 0.01 WHERE trial_id = {OF_THE_SIXTH} AND step = 1",
    "a verdict": "UPDATE tuner_decisions SET verdict = 'go' WHERE id = "
    "(SELECT min(id) FROM tuner_decisions WHERE verdict = 'prune')",
    "a decision removed": "DELETE FROM tuner_decisions WHERE id = "
    "(SELECT max(id) FROM tuner_decisions WHERE kind = 'rung')",
    "two suggestions exchanged": "UPDATE tuner_decisions SET trial = 21 - trial "
    "WHERE kind = 'ask' AND trial IN (10, 11)",
    "a trial's state": "UPDATE trials SET state = 'COMPLETE' WHERE number = "
    "(SELECT min(number) FROM trials WHERE state = 'PRUNED')",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--other", action="store_true")
    asked = parser.parse_args()
    folder: Path = asked.folder
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    database = folder / "tuner.db"
    if not database.exists():
        (folder / "study.toml").write_text(STUDY)
        launch = [Path(sys.executable).with_name("tuner"), "launch", "study.toml"]
        places = ["--storage", f"sqlite:///{database.absolute()}", "--artifacts", "artifacts"]
        subprocess.run([*launch, *places, "--workers", str(asked.workers)], cwd=folder, check=True)
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if asked.other:
        os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
        found["without_onednn"] = _replays(database, folder, 20, asked.trials)
    else:
        found["bit_for_bit"] = _replays(database, folder, 0, asked.trials)
        found["search"] = _search(database, folder)
        found["changed"] = {what: _changed(folder, sql) for what, sql in CHANGES.items()}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def _replays(database: Path, folder: Path, first: int, count: int) -> dict[str, Any]:
    with Storage(f"sqlite:///{database.absolute()}") as storage:
        tuned = load(storage, "replayed", artifacts_root=folder / "artifacts")
        numbers = [trial.number for trial in tuned.trials() if curve_of(trial)]
        replays = [replay(tuned, number) for number in numbers[first : first + count]]
        trials = tuned.trials()
    workers = {trials[one.trial].user_attrs["worker"] for one in replays}
    return {
        "trials": len(replays),
        "workers": len(workers),
        "epochs": sum(one.epochs for one in replays),
        "equal": sum(one.equal for one in replays),
        "bit_for_bit": sum(one.is_exact for one in replays),
        "largest_difference": max(one.largest_difference for one in replays),
        "tolerances": TOLERANCES,
        "beyond_tolerances": [one.trial for one in replays if not one.within_tolerances],
    }


def _search(database: Path, folder: Path) -> dict[str, Any]:
    with Storage(f"sqlite:///{database.absolute()}") as storage:
        return replay_search(load(storage, "replayed", artifacts_root=folder)).to_document()


def _changed(folder: Path, sql: str) -> str | None:
    copy = folder / "changed.db"
    shutil.copy(folder / "tuner.db", copy)
    with closing(sqlite3.connect(copy)) as connection, connection:
        assert connection.execute(sql).rowcount > 0
    with Storage(f"sqlite:///{copy.absolute()}") as storage:
        found = replay_search(load(storage, "replayed", artifacts_root=folder))
    copy.unlink()
    return None if found.first_unexplained is None else found.first_unexplained.in_words


if __name__ == "__main__":
    main()
