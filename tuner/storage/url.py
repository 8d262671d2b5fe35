"""Database URLs: read, refused with the remedy, and shown without their password."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from tuner.artifacts import DEFAULT_STORAGE_URL
from tuner.commands import secret_options
from tuner.errors import StorageError
from tuner.spec.mistakes import did_you_mean

#: A file with the password of a PostgreSQL URL that has none: secrets stay out of argv.
PASSWORD_FILE_VARIABLE = "TUNER_STORAGE_PASSWORD_FILE"  # noqa: S105 - a name, no password


_LONGEST_HOST = 253  #: letters of a host's name, RFC 1035
_LAST_PORT = 65535
_LONGEST_PASSWORD = 4096  #: bytes of a password file


PSYCOPG_ARGUMENTS = {
    "application_name": "tuner",
    "connect_timeout": 5,
    # A peer that went away without a word is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # ms
}


def parse_url(url: str) -> sa.URL:
    """The URL of a database that a study can live in, with its password where a file has it.

    Raises:
        StorageError: A study cannot live there, or a part of the URL cannot be used.
    """
    try:
        parsed = sa.make_url(url)
    except (SQLAlchemyError, ValueError):
        raise StorageError(
            f"--storage {mask(url)!r} is no database URL; write sqlite:///PATH, "
            f"like {DEFAULT_STORAGE_URL}, or postgresql://USER@HOST/DATABASE."
        ) from None
    backend = parsed.get_backend_name()
    if backend not in ("sqlite", "postgresql") or parsed.drivername not in (
        backend,
        "postgresql+psycopg",
    ):
        _refuse(
            parsed,
            "only SQLite and PostgreSQL are known; write sqlite:///PATH, "
            f"like {DEFAULT_STORAGE_URL}, or postgresql://USER@HOST/DATABASE",
        )
    options = _options(url)
    texts = (parsed.username, parsed.password, parsed.host, parsed.database, *sum(options, ()))
    if not all(_is_plain(text) for text in texts if text):
        _refuse(parsed, "it holds a NUL byte, or bytes that are not UTF-8; remove them", bare=True)
    if backend == "sqlite":
        _check_file(parsed, options)
        return parsed
    if not parsed.database:
        _refuse(parsed, "it names no database; write postgresql://USER@HOST/DATABASE")
    parsed = parsed.set(drivername="postgresql+psycopg")
    _check_server(parsed, options)
    return _with_password(parsed)


def _refuse(parsed: sa.URL, problem: str, *, bare: bool = False) -> NoReturn:
    # Without its options: one that is not known may be a secret, too.
    scheme = parsed.drivername.removesuffix("+psycopg")
    place = f"{scheme}://***" if bare else shown(parsed.set(query={}))
    raise StorageError(f"--storage {place}: {problem}.")


def _options(url: str) -> list[tuple[str, str]]:
    """What stands after the question mark, also what has no value: SQLAlchemy drops that."""
    # As SQLAlchemy reads it: a user or a password may hold a question mark.
    place = re.sub("^[^:/]*(:[^@]*)?@", "", url.partition("://")[2])
    return parse_qsl(place.partition("?")[2], keep_blank_values=True)


def _is_plain(text: str) -> bool:
    """Whether a database is given the text as it is: libpq stops at a NUL, and says nothing."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not UTF-8
        return False


