from __future__ import annotations

import asyncio
import gc

import pytest
from harness.packages import noise
from harness.process import eventually

from relay.errors import StoreError
from relay.package.chunk import Chunk
from relay.server.arrivals import BATCH_BYTES, QUEUE_BYTES, Arrivals, Landing
from relay.stores.memory import MemoryChunks

MIB = 1 << 20
CHUNKS = [Chunk.of(noise(i, 1000 + i)) for i in range(6)]
LARGE = [Chunk.of(noise(i, MIB)) for i in range(20)]


class SlowStore(MemoryChunks):
    """Writes when it is told to, and remembers each batch."""

    def __init__(self):
        super().__init__()
        self.batches = []
        self.may_write = asyncio.Event()
        self.error = None

    async def put_many(self, chunks):
        self.batches.append(list(chunks))
        await self.may_write.wait()
        if self.error:
            raise self.error
        await super().put_many(chunks)


class Immediate(SlowStore):
    def __init__(self):
        super().__init__()
        self.may_write.set()


# --- who waits


async def test_everybody_who_waits_for_a_chunk_hangs_on_the_one_flight():
    arrivals = Arrivals()
    flights = [arrivals.of(CHUNKS[0].id) for _ in range(50)]
    assert len(set(map(id, flights))) == 1
    other = arrivals.of(CHUNKS[1].id)
    arrivals.tell([CHUNKS[0].id])
    assert flights[0].is_set()
    assert not other.is_set()


async def test_a_flight_that_nobody_waits_for_is_forgotten():
    arrivals = Arrivals()
    arrivals.of(CHUNKS[0].id)
    gc.collect()
    assert len(arrivals._events) == 0


async def test_who_comes_after_the_landing_waits_for_the_next_one():
    arrivals = Arrivals()
    arrivals.tell([CHUNKS[0].id])
    assert not arrivals.of(CHUNKS[0].id).is_set()


# --- what lands


async def test_all_that_was_added_is_in_the_store_after_a_flush():
    store = Immediate()
    async with Landing(store, Arrivals()) as landing:
        for chunk in CHUNKS:
            await landing.add(chunk)
        await landing.flush()
        assert await store.has_many(c.id for c in CHUNKS) == {c.id for c in CHUNKS}
    assert landing.stored == len(CHUNKS)


async def test_a_flush_of_nothing_returns():
    async with Landing(Immediate(), Arrivals()) as landing:
        await landing.flush()


async def test_a_chunk_is_told_of_only_when_it_is_durable():
    store, arrivals = SlowStore(), Arrivals()
    flight = arrivals.of(CHUNKS[0].id)
    async with Landing(store, arrivals) as landing:
        await landing.add(CHUNKS[0])
        await eventually(lambda: store.batches)
        assert not flight.is_set()
        store.may_write.set()
        await asyncio.wait_for(flight.wait(), 20)
        assert await store.has_many([CHUNKS[0].id])


async def test_while_one_batch_is_written_the_next_one_gathers():
    store = SlowStore()
    async with Landing(store, Arrivals()) as landing:
        await landing.add(CHUNKS[0])
        await eventually(lambda: store.batches)
        for chunk in CHUNKS[1:]:
            await landing.add(chunk)
        store.may_write.set()
        await landing.flush()
    assert [len(batch) for batch in store.batches] == [1, len(CHUNKS) - 1]


async def test_no_batch_is_larger_than_agreed_and_order_is_kept():
    store = SlowStore()
    async with Landing(store, Arrivals()) as landing:
        adding = asyncio.create_task(add_all(landing, LARGE))
        await eventually(lambda: store.batches)
        store.may_write.set()
        await adding
        await landing.flush()
    assert [chunk for batch in store.batches for chunk in batch] == LARGE
    assert all(sum(chunk.size for chunk in batch) <= BATCH_BYTES for batch in store.batches)


async def add_all(landing, chunks):
    for chunk in chunks:
        await landing.add(chunk)


async def test_a_sender_waits_while_too_much_waits_to_be_written():
    store = SlowStore()
    async with Landing(store, Arrivals()) as landing:
        adding = asyncio.create_task(add_all(landing, LARGE))
        await eventually(lambda: store.batches)
        for _ in range(50):
            await asyncio.sleep(0)
        assert not adding.done()
        held = landing._bytes
        assert QUEUE_BYTES <= held <= QUEUE_BYTES + MIB
        store.may_write.set()
        await adding
        await landing.flush()
    assert landing.stored == len(LARGE)


# --- what goes wrong


async def test_leaving_by_an_error_keeps_what_was_verified_until_then():
    store = SlowStore()
    landing = Landing(store, Arrivals())

    async def break_off():
        async with landing:
            await add_all(landing, CHUNKS)
            store.may_write.set()
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await break_off()
    assert await store.has_many(c.id for c in CHUNKS) == {c.id for c in CHUNKS}


async def test_a_request_that_is_cancelled_keeps_what_was_verified_until_then():
    store = SlowStore()
    added = asyncio.Event()

    async def request():
        async with Landing(store, Arrivals()) as landing:
            await add_all(landing, CHUNKS)
            added.set()
            await asyncio.sleep(3600)

    task = asyncio.create_task(request())
    await added.wait()
    task.cancel()
    await asyncio.sleep(0)
    store.may_write.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await store.has_many(c.id for c in CHUNKS) == {c.id for c in CHUNKS}


async def test_a_second_cancel_does_not_stop_the_writing():
    store = SlowStore()
    added = asyncio.Event()

    async def request():
        async with Landing(store, Arrivals()) as landing:
            await add_all(landing, CHUNKS)
            added.set()
            await asyncio.sleep(3600)

    task = asyncio.create_task(request())
    await added.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([task])
    store.may_write.set()
    await eventually(lambda: len(store.stored) == len(CHUNKS))


@pytest.mark.parametrize("full", [True, False])
async def test_a_store_that_fails_is_told_to_the_sender_at_the_next_step(full):
    store = SlowStore()
    store.error = StoreError("no room", full=full)
    arrivals = Arrivals()
    flight = arrivals.of(CHUNKS[0].id)
    async with Landing(store, arrivals) as landing:
        await landing.add(CHUNKS[0])
        store.may_write.set()
        with pytest.raises(StoreError) as caught:
            await landing.flush()
        assert caught.value.full is full
        with pytest.raises(StoreError):
            await landing.add(CHUNKS[1])
    assert landing.stored == 0
    assert not flight.is_set()
    assert len(store.batches) == 1


async def test_a_sender_that_waits_for_room_hears_of_the_failure():
    store = SlowStore()
    store.error = StoreError("no room", full=True)
    async with Landing(store, Arrivals()) as landing:
        adding = asyncio.create_task(add_all(landing, LARGE))
        await eventually(lambda: store.batches)
        store.may_write.set()
        with pytest.raises(StoreError):
            await asyncio.wait_for(adding, 20)


async def test_one_senders_failure_is_not_anothers():
    bad, good = SlowStore(), Immediate()
    bad.error = StoreError("no room")
    bad.may_write.set()
    arrivals = Arrivals()
    flight = arrivals.of(CHUNKS[0].id)
    async with Landing(bad, arrivals) as one, Landing(good, arrivals) as other:
        await one.add(CHUNKS[0])
        with pytest.raises(StoreError):
            await one.flush()
        await other.add(CHUNKS[0])
        await other.flush()
    assert flight.is_set()
