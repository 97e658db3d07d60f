"""The one contract on a bucket, and what is S3's alone: conditions, damage behind our back, a server that is away."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from harness.s3 import SECRET, S3Server, s3_server
from harness.store_contract import BlobsContract, DocumentsContract, Subject, SweeperContract, some_chunks

from relay.errors import ChunkMissing, LockedError, StoreError, UsageError
from relay.stores.open import Store, open_store, parse_location
from relay.stores.s3 import locks, open_bucket
from relay.stores.s3.bucket import Bucket, ConditionsIgnoredError
from relay.stores.s3.chunks import KnownChunks, S3Chunks
from relay.stores.s3.settings import S3Settings, parse_settings
from relay.stores.stored_form import STORED_MAX, encode_stored


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(request: pytest.FixtureRequest, server: S3Server) -> str:
    """That of the shared store, where a test has that, too."""
    if "store" in request.fixturenames:
        shared: Shared = request.getfixturevalue("shared")
        return shared.bucket
    return server.make_bucket()


@pytest.fixture(scope="module")
def shared(server: S3Server) -> Shared:
    return Shared(server, server.make_bucket())


@pytest.fixture
async def store(shared: Shared) -> Store:
    """An empty one."""
    return await shared.emptied()


@dataclass
class Shared:
    """One store for many tests, as opening one takes its time; what a test has closed is opened anew."""

    server: S3Server
    bucket: str
    opened: Store | None = None

    async def emptied(self) -> Store:
        self.server.empty(self.bucket, keep="relays/fra/format")
        if self.opened is None or self.opened.closed_to_writes():
            self.opened = await open_store(self.server.location(self.bucket, "relays/fra"))
        assert isinstance(self.opened.chunks, S3Chunks)
        self.opened.chunks._known = KnownChunks()
        return self.opened


def key_of(id: str, kind: str = "chunks") -> str:
    return f"relays/fra/{kind}/{id[:2]}/{id}"


# --- the contract


class TestS3Chunks(SweeperContract):
    @pytest.fixture
    async def subject(self, shared: Shared, store: Store) -> Subject:
        def damage(id, change) -> None:
            shared.server.change(shared.bucket, key_of(id), change)

        return Subject(store.chunks, store.chunks.put_many, damage)


class TestS3Documents(DocumentsContract):
    @pytest.fixture
    async def documents(self, store: Store):
        return store.documents


class TestS3Blobs(BlobsContract):
    @pytest.fixture
    async def blobs(self, shared: Shared, store: Store):
        self.shared = shared
        return store.blobs

    def damage_blob(self, blobs, sha256, change) -> None:
        self.shared.server.change(self.shared.bucket, key_of(sha256, "blobs"), change)


def ignore_conditions(monkeypatch: pytest.MonkeyPatch, *, refuse: bool = False) -> None:
    """As some servers do: they write all the same, or say that they do not know what was asked."""
    put = Bucket.put

    def careless(self, key, data, *, only_new=False, replaces=""):
        if refuse and (only_new or replaces):
            raise ConditionsIgnoredError
        return put(self, key, data)

    monkeypatch.setattr(Bucket, "put", careless)


# --- the layout


async def test_keys_spread_by_the_first_byte_of_the_hash_below_one_prefix(server, bucket, store) -> None:
    [chunk] = some_chunks(1)
    await store.chunks.put(chunk)
    await store.documents.write("packages/demo/1.0.0", b"{}")
    assert sorted(server.keys(bucket)) == [
        f"relays/fra/chunks/{chunk.id[:2]}/{chunk.id}",
        "relays/fra/format",
        "relays/fra/packages/demo/1.0.0",
    ]


async def test_two_prefixes_of_one_bucket_are_two_stores(server, bucket, store) -> None:
    [chunk] = some_chunks(1)
    await store.chunks.put(chunk)
    other = await open_store(server.location(bucket, "relays/iad"))
    assert await other.chunks.has_many([chunk.id]) == set()
    assert [id async for id in other.chunks.list()] == []
    await other.close()


async def test_what_is_no_store_is_refused_and_left_alone(server, bucket) -> None:
    server.client.put_object(Bucket=bucket, Key="holidays.jpg", Body=b"x")
    with pytest.raises(UsageError, match=r"neither empty nor a store: it holds 'holidays\.jpg'"):
        await open_store(server.location(bucket))
    assert server.keys(bucket) == ["holidays.jpg"]


async def test_a_store_of_another_format_is_refused(server, bucket) -> None:
    server.client.put_object(Bucket=bucket, Key="format", Body=b"waystation-store 9\n")
    with pytest.raises(UsageError, match="unknown format"):
        await open_store(server.location(bucket))


async def test_reading_only_writes_nothing(server, bucket) -> None:
    store = await open_store(server.location(bucket), read_only=True)
    with pytest.raises(StoreError, match="there is no store in"):
        await store.chunks.has_many([some_chunks(1)[0].id])
    await store.close()
    assert server.keys(bucket) == []


# --- writing under conditions


async def test_who_was_first_is_believed_only_where_what_it_wrote_is_sound(server, bucket, store) -> None:
    """412 says that something is there; not what."""
    good, bad, long = some_chunks(3)
    as_others_encode = encode_stored(good)
    server.client.put_object(Bucket=bucket, Key=key_of(good.id), Body=as_others_encode)
    server.client.put_object(Bucket=bucket, Key=key_of(bad.id), Body=b"damage")
    server.client.put_object(Bucket=bucket, Key=key_of(long.id), Body=bytes(STORED_MAX + 1))
    await store.chunks.put_many([good, bad, long])
    for chunk in (good, bad, long):
        assert (await store.chunks.get(chunk.id)).data == chunk.data


async def test_a_write_whose_answer_was_lost_is_known_as_ones_own(
    server, store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client tries again by itself, and meets what its first try wrote."""
    client = store.chunks._bucket._client
    put, writes = client.put_object, []

    def twice(**given):
        writes.append(given["Key"])
        put(**given)
        return put(**given)

    monkeypatch.setattr(client, "put_object", twice)
    [chunk] = some_chunks(1)
    await store.chunks.put(chunk)
    assert await store.documents.create("state/once", b"mine") is True
    with store.exclusive("serve"):
        pass
    assert len(writes) == 3
    monkeypatch.undo()
    assert await store.documents.create("state/once", b"another's") is False
    assert (await store.chunks.get(chunk.id)).data == chunk.data


