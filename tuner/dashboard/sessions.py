"""Sessions and the limits of logging in.

Why: `docs/decisions.md#why-are-sessions-kept-in-the-server-and-not-in-a-signed-cookie`.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tuner.dashboard.addresses import counted_address
from tuner.dashboard.users import Role, Users

COOKIE = "tuner_session"


_IDLE_SECONDS = 12 * 3600.0  #: until an unused session ends
_SESSION_SECONDS = 7 * 24 * 3600.0  #: until any session ends
_SESSIONS_OF_A_USER = 20  #: a further login ends the oldest one
_COUNTED_KEYS = 10_000  #: names and addresses whose failed logins are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """Who sent a request."""

    name: str  #: of the user
    role: Role  #: what the user may do
    logged_in: bool = True  #: False where no login is asked for, on this machine alone


@dataclass(slots=True, kw_only=True)
class _Session:
    name: str  #: of the user
    password_mark: str  #: `Users.password_mark` when it began
    began: float  #: by the clock of `Sessions`, seconds
    used: float  #: when its last request came, likewise


class Sessions:
    """Who is logged in: a random token in a cookie for each, known until the process ends."""

    def __init__(self, users: Users, clock: Callable[[], float] = time.monotonic) -> None:
        self._users = users
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[bytes, _Session] = {}

    def begin(self, name: str) -> str:
        """Begins a session; its token is new, whatever token the browser sent."""
        token = secrets.token_urlsafe(32)
        now = self._clock()
        mark = self._users.password_mark(name)
        with self._lock:
            self._forget_old(now)
            own = [key for key, one in self._sessions.items() if one.name == name]
            for key in own[: max(0, len(own) + 1 - _SESSIONS_OF_A_USER)]:
                del self._sessions[key]
            self._sessions[_digest(token)] = _Session(
                name=name, password_mark=mark, began=now, used=now
            )
        return token

    def visitor(self, token: str) -> Visitor | None:
        """The user of a valid token, with the role that the users file gives now; else None."""
        now = self._clock()
        with self._lock:
            session = self._sessions.get(_digest(token))
            if session is None or _is_over(session, now):
                return None
            session.used = now
        role = self._users.role(session.name)
        if role is None or session.password_mark != self._users.password_mark(session.name):
            self.end(token)
            return None
        return Visitor(name=session.name, role=role)

    def end(self, token: str) -> None:
        with self._lock:
            self._sessions.pop(_digest(token), None)

    def _forget_old(self, now: float) -> None:
        for key in [key for key, one in self._sessions.items() if _is_over(one, now)]:
            del self._sessions[key]


def _is_over(session: _Session, now: float) -> bool:
    return now - session.used > _IDLE_SECONDS or now - session.began > _SESSION_SECONDS


def _digest(token: str) -> bytes:
    # Looked up by a digest, so that the time of a look-up tells nothing about a token.
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


@dataclass(frozen=True, slots=True)
class _Limit:
    failures: int  #: that are allowed
    seconds: float  #: in this time


#: For a user at one address; for one address; for a user at all those addresses together at which
#: the user has not logged in yet: others share the last one, and cannot lock the user out with it.
_LIMITS = {
    "user and address": _Limit(5, 60.0),
    "address": _Limit(20, 300.0),
    "user": _Limit(60, 300.0),
}


class LoginLimit:
    """Counts failed logins and says how long to wait before the next attempt."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failures: dict[tuple[str, str], list[float]] = {}
        self._known: dict[str, None] = {}  # users at addresses at which they have logged in

    def claim(self, name: str, address: str) -> float:
        """Counts an attempt before its password is checked.

        A hundred attempts at once are thus counted before the first is answered. `succeeded`
        takes the attempt back.

        Returns:
            Seconds to wait if it is one too many, which is then not counted; else 0.
        """
        now = self._clock()
        with self._lock:
            waits = [self._wait(key, limit, now) for key, limit in self._keys(name, address)]
            if max(waits) > 0:
                return max(waits)
            for key, _ in self._keys(name, address):
                self._failures.setdefault(key, []).append(now)
            while len(self._failures) > _COUNTED_KEYS:
                del self._failures[next(iter(self._failures))]
        return 0.0

    def succeeded(self, name: str, address: str) -> None:
        """The password was right: the attempt does not count, and the user is known there."""
        self.take_back(name, address)
        self.remember(name, address)

    def take_back(self, name: str, address: str) -> None:
        """The last attempt does not count."""
        with self._lock:
            for key, _ in self._keys(name, address):
                tries = self._failures.get(key)
                if tries:
                    tries.pop()
                if not tries:
                    self._failures.pop(key, None)

    def remember(self, name: str, address: str) -> None:
        """The user has logged in at this address: failures elsewhere do not count here."""
        known = _user_at(name, address)
        with self._lock:
            self._known.pop(known, None)
            self._known[known] = None
            while len(self._known) > _COUNTED_KEYS:
                del self._known[next(iter(self._known))]

    def _wait(self, key: tuple[str, str], limit: _Limit, now: float) -> float:
        recent = [when for when in self._failures.get(key, ()) if now - when < limit.seconds]
        if recent:
            self._failures[key] = recent
        else:
            self._failures.pop(key, None)
        return recent[0] + limit.seconds - now if len(recent) >= limit.failures else 0.0

    def _keys(self, name: str, address: str) -> list[tuple[tuple[str, str], _Limit]]:
        user_at = _user_at(name, address)
        names = {"user and address": user_at, "address": user_at.rpartition(" ")[2]}
        if user_at not in self._known:
            names["user"] = user_at.rpartition(" ")[0]
        return [((kind, of), _LIMITS[kind]) for kind, of in names.items()]


def _user_at(name: str, address: str) -> str:
    # Cut to the longest name of a user: longer ones would fill the memory.
    return f"{name[:64].lower()} {counted_address(address)}"
