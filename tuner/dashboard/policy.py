"""Who may do what on the dashboard: users, sessions, login limits, and where a request is from.

Nothing here knows a study. `tuner.dashboard.guard` asks these questions of every request, before
any page or any part of Optuna's dashboard sees it.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import re
import secrets
import stat
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from werkzeug.security import check_password_hash, generate_password_hash

from tuner.commands import command
from tuner.errors import TunerError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

Role = Literal["viewer", "editor"]
ROLES: tuple[Role, ...] = get_args(Role)

LOOPBACK_HOSTS = frozenset(("127.0.0.1", "localhost", "::1"))
#: Names under which a browser on this machine, or at the other end of an SSH tunnel, asks.
LOOPBACK_NAMES = frozenset(("127.0.0.1", "localhost", "[::1]"))

READING = frozenset(("GET", "HEAD"))
WRITING = frozenset(("POST", "PUT", "DELETE"))

COOKIE = "tuner_session"
MIN_PASSWORD = 10  #: characters
MAX_PASSWORD = 200  #: characters

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
#: Docker and Kubernetes mount secrets here, read-only, with permissions that they choose.
_MOUNTED_SECRETS = Path("/run/secrets")
_IDLE_SECONDS = 12 * 3600.0  #: a session that is not used for so long ends
_SESSION_SECONDS = 7 * 24 * 3600.0  #: and every session ends after so long
_SESSIONS_OF_A_USER = 20  #: more browsers than anybody has; the oldest session makes room
_HASHES_AT_ONCE = 2  #: scrypt takes 32 MB and 0.1 s of a core
_QUEUED_HASHES = 6  #: those and the ones that wait: each holds one of the server's threads
_QUEUED_OF_AN_ADDRESS = 3
_COUNTED_PLACES = 10_000  #: addresses and names whose failed logins are remembered
_REFUSALS = 100  #: in `_REFUSALS_SECONDS` that are recorded one by one
_REFUSALS_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """Who sent a request."""

    name: str
    role: Role
    logged_in: bool = True  #: False on this machine, where no login is asked for


class LoginsBusyError(TunerError):
    """More passwords wait to be checked than may wait."""


# --- users ---


@dataclass(frozen=True, slots=True, kw_only=True)
class _User:
    role: Role
    password: str  #: hashed with scrypt, as Werkzeug writes it


class Users:
    """The users file: names, roles, and hashes of passwords. Read again whenever it changes."""

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            TunerError: It is missing, damaged, empty, or others may read or change it.
        """
        self.path = path
        self._lock = threading.Lock()
        self._hashing = _HashQueue()
        self._stamp: tuple[int, ...] | None = _stamp(path)
        self._known = read_users(path)
        # Unknown names are checked against this one, so that they take as long.
        self._nobody = generate_password_hash(secrets.token_hex(16))
        if not self._known:
            raise TunerError(f"{path} holds no user, so nobody could log in. {_how_to_add(path)}")

    def _current(self) -> Mapping[str, _User]:
        with self._lock:
            try:
                stamp = _stamp(self.path)
                if stamp != self._stamp:
                    self._known, self._stamp = read_users(self.path), stamp
            except TunerError:
                # Whoever cannot be looked up any more has no rights any more.
                self._known, self._stamp = {}, None  # looked at again each time
            return self._known

    def role(self, name: str) -> Role | None:
        """The role of a user; None where there is no such user (any more)."""
        user = self._current().get(name)
        return None if user is None else user.role

    def check(self, name: str, password: str, address: str = "") -> Role | None:
        """The user's role where the password is right, else None; a no takes as long as a yes.

        Raises:
            LoginsBusyError: Too many passwords are being checked, of all addresses or of this one.
        """
        user = self._current().get(name)
        with self._hashing.turn(address):
            right = check_password_hash(
                self._nobody if user is None else user.password, password[:MAX_PASSWORD]
            )
        return user.role if user is not None and right else None

    def mark(self, name: str) -> str:
        """Changes with the user's password: a session of the old one ends."""
        user = self._current().get(name)
        return "" if user is None else hashlib.sha256(user.password.encode()).hexdigest()


