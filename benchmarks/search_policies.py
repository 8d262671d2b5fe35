"""Replays search policies on recorded learning curves, in seconds of simulated time.

    .venv/bin/python benchmarks/search_policies.py     # 20 minutes, no training

benchmarks/results/learning_curves.json has real trials that were trained to the end
(learning_curves.py). Here simulated workers train them again: an epoch takes as long as it took,
the rungs are decided by the product's own pruner, and a trial ends as `Objective` ends it. What is
compared is the best validation loss of the fully trained trials after so many simulated minutes of
two workers, and the epochs that were spent.

A random search draws the recorded networks in random order, and once more when it had them all.
TPE's suggestion is replaced by the nearest recorded network that was not trained yet, and so is a
known configuration. So a table of a few hundred rows shows much of what a pruner does and less of
what a sampler does.

Of the stop rule ([stop] in a study file) is told what it would have cost in studies of the default
policy that ran for the longest of the times: the epochs that it saves, and how much better the best
loss would have become without it.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from learning_curves import MAX_EPOCHS, SOLUBILITY, TABLE, study_document
from optuna.samplers import TPESampler
from optuna.trial import TrialState

from tuner.search.hyperband import make_pruner
from tuner.search.sampler import TPE_SETTINGS, PerTrialSampler, make_sampler
from tuner.search.stop_rule import StopRule, in_order_of_end
from tuner.search.tuned_study import FINISHED
from tuner.spec.reader import load_spec, spec_from_document
from tuner.spec.spec import StopSettings, StudySpec

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2
MORE_SEEDS = 4  # times as many of random draws, which take a tenth of the time


@dataclass(frozen=True)
class Row:
    """A recorded trial."""

    params: dict[str, Any]
    losses: list[float]
    seconds: float  # an epoch


@dataclass(frozen=True)
class Policy:
    name: str
    min_epochs: int | None = 1  # None: no Hyperband
    eta: int = 3
    patience: int | None = 8
    sampler: str = "random"
    tpe: dict[str, Any] | None = None  # other settings of TPE than the product's
    pruner: Callable[[], optuna.pruners.BasePruner] | None = None  # in place of Hyperband
    every_epoch: bool = False  # is it asked after each one, not at rungs alone
    last_loss: bool = False  # is it told the epoch's loss, not the best so far
    known: bool = False  # begins with the known configuration of studies/solubility.toml

    def spec(self, seed: int) -> StudySpec:
        document = study_document(1, seed)
        document["sampler"] = {"kind": self.sampler}
        if self.known:
            document["known"] = load_spec(SOLUBILITY).to_document()["known"]
        document["training"]["patience"] = self.patience or "none"
        if self.min_epochs is not None:
            document["hyperband"] = {"min_epochs": self.min_epochs, "eta": self.eta}
        return spec_from_document(document)

    def make_sampler(self, spec: StudySpec) -> optuna.samplers.BaseSampler:
        if self.tpe is None:
            return make_sampler(spec)
        settings = TPE_SETTINGS | self.tpe
        return PerTrialSampler(lambda seed: TPESampler(**settings, seed=seed), spec.seed)


DEFAULT = "hyperband 1, eta 3, patience 8"
WITH_TPE = f"TPE, {DEFAULT}"


def optunas_hyperband() -> optuna.pruners.BasePruner:
    """A trial's bracket is drawn by a hash of the study's name and the trial's number."""
    return optuna.pruners.HyperbandPruner(
        min_resource=1, max_resource=MAX_EPOCHS, reduction_factor=3
    )


