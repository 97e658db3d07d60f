from __future__ import annotations

import asyncio

import msgspec
import pytest
from harness.origins import depot_with
from harness.packages import cut_package, make_nupkg, noise
from harness.relays import running_relay

from relay.errors import ConflictError, NotFoundError, StoreError
from relay.package.identity import NuGetVersion, PackageId, PackageRef
from relay.stores.catalog import Catalog, Pointer, Provenance
from relay.stores.memory import MemoryDocuments
from relay.stores.open import open_store

ONE = cut_package({"a.txt": b"one"}).manifest
NEXT = cut_package({"a.txt": b"one"}, version="1.0.1").manifest
REBUILT = cut_package({"a.txt": b"rebuilt"}).manifest
HOW = Provenance("replicated")


class SlowDocuments(MemoryDocuments):
    reads = 0

    async def read(self, name):
        self.reads += 1
        await asyncio.sleep(0.01)
        return await super().read(name)


@pytest.fixture
def documents():
    return MemoryDocuments()


@pytest.fixture
def catalog(documents):
    return Catalog(documents)


async def reopened(documents):
    again = Catalog(documents)
    await again.load()
    return again


# --- packages


async def test_what_was_published_is_found_also_by_the_next_process(catalog, documents):
    pointer = await catalog.publish(ONE, HOW)
    for each in (catalog, await reopened(documents)):
        assert each.get(ONE.package) == each.find(ONE.package) == pointer
        assert each.all() == [pointer]
    assert pointer.manifest_id == ONE.id
    assert pointer.nupkg_sha256 == ONE.nupkg.sha256
    assert pointer.provenance == HOW


async def test_a_package_is_found_however_its_name_is_spelled(catalog):
    pointer = await catalog.publish(ONE, HOW)
    assert catalog.find(PackageRef(PackageId.parse("ACME.web"), NuGetVersion.parse("1.0"))) == pointer


async def test_publishing_again_changes_nothing(catalog, documents):
    first = await catalog.publish(ONE, HOW)
    before = {name: await documents.read(name) for name in await documents.list("")}
    assert await catalog.publish(ONE, Provenance("pushed")) == first
    assert {name: await documents.read(name) for name in await documents.list("")} == before


async def test_other_bytes_under_the_same_name_are_refused_and_change_nothing(catalog):
    first = await catalog.publish(ONE, HOW)
    with pytest.raises(ConflictError) as caught:
        await catalog.publish(REBUILT, HOW)
    assert "new version" in caught.value.hint
    assert catalog.all() == [first]
    with pytest.raises(ConflictError):
        catalog.check_name(ONE.package, "00" * 32)


async def test_versions_are_listed_in_their_order(catalog):
    for version in ("1.10.0", "1.9.0", "2.0.0-beta", "2.0.0"):
        await catalog.publish(cut_package({"a.txt": b"a"}, version=version).manifest, HOW)
    await catalog.publish(cut_package({"a.txt": b"a"}, id="Acme.Api").manifest, HOW)
    assert [str(pointer.ref) for pointer in catalog.all()] == [
        "Acme.Api 1.0.0",
        "Acme.Web 1.9.0",
        "Acme.Web 1.10.0",
        "Acme.Web 2.0.0-beta",
        "Acme.Web 2.0.0",
    ]
    assert len(catalog.of_id(PackageId.parse("acme.WEB"))) == 4


async def test_what_is_not_here_says_what_is(catalog):
    with pytest.raises(NotFoundError, match="No version"):
        catalog.get(ONE.package)
    await catalog.publish(ONE, HOW)
    with pytest.raises(NotFoundError) as caught:
        catalog.get(NEXT.package)
    assert "1.0.0" in caught.value.hint


async def test_a_removed_package_is_gone_and_may_come_back(catalog, documents):
    await catalog.publish(ONE, HOW)
    await catalog.remove(ONE.package)
    assert catalog.find(ONE.package) is None
    assert (await reopened(documents)).all() == []
    with pytest.raises(NotFoundError):
        await catalog.remove(ONE.package)
    await catalog.publish(REBUILT, HOW)


# --- two processes over one store


async def test_of_two_processes_that_publish_the_same_the_first_counts_and_both_end_well(tmp_path):
    stores = [await open_store(f"disk:{tmp_path}/store") for _ in range(2)]
    try:
        catalogs = [Catalog(store.documents) for store in stores]
        pointers = await asyncio.gather(*(each.publish(ONE, HOW) for each in catalogs))
        assert pointers[0] == pointers[1]
        assert [each.get(ONE.package) for each in catalogs] == pointers
    finally:
        for store in stores:
            await store.close()


async def test_of_two_processes_that_publish_different_bytes_exactly_one_is_refused(tmp_path):
    stores = [await open_store(f"disk:{tmp_path}/store") for _ in range(2)]
    try:
        catalogs = [Catalog(store.documents) for store in stores]
        results = await asyncio.gather(
            catalogs[0].publish(ONE, HOW), catalogs[1].publish(REBUILT, HOW), return_exceptions=True
        )
        (kept,) = [each for each in results if isinstance(each, Pointer)]
        (refused,) = [each for each in results if not isinstance(each, Pointer)]
        assert isinstance(refused, ConflictError)
        for each in catalogs:
            await each.load()
            assert each.all() == [kept]
    finally:
        for store in stores:
            await store.close()


async def test_losing_a_race_takes_up_the_winner_and_forgets_nothing(documents):
    one, other = Catalog(documents), Catalog(documents)
    await one.publish(NEXT, HOW)
    winner = await other.publish(ONE, HOW)
    with pytest.raises(ConflictError):
        await one.publish(REBUILT, HOW)
    assert one.find(ONE.package) == winner
    assert one.find(NEXT.package) is not None


