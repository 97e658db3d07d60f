"""Differences that are sent to a relay: what they may build on, what is refused, and that a plain run can always follow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
from harness.packages import cut_package, encode_run, noise
from harness.process import eventually

from relay.encoding import holdings
from relay.encoding.bundle import BundleDecoder, BundleWriter, Received, Span, data_header
from relay.errors import FrameError, StoreError
from relay.package import manifest as manifests
from relay.package.ranges import indexes
from relay.protocol import messages
from relay.server.packages import Transfer
from relay.stores.open import open_store
from relay.support.byte_budget import ByteBudget

PATIENCE = 20.0
FILES = {f"lib/{i}.dll": noise(i, 100_000 + i) for i in range(4)}
OLD = cut_package(FILES)
NEW = cut_package({path: data[:50_000] + b"changed" + data[50_000:] for path, data in FILES.items()}, version="1.0.1")
OTHER = cut_package({"x.dll": noise("x", 300_000)}, id="Other.Lib")
CHANGED = [i for i in NEW.indexes if NEW.manifest.chunk_id(i) not in OLD.chunks]
BASES = [i for i in OLD.indexes if OLD.manifest.chunk_id(i) not in NEW.chunks]
DELTAS = ["zstd-prefix", "hdiff"]


@pytest.fixture
async def store():
    return await open_store("memory:")


@pytest.fixture
async def transfer(store):
    made = Transfer(store, arriving_seconds=0.2)
    await made.load()
    yield made
    await made.close()


async def body(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        await asyncio.sleep(0)
        yield piece


async def offer(transfer, cut, base=None):
    prefix = None if base is None else base.manifest.canonical
    document = messages.Document(manifests.to_wire(cut.manifest.canonical, prefix))
    return await transfer.offer(cut.manifest.id, document, None if base is None else base.manifest.id)


async def publish(transfer, cut):
    lease = (await offer(transfer, cut)).lease
    await transfer.take_bundle(lease, body(bundle(plain_run(list(cut.indexes), cut))))
    await transfer.publish(cut.manifest.package, messages.PublishRequest(manifest=cut.manifest.id))


@pytest.fixture
async def lease(transfer):
    """Of the new version, while the old one stands published."""
    await publish(transfer, OLD)
    return (await offer(transfer, NEW, OLD)).lease


def plain_run(places, cut=NEW):
    encoding, payload = encode_run([cut.chunk(i).data for i in places])
    return data_header((Span.of(cut.manifest.id, places),), encoding, payload), payload


def delta_run(coding, places=CHANGED, bases=BASES, *, base_of=OLD, built_on=None):
    """A difference of NEW; `built_on` are the bytes that it is really made from."""
    base = b"".join(base_of.chunk(i).data for i in bases) if built_on is None else built_on
    encoding, payload = encode_run([NEW.chunk(i).data for i in places], coding, base)
    assert encoding == coding, "this difference is none: the test would prove nothing"
    spans = (Span.of(base_of.manifest.id, bases),)
    return data_header((Span.of(NEW.manifest.id, places),), encoding, payload, bases=spans), payload


def bundle(*runs) -> bytes:
    writer = BundleWriter()
    made = [writer.start()]
    for head, payload in runs:
        made += [writer.frame(head), payload]
    return b"".join([*made, writer.end()])


async def holds(store, places) -> bool:
    ids = {NEW.manifest.chunk_id(i) for i in places}
    return await store.chunks.has_many(ids) == ids


def refused(*reasons, places=CHANGED):
    """Everything of `places`, for one of these reasons."""
    return lambda answer: (
        {run.reason for run in answer.refused} <= set(reasons)
        and [i for run in answer.refused for i in indexes(run.ranges)] == list(places)
    )


# --- when all is well


@pytest.mark.parametrize("coding", DELTAS)
async def test_a_difference_from_what_is_here_is_stored_and_takes_little(transfer, store, lease, coding):
    head, payload = delta_run(coding)
    assert len(payload) < 5_000
    answer = await transfer.take_bundle(lease, body(bundle((head, payload))))
    assert (answer.stored, answer.refused) == (len(CHANGED), ())
    assert await holds(store, CHANGED)
    await transfer.publish(NEW.manifest.package, messages.PublishRequest(manifest=NEW.manifest.id))


@pytest.mark.parametrize("coding", DELTAS)
async def test_chunks_of_another_package_are_bases_once_the_lease_holds_them(transfer, store, coding):
    await publish(transfer, OLD)
    lease = (await offer(transfer, NEW)).lease
    ask = messages.ChunkRanges(manifest=OLD.manifest.id, ranges=((0, len(OLD.indexes)),))
    assert (await transfer.missing(messages.MissingRequest(want=(ask,), lease=lease))).missing == ()
    answer = await transfer.take_bundle(lease, body(bundle(delta_run(coding))))
    assert answer.refused == ()
    assert await holds(store, CHANGED)


# --- what is refused, and what follows


@pytest.mark.parametrize("coding", DELTAS)
async def test_a_base_that_is_gone_since_the_offer_costs_the_run_and_a_plain_one_follows(
    transfer, store, lease, coding
):
    await store.chunks.remove(OLD.manifest.chunk_id(BASES[0]))
    answer = await transfer.take_bundle(lease, body(bundle(delta_run(coding, CHANGED[:2]), plain_run(CHANGED[2:]))))
    assert refused("base_missing", places=CHANGED[:2])(answer)
    assert answer.stored == len(CHANGED[2:])
    answer = await transfer.take_bundle(lease, body(bundle(plain_run(CHANGED[:2]))))
    assert (answer.stored, answer.refused) == (2, ())
    assert await holds(store, CHANGED)


async def test_a_base_that_is_damaged_counts_as_gone(transfer, store, lease):
    id = OLD.manifest.chunk_id(BASES[0])
    store.chunks.stored[id] = store.chunks.stored[id][:-1] + b"\0"
    assert refused("base_missing")(await transfer.take_bundle(lease, body(bundle(delta_run("hdiff")))))


@pytest.mark.parametrize("coding", DELTAS)
async def test_a_difference_from_other_bytes_than_it_names_is_refused_and_a_plain_one_follows(
    transfer, store, lease, coding
):
    others = b"".join(OLD.chunk(i).data for i in reversed(BASES))
    lie = delta_run(coding, CHANGED[1:], BASES, built_on=others)
    answer = await transfer.take_bundle(lease, body(bundle(lie, plain_run(CHANGED[:1]))))
    assert refused("wrong_bytes", "bad_frame", places=CHANGED[1:])(answer)
    assert answer.stored == 1
    assert (await transfer.take_bundle(lease, body(bundle(plain_run(CHANGED[1:]))))).refused == ()
    assert await holds(store, CHANGED)


@pytest.mark.parametrize("coding", DELTAS)
async def test_a_base_that_the_lease_does_not_hold_ends_the_bundle_and_keeps_what_came_before(
    transfer, store, lease, coding
):
    """Also where it stands in the store: nothing would keep it there."""
    await publish(transfer, OTHER)
    foreign = delta_run(
        coding,
        CHANGED[1:],
        bases=list(OTHER.indexes),
        base_of=OTHER,
        built_on=b"".join(OLD.chunk(i).data for i in BASES),
    )
    with pytest.raises(FrameError, match="not known here"):
        await transfer.take_bundle(lease, body(bundle(plain_run(CHANGED[:1]), foreign)))
    assert await holds(store, CHANGED[:1])


async def test_a_base_outside_of_its_manifest_ends_the_bundle(transfer, lease):
    head, payload = delta_run("hdiff")
    beyond = (Span.of(OLD.manifest.id, [len(OLD.indexes)]),)
    with pytest.raises(FrameError, match="does not lie in"):
        await transfer.take_bundle(lease, body(bundle((msgspec.structs.replace(head, bases=beyond), payload))))


@pytest.mark.parametrize("coding", DELTAS)
async def test_a_difference_that_holds_more_or_less_than_it_names_is_refused(transfer, store, lease, coding):
    _, payload = delta_run(coding)
    fewer = data_header(
        (Span.of(NEW.manifest.id, CHANGED[:-1]),), coding, payload, bases=(Span.of(OLD.manifest.id, BASES),)
    )
    answer = await transfer.take_bundle(lease, body(bundle((fewer, payload))))
    # What was verified before the lie showed is kept; nothing else is.
    assert answer.refused == () or refused("bad_frame", "wrong_bytes", places=CHANGED[answer.stored : -1])(answer)
    _, short = delta_run(coding, CHANGED[:1])
    more = data_header((Span.of(NEW.manifest.id, CHANGED),), coding, short, bases=(Span.of(OLD.manifest.id, BASES),))
    answer = await transfer.take_bundle(lease, body(bundle((more, short))))
    assert answer.refused
    assert all(run.reason in {"bad_frame", "wrong_bytes"} for run in answer.refused)
    assert not await holds(store, CHANGED[-1:])


async def test_a_medium_that_fails_under_a_base_is_told_to_the_sender(transfer, store, lease, monkeypatch):
    async def fails(id):
        raise StoreError("the disk is gone")

    monkeypatch.setattr(store.chunks, "get", fails)
    with pytest.raises(StoreError, match="the disk is gone"):
        await transfer.take_bundle(lease, body(bundle(delta_run("hdiff"))))


# --- memory


async def test_bases_wait_for_memory_and_a_run_that_waits_too_long_is_refused(transfer, store, lease, monkeypatch):
    size = 2 * sum(OLD.manifest.chunks[i].size for i in BASES)
    transfer.room = ByteBudget(size)
    monkeypatch.setattr(holdings, "_ROOM_SECONDS", 0.05)
    async with asyncio.timeout(PATIENCE):
        await transfer.room.enter(1)
        assert refused("base_missing")(await transfer.take_bundle(lease, body(bundle(delta_run("hdiff")))))
        transfer.room.leave(1)
        assert (await transfer.take_bundle(lease, body(bundle(delta_run("hdiff"))))).refused == ()
    assert transfer.room.used == 0


# --- handed on as it comes


async def read(transfer, cut, places, events, reader=None):
    decoder = BundleDecoder({cut.manifest.id: cut.manifest}.get)
    given = transfer.give([(cut.manifest, tuple(places))], *([] if reader is None else [reader]))
    async for piece in given:
        for batch in decoder.feed(piece):
            events.extend(batch)
    decoder.finish()


async def test_a_run_is_handed_on_before_its_end_has_come_and_byte_for_byte(transfer, store):
    """Cut-through in the middle of a run, without encoding anything: what arrives is what leaves."""
    big = cut_package({f"{i}.bin": noise(i, 300_000) for i in range(6)}, id="Big")
    lease = (await offer(transfer, big)).lease
    encoding, payload = encode_run([big.chunk(i).data for i in big.indexes], "zstd:19")
    stretches = [payload[at : at + 200_000] for at in range(0, len(payload), 200_000)]
    head = data_header((Span.of(big.manifest.id, list(big.indexes)),), encoding, stretches[0], more=True)
    got: list = []
    reader = asyncio.create_task(read(transfer, big, big.indexes, got))

    async def in_step():
        writer = BundleWriter()
        yield writer.start() + writer.frame(head) + stretches[0]
        for at, stretch in enumerate(stretches[1:], 1):
            more = at + 1 < len(stretches)
            yield writer.frame(data_header((), encoding, stretch, more=more, goes_on=True)) + stretch
            if at == len(stretches) - 2:
                # All but the last stretch was sent, nothing of it is durable, and the reader holds most of it.
                await eventually(lambda: sum(isinstance(event, Received) for event in got) >= 4)
        yield writer.end()

    transfer._arriving_seconds = PATIENCE
    async with asyncio.timeout(PATIENCE):
        await transfer.take_bundle(lease, in_step())
        await reader
    received = [event for event in got if isinstance(event, Received)]
    assert [event.index for event in received] == list(big.indexes)
    assert sum(event.payload_bytes for event in received) <= len(payload)
    spec = transfer.payloads.find(big.manifest.chunk_ids(), (), {encoding})
    reader = transfer.payloads.open(spec)
    assert b"".join([stretch async for stretch, _ in reader.stretches()]) == payload
    reader.close()


async def test_a_run_that_breaks_off_on_its_way_in_ends_the_readers_bundle_well_and_it_asks_again(transfer, store):
    big = cut_package({f"{i}.bin": noise(i, 300_000) for i in range(6)}, id="Big")
    lease = (await offer(transfer, big)).lease
    encoding, payload = encode_run([big.chunk(i).data for i in big.indexes])
    head = data_header((Span.of(big.manifest.id, list(big.indexes)),), encoding, payload[:900_000], more=True)
    got: list = []
    transfer._arriving_seconds = PATIENCE
    reader = asyncio.create_task(read(transfer, big, big.indexes, got))

    async def broken():
        writer = BundleWriter()
        yield writer.start() + writer.frame(head) + payload[:900_000]
        await eventually(lambda: any(isinstance(event, Received) for event in got))
        raise ConnectionResetError

    async with asyncio.timeout(PATIENCE):
        with pytest.raises(ConnectionResetError):
            await transfer.take_bundle(lease, broken())
        await reader
    assert [event.code for event in got if hasattr(event, "code")] == ["busy"]
    assert all(event.chunk.data == big.chunk(event.index).data for event in got if isinstance(event, Received))
    missing = (await offer(transfer, big)).missing
    assert (await transfer.take_bundle(lease, body(bundle(plain_run(list(indexes(missing)), big))))).refused == ()
    again: list = []
    await read(transfer, big, big.indexes, again)
    assert sum(isinstance(event, Received) for event in again) == len(big.indexes)


async def test_a_lie_is_not_handed_on_as_finished(transfer, store, lease):
    others = noise("elsewhere", 400_000)
    await transfer.take_bundle(
        lease, body(bundle(delta_run("hdiff", built_on=others + b"".join(OLD.chunk(i).data for i in BASES))))
    )
    ids = NEW.manifest.chunk_ids()
    assert transfer.payloads.find(ids, OLD.manifest.chunk_ids(), DELTAS) is None
