"""Cascades of real relay processes: cut-through over the hops, and relays on the way that are killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.origins import OriginHome
from harness.packages import make_nupkg, noise
from harness.relays import RelayProcess, check_store

from benchmarks.lines.network import CountingProxy, Line
from orchestrator.depot.depot import open_depot
from orchestrator.plan.plan import PlannedRelay
from orchestrator.replication.cascade import Cascaded, replicate_all
from relay.package.manifest import Manifest
from relay.protocol.client import RelayClient
from relay.transfer.replicate import Progress, ReplicationResult, replicate

ID, VERSION = "Acme.Cascade", "1.0.0"
SIZE = 6_000_000
"""Bytes of the package, which does not compress: what crosses."""
RATE = 1_250_000
"""Bytes a second of every line: 10 Mbit/s."""
NAMES = ("fra", "iad", "syd")


@dataclass(frozen=True)
class Chain:
    """The origin, and relays of which each fetches from the one before it; every line is shaped."""

    manifest: Manifest
    relays: dict[str, RelayProcess]
    lines: dict[str, CountingProxy]
    """Into each relay's site: from the origin, as `origin → NAME`, and from another relay."""
    cascading: asyncio.Task[Cascaded]


@asynccontextmanager
async def chain(folder: Path, patience: float) -> AsyncIterator[Chain]:
    origin = OriginHome(folder / "origin")
    origin.add(make_nupkg(folder, {f"lib/part{n}.dll": noise(n, SIZE // 15) for n in range(15)}, ID, VERSION))
    manifest = await origin.manifest(ID, VERSION)
    async with AsyncExitStack() as stack:
        depot = await stack.enter_async_context(open_depot(f"disk:{origin.home / 'depot'}"))
        signature = await depot.catalog.signature(manifest.id)
        relays = {name: stack.enter_context(RelayProcess(folder / name)) for name in NAMES}
        lines, clients, planned = {}, {}, []
        for name, above in zip(NAMES, ("", *NAMES), strict=False):
            up = CountingProxy("127.0.0.1", relays[name].port, up=Line(rate=RATE))
            lines[f"origin → {name}"] = await stack.enter_async_context(up)
            url = f"http://127.0.0.1:{lines[f'origin → {name}'].port}"
            clients[name] = await stack.enter_async_context(RelayClient(url))
            planned.append(PlannedRelay(name, url, name, upstream=above))
        for above, below in (("fra", "iad"), ("iad", "syd"), ("fra", "syd")):
            down = CountingProxy("127.0.0.1", relays[above].port, down=Line(rate=RATE))
            lines[f"{above} → {below}"] = await stack.enter_async_context(down)

        async def send(relay: PlannedRelay, client: RelayClient, progress: Progress) -> ReplicationResult:
            source = depot.store.chunks
            return await replicate(manifest, signature, source, client, progress=progress, patience=patience)

        def url_of(above: PlannedRelay, relay: PlannedRelay) -> str:
            return f"http://127.0.0.1:{lines[f'{above.name} → {relay.name}'].port}"

        work = replicate_all(manifest, planned, clients, send, lambda *_: None, patience=patience, source_url=url_of)
        cascading = asyncio.create_task(work)
        stack.callback(cascading.cancel)
        yield Chain(manifest, relays, lines, cascading)


def egress(chain: Chain) -> int:
    return sum(line.counts.up for name, line in chain.lines.items() if name.startswith("origin"))


async def test_the_last_of_three_sites_ends_soon_after_the_first(tmp_path: Path) -> None:
    async with chain(tmp_path, 60.0) as country:
        done = await country.cascading
        assert (done.failed, done.replans) == ({}, ())
        first, _, last = done.delivered
        print(f"first site {first.seconds:.2f} s, last site {last.seconds:.2f} s")
        # Who waited for the whole at each hop would need three times as long; where it is to be 1.3 times, the benchmark
        # says so on a machine that does nothing else.
        assert last.seconds < 2 * first.seconds
        assert egress(country) < 1.05 * SIZE
        for name in NAMES:
            await check_store(country.relays[name].store, country.manifest)


async def test_a_relay_that_is_killed_on_the_way_is_passed_by(tmp_path: Path) -> None:
    async with chain(tmp_path, 3.0) as country:
        await country.lines["iad → syd"].wait_for(SIZE // 4, direction="down")
        assert not country.cascading.done()
        country.relays["iad"].kill()
        done = await country.cascading
        assert list(done.failed) == ["iad"]
        assert [(replan.relay, replan.left, replan.taken) for replan in done.replans] == [("syd", "iad", "fra")]
        assert [one.relay for one in done.delivered] == ["fra", "syd"]
        for name in ("fra", "syd"):
            await check_store(country.relays[name].store, country.manifest)
        assert egress(country) < 1.05 * SIZE
        again = country.lines["iad → syd"].counts.down + country.lines["fra → syd"].counts.down
        assert again < SIZE + 1_500_000, "what came was thrown away"


async def test_a_relay_that_is_killed_and_comes_back_goes_on_where_it_was(tmp_path: Path) -> None:
    async with chain(tmp_path, 60.0) as country:
        await country.lines["iad → syd"].wait_for(SIZE // 4, direction="down")
        country.relays["iad"].kill()
        await asyncio.to_thread(country.relays["iad"].start)
        done = await country.cascading
        assert done.failed == {}
        assert {one.relay: one.interruptions > 0 for one in done.delivered} == {"fra": False, "iad": True, "syd": False}
        for name in NAMES:
            await check_store(country.relays[name].store, country.manifest)
        assert egress(country) < 1.05 * SIZE
        assert country.lines["fra → iad"].counts.down < SIZE + 1_500_000, "what came was thrown away"
