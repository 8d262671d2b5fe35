"""Writes docs/benchmarks.md from benchmarks/results/*.json.

    .venv/bin/python benchmarks/render.py

tests/repository/test_house.py holds the page against the files, so no figure on it was typed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/benchmarks.md"

HEAD = """# Benchmarks

Made by `.venv/bin/python benchmarks/render.py` from `benchmarks/results/`. Each section names its \
command; what each claims is in [`benchmarks/README.md`](../benchmarks/README.md). Medians with \
the least and the greatest value in brackets. Coordination has a page of its own, \
[`coordination.md`](coordination.md), the dashboard's times stand in \
[`dashboard.md`](dashboard.md#how-fast), storm and scaling in [`experiments.md`](experiments.md).
"""

NETWORKS = {
    "a": "(a) chapter's baseline, batch 16",
    "b": "(b) 64 filters, 2 blocks, batch 64",
    "c": "(c) 128 filters, width 9, 3 blocks, batch 128",
}
WHO = {
    "tuner": "`tuner launch`",
    "plain": "plain script",
    "prefetch": "plain script, prefetching, 32 steps an execution",
    "median": "Optuna, TPE + MedianPruner, Keras",
    "hyperband": "Optuna, TPE + HyperbandPruner, Keras",
    "kerastuner": "KerasTuner Hyperband",
    "ray": "Ray Tune, ASHA + OptunaSearch",
}


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def measured(document: dict[str, Any]) -> str:
    """Command, machine, versions and date."""
    commands = {row["command"] for row in document.get("rows", ()) if "command" in row}
    commands = commands or {document["command"]}
    shown = ", ".join(f"`.venv/bin/python {command.strip()}`" for command in sorted(commands))
    parts = [shown, document["machine"]]
    if found := document.get("versions"):
        parts.append(", ".join(f"{name} {found[name]}" for name in ("tensorflow", "keras")))
    elif "tensorflow" in document:
        parts.append(f"tensorflow {document['tensorflow']}")
    return "; ".join([*parts, document["measured_at"][:10]]) + "."


def throughput(document: dict[str, Any]) -> str:
    rows, limits, defaults = [], [], []
    for case, name in NETWORKS.items():
        of_case = {
            (row["who"], row["processes"]): row for row in document["rows"] if row["case"] == case
        }
        if {("tuner", 2), ("plain", 1), ("prefetch", 1)} <= of_case.keys():
            ours = of_case["tuner", 2]["epochs_a_second"]
            times = [
                f"**{ours / of_case[who, 1]['epochs_a_second']:.1f}x**"
                for who in ("plain", "prefetch")
            ]
            defaults.append([name, f"{ours:.3f}", *times])
        for processes in (1, 2):
            found = {who: row for (who, count), row in of_case.items() if count == processes}
            if not found:
                continue
            ours = found["tuner"]["epochs_a_second"]
            cells = [
                f"{row['epochs_a_second']:.3f} ({row['spread'][0]:.3f}-{row['spread'][1]:.3f})"
                + ("" if who == "tuner" else f", **{ours / row['epochs_a_second']:.1f}x**")
                for who in ("tuner", "plain", "prefetch")
                if (row := found.get(who))
            ]
            rows.append([name, processes, *cells, *["-"] * (3 - len(cells))])
            if "share_of_the_peak" in found["tuner"]:
                row = found["tuner"]
                limits.append(
                    [
                        name,
                        row["precision"],
                        row["giga_multiply_adds_an_epoch"],
                        row["peak_giga_multiply_adds_a_second"],
                        f"{row['share_of_the_peak']:.0%}",
                    ]
                )
    head = ("network", "processes", *(f"{WHO[who]}, epochs a second" for who in list(WHO)[:3]))
    default = ("network", f"{WHO['tuner']}, epochs a second", WHO["plain"], WHO["prefetch"])
    limit = (
        "network",
        "precision",
        "giga multiply-adds an epoch",
        "peak a second, one thread",
        "share reached",
    )
    return f"""## Throughput

{measured(document)} Epochs a second, building the network included; the bold figure is how many \
times ours is as fast. A process of ours has one thread, so that one alone leaves a core idle; the \
scripts' processes use both.

{table(head, rows)}

The whole machine, each started as it is by default: `tuner launch` with a worker a core, the \
scripts in one process.

{table(default, defaults)}

The physical limit, one process with one thread: the multiply-adds of a plain implementation \
(three products a training step, one in validation) at the speed of a product of 2,048 x 2,048. \
The convolution over tokens needs fewer, so a share may hide some idle time.

{table(limit, limits)}
"""


def quality(document: dict[str, Any]) -> str:
    rows = []
    for case, name in NETWORKS.items():
        found = {row["who"]: row for row in document["rows"] if row["case"] == case}
        if found:
            ours = found["tuner"]["mean_best_validation_loss"]
            rows += [
                [
                    name,
                    WHO[who],
                    f"{row['mean_best_validation_loss']:.4f}",
                    ", ".join(f"{loss:.4f}" for loss in row["best_validation_losses"]),
                    "" if who == "tuner" else f"{ours - row['mean_best_validation_loss']:+.4f}",
                ]
                for who, row in found.items()
            ]
    head = ("network", "who", "mean best validation loss", "of the seeds", "ours above it")
    return f"""## The same quality

{measured(document)} Ten epochs without pruning.

