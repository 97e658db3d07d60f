"""Payloads of runs, made on demand: one encoder however many ask, read while it still works, kept for a while.

What is encoded is named by its chunks, its bases and its coding. Encoders run in threads, few at a time; all that they
hold (chunks, bases, what they make, what is kept) stays under one budget in bytes.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from io import BytesIO
from itertools import chain, islice
from typing import Final

from relay.encoding.choose_bases import Held
from relay.encoding.codecs import Coding, encode
from relay.errors import StoreError
from relay.package.identity import ChunkId
from relay.package.ranges import from_indexes, indexes
from relay.stores.contract import PIECE, ChunkReader
from relay.support.byte_budget import ByteBudget
from relay.support.malloc import give_back_free

KEPT_BYTES = 64 << 20
"""Bytes of finished payloads that are kept for the next reader."""
MEMORY_BYTES = 264 << 20
"""Bytes that all encoders of one process may hold together, kept payloads included. Just enough for two runs of 16 MiB in
zstd level 19 at once, so that a thin line waits for no encoder."""

_STRETCH_MIN: Final = 128 << 10
"""Bytes of payload under one header, at least, of a sender; but for the last one."""
_STRETCH: Final = 256 << 10
"""The same, at most."""
_READS: Final = 2
"""Chunks that are read from the store at once, for one run."""
_KEPT: Final = 4096
"""Finished payloads that are kept, however small they are."""
_MADE: Final = 4096
"""Finished payloads of which size and time are remembered."""
_ZSTD_TABLES: Final = ((4, 4 << 20), (9, 14 << 20), (12, 44 << 20), (15, 70 << 20), (sys.maxsize, 88 << 20))
"""Up to which level zstd's tables take how many bytes, however small the run is: it does not know that when it begins."""


@dataclass(frozen=True, slots=True)
class PayloadSpec:
    """What to encode. Two that are equal have the same payload."""

    chunks: tuple[ChunkId, ...]
    bases: tuple[ChunkId, ...]
    coding: Coding
    size: int
    """Bytes of the chunks."""
    base_size: int = 0
    """Bytes of the bases."""


@dataclass(frozen=True, slots=True)
class Made:
    """A payload that was finished."""

    payload_bytes: int
    seconds: float
    """Of one core, or of waiting for the store. 0 where it came from elsewhere."""


def expected_payload(spec: PayloadSpec) -> int:
    """Bytes to set aside for a payload that is not made yet: above what packages of code take, as a rule."""
    if spec.coding.encoding == "raw":
        return spec.size
    return spec.size // (4 if spec.coding.needs_bases else 2)


