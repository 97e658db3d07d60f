"""Parts read out of chunks: the bytes of one part in pieces, whatever chunks hold them."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final

from relay.package.chunk import CHUNK_MAX, Chunk
from relay.package.manifest import Manifest

PIECE: Final = 256 << 10
"""Bytes of a piece at most."""
_CACHE: Final = 4 * CHUNK_MAX
"""Bytes of chunks at hand: small parts share one, and the file's order jumps between them."""

PartReader = Callable[[int], AsyncGenerator[bytes, None]]
"""The content of a part of the manifest, by index, in pieces; may be asked several times."""
ChunkGetter = Callable[[int], Awaitable[Chunk]]
"""A chunk of the manifest, by index."""


def parts_of_chunks(manifest: Manifest, get: ChunkGetter) -> PartReader:
    """Reads parts out of chunks. Chunks that small parts share are asked for once, within 16 MiB."""
    cache = _ChunkCache(get)
    starts = manifest.chunk_starts

    async def read(part: int) -> AsyncGenerator[bytes, None]:
        at = manifest.part_starts[part]
        end = at + manifest.parts[part].size
        while at < end:
            index = bisect_right(starts, at) - 1
            chunk = await cache.get(index)
            stop = min(end, starts[index] + manifest.chunks[index].size)
            data = memoryview(chunk.data)[at - starts[index] : stop - starts[index]]
            for piece in range(0, len(data), PIECE):
                yield bytes(data[piece : piece + PIECE])
            at = stop

    return read


class _ChunkCache:
    def __init__(self, get: ChunkGetter) -> None:
        self._get = get
        self._held: OrderedDict[int, Chunk] = OrderedDict()
        self._size = 0
        self._locks: dict[int, asyncio.Lock] = {}

    async def get(self, index: int) -> Chunk:
        async with self._locks.setdefault(index, asyncio.Lock()):
            if index not in self._held:
                self._held[index] = chunk = await self._get(index)
                self._size += chunk.size
            self._held.move_to_end(index)
            chunk = self._held[index]
        while self._size > _CACHE and len(self._held) > 1:
            self._size -= self._held.popitem(last=False)[1].size
        return chunk
