"""Fetch chunks of one package from the best of several sources, and go on at the next one when it fails.

The whole of resumption is one question: which chunks are still missing? A chunk counts when it is verified; whatever
was in flight when a source failed is asked for again, of anybody.

Where the line is not fast, a source is told what is held here already, so that it can send differences. A difference
that cannot be decoded is asked for again plainly, of the same source: only who lies in plain bytes is left for it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
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
from relay.encoding.planner import Manner, manner
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

FALLBACKS_MAX = 3
"""Differences of one source that may fail, before it is asked for none any more."""
CONNECTIONS = 2
"""Requests at a time. Each can lose at most one chunk in flight when its source dies."""
STALL_SECONDS = 60.0
"""A source where chunks are still arriving is left when none came for so long."""


class ChunkSource(Protocol):
    """Who can stream chunks of a manifest: a relay, or a store that can be reached as files."""

    @property
    def name(self) -> str:
        """For people."""
        ...

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
            tap: is told of each run before its chunks come, in any thread.

        Raises:
            UntrustedError, UnreachableError, RefusedError: the source's fault, the line's, or its rule.
            StoreError: a base cannot be read here.
        """
        ...


@dataclass(frozen=True, slots=True)
class Measured:
    """How one request went, for the ranking of sources."""

    first_byte: float
    """Seconds from the request to the first verified chunk."""
    goodput: float | None
    """Bytes of payload per second of all requests to this source together; None where too few came to tell."""
    is_steady: bool = True
    """Whether it was the line that set the pace; else the source may have waited for an encoder or for chunks to arrive,
    and the line is at least so fast."""


@dataclass(slots=True)
class Tally:
    """What one source did in one fetch."""

    chunks: int = 0
    bytes: int = 0
    payload_bytes: int = 0
    error: WaystationError | None = None
    measured: list[Measured] = field(default_factory=list)
    fallbacks: int = 0
    """Runs that could not be decoded and were asked for again plainly."""
    encodings: dict[str, EncodedBytes] = field(default_factory=dict)

    def count(self, encoding: str, size: int, payload_bytes: int) -> None:
        """One chunk of `size` bytes that came in this encoding."""
        before = self.encodings.get(encoding) or EncodedBytes(encoding, 0, 0, 0)
        self.encodings[encoding] = EncodedBytes(
            encoding, before.chunks + 1, before.stream_bytes + size, before.payload_bytes + payload_bytes
        )


def sum_encodings(tallies: Iterable[Tally]) -> list[EncodedBytes]:
    """What crossed all lines, by encoding."""
    return list(summed(each for tally in tallies for each in tally.encodings.values()))


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


class _NotDeliveredError(Exception):
    """Around what `deliver` raised: that is the caller's own trouble, and no source is left for it."""


Deliver = Callable[[list[Received]], Awaitable[None]]
"""Takes verified chunks; when it returns, they count as fetched."""

FindBases = Callable[[], Awaitable[Holdings | None]]
"""Finds out what is held here. Asked at most once, and only where a line makes it worth while."""

OnFailure = Callable[[ChunkSource, WaystationError], Awaitable[None]]
"""Told when a source failed in this fetch; it will not be asked again in it."""


async def fetch(
    manifest: Manifest,
    wanted: Iterable[int],
    sources: Sequence[ChunkSource],
    deliver: Deliver,
    *,
    on_failure: OnFailure | None = None,
    connections: int = CONNECTIONS,
    stall_seconds: float = STALL_SECONDS,
    find_bases: FindBases | None = None,
    goodput_of: Callable[[str], float] = lambda _: 0.0,
) -> dict[str, Tally]:
    """Bring every chunk in `wanted` (indexes) to `deliver`, from `sources` in order of preference.

    `goodput_of` a source, by name, is what was measured of its line before, bytes per second; 0 where nothing was.

    Returns what each source that was asked did, by name.

    Raises:
        NoSourceLeftError: all sources failed before all chunks were there.
        Exception: whatever `deliver` raises, at once.
    """
    run = _Fetch(manifest, wanted, sources, deliver, on_failure, stall_seconds, find_bases, goodput_of)
    await run.work(connections)
    return run.tallies