{table(head, rows)}
"""


def time_to_quality(document: dict[str, Any]) -> str:
    def at(run: dict[str, Any], seconds: float) -> str:
        reached = [loss for when, loss in run["best_so_far"] if when <= seconds]
        return f"{reached[-1]:.4f}" if reached else "-"

    runs = sorted(document["runs"], key=lambda run: (run["seed"], list(WHO).index(run["who"])))
    ours = {run["seed"]: run["best_so_far"] for run in runs if run["who"] == "tuner"}

    def ours_had_it(run: dict[str, Any]) -> str:
        if run["who"] == "tuner":
            return ""
        last = run["best_so_far"][-1][1]
        reached = [when for when, loss in ours.get(run["seed"], []) if loss <= last]
        return f"{reached[0] / 60:.1f} min" if reached else "never"

    rows = [
        [
            run["seed"],
            WHO[run["who"]],
            run["patience"],
            run["trials"],
            run["epochs"],
            *(at(run, 60 * minutes) for minutes in (2, 4, 8, 15)),
            ours_had_it(run),
        ]
        for run in runs
    ]
    words = []
    for who, name in WHO.items():
        losses = [run["best_so_far"][-1][1] for run in runs if run["who"] == who]
        if losses:
            words.append(f"{name} {fmean(losses):.4f}")
    machines = "; ".join(sorted({run["machine"] for run in runs}))
    head = (
        "seed", "who", "patience", "trials", "epochs", "2 min", "4 min", "8 min", "15 min",
        "ours had it after",
    )  # fmt: skip
    return f"""## Time to quality

`.venv/bin/python benchmarks/time_to_quality.py`; {machines}. Best validation loss by the \
clock, and when ours had a loss as low as the other's last.

{table(head, rows)}

Mean over the seeds after 15 minutes: {", ".join(words)}.
"""


def layers(document: dict[str, Any]) -> str:
    rows = [
        [row["case"], row["keras_ms"], row["fast_ms"], f"{row['ratio']:.2f}x"]
        for row in document["rows"]
    ]
    return f"""## Layers

{measured(document)} Values and gradients of one layer, CPU milliseconds on one thread.

{table(("layer", "Keras", "ours", ""), rows)}
"""


def precision(document: dict[str, Any]) -> str:
    rule, groups = document["rule"], []
    bounds = [0, 32, 64, 96, 128, 1_000]
    for low, high in pairwise(bounds):
        gains = [
            row["gain"] for row in document["rows"] if low <= row["multiply_adds_a_value"] < high
        ]
        if gains:
            name = f"{low}-{high}" if high < 1_000 else f"{low} or more"
            spread = f"{median(gains):.2f} ({min(gains):.2f}-{max(gains):.2f})"
            groups.append([name, len(gains), spread])
    at = ", ".join(f"{threshold}: {share:.3f}" for threshold, share in rule["at"].items())
    return f"""## Precision

{measured(document)} Networks drawn from studies/solubility.toml: time of a training step in \
float32 over that in bfloat16.

{table(("multiply-adds a value", "networks", "gain of bfloat16"), groups)}

Time of all networks together, as a part of that in float32, if bfloat16 is used from this number \
of multiply-adds a value: {at}; all in bfloat16 {rule["all_in_bfloat16"]:.3f}, each in its better \
precision {rule["each_in_its_better_one"]:.3f}.
"""


def policies(document: dict[str, Any]) -> str:
    head = [key for key in document["rows"][0] if key.startswith("loss_after")]
    rows = []
    for row in document["rows"]:
        cells = [row["policy"], row["seeds"], row["epochs"]]
        for key in head:
            apart, error = row[key.replace("loss_after", "above_default")]
            cells.append(f"{row[key]:.4f} ({apart:+.4f} ± {error:.4f})")
        rows.append(cells)
    names = [key.replace("_", " ") for key in head]
    longest = names[-1].split()[2]
    stop_head = ("patience", "min_delta", "epochs saved", "loss given away", "at most")
    stops = [
        [
            row["patience"],
            row["min_delta"],
            f"{row['part_of_epochs_saved'][0]:.0%}",
            "{:.4f} ± {:.4f}".format(*row["loss_given_away"]),
            f"{row['most_given_away']:.4f}",
        ]
        for row in document["stop_rule"]
    ]
    return f"""## Search policies

`.venv/bin/python {document["command"]}`; {document["curves"]} recorded curves, \
{document["measured_at"][:10]}. Mean over the seeds; in brackets the difference from the default \
with its standard error, seed by seed. The best of all curves is \
{document["best_of_all_curves"]:.4f}.

{table(["policy", "seeds", "epochs", *names], rows)}

The stop rule in the studies of the default policy, in {longest} minutes: the part of the epochs \
that it saves, and how much lower the best loss becomes without it.

{table(stop_head, stops)}
"""


def memory(document: dict[str, Any]) -> str:
    first, second, third = document["mean_mb_by_thirds"]
    slope = document["mb_a_trial_after_the_first_third"]
    return f"""## Memory of a worker

{measured(document)} Resident memory of the training process: {first:.0f} MB on average in the \
first third of the trials, {second:.0f} MB in the second, {third:.0f} MB in the last, \
{document["most_mb"]:.0f} MB at most; {slope:+.3f} MB a trial after the first third.
"""


def startup(document: dict[str, Any]) -> str:
    rows = [
        [row["what"], f"{row['seconds']:.2f} ({row['spread'][0]:.2f}-{row['spread'][1]:.2f})"]
        for row in document["rows"]
    ]
    return f"""## Start-up

{measured(document)}

{table(("command", "seconds"), rows)}
"""


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "throughput": throughput,
    "throughput-quality": quality,
    "time_to_quality": time_to_quality,
    "policies": policies,
    "startup": startup,
    "memory": memory,
    "precision": precision,
    "layers": layers,
}


def page() -> str:
    parts = [HEAD]
    for name, section in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            parts.append(section(json.loads(file.read_text())))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
