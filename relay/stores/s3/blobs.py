"""Whole files in a bucket, as they are. A large one goes up in parts, and appears when its last part is there."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Iterator
from typing import Final

from relay.audit.acts import NotQuarantined, Quarantined
from relay.audit.event import tell
from relay.errors import ChunkInvalid, ChunkMissing, StoreError
from relay.package.identity import parse_digest
from relay.stores.contract import Blobs
from relay.stores.s3.bucket import Bucket
from relay.stores.s3.keys import Keys

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
        pieces = await self._bucket.run(self._bucket.stream, self._keys.blob(sha256))
        if pieces is None:
            raise ChunkMissing(sha256)
        digest, held = hashlib.sha256(), b""
        while piece := await self._bucket.run(_next, pieces):
            await asyncio.to_thread(digest.update, piece)
            if held:
                yield held
            held = piece
        if digest.hexdigest() != parse_digest(sha256):
            damage = ChunkInvalid(sha256, digest.hexdigest())
            await self._bucket.run(self._set_aside, sha256, damage)
            raise damage
        if held:
            yield held

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

    def _set_aside(self, sha256: str, damage: ChunkInvalid) -> None:
        key, aside = self._keys.blob(sha256), self._keys.quarantine(sha256)
        try:
            self._bucket.copy(key, aside)
            self._bucket.delete(key)
        except StoreError as error:
            tell(NotQuarantined(key, str(error)))
            damage.add_note(str(error))
            return
        tell(Quarantined(key, aside))


def _next(pieces: Iterator[bytes]) -> bytes:
    return next(pieces, b"")
