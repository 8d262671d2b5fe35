"""Is the audit of pruning right? Simulated on recorded curves, whose ends are all known.

    .venv/bin/python benchmarks/pruning_audits.py [--studies 200]     # minutes, no training

Each study draws the recorded trials (learning_curves.json, trained to the end) in an order of its
own, and the product's Hyperband prunes them. Of every pruned trial is known what it would have
become, so the true share of those better than the best that pruning kept is, too. Compared with it
is what an audit of some share says: how often its 95 % interval holds the truth. Writes
results/pruning_audits.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from learning_curves import TABLE, study_document
from optuna.trial import TrialState

from tuner.metrics import mid_p_interval
from tuner.search.hyperband import make_pruner
from tuner.search.pruning_audit import is_drawn
from tuner.spec.reader import spec_from_document
from tuner.spec.spec import StudySpec

RESULTS = Path(__file__).resolve().parent / "results" / "pruning_audits.json"
PATIENCE = 8
SHARES = (0.05, 0.1, 0.2, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--trials", type=int, default=200)
    asked = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    curves = [
        _until_patience(row["validation_losses"]) for row in json.loads(TABLE.read_text())["rows"]
    ]
    studies = [_study(curves, seed, asked.trials) for seed in range(asked.studies)]
    found: dict[str, Any] = {
        "curves": len(curves),
        "studies": len(studies),
        "trials": asked.trials,
        "pruned": float(np.mean([len(one) for one in studies])),
        "better_share": float(np.mean([np.mean(list(one.values())) for one in studies])),
        "studies_where_pruning_lost_a_better_one": float(
            np.mean([any(one.values()) for one in studies])
        ),
        "audits": [_audit(studies, share) for share in SHARES],
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def _until_patience(losses: list[float]) -> list[float]:
    """The losses of a trial that patience ends."""
    for epoch in range(1, len(losses) + 1):
        if epoch - 1 - int(np.argmin(losses[:epoch])) >= PATIENCE:
            return losses[:epoch]
    return losses


def _spec(seed: int, audit: float | None = None) -> StudySpec:
    document = study_document(1, seed)
    document["hyperband"] = {"min_epochs": 1, "eta": 3} | (
        {} if audit is None else {"audit": audit}
    )
    return spec_from_document(document, folder=Path())


def _study(curves: list[list[float]], seed: int, trials: int) -> dict[int, bool]:
    """The pruned trials of a study, and whether each would have been better than the best kept."""
    spec = _spec(seed)
    study = optuna.create_study(pruner=make_pruner(spec))
    order = np.random.default_rng(seed).permutation(len(curves))
    best, pruned = math.inf, {}
    for row in itertools.islice(itertools.cycle(order), trials):
        trial, reached = study.ask(), math.inf
        state = TrialState.COMPLETE
        for epoch, loss in enumerate(curves[row], start=1):
            reached = min(reached, loss)
            trial.report(reached, epoch)
            if epoch in spec.rungs and trial.should_prune():
                state = TrialState.PRUNED
                pruned[trial.number] = min(curves[row])
                break
        if state == TrialState.COMPLETE:
            best = min(best, reached)
        study.tell(trial, reached if state == TrialState.COMPLETE else None, state)
    return {number: loss < best for number, loss in pruned.items()}


def _audit(studies: list[dict[int, bool]], share: float) -> dict[str, Any]:
    covered, widths, sizes, estimates = [], [], [], []
    for seed, pruned in enumerate(studies):
        spec = _spec(seed, share)
        drawn = [is_better for number, is_better in pruned.items() if is_drawn(spec, number)]
        if not drawn:
            continue
        low, high = mid_p_interval(sum(drawn), len(drawn))
        truth = float(np.mean(list(pruned.values())))
        covered.append(low <= truth <= high)
        widths.append(high - low)
        sizes.append(len(drawn))
        estimates.append(float(np.mean(drawn)))
    return {
        "share": share,
        "audited": float(np.mean(sizes)),
        "estimate": float(np.average(estimates, weights=sizes)),
        "coverage": float(np.mean(covered)),
        "width": float(np.mean(widths)),
    }


if __name__ == "__main__":
    main()
