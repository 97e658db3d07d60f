from __future__ import annotations

import os
import sys

import pytest
from harness.store_contract import some_chunks
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import LockedError, StoreError, UsageError
from relay.stores.layers import Failover
from relay.stores.open import Location, open_reader, open_store, parse_location


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("disk:/var/lib/waystation", "/var/lib/waystation"),
        ("disk:/var/lib/../lib/waystation/", "/var/lib/waystation"),
        ("/srv/store", "/srv/store"),
        ("/srv/with:colon", "/srv/with:colon"),
        ("disk:/srv/with:colon", "/srv/with:colon"),
        ("store", os.path.join(os.getcwd(), "store")),
        ("./store", os.path.join(os.getcwd(), "store")),
        ("~/store", os.path.expanduser("~/store")),
    ],
)
def test_a_path_is_a_disk_store(text, path):
    assert parse_location(text) == Location("disk", path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "disk:",
        "disk:relative",
        "disk://host/path/../..\0",
        "ftp://host/x",
        "disc:/typo",
        "c:\\store",
        "memory:x",
        "http://relay:8080",
    ],
)
def test_what_is_no_location_is_refused_and_says_what_is_expected(text):
    with pytest.raises(UsageError, match="expected disk:/absolute/path") as refused:
        parse_location(text)
    assert refused.value.exit_code == 2


def test_a_bucket_is_a_location_with_its_options():
    text = "s3://bucket/prefix?endpoint=http://x"
    location = parse_location(text)
    assert (location.kind, location.path, str(location)) == ("s3", "", text)


async def test_a_bucket_without_boto3_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "relay.stores.s3.open_bucket", None)
    with pytest.raises(UsageError, match=r"waystation\[s3\]"):
        await open_store("s3://bucket")


@given(text=st.text(max_size=30))
def test_any_text_is_a_location_or_refused(text):
    try:
        location = parse_location(text)
    except UsageError:
        return
    assert parse_location(str(location)) == location


async def test_a_disk_store_has_all_faces_over_one_folder(tmp_path):
    store = await open_store(f"disk:{tmp_path}/store", free_floor=0)
    [chunk] = some_chunks(1)
    await store.chunks.put(chunk)
    await store.documents.write("state/x", b"x")
    assert store.location == store.chunks.name == f"disk:{tmp_path}/store"
    with store.exclusive("serve"):
        other = await open_store(f"{tmp_path}/store", free_floor=0)
        with pytest.raises(LockedError), other.exclusive("serve"):
            pass
        assert (await other.chunks.get(chunk.id)).data == chunk.data
        assert await other.documents.read("state/x") == b"x"
        await other.close()
    await store.close()
    await store.close()


async def test_a_memory_store_has_the_same_faces():
    store = await open_store("memory:")
    [chunk] = some_chunks(1)
    await store.chunks.put(chunk)
    await store.documents.write("state/x", b"x")
    with store.exclusive("sweep"), pytest.raises(LockedError), store.exclusive("sweep"):
        pass
    assert (await store.chunks.get(chunk.id)).data == chunk.data
    await store.close()


async def test_a_bar_between_readers_is_a_failover(tmp_path):
    [chunk] = some_chunks(1)
    store = await open_store(f"{tmp_path}/b", free_floor=0)
    await store.chunks.put(chunk)
    reader = await open_reader(f"disk:{tmp_path}/a|disk:{tmp_path}/b")
    assert isinstance(reader, Failover)
    assert reader.name == f"disk:{tmp_path}/a|disk:{tmp_path}/b"
    assert (await reader.get(chunk.id)).data == chunk.data
    assert not (tmp_path / "a").exists(), "a reader makes nothing"
    await reader.close()
    await store.close()


async def test_a_reader_cannot_write(tmp_path):
    store = await open_store(f"{tmp_path}/a", free_floor=0)
    reader = await open_reader(f"{tmp_path}/a")
    with pytest.raises(StoreError, match="reading only"):
        await reader.put_many(some_chunks(1))
    await reader.close()
    await store.close()


@pytest.mark.parametrize("text", ["|", "/a|", "|/a", "/a||/b", "/a|s3://b"])
async def test_a_group_with_a_bad_member_is_refused(text):
    with pytest.raises(UsageError):
        await open_reader(text)
