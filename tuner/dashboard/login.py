"""Logging in and out, by a form and as JSON."""

from __future__ import annotations

import hmac
import math
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from werkzeug.datastructures import Authorization
from werkzeug.exceptions import (
    BadRequest,
    HTTPException,
    ServiceUnavailable,
    TooManyRequests,
    Unauthorized,
)
from werkzeug.wrappers import Response

from tuner.dashboard.http import LOGIN, METRICS, ROOT, RequestError
from tuner.dashboard.policy import Policy, Refusals
from tuner.dashboard.sessions import Visitor
from tuner.dashboard.users import MAX_PASSWORD, LoginsBusyError, Users
from tuner.dashboard.web import Request, Routes, json_answer, page, to_page
from tuner.storage.audit import LOG_IN

if TYPE_CHECKING:
    from wsgiref.types import WSGIEnvironment

_REMEMBERED = 100  #: passwords that were right

routes = Routes()


@routes.add("GET", "/login")
def show_login(request: Request) -> Response:
    return _login_page(request, request.args.get("next", ""))


@routes.add("POST", "/login")
def log_in(request: Request) -> Response:
    name, there = request.form.get("name", ""), request.form.get("next", "")
    try:
        token = _begin_session(request, name, request.form.get("password", ""))
    except (Unauthorized, TooManyRequests, ServiceUnavailable) as error:
        code, said = error.code, error.description or ""
        response = _login_page(request, there, code=code, said=said, name=name)
        response.headers.extend(headers_of(error))
        return response
    return _with_cookie(request, to_page(_local(there)), token)


@routes.add("POST", "/logout")
def log_out(request: Request) -> Response:
    response = _without_session(request, to_page(LOGIN))
    response.headers["Clear-Site-Data"] = '"cache"'
    return response


@routes.add("POST", "/api/login")
def log_in_as_json(request: Request) -> Response:
    document = request.document()
    name, password = document.get("name"), document.get("password")
    if not isinstance(name, str) or not isinstance(password, str):
        raise BadRequest('Send {"name": "...", "password": "..."}.')
    try:
        (name + password).encode()
    except UnicodeEncodeError:  # nothing hashes it, and no database takes it
        raise BadRequest("name or password holds half of a surrogate pair.") from None
    token = _begin_session(request, name, password)
    users = request.site.policy.users
    role = None if users is None else users.role(name)
    return _with_cookie(request, json_answer({"name": name, "role": role}), token)


@routes.add("POST", "/api/logout")
def log_out_as_json(request: Request) -> Response:
    return _without_session(request, json_answer({}))


def headers_of(error: HTTPException) -> dict[str, str]:
    """The headers of an error, such as Retry-After, beside those of its body."""
    return {name: value for name, value in error.get_headers() if name != "Content-Type"}


def _login_page(
    request: Request, there: str, *, code: int = 200, said: str = "", name: str = ""
) -> Response:
    return page(request, "login", code=code, there=_local(there), said=said, name=name[:64])


def _begin_session(request: Request, name: str, password: str) -> str:
    """The token of a new session; every attempt is recorded.

    Raises:
        BadRequest: No login is asked for.
        TooManyRequests: There were too many attempts.
        ServiceUnavailable: Too many passwords are being checked.
        Unauthorized: The name or the password is wrong.
    """
    site, address = request.site, request.remote_addr or ""
    if site.policy.users is None or site.sessions is None:
        raise BadRequest("This dashboard asks for no login.")
    check = _PasswordCheck(site.policy, site.refusals)
    check(site.policy.users, name, password, address=address, action=LOG_IN)
    site.storage.audit.record(who=name, address=address, action=LOG_IN, status=200)
    return site.sessions.begin(name)


@dataclass(frozen=True, slots=True)
class _PasswordCheck:
    """Checks a password, within the limits of logging in."""

    policy: Policy
    refusals: Refusals

    def __call__(
        self, users: Users, name: str, password: str, *, address: str, action: str
    ) -> None:
        """Checks it, and records a failure.

        Raises:
            TooManyRequests: There were too many attempts.
            ServiceUnavailable: Too many passwords are being checked.
            Unauthorized: The name or the password is wrong.
        """
        try:
            self._check(users, name, password, address)
        except HTTPException as error:
            code, said = error.code or 500, error.description or ""
            self.refusals.add(who=name, address=address, action=action, status=code, detail=said)
            raise
        self.policy.limit.succeeded(name, address)

    def _check(self, users: Users, name: str, password: str, address: str) -> None:
        limit = self.policy.limit
        wait = math.ceil(limit.claim(name, address))
        if wait:
            raise TooManyRequests(f"Too many tries; wait {wait} seconds.", retry_after=wait)
        try:
            is_right = len(password) <= MAX_PASSWORD and users.check(name, password, address)
        except LoginsBusyError as error:
            limit.take_back(name, address)
            raise ServiceUnavailable(str(error), retry_after=1) from error
        if not is_right:
            raise Unauthorized("Wrong user name or password.")


class Scrapers:
    """Users who send name and password with each request (basic auth), as Prometheus does.

    A password that was right is not hashed again until it changes: scrypt takes 0.1 s of a core.
    """

    def __init__(self, policy: Policy, refusals: Refusals) -> None:
        self._policy = policy
        self._check = _PasswordCheck(policy, refusals)
        self._key = secrets.token_bytes(32)
        self._right: OrderedDict[bytes, None] = OrderedDict()

    def visitor(self, environ: WSGIEnvironment) -> Visitor | None:
        """The user; None where a request has no name and password.

        Raises:
            RequestError: They are wrong, or there were too many attempts.
        """
        users = self._policy.users
        sent = Authorization.from_header(environ.get("HTTP_AUTHORIZATION"))
        if users is None or sent is None or sent.type != "basic":
            return None
        name, password = sent.username or "", sent.password or ""
        secret = "\0".join((name, password, users.password_mark(name)))
        proof = hmac.digest(self._key, secret.encode("utf-8", "surrogatepass"), "sha256")
        if proof not in self._right:
            address = str(environ.get("REMOTE_ADDR", ""))
            try:
                self._check(users, name, password, address=address, action=f"GET {METRICS}")
            except HTTPException as error:
                status, said = f"{error.code} {error.name}", error.description or ""
                raise RequestError(status, said, list(headers_of(error).items())) from error
            self._right[proof] = None
            while len(self._right) > _REMEMBERED:
                self._right.popitem(last=False)
        role = users.role(name)
        return None if role is None else Visitor(name=name, role=role)


def _with_cookie(request: Request, response: Response, token: str) -> Response:
    response.set_cookie(value=token, **_cookie(request))
    return response


def _without_session(request: Request, response: Response) -> Response:
    """Ends the session of the request, on the server and in the browser."""
    cookie, sessions = _cookie(request), request.site.sessions
    token = request.cookies.get(cookie["key"])
    if token and sessions is not None:
        sessions.end(token)
    response.delete_cookie(**cookie)
    return response


def _cookie(request: Request) -> dict[str, Any]:
    policy = request.site.policy
    return {
        "key": policy.cookie(request.environ),
        "path": "/",
        "httponly": True,
        "samesite": "Strict",
        "secure": policy.secure,
    }


def _local(there: str) -> str:
    """Where to go after the login: a page of this server, never another site's."""
    plain = there.startswith("/") and not there.startswith(("//", "/\\"))
    return there if plain and there.isprintable() and "\\" not in there else ROOT
