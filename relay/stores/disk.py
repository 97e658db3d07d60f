"""A store in a folder of a local or shared file system.

    format                        "waystation-store 1"
    chunks/ab/<sha256>            one chunk each, in the stored form of `stored.py`
    blobs/ab/<sha256>             whole files as they are
    manifests/ packages/ …        documents, under their own names
    quarantine/                   damage that was put aside
    tmp/                          files that are still being written
    lock, lock-serve, lock-sweep  held with flock(2), so that the kernel frees them whatever kills the holder

`volume.py` owns the folder: the durable write, the room, the health and the locks. `DiskStore`, `DiskDocuments` and
`DiskBlobs` are its three faces. Files are never changed in place: they appear by a rename, whole, and read-only.
"""

from __future__ import annotations

import asyncio
import builtins
import hashlib
import logging
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

import aiofiles
import xxhash

from relay.errors import ChunkInvalid, IdentityError, StoreError
from relay.package.chunk import Chunk
from relay.package.identity import ChunkId, parse_digest
from relay.stores.contract import (
    PIECE,
    Blobs,
    ChunkSweeper,
    Documents,
    StoredChunk,
    document_folder,
    document_name,
)
from relay.stores.stored_form import (
    FRAME_MAX,
    HEADER_SIZE,
    STORED_MAX,
    DamageError,
    check_stored,
    decode_stored,
    parse_stored_header,
    stored_pieces,
)
from relay.stores.volume import (
    UNREADABLE,
    Look,
    NameTakenError,
    NewFile,
    Volume,
    hashed,
    is_file,
    is_same,
    link_new,
    translate,
    translated,
)
from relay.stores.whole_file import checked_to_the_last

_log = logging.getLogger(__name__)

# --- chunks


@dataclass(eq=False)
class DiskChunk(StoredChunk):
    """A stored chunk that was checked; it is read again, piece by piece, when it is sent. `DiskStore.open` makes it."""

    path: str
    seen: os.stat_result

    async def pieces(self, most: int = PIECE) -> AsyncGenerator[bytes, None]:
        look = Look()
        try:
            async with aiofiles.open(self.path, "rb", buffering=0, opener=look) as file:
                if look.seen is None or not is_same(look.seen, self.seen):
                    raise StoreError(f"chunk {self.id[:16]}… changed since it was checked")
                await file.seek(HEADER_SIZE)
                left = self.length
                while left:
                    piece = await file.read(min(most, left))
                    if not piece:
                        raise StoreError(f"chunk {self.id[:16]}… ended early")
                    left -= len(piece)
                    yield piece
        except OSError as error:
            raise translate(error, f"read chunk {self.id[:16]}…") from error
        except DamageError as error:
            raise StoreError(f"chunk {self.id[:16]}… changed since it was checked") from error


