"""What crosses which line: a package goes once to each site, and of its next version only what changed goes anywhere."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.machines import Machine
from harness.origins import OriginHome
from harness.packages import make_nupkg, noise
from harness.relays import RelayProcess

from agent.relays.sources import Sources
from agent.trees import pull as agent_pull
from agent.trees.installed import AgentState
from benchmarks.lines.network import ThreadedProxy
from benchmarks.support.workload import installed_files, real_package
from orchestrator.depot.depot import open_depot
from relay.package import chunking
from relay.package.identity import ChunkId
from relay.package.manifest import Manifest, to_wire
from relay.support.zstd import zstd
from relay.trust.keys import parse_pins

PULLS_AT_ONCE = 4


@dataclass(frozen=True)
class Site:
    """A relay, and the line between it and the origin."""

    relay: RelayProcess
    line: ThreadedProxy

    @property
    def url(self) -> str:
        """How the origin reaches the relay; machines use the relay's own."""
        return f"http://127.0.0.1:{self.line.port}"


@contextmanager
def sites(folder: Path, *names: str) -> Iterator[list[Site]]:
    with ExitStack() as stack:
        relays = [stack.enter_context(RelayProcess(folder / name, "--site", name)) for name in names]
        yield [Site(relay, stack.enter_context(ThreadedProxy("127.0.0.1", relay.port))) for relay in relays]


def some_package(folder: Path, name: str, fallback_bytes: int, origin: OriginHome) -> tuple[str, str]:
    """Add the real package `name` where it lies beside the project, else a pack of installed files. Its id and version."""
    nupkg = real_package(name)
    if nupkg is None:
        content, nupkg = folder / "content", os.fspath(folder / "packed.nupkg")
        installed_files(os.fspath(content), fallback_bytes)
        origin.run("package", "pack", str(content), "--id", "Acme.Packed", "--version", "1.0.0", "--output", nupkg)
    [added] = origin.add(nupkg)
    return added["id"], added["version"]


async def plain_bytes(origin: OriginHome, manifest: Manifest) -> int:
    """What the promise is measured by: each chunk for itself at zstd level 3, and the manifest as it travels."""
    async with open_depot(f"disk:{origin.home / 'depot'}") as depot:
        ids = set(manifest.chunk_ids())
        return sum([len(zstd.compress((await depot.store.chunks.get(id)).data, 3)) for id in ids]) + len(
            to_wire(manifest.canonical)
        )


async def pull_onto_many(
    folder: Path, pins: Path, id: str, version: str, relays: list[str], names: range
) -> list[agent_pull.Pulled]:
    """Pulls of many machines, each with a home and a root of its own; several at once, half of them at each site."""
    room = asyncio.Semaphore(PULLS_AT_ONCE)

    async def one(number: int) -> agent_pull.Pulled:
        home = folder / f"m{number}" / "home"
        home.mkdir(parents=True)
        request = agent_pull.parse_request(id, version, str(home.parent / "root"), None, switch=False)
        state = AgentState(str(home))
        async with room, Sources(state.config(), home / "relays.json", relays=[relays[number % len(relays)]]) as known:
            return await agent_pull.pull(request, state, known, parse_pins(pins.read_bytes()))

    return await asyncio.gather(*map(one, names))


async def test_scenario_07_a_first_package_crosses_the_line_to_each_site_once_and_no_more_than_its_chunks(
    tmp_path: Path,
) -> None:
    origin = OriginHome(tmp_path / "origin")
    id, version = some_package(tmp_path, "Shop.Web.1.0.0.nupkg", 30 << 20, origin)
    manifest = await origin.manifest(id, version)
    promised = await plain_bytes(origin, manifest)
    with sites(tmp_path, "fra", "iad") as both:
        ledger = origin.replicate(id, version, *[site.url for site in both])
        sent = [site.line.counts for site in both]
        print(f"{id} {version}: nupkg {manifest.nupkg.size}, promised {promised} a site, sent {sent}")
        for site, counts in zip(both, sent, strict=True):
            assert ledger[site.url]["chunks_sent"] == len(set(manifest.chunk_ids()))
            assert ledger[site.url]["wire_bytes"] == pytest.approx(counts.total, rel=0.01)
        assert sum(counts.up for counts in sent) <= 2 * promised * 1.01

        again = origin.replicate(id, version, *[site.url for site in both])
        for site, counts in zip(both, sent, strict=True):
            assert again[site.url]["chunks_sent"] == 0
            assert site.line.counts.total - counts.total < 8 << 10, "running it again asks, and sends nothing"


