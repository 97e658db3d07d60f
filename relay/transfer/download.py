"""Download chunks of one package from the best of several sources, and go on at the next one when it fails.

The whole of resumption is one question: which chunks are still missing? A chunk counts when it is verified; what was in
flight when a source failed is asked for again, of any source.

Where the line is not fast, a source hears what is held here already, so that it can send differences. A difference that
cannot be decoded is asked for again plainly, of the same source: a source is left for lies in plain bytes only.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from relay.encoding.bundle import (
    Aborted,
    BaseMissingError,
    CutShortError,
    Event,
    NotSent,
    Places,
    Received,
    RunRefused,
    Sink,
    Tap,
)
from relay.encoding.codecs import DELTAS, Encoding
from relay.encoding.holdings import Holdings
from relay.encoding.planner import RequestShape, request_shape
from relay.errors import (
    FrameError,
    RefusedError,
    StoreError,
    UnreachableError,
    UntrustedError,
    WaystationError,
    first_of,
)
from relay.package.manifest import Manifest
from relay.protocol.messages import EncodedBytes, summed
from relay.support.persistence import Bearing, Persistence

FALLBACKS_MAX = 3
"""Differences of one source that may fail, before it is asked for none any more."""
CONNECTIONS = 2
"""Requests at a time. Each can lose at most one chunk in flight when its source dies."""
STALL_SECONDS = 60.0
"""A source where chunks are still arriving is left when none came for so long."""
PERSISTENCE = Persistence(first_pause=0.2, longest_pause=5.0, longest_asked=5.0, failures=0, patience=STALL_SECONDS)
"""With one source: one that fails is left for the next at once, unless it asks for patience."""
_BATCH_BYTES = 2 << 20
_TELLING_BYTES = 256 << 10
"""Bytes of payload behind the first chunk from which on a request says something about the line."""


class ChunkSource(Protocol):
    """What streams chunks of a manifest: a relay, or a store that can be reached as files."""

    @property
    def name(self) -> str:
        """For people."""

    def stream(
        self,
        manifest: Manifest,
        indexes: Sequence[int],
        *,
        bases: Holdings | None = None,
        goodput: float = 0.0,
        tap: Tap | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Verified chunks, about in this order; `NeedsBases` is answered behind it.

        Args:
            manifest: of the package.
            indexes: of the chunks.
            bases: what the source may build on.
            goodput: of the line, bytes per second of payload; 0 where it is not known.
            tap: hears of each run before its chunks come, in any thread.

        Raises:
            UntrustedError, UnreachableError, RefusedError: the source's fault, the line's, or its rule.
            StoreError: a base cannot be read here.
        """


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """How one request went, for the ranking of sources."""

    first_byte: float
    """Seconds from the request to the first verified chunk."""
    goodput: float | None
    """Bytes of payload per second of all requests to this source together; None where too few came to tell."""
    is_steady: bool = True
    """Whether it was the line that set the pace; else the source may have waited for an encoder or for chunks to arrive,
    and the line is at least so fast."""


@dataclass(slots=True)
class SourceTally:
    """What one source did in one download."""

    chunks: int = 0
    bytes: int = 0
    payload_bytes: int = 0
    error: WaystationError | None = None
    timings: list[RequestTiming] = field(default_factory=list)
    fallbacks: int = 0
    """Runs that could not be decoded and were asked for again plainly."""
    encodings: dict[str, EncodedBytes] = field(default_factory=dict)

    def count(self, encoding: str, size: int, payload_bytes: int) -> None:
        """One chunk of `size` bytes that came in this encoding."""
        self.chunks += 1
        self.bytes += size
        self.payload_bytes += payload_bytes
        known = [self.encodings[encoding]] if encoding in self.encodings else []
        (self.encodings[encoding],) = summed([*known, EncodedBytes(encoding, 1, size, payload_bytes)])


def sum_encodings(tallies: Iterable[SourceTally]) -> list[EncodedBytes]:
    """What crossed all lines, by encoding."""
    return list(summed(each for tally in tallies for each in tally.encodings.values()))


@dataclass(frozen=True, slots=True)
class DownloadLimits:
    """How much a receiver asks for and takes at a time, and how long it bears with a source."""

    connections: int = CONNECTIONS
    asks_whole: bool = False
    """Whether all that is missing is asked for in one request, with what is held here, whatever the line: for a receiver
    that hands on what comes, as the source then encodes far ahead."""
    batch_bytes: int = _BATCH_BYTES
    """Chunks are delivered when so many bytes of them came; 0: each as it comes."""
    persistence: Persistence = PERSISTENCE
    """For each source. Its patience is also for a source where chunks are still arriving."""


