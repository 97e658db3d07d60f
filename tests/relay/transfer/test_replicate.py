from __future__ import annotations

import asyncio
import contextlib
import shutil
from dataclasses import replace
from itertools import product

import msgspec
import pytest
from aiohttp import web
from harness.origins import depot_with
from harness.packages import cut_package, make_nupkg, noise
from harness.relays import CLIENT_LIMITS, running_relay, small_server, token
from harness.seed import SOAK
from harness.short_runs import shorten_runs

from benchmarks.lines.network import CountingProxy
from relay.encoding.bundle import Received
from relay.encoding.codecs import Coding
from relay.errors import (
    ChunkInvalid,
    ChunkMissing,
    ConflictError,
    NotFoundError,
    RefusedError,
    StoreError,
    UnknownLeaseError,
    UnreachableError,
    UntrustedError,
)
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.protocol.connection import LeaseLostError, TokenRefusedError
from relay.server.leases import Leases
from relay.stores.memory import MemoryChunks, MemoryDocuments
from relay.stores.open import open_store
from relay.support.rate_limit import Pacer
from relay.transfer import replicate as replicating
from relay.transfer import sender
from relay.transfer.encoder_pool import Payloads
from relay.transfer.link_history import CONNECTIONS_MAX, Lines
from relay.transfer.replicate import Shipping, plan, replicate
from relay.transfer.run_queue import RunQueue

PATIENCE = 60.0
FILES = {f"lib/{i:02}.dll": noise(i, 200_000 + i) for i in range(20)} | {"readme.txt": b"text " * 500}
CUT = cut_package(FILES)
MANIFEST = CUT.manifest
COUNT = len(MANIFEST.chunks)
NEXT = cut_package({**FILES, "lib/07.dll": noise("new", 190_000)}, version="1.0.1")
REBUILT = cut_package({**FILES, "lib/07.dll": noise("rebuilt", 190_000)})


@pytest.fixture(autouse=True)
def small_bundles(monkeypatch):
    """Several runs and bundles from a small package."""
    shorten_runs(monkeypatch, 500_000)
    monkeypatch.setattr(sender, "BUNDLE_PAYLOAD_MIN", 600_000)
    monkeypatch.setattr(sender, "BUNDLE_PAYLOAD", 600_000)


@pytest.fixture
async def relay(tmp_path):
    async with running_relay(tmp_path / "relay") as running:
        yield running


async def source_of(*cuts, store=None):
    store = store or MemoryChunks()
    for cut in cuts:
        await store.put_many(list(cut.chunks.values()))
    return store


async def bring(relay, cut=CUT, source=None, signature=b"envelope", progress=None, patience=60.0, **shipping):
    source = source or await source_of(cut)
    async with asyncio.timeout(PATIENCE), relay.client() as client:
        how = Shipping(**shipping)
        return await replicate(cut.manifest, signature, source, client, how, progress=progress, patience=patience)


async def whole(relay, cut=CUT):
    """The package as a reader gets it from the relay."""
    async with relay.client() as client:
        pointer = await client.package(cut.manifest.package.id, cut.manifest.package.version)
        assert pointer.manifest == cut.manifest.id
        events = [event async for event in client.stream(cut.manifest, list(cut.indexes))]
    data = b"".join(event.chunk.data for event in events if isinstance(event, Received))
    return data == cut.stream


# --- when all is well


async def test_a_package_is_at_the_relay_and_listed_when_it_ends(relay):
    done = await bring(relay)
    assert await whole(relay)
    assert (done.chunks, done.chunks_sent, done.interruptions) == (COUNT, COUNT, 0)
    assert done.package_bytes == MANIFEST.nupkg.size
    assert done.payload_bytes < done.wire_bytes < done.payload_bytes * 1.01 + 10_000
    assert done.relay == relay.url


async def test_again_sends_nothing(relay):
    await bring(relay)
    again = await bring(relay)
    assert (again.chunks_sent, again.payload_bytes) == (0, 0)
    assert again.wire_bytes < 2000


async def test_with_one_client_each_replication_counts_its_own_bytes(relay):
    source = await source_of(CUT)
    async with relay.client() as client:
        first = await replicate(MANIFEST, b"", source, client)
        second = await replicate(MANIFEST, b"", source, client)
    assert first.wire_bytes > first.payload_bytes
    assert second.wire_bytes < 2000


