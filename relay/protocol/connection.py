"""A connection to one relay: sessions, TLS, tokens, timeouts, retries, and the translation of errors.

What comes back is parsed and bounded. Errors follow the roots of `relay.errors`: the road (`UnreachableError`), the
bytes (`UntrustedError`), or a rule of the relay (`RefusedError`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import SplitResult, urlsplit

import aiohttp
import msgspec

from relay.errors import (
    ConflictError,
    NotFoundError,
    RefusedError,
    UnreachableError,
    UntrustedError,
    UsageError,
    WaystationError,
)
from relay.network.addresses import connector
from relay.network.names import Names
from relay.network.proxies import proxy_of, through
from relay.network.way import Way
from relay.package.ranges import Ranges
from relay.protocol import messages
from relay.protocol.credentials import PLAIN_HTTP, may_be_shown, tls_from
from relay.protocol.followed import Current, Followed
from relay.protocol.not_exact import NotExactError
from relay.support.json_bounds import JsonTooDeepError, check_depth
from relay.support.persistence import Persistence, is_passing, seconds_asked

T = TypeVar("T")

_log = logging.getLogger(__name__)

_LOST = (
    aiohttp.ClientPayloadError,
    aiohttp.ClientConnectionError,
    ConnectionError,
    socket.gaierror,
    ssl.SSLError,
)
"""What is raised where the road breaks."""
_PERSISTENCE = Persistence(first_pause=0.5, longest_pause=2.0, spread=0.5)
"""Of a small request."""
_LINE_MAX = 64 << 10
"""Bytes of one line of progress."""


LEAST_SECONDS = 5.0
"""A relay that says nothing for less may be busy, and is not called away."""


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """How long a client bears with a relay. Seconds and bytes."""

    connect_seconds: float = 5.0
    answer_seconds: float = 60.0
    """From the request, or the last piece of an upload that was taken, to the head of the answer or the next piece."""
    window_seconds: float = 30.0
    """A body must bring `window_bytes` in every such stretch of time."""
    window_bytes: int = 30 << 10
    attempts: int = 3
    """Tries of a small request."""
    tries_seconds: float = 3600.0
    """For all tries of a small request together."""

    def within(self, seconds: float) -> ClientLimits:
        """Limits for one who bears with the relay for so long; what may be a busy moment is borne in any case."""
        most = max(seconds, LEAST_SECONDS)
        return replace(
            self,
            connect_seconds=min(self.connect_seconds, most),
            answer_seconds=min(self.answer_seconds, most),
            tries_seconds=most,
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as `Connection` sends it."""

    method: str
    path: str
    body: bytes | AsyncIterator[bytes] | None = None
    content_type: str = messages.JSON
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    answer_seconds: float | None = 0.0
    """Until the head of the answer. 0: as the connection's limits say; None: for ever."""
    answer_max: int = 0
    """Bytes of the answer, where it is read as one. 0: `messages.JSON_MAX`."""
    attempts: int = 0
    """0: as the connection's limits say."""


class TokenRefusedError(RefusedError):
    """The relay does not take this token, or wants one."""

    def __init__(self, message: str, *, hint: str = "", status: int = 401) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class MissingChunksError(ConflictError):
    """A publish came too early: these ranges are not at the relay yet. Told by a relay, and so by its client."""

    def __init__(self, missing: Ranges) -> None:
        super().__init__("the relay still lacks chunks of this package")
        self.missing = missing


class UnknownPeerError(RefusedError):
    """The relay does not fetch from the other relay that it was told of."""


class LeaseLostError(RefusedError):
    """The relay does not know the lease (any more): offer again."""


class TooSlowError(UnreachableError):
    """The relay sends, but below the minimum rate."""


# --- counting what crosses the line, as the ledger needs it: bodies and the headers around them


@dataclass(slots=True)
class Traffic:
    """Bytes of HTTP in both directions, TLS and TCP not counted."""

    sent: int = 0
    received: int = 0

    @property
    def total(self) -> int:
        return self.sent + self.received


def header_bytes(first_line: str, headers: Iterable[tuple[bytes, bytes]]) -> int:
    """What a request's or response's head takes on the wire: each line ends in CR LF, an empty one closes it."""
    return len(first_line) + 2 + sum(len(name) + len(value) + 4 for name, value in headers) + 2


def chunked_bytes(size: int) -> int:
    """What a piece of a body without a length takes on the wire (RFC 9112, 7.1); 0 bytes end the body."""
    return len(f"{size:x}") + 2 + size + 2


# --- the connection


@dataclass(eq=False, slots=True)
class _Line:
    """Connections to one place, and how many requests use them."""

    session: aiohttp.ClientSession
    requests: int = 0


