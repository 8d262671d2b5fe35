"""Keeps Dask talking when somebody sets the wall clock back.

Dask's batched streams (which carry every order, epoch and checkpoint) wait until a time of day
to send the next batch. Where the clock is set back by an hour just then, nothing is sent for
an hour, while heartbeats continue and nothing is noticed. So in our processes they read a clock
that starts at the time of day and then only counts seconds.
"""

from __future__ import annotations

import time
from typing import Any

import distributed.batched
from tornado.ioloop import IOLoop

_OFFSET = time.time() - time.monotonic()


def steady_time() -> float:
    """Seconds since the epoch, as of when this process began; never set back or forward."""
    return _OFFSET + time.monotonic()


def _loop_time(_loop: Any) -> float:
    return steady_time()


def keep_steady() -> None:
    """Makes Dask's streams of this process read the steady clock, running ones, too."""
    # A stream hands its deadlines to the event loop, so both must read the same clock.
    for place, clock in ((distributed.batched, steady_time), (IOLoop, _loop_time)):
        setattr(place, "time", clock)  # noqa: B010 - neither module offers the name
