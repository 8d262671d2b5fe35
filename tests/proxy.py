"""A network that a test can cut and heal: a TCP proxy before a port of 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from typing import Any, Literal, Self

from ports import free_port

Cut = Literal["reset", "blackhole"]

_CHUNK = 65536  # bytes


class Proxy:
    """Forwards `port` to `target`; a context manager."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self.accepted = 0  # connections so far
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._open = asyncio.Event()  # clear while nothing is forwarded
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        self.heal()
        return self

    def __exit__(self, *exc: object) -> None:
        self.cut("reset")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self, how: Cut) -> None:
        """Cuts the network.

        "reset": connections are reset, new ones refused, as by a host that is down or a firewall
        that says so. "blackhole": connections stay and new ones open, but nothing comes through,
        as where packets are dropped; what was sent arrives after `heal`.
        """
        self._do(self._reset() if how == "reset" else self._swallow())

    def heal(self) -> None:
        self._do(self._heal())

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=20)

    async def _heal(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self._open.set()

    async def _swallow(self) -> None:
        self._open.clear()

    async def _reset(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        # Without a linger time a closed connection is reset, and nothing in it arrives.
        at_once = struct.pack("ii", 1, 0)
        for writer in self._writers:
            with contextlib.suppress(OSError):
                link = writer.get_extra_info("socket")
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            writer.transport.abort()
        links = tuple(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("asyncio starts a task for each connection")
        self._links.add(task)
        writers = [writer]
        self._writers.add(writer)
        try:
            await self._open.wait()
            onward, out = await asyncio.open_connection("127.0.0.1", self._target)
            writers.append(out)
            self._writers.add(out)
            await asyncio.gather(self._pump(reader, out), self._pump(onward, writer))
        except (OSError, asyncio.CancelledError):  # an end is gone, or we cut it
            pass
        finally:
            for one in writers:
                one.transport.abort()
                self._writers.discard(one)
            self._links.discard(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while chunk := await source.read(_CHUNK):
            await self._open.wait()
            sink.write(chunk)
            await sink.drain()
        await self._open.wait()
        with contextlib.suppress(OSError):
            sink.write_eof()