async def test_the_next_version_sends_only_the_chunks_that_changed(relay):
    await bring(relay)
    fresh = {NEXT.manifest.chunk_id(i) for i in NEXT.indexes} - set(MANIFEST.chunk_ids())
    done = await bring(relay, NEXT)
    assert done.chunks_sent == len(fresh) == 2  # the changed file, and the container's parts
    assert await whole(relay, NEXT)
    assert await whole(relay)


async def test_a_chunk_that_stands_twice_is_sent_once(relay):
    same = noise("same", 100_000)
    twice = cut_package({"a/x.dll": same, "b/x.dll": same, "c/x.dll": same})
    done = await bring(relay, twice)
    assert done.chunks_sent == len(twice.manifest.chunks) - 2
    assert await whole(relay, twice)


@pytest.mark.long
async def test_the_manifest_travels_as_a_difference_against_a_version_that_both_hold(relay, tmp_path):
    many = {f"content/{i}.txt": noise(i, 100) for i in range(500)} | {f"{i}.dll": noise(i, 66_000) for i in range(30)}
    old, new = cut_package(many), cut_package({**many, "content/7.txt": noise("x", 100)}, version="1.0.1")
    source = await source_of(old, new)
    await bring(relay, old, source)
    plainly = {"force": Coding.parse("zstd:3")}
    difference = await bring(relay, new, source, known=[NEXT.manifest, old.manifest], **plainly)
    async with running_relay(tmp_path / "other") as other:
        await bring(other, old, source)
        plain = await bring(other, new, source, **plainly)
    assert difference.payload_bytes == plain.payload_bytes
    assert difference.wire_bytes - difference.payload_bytes < (plain.wire_bytes - plain.payload_bytes) / 3


async def test_progress_starts_at_what_is_there_and_ends_at_the_whole(relay):
    told: list[tuple[int, int]] = []
    await bring(relay)
    await bring(relay, NEXT, progress=lambda there, all: told.append((there, all)))
    size = NEXT.manifest.stream_size
    assert [there for there, _ in told] == sorted(there for there, _ in told)
    assert 0 < told[0][0] < size
    assert told[-1] == (size, size)
    assert {all for _, all in told} == {size}


async def test_two_replications_of_one_package_at_the_same_time_both_end_well(relay):
    results = await asyncio.gather(bring(relay), bring(relay), bring(relay))
    assert all(done.interruptions == 0 for done in results)
    assert await whole(relay)


@pytest.mark.long
async def test_one_package_goes_to_several_relays_at_the_same_time(tmp_path):
    source = await source_of(CUT)
    async with contextlib.AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(running_relay(tmp_path / f"relay{i}")) for i in range(3)]
        await asyncio.gather(*(bring(each, CUT, source) for each in relays))
        for each in relays:
            assert await whole(each)


async def test_a_new_signature_reaches_a_relay_that_holds_the_package_and_no_chunk_does(relay):
    await bring(relay)
    done = await bring(relay, signature=b"another envelope")
    assert done.chunks_sent == 0
    async with relay.client() as client:
        assert (await client.manifest(MANIFEST.id)).signature == b"another envelope"


async def test_a_real_nupkg_goes_from_a_depot_to_a_relay(relay, tmp_path):
    nupkg = make_nupkg(tmp_path, FILES)
    async with depot_with(tmp_path / "origin", nupkg) as origin:
        manifest = origin.added[0].manifest
        async with relay.client() as client:
            await replicate(manifest, await origin.signature(manifest), origin.depot.store.chunks, client)
            events = [event async for event in client.stream(manifest, range(len(manifest.chunks)))]
    assert b"".join(e.chunk.data for e in events if isinstance(e, Received)) == CUT.stream


# --- deltas


def edited(data, every=4000):
    """`data` with one byte changed now and then, as rebuilt code is: nothing of it is the same chunk, all of it is like it."""
    changed = bytearray(data)
    for at in range(0, len(changed), every):
        changed[at] ^= 0x55
    return bytes(changed)


EDITED = cut_package({path: edited(data) for path, data in FILES.items()}, version="1.0.1")


def encodings_of(done):
    return {entry.encoding for entry in done.encodings}


