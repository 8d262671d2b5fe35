"""Answers that many browsers poll for, computed once for all of them.

Why: `docs/decisions.md#why-is-every-answer-of-a-study-kept-for-two-seconds`.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from werkzeug.wrappers import Response

_MAX_AGE_SECONDS = 10.0  #: the longest that an answer which took long to compute is cached
_MAX_BYTES = 128 * 1024 * 1024  #: of all cached bodies together
_MAX_ANSWERS = 256


@dataclass(slots=True)
class _Entry:
    """The place of one answer."""

    lock: threading.Lock = field(default_factory=threading.Lock)  #: held while it is computed
    until: float = 0.0  #: by the monotonic clock, seconds; then it is computed again
    answer: Response = field(default_factory=Response)


class AnswerCache:
    """Caches answers for seconds; fifty browsers that poll a study cost as much as one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def get(self, key: str, seconds: float, ask: Callable[[], Response]) -> Response:
        """The cached answer, or a new one.

        Args:
            key: Equal for requests that have the same answer.
            seconds: How long it is cached at least, if it is not an error.
            ask: Computes it; others that want it wait meanwhile.
        """
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
        with entry.lock:
            began = time.monotonic()
            if began >= entry.until:
                entry.answer = ask()
                ended = time.monotonic()
                if entry.answer.status_code == 200:
                    # The larger the study, the longer: polls never take more than a fiftieth of
                    # a core. Optuna's dashboard keeps the trials of a large study as long.
                    longest = max(seconds, _MAX_AGE_SECONDS)
                    entry.until = ended + min(max(seconds, 50 * (ended - began)), longest)
                self._make_room(key, entry)
            return entry.answer

    def clear(self) -> None:
        """Forgets every answer."""
        with self._lock:
            self._entries.clear()

    def _make_room(self, key: str, entry: _Entry) -> None:
        """Keeps the newest answers within the limits, and no error."""
        with self._lock:
            if entry.until <= 0 and self._entries.get(key) is entry:
                del self._entries[key]
            size = sum(len(one.answer.data) for one in self._entries.values())
            while size > _MAX_BYTES or len(self._entries) > _MAX_ANSWERS:
                size -= len(self._entries.popitem(last=False)[1].answer.data)
