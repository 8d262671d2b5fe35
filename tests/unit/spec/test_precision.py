"""What precision "auto" means: decided once a study by its workers, then by each network."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import FakeWorkers, Notes, make_study, small_spec

from tuner.cluster import connection, processes
from tuner.coordination.coordinator import Coordinator
from tuner.results.export import config_of_trial
from tuner.search.attributes import BFLOAT16_FROM_KEY
from tuner.search.tuned_study import TunedStudy
from tuner.spec.precision import BFLOAT16_FROM, multiply_adds_a_value

#: One block that is far below the threshold, or far above it.
SPACE = {
    "embedding_dim": 64,
    "blocks": 1,
    "kernel_size": {"choices": [1, 11]},
    "filters": 64,
    "learning_rate": 1e-3,
}


def study(folder: Path, precision: str = "auto") -> TunedStudy:
    training = {"max_epochs": 9, "precision": precision}
    return make_study(folder, small_spec(trials=8, space=SPACE, training=training))


def workers(*, fast: bool) -> FakeWorkers:
    made = FakeWorkers()
    made.fast_bfloat16 = fast
    return made


def precisions(tuned: TunedStudy) -> dict[int, str]:
    """Of the networks of each kernel size."""
    space = tuned.record.spec.space
    return {
        size: tuned.precision_of(space.resolve({"block1.kernel_size": size})) for size in (1, 11)
    }


def test_multiply_adds_are_counted_for_each_value_between_layers() -> None:
    space = {
        "embedding_dim": 8,
        "blocks": 1,
        "kernel_size": 3,
        "filters": 4,
        "normalization": "batch",
        "pool_size": 2,
        "head": "global_max",
        "dense_layers": 1,
        "units": 2,
        "learning_rate": 1e-3,
    }
    config = small_spec(space=space).space.resolve({})
    convolution, dense, logit = 10 * (3 * 8 + 1) * 4, (4 + 1) * 2, 2 + 1
    embedded, convolved, normalised, pooled = 10 * 8, 10 * 4, 10 * 4, 5 * 4
    values = embedded + convolved + normalised + pooled + 4 + 2 + 1
    found = multiply_adds_a_value(config, 10)
    assert found == pytest.approx((convolution + dense + logit) / values)


def test_workers_that_are_fast_in_bfloat16_compute_the_large_networks_in_it(
    tmp_path: Path,
) -> None:
    tuned = study(tmp_path)
    Coordinator(tuned, workers(fast=True), Notes()).run()
    assert tuned.study.user_attrs[BFLOAT16_FROM_KEY] == BFLOAT16_FROM
    assert precisions(tuned) == {1: "float32", 11: "bfloat16"}
    for trial in tuned.trials():
        wanted = precisions(tuned)[trial.params["block1.kernel_size"]]
        assert trial.user_attrs["precision"] == wanted
        exported = config_of_trial(tuned, trial.number)
        assert exported.document["training"]["precision"] == wanted
        assert exported.provenance["precision"] == wanted
    tuned.storage.close()


def test_other_workers_compute_everything_in_float32(tmp_path: Path) -> None:
    tuned = study(tmp_path)
    Coordinator(tuned, workers(fast=False), Notes()).run()
    assert tuned.study.user_attrs[BFLOAT16_FROM_KEY] is None
    assert precisions(tuned) == {1: "float32", 11: "float32"}
    tuned.storage.close()


@pytest.mark.parametrize("fast", [True, False])
def test_what_was_decided_stays_on_other_workers_and_with_another_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    tuned = study(tmp_path)
    first = Coordinator(tuned, workers(fast=fast), Notes())
    first.stop("interrupted")
    first.run()
    assert BFLOAT16_FROM_KEY not in tuned.study.user_attrs  # nothing was trained, nothing decided
    tuned.decide_precision(fast_bfloat16=fast)
    decided = precisions(tuned)
    monkeypatch.setattr("tuner.search.tuned_study.BFLOAT16_FROM", 1e9)
    Coordinator(tuned, workers(fast=not fast), Notes()).run()
    assert precisions(tuned) == decided
    assert tuned.study.user_attrs[BFLOAT16_FROM_KEY] == (BFLOAT16_FROM if fast else None)
    tuned.storage.close()


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_a_precision_that_was_asked_for_is_taken_everywhere(tmp_path: Path, asked: str) -> None:
    tuned = study(tmp_path, asked)
    Coordinator(tuned, workers(fast=True), Notes()).run()
    assert BFLOAT16_FROM_KEY not in tuned.study.user_attrs
    assert set(precisions(tuned).values()) == {asked}
    tuned.storage.close()


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 sse2", True),
        ("flags\t\t: amx_bf16 amx_tile", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("vmx flags\t: avx512_bf16", False),
        ("", False),
        (None, False),
    ],
)
def test_the_processor_tells_whether_it_multiplies_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str | None, fast: bool
) -> None:
    described = tmp_path / "cpuinfo"
    if flags is not None:
        described.write_text(f"processor\t: 0\n{flags}\nbogomips\t: 4\n")
    monkeypatch.setattr(processes, "_PROCESSOR", described)
    processes.has_fast_bfloat16.cache_clear()
    try:
        assert processes.has_fast_bfloat16() is fast
        offered = {"slot": 1, "bfloat16": 1} if fast else {"slot": 1}
        assert processes.training_resources() == offered
        assert processes.training_resources(has_gpu=True) == {"slot": 1}
    finally:
        processes.has_fast_bfloat16.cache_clear()


@dataclass
class Scheduler:
    """As much of Dask's as a look at it needs."""

    workers: dict[int, SimpleNamespace] = field(default_factory=dict)

    def with_worker(self, status: str = "running", **resources: int) -> Scheduler:
        described = SimpleNamespace(status=SimpleNamespace(name=status), resources=resources)
        self.workers[len(self.workers)] = described
        return self


@pytest.mark.parametrize(
    ("scheduler", "seen"),
    [
        (Scheduler().with_worker(slot=1, bfloat16=1).with_worker(slot=2, bfloat16=1), (3, True)),
        (Scheduler().with_worker(slot=1, bfloat16=1).with_worker(slot=1), (2, False)),
        # Who trains nothing, or leaves, has no say.
        (Scheduler().with_worker(slot=1, bfloat16=1).with_worker(), (1, True)),
        (Scheduler().with_worker(slot=1, bfloat16=1).with_worker("closing", slot=1), (1, True)),
    ],
)
def test_all_workers_must_be_fast(scheduler: Scheduler, seen: tuple[int, bool]) -> None:
    assert connection._glance()((), scheduler) == seen
