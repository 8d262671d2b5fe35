"""Users: their names, roles and passwords, and the file that holds them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import stat
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from werkzeug.security import check_password_hash, generate_password_hash

from tuner.commands import command
from tuner.errors import TunerError

Role = Literal["viewer", "editor"]
ROLES: tuple[Role, ...] = get_args(Role)

MIN_PASSWORD = 10  #: characters
MAX_PASSWORD = 200  #: characters

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
#: Docker and Kubernetes mount secrets here, read-only, with permissions that they choose.
_MOUNTED_SECRETS = Path("/run/secrets")

_HASHES_AT_ONCE = 2  #: passwords; for each, scrypt takes 32 MB and 0.1 s of a core
_QUEUED_HASHES = 6  #: passwords being checked or waiting; each holds one of the server's threads
_QUEUED_OF_AN_ADDRESS = 3  #: of those, from one address


class LoginsBusyError(TunerError):
    """More passwords wait to be checked than may wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _User:
    role: Role  #: what the user may do
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
        # Passwords of unknown names are checked against this one, so that they take as long.
        self._unknown_user_hash = generate_password_hash(secrets.token_hex(16))
        if not self._known:
            raise TunerError(f"{path} has no user, so no one could log in. {_how_to_add(path)}")

    def _current(self) -> Mapping[str, _User]:
        with self._lock:
            try:
                stamp = _stamp(self.path)
                if stamp != self._stamp:
                    self._known, self._stamp = read_users(self.path), stamp
            except TunerError:
                # Without a file that can be trusted, no user has rights.
                self._known, self._stamp = {}, None  # looked at again each time
            return self._known

    def role(self, name: str) -> Role | None:
        """The role of a user; None if there is no such user (any more)."""
        user = self._current().get(name)
        return None if user is None else user.role

    def check(self, name: str, password: str, address: str = "") -> Role | None:
        """The user's role if the password is right, else None; both take equally long.

        Raises:
            LoginsBusyError: Too many passwords are being checked, of all addresses or of this one.
        """
        user = self._current().get(name)
        with self._hashing.turn(address):
            right = check_password_hash(
                self._unknown_user_hash if user is None else user.password, password[:MAX_PASSWORD]
            )
        return user.role if user is not None and right else None

    def password_mark(self, name: str) -> str:
        """Differs after the user's password was changed, which ends the sessions before."""
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
            f"{path} is not a users file ({type(error).__name__}: {error}); remove it. "
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
    """Adds a user, or changes role and password of one; True if the user is new.

    Raises:
        TunerError: The name or the password is not allowed, or the file cannot be used.
    """
    if not _NAME.fullmatch(name):
        raise TunerError(
            f"{name!r} is not a user name: letters, digits and . _ @ -, at most 64, "
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
        listed = ", ".join(sorted(users)) or "no user"
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
        # Readable by this user alone before the first byte is written.
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
    """Differs after content, owner or mode of the file changed: ctime changes with each."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)


def _how_to_add(path: Path) -> str:
    add = command("dashboard", "add-user", "NAME", "--role", "editor", "--users", path)
    return f"`{add}` adds one."
