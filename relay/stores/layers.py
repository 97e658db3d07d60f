"""Stores made of stores. Both are readers: a writer writes to the member that it means."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from relay.errors import ChunkInvalid, ChunkMissing, StoreError, UnreachableError, WaystationError
from relay.package.chunk import Chunk
from relay.package.identity import ChunkId
from relay.stores.contract import ChunkReader, ChunkWriter, StoredChunk
from relay.stores.memory import StoredBytes
from relay.stores.stored_form import encode_stored
from relay.support.together import Flights

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one member of a group did not answer."""

    member: str
    error: ChunkInvalid | UnreachableError


class Cached(ChunkReader):
    """`local` in front of `upstream`: what had to be fetched is kept, and damage in `local` is mended from `upstream`.

    However many ask for one chunk at the same time, `upstream` is asked once. A `local` that fails or is full slows
    readers down, it does not stop them.
    """

    def __init__(self, upstream: ChunkReader, local: ChunkWriter) -> None:
        """Both are closed with this one."""
        self._upstream = upstream
        self._local = local
        self._flights: Flights[ChunkId, Chunk] = Flights()
        self.name = f"{local.name} before {upstream.name}"

    async def get(self, id: ChunkId) -> Chunk:
        try:
            return await self._local.get(id)
        except (ChunkInvalid, UnreachableError) as error:
            _log.debug("chunk %s is not in %s: %s", id, self._local.name, error)
        return await self._flights.join(id, lambda: self._fetch(id))

    async def has_many(self, ids: Iterable[ChunkId]) -> set[ChunkId]:
        return await union((self._local, self._upstream), ids)

    async def open(self, id: ChunkId) -> StoredChunk:
        with suppress(ChunkInvalid, UnreachableError):
            return await self._local.open(id)
        chunk = await self._flights.join(id, lambda: self._fetch(id))
        try:
            return await self._local.open(id)
        except (ChunkInvalid, UnreachableError):
            return StoredBytes(id, await asyncio.to_thread(encode_stored, chunk))

    async def close(self) -> None:
        await self._flights.close()
        await self._local.close()
        await self._upstream.close()

    async def _fetch(self, id: ChunkId) -> Chunk:
        chunk = await self._upstream.get(id)
        try:
            await self._local.put(chunk)
        except StoreError as error:
            _log.warning("chunk %s is not kept in %s: %s", id, self._local.name, error)
        return chunk


class Failover(ChunkReader):
    """Several readers of the same chunks, asked in order until one has a good answer."""

    def __init__(self, readers: Sequence[ChunkReader]) -> None:
        """All are closed with this one."""
        self._readers = tuple(readers)
        self.name = "|".join(reader.name for reader in self._readers)

    async def get(self, id: ChunkId) -> Chunk:
        return await self._first(id, lambda reader: reader.get(id))

    async def has_many(self, ids: Iterable[ChunkId]) -> set[ChunkId]:
        return await union(self._readers, ids)

    async def open(self, id: ChunkId) -> StoredChunk:
        return await self._first(id, lambda reader: reader.open(id))

    async def close(self) -> None:
        for reader in self._readers:
            await reader.close()

    async def _first(self, id: ChunkId, ask: Callable[[ChunkReader], Awaitable[T]]) -> T:
        failures = []
        for reader in self._readers:
            try:
                return await ask(reader)
            except (ChunkInvalid, UnreachableError) as error:
                failures.append(Failure(reader.name, error))
        raise verdict(id, failures)


async def union(readers: Iterable[ChunkReader], ids: Iterable[ChunkId]) -> set[ChunkId]:
    """Those of `ids` that some reader has. Later ones are asked only for what is left; a dead one counts as empty.

    Raises:
        StoreError: none of those asked answered.
    """
    wanted, found = set(ids), set[ChunkId]()
    failures, answered = [], False
    for reader in readers:
        if answered and not wanted - found:
            break
        try:
            found |= await reader.has_many(wanted - found)
            answered = True
        except UnreachableError as error:
            failures.append(Failure(reader.name, error))
    if failures and not answered:
        raise StoreError(f"nobody answered: {_tell(failures)}", retry_after=_retry_after(failures))
    return found


def verdict(id: ChunkId, failures: Sequence[Failure]) -> WaystationError:
    """What the failures of all members mean together: absence is proven only if every one of them said so."""
    unreachable = [failure for failure in failures if not isinstance(failure.error, ChunkMissing | ChunkInvalid)]
    if unreachable:
        return StoreError(f"chunk {id[:16]}… from nobody: {_tell(failures)}", retry_after=_retry_after(unreachable))
    for failure in failures:
        if isinstance(failure.error, ChunkInvalid):
            found = ChunkInvalid(id, failure.error.found)
            found.add_note(_tell(failures))
            return found
    return ChunkMissing(id)


def _tell(failures: Iterable[Failure]) -> str:
    return "; ".join(f"{failure.member}: {failure.error}" for failure in failures)


def _retry_after(failures: Iterable[Failure]) -> float | None:
    """Seconds: the soonest that any of them named."""
    named = [failure.error.retry_after for failure in failures if isinstance(failure.error, UnreachableError)]
    return min((seconds for seconds in named if seconds is not None), default=None)
