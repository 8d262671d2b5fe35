"""Who may do what, from where: the settings by which the guard decides, and the log of refusals.

`tuner.dashboard.guard` checks every request by it, before a page or Optuna's dashboard sees it.
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

_REFUSALS = 100  #: that are recorded one by one in `_REFUSALS_SECONDS`
_REFUSALS_SECONDS = 300.0


class Refusals:
    """Failed logins and refused requests, for the record of changes.

    They must not fill the database: beyond 100 in 5 minutes they are counted, and the number is
    recorded with the next one.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the server was started with; who may come in, from where."""

    users: Users | None = None  #: who may log in; None: no login, on this machine alone
    hosts: Collection[str] = LOOPBACK_NAMES  #: names in the Host header, lower case, no port
    secure: bool = False  #: the browser speaks TLS, with us or with the proxy
    #: Addresses of the proxy that terminates TLS and forwards the client's address; empty: there
    #: is none. Requests from elsewhere are refused: they came past it, unencrypted.
    proxies: Collection[Network] = ()
    local_name: str = "local"  #: the user in the record of changes if no login is asked for
    limit: LoginLimit = field(default_factory=LoginLimit)  #: of failed logins

    def cookie(self, environ: Mapping[str, Any]) -> str:
        """The name of the session's cookie for the host and port of a request.

        With TLS it is one that browsers accept from this host alone: another host of the same
        domain could otherwise set a session of its own. Browsers send cookies to every port of a
        host, so the name has the port: two dashboards would else end each other's sessions.
        """
        port = re.search(r":(\d{1,5})$", str(environ.get("HTTP_HOST", "")))
        number = int(port[1]) if port else 443 if self.secure else 80
        return f"{'__Host-' if self.secure else ''}{COOKIE}_{number}"

    def is_proxy(self, address: str) -> bool:
        """Whether a connection from this address is our proxy's."""
        return any(is_in(address, network) for network in self.proxies)

    def names_host(self, environ: Mapping[str, Any]) -> bool:
        """Whether the Host header has a name of ours: after DNS rebinding it does not."""
        host = str(environ.get("HTTP_HOST", "")).lower()
        return re.sub(r":\d{1,5}$", "", host) in self.hosts

    def is_same_origin(self, environ: Mapping[str, Any]) -> bool:
        """Whether a writing request is from our own pages, or from no page at all.

        Browsers send the origin of every such request; programs such as curl send none.
        """
        if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in ("same-origin", "none"):
            return False
        origin = environ.get("HTTP_ORIGIN")
        scheme = "https" if self.secure else "http"
        return origin is None or origin == f"{scheme}://{environ.get('HTTP_HOST', '')}"
