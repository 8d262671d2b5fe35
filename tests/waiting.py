"""The one way in which a test waits for what happens elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Process(Protocol):
    """A process that may end."""

    def poll(self) -> int | None: ...


def wait_until(
    condition: Callable[[], T],
    otherwise: Callable[[], object] | str = "it did not happen",
    *,
    seconds: float = 60.0,
    pause: float = 0.05,
    alive: Sequence[Process | Any] = (),
) -> T:
    """The first true value of a condition that is asked again and again.

    Args:
        condition: What is awaited.
        otherwise: What to say if it does not come.
        seconds: After which the test fails; far more than it takes on a busy machine.
        pause: Seconds between two times.
        alive: Processes without which it cannot come: the test fails once one of them ended.

    Raises:
        AssertionError: It did not come.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        ended = [process.poll() for process in alive if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            said = otherwise() if callable(otherwise) else otherwise
            raise AssertionError(f"ended with {ended}: {said}" if ended else said)
        time.sleep(pause)
    return value
