"""Chunks in a bucket: one object each, in the stored form, so that each says by itself whether it was damaged."""

from __future__ import annotations

import asyncio
import builtins
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Final

from relay.errors import ChunkInvalid, ChunkMissing, StoreError
from relay.package.chunk import Chunk
from relay.package.identity import ChunkId, parse_digest
from relay.stores.contract import ChunkSweeper, StoredChunk
from relay.stores.memory import StoredBytes
from relay.stores.s3.bucket import Bucket, TakenError, TooLargeError
from relay.stores.s3.keys import Keys
from relay.stores.stored_form import STORED_MAX, decode_stored, encode_stored

KNOWN: Final = 200_000
"""Chunks of which it is remembered that they are there."""
KNOWN_SECONDS: Final = 300.0
"""For how long: another process may remove them."""
_LISTED: Final = 1000
"""Keys that are taken from a listing at a time."""


class KnownChunks:
    """Chunks that were there a while ago. What is not among them has to be asked for. Touched in the loop's thread only."""

    def __init__(self, most: int = KNOWN, seconds: float = KNOWN_SECONDS) -> None:
        self._most, self._seconds = most, seconds
        self._seen: OrderedDict[ChunkId, float] = OrderedDict()

    def add(self, ids: Iterable[ChunkId]) -> None:
        now = time.monotonic()
        for id in ids:
            self._seen[id] = now
            self._seen.move_to_end(id)
        while len(self._seen) > self._most:
            self._seen.popitem(last=False)

    def discard(self, id: ChunkId) -> None:
        self._seen.pop(id, None)

    def __contains__(self, id: ChunkId) -> bool:
        return time.monotonic() - self._seen.get(id, -self._seconds) < self._seconds


class S3Chunks(ChunkSweeper):
    """The chunks of a bucket. Closing this closes the bucket."""

    def __init__(self, bucket: Bucket, keys: Keys) -> None:
        self._bucket, self._keys = bucket, keys
        self._known = KnownChunks()
        self.name = str(bucket.settings)

    async def get(self, id: ChunkId) -> Chunk:
        stored = await self._read(id)
        try:
            return await asyncio.to_thread(decode_stored, id, stored)
        except ChunkInvalid as damage:
            await self._set_aside(id, damage)
            raise

    async def open(self, id: ChunkId) -> StoredChunk:
        stored = await self._read(id)
        try:
            return StoredBytes(id, stored)
        except ChunkInvalid as damage:
            await self._set_aside(id, damage)
            raise

    async def has_many(self, ids: Iterable[ChunkId]) -> set[ChunkId]:
        asked = {ChunkId(parse_digest(id)) for id in ids}
        here = {id for id in asked if id in self._known}
        doubtful = list(asked - here)
        answers = await self._bucket.run_all(partial(self._bucket.has, self._keys.chunk(id)) for id in doubtful)
        found = {id for id, is_here in zip(doubtful, answers, strict=True) if is_here}
        if len(found) < len(doubtful):
            await self._require_here()
        self._known.add(found)
        return here | found

    async def put_many(self, chunks: Sequence[Chunk]) -> None:
        absent = {chunk.id: chunk for chunk in chunks if chunk.id not in self._known}
        await self._bucket.run_all(partial(self._put, chunk) for chunk in absent.values())
        self._known.add(absent)

    async def list(self) -> AsyncIterator[ChunkId]:
        listed = self._keys.chunks_in(self._bucket.list(self._keys.chunks))
        while ids := await self._bucket.run(_take, listed):
            for id in ids:
                yield id

    async def remove(self, id: ChunkId) -> None:
        key = self._keys.chunk(id)
        self._known.discard(id)
        await self._bucket.run(self._bucket.delete, key)
        self._known.discard(id)

    async def close(self) -> None:
        await asyncio.to_thread(self._bucket.close)

    async def _read(self, id: ChunkId) -> bytes:
        key = self._keys.chunk(id)
        try:
            found = await self._bucket.run(self._bucket.get, key, STORED_MAX)
        except TooLargeError as error:
            damage = ChunkInvalid(id, "too long")
            await self._set_aside(id, damage)
            raise damage from error
        if found is None:
            self._known.discard(id)
            await self._require_here()
            raise ChunkMissing(id)
        return found.data

    def _put(self, chunk: Chunk) -> None:
        key, stored = self._keys.chunk(chunk.id), encode_stored(chunk)
        try:
            self._bucket.put(key, stored, only_new=True)
            return
        except TakenError:
            is_sound = self._is_sound(chunk.id)
        # Who was first may have written damage, or another's encoder made other bytes of the same chunk.
        if not is_sound:
            self._bucket.put(key, stored)

    def _is_sound(self, id: ChunkId) -> bool:
        try:
            if (found := self._bucket.get(self._keys.chunk(id), STORED_MAX)) is None:
                return False
            decode_stored(id, found.data)
        except (ChunkInvalid, TooLargeError):
            return False
        return True

    async def _set_aside(self, id: ChunkId, damage: ChunkInvalid) -> None:
        self._known.discard(id)
        await self._bucket.run(self._bucket.set_aside, self._keys.chunk(id), self._keys.quarantine(id), damage)

    async def _require_here(self) -> None:
        """A missing object proves nothing where the whole store is missing. Raises `StoreError`."""
        if not await self._bucket.run(self._bucket.has, self._keys.format):
            raise StoreError(f"there is no store in {self._bucket.settings.place} now")


def _take(ids: Iterator[ChunkId]) -> builtins.list[ChunkId]:
    return list(islice(ids, _LISTED))