class NoSourceLeftError(UnreachableError):
    """Every source failed. Its message names each with its reason; what was fetched is kept."""

    def __init__(self, manifest: Manifest, missing: int, errors: dict[str, WaystationError]) -> None:
        told = "; ".join(f"{name}: {error.message}" for name, error in errors.items()) or "there is none"
        super().__init__(
            f"{missing} chunks of {manifest.package} could not be fetched from any source ({told})",
            hint="What was fetched is kept: the same command goes on from there",
        )
        self.errors = errors


class ChunksAbsentError(UnreachableError):
    """The source does not hold all of it. An answer, not a failure of the source."""


class StalledError(UnreachableError):
    """The source still waits for chunks, and none came for so long that asking again is no use."""


class _NotTakenError(Exception):
    """Around what `Receiver.take` raised: that is the receiver's own trouble, and no source is left for it."""


class Receiver:
    """What differs between receivers: where chunks go, what a source may build on, how long it is borne with."""

    limits = DownloadLimits()

    async def take(self, batch: Sequence[Received]) -> None:
        """Verified chunks; when it returns, they count as here. What it raises ends the download."""
        raise NotImplementedError

    async def bases(self) -> Holdings | None:
        """What is held here. Asked at most once, and only where a line makes it worth while."""
        return None

    def goodput(self, source: str) -> float:  # noqa: ARG002 - the signature
        """What was measured of the line to a source before, bytes per second; 0 where nothing was."""
        return 0.0

    def tap(self, run: Places, bases: Places, encoding: Encoding) -> Sink | None:  # noqa: ARG002 - the signature
        """As `Tap`: hears of each run before its chunks come, and takes its payload while it comes, in any thread."""
        return None

    async def left(self, source: ChunkSource, error: WaystationError) -> None:
        """A source failed; it will not be asked again in this download."""


async def download(
    manifest: Manifest,
    wanted: Iterable[int],
    sources: Sequence[ChunkSource],
    receiver: Receiver,
    tallies: dict[str, SourceTally] | None = None,
) -> dict[str, SourceTally]:
    """Bring every chunk in `wanted` (indexes) to `receiver`, from `sources` in order of preference.

    Returns what each source that was asked did, by name: `tallies` where it is given, which can be read meanwhile.

    Raises:
        NoSourceLeftError: all sources failed before all chunks were there.
        Exception: whatever `receiver.take` raises, at once.
    """
    run = _Download(manifest, wanted, sources, receiver, {} if tallies is None else tallies)
    await run.work()
    return run.tallies


class _Asked:
    """One source in this download: how it was borne, and what is known of its line, which all its requests share."""

    def __init__(self, source: ChunkSource, tally: SourceTally, bearing: Bearing, goodput: float) -> None:
        self.source = source
        self.name = source.name
        self.tally = tally
        self.bearing = bearing
        self.goodput = goodput
        self.open = 0
        """Requests."""

    def learn(self, timing: RequestTiming) -> None:
        self.tally.timings.append(timing)
        if timing.goodput is not None and (timing.is_steady or 0.0 < self.goodput < timing.goodput):
            self.goodput = timing.goodput


