"""Connections to the dashboard: how many there may be, and which one is closed for the next.

A connection costs a file descriptor, and the process that serves the dashboard may also run
studies: its clients must not take the descriptors that checkpoints, the database and the workers
need. So connections are limited, in total and for each address, and a share of the descriptors is
not used for any.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPConnection, HTTPMessageDelegate
from tornado.iostream import IOStream

from tuner.dashboard.addresses import counted_address
from tuner.every import Every

MOST = 512  #: connections at once; 50 browsers open 6 each
MOST_OF_AN_ADDRESS = 128  #: of one IPv4 address, or of one /64 network of IPv6
_MOST_DESCRIPTORS = 65_536  #: that the process asks for; a hard limit may be a billion
_SHARE = 4  #: connections take at most one in `_SHARE` descriptors, and as many are kept free
_AT_ONCE = 128  #: connections accepted in one turn of the event loop
_PAUSE_SECONDS = 1.0  #: until accepting is tried again after the system refused it
_LOG_SECONDS = 600.0  #: until the same problem is logged again

#: The process or the machine has no descriptor or memory left for a connection.
_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


def raise_descriptor_limit() -> int:
    """Lets this process open as many files as its hard limit allows, up to 65,536.

    Processes that it starts inherit that.

    Returns:
        How many files it may open now.
    """
    try:
        import resource  # noqa: PLC0415 - not every system has it
    except ImportError:
        return 8192  # what Windows' C library allows at most; sockets are not counted there
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return _MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):  # macOS allows fewer than its hard limit says
        return soft
    return most


@dataclass(slots=True, eq=False)
class _Connection:
    stream: IOStream  #: Tornado's, with its socket
    owner: str  #: its address, or the network that is counted as one
    #: Since when it waits for its next request, by the monotonic clock, seconds.
    waits_since: float = field(default_factory=time.monotonic)
    answering: int = 0  #: requests of it that are being answered


class LimitedServer(HTTPServer):
    """Tornado's HTTP server with a limited number of connections.

    A new connection is accepted as long as another one can be closed for it: if its address has
    reached its limit, the one of that address that has waited longest for a request; if the total
    is reached, the longest-waiting one of the address that holds most. A client that keeps
    opening connections thus closes its own. A connection whose request is being answered is not
    closed.
    """

    def limit(
        self,
        *,
        descriptors: int,
        say: Callable[[str], None],
        of_an_address: int = MOST_OF_AN_ADDRESS,
        is_shared: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """Sets the limits; before `listen_on`.

        Args:
            descriptors: Files that this process may open.
            say: Logs a line if connections cannot be accepted.
            of_an_address: Connections of one address, or of one /64 network of IPv6.
            is_shared: Whether an address stands for many visitors, as a proxy's does, so that
                only the number of all connections limits it.
        """
        self._most = max(1, min(MOST, descriptors // _SHARE))
        self._most_of_an_address = min(self._most, of_an_address)
        self._is_shared = is_shared
        # The system gives out the lowest number that is free, so a number from here on says
        # that as many files are open, whoever opened them.
        self._first_kept_free = descriptors - descriptors // _SHARE
        self._say = say
        self._log_pause = Every(_LOG_SECONDS)
        self._open: dict[IOStream, _Connection] = {}
        self._listening: socket.socket | None = None

    def listen_on(self, listening: socket.socket) -> None:
        """Accepts connections of a socket that listens and does not block, until `stop`."""
        self._listening = listening
        asyncio.get_running_loop().add_reader(listening, self._accept)

    def stop(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            asyncio.get_running_loop().remove_reader(listening)
        super().stop()

    @contextmanager
    def answering(self, stream: IOStream) -> Iterator[None]:
        """A block that answers a request of a connection, which is not closed meanwhile."""
        connection = self._open.get(stream)
        if connection is None:  # it was closed meanwhile
            yield
            return
        connection.answering += 1
        try:
            yield
        finally:
            connection.answering -= 1
            connection.waits_since = time.monotonic()

    # --- what Tornado calls ---

    def handle_stream(self, stream: IOStream, address: tuple[str, int]) -> None:
        self._open[stream] = _Connection(stream, counted_address(address[0]))
        super().handle_stream(stream, address)

    def start_request(
        self, server_conn: object, request_conn: HTTPConnection
    ) -> HTTPMessageDelegate:
        connection = self._open.get(getattr(server_conn, "stream", None))  # type: ignore[arg-type]
        if connection is not None:
            connection.waits_since = time.monotonic()
        return super().start_request(server_conn, request_conn)

    def on_close(self, server_conn: object) -> None:
        self._open.pop(getattr(server_conn, "stream", None), None)  # type: ignore[arg-type]
        super().on_close(server_conn)

    # --- accepting ---

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            if self._listening is None:
                return
            try:
                connection, address = self._listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                # A connection that ended in the queue is an error of that one alone.
                if error.errno in _EXHAUSTED:
                    self._pause(error)
                    return
                continue
            if not self._make_room(address[0], connection.fileno()):
                connection.close()
                continue
            try:
                self._handle_connection(connection, address)
            except OSError:  # it was closed before TLS could begin
                connection.close()

    def _make_room(self, address: str, descriptor: int) -> bool:
        """Whether one more connection may be accepted; closes another one for it if need be."""
        owner = counted_address(address)
        open_ = [one for one in self._open.values() if not one.stream.closed()]
        held = Counter(one.owner for one in open_)
        if held[owner] >= self._most_of_an_address and not self._is_shared(address):
            return self._close_one([one for one in open_ if one.owner == owner])
        if len(open_) >= self._most or descriptor >= self._first_kept_free:
            by_size = sorted(open_, key=lambda one: held[one.owner], reverse=True)
            for largest in dict.fromkeys(one.owner for one in by_size):
                if self._close_one([one for one in open_ if one.owner == largest]):
                    return True
            return False
        return True

    def _close_one(self, open_: list[_Connection]) -> bool:
        """Closes the one that has waited longest for a request; False if none waits."""
        waiting = [one for one in open_ if not one.answering]
        if not waiting:
            return False
        min(waiting, key=lambda one: one.waits_since).stream.close()
        return True

    def _pause(self, error: OSError) -> None:
        """Accepts nothing for a moment: the socket stays readable, and the loop would spin."""
        listening = self._listening
        if listening is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening)
        self._close_one(list(self._open.values()))

        def resume() -> None:
            if self._listening is listening:
                loop.add_reader(listening, self._accept)

        loop.call_later(_PAUSE_SECONDS, resume)
        if self._log_pause.is_due():
            self._say(
                f"The dashboard cannot accept connections ({error.strerror}); it tries again "
                "every second. A higher limit of open files (ulimit -n) helps."
            )
