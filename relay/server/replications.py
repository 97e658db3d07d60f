"""Packages that this relay fetches from another one on request: one flight for each, however many ask.

A flight belongs to the relay, not to its request: it goes on when its watchers are gone, and ends with the relay.
What came stays; asked again, it goes on from there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Final, Literal
from weakref import WeakValueDictionary

import msgspec
from aiohttp import web

from relay.audit.acts import PackageConflict, ReplicationBegun, ReplicationEnded, ReplicationFailed
from relay.audit.event import NOBODY, Caller, tell
from relay.errors import ConflictError, IdentityError, StoreError, WaystationError
from relay.package.identity import NuGetVersion, PackageId, PackageRef
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.server import metrics
from relay.server.http.access import DRAINING, Routes
from relay.server.http.bodies import read_json, stream
from relay.server.http.callers import caller_of
from relay.server.http.connection import Limits
from relay.server.http.problems import TITLES, HttpRefusal, verdict_of
from relay.server.packages import Transfer
from relay.server.peers import Peers
from relay.server.relay_download import DownloadState, RelayDownload
from relay.stores.open import Store
from relay.support.rate_limit import Pacer
from relay.support.together import any_of

AT_ONCE: Final = 3
"""Replications that fetch at one time; the others wait for their turn."""
TELL_SECONDS: Final = 0.5
"""Between two lines of progress, where something came."""
UNHEARD_SECONDS: Final = 60.0
"""How long one that ended well without a watcher can still be joined: a watcher that was cut off learns what it moved."""
SILENCE_SECONDS: Final = 2.0
"""Between two lines of progress at most: watchers know that we are there."""


class Flight:
    """One package on its way here."""

    def __init__(
        self,
        order: messages.ReplicationRequest,
        bring: Callable[[DownloadState], Coroutine[Any, Any, None]],
        places: asyncio.Semaphore,
        by: Caller = NOBODY,
    ) -> None:
        """Begin at once, or as soon as one of `places` is free. `by` asked for it."""
        self.order = order
        self._by = by
        self.download = DownloadState()
        self._state: Literal["waiting", "running", "done", "failed"] = "waiting"
        self._code = self._reason = ""
        self._began = time.monotonic()
        self._ended = 0.0
        self._was_heard = False
        self._task = asyncio.create_task(self._run(bring, places))

    @property
    def is_over(self) -> bool:
        return self._task.done()

    @property
    def can_be_joined(self) -> bool:
        if not self.is_over:
            return True
        is_new = time.monotonic() - self._ended < UNHEARD_SECONDS
        return self._state == "done" and not self._was_heard and is_new

    @property
    def progress(self) -> messages.ReplicationProgress:
        """How it stands now."""
        download = self.download
        return messages.ReplicationProgress(
            state=self._state,
            bytes=download.here,
            whole=download.whole,
            wire_bytes=download.wire_bytes(),
            encodings=download.encodings,
            fallbacks=download.fallbacks,
            seconds=(self._ended or time.monotonic()) - self._began,
            code=self._code,
            reason=self._reason,
        )

    async def watch(self, stop: asyncio.Event) -> AsyncGenerator[messages.ReplicationProgress, None]:
        """How it stands, now, when that changes, and at last how it ended. It ends early when `stop` is set."""
        shown: messages.ReplicationProgress | None = None
        shown_at = 0.0
        while not (self.is_over or stop.is_set()):
            now = self.progress
            if shown is None or _is_news(now, shown) or time.monotonic() - shown_at > SILENCE_SECONDS:
                shown, shown_at = now, time.monotonic()
                yield now
            # Bytes are news now and then; the offer and the end are at once, as relays below wait for them.
            offer = self.download.news
            at_once = [stop.wait()] if offer.is_set() else [stop.wait(), offer.wait()]
            await any_of(TELL_SECONDS, asyncio.shield(self._task), *at_once)
        if self.is_over:
            yield self.progress
            self._was_heard = True

    async def stop(self) -> None:
        """End it here. What came is kept. Twice is once."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(
        self, bring: Callable[[DownloadState], Coroutine[Any, Any, None]], places: asyncio.Semaphore
    ) -> None:
        try:
            async with places:
                self._state = "running"
                order = self.order
                tell(ReplicationBegun(self._by, order.id, order.version, order.manifest, order.source))
                await bring(self.download)
            self._state = "done"
        except WaystationError as error:
            if isinstance(error, ConflictError):
                tell(PackageConflict(self._by, messages.REPLICATIONS, error.message))
            code = verdict_of(error).code
            # What went wrong with our own store names folders of ours: that is for the log.
            self._fail(code, TITLES[code] if isinstance(error, StoreError) else error.message, error.message)
        except asyncio.CancelledError:
            self._fail("busy", "the relay was asked to stop fetching from there")
        except Exception as error:
            self._fail("internal", TITLES["internal"], type(error).__name__, error)
        finally:
            self._ended = time.monotonic()
            metrics.REPLICATIONS.labels(self._state).inc()
        if self._state == "done":
            done = self.progress
            what = self.order.id, self.order.version, self.order.source
            tell(ReplicationEnded(*what, done.bytes, done.wire_bytes, done.seconds))

    def _fail(self, code: str, reason: str, why: str = "", error: Exception | None = None) -> None:
        """`why` and `error` are for the log alone."""
        self._state, self._code, self._reason = "failed", code, reason[:300]
        now, what = self.progress, (self.order.id, self.order.version, self.order.source)
        tell(ReplicationFailed(*what, now.wire_bytes, now.seconds, code, why or reason), error)


