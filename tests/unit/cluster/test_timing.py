"""What a machine can do, measured by training."""

from __future__ import annotations

import os

import numpy as np
import pytest
from fakes import small_spec

from tuner.cluster import timing
from tuner.cluster.timing import TIMED_ROWS, measure
from tuner.errors import SetupError
from tuner.spec.bounds import sampled_configurations
from tuner.train import TrainingTime

NETWORKS = sampled_configurations(small_spec().space)[:1]


def measured(max_length: int) -> TrainingTime:
    rows = 10 * TIMED_ROWS
    return measure(NETWORKS, np.array([5, 9]), max_length=max_length, rows=rows, workers=1)


def test_networks_are_trained_and_timed_in_processes_of_their_own() -> None:
    before = dict(os.environ)
    found = measured(max_length=20)
    assert found.epoch_seconds > 0
    assert found.start_seconds > 0
    assert (found.networks, found.workers) == (1, 1)
    assert dict(os.environ) == before


@pytest.mark.parametrize("ending", [os.abort, "not a function"])
def test_a_process_that_cannot_train_is_told_in_words(
    ending: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_timed", ending)
    with pytest.raises(SetupError, match="The networks cannot be trained here"):
        measured(max_length=20)