async def test_a_new_version_goes_as_what_differs_from_the_one_that_the_relay_holds(relay):
    source = await source_of(CUT, EDITED)
    await bring(relay, CUT, source)
    done = await bring(relay, EDITED, source, known=[MANIFEST])
    assert encodings_of(done) <= {"hdiff", "zstd-prefix"}
    assert done.chunks_sent == len(EDITED.manifest.chunks)
    assert done.payload_bytes < EDITED.manifest.stream_size / 50
    assert sum(entry.payload_bytes for entry in done.encodings) == done.payload_bytes
    assert sum(entry.stream_bytes for entry in done.encodings) == EDITED.manifest.stream_size
    assert done.overhead_bytes == done.wire_bytes - done.payload_bytes
    assert await whole(relay, EDITED)


@pytest.mark.long
@pytest.mark.parametrize("encoding", ["raw", "zstd:1", "zstd:19", "zstd-prefix", "hdiff", "hdiff:3"])
async def test_any_encoding_can_be_forced_and_comes_out_right(relay, encoding):
    source = await source_of(CUT, EDITED)
    await bring(relay, CUT, source)
    done = await bring(relay, EDITED, source, known=[MANIFEST], force=Coding.parse(encoding))
    assert encodings_of(done) == {encoding.partition(":")[0]}
    assert await whole(relay, EDITED)


async def test_a_forced_delta_without_a_base_goes_as_zstd_and_says_so(relay):
    done = await bring(relay, force=Coding.parse("hdiff"), explains=True)
    assert encodings_of(done) == {"zstd"}
    assert "nothing to build on" in done.explained.note
    assert await whole(relay)


async def test_an_application_goes_as_references_to_libraries_that_the_relay_holds_as_packages(relay):
    """The library is gathered with others there, so that none of its chunks is one of the application's."""
    texts = {f"lib/{i:02}.txt": noise(i, 9_000) for i in range(60)}
    library = cut_package(texts, id="Acme.Library")
    application = cut_package({f"app/bin/{path[4:]}": data for path, data in texts.items()} | {"app/own.txt": b"own"})
    source = await source_of(library, application)
    await bring(relay, library, source)
    done = await bring(relay, application, source, others=[library.manifest])
    assert done.payload_bytes < application.manifest.stream_size / 100
    assert await whole(relay, application)


@pytest.mark.long
@pytest.mark.parametrize("force", [None, "hdiff", "zstd-prefix"])
async def test_a_base_that_goes_between_offer_and_bundle_costs_a_plain_run_and_nothing_else(relay, monkeypatch, force):
    source = await source_of(CUT, EDITED)
    await bring(relay, CUT, source)
    put, removed = RelayClient.put_bundle, []

    async def robbed(self, lease, body):
        if not removed:
            store = await open_store(relay.store)
            for id in MANIFEST.chunk_ids():
                removed.append(id)
                await store.chunks.remove(id)
            await store.close()
        return await put(self, lease, body)

    monkeypatch.setattr(RelayClient, "put_bundle", robbed)
    done = await bring(relay, EDITED, source, known=[MANIFEST], force=Coding.parse(force) if force else None)
    assert removed
    assert done.fallbacks >= 1
    assert "zstd" in encodings_of(done)
    assert done.interruptions == 0
    assert await whole(relay, EDITED)


@pytest.mark.long
async def test_what_two_relays_need_alike_is_read_and_encoded_once(tmp_path):
    class Counting(MemoryChunks):
        reads = 0

        async def get(self, id):
            self.reads += 1
            return await super().get(id)

    source = await source_of(CUT, store=Counting())
    payloads = Payloads(source)
    async with contextlib.AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(running_relay(tmp_path / f"relay{i}")) for i in range(3)]
        how = {"payloads": payloads, "force": Coding.parse("zstd:3")}
        await asyncio.gather(*(bring(each, CUT, source, **how) for each in relays))
        assert source.reads == COUNT
        for each in relays:
            assert await whole(each)
    await payloads.close()


async def test_a_limit_is_asked_before_each_byte(relay):
    class Spy(Pacer):
        taken = 0

        async def wait(self, size):
            self.taken += size
            return await super().wait(size)

    pacer = Spy(1e9)
    done = await bring(relay, pacer=pacer)
    assert done.payload_bytes < pacer.taken < done.payload_bytes + 10_000


# --- plans


