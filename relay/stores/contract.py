"""What a store of chunks promises. A reader, then a writer, then a sweeper: ask for the least that you need.

Rules that hold for every store and every layer, checked by `tests/harness/store_contract.py`:

- A chunk is named by its bytes; putting it twice is the same as putting it once.
- What `put` or `put_many` returned from is durable: it survives a power cut.
- `get` hands out verified chunks only. Damage is `ChunkInvalid` (and the store has put the bad file aside, so that the
  next `put` of the same chunk mends it); absence is `ChunkMissing`; anything else is the road (`StoreError`).
- A chunk that `has_many` named may be gone in the next moment: only a lease or a pin keeps it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

from relay.errors import ChunkInvalid, ChunkMissing, UsageError
from relay.package.chunk import Chunk
from relay.package.identity import ChunkId

PIECE = 256 << 10
"""Bytes. Stored chunks stream in pieces of at most this size."""

LockName = Literal["serve", "sweep"]
"""What one process at a time may do with a store. Writing needs no such lock: names are contents."""

FORMAT: Final = b"waystation-store 1\n"
"""What every store that outlives its process has under the name `format`."""

DOCUMENT_NAME_MAX: Final = 512
"""Characters of a whole document name."""

_SEGMENT: Final = re.compile(r"[a-z0-9_][a-z0-9._+-]{0,199}", re.ASCII)
_RESERVED: Final = frozenset({"chunks", "blobs", "tmp", "quarantine", "lost+found"})


def check_format(store: str, found: bytes) -> None:
    """Whether `found` is the format that this version knows; `store` is for people.

    Raises:
        UsageError: it is another one.
    """
    if found != FORMAT:
        raise UsageError(
            f"{store} is a store of an unknown format, {found[:40]!r}",
            hint=f"this version knows {FORMAT.decode().strip()!r}",
        )


def document_name(name: str) -> str:
    """`name`, if it is a plain relative path of a folder and at least one more segment.

    Lower case only, because a store may lie on a file system that folds case. A segment cannot begin with a dot, so
    neither `..` nor hidden files can be said; the stores' own folders cannot be named either.

    Raises:
        ValueError: it is not.
    """
    segments = name.split("/")
    plain = len(name) <= DOCUMENT_NAME_MAX and all(_SEGMENT.fullmatch(segment) for segment in segments)
    if not plain or len(segments) < 2 or segments[0] in _RESERVED:
        raise ValueError(f"not a document name: {name[:120]!r}")
    return name


def document_folder(prefix: str) -> str:
    """`prefix`, if it is empty (everything) or a plain folder that documents may lie in.

    Raises:
        ValueError: it is not.
    """
    if prefix:
        document_name(f"{prefix}/x")
    return prefix


@dataclass(eq=False)
class StoredChunk(ABC):
    """One chunk in its stored form (a zstd frame), to be sent without decoding it.

    The stored form was checked against the XXH3-64 written beside it, when it was opened: that finds damage.
    Whoever decodes it checks the SHA-256: that finds lies.
    """

    id: ChunkId
    size: int
    """Bytes of the chunk itself."""
    length: int
    """Bytes of the stored form."""
    xxh3: int
    """XXH3-64 (seed 0) of the stored form."""

    @abstractmethod
    def pieces(self, most: int = PIECE) -> AsyncGenerator[bytes, None]:
        """The stored form in order, in pieces of at most `most` bytes.

        Raises:
            StoreError: it went away or changed while it was read.
        """


class ChunkReader(ABC):
    """Where chunks can be read."""

    name: str
    """For people: says which store, e.g. its location."""

    @abstractmethod
    async def get(self, id: ChunkId) -> Chunk:
        """One verified chunk.

        Raises:
            ChunkMissing: not here.
            ChunkInvalid: here, but damaged; it has been put aside.
            StoreError: the medium failed.
        """

    @abstractmethod
    async def has_many(self, ids: Iterable[ChunkId]) -> set[ChunkId]:
        """Those of `ids` that are here, by name only (damage shows when they are read)."""

    @abstractmethod
    async def open(self, id: ChunkId) -> StoredChunk:
        """The stored form, for streaming. Raises as `get` does."""

    async def sound_many(self, ids: Iterable[ChunkId]) -> set[ChunkId]:
        """Those of `ids` that are here undamaged: each is read, and one that is damaged is put aside.

        Raises:
            StoreError: the medium failed.
        """
        sound = set()
        for id in await self.has_many(ids):
            with suppress(ChunkMissing, ChunkInvalid):
                await self.open(id)
                sound.add(id)
        return sound

    async def close(self) -> None:
        """Give back what the store holds (handles, threads, locks). Twice is once."""
        return


class ChunkWriter(ChunkReader):
    """Where chunks can be put."""

    @abstractmethod
    async def put_many(self, chunks: Sequence[Chunk]) -> None:
        """All of them, durable on return, in one go (write all, sync all, rename all).

        Raises:
            StoreError: none, some or all may be here now, none of them damaged; `full` when there is no room.
        """

    async def put(self, chunk: Chunk) -> None:
        """One chunk, durable on return. Raises as `put_many` does."""
        await self.put_many([chunk])


class ChunkSweeper(ChunkWriter):
    """Where chunks can be listed and removed."""

    @abstractmethod
    def list(self) -> AsyncIterator[ChunkId]:
        """Every chunk here, in no order."""

    @abstractmethod
    async def remove(self, id: ChunkId) -> None:
        """Gone on return. Removing what is not here is no error. Must work with no space left."""


class Documents(ABC):
    """Small named files beside the chunks: manifests, pointers, leases. The truth that the catalog is a cache of.

    Names are relative paths of lower-case segments (`manifests/<hex>`, `packages/<id>/<version>`); a name that
    `document_name` refuses is a `ValueError` before a path is built.
    """

    @abstractmethod
    async def read(self, name: str) -> bytes | None:
        """The whole document, or None where there is none, or none that can be read."""

    @abstractmethod
    async def write(self, name: str, data: bytes) -> None:
        """Durable and atomic: a reader sees the old or the new one, never a mix. Raises `StoreError`."""

    @abstractmethod
    async def create(self, name: str, data: bytes) -> bool:
        """As `write`, but only where no such document is; False where one was (it is untouched)."""

    @abstractmethod
    async def remove(self, name: str) -> None:
        """Gone on return. Removing what is not here is no error."""

    @abstractmethod
    async def list(self, prefix: str) -> list[str]:
        """Names of all documents below the folder `prefix` (`""`: of all there are), sorted."""


class Blobs(ABC):
    """Whole files under their SHA-256 (nupkgs, up to 4 GiB)."""

    @abstractmethod
    async def put_file(self, sha256: str, path: str) -> None:
        """Copy the local file `path` in, durable on return.

        Raises:
            ChunkInvalid: the file has another SHA-256.
            StoreError: the medium failed.
        """

    @abstractmethod
    async def has(self, sha256: str) -> bool: ...

    @abstractmethod
    def read(self, sha256: str) -> AsyncGenerator[bytes, None]:
        """The bytes in pieces of at most `PIECE`; the last one is held back until all of them have the right SHA-256.

        Raises:
            ChunkMissing: not here.
            ChunkInvalid: damaged; it has been put aside. Earlier pieces may have been handed out: cut the answer off.
            StoreError: the medium failed.
        """

    @abstractmethod
    async def remove(self, sha256: str) -> None:
        """Gone on return. Removing what is not here is no error."""
