"""What a Markdown note on every trial would cost Optuna's dashboard, beside an attribute on each.

    .venv/bin/python benchmarks/trial_notes.py

Optuna keeps the notes of all trials with their study, and its dashboard looks through all of them
for each trial that it serializes: the time of a first look at a study grows with the square.
Writes benchmarks/results/trial_notes.json.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from machine import processor
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, create_trial
from optuna_dashboard._serializer import serialize_frozen_trial

RESULTS = Path(__file__).resolve().parent / "results" / "trial_notes.json"
NOTE = "Pruned at the rung after epoch 3 of 9. " * 12
MOST_TRIALS_TIMED = 300  # of each study; the rest takes as long for each


def trials_of(count: int, **attributes: str) -> list[FrozenTrial]:
    distributions = {f"p{number}": FloatDistribution(0, 1) for number in range(10)}
    trials = []
    for number in range(count):
        trial = create_trial(
            value=1.0,
            params=dict.fromkeys(distributions, 0.5),
            distributions=distributions,
            intermediate_values=dict.fromkeys(range(9), 0.5),
            user_attrs=attributes,
        )
        trial.number, trial._trial_id = number, number + 1
        trials.append(trial)
    return trials


def seconds(trials: list[FrozenTrial], on_study: dict[str, object]) -> float:
    timed = trials[:MOST_TRIALS_TIMED]
    began = time.perf_counter()
    for trial in timed:
        serialize_frozen_trial(1, trial, on_study)
    return (time.perf_counter() - began) * len(trials) / len(timed)


def main() -> None:
    found = {}
    print("trials   no note, s   attribute, s   Markdown note, s")
    for count in (100, 2_000, 10_000):
        on_study: dict[str, object] = {}
        for trial_id in range(1, count + 1):
            on_study[f"dashboard:{trial_id}:note_ver"] = 1
            on_study[f"dashboard:{trial_id}:note_str:0"] = NOTE
        plain, noted = trials_of(count), trials_of(count, note=NOTE)
        cells = (seconds(plain, {}), seconds(noted, {}), seconds(plain, on_study))
        print(f"{count:6}   {cells[0]:10.2f}   {cells[1]:12.2f}   {cells[2]:16.2f}")
        names = ("no note", "attribute", "Markdown note")
        found[str(count)] = dict(zip(names, (round(cell, 3) for cell in cells), strict=True))
    document = {
        "machine": processor(),
        "load": round(os.getloadavg()[0], 1),
        "unit": "seconds to serialize all trials",
        "trials": found,
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
