"""Studies of one space over several splits of the same rows, and their reports side by side.

    .venv/bin/python benchmarks/split_rules.py --data DIR --folder runs/split-rules

DIR holds psi_biology.csv (its column `partition` names groups that share no homologues) and
solubility.npz. A study that is finished is not run again, so that the command goes on where it was
stopped. Homology needs the extra `homology`. Splits have seed 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SPACE = """
[training]
max_epochs = 6
[hyperband]
[space]
embedding_dim = 16
kernel_size = { low = 5, high = 9, step = 2 }
blocks = 1
filters = { choices = [16, 32] }
pool_size = 4
head = { choices = ["global_max", "global_both"] }
units = 32
normalization = "batch"
learning_rate = { low = 1e-3, high = 1e-2, log = true }
"""
PSI = """
source = "psi_biology.csv"
columns = { sequence = "fasta", label = "solubility" }
max_length = 300
truncate = "end"
conflicts = "drop"
"""
SOLUBILITY = """
source = "solubility"
"""
PARTITIONS = 'rule = "given", column = "partition", validation = ["2"], test = ["3"]'
#: By name: the data and the split.
STUDIES = {
    "psi-given": (PSI, PARTITIONS),
    "psi-folds": (PSI, f'{PARTITIONS}, folds = {{ column = "partition" }}'),
    "psi-random": (PSI, 'rule = "random", seed = 1, validation = 0.24, test = 0.2'),
    "solubility-random": (SOLUBILITY, 'rule = "random", seed = 1'),
    "solubility-homology": (SOLUBILITY, 'rule = "homology", seed = 1'),
}


def study_file(name: str, trials: int) -> str:
    data, split = STUDIES[name]
    return f'name = "{name}"\ntrials = {trials}\n[data]{data}split = {{ {split} }}\n{SPACE}'


def tuner(folder: Path, *arguments: str) -> None:
    """Runs `tuner` on this folder's storage, with what it says on the terminal."""
    environment = os.environ | {
        "TUNER_STORAGE": f"sqlite:///{folder / 'tuner.db'}",
        "TUNER_ARTIFACTS": str(folder / "artifacts"),
        "TUNER_DATA_DIR": str(folder),
    }
    program = Path(sys.executable).with_name("tuner")
    subprocess.run([program, *arguments], env=environment, check=True)


def run(name: str, folder: Path, trials: int, workers: int) -> dict[str, Any]:
    """The report of a study, which is run where it is not finished."""
    written = folder / name / "report.json"
    if not written.is_file():
        path = folder / f"{name}.toml"
        path.write_text(study_file(name, trials))
        tuner(folder, "launch", str(path), "--workers", str(workers))
        report = ("report", name, "-o", str(written.parent))
        try:
            tuner(folder, *report)
        except subprocess.CalledProcessError:
            # The studies share test rows, so a later one opens some of an earlier one again.
            tuner(folder, *report, "--again", "--reason", "splits of the same rows are compared")
    return dict(json.loads(written.read_text()))


def row(name: str, report: dict[str, Any]) -> str:
    test, validation = report["test"], report["validation"]
    rows = report["data"]
    folds = f", {rows['folds']} folds" if rows.get("folds") else ""
    low, high = test["accuracy_ci95"]
    return (
        f"| {name} | {rows['training_rows']:,}/{rows['validation_rows']:,}/{rows['test_rows']:,}"
        f"{folds} | {report['validation_loss']:.4f} | {100 * validation['accuracy']:.1f} % | "
        f"{test['loss']:.4f} | {100 * test['accuracy']:.1f} % ({100 * low:.1f} to "
        f"{100 * high:.1f}) | {validation['roc_auc']:.3f} | {test['roc_auc']:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/split-rules"))
    parser.add_argument("--trials", type=int, default=9)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(STUDIES), choices=STUDIES)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("psi_biology.csv", "solubility.npz"):
        if not (folder / name).exists():
            (folder / name).symlink_to((arguments.data / name).absolute())
    lines = [
        row(name, run(name, folder, arguments.trials, arguments.workers)) for name in arguments.only
    ]
    print(
        "| study | training/validation/test rows | validation loss | accuracy | test loss | test "
        "accuracy (95 %) | validation ROC AUC | test ROC AUC |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
