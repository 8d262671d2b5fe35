"""What a machine can do, measured by training."""

from __future__ import annotations

import os

import numpy as np
from fakes import small_spec

from tuner.cluster.timing import TIMED_ROWS, measure
from tuner.spec.bounds import sampled_configurations


def test_networks_are_trained_and_timed_in_processes_of_their_own() -> None:
    before = dict(os.environ)
    networks = sampled_configurations(small_spec().space)[:1]
    found = measure(networks, np.array([5, 9]), max_length=20, rows=10 * TIMED_ROWS, workers=1)
    assert found.epoch_seconds > 0
    assert found.start_seconds > 0
    assert (found.networks, found.workers) == (1, 1)
    assert dict(os.environ) == before
