"""Chunks on their way into the store: all that wait for one hang on the one flight that brings it."""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Self

from relay.encoding.bundle import Places, Sink, Tap
from relay.encoding.codecs import Coding, Encoding
from relay.encoding.holdings import size_of
from relay.errors import ChunkInvalid, ChunkMissing
from relay.package.chunk import Chunk
from relay.package.identity import ChunkId, ManifestId
from relay.package.manifest import Manifest
from relay.server import metrics
from relay.stores.contract import ChunkReader, ChunkWriter, StoredChunk
from relay.support.together import News
from relay.transfer.encoder_pool import Growing, Payloads, PayloadSpec

log = logging.getLogger(__name__)

BATCH_BYTES = 4 << 20
"""Chunks made durable in one go: few enough that readers who wait for them wait briefly."""
QUEUE_BYTES = 4 << 20
"""Verified chunks of one sender that wait to be written; more make the sender wait."""


Arrivals = News[ChunkId]
"""Tells of chunks that are durable now."""


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
            self._arrivals.tell(chunk.id for chunk in batch)
            async with self._changed:
                self._bytes -= sum(chunk.size for chunk in batch)
                self._changed.notify_all()

    def _next_batch(self) -> list[Chunk]:
        ends = list(accumulate(chunk.size for chunk in self._gathered))
        count = max(1, bisect_right(ends, BATCH_BYTES))
        batch, self._gathered = self._gathered[:count], self._gathered[count:]
        return batch


class ArrivingChunks:
    """The chunks of a relay as a reader meets them: here, on their way, or neither."""

    def __init__(self, store: ChunkReader, arrivals: Arrivals, is_arriving: Callable[[Manifest], bool]) -> None:
        """`is_arriving`: whether somebody brings what is missing of a manifest."""
        self.is_arriving = is_arriving
        self.flight = arrivals.of
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
        # Not `wait_for`: until Python 3.12 it loses a cancellation that comes in the moment of waking.
        async with asyncio.timeout(patience):
            await flight.wait()
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
        return Growing(payloads, spec, loop, metrics.PAYLOADS.labels("adopted").inc)

    return tap