class _Fetch:
    def __init__(
        self,
        manifest: Manifest,
        wanted: Iterable[int],
        sources: Sequence[ChunkSource],
        deliver: Deliver,
        on_failure: OnFailure | None,
        stall_seconds: float,
        find_bases: FindBases | None,
        goodput_of: Callable[[str], float],
    ) -> None:
        self.tallies: dict[str, Tally] = {}
        self._manifest = manifest
        self._missing = set(wanted)
        self._sources = list(sources)
        self._deliver = deliver
        self._on_failure = on_failure
        self._stall_seconds = stall_seconds
        self._goodput_of = goodput_of
        self._lines: dict[str, float] = {}
        """Bytes per second that were measured in this fetch, by source."""
        self._asking: Counter[str] = Counter()
        """Requests that are open, by source."""
        self._bases = _Once(find_bases)
        self._last_progress = time.monotonic()
        self._todo: deque[int] = deque()
        self._plainly: set[int] = set()
        """Chunks whose difference failed."""

    async def work(self, connections: int) -> None:
        while self._missing:
            if not self._todo:
                self._todo = deque(sorted(self._missing))
            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(connections):
                        group.create_task(self._worker(is_first=not number))
            except BaseExceptionGroup as errors:
                first = first_of(errors)
                raise (first.__cause__ or first if isinstance(first, _NotDeliveredError) else first) from None

    async def _worker(self, *, is_first: bool) -> None:
        while self._todo:
            source = self._best()
            how = await self._manner(source)
            if not self._todo or (how.one_at_a_time and not is_first):
                return
            segment, plainly = self._next_segment(how.segment_bytes)
            try:
                await self._ask(source, segment, with_bases=how.with_bases and not plainly)
            except StoreError:
                raise
            except (UntrustedError, UnreachableError, RefusedError) as error:
                if self._is_busy(error):
                    # It is well and asks for patience; the next source may stand behind a thin line.
                    asked_for = getattr(error, "retry_after", None) or 0.0
                    await asyncio.sleep(max(_PAUSE_SECONDS, min(asked_for, _BUSY_SECONDS)))
                else:
                    await self._give_up(source, error)
            else:
                if self._missing.issuperset(segment) and self._plainly.isdisjoint(segment):
                    # Everything is still on its way there. A relay waits itself before it says so; one that does not
                    # must not be asked without end.
                    await asyncio.sleep(_PAUSE_SECONDS)
            self._todo.extendleft(index for index in reversed(segment) if index in self._missing)

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

    def _best(self) -> ChunkSource:
        for source in self._sources:
            tally = self.tallies.get(source.name)
            if tally is None or tally.error is None:
                return source
        errors = {name: tally.error for name, tally in self.tallies.items() if tally.error}
        raise NoSourceLeftError(self._manifest, len(self._missing), errors)

    async def _manner(self, source: ChunkSource) -> Manner:
        goodput = self._goodput(source.name)
        tally = self.tallies.get(source.name)
        trusted = tally is None or tally.fallbacks < FALLBACKS_MAX
        # Looked for only where it may be of use: that reads whole trees.
        found = await self._bases.get() if trusted and manner(goodput, can_have_bases=True).with_bases else None
        return manner(goodput, can_have_bases=found is not None)

    def _goodput(self, name: str) -> float:
        return self._lines.get(name) or self._goodput_of(name)

    async def _ask(self, source: ChunkSource, segment: Sequence[int], *, with_bases: bool) -> None:
        tally = self.tallies.setdefault(source.name, Tally())
        bases = await self._bases.get() if with_bases else None
        meter = _Meter(source.name, self._asking)
        encodings: dict[int, Encoding] = {}

        def tap(run: Places, built_on: Places, encoding: Encoding) -> Sink | None:
            meter.is_steady = meter.is_steady and len(run) == 1 and not built_on
            encodings.update((index, encoding) for _, index in run)
            return None

        stream = source.stream(self._manifest, segment, bases=bases, goodput=self._goodput(source.name), tap=tap)
        batch: list[Received] = []
        owed = set(segment)

        async def take() -> None:
            nonlocal batch
            taken, batch = batch, []
            await self._take(taken, tally, encodings)

        try:
            async for event in stream:
                if isinstance(event, Received):
                    if event.index not in owed:
                        raise FrameError(f"{source.name} sent chunk {event.index}, which was not asked for")
                    owed.discard(event.index)
                    meter.took(event)
                    batch.append(event)
                    if sum(received.chunk.size for received in batch) >= _BATCH_BYTES:
                        await take()
                    continue
                await take()
                if isinstance(event, RunRefused) and bases is not None and _is_delta(event, encodings):
                    tally.fallbacks += 1
                    self._plainly.update(index for _, index in event.run)
                    owed.difference_update(index for _, index in event.run)
                    continue
                self._heed(source, event)
                if isinstance(event, NotSent):
                    meter.is_steady = False
                    owed.difference_update(index for _, index in event.run)
            if owed:
                raise FrameError(f"{source.name} left out {len(owed)} chunks without a word")
        finally:
            meter.close()
            try:
                await take()
            finally:
                await stream.aclose()
        if meter.bytes:
            measured = meter.result()
            tally.measured.append(measured)
            self._learn(source.name, measured)

    def _learn(self, name: str, measured: Measured) -> None:
        known = self._goodput(name)
        if measured.goodput is not None and (measured.is_steady or 0.0 < known < measured.goodput):
            self._lines[name] = measured.goodput

    async def _take(self, batch: list[Received], tally: Tally, encodings: dict[int, Encoding]) -> None:
        fresh = [received for received in batch if received.index in self._missing]
        if not fresh:
            return
        try:
            await self._deliver(fresh)
        except WaystationError as error:
            raise _NotDeliveredError from error
        self._missing.difference_update(received.index for received in fresh)
        self._last_progress = time.monotonic()
        tally.chunks += len(fresh)
        tally.bytes += sum(received.chunk.size for received in fresh)
        for received in fresh:
            tally.payload_bytes += received.payload_bytes
            tally.count(encodings.get(received.index, "zstd"), received.chunk.size, received.payload_bytes)

    def _heed(self, source: ChunkSource, event: Event) -> None:
        if isinstance(event, RunRefused) and not isinstance(event.error, CutShortError):
            raise event.error
        if isinstance(event, Aborted):
            # Busy: what it was sending came from elsewhere, and may be here in a moment.
            again = _PAUSE_SECONDS if event.code == "busy" else None
            raise UnreachableError(f"{source.name} broke off ({event.code})", retry_after=again)
        if isinstance(event, NotSent) and event.reason != "arriving":
            raise ChunksAbsentError(f"{source.name} lacks {len(event.run)} chunks of {self._manifest.package}")
        if isinstance(event, NotSent) and time.monotonic() - self._last_progress > self._stall_seconds:
            raise UnreachableError(f"{source.name} still waits for chunks, none came for {self._stall_seconds:.0f} s")

    def _is_busy(self, error: WaystationError) -> bool:
        asks = isinstance(error, UnreachableError) and error.retry_after is not None
        return asks and time.monotonic() - self._last_progress <= self._stall_seconds

    async def _give_up(self, source: ChunkSource, error: WaystationError) -> None:
        tally = self.tallies.setdefault(source.name, Tally())
        if tally.error is None:
            tally.error = error
            # The next source gets its own patience.
            self._last_progress = time.monotonic()
            if self._on_failure:
                await self._on_failure(source, error)


