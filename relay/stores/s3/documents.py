"""Documents in a bucket: one object each, under its own name. A write of one is whole or not at all, as S3 has it."""

from __future__ import annotations

import builtins
import threading
from typing import Final

from relay.stores.contract import Documents, document_folder
from relay.stores.s3.bucket import Bucket, TakenError
from relay.stores.s3.keys import Keys

DOCUMENT_MAX: Final = 512 << 20
"""Bytes. The largest manifest there may be is far below that."""


class S3Documents(Documents):
    """The documents of a bucket.

    Where the server ignores conditions, `create` looks first: then one process at a time has the bucket (`locks.py`).
    """

    def __init__(self, bucket: Bucket, keys: Keys, *, has_conditions: bool) -> None:
        self._bucket, self._keys = bucket, keys
        self._has_conditions = has_conditions
        self._creating = threading.Lock()
        self.name = str(bucket.settings)

    async def read(self, name: str) -> bytes | None:
        found = await self._bucket.run(self._bucket.get, self._keys.document(name), DOCUMENT_MAX)
        return None if found is None else found.data

    async def write(self, name: str, data: bytes) -> None:
        await self._bucket.run(self._bucket.put, self._keys.document(name), data)

    async def create(self, name: str, data: bytes) -> bool:
        return await self._bucket.run(self._create, self._keys.document(name), data)

    async def remove(self, name: str) -> None:
        await self._bucket.run(self._bucket.delete, self._keys.document(name))

    async def list(self, prefix: str) -> builtins.list[str]:
        return await self._bucket.run(self._list, document_folder(prefix))

    def _create(self, key: str, data: bytes) -> bool:
        if not self._has_conditions:
            with self._creating:
                if self._bucket.has(key):
                    return False
                self._bucket.put(key, data)
                return True
        try:
            self._bucket.put(key, data, only_new=True)
        except TakenError:
            # Perhaps by ourselves: a first try may have been written, and its answer lost.
            found = self._bucket.get(key, DOCUMENT_MAX)
            return found is not None and found.data == data
        return True

    def _list(self, folder: str) -> builtins.list[str]:
        below = f"{self._keys.all}{folder}/" if folder else self._keys.all
        return sorted(self._keys.documents_in(self._bucket.list(below)))
