"""What every store promises, once for all of them. A test file subclasses the part its store claims and gives fixtures.

The fixture `subject` is a `Subject`: the reader, how chunks get where it sees them, and how to damage what is held.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.errors import ChunkInvalid, ChunkMissing, IdentityError, StoreError
from relay.package.chunk import CHUNK_MAX, Chunk
from relay.package.identity import ChunkId, chunk_id
from relay.stores.contract import PIECE, Blobs, ChunkReader, ChunkSweeper, ChunkWriter, Documents, StoredChunk
from relay.support.zstd import zstd

ABSENT = ChunkId("0" * 64)

NOT_DIGESTS = ["", "0" * 63, "0" * 65, "A" * 64, "../" + "0" * 61, "0" * 63 + "\n", "0" * 31 + "/" + "0" * 32]

BAD_NAMES = [
    "",
    "/",
    "one-segment",
    "/state/absolute",
    "state/",
    "state//double",
    "state/../escape",
    "../escape/x",
    "state/..",
    "./state/x",
    "state/.hidden",
    "state/Upper",
    "state/nul\0",
    "state\\windows",
    "state/c:x",
    "state/new\nline",
    "state/space here",
    "state/ünicode",
    "state/" + "x" * 201,
    "state/" + "/".join(["x" * 100] * 6),
    "chunks/ab",
    "blobs/ab",
    "tmp/x",
    "quarantine/x",
]

SAMPLES = {
    "empty": b"",
    "one byte": b"x",
    "text": b"waystation " * 1000,
    "noise of several pieces": random.Random(7).randbytes(3 * PIECE + 17),
    "largest": random.Random(8).randbytes(CHUNK_MAX),
    "largest and flat": bytes(CHUNK_MAX),
}

ANY_STORE = settings(
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
"""One store serves all examples of a test: promises must hold in a store that is in use. Every store runs the same test
functions, so examples are not kept from one to the next."""


@dataclass(frozen=True)
class Subject:
    """A store under test."""

    reader: ChunkReader
    put: Callable[[list[Chunk]], Awaitable[None]]
    damage: Callable[[ChunkId, Callable[[bytes], bytes]], None] | None = None
    """Change the stored form of a chunk behind the store's back; for the `DamageContract`."""


def some_chunks(count: int, seed: int = 1) -> list[Chunk]:
    source = random.Random(seed)
    return [Chunk.of(source.randbytes(source.randrange(1, 60_000))) for _ in range(count)]


async def frame_of(stored: StoredChunk) -> bytes:
    pieces = [piece async for piece in stored.pieces()]
    assert all(0 < len(piece) <= PIECE for piece in pieces)
    return b"".join(pieces)