_BATCH_BYTES = 2 << 20
_BUSY_SECONDS = 5.0
"""The longest pause before a source that asked for patience is asked again."""
_PAUSE_SECONDS = 0.2


_TELLING_BYTES = 256 << 10
"""Bytes of payload behind the first chunk from which on a request says something about the line."""


class _Once:
    """What is held here, looked for when it is first of use."""

    def __init__(self, find: FindBases | None) -> None:
        self._find = find
        self._task: asyncio.Future[Holdings | None] | None = None

    async def get(self) -> Holdings | None:
        if self._find is None:
            return None
        if self._task is None:
            self._task = asyncio.ensure_future(self._find())
        found = await asyncio.shield(self._task)
        return found if found is not None and found.held else None


def _is_delta(event: RunRefused, encodings: dict[int, Encoding]) -> bool:
    if isinstance(event.error, CutShortError):
        return False
    return isinstance(event.error, BaseMissingError) or any(encodings.get(index) in DELTAS for _, index in event.run)


class _Meter:
    """How one request goes. The line is shared by all that are open to the same source."""

    def __init__(self, name: str, asking: Counter[str]) -> None:
        self._name = name
        self._asking = asking
        self._asking[name] += 1
        self._open_at_first = self._asking[name]
        self._open_at_last = self._open_at_first
        self._asked = time.monotonic()
        self._first: float | None = None
        self._before = 0
        self.bytes = 0
        self.payload_bytes = 0
        self.is_steady = True

    def took(self, received: Received) -> None:
        if self._first is None:
            self._first = time.monotonic()
            self._before = received.payload_bytes
        self.bytes += received.chunk.size
        self.payload_bytes += received.payload_bytes

    def close(self) -> None:
        """The request has ended."""
        self._open_at_last = self._asking[self._name]
        self._asking[self._name] -= 1

    def result(self) -> Measured:
        now = time.monotonic()
        first = self._asked if self._first is None else self._first
        telling = self.payload_bytes - self._before
        goodput = None
        if telling >= _TELLING_BYTES:
            # Where something else set the pace, the whole of the time gives what is true of the line in any case.
            since = first if self.is_steady else self._asked
            lanes = (self._open_at_first + self._open_at_last) / 2 if self.is_steady else 1.0
            goodput = lanes * telling / max(now - since, 1e-6)
        return Measured(first - self._asked, goodput, self.is_steady)
