"""A chunk that was verified when it was made: the only kind a caller can hold."""

from __future__ import annotations

from relay.errors import ChunkInvalid
from relay.package.identity import ChunkId, chunk_id

CHUNK_MAX = 4 << 20
"""Bytes. No chunk of any format is larger; every receiver may refuse one that is."""


class Chunk:
    """Up to 4 MiB of the tree stream and its name. Construction checks the hash."""

    __slots__ = ("data", "id")

    def __init__(self, id: ChunkId, data: bytes) -> None:
        """Take `data` under the name `id`.

        Raises:
            ChunkInvalid: `data` has another SHA-256.
        """
        found = chunk_id(data)
        if found != id:
            raise ChunkInvalid(id, found)
        self.id = id
        self.data = data

    @classmethod
    def of(cls, data: bytes) -> Chunk:
        """Name `data` by its own hash."""
        chunk = cls.__new__(cls)
        chunk.id = chunk_id(data)
        chunk.data = data
        return chunk

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.data)

    def __repr__(self) -> str:
        return f"Chunk({self.id[:12]}…, {self.size} B)"
