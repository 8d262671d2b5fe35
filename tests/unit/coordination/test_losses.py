from __future__ import annotations

import pytest
from optuna.trial import TrialState

from tuner.coordination.losses import (
    FAILURES_IN_A_ROW,
    POISON_EARLY_LOSSES,
    POISON_LOSSES,
    Failures,
    Losses,
)
from tuner.errors import WorkerDiedEarlyError, WorkerLeftError, WorkerLostError
from tuner.search.attributes import EARLY_LOSSES_KEY, LOSSES_KEY

DIED, EARLY, LEFT = (
    kind("the worker is gone") for kind in (WorkerLostError, WorkerDiedEarlyError, WorkerLeftError)
)


@pytest.mark.parametrize(
    ("before", "lost", "progressed", "after"),
    [
        (Losses(), DIED, False, Losses(1, 0)),
        (Losses(), EARLY, False, Losses(0, 1)),
        (Losses(), LEFT, False, Losses()),
        (Losses(2, 3), DIED, False, Losses(3, 3)),
        (Losses(2, 3), EARLY, False, Losses(2, 4)),
        (Losses(2, 3), LEFT, True, Losses(2, 3)),
        (Losses(4, 3), DIED, True, Losses(1, 3)),
        (Losses(4, 24), EARLY, True, Losses(4, 1)),
    ],
)
def test_a_lost_worker_is_counted_by_its_kind(
    before: Losses, lost: WorkerLostError, progressed: bool, after: Losses
) -> None:
    assert before.after(lost, progressed=progressed) == after


@pytest.mark.parametrize(
    ("losses", "poison", "most"),
    [
        (Losses(), False, 0),
        (Losses(POISON_LOSSES - 1, POISON_EARLY_LOSSES - 1), False, POISON_EARLY_LOSSES - 1),
        (Losses(POISON_LOSSES, 0), True, POISON_LOSSES),
        (Losses(0, POISON_EARLY_LOSSES), True, POISON_EARLY_LOSSES),
    ],
)
def test_a_trial_ends_that_cost_too_many(losses: Losses, poison: bool, most: int) -> None:
    assert (losses.is_poison, losses.most) == (poison, most)


def test_the_counts_are_kept_as_attributes_of_the_trial() -> None:
    assert Losses().attributes() == {}
    assert Losses(2, 7).attributes() == {LOSSES_KEY: 2, EARLY_LOSSES_KEY: 7}
    for losses in (Losses(), Losses(2), Losses(0, 7), Losses(2, 7)):
        assert Losses.of(losses.attributes()) == losses


def test_failures_count_in_a_row_only() -> None:
    failures = Failures()
    for state in [TrialState.FAIL] * (FAILURES_IN_A_ROW - 1):
        failures = failures.after(state)
    assert not failures.are_too_many
    assert failures.after(TrialState.FAIL).are_too_many
    for state in (TrialState.COMPLETE, TrialState.PRUNED):
        assert failures.after(state) == Failures()
