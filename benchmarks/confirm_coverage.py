"""How often the intervals of `tuner confirm` hold, and its set of ties has the best configuration.

    .venv/bin/python benchmarks/confirm_coverage.py              # 2 minutes
    .venv/bin/python benchmarks/confirm_coverage.py --seeds 3

The truth has to be known, so small networks stand in for large ones: one hidden layer of random
features of a synthetic protein's composition, and a linear output that is fitted. Another seed,
other features. Each configuration is trained with many seeds and evaluated on many rows, whose
mean is the truth. A simulated confirmation draws a few of the seeds and 1,845 of the rows.
Resampling the seeds, too, is measured beside it.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import numpy.typing as npt

from tuner.data.rows import RESIDUES, encode
from tuner.data.synthetic import synthetic_sequences
from tuner.metrics import cross_entropy
from tuner.results.resampling import intervals, resampled_deviations, tied_with_best

ROWS = 1_845  #: of a validation split
POOL_SEEDS = 60
TRAINING_ROWS = 1_500
RESAMPLES = 1_000
#: Random features and strength of the penalty: the first three are close to each other.
CONFIGURATIONS = ((40, 3.0), (44, 3.0), (40, 5.0), (24, 3.0), (12, 3.0), (80, 0.3))

Floats = npt.NDArray[np.float64]


def rows_and_labels() -> tuple[Floats, npt.NDArray[np.uint8]]:
    """Composition of each sequence, [n, 20], standardised; and labels."""
    sequences, labels = synthetic_sequences()
    length = max(map(len, sequences))
    tokens = encode(sequences, length)
    counts = np.stack([(tokens == token).sum(axis=1) for token in range(1, len(RESIDUES) + 1)], 1)
    shares = counts / counts.sum(axis=1, keepdims=True)
    return (shares - shares.mean(axis=0)) / shares.std(axis=0), np.asarray(labels, np.uint8)


def logits_of(
    features: int, penalty: float, seed: int, rows: Floats, labels: npt.NDArray[np.uint8]
) -> Floats:
    """The logits of all rows by a network that was fitted to the first `TRAINING_ROWS`."""
    generator = np.random.default_rng([seed, features])
    hidden = np.tanh(rows @ generator.normal(0, 0.5, (rows.shape[1], features)))
    hidden = np.column_stack([hidden, np.ones(len(rows))])
    fitted, targets = hidden[:TRAINING_ROWS], labels[:TRAINING_ROWS]
    weights = np.zeros(hidden.shape[1])
    for _ in range(12):  # Newton's method
        probability = 1 / (1 + np.exp(-fitted @ weights))
        curvature = (fitted * (probability * (1 - probability))[:, np.newaxis]).T @ fitted
        gradient = fitted.T @ (probability - targets) + penalty * weights
        weights -= np.linalg.solve(curvature + penalty * np.eye(len(weights)), gradient)
    found: Floats = hidden @ weights
    return found


def resampled_seeds(losses: Floats, generator: np.random.Generator, resamples: int) -> Floats:
    """As `resampled_deviations`, with the seeds resampled like the rows."""
    k, seeds, rows = losses.shape
    of_seeds = losses.mean(axis=2)
    drawn = generator.integers(0, seeds, (resamples, k, seeds))
    chosen = np.take_along_axis(of_seeds[np.newaxis], drawn, axis=2).mean(axis=2)
    of_rows = losses.mean(axis=1)
    of_rows -= of_rows.mean(axis=1, keepdims=True)
    weights = generator.multinomial(rows, np.full(rows, 1 / rows), resamples)
    deviations: Floats = chosen - of_seeds.mean(axis=1) + weights @ of_rows.T / rows
    return deviations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--times", type=int, default=400, help="simulated confirmations")
    arguments = parser.parse_args()
    rows, labels = rows_and_labels()
    pool = np.stack(
        [
            [
                cross_entropy(
                    labels[TRAINING_ROWS:],
                    logits_of(features, penalty, seed, rows, labels)[TRAINING_ROWS:],
                )
                for seed in range(POOL_SEEDS)
            ]
            for features, penalty in CONFIGURATIONS
        ]
    )
    truth = pool.mean(axis=(1, 2))
    best = int(truth.argmin())
    generator = np.random.default_rng(0)
    held = {method: {"means": 0, "differences": 0} for method in ("ours", "seeds resampled")}
    tied, sizes = 0, 0
    for _ in range(arguments.times):
        # With replacement: the pool is the population, so its mean is the truth.
        chosen = generator.integers(0, POOL_SEEDS, (len(truth), arguments.seeds))
        at = generator.integers(0, pool.shape[2], ROWS)
        losses = np.stack([one[seeds][:, at] for one, seeds in zip(pool, chosen, strict=True)])
        means = losses.mean(axis=(1, 2))
        for method, resample in (
            ("ours", resampled_deviations),
            ("seeds resampled", resampled_seeds),
        ):
            deviations = resample(losses, generator, RESAMPLES)
            of_means = intervals(means, deviations)
            # From one configuration that was named beforehand, as intervals of differences are.
            apart = intervals(means - means[0], deviations - deviations[:, [0]])
            held[method]["means"] += sum(
                low <= true <= high for true, (low, high) in zip(truth, of_means, strict=True)
            )
            held[method]["differences"] += sum(
                low <= true <= high
                for true, (low, high) in zip(truth[1:] - truth[0], apart[1:], strict=True)
            )
            if method == "ours":
                found = tied_with_best(means, deviations)
                tied += best in found
                sizes += len(found)
    count = arguments.times
    print(
        json.dumps(
            {
                "seeds": arguments.seeds,
                "rows": ROWS,
                "confirmations": count,
                "true mean losses": [round(float(one), 4) for one in truth],
                "sd of the seeds": [
                    round(float(one), 4) for one in pool.mean(axis=2).std(axis=1, ddof=1)
                ],
                "95 % intervals that hold": {
                    method: {
                        "means": round(of["means"] / count / len(truth), 3),
                        "differences": round(of["differences"] / count / (len(truth) - 1), 3),
                    }
                    for method, of in held.items()
                },
                "the best is among the ties": round(tied / count, 3),
                "ties": round(sizes / count, 2),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