async def test_scenario_07_sixty_machines_cost_the_origin_no_byte_more_than_six(tmp_path: Path) -> None:
    origin = OriginHome(tmp_path / "origin")
    id, version = some_package(tmp_path, "newtonsoft.json.13.0.3.nupkg", 6 << 20, origin)
    manifest = await origin.manifest(id, version)
    with sites(tmp_path, "fra", "iad") as both:
        origin.replicate(id, version, *[site.url for site in both])
        near = [site.relay.url for site in both]
        after_replication = [site.line.counts.total for site in both]

        pulled = await pull_onto_many(tmp_path, origin.pins, id, version, near, range(6))
        after_six = [site.line.counts.total for site in both]
        pulled += await pull_onto_many(tmp_path, origin.pins, id, version, near, range(6, 60))
        after_sixty = [site.line.counts.total for site in both]

    assert after_replication == after_six == after_sixty
    assert all(sum(tally["bytes"] for tally in one.from_relays.values()) == tree_bytes(manifest) for one in pulled)
    assert len({one.tree for one in pulled}) == 60
    assert all(Path(one.tree).is_dir() for one in pulled)


def tree_bytes(manifest: Manifest) -> int:
    """Bytes of the chunks that an agent asks for, each once."""
    return sum({entry.id: entry.size for entry in map(manifest.chunks.__getitem__, manifest.tree_chunks)}.values())


# --- the next version


@dataclass(frozen=True)
class Step:
    """From one version to the next: the manifests, and the parts that differ between them."""

    old: Manifest
    new: Manifest

    @property
    def changed(self) -> set[str]:
        before = {part.path: self.old.part_sha256(i) for i, part in enumerate(self.old.parts) if part.size}
        return {
            part.path
            for i, part in enumerate(self.new.parts)
            if part.size and before.get(part.path) != self.new.part_sha256(i)
        }

    @property
    def new_chunks(self) -> set[ChunkId]:
        return set(self.new.chunk_ids()) - set(self.old.chunk_ids())

    @property
    def new_tree_chunks(self) -> dict[ChunkId, int]:
        """Those that machines lack, with their sizes."""
        tree = {self.new.chunk_id(i): self.new.chunks[i].size for i in self.new.tree_chunks}
        return {id: size for id, size in tree.items() if id in self.new_chunks}

    def parts_of(self, id: ChunkId) -> set[str]:
        return {self.new.parts[extent.part].path for extent in self.new.extents[self.new.index_of[id]]}

    def check_that_only_changed_chunks_are_new(self) -> None:
        for id in self.new_chunks:
            held = self.parts_of(id)
            assert held & self.changed or all(map(chunking.is_container, held)), f"{held} moved for nothing"


