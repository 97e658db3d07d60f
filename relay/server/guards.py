"""What stands between the network and a relay's handlers: limits in time, size and number, and who may call what.

aiohttp (3.14) by itself bounds neither a half-sent body nor a client that never reads, waits an hour for an idle
connection, inflates request bodies, echoes malformed bytes in its error page, answers to any Host, and drops the rest of
an upload when it is told to shut down. Each of these is closed here, in this order: connection, request, access, body,
answer, start and stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import re
import socket
import ssl
import struct
import sys
from asyncio.sslproto import SSLProtocol
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeVar, cast, get_args

import msgspec
from aiohttp import http_parser, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from relay.errors import UnreachableError, UsageError
from relay.server.problems import SERVER, HttpRefusal, log, problem_middleware, problem_of
from relay.server.tokens import (
    Identity,
    Scope,
    TokenSet,
    UnauthenticatedError,
    authenticate,
)

T = TypeVar("T")

JSON_TYPE: Final = "application/json"
ACKS_ARE_COUNTED: Final[bool] = sys.platform == "linux"
"""Whether the system tells how many bytes a peer has acknowledged."""
PIECE: Final = 256 << 10
"""Bytes. What is written is handed on in pieces of at most this size."""


@dataclass(frozen=True)
class Limits:
    """Every limit of the HTTP side, with its unit. Tests shorten them; an operator may set them."""

    header_seconds: float = 15.0
    """From the connection to the end of its first request's headers. Later ones have `keepalive_seconds`."""
    keepalive_seconds: float = 15.0
    """From an answer's end to the end of the next request's headers."""
    linger_seconds: float = 2.0
    """How long the rest of a refused body is read and thrown away, so that its sender gets to read the refusal."""
    tls_handshake_seconds: float = 10.0
    tls_shutdown_seconds: float = 5.0
    body_window_seconds: float = 30.0
    """The time over which the body rates below are judged."""
    body_min_rate: float = 1024.0
    """Bytes per second, of all bodies together that a peer with identity sends at one time."""
    body_min_rate_anonymous: float = 16 * 1024.0
    """The same for a peer without identity, by address."""
    write_stall_seconds: float = 30.0
    """How long a peer may leave written bytes unread."""
    write_min_rate: float = 1024.0
    """Bytes per second over `write_stall_seconds` below which reading counts as not reading."""
    drain_seconds: float = 30.0
    """What running requests get when the relay stops."""
    connections: int = 10_000
    """In all, long polls apart."""
    connections_per_address: int = 64
    """Without identity, half-sent headers and TLS handshakes included. An IPv6 address stands for its /64."""
    connections_per_identity: int = 64
    """Long polls apart."""
    long_polls: int = 10_000
    json_bytes: int = 16 << 20
    json_depth: int = 16
    bytes_in_flight: int = 256 << 20
    """Bytes of bodies held in memory at one time, over all requests."""
    line_bytes: int = 8190
    """Of the request line, and of each header."""
    headers: int = 100
    """How many headers a request may have."""


# --- the connection


class Budget:
    """A number of bytes that requests share."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    @contextlib.contextmanager
    def reserve(self, size: int) -> Iterator[Callable[[int], None]]:
        """Hold `size` bytes; the function that it gives takes more of them.

        Raises:
            UnreachableError: there are not so many left now (503 with Retry-After).
        """
        held = 0

        def take(more: int) -> None:
            nonlocal held
            if self.used + more > self.limit:
                raise UnreachableError("too many bytes are in flight")
            self.used += more
            held += more

        try:
            take(size)
            yield take
        finally:
            self.used -= held


class Meter:
    """Bytes over a sliding window, kept in tenths of it."""

    def __init__(self, window: float) -> None:
        self._window = window
        self._parts: deque[tuple[float, int]] = deque()
        self.users = 0

    def add(self, now: float, size: int) -> None:
        if self._parts and now - self._parts[-1][0] < self._window / 10:
            began, before = self._parts[-1]
            self._parts[-1] = (began, before + size)
        else:
            self._parts.append((now, size))

    def total(self, now: float) -> int:
        """Bytes of the window that ends `now`, and of up to a tenth of a window before it."""
        while self._parts and self._parts[0][0] < now - self._window * 1.1:
            self._parts.popleft()
        return sum(size for _, size in self._parts)


class Ticket:
    """One open connection's place in the ledger. It counts for its address until it has shown an identity."""

    def __init__(self, ledger: Ledger, address: str) -> None:
        self._ledger = ledger
        self.address = address
        self.identity: str | None = None
        self.polling = False
        self.released = False

    def identify(self, id: str) -> None:
        """Count for the identity `id` from now on.

        Raises:
            HttpRefusal: 429, the identity has all its connections already.
        """
        if id == self.identity or self.released:
            return
        if self._ledger.by_identity[id] >= self._ledger.limits.connections_per_identity:
            raise HttpRefusal(429, "too_many_connections", retry_after=2.0)
        self._ledger.leave(self)
        self.identity = id
        self._ledger.enter(self)

    @contextlib.contextmanager
    def long_poll(self) -> Iterator[None]:
        """While a peer waits for news, its connection counts among the long polls only.

        Raises:
            UnreachableError: there are too many of them (503 with Retry-After).
        """
        if self._ledger.polling >= self._ledger.limits.long_polls:
            raise UnreachableError("too many long polls")
        self._move(polling=True)
        try:
            yield
        finally:
            self._move(polling=False)

    def release(self) -> None:
        """The connection is gone. Twice is once."""
        if not self.released:
            self._ledger.leave(self)
            self.released = True

    def _move(self, *, polling: bool) -> None:
        if not self.released:
            self._ledger.leave(self)
            self.polling = polling
            self._ledger.enter(self)