class ReaderContract:
    """Promises of a `ChunkReader`."""

    @pytest.fixture
    async def subject(self) -> Subject:
        raise NotImplementedError

    @pytest.mark.parametrize("kind", SAMPLES)
    async def test_what_was_put_is_got(self, subject: Subject, kind: str):
        chunk = Chunk.of(SAMPLES[kind])
        await subject.put([chunk])
        got = await subject.reader.get(chunk.id)
        assert (got.id, got.data) == (chunk.id, chunk.data)

    @pytest.mark.parametrize("kind", SAMPLES)
    async def test_the_stored_form_is_one_zstd_frame_that_says_its_size(self, subject: Subject, kind: str):
        chunk = Chunk.of(SAMPLES[kind])
        await subject.put([chunk])
        stored = await subject.reader.open(chunk.id)
        frame = await frame_of(stored)
        assert (stored.id, stored.size, stored.length) == (chunk.id, chunk.size, len(frame))
        assert stored.xxh3 == xxhash.xxh3_64_intdigest(frame)
        assert zstd.get_frame_info(frame).decompressed_size == chunk.size
        assert zstd.get_frame_size(frame) == len(frame)
        assert zstd.decompress(frame) == chunk.data

    @ANY_STORE
    @given(data=st.binary(max_size=5000))
    async def test_any_bytes_come_back(self, subject: Subject, data: bytes):
        chunk = Chunk.of(data)
        await subject.put([chunk])
        assert (await subject.reader.get(chunk.id)).data == data
        assert zstd.decompress(await frame_of(await subject.reader.open(chunk.id))) == data

    async def test_a_stored_chunk_can_be_streamed_twice(self, subject: Subject):
        [chunk] = some_chunks(1)
        await subject.put([chunk])
        stored = await subject.reader.open(chunk.id)
        assert await frame_of(stored) == await frame_of(stored)

    async def test_absence_is_said_as_missing(self, subject: Subject):
        with pytest.raises(ChunkMissing) as missing:
            await subject.reader.get(ABSENT)
        assert missing.value.id == ABSENT
        with pytest.raises(ChunkMissing):
            await subject.reader.open(ABSENT)

    async def test_has_many_names_what_is_here_and_nothing_else(self, subject: Subject):
        chunks = some_chunks(20)
        await subject.put(chunks[:12])
        asked = [chunk.id for chunk in chunks] + [ABSENT]
        assert await subject.reader.has_many(iter(asked)) == {chunk.id for chunk in chunks[:12]}
        assert await subject.reader.has_many([]) == set()

    @pytest.mark.parametrize("text", NOT_DIGESTS)
    async def test_what_is_no_digest_is_refused(self, subject: Subject, text: str):
        for ask in (subject.reader.get, subject.reader.open, lambda id: subject.reader.has_many([id])):
            with pytest.raises(IdentityError):
                await ask(ChunkId(text))

    async def test_many_readers_at_once_get_the_same_bytes(self, subject: Subject):
        chunks = some_chunks(8)
        await subject.put(chunks)
        got = await asyncio.gather(*(subject.reader.get(chunk.id) for chunk in chunks * 4))
        assert [chunk.data for chunk in got] == [chunk.data for chunk in chunks * 4]

    async def test_closing_twice_is_closing_once(self, subject: Subject):
        await subject.reader.close()
        await subject.reader.close()


