"""Chunks on their way into the store: whoever waits for one hangs on the one flight that brings it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Self
from weakref import WeakValueDictionary

from relay.content.chunk import Chunk
from relay.content.identity import ChunkId
from relay.stores.contract import ChunkWriter

BATCH_BYTES = 4 << 20
"""Chunks made durable in one go: few enough that readers who wait for them wait briefly."""
QUEUE_BYTES = 8 << 20
"""Verified chunks of one sender that wait to be written; more make the sender wait."""


class Arrivals:
    """Who waits for which chunk."""

    def __init__(self) -> None:
        # Weak: a flight that nobody waits for any more is forgotten by itself.
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