class Road:
    """One site and one machine, over which versions go one after another."""

    def __init__(self, origin: OriginHome, site: Site, machine: Machine) -> None:
        self.origin = origin
        self.site = site
        self.machine = machine

    def bring(self, id: str, version: str) -> tuple[dict[str, Any], dict[str, Any], int]:
        """Replicate and pull; both ledgers, and the bytes that really crossed the line to the site."""
        before = self.site.line.counts.total
        sent = self.origin.replicate(id, version, self.site.url)[self.site.url]
        crossed = self.site.line.counts.total - before
        return sent, self.machine.pull(id, version, self.site.relay.url), crossed

    def bring_next(self, step: Step) -> None:
        """The new version of `step`, its ledgers held against what should have moved."""
        step.check_that_only_changed_chunks_are_new()
        sent, pulled, crossed = self.bring(str(step.new.package.id), str(step.new.package.version))
        print(f"{step.new.package}: changed {sorted(step.changed)}, crossed {crossed}, {sent}, {pulled}")
        assert sent["chunks_sent"] == len(step.new_chunks)
        assert sent["wire_bytes"] == pytest.approx(crossed, rel=0.01)
        # Beside the chunks themselves: the manifest as a difference, and a few questions.
        assert crossed < sent["payload_bytes"] + (8 << 10)
        from_relay = pulled["from_relays"][self.site.relay.url]
        assert from_relay["chunks"] == len(step.new_tree_chunks)
        assert from_relay["bytes"] == sum(step.new_tree_chunks.values())
        assert pulled["wire_bytes"] < from_relay["payload_bytes"] + (8 << 10)
        assert pulled["from_disk_bytes"] == tree_bytes(step.new) - from_relay["bytes"]


@contextmanager
def road(folder: Path, origin: OriginHome) -> Iterator[Road]:
    with sites(folder, "fra") as [site]:
        yield Road(origin, site, Machine.made(folder / "machine", origin.pins))


ONE_CHANGED = ("lib/net8.0/Large.dll", "content/page7.html", "data/model.bin")
"""What differs from one made version to the next: a part that is one chunk, one of many in a chunk, one of several."""


def made_files() -> dict[str, bytes]:
    """Large parts that are chunks of their own, one that is several, and small ones that are gathered."""
    files = {f"lib/net8.0/Library{n}.dll": noise(n, 200_000 + 1000 * n) for n in range(12)}
    files |= {f"content/page{n}.html": noise(f"page {n}", 9_000) for n in range(80)}
    return files | {"lib/net8.0/Large.dll": noise("large", 300_000), "data/model.bin": noise("model", 9 << 20)}


async def test_scenario_07_of_a_next_version_with_one_changed_file_only_its_chunks_move(tmp_path: Path) -> None:
    origin = OriginHome(tmp_path / "origin")
    files, nupkgs = made_files(), []
    for number, path in enumerate([None, *ONE_CHANGED]):
        if path is not None:
            data = files[path]
            files[path] = data[: len(data) // 2] + noise(f"edit {path}", 100) + data[len(data) // 2 + 100 :]
        nupkgs.append(make_nupkg(tmp_path, files, version=f"1.0.{number}"))
    origin.add(*nupkgs)
    versions = [await origin.manifest("Acme.Web", f"1.0.{number}") for number in range(len(nupkgs))]

    with road(tmp_path, origin) as way:
        way.bring("Acme.Web", "1.0.0")
        for path, old, new in zip(ONE_CHANGED, versions, versions[1:], strict=False):
            step = Step(old, new)
            assert step.changed == {path, "Acme.Web.nuspec"}
            assert len(step.new_tree_chunks) == 1
            way.bring_next(step)
        assert len(way.machine.verified()) == len(versions)


async def test_of_a_real_next_version_only_the_changed_files_move(tmp_path: Path) -> None:
    nupkgs = [real_package(f"Shop.Web.{version}.nupkg") for version in ("1.0.0", "1.0.1")]
    if None in nupkgs:
        pytest.skip("the package Shop.Web does not lie beside the project")
    origin = OriginHome(tmp_path / "origin")
    origin.add(*[nupkg for nupkg in nupkgs if nupkg])
    step = Step(await origin.manifest("Shop.Web", "1.0.0"), await origin.manifest("Shop.Web", "1.0.1"))
    assert "Shop.Web.dll" in step.changed

    with road(tmp_path, origin) as way:
        way.bring("Shop.Web", "1.0.0")
        way.bring_next(step)
        assert sorted(way.machine.verified()) == ["Shop.Web 1.0.0", "Shop.Web 1.0.1"]
