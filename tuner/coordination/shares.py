"""Turns of studies at the slots: max-min fair shares."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from tuner.coordination.roles import Workers
from tuner.train import Train


def max_min_shares(slots: int, wishes: Sequence[int]) -> list[int]:
    """Shares out slots so that nobody can have more without taking from one who has less.

    Args:
        slots: How many there are.
        wishes: How many each could use. What cannot be divided goes to the first ones.

    Returns:
        A share for each wish; together all slots, or all wishes.
    """
    shares = [0] * len(wishes)
    hungry = [index for index, wish in enumerate(wishes) if wish > 0]
    while slots > 0 and hungry:
        each = slots // len(hungry)
        if each == 0:
            for index in hungry[:slots]:
                shares[index] += 1
            break
        for index in hungry:
            more = min(each, wishes[index] - shares[index])
            shares[index] += more
            slots -= more
        hungry = [index for index in hungry if shares[index] < wishes[index]]
    return shares


class Driven(Protocol):
    """What a turn must know of its study: `Coordinator`."""

    @property
    def running(self) -> int: ...

    def unfinished(self) -> int: ...

    def wake(self) -> None: ...


class Turns:
    """The slots of one cluster, shared by the studies that are driven over it.

    Each gets its max-min share; a remainder goes to whoever has had the least time on the
    slots, so that it goes round, and long trials of one study do not keep short ones of another
    waiting for more than one of them. Nothing running is taken away: a share that shrank is
    reached as trials end, and no slot is given twice, so that no trial is asked for before a
    worker can take it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._turns: list[Turn] = []
        self._starts = itertools.count(1)
        self._clock = clock
        self._counted_at = clock()

    def join(self, workers: Workers) -> Turn:
        """A study's place among the others, from its first `slots()` to `leave()`."""
        turn = Turn(self, workers)
        with self._lock:
            self._count_time()
            # Who comes later has no claim on the time before.
            turn.had = min((one.had for one in self._turns), default=0.0)
            self._turns.append(turn)
        return turn

    def leave(self, turn: Turn) -> None:
        with self._lock:
            self._count_time()
            self._turns.remove(turn)
        self._wake_others(turn)

    def _grant(self, turn: Turn, study: Driven, total: int, wish: int) -> int:
        with self._lock:
            self._count_time()
            turn.study, turn.wish = study, wish
            queue = sorted(self._turns, key=lambda one: (one.had, one.last_start))
            shares = max_min_shares(total, [one.wish for one in queue])
            share = shares[queue.index(turn)]
            taken = sum(one.held() for one in self._turns if one is not turn)
            running = study.running
            turn.granted = max(0, min(share, total - taken))
            if turn.granted > running:
                turn.last_start = next(self._starts)
            before, turn.last_held = turn.last_held, turn.held()
            granted = turn.granted
        if turn.last_held < before:
            self._wake_others(turn)
        return granted

    def _count_time(self) -> None:
        now = self._clock()
        for turn in self._turns:
            turn.had += turn.last_held * (now - self._counted_at)
        self._counted_at = now

    def _give_back(self, turn: Turn) -> None:
        with self._lock:
            turn.wish = turn.granted = 0
        self._wake_others(turn)

    def _wake_others(self, turn: Turn) -> None:
        with self._lock:
            others = [one.study for one in self._turns if one is not turn]
        for study in others:
            if study is not None:
                study.wake()


class Turn:
    """One study's workers: the cluster's, as far as it is this study's turn."""

    def __init__(self, turns: Turns, workers: Workers) -> None:
        self._turns = turns
        self._workers = workers
        self._drives: Driven | None = None
        self.study: Driven | None = None  # once it has asked for slots
        self.wish = 0  # trials that it could run
        self.granted = 0  # as last answered
        self.last_start = 0  # its place in the order of starts; 0 for none yet
        self.last_held = 0  # slots, when last looked at
        self.had = 0.0  # slots times seconds

    def drives(self, study: Driven) -> None:
        """Says which study's turn this is."""
        self._drives = study

    def held(self) -> int:
        """Slots that nobody else may use."""
        running = 0 if self.study is None else self.study.running
        return max(self.granted, running)

    @property
    def train(self) -> Train:
        return self._workers.train

    def slots(self) -> int:
        """The study's share, as far as it is free by now."""
        study = self._drives
        if study is None:
            return 0
        wish = study.unfinished()  # may wait for the database: not under the lock of all
        return self._turns._grant(self, study, self._workers.slots(), wish)  # noqa: SLF001

    def has_fast_bfloat16(self) -> bool:
        return self._workers.has_fast_bfloat16()

    def pause(self) -> None:
        self._turns._give_back(self)  # noqa: SLF001
        self._workers.pause()

    def leave(self) -> None:
        self._turns.leave(self)
