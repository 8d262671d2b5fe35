"""Connections to the dashboard: how many, which one gives way, and what is kept free."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import ready_sqlite
from lab import certificate, write_users
from waiting import wait_until

from tuner.dashboard import connections, optuna_app
from tuner.dashboard import server as web_server
from tuner.dashboard.addresses import counted_address
from tuner.dashboard.connections import LimitedServer, raise_descriptor_limit
from tuner.dashboard.server import DashboardServer, make_server
from tuner.dashboard.settings import Folders, Settings
from tuner.storage.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    with Storage(ready_sqlite(tmp_path)) as opened:
        yield opened


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the server tells."""
    lines: list[str] = []
    monkeypatch.setattr(web_server, "log_line", lines.append)
    return lines


def settings(folder: Path, **changes: Any) -> Settings:
    return Settings(**{"port": 0, "folders": Folders(artifacts=folder / "artifacts")} | changes)


class Clients(contextlib.ExitStack):
    """Connections that are open until the block ends."""

    def __init__(self, server: DashboardServer) -> None:
        super().__init__()
        self.server = server

    def open(self, address: str = "127.0.0.1") -> socket.socket:
        """One more connection, of which the server knows when this returns."""
        there = ("127.0.0.1", self.server.port)
        client = socket.create_connection(there, timeout=30, source_address=(address, 0))
        self.enter_context(client)
        return client

    def open_and_ask(self, address: str = "127.0.0.1") -> socket.socket:
        client = self.open(address)
        assert is_answered(client)
        return client


def is_answered(client: socket.socket) -> bool:
    """Whether a request over a connection is answered; False where it was closed."""
    try:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: probe\r\n\r\n")
        answer = b""
        while not answer.endswith(b"ok\n"):
            more = client.recv(1000)
            if not more:
                return False
            answer += more
    except (ConnectionResetError, BrokenPipeError):
        return False
    return answer.startswith(b"HTTP/1.1 200")


def healthy(server: DashboardServer) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/healthz")
        return connection.getresponse().read() == b"ok\n"


def test_an_address_that_has_its_share_closes_its_own_longest_waiting_connection(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_server, "MOST_OF_AN_ADDRESS", 3)
    with make_server(storage, settings(tmp_path)) as server, Clients(server) as clients:
        other = clients.open_and_ask("127.0.0.9")
        first, second, third = (clients.open_and_ask("127.0.0.2") for _ in range(3))
        assert is_answered(first)  # so the second has waited longest
        fourth = clients.open_and_ask("127.0.0.2")
        assert not is_answered(second)
        assert all(is_answered(one) for one in (first, third, fourth, other))