async def test_a_plan_tells_every_encoding_and_sends_nothing(relay):
    source = await source_of(CUT, EDITED)
    await bring(relay, CUT, source)
    async with relay.client() as client:
        before = client.traffic.total
        explained = await plan(EDITED.manifest, source, client, Shipping(known=[MANIFEST]))
        assert client.traffic.total - before < 2000
        with pytest.raises(NotFoundError):
            await client.manifest(EDITED.manifest.id)
    assert explained.base == "1.0.0"
    assert explained.missing_bytes == EDITED.manifest.stream_size
    assert "never measured" in explained.goodput_from
    rows = {str(row.candidate.coding): row for row in explained.rows}
    assert {"raw", "zstd:3", "zstd:19", "zstd-prefix:3", "hdiff:19"} <= set(rows)
    assert rows["raw"].candidate.payload_bytes == EDITED.manifest.stream_size
    assert rows["raw"].candidate.exact
    assert rows["zstd-prefix:3"].candidate.exact
    assert not rows["hdiff:3"].candidate.exact
    assert {str(run.coding) for run in explained.runs} == {name for name, row in rows.items() if row.chosen}
    assert all(row.chosen != bool(row.why_not) for row in rows.values())


async def test_what_is_exact_in_a_plan_is_what_crosses(relay):
    source = await source_of(CUT)
    done = await bring(relay, CUT, source, force=Coding.parse("zstd:3"), explains=True)
    [exact] = [row for row in done.explained.rows if row.chosen]
    assert exact.candidate.exact
    assert done.payload_bytes == exact.candidate.payload_bytes


async def test_of_a_relay_that_has_it_all_a_plan_says_so(relay):
    source = await source_of(CUT)
    await bring(relay, CUT, source)
    async with relay.client() as client:
        explained = await plan(MANIFEST, source, client)
    assert (explained.encoding, explained.missing_chunks, explained.note) == ("", 0, "nothing is missing")


# --- what is remembered


async def questions(relay, cut, source, monkeypatch, **shipping):
    """How often the relay was asked what it lacks, and what came of the replication."""
    asked = []
    missing = RelayClient.missing

    async def counted(self, want, lease=None):
        asked.append(want)
        return await missing(self, want, lease)

    with monkeypatch.context() as patch:
        patch.setattr(RelayClient, "missing", counted)
        done = await bring(relay, cut, source, **shipping)
    return len(asked), done


async def test_a_line_is_remembered_and_the_next_version_offered_without_a_question(relay, monkeypatch):
    source, lines = await source_of(CUT, EDITED), Lines(MemoryDocuments())
    await bring(relay, CUT, source, lines=lines)
    assert (await lines.recall(relay.url)).goodput > 0
    how = {"lines": lines, "known": [MANIFEST], "force": Coding.parse("hdiff")}
    asked, done = await questions(relay, EDITED, source, monkeypatch, **how)
    assert asked == 0
    assert done.payload_bytes < EDITED.manifest.stream_size / 10
    assert await whole(relay, EDITED)


async def test_a_relay_that_lost_what_it_was_sent_is_asked(tmp_path, monkeypatch):
    source, lines = await source_of(CUT, EDITED), Lines(MemoryDocuments())
    async with running_relay(tmp_path / "first") as relay:
        await bring(relay, CUT, source, lines=lines)
        port = relay.port
    async with running_relay(tmp_path / "second", port=port) as relay:
        asked, done = await questions(relay, EDITED, source, monkeypatch, lines=lines, known=[MANIFEST])
        assert asked == 1
        assert encodings_of(done) <= {"zstd", "raw"}
        assert await whole(relay, EDITED)


async def test_manifest_and_headers_cost_48_bytes_a_changed_chunk_and_2_kib(relay, tmp_path):
    """Counted on the line itself, with the envelope of a real key."""
    old = make_nupkg(tmp_path, FILES)
    new = make_nupkg(tmp_path, {**FILES, "lib/07.dll": edited(FILES["lib/07.dll"])}, version="1.0.1")
    async with depot_with(tmp_path / "origin", old, new) as origin, CountingProxy("127.0.0.1", relay.port) as line:
        chunks, lines = origin.depot.store.chunks, Lines(origin.depot.store.documents)
        first, second = (added.manifest for added in origin.added)
        async with RelayClient(f"http://127.0.0.1:{line.port}", limits=CLIENT_LIMITS) as client:
            await replicate(first, await origin.signature(first), chunks, client, Shipping(lines=lines))
            before, how = line.counts.total, Shipping(lines=lines, known=[first])
            done = await replicate(second, await origin.signature(second), chunks, client, how)
            crossed = line.counts.total - before
            assert (await client.manifest(second.id)).signature == await origin.signature(second)
    changed = set(second.chunk_ids()) - set(first.chunk_ids())
    assert crossed - done.payload_bytes <= 48 * len(changed) + 2048
    assert done.wire_bytes <= crossed <= done.wire_bytes + 300


