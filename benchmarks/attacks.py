"""Attacks on a real `tuner serve` whose study is running, and what became of both.

    .venv/bin/python benchmarks/attacks.py               # about 3 minutes

Opens idle connections from this machine's own addresses (1,100 at most), sends bodies, passwords
and odd requests, knocks at every port of the service and its workers, and prints a table. The study
is synthetic; it must reach its budget with no trial failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import re
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from distributed import rpc

TRIALS = 6
STUDY = f"""name = "attacked"
trials = {TRIALS}
[data]
source = "synthetic"
split = {{ seed = 1 }}
[training]
max_epochs = 6
[space]
embedding_dim = 4
blocks = 1
filters = 4
head = "global_max"
dense_layers = 1
units = 8
batch_size = 128
learning_rate = {{ low = 1e-3, high = 1e-2, log = true }}
"""
SERVE = ("serve", "--workers", "1")
#: What is sent over one connection each; none may be answered with 500.
REQUESTS = {
    "a note whose text is a list": ("PUT", "/api/studies/1/note", {"version": 1, "body": ["a"]}),
    "a version that is true": ("PUT", "/api/studies/1/note", {"version": True, "body": "a"}),
    "an upload to no study": ("POST", "/api/artifacts/77", {"file": "data:;base64,YQ=="}),
    "an upload that is no file": ("POST", "/api/artifacts/1", {"file": ["a"]}),
    "an id of 5,000 digits": ("GET", f"/api/studies/{'9' * 5000}", None),
    "a negative id": ("GET", "/csv/-1", None),
    "a query of other digits": ("GET", "/api/studies/1?after=%D9%A3", None),
    "a plot of two objectives": ("GET", "/api/studies/1/plot/pareto_front", None),
    "half of a surrogate pair": ("POST", "/tuner/api/check", {"toml": "\ud800"}),
    "bytes that are no text": ("GET", "/tuner/studies/%ff%00%ed%a0%80", None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=1100, help="at most 1,100")
    parser.add_argument("--descriptors", type=int, default=1024, help="of the service")
    chosen = parser.parse_args()
    raise_own_limit()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "study.toml").write_text(STUDY)
        tuner(folder, "launch", "study.toml", "--detach")
        log = folder / "log"
        with serving(folder, log, chosen.descriptors, *SERVE) as (process, port):
            wait_for(lambda: status(folder)["trials"]["RUNNING"] > 0)
            rows.append(without_certificate(process))
            for what, addresses in (("one address", 1), ("eight addresses", 8)):
                rows.append(idle_connections(port, min(chosen.connections, 1100), what, addresses))
            rows += [odd(port, what, *request) for what, request in REQUESTS.items()]
            rows += strangers(folder, chosen.descriptors)
            wait_for(lambda: status(folder)["state"] == "finished")
            shown = ask(port, "GET", "/api/studies/1")[0]
            size = log.stat().st_size
        ended = status(folder)
    failed = [what for what, answer in rows if re.match(r"0$|5\d\d|.*, 5\d\d", answer)]
    rows.append(("the study's page afterwards", f"{shown}"))
    rows.append(("the study", f"{json.dumps(ended['trials'])}, {ended['state']}"))
    rows.append(("the service's log", f"{size:,} bytes"))
    print("| attack | answer |\n| --- | --- |")
    print("\n".join(f"| {what} | {answer} |" for what, answer in rows))
    trials = ended["trials"]
    finished = trials["COMPLETE"] + trials["PRUNED"] == TRIALS and not trials["FAIL"]
    broken = not finished or shown != 200 or size > 100_000
    sys.exit(1 if broken or failed else 0)


def raise_own_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def tuner(folder: Path, *arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("tuner")), *arguments]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True, timeout=300
    ).stdout


def status(folder: Path) -> dict:
    return json.loads(tuner(folder, "status", "attacked", "--json"))


def wait_for(is_so: Callable[[], object], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise SystemExit("The study did not get there in time.")
        time.sleep(1.0)


@contextlib.contextmanager
def serving(
    folder: Path, log: Path, descriptors: int, *words: str
) -> Iterator[tuple[psutil.Process, int]]:
    """`tuner WORDS` with so many descriptors and no more: its process, and the dashboard's port."""
    command = [str(Path(sys.executable).with_name("tuner")), *words, "--port", "0"]
    limited = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *command]
    with (
        log.open("wb") as file,
        subprocess.Popen(limited, cwd=folder, stderr=file, stdout=file) as process,
    ):
        try:
            wait_for(lambda: re.search(rb"http://127\.0\.0\.1:\d+/", log.read_bytes()))
            port = int(re.findall(rb"http://127\.0\.0\.1:(\d+)/", log.read_bytes())[0])
            yield psutil.Process(process.pid), port
        finally:
            process.terminate()
            process.wait(120)


