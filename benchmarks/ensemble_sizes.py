"""How many kept networks pay for an ensemble, and whether those of pruned trials do.

    TUNER_DATA_DIR=../shared/data .venv/bin/python benchmarks/ensemble_sizes.py --timeout 5000
    TUNER_DATA_DIR=../shared/data .venv/bin/python benchmarks/ensemble_sizes.py --again

A search over a space a little larger than the quickstart's (split seed 1, 15 epochs, Hyperband,
TPE) in this process, which keeps the validation logits of each trial's best epoch, pruned trials'
too. Then ensembles are selected from the best 5, 10, 25, 50 and all of them, and each selection is
measured on validation rows that did not choose it (`tuner.results.ensemble`). The logits stay in
runs/, for `--again`. The test split takes no part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from machine import processor

from tuner import load_study_file, new_study
from tuner.data.development import DevelopmentData, load_development
from tuner.data.prepare import prepare
from tuner.results.ensemble import select
from tuner.search.objective import Objective
from tuner.train import VALIDATION_LOGITS, EpochResult, TrainingJob

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "runs/ensemble_sizes.npz"
RESULTS = ROOT / "benchmarks/results/ensemble_sizes.json"
SIZES = (2, 5, 10, 25, 50)
OVERRIDES = (
    "trials=1000",
    "training.max_epochs=15",
    "space.filters={ choices = [16, 32, 64] }",
    'data={ source = "solubility", max_length = 200, split = { seed = 1 } }',
)


def record(spec: Any, data: DevelopmentData, timeout: float) -> None:
    """Runs the search; writes logits [trials, m], losses and states of all trials."""
    from tuner.network.training import (
        TensorData,
        TrainingRun,
        configure_tensorflow,
        unpacked,
    )

    configure_tensorflow(1)
    tensors, logits = TensorData(data), dict[int, np.ndarray]()

    def train(job: TrainingJob) -> Generator[EpochResult, None, None]:
        run = TrainingRun(tensors, job)
        try:
            yield from run.epochs()
        finally:
            with contextlib.suppress(KeyError):  # it ended before its first epoch
                logits[job.trial] = unpacked(run.best_weights())[VALIDATION_LOGITS]

    def save(study: optuna.Study, _: Any) -> None:
        trials = [one for one in study.get_trials() if one.number in logits]
        np.savez(
            RECORDED,
            logits=np.stack([logits[one.number] for one in trials]),
            losses=[min(one.intermediate_values.values()) for one in trials],
            complete=[one.state.name == "COMPLETE" for one in trials],
        )

    RECORDED.parent.mkdir(exist_ok=True)
    study = new_study(spec)
    study.optimize(Objective(spec, train), timeout=timeout, callbacks=[save])


def row(
    probabilities: np.ndarray, labels: np.ndarray, which: str, best: int, of: int
) -> dict[str, Any]:
    found = select(probabilities, labels)
    crossed = found.cross_fitted
    assert crossed is not None
    return {
        "networks": which,
        "kept": best,
        "of": of,
        "members": len(found.members),
        "selected_loss": round(found.selected_loss, 4),
        "cross_fitted_loss": round(crossed.ensemble_loss, 4),
        "single_loss": round(crossed.single_loss, 4),
        "gain": round(crossed.gain, 4),
        "gain_sd": round(crossed.gain_sd, 4),
    }


def analyse(labels: np.ndarray) -> list[dict[str, Any]]:
    """Ensembles of the best networks, by `SIZES`: of complete trials alone, and of all."""
    with np.load(RECORDED) as recorded:
        logits, losses, complete = (recorded[key] for key in ("logits", "losses", "complete"))
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    rows = []
    for which, chosen in (("complete", complete), ("complete and pruned", complete | True)):
        order = np.flatnonzero(chosen)[np.argsort(losses[chosen], kind="stable")]
        sizes = {*(size for size in SIZES if size < len(order)), len(order)}
        rows += [
            row(probabilities[order[:best]], labels, which, best, len(order))
            for best in sorted(sizes)
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--timeout", type=float, default=5000, help="seconds of the search")
    parser.add_argument("--again", action="store_true", help="of the logits in runs/")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    spec = load_study_file(ROOT / "studies/quickstart.toml", OVERRIDES)
    prepared = prepare(spec.data, folder=spec.folder, artifacts=ROOT / "runs/artifacts")
    data = load_development(prepared.development_file)
    if not options.again:
        record(spec, data, options.timeout)
    rows = analyse(data.validation_labels)
    for one in rows:
        print(json.dumps(one))
    document = {
        "command": "benchmarks/ensemble_sizes.py " + " ".join(sys.argv[1:]),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": processor(),
        "rows": rows,
    }
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
