"""The chapter's three networks beside the chapter's claims: runs their studies, prints a table.

    TUNER_DATA_DIR=../shared/data .venv/bin/python benchmarks/chapter.py

Ten epochs, three seeds each, split seed 1 of the real data; validation rows only. The chapter
shuffles without stratifying, so its rows are others.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tuner.search.attributes import curve_of
from tuner.search.study import load
from tuner.storage.storage import Storage

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = {
    "chapter-baseline": "overfits: validation loss rises quickly",
    "chapter-dropout": "a little better, rises later",
    "chapter-l2": "too strong, prevents learning",
}


def row(study: str, folder: Path) -> str:
    with Storage(f"sqlite:///{folder}/tuner.db") as storage:
        trials = load(storage, study, artifacts_root=folder).trials()
    curves = [curve_of(trial) for trial in trials]
    bests = [min(curve, key=lambda epoch: epoch.validation_loss) for curve in curves]
    best_losses = [best.validation_loss for best in bests]
    cells = [
        study,
        " ".join(f"{loss:.4f}" for loss in best_losses),
        f"{statistics.mean(best_losses):.4f}",
        " ".join(str(best.epoch) for best in bests),
        f"{statistics.mean(best.validation_accuracy for best in bests):.4f}",
        f"{statistics.mean(curve[-1].validation_loss for curve in curves):.4f}",
        f"{statistics.mean(curve[-1].training_loss for curve in curves):.4f}",
        CLAIMS[study],
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    print(
        "| study | best validation loss by seed | mean | epoch of the best | its accuracy, mean "
        "| validation loss, epoch 10 | training loss, epoch 10 | the chapter says |"
    )
    print("| --- " * 8 + "|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for study in CLAIMS:
            subprocess.run(
                [sys.executable, "-m", "tuner", "launch", f"studies/{study}.toml",
                 "--storage", f"sqlite:///{folder}/tuner.db", "--artifacts", str(folder)],
                cwd=ROOT, stdout=subprocess.DEVNULL, check=True,
            )  # fmt: skip
            print(row(study, folder), flush=True)


if __name__ == "__main__":
    main()
