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
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol, TypeVar

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
from relay.transfer.pace import ENCODER_SECONDS, WINDOW_SECONDS, Outlook, Pace, is_slow, is_sooner

T = TypeVar("T")

FALLBACKS_MAX = 3
"""Differences of one source that may fail, before it is asked for none any more."""
CONNECTIONS = 2
"""Requests at a time. Each can lose at most one chunk in flight when its source dies."""
STALL_SECONDS = 60.0
"""A source where chunks are still arriving is left when none came for so long."""
PERSISTENCE = Persistence(first_pause=0.2, longest_pause=5.0, longest_asked=5.0, failures=0, patience=STALL_SECONDS)
"""With one source: one that fails is left for the next at once, unless it asks for patience."""
LOOK_SECONDS = 0.5
"""Between two looks at how fast the source in use is."""
TRY_BYTES = 1 << 20
"""Bytes of tree that another source is tried with, or one chunk: enough to measure it, and little where it was in vain."""
TRY_AGAIN_SECONDS = 15.0
"""Before a source that gave nothing when it was tried is tried once more."""
WAITING_SECONDS = 15.0
"""So long a source's word counts that it waits for chunks itself: it waits for ten seconds before it says so again."""
END_SECONDS = 2.0
"""Until the end of an answer, once every chunk is there."""
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
    overtaken: bool = False
    """Whether another source was faster by far, and brought the rest."""
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