def test_when_all_places_are_taken_the_address_that_holds_most_makes_room(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST", 4)
    with make_server(storage, settings(tmp_path)) as server, Clients(server) as clients:
        visitor = clients.open_and_ask("127.0.0.9")
        crowd = [clients.open_and_ask("127.0.0.2") for _ in range(3)]
        newcomer = clients.open_and_ask("127.0.0.3")
        assert not is_answered(crowd[0])
        assert all(is_answered(one) for one in (visitor, newcomer, *crowd[1:]))


@pytest.mark.parametrize("sent", [b"", b"POST /tuner/login HTTP/1.1\r\nHost: 127.0.0.1\r\nContent"])
def test_connections_without_end_leave_room_for_the_next(
    storage: Storage, tmp_path: Path, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST", 12)
    monkeypatch.setattr(web_server, "MOST_OF_AN_ADDRESS", 5)
    with make_server(storage, settings(tmp_path)) as server, Clients(server) as clients:
        for number in range(60):
            client = clients.open(f"127.0.0.{2 + number % 4}")
            with contextlib.suppress(OSError):  # it made room for another already
                client.sendall(sent)
        assert healthy(server)
        # Of those that were closed, the server hears a turn of its loop later.
        assert sum(not stream.closed() for stream in list(server._server._open)) <= 12


def test_behind_a_proxy_whose_address_stands_for_many_all_places_are_for_it(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_server, "MOST_OF_AN_ADDRESS", 2)
    chosen = settings(tmp_path, users_file=write_users(tmp_path), behind_proxy=True)
    with make_server(storage, chosen) as server, Clients(server) as clients:
        held = [clients.open_and_ask() for _ in range(6)]
        assert all(is_answered(one) for one in held)


def test_a_connection_that_is_being_answered_gives_way_to_none(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go = threading.Event(), threading.Event()

    def slow(_: object, environ: Any, answer: Any, *more: object) -> list[bytes]:
        entered.set()
        assert go.wait(30)
        answer("200 OK", [])
        return [b"ok\n"]

    monkeypatch.setattr(optuna_app.OptunaDashboard, "read", slow)
    monkeypatch.setattr(web_server, "MOST_OF_AN_ADDRESS", 1)
    with make_server(storage, settings(tmp_path)) as server, Clients(server) as clients:
        asking = clients.open()
        asking.sendall(b"GET /api/studies HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert entered.wait(30)
        assert not is_answered(clients.open())  # there is no place that it could have
        go.set()
        assert b"200 OK" in asking.recv(1000)
        wait_until(lambda: is_answered(clients.open()))  # now it waits, and gives way


def test_descriptors_are_kept_free_whoever_holds_the_others(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lowest free number is above three quarters of eight: as many files are open."""
    monkeypatch.setattr(web_server, "raise_descriptor_limit", lambda: 8)
    with make_server(storage, settings(tmp_path)) as server, Clients(server) as clients:
        assert not is_answered(clients.open())
    monkeypatch.setattr(web_server, "raise_descriptor_limit", lambda: 4000)
    with make_server(storage, settings(tmp_path)) as server, Clients(server) as clients:
        assert is_answered(clients.open())


class Refusing(socket.socket):
    """Listens, and fails to accept for want of what an error number says."""

    def fail(self, *codes: int) -> None:
        self.codes = iter(codes)
        self.tries = 0

    def accept(self) -> Any:
        self.tries += 1
        if code := next(self.codes, None):
            raise OSError(code, os.strerror(code))
        return super().accept()


def server_that_fails_to_accept(
    storage: Storage, folder: Path, *codes: int
) -> tuple[DashboardServer, Refusing]:
    server = make_server(storage, settings(folder))
    listening = Refusing(fileno=server._socket.detach())
    listening.setblocking(False)
    listening.fail(*codes)
    server._socket = listening
    return server, listening


def turn(server: DashboardServer, times: int) -> None:
    """Lets the server look at its sockets that often at least."""
    for _ in range(times):
        turned = threading.Event()
        server._loop.call_soon_threadsafe(turned.set)
        assert turned.wait(30)


@pytest.mark.parametrize("code", sorted(connections._EXHAUSTED))
def test_a_connection_that_cannot_be_accepted_is_told_once_and_not_tried_in_a_loop(
    storage: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
    code: int,
) -> None:
    monkeypatch.setattr(connections, "_PAUSE_SECONDS", 3600.0)
    server, listening = server_that_fails_to_accept(storage, tmp_path, *[code] * 1000)
    with server, Clients(server) as clients:
        clients.open()
        turn(server, 50)
        assert listening.tries == 1
    monkeypatch.setattr(connections, "_PAUSE_SECONDS", 0.01)
    said.clear()
    server, listening = server_that_fails_to_accept(storage, tmp_path, *[code] * 5)
    with server:
        assert healthy(server)
    assert listening.tries > 5
    (line,) = said
    assert line == (
        f"The dashboard cannot accept connections ({os.strerror(code)}); it tries again every "
        "second. A higher limit of open files (ulimit -n) helps."
    )


def test_a_connection_that_ended_in_the_queue_is_no_trouble_of_the_others(
    storage: Storage, tmp_path: Path, said: list[str]
) -> None:
    codes = errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EINVAL
    server, listening = server_that_fails_to_accept(storage, tmp_path, *codes)
    with server:
        assert healthy(server)
    assert listening.tries > len(codes)
    assert said == []


def test_connections_that_never_finish_tls_give_way_too(
    storage: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
) -> None:
    monkeypatch.setattr(web_server, "MOST_OF_AN_ADDRESS", 4)
    cert, key = certificate(tmp_path)
    chosen = settings(tmp_path, certificate=cert, key=key, users_file=write_users(tmp_path))
    context = ssl.create_default_context(cafile=cert)
    with make_server(storage, chosen) as server, Clients(server) as clients:
        for number in range(20):
            client = clients.open()
            if number % 3 == 0:
                client.sendall(b"\x16\x03\x01")
            if number % 3 == 1:
                client.close()
        connection = http.client.HTTPSConnection(
            "localhost", server.port, context=context, timeout=30
        )
        with contextlib.closing(connection):
            connection.request("GET", "/healthz")
            assert connection.getresponse().read() == b"ok\n"
    assert said == []


@pytest.mark.parametrize(
    ("address", "owner"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2::7", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::8", "2001:db8:1:2::/64"),
        ("not-an-address", "not-an-address"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_a_host_of_ipv6_counts_with_its_whole_network(address: str, owner: str) -> None:
    assert counted_address(address) == owner


def test_the_share_of_connections_follows_from_the_descriptors() -> None:
    server = LimitedServer(lambda request: None)
    for descriptors, most, kept_free in (
        (256, 64, 192),
        (1024, 256, 768),
        (65536, 512, 49152),
    ):
        server.limit(descriptors=descriptors, say=print)
        assert (server._most, server._first_kept_free) == (most, kept_free)
        assert server._most_of_an_address == min(most, connections.MOST_OF_AN_ADDRESS)


def test_the_descriptor_limit_is_raised_to_the_hard_one_and_never_lowered() -> None:
    code = (
        "import resource, sys; from tuner.dashboard.connections import raise_descriptor_limit\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "soft = min(hard, 300)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, soft))\n"
        "assert raise_descriptor_limit() == soft\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, soft)\n"
        "assert raise_descriptor_limit() == soft\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert raise_descriptor_limit() >= before