def without_certificate(service: psutil.Process) -> tuple[str, str]:
    """Asks every port of the service and of its workers to run a program, as Dask's client does."""
    ports = {
        link.laddr.port
        for process in (service, *service.children(recursive=True))
        for link in process.net_connections(kind="inet")
        if link.status == psutil.CONN_LISTEN
    }

    async def is_let_in(port: int) -> bool:
        try:
            async with rpc(f"tcp://127.0.0.1:{port}", timeout=3) as scheduler:
                await asyncio.wait_for(scheduler.identity(), 3)
        except (TimeoutError, OSError, ValueError):
            return False
        return True

    let_in = [port for port in sorted(ports) if asyncio.run(is_let_in(port))]
    answer = f"let in at {len(let_in)} of {len(ports)} ports"
    return "Dask's protocol without a certificate", f"{'500, ' if let_in else ''}{answer}"


def strangers(folder: Path, descriptors: int) -> Iterator[tuple[str, str]]:
    """What those get who have no login: a dashboard with users over the same storage."""
    (folder / "password").write_text("correct horse battery")
    tuner(folder, "dashboard", "add-user", "ada", "--password-file", "password")
    with serving(folder, folder / "log2", descriptors, "dashboard") as (process, port):
        before = process.memory_info().rss
        with contextlib.ExitStack() as held:
            for _ in range(60):
                client = socket.create_connection(("127.0.0.1", port), timeout=10)
                held.enter_context(client)
                with contextlib.suppress(OSError):
                    client.sendall(
                        b"POST /tuner/login HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                        b"Content-Length: 15000000\r\n\r\n" + bytes(14_000_000)
                    )
            grown = (process.memory_info().rss - before) / 1e6
        yield "60 bodies of 15 MB without a login", f"{grown:.0f} MB more memory"

        codes: list[int] = []
        wrong = {"name": "ada", "password": "wrong password"}
        tries = [
            threading.Thread(
                target=lambda: codes.append(ask(port, "POST", "/tuner/api/login", wrong)[0])
            )
            for _ in range(40)
        ]
        for one in tries:
            one.start()
        answers = [ask(port, "GET", path) for path in ("/healthz", "/readyz", "/tuner/login") * 5]
        for one in tries:
            one.join()
        slowest = max(seconds for _, seconds in answers)
        told = ", ".join(f"{codes.count(code)} times {code}" for code in sorted(set(codes)))
        yield "40 passwords at once", f"{told}; slowest of 15 other answers {slowest:.2f} s"


def ask(port: int, method: str, path: str, document: object = None) -> tuple[int, float]:
    """Status of an answer, 0 where none came, and the seconds that it took."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        body = None if document is None else json.dumps(document)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            return 0, time.monotonic() - began
        return answer.status, time.monotonic() - began


def odd(port: int, what: str, method: str, path: str, document: object) -> tuple[str, str]:
    return what, str(ask(port, method, path, document)[0])


def idle_connections(port: int, number: int, what: str, addresses: int) -> tuple[str, str]:
    """Holds connections for five seconds while others ask."""
    held = []
    try:
        for index in range(number):
            there = f"127.0.0.{2 + index % addresses}"
            with contextlib.suppress(OSError):
                held.append(
                    socket.create_connection(
                        ("127.0.0.1", port), timeout=10, source_address=(there, 0)
                    )
                )
        answers = []
        for _ in range(10):
            answers.append(ask(port, "GET", "/healthz"))
            answers.append(ask(port, "GET", "/api/studies"))
            time.sleep(0.5)
    finally:
        for one in held:
            one.close()
    statuses = sorted({code for code, _ in answers})
    slowest = max(seconds for _, seconds in answers)
    said = f"{', '.join(map(str, statuses))}; slowest of {len(answers)} answers {slowest:.2f} s"
    return f"{len(held):,} idle connections of {what}", said


if __name__ == "__main__":
    main()
