"""Free ports that nobody takes by accident between two binds."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port on which nobody listens, below those that the system gives to clients.

    A server of a test comes back at the same port. Were it one of the clients' ports, a
    connection of anybody could have taken it meanwhile, even one that was looking for it.
    """
    choose = random.SystemRandom()
    while True:
        port = choose.randrange(15_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
