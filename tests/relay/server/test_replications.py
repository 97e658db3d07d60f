"""A relay fetches a package from another one: by its own rules, once however many ask, and so that others may read on."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from harness.evil_front import EvilFront, way
from harness.origins import depot_with
from harness.packages import make_nupkg, noise
from harness.relays import CLIENT_LIMITS, RELAY_LIMITS, Relay, small_server, token

from benchmarks.lines.network import CountingProxy, Line
from relay.config import Peer, PeerToken, RelayConfig
from relay.encoding.codecs import DELTAS
from relay.errors import NotFoundError, UnreachableError, UsageError
from relay.package.manifest import Manifest, to_wire
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.protocol.connection import TokenRefusedError, UnknownPeerError
from relay.server.app import start
from relay.server.http.problems import HttpRefusal
from relay.server.peers import Peers
from relay.stores.open import open_reader

FILES = {f"lib/part{n}.dll": noise(n, 300_000) for n in range(8)} | {"lib/small.txt": b"small " * 3000}
PACKAGE_BYTES = 2_400_000
"""What crosses when all of it crosses once, about: most of it does not compress."""


@asynccontextmanager
async def relay_at(folder: Path, **config: object) -> AsyncIterator[Relay]:
    """A relay in this process, on loopback, with any configuration."""
    location = f"disk:{folder}"
    made = msgspec.convert({"listen": "127.0.0.1:0", "store": location} | config, RelayConfig)
    async with AsyncExitStack() as stack:
        running = await start(made, RELAY_LIMITS, stack)
        yield Relay(running.url, running.port, location)


@dataclass(frozen=True)
class Held:
    """A package in a depot that can be served as a relay's store."""

    manifest: Manifest
    signature: bytes
    depot: Path

    def request(self, source: str, rate: float = 0.0) -> messages.ReplicationRequest:
        package = self.manifest.package
        return messages.ReplicationRequest(
            id=str(package.id), version=str(package.version), manifest=self.manifest.id, source=source, rate=rate
        )


async def held_at(folder: Path, files: dict[str, bytes] | None = None, *, version: str = "1.0.0") -> Held:
    folder.mkdir(exist_ok=True)
    async with depot_with(folder, make_nupkg(folder, files or FILES, version=version)) as origin:
        manifest = origin.added[0].manifest
        return Held(manifest, await origin.signature(manifest), folder / "depot")


async def follow(client: RelayClient, request: messages.ReplicationRequest) -> list[messages.ReplicationProgress]:
    async with aclosing(client.replication(request)) as lines:
        return [progress async for progress in lines]


async def check_holds(relay: Relay, held: Held) -> None:
    """It lists the package with its signature, and every chunk is there and whole."""
    async with relay.client() as client:
        pointer = await client.package(held.manifest.package.id, held.manifest.package.version)
        assert (pointer.manifest, pointer.signature) == (held.manifest.id, held.signature)
    reader = await open_reader(relay.store)
    try:
        for id in held.manifest.chunk_ids():
            await reader.get(id)
    finally:
        await reader.close()


@pytest.fixture
async def held(tmp_path: Path) -> Held:
    return await held_at(tmp_path / "origin")


@pytest.fixture
async def source(held: Held) -> AsyncIterator[Relay]:
    async with relay_at(held.depot) as relay:
        yield relay


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[Relay]:
    async with relay_at(tmp_path / "relay") as relay:
        yield relay


# --- what it does


async def test_a_relay_fetches_what_it_lacks_and_lists_it(held: Held, source: Relay, relay: Relay) -> None:
    async with relay.client() as client:
        lines = await follow(client, held.request(source.url))
    last = lines[-1]
    assert (last.state, last.code) == ("done", "")
    assert last.bytes == last.whole == held.manifest.stream_size
    assert sum(encoded.stream_bytes for encoded in last.encodings) == held.manifest.stream_size
    assert sum(encoded.chunks for encoded in last.encodings) == len(held.manifest.chunks)
    payload = sum(encoded.payload_bytes for encoded in last.encodings)
    assert PACKAGE_BYTES < payload < last.wire_bytes < 1.02 * payload
    await check_holds(relay, held)


