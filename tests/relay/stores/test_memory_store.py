from __future__ import annotations

import pytest
from harness.store_contract import BlobsContract, DocumentsContract, Subject, SweeperContract

from relay.errors import LockedError
from relay.stores.memory import MemoryBlobs, MemoryChunks, MemoryDocuments, MemoryLocks


class TestMemoryChunks(SweeperContract):
    @pytest.fixture
    async def subject(self):
        store = MemoryChunks()

        def damage(id, change):
            store.stored[id] = change(store.stored[id])

        yield Subject(store, store.put_many, damage)
        await store.close()


class TestMemoryDocuments(DocumentsContract):
    @pytest.fixture
    async def documents(self):
        return MemoryDocuments()


class TestMemoryBlobs(BlobsContract):
    @pytest.fixture
    async def blobs(self):
        return MemoryBlobs()

    def damage_blob(self, blobs, sha256, change):
        blobs.blobs[sha256] = change(blobs.blobs[sha256])


def test_a_lock_is_held_by_one_at_a_time():
    locks = MemoryLocks()
    with locks.exclusive("serve"):
        with pytest.raises(LockedError), locks.exclusive("serve"):
            pass
        with locks.exclusive("sweep"):
            pass
    with locks.exclusive("serve"):
        pass
