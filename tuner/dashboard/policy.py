"""Who may do what on the dashboard: users, sessions, login limits, and where a request is from.

Nothing here knows a study. `tuner.dashboard.guard` asks these questions of every request, before
any page or any part of Optuna's dashboard sees it.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tuner.dashboard.addresses import LOOPBACK_NAMES, Network, is_in
from tuner.dashboard.sessions import COOKIE, LoginLimit
from tuner.dashboard.users import Users

READING = frozenset(("GET", "HEAD"))
WRITING = frozenset(("POST", "PUT", "DELETE"))


_REFUSALS = 100  #: in `_REFUSALS_SECONDS` that are recorded one by one
_REFUSALS_SECONDS = 300.0


# --- login limits ---


class Refusals:
    """Failed logins and refused requests, for the record of changes.

    A flood of them must not fill the database: of more than 100 in 5 minutes, the number is
    recorded with the next one that is recorded.
    """

    def __init__(
        self, record: Callable[..., object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._record = record
        self._clock = clock
        self._lock = threading.Lock()
        self._recorded: list[float] = []
        self._left_out = 0

    def add(self, *, who: str, address: str, action: str, status: int, detail: str) -> None:
        """Records one refusal: `AuditLog.record` has what the arguments mean."""
        now = self._clock()
        with self._lock:
            self._recorded = [when for when in self._recorded if now - when < _REFUSALS_SECONDS]
            if len(self._recorded) >= _REFUSALS:
                self._left_out += 1
                return
            self._recorded.append(now)
            left_out, self._left_out = self._left_out, 0
        if left_out:
            detail += f" ({left_out} more refusals before this one were not recorded)"
        self._record(who=who, address=address, action=action, status=status, detail=detail)


# --- where requests come from ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the server was started with; who may come in, from where."""

    users: Users | None = None  #: None: on this machine, without a login
    hosts: Collection[str] = LOOPBACK_NAMES  #: names in the Host header, lower case, no port
    secure: bool = False  #: the browser speaks TLS, with us or with the proxy before us
    #: Where the proxy is that speaks TLS and says who asks; empty where there is none. Other
    #: addresses are refused: they would come past it, in the clear.
    proxies: Collection[Network] = ()
    #: Who changes things where nobody logs in.
    local_name: str = "local"
    limit: LoginLimit = field(default_factory=LoginLimit)

    def cookie(self, environ: Mapping[str, Any]) -> str:
        """The name of the session's cookie, under the address that a request asks for.

        With TLS it is one that browsers take from this host alone: a neighbour under the same
        domain could otherwise plant a session of its own. Browsers do not tell the ports of a
        host apart, so the name does: two dashboards would else end each other's sessions.
        """
        port = re.search(r":(\d{1,5})$", str(environ.get("HTTP_HOST", "")))
        number = int(port[1]) if port else 443 if self.secure else 80
        return f"{'__Host-' if self.secure else ''}{COOKIE}_{number}"

    def is_proxy(self, address: str) -> bool:
        """Whether a connection from this address is our proxy's."""
        return any(is_in(address, network) for network in self.proxies)

    def names_host(self, environ: Mapping[str, Any]) -> bool:
        """Whether the request asks for a name of ours: one whose name was pointed here does not."""
        host = str(environ.get("HTTP_HOST", "")).lower()
        return re.sub(r":\d{1,5}$", "", host) in self.hosts

    def is_same_origin(self, environ: Mapping[str, Any]) -> bool:
        """Whether a writing request is from our own pages, or from no page at all.

        Browsers name the origin of every such request; programs such as curl name none.
        """
        if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in ("same-origin", "none"):
            return False
        origin = environ.get("HTTP_ORIGIN")
        scheme = "https" if self.secure else "http"
        return origin is None or origin == f"{scheme}://{environ.get('HTTP_HOST', '')}"