PLAIN: dict[str, Any] = {
    "sampler": "tpe",
    "tpe": {"constant_liar": False},
    "every_epoch": True,
    "last_loss": True,
}
POLICIES = (
    Policy("no pruning, patience 8", min_epochs=None),
    Policy("no pruning, no patience", min_epochs=None, patience=None),
    Policy(DEFAULT),
    Policy(f"{DEFAULT}, Optuna's brackets", pruner=optunas_hyperband),
    Policy("hyperband 1, eta 2, patience 8", eta=2),
    Policy("hyperband 1, eta 4, patience 8", eta=4),
    Policy("hyperband 2, eta 3, patience 8", min_epochs=2),
    Policy("hyperband 3, eta 3, patience 8", min_epochs=3),
    Policy("hyperband 1, eta 3, patience 3", patience=3),
    Policy("hyperband 1, eta 3, patience 5", patience=5),
    Policy("hyperband 1, eta 3, patience 12", patience=12),
    Policy("hyperband 1, eta 3, no patience", patience=None),
    Policy(f"{DEFAULT}, known configuration first", known=True),
    Policy(
        "successive halving 1, eta 3, patience 8",
        pruner=lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
    ),
    Policy(
        "successive halving 1, eta 4, patience 8",
        eta=4,
        pruner=lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=4),
        every_epoch=True,  # its rungs, 1, 4 and 16, are not Hyperband's of 27 epochs
    ),
    Policy("median, patience 8", pruner=optuna.pruners.MedianPruner, every_epoch=True),
    Policy("TPE, no pruning, patience 8", min_epochs=None, sampler="tpe"),
    Policy(WITH_TPE, sampler="tpe"),
    Policy(f"{WITH_TPE}, Optuna's brackets", sampler="tpe", pruner=optunas_hyperband),
    Policy("TPE, hyperband 1, eta 3, patience 5", patience=5, sampler="tpe"),
    Policy("TPE, hyperband 2, eta 3, patience 8", min_epochs=2, sampler="tpe"),
    Policy("TPE, hyperband 3, eta 3, patience 8", min_epochs=3, sampler="tpe"),
    Policy(f"{WITH_TPE}, 5 random trials first", sampler="tpe", tpe={"n_startup_trials": 5}),
    Policy(f"{WITH_TPE}, 20 random trials first", sampler="tpe", tpe={"n_startup_trials": 20}),
    Policy(f"{WITH_TPE}, 100 candidates", sampler="tpe", tpe={"n_ei_candidates": 100}),
    Policy(f"{WITH_TPE}, no constant liar", sampler="tpe", tpe={"constant_liar": False}),
    Policy(f"{WITH_TPE}, known configuration first", sampler="tpe", known=True),
    # The searches of time_to_quality.py, with our epochs.
    Policy("plain Optuna: TPE, median, patience 8", pruner=optuna.pruners.MedianPruner, **PLAIN),
    Policy("plain Optuna: TPE, hyperband, patience 8", pruner=optunas_hyperband, **PLAIN),
)


class Replay:
    """One study on simulated workers."""

    def __init__(self, rows: list[Row], policy: Policy, seed: int) -> None:
        self._rows = rows
        self._policy = policy
        self._spec = policy.spec(seed)
        self._shuffling = np.random.default_rng(seed)
        self._order: list[int] = []
        self._distance = _distances(rows)
        self._known = list(self._spec.known)
        pruner = policy.pruner() if policy.pruner else make_pruner(self._spec)
        self._study = optuna.create_study(
            study_name=f"replay {seed}", sampler=policy.make_sampler(self._spec), pruner=pruner
        )
        self.epochs = 0
        self.found: list[tuple[float, float]] = []  # (seconds, the best loss from then on)

    def run(self, seconds: float) -> None:
        clock: list[tuple[float, int, Any, Row, int]] = []
        for worker in range(WORKERS):
            self._start(clock, 0.0, worker)
        while clock:
            now, worker, trial, row, epoch = heapq.heappop(clock)
            if now > seconds:
                return
            self.epochs += 1
            if self._goes_on(trial, row, epoch, now):
                heapq.heappush(clock, (now + row.seconds, worker, trial, row, epoch + 1))
            else:
                self._start(clock, now, worker)

    def _start(self, clock: list[Any], now: float, worker: int) -> None:
        if not self._order:
            self._order = self._shuffling.permutation(len(self._rows)).tolist()
        row = self._rows[self._next()]
        self._study.enqueue_trial(row.params)
        trial = self._study.ask()
        self._spec.space.suggest(trial)
        heapq.heappush(clock, (now + row.seconds, worker, trial, row, 1))

    def _next(self) -> int:
        if self._known:
            wanted = dict(self._known.pop(0))
        elif self._policy.sampler == "random":
            return self._order.pop()
        else:
            # Asked for in a trial of its own, which fails: samplers do not look at such.
            asked = self._study.ask()
            self._spec.space.suggest(asked)
            self._study.tell(asked, state=TrialState.FAIL)
            wanted = asked.params
        nearest = min(self._order, key=lambda index: self._distance(wanted, index))
        self._order.remove(nearest)
        return nearest

    def _goes_on(self, trial: optuna.Trial, row: Row, epoch: int, now: float) -> bool:
        """Reports an epoch; ends the trial where the product would."""
        losses = row.losses[:epoch]
        best = min(losses)
        trial.report(losses[-1] if self._policy.last_loss else best, step=epoch)
        waited = epoch - (losses.index(best) + 1)
        patience = self._policy.patience
        if epoch == MAX_EPOCHS or (patience is not None and waited >= patience):
            self._study.tell(trial, best)
            if not self.found or best < self.found[-1][1]:
                self.found.append((now, best))
            return False
        if (self._policy.every_epoch or epoch in self._spec.rungs) and trial.should_prune():
            self._study.tell(trial, state=TrialState.PRUNED)
            return False
        return True

    def stopped(self, settings: StopSettings) -> tuple[float, float]:
        """The part of the epochs that the stop rule would have saved, and what it would cost."""
        rule, epochs = StopRule(settings, ()), 0
        best = math.inf
        for trial in in_order_of_end(self._study.get_trials(states=FINISHED)):
            rule.ended(trial)
            epochs += trial.last_step or 0
            if trial.state == TrialState.COMPLETE:
                best = min(best, trial.value or math.inf)
            if rule.ends_the_study:
                return 1 - epochs / self.epochs, best - self.found[-1][1]
        return 0.0, 0.0

    def best_after(self, seconds: float) -> float:
        return min((loss for when, loss in self.found if when <= seconds), default=math.log(2))