class _Download:
    def __init__(
        self,
        manifest: Manifest,
        wanted: Iterable[int],
        sources: Sequence[ChunkSource],
        receiver: Receiver,
        tallies: dict[str, SourceTally],
    ) -> None:
        self.tallies = tallies
        self._manifest = manifest
        self._missing = set(wanted)
        self._sources = sources
        self._receiver = receiver
        self._limits = receiver.limits
        self._asked: dict[str, _Asked] = {}
        self._finding: asyncio.Task[Holdings | None] | None = None
        self._todo: deque[int] = deque()
        self._plainly: set[int] = set()
        """Chunks whose difference failed."""

    async def work(self) -> None:
        while self._missing:
            if not self._todo:
                self._todo = deque(sorted(self._missing))
            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(self._limits.connections):
                        group.create_task(self._worker(is_first=not number))
            except BaseExceptionGroup as errors:
                first = first_of(errors)
                raise (first.__cause__ or first if isinstance(first, _NotTakenError) else first) from None

    async def _worker(self, *, is_first: bool) -> None:
        while self._todo:
            asked = self._best()
            shape = await self._shape(asked)
            if not self._todo or (shape.one_at_a_time and not is_first):
                return
            segment, plainly = self._next_segment(shape.segment_bytes)
            try:
                await self._ask(asked, segment, with_bases=shape.with_bases and not plainly)
            except StoreError:
                raise
            except (UntrustedError, UnreachableError, RefusedError) as error:
                await self._bear(asked, error)
            else:
                if self._missing.issuperset(segment) and self._plainly.isdisjoint(segment):
                    # Everything is still on its way there. A relay waits itself before it says so; one that does not
                    # must not be asked without end.
                    await asyncio.sleep(self._limits.persistence.first_pause)
            self._todo.extendleft(index for index in reversed(segment) if index in self._missing)

    def _best(self) -> _Asked:
        for source in self._sources:
            asked = self._asked.get(source.name) or self._begin(source)
            if asked.tally.error is None:
                return asked
        errors = {name: tally.error for name, tally in self.tallies.items() if tally.error}
        raise NoSourceLeftError(self._manifest, len(self._missing), errors)

    def _begin(self, source: ChunkSource) -> _Asked:
        tally = self.tallies.setdefault(source.name, SourceTally())
        bearing = Bearing(self._limits.persistence)
        asked = self._asked[source.name] = _Asked(source, tally, bearing, self._receiver.goodput(source.name))
        return asked

    async def _shape(self, asked: _Asked) -> RequestShape:
        # Bases are looked for only where they may be of use: that reads whole trees.
        is_worth_it = self._limits.asks_whole or request_shape(asked.goodput, can_have_bases=True).with_bases
        found = await self._bases() if is_worth_it and asked.tally.fallbacks < FALLBACKS_MAX else None
        if self._limits.asks_whole:
            return RequestShape(self._manifest.stream_size, one_at_a_time=True, with_bases=found is not None)
        return request_shape(asked.goodput, can_have_bases=found is not None)

    async def _bases(self) -> Holdings | None:
        """What is held here, looked for once, when it is first of use."""
        if self._finding is None:
            self._finding = asyncio.ensure_future(self._receiver.bases())
        found = await asyncio.shield(self._finding)
        return found if found is not None and found.held else None

    def _next_segment(self, most: int) -> tuple[list[int], bool]:
        """What to ask for next, and whether to ask for it plainly: chunks of one kind, so that the others need not be."""
        plainly = self._todo[0] in self._plainly
        segment: list[int] = []
        size = 0
        while self._todo and (self._todo[0] in self._plainly) == plainly:
            size += self._manifest.chunks[self._todo[0]].size
            if segment and size > most:
                break
            segment.append(self._todo.popleft())
        return segment, plainly

    async def _bear(self, asked: _Asked, error: WaystationError) -> None:
        """Pause before the source is asked again, or leave it.

        One that is well and asks for patience gets some: the next may stand behind a thin line.
        """
        may_help = isinstance(error, UnreachableError) and not isinstance(error, StalledError)
        pause = asked.bearing.pause_after(error) if may_help else None
        if pause is not None:
            await asyncio.sleep(pause)
        elif asked.tally.error is None:
            asked.tally.error = error
            await self._receiver.left(asked.source, error)

    # --- one request

    async def _ask(self, asked: _Asked, segment: Sequence[int], *, with_bases: bool) -> None:
        bases = await self._bases() if with_bases else None
        request = _Request(asked, segment)

        def tap(run: Places, built_on: Places, encoding: Encoding) -> Sink | None:
            request.begins(run, built_on, encoding)
            return self._receiver.tap(run, built_on, encoding)

        stream = asked.source.stream(self._manifest, segment, bases=bases, goodput=asked.goodput, tap=tap)
        try:
            async for event in stream:
                if isinstance(event, Received):
                    request.took(event)
                    if request.untaken_bytes >= self._limits.batch_bytes:
                        await self._take(request)
                    continue
                await self._take(request)
                self._heed(request, event, had_bases=bases is not None)
            if request.owed:
                raise FrameError(f"{asked.name} left out {len(request.owed)} chunks without a word")
        finally:
            request.close()
            try:
                await self._take(request)
            finally:
                await stream.aclose()
        if request.bytes:
            asked.learn(request.timing())

    async def _take(self, request: _Request) -> None:
        fresh = [received for received in request.untaken() if received.index in self._missing]
        if not fresh:
            return
        try:
            await self._receiver.take(fresh)
        except WaystationError as error:
            raise _NotTakenError from error
        self._missing.difference_update(received.index for received in fresh)
        request.asked.bearing.gain()
        for received in fresh:
            encoding = request.encodings.get(received.index, "zstd")
            request.asked.tally.count(encoding, received.chunk.size, received.payload_bytes)

    def _heed(self, request: _Request, event: Event, *, had_bases: bool) -> None:
        """What an event means that brings no chunk. Raises what cannot be borne in this request."""
        name = request.asked.name
        match event:
            case RunRefused(error=CutShortError()):
                return
            case RunRefused():
                if not (had_bases and request.is_delta(event)):
                    raise event.error
                request.asked.tally.fallbacks += 1
                self._plainly.update(request.excuse(event))
            case Aborted(code=code):
                # Busy: what it was sending came from elsewhere, and may be there in a moment.
                raise UnreachableError(f"{name} broke off ({code})", retry_after=0.0 if code == "busy" else None)
            case NotSent():
                if event.reason != "arriving":
                    raise ChunksAbsentError(f"{name} lacks {len(event.run)} chunks of {self._manifest.package}")
                if not request.asked.bearing.has_patience:
                    seconds = self._limits.persistence.patience
                    raise StalledError(f"{name} still waits for chunks, none came for {seconds:.0f} s")
                request.is_steady = False
                request.excuse(event)


