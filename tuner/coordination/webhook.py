"""Notifies a webhook of how studies end, without delaying them.

The URL of a webhook often holds a token. A study file is stored, shown and exported, so it names an
environment variable that holds the URL; messages have no more of it than its host.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self, get_args
from urllib.parse import urlsplit

import stamina

from tuner.coordination.coordinator import Ending
from tuner.errors import LeaseLostError, StudyInUseError, TunerError, counted, reason_of
from tuner.search.status import StudyStatus, status
from tuner.search.tuned_study import TunedStudy
from tuner.spec.spec import NOTIFY_VARIABLE, NotifyEvent, NotifySettings

EVENTS: tuple[NotifyEvent, ...] = get_args(NotifyEvent)

_TRY_SECONDS = 5.0  #: until an answer is given up
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0  #: between two tries
_PATIENCE_SECONDS = 300.0  #: with a webhook that does not answer
_LAST_SECONDS = 15.0  #: for what is being sent when the process ends
#: Statuses beside 5xx after which another try may succeed: a timeout, too early, too many.
_TEMPORARY = frozenset((408, 425, 429))

Post = Callable[[str, bytes], None]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    """Where notifications go, and of which events."""

    url: str = field(repr=False)  #: http or https; may hold a token
    events: frozenset[NotifyEvent]  #: of which it is notified

    @property
    def host(self) -> str:
        """What may be shown of the URL."""
        return urlsplit(self.url).hostname or ""


def webhook_of(
    settings: NotifySettings | None,
    *,
    given: str | None = None,
    environ: Mapping[str, str] = os.environ,
    say: Say,
) -> Webhook | None:
    """The webhook of a study; None if there is none.

    Args:
        settings: The table [notify] of its study file.
        given: A URL that is used in place of the variable's.
        environ: Holds the URL.
        say: Takes a warning if the table names a variable that is not set.

    Raises:
        TunerError: The URL cannot be used.
    """
    variable = NOTIFY_VARIABLE if settings is None else settings.url_env
    url = given if given is not None else environ.get(variable, "").strip()
    if not url:
        if settings is not None:
            say(
                f"[notify]: the environment variable {variable} is not set here, so no "
                "notification is sent."
            )
        return None
    _check_url(url, "--notify" if given is not None else f"${variable}")
    return Webhook(url=url, events=frozenset(EVENTS if settings is None else settings.on))


def _check_url(url: str, where: str) -> None:
    """Refuses a URL, and does not repeat it: it may hold a token."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or " " in url:
        raise TunerError(f"{where} does not hold a URL such as https://hooks.example.org/token.")
    if parts.username is not None:
        raise TunerError(f"{where}: user and password in the URL are not sent; use a token.")
    if parts.scheme == "http" and not _is_private(host):
        raise TunerError(
            f"{where}: http:// sends the URL's token in the clear to {host}; use https://. "
            "http:// is for this machine and private networks."
        )


def _is_private(host: str) -> bool:
    """Whether a host is this machine or in a private network, as its name or address tells."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith((".internal", ".local", ".svc"))
    return address.is_loopback or (address.is_private and not address.is_unspecified)


class Notifier:
    """Sends notifications, each on a thread of its own, which tries for five minutes.

    As a context manager it waits at the end, for 15 seconds at most.
    """

    def __init__(self, say: Say, *, post: Post | None = None) -> None:
        """Sends nothing yet.

        Args:
            say: Takes a line for each notification that was sent, or could not be.
            post: Sends a body to a URL; raises OSError or HTTPException.
        """
        self._say = say
        self._post = post or _post
        self._lock = threading.Lock()
        self._sending: dict[threading.Thread, str] = {}  # the host to which each thread sends

    def run(self, tuned: TunedStudy, webhook: Webhook | None, run: Callable[[], Ending]) -> Ending:
        """Runs a study, and notifies of its end: "finished", why it was stopped, or an error.

        If another process runs the study, that is not an end of it.
        """
        try:
            ending = run()
        except (StudyInUseError, LeaseLostError):
            raise
        except Exception as error:
            is_ours = isinstance(error, TunerError)
            reason = str(error) if is_ours else f"{type(error).__name__}: {error}"
            self.notify(tuned, webhook, "failed", reason)
            raise
        if ending == "finished":
            self.notify(tuned, webhook, "finished")
        else:
            self.notify(tuned, webhook, "stopped", ending)
        return ending

    def notify(
        self, tuned: TunedStudy, webhook: Webhook | None, event: NotifyEvent, reason: str = ""
    ) -> None:
        """Begins to send; returns at once."""
        if webhook is None or event not in webhook.events:
            return
        try:
            now = status(tuned)
        except Exception:  # noqa: BLE001 - it is sent without the status
            now = None
        body = json.dumps(_document(tuned.name, event, reason, now)).encode()
        thread = threading.Thread(
            target=self._send, args=(webhook, tuned.name, event, body), name="webhook", daemon=True
        )
        thread.start()
        with self._lock:  # several studies may end at once
            alive = {one: host for one, host in self._sending.items() if one.is_alive()}
            self._sending = {**alive, thread: webhook.host}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        until = time.monotonic() + _LAST_SECONDS
        for thread, host in self._sending.items():
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                self._say(f"No notification was sent to {host}: no answer in {_LAST_SECONDS:g} s.")

    def _send(self, webhook: Webhook, study: str, event: NotifyEvent, body: bytes) -> None:
        try:
            for attempt in stamina.retry_context(
                on=_may_succeed_later,
                attempts=None,
                timeout=_PATIENCE_SECONDS,
                wait_initial=_FIRST_PAUSE_SECONDS,
                wait_max=_LONGEST_PAUSE_SECONDS,
                wait_jitter=_FIRST_PAUSE_SECONDS,
            ):
                with attempt:
                    self._post(webhook.url, body)
        except Exception as error:  # noqa: BLE001 - whatever it is, the study goes its way
            self._say(
                f"Study {study}: no notification ({event}) was sent to {webhook.host}: "
                f"{_reason(error)}."
            )
        else:
            self._say(f"Study {study}: notification ({event}) sent to {webhook.host}.")


_PAST: Mapping[NotifyEvent, str] = {
    "finished": "finished",
    "failed": "failed",
    "stopped": "was stopped",
}


def _document(
    study: str, event: NotifyEvent, reason: str, now: StudyStatus | None
) -> dict[str, Any]:
    """What is posted: the status as `tuner status --json` prints it, and what happened."""
    text = f"Study {study} {_PAST[event]}{f' ({reason})' if reason else ''}"
    if now is not None:
        text += f": {now.finished_trials} of {counted(now.budget, 'trial')}"
        if now.best is not None:
            text += f", best validation loss {now.best.value:.4f} (trial {now.best.number})"
    return {
        "event": event,
        "study": study,
        "reason": reason or None,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "text": f"{text}.",
        **({} if now is None else now.to_document()),
    }


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: a POST would become a GET, to a host that the user did not name."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _post(url: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json", "User-Agent": "tuner"}
    request = urllib.request.Request(url, body, headers, method="POST")  # noqa: S310 - it was checked
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        opener.open(request, timeout=_TRY_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
        raise


def _may_succeed_later(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _TEMPORARY or error.code >= 500
    return isinstance(error, OSError | http.client.HTTPException)


def _reason(error: Exception) -> str:
    """The error in a few words, without the URL."""
    if isinstance(error, urllib.error.HTTPError):
        return f"it answers {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        return reason_of(error.reason)
    return type(error).__name__
