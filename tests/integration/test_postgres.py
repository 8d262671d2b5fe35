"""The PostgreSQL that other tests stand on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import psycopg
import pytest
from folders import TESTS
from postgres import Postgres

SHARED_MEMORY = Path("/proc/sysvipc/shm")  # of System V, where the system has it


def rows(url: str) -> list[tuple[int]]:
    with psycopg.connect(url, connect_timeout=5) as connection:
        return connection.execute("SELECT x FROM t ORDER BY x").fetchall()


def with_a_row(url: str) -> str:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE t (x int)")
        connection.execute("INSERT INTO t VALUES (7)")
    return url


def test_each_database_is_new_and_empty(postgres: Postgres) -> None:
    with_a_row(postgres.database())
    with pytest.raises(psycopg.errors.UndefinedTable):
        rows(postgres.database())


def test_it_asks_for_the_password_and_listens_on_loopback_alone(postgres: Postgres) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(postgres.database().replace("tuner:", "tuner:x"))
    addresses = {
        link.laddr.ip
        for link in psutil.net_connections("tcp")
        if link.status == psutil.CONN_LISTEN and link.laddr.port == postgres.port
    }
    assert addresses == {"127.0.0.1"}


@pytest.mark.parametrize("end", [Postgres.stop, Postgres.kill])
def test_it_comes_back_at_its_port_with_what_was_committed(postgres: Postgres, end) -> None:
    url = with_a_row(postgres.database())
    end(postgres)
    try:
        with pytest.raises(psycopg.OperationalError, match="refused"):
            rows(url)
    finally:
        postgres.start()
    assert rows(url) == [(7,)]


SCRIPT = """
import os, signal, sys
from postgres import postgres_server
with postgres_server() as server:
    print(server._folder, server.port, server.process().pid, flush=True)
    if sys.argv[1] == "killed first":
        server.kill()
    if sys.argv[1] == "never ends":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["ends", "killed first", "never ends"])
def test_it_leaves_no_process_port_or_shared_memory(how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
    )
    folder, port, pid = done.stdout.split()
    left = [process for process in psutil.process_iter(["cmdline"]) if mentions(process, folder)]
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)))
    assert int(pid) not in makers_of_shared_memory()
    if how == "never ends":
        import shutil

        shutil.rmtree(folder)
    else:
        assert done.returncode == 0, done.stderr
        assert not Path(folder).exists()


def mentions(process: psutil.Process, folder: str) -> bool:
    return any(folder in word for word in process.info["cmdline"] or ())


def test_its_shared_memory_is_seen_while_it_runs(postgres: Postgres) -> None:
    assert (postgres.process().pid in makers_of_shared_memory()) == SHARED_MEMORY.exists()


def makers_of_shared_memory() -> set[int]:
    """The processes that made what there is on the whole machine."""
    if not SHARED_MEMORY.exists():
        return set()
    heads, *lines = SHARED_MEMORY.read_text().splitlines()
    return {int(line.split()[heads.split().index("cpid")]) for line in lines}
