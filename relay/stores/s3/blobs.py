"""Whole files in a bucket, as they are. A large one goes up in parts, and appears when its last part is there."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Final

from relay.errors import ChunkInvalid, ChunkMissing, StoreError
from relay.package.identity import parse_digest
from relay.stores.contract import Blobs
from relay.stores.s3.bucket import Bucket
from relay.stores.s3.keys import Keys
from relay.stores.whole_file import checked_to_the_last

STALE_SECONDS: Final = 24 * 3600.0
"""An upload that began longer ago than that and never ended was left by a process that died."""


class S3Blobs(Blobs):
    """The whole files of a bucket."""

    def __init__(self, bucket: Bucket, keys: Keys) -> None:
        self._bucket, self._keys = bucket, keys
        self.name = str(bucket.settings)

    async def put_file(self, sha256: str, path: str) -> None:
        await self._bucket.run(self._put_file, sha256, path)

    async def has(self, sha256: str) -> bool:
        return await self._bucket.run(self._bucket.has, self._keys.blob(sha256))

    async def read(self, sha256: str) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(checked_to_the_last(sha256, self._pieces(sha256))) as pieces:
                async for piece in pieces:
                    yield piece
        except ChunkInvalid as damage:
            key, aside = self._keys.blob(sha256), self._keys.quarantine(sha256)
            await self._bucket.run(self._bucket.set_aside, key, aside, damage)
            raise

    async def _pieces(self, sha256: str) -> AsyncGenerator[bytes, None]:
        pieces = await self._bucket.run(self._bucket.stream, self._keys.blob(sha256))
        if pieces is None:
            raise ChunkMissing(sha256)
        while piece := await self._bucket.run(_next, pieces):
            yield piece

    async def remove(self, sha256: str) -> None:
        await self._bucket.run(self._bucket.delete, self._keys.blob(sha256))

    def _put_file(self, sha256: str, path: str) -> None:
        key = self._keys.blob(sha256)
        try:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror}") from error
        if found != parse_digest(sha256):
            raise ChunkInvalid(sha256, found)
        if not self._bucket.has(key):
            self._bucket.put_file(key, path)


def _next(pieces: Iterator[bytes]) -> bytes:
    return next(pieces, b"")
