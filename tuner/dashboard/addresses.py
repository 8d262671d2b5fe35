"""Where requests come from: addresses, networks and hosts."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Collection

from tuner.errors import TunerError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_LOOPBACK_HOSTS = frozenset(("127.0.0.1", "localhost", "::1"))
#: Host headers of a browser on this machine, or at the other end of an SSH tunnel; without a port.
LOOPBACK_NAMES = frozenset(("127.0.0.1", "localhost", "[::1]"))


def counted_address(address: str) -> str:
    """The address that limits count; of IPv6 its /64 network, which one client has as a whole."""
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_address(address.partition("%")[0])
        if isinstance(found, ipaddress.IPv6Address):
            return str(found.ipv4_mapped or ipaddress.ip_network((int(found), 64), strict=False))
    return address


def networks(given: Collection[str]) -> tuple[Network, ...]:
    """Addresses and networks (10.0.0.0/8), as `--trust-proxy` names them.

    Raises:
        TunerError: One of them is neither.
    """
    found: list[Network] = []
    for text in given:
        try:
            found.append(ipaddress.ip_network(text.strip()))
        except ValueError as error:
            raise TunerError(
                f"--trust-proxy {text!r}: {error}; write the proxy's address, such as 10.0.0.2, "
                "or its network, such as 10.0.0.0/24."
            ) from error
    return tuple(found)


def is_in(address: str, network: Network) -> bool:
    """Whether an address is in a network; an IPv4 address may be written as IPv6 (::ffff:...)."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return (getattr(found, "ipv4_mapped", None) or found) in network


def is_loopback_host(host: str) -> bool:
    """Whether a server that listens on this address is reached from its own machine alone."""
    if host in _LOOPBACK_HOSTS:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed_hosts(listening_on: str, also: Collection[str]) -> frozenset[str]:
    """Names that the Host header may have: this machine's, the address, and those given.

    Raises:
        TunerError: One of them is not a host name.
    """
    for name in also:
        if not re.fullmatch(r"[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]", name):
            raise TunerError(
                f"--allow-host {name!r} is not a host name: write it without https:// and without "
                "a port, such as tuner.example.org."
            )
    given = {name.lower() for name in also}
    if listening_on not in ("0.0.0.0", "::", ""):  # noqa: S104 - they stand for every address
        given.add(f"[{listening_on}]" if ":" in listening_on else listening_on.lower())
    return LOOPBACK_NAMES | given
