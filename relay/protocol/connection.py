"""A connection to one relay: sessions, TLS, tokens, timeouts, retries, and the translation of errors.

What comes back is parsed and bounded. Errors follow the roots of `relay.errors`: the road (`UnreachableError`), the
bytes (`UntrustedError`), or a rule of the relay (`RefusedError`).
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
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
from relay.network.addresses import KnownAddresses, connector
from relay.network.proxies import proxy_of, through
from relay.package.ranges import Ranges
from relay.protocol import messages
from relay.protocol.not_exact import NotExactError
from relay.support.json_bounds import JsonTooDeepError, check_depth
from relay.support.persistence import Persistence, is_passing, seconds_asked

T = TypeVar("T")

_PERSISTENCE = Persistence(first_pause=0.5, longest_pause=2.0, spread=0.5)
"""Of a small request."""
_LINE_MAX = 64 << 10
"""Bytes of one line of progress."""


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


class Connection:
    """To one relay. Use it as an async context manager; safe for many tasks at once."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        connect_to: Sequence[str] = (),
        limits: ClientLimits | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Talk to the relay at `url` (`http` or `https`, no path), as bearer of `token`.

        `connect_to` are the host's addresses, where another resolver than the system's found them; TLS and Host keep
        the name.

        Raises:
            UsageError: `url` is not such a URL, or the environment names a proxy for it that cannot be used.
        """
        parts = _split_url(url)
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.traffic = Traffic()
        self.limits = limits or ClientLimits()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._host, self._connect_to = parts.hostname or "", connect_to
        self._resolver: KnownAddresses | None = None
        self._proxy = proxy_of(self.url)
        self._way = f"It is asked through {self._proxy}" if self._proxy else ""
        self._where = f"relay {self.url}"
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    # --- whole answers

    async def ask(self, request: Request, answer: type[T]) -> T:
        """The answer, parsed. Retried where that may help."""
        return self.parse(await self.fetch(request), answer)

    async def fetch(self, request: Request) -> bytes:
        """The answer as it came. Retried where that may help."""

        async def once() -> bytes:
            async with self.open(request) as response:
                return await self.body(response, request.answer_max or messages.JSON_MAX)

        attempts = request.attempts or self.limits.attempts
        return await replace(_PERSISTENCE, failures=attempts - 1).call(once)

    async def upload(self, request: Request, body: AsyncIterator[bytes], answer: type[T]) -> T:
        """As `ask`, with a body that is made as it goes. Not retried. Raises what `body` raises, too."""
        own: list[WaystationError] = []
        loop, patience = asyncio.get_running_loop(), asyncio.timeout(self.limits.answer_seconds)

        async def counted() -> AsyncIterator[bytes]:
            try:
                async for piece in body:
                    self.traffic.sent += chunked_bytes(len(piece))
                    yield piece
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
            raise UntrustedError(message, hint=self._way) from error

    # --- answers as they come

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer, from its head on. Not retried."""
        session, body = self._open_session(), request.body
        if isinstance(body, bytes):
            self.traffic.sent += len(body)
        wait = self.limits.answer_seconds if request.answer_seconds == 0.0 else request.answer_seconds
        try:
            with through(self._proxy, self._where):
                async with (
                    asyncio.timeout(wait) as deadline,
                    session.request(
                        request.method,
                        request.path,
                        data=body,
                        headers=({} if body is None else {"Content-Type": request.content_type})
                        | dict(request.headers),
                        params=request.params,
                        allow_redirects=False,
                        proxy=self._proxy.url if self._proxy else None,
                    ) as response,
                ):
                    deadline.reschedule(None)
                    self._count_heads(request.method, response)
                    if response.status >= 300:
                        await self._raise_problem(response)
                    yield response
        except aiohttp.ClientConnectorCertificateError as error:
            # The verdict alone, without the library's own framing.
            verdict = getattr(error.certificate_error, "verify_message", "") or error.certificate_error
            raise UntrustedError(
                f"{self._where} shows a certificate that is not trusted: {verdict}",
                hint="Name the authority that signs it with --ca-file, or with ca_file in agent.yaml",
            ) from error
        except aiohttp.ServerDisconnectedError as error:
            self._turn()
            hint = "If it speaks TLS, its URL begins with https" if self.url.startswith("http:") else ""
            message = f"{self._where} closed the connection without an answer"
            raise UnreachableError(message, hint=self._way or hint) from error
        except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError, ConnectionError, socket.gaierror) as error:
            self._turn()
            raise UnreachableError(f"{self._where} cannot be reached: {_reason(error)}", hint=self._way) from error
        except TimeoutError as error:
            raise UnreachableError(f"{self._where} did not answer in time", hint=self._way) from error
        except aiohttp.ClientError as error:
            message = f"{self._where} does not speak the protocol: {_reason(error)}"
            raise UntrustedError(message, hint=self._way) from error

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

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._resolver = KnownAddresses(self._host, self._connect_to) if self._connect_to else None
            self._session = aiohttp.ClientSession(
                base_url=self.url,
                connector=connector(self._resolver, tls=self._tls, limit=64),
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.limits.connect_seconds),
                auto_decompress=False,
                read_bufsize=512 << 10,
                skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept"),
            )
        return self._session

    def _turn(self) -> None:
        """The next try begins with another address: what accepts connections is not yet the relay."""
        if self._resolver is not None:
            self._resolver.turn()

    def _count_heads(self, method: str, response: aiohttp.ClientResponse) -> None:
        sent = ((k.encode(), v.encode()) for k, v in response.request_info.headers.items())
        target = response.request_info.url.raw_path_qs
        self.traffic.sent += header_bytes(f"{method} {target} HTTP/1.1", sent)
        self.traffic.received += header_bytes(f"HTTP/1.1 {response.status} {response.reason}", response.raw_headers)

    async def _raise_problem(self, response: aiohttp.ClientResponse) -> None:
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
                raise TokenRefusedError(
                    f"{where} refuses this token" if status == 403 else f"{where} wants a token",
                    hint="Give one of the right scope with --token-file or WAYSTATION_TOKEN",
                )
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
        return msgspec.json.decode(body, type=messages.ProblemAnswer)
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


def tls_from(ca_file: str | None) -> ssl.SSLContext | None:
    """How to trust a relay's certificate: by the authorities in `ca_file` (PEM), or None for the system's.

    Raises:
        UsageError: the file cannot be used.
    """
    if ca_file is None:
        return None
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"CA file {ca_file!r} cannot be used: {error}") from error


def token_from(file: str | None, environment: Callable[[str], str | None] = os.environ.get) -> str | None:
    """The bearer token: from `--token-file`, else from WAYSTATION_TOKEN, else none.

    Raises:
        UsageError: the file cannot be read or is empty.
    """
    if file is None:
        return (environment("WAYSTATION_TOKEN") or "").strip() or None
    try:
        with open(file, encoding="utf-8") as handle:
            token = handle.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"token file {file!r} cannot be read: {error}") from error
    if not token:
        raise UsageError(f"token file {file!r} is empty")
    return token