# --- what a rule refuses


async def test_other_bytes_under_a_listed_name_are_a_conflict_and_change_nothing(relay):
    await bring(relay)
    with pytest.raises(ConflictError):
        await bring(relay, REBUILT)
    assert await whole(relay)


async def test_of_two_builds_at_the_same_time_one_is_listed_and_the_other_refused(relay):
    results = await asyncio.gather(bring(relay), bring(relay, REBUILT), return_exceptions=True)
    assert sorted(isinstance(result, ConflictError) for result in results) == [False, True]
    assert await whole(relay, CUT if isinstance(results[1], ConflictError) else REBUILT)


async def test_without_the_right_token_nothing_is_tried_again(tmp_path):
    text, record = token("read")
    async with running_relay(tmp_path / "relay", tokens=[record]) as relay:
        for bearer in (None, text):
            async with relay.client(bearer) as client:
                with pytest.raises(TokenRefusedError):
                    await replicate(MANIFEST, b"", await source_of(CUT), client)


# --- what the source cannot give


async def test_a_chunk_that_the_depot_lost_is_told_as_such(relay):
    source = await source_of(CUT)
    await source.remove(MANIFEST.chunk_id(3))
    with pytest.raises(ChunkMissing) as caught:
        await bring(relay, CUT, source)
    assert caught.value.id == MANIFEST.chunk_id(3)


async def test_a_chunk_that_the_depot_damaged_is_told_as_such(relay):
    source = await source_of(CUT)
    id = MANIFEST.chunk_id(3)
    source.stored[id] = source.stored[id][:-1] + bytes([source.stored[id][-1] ^ 1])
    with pytest.raises(ChunkInvalid):
        await bring(relay, CUT, source)


async def test_a_depot_that_cannot_be_read_is_not_held_against_the_relay(relay):
    class Broken(MemoryChunks):
        reads = 0

        async def get(self, id):
            self.reads += 1
            raise StoreError("the depot's disk")

    source = await source_of(store=Broken())
    with pytest.raises(StoreError, match="the depot's disk"):
        await bring(relay, CUT, source)
    assert source.reads <= CONNECTIONS_MAX


# --- what comes in between


class Gate(MemoryChunks):
    """A depot that does something when a number of chunks has been read."""

    def __init__(self, after, action):
        super().__init__()
        self.reads = 0
        self._after = after
        self._action = action
        self.acting = None

    async def get(self, id):
        self.reads += 1
        if self.reads == self._after:
            # A task of its own: who reads for an upload is cancelled when the upload breaks off.
            self.acting = asyncio.create_task(self._action())
        if self.acting is not None and not self.acting.done():
            await asyncio.sleep(0.01)
        return await super().get(id)


