"""What is to happen at most once in a while."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Every:
    """Says that something is due, at most once in a number of seconds.

    Not safe for threads: its owner's lock, or its owner's only thread, guards it.
    """

    def __init__(
        self,
        seconds: float,
        *,
        at_once: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins.

        Args:
            seconds: Between two times.
            at_once: Whether it is due at the start; else after the first pause.
            clock: Seconds that never go back.
        """
        self._seconds = seconds
        self._clock = clock
        self._due = -math.inf if at_once else clock() + seconds

    def is_due(self) -> bool:
        """Whether it is time; if so, the next pause begins."""
        if self._clock() < self._due:
            return False
        self.begin_pause()
        return True

    def begin_pause(self, at_least: float = 0.0) -> None:
        """Begins the pause now; one of `at_least` seconds where that is longer."""
        self._due = self._clock() + max(self._seconds, at_least)

    def end_pause(self) -> None:
        """Makes it due now."""
        self._due = -math.inf
