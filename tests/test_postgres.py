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
from postgres import Postgres


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
    if sys.argv[1] == "killed first":
        server.kill()
    print(server._folder, server.port, flush=True)
    if sys.argv[1] == "never ends":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["ends", "killed first", "never ends"])
def test_it_leaves_no_process_port_or_shared_memory(how: str) -> None:
    before = shared_memory()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    folder, port = done.stdout.split()
    left = [process for process in psutil.process_iter(["cmdline"]) if mentions(process, folder)]
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)))
    assert shared_memory() <= before
    if how == "never ends":
        import shutil

        shutil.rmtree(folder)
    else:
        assert done.returncode == 0, done.stderr
        assert not Path(folder).exists()


def mentions(process: psutil.Process, folder: str) -> bool:
    return any(folder in word for word in process.info["cmdline"] or ())


def shared_memory() -> set[str]:
    """Of System V; its own users are the servers of this session."""
    path = Path("/proc/sysvipc/shm")
    return (
        {line.split()[1] for line in path.read_text().splitlines()[1:]} if path.exists() else set()
    )
