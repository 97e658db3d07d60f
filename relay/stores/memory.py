"""A store that lives and dies with its process: for tests, and where a few chunks are held for a moment."""

from __future__ import annotations

import builtins
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager

import aiofiles
import xxhash

from relay.errors import ChunkInvalid, ChunkMissing, LockedError, StoreError
from relay.package.chunk import Chunk
from relay.package.identity import ChunkId, Sha256, chunk_id, parse_digest
from relay.stores.contract import (
    PIECE,
    Blobs,
    ChunkSweeper,
    Documents,
    LockName,
    StoredChunk,
    document_folder,
    document_name,
)
from relay.stores.stored_form import (
    HEADER_SIZE,
    DamageError,
    check_stored,
    decode_stored,
    encode_stored,
    parse_stored_header,
)


class StoredBytes(StoredChunk):
    """A stored form that is held in memory. Construction checks it for damage."""

    def __init__(self, id: ChunkId, stored: bytes) -> None:
        """Take `stored`, the file form of the chunk `id`.

        Raises:
            ChunkInvalid: it is damaged.
        """
        try:
            header = parse_stored_header(stored)
            self._frame = stored[HEADER_SIZE:]
            check_stored(id, header, self._frame, xxhash.xxh3_64_intdigest(self._frame))
        except DamageError as damage:
            raise ChunkInvalid(id, damage.found) from damage
        super().__init__(id, header.size, len(self._frame), header.xxh3)

    async def pieces(self, most: int = PIECE) -> AsyncGenerator[bytes, None]:
        for piece in _cut(self._frame, most):
            yield piece


class MemoryChunks(ChunkSweeper):
    """Chunks in a dictionary, in the same stored form as on disk."""

    name = "memory"

    def __init__(self) -> None:
        self.stored: dict[ChunkId, bytes] = {}

    async def get(self, id: ChunkId) -> Chunk:
        with self._judging(id) as stored:
            return decode_stored(id, stored)

    async def has_many(self, ids: Iterable[ChunkId]) -> set[ChunkId]:
        return {id for id in ids if ChunkId(parse_digest(id)) in self.stored}

    async def open(self, id: ChunkId) -> StoredChunk:
        with self._judging(id) as stored:
            return StoredBytes(id, stored)

    async def put_many(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            if chunk.id not in self.stored:
                self.stored[chunk.id] = encode_stored(chunk)

    async def list(self) -> AsyncIterator[ChunkId]:
        for id in tuple(self.stored):
            yield id

    async def remove(self, id: ChunkId) -> None:
        self.stored.pop(ChunkId(parse_digest(id)), None)

    @contextmanager
    def _judging(self, id: ChunkId) -> Iterator[bytes]:
        """What is held under this name; damage found inside the context takes it away."""
        stored = self.stored.get(ChunkId(parse_digest(id)))
        if stored is None:
            raise ChunkMissing(id)
        try:
            yield stored
        except ChunkInvalid:
            self.stored.pop(id, None)
            raise


class MemoryDocuments(Documents):
    """Documents in a dictionary."""

    def __init__(self) -> None:
        self._documents: dict[str, bytes] = {}

    async def read(self, name: str) -> bytes | None:
        return self._documents.get(document_name(name))

    async def write(self, name: str, data: bytes) -> None:
        self._documents[document_name(name)] = bytes(data)

    async def create(self, name: str, data: bytes) -> bool:
        if document_name(name) in self._documents:
            return False
        self._documents[name] = bytes(data)
        return True

    async def remove(self, name: str) -> None:
        self._documents.pop(document_name(name), None)

    async def list(self, prefix: str) -> builtins.list[str]:
        folder = f"{document_folder(prefix)}/" if prefix else ""
        return sorted(name for name in self._documents if name.startswith(folder))


class MemoryBlobs(Blobs):
    """Whole files in a dictionary."""

    def __init__(self) -> None:
        self.blobs: dict[Sha256, bytes] = {}

    async def put_file(self, sha256: str, path: str) -> None:
        try:
            async with aiofiles.open(path, "rb") as file:
                data = await file.read()
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}") from error
        self.blobs[parse_digest(sha256)] = _checked(sha256, data)

    async def has(self, sha256: str) -> bool:
        return parse_digest(sha256) in self.blobs

    async def read(self, sha256: str) -> AsyncGenerator[bytes, None]:
        data = self.blobs.get(parse_digest(sha256))
        if data is None:
            raise ChunkMissing(sha256)
        try:
            _checked(sha256, data)
        except ChunkInvalid:
            self.blobs.pop(parse_digest(sha256), None)
            raise
        for piece in _cut(data):
            yield piece

    async def remove(self, sha256: str) -> None:
        self.blobs.pop(parse_digest(sha256), None)


class MemoryLocks:
    """The exclusive locks of a store that only this process can see."""

    def __init__(self) -> None:
        self._held: set[str] = set()

    @contextmanager
    def exclusive(self, name: LockName) -> Iterator[None]:
        """Hold the lock `name` until the context ends.

        Raises:
            LockedError: on entering, if it is held.
        """
        if name in self._held:
            raise LockedError(f"the {name} lock of this memory store is held by this process")
        self._held.add(name)
        try:
            yield
        finally:
            self._held.discard(name)


def _checked(sha256: str, data: bytes) -> bytes:
    found = chunk_id(data)
    if found != ChunkId(parse_digest(sha256)):
        raise ChunkInvalid(sha256, found)
    return data


def _cut(data: bytes, most: int = PIECE) -> Iterator[bytes]:
    return (data[start : start + most] for start in range(0, len(data), most))