class OvertakenError(UnreachableError):
    """Another source brings the rest much sooner. Rates in bytes per second."""

    def __init__(self, name: str, other: str, rate: float, of_other: float) -> None:
        super().__init__(f"{name} sends {rate:,.0f} bytes in a second, and {other} {of_other:,.0f}")
        self.rate = rate
        self.of_other = of_other


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
        """A source failed; it will not be asked again in this download. Or (`OvertakenError`) only where others fail."""


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
        self.open: set[_Request] = set()
        self.pace = Pace(time.monotonic())
        self.overtaken = asyncio.Event()
        """Set while another source is taken for faster by far: requests that are open go on, and none is added."""
        self.waited_at = -inf
        """When it said last that chunks are on their way to it."""
        self.rests_until = 0.0
        """When it may be tried beside the one in use again."""
        self.tried_rate = 0.0
        """Bytes of payload per second, when it was tried last; 0: it was not, or gave nothing."""

    @property
    def is_ending(self) -> bool:
        """Whether a request of it lacks no chunk any more, only its end."""
        return any(not request.owed for request in self.open)

    @property
    def waits(self) -> bool:
        """Whether it said of late that it waits for chunks itself."""
        return time.monotonic() - self.waited_at < WAITING_SECONDS

    @property
    def window(self) -> float:
        """Seconds that it is judged by."""
        return ENCODER_SECONDS if any(request.may_encode for request in self.open) else WINDOW_SECONDS

    def learn(self, timing: RequestTiming) -> None:
        self.tally.timings.append(timing)
        if timing.goodput is not None and (timing.is_steady or 0.0 < self.goodput < timing.goodput):
            self.goodput = timing.goodput

    def outlook(self, rest: int, rate: float) -> Outlook:
        """On `rest` bytes of tree, by how its chunks shrank so far."""
        shrunk = self.tally.payload_bytes / self.tally.bytes if self.tally.bytes else 1.0
        return Outlook(rest * shrunk, rate)


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
        self._landing: set[int] = set()
        """Chunks that the receiver is just taking: one that two sources bring is taken once."""
        self._complete = asyncio.Event()
        """Set when nothing is missing any more."""
        self._sources = sources
        self._receiver = receiver
        self._limits = receiver.limits
        self._asked: dict[str, _Asked] = {}
        self._finding: asyncio.Task[Holdings | None] | None = None
        self._todo: deque[int] = deque()
        self._plainly: set[int] = set()
        """Chunks whose difference failed."""
        self._requests: set[asyncio.Task[Any]] = set()
        """Those that are open."""
        self._used: _Asked | None = None
        """The source that was asked last."""
        self._next_try = 0.0
        """When another source may be tried beside the one in use."""

    async def work(self) -> None:
        if not self._missing:
            return
        try:
            async with asyncio.TaskGroup() as self._group:
                watching = self._group.create_task(self._watch())
                while self._missing:
                    await self._round()
                watching.cancel()
                await self._end_requests()
        except BaseExceptionGroup as errors:
            first = first_of(errors)
            raise (first.__cause__ or first if isinstance(first, _NotTakenError) else first) from None

    async def _round(self) -> None:
        """Ask until nothing is left to be asked for, or all is there."""
        if not self._todo:
            self._todo = deque(sorted(self._missing))
        numbers = range(self._limits.connections)
        working = {self._group.create_task(self._worker(is_first=not number)) for number in numbers}
        complete = self._group.create_task(self._complete.wait())
        while working and not complete.done():
            await asyncio.wait({*working, complete}, return_when=asyncio.FIRST_COMPLETED)
            working = {task for task in working if not task.done()}
        complete.cancel()
        if working and any(asked.is_ending for asked in self._asked.values()):
            # What comes behind the last chunk still counts: an answer that does not end as it should is a lie.
            await asyncio.wait(working, timeout=END_SECONDS)

    async def _end_requests(self) -> None:
        """Nothing is missing: end what is still open, and name the sources that did not end by themselves."""
        for asked in self._asked.values():
            if asked.is_ending and asked.tally.error is None:
                await self._leave(asked, UnreachableError(f"{asked.name} gave everything and does not end its answer"))
        for task in self._requests:
            task.cancel()

    async def _worker(self, *, is_first: bool) -> None:
        while self._missing and self._todo:
            asked = self._best()
            shape = await self._shape(asked)
            if not self._todo or (shape.one_at_a_time and not is_first):
                return
            segment, plainly = self._next_segment(shape.segment_bytes)
            if segment:
                await self._carry(asked, segment, with_bases=shape.with_bases and not plainly)
                self._todo.extendleft(index for index in reversed(segment) if index in self._missing)

    async def _carry(self, asked: _Asked, segment: Sequence[int], *, with_bases: bool) -> None:
        """One request, to its end; or until its source is overtaken: then it goes on by itself, and what it owes is
        asked for elsewhere as well.
        """
        if asked is not self._used:
            self._used = asked
            asked.pace.begin(time.monotonic())
        request = self._open(self._request(asked, segment, with_bases=with_bases))
        overtaken = self._group.create_task(asked.overtaken.wait())
        await asyncio.wait({request, overtaken}, return_when=asyncio.FIRST_COMPLETED)
        overtaken.cancel()

    def _open(self, request: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A request that may go on behind the back of what began it: it ends with the download at the latest."""
        task = self._group.create_task(request)
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        return task

    async def _request(self, asked: _Asked, segment: Sequence[int], *, with_bases: bool) -> None:
        try:
            await self._ask(asked, segment, with_bases=with_bases)
        except StoreError:
            raise
        except (UntrustedError, UnreachableError, RefusedError) as error:
            await self._bear(asked, error)
        else:
            if self._missing.issuperset(segment) and self._plainly.isdisjoint(segment):
                # Everything is still on its way there. A relay waits itself before it says so; one that does not
                # must not be asked without end.
                await asyncio.sleep(self._limits.persistence.first_pause)

    # --- which source

    def _best(self) -> _Asked:
        """The source to ask now. Raises `NoSourceLeftError`."""
        asked = self._first()
        if asked is None:
            errors = {name: tally.error for name, tally in self.tallies.items() if tally.error}
            raise NoSourceLeftError(self._manifest, len(self._missing), errors)
        if asked.overtaken.is_set():
            # Those that overtook it have failed since: a slow source is better than none.
            asked.overtaken.clear()
        return asked

    def _first(self) -> _Asked | None:
        """The first that did not fail; one that was overtaken where there is no other."""
        slow: _Asked | None = None
        for source in self._sources:
            asked = self._asked.get(source.name) or self._begin(source)
            if asked.tally.error is None and not asked.overtaken.is_set():
                return asked
            if asked.tally.error is None:
                slow = slow or asked
        return slow

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
        while self._todo and self._todo[0] not in self._missing:
            # Another source brought it meanwhile.
            self._todo.popleft()
        plainly = bool(self._todo) and self._todo[0] in self._plainly
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
            await self._leave(asked, error)

    async def _leave(self, asked: _Asked, error: WaystationError) -> None:
        asked.tally.error = error
        await self._receiver.left(asked.source, error)

    # --- another source beside the one in use

    async def _watch(self) -> None:
        """Look now and then how fast the source in use is, and try another one beside it where that may pay."""
        while len(self._sources) > 1:
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
            for asked in self._asked.values():
                asked.pace.mark(now)
            used = self._used
            outlook = self._outlook(used, now) if used is not None and used is self._first() else None
            if used is None or outlook is None or not is_slow(outlook) or now < self._next_try:
                continue
            other = self._worth_trying(used, outlook, now)
            if other is not None:
                self._next_try = now + WINDOW_SECONDS
                other.rests_until = inf
                self._group.create_task(self._try(other, used))

    def _outlook(self, used: _Asked, now: float) -> Outlook | None:
        """None where it cannot be said yet, or where it says that it waits itself, and chunks do come."""
        rate = used.pace.rate(now, used.window)
        return None if rate is None or (rate and used.waits) else used.outlook(self._rest, rate)

    @property
    def _rest(self) -> int:
        return self._manifest.size_of(self._missing)

    def _worth_trying(self, used: _Asked, outlook: Outlook, now: float) -> _Asked | None:
        """The next source that is not known to be as slow."""
        for source in self._sources:
            other = self._asked.get(source.name) or self._begin(source)
            if other is used or other.tally.error is not None or now < other.rests_until:
                continue
            known = other.tried_rate or other.goodput
            if not known or is_sooner(Outlook(outlook.payload, known), outlook):
                return other
        return None

    async def _try(self, other: _Asked, used: _Asked) -> None:
        """Ask `other` for a little of the end. Where it is faster by far, it is the one in use from now on."""
        shape = await self._shape(other)
        piece, rest = self._last_piece(), self._rest
        asked_at, before = time.monotonic(), other.pace.bytes
        request = self._open(self._tried(other, piece, with_bases=shape.with_bases))
        await asyncio.wait({request})
        now = time.monotonic()
        of_used = used.pace.rate(now, used.window)
        of_other = (other.pace.bytes - before) / max(now - asked_at, 1e-6)
        other.rests_until = now + TRY_AGAIN_SECONDS
        if request.cancelled() or not request.result() or of_used is None or used is not self._first():
            return
        # Once its rate is known, a look at the one in use is enough to see whether that has become worth a change.
        other.rests_until, other.tried_rate = now + WINDOW_SECONDS, of_other
        if is_sooner(other.outlook(rest, of_other), used.outlook(rest, of_used)):
            await self._overtake(used, other, of_used, of_other)

    async def _tried(self, other: _Asked, piece: Sequence[int], *, with_bases: bool) -> bool:
        """Whether it gave what it was asked for. One that does not is left only for a lie: it was not its turn."""
        if not piece:
            return False
        try:
            await self._ask(other, piece, with_bases=with_bases)
        except StoreError:
            raise
        except UntrustedError as error:
            await self._bear(other, error)
        except (UnreachableError, RefusedError):
            return False
        return self._missing.isdisjoint(piece)

    def _last_piece(self) -> list[int]:
        """Chunks that the source in use would bring last."""
        piece: list[int] = []
        size = 0
        for index in sorted(self._missing - self._landing, reverse=True):
            size += self._manifest.chunks[index].size
            piece.append(index)
            if size >= TRY_BYTES:
                break
        return piece[::-1]

    async def _overtake(self, used: _Asked, other: _Asked, rate: float, of_other: float) -> None:
        """From now on `other` is asked; a way back is kept, as it may fail."""
        for request in list(used.open):
            await self._take(request)
        used.tally.overtaken = True
        self._sources = [other.source, *(source for source in self._sources if source is not other.source)]
        await self._receiver.left(used.source, OvertakenError(used.name, other.name, rate, of_other))
        used.overtaken.set()

    # --- one request

    async def _ask(self, asked: _Asked, segment: Sequence[int], *, with_bases: bool) -> None:
        bases = await self._bases() if with_bases else None
        request = _Request(asked, segment, with_bases=with_bases)

        def tap(run: Places, built_on: Places, encoding: Encoding) -> Sink:
            request.begins(run, built_on, encoding)
            return _Heard(request, self._receiver.tap(run, built_on, encoding))

        stream = asked.source.stream(self._manifest, segment, bases=bases, goodput=asked.goodput, tap=tap)
        try:
            async for event in stream:
                if isinstance(event, Received):
                    request.took(event)
                    if request.untaken_bytes >= self._limits.batch_bytes or not request.owed:
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
        fresh = [one for one in request.untaken() if one.index in self._missing and one.index not in self._landing]
        if not fresh:
            return
        indexes = {received.index for received in fresh}
        self._landing |= indexes
        try:
            await self._receiver.take(fresh)
        except WaystationError as error:
            raise _NotTakenError from error
        finally:
            self._landing -= indexes
        self._missing -= indexes
        if not self._missing:
            self._complete.set()
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
                request.asked.waited_at = time.monotonic()
                request.excuse(event)


class _Heard:
    """Counts the payload of a run while it comes, and hands it on to what the receiver taps it with."""

    def __init__(self, request: _Request, behind: Sink | None) -> None:
        self._request = request
        self._behind = behind

    def add(self, piece: bytes) -> None:
        self._request.hear(len(piece))
        if self._behind is not None:
            self._behind.add(piece)

    def finish(self) -> None:
        if self._behind is not None:
            self._behind.finish()

    def fail(self) -> None:
        if self._behind is not None:
            self._behind.fail()


class _Request:
    """One request to a source: what it still owes, what came and was not taken yet, and how fast it goes.

    The line is shared by all requests that are open to the same source.
    """

    def __init__(self, asked: _Asked, segment: Sequence[int], *, with_bases: bool) -> None:
        self.asked = asked
        self.with_bases = with_bases
        self.owed = set(segment)
        self.encodings: dict[int, Encoding] = {}
        """Of each chunk that was announced."""
        self.bytes = 0
        self.is_steady = True
        """Whether it was the line that set the pace, and neither an encoder nor chunks that had to arrive first."""
        self.untaken_bytes = 0
        self._untaken: list[Received] = []
        asked.open.add(self)
        self._open_at_first = self._open_at_last = len(asked.open)
        self._asked_at = time.monotonic()
        self._first_at: float | None = None
        self._payload_bytes = 0
        """Behind the first chunk."""
        self._heard = 0
        """Bytes of payload, also of chunks that are not whole yet."""
        self._told = 0
        """The same of whole chunks."""

    @property
    def may_encode(self) -> bool:
        """Whether differences were asked for, and nothing of them came yet."""
        return self.with_bases and not self._heard

    def hear(self, size: int) -> None:
        """Payload came."""
        self._heard += size
        self.asked.pace.bytes += size

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
        self._told += received.payload_bytes
        self.hear(max(0, self._told - self._heard))
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
        self._open_at_last = len(self.asked.open)
        self.asked.open.discard(self)

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
