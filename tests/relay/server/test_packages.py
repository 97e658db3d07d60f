from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace

import pytest
from harness.packages import cut_package, encode_run, noise
from harness.process import eventually
from xxhash import xxh3_64_intdigest

from relay.encoding import bundle as bundles
from relay.encoding.bundle import (
    BundleDecoder,
    BundleWriter,
    Data,
    Missing,
    More,
    NotSent,
    Received,
    Span,
    Whole,
    data_header,
)
from relay.errors import (
    ChunkMissing,
    ConflictError,
    FrameError,
    ManifestError,
    StoreError,
    UnknownLeaseError,
    UnreachableError,
    UntrustedError,
)
from relay.package import manifest as manifests
from relay.package.chunk import CHUNK_MAX
from relay.package.identity import chunk_id
from relay.package.ranges import from_indexes, indexes
from relay.protocol import messages
from relay.protocol.connection import MissingChunksError
from relay.server import packages as transferring
from relay.server.packages import Transfer, UnknownManifestError
from relay.stores.catalog import Catalog
from relay.stores.memory import MemoryChunks
from relay.stores.open import Store, open_store
from relay.support.zstd import zstd

PATIENCE = 20.0
CUT = cut_package({f"lib/{i}.dll": noise(i, 70_000 + i) for i in range(8)} | {"readme.txt": b"text " * 500})
MANIFEST = CUT.manifest
COUNT = len(MANIFEST.chunks)
NEXT = cut_package({f"lib/{i}.dll": noise(i, 70_000 + i) for i in range(7)} | {"new.txt": b"new"}, version="1.0.1")
REBUILT = cut_package({"lib/0.dll": noise("other", 70_000)})


class Faulty(MemoryChunks):
    """A store whose writing can be told to fail, and counts what it wrote."""

    error = None
    after = 0
    written = 0

    async def put_many(self, chunks):
        await asyncio.sleep(0)
        if self.error and self.written >= self.after:
            raise self.error
        await super().put_many(chunks)
        self.written += len(chunks)


@pytest.fixture
async def store():
    made = await open_store("memory:")
    return replace(made, chunks=Faulty())


@pytest.fixture
async def transfer(store):
    made = Transfer(store, arriving_seconds=0.05)
    await made.load()
    return made


def document(cut=CUT, signature=b"envelope", base=None):
    return messages.Document(manifests.to_wire(cut.manifest.canonical, base), signature)


async def offered(transfer, cut=CUT):
    return await transfer.offer(cut.manifest.id, document(cut), None)


def run_of(places, cut=CUT):
    encoding, payload = encode_run([cut.chunk(i).data for i in places], "zstd")
    return data_header((Span.of(cut.manifest.id, places),), encoding, payload), payload


def bundle(*parts) -> bytes:
    writer = BundleWriter()
    made = [writer.start()]
    for part in parts:
        head, payload = part if isinstance(part, tuple) else (part, b"")
        made += [writer.frame(head), payload]
    return b"".join([*made, writer.end()])