class _Request:
    """One request to a source: what it still owes, what came and was not taken yet, and how fast it goes.

    The line is shared by all requests that are open to the same source.
    """

    def __init__(self, asked: _Asked, segment: Sequence[int]) -> None:
        self.asked = asked
        self.owed = set(segment)
        self.encodings: dict[int, Encoding] = {}
        """Of each chunk that was announced."""
        self.bytes = 0
        self.is_steady = True
        """Whether it was the line that set the pace, and neither an encoder nor chunks that had to arrive first."""
        self.untaken_bytes = 0
        self._untaken: list[Received] = []
        asked.open += 1
        self._open_at_first = self._open_at_last = asked.open
        self._asked_at = time.monotonic()
        self._first_at: float | None = None
        self._payload_bytes = 0
        """Behind the first chunk."""

    def begins(self, run: Places, built_on: Places, encoding: Encoding) -> None:
        """A run is about to come."""
        self.is_steady = self.is_steady and len(run) == 1 and not built_on
        self.encodings.update((index, encoding) for _, index in run)

    def took(self, received: Received) -> None:
        """A chunk came. Raises `FrameError` where it was not asked for."""
        if received.index not in self.owed:
            raise FrameError(f"{self.asked.name} sent chunk {received.index}, which was not asked for")
        self.owed.discard(received.index)
        self._untaken.append(received)
        self.untaken_bytes += received.chunk.size
        self.bytes += received.chunk.size
        if self._first_at is None:
            self._first_at = time.monotonic()
        else:
            self._payload_bytes += received.payload_bytes

    def untaken(self) -> list[Received]:
        """What came since this was asked last."""
        untaken, self._untaken, self.untaken_bytes = self._untaken, [], 0
        return untaken

    def excuse(self, event: RunRefused | NotSent) -> set[int]:
        """The chunks that an event speaks of: they are not owed any more."""
        run = {index for _, index in event.run}
        self.owed -= run
        return run

    def is_delta(self, event: RunRefused) -> bool:
        built_on = any(self.encodings.get(index) in DELTAS for _, index in event.run)
        return built_on or isinstance(event.error, BaseMissingError)

    def close(self) -> None:
        """It has ended."""
        self._open_at_last = self.asked.open
        self.asked.open -= 1

    def timing(self) -> RequestTiming:
        """How it went. Of one that brought something."""
        now = time.monotonic()
        first_at = self._asked_at if self._first_at is None else self._first_at
        goodput = None
        if self._payload_bytes >= _TELLING_BYTES:
            # Where something else set the pace, the whole of the time gives what is true of the line in any case.
            since = first_at if self.is_steady else self._asked_at
            lanes = (self._open_at_first + self._open_at_last) / 2 if self.is_steady else 1.0
            goodput = lanes * self._payload_bytes / max(now - since, 1e-6)
        return RequestTiming(first_at - self._asked_at, goodput, self.is_steady)