class Connection:
    """To one relay. Use it as an async context manager; safe for many tasks at once."""

    def __init__(
        self,
        url: str,
        *,
        token: str | Current[str | None] | None = None,
        names: Names | None = None,
        limits: ClientLimits | None = None,
        tls: Current[ssl.SSLContext] | None = None,
        plain_http: bool = False,
    ) -> None:
        """Talk to the relay at `url` (`http` or `https`, no path).

        Args:
            url: of the relay.
            token: to be shown there; what gives the one of now is asked for each request.
            names: looks the host up, in place of the system's resolver.
            limits: how long to bear with it.
            tls: gives what to trust; without it, the system's authorities are.
            plain_http: the token may go over plain http beyond this machine: the configuration names this relay.

        Raises:
            UsageError: `url` is not such a URL, or the environment names a proxy for it that cannot be used.
        """
        parts = _split_url(url)
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.traffic = Traffic()
        self.limits = limits or ClientLimits()
        self._token = token
        self._shows_token = plain_http or may_be_shown(parts.scheme, parts.hostname or "")
        self._way = Way(parts.hostname or "", names)
        self._proxy = proxy_of(self.url)
        self._hint = f"It is asked through {self._proxy}" if self._proxy else ""
        self._where = f"relay {self.url}"
        self._tls = (tls or tls_from(None)) if parts.scheme == "https" else None
        self._line: _Line | None = None
        self._left: set[_Line] = set()
        self.waiting_since = time.monotonic()
        """When it was asked for something, took something, or something came from it, last."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        lines, self._line = [*self._left, *([self._line] if self._line else ())], None
        for line in lines:
            await line.session.close()
        await self._way.close()

    # --- whole answers

    async def ask(self, request: Request, answer: type[T]) -> T:
        """The answer, parsed. Retried where that may help."""
        return self.parse(await self.fetch(request), answer)

    async def fetch(self, request: Request) -> bytes:
        """The answer as it came. Retried where that may help."""

        async def once() -> bytes:
            async with self.open(request) as response:
                return await self.body(response, request.answer_max or messages.JSON_MAX)

        self.waiting_since = time.monotonic()
        attempts = request.attempts or self.limits.attempts
        shown = self._current_token()
        try:
            async with asyncio.timeout(self.limits.tries_seconds):
                return await replace(_PERSISTENCE, failures=attempts - 1).call(once)
        except TimeoutError as error:
            raise UnreachableError(f"{self._where} did not answer in time", hint=self._hint) from error
        except TokenRefusedError as error:
            # The file may have been replaced meanwhile, or in a way that its stamps do not show.
            is_once = request.body is not None and not isinstance(request.body, bytes)
            if error.status != 401 or is_once or self._current_token(again=True) == shown:
                raise
            return await once()

    async def upload(self, request: Request, body: AsyncIterator[bytes], answer: type[T]) -> T:
        """As `ask`, with a body that is made as it goes. Not retried. Raises what `body` raises, too."""
        own: list[WaystationError] = []
        loop, patience = asyncio.get_running_loop(), asyncio.timeout(self.limits.answer_seconds)

        async def counted() -> AsyncIterator[bytes]:
            try:
                async for piece in body:
                    self.traffic.sent += chunked_bytes(len(piece))
                    yield piece
                    self.waiting_since = time.monotonic()
                    patience.reschedule(loop.time() + self.limits.answer_seconds)
                self.traffic.sent += chunked_bytes(0)
            except WaystationError as error:
                # aiohttp tells of it as a broken connection; a damaged depot is no fault of the relay's.
                own.append(error)
                raise

        try:
            async with patience:
                return await self.ask(replace(request, body=counted(), attempts=1, answer_seconds=None), answer)
        except TimeoutError as error:
            raise UnreachableError(f"relay {self.url} takes no more of what it is sent") from error
        except UnreachableError:
            if own:
                raise own[0] from None
            raise

    def parse(self, body: bytes, answer: type[T]) -> T:
        try:
            check_depth(body, messages.JSON_DEPTH)
            return msgspec.json.decode(body, type=answer)
        except (msgspec.DecodeError, JsonTooDeepError, UnicodeDecodeError) as error:
            message = f"{self.url} answered with something that is not the protocol's"
            raise UntrustedError(message, hint=self._hint) from error

    # --- answers as they come

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer, from its head on. Not retried."""
        body = request.body
        if isinstance(body, bytes):
            self.traffic.sent += len(body)
        token = self._current_token()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        if body is not None:
            headers["Content-Type"] = request.content_type
        wait = self.limits.answer_seconds if request.answer_seconds == 0.0 else request.answer_seconds
        try:
            with self.reading(), through(self._proxy, self._where):
                async with (
                    asyncio.timeout(wait) as deadline,
                    self._session() as session,
                    session.request(
                        request.method,
                        request.path,
                        data=body,
                        headers=headers | dict(request.headers),
                        params=request.params,
                        allow_redirects=False,
                        proxy=self._proxy.url if self._proxy else None,
                        ssl=True if self._tls is None else self._tls(),
                    ) as response,
                ):
                    deadline.reschedule(None)
                    self.waiting_since = time.monotonic()
                    self._count_heads(request.method, response)
                    if response.status >= 300:
                        await self._raise_problem(response, bore_token=token is not None)
                    yield response
        except aiohttp.ClientConnectorCertificateError as error:
            # The verdict alone, without the library's own framing.
            verdict = getattr(error.certificate_error, "verify_message", "") or error.certificate_error
            raise UntrustedError(
                f"{self._where} shows a certificate that is not trusted: {verdict}",
                hint="Name the authority that signs it with --ca-file, or with ca_file in agent.yaml",
            ) from error
        except aiohttp.ServerDisconnectedError as error:
            self._way.turn()
            hint = "If it speaks TLS, its URL begins with https" if self.url.startswith("http:") else ""
            message = f"{self._where} closed the connection without an answer"
            raise UnreachableError(message, hint=self._hint or hint) from error
        except _LOST as error:
            self._way.turn()
            raise UnreachableError(f"{self._where} cannot be reached: {_reason(error)}", hint=self._hint) from error
        except TimeoutError as error:
            raise UnreachableError(f"{self._where} did not answer in time", hint=self._hint) from error
        except aiohttp.ClientError as error:
            message = f"{self._where} does not speak the protocol: {_reason(error)}"
            raise UntrustedError(message, hint=self._hint) from error

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around whatever takes an answer apart: bytes of a relay that our own code stumbles over are untrusted bytes.

        A fault of this machine (`OSError`), and what says itself whose fault it is, goes through as it is.
        """
        try:
            yield
        except (WaystationError, aiohttp.ClientError, OSError, TimeoutError):
            raise
        except Exception as error:
            # The trace is for us: code that stumbles wants mending.
            _log.exception("client.stumbled", extra={"relay": self.url})
            message = f"{self.url} answered with something that cannot be read ({type(error).__name__})"
            raise UntrustedError(message, hint=self._hint) from error

    async def pieces(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        # Only time spent waiting for the relay counts: a slow disk on our side is no fault of its.
        waited, in_window = 0.0, 0
        while True:
            asked = time.monotonic()
            try:
                async with asyncio.timeout(self.limits.window_seconds - waited):
                    piece = await response.content.readany()
            except TimeoutError:
                waited = self.limits.window_seconds
            else:
                if not piece:
                    return
                waited += time.monotonic() - asked
                in_window += len(piece)
                self.traffic.received += len(piece)
                yield piece
            if waited >= self.limits.window_seconds:
                if in_window < self.limits.window_bytes:
                    raise TooSlowError(f"relay {self.url} sends too slowly: {in_window} bytes in {waited:.0f} s")
                waited, in_window = 0.0, 0

    async def body(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        collected = bytearray()
        async for piece in self.pieces(response):
            collected += piece
            if len(collected) > limit:
                raise UntrustedError(f"{self.url} answers with more than {limit} bytes")
        return bytes(collected)

    async def lines(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The body line by line, as it comes: little is sent, so that no minimum rate is asked for."""
        buffer = bytearray()
        while True:
            async with asyncio.timeout(self.limits.answer_seconds):
                piece = await response.content.readany()
            if not piece:
                return
            self.traffic.received += len(piece)
            buffer += piece
            *whole, rest = buffer.split(b"\n")
            for line in whole:
                yield bytes(line)
            buffer = rest
            if len(buffer) > _LINE_MAX:
                raise UntrustedError(f"{self.url} answers with a line of more than {_LINE_MAX} bytes")

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        """To where the relay's name leads now. Requests that run when it begins to lead elsewhere end where they are."""
        if self._line is not None and await self._way.leads_elsewhere() and self._line is not None:
            self._left.add(self._line)
            self._line = None
            await self._close_left()
        line = self._line = self._line or _Line(self._open_session())
        line.requests += 1
        try:
            yield line.session
        finally:
            line.requests -= 1
            await self._close_left()

    async def _close_left(self) -> None:
        for line in [line for line in self._left if not line.requests]:
            self._left.discard(line)
            await line.session.close()

    def _open_session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            base_url=self.url,
            # The way keeps what names lead to, for as long as that may be kept.
            connector=connector(self._way, limit=64),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.limits.connect_seconds),
            auto_decompress=False,
            read_bufsize=512 << 10,
            skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept"),
        )

    def _current_token(self, *, again: bool = False) -> str | None:
        """The token to show now; None where there is none, or none may be shown."""
        return self._held_token(again=again) if self._shows_token else None

    def _held_token(self, *, again: bool = False) -> str | None:
        """`again`: read from its file whatever its stamps say."""
        token = self._token
        if again and isinstance(token, Followed):
            return str(token.again())
        return token if token is None or isinstance(token, str) else token()

    def _count_heads(self, method: str, response: aiohttp.ClientResponse) -> None:
        sent = ((k.encode(), v.encode()) for k, v in response.request_info.headers.items())
        target = response.request_info.url.raw_path_qs
        self.traffic.sent += header_bytes(f"{method} {target} HTTP/1.1", sent)
        self.traffic.received += header_bytes(f"HTTP/1.1 {response.status} {response.reason}", response.raw_headers)

    async def _raise_problem(self, response: aiohttp.ClientResponse, *, bore_token: bool) -> None:
        problem = _parse_problem(await self.body(response, 1 << 20))
        where, asked = self._where, seconds_asked(response.headers.get("Retry-After"))
        if self._proxy and not problem.code and self.url.startswith("http:"):
            # The relay answers with a problem of its own; what stands in a tunnel of TLS is the relay's in any case.
            raise self._proxy.answered(response.status, where, asked)
        match response.status, problem.code:
            case _, "unknown_peer":
                raise UnknownPeerError(
                    f"{where} may not fetch from there", hint="Name the other relay under peers: in its relay.yaml"
                )
            case (401 | 403) as status, _:
                raise self._token_refused(status, bore_token=bore_token)
            case _, "not_exact":
                raise NotExactError(f"{where} cannot give the identical nupkg", problem.lacks or messages.ExactLacks())
            case 404, "unknown_lease":
                raise LeaseLostError(f"{where} does not know the lease")
            case 404, _:
                raise NotFoundError(f"not at {where}")
            case 409, _ if problem.missing:
                raise MissingChunksError(problem.missing)
            case 409, _:
                raise ConflictError(f"{where} holds other bytes under this id and version; nothing was changed")
            case status, code if is_passing(status):
                trouble = "has no space left" if status == 507 else "cannot serve now"
                raise UnreachableError(f"{where} {trouble} ({status} {code})", retry_after=asked)
            case status, code:
                raise RefusedError(f"{where} refuses the request ({status} {code})")

    def _token_refused(self, status: int, *, bore_token: bool) -> TokenRefusedError:
        if self._held_token() and not self._shows_token:
            return TokenRefusedError(
                f"relay {self.url} wants a token, and none is sent over plain http",
                hint=f"Use https, or name the relay by plain_http: in the configuration or in ${PLAIN_HTTP}",
                status=status,
            )
        if status == 403:
            words = f"relay {self.url} refuses this token: it has not the scope"
        elif bore_token:
            words = f"relay {self.url} refuses this token: it is unknown, revoked or has ended"
        else:
            words = f"relay {self.url} wants a token"
        hint = "Give one of the right scope with --token-file or WAYSTATION_TOKEN"
        return TokenRefusedError(words, hint=hint, status=status)


