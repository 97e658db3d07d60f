"""People at the shop: clients that ask at a fixed rate, half of them over one connection, half over a new one each time.

Every request is tried once. HTTP is spoken by hand, as libraries (aiohttp among them) quietly repeat a GET whose
kept connection broke, and that is one of the failures to be seen. The rate is kept whatever the answers take: a slow
answer is not followed by fewer requests (https://www.scylladb.com/2021/04/22/on-coordinated-omission/).
"""

from __future__ import annotations

import asyncio
import time
from asyncio import StreamReader, StreamWriter
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

CLIENTS = 24
RATE = 120.0
"""Requests a second of all clients together."""

_HEAD_MAX = 16 << 10


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without a whole answer of status 200. `second` counts from the start."""

    second: float
    kind: str
    """`refused`, `reset`, `cut`, `timeout`, `garbled`, or `status 503` and the like."""
    kept: bool
    """The client keeps its connection."""


@dataclass(frozen=True, slots=True)
class Second:
    """What happened within one second, by when requests began."""

    requests: int
    failed: int
    versions: dict[str, int]


@dataclass(frozen=True, slots=True)
class Summary:
    """What the clients saw.

    Attributes:
        kept, single: requests over connections that are kept, and over one of their own.
        kinds: failures by kind.
        versions: answers of status 200 by the version that gave them.
        seconds: the same second by second.
        slowest: the longest time that one answer took, in seconds.
    """

    requests: int
    kept: int
    single: int
    failures: tuple[Failure, ...]
    versions: dict[str, int]
    seconds: tuple[Second, ...]
    slowest: float

    @property
    def failed(self) -> int:
        return len(self.failures)

    @property
    def kinds(self) -> dict[str, int]:
        return dict(Counter(failure.kind for failure in self.failures))


class Load:
    """Clients that ask for `url` from the beginning of `async with` to its end, when each finishes what it has begun."""

    def __init__(self, url: str, *, clients: int = CLIENTS, rate: float = RATE, timeout: float = 10.0) -> None:
        self._target = _Target.of(url)
        self._clients = clients
        self._pause = clients / rate
        self._timeout = timeout
        self._book = _Book()
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._book.start = time.monotonic()
        for number in range(self._clients):
            client = _Client(self._target, self._timeout, keeps=number % 2 == 0)
            begin = self._book.start + number * self._pause / self._clients
            self._tasks.append(asyncio.create_task(self._visit(client, begin)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        try:
            await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()

    def summary(self) -> Summary:
        """So far, or of all once it has ended."""
        return self._book.summary()

    async def until(self, requests: int) -> None:
        """Return once so many requests have ended."""
        while self._book.count < requests:
            for task in self._tasks:
                if task.done():
                    task.result()  # None ends before the load does, but by an error.
            await asyncio.sleep(0.02)

    async def _visit(self, client: _Client, at: float) -> None:
        try:
            while not await self._stopped_before(at):
                begun = time.monotonic()
                try:
                    version, failure = await client.ask(), ""
                except _FailedError as error:
                    version, failure = "", error.kind
                self._book.enter(begun, time.monotonic(), version, failure, kept=client.keeps)
                at += self._pause
        finally:
            client.hang_up()

    async def _stopped_before(self, at: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), max(0.0, at - time.monotonic()))
        return self._stop.is_set()


class _FailedError(Exception):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class _Target:
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> _Target:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url!r}: expected http://HOST:PORT/PATH")
        return cls(parts.hostname, parts.port or 80, parts.path or "/")


@dataclass(slots=True)
class _Client:
    """One visitor; it holds its connection between two requests, or not."""

    target: _Target
    timeout: float
    keeps: bool
    line: tuple[StreamReader, StreamWriter] | None = None

    async def ask(self) -> str:
        """The version that answered. Raises `_FailedError`."""
        try:
            async with asyncio.timeout(self.timeout):
                version, stays = await self._exchange()
        except BaseException as error:
            self.hang_up()
            match error:
                case TimeoutError():
                    raise _FailedError("timeout") from None
                case ConnectionRefusedError():
                    raise _FailedError("refused") from None
                case asyncio.IncompleteReadError():
                    raise _FailedError("cut") from None
                case OSError():
                    raise _FailedError("reset") from None
                case ValueError() | LookupError() | asyncio.LimitOverrunError():
                    raise _FailedError("garbled") from None
            raise
        if not (self.keeps and stays):
            self.hang_up()
        return version

    async def _exchange(self) -> tuple[str, bool]:
        if self.line is None:
            self.line = await asyncio.open_connection(self.target.host, self.target.port, limit=_HEAD_MAX)
        reader, writer = self.line
        connection = "keep-alive" if self.keeps else "close"
        writer.write(
            f"GET {self.target.path} HTTP/1.1\r\nHost: {self.target.host}\r\nConnection: {connection}\r\n\r\n".encode()
        )
        await writer.drain()
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if (status := int(first.split(" ")[1])) != 200:
            raise _FailedError(f"status {status}")
        await reader.readexactly(int(headers["content-length"]))
        return headers["x-version"], headers.get("connection", "").lower() != "close"

    def hang_up(self) -> None:
        if self.line is not None:
            self.line[1].close()
            self.line = None


@dataclass(slots=True)
class _Book:
    start: float = 0.0
    count: int = 0
    kept: int = 0
    slowest: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    per_second: dict[int, tuple[int, Counter[str]]] = field(default_factory=dict)

    def enter(self, begun: float, ended: float, version: str, failure: str, *, kept: bool) -> None:
        self.count += 1
        self.kept += kept
        self.slowest = max(self.slowest, ended - begun)
        second = int(begun - self.start)
        requests, versions = self.per_second.setdefault(second, (0, Counter()))
        self.per_second[second] = (requests + 1, versions)
        if failure:
            self.failures.append(Failure(begun - self.start, failure, kept))
        else:
            versions[version] += 1

    def summary(self) -> Summary:
        failed = Counter(int(failure.second) for failure in self.failures)
        whole: Counter[str] = Counter()
        seconds = []
        for second in range(max(self.per_second, default=-1) + 1):
            requests, versions = self.per_second.get(second, (0, Counter()))
            whole.update(versions)
            seconds.append(Second(requests, failed[second], dict(versions)))
        return Summary(
            self.count,
            self.kept,
            self.count - self.kept,
            tuple(self.failures),
            dict(whole),
            tuple(seconds),
            self.slowest,
        )
