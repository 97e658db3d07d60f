"""Every package of a release is in the depot before anything begins: signed, whole, and the one that was planned."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness.feed import Server, body, running_feed
from harness.origins import Origin, depot_with, trust_keys
from harness.packages import make_nupkg, noise

from orchestrator.files.script_files import ScriptPathError
from orchestrator.plan.plan import PlannedFeed, PlannedPackage, SecretSource
from orchestrator.releases.packages import ServerTrees, build_scripts_package, ensure_packages
from orchestrator.trust.secrets import SecretStore
from relay.errors import ConflictError, NotFoundError, RefusedError, UntrustedError, UsageError
from relay.trust.envelopes import verify_package

FILES = {"bin/migrate": b"#!/bin/sh\necho hello\n", "data/big": noise(1, 300_000), "data/empty": b""}
NOTHING = SecretStore({})


@pytest.fixture
async def origin(tmp_path: Path) -> AsyncIterator[Origin]:
    async with depot_with(tmp_path / "origin", make_nupkg(tmp_path, FILES)) as origin:
        yield origin


async def ensure(origin: Origin, packages, feeds=None, secrets=NOTHING, **more):
    return await ensure_packages(origin.depot, packages, feeds or {}, secrets, origin.keys.signer, **more)


def serve(feed: Server, nupkg: str, id: str = "Acme.Schema", version: str = "2.0.0") -> PlannedFeed:
    path = f"/flat/{id.lower()}/{version}/{id.lower()}.{version}.nupkg"
    feed.serve(path, body(Path(nupkg).read_bytes()))
    return PlannedFeed(feed.index)


# --- into the depot


async def test_what_is_in_the_depot_is_filled_in(origin: Origin) -> None:
    manifest = origin.added[0].manifest
    found = await ensure(origin, {"web": PlannedPackage("Acme.Web", "1.0.0")})
    assert found == {
        "web": PlannedPackage("Acme.Web", "1.0.0", manifest.id, manifest.tree_size, manifest.nupkg.size),
    }
    assert manifest.tree_size == sum(map(len, FILES.values()))
    assert await ensure(origin, found) == found


async def test_what_the_depot_lacks_is_taken_from_its_feed_and_signed(origin: Origin, tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, {"up.sql": b"select 1"}, "Acme.Schema", "2.0.0")
    planned = {"db": PlannedPackage("Acme.Schema", "2.0.0", feed="corp")}
    told: list[tuple[str, int, int]] = []

    def bar(name: str):
        return lambda done, whole: told.append((name, done, whole))

    async with running_feed() as feed:
        found = await ensure(origin, planned, {"corp": serve(feed, nupkg)}, bar=bar)
        asked = len(feed.asked)
        assert asked
        assert await ensure(origin, planned, {"corp": PlannedFeed(feed.index)}) == found
        assert len(feed.asked) == asked, "what the depot has is not asked for again"
    pointer = origin.depot.catalog.get(planned["db"].ref)
    statement = verify_package(await origin.depot.catalog.signature(pointer.manifest_id), origin.keys.pins)
    assert statement.manifest == found["db"].manifest == pointer.manifest
    assert pointer.provenance.source.startswith(feed.base)
    assert told[-1][0] == "Acme.Schema 2.0.0"
    assert told[-1][1] == told[-1][2] > 0


@pytest.mark.parametrize(
    ("secret", "header"),
    [("nobody:pass:word", "Basic bm9ib2R5OnBhc3M6d29yZA=="), ("tokn", "Basic d2F5c3RhdGlvbjp0b2tu")],
)
async def test_a_feed_gets_its_secret_as_user_and_password_or_as_a_token(
    origin: Origin, tmp_path: Path, secret: str, header: str
) -> None:
    nupkg = make_nupkg(tmp_path, {"up.sql": b"select 1"}, "Acme.Schema", "2.0.0")
    (tmp_path / "feed.secret").write_text(secret + "\n")
    (tmp_path / "feed.secret").chmod(0o600)
    secrets = SecretStore({"corp_feed": SecretSource(file=str(tmp_path / "feed.secret"))})
    async with running_feed() as feed:
        serve(feed, nupkg)
        planned = {"db": PlannedPackage("Acme.Schema", "2.0.0", feed="corp")}
        await ensure(origin, planned, {"corp": PlannedFeed(feed.index, "corp_feed")}, secrets)
        assert {headers.get("Authorization") for _, headers in feed.asked} == {header}


async def test_a_package_that_is_nowhere_is_named_with_both_ways_to_add_it(origin: Origin) -> None:
    with pytest.raises(NotFoundError) as caught:
        await ensure(origin, {"web": PlannedPackage("Acme.Web", "9.9.9")})
    text = str(caught.value)
    assert "Acme.Web 9.9.9 is not in the depot" in text
    assert "waystation package add Acme.Web.9.9.9.nupkg" in text
    assert "waystation package add --feed URL Acme.Web 9.9.9" in text


async def test_a_feed_without_the_package_is_told_with_both_ways_to_add_it(origin: Origin) -> None:
    async with running_feed() as feed:
        with pytest.raises(NotFoundError, match=r"not in the depot, and the feed .* has no .*waystation package add"):
            await ensure(
                origin,
                {"db": PlannedPackage("Acme.Schema", "2.0.0", feed="corp")},
                {"corp": PlannedFeed(feed.index)},
            )


async def test_no_feed_is_asked_while_another_package_is_missing_for_good(origin: Origin, tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, {"up.sql": b"select 1"}, "Acme.Schema", "2.0.0")
    async with running_feed() as feed:
        packages = {
            "db": PlannedPackage("Acme.Schema", "2.0.0", feed="corp"),
            "web": PlannedPackage("Acme.Web", "9.9.9"),
        }
        with pytest.raises(NotFoundError, match=r"Acme\.Web"):
            await ensure(origin, packages, {"corp": serve(feed, nupkg)})
        with pytest.raises(UsageError, match="'corp', which the environment does not name"):
            await ensure(origin, {"db": packages["db"]})
        assert feed.asked == []


async def test_a_feed_that_sends_another_package_is_refused(origin: Origin, tmp_path: Path) -> None:
    evil = make_nupkg(tmp_path, {"up.sql": b"drop"}, "Acme.Evil", "2.0.0")
    async with running_feed() as feed:
        feeds = {"corp": serve(feed, evil)}
        with pytest.raises(UntrustedError, match=r"Acme\.Evil"):
            await ensure(origin, {"db": PlannedPackage("Acme.Schema", "2.0.0", feed="corp")}, feeds)
        assert "/flat/acme.schema/2.0.0/acme.schema.2.0.0.nupkg" in feed.paths
    assert [str(pointer.ref) for pointer in origin.depot.catalog.all()] == ["Acme.Web 1.0.0"]


async def test_another_manifest_than_planned_is_a_conflict(origin: Origin) -> None:
    with pytest.raises(ConflictError, match="is not the one that was planned"):
        await ensure(origin, {"web": PlannedPackage("Acme.Web", "1.0.0", "0" * 64)})


async def test_a_package_that_lost_its_signature_is_refused(origin: Origin) -> None:
    await origin.depot.store.documents.remove(f"signatures/{origin.added[0].manifest.id}")
    with pytest.raises(RefusedError, match="is not signed"):
        await ensure(origin, {"web": PlannedPackage("Acme.Web", "1.0.0")})


# --- the scripts package


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "deploy").mkdir(parents=True)
    (folder / "deploy/configure.sh").write_text("#!/bin/sh\necho configure\n")
    (folder / "deploy/warm.py").write_text("print('warm')\n")
    (folder / "deploy/lb.token").write_text("never in a package")
    return folder


PATHS = ["deploy/configure.sh", "deploy/warm.py"]


async def build(origin: Origin, project: Path, paths=PATHS, name: str = "webshop") -> PlannedPackage | None:
    return await build_scripts_package(str(project), paths, name, origin.depot, origin.keys.signer)


async def test_the_package_holds_exactly_the_named_scripts(origin: Origin, project: Path, tmp_path: Path) -> None:
    package = await build(origin, project)
    assert package is not None
    assert package.id == "Waystation.Scripts.webshop"
    digests = {path: hashlib.sha256((project / path).read_bytes()).hexdigest() for path in PATHS}
    text = "".join(f"{path}\0{digests[path]}" for path in sorted(digests))
    assert package.version == f"1.0.0-h{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    tree = await ServerTrees(origin.depot.store.location, origin.keys.pins, str(tmp_path / "trees")).build(package)
    found = {str(path.relative_to(tree)): path.read_bytes() for path in Path(tree).rglob("*") if path.is_file()}
    assert found == {path: (project / path).read_bytes() for path in PATHS}
    assert package.tree_bytes == sum(map(len, found.values()))


async def test_the_same_scripts_are_the_same_package(origin: Origin, project: Path) -> None:
    package = await build(origin, project)
    (project / PATHS[0]).chmod(0o755)
    os.utime(project / PATHS[1], (1, 1))
    assert await build(origin, project, [*reversed(PATHS), PATHS[0]]) == package
    (project / PATHS[1]).write_text("print('other')\n")
    other = await build(origin, project)
    assert other is not None
    assert package is not None
    assert other.id == package.id
    assert other.version != package.version


async def test_the_same_scripts_are_the_same_package_though_the_depot_lost_some_of_it(
    origin: Origin, project: Path
) -> None:
    package = await build(origin, project)
    assert package is not None
    manifest = await origin.depot.manifest(origin.depot.catalog.get(package.ref))
    lost = manifest.chunk_id(0)
    await origin.depot.store.chunks.remove(lost)
    assert await build(origin, project) == package
    assert await origin.depot.store.chunks.has_many([lost]) == {lost}


async def test_no_scripts_need_no_package(origin: Origin, project: Path) -> None:
    assert await build(origin, project, []) is None
    assert len(origin.depot.catalog.all()) == 1


@pytest.mark.parametrize(
    "path", ["../outside.sh", "/etc/passwd", "deploy/../../outside.sh", "none.sh", "deploy", "link.sh"]
)
async def test_only_plain_files_of_the_process_become_scripts(origin: Origin, project: Path, path: str) -> None:
    (project.parent / "outside.sh").write_text("#!/bin/sh\n")
    (project / "link.sh").symlink_to(project.parent / "outside.sh")
    with pytest.raises(ScriptPathError):
        await build(origin, project, [*PATHS, path])
    assert len(origin.depot.catalog.all()) == 1


@pytest.mark.parametrize("name", ["webshop", "web-shop", "Web.Shop_2", "a" * 60])
async def test_a_project_names_its_package(origin: Origin, project: Path, name: str) -> None:
    package = await build(origin, project, name=name)
    assert package is not None
    assert package.id == f"Waystation.Scripts.{name}"


async def test_a_signature_that_the_disk_damaged_is_told_before_anything_begins(origin: Origin, tmp_path: Path) -> None:
    manifest = origin.added[0].manifest
    envelope = await origin.signature(manifest)
    await origin.depot.store.documents.write(f"signatures/{manifest.id}", envelope.replace(b"A", b"B", 1))
    packages = {"web": PlannedPackage(str(manifest.package.id), manifest.package.version.normalized)}

    with pytest.raises(RefusedError, match="no machine would believe") as error:
        await ensure(origin, packages, pins=origin.keys.pins)

    assert "Add its nupkg again" in error.value.hint


# --- the server's own tree


async def test_the_tree_on_the_server_is_that_of_the_package(origin: Origin, tmp_path: Path) -> None:
    package = (await ensure(origin, {"web": PlannedPackage("Acme.Web", "1.0.0")}))["web"]
    trees = str(tmp_path / "trees")
    tree = Path(await ServerTrees(origin.depot.store.location, origin.keys.pins, trees).build(package))
    assert {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()} == set(FILES)
    assert all((tree / path).read_bytes() == data for path, data in FILES.items())
    assert os.access(tree / "bin/migrate", os.X_OK)
    assert await ServerTrees(origin.depot.store.location, origin.keys.pins, trees).build(package) == str(tree)


async def test_a_tree_that_was_edited_is_built_again(origin: Origin, tmp_path: Path) -> None:
    package = (await ensure(origin, {"web": PlannedPackage("Acme.Web", "1.0.0")}))["web"]
    trees = str(tmp_path / "trees")
    tree = Path(await ServerTrees(origin.depot.store.location, origin.keys.pins, trees).build(package))
    (tree / "bin/migrate").write_bytes(b"#!/bin/sh\necho HELLO\n")
    again = Path(await ServerTrees(origin.depot.store.location, origin.keys.pins, trees).build(package))
    assert again != tree
    same = ServerTrees(origin.depot.store.location, origin.keys.pins, trees)
    assert await same.build(package) == str(again)
    (again / "bin/migrate").chmod(0o644)
    assert await same.build(package) not in {str(tree), str(again)}, "between two steps of one deployment, too"
    assert (again / "bin/migrate").read_bytes() == FILES["bin/migrate"]


async def test_a_tree_that_nobody_trusted_signed_is_not_built(origin: Origin, tmp_path: Path) -> None:
    package = (await ensure(origin, {"web": PlannedPackage("Acme.Web", "1.0.0")}))["web"]
    stranger = trust_keys(tmp_path / "stranger").pins
    with pytest.raises(UntrustedError):
        await ServerTrees(origin.depot.store.location, stranger, str(tmp_path / "trees")).build(package)
    assert not (tmp_path / "trees/releases").exists()
