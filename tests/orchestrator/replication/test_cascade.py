"""A package goes to many relays through one another: each byte leaves the origin once, and a relay that fails is passed by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from aiohttp import ClientSession, web
from harness.origins import Origin, depot_with
from harness.packages import make_nupkg, noise
from harness.relays import CLIENT_LIMITS, RELAY_LIMITS, Relay, small_server

from benchmarks.lines.network import CountingProxy, Line
from orchestrator.plan.plan import PlannedRelay
from orchestrator.replication.cascade import Cascaded, Delivered, OnFailed, document_of, replicate_all
from relay.config import RelayConfig
from relay.errors import UnreachableError, UsageError, WaystationError
from relay.package.manifest import Manifest
from relay.protocol.client import RelayClient
from relay.server.app import start
from relay.stores.open import open_reader
from relay.transfer.replicate import Progress, ReplicationResult, replicate

FILES = {f"lib/part{n}.dll": noise(n, 400_000) for n in range(6)}
PACKAGE_BYTES = 2_400_000
PATIENCE = 1.5
SLACK = 60_000
"""Bytes of manifest, headers and progress on one line, at most."""


@dataclass
class Site:
    """A relay, the line from the origin to it, and its store."""

    relay: Relay
    line: CountingProxy
    stop: AsyncExitStack


@dataclass
class Country:
    """Relays by name, each behind a line of its own from the origin, and lines between them."""

    origin: Origin
    stack: AsyncExitStack
    folder: Path
    sites: dict[str, Site] = field(default_factory=dict)
    between: dict[str, CountingProxy] = field(default_factory=dict)
    """By `above → below`."""
    sources: dict[str, str] = field(default_factory=dict)
    """Other URLs, by the same."""
    heard: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    rate: float | None = None

    @property
    def manifest(self) -> Manifest:
        return self.origin.added[0].manifest

    async def site(self, name: str, **config: object) -> Site:
        location = f"disk:{self.folder / name}"
        made = msgspec.convert({"listen": "127.0.0.1:0", "store": location} | config, RelayConfig)
        stop = await self.stack.enter_async_context(AsyncExitStack())
        running = await start(made, RELAY_LIMITS, stop)
        proxy = CountingProxy("127.0.0.1", running.port, up=Line(rate=self.rate))
        line = await self.stack.enter_async_context(proxy)
        self.sites[name] = Site(Relay(running.url, running.port, location), line, stop)
        return self.sites[name]

    async def cascade(self, upstreams: Mapping[str, str], *, failed: OnFailed | None = None) -> Cascaded:
        clients = {}
        relays = []
        for name, upstream in upstreams.items():
            site = self.sites[name]
            url = f"http://127.0.0.1:{site.line.port}"
            clients[name] = await self.stack.enter_async_context(RelayClient(url, limits=CLIENT_LIMITS))
            relays.append(PlannedRelay(name, url, name, upstream=upstream))
        names = list(self.sites)
        for below in names:
            for above in names:
                if above != below and above in self._above(below, upstreams):
                    proxy = CountingProxy("127.0.0.1", self.sites[above].relay.port, down=Line(rate=self.rate))
                    self.between[f"{above} → {below}"] = await self.stack.enter_async_context(proxy)
        return await replicate_all(
            self.manifest,
            relays,
            clients,
            self._send,
            self._hear,
            failed=failed,
            patience=PATIENCE,
            source_url=self._url,
        )

    def _above(self, name: str, upstreams: Mapping[str, str]) -> list[str]:
        above = []
        while upstreams.get(name) and upstreams[name] not in above:
            name = upstreams[name]
            above.append(name)
        return above

    def _url(self, above: PlannedRelay, relay: PlannedRelay) -> str:
        line = f"{above.name} → {relay.name}"
        return self.sources.get(line) or f"http://127.0.0.1:{self.between[line].port}"

    async def _send(self, relay: PlannedRelay, client: RelayClient, progress: Progress) -> ReplicationResult:
        signature = await self.origin.signature(self.manifest)
        source = self.origin.depot.store.chunks
        return await replicate(self.manifest, signature, source, client, progress=progress, patience=PATIENCE)

    def _hear(self, relay: str, here: int, whole: int) -> None:
        self.heard.setdefault(relay, []).append((here, whole))

    async def check_holds(self, *names: str) -> None:
        for name in names:
            site = self.sites[name]
            async with site.relay.client() as client:
                pointer = await client.package(self.manifest.package.id, self.manifest.package.version)
                assert pointer.manifest == self.manifest.id
                assert pointer.signature == await self.origin.signature(self.manifest)
            reader = await open_reader(site.relay.store)
            for id in self.manifest.chunk_ids():
                await reader.get(id)
            await reader.close()

    def carried(self, *names: str) -> list[int]:
        """Bytes that left the origin to each."""
        return [self.sites[name].line.counts.up for name in names]


@pytest.fixture
async def country(tmp_path: Path) -> AsyncIterator[Country]:
    async with (
        depot_with(tmp_path / "origin", make_nupkg(tmp_path, FILES)) as origin,
        AsyncExitStack() as stack,
    ):
        yield Country(origin, stack, tmp_path)


def lines_of(done: Delivered) -> list[str]:
    return [line.line for line in done.lines]


async def test_in_a_chain_each_byte_leaves_the_origin_once(country: Country) -> None:
    for name in ("fra", "iad", "syd"):
        await country.site(name)
    # The order in which they are named does not count.
    done = await country.cascade({"syd": "iad", "fra": "", "iad": "fra"})
    assert (done.failed, done.replans) == ({}, ())
    assert [(one.relay, one.source) for one in done.delivered] == [("syd", "iad"), ("fra", ""), ("iad", "fra")]
    await country.check_holds("fra", "iad", "syd")
    egress = sum(country.carried("fra", "iad", "syd"))
    assert PACKAGE_BYTES < egress < 1.02 * PACKAGE_BYTES + SLACK
    for line in ("fra → iad", "iad → syd"):
        assert PACKAGE_BYTES < country.between[line].counts.down < 1.02 * PACKAGE_BYTES + SLACK
    by_name = {one.relay: one for one in done.delivered}
    assert lines_of(by_name["fra"]) == ["origin → fra"]
    assert lines_of(by_name["syd"]) == ["iad → syd"]
    assert all(PACKAGE_BYTES < one.payload_bytes < one.wire_bytes for one in done.delivered)
    assert {one.chunks_sent for one in done.delivered} == {len(country.manifest.chunks)}
    told = document_of(by_name["syd"])
    assert (told["relay"], told["name"], told["source"]) == (by_name["syd"].url, "syd", "iad")
    assert told["wire_bytes"] == told["lines"][0]["wire_bytes"] == told["payload_bytes"] + told["overhead_bytes"]
    assert sum(one["payload_bytes"] for one in told["encodings"]) == told["payload_bytes"]


@pytest.mark.long
async def test_in_a_tree_each_line_carries_the_package_once(country: Country) -> None:
    upstreams = {"hub": "", "fra": "hub", "iad": "hub", "syd": "iad"}
    for name in upstreams:
        await country.site(name)
    done = await country.cascade(upstreams)
    assert (done.failed, done.replans) == ({}, ())
    await country.check_holds(*upstreams)
    assert sum(country.carried(*upstreams)) < 1.02 * PACKAGE_BYTES + SLACK
    for line in ("hub → fra", "hub → iad", "iad → syd"):
        assert PACKAGE_BYTES < country.between[line].counts.down < 1.02 * PACKAGE_BYTES + SLACK
    assert country.between["hub → syd"].counts.total == 0


async def test_progress_of_each_relay_only_rises_and_ends_whole(country: Country) -> None:
    country.rate = 2_000_000
    for name in ("fra", "iad"):
        await country.site(name)
    await country.cascade({"fra": "", "iad": "fra"})
    whole = country.manifest.stream_size
    for name in ("fra", "iad"):
        told = [here for here, of in country.heard[name] if of == whole]
        assert len(told) == len(country.heard[name]), "every report names the whole"
        assert told == sorted(told)
        assert told[-1] == whole
        assert len(set(told)) > 2


async def test_again_moves_no_chunk(country: Country) -> None:
    for name in ("fra", "iad"):
        await country.site(name)
    await country.cascade({"fra": "", "iad": "fra"})
    again = await country.cascade({"fra": "", "iad": "fra"})
    assert [one.chunks_sent for one in again.delivered] == [0, 0]
    assert all(one.wire_bytes < SLACK for one in again.delivered)


async def test_a_relay_that_dies_in_the_middle_is_passed_by(country: Country) -> None:
    country.rate = 2_000_000
    for name in ("fra", "iad", "syd"):
        await country.site(name)
    cascading = asyncio.create_task(country.cascade({"fra": "", "iad": "fra", "syd": "iad"}))
    async with asyncio.timeout(20):
        while "iad → syd" not in country.between:
            await asyncio.sleep(0.01)
    await country.between["iad → syd"].wait_for(PACKAGE_BYTES // 3, direction="down")
    assert not cascading.done()
    # Nobody reaches it any more: neither the origin, nor who fetches from it. It reaches fra no more, either.
    for line in (country.sites["iad"].line, country.between["iad → syd"], country.between["fra → iad"]):
        await line.cut()
    done = await cascading
    assert list(done.failed) == ["iad"]
    assert isinstance(done.failed["iad"], UnreachableError)
    assert [(replan.relay, replan.left, replan.taken) for replan in done.replans] == [("syd", "iad", "fra")]
    assert [(one.relay, one.source) for one in done.delivered] == [("fra", ""), ("syd", "fra")]
    await country.check_holds("fra", "syd")
    syd = done.delivered[1]
    assert lines_of(syd) == ["iad → syd", "fra → syd"]
    # What had come stayed: the rest alone was fetched again.
    assert country.between["fra → syd"].counts.down < 0.85 * PACKAGE_BYTES
    assert sum(country.carried("fra", "iad", "syd")) < 1.02 * PACKAGE_BYTES + SLACK
    told = [here for here, _ in country.heard["syd"]]
    assert told == sorted(told)


async def test_when_the_only_relay_above_dies_the_origin_sends_the_rest(country: Country) -> None:
    country.rate = 2_000_000
    for name in ("fra", "iad"):
        await country.site(name)
    cascading = asyncio.create_task(country.cascade({"fra": "", "iad": "fra"}))
    async with asyncio.timeout(20):
        while "fra → iad" not in country.between:
            await asyncio.sleep(0.01)
    await country.between["fra → iad"].wait_for(PACKAGE_BYTES // 3, direction="down")
    for line in (country.sites["fra"].line, country.between["fra → iad"]):
        await line.cut()
    done = await cascading
    assert list(done.failed) == ["fra"]
    assert [(replan.relay, replan.left, replan.taken) for replan in done.replans] == [("iad", "fra", "")]
    assert lines_of(done.delivered[0]) == ["fra → iad", "origin → iad"]
    await country.check_holds("iad")
    assert country.carried("iad")[0] < 0.85 * PACKAGE_BYTES


async def test_a_relay_that_is_not_there_is_passed_by_before_anything_moves(country: Country) -> None:
    for name in ("fra", "iad"):
        await country.site(name)
    await country.sites["fra"].line.cut()
    done = await country.cascade({"fra": "", "iad": "fra"})
    assert list(done.failed) == ["fra"]
    assert [(replan.relay, replan.taken) for replan in done.replans] == [("iad", "")]
    await country.check_holds("iad")


@pytest.mark.long
async def test_a_relay_that_lies_is_left_for_the_one_above_it(country: Country) -> None:
    for name in ("fra", "iad", "syd"):
        await country.site(name)
    lied = 0

    async def pass_on(request: web.Request) -> web.Response:
        nonlocal lied
        url = country.sites["iad"].relay.url + request.path_qs
        async with (
            ClientSession() as session,
            session.request(
                request.method, url, data=await request.read(), headers={"Content-Type": request.content_type}
            ) as answer,
        ):
            body = bytearray(await answer.read())
            if request.path == "/v1/bundle":
                lied += 1
                body[len(body) // 2] ^= 1
            return web.Response(status=answer.status, body=bytes(body), content_type=answer.content_type)

    async with small_server([web.route("*", "/{tail:.*}", pass_on)]) as liar:
        country.sources["iad → syd"] = liar
        done = await country.cascade({"fra": "", "iad": "fra", "syd": "iad"})
    assert lied == 1
    assert done.failed == {}
    [replan] = done.replans
    assert (replan.relay, replan.left, replan.taken) == ("syd", "iad", "fra")
    assert "untrusted" in replan.reason or "digest_mismatch" in replan.reason
    await country.check_holds("fra", "iad", "syd")
    assert sum(country.carried("fra", "iad", "syd")) < 1.02 * PACKAGE_BYTES + SLACK


async def test_a_relay_that_may_not_fetch_from_the_one_above_gets_it_from_the_origin(country: Country) -> None:
    for name in ("fra", "iad"):
        await country.site(name)
    country.sources["fra → iad"] = "http://relay.fra.example:7443"
    done = await country.cascade({"fra": "", "iad": "fra"})
    assert done.failed == {}
    [replan] = done.replans
    assert (replan.relay, replan.left, replan.taken) == ("iad", "fra", "")
    assert "may not fetch from there" in replan.reason
    await country.check_holds("fra", "iad")


async def test_a_relay_without_room_fails_alone(country: Country) -> None:
    await country.site("fra")
    await country.site("iad", free_floor=1 << 60)
    await country.site("syd")
    done = await country.cascade({"fra": "", "iad": "fra", "syd": "iad"})
    assert list(done.failed) == ["iad"]
    assert "store_full" in done.failed["iad"].message
    assert [(replan.relay, replan.left, replan.taken) for replan in done.replans] == [("syd", "iad", "fra")]
    await country.check_holds("fra", "syd")


async def test_what_is_told_of_a_failed_relay_may_end_everything(country: Country) -> None:
    await country.site("fra")
    await country.site("iad", free_floor=1 << 60)

    async def failed(relay: str, error: WaystationError) -> None:
        assert relay == "iad"
        raise error

    with pytest.raises(WaystationError, match="store_full"):
        await country.cascade({"fra": "", "iad": "fra"}, failed=failed)


async def test_an_orchestrator_that_lost_a_relay_joins_what_it_does(country: Country) -> None:
    country.rate = 2_000_000
    for name in ("fra", "iad"):
        await country.site(name)
    cascading = asyncio.create_task(country.cascade({"fra": "", "iad": "fra"}))
    async with asyncio.timeout(20):
        while "fra → iad" not in country.between:
            await asyncio.sleep(0.01)
    await country.between["fra → iad"].wait_for(PACKAGE_BYTES // 3, direction="down")
    await country.sites["iad"].line.cut()
    await asyncio.sleep(0.3)
    country.sites["iad"].line.restore()
    done = await cascading
    assert (done.failed, done.replans) == ({}, ())
    assert done.delivered[1].interruptions == 1
    # Counted once, though it was heard of twice.
    assert done.delivered[1].chunks_sent == len(country.manifest.chunks)
    assert country.between["fra → iad"].counts.down < 1.02 * PACKAGE_BYTES + SLACK
    await country.check_holds("fra", "iad")


@pytest.mark.parametrize("upstreams", [{"fra": "fra"}, {"fra": "iad", "iad": "fra"}, {"fra": "nobody"}])
async def test_ways_that_lead_nowhere_are_refused(country: Country, upstreams: dict[str, str]) -> None:
    relays = [PlannedRelay(name, "http://x", name, upstream=upstream) for name, upstream in upstreams.items()]
    with pytest.raises(UsageError):
        await replicate_all(country.manifest, relays, {}, country._send, country._hear)
