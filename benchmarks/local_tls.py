"""What the certificates of a local cluster cost: the same work with and without them, by turns.

    .venv/bin/python benchmarks/local_tls.py               # 2 minutes

Start: until two worker processes offer a slot. A call: a function that does nothing, on a worker,
from submission to its result. A trial: 27 epochs that cost nothing, with every message that a
training sends, its checkpoint of 1 MB among them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import optuna  # noqa: E402
from distributed import SpecCluster  # noqa: E402
from fakes import FakeRun, make_study, small_job, small_spec  # noqa: E402

from tuner.cluster.connection import local_connection  # noqa: E402
from tuner.cluster.messages import TrainingTask  # noqa: E402
from tuner.cluster.trainings import Cluster  # noqa: E402
from tuner.coordination.study_trainings import StudyTrainings  # noqa: E402

_CHECKPOINT_BYTES = 1 << 20


class HeavyRun(FakeRun):
    """Trains nothing; its checkpoints have the size of a real network's."""

    def checkpoint(self) -> bytes:
        return super().checkpoint() + b" " * _CHECKPOINT_BYTES


def open_heavy(task: TrainingTask) -> HeavyRun:
    return HeavyRun(task)


@contextlib.contextmanager
def without_certificates() -> Iterator[None]:
    """Dask as it is by default."""

    def plain(*, scheduler: dict[str, Any], workers: dict[int, Any], **_: Any) -> SpecCluster:
        for one in (scheduler, *workers.values()):
            one["options"] |= {"protocol": "tcp://", "security": None}
        return SpecCluster(scheduler=scheduler, workers=workers)

    with mock.patch("tuner.cluster.connection.SpecCluster", plain):
        yield


def measure(folder: Path, *, calls: int, trials: int) -> dict[str, float]:
    began = time.monotonic()
    with local_connection(2, say=print) as connection:
        connection.require_workers()
        while connection.slots() < 2:
            time.sleep(0.01)
        taken = {"start, s": time.monotonic() - began}
        client = connection.client
        client.submit(abs, -1, pure=False).result()
        began = time.monotonic()
        for number in range(calls):
            client.submit(abs, -number, pure=False).result()
        taken["a call, ms"] = (time.monotonic() - began) * 1000 / calls
        tuned = make_study(folder, small_spec(training={"max_epochs": 27}))
        with Cluster(
            connection,
            StudyTrainings(tuned),
            development_file=Path("none"),
            threads=1,
            open_run=open_heavy,
        ) as cluster:
            began = time.monotonic()
            for number in range(trials):
                list(cluster.train(small_job(tuned.record.spec, trial=number)))
            taken["a trial, ms"] = (time.monotonic() - began) * 1000 / trials
        tuned.storage.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--trials", type=int, default=20)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as name:
        for repeat in range(options.repeats):
            work = {"calls": options.calls, "trials": options.trials}
            with without_certificates():
                plain = measure(Path(name) / f"plain{repeat}", **work)
            rounds.append((plain, measure(Path(name) / f"tls{repeat}", **work)))
    for what in rounds[0][0]:
        plain_ones, tls_ones = ([one[side][what] for one in rounds] for side in (0, 1))
        ratios = (tls / plain for plain, tls in zip(plain_ones, tls_ones, strict=True))
        row = {
            "what": what,
            "without": round(statistics.median(plain_ones), 2),
            "with certificates": round(statistics.median(tls_ones), 2),
            "ratio": round(statistics.median(ratios), 3),
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
