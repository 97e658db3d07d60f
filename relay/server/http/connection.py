"""One connection, with a relay's limits on it: how many there may be, how long each may say or read nothing.

aiohttp (3.14) by itself waits an hour for an idle connection, echoes malformed bytes in its error page, and lets a peer
that never reads hold its answer for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
import struct
import sys
from asyncio.sslproto import SSLProtocol
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, cast
from weakref import WeakValueDictionary

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from relay.audit.acts import ConnectionCut, ConnectionRefused, HandshakeFailed
from relay.audit.event import Caller, tell
from relay.errors import UnreachableError
from relay.protocol import messages
from relay.server.http.counts import CONNECTIONS_REFUSED
from relay.server.http.problems import HttpRefusal, problem_of, tell_problem
from relay.support.byte_budget import ByteBudget

ACKS_ARE_COUNTED: Final[bool] = sys.platform == "linux"
"""Whether the system tells how many bytes a peer has acknowledged."""


SHARED_BYTES: Final = 16 << 20
"""Bytes that all connections together take with one read, or one piece of an answer, of each."""
_WRITTEN_AHEAD: Final = 16 << 10
"""Bytes that may wait in a connection's buffer while the next ones are made."""
_SHARE_LEAST, _SHARE_MOST = 8 << 10, 256 << 10
_CONNECTION_BYTES: Final = 96 << 10
"""Resident for each of 900 slow peers, the bodies that they send among it: measured by `benchmarks.memory --crowd`."""
_ENCODERS_LEAST, _ENCODERS_MOST = 60 << 20, 140 << 20
"""A run of 16 MiB in zstd level 9, and the same in level 19."""


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
    json_bytes: int = messages.JSON_MAX
    json_depth: int = messages.JSON_DEPTH
    memory_bytes: int = 160 << 20
    """What connections, bodies and encoders hold together, beside what a relay takes at rest. A connection counts for 96
    KiB, and encoders get the rest: at most 140 MiB, at least 60."""
    bytes_in_flight: int = 32 << 20
    """Bytes of bodies held in memory at one time, over all requests but those of the next two limits."""
    bundle_bytes_in_flight: int = 192 << 20
    """The same for incoming bundles, of which each counts for 24 MiB: what one holds when it is decoded."""
    mail_bytes_in_flight: int = 16 << 20
    """The same for orders, and once more for polls and reports."""
    mail_bytes: int = 1 << 30
    """Of letters that are kept, 512 bytes added for each."""
    mail_letters: int = 500_000
    mail_bytes_per_agent: int = 16 << 20
    """Of orders for one agent."""
    mail_bytes_per_deployment: int = 512 << 20
    """Of reports and logs of one deployment."""
    agents: int = 10_000
    """Whose presence is told."""
    line_bytes: int = 8190
    """Of the request line, and of each header."""
    headers: int = 100
    """How many headers a request may have."""


class Meter:
    """Bytes over a sliding window, kept in tenths of it."""

    def __init__(self, window: float) -> None:
        self._window = window
        self._parts: deque[tuple[float, int]] = deque()

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
        self._ledger.count(self, -1)
        self.identity = id
        self._ledger.count(self, 1)

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
            self._ledger.release(self)
            self.released = True

    def _move(self, *, polling: bool) -> None:
        if not self.released:
            self._ledger.count(self, -1)
            self.polling = polling
            self._ledger.count(self, 1)


