"""Where a Dask scheduler is: its address, its scheduler file, its certificates."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from distributed import Security
from distributed.comm.core import connect

from tuner.commands import command
from tuner.errors import ClusterError

_SCHEMES = ("tcp", "tls")
DEFAULT_PORT = 8786  #: Dask's own


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """What both sides show each other: --tls-ca, --tls-cert, --tls-key."""

    ca: Path  #: certificates of the authorities that are trusted
    cert: Path  #: of this program
    key: Path  #: of that certificate, private

    def __post_init__(self) -> None:
        for option, path in (("ca", self.ca), ("cert", self.cert), ("key", self.key)):
            if not path.is_file():
                raise ClusterError(f"--tls-{option} {path}: no such file.")

    def security(self) -> Security:
        return Security(
            require_encryption=True,
            tls_ca_file=str(self.ca),
            **{
                f"tls_{role}_{kind}": str(path)
                for role in ("client", "worker", "scheduler")
                for kind, path in (("cert", self.cert), ("key", self.key))
            },
        )


def tls_files(ca: Path | None, cert: Path | None, key: Path | None) -> TlsFiles | None:
    """The three options together; None where none is given.

    Raises:
        ClusterError: Only some of them are given, or a file is missing.
    """
    if ca is None and cert is None and key is None:
        return None
    if ca is None or cert is None or key is None:
        raise ClusterError("TLS needs all three files: --tls-ca, --tls-cert and --tls-key.")
    return TlsFiles(ca=ca, cert=cert, key=key)


class SchedulerFileMissingError(ClusterError):
    """The scheduler writes it when it starts: it may come."""


class SchedulerAwayError(ClusterError):
    """Nothing listens at its address: it may come."""


def scheduler_address(cluster: str, tls: TlsFiles | None = None) -> str:
    """The address that --cluster means; a scheduler file is read each time.

    Raises:
        ClusterError: It is neither an address nor a scheduler file, or does not fit the
            certificates.
    """
    address = _given_address(cluster) or _address_in(Path(cluster))
    place = cluster if cluster == address else f"{address} (of {cluster})"
    if address.startswith("tls://") and tls is None:
        raise ClusterError(
            f"{place} wants TLS: give --tls-ca, --tls-cert and --tls-key, the files that its "
            "scheduler was started with."
        )
    if address.startswith("tcp://") and tls is not None:
        raise ClusterError(
            f"{place} does not speak TLS, so --tls-ca, --tls-cert and --tls-key would protect "
            "nothing. Start the scheduler with its certificates and name its tls:// address, or "
            "leave the three options out."
        )
    return address


def _given_address(cluster: str) -> str | None:
    if "://" not in cluster:
        return None
    scheme, _, rest = cluster.partition("://")
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        host, port = None, 0
    if scheme not in _SCHEMES or not host:
        raise ClusterError(
            f"--cluster {cluster}: no address of a Dask scheduler; one looks like "
            f"tcp://host:{DEFAULT_PORT} or tls://host:{DEFAULT_PORT}."
        )
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _address_in(path: Path) -> str:
    remedy = "It is what `dask scheduler --scheduler-file FILE` writes"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SchedulerFileMissingError(
            f"--cluster {path}: no such scheduler file, and no address either (tcp://host:"
            f"{DEFAULT_PORT}). {remedy}."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"--cluster {path}: cannot be read ({error}). {remedy}.") from None
    try:
        address = json.loads(text)["address"]
        return _given_address(address) or _no_address()
    except (ValueError, KeyError, TypeError):
        raise ClusterError(
            f"--cluster {path}: no scheduler file, for it is not JSON with an address. {remedy}."
        ) from None


def _no_address() -> str:
    raise ValueError


def exposure(address: str) -> str | None:
    """A warning, where whoever reaches this address could run programs on it."""
    if address.startswith("tls://") or is_loopback(address):
        return None
    return (
        f"WARNING: {address} can be reached beyond this machine, and without TLS. Dask runs "
        "whatever code it is sent: anyone who can reach the scheduler or a worker can run "
        "programs as you. Start the scheduler with TLS and give --tls-ca, --tls-cert and "
        "--tls-key, or keep it in a network that only you can reach."
    )


def is_loopback(address: str) -> bool:
    """Whether it can be reached from this machine alone."""
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_scheduler(cluster: str, tls: TlsFiles | None, *, patience_seconds: float) -> str:
    """The address that --cluster means, where a Dask scheduler answers.

    Dask's client waits without end at a port that accepts and stays silent (distributed issue
    8071): so it is made only after the scheduler has said what it is.

    Args:
        cluster: As `scheduler_address` takes it.
        tls: What the scheduler asks of who connects.
        patience_seconds: For the connection, and once more for the answer.

    Raises:
        SchedulerAwayError: Nothing listens there.
        ClusterError: What listens there is not a scheduler, or does not talk to us; or as
            `scheduler_address`.
    """
    address = scheduler_address(cluster, tls)
    place = address if address == cluster else f"{address} (of {cluster})"
    parts = urlsplit(address)
    target: tuple[Any, Any] = (parts.hostname, parts.port)
    try:
        # First: Dask tries a port where nothing listens again and again.
        socket.create_connection(target, timeout=patience_seconds).close()
    except (OSError, UnicodeError):  # the latter of a host that no name can be
        raise SchedulerAwayError(f"No Dask scheduler answers at {place}.") from None
    try:
        asyncio.run(_greet(address, tls, patience_seconds))
    except Exception as error:
        raise ClusterError(
            f"Something answers at {place}, but no Dask scheduler that can be spoken to"
            f"{'' if tls else ' without TLS'}: {_in_words(error, patience_seconds)}"
        ) from error
    return address


async def _greet(address: str, tls: TlsFiles | None, patience_seconds: float) -> None:
    """Asks what listens there, and has it answer as a scheduler does."""
    security = Security() if tls is None else tls.security()
    # The outer limit is for what Dask's own does not cover: half a message, a name server.
    async with asyncio.timeout(patience_seconds + 1.0):
        comm = await connect(
            address,
            timeout=patience_seconds,
            deserialize=False,
            **security.get_connection_args("client"),
        )
        try:
            await comm.write({"op": "identity", "n_workers": 0, "reply": True})
            answer = await comm.read()
        finally:
            comm.abort()
    if not isinstance(answer, dict) or answer.get("type") != "Scheduler":
        raise OSError("it speaks as Dask does, but is another part of it than a scheduler")


def _in_words(error: Exception, patience_seconds: float) -> str:
    if isinstance(error, TimeoutError) or "Timed out" in str(error):
        return (
            f"it accepted the connection, and did not answer within {patience_seconds:.0f} s. Is "
            "this the port of Dask's dashboard, or another program's?"
        )
    deepest = error.__cause__ or error
    if not isinstance(deepest, OSError):  # of whoever tried to read the answer as Dask's
        return "what it says is not Dask's protocol"
    return (str(deepest) or type(deepest).__name__).splitlines()[0]


def worker_command(cluster: str, tls: TlsFiles | None) -> str:
    """The command that adds a worker."""
    files = (
        () if tls is None else ("--tls-ca", tls.ca, "--tls-cert", tls.cert, "--tls-key", tls.key)
    )
    return command("worker", "--cluster", cluster, *files)
