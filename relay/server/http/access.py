"""Who may call what, and by which host name. Deny by default: a route without a declared scope is not served."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, get_args

from aiohttp import HttpVersion, HttpVersion10, HttpVersion11, web
from aiohttp.typedefs import Handler

from relay.config import Scope
from relay.errors import UsageError
from relay.server.http.callers import IDENTITY
from relay.server.http.connection import GuardedHandler
from relay.server.http.problems import SERVER, HttpRefusal
from relay.server.http.tokens import Identity, TokenSet, UnauthenticatedError, authenticate

HostRule = Callable[[str], bool]
"""Whether a relay answers for a host name (lower case, without port and brackets)."""

# RFC 9110, section 7.2, and RFC 3986, section 3.2.2: a registered name or IPv4 address, or an IP literal, and a port.
_HOST = re.compile(r"(?:([A-Za-z0-9._~-]{1,255})|\[([0-9A-Fa-f:.]{2,45})\])(?::[0-9]{1,5})?", re.ASCII)


_WHOLE_URL = re.compile(r"[a-z][a-z0-9+.-]*://([^/?#]*)", re.ASCII | re.IGNORECASE)


def host_name(header: str) -> str:
    """The name in a Host header, lower case, without port and brackets.

    Raises:
        HttpRefusal: 400, it is malformed.
    """
    match = _HOST.fullmatch(header)
    if not match:
        raise HttpRefusal(400, "bad_host")
    return (match[1] or match[2]).lower()


def check_request_line(request: web.BaseRequest, allowed_hosts: HostRule | None) -> None:
    """The version, the Host header and, where the target is a whole URL, its host.

    A browser on this machine can be made to send requests to a loopback relay under a foreign name (DNS rebinding):
    `allowed_hosts` refuses them.

    Raises:
        HttpRefusal: 400, 421 or 505.
    """
    if request[VERSION] not in SPOKEN:
        raise HttpRefusal(505, "http_version")
    header = request.headers.get("Host")
    if header is None:
        if request.version == (1, 1) or allowed_hosts is not None:
            raise HttpRefusal(400, "bad_host")
        return
    name = host_name(header)
    if allowed_hosts is not None and not allowed_hosts(name):
        raise HttpRefusal(421, "misdirected")
    if (target := _WHOLE_URL.match(request.raw_path)) and host_name(target[1]) != name:
        raise HttpRefusal(400, "bad_host")


async def check_request(request: web.Request, handler: Handler, allowed_hosts: HostRule | None) -> web.StreamResponse:
    """What holds for every request, known path or not. It stands outside of the application, so that neither routing
    nor `Expect` comes before it.
    """
    check_request_line(request, allowed_hosts)
    expect = request.headers.get("Expect", "100-continue")
    if expect.lower() != "100-continue":
        raise HttpRefusal(417, "expectation")
    return await handler(request)


class Access:
    """Who may call."""

    def __init__(self, tokens: TokenSet, *, required: bool | None = None) -> None:
        self.tokens = tokens
        self.required = bool(len(tokens)) if required is None else required

    def replace(self, tokens: TokenSet) -> None:
        """From the next request on, these tokens count. Once tokens are required, they stay so: a relay does not open
        itself because its last token was taken away.
        """
        self.tokens = tokens
        self.required = self.required or bool(len(tokens))


ACCESS: Final = web.AppKey("access", Access)
DRAINING: Final = web.AppKey("draining", asyncio.Event)
"""Set when the relay begins to stop: long polls answer at once, and readiness says no."""
_ROUTES: Final = web.AppKey("route_scopes", dict[web.AbstractRoute, str])

VERSION: Final = web.RequestKey("version", HttpVersion)
"""Of HTTP, as the request has it."""
SPOKEN: Final = frozenset({HttpVersion10, HttpVersion11})

OPEN: Final = "open"


def guarded_app(access: Access) -> web.Application:
    """An application whose routes are registered with `add`, each with the scope that it asks for."""
    app = web.Application(middlewares=[access_middleware])
    app[ACCESS] = access
    app[DRAINING] = asyncio.Event()
    app[_ROUTES] = {}
    app.on_response_prepare.append(_hide_versions)
    return app


async def _hide_versions(_request: web.BaseRequest, response: web.StreamResponse) -> None:
    response.headers["Server"] = SERVER


def add(
    app: web.Application,
    method: str,
    path: str,
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    scope: Scope | str,
) -> None:
    """Register a route. `scope` is one of the token scopes, or `OPEN` for everybody.

    Raises:
        UsageError: there is no such scope.
    """
    if scope != OPEN and scope not in get_args(Scope):
        raise UsageError(f"{method} {path}: there is no scope {scope!r}")
    app[_ROUTES][app.router.add_route(method, path, handler)] = scope


Routes = tuple[tuple[str, str, Callable[[web.Request], Awaitable[web.StreamResponse]], Scope | str], ...]
"""Method, path, handler and scope of each, as `add` takes them."""


class Routed(Protocol):
    """Handlers of one subject."""

    def routes(self) -> Routes:
        """Every route with the scope that it asks for."""


@dataclass(frozen=True)
class RouteInfo:
    method: str
    path: str
    scope: str | None
    """None: registered past `add`. Such an application is not started."""


def iter_routes(app: web.Application) -> Iterator[RouteInfo]:
    """Every route and its scope, for the sweep that proves what each asks for."""
    scopes = app.get(_ROUTES, {})
    for route in app.router.routes():
        path = route.resource.canonical if route.resource else ""
        yield RouteInfo(route.method, path, scopes.get(route))


def check_routes(app: web.Application) -> None:
    """Deny by default, at start-up.

    Raises:
        UsageError: the application was not made by `guarded_app`, or has a route without a declared scope.
    """
    if ACCESS not in app:
        raise UsageError("the application has no access rules")
    bare = [f"{route.method} {route.path}" for route in iter_routes(app) if route.scope is None]
    if bare:
        raise UsageError(f"routes without a declared scope: {', '.join(bare)}")


@web.middleware
async def access_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let a request pass to its route when it has the scope that the route asks for.

    The decision is made by the route that was found, not by the path: there is no second reading of it to be fooled.
    """
    scope = request.app[_ROUTES].get(request.match_info.route)
    if scope is None and request.match_info.http_exception is None:
        raise RuntimeError("a route without a declared scope was reached")
    identity = _identify(request, scope)
    if identity is not None:
        request[IDENTITY] = identity
        if isinstance(request.protocol, GuardedHandler) and request.protocol.ticket is not None:
            request.protocol.ticket.identify(identity.id)
    return await handler(request)


def require(request: web.Request, scope: str) -> None:
    """Whether the caller of an open route could do what takes `scope`. Raises as the routes do that ask for it.

    Raises:
        HttpRefusal: 400, there is no such scope.
    """
    if scope not in get_args(Scope):
        raise HttpRefusal(400, "bad_fields")
    _identify(request, scope)


def _identify(request: web.Request, scope: str | None) -> Identity | None:
    """Raises as `authenticate` and `Identity.require` do. Routes that ask for nothing do not mind a bad token."""
    access = request.app[ACCESS]
    asks = scope not in {None, OPEN}
    try:
        identity = authenticate(request, access.tokens)
    except UnauthenticatedError:
        if asks and access.required:
            raise
        return None
    if asks and access.required:
        if identity is None:
            raise UnauthenticatedError
        identity.require(str(scope))
    return identity


@contextlib.contextmanager
def long_poll(request: web.BaseRequest) -> Iterator[None]:
    """Around the waiting of a long poll: it counts apart. Raises as `Ticket.long_poll` does."""
    ticket = getattr(request.protocol, "ticket", None)
    with ticket.long_poll() if ticket is not None else contextlib.nullcontext():
        yield