@pytest.mark.long
async def test_a_relay_that_restarts_in_mid_transfer_gets_the_rest_and_little_twice(tmp_path):
    async with contextlib.AsyncExitStack() as outer:
        first = contextlib.AsyncExitStack()
        relay = await first.enter_async_context(running_relay(tmp_path / "relay"))

        async def restart():
            await first.aclose()
            await outer.enter_async_context(running_relay(tmp_path / "relay", port=relay.port))

        source = await source_of(CUT, store=Gate(COUNT // 2, restart))
        done = await bring(relay, CUT, source)
        await source.acting
        assert done.interruptions >= 1
        assert await whole(relay)
        # What was in flight may cross twice: each of the connections had one bundle.
        twice = done.payload_bytes - sum(MANIFEST.chunks[i].size for i in range(COUNT))
        assert twice < CONNECTIONS_MAX * (sender.BUNDLE_PAYLOAD + 500_000)


LOSSES = {
    "the base": lambda store: [store / "manifests" / MANIFEST.id],
    "what was offered": lambda store: [store / "manifests" / EDITED.manifest.id],
    "chunks and manifests": lambda store: [store / "chunks", store / "manifests"],
    "everything": lambda store: [store],
}


@pytest.mark.parametrize(
    ("loss", "at"),
    list(product(LOSSES, ["put_bundle", "publish"]))
    if SOAK
    else [("the base", "put_bundle"), ("everything", "publish")],
)
async def test_a_relay_that_comes_back_without_what_it_was_offered_is_offered_it_again(tmp_path, monkeypatch, loss, at):
    source = await source_of(CUT, EDITED)
    async with contextlib.AsyncExitStack() as outer:
        first = contextlib.AsyncExitStack()
        relay = await first.enter_async_context(running_relay(tmp_path / "relay"))
        await bring(relay, CUT, source)
        send, lost = getattr(RelayClient, at), []

        async def robbed(self, *words):
            if not lost:
                lost.extend(LOSSES[loss](tmp_path / "relay"))
                await first.aclose()
                for path in lost:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                await outer.enter_async_context(running_relay(tmp_path / "relay", port=relay.port))
            return await send(self, *words)

        monkeypatch.setattr(RelayClient, at, robbed)
        await bring(relay, EDITED, source, known=[MANIFEST], force=Coding.parse("hdiff"))
        assert lost
        assert await whole(relay, EDITED)


async def test_a_lease_that_is_lost_in_mid_transfer_is_taken_anew(relay, monkeypatch):
    lost = []
    use = Leases.use

    async def forgetful(self, id, also=()):
        if len(lost) < 2:
            lost.append(id)
            raise UnknownLeaseError
        return await use(self, id, also)

    monkeypatch.setattr(Leases, "use", forgetful)
    done = await bring(relay)
    assert len(lost) == 2
    assert done.interruptions >= 1
    assert await whole(relay)


async def test_a_lease_that_never_lives_ends_the_replication(relay, monkeypatch):
    tries = []

    async def never(self, id, also=()):
        tries.append(id)
        raise UnknownLeaseError

    monkeypatch.setattr(Leases, "use", never)
    with pytest.raises(LeaseLostError):
        await bring(relay)
    assert len(tries) <= (replicating.PERSISTENCE.failures + 1) * CONNECTIONS_MAX


async def test_a_chunk_that_vanishes_before_publishing_is_sent_again(relay, tmp_path):
    """Another process swept it, say: the relay's answer to the publish says so."""
    publish = RelayClient.publish
    removed = []

    async def robbed(self, manifest):
        if not removed:
            removed.append(manifest.chunk_id(5))
            store = await open_store(relay.store)
            await store.chunks.remove(manifest.chunk_id(5))
            await store.close()
        await publish(self, manifest)

    await bring(relay, NEXT)
    source = await source_of(CUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RelayClient, "publish", robbed)
        done = await bring(relay, CUT, source)
    assert removed
    assert done.chunks_sent >= 1
    assert await whole(relay)


async def test_a_relay_that_does_not_come_back_is_unreachable_after_our_patience(tmp_path):
    async with contextlib.AsyncExitStack() as stack:
        relay = await stack.enter_async_context(running_relay(tmp_path / "relay"))
        source = await source_of(CUT, store=Gate(COUNT // 2, stack.aclose))
        with pytest.raises(UnreachableError):
            await bring(relay, CUT, source, patience=0.5)
        await source.acting


async def test_a_relay_that_nobody_started_is_unreachable():
    async with RelayClient("http://127.0.0.1:1", limits=replace(CLIENT_LIMITS, attempts=1)) as client:
        with pytest.raises(UnreachableError):
            await replicate(MANIFEST, b"", await source_of(CUT), client, patience=0.2)


# --- relays that take and do not keep


class BadRelay:
    """Takes offers and bundles, and answers as it is told."""

    def __init__(self, bundle_status=200, missing=((0, COUNT),), refused=(), retry_after="0"):
        self.bundles = self.offers = 0
        self.bytes = 0
        self._status = bundle_status
        self._missing = missing
        self._refused = refused
        self._retry_after = retry_after

    def routes(self):
        return [
            web.get(messages.HEALTH, self.health),
            web.get("/v1/packages", self.nothing),
            web.get("/v1/packages/{id}", self.nothing),
            web.get("/v1/packages/{id}/{version}", self.not_found),
            web.post(messages.MISSING, self.unknown),
            web.put("/v1/manifests/{name}", self.offer),
            web.put(messages.BUNDLE_IN, self.bundle),
            web.put("/v1/packages/{id}/{version}", self.publish),
        ]

    async def health(self, request):
        return self._json(messages.HealthAnswer(status="ok", versions=(1,), time=0.0))

    async def unknown(self, request):
        asked = msgspec.json.decode(await request.read(), type=messages.MissingRequest).want
        return self._json(messages.MissingAnswer(asked, tuple(want.manifest for want in asked)))

    async def nothing(self, request):
        return self._json(messages.PackagesAnswer(()))

    async def not_found(self, request):
        return web.Response(status=404)

    async def offer(self, request):
        await request.read()
        self.offers += 1
        return self._json(messages.OfferAnswer("0" * 32, 3600.0, self._missing))

    async def bundle(self, request):
        self.bundles += 1
        self.bytes += len(await request.read())
        if self._status != 200:
            return web.Response(status=self._status, headers={"Retry-After": self._retry_after})
        return self._json(messages.BundleAnswer(1, 0, self._refused))

    async def publish(self, request):
        await request.read()
        answer = {"code": "missing_chunks", "missing": [[0, 1]]}
        return web.Response(status=409, body=msgspec.json.encode(answer))

    def _json(self, answer):
        return web.Response(body=msgspec.json.encode(answer), content_type=messages.JSON)


@contextlib.asynccontextmanager
async def bad(**how):
    made = BadRelay(**how)
    async with small_server(made.routes()) as url, RelayClient(url, limits=CLIENT_LIMITS) as client:
        async with asyncio.timeout(PATIENCE):
            yield made, client


@pytest.mark.parametrize("status", [507, 500, 503])
async def test_a_relay_that_takes_bundles_and_keeps_nothing_is_given_up(status):
    """A full disk, say: what was sent is no progress, what the relay says it lacks is."""
    async with bad(bundle_status=status) as (relay, client):
        with pytest.raises(UnreachableError):
            await replicate(MANIFEST, b"", await source_of(CUT), client, patience=2.0)
    assert replicating.PERSISTENCE.failures < relay.offers <= replicating.PERSISTENCE.failures + 4
    assert relay.bytes <= relay.offers * CONNECTIONS_MAX * (MANIFEST.stream_size + 10_000)


async def test_a_relay_that_says_it_stored_but_lacks_the_same_again_is_refused():
    async with bad() as (relay, client):
        with pytest.raises(RefusedError, match="does not keep"):
            await replicate(MANIFEST, b"", await source_of(CUT), client)
    assert relay.bytes <= MANIFEST.stream_size + 10_000


async def test_chunks_that_the_relay_refuses_end_the_replication_with_its_reason():
    refused = (messages.RefusedRun(MANIFEST.id, ((0, 2),), "wrong_bytes"),)
    async with bad(refused=refused) as (_, client):
        with pytest.raises(RefusedError, match=r"2 chunks of Acme\.Web 1\.0\.0: wrong_bytes"):
            await replicate(MANIFEST, b"", await source_of(CUT), client)


@pytest.mark.parametrize(
    "refused", [messages.RefusedRun(MANIFEST.id, ((0, 10**12),), "x"), messages.RefusedRun("0" * 64, ((0, 1),), "x")]
)
async def test_a_relay_that_refuses_what_was_never_sent_is_not_believed(refused):
    async with bad(refused=(refused,)) as (_, client):
        with pytest.raises(UntrustedError):
            await replicate(MANIFEST, b"", await source_of(CUT), client)


async def test_a_relay_that_lacks_what_does_not_exist_is_not_believed():
    async with bad(missing=((0, 10**12),)) as (relay, client):
        with pytest.raises(Exception, match="does not lie in"):
            await replicate(MANIFEST, b"", await source_of(CUT), client)
    assert relay.bundles == 0


async def test_a_run_that_is_put_back_when_the_others_have_ended_goes_all_the_same(relay, monkeypatch):
    """Connections find nothing left while one holds the last run; it puts that back, and is one too many for the line."""
    take, put_back = RunQueue.next, []

    async def next_run(self):
        ahead = await take(self)
        if ahead is not None and not self.has_more and len(put_back) < CONNECTIONS_MAX:
            put_back.append(ahead)
            self.put_back(ahead)
            return None
        return ahead

    monkeypatch.setattr(RunQueue, "next", next_run)
    result = await bring(relay)
    assert put_back, "no run was put back"
    assert result.chunks_sent == COUNT