def _is_news(now: messages.ReplicationProgress, before: messages.ReplicationProgress) -> bool:
    return (now.state, now.bytes, now.whole) != (before.state, before.bytes, before.whole)


async def _lines(progresses: AsyncGenerator[messages.ReplicationProgress, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(progresses):
        async for progress in progresses:
            yield msgspec.json.encode(progress) + b"\n"


class Replications:
    """All flights of one relay, and the route that begins and watches them."""

    def __init__(
        self,
        transfer: Transfer,
        store: Store,
        peers: Peers,
        limits: Limits,
        *,
        at_once: int = AT_ONCE,
    ) -> None:
        self._transfer = transfer
        self._store = store
        self._peers = peers
        self._limits = limits
        self._places = asyncio.Semaphore(at_once)
        self._flights: dict[str, Flight] = {}
        # Weak: a line that nothing is fetched over has no limit to keep.
        self._pacers: WeakValueDictionary[str, Pacer] = WeakValueDictionary()
        self._changing = asyncio.Lock()

    def routes(self) -> Routes:
        """As `Routed`."""
        return (("POST", messages.REPLICATIONS, self.post, "write"),)

    async def post(self, request: web.Request) -> web.StreamResponse:
        """Begin or join a flight, and stream how far it is. The peer may go away at any time."""
        body = await read_json(request, self._limits, messages.ReplicationRequest, messages.RANGES_BODY_MAX)
        flight = await self.begin(body, caller_of(request))
        lines = _lines(flight.watch(request.app[DRAINING]))
        headers = {"Content-Type": messages.PROGRESS_TYPE, "Cache-Control": "no-store"}
        return await stream(request, lines, self._limits, headers)

    async def begin(self, request: messages.ReplicationRequest, by: Caller = NOBODY) -> Flight:
        """The flight that brings this package: the one under way where there is one, else a new one.

        One that fetches from elsewhere ends first: the last request knows best which relays are alive.

        Raises:
            HttpRefusal: 403 `unknown_peer`; 400 `bad_fields` where id or version are none.
            UsageError: the peer's token cannot be read.
        """
        package = _package(request)
        client = self._peers.open(request.source)
        async with self._changing:
            running = self._flights.get(request.manifest)
            if running is not None and running.can_be_joined and running.order == request:
                await client.close()
                return running
            if running is not None:
                await running.stop()
            flight = Flight(request, lambda state: self._bring(package, request, client, state), self._places, by)
            living = {manifest: flight for manifest, flight in self._flights.items() if flight.can_be_joined}
            self._flights = living | {request.manifest: flight}
            return flight

    async def close(self) -> None:
        """Stop all flights. What came is kept. Twice is once."""
        await asyncio.gather(*(flight.stop() for flight in self._flights.values()))

    async def _bring(
        self, package: PackageRef, request: messages.ReplicationRequest, client: RelayClient, state: DownloadState
    ) -> None:
        async with client:
            pacer = self._pacer(request)
            await RelayDownload(package, request, client, self._transfer, self._store, state, pacer).run()

    def _pacer(self, request: messages.ReplicationRequest) -> Pacer | None:
        """Of the line to this source: what is fetched over it at one time shares its limit."""
        if not request.rate:
            return None
        pacer = self._pacers.get(request.source)
        if pacer is None or pacer.rate != request.rate:
            pacer = self._pacers[request.source] = Pacer(request.rate)
        return pacer


def _package(request: messages.ReplicationRequest) -> PackageRef:
    try:
        return PackageRef(PackageId.parse(request.id), NuGetVersion.parse(request.version))
    except IdentityError as error:
        raise HttpRefusal(400, "bad_fields") from error