async def test_an_object_that_is_far_too_long_is_damage_and_put_aside(server, bucket, store) -> None:
    [chunk] = some_chunks(1)
    await store.chunks.put(chunk)
    server.change(bucket, key_of(chunk.id), lambda _: bytes(STORED_MAX + 1))
    with pytest.raises(Exception, match="other bytes"):
        await store.chunks.get(chunk.id)
    assert f"relays/fra/quarantine/{chunk.id}" in server.keys(bucket)
    with pytest.raises(ChunkMissing):
        await store.chunks.get(chunk.id)


async def test_what_was_removed_by_another_process_is_not_believed_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    [chunk] = some_chunks(1)
    known = KnownChunks(most=2, seconds=10.0)
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    known.add([chunk.id])
    assert chunk.id in known
    now += 11.0
    assert chunk.id not in known
    known.add(each.id for each in some_chunks(3, seed=9))
    assert chunk.id not in known


async def test_parts_of_an_upload_that_never_ended_are_thrown_away_after_a_day(
    server, bucket, store, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_of("ab" * 32, "blobs")
    upload = server.client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    server.client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x")

    def left() -> int:
        return len(server.client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()))

    # moto says of all uploads that they began in 2010.
    monkeypatch.setattr(open_bucket, "STALE_SECONDS", 1e12)
    await (await open_store(server.location(bucket, "relays/fra"))).close()
    assert left() == 1, "it may still go on"
    monkeypatch.setattr(open_bucket, "STALE_SECONDS", 24 * 3600.0)
    await (await open_store(server.location(bucket, "relays/fra"))).close()
    assert left() == 0


async def test_a_large_file_goes_up_in_parts_and_comes_back(server, bucket, store, tmp_path, monkeypatch) -> None:
    import hashlib

    data = b"waystation" * 1_200_000
    path = tmp_path / "large"
    path.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    monkeypatch.setattr("relay.stores.s3.bucket.PART_BYTES", 5 << 20)
    await store.blobs.put_file(sha256, str(path))
    assert server.client.head_object(Bucket=bucket, Key=key_of(sha256, "blobs"))["ETag"].endswith('-3"')
    assert b"".join([piece async for piece in store.blobs.read(sha256)]) == data


# --- one process at a time


async def test_a_lock_names_its_holder_and_is_free_again(server, bucket, store) -> None:
    with store.exclusive("serve"):
        other = await open_store(server.location(bucket, "relays/fra"))
        held = pytest.raises(LockedError, match=f"locked for serve by pid .* on {socket.gethostname()}")
        with held, other.exclusive("serve"):
            pass
        with other.exclusive("sweep"):
            pass
        await other.close()
    with store.exclusive("serve"):
        pass
    assert "relays/fra/lock-serve" not in server.keys(bucket)