async def test_progress_only_rises_and_ends_once(held: Held, source: Relay, relay: Relay) -> None:
    async with CountingProxy("127.0.0.1", source.port, down=Line(rate=1_500_000)) as line, relay.client() as client:
        lines = await follow(client, held.request(f"http://127.0.0.1:{line.port}"))
    running = [progress for progress in lines if progress.state == "running" and progress.whole]
    assert len({progress.bytes for progress in running}) >= 2, "the line was not slow enough to see anything"
    for before, after in itertools.pairwise(lines):
        assert after.bytes >= before.bytes
        assert after.wire_bytes >= before.wire_bytes
        assert after.seconds >= before.seconds
    assert [progress.state for progress in lines].count("done") == 1


async def test_again_costs_no_chunk(held: Held, source: Relay, relay: Relay) -> None:
    async with relay.client() as client:
        await follow(client, held.request(source.url))
        again = (await follow(client, held.request(source.url)))[-1]
    assert (again.state, again.encodings) == ("done", ())
    assert again.wire_bytes < 20_000


async def test_a_second_request_joins_the_first(held: Held, source: Relay, relay: Relay) -> None:
    async with CountingProxy("127.0.0.1", source.port, down=Line(rate=3_000_000)) as line, relay.client() as client:
        request = held.request(f"http://127.0.0.1:{line.port}")
        first = asyncio.create_task(follow(client, request))
        await line.wait_for(PACKAGE_BYTES // 4, direction="down")
        joined = await follow(client, request)
        assert joined[0].bytes > 0, "it began anew"
        assert joined[-1].encodings == (await first)[-1].encodings
        assert line.counts.down < 1.05 * PACKAGE_BYTES + 50_000
    await check_holds(relay, held)


async def test_it_goes_on_when_nobody_listens_any_more(held: Held, source: Relay, relay: Relay) -> None:
    async with CountingProxy("127.0.0.1", source.port, down=Line(rate=3_000_000)) as line, relay.client() as client:
        request = held.request(f"http://127.0.0.1:{line.port}")
        watching = asyncio.create_task(follow(client, request))
        await line.wait_for(PACKAGE_BYTES // 4, direction="down")
        watching.cancel()
        await asyncio.wait([watching])
        await line.wait_for(PACKAGE_BYTES, direction="down")
        await asyncio.sleep(0.5)
        # Who comes back learns what was moved; the next one, that nothing was.
        last = (await follow(client, request))[-1]
        assert (last.state, last.bytes) == ("done", last.whole)
        assert sum(encoded.chunks for encoded in last.encodings) == len(held.manifest.chunks)
        assert (await follow(client, request))[-1].encodings == ()
        assert line.counts.down < 1.05 * PACKAGE_BYTES + 50_000
    await check_holds(relay, held)


async def test_another_source_takes_the_place_of_the_first(
    tmp_path: Path, held: Held, source: Relay, relay: Relay
) -> None:
    async with CountingProxy("127.0.0.1", source.port) as stuck, relay.client() as client:
        first = asyncio.create_task(follow(client, held.request(f"http://127.0.0.1:{stuck.port}")))
        await stuck.wait_for(500_000, direction="down")
        stuck.pause()
        assert (await follow(client, held.request(source.url)))[-1].state == "done"
        left = (await first)[-1]
        assert (left.state, left.code) == ("failed", "busy")
    await check_holds(relay, held)


async def test_a_limit_is_kept(held: Held, source: Relay, relay: Relay) -> None:
    async with relay.client() as client:
        last = (await follow(client, held.request(source.url, rate=2_000_000)))[-1]
    assert last.state == "done"
    # What lies in buffers when the first chunk is seen comes faster.
    assert last.seconds > (PACKAGE_BYTES - 1_500_000) / 2_000_000


async def test_a_limit_holds_for_all_that_is_fetched_from_one_place(tmp_path: Path, relay: Relay) -> None:
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(relay_at(tmp_path / "source"))
        above = await stack.enter_async_context(source.client())
        packages = []
        for n in range(2):
            files = {f"lib/part{m}.dll": noise(f"{n} {m}", 250_000) for m in range(8)}
            packages.append(await held_at(tmp_path / f"origin{n}", files, version=f"1.{n}.0"))
            origin = await stack.enter_async_context(relay_at(packages[n].depot))
            await follow(above, packages[n].request(origin.url))
        client = await stack.enter_async_context(relay.client())
        both = await asyncio.gather(*(follow(client, one.request(source.url, rate=2_000_000)) for one in packages))
    assert [lines[-1].state for lines in both] == ["done", "done"]
    assert max(lines[-1].seconds for lines in both) > (4_000_000 - 2_000_000) / 2_000_000


# --- a source that fails


async def test_a_cut_line_costs_what_was_in_flight(held: Held, source: Relay, relay: Relay) -> None:
    async with CountingProxy("127.0.0.1", source.port, down=Line(rate=6_000_000)) as line, relay.client() as client:
        following = asyncio.create_task(follow(client, held.request(f"http://127.0.0.1:{line.port}")))
        await line.wait_for(PACKAGE_BYTES // 2, direction="down")
        await line.cut()
        assert not following.done()
        line.restore()
        assert (await following)[-1].state == "done"
        assert PACKAGE_BYTES < line.counts.down < PACKAGE_BYTES + 1_000_000
    await check_holds(relay, held)


async def test_a_source_that_stays_away_fails_it_and_what_came_is_kept(held: Held, source: Relay, relay: Relay) -> None:
    async with relay.client() as client:
        async with CountingProxy("127.0.0.1", source.port, down=Line(rate=6_000_000)) as line:
            following = asyncio.create_task(follow(client, held.request(f"http://127.0.0.1:{line.port}")))
            await line.wait_for(PACKAGE_BYTES // 2, direction="down")
            await line.cut()
            failed = (await following)[-1]
        assert (failed.state, failed.code) == ("failed", "busy")
        assert failed.bytes > PACKAGE_BYTES // 4
        with pytest.raises(NotFoundError):
            await client.package(held.manifest.package.id, held.manifest.package.version)
        rest = (await follow(client, held.request(source.url)))[-1]
    assert rest.state == "done"
    assert sum(encoded.stream_bytes for encoded in rest.encodings) <= rest.whole - failed.bytes
    await check_holds(relay, held)


async def test_a_source_that_does_not_know_the_package_yet_is_asked_again(
    tmp_path: Path, held: Held, source: Relay, relay: Relay
) -> None:
    async with relay_at(tmp_path / "between") as between, relay.client() as client, between.client() as above:
        following = asyncio.create_task(follow(client, held.request(between.url)))
        await asyncio.sleep(0.8)
        assert not following.done()
        assert (await follow(above, held.request(source.url)))[-1].state == "done"
        assert (await following)[-1].state == "done"
    await check_holds(relay, held)


async def test_a_source_that_lies_is_not_asked_again(held: Held, source: Relay, relay: Relay) -> None:
    other = {name: noise(f"other {name}", len(data)) for name, data in FILES.items()}
    asked = 0

    async def manifest(request: web.Request) -> web.Response:
        document = messages.Document(to_wire(held.manifest.canonical, None), held.signature)
        return web.Response(body=msgspec.msgpack.encode(document), content_type=messages.DOCUMENT_TYPE)

    async def bundle(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        from relay.encoding.bundle import BundleWriter, Span, data_header

        writer, lie = BundleWriter(), other["lib/part0.dll"]
        run = (Span.of(held.manifest.id, (0,)),)
        header = data_header(run, "raw", lie[: held.manifest.chunks[0].size])
        body = writer.start() + writer.frame(header) + lie[: held.manifest.chunks[0].size] + writer.end()
        return web.Response(body=body, content_type=messages.BUNDLE_TYPE)

    routes = [web.get("/v1/manifests/{id}", manifest), web.post(messages.BUNDLE_OUT, bundle)]
    async with small_server(routes) as liar, relay.client() as client:
        failed = (await follow(client, held.request(liar)))[-1]
        assert (failed.state, failed.code) == ("failed", "digest_mismatch")
        assert asked == 1
        # Nothing of the lie was kept, and an honest source is as welcome as before.
        assert (await follow(client, held.request(source.url)))[-1].state == "done"
    await check_holds(relay, held)


async def test_a_manifest_of_another_package_is_refused(
    tmp_path: Path, held: Held, source: Relay, relay: Relay
) -> None:
    request = msgspec.structs.replace(held.request(source.url), version="1.0.1")
    async with relay.client() as client:
        failed = (await follow(client, request))[-1]
        assert (failed.state, failed.code) == ("failed", "untrusted")
        assert await client.packages() == []


async def test_a_version_with_other_bytes_is_a_conflict(tmp_path: Path, held: Held, source: Relay) -> None:
    other = await held_at(tmp_path / "other", {"lib/other.dll": noise("other", 100_000)})
    async with relay_at(other.depot) as relay, relay.client() as client:
        failed = (await follow(client, held.request(source.url)))[-1]
    assert (failed.state, failed.code) == ("failed", "conflict")


async def test_a_full_disk_is_its_own_fault(tmp_path: Path, held: Held, source: Relay) -> None:
    async with relay_at(tmp_path / "full", free_floor=1 << 60) as relay, relay.client() as client:
        failed = (await follow(client, held.request(source.url)))[-1]
    assert (failed.state, failed.code) == ("failed", "store_full")


# --- stopping


async def test_a_relay_that_is_stopped_keeps_what_came(tmp_path: Path, held: Held, source: Relay) -> None:
    async with CountingProxy("127.0.0.1", source.port, down=Line(rate=2_000_000)) as line:
        request = held.request(f"http://127.0.0.1:{line.port}")
        async with AsyncExitStack() as stack:
            async with relay_at(tmp_path / "relay") as relay:
                client = await stack.enter_async_context(relay.client())
                following = asyncio.create_task(follow(client, request))
                await line.wait_for(PACKAGE_BYTES // 2, direction="down")
            with pytest.raises(UnreachableError, match="broke off in the middle"):
                await following
        carried = line.counts.down
        line.shape()
        async with relay_at(tmp_path / "relay") as relay, relay.client() as client:
            rest = (await follow(client, request))[-1]
            assert rest.state == "done"
            assert line.counts.down - carried < PACKAGE_BYTES - carried + 1_000_000
            await check_holds(relay, held)


async def test_only_so_many_are_fetched_at_a_time(tmp_path: Path, relay: Relay) -> None:
    from relay.server.replications import AT_ONCE

    packages = [
        await held_at(tmp_path / f"origin{n}", {"lib/a.dll": noise(f"a{n}", 800_000)}) for n in range(AT_ONCE + 1)
    ]
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(relay.client())
        lines = []
        for package in packages:
            above = await stack.enter_async_context(relay_at(package.depot))
            lines.append(
                await stack.enter_async_context(CountingProxy("127.0.0.1", above.port, down=Line(rate=500_000)))
            )
        following = [
            asyncio.create_task(follow(client, package.request(f"http://127.0.0.1:{line.port}")))
            for package, line in zip(packages[:-1], lines[:-1], strict=True)
        ]
        for line in lines[:-1]:
            await line.wait_for(50_000, direction="down")
        last = await follow(client, packages[-1].request(f"http://127.0.0.1:{lines[-1].port}"))
        assert last[0].state == "waiting"
        # They are all of one id and version: only the first that ends can be listed.
        ended = [(await one)[-1] for one in following] + [last[-1]]
        assert sorted({progress.state for progress in ended}) == ["done", "failed"]


# --- what it holds already


def library(version: int) -> dict[str, bytes]:
    """Parts as builds of code have them: much alike from one version to the next."""
    parts = {}
    for number in range(6):
        block = bytearray(noise(f"library {number}", 250_000))
        for at in range(0, len(block), 5000):
            block[at : at + 4] = version.to_bytes(4, "little")
        parts[f"lib/part{number}.dll"] = bytes(block)
    return parts


async def test_what_it_holds_of_another_version_need_not_cross(tmp_path: Path) -> None:
    old = await held_at(tmp_path / "old", library(1))
    new = await held_at(tmp_path / "new", library(2), version="1.1.0")
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(relay_at(tmp_path / "source"))
        above = await stack.enter_async_context(source.client())
        for held in (old, new):
            origin = await stack.enter_async_context(relay_at(held.depot))
            assert (await follow(above, held.request(origin.url)))[-1].state == "done"
        relay = await stack.enter_async_context(relay_at(tmp_path / "relay"))
        client = await stack.enter_async_context(relay.client())
        assert (await follow(client, old.request(source.url)))[-1].state == "done"
        last = (await follow(client, new.request(source.url, rate=1_000_000)))[-1]
        assert (last.state, last.fallbacks) == ("done", 0)
        assert {encoded.encoding for encoded in last.encodings} & DELTAS
        assert last.wire_bytes < 0.1 * new.manifest.nupkg.size
        await check_holds(relay, new)


async def test_a_base_that_is_damaged_here_costs_a_plain_run(tmp_path: Path) -> None:
    old = await held_at(tmp_path / "old", library(1))
    new = await held_at(tmp_path / "new", library(2), version="1.1.0")
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(relay_at(tmp_path / "source"))
        above = await stack.enter_async_context(source.client())
        for held in (old, new):
            origin = await stack.enter_async_context(relay_at(held.depot))
            assert (await follow(above, held.request(origin.url)))[-1].state == "done"
        relay = await stack.enter_async_context(relay_at(tmp_path / "relay"))
        client = await stack.enter_async_context(relay.client())
        assert (await follow(client, old.request(source.url)))[-1].state == "done"
        for index in range(len(old.manifest.chunks)):
            id = old.manifest.chunk_id(index)
            (tmp_path / "relay" / "chunks" / id[:2] / id).write_bytes(b"damaged")
        last = (await follow(client, new.request(source.url, rate=1_000_000)))[-1]
        assert last.state == "done"
        assert last.fallbacks >= 1
        assert not {encoded.encoding for encoded in last.encodings} & DELTAS
        reader = await open_reader(relay.store)
        stack.push_async_callback(reader.close)
        for id in new.manifest.chunk_ids():
            await reader.get(id)


# --- cut-through


async def test_a_relay_below_gets_the_package_while_it_still_arrives_above(
    tmp_path: Path, held: Held, source: Relay
) -> None:
    async with AsyncExitStack() as stack:
        above = await stack.enter_async_context(relay_at(tmp_path / "above"))
        below = await stack.enter_async_context(relay_at(tmp_path / "below"))
        first = await stack.enter_async_context(CountingProxy("127.0.0.1", source.port, down=Line(rate=1_000_000)))
        second = await stack.enter_async_context(CountingProxy("127.0.0.1", above.port))
        one = await stack.enter_async_context(above.client())
        two = await stack.enter_async_context(below.client())
        following = asyncio.create_task(follow(one, held.request(f"http://127.0.0.1:{first.port}")))
        await first.wait_for(100_000, direction="down")
        lower = asyncio.create_task(follow(two, held.request(f"http://127.0.0.1:{second.port}")))
        await second.wait_for(PACKAGE_BYTES // 3, direction="down")
        assert not following.done(), "the package was whole above before it began to arrive below"
        assert [lines[-1].state for lines in await asyncio.gather(following, lower)] == ["done", "done"]
        assert first.counts.down < 1.05 * PACKAGE_BYTES + 50_000
        await check_holds(below, held)


# --- whom it asks


async def test_an_unknown_peer_is_refused_and_not_asked(held: Held, relay: Relay) -> None:
    async with relay.client() as client:
        for source in (
            "http://169.254.169.254",
            "http://relay.example:7443",
            "http://127.0.0.1.example:80",
            "http://[::ffff:10.0.0.1]:80",
            "file:///etc/passwd",
            "http://user:word@127.0.0.1:1",
            "http://127.0.0.1:1/path",
            "nonsense",
            "",
        ):
            with pytest.raises(UnknownPeerError):
                await follow(client, held.request(source))


def test_loopback_is_for_relays_on_loopback_only() -> None:
    assert Peers(RelayConfig(listen="127.0.0.1:0")).open("http://127.0.0.1:7")
    assert Peers(RelayConfig(listen="[::1]:0")).open("http://localhost:7")
    for listen in ("0.0.0.0:0", "10.0.0.5:0", "relay.example:0"):
        with pytest.raises(HttpRefusal) as caught:
            Peers(RelayConfig(listen=listen)).open("http://127.0.0.1:7")
        assert (caught.value.status, caught.value.code) == (403, "unknown_peer")


def test_a_peer_is_known_in_every_spelling_of_its_url() -> None:
    peers = Peers(RelayConfig(listen="0.0.0.0:0", peers=[Peer("https://Relay.FRA.example"), Peer("http://hub:80/")]))
    for source in ("https://relay.fra.example:443", "HTTPS://relay.fra.example/", "http://hub", "http://HUB:80"):
        assert peers.open(source)
    for source in ("http://relay.fra.example", "https://relay.fra.example:7443", "http://hub:81", "https://hub"):
        with pytest.raises(HttpRefusal):
            peers.open(source)


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (Peer("relay.example"), "is not a relay's URL"),
        (Peer("http://u:p@relay.example"), "carries no credentials"),
        (Peer("http://relay.example", PeerToken("/etc/token", "TOKEN")), "both or neither of file and env"),
        (Peer("http://relay.example", PeerToken()), "both or neither of file and env"),
        (Peer("https://relay.example", ca_file="/nowhere/ca.pem"), "cannot be used"),
    ],
)
def test_a_peer_that_cannot_be_is_refused_at_the_start(peer: Peer, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        Peers(RelayConfig(peers=[peer]))


async def test_a_peer_gets_its_token_and_nobody_else_does(
    tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, record = token("read")
    monkeypatch.setenv("FRA_TOKEN", text)
    async with relay_at(held.depot, tokens=[msgspec.to_builtins(record)]) as source:
        peers = [{"url": source.url, "token": {"env": "FRA_TOKEN"}}]
        async with relay_at(tmp_path / "known", peers=peers) as relay, relay.client() as client:
            assert (await follow(client, held.request(source.url)))[-1].state == "done"
        async with relay_at(tmp_path / "stranger") as relay, relay.client() as client:
            failed = (await follow(client, held.request(source.url)))[-1]
            assert (failed.state, failed.code) == ("failed", "refused")


async def test_who_may_only_read_cannot_make_it_fetch(tmp_path: Path, held: Held, source: Relay) -> None:
    text, record = token("read")
    async with (
        relay_at(tmp_path / "relay", tokens=[msgspec.to_builtins(record)]) as relay,
        RelayClient(relay.url, token=text, limits=CLIENT_LIMITS) as client,
    ):
        with pytest.raises(TokenRefusedError):
            await follow(client, held.request(source.url))


async def test_a_redirect_is_not_followed(held: Held, source: Relay, relay: Relay) -> None:
    asked = []

    async def away(request: web.Request) -> web.Response:
        asked.append(request.path)
        raise web.HTTPTemporaryRedirect(f"{source.url}{request.path_qs}")

    async with small_server([web.route("*", "/{tail:.*}", away)]) as elsewhere, relay.client() as client:
        failed = (await follow(client, held.request(elsewhere)))[-1]
    assert failed.state == "failed"
    assert len(asked) == 1


def test_a_parent_is_a_peer() -> None:
    peers = Peers(RelayConfig(listen="0.0.0.0:0", parent=Peer("https://hub.example:7443")))
    assert peers.open("https://hub.example:7443")
    with pytest.raises(HttpRefusal):
        peers.open("https://other.example:7443")


async def test_the_recipe_of_the_nupkg_comes_with_the_package(held: Held, source: Relay, relay: Relay) -> None:
    async with source.client() as above, relay.client() as client:
        recipe = await above.recipe(held.manifest)
        if recipe is None:
            pytest.skip("the depot made no recipe: that one goes on with a package is NOT tested")
        assert await client.recipe(held.manifest) is None
        assert (await follow(client, held.request(source.url)))[-1].state == "done"
        assert await client.recipe(held.manifest) == recipe


async def test_a_source_that_builds_on_what_was_never_offered_is_untrusted_and_the_next_one_brings_it(
    held: Held, source: Relay, relay: Relay
) -> None:
    front = EvilFront(source.port, way("a base that was never offered"))
    await front.start()
    async with relay.client() as client:
        lied = (await follow(client, held.request(front.url)))[-1]
        brought = (await follow(client, held.request(source.url)))[-1]
    await front.stop()

    assert front.played
    assert (lied.state, lied.code) == ("failed", "untrusted")
    assert "never offered" in lied.reason
    assert brought.state == "done"
    await check_holds(relay, held)
