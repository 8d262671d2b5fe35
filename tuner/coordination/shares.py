"""Max-min fair shares of a cluster's slots, one for each study.

Why: `docs/decisions.md#how-does-the-service-share-workers-among-studies`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from tuner.coordination.roles import Workers
from tuner.train import Train


def max_min_shares(slots: int, wishes: Sequence[int]) -> list[int]:
    """Shares out slots so that no share can be larger without making a smaller one smaller.

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


class SlotUser(Protocol):
    """What a share must know of the study that uses it: `Coordinator`."""

    @property
    def running(self) -> int: ...

    def unfinished(self) -> int: ...

    def wake(self) -> None: ...


class FairShares:
    """The slots of one cluster, shared by the studies that are driven over it.

    Each gets its max-min share; a remainder goes to whoever has had the least time on the
    slots, so that it goes round, and long trials of one study do not keep short ones of another
    waiting for more than one of them. Nothing running is taken away: a share that shrank is
    reached as trials end, and no slot is given twice, so that no trial is asked for before a
    worker can take it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._shares: list[Share] = []
        self._clock = clock
        self._counted_at = clock()  # until then the slot seconds of all are counted

    def join(self, workers: Workers) -> Share:
        """A study's share, from its first `slots()` to `leave()`."""
        share = Share(self, workers)
        with self._lock:
            self._count_time()
            # Who comes later has no claim on the time before.
            share.slot_seconds = min((one.slot_seconds for one in self._shares), default=0.0)
            self._shares.append(share)
        return share

    def leave(self, share: Share) -> None:
        with self._lock:
            self._count_time()
            self._shares.remove(share)
        self._wake_others(share)

    def grant(self, share: Share, slots: int, wish: int) -> int:
        """How many of the cluster's slots a study may use now.

        Args:
            share: The study's.
            slots: How many the cluster has.
            wish: How many trials the study could run.
        """
        with self._lock:
            self._count_time()
            share.wish = wish
            queue = sorted(self._shares, key=lambda one: one.slot_seconds)
            shares = max_min_shares(slots, [one.wish for one in queue])
            taken = sum(one.held() for one in self._shares if one is not share)
            share.granted = max(0, min(shares[queue.index(share)], slots - taken))
            before, share.last_held = share.last_held, share.held()
            granted = share.granted
        if share.last_held < before:
            self._wake_others(share)
        return granted

    def give_back(self, share: Share) -> None:
        """A study starts no more trials."""
        with self._lock:
            share.wish = share.granted = 0
        self._wake_others(share)

    def _count_time(self) -> None:
        now = self._clock()
        for share in self._shares:
            share.slot_seconds += share.last_held * (now - self._counted_at)
        self._counted_at = now

    def _wake_others(self, share: Share) -> None:
        with self._lock:
            others = [one.user for one in self._shares if one is not share]
        for user in others:
            if user is not None:
                user.wake()


class Share:
    """One study's workers: the cluster's, as far as its share of the slots goes."""

    def __init__(self, shares: FairShares, workers: Workers) -> None:
        self._shares = shares
        self._workers = workers
        self.user: SlotUser | None = None  # once it is known
        self.wish = 0  # trials that it could run
        self.granted = 0  # slots, as last answered
        self.last_held = 0  # slots, when last looked at
        self.slot_seconds = 0.0  # slots held, times seconds

    def used_by(self, study: SlotUser) -> None:
        """Says whose share this is."""
        self.user = study

    def held(self) -> int:
        """Slots that no other study may use."""
        return max(self.granted, 0 if self.user is None else self.user.running)

    @property
    def train(self) -> Train:
        return self._workers.train

    def slots(self) -> int:
        """The study's share, as far as it is free by now."""
        if self.user is None:
            return 0
        wish = self.user.unfinished()  # may wait for the database: not under the lock of all
        return self._shares.grant(self, self._workers.slots(), wish)

    def has_fast_bfloat16(self) -> bool:
        return self._workers.has_fast_bfloat16()

    def pause(self) -> None:
        self._shares.give_back(self)
        self._workers.pause()

    def leave(self) -> None:
        self._shares.leave(self)