async def test_a_lock_of_another_machine_is_free_once_it_was_not_renewed_for_a_while(
    server, bucket, store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "elsewhere")
        lock = store.exclusive("serve")
        lock.__enter__()
    with pytest.raises(LockedError, match="on elsewhere"), store.exclusive("serve"):
        pass
    monkeypatch.setattr(locks, "LOST_SECONDS", -1.0)
    with store.exclusive("serve"):
        assert store.closed_to_writes() == ""
        lock.__exit__(None, None, None)
        assert "relays/fra/lock-serve" in server.keys(bucket), "the lock of another is not given back"


async def test_who_loses_its_lock_writes_nothing_more(server, bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks.S3Locks.__init__, "__kwdefaults__", {"seconds": 0.05})
    store = await open_store(server.location(bucket))
    chunk, other = some_chunks(2)
    await store.chunks.put(chunk)
    with store.exclusive("serve"):
        server.client.put_object(
            Bucket=bucket, Key="lock-serve", Body=b'{"host":"a","boot":"b","pid":1,"since":"c","mark":"d"}'
        )
        async with asyncio.timeout(30):
            while not store.closed_to_writes():
                await asyncio.sleep(0.02)
        with pytest.raises(StoreError, match="read-only"):
            await store.chunks.put(other)
        assert (await store.chunks.get(chunk.id)).data == chunk.data, "reads go on"
    await store.close()


@pytest.mark.parametrize("refuse", [False, True])
async def test_where_conditions_are_ignored_a_second_process_is_refused_by_name(
    server, bucket, monkeypatch: pytest.MonkeyPatch, refuse: bool
) -> None:
    ignore_conditions(monkeypatch, refuse=refuse)
    one, other = await open_store(server.location(bucket)), await open_store(server.location(bucket))
    assert not open_bucket._heeds_conditions(one.chunks._bucket, one.chunks._keys)
    with one.exclusive("serve"), pytest.raises(LockedError, match="by pid"), other.exclusive("serve"):
        pass
    assert await one.documents.create("state/a", b"1")
    assert not await one.documents.create("state/a", b"2")
    await one.close()
    await other.close()


# --- a bucket that is away, or says no


async def test_a_server_that_is_away_is_said_so_in_bounded_time(
    server, bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_bucket, "_TRIES", 1)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with pytest.raises(StoreError, match=f"bucket {bucket} at {endpoint} cannot be reached") as away:
        await open_store(server.location(bucket, through=endpoint))
    assert away.value.retry_after


async def test_a_bucket_that_is_not_there_is_named(server) -> None:
    with pytest.raises(StoreError, match="there is no bucket never-made"):
        await open_store(server.location("never-made"))


async def test_a_secret_is_in_no_error_no_log_and_no_name(server, bucket, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        store = await open_store(server.location(bucket))
        with pytest.raises(StoreError) as failed:
            await open_store(server.location("never-made"))
        await store.close()
    assert SECRET not in f"{store.location}{store.chunks.name}{failed.value}"
    assert SECRET not in caplog.text


# --- locations


def test_a_location_comes_back_as_it_was_parsed() -> None:
    text = "s3://b-1/a/b?endpoint=http://127.0.0.1:9000&region=eu-1&path_style=true&credentials=/etc/s3.ini&state=/var/lib/x"
    assert str(parse_location(text)) == text
    assert parse_location(text).path == "/var/lib/x"
    assert parse_settings("s3://b-1") == S3Settings("b-1")
    assert str(replace(parse_settings("s3://b-1/p"), region="eu-1")) == "s3://b-1/p?region=eu-1"


@pytest.mark.parametrize(
    "text",
    [
        "s3://",
        "s3:/b",
        "s3:b",
        "s3://B",
        "s3://b/../c",
        "s3://bucket/.x",
        "s3://bucket?colour=red",
        "s3://bucket?endpoint=ftp://x",
        "s3://bucket?endpoint=http://user:pass@x",
        "s3://bucket?credentials=relative",
        "s3://bucket?path_style=yes",
        "s3://bucket?region=a&region=b",
        "s3://bucket?region",
        "s3://bucket#x",
        "s3://user:secret@bucket",
    ],
)
def test_what_names_no_bucket_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected s3://"):
        parse_location(text)


@pytest.mark.parametrize(
    "text", ["", "[other]\naws_access_key_id = x\n", "no section", "[default]\naws_access_key_id = x\n"]
)
async def test_a_credentials_file_that_cannot_be_used_is_refused_without_what_it_holds(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "credentials"
    path.write_text(f"{text}")
    with pytest.raises(UsageError, match=str(path)):
        await open_store(f"s3://bucket-1?endpoint=http://127.0.0.1:1&credentials={path}")
