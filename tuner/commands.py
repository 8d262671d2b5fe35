"""Commands that messages suggest: quoted for the shell, complete, and without a secret."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.artifacts import DEFAULT_ROOT, DEFAULT_STORAGE_URL

if TYPE_CHECKING:
    import sqlalchemy as sa

#: The project's name on package indexes, where `tuner` is another program.
DISTRIBUTION = "protein-tuner"
#: Parts of the names of a connection's options that are secrets or tell where one is; libpq has
#: one in each version more (password, sslpassword, passfile, scram_client_key, ...).
_SECRET_NAME = re.compile("pass|pwd|secret|token|scram", re.IGNORECASE)
#: A secret within the value of another option: a connection string in `dbname`, say.
_SECRET_VALUE = re.compile(r"(?:pass\w*|pwd|secret|token)\s*=|://[^@]*:[^@]*@", re.IGNORECASE)


def command(*words: object, storage: str | None = None, artifacts: Path | None = None) -> str:
    """`tuner WORDS...` as a POSIX shell takes it, for messages, notes and pages.

    Args:
        words: Verb, arguments and options.
        storage: The URL to which the command belongs; added as `--storage` where neither the
            default nor $TUNER_STORAGE of this process names it. Secrets are left out: see
            `password_hint`.
        artifacts: The folder of the artifacts, likewise.
    """
    found = ["tuner", *map(str, words)]
    if storage is not None and (plain := _without_secrets(storage)) != _known_place():
        found += ["--storage", plain]
    if artifacts is not None and artifacts != Path(
        os.environ.get("TUNER_ARTIFACTS") or DEFAULT_ROOT
    ):
        found += ["--artifacts", str(artifacts)]
    return shlex.join(found)


def install_command(extra: str) -> str:
    """The command that installs an extra of the tuner into the environment in which it runs."""
    return shlex.join(("pip", "install", f"{DISTRIBUTION}[{extra}]"))


def password_hint(storage: str) -> str:
    """How to give what `command` leaves out of the URL, as a sentence; "" where that is nothing."""
    if storage == _known_storage():
        return ""
    url = _parsed(storage)
    left_out = {name.lower() for name in secret_options(url)}
    ways = []
    if url.password is not None or "password" in left_out:
        ways.append("set PGPASSWORD, or name a file that holds it in TUNER_STORAGE_PASSWORD_FILE")
    if "passfile" in left_out:
        ways.append("name the password file in PGPASSFILE")
    if others := sorted(left_out - {"password", "passfile"}):
        ways.append(f"write {', '.join(others)} into a connection service file (PGSERVICE)")
    return f"The storage's password is not repeated here: {'; '.join(ways)}." if ways else ""


def secret_options(url: sa.URL) -> list[str]:
    """The options of a database's URL that are secrets, or tell where one is."""
    return [
        name
        for name, value in url.query.items()
        if _SECRET_NAME.search(name) or any(map(_SECRET_VALUE.search, _each(value)))
    ]


def _each(value: str | Iterable[str]) -> Iterable[str]:
    return (value,) if isinstance(value, str) else value


def _known_storage() -> str:
    """The storage of a command that names none."""
    return os.environ.get("TUNER_STORAGE") or DEFAULT_STORAGE_URL


def _known_place() -> str:
    """The same without its secrets."""
    import sqlalchemy as sa  # noqa: PLC0415 - as below

    known = _known_storage()
    try:
        return _without_secrets(known)
    except (ValueError, sa.exc.SQLAlchemyError):  # what is wrong with it is told elsewhere
        return known


def _without_secrets(storage: str) -> str:
    url, hidden = _parsed(storage), secret_options(_parsed(storage))
    if url.password is None and not hidden:
        return storage
    # A user without a password: *** would be taken for one, and $PGPASSWORD not be looked at.
    plain = url.set(drivername=url.drivername.removesuffix("+psycopg"))._replace(password=None)
    return plain.difference_update_query(hidden).render_as_string()


def _parsed(storage: str) -> sa.URL:
    import sqlalchemy as sa  # noqa: PLC0415 - workers, who have no storage, do not wait for it

    return sa.make_url(storage)