class Ledger:
    """Who has how many connections, what they sent lately, and how many bytes are held for them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.budget = Budget(limits.bytes_in_flight)
        self.total = 0
        self.polling = 0
        self.by_address: Counter[str] = Counter()
        self.by_identity: Counter[str] = Counter()
        self.handshakes: set[GuardedHandler] = set()
        """Connections whose TLS handshake is not done."""
        self._meters: dict[str, Meter] = {}

    def admit(self, address: str) -> Ticket | None:
        """A place for a new connection, or None where there is none left."""
        key = address_key(address)
        if self.total >= self.limits.connections or self.by_address[key] >= self.limits.connections_per_address:
            return None
        ticket = Ticket(self, key)
        self.enter(ticket)
        return ticket

    def enter(self, ticket: Ticket) -> None:
        self._count(ticket, 1)

    def leave(self, ticket: Ticket) -> None:
        self._count(ticket, -1)

    def _count(self, ticket: Ticket, step: int) -> None:
        if ticket.polling:
            self.polling += step
            return
        self.total += step
        counter, key = (
            (self.by_address, ticket.address) if ticket.identity is None else (self.by_identity, ticket.identity)
        )
        counter[key] += step
        if not counter[key]:
            del counter[key]

    @contextlib.contextmanager
    def meter(self, peer: str) -> Iterator[Meter]:
        """The meter of everything that `peer` is sending now."""
        meter = self._meters.setdefault(peer, Meter(self.limits.body_window_seconds))
        meter.users += 1
        try:
            yield meter
        finally:
            meter.users -= 1
            if not meter.users:
                self._meters.pop(peer, None)


def address_key(address: str) -> str:
    """What one peer can be expected to own: an IPv4 address, or the /64 of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))


def acknowledged(transport: asyncio.Transport) -> int | None:
    """How many bytes the peer has acknowledged on this TCP connection; None where the system does not tell.

    Linux: `tcpi_bytes_acked` of `struct tcp_info`, an u64 at offset 120 (include/uapi/linux/tcp.h, since 4.1). Neither
    the size of a write nor that of a buffer would do: kernels hold megabytes, and a slow reader drains them in steps.
    """
    sock = transport.get_extra_info("socket")
    if not ACKS_ARE_COUNTED or sock is None:
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
    except OSError:
        return None
    return int(struct.unpack_from("=Q", info, 120)[0]) if len(info) >= 128 else None


class StallWatch:
    """Decides when a peer has stopped reading. Pure: it is told the time and the counters."""

    def __init__(self, limits: Limits) -> None:
        self._seconds = limits.write_stall_seconds
        self._least = int(limits.write_min_rate * limits.write_stall_seconds)
        self._goal: int | None = None
        self._deadline = 0.0

    def stalled(self, now: float, waiting: int, acked: int) -> bool:
        """Whether to give up. `waiting`: bytes still unsent on our side; `acked`: all that the peer ever acknowledged."""
        if not waiting:
            self._goal = None
        elif self._goal is None or acked >= self._goal:
            self._goal = acked + max(1, min(self._least, waiting))
            self._deadline = now + self._seconds
        return self._goal is not None and now >= self._deadline