async def body(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        await asyncio.sleep(0)
        yield piece


async def send(transfer, lease, places: Iterable[int] = range(COUNT), cut=CUT):
    return await transfer.take_bundle(lease, body(bundle(run_of(list(places), cut))))


async def publish(transfer, cut=CUT):
    return await transfer.publish(cut.manifest.package, messages.PublishRequest(manifest=cut.manifest.id))


async def take(transfer, places=range(COUNT), cut=CUT):
    """What a reader who asks for `places` gets: indexes, what is not sent, and whether the bundle was whole."""
    request = messages.BundleRequest(
        want=(messages.ChunkRanges(manifest=cut.manifest.id, ranges=from_indexes(places)),)
    )
    decoder = BundleDecoder({cut.manifest.id: cut.manifest}.get)
    events = []
    async with asyncio.timeout(PATIENCE):
        async for piece in transfer.give(await transfer.wanted(request)):
            for batch in decoder.feed(piece):
                events += batch
    decoder.finish()
    assert isinstance(events[-1], Whole)
    sent = [event.index for event in events if isinstance(event, Received)]
    return sent, {e.reason: [index for _, index in e.run] for e in events if isinstance(e, NotSent)}


# --- offering


async def test_an_offer_keeps_the_manifest_unlisted_and_names_what_is_missing(transfer):
    answer = await offered(transfer)
    assert list(indexes(answer.missing)) == list(range(COUNT))
    assert answer.expires_in == messages.LEASE_SECONDS
    assert transfer.catalog.all() == []
    assert (await transfer.document(MANIFEST.id, None))[0].signature == b"envelope"


async def test_an_offer_again_names_only_what_is_still_missing(transfer):
    lease = (await offered(transfer)).lease
    await send(transfer, lease, [1, 2, 5])
    assert list(indexes((await offered(transfer)).missing)) == [i for i in range(COUNT) if i not in {1, 2, 5}]


async def test_what_another_package_brought_is_not_missing(transfer):
    await send(transfer, (await offered(transfer)).lease)
    missing = (await offered(transfer, NEXT)).missing
    shared = {NEXT.manifest.chunk_id(i) for i in NEXT.indexes} & set(MANIFEST.chunk_ids())
    assert len(shared) == 7
    assert {NEXT.manifest.chunk_id(i) for i in indexes(missing)} == set(NEXT.manifest.chunk_ids()) - shared


async def test_a_chunk_that_stands_twice_is_missing_once(transfer):
    same = noise("same", 70_000)
    twice = cut_package({"a/x.dll": same, "b/x.dll": same})
    answer = await offered(transfer, twice)
    missing = [twice.manifest.chunk_id(i) for i in indexes(answer.missing)]
    assert len(missing) == len(set(missing)) == len(twice.manifest.chunks) - 1
    await send(transfer, answer.lease, indexes(answer.missing), twice)
    await publish(transfer, twice)
    sent, left = await take(transfer, twice.indexes, twice)
    assert (sent, left) == (list(twice.indexes), {})


async def test_a_manifest_under_another_name_is_refused(transfer):
    with pytest.raises(ManifestError):
        await transfer.offer(NEXT.manifest.id, document(), None)
    assert await transfer.catalog.manifest(NEXT.manifest.id) is None


@pytest.mark.parametrize("junk", [b"", b"junk", b"\x28\xb5\x2f\xfd", bundles.MAGIC])
async def test_an_offer_that_is_no_manifest_is_refused(transfer, junk):
    with pytest.raises(ManifestError):
        await transfer.offer(MANIFEST.id, messages.Document(junk), None)


async def test_an_offer_as_a_difference_needs_its_base_here(transfer):
    against = document(NEXT, base=MANIFEST.canonical)
    with pytest.raises(UnknownManifestError):
        await transfer.offer(NEXT.manifest.id, against, MANIFEST.id)
    await offered(transfer)
    await transfer.offer(NEXT.manifest.id, against, MANIFEST.id)
    assert (await transfer.catalog.manifest(NEXT.manifest.id)).canonical == NEXT.manifest.canonical


async def test_other_bytes_under_a_published_name_are_refused_with_the_offer_already(transfer):
    await send(transfer, (await offered(transfer)).lease)
    await publish(transfer)
    with pytest.raises(ConflictError):
        await offered(transfer, REBUILT)
    assert await transfer.catalog.manifest(REBUILT.manifest.id) is None


# --- sending


async def test_a_bundle_is_stored_and_told_of(transfer, store):
    lease = (await offered(transfer)).lease
    answer = await send(transfer, lease)
    assert (answer.stored, answer.held, answer.refused) == (COUNT, 0, ())
    assert await store.chunks.has_many(MANIFEST.chunk_ids()) == set(MANIFEST.chunk_ids())


async def test_what_is_here_already_is_held_and_not_written_again(transfer, store):
    lease = (await offered(transfer)).lease
    await send(transfer, lease, [0, 1])
    answer = await send(transfer, lease, [0, 1, 2])
    assert (answer.stored, answer.held) == (1, 2)
    assert store.chunks.written == 3


async def test_without_a_living_lease_nothing_is_taken(transfer, store):
    with pytest.raises(UnknownLeaseError):
        await send(transfer, "0" * 32)
    assert store.chunks.written == 0


async def test_a_bundle_speaks_of_the_leases_manifests_only(transfer, store):
    await offered(transfer)
    other = (await offered(transfer, NEXT)).lease
    with pytest.raises(FrameError, match="not known here"):
        await send(transfer, other)
    assert store.chunks.written == 0


@pytest.mark.parametrize("encoding", ["raw", "zstd"])
async def test_a_payload_that_goes_on_behind_its_last_chunk_costs_that_chunk_its_word(transfer, store, encoding):
    lease = (await offered(transfer)).lease
    head, _ = run_of([0, 1])
    payload = CUT.chunk(0).data + CUT.chunk(1).data
    payload = payload if encoding == "raw" else zstd.compress(payload)
    too_many = [
        (Data(head.run, (), encoding, len(payload), xxh3_64_intdigest(payload), more=True), payload),
        (More(1, xxh3_64_intdigest(b"!")), b"!"),
    ]
    answer = await transfer.take_bundle(lease, body(bundle(*too_many, run_of([2]))))
    assert answer.stored == 3
    assert answer.refused == (messages.RefusedRun(MANIFEST.id, ((1, 2),), "bad_frame"),)


async def test_wrong_bytes_are_refused_by_name_and_the_rest_is_kept(transfer, store):
    lease = (await offered(transfer)).lease
    head, _ = run_of([1])
    lie = encode_run([CUT.chunk(0).data], "raw")[1][: MANIFEST.chunks[1].size].ljust(MANIFEST.chunks[1].size, b"!")
    liar = (Data(head.run, (), "raw", len(lie), 0), lie)
    answer = await transfer.take_bundle(lease, body(bundle(run_of([0]), liar, run_of([2]))))
    assert answer.stored == 2
    assert answer.refused == (messages.RefusedRun(MANIFEST.id, ((1, 2),), "wrong_bytes"),)
    assert await store.chunks.has_many([MANIFEST.chunk_id(i) for i in (0, 1, 2)]) == {
        MANIFEST.chunk_id(0),
        MANIFEST.chunk_id(2),
    }


async def test_a_bundle_that_breaks_off_keeps_what_was_verified(transfer, store):
    lease = (await offered(transfer)).lease
    whole = bundle(run_of([0]), run_of([1]), run_of([2]))
    with pytest.raises(FrameError, match="cut off"):
        await transfer.take_bundle(lease, body(whole[:160_000]))
    assert await store.chunks.has_many(MANIFEST.chunk_ids()) == {MANIFEST.chunk_id(0), MANIFEST.chunk_id(1)}


async def test_a_sender_whose_line_breaks_has_sent_what_was_verified(transfer, store):
    lease = (await offered(transfer)).lease

    async def broken():
        yield bundle(run_of([0]), run_of([1]))[:100_000]
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await transfer.take_bundle(lease, broken())
    assert await store.chunks.has_many(MANIFEST.chunk_ids()) == {MANIFEST.chunk_id(0)}


async def test_a_sender_that_is_cut_off_in_mid_body_has_sent_what_was_verified(transfer, store):
    lease = (await offered(transfer)).lease
    reached = asyncio.Event()

    async def hanging():
        yield bundle(run_of([0]), run_of([1]))[:100_000]
        reached.set()
        await asyncio.sleep(3600)

    task = asyncio.create_task(transfer.take_bundle(lease, hanging()))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await store.chunks.has_many(MANIFEST.chunk_ids()) == {MANIFEST.chunk_id(0)}


@pytest.mark.parametrize("tail", [b"\0", bundle()])
async def test_bytes_after_the_end_of_a_bundle_are_refused(transfer, tail):
    lease = (await offered(transfer)).lease
    for pieces in ([bundle(run_of([0])) + tail], [bundle(run_of([1])), tail]):
        with pytest.raises(FrameError, match="after the end"):
            await transfer.take_bundle(lease, body(*pieces))


async def test_a_senders_bundle_holds_data_only(transfer):
    lease = (await offered(transfer)).lease
    with pytest.raises(FrameError, match="data frames only"):
        await transfer.take_bundle(lease, body(bundle(Missing((Span.of(MANIFEST.id, [0]),), "absent"))))


@pytest.mark.parametrize("full", [True, False])
async def test_a_store_that_fails_in_mid_bundle_is_told_to_the_sender_and_no_reader_is_stuck(transfer, store, full):
    lease = (await offered(transfer)).lease
    reading = asyncio.create_task(take(transfer))
    await asyncio.sleep(0)
    store.chunks.error, store.chunks.after = StoreError("no room", full=full), 1
    with pytest.raises(StoreError) as caught:
        await transfer.take_bundle(lease, many_runs())
    assert caught.value.full is full
    sent, left = await reading
    assert left == {"arriving": [i for i in range(COUNT) if i not in sent]}
    store.chunks.error = None
    assert (await send(transfer, lease)).refused == ()
    assert (await publish(transfer)).manifest == MANIFEST.id


async def many_runs():
    whole = bundle(*[run_of([i]) for i in range(COUNT)])
    for at in range(0, len(whole), 30_000):
        await asyncio.sleep(0.001)
        yield whole[at : at + 30_000]


async def test_a_bundle_whose_lease_ends_in_the_middle_keeps_its_chunks_and_says_so(transfer, store, monkeypatch):
    """The sender then offers again, and sends nothing twice."""
    lease = (await offered(transfer)).lease
    now = time.time()

    async def slow():
        whole = bundle(run_of([0, 1]))
        yield whole[:100_000]
        monkeypatch.setattr(transfer.leases, "_clock", lambda: now + messages.LEASE_SECONDS + 60)
        yield whole[100_000:]

    with pytest.raises(UnknownLeaseError):
        await transfer.take_bundle(lease, slow())
    assert list(indexes((await offered(transfer)).missing)) == list(range(2, COUNT))


async def test_two_senders_of_the_same_package_at_the_same_time_both_end_well(transfer, store):
    leases = [(await offered(transfer)).lease for _ in range(2)]
    answers = await asyncio.gather(*(transfer.take_bundle(lease, many_runs()) for lease in leases))
    assert all(answer.stored + answer.held == COUNT and not answer.refused for answer in answers)
    pointers = await asyncio.gather(publish(transfer), publish(transfer))
    assert pointers[0] == pointers[1]


@pytest.mark.long
async def test_a_small_bundle_that_inflates_hugely_never_fills_the_memory(transfer, store, monkeypatch):
    most = 0
    taken = transferring.Transfer._take_events

    async def watched(self, events, *rest):
        nonlocal most
        most = max(most, sum(event.chunk.size for event in events if isinstance(event, Received)))
        await taken(self, events, *rest)

    monkeypatch.setattr(transferring.Transfer, "_take_events", watched)
    zeros = cut_package({f"{i}.bin": i.to_bytes(4, "big") * (CHUNK_MAX // 4) for i in range(16)})
    lease = (await offered(transfer, zeros)).lease
    made = bundle(*[run_of([i], zeros) for i in zeros.indexes])
    assert len(made) < 1 << 20
    answer = await transfer.take_bundle(lease, body(made))
    assert answer.stored == len(zeros.manifest.chunks)
    assert 0 < most <= bundles.BATCH_BYTES + CHUNK_MAX


# --- what is missing


async def test_missing_names_what_is_not_here_of_what_was_asked(transfer):
    lease = (await offered(transfer)).lease
    await send(transfer, lease, [0, 3])
    ask = messages.ChunkRanges(manifest=MANIFEST.id, ranges=((0, 5),))
    answer = await transfer.missing(messages.MissingRequest(want=(ask,)))
    assert answer.missing == (messages.ChunkRanges(manifest=MANIFEST.id, ranges=((1, 3), (4, 5))),)


async def test_what_a_lease_was_told_is_there_it_holds(transfer):
    await send(transfer, (await offered(transfer)).lease)
    lease = (await offered(transfer, NEXT)).lease
    ask = messages.ChunkRanges(manifest=MANIFEST.id, ranges=((0, 5),))
    assert (await transfer.missing(messages.MissingRequest(want=(ask,), lease=lease))).missing == ()
    assert (await transfer.leases.use(lease)).manifests == {MANIFEST.id, NEXT.manifest.id}
    with pytest.raises(UnknownLeaseError):
        await transfer.missing(messages.MissingRequest(want=(ask,), lease="0" * 32))


async def test_ranges_outside_of_a_manifest_are_refused(transfer):
    await offered(transfer)
    for ranges in (((0, 10**9),), ((0, 2), (1, 3)), ((-1, 2),)):
        ask = messages.ChunkRanges(manifest=MANIFEST.id, ranges=ranges)
        with pytest.raises(FrameError):
            await transfer.missing(messages.MissingRequest(want=(ask,)))
        with pytest.raises(FrameError):
            await transfer.wanted(messages.BundleRequest(want=(ask,)))


async def test_a_request_for_more_chunks_than_agreed_is_refused(transfer, monkeypatch):
    monkeypatch.setattr(transferring, "PLACES_MAX", 2 * COUNT - 1)
    await offered(transfer)
    ask = messages.ChunkRanges(manifest=MANIFEST.id, ranges=((0, COUNT),))
    assert len(await transfer.wanted(messages.BundleRequest(want=(ask,)))) == 1
    with pytest.raises(FrameError, match="more than"):
        await transfer.wanted(messages.BundleRequest(want=(ask, ask)))


async def test_a_manifest_that_was_never_offered_is_unknown(transfer):
    ask = messages.ChunkRanges(manifest=MANIFEST.id, ranges=((0, 1),))
    for asking in (
        transfer.wanted(messages.BundleRequest(want=(ask,))),
        transfer.document(MANIFEST.id, None),
        publish(transfer),
    ):
        with pytest.raises(UnknownManifestError):
            await asking


async def test_missing_names_unknown_manifests_beside_what_it_knows(transfer):
    """A sender asks for several candidates at once: that one is not here must not hide what is said of the others."""
    await send(transfer, (await offered(transfer)).lease, [0])
    known = messages.ChunkRanges(manifest=MANIFEST.id, ranges=((0, 2),))
    unknown = messages.ChunkRanges(manifest=NEXT.manifest.id, ranges=((0, 10**6),))
    answer = await transfer.missing(messages.MissingRequest(want=(unknown, known, unknown)))
    assert answer.unknown == (NEXT.manifest.id,)
    assert answer.missing == (messages.ChunkRanges(manifest=MANIFEST.id, ranges=((1, 2),)),)


async def test_a_lease_holds_the_known_manifests_of_a_question_only(transfer):
    lease = (await offered(transfer)).lease
    unknown = messages.ChunkRanges(manifest=NEXT.manifest.id, ranges=((0, 1),))
    await transfer.missing(messages.MissingRequest(want=(unknown,), lease=lease))
    assert (await transfer.leases.use(lease)).manifests == {MANIFEST.id}


async def test_an_offer_with_a_base_holds_that_too(transfer):
    await offered(transfer)
    lease = (await transfer.offer(NEXT.manifest.id, document(NEXT, base=MANIFEST.canonical), MANIFEST.id)).lease
    held = await transfer.leases.use(lease)
    assert held.manifests == {MANIFEST.id, NEXT.manifest.id}
    assert held.offered == {NEXT.manifest.id}


# --- publishing


async def test_a_package_is_listed_only_when_all_its_chunks_are_here(transfer):
    lease = (await offered(transfer)).lease
    await send(transfer, lease, range(COUNT - 2))
    with pytest.raises(MissingChunksError) as caught:
        await publish(transfer)
    assert caught.value.missing == ((COUNT - 2, COUNT),)
    assert transfer.catalog.all() == []
    await send(transfer, lease, [COUNT - 2, COUNT - 1])
    first = await publish(transfer)
    assert await publish(transfer) == first
    assert transfer.catalog.all() == [first]


async def test_a_manifest_of_another_package_than_the_path_names_is_refused(transfer):
    await send(transfer, (await offered(transfer)).lease)
    with pytest.raises(UntrustedError):
        await transfer.publish(NEXT.manifest.package, messages.PublishRequest(manifest=MANIFEST.id))
    assert transfer.catalog.all() == []


async def test_of_two_builds_offered_under_one_name_the_first_published_counts(transfer):
    for cut in (CUT, REBUILT):
        await send(transfer, (await offered(transfer, cut)).lease, cut.indexes, cut)
    first = await publish(transfer)
    with pytest.raises(ConflictError):
        await publish(transfer, REBUILT)
    assert transfer.catalog.all() == [first]


async def test_a_publish_by_another_process_of_the_same_store_is_not_overwritten(tmp_path):
    stores: list[Store] = [await open_store(f"disk:{tmp_path}/store") for _ in range(2)]
    try:
        one, other = [Transfer(each) for each in stores]
        for each, cut in ((one, CUT), (other, REBUILT)):
            await send(each, (await offered(each, cut)).lease, cut.indexes, cut)
        results = await asyncio.gather(publish(one), publish(other, REBUILT), return_exceptions=True)
        assert sorted(isinstance(result, ConflictError) for result in results) == [False, True]
        catalog = Catalog(stores[0].documents)
        await catalog.load()
        assert len(catalog.all()) == 1
    finally:
        for each in stores:
            await each.close()


# --- giving


async def test_a_published_package_is_given_in_the_order_asked(transfer):
    await send(transfer, (await offered(transfer)).lease)
    await publish(transfer)
    assert await take(transfer) == (list(range(COUNT)), {})
    wanted = await transfer.wanted(
        messages.BundleRequest(want=(messages.ChunkRanges(manifest=MANIFEST.id, ranges=((4, 6), (0, 2))),))
    )
    assert wanted[0][1] == (4, 5, 0, 1)


async def test_the_stored_form_is_sent_as_it_lies(transfer, store):
    await send(transfer, (await offered(transfer)).lease)
    stored = await store.chunks.open(MANIFEST.chunk_id(0))
    form = b"".join([piece async for piece in stored.pieces()])
    wanted = [(MANIFEST, (0,))]
    assert form in b"".join([piece async for piece in transfer.give(wanted)])


async def test_after_publishing_a_lost_chunk_is_absent_and_nobody_waits_for_it(transfer, store, monkeypatch):
    await send(transfer, (await offered(transfer)).lease)
    await publish(transfer)
    await store.chunks.remove(MANIFEST.chunk_id(1))
    monkeypatch.setattr(transfer, "_arriving_seconds", 3600.0)
    assert await take(transfer) == ([i for i in range(COUNT) if i != 1], {"absent": [1]})


async def test_a_damaged_chunk_is_absent_and_the_others_are_given(transfer, store):
    await send(transfer, (await offered(transfer)).lease)
    await publish(transfer)
    id = MANIFEST.chunk_id(2)
    store.chunks.stored[id] = store.chunks.stored[id][:-1] + b"\0"
    assert (await take(transfer))[1] == {"absent": [2]}


async def test_without_a_living_lease_what_is_not_here_is_absent_at_once(transfer, monkeypatch):
    lease = (await offered(transfer)).lease
    await send(transfer, lease, [0])
    now = time.time()
    monkeypatch.setattr(transfer.leases, "_clock", lambda: now + messages.LEASE_SECONDS + 60)
    monkeypatch.setattr(transfer, "_arriving_seconds", 3600.0)
    assert await take(transfer) == ([0], {"absent": list(range(1, COUNT))})


async def test_a_package_is_read_while_it_still_arrives(transfer, monkeypatch):
    monkeypatch.setattr(transfer, "_arriving_seconds", PATIENCE)
    lease = (await offered(transfer)).lease
    readers = [asyncio.create_task(take(transfer)) for _ in range(5)]
    await eventually(lambda: len(transfer.arrivals._events) == 1)
    await transfer.take_bundle(lease, many_runs())
    await publish(transfer)
    for reader in readers:
        assert await reader == (list(range(COUNT)), {})


async def test_a_reader_gets_each_chunk_before_the_next_one_was_sent(transfer, monkeypatch):
    """Cut-through proper: the sender goes on only when the reader holds what came before."""
    monkeypatch.setattr(transfer, "_arriving_seconds", PATIENCE)
    lease = (await offered(transfer)).lease
    held: list[int] = []

    async def in_step():
        for at, part in enumerate(split_frames()):
            yield part
            if at < COUNT:
                await eventually(lambda: len(held) >= at)  # noqa: B023 - awaited before the loop goes on

    async def reading():
        decoder = BundleDecoder({MANIFEST.id: MANIFEST}.get)
        async for piece in transfer.give([(MANIFEST, tuple(range(COUNT)))]):
            for batch in decoder.feed(piece):
                held.extend(event.index for event in batch if isinstance(event, Received))

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        group.create_task(reading())
        group.create_task(transfer.take_bundle(lease, in_step()))
    assert held == list(range(COUNT))


def split_frames():
    writer = BundleWriter()
    yield writer.start()
    for i in range(COUNT):
        head, payload = run_of([i])
        yield writer.frame(head) + payload
    yield writer.end()


async def test_what_has_not_arrived_in_time_is_told_and_the_reader_asks_again(transfer):
    lease = (await offered(transfer)).lease
    await send(transfer, lease, [0, 1])
    assert await take(transfer) == ([0, 1], {"arriving": list(range(2, COUNT))})
    await send(transfer, lease, range(2, COUNT))
    assert await take(transfer, range(2, COUNT)) == (list(range(2, COUNT)), {})


async def test_a_document_is_made_against_a_base_where_that_is_here(transfer):
    await offered(transfer)
    await offered(transfer, NEXT)
    packed, used = await transfer.document(NEXT.manifest.id, MANIFEST.id)
    assert used
    assert manifests.from_wire(packed.manifest, MANIFEST.canonical) == NEXT.manifest.canonical
    alone, used = await transfer.document(NEXT.manifest.id, REBUILT.manifest.id)
    assert not used
    assert manifests.from_wire(alone.manifest) == NEXT.manifest.canonical
    assert not (await transfer.document(NEXT.manifest.id, NEXT.manifest.id))[1]


async def test_a_medium_that_fails_is_told_in_the_bundle(transfer, monkeypatch):
    await send(transfer, (await offered(transfer)).lease, range(COUNT))
    opened, asked = transfer._store.open, []

    async def fails_at_the_third(id):
        asked.append(id)
        if len(asked) == 3:
            raise StoreError("the disk is gone")
        return await opened(id)

    monkeypatch.setattr(transfer._store, "open", fails_at_the_third)
    wanted = await transfer.wanted(
        messages.BundleRequest(want=(messages.ChunkRanges(manifest=MANIFEST.id, ranges=((0, 4),)),))
    )
    decoder = bundles.BundleDecoder({MANIFEST.id: MANIFEST}.get)
    pieces = [piece async for piece in transfer.give(wanted)]
    events = [event for piece in pieces for batch in decoder.feed(piece) for event in batch]
    assert [event.index for event in events if isinstance(event, bundles.Received)] == [0, 1]
    assert bundles.Aborted("store_failed") in events
    assert decoder.ended


async def test_one_chunk_by_its_name(transfer):
    await send(transfer, (await offered(transfer)).lease, [0])
    assert (await transfer.chunk(MANIFEST.chunk_id(0))).size == MANIFEST.chunks[0].size
    with pytest.raises(ChunkMissing):
        await transfer.chunk(chunk_id(b"nobody offered this"))


async def test_one_chunk_that_is_on_its_way_is_awaited_and_then_the_reader_is_told_to_ask_again(transfer):
    lease = (await offered(transfer)).lease
    with pytest.raises(UnreachableError) as caught:
        await transfer.chunk(MANIFEST.chunk_id(1))
    assert caught.value.retry_after
    transfer._arriving_seconds = 30.0
    waiting = asyncio.create_task(transfer.chunk(MANIFEST.chunk_id(1)))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await send(transfer, lease, [1])
    assert (await waiting).id == MANIFEST.chunk_id(1)


async def test_a_relay_that_was_restarted_goes_on_with_the_lease_and_the_chunks(transfer, store):
    lease = (await offered(transfer)).lease
    await send(transfer, lease, [0, 1, 2])
    again = Transfer(store, arriving_seconds=0.05)
    await again.load()
    assert (await take(again))[1] == {"arriving": list(range(3, COUNT))}
    assert (await send(again, lease, range(3, COUNT))).stored == COUNT - 3
    await publish(again)
    assert await take(again) == (list(range(COUNT)), {})
