"""What cannot be read counts as gone, is put aside, and is written anew. As another user than root, whom no mode keeps out."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from relay.errors import ChunkInvalid, ChunkMissing
from relay.package.chunk import Chunk
from relay.package.identity import ManifestId
from relay.stores.catalog import Catalog
from relay.stores.open import Store, open_store

NOBODY = 65534
CHUNK = Chunk.of(b"what a disk holds " * 5000)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user whom modes keep out")


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    """A store of a user's own, with one chunk, in a process of that user's."""
    folder = tempfile.mkdtemp(prefix="unreadable-")
    os.chown(folder, NOBODY, NOBODY)
    os.seteuid(NOBODY)
    try:
        opened = await open_store(f"disk:{folder}/store", free_floor=0)
        await opened.chunks.put(CHUNK)
        yield opened
        await opened.close()
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


def chunk_path(store: Store) -> Path:
    return Path(store.location.removeprefix("disk:"), "chunks", CHUNK.id[:2], CHUNK.id)


def as_root(work: Callable[[], object]) -> None:
    os.seteuid(0)
    work()
    os.seteuid(NOBODY)


def closed(path: Path) -> None:
    path.chmod(0)


def given_away(path: Path) -> None:
    as_root(lambda: (os.chown(path, 0, 0), path.chmod(0o600)))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("harm", [closed, given_away, a_folder, a_fifo], ids=lambda harm: harm.__name__)
async def test_a_chunk_that_cannot_be_read_is_missing_put_aside_and_put_again(
    store: Store, harm: Callable[[Path], None]
) -> None:
    harm(chunk_path(store))

    assert await store.chunks.sound_many([CHUNK.id]) == set()

    with pytest.raises((ChunkMissing, ChunkInvalid)):
        await store.chunks.get(CHUNK.id)
    await store.chunks.put(CHUNK)
    assert (await store.chunks.get(CHUNK.id)).data == CHUNK.data
    assert len(os.listdir(os.path.join(store.location.removeprefix("disk:"), "quarantine"))) == 1


@pytest.mark.parametrize("how", ["get", "open"])
async def test_whoever_asks_for_an_unreadable_chunk_learns_that_it_is_damaged(store: Store, how: str) -> None:
    closed(chunk_path(store))

    with pytest.raises(ChunkInvalid, match="unreadable"):
        await getattr(store.chunks, how)(CHUNK.id)


async def test_a_document_that_cannot_be_read_counts_as_gone_and_is_written_anew(store: Store) -> None:
    await store.documents.write("manifests/some", b"before")
    Path(store.location.removeprefix("disk:"), "manifests", "some").chmod(0)

    assert await store.documents.read("manifests/some") is None
    assert await Catalog(store.documents).manifest(ManifestId("0" * 64)) is None
    await store.documents.write("manifests/some", b"after")
    assert await store.documents.read("manifests/some") == b"after"


async def test_a_blob_that_cannot_be_read_is_put_aside(store: Store) -> None:
    source = Path(store.location.removeprefix("disk:"), "tmp", "file")
    source.write_bytes(CHUNK.data)
    await store.blobs.put_file(CHUNK.id, str(source))
    blob = Path(store.location.removeprefix("disk:"), "blobs", CHUNK.id[:2], CHUNK.id)
    given_away(blob)

    with pytest.raises(ChunkInvalid):
        async for _ in store.blobs.read(CHUNK.id):
            pass

    assert not await store.blobs.has(CHUNK.id)
    assert stat.S_IMODE(os.stat(blob.parent).st_mode) == 0o755
