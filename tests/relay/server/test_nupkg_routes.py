"""The identical nupkg at a relay: made of chunks, brought, or taken from a parent; and never any other bytes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import zipfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web
from harness.engines import ENGINES, PACKAGES, needs_engines
from harness.origins import Origin, depot_with
from harness.packages import deflated, make_nupkg, noise, nuspec, words
from harness.relays import Relay, relay_with, small_server, token

import relay.rebuild.nupkgs as module
from benchmarks.lines.network import CountingProxy
from orchestrator.replication.send import package_to_send, send_to, shipping_from
from relay.config import Peer
from relay.errors import NotFoundError, RefusedError, UnreachableError, UntrustedError
from relay.package import manifest as manifests
from relay.package.manifest import Manifest, to_wire
from relay.package.recipe import VERBATIM, Canonical, Opaque, Recipe, opaque, shares
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.protocol.not_exact import NotExactError
from relay.transfer.replicate import ReplicationResult

PARTS = {"lib/net10.0/a.dll": words(1, 700_000), "lib/net10.0/b.dll": words(2, 90_000), "c.txt": words(3, 400)}
EDITED = PARTS | {"lib/net10.0/a.dll": words(1, 600_000) + words(9, 100_000)}


async def bring(origin: Origin, url: str, index: int = 0, *, exact: bool = False) -> ReplicationResult:
    """Replicate, as the command does."""
    manifest = origin.added[index].manifest
    async with RelayClient(url) as client, shipping_from(origin.depot) as plain:
        shipping = replace(plain, nupkgs=origin.depot.nupkgs) if exact else plain
        what = await package_to_send(origin.depot, manifest.package)
        return await send_to(origin.depot, what, client, lambda _done, _whole: None, shipping=shipping)


async def taken(relay: Relay | str, manifest: Manifest) -> bytes:
    """The nupkg as any HTTP client gets it."""
    url = relay if isinstance(relay, str) else relay.url
    async with RelayClient(url) as client:
        return b"".join([piece async for piece in client.nupkg(manifest.package)])


async def lacks(relay: Relay, manifest: Manifest) -> messages.ExactLacks:
    with pytest.raises(NotExactError) as refused:
        await taken(relay, manifest)
    return refused.value.lacks


async def recipe_of(origin: Origin, index: int = 0) -> Recipe:
    recipe = await origin.depot.recipes.find(origin.added[index].manifest)
    assert recipe is not None
    return recipe


def blobs(relay: Relay) -> set[str]:
    folder = Path(relay.store.removeprefix("disk:"), "blobs")
    return {path.name for path in folder.glob("*/*")}


# --- made of chunks


@needs_engines
@pytest.mark.parametrize(
    "name",
    [
        "microsoft.entityframeworkcore.10.0.15",
        "Shop.Web.1.1.0",
        "microsoft.aspnetcore.app.runtime.linux-x64.10.0.14",
    ],
)
async def test_a_package_of_net_10_is_made_at_the_relay_and_no_deflate_byte_crosses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAYSTATION_ENGINES", str(ENGINES))
    nupkg = PACKAGES / f"{name}.nupkg"
    async with (
        depot_with(tmp_path / "origin", str(nupkg)) as origin,
        relay_with(tmp_path / "relay") as relay,
        CountingProxy("127.0.0.1", relay.port) as proxy,
    ):
        manifest = origin.added[0].manifest
        recipe = await recipe_of(origin)
        assert recipe.verbatim is None
        done = await bring(origin, f"http://127.0.0.1:{proxy.port}")
        assert done.exact_bytes == 0
        crossed = proxy.counts.total
        # The content's own encodings, the manifest and the recipe: nothing else has room in this.
        assert crossed - done.payload_bytes < len(manifest.canonical) + 6_000
        assert hashlib.sha512(await taken(relay, manifest)).digest() == hashlib.sha512(nupkg.read_bytes()).digest()
        assert proxy.counts.total == crossed
        assert blobs(relay) == {manifest.nupkg.sha256}


async def test_the_answer_says_its_length_its_digest_and_that_it_never_changes(tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, PARTS)
    async with depot_with(tmp_path / "origin", nupkg) as origin, relay_with(tmp_path / "relay") as relay:
        await bring(origin, relay.url)
        sha256 = origin.added[0].manifest.nupkg.sha256
        path = messages.NUPKG.format(id="acme.web", version="1.0.0")
        async with aiohttp.ClientSession() as session, session.get(relay.url + path) as response:
            assert await response.read() == Path(nupkg).read_bytes()
            assert response.headers["Content-Length"] == str(os.path.getsize(nupkg))
            assert response.headers["ETag"] == f'"{sha256}"'
            assert "immutable" in response.headers["Cache-Control"]
            assert response.headers["Content-Type"] == messages.NUPKG_TYPE


async def test_twenty_that_ask_at_once_cost_one_rebuild(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = module.rebuild

    async def counted(manifest: Manifest, *more: object) -> None:
        made.append(manifest.package)
        await asyncio.sleep(0.2)
        await real(manifest, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "rebuild", counted)
    nupkg = deflated(tmp_path, PARTS)
    async with depot_with(tmp_path / "origin", nupkg) as origin, relay_with(tmp_path / "relay") as relay:
        manifest = origin.added[0].manifest
        await bring(origin, relay.url)
        found = await asyncio.gather(*(taken(relay, manifest) for _ in range(20)))
        assert set(found) == {Path(nupkg).read_bytes()}
        await taken(relay, manifest)
        assert made == [manifest.package]


async def test_the_engine_comes_out_of_a_runtime_package_that_the_relay_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ENGINES.is_dir():
        pytest.skip("no engines in ../shared/data")
    monkeypatch.setenv("WAYSTATION_ENGINES", str(ENGINES))
    runtime = make_nupkg(
        tmp_path,
        {
            "runtimes/linux-x64/native/libSystem.IO.Compression.Native.so": (
                ENGINES / "dotnet-10.0.14-linux-x64.so"
            ).read_bytes()
        },
        "Microsoft.NETCore.App.Runtime.linux-x64",
        "10.0.14",
    )
    nupkg = PACKAGES / "microsoft.entityframeworkcore.10.0.14.nupkg"
    async with depot_with(tmp_path / "origin", str(nupkg), runtime) as origin:
        manifest = origin.added[0].manifest
        assert (await recipe_of(origin)).encoders == {"dotnet-10"}
        monkeypatch.delenv("WAYSTATION_ENGINES")
        async with relay_with(tmp_path / "without") as relay:
            await bring(origin, relay.url)
            assert await lacks(relay, manifest) == messages.ExactLacks(encoders=("dotnet-10",))
        async with relay_with(tmp_path / "with") as relay:
            await bring(origin, relay.url, 1)
            await bring(origin, relay.url)
            assert await taken(relay, manifest) == nupkg.read_bytes()


async def test_a_depot_that_serves_as_a_relay_gives_the_file_that_it_took_in(tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, PARTS, level=1)
    async with depot_with(tmp_path / "origin", nupkg) as origin:
        manifest = origin.added[0].manifest
    async with relay_with(tmp_path / "origin" / "depot") as relay:
        assert await taken(relay, manifest) == Path(nupkg).read_bytes()


async def test_what_a_killed_relay_left_of_a_rebuild_is_swept(tmp_path: Path) -> None:
    async with relay_with(tmp_path / "relay"):
        left = tmp_path / "relay" / "tmp" / ".rebuild-abc"
        left.write_bytes(b"half a nupkg")
    async with relay_with(tmp_path / "relay"):
        assert not left.exists()


# --- what no encoder makes


async def test_verbatim_bytes_are_refused_with_the_reason_then_brought(tmp_path: Path) -> None:
    mixed = deflated(tmp_path, PARTS)
    nupkg = _with_one_odd_part(tmp_path)
    async with depot_with(tmp_path / "origin", nupkg, mixed) as origin, relay_with(tmp_path / "relay") as relay:
        manifest, recipe = origin.added[0].manifest, await recipe_of(origin)
        assert recipe.verbatim is not None
        assert isinstance(recipe.records, Canonical)
        assert set(shares(recipe, manifest)) == {VERBATIM, "zlib", "stored"}
        await bring(origin, relay.url)
        assert await lacks(relay, manifest) == messages.ExactLacks(verbatim_bytes=recipe.verbatim.size)
        assert blobs(relay) == set()

        done = await bring(origin, relay.url, exact=True)
        assert done.exact_bytes == recipe.verbatim.size < manifest.nupkg.size
        assert await taken(relay, manifest) == Path(nupkg).read_bytes()
        assert (await bring(origin, relay.url, exact=True)).exact_bytes == 0


def _with_one_odd_part(folder: Path) -> str:
    path = os.path.join(folder, "Acme.Odd.1.0.0.nupkg")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("Acme.Odd.nuspec"), nuspec("Acme.Odd"))
        for index, (name, data) in enumerate(PARTS.items()):
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED, 1 if index == 1 else 6)
    return path


async def test_a_nupkg_of_no_encoder_is_brought_whole(tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, PARTS, level=1)
    async with depot_with(tmp_path / "origin", nupkg) as origin, relay_with(tmp_path / "relay") as relay:
        manifest = origin.added[0].manifest
        assert isinstance((await recipe_of(origin)).records, Opaque)
        await bring(origin, relay.url)
        assert await lacks(relay, manifest) == messages.ExactLacks(verbatim_bytes=manifest.nupkg.size)
        assert (await bring(origin, relay.url, exact=True)).exact_bytes == manifest.nupkg.size
        assert await taken(relay, manifest) == Path(nupkg).read_bytes()


@needs_engines
async def test_a_relay_without_the_engine_is_brought_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAYSTATION_ENGINES", str(ENGINES))
    nupkg = PACKAGES / "microsoft.entityframeworkcore.10.0.14.nupkg"
    async with depot_with(tmp_path / "origin", str(nupkg)) as origin:
        manifest = origin.added[0].manifest
        monkeypatch.delenv("WAYSTATION_ENGINES")
        async with relay_with(tmp_path / "relay") as relay:
            assert (await bring(origin, relay.url, exact=True)).exact_bytes == manifest.nupkg.size
            assert await taken(relay, manifest) == nupkg.read_bytes()


# --- from a parent


@pytest.mark.parametrize("odd", ["one part", "all of it"])
async def test_a_parent_is_asked_once_for_what_is_lacking(odd: str, tmp_path: Path) -> None:
    nupkg = _with_one_odd_part(tmp_path) if odd == "one part" else deflated(tmp_path, PARTS, level=1)
    async with (
        depot_with(tmp_path / "origin", nupkg) as origin,
        relay_with(tmp_path / "parent") as parent,
        CountingProxy("127.0.0.1", parent.port) as proxy,
        relay_with(tmp_path / "child", parent=Peer(f"http://127.0.0.1:{proxy.port}")) as child,
    ):
        manifest, recipe = origin.added[0].manifest, await recipe_of(origin)
        assert recipe.verbatim is not None
        await bring(origin, parent.url, exact=True)
        await bring(origin, child.url)
        found = await asyncio.gather(*(taken(child, manifest) for _ in range(5)))
        assert set(found) == {Path(nupkg).read_bytes()}
        crossed = proxy.counts.total
        assert recipe.verbatim.size < crossed < recipe.verbatim.size + 4_000
        assert await taken(child, manifest) == Path(nupkg).read_bytes()
        assert proxy.counts.total == crossed


async def test_verbatim_bytes_are_cut_out_of_the_nupkg_that_the_parent_keeps(tmp_path: Path) -> None:
    nupkg = _with_one_odd_part(tmp_path)
    async with depot_with(tmp_path / "origin", nupkg) as origin:
        manifest, recipe = origin.added[0].manifest, await recipe_of(origin)
        assert recipe.verbatim is not None
        async with relay_with(tmp_path / "child") as child:
            await bring(origin, child.url)
    async with relay_with(tmp_path / "origin" / "depot") as parent:
        async with RelayClient(parent.url) as client:
            cut = b"".join([piece async for piece in client.blob(recipe.verbatim.id, manifest)])
        assert hashlib.sha256(cut).hexdigest() == recipe.verbatim.id
        async with relay_with(tmp_path / "child", parent=Peer(parent.url)) as child:
            assert await taken(child, manifest) == Path(nupkg).read_bytes()
            assert blobs(child) == {manifest.nupkg.sha256, recipe.verbatim.id}


async def test_a_parent_that_is_away_is_no_absence(tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, PARTS, level=1)
    async with depot_with(tmp_path / "origin", nupkg) as origin:
        async with relay_with(tmp_path / "gone") as gone:
            url = gone.url
        async with relay_with(tmp_path / "child", parent=Peer(url)) as child:
            await bring(origin, child.url)
            with pytest.raises(UnreachableError, match="503"):
                await taken(child, origin.added[0].manifest)


async def test_a_parent_that_lies_is_not_believed(tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, PARTS, level=1)
    honest = Path(nupkg).read_bytes()
    asked: list[str] = []

    async def lying(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(body=honest[:-1] + bytes([honest[-1] ^ 1]))

    async with (
        small_server([web.get("/{path:.*}", lying)]) as url,
        depot_with(tmp_path / "origin", nupkg) as origin,
        relay_with(tmp_path / "child", parent=Peer(url)) as child,
    ):
        manifest = origin.added[0].manifest
        await bring(origin, child.url)
        assert (await lacks(child, manifest)).verbatim_bytes == manifest.nupkg.size
        assert asked
        assert blobs(child) == set()


# --- damage and lies


async def test_a_damaged_chunk_is_told_and_nothing_is_served(tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, PARTS)
    async with depot_with(tmp_path / "origin", nupkg) as origin, relay_with(tmp_path / "relay") as relay:
        manifest = origin.added[0].manifest
        await bring(origin, relay.url)
        id = manifest.chunk_id(0)
        path = tmp_path / "relay" / "chunks" / id[:2] / id
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-9] + b"damaged!!")
        assert await lacks(relay, manifest) == messages.ExactLacks(chunks=True)
        assert blobs(relay) == set()
        # Mended by sending it again.
        await bring(origin, relay.url)
        assert await taken(relay, manifest) == Path(nupkg).read_bytes()


@pytest.mark.parametrize("size", ["one piece", "many pieces"])
async def test_a_kept_nupkg_that_is_damaged_never_comes_whole_and_is_made_again(size: str, tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, {"a": words(5, 60_000)} if size == "one piece" else PARTS)
    assert (os.path.getsize(nupkg) > 256 << 10) == (size == "many pieces")
    async with depot_with(tmp_path / "origin", nupkg) as origin, relay_with(tmp_path / "relay") as relay:
        manifest = origin.added[0].manifest
        await bring(origin, relay.url)
        await taken(relay, manifest)
        sha256 = manifest.nupkg.sha256
        path = tmp_path / "relay" / "blobs" / sha256[:2] / sha256
        path.chmod(0o600)
        path.write_bytes(bytes([1]) + path.read_bytes()[1:])
        if size == "many pieces":
            with pytest.raises(UnreachableError):
                await taken(relay, manifest)
        assert await taken(relay, manifest) == Path(nupkg).read_bytes()


async def test_a_recipe_that_lies_is_never_served_and_a_right_one_mends_it(tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, PARTS)
    async with (
        depot_with(tmp_path / "origin", nupkg) as origin,
        relay_with(tmp_path / "relay") as relay,
        RelayClient(relay.url) as client,
    ):
        manifest, right = origin.added[0].manifest, await recipe_of(origin)
        await bring(origin, relay.url)
        assert isinstance(right.records, Canonical)
        records = msgspec.structs.replace(right.records, attributes=((7, len(manifest.parts)),))
        await client.put_recipe(manifest, msgspec.structs.replace(right, records=records))
        assert await lacks(relay, manifest) == messages.ExactLacks(recipe=True)
        assert blobs(relay) == set()
        assert await client.recipe(manifest) is None

        await client.put_recipe(manifest, right)
        assert await taken(relay, manifest) == Path(nupkg).read_bytes()
        # Now it is proved, and no lie takes its place.
        await client.put_recipe(manifest, opaque(manifest))
        assert await client.recipe(manifest) == right


async def test_what_is_no_recipe_of_the_manifest_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    first, second = deflated(tmp_path, PARTS), deflated(tmp_path, EDITED, version="2.0.0")
    async with (
        depot_with(tmp_path / "origin", first, second) as origin,
        relay_with(tmp_path / "relay") as relay,
        RelayClient(relay.url) as client,
    ):
        mine, other = (added.manifest for added in origin.added)
        foreign = await origin.depot.recipes.pack(other)
        for junk in (b"junk", foreign, to_wire(b"\x93"), foreign[:-1]):
            with pytest.raises(RefusedError, match="untrusted"):
                await client.offer(mine, await origin.signature(mine), recipe=junk)
        with pytest.raises(NotFoundError):
            await client.manifest(mine.id)
        await bring(origin, relay.url)
        kept = await client.recipe(mine)
        async with aiohttp.ClientSession() as session:
            for junk in (b"junk", foreign):
                path = messages.REBUILD.format(hex=mine.nupkg.sha256)
                async with session.put(
                    f"{relay.url}{path}?manifest=sha256:{mine.id}",
                    data=junk,
                    headers={"Content-Type": messages.RECIPE_TYPE},
                ) as response:
                    assert (response.status, (await response.json())["code"]) == (400, "untrusted")
        assert await client.recipe(mine) == kept is not None


async def test_a_manifest_that_lies_about_its_sha512_is_served_nothing(tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, PARTS)
    async with depot_with(tmp_path / "origin", nupkg) as origin, relay_with(tmp_path / "relay") as relay:
        manifest = origin.added[0].manifest
        await bring(origin, relay.url)
        await taken(relay, manifest)
        body = msgspec.json.decode(manifest.canonical)
        body["package"]["version"] = "6.6.6"
        body["nupkg"]["sha512"] = "A" * 86 + "=="
        lying = manifests.parse(msgspec.json.encode(body, order="sorted"))
        assert lying.nupkg.sha256 == manifest.nupkg.sha256
        async with RelayClient(relay.url) as client:
            await client.offer(lying, b"envelope")
            await client.publish(lying)
        with pytest.raises(NotExactError):
            await taken(relay, lying)
        assert await taken(relay, manifest) == Path(nupkg).read_bytes()


async def test_a_blob_is_taken_only_where_a_recipe_names_it_and_only_as_it_is_named(tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, PARTS, level=1)
    data = Path(nupkg).read_bytes()

    async def body(data: bytes) -> AsyncIterator[bytes]:
        yield data

    async with (
        depot_with(tmp_path / "origin", nupkg) as origin,
        relay_with(tmp_path / "relay") as relay,
        RelayClient(relay.url) as client,
    ):
        manifest = origin.added[0].manifest
        sha256 = manifest.nupkg.sha256
        with pytest.raises(NotFoundError):
            await client.put_blob(sha256, manifest, body(data))
        await bring(origin, relay.url)
        stranger = noise("blob", 5_000)
        with pytest.raises(NotFoundError):
            await client.put_blob(hashlib.sha256(stranger).hexdigest(), manifest, body(stranger))
        for wrong in (data[:-1], data + b"x", data[:-1] + b"x"):
            with pytest.raises((RefusedError, UntrustedError, UnreachableError)):
                await client.put_blob(sha256, manifest, body(wrong))
        assert blobs(relay) == set()
        await client.put_blob(sha256, manifest, body(data))
        assert blobs(relay) == {sha256}
        assert list((tmp_path / "relay" / "tmp").iterdir()) == []


@pytest.mark.parametrize("scope", [None, "order", "read", "write"])
async def test_each_route_asks_for_its_scope(scope: str | None, tmp_path: Path) -> None:
    tokens = {each: token(each) for each in ("order", "read", "write")}
    records = [msgspec.to_builtins(record) for _, record in tokens.values()]
    headers = {} if scope is None else {"Authorization": f"Bearer {tokens[scope][0]}"}
    sha256 = "a" * 64
    asked = {
        ("GET", messages.NUPKG.format(id="acme.web", version="1.0.0")): {"read", "write"},
        ("GET", messages.REBUILD.format(hex=sha256)): {"read", "write"},
        ("PUT", messages.REBUILD.format(hex=sha256)): {"write"},
        ("GET", messages.BLOB.format(hex=sha256)): {"read", "write"},
        ("PUT", messages.BLOB.format(hex=sha256)): {"write"},
    }
    async with relay_with(tmp_path / "relay", tokens=records) as relay, aiohttp.ClientSession(relay.url) as session:
        for (method, path), allowed in asked.items():
            type = messages.RECIPE_TYPE if path.startswith("/v1/rebuilds") else messages.NUPKG_TYPE
            data = {"data": b"x"} if method == "PUT" else {}
            async with session.request(
                method, f"{path}?manifest=sha256:{sha256}", headers=headers | {"Content-Type": type}, **data
            ) as response:
                expected = 404 if scope in allowed else 401 if scope is None else 403
                assert (path, response.status) == (path, expected)


# --- recipes on the way


async def test_a_new_versions_recipe_crosses_as_the_difference_from_the_one_before(tmp_path: Path) -> None:
    first, second = deflated(tmp_path, PARTS), deflated(tmp_path, EDITED, version="2.0.0")
    async with (
        depot_with(tmp_path / "origin", first, second) as origin,
        relay_with(tmp_path / "relay") as relay,
        RelayClient(relay.url) as client,
    ):
        old, new = (added.manifest for added in origin.added)
        await bring(origin, relay.url, 0)
        packed = await origin.depot.recipes.pack(new, old)
        assert len(packed) < len(await origin.depot.recipes.pack(new))
        offer = await client.offer(new, b"", old, packed)
        assert not offer.recipe_unread
        assert await client.recipe(new) == await recipe_of(origin, 1)


async def test_a_recipe_against_one_that_the_relay_has_otherwise_goes_plainly(tmp_path: Path) -> None:
    first, second = deflated(tmp_path, PARTS), deflated(tmp_path, EDITED, version="2.0.0")
    async with (
        depot_with(tmp_path / "origin", first, second) as origin,
        relay_with(tmp_path / "relay") as relay,
        RelayClient(relay.url) as client,
    ):
        old, new = (added.manifest for added in origin.added)
        await bring(origin, relay.url, 0)
        await client.put_recipe(old, opaque(old))
        offer = await client.offer(new, b"", old, await origin.depot.recipes.pack(new, old))
        assert offer.recipe_unread
        assert await client.recipe(new) is None
        await bring(origin, relay.url, 1)
        assert await taken(relay, new) == Path(second).read_bytes()


async def test_a_package_that_came_without_a_recipe_says_so(tmp_path: Path) -> None:
    nupkg = deflated(tmp_path, PARTS)
    async with depot_with(tmp_path / "origin", nupkg) as origin, relay_with(tmp_path / "relay") as relay:
        manifest = origin.added[0].manifest
        recipe = await recipe_of(origin)
        await origin.depot.recipes.forget(manifest.nupkg.sha256)
        await bring(origin, relay.url)
        assert await lacks(relay, manifest) == messages.ExactLacks(recipe=True)
        await origin.depot.recipes.keep(manifest, recipe)
        # The package is there: only `--exact` looks for more.
        await bring(origin, relay.url, exact=True)
        assert await taken(relay, manifest) == Path(nupkg).read_bytes()