class GuardedHandler(web.RequestHandler):
    """One connection, with our limits on it."""

    def __init__(
        self,
        server: web.Server,
        ledger: Ledger,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **settings)
        self.ledger = ledger
        self.ticket: Ticket | None = None
        self.draining = False
        self._wire: asyncio.Transport | None = None
        self._stall = StallWatch(ledger.limits)
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it
        self.ticket = self.ticket or self.ledger.admit(_address_of(transport))
        if self.ticket is None:
            self.force_close()
            transport.abort()
            return
        self._wire = transport
        self.ledger.handshakes.discard(self)
        super().connection_made(transport)
        limits = self.ledger.limits
        self._timers["header"] = self._loop.call_later(limits.header_seconds, self._end_of_header_time)
        self._watch_writing()

    def begin_handshake(self, raw: asyncio.Transport) -> bool:
        """Take a place for a connection that is to become ours after its TLS handshake; False where there is none."""
        self.ticket = self.ledger.admit(_address_of(raw))
        if self.ticket is None:
            raw.abort()
            return False
        self._wire = raw
        self.ledger.handshakes.add(self)
        return True

    def end_handshake(self) -> None:
        """The TCP connection is gone, before or after the handshake was done."""
        self.ledger.handshakes.discard(self)
        if self.ticket is not None:
            self.ticket.release()

    def connection_lost(self, exc: BaseException | None) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._wire = None
        if self.ticket is not None:
            self.ticket.release()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Where a body breaks its framing, aiohttp queues an answer for "the next request" and leaves the reader of
        # this body waiting for ever: tell it.
        if self._messages and isinstance(getattr(self._messages[-1][0], "exc", None), HttpProcessingError):
            bodies = [payload for _, payload in self._messages] + (
                [self._current_request.content] if self._current_request is not None else []
            )
            for body in bodies:
                if not body.is_eof() and body.exception() is None:
                    body.set_exception(web.RequestPayloadError("the body breaks its framing"))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,  # noqa: ARG002 - `exc` says it
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - never told
    ) -> web.StreamResponse:
        """For malformed HTTP, aiohttp's own page echoes it; ours is a problem document, and the connection ends."""
        if request.writer.output_size or isinstance(exc, ConnectionError):
            raise ConnectionResetError("the connection is broken")
        response = problem_of(exc or web.HTTPInternalServerError())
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:  # noqa: ANN401 - aiohttp's signature
        """A peer that breaks off or breaks HTTP is no error of ours, and its bytes do not belong into the log."""
        if not isinstance(kw.get("exc_info"), HttpProcessingError | web.RequestPayloadError | ConnectionError):
            super().log_exception(*args, **kw)

    def drain(self) -> None:
        """Take no further request: close when idle, else after the answer that is under way."""
        self.draining = True
        if not self._request_in_progress and not self._messages:
            self.force_close()

    def abort(self) -> None:
        """Cut the connection now. Unsent bytes are lost."""
        if self._wire is not None:
            self._wire.abort()

    def _end_of_header_time(self) -> None:
        if not self._request_count:
            self.force_close()

    def _watch_writing(self) -> None:
        """Also after `close()`: a transport that waits for its buffer to empty waits for ever."""
        if self._wire is None:
            return
        waiting = self._wire.get_write_buffer_size()
        acked = acknowledged(self._wire) if waiting else 0
        if acked is not None and self._stall.stalled(self._loop.time(), waiting, acked):
            log.info("a peer stopped reading; its connection is cut")
            self._wire.abort()
            return
        pause = self.ledger.limits.write_stall_seconds / 4
        self._timers["stall"] = self._loop.call_later(pause, self._watch_writing)


def _address_of(transport: asyncio.BaseTransport) -> str:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) and peer else "local"