class Ledger:
    """Who has how many connections, what they sent lately, and how many bytes are held for them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.budget = ByteBudget(limits.bytes_in_flight)
        self.total = 0
        self.polling = 0
        self.left_for_encoders: Callable[[int], None] = lambda _bytes: None
        """Called with the bytes, whenever a connection comes or goes."""
        self.by_address: Counter[str] = Counter()
        self.by_identity: Counter[str] = Counter()
        self.read_buffer = memoryview(bytearray(_SHARE_MOST))
        """What was read goes on in the same moment, so that one buffer serves all."""
        self.handshakes: set[GuardedHandler] = set()
        """Connections whose TLS handshake is not done."""
        # Weak: a meter is forgotten with the last body that it counts.
        self._meters: WeakValueDictionary[str, Meter] = WeakValueDictionary()

    def admit(self, address: str) -> Ticket | None:
        """A place for a new connection, or None where there is none left."""
        key = address_key(address)
        limits = self.limits
        for why, count, limit in (
            ("connections", self.total, limits.connections),
            ("connections_per_address", self.by_address[key], limits.connections_per_address),
        ):
            if count >= limit:
                CONNECTIONS_REFUSED.labels(why).inc()
                tell(ConnectionRefused(address, why, limit))
                return None
        ticket = Ticket(self, key)
        self.count(ticket, 1)
        self._tell_encoders()
        return ticket

    def release(self, ticket: Ticket) -> None:
        """What `ticket` stands for is gone."""
        self.count(ticket, -1)
        self._tell_encoders()

    def _tell_encoders(self) -> None:
        self.left_for_encoders(bytes_for_encoders(self.limits.memory_bytes, self.total + self.polling))

    def share(self) -> int:
        """Bytes that one connection reads at a time, or is handed of an answer: where there are many, each gets less."""
        return max(_SHARE_LEAST, min(_SHARE_MOST, SHARED_BYTES // (self.total or 1)))

    def count(self, ticket: Ticket, step: int) -> None:
        """As what `ticket` stands for now: one more, or one less."""
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

    def meter(self, peer: str) -> Meter:
        """The meter of everything that `peer` is sending now."""
        return self._meters.setdefault(peer, Meter(self.limits.body_window_seconds))


def bytes_for_encoders(memory_bytes: int, connections: int) -> int:
    """What so many connections leave of the memory: pure."""
    return max(_ENCODERS_LEAST, min(_ENCODERS_MOST, memory_bytes - connections * _CONNECTION_BYTES))


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
        # By default one that does not read has two pieces of an answer in its buffer.
        transport.set_write_buffer_limits(high=_WRITTEN_AHEAD)
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

    def end_handshake(self, error: BaseException | None) -> None:
        """The TCP connection is gone, before or after the handshake was done."""
        if self in self.ledger.handshakes and self.ticket is not None:
            tell(HandshakeFailed(self.ticket.address, str(error or "the peer has gone")))
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
        tell_problem(request, response)
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
            self._tell_cut("no_request")
            self.force_close()

    def _tell_cut(self, why: str) -> None:
        if self.ticket is not None:
            tell(ConnectionCut(Caller(self.ticket.address, self.ticket.identity or ""), why))

    def _watch_writing(self) -> None:
        """Also after `close()`: a transport that waits for its buffer to empty waits for ever."""
        if self._wire is None:
            return
        waiting = self._wire.get_write_buffer_size()
        acked = acknowledged(self._wire) if waiting else 0
        if acked is not None and self._stall.stalled(self._loop.time(), waiting, acked):
            self._tell_cut("not_read")
            self._wire.abort()
            return
        pause = self.ledger.limits.write_stall_seconds / 4
        self._timers["stall"] = self._loop.call_later(pause, self._watch_writing)


def _address_of(transport: asyncio.BaseTransport) -> str:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) and peer else "local"


class Plain(asyncio.BufferedProtocol):
    """What reads for a connection without TLS, into a buffer of ours.

    uvloop by itself reads 256 KiB at a time, which 900 connections that send at once make 230 MiB of, and aiohttp's
    protocol cannot name a buffer of its own.
    """

    def __init__(self, handler: GuardedHandler) -> None:
        self._handler = handler
        self.connection_made = handler.connection_made  # type: ignore[method-assign]
        self.connection_lost = handler.connection_lost  # type: ignore[method-assign]
        self.eof_received = handler.eof_received  # type: ignore[method-assign]
        self.pause_writing = handler.pause_writing  # type: ignore[method-assign]
        self.resume_writing = handler.resume_writing  # type: ignore[method-assign]

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the signature
        return self._handler.ledger.read_buffer[: self._handler.ledger.share()]

    def buffer_updated(self, nbytes: int) -> None:
        self._handler.data_received(bytes(self._handler.ledger.read_buffer[:nbytes]))


class CountedTls(SSLProtocol):
    """The TLS layer of one connection, counted from its first byte on.

    asyncio tells a protocol of its connection after the handshake only, which is too late to count those who never
    finish one. `loop.start_tls` from a plain protocol would do, but uvloop may deliver the handshake's first bytes to
    that protocol before.
    """

    max_size = 64 << 10
    """Bytes of its buffer, in place of 256 KiB: each connection has one of its own."""

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
        self._handler.end_handshake(exc)
        super().connection_lost(exc)
