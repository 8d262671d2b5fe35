"""Sessions and the limits of logging in."""

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


_IDLE_SECONDS = 12 * 3600.0  #: a session that is not used for so long ends
_SESSION_SECONDS = 7 * 24 * 3600.0  #: and every session ends after so long
_SESSIONS_OF_A_USER = 20  #: more browsers than anybody has; the oldest session makes room


_COUNTED_PLACES = 10_000  #: addresses and names whose failed logins are remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """Who sent a request."""

    name: str
    role: Role
    logged_in: bool = True  #: False on this machine, where no login is asked for


@dataclass(slots=True, kw_only=True)
class _Session:
    name: str
    mark: str  #: of the password that it began with
    began: float
    used: float


class Sessions:
    """Who is logged in: random tokens, kept here and as cookies only, gone with the process."""

    def __init__(self, users: Users, clock: Callable[[], float] = time.monotonic) -> None:
        self._users = users
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[bytes, _Session] = {}

    def begin(self, name: str) -> str:
        """A new session's token; a token that a browser brought along is never used."""
        token = secrets.token_urlsafe(32)
        now = self._clock()
        mark = self._users.mark(name)
        with self._lock:
            self._forget_old(now)
            own = [key for key, one in self._sessions.items() if one.name == name]
            for key in own[: max(0, len(own) + 1 - _SESSIONS_OF_A_USER)]:
                del self._sessions[key]
            self._sessions[_digest(token)] = _Session(name=name, mark=mark, began=now, used=now)
        return token

    def visitor(self, token: str) -> Visitor | None:
        """Whose token it is, with the role that the users file gives now."""
        now = self._clock()
        with self._lock:
            session = self._sessions.get(_digest(token))
            if session is None or _is_over(session, now):
                return None
            session.used = now
        role = self._users.role(session.name)
        if role is None or session.mark != self._users.mark(session.name):
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
    failures: int
    seconds: float


#: A user at one address; one address; a user from all addresses together at which that user has
#: not logged in yet: strangers share the last one, and cannot lock the user out with it.
_LIMITS = {
    "user and address": _Limit(5, 60.0),
    "address": _Limit(20, 300.0),
    "user": _Limit(60, 300.0),
}


class LoginLimit:
    """Counts failed logins and says how long to wait before the next try."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failures: dict[tuple[str, str], list[float]] = {}
        self._known: dict[str, None] = {}  # users at addresses at which they have logged in

    def claim(self, name: str, address: str) -> float:
        """Counts a try in advance; seconds to wait where it is one too many, else 0.

        A hundred tries at once are so counted before the first is answered. `succeeded` takes
        back what a right password cost.
        """
        now = self._clock()
        with self._lock:
            waits = [self._wait(key, limit, now) for key, limit in self._keys(name, address)]
            if max(waits) > 0:
                return max(waits)
            for key, _ in self._keys(name, address):
                self._failures.setdefault(key, []).append(now)
            while len(self._failures) > _COUNTED_PLACES:
                del self._failures[next(iter(self._failures))]
        return 0.0

    def succeeded(self, name: str, address: str) -> None:
        """The password was right: the try does not count, and the user is known there."""
        self.take_back(name, address)
        self.remember(name, address)

    def take_back(self, name: str, address: str) -> None:
        """The last try does not count."""
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
            while len(self._known) > _COUNTED_PLACES:
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
    # A name longer than a user's may be must not fill the memory.
    return f"{name[:64].lower()} {counted_address(address)}"
