"""Chunks on their way into the store: all that wait for one hang on the one flight that brings it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Self
from weakref import WeakValueDictionary

from relay.encoding.bundle import Places, Sink, Tap
from relay.encoding.codecs import Coding, Encoding
from relay.encoding.holdings import size_of
from relay.errors import ChunkInvalid, ChunkMissing
from relay.package.chunk import Chunk
from relay.package.identity import ChunkId, ManifestId
from relay.package.manifest import Manifest
from relay.server import metrics
from relay.stores.contract import ChunkReader, ChunkWriter, StoredChunk
from relay.transfer.encoder_pool import Growing, Payloads, PayloadSpec

log = logging.getLogger(__name__)

BATCH_BYTES = 4 << 20
"""Chunks made durable in one go: few enough that readers who wait for them wait briefly."""
QUEUE_BYTES = 4 << 20
"""Verified chunks of one sender that wait to be written; more make the sender wait."""


class Arrivals:
    """The flights of chunks that are waited for."""

    def __init__(self) -> None:
        # Weak: a flight without a waiter is forgotten by itself.
        self._waiting: WeakValueDictionary[ChunkId, asyncio.Event] = WeakValueDictionary()

    def landed(self, ids: Sequence[ChunkId]) -> None:
        """These chunks are durable now."""
        for id in ids:
            event = self._waiting.pop(id, None)
            if event is not None:
                event.set()

    def flight(self, id: ChunkId) -> asyncio.Event:
        """Set as soon as `id` has landed. Take it first, then look into the store, then wait."""
        event = self._waiting.get(id)
        if event is None:
            event = self._waiting[id] = asyncio.Event()
        return event


class Landing:
    """Writes the chunks of one sender in batches: while one batch is made durable, the next one gathers.

    Use as an async context manager: leaving it, also by an error, writes what was verified until then.
    """

    def __init__(self, store: ChunkWriter, arrivals: Arrivals) -> None:
        self.stored = 0
        self._store = store
        self._arrivals = arrivals
        self._gathered: list[Chunk] = []
        self._bytes = 0
        self._changed = asyncio.Condition()
        self._closing = False
        self._error: BaseException | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._write_all())
        return self

    async def __aexit__(self, *_: object) -> None:
        # The sender may be gone and this request cancelled: what it brought and we verified is kept all the same.
        await asyncio.shield(self._finish())

    async def add(self, chunk: Chunk) -> None:
        """Take a chunk, waiting while too much waits to be written. Raises what the store raised."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._bytes < QUEUE_BYTES or self._error is not None)
            self._check()
            self._gathered.append(chunk)
            self._bytes += chunk.size
            self._changed.notify_all()

    async def flush(self) -> None:
        """Wait until everything that was added is durable. Raises what the store raised."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._bytes == 0 or self._error is not None)
            self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    async def _finish(self) -> None:
        async with self._changed:
            self._closing = True
            self._changed.notify_all()
        await self._task

    async def _write_all(self) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._gathered or self._closing)
                batch = self._next_batch()
            if not batch:
                return
            try:
                await self._store.put_many(batch)
            except BaseException as error:
                async with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            self.stored += len(batch)
            self._arrivals.landed([chunk.id for chunk in batch])
            async with self._changed:
                self._bytes -= sum(chunk.size for chunk in batch)
                self._changed.notify_all()

    def _next_batch(self) -> list[Chunk]:
        size, count = 0, 0
        for chunk in self._gathered:
            if count and size + chunk.size > BATCH_BYTES:
                break
            size += chunk.size
            count += 1
        batch, self._gathered = self._gathered[:count], self._gathered[count:]
        return batch


class ArrivingChunks:
    """The chunks of a relay as a reader meets them: here, on their way, or neither."""

    def __init__(self, store: ChunkReader, arrivals: Arrivals, is_arriving: Callable[[Manifest], bool]) -> None:
        """`is_arriving`: whether somebody brings what is missing of a manifest."""
        self.is_arriving = is_arriving
        self.flight = arrivals.flight
        self.has_many = store.has_many
        self._store = store

    async def here(self, id: ChunkId) -> StoredChunk | None:
        """The chunk; None where it is not here, or damaged. Raises `StoreError`."""
        try:
            return await self._store.open(id)
        except ChunkMissing:
            return None
        except ChunkInvalid as error:
            log.warning("store: %s", error)
            return None

    async def open(self, manifest: Manifest, index: int, patience: float) -> StoredChunk | None:
        """The chunk; None where it is neither here nor on its way.

        Raises:
            TimeoutError: it did not arrive within `patience` seconds.
            StoreError: the medium failed.
        """
        id = manifest.chunk_id(index)
        # Asked before looking: while we look, the last chunks may land and the package be published.
        is_arriving = self.is_arriving(manifest)
        found = await self.here(id)
        if found is not None or not is_arriving:
            return found
        flight = self.flight(id)
        found = await self.here(id)
        if found is not None:
            return found
        await asyncio.wait_for(flight.wait(), patience)
        return await self.here(id)


def adopting(payloads: Payloads, known: Mapping[ManifestId, Manifest]) -> Tap:
    """What arrives as one payload of several chunks is kept as it comes, for readers who can take it so.

    To be called by a decoder in any thread, in the running loop of whom this function is called.
    """
    loop = asyncio.get_running_loop()

    def tap(run: Places, bases: Places, encoding: Encoding) -> Sink | None:
        if len(run) < 2 and not bases:
            return None
        spec = PayloadSpec(
            tuple(known[manifest].chunk_id(index) for manifest, index in run),
            tuple(known[manifest].chunk_id(index) for manifest, index in bases),
            Coding(encoding, 0),
            size_of(run, known),
            size_of(bases, known),
        )
        return _Adoption(payloads, spec, loop)

    return tap


class _Adoption:
    """Hands what a decoder tells in its thread to the loop, in order."""

    def __init__(self, payloads: Payloads, spec: PayloadSpec, loop: asyncio.AbstractEventLoop) -> None:
        self._payloads = payloads
        self._spec = spec
        self._loop = loop
        self._growing: Growing | None = None
        self._in_loop(self._begin)

    def add(self, piece: bytes) -> None:
        self._tell(lambda growing: growing.add(piece))

    def finish(self) -> None:
        self._tell(lambda growing: growing.finish())

    def fail(self) -> None:
        self._tell(lambda growing: growing.fail())

    def _begin(self) -> None:
        self._growing = self._payloads.adopt(self._spec)
        if self._growing is not None:
            metrics.PAYLOADS.labels("adopted").inc()

    def _tell(self, what: Callable[[Growing], None]) -> None:
        self._in_loop(lambda: None if self._growing is None else what(self._growing))

    def _in_loop(self, what: Callable[[], None]) -> None:
        # A loop that is closed has no readers any more.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what)
