"""Dask schedulers and workers as processes of their own, as on a cluster."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from folders import ROOT
from ports import free_port
from waiting import wait_until

from tuner.cluster.connection import Connection

SCHEDULER = (
    *("-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1"),
    *("--no-dashboard", "--dashboard-address", "127.0.0.1:0"),
)
DASK_WORKER = ("-m", "distributed.cli.dask_worker", "--no-dashboard", "--resources", "slot=1")
TUNER_WORKER = ("-m", "tuner", "worker", "--cluster")


class Program:
    """A Python program with what it said, in a process group of its own as from a terminal."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        # Killed, it leaves its temporary files behind.
        self._folder = tempfile.mkdtemp(prefix="tuner-test-")
        paths = {"TMPDIR": self._folder, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | paths | dict(environment or {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def interrupt(self) -> None:
        """Ctrl-C in its terminal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self, timeout: float = 30) -> int:
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code

    def end(self) -> None:
        """Kills it with all that it started."""
        if self.process.poll() is None:
            below = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
            for child in below:
                try:
                    child.kill()
                except psutil.NoSuchProcess:
                    continue
        if self.process.stderr is not None and not self.process.stderr.closed:
            self.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def says(self, words: str, timeout: float = 30) -> str:
        """The line with these words, once it is there."""
        found: list[str] = []

        def look() -> bool:
            found.extend(line for line in self.lines if words in line)
            return bool(found)

        wait_until(look, lambda: f"{words!r} is not in {self.lines}", seconds=timeout)
        return found[0]


@contextmanager
def program(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Program]:
    running = Program(*arguments, environment=environment)
    try:
        yield running
    finally:
        running.end()


@contextmanager
def scheduler(port: int | None = None, more: Sequence[str] = ()) -> Iterator[str]:
    """A scheduler; its address."""
    port = port or free_port()
    with program(*SCHEDULER, "--port", str(port), *more) as running:
        running.says("Scheduler at")
        yield f"{'tls' if more and '--tls-ca-file' in more else 'tcp'}://127.0.0.1:{port}"


#: What a port of another program may say to whoever connects; None: it hangs up.
STRANGERS = {
    "silent": b"",
    "hangs up": None,
    "mail server": b"220 mail.example ESMTP ready\r\n",
    "web server": b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
    "half a message": b"\1\0\0\0",
}


@contextmanager
def stranger(kind: str, port: int = 0) -> Iterator[str]:
    """What listens where a scheduler was looked for, and is another program; its address."""
    is_over = threading.Event()
    kept: list[socket.socket] = []
    says = STRANGERS[kind]

    def listen(server: socket.socket) -> None:
        server.settimeout(0.05)
        while not is_over.is_set():
            try:
                client = server.accept()[0]
            except TimeoutError:
                continue
            kept.append(client)
            with contextlib.suppress(OSError):  # it looked whether anything listens, and went
                client.sendall(says or b"")
            if says is None:
                client.close()

    with socket.create_server(("127.0.0.1", port)) as server:
        thread = threading.Thread(target=listen, args=(server,), name="stranger")
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        finally:
            is_over.set()
            thread.join()
            for client in kept:
                client.close()


def assert_memory_is_kept(connection: Connection) -> None:
    """Malloc of the training processes keeps what a step freed: it reads this as they start."""
    started_with = connection.client.run(lambda: Path("/proc/self/environ").read_text().split("\0"))
    assert started_with
    for environment in started_with.values():
        assert "MALLOC_TRIM_THRESHOLD_=1073741824" in environment
        assert "MALLOC_MMAP_THRESHOLD_=33554432" in environment