def _split_url(url: str) -> SplitResult:
    """Raises `UsageError`, which never shows credentials."""
    try:
        parts = urlsplit(url)
        plain = parts.scheme in {"http", "https"} and parts.hostname and parts.path in {"", "/"} and parts.port != 0
    except ValueError:
        plain = False
    if "@" in url:
        raise UsageError("a relay's URL carries no credentials", hint="Give the token by file or environment")
    if not plain or parts.query or parts.fragment:
        raise UsageError(f"{url!r} is not a relay's URL", hint="Expected for example https://relay.example:7443")
    return parts


def _parse_problem(body: bytes) -> messages.ProblemAnswer:
    try:
        problem = msgspec.json.decode(body, type=messages.ProblemAnswer)
        return msgspec.structs.replace(problem, code=problem.code[: messages.REASON_CHARS])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return messages.ProblemAnswer()


def _reason(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ssl.SSLError):
        # Its errno is the TLS library's own, which the system would name "Operation not permitted".
        return f"it does not answer in TLS ({error.os_error.reason or error.os_error})"
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno:
        failed = error.os_error
        # A name that cannot be looked up has no errno of the system's, but words of its own.
        return (failed.strerror if isinstance(failed, socket.gaierror) else os.strerror(failed.errno or 0)) or str(
            error
        )
    return str(error) or type(error).__name__