class CountedTls(SSLProtocol):
    """The TLS layer of one connection, counted from its first byte on.

    asyncio tells a protocol of its connection after the handshake only, which is too late to count those who never
    finish one. `loop.start_tls` from a plain protocol would do, but uvloop may deliver the handshake's first bytes to
    that protocol before.
    """

    def __init__(self, handler: GuardedHandler, context: ssl.SSLContext) -> None:
        self._handler = handler
        super().__init__(
            asyncio.get_running_loop(),
            handler,
            context,
            waiter=None,  # type: ignore[arg-type] # nobody waits; the code allows it, its types do not
            server_side=True,
            ssl_handshake_timeout=handler.ledger.limits.tls_handshake_seconds,  # type: ignore[arg-type]
            ssl_shutdown_timeout=handler.ledger.limits.tls_shutdown_seconds,
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self._handler.begin_handshake(cast("asyncio.Transport", transport)):
            super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._handler.end_handshake()
        super().connection_lost(exc)


# --- the request


class HostRule(Protocol):
    """Whether a relay answers for the host name `name` (lower case, without port and brackets)."""

    def __call__(self, name: str) -> bool: ...


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


def is_loopback(name: str) -> bool:
    """Whether a host name or address means this machine alone, without asking a resolver."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_request_line(request: web.BaseRequest, allowed_hosts: HostRule | None) -> None:
    """The version, the Host header and, where the target is a whole URL, its host.

    A browser on this machine can be made to send requests to a loopback relay under a foreign name (DNS rebinding):
    `allowed_hosts` refuses them.

    Raises:
        HttpRefusal: 400, 421 or 505.
    """
    if request.version not in {(1, 0), (1, 1)}:
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


async def _check_request(request: web.Request, handler: Handler, allowed_hosts: HostRule | None) -> web.StreamResponse:
    """What holds for every request, known path or not. It stands outside of the application, so that neither routing
    nor `Expect` comes before it.
    """
    check_request_line(request, allowed_hosts)
    expect = request.headers.get("Expect", "100-continue")
    if expect.lower() != "100-continue":
        raise HttpRefusal(417, "expectation")
    return await handler(request)


# --- access


class Access:
    """Who may call. Replace `tokens` when the file changed; whether tokens are `required` never changes: a relay does
    not open itself because its last token was taken away.
    """

    def __init__(self, tokens: TokenSet, *, required: bool | None = None) -> None:
        self.tokens = tokens
        self.required = bool(len(tokens)) if required is None else required


ACCESS: Final = web.AppKey("access", Access)
DRAINING: Final = web.AppKey("draining", asyncio.Event)
"""Set when the relay begins to stop: long polls answer at once, and readiness says no."""
IDENTITY: Final = web.RequestKey("identity", Identity)
_ROUTES: Final = web.AppKey("route_scopes", dict[web.AbstractRoute, str])

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


def identity_of(request: web.Request) -> Identity | None:
    """Who sends this request, where it bears a valid token."""
    return request.get(IDENTITY)


@contextlib.contextmanager
def long_poll(request: web.BaseRequest) -> Iterator[None]:
    """Around the waiting of a long poll: it counts apart. Raises as `Ticket.long_poll` does."""
    ticket = getattr(request.protocol, "ticket", None)
    with ticket.long_poll() if ticket is not None else contextlib.nullcontext():
        yield


# --- the body


def _ledger_of(request: web.BaseRequest, limits: Limits) -> Ledger:
    protocol = request.protocol
    return protocol.ledger if isinstance(protocol, GuardedHandler) else Ledger(limits)


def budget_of(request: web.BaseRequest, limits: Limits) -> Budget:
    """The bytes in flight of this relay, for handlers that hold more than a piece of a body at a time."""
    return _ledger_of(request, limits).budget


async def body_pieces(request: web.Request, limits: Limits, cap: int) -> AsyncIterator[bytes]:
    """The body as it comes, of at most `cap` bytes in all.

    The minimum rate is judged over the sum of what the peer sends in all its bodies, because they share its line, and
    only over time in which we were the ones who waited.

    Raises:
        HttpRefusal: 413 above `cap` (before reading, where the length was told), 415 for any Content-Encoding, 408
            below the minimum rate.
        web.RequestPayloadError: the body breaks its framing.
        ConnectionError: the peer has gone.
    """
    if "Content-Encoding" in request.headers:
        raise HttpRefusal(415, "content_coding")
    if (request.content_length or 0) > cap:
        raise HttpRefusal(413, "too_large")
    identity = request.get(IDENTITY)
    rate = limits.body_min_rate if identity else limits.body_min_rate_anonymous
    peer = f"token {identity.id}" if identity else f"address {address_key(request.remote or '')}"
    clock, window = asyncio.get_running_loop().time, limits.body_window_seconds
    received = 0
    judged_from = clock()
    with _ledger_of(request, limits).meter(peer) as meter:
        while True:
            piece = await _next_piece(request, window / 8)
            now = clock()
            if piece is not None:
                received += len(piece)
                meter.add(now, len(piece))
            if received > cap:
                raise HttpRefusal(413, "too_large")
            if piece == b"":
                return
            if now - judged_from >= window and meter.total(now) < rate * window:
                raise HttpRefusal(408, "too_slow")
            if piece is not None:
                yield piece
                judged_from += clock() - now


async def _next_piece(request: web.Request, patience: float) -> bytes | None:
    """What has come; empty at the body's end, None when nothing came within `patience` seconds."""
    try:
        async with asyncio.timeout(patience):
            return await request.content.readany()
    except TimeoutError:
        return None


async def read_body(request: web.Request, limits: Limits, cap: int) -> bytes:
    """The whole body, counted against the bytes in flight while it comes. Raises as `body_pieces`, and 503 (busy)."""
    collected = bytearray()
    with budget_of(request, limits).reserve(0) as take:
        async for piece in body_pieces(request, limits, cap):
            take(len(piece))
            collected += piece
    return bytes(collected)


async def read_json(request: web.Request, limits: Limits, type: type[T]) -> T:
    """The body as a `type`, which says itself whether it forbids unknown fields.

    Only `application/json` is taken: a web page can send anything else to a loopback relay without asking first.

    Raises:
        HttpRefusal: 415 for another media type, 400 for malformed JSON or for fields that `type` does not take; and as
            `body_pieces`.
    """
    if request.content_type != JSON_TYPE:
        raise HttpRefusal(415, "media_type")
    raw = await read_body(request, limits, limits.json_bytes)
    # Large documents take long enough to be felt by everybody else on this thread.
    if len(raw) > 64 << 10:
        return await asyncio.to_thread(parse_json, raw, type, limits.json_depth)
    return parse_json(raw, type, limits.json_depth)


def parse_json(raw: bytes, type: type[T], depth: int) -> T:
    """JSON as a `type`: nested at most `depth` deep, without a key that stands twice in one object.

    Raises:
        HttpRefusal: 400.
    """
    if deeper_than(raw, depth):
        raise HttpRefusal(400, "bad_json")
    try:
        value = msgspec.json.decode(raw, type=type)
    except msgspec.ValidationError as error:
        raise HttpRefusal(400, "bad_fields") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HttpRefusal(400, "bad_json") from error
    # After decoding: the text is known to be JSON, and of the size that `type` allows.
    if repeats_a_key(raw):
        raise HttpRefusal(400, "bad_json")
    return value


# Possessive, and content with the end of the text instead of the closing quote: every byte is looked at once.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+'
_ANY_STRING = re.compile(_STRING + rb'"?', re.DOTALL)
_MARK = re.compile(rb"(" + _STRING + rb'")([ \t\r\n]*+:)?|[{}]', re.DOTALL)
_TO_BRACES = bytes.maketrans(b"[]", b"{}")
_NO_BRACES = bytes(set(range(256)) - set(b"[]{}"))


def deeper_than(raw: bytes, depth: int) -> bool:
    """Whether the JSON text `raw` is nested deeper than `depth` (or does not close what it opens).

    Strings are taken out, and all but the brackets; then each round takes out the innermost pairs, one level.
    """
    braces = _ANY_STRING.sub(b"", raw).translate(_TO_BRACES, _NO_BRACES)
    for _ in range(depth):
        if not braces:
            return False
        braces = braces.replace(b"{}", b"")
    return bool(braces)


def repeats_a_key(raw: bytes) -> bool:
    """Whether an object of the valid JSON text `raw` has a key twice, however it is spelled."""
    outer: list[set[bytes]] = []
    keys: set[bytes] = set()
    for mark in _MARK.finditer(raw):
        if mark[0] == b"{":
            outer.append(keys)
            keys = set()
        elif mark[0] == b"}":
            keys = outer.pop()
        elif mark[2]:
            key = mark[1] if b"\\" not in mark[1] else json.dumps(json.loads(mark[1]), ensure_ascii=False).encode()
            if key in keys:
                return True
            keys.add(key)
    return False


# --- the answer


async def write_guarded(response: web.StreamResponse, data: bytes | bytearray | memoryview, limits: Limits) -> None:
    """Write and wait until the peer has taken all but the last piece.

    A peer that stops reading is cut off by the connection's `StallWatch`; a timeout around the write does it where the
    system does not count acknowledged bytes.

    Raises:
        ConnectionError: the peer has gone, or was cut off.
    """
    view = memoryview(data)
    for start in range(0, len(view), PIECE):
        if ACKS_ARE_COUNTED:
            await response.write(view[start : start + PIECE])
            continue
        try:
            async with asyncio.timeout(limits.write_stall_seconds):
                await response.write(view[start : start + PIECE])
        except TimeoutError as error:
            raise ConnectionResetError("the peer does not read") from error


# --- start and stop


def check_c_parser() -> None:
    """The parser in Python that aiohttp falls back to is the one that most request-smuggling advisories are about.

    Raises:
        UsageError: the C parser is not in use.
    """
    if os.environ.get("AIOHTTP_NO_EXTENSIONS") or http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        raise UsageError(
            "aiohttp's C parser is not in use; the relay does not serve without it",
            hint="Install aiohttp with its extensions, and unset AIOHTTP_NO_EXTENSIONS",
        )


def raise_open_files(limits: Limits) -> int:
    """Lift this process's soft limit of open files towards what `limits` needs; the limit that holds now, or 0 where
    the system has none.
    """
    if sys.platform == "win32":
        return 0
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + limits.long_polls + 1024
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft


class Running:
    """A relay that listens."""

    def __init__(
        self, runner: web.AppRunner, listener: asyncio.Server, ledger: Ledger, draining: asyncio.Event, scheme: str
    ) -> None:
        self._runner = runner
        self._listener = listener
        self._draining = draining
        self.ledger = ledger
        host, self.port = listener.sockets[0].getsockname()[:2]
        self.url = f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"

    async def stop(self) -> None:
        """Take no new connection, let running requests end for `drain_seconds`, then cut what is left. Twice is once."""
        self._listener.close()
        self._draining.set()
        for handler in list(self.ledger.handshakes):
            handler.abort()
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.ledger.limits.drain_seconds
        while (handlers := self._handlers()) and clock() < deadline:
            for handler in handlers:
                handler.drain()
            await asyncio.sleep(0.05)
        for handler in self._handlers():
            handler.abort()
        await self._runner.cleanup()

    def _handlers(self) -> list[GuardedHandler]:
        server = self._runner.server
        return [c for c in server.connections if isinstance(c, GuardedHandler)] if server else []


async def start_guarded(
    app: web.Application,
    host: str,
    port: int,
    limits: Limits,
    *,
    ssl_context: ssl.SSLContext | None = None,
    allowed_hosts: HostRule | None = None,
) -> Running:
    """Serve `app` (of `guarded_app`) on `host`:`port` (0: any free one).

    Without access control it listens on loopback only, and answers for loopback names only. A handler is cancelled when
    its peer goes away: work that others wait for, too, must be shielded.

    Raises:
        UsageError: no C parser, a route without a scope, a listener beyond loopback without tokens, or an address that
            cannot be listened on.
    """
    check_c_parser()
    check_routes(app)
    if not app[ACCESS].required:
        if not is_loopback(host):
            raise UsageError(
                "beyond loopback a relay does not listen without access control",
                hint="Make a token with: waystation relay token SCOPE",
            )
        allowed_hosts = allowed_hosts or is_loopback
    # Nothing runs any more when this timeout begins: `Running.stop` has drained before.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        server = runner.server
        assert server is not None  # noqa: S101 - set up one line above
        inner = partial(_check_request, handler=server.request_handler, allowed_hosts=allowed_hosts)
        server.request_handler = partial(_answer, handler=inner)
        ledger = Ledger(limits)
        factory = _connection_factory(server, ledger, ssl_context)
        listener = await asyncio.get_running_loop().create_server(factory, host, port, backlog=1024)
    except BaseException as error:
        await runner.cleanup()
        if isinstance(error, OSError):
            raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        raise
    return Running(runner, listener, ledger, app[DRAINING], "https" if ssl_context else "http")


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    response = await problem_middleware(request, handler)
    if isinstance(request.protocol, GuardedHandler) and request.protocol.draining:
        response.force_close()
    return response


def _connection_factory(
    server: web.Server, ledger: Ledger, context: ssl.SSLContext | None
) -> Callable[[], asyncio.BaseProtocol]:
    limits = ledger.limits

    def handler() -> GuardedHandler:
        return GuardedHandler(
            server,
            ledger,
            keepalive_timeout=limits.keepalive_seconds,
            lingering_time=limits.linger_seconds,
            max_line_size=limits.line_bytes,
            max_field_size=limits.line_bytes,
            max_headers=limits.headers,
            auto_decompress=False,
            access_log=None,
        )

    return handler if context is None else lambda: CountedTls(handler(), context)
