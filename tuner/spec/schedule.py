"""Hyperband by arithmetic: rungs, brackets and whose turn it is."""

from __future__ import annotations

import functools


def rungs(min_epochs: int, max_epochs: int, eta: int) -> tuple[int, ...]:
    """The rungs of the bracket that stops soonest (arXiv:1603.06560, algorithm 1), rising.

    They are `max_epochs * eta**-k` with k = s_max .. 1, each rounded to the nearest whole epoch,
    halves up: for R = 100 and eta = 4 after 2 (1.56), 6 (6.25) and 25 epochs. None is below
    `min_epochs`, and none is `max_epochs`: a fully trained trial meets no rung at its end.
    """
    divisors = (eta**k for k in range(halvings(min_epochs, max_epochs, eta), 0, -1))
    return tuple((2 * max_epochs + divisor) // (2 * divisor) for divisor in divisors)


def rungs_counted_up(min_epochs: int, max_epochs: int, eta: int) -> tuple[int, ...]:
    """`min_epochs * eta**k` below `max_epochs`, the rungs of studies that recorded none.

    The same as `rungs` where `max_epochs / min_epochs` is a power of `eta`. Elsewhere there may
    be one more, which the bracket that should never stop has, too.
    """
    found: list[int] = []
    epochs = min_epochs
    while epochs < max_epochs:
        found.append(epochs)
        epochs *= eta
    return tuple(found)


def brackets(min_epochs: int, max_epochs: int, eta: int) -> tuple[tuple[int, ...], ...]:
    """The rungs of every bracket (arXiv:1603.06560, algorithm 1); the last has none.

    Each begins a rung later than the one before, and all end at `max_epochs`.
    """
    all_rungs = rungs(min_epochs, max_epochs, eta)
    return tuple(all_rungs[first:] for first in range(len(all_rungs) + 1))


def halvings(min_epochs: int, max_epochs: int, eta: int) -> int:
    """s_max of the paper, floor(log_eta(max_epochs / min_epochs)), counted in integers."""
    count = 0
    while min_epochs * eta ** (count + 1) <= max_epochs:
        count += 1
    return count


@functools.cache  # asked for every trial
def bracket_turns(min_epochs: int, max_epochs: int, eta: int) -> tuple[int, ...]:
    """The bracket of each trial of a round, that which stops soonest first.

    As in the paper (arXiv:1603.06560, algorithm 1) one follows when the one before has all its
    trials, of `count` brackets ceil(eta^s / (s + 1)) with s from count - 1 down to 0, so 7, 3, 2
    and 1 of four with eta 3. That is the paper's n for a budget B of R epochs a bracket; with
    B = count * R a round is `count` times as long, and many a study would end in its first bracket.
    """
    count = 1 + halvings(min_epochs, max_epochs, eta)
    return tuple(
        bracket
        for bracket, s in enumerate(reversed(range(count)))
        for _ in range(-(-(eta**s) // (s + 1)))
    )