class DamageContract:
    """What a store that keeps chunks itself promises about damage. (A cache mends it before anybody sees it.)"""

    @pytest.fixture
    async def subject(self) -> Subject:
        raise NotImplementedError

    @pytest.mark.parametrize("way", ["get", "open"])
    @pytest.mark.parametrize("kind", ["flip", "zeros", "truncate", "halve", "empty", "append", "other chunk"])
    async def test_damage_is_never_handed_out_and_the_next_put_mends_it(self, subject: Subject, kind: str, way: str):
        assert subject.damage is not None
        victim, other = some_chunks(2)
        await subject.put([victim, other])
        subject.damage(victim.id, lambda stored: damaged(kind, stored, victim, other))
        with pytest.raises(ChunkInvalid) as invalid:
            await getattr(subject.reader, way)(victim.id)
        assert invalid.value.id == victim.id
        with pytest.raises(ChunkMissing):
            await subject.reader.get(victim.id)
        await subject.put([victim])
        assert (await subject.reader.get(victim.id)).data == victim.data

    async def test_only_what_is_undamaged_is_sound(self, subject: Subject):
        assert subject.damage is not None
        victim, other, absent = some_chunks(3)
        await subject.put([victim, other])
        subject.damage(victim.id, lambda stored: damaged("flip", stored, victim, other))
        assert await subject.reader.has_many([victim.id, other.id, absent.id]) == {victim.id, other.id}
        assert await subject.reader.sound_many([victim.id, other.id, absent.id]) == {other.id}
        assert await subject.reader.has_many([victim.id]) == set(), "what is damaged was put aside"

    @ANY_STORE
    @given(data=st.data())
    async def test_no_flipped_bit_goes_unseen(self, subject: Subject, data: st.DataObject):
        assert subject.damage is not None
        chunk = Chunk.of(data.draw(st.binary(min_size=1, max_size=300)))
        way = data.draw(st.sampled_from(["get", "open"]))
        await subject.put([chunk])

        def flip(stored: bytes) -> bytes:
            bit = data.draw(st.integers(0, len(stored) * 8 - 1))
            return stored[: bit // 8] + bytes([stored[bit // 8] ^ 1 << bit % 8]) + stored[bit // 8 + 1 :]

        subject.damage(chunk.id, flip)
        with pytest.raises(ChunkInvalid):
            await getattr(subject.reader, way)(chunk.id)


def damaged(kind: str, stored: bytes, victim: Chunk, other: Chunk) -> bytes:
    from relay.stores.stored_form import encode_stored

    middle = len(stored) // 2
    return {
        "flip": stored[:middle] + bytes([stored[middle] ^ 0x10]) + stored[middle + 1 :],
        "zeros": stored[:middle] + bytes(min(4096, len(stored) - middle)) + stored[middle + 4096 :],
        "truncate": stored[:-1],
        "halve": stored[:middle],
        "empty": b"",
        "append": stored + b"\0",
        # Sound in itself, under the wrong name: what a swap of two files leaves.
        "other chunk": encode_stored(other),
    }[kind]


class WriterContract(ReaderContract, DamageContract):
    """Promises of a `ChunkWriter`: `subject.reader` is one."""

    async def test_putting_twice_is_putting_once(self, subject: Subject):
        store = writer(subject)
        [chunk] = some_chunks(1)
        await store.put_many([chunk, chunk])
        await store.put(chunk)
        assert (await store.get(chunk.id)).data == chunk.data

    async def test_putting_nothing_is_no_error(self, subject: Subject):
        await writer(subject).put_many([])

    async def test_a_large_batch_is_all_there(self, subject: Subject):
        chunks = some_chunks(200, seed=3)
        await writer(subject).put_many(chunks)
        assert await subject.reader.has_many(chunk.id for chunk in chunks) == {chunk.id for chunk in chunks}
        for chunk in chunks[::17]:
            assert (await subject.reader.get(chunk.id)).data == chunk.data

    async def test_the_same_chunks_may_be_put_by_many_at_once(self, subject: Subject):
        chunks = some_chunks(12, seed=4)
        await asyncio.gather(*(writer(subject).put_many(chunks) for _ in range(6)))
        for chunk in chunks:
            assert (await subject.reader.get(chunk.id)).data == chunk.data


class SweeperContract(WriterContract):
    """Promises of a `ChunkSweeper`: `subject.reader` is one."""

    async def test_list_names_every_chunk_once(self, subject: Subject):
        chunks = some_chunks(30)
        await subject.put(chunks)
        listed = [id async for id in sweeper(subject).list()]
        assert sorted(listed) == sorted(chunk.id for chunk in chunks)

    async def test_an_empty_store_lists_nothing(self, subject: Subject):
        assert [id async for id in sweeper(subject).list()] == []

    async def test_what_was_removed_is_gone_and_can_come_back(self, subject: Subject):
        store = sweeper(subject)
        keep, drop = some_chunks(2)
        await store.put_many([keep, drop])
        await store.remove(drop.id)
        assert await store.has_many([keep.id, drop.id]) == {keep.id}
        with pytest.raises(ChunkMissing):
            await store.get(drop.id)
        await store.put(drop)
        assert (await store.get(drop.id)).data == drop.data

    async def test_removing_what_is_not_here_is_no_error(self, subject: Subject):
        await sweeper(subject).remove(ABSENT)

    async def test_chunks_may_be_removed_while_they_are_listed(self, subject: Subject):
        await subject.put(some_chunks(10))
        async for id in sweeper(subject).list():
            await sweeper(subject).remove(id)
        assert [id async for id in sweeper(subject).list()] == []


def writer(subject: Subject) -> ChunkWriter:
    assert isinstance(subject.reader, ChunkWriter)
    return subject.reader


def sweeper(subject: Subject) -> ChunkSweeper:
    assert isinstance(subject.reader, ChunkSweeper)
    return subject.reader


class DocumentsContract:
    """Promises of `Documents`."""

    @pytest.fixture
    async def documents(self) -> Documents:
        raise NotImplementedError

    async def test_what_was_written_is_read(self, documents: Documents):
        await documents.write("packages/serilog/4.0.0-dev.2+b", b"one")
        assert await documents.read("packages/serilog/4.0.0-dev.2+b") == b"one"
        await documents.write("packages/serilog/4.0.0-dev.2+b", b"")
        assert await documents.read("packages/serilog/4.0.0-dev.2+b") == b""

    async def test_no_document_is_none(self, documents: Documents):
        assert await documents.read("state/nothing") is None
        await documents.write("state/deep/document", b"x")
        assert await documents.read("state/deep") is None

    async def test_create_never_touches_what_is_there(self, documents: Documents):
        assert await documents.create("state/once", b"first") is True
        assert await documents.create("state/once", b"second") is False
        assert await documents.read("state/once") == b"first"

    async def test_of_many_creators_one_wins(self, documents: Documents):
        won = await asyncio.gather(*(documents.create("state/race", bytes([n])) for n in range(12)))
        assert won.count(True) == 1
        assert await documents.read("state/race") == bytes([won.index(True)])

    async def test_a_reader_sees_the_old_or_the_new_never_a_mix(self, documents: Documents):
        versions = [bytes([n]) * 100_000 for n in range(20)]
        await documents.write("state/busy", versions[0])

        async def write() -> None:
            for version in versions:
                await documents.write("state/busy", version)

        async def read() -> None:
            for _ in range(40):
                assert await documents.read("state/busy") in versions

        await asyncio.gather(write(), read(), read())

    async def test_removed_is_gone_and_twice_is_once(self, documents: Documents):
        await documents.write("state/x", b"x")
        await documents.remove("state/x")
        await documents.remove("state/x")
        await documents.remove("state/never/was")
        assert await documents.read("state/x") is None
        assert await documents.create("state/x", b"again") is True

    async def test_list_is_all_below_the_folder_and_sorted(self, documents: Documents):
        names = ["packages/b/1.0.0", "packages/a/2.0.0", "packages/a/1.0.0", "packages-not/x", "state/leases/7"]
        for name in names:
            await documents.write(name, b"x")
        assert await documents.list("packages") == ["packages/a/1.0.0", "packages/a/2.0.0", "packages/b/1.0.0"]
        assert await documents.list("packages/a") == ["packages/a/1.0.0", "packages/a/2.0.0"]
        assert await documents.list("feeds") == []
        assert await documents.list("") == sorted(names)

    @pytest.mark.parametrize("name", BAD_NAMES)
    async def test_a_name_that_is_not_plain_is_refused_and_makes_nothing(self, documents: Documents, name: str):
        with pytest.raises(ValueError):
            await documents.write(name, b"x")
        with pytest.raises(ValueError):
            await documents.create(name, b"x")
        with pytest.raises(ValueError):
            await documents.read(name)
        with pytest.raises(ValueError):
            await documents.remove(name)
        assert await documents.list("") == []

    @pytest.mark.parametrize("prefix", ["..", "/", "state/", "../state", "tmp", "chunks", "a\0b", "UP"])
    async def test_a_folder_that_is_not_plain_is_refused(self, documents: Documents, prefix: str):
        with pytest.raises(ValueError):
            await documents.list(prefix)

    @ANY_STORE
    @given(name=st.text(alphabet="ab./\\\0A_", max_size=12), data=st.binary(max_size=50))
    async def test_any_name_is_kept_or_refused(self, documents: Documents, name: str, data: bytes):
        before = await documents.list("")
        try:
            await documents.write(name, data)
        except ValueError:
            assert await documents.list("") == before
        except StoreError:
            # A document cannot lie below a document: on disk a file is no folder.
            assert any(name.startswith(f"{other}/") or other.startswith(f"{name}/") for other in before)
        else:
            assert await documents.read(name) == data
            assert name in await documents.list("")


class BlobsContract:
    """Promises of `Blobs`."""

    @pytest.fixture
    async def blobs(self) -> Blobs:
        raise NotImplementedError

    def damage_blob(self, blobs: Blobs, sha256: str, change: Callable[[bytes], bytes]) -> None:
        raise NotImplementedError

    @pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 3 * PIECE])
    async def test_a_file_comes_back_in_pieces(self, blobs: Blobs, tmp_path, size: int):
        sha256, path, data = a_file(tmp_path, size)
        assert await blobs.has(sha256) is False
        await blobs.put_file(sha256, path)
        await blobs.put_file(sha256, path)
        assert await blobs.has(sha256) is True
        pieces = [piece async for piece in blobs.read(sha256)]
        assert b"".join(pieces) == data
        assert all(0 < len(piece) <= PIECE for piece in pieces)

    async def test_a_file_under_a_false_name_is_refused(self, blobs: Blobs, tmp_path):
        _, path, data = a_file(tmp_path, 1000)
        with pytest.raises(ChunkInvalid) as invalid:
            await blobs.put_file(ABSENT, path)
        assert invalid.value.found == chunk_id(data)
        assert await blobs.has(ABSENT) is False

    async def test_a_source_that_cannot_be_read_is_told(self, blobs: Blobs, tmp_path):
        with pytest.raises(StoreError, match="cannot read"):
            await blobs.put_file(ABSENT, str(tmp_path / "nothing"))

    async def test_absence_is_said_as_missing(self, blobs: Blobs):
        with pytest.raises(ChunkMissing):
            [piece async for piece in blobs.read(ABSENT)]

    async def test_removed_is_gone_and_twice_is_once(self, blobs: Blobs, tmp_path):
        sha256, path, _ = a_file(tmp_path, 10)
        await blobs.put_file(sha256, path)
        await blobs.remove(sha256)
        await blobs.remove(sha256)
        assert await blobs.has(sha256) is False

    @pytest.mark.parametrize("text", NOT_DIGESTS)
    async def test_what_is_no_digest_is_refused(self, blobs: Blobs, tmp_path, text: str):
        _, path, _ = a_file(tmp_path, 10)
        for ask in (blobs.has, blobs.remove, lambda text: blobs.put_file(text, path)):
            with pytest.raises(IdentityError):
                await ask(text)
        with pytest.raises(IdentityError):
            [piece async for piece in blobs.read(text)]

    @pytest.mark.parametrize("size", [100, 2 * PIECE + 5])
    async def test_a_damaged_file_is_never_handed_out_whole_and_can_be_put_again(self, blobs: Blobs, tmp_path, size):
        sha256, path, data = a_file(tmp_path, size)
        await blobs.put_file(sha256, path)
        self.damage_blob(blobs, sha256, lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]))
        got = []
        with pytest.raises(ChunkInvalid):
            await read_into(got, blobs, sha256)
        assert sum(got) < size
        assert await blobs.has(sha256) is False
        await blobs.put_file(sha256, path)
        assert b"".join([piece async for piece in blobs.read(sha256)]) == data


async def read_into(got: list[int], blobs: Blobs, sha256: str) -> None:
    async for piece in blobs.read(sha256):
        got += [len(piece)]


def a_file(folder: os.PathLike[str], size: int) -> tuple[str, str, bytes]:
    """Its SHA-256, path and bytes."""
    data = random.Random(size).randbytes(size)
    path = os.path.join(folder, f"file-{size}")
    with open(path, "wb") as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest(), path, data
