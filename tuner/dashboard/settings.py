"""Where the server listens, whom it lets in, and the files that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tuner.artifacts import DEFAULT_ROOT, DEFAULT_STUDIES_FOLDER
from tuner.dashboard.addresses import allowed_hosts, is_loopback_host, networks
from tuner.dashboard.policy import Policy
from tuner.dashboard.users import Users
from tuner.errors import TunerError

_LOOPBACK = ("127.0.0.0/8", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """The folders that the pages read."""

    artifacts: Path = DEFAULT_ROOT  #: checkpoints, weights, development data and reports
    studies: Path = DEFAULT_STUDIES_FOLDER  #: its study files may be launched
    data: Path | None = None  #: uploaded study files may name the data files in it; None: none


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the dashboard is served."""

    host: str = "127.0.0.1"  #: address to listen on
    port: int = 8080  #: to listen on; 0 takes a free one
    users_file: Path | None = None  #: None: no login, which only a loopback address allows
    certificate: Path | None = None  #: PEM; the server then speaks TLS itself
    key: Path | None = None  #: of the certificate, PEM, without a password
    behind_proxy: bool = False  #: a proxy terminates TLS and forwards the client's address
    proxies: Sequence[str] = ()  #: its addresses or networks; by default this machine's
    trust_network: bool = False  #: plain HTTP beyond loopback: the network is private
    allow_hosts: Sequence[str] = ()  #: host names that requests may have, beside the usual ones
    folders: Folders = field(default_factory=Folders)  #: what the pages read


def make_policy(settings: Settings) -> Policy:
    """Who may come in, from where.

    Raises:
        TunerError: Strangers could reach a dashboard that asks for no login, or could listen.
    """
    host = settings.host
    if not is_loopback_host(host):
        if settings.users_file is None:
            raise TunerError(
                f"--host {host}: whoever reaches that address would see and change every study, "
                "so it needs a login: `tuner dashboard add-user NAME --role editor` makes the "
                "users file. Without one, leave --host out and take an SSH tunnel "
                "(ssh -L 8080:127.0.0.1:8080 USER@MACHINE)."
            )
        if settings.certificate is None and not (settings.behind_proxy or settings.trust_network):
            raise TunerError(
                f"--host {host}: passwords would cross the network in the clear. Give a "
                "certificate (--tls-cert and --tls-key), or say what protects it: --behind-proxy "
                "(a proxy with TLS is in front of it), or --trust-network (the network is "
                "private: a container whose port is published on 127.0.0.1)."
            )
    if settings.behind_proxy and settings.users_file is None:
        raise TunerError(
            "--behind-proxy: whoever reaches the proxy would see and change every study. "
            "`tuner dashboard add-user NAME --role editor` makes the users file."
        )
    if settings.proxies and not settings.behind_proxy:
        raise TunerError("--trust-proxy says where a proxy is: give --behind-proxy as well.")
    proxies = networks(settings.proxies or (_LOOPBACK if settings.behind_proxy else ()))
    if settings.behind_proxy and not settings.proxies and not is_loopback_host(host):
        raise TunerError(
            f"--host {host} --behind-proxy: name the proxy's address (--trust-proxy 10.0.0.2, or "
            "its network, 10.0.0.0/24). Only what comes from there is believed when it says who "
            "asks; the rest is refused, since it would come past the proxy, in the clear."
        )
    return Policy(
        users=None if settings.users_file is None else Users(settings.users_file),
        hosts=allowed_hosts(host, settings.allow_hosts),
        secure=settings.certificate is not None or settings.behind_proxy,
        proxies=proxies,
    )