# --- damage


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"\xff", b"\0" * 50, msgspec.json.encode({"id": "..", "version": "1", "manifest": "x"})]
)
async def test_a_damaged_pointer_counts_as_absent_and_can_be_published_again(documents, damage):
    await Catalog(documents).publish(NEXT, HOW)
    await Catalog(documents).publish(ONE, HOW)
    await documents.write("packages/acme.web/1.0.0", damage)
    catalog = await reopened(documents)
    assert [pointer.version for pointer in catalog.all()] == ["1.0.1"]
    await catalog.publish(ONE, HOW)
    assert [pointer.version for pointer in (await reopened(documents)).all()] == ["1.0.0", "1.0.1"]


async def test_a_pointer_under_another_packages_name_is_not_believed(documents):
    await Catalog(documents).publish(ONE, HOW)
    await documents.write("packages/other/1.0.0", await documents.read("packages/acme.web/1.0.0"))
    assert [pointer.id for pointer in (await reopened(documents)).all()] == ["Acme.Web"]


async def test_a_damaged_manifest_counts_as_absent_and_an_offer_mends_it(documents):
    await Catalog(documents).keep_manifest(ONE, b"")
    await documents.write(f"manifests/{ONE.id}", ONE.canonical[:-1] + b" ")
    catalog = Catalog(documents)
    assert await catalog.manifest(ONE.id) is None
    await catalog.keep_manifest(ONE, b"")
    assert await documents.read(f"manifests/{ONE.id}") == ONE.canonical
    found = await Catalog(documents).manifest(ONE.id)
    assert found is not None


# --- manifests and signatures


async def test_a_manifest_is_kept_unlisted(catalog, documents):
    await catalog.keep_manifest(ONE, b"envelope")
    again = await reopened(documents)
    assert again.all() == []
    assert (await again.manifest(ONE.id)).canonical == ONE.canonical
    assert await again.signature(ONE.id) == b"envelope"


async def test_an_envelope_is_replaced_by_a_new_one_and_not_by_none(catalog):
    await catalog.keep_manifest(ONE, b"old")
    await catalog.keep_manifest(ONE, b"new")
    await catalog.keep_manifest(ONE, b"")
    assert await catalog.signature(ONE.id) == b"new"


async def test_what_is_not_kept_is_none(catalog):
    assert await catalog.manifest(ONE.id) is None
    assert await catalog.signature(ONE.id) == b""
    assert await catalog.manifests_of([ONE.id]) == {}


async def test_a_manifest_is_loaded_once_however_many_ask():
    documents = SlowDocuments()
    await Catalog(documents).keep_manifest(ONE, b"")
    documents.reads = 0
    catalog = Catalog(documents)
    found = await asyncio.gather(*(catalog.manifest(ONE.id) for _ in range(50)))
    assert documents.reads == 1
    assert all(each is found[0] for each in found)


async def test_an_asker_that_gives_up_does_not_spoil_it_for_the_others():
    documents = SlowDocuments()
    await Catalog(documents).keep_manifest(ONE, b"")
    catalog = Catalog(documents)
    first, second = (asyncio.create_task(catalog.manifest(ONE.id)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).id == ONE.id


async def test_a_load_that_failed_is_tried_again(documents):
    class Failing(MemoryDocuments):
        fails = True

        async def read(self, name):
            if self.fails:
                raise StoreError("the disk")
            return await documents.read(name)

    await Catalog(documents).keep_manifest(ONE, b"")
    failing = Failing()
    catalog = Catalog(failing)
    with pytest.raises(StoreError):
        await catalog.manifest(ONE.id)
    failing.fails = False
    assert (await catalog.manifest(ONE.id)).id == ONE.id


async def test_manifests_kept_parsed_stay_below_their_bound(monkeypatch):
    monkeypatch.setattr("relay.stores.catalog._CACHED_BYTES", 3 * len(ONE.canonical))
    catalog = Catalog(MemoryDocuments())
    made = [cut_package({"a.txt": noise(i, 50)}, version=f"1.0.{i}").manifest for i in range(12)]
    for manifest in made:
        await catalog.keep_manifest(manifest, b"")
    assert sum(len(each.canonical) for each in catalog._parsed.values()) <= 3 * len(ONE.canonical)
    for manifest in made:
        assert (await catalog.manifest(manifest.id)).id == manifest.id


async def test_what_another_process_added_or_removed_is_seen_without_a_restart(tmp_path):
    async with depot_with(tmp_path / "origin", make_nupkg(tmp_path, {"a": b"1"})) as origin:
        location = origin.depot.store.location
        async with running_relay(location) as relay, relay.client() as client:
            late = make_nupkg(tmp_path, {"a": b"2"}, version="2.0.0")
            await origin.depot.add(late, origin.keys.signer, Provenance("added"))
            id = origin.added[0].manifest.package.id
            assert [str(p.package.version) for p in await client.packages(id)] == ["1.0.0", "2.0.0"]
            assert len(await client.packages()) == 2
            found = await client.package(id, NuGetVersion.parse("2.0.0"))
            assert found.manifest == (await client.manifest(found.manifest)).manifest.id
            await origin.depot.remove(found.package)
            with pytest.raises(NotFoundError):
                await client.package(id, NuGetVersion.parse("2.0.0"))


async def test_a_listing_does_not_make_a_relay_forget_what_is_published_meanwhile():
    catalog = Catalog(SlowDocuments())
    await catalog.publish(ONE, HOW)
    listing = asyncio.create_task(catalog.look_up_all())
    await asyncio.sleep(0)
    await catalog.publish(NEXT, HOW)
    assert ONE.package in [pointer.ref for pointer in await listing]
    assert catalog.find(NEXT.package) is not None
