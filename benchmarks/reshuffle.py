"""What `reshuffle = true` buys: the chosen configuration on many new rows, with and without it.

    .venv/bin/python benchmarks/reshuffle.py

Rows are of the synthetic rule, whose best loss is known. Each repetition takes development rows at
random and searches the same random configurations of a logistic regression (which words of a
reduced alphabet are counted, and how strong the penalty is) with a validation split that stays and
with one that `DevelopmentData.reshuffled` draws for each trial. Each search's choice is then judged
by the thousands of rows that are left, which is what a test split estimates. Differences are paired
by repetition. Needs the extra `audit` (scikit-learn).
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import MaxAbsScaler

from tuner.data.development import DevelopmentData
from tuner.data.rows import decode_tokens, encode
from tuner.data.synthetic import SYNTHETIC_BEST_LOSS, synthetic_sequences
from tuner.metrics import cross_entropy

ALPHABETS = ("FILVWY", "FILVWYAM", "DEKR", "GPST", "FILVWYDEKR")
WORD_LENGTHS = (1, 2, 3, 4, 5, 6)
PENALTIES = np.logspace(-4, 2, 25)  # C of scikit-learn


def reduced(sequences: list[str], inside: str) -> list[str]:
    """Each residue as a letter: in the group or not."""
    table = str.maketrans({chr(one): "h" if chr(one) in inside else "p" for one in range(65, 91)})
    return [sequence.translate(table) for sequence in sequences]


class Features:
    """Counts of words of each alphabet and length, for all rows, by configuration."""

    def __init__(self, sequences: list[str]) -> None:
        self._of: dict[tuple[str, int], Any] = {}
        for alphabet in ALPHABETS:
            words = reduced(sequences, alphabet)
            for length in WORD_LENGTHS:
                counts = CountVectorizer(analyzer="char", ngram_range=(length, length))
                self._of[alphabet, length] = MaxAbsScaler().fit_transform(
                    counts.fit_transform(words).astype(float)
                )

    def of(self, config: tuple[str, int, float]) -> Any:
        return self._of[config[0], config[1]]


def logits_of(
    features: Any, labels: npt.NDArray[np.uint8], train: Any, rows: Any, penalty: float
) -> npt.NDArray[np.float64]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a hundred steps are enough for this comparison
        model = LogisticRegression(C=penalty, max_iter=100).fit(features[train], labels[train])
    found: npt.NDArray[np.float64] = model.decision_function(features[rows])
    return found


def repetition(
    seed: int, features: Features, rows: DevelopmentData, trials: int, size: int
) -> dict[str, float]:
    """The loss on new rows of what each search chose, and what it said of its choice."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows.training_labels))
    chosen_rows, new = order[:size], order[size:]
    cut = size * 8 // 10
    # A row's number stands for its sequence.
    numbers = np.zeros((len(order), 2), np.uint8)
    numbers[:, 0], numbers[:, 1] = np.arange(len(order)) // 256, np.arange(len(order)) % 256
    labels = rows.training_labels
    development = DevelopmentData(
        training_tokens=numbers[chosen_rows[:cut]],
        training_labels=labels[chosen_rows[:cut]],
        validation_tokens=numbers[chosen_rows[cut:]],
        validation_labels=labels[chosen_rows[cut:]],
    )
    configs = [
        (ALPHABETS[rng.integers(len(ALPHABETS))], int(rng.choice(WORD_LENGTHS)),
         float(rng.choice(PENALTIES)))
        for _ in range(trials)
    ]  # fmt: skip

    def at(tokens: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = tokens[:, 0].astype(np.int64) * 256 + tokens[:, 1]
        return found

    found: dict[str, float] = {}
    for name in ("fixed", "reshuffled"):
        values = []
        for trial, config in enumerate(configs):
            its = development if name == "fixed" else development.reshuffled(seed, trial)
            train, valid = at(its.training_tokens), at(its.validation_tokens)
            logits = logits_of(features.of(config), labels, train, valid, config[2])
            values.append(float(cross_entropy(labels[valid], logits).mean()))
        best = configs[int(np.argmin(values))]
        # Trained on all development rows, so that both choices have the same.
        logits = logits_of(features.of(best), labels, chosen_rows, new, best[2])
        found[name] = float(cross_entropy(labels[new], logits).mean())
        found[f"{name}, said"] = min(values)
    return found


def summary(results: list[dict[str, float]]) -> dict[str, Any]:
    """Means, and the paired difference with its 95 % interval (normal)."""
    values = {key: np.array([one[key] for one in results]) for key in results[0]}
    gain = values["fixed"] - values["reshuffled"]
    half = 1.96 * gain.std(ddof=1) / len(gain) ** 0.5
    return {key: round(float(value.mean()), 4) for key, value in values.items()} | {
        "gain": round(float(gain.mean()), 4),
        "gain_ci95": [round(float(gain.mean() - half), 4), round(float(gain.mean() + half), 4)],
        "better": int((gain > 0).sum()),
        "worse": int((gain < 0).sum()),
        "repetitions": len(results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--repetitions", type=int, default=60)
    parser.add_argument("--sizes", type=int, nargs="*", default=[250, 1000])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    sequences, labels = synthetic_sequences()
    tokens = encode(sequences, 200)
    features = Features(decode_tokens(tokens))
    every = np.array(labels, np.uint8)
    rows = DevelopmentData(
        training_tokens=tokens, training_labels=every, validation_tokens=tokens[:0],
        validation_labels=every[:0],
    )  # fmt: skip
    document: dict[str, Any] = {"best_possible_loss": SYNTHETIC_BEST_LOSS, "sizes": {}}
    for size in arguments.sizes:
        results = [
            repetition(seed, features, rows, arguments.trials, size)
            for seed in range(1, arguments.repetitions + 1)
        ]
        document["sizes"][size] = summary(results)
        print(size, json.dumps(document["sizes"][size]), flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