def _distances(rows: list[Row]) -> Callable[[dict[str, Any], int], float]:
    """How far a configuration is from a recorded one: the mean over all that either has."""
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for row in rows:
        for name, value in row.params.items():
            if not isinstance(value, str):
                scaled = math.log(value) if value > 0 else 0.0
                low[name] = min(low.get(name, scaled), scaled)
                high[name] = max(high.get(name, scaled), scaled)

    def apart(name: str, one: Any, other: Any) -> float:
        if one is None or other is None or isinstance(one, str):
            return float(one != other)
        width = high.get(name, 0.0) - low.get(name, 0.0)
        scaled = [math.log(value) if value > 0 else 0.0 for value in (one, other)]
        return min(1.0, abs(scaled[0] - scaled[1]) / width) if width else 0.0

    def distance(params: dict[str, Any], index: int) -> float:
        recorded = rows[index].params
        names = params.keys() | recorded.keys()
        return sum(apart(n, params.get(n), recorded.get(n)) for n in names) / len(names)

    return distance


STOPS = [
    StopSettings(patience=patience, min_delta=delta)
    for delta in (0.0, 0.001)
    for patience in (20, 40, 60, 100)
]


def replayed(rows: list[Row], number: int, seed: int, minutes: list[float]) -> dict[str, Any]:
    """What is kept of one replay of `POLICIES[number]`."""
    policy = POLICIES[number]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    replay = Replay(rows, policy, seed)
    replay.run(60 * max(minutes))
    return {
        "epochs": replay.epochs,
        "best": {end: replay.best_after(60 * end) for end in minutes},
        "stops": [replay.stopped(one) for one in STOPS] if policy.name == DEFAULT else [],
    }


def mean_and_error(values: list[float]) -> list[float]:
    """With the standard error of the mean."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return [round(statistics.mean(values), 4), round(error, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=30, help="of a policy with TPE")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5.0, 10.0, 20.0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/policies.json")
    options = parser.parse_args()
    table = json.loads(TABLE.read_text())
    rows = [
        Row(row["params"], row["validation_losses"], row["seconds_an_epoch"])
        for row in table["rows"]
    ]
    seeds = [options.seeds * (MORE_SEEDS if one.sampler == "random" else 1) for one in POLICIES]
    asked = [
        (rows, number, seed, options.minutes)
        for number in range(len(POLICIES))
        for seed in range(seeds[number])
    ]
    with multiprocessing.Pool() as pool:
        all_found = iter(pool.starmap(replayed, asked, chunksize=1))
    of_policy = {
        policy.name: list(itertools.islice(all_found, count))
        for policy, count in zip(POLICIES, seeds, strict=True)
    }
    lines = []
    for name, found in of_policy.items():
        line: dict[str, Any] = {"policy": name, "seeds": len(found)}
        line["epochs"] = round(statistics.mean(one["epochs"] for one in found), 1)
        for end in options.minutes:
            line[f"loss_after_{end:g}_min"] = round(
                statistics.mean(one["best"][end] for one in found), 4
            )
            # The same seeds: the difference of each pair.
            pairs = zip(found, of_policy[DEFAULT][: len(found)], strict=True)
            line[f"above_default_{end:g}_min"] = mean_and_error(
                [one["best"][end] - default["best"][end] for one, default in pairs]
            )
        lines.append(line)
        print(json.dumps(line), flush=True)
    stops = []
    for number, settings in enumerate(STOPS):
        saved, lost = zip(*(one["stops"][number] for one in of_policy[DEFAULT]), strict=True)
        stops.append(
            settings.model_dump()
            | {
                "part_of_epochs_saved": mean_and_error(list(saved)),
                "loss_given_away": mean_and_error(list(lost)),
                "most_given_away": round(max(lost), 4),
            }
        )
        print(json.dumps(stops[-1]), flush=True)
    document = {
        "command": f"benchmarks/search_policies.py --seeds {options.seeds}",
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "curves": len(rows),
        "best_of_all_curves": min(min(row.losses) for row in rows),
        "seconds_an_epoch": round(statistics.median(row.seconds for row in rows), 2),
        "rows": lines,
        "stop_rule": stops,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