def _check_file(parsed: sa.URL, options: list[tuple[str, str]]) -> None:
    if parsed.host or parsed.username is not None or parsed.port is not None:
        meant = "/".join(part for part in (parsed.host, parsed.database) if part)
        _refuse(
            parsed,
            f"the path stands after three slashes; write sqlite:///{meant}",
        )
    if not parsed.database or parsed.database == ":memory:":
        _refuse(
            parsed,
            f"a study must outlive its process; name a file, for instance {DEFAULT_STORAGE_URL}",
        )
    path = Path(parsed.database)
    if parsed.database.startswith("~") and not path.exists():
        _refuse(
            parsed,
            f"no shell replaces the ~ here, and {path.parts[0]!r} would be a folder of that name; "
            "write sqlite:////home/...",
        )
    for name, value in options:
        if name != "timeout":
            _refuse(
                parsed,
                f"SQLite has no option {name!r} here, only ?timeout=SECONDS (a question mark in a "
                "file's name is written %3F)",
            )
        if len(options) > 1 or not 0 < _number(value) < math.inf:
            _refuse(parsed, "timeout is one number of seconds above 0, for instance ?timeout=30")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _check_server(parsed: sa.URL, options: list[tuple[str, str]]) -> None:
    dialect = parsed.get_dialect()
    libpq: Any = dialect.import_dbapi()
    known = {option.keyword.decode() for option in libpq.pq.Conninfo.get_defaults()}
    for position, (name, value) in enumerate(options):
        if name not in known:
            hint = did_you_mean(name, known) or "; remove it"
            _refuse(parsed, f"libpq, which connects to PostgreSQL, has no option {name!r}{hint}")
        if not value:
            _refuse(parsed, f"its option {name!r} has no value; give it one, or leave it out")
        if name not in ("host", "port") and name in dict(options[:position]):
            _refuse(parsed, f"its option {name!r} stands twice; remove one")
    try:
        _, arguments = dialect().create_connect_args(parsed)
    except (SQLAlchemyError, ValueError):
        _refuse(
            parsed,
            "its hosts or ports cannot be read; several are written ?host=one:5432&host=two:5432",
        )
    for host in str(arguments.get("host", "")).split(","):
        if "@" in host[1:]:  # a first one marks a socket
            problem = "its host holds an @; in a user or a password, write @ as %40"
            _refuse(parsed, problem, bare=True)
        try:
            is_name = len(host.encode("idna")) <= _LONGEST_HOST or host.startswith("/")
        except UnicodeError:
            is_name = host.startswith("/")
        if not is_name:
            _refuse(
                parsed,
                f"{host[:80]!r} cannot be a host: the parts between its dots have 1 to 63 letters, "
                f"all of it at most {_LONGEST_HOST}",
                bare=True,
            )
    ports = [parsed.port, *str(arguments.get("port", "")).split(",")]
    for port in ports:
        if port not in (None, "") and not 0 < _number(str(port)) <= _LAST_PORT:
            _refuse(parsed, f"a port is a number from 1 to {_LAST_PORT}, not {port}")


def _with_password(url: sa.URL) -> sa.URL:
    file = os.environ.get(PASSWORD_FILE_VARIABLE)
    if url.password is not None or "password" in url.query or not file:
        return url
    place = f"${PASSWORD_FILE_VARIABLE}: {file}"
    remedy = "it should name the file that holds the database's password"
    try:
        with Path(file).open("rb") as opened:
            content = opened.read(_LONGEST_PASSWORD + 1)
    except OSError as error:
        raise StorageError(f"{place}: {error.strerror}; {remedy}.") from error
    problem = password = ""
    try:
        password = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:  # it carries what it could not read: nothing may be raised in here
        problem = "is not UTF-8 text"
    if len(content) > _LONGEST_PASSWORD:
        problem = f"has more than {_LONGEST_PASSWORD} bytes"
    elif len(password.splitlines()) > 1:
        problem = "has more than one line"
    elif not _is_plain(password):
        problem = "holds a NUL byte"
    elif not password:
        problem = problem or "is empty"
    if problem:
        raise StorageError(f"{place}: {problem}; {remedy}, and nothing else.")
    return url.set(password=password)


def shown(url: sa.URL) -> str:
    """The URL as its user writes it, without its password."""
    plain = url.set(drivername=url.drivername.removesuffix("+psycopg"))  # which we put there
    return plain.difference_update_query(secret_options(url)).render_as_string(hide_password=True)


def mask(url: str) -> str:
    """The URL without its password, also where it cannot be parsed."""
    try:
        return shown(sa.make_url(url))
    except (SQLAlchemyError, ValueError):
        scheme, separator, _ = url.partition("://")
        if "@" in url:  # where its password begins and ends cannot be said
            return f"{scheme}://***" if separator else "***"
        place, mark, _ = url.partition("?")
        return f"{place}?***" if mark else place


def is_sqlite(engine: sa.Engine) -> bool:
    """Whether it is SQLite and not PostgreSQL."""
    return engine.dialect.name == "sqlite"
