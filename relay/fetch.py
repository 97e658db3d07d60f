"""Fetch chunks of one package from the best of several sources, and go on at the next one when it fails.

The whole of resumption is one question: which chunks are still missing? A chunk counts when it is verified; whatever
was in flight when a source failed is asked for again, of anybody.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from relay.content.frames import Aborted, Event, NotSent, Received, RunRefused, plan_runs
from relay.content.manifest import Manifest
from relay.errors import FrameError, RefusedError, UnreachableError, UntrustedError, WaystationError, first_of

SEGMENT_BYTES = 6 << 20
"""Tree stream in one request, at most (or one chunk). Requests in flight are all that can cross twice if this process is
killed: what else came is on the disk."""
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

    def stream(self, manifest: Manifest, indexes: Sequence[int]) -> AsyncGenerator[Event, None]:
        """Verified chunks in this order. Raises `UntrustedError`, `UnreachableError` or `RefusedError`."""
        ...


@dataclass(frozen=True, slots=True)
class Measured:
    """How one request went, for the ranking of sources."""

    first_byte: float
    """Seconds from the request to the first verified chunk."""
    goodput: float
    """Bytes of chunks per second over the request."""


@dataclass(slots=True)
class Tally:
    """What one source did in one fetch."""

    chunks: int = 0
    bytes: int = 0
    payload_bytes: int = 0
    error: WaystationError | None = None
    measured: list[Measured] = field(default_factory=list)


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
) -> dict[str, Tally]:
    """Bring every chunk in `wanted` (indexes) to `deliver`, from `sources` in order of preference.

    Returns what each source that was asked did, by name.

    Raises:
        NoSourceLeftError: all sources failed before all chunks were there.
        Exception: whatever `deliver` raises, at once.
    """
    run = _Fetch(manifest, wanted, sources, deliver, on_failure, stall_seconds)
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
    ) -> None:
        self.tallies: dict[str, Tally] = {}
        self._manifest = manifest
        self._missing = set(wanted)
        self._sources = list(sources)
        self._deliver = deliver
        self._on_failure = on_failure
        self._stall_seconds = stall_seconds
        self._last_progress = time.monotonic()
        self._segments = deque(_segments(manifest, self._missing))

    async def work(self, connections: int) -> None:
        while self._missing:
            if not self._segments:
                self._segments = deque(_segments(self._manifest, self._missing))
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(connections, len(self._segments))):
                        group.create_task(self._worker())
            except BaseExceptionGroup as errors:
                first = first_of(errors)
                raise (first.__cause__ or first if isinstance(first, _NotDeliveredError) else first) from None

    async def _worker(self) -> None:
        while self._segments:
            segment = [index for index in self._segments.popleft() if index in self._missing]
            if not segment:
                continue
            source = self._best()
            try:
                await self._ask(source, segment)
            except (UntrustedError, UnreachableError, RefusedError) as error:
                if self._is_busy(error):
                    # It is well and asks for patience; the next source may stand behind a thin line.
                    asked_for = getattr(error, "retry_after", None) or 0.0
                    await asyncio.sleep(max(_PAUSE_SECONDS, min(asked_for, _BUSY_SECONDS)))
                else:
                    await self._give_up(source, error)
            else:
                if self._missing.issuperset(segment):
                    # Everything is still on its way there. A relay waits itself before it says so; one that does not
                    # must not be asked without end.
                    await asyncio.sleep(_PAUSE_SECONDS)
            left = [index for index in segment if index in self._missing]
            if left:
                self._segments.appendleft(left)

    def _best(self) -> ChunkSource:
        for source in self._sources:
            tally = self.tallies.get(source.name)
            if tally is None or tally.error is None:
                return source
        errors = {name: tally.error for name, tally in self.tallies.items() if tally.error}
        raise NoSourceLeftError(self._manifest, len(self._missing), errors)

    async def _ask(self, source: ChunkSource, segment: Sequence[int]) -> None:
        tally = self.tallies.setdefault(source.name, Tally())
        meter = _Meter()
        stream = source.stream(self._manifest, segment)
        batch: list[Received] = []
        owed = set(segment)

        async def take() -> None:
            nonlocal batch
            taken, batch = batch, []
            await self._take(taken, tally)

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
                self._heed(source, event)
                if isinstance(event, NotSent):
                    owed.difference_update(index for _, index in event.run)
            if owed:
                raise FrameError(f"{source.name} left out {len(owed)} chunks without a word")
        finally:
            try:
                await take()
            finally:
                await stream.aclose()
        if meter.bytes:
            tally.measured.append(meter.result())
            tally.payload_bytes += meter.payload_bytes

    async def _take(self, batch: list[Received], tally: Tally) -> None:
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

    def _heed(self, source: ChunkSource, event: Event) -> None:
        if isinstance(event, RunRefused):
            raise event.error
        if isinstance(event, Aborted):
            raise UnreachableError(f"{source.name} broke off ({event.code})")
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


class _Meter:
    def __init__(self) -> None:
        self._asked = time.monotonic()
        self._first: float | None = None
        self.bytes = 0
        self.payload_bytes = 0

    def took(self, received: Received) -> None:
        self._first = self._first or time.monotonic()
        self.bytes += received.chunk.size
        self.payload_bytes += received.payload_bytes

    def result(self) -> Measured:
        first = (self._first or self._asked) - self._asked
        return Measured(first, self.bytes / max(time.monotonic() - self._asked, 1e-6))


def _segments(manifest: Manifest, missing: set[int]) -> list[list[int]]:
    return plan_runs([(index, manifest.chunks[index].size) for index in sorted(missing)], SEGMENT_BYTES)
