"""The network that tests cut."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest
from proxy import Proxy


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(ConnectionResetError):
            while said := self.request.recv(1024):
                self.request.sendall(said)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        with Proxy(server.server_address[1]) as proxy:
            yield proxy
        server.shutdown()
        thread.join()


def dial(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def echo(link: socket.socket, said: bytes, timeout: float = 5) -> bytes:
    link.settimeout(timeout)
    link.sendall(said)
    return link.recv(1024)


def test_it_forwards_both_ways_and_a_closed_end_closes_the_other(proxy: Proxy) -> None:
    with dial(proxy) as link:
        assert echo(link, b"one") == b"one"
        link.shutdown(socket.SHUT_WR)
        assert link.recv(1024) == b""


def test_a_reset_ends_connections_and_refuses_new_ones_until_it_heals(proxy: Proxy) -> None:
    with dial(proxy) as link:
        assert echo(link, b"one") == b"one"
        proxy.cut("reset")
        with pytest.raises(ConnectionResetError):
            link.recv(1024)
    with pytest.raises(ConnectionRefusedError):
        dial(proxy)
    proxy.heal()
    with dial(proxy) as link:
        assert echo(link, b"two") == b"two"


def test_a_black_hole_keeps_connections_and_forwards_nothing_until_it_heals(proxy: Proxy) -> None:
    with dial(proxy) as old:
        assert echo(old, b"one") == b"one"
        proxy.cut("blackhole")
        with dial(proxy) as new:
            for link in (old, new):
                with pytest.raises(TimeoutError):
                    echo(link, b"late", timeout=0.3)
            proxy.heal()
            for link in (old, new):
                link.settimeout(5)
                assert link.recv(1024) == b"late"
                assert echo(link, b"two") == b"two"


def test_a_black_hole_may_turn_into_a_reset(proxy: Proxy) -> None:
    with dial(proxy) as link:
        assert echo(link, b"one") == b"one"
        proxy.cut("blackhole")
        proxy.cut("reset")
        with pytest.raises(ConnectionResetError):
            link.recv(1024)


def test_a_target_that_is_away_is_a_closed_connection() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with Proxy(nobody.getsockname()[1]) as proxy, dial(proxy) as link:
            assert link.recv(1024) == b""