class _OnVolume:
    """One face of a volume."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.name = f"disk:{volume.root}"


class DiskStore(_OnVolume, ChunkSweeper):
    """The chunks of a volume. Closing this closes the volume."""

    async def get(self, id: ChunkId) -> Chunk:
        return await asyncio.to_thread(self._get, id)

    async def has_many(self, ids: Iterable[ChunkId]) -> set[ChunkId]:
        return await asyncio.to_thread(self._has_many, tuple(ids))

    async def open(self, id: ChunkId) -> StoredChunk:
        return await asyncio.to_thread(self._open, id)

    async def put_many(self, chunks: Sequence[Chunk]) -> None:
        await self._volume.run(self._put_many, tuple(chunks))

    async def list(self) -> AsyncIterator[ChunkId]:
        for fan in range(256):
            for id in await asyncio.to_thread(self._list, f"{fan:02x}"):
                yield id

    async def remove(self, id: ChunkId) -> None:
        # Not synced: a removed chunk that a power cut brings back is waste, which the next sweep finds.
        await asyncio.to_thread(self._volume.remove, hashed("chunks", id))

    async def close(self) -> None:
        await self._volume.close()

    def _get(self, id: ChunkId) -> Chunk:
        below = hashed("chunks", id)
        with self._volume.judging(id, below) as look, open(self._volume.path(below), "rb", opener=look) as file:
            return decode_stored(id, file.read(STORED_MAX + 1))

    def _has_many(self, ids: Sequence[ChunkId]) -> set[ChunkId]:
        with translated(f"read from {self._volume.root}"):
            here = {id for id in ids if is_file(self._volume.path(hashed("chunks", id)))}
        if len(here) < len(ids):
            self._volume.require_here()
        return here

    def _open(self, id: ChunkId) -> DiskChunk:
        below = hashed("chunks", id)
        path = self._volume.path(below)
        with self._volume.judging(id, below) as look, open(path, "rb", buffering=0, opener=look) as file:
            header = parse_stored_header(file.read(HEADER_SIZE))
            front, length, digest = b"", 0, xxhash.xxh3_64()
            while piece := file.read(PIECE):
                front = front or piece[:18]
                length += len(piece)
                digest.update(piece)
                if length > FRAME_MAX:
                    raise DamageError("too long")
            check_stored(id, header, front, digest.intdigest())
            seen = look.seen
        assert seen is not None  # noqa: S101 - a file was opened
        return DiskChunk(id, header.size, length, header.xxh3, path, seen)

    def _put_many(self, chunks: Sequence[Chunk]) -> None:
        by_path = {hashed("chunks", chunk.id): chunk for chunk in chunks}
        with translated(f"write to {self._volume.root}"):
            absent = {path: chunk for path, chunk in by_path.items() if not self._volume.present(path)}
        self._volume.write(
            [NewFile(path, partial(stored_pieces, chunk)) for path, chunk in absent.items()],
            bulk=sum(chunk.size for chunk in absent.values()),
            # Whoever wrote the others may have died between its rename and its fsync of the folder.
            also_sync={os.path.dirname(path) for path in by_path},
        )

    def _list(self, fan: str) -> builtins.list[ChunkId]:
        try:
            names = os.listdir(self._volume.path(f"chunks/{fan}"))
        except FileNotFoundError:
            self._volume.require_here()
            return []
        except OSError as error:
            raise translate(error, f"list {self._volume.root}") from error
        return [ChunkId(name) for name in names if _is_digest(name) and name.startswith(fan)]


def _is_digest(name: str) -> bool:
    with suppress(IdentityError):
        return parse_digest(name) == name
    return False


# --- documents


class DiskDocuments(_OnVolume, Documents):
    """The documents of a volume, each a file under its own name."""

    async def read(self, name: str) -> bytes | None:
        return await asyncio.to_thread(self._read, document_name(name))

    async def write(self, name: str, data: bytes) -> None:
        await self._volume.run(self._volume.write, [NewFile(document_name(name), lambda: (data,))], undo=False)

    async def create(self, name: str, data: bytes) -> bool:
        return await self._volume.run(self._create, document_name(name), data)

    async def remove(self, name: str) -> None:
        # Synced, because what the document named may be removed next: a manifest goes before its chunks.
        await self._volume.run(self._volume.remove, document_name(name), sync=True)

    async def list(self, prefix: str) -> builtins.list[str]:
        return await asyncio.to_thread(self._list, document_folder(prefix))

    def _read(self, name: str) -> bytes | None:
        path = self._volume.path(name)
        try:
            with open(path, "rb", opener=Look()) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            self._volume.require_here()
            return None
        except DamageError as error:
            if stat.S_ISDIR(os.lstat(path).st_mode):
                return None
            raise StoreError(f"{name} in {self._volume.root} is not a file") from error
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise translate(error, f"read {name} in {self._volume.root}") from error
            # As good as gone: whatever it said is written anew, over it.
            _log.warning("disk.unreadable: %s: %s", path, error.strerror)
            self._volume.require_here()
            return None

    def _create(self, name: str, data: bytes) -> bool:
        if not os.path.lexists(self._volume.path(name)):
            with suppress(NameTakenError):
                self._volume.write([NewFile(name, lambda: (data,))], place=link_new)
                return True
        # False says "it is there", so let that be true after a power cut, too.
        self._volume.write([], also_sync={os.path.dirname(name)})
        return False

    def _list(self, prefix: str) -> builtins.list[str]:
        with translated(f"list {self._volume.root}"):
            names = sorted(self._walk(prefix))
        if not names:
            self._volume.require_here()
        return names

    def _walk(self, folder: str) -> Iterator[str]:
        # Unlike os.walk, an unreadable folder is an error: a sweep must not take it for an empty one.
        try:
            entries = tuple(os.scandir(self._volume.path(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                if _passes(document_folder, name):
                    yield from self._walk(name)
            elif entry.is_file(follow_symlinks=False) and _passes(document_name, name):
                yield name


def _passes(check: Callable[[str], str], name: str) -> bool:
    with suppress(ValueError):
        return bool(check(name))
    return False


# --- blobs

_BLOB_PIECE: Final = 64 << 10
"""Bytes that are read at a time of a file that is sent: two of them are held for each peer that does not read on."""


class DiskBlobs(_OnVolume, Blobs):
    """The whole files of a volume."""

    async def put_file(self, sha256: str, path: str) -> None:
        await self._volume.run(self._put_file, sha256, path)

    async def has(self, sha256: str) -> bool:
        return await asyncio.to_thread(self._has, hashed("blobs", sha256))

    async def read(self, sha256: str) -> AsyncGenerator[bytes, None]:
        below = hashed("blobs", sha256)
        with self._volume.judging(sha256, below) as look:
            async with aclosing(checked_to_the_last(sha256, self._pieces(below, look))) as pieces:
                async for piece in pieces:
                    yield piece

    async def _pieces(self, below: str, look: Look) -> AsyncGenerator[bytes, None]:
        async with aiofiles.open(self._volume.path(below), "rb", buffering=0, opener=look) as file:
            while piece := await file.read(_BLOB_PIECE):
                yield piece

    async def remove(self, sha256: str) -> None:
        await asyncio.to_thread(self._volume.remove, hashed("blobs", sha256))

    def _put_file(self, sha256: str, source: str) -> None:
        below = hashed("blobs", sha256)
        pieces = partial(_checked_pieces, sha256, source)
        with translated(f"write to {self._volume.root}"):
            present = self._volume.present(below)
        if present:
            for _ in pieces():
                pass
            self._volume.write([], also_sync={os.path.dirname(below)})
        else:
            with translated(f"read {source}"):
                size = os.stat(source).st_size
            self._volume.write([NewFile(below, pieces)], bulk=size)

    def _has(self, below: str) -> bool:
        with translated(f"read from {self._volume.root}"):
            here = is_file(self._volume.path(below))
        if not here:
            self._volume.require_here()
        return here


def _checked_pieces(sha256: str, source: str) -> Iterator[bytes]:
    """The file `source` in pieces; raises `ChunkInvalid` after the last one, if they are not what `sha256` names."""
    digest = hashlib.sha256()
    with translated(f"read {source}"), open(source, "rb", buffering=0) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            yield piece
    if digest.hexdigest() != parse_digest(sha256):
        raise ChunkInvalid(sha256, digest.hexdigest())