def working_bytes(spec: PayloadSpec) -> int:
    """Bytes that the encoder of `spec` holds at its peak: run, bases, its own tables, and the payload.

    Measured as the peak of resident memory, on .NET packages, runs and bases of 8 to 48 MiB. HDiffPatch's suffix array
    takes 4.0 to 4.1 bytes for each of the base, and what it finds up to the run; then zstd packs the differences. zstd takes
    its window (as large as run and prefix) 1.1 to 1.2 times, and the tables of its level.
    """
    size, base_size, coding = spec.size, spec.base_size, spec.coding
    match coding.encoding:
        case "raw":
            tables = 0
        case "hdiff":
            tables = max(41 * base_size // 10, _zstd_bytes(coding.level, size)) + size
        case _:
            tables = _zstd_bytes(coding.level, size + base_size)
    return size + base_size + tables + expected_payload(spec)


def _zstd_bytes(level: int, window: int) -> int:
    return next(size for most, size in _ZSTD_TABLES if level <= most) + 6 * window // 5


class _Payload:
    """Pieces, as many as there are by now. Touched in the loop's thread only."""

    def __init__(self, spec: PayloadSpec, *, is_arriving: bool) -> None:
        self.spec = spec
        self.is_arriving = is_arriving
        self.pieces: list[bytes] = []
        self.size = 0
        self.counted = 0
        """Bytes that it counts for in the budget."""
        self.readers = 0
        self.is_whole = False
        self.error: Exception | None = None
        self.stopped = threading.Event()
        self.waiting: asyncio.Task[None] | None = None
        """What waits for its turn, or reads its chunks: can be cancelled. An encoder can only be told to stop."""
        self.news = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        return self.is_whole or self.error is not None

    @property
    def is_idle(self) -> bool:
        return self.is_whole and not self.readers

    def add(self, piece: bytes) -> None:
        if self.has_ended:
            return
        self.pieces.append(piece)
        self.size += len(piece)
        self.wake()

    def wake(self) -> None:
        self.news.set()
        self.news = asyncio.Event()


class PayloadReader:
    """One reader of a payload, which is made from now on: what the line is not ready for yet waits in the pool, once for all
    readers.
    """

    def __init__(self, payload: _Payload, left: Callable[[_Payload], None]) -> None:
        self.taken = 0
        """Bytes."""
        self.most = _STRETCH
        """Bytes of one stretch."""
        self._payload = payload
        self._left = left
        self._at = self._offset = 0
        self._is_open = True
        payload.readers += 1

    @property
    def size(self) -> int:
        """Bytes that are made by now."""
        return self._payload.size

    @property
    def has_failed(self) -> bool:
        return self._payload.error is not None

    async def ready(self, least: float = _STRETCH_MIN) -> None:
        """Return when `least` bytes can be taken, or all of the rest, or when there is something to raise."""
        # The last byte stays behind until it is known whether another follows it.
        while not self._payload.has_ended and self._payload.size - self.taken <= least:
            await self._payload.news.wait()

    async def stretches(
        self, least: int = _STRETCH_MIN, patience: float | None = None
    ) -> AsyncIterator[tuple[bytes, bool]]:
        """The payload in stretches of up to `self.most` bytes, each with whether more follows.

        Raises:
            ChunkMissing, ChunkInvalid, StoreError: what the encoder or its store raised.
            TimeoutError: nothing came for `patience` seconds.
        """
        more = True
        while more:
            async with asyncio.timeout(patience):
                await self.ready(least)
            self.check()
            room = self._payload.size - self.taken - (0 if self._payload.is_whole else 1)
            size = min(room, self.most)
            more = not (self._payload.is_whole and self.taken + size == self._payload.size)
            # Under no name here: it would be held until the next one is asked for.
            yield b"".join(self._take(size)), more

    def close(self) -> None:
        """Nothing more is read. Twice is once."""
        if self._is_open:
            self._is_open = False
            self._payload.readers -= 1
            self._left(self._payload)

    def check(self) -> None:
        """Raise what the encoder or its store raised."""
        if self._payload.error is not None:
            raise self._payload.error

    def _take(self, size: int) -> Iterator[memoryview]:
        while size > 0:
            piece = memoryview(self._payload.pieces[self._at])[self._offset : self._offset + size]
            self._offset += len(piece)
            if self._offset == len(self._payload.pieces[self._at]):
                self._at, self._offset = self._at + 1, 0
            self.taken += len(piece)
            size -= len(piece)
            yield piece


class Growing:
    """A payload on its way in from elsewhere, told of in any thread. Readers of it see each piece as it is added.

    Without room for it, or where the same one is here already, what is told is passed over. One that is thrown away
    without `finish` has failed.
    """

    def __init__(
        self,
        payloads: Payloads,
        spec: PayloadSpec,
        loop: asyncio.AbstractEventLoop,
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        """`spec.coding.level` is 0: it is not known here. `loop` is that of `payloads`; `begun`: there was room for it."""
        self._loop = loop
        payload = _Payload(spec, is_arriving=True)
        self._tell(payloads.adopt, payload, begun)
        self._payload = payload
        self._payloads = payloads

    def add(self, piece: bytes) -> None:
        """The next bytes, once they were decoded here without fault."""
        for part in _recut(piece):
            self._tell(self._payloads.grow, self._payload, part)

    def finish(self) -> None:
        """It is whole, and its chunks were verified."""
        self._tell(self._payloads.finish, self._payload)

    def fail(self) -> None:
        """It will not be whole: its readers get a `StoreError`, and it is forgotten. After `finish` it changes nothing."""
        self._tell(self._payloads.fail, self._payload, StoreError("a payload broke off on its way in"))

    def __del__(self) -> None:
        self.fail()

    def _tell(self, what: Callable[..., object], *values: object) -> None:
        # A loop that is closed has no readers any more.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what, *values)


class Payloads:
    """The payloads of one process over one store. All of it belongs to one event loop."""

    def __init__(
        self,
        source: ChunkReader,
        *,
        kept_bytes: int = KEPT_BYTES,
        memory_bytes: int = MEMORY_BYTES,
        threads: int | None = None,
    ) -> None:
        """`threads`: encoders at a time; by default one for each core."""
        threads = threads or os.cpu_count() or 1
        self._source = source
        self._kept_bytes = kept_bytes
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encoder")
        # One more than there are threads: it is next, and has its memory.
        self._budget = ByteBudget(memory_bytes, turns=threads + 1, make_way=self._make_way)
        # The next one reads nothing yet: that would take its cores from the others, and hold a run more.
        self._threads = asyncio.Semaphore(threads)
        self._counted = 0
        """Bytes of the budget that payloads count for; the rest is the encoders'."""
        self._inside: dict[_Payload, int] = {}
        """What is encoded now, in the order of its turns, and the bytes of the budget that its encoder has."""
        self._payloads: OrderedDict[PayloadSpec, _Payload] = OrderedDict()
        self._by_first: dict[ChunkId, list[_Payload]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._made: OrderedDict[bytes, Made] = OrderedDict()
        self._news = asyncio.Event()
        self._closed = False

    # --- reading

    async def sound(self, held: Sequence[Held]) -> tuple[Held, ...]:
        """Of `held`, what the store has undamaged: a difference can be built on nothing else."""
        here = await self._source.sound_many({one.manifest.chunk_id(i) for one in held for i in indexes(one.ranges)})
        sound = (
            Held(one.manifest, from_indexes(i for i in indexes(one.ranges) if one.manifest.chunk_id(i) in here))
            for one in held
        )
        return tuple(one for one in sound if one.ranges)

    def open(self, spec: PayloadSpec) -> PayloadReader:
        """Begin to make the payload, where it is not made or on its way yet. Any number may read one; each has to close.

        It waits for its turn where encoders or memory are short. An encoder that has no reader any more is stopped.

        Raises:
            StoreError: these payloads were closed.
        """
        payload = self._payloads.get(spec) or self._start(replace(spec, coding=spec.coding.at_a_level))
        self._payloads.move_to_end(payload.spec)
        return PayloadReader(payload, self._reader_left)

    async def make(self, spec: PayloadSpec) -> Made:
        """Make the payload, and say how that went. Raises what `PayloadReader.stretches` does."""
        reader = self.open(spec)
        try:
            await reader.ready(math.inf)
            reader.check()
        finally:
            reader.close()
        return self._made[_digest(spec)]

    def find(
        self, chunks: Collection[ChunkId], bases: Collection[ChunkId], encodings: Collection[str]
    ) -> PayloadSpec | None:
        """A payload that is kept, being made or arriving, whose chunks are all among `chunks` and whose bases all among
        `bases`; the one with the most bytes of chunks. Reading it costs no encoder.
        """
        wanted, there = frozenset(chunks), frozenset(bases)
        fitting = [
            payload
            for first in self._by_first.keys() & wanted
            for payload in self._by_first[first]
            if payload.spec.coding.encoding in encodings
            and wanted.issuperset(payload.spec.chunks)
            and there.issuperset(payload.spec.bases)
        ]
        best = max(fitting, key=lambda payload: (payload.spec.size, payload.is_whole, -payload.counted), default=None)
        return None if best is None else best.spec

    async def changed(self) -> None:
        """Return when the next payload begins to arrive or to be made (cut it with a timeout)."""
        await self._news.wait()

    def made(self, spec: PayloadSpec) -> Made | None:
        """How large it is and what it took, where it was finished before (kept or not; the newest few thousand)."""
        return self._made.get(_digest(spec))

    def limit_to(self, most: int) -> None:
        """All that is held stays below `most` bytes from now on. Where it is more, what is kept for no need goes, then
        encoders are stopped, the newest first: their readers take stored chunks, or ask again.
        """
        if most == self._budget.limit:
            return
        self._budget.limit = most
        if self._budget.used > most:
            self._make_way(self._budget.used - most, True)
        too_large = [
            each
            for each in self._payloads.values()
            if not (each.has_ended or each.is_arriving or each in self._inside) and working_bytes(each.spec) > most
        ]
        going = sum(need for each, need in self._inside.items() if each.has_ended)
        for payload in reversed([each for each in self._inside if not each.has_ended]):
            if self._budget.used - going > most:
                going += self._inside[payload]
                too_large.append(payload)
        for payload in too_large:
            self.fail(payload, StoreError("this encoder gave way to connections"))
        self._budget.look()

    def has_room_for(self, coding: Coding, size: int, base_size: int) -> bool:
        """Whether a run of so many bytes, over bases of so many, can be encoded so while others wait, if need be."""
        return working_bytes(PayloadSpec((), (), coding, size, base_size)) <= self._budget.limit

    def is_busy(self) -> bool:
        """Whether a new payload would have to wait long: a reader that can do with stored chunks should take them."""
        return self._budget.waiting > 0

    async def close(self) -> None:
        """Stop all encoders, forget everything. Twice is once."""
        self._closed = True
        for payload in list(self._payloads.values()):
            self._forget(payload)
            self.fail(payload, StoreError("the payloads of this process were closed"))
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._pool.shutdown(wait=False)

    # --- arriving

    def adopt(self, payload: _Payload, begun: Callable[[], None]) -> None:
        """Keep a payload as it grows, so that it can be handed on as it came; see `Growing`."""
        room = expected_payload(payload.spec)
        if self._closed or payload.spec in self._payloads or not self._budget.has_room(room):
            payload.error = StoreError("a payload that is not kept")
            return
        self._enlist(payload)
        self._count(payload, room)
        # What arrives takes the place of what is kept, not room beside it.
        self._tidy()
        begun()

    def grow(self, payload: _Payload, piece: bytes) -> None:
        """The next bytes of one that arrives."""
        more = payload.size + len(piece) - payload.counted
        if payload.has_ended:
            return
        if more > 0 and not self._budget.has_room(more):
            self.fail(payload, StoreError("no memory for a payload that was to be handed on"))
            return
        payload.add(piece)
        self._count(payload, max(payload.size, payload.counted))

    # --- making

    def _start(self, spec: PayloadSpec) -> _Payload:
        if self._closed:
            raise StoreError("the payloads of this process were closed")
        if (known := self._payloads.get(spec)) is not None:
            return known
        payload = _Payload(spec, is_arriving=False)
        self._enlist(payload)
        task = payload.waiting = asyncio.create_task(self._make(payload))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return payload

    async def _make(self, payload: _Payload) -> None:
        """One spec is made once at a time, and for readers only: the last one that leaves cancels or stops it."""
        need = working_bytes(payload.spec)
        try:
            await self._budget.enter(need)
            self._inside[payload] = need
            try:
                await self._encode(payload)
            finally:
                del self._inside[payload]
                self._budget.leave(need)
        except Exception as error:
            # Each error is for the readers to know.
            self.fail(payload, error)
        except asyncio.CancelledError:
            self.fail(payload, StoreError("the encoder of this payload was stopped"))
            raise

    async def _encode(self, payload: _Payload) -> None:
        loop, spec = asyncio.get_running_loop(), payload.spec
        async with self._threads:
            run, base = await self._join(spec.chunks), await self._join(spec.bases)
            payload.waiting = None
            # What the thread hands over is in the loop's queue before its end is.
            seconds = await loop.run_in_executor(self._pool, _encode_into, payload, run, base, loop)
        self.finish(payload, seconds)

    async def _join(self, ids: tuple[ChunkId, ...]) -> bytes:
        """One after another, read a few ahead: beside what is joined, no more than those are held."""
        joined = BytesIO()
        left = iter(ids)
        reads = deque(asyncio.create_task(self._source.get(id)) for id in islice(left, _READS))
        try:
            while reads:
                joined.write((await reads[0]).data)
                reads.popleft()
                reads.extend(asyncio.create_task(self._source.get(id)) for id in islice(left, 1))
        finally:
            for read in reads:
                read.cancel()
            await asyncio.gather(*reads, return_exceptions=True)
        return joined.getvalue()

    def finish(self, payload: _Payload, seconds: float = 0.0) -> None:
        """It is whole; where it ended before, nothing changes."""
        if payload.has_ended:
            return
        payload.is_whole = True
        key = _digest(payload.spec)
        self._made[key] = Made(payload.size, seconds)
        self._made.move_to_end(key)
        if len(self._made) > _MADE:
            self._made.popitem(last=False)
        self._count(payload, payload.size)
        payload.wake()
        self._tidy()

    def fail(self, payload: _Payload, error: Exception) -> None:
        """Tell its readers, stop its encoder. The next reader begins anew."""
        if payload.has_ended:
            return
        payload.error = error
        payload.pieces.clear()
        payload.stopped.set()
        if payload.waiting is not None:
            payload.waiting.cancel()
        self._forget(payload)
        payload.wake()
        self._tidy()

    def _reader_left(self, payload: _Payload) -> None:
        if payload.readers:
            return
        if not payload.has_ended and not payload.is_arriving:
            self.fail(payload, StoreError("this payload has no reader any more"))
        self._tidy()

    # --- memory

    def _enlist(self, payload: _Payload) -> None:
        self._payloads[payload.spec] = payload
        self._by_first.setdefault(payload.spec.chunks[0], []).append(payload)
        self._news.set()
        self._news = asyncio.Event()

    def _forget(self, payload: _Payload) -> None:
        if self._payloads.get(payload.spec) is not payload:
            return
        del self._payloads[payload.spec]
        first = payload.spec.chunks[0]
        self._by_first[first].remove(payload)
        if not self._by_first[first]:
            del self._by_first[first]
        self._count(payload, 0)

    def _count(self, payload: _Payload, size: int) -> None:
        self._counted += size - payload.counted
        self._budget.used += size - payload.counted
        payload.counted = size

    def _tidy(self) -> None:
        """Something ended: let go of what is too much, and let in what waits."""
        self._evict(self._kept_bytes, entries=_KEPT)
        self._budget.look()

    def _evict(self, most: int, *, entries: int = sys.maxsize) -> None:
        """Forget what has no reader, the longest unused first, until payloads count for at most `most` bytes."""
        if self._counted <= most and len(self._payloads) <= entries:
            return
        for payload in [payload for payload in self._payloads.values() if payload.is_idle]:
            if self._counted <= most and len(self._payloads) <= entries:
                return
            self._forget(payload)

    def _make_way(self, lacking: int, at_any_cost: bool) -> bool:  # noqa: FBT001 - as the budget calls it
        """Kept payloads give way, but only where that is enough."""
        idle = sum(payload.counted for payload in self._payloads.values() if payload.is_idle)
        if idle >= lacking or at_any_cost:
            self._evict(self._counted - lacking)
        return idle >= lacking


def _encode_into(payload: _Payload, run: bytes, base: bytes, loop: asyncio.AbstractEventLoop) -> float:
    """Returns seconds of this thread: what it waits for, on a busy machine, says nothing of the encoder."""
    started = time.thread_time()
    if payload.stopped.is_set():
        return 0.0
    for made in encode(payload.spec.coding, run, base):
        for piece in _recut(made):
            if payload.stopped.is_set():
                return 0.0
            loop.call_soon_threadsafe(payload.add, piece)
    seconds = time.thread_time() - started
    give_back_free()
    return seconds


def _recut(data: bytes) -> Iterator[bytes]:
    view = memoryview(data)
    for start in range(0, len(view), PIECE):
        yield bytes(view[start : start + PIECE])


def _digest(spec: PayloadSpec) -> bytes:
    """A short name for what is remembered long."""
    text = " ".join(chain([str(spec.coding)], spec.chunks, ["over"], spec.bases))
    return blake2b(text.encode(), digest_size=16).digest()
