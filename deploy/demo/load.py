"""People at the shop: clients that ask at a fixed rate, half of them over one connection, half over a new one each time.

Every request is tried once. It is http.client that speaks HTTP: other libraries (aiohttp among them) quietly repeat a GET
whose kept connection broke, and that is one of the failures to be seen. The rate is kept whatever the answers take: a slow
answer is not followed by fewer requests (https://www.scylladb.com/2021/04/22/on-coordinated-omission/).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, IncompleteRead, RemoteDisconnected
from typing import Self

from yarl import URL

CLIENTS = 24
RATE = 120.0
"""Requests a second of all clients together."""

_KINDS: dict[str, type[BaseException] | tuple[type[BaseException], ...]] = {
    "timeout": TimeoutError,
    "refused": ConnectionRefusedError,
    "cut": (RemoteDisconnected, IncompleteRead),
    "reset": OSError,
    "garbled": HTTPException,
}
"""The first that fits says what a failure is called."""


@dataclass(frozen=True, slots=True)
class Visit:
    """A request and what came of it.

    Attributes:
        second: when it began, counted from the start.
        version: what answered it with status 200, or empty.
        failure: else what went wrong: `refused`, `reset`, `cut`, `timeout`, `garbled`, or `status 503` and the like.
        kept: its client keeps its connection.
    """

    second: float
    version: str
    failure: str
    kept: bool


@dataclass(frozen=True, slots=True)
class Summary:
    """What the clients saw."""

    visits: tuple[Visit, ...]

    @property
    def requests(self) -> int:
        return len(self.visits)

    @property
    def kept(self) -> int:
        """Requests over connections that are kept."""
        return sum(visit.kept for visit in self.visits)

    @property
    def failed(self) -> int:
        return self.kinds.total()

    @property
    def kinds(self) -> Counter[str]:
        """Failures by kind."""
        return Counter(visit.failure for visit in self.visits if visit.failure)

    @property
    def versions(self) -> dict[str, int]:
        """Answers of status 200 by the version that gave them."""
        return dict(Counter(visit.version for visit in self.visits if not visit.failure))

    @property
    def seconds(self) -> list[Summary]:
        """The same second by second, by when requests began."""
        last = int(max((visit.second for visit in self.visits), default=-1))
        return [
            Summary(tuple(visit for visit in self.visits if int(visit.second) == second)) for second in range(last + 1)
        ]


class Load:
    """Clients that ask for `url` from the beginning of `async with` to its end, when each finishes what it has begun."""

    def __init__(self, url: str, *, clients: int = CLIENTS, rate: float = RATE, timeout: float = 10.0) -> None:
        self._url = URL(url)
        self._clients = clients
        self._pause = clients / rate
        self._timeout = timeout
        self._start = 0.0
        self._visits: list[Visit] = []
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._threads = ThreadPoolExecutor(clients)

    async def __aenter__(self) -> Self:
        self._start = time.monotonic()
        for number in range(self._clients):
            client = _Client(self._url, self._timeout, keeps=number % 2 == 0)
            begin = self._start + number * self._pause / self._clients
            self._tasks.append(asyncio.create_task(self._visit(client, begin)))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        try:
            await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            self._threads.shutdown(wait=False)

    @property
    def requests(self) -> int:
        """Those that have ended."""
        return len(self._visits)

    def summary(self) -> Summary:
        """So far, or of all once it has ended."""
        return Summary(tuple(self._visits))

    async def until(self, requests: int) -> None:
        """Return once so many requests have ended."""
        while len(self._visits) < requests:
            for task in self._tasks:
                if task.done():
                    task.result()  # None ends before the load does, but by an error.
            await asyncio.sleep(0.02)

    async def _visit(self, client: _Client, at: float) -> None:
        loop = asyncio.get_running_loop()
        try:
            while not await self._stopped_before(at):
                begun = time.monotonic()
                try:
                    version, failure = await loop.run_in_executor(self._threads, client.ask), ""
                except _FailedError as error:
                    version, failure = "", error.kind
                self._visits.append(Visit(begun - self._start, version, failure, client.keeps))
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


class _Client:
    """One visitor; it holds its connection between two requests, or not."""

    def __init__(self, url: URL, timeout: float, *, keeps: bool) -> None:
        self.keeps = keeps
        self._path = url.path
        self._line = HTTPConnection(url.host or "", url.port, timeout=timeout)

    def ask(self) -> str:
        """The version that answered. Blocking. Raises `_FailedError`."""
        try:
            self._line.request("GET", self._path, headers={"Connection": "keep-alive" if self.keeps else "close"})
            answer = self._line.getresponse()
            answer.read()
        except (OSError, HTTPException) as error:
            self.hang_up()
            raise _FailedError(next(kind for kind, errors in _KINDS.items() if isinstance(error, errors))) from None
        is_good = answer.status == HTTPStatus.OK
        if not (self.keeps and is_good):
            self.hang_up()
        if not is_good:
            raise _FailedError(f"status {answer.status}")
        return answer.headers["X-Version"]

    def hang_up(self) -> None:
        self._line.close()
