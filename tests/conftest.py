"""A clean environment for the tests, and a last look that they leave nothing behind."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fakes import ready_sqlite
from postgres import Postgres, postgres_server

from tuner.storage.storage import Storage

ROOT = (
    Path(__file__).resolve().parent.parent
)  # not of folders.py: a test copies this file elsewhere

# Before any module of ours is imported: what the developer's shell sets must not steer a test.
# The folder of the real data is the exception; made absolute, since tests change directories.
for name in [name for name in os.environ if name.startswith("TUNER_")]:
    if name == "TUNER_DATA_DIR":
        os.environ[name] = str(Path(os.environ[name]).resolve())
    else:
        del os.environ[name]

# TensorFlow logs a screenful on import, from C++.
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

# Every process that a test starts inherits it, also one that outlives its parent: so the last look
# finds our processes, and no one else's.
SESSION_MARK = "PYTEST_TUNER_SESSION"
SESSION = uuid.uuid4().hex

PATIENCE = 10.0  # seconds for processes that are ending already


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fails the session where a process, a listening port or a file in the project outlives it."""
    os.environ[SESSION_MARK] = SESSION
    ports = listening_ports()
    files = set(ROOT.iterdir())
    yield
    _, alive = psutil.wait_procs(our_processes(), timeout=PATIENCE)
    left = [f"process {process.pid}: {command_line(process)}" for process in alive]
    for process in alive:
        process.kill()  # the mark in its environment proves that this session started it
    left += [f"port {port} of this process still listens" for port in listening_ports() - ports]
    left += [f"file {path}" for path in sorted(set(ROOT.iterdir()) - files) if not is_cache(path)]
    if left:
        pytest.fail("the tests left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def temporary_files(
    tmp_path_factory: pytest.TempPathFactory, nothing_is_left_behind: None
) -> Iterator[None]:
    """Gives the session a folder for temporary files: what a killed process had there goes too."""
    tmp_path_factory.getbasetemp()  # pytest's own stays where it is
    with (
        tempfile.TemporaryDirectory(prefix="tuner-tests-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        Path(folder).chmod(0o711)  # PostgreSQL, where root starts it, is another user
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        patch.setenv("XDG_CACHE_HOME", f"{folder}/cache")  # nor is anything left in the user's
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL, started for the first test that asks; `postgres.database()` is its own.

    A test that stops it starts it again.
    """
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without a table."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/tuner.db"
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.database()


@pytest.fixture(scope="session")
def ready_postgres(postgres: Postgres) -> str:
    """The name of a database with every table, to be copied: making them takes longer."""
    url = postgres.database()
    Storage(url).close()
    return url.rpartition("/")[2]


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database with every table: the tests that take it are the contract of every storage."""
    if request.param == "sqlite":
        return ready_sqlite(tmp_path)
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.database(template=request.getfixturevalue("ready_postgres"))


def our_processes() -> list[psutil.Process]:
    """Running processes with this session's mark, but for this one and multiprocessing's helper."""
    found = []
    for process in psutil.process_iter():
        try:
            marked = process.environ().get(SESSION_MARK) == SESSION
            # The resource tracker lives as long as the process that it serves: this one.
            helper = "multiprocessing.resource_tracker" in command_line(process)
            if marked and not helper and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue
    return [process for process in found if process.pid != os.getpid()]


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return "?"


def listening_ports() -> set[int]:
    connections = psutil.Process().net_connections(kind="inet")
    return {link.laddr.port for link in connections if link.status == psutil.CONN_LISTEN}


def is_cache(path: Path) -> bool:
    """What pytest, coverage and Hypothesis write into the project by design; git ignores it."""
    return path.name.startswith(".")