class _HashQueue:
    """Bounds the passwords that are checked at once, and the threads that wait for their turn."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hashing = threading.BoundedSemaphore(_HASHES_AT_ONCE)
        self._queued: Counter[str] = Counter()

    @contextlib.contextmanager
    def turn(self, address: str) -> Iterator[None]:
        with self._lock:
            if (
                self._queued.total() >= _QUEUED_HASHES
                or self._queued[address] >= _QUEUED_OF_AN_ADDRESS
            ):
                raise LoginsBusyError("Too many logins at this moment; try again in a second.")
            self._queued[address] += 1
        try:
            with self._hashing:
                yield
        finally:
            with self._lock:
                self._queued[address] -= 1
                if not self._queued[address]:
                    del self._queued[address]


def read_users(path: Path) -> dict[str, _User]:
    """The users of a file.

    Raises:
        TunerError: It is missing, damaged, or others may read or change it.
    """
    try:
        with path.open("rb") as file:
            _refuse_what_others_control(path, os.fstat(file.fileno()))
            document = json.load(file)
        users = {
            str(name): _User(role=user["role"], password=str(user["password"]))
            for name, user in document["users"].items()
        }
    except FileNotFoundError as error:
        raise TunerError(f"There is no users file {path}. {_how_to_add(path)}") from error
    except OSError as error:
        raise TunerError(f"Users file {path}: {error.strerror or error}.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TunerError(
            f"{path} is no users file ({type(error).__name__}: {error}); remove it. "
            f"{_how_to_add(path)}"
        ) from error
    for name, user in users.items():
        if user.role not in ROLES or not user.password.startswith("scrypt:"):
            raise TunerError(
                f"{path}: user {name!r} has role {user.role!r} and a password hash that begins "
                f"with {user.password[:7]!r}; roles are {' and '.join(ROLES)}, hashes are scrypt's."
            )
    return users


def write_user(path: Path, name: str, role: Role, password: str) -> bool:
    """Adds a user, or changes role and password of one; True where the user is new.

    Raises:
        TunerError: Name or password are none, or the file cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise TunerError(
            f"{name!r} is no user's name: letters, digits and . _ @ -, at most 64, "
            "a letter or digit first."
        )
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise TunerError(
            f"The password has {len(password)} characters; it needs {MIN_PASSWORD} to "
            f"{MAX_PASSWORD}."
        )
    users = read_users(path) if path.exists() else {}
    fresh = name not in users
    users[name] = _User(role=role, password=generate_password_hash(password))
    _write(path, users)
    return fresh


def remove_user(path: Path, name: str) -> None:
    """Removes a user, whose sessions end with the next request.

    Raises:
        TunerError: There is no such user.
    """
    users = read_users(path)
    if name not in users:
        listed = ", ".join(sorted(users)) or "nobody"
        raise TunerError(f"{path} holds no user {name!r}; it holds: {listed}.")
    del users[name]
    _write(path, users)


def _write(path: Path, users: Mapping[str, _User]) -> None:
    document = {
        "users": {
            name: {"role": user.role, "password": user.password}
            for name, user in sorted(users.items())
        }
    }
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        # For this user alone before its first byte.
        with beside.open("xb") as file:
            beside.chmod(0o600)
            file.write(json.dumps(document, indent=2).encode() + b"\n")
        os.replace(beside, path)
    except OSError as error:
        raise TunerError(f"Users file {path}: {error.strerror or error}.") from error
    finally:
        beside.unlink(missing_ok=True)


def _refuse_what_others_control(path: Path, found: os.stat_result) -> None:
    if os.name != "posix" or path.absolute().is_relative_to(_MOUNTED_SECRETS):
        return
    if found.st_uid not in (0, os.geteuid()):
        raise TunerError(
            f"Users file {path} belongs to another user of this machine (uid {found.st_uid}), who "
            f"may change it. chown {os.geteuid()} {path}"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise TunerError(
            f"Users file {path} has mode {stat.S_IMODE(found.st_mode):04o}: others on this machine "
            f"may read or change it. chmod 600 {path}"
        )


def _stamp(path: Path) -> tuple[int, ...]:
    """Differs once content, owner or mode of the file did; ctime changes with each of them."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)


def _how_to_add(path: Path) -> str:
    add = command("dashboard", "add-user", "NAME", "--role", "editor", "--users", path)
    return f"`{add}` adds one."


# --- sessions ---


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


# --- login limits ---


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


def counted_address(address: str) -> str:
    """For whom an address counts: whoever has one IPv6 address has the 2**64 of its network."""
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(found, ipaddress.IPv6Address):
            return str(found.ipv4_mapped or ipaddress.ip_network((int(found), 64), strict=False))
    return address


class Refusals:
    """Failed logins and refused requests, for the record of changes.

    A flood of them must not fill the database: of more than 100 in 5 minutes, the number is
    recorded with the next one that is recorded.
    """

    def __init__(
        self, record: Callable[..., object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._record = record
        self._clock = clock
        self._lock = threading.Lock()
        self._recorded: list[float] = []
        self._left_out = 0

    def add(self, *, who: str, address: str, action: str, status: int, detail: str) -> None:
        """Records one refusal: `Storage.record_change` has what the arguments mean."""
        now = self._clock()
        with self._lock:
            self._recorded = [when for when in self._recorded if now - when < _REFUSALS_SECONDS]
            if len(self._recorded) >= _REFUSALS:
                self._left_out += 1
                return
            self._recorded.append(now)
            left_out, self._left_out = self._left_out, 0
        if left_out:
            detail += f" ({left_out} more refusals before this one were not recorded)"
        self._record(who=who, address=address, action=action, status=status, detail=detail)


# --- where requests come from ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the server was started with; who may come in, from where."""

    users: Users | None = None  #: None: on this machine, without a login
    hosts: Collection[str] = LOOPBACK_NAMES  #: names in the Host header, lower case, no port
    secure: bool = False  #: the browser speaks TLS, with us or with the proxy before us
    #: Where the proxy is that speaks TLS and says who asks; empty where there is none. Other
    #: addresses are refused: they would come past it, in the clear.
    proxies: Collection[Network] = ()
    #: Who changes things where nobody logs in.
    local_name: str = "local"
    limit: LoginLimit = field(default_factory=LoginLimit)

    def cookie(self, environ: Mapping[str, Any]) -> str:
        """The name of the session's cookie, under the address that a request asks for.

        With TLS it is one that browsers take from this host alone: a neighbour under the same
        domain could otherwise plant a session of its own. Browsers do not tell the ports of a
        host apart, so the name does: two dashboards would else end each other's sessions.
        """
        port = re.search(r":(\d{1,5})$", str(environ.get("HTTP_HOST", "")))
        number = int(port[1]) if port else 443 if self.secure else 80
        return f"{'__Host-' if self.secure else ''}{COOKIE}_{number}"

    def is_proxy(self, address: str) -> bool:
        """Whether a connection from this address is our proxy's."""
        return any(is_in(address, network) for network in self.proxies)

    def names_host(self, environ: Mapping[str, Any]) -> bool:
        """Whether the request asks for a name of ours: one whose name was pointed here does not."""
        host = str(environ.get("HTTP_HOST", "")).lower()
        return re.sub(r":\d{1,5}$", "", host) in self.hosts

    def is_same_origin(self, environ: Mapping[str, Any]) -> bool:
        """Whether a writing request is from our own pages, or from no page at all.

        Browsers name the origin of every such request; programs such as curl name none.
        """
        if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in ("same-origin", "none"):
            return False
        origin = environ.get("HTTP_ORIGIN")
        scheme = "https" if self.secure else "http"
        return origin is None or origin == f"{scheme}://{environ.get('HTTP_HOST', '')}"


def networks(given: Collection[str]) -> tuple[Network, ...]:
    """Addresses and networks (10.0.0.0/8), as `--trust-proxy` names them.

    Raises:
        TunerError: One of them is neither.
    """
    found: list[Network] = []
    for text in given:
        try:
            found.append(ipaddress.ip_network(text.strip()))
        except ValueError as error:
            raise TunerError(
                f"--trust-proxy {text!r}: {error}; write the proxy's address, such as 10.0.0.2, "
                "or its network, such as 10.0.0.0/24."
            ) from error
    return tuple(found)


def is_in(address: str, network: Network) -> bool:
    """Whether an address is in a network; an IPv4 address may be written as IPv6 (::ffff:...)."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return (getattr(found, "ipv4_mapped", None) or found) in network


def is_loopback(host: str) -> bool:
    """Whether a server that listens on this address is reached from its own machine alone."""
    if host in LOOPBACK_HOSTS:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed_hosts(listening_on: str, also: Collection[str]) -> frozenset[str]:
    """Names that the Host header may have: this machine's, the address, and those given.

    Raises:
        TunerError: One of them is no name.
    """
    for name in also:
        if not re.fullmatch(r"[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]", name):
            raise TunerError(
                f"--allow-host {name!r} is no host's name: write it without https:// and without "
                "a port, such as tuner.example.org."
            )
    given = {name.lower() for name in also}
    if listening_on not in ("0.0.0.0", "::", ""):  # noqa: S104 - every address is no name
        given.add(f"[{listening_on}]" if ":" in listening_on else listening_on.lower())
    return LOOPBACK_NAMES | given
