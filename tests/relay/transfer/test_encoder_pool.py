from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.encoding import codecs
from relay.encoding.codecs import PLAIN, RAW, Coding, decoder_for
from relay.errors import ChunkMissing, StoreError
from relay.package.chunk import Chunk
from relay.package.identity import ChunkId
from relay.stores.contract import PIECE
from relay.stores.memory import MemoryChunks
from relay.transfer import encoder_pool as under_test
from relay.transfer.encoder_pool import Growing, Payloads, PayloadSpec, expected_payload, working_bytes

MIB = 1 << 20


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


class Shelf(MemoryChunks):
    """A store that counts what is read of it, and fails where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.at_once = 0
        self.most_at_once = 0
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None

    async def get(self, id: ChunkId) -> Chunk:
        self.reads += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(0)
            if self.gate is not None:
                await self.gate.wait()
            if self.error is not None:
                raise self.error
            return await super().get(id)
        finally:
            self.at_once -= 1

    async def put_data(self, *data: bytes) -> tuple[ChunkId, ...]:
        chunks = [Chunk.of(one) for one in data]
        await self.put_many(chunks)
        return tuple(chunk.id for chunk in chunks)


class Encoder:
    """Stands in for `encode`: gives one byte string after another, each when it is allowed to."""

    def __init__(self, pieces: int = 4, piece: bytes = b"p" * 1000) -> None:
        self.pieces = pieces
        self.piece = piece
        self.calls: list[tuple[Coding, int]] = []
        self.gave = 0
        self.running = 0
        self.most_running = 0
        self.allowed = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)
        self._lock = threading.Lock()

    def __call__(self, coding: Coding, run: bytes, base: bytes = b"") -> Iterator[bytes]:
        with self._lock:
            self.calls.append((coding, len(run)))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            for _ in range(self.pieces):
                assert self.allowed.acquire(timeout=20)
                self.gave += 1
                yield self.piece
        finally:
            with self._lock:
                self.running -= 1
            self.ended.release()

    def allow(self, pieces: int = 1) -> None:
        self.allowed.release(pieces)

    async def has_ended(self) -> None:
        assert await asyncio.to_thread(self.ended.acquire, timeout=20)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Encoder]:
    stand_in = Encoder()
    monkeypatch.setattr(under_test, "encode", stand_in)
    yield stand_in
    stand_in.allow(10_000)


@asynccontextmanager
async def opened(shelf: Shelf, **options: int) -> AsyncIterator[Payloads]:
    payloads = Payloads(shelf, **options)
    try:
        yield payloads
    finally:
        await asyncio.wait_for(payloads.close(), 30)


async def stretches(payloads: Payloads, spec: PayloadSpec) -> AsyncGenerator[bytes, None]:
    """One reader's stretches, as soon as there are any."""
    reader = payloads.open(spec)
    try:
        async for stretch, _ in reader.stretches(1):
            yield stretch
    finally:
        reader.close()


async def whole(payloads: Payloads, spec: PayloadSpec) -> bytes:
    return b"".join([stretch async for stretch in stretches(payloads, spec)])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def spec_of(*ids: ChunkId, size: int = 1000, coding: Coding = PLAIN) -> PayloadSpec:
    return PayloadSpec(ids, (), coding, size)


def named(*names: str) -> tuple[ChunkId, ...]:
    return tuple(Chunk.of(name.encode()).id for name in names)


# --- what is made


@pytest.mark.parametrize(
    "coding", [RAW, PLAIN, Coding("zstd", 9), Coding("zstd-prefix", 3), Coding("hdiff", 3)], ids=str
)
async def test_a_payload_decodes_to_its_run_whatever_the_encoding(coding: Coding):
    shelf = Shelf()
    old = [noise(n, 100_000) for n in range(4)]
    new = [data[:50_000] + b"changed" + data[50_000:] for data in old]
    base_ids, ids = await shelf.put_data(*old), await shelf.put_data(*new)
    bases = base_ids if coding.needs_bases else ()
    spec = PayloadSpec(ids, bases, coding, sum(map(len, new)), sum(map(len, old)) if bases else 0)
    async with opened(shelf) as payloads:
        payload = await whole(payloads, spec)
    decoder = decoder_for(coding.encoding, spec.size, b"".join(old) if bases else b"")
    assert b"".join(bytes(piece) for piece in decoder.feed(memoryview(payload))) == b"".join(new)
    assert decoder.is_whole


async def test_stretches_are_no_longer_than_a_header_is_worth_whatever_the_encoder_gives():
    shelf = Shelf()
    data = noise(1, 3 * MIB + 7)
    spec = spec_of(*await shelf.put_data(data), size=len(data), coding=RAW)
    async with opened(shelf) as payloads:
        await payloads.make(spec)
        found = [stretch async for stretch in stretches(payloads, spec)]
    assert [len(stretch) for stretch in found] == [MIB // 4] * 12 + [7]
    assert b"".join(found) == data


async def test_a_run_is_joined_in_its_own_order_with_repetitions():
    shelf = Shelf()
    first, second = await shelf.put_data(b"one", b"two")
    async with opened(shelf) as payloads:
        spec = spec_of(second, first, second, first, first, second, size=18, coding=RAW)
        assert await whole(payloads, spec) == b"twoonetwooneonetwo"
    assert 1 < shelf.most_at_once <= 4, "a few chunks at once are read"


async def test_size_and_time_of_what_was_made_are_remembered():
    shelf = Shelf()
    spec = spec_of(*await shelf.put_data(noise(1, 5000)), size=5000, coding=RAW)
    async with opened(shelf, kept_bytes=0) as payloads:
        assert payloads.made(spec) is None
        await whole(payloads, spec)
        made = payloads.made(spec)
        assert made is not None
        assert made.payload_bytes == 5000
        assert made.seconds > 0
        assert payloads.find(spec.chunks, (), ["raw"]) is None, "it was to be forgotten by now"


async def test_only_some_thousand_sizes_are_remembered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(under_test, "_MADE", 3)
    shelf = Shelf()
    ids = await shelf.put_data(b"a", b"b", b"c", b"d")
    async with opened(shelf) as payloads:
        specs = [spec_of(id, size=1, coding=RAW) for id in ids]
        for spec in specs:
            await whole(payloads, spec)
        assert [payloads.made(spec) is not None for spec in specs] == [False, True, True, True]


# --- single-flight


async def test_many_readers_have_one_encoder(encoder: Encoder):
    shelf = Shelf()
    spec = spec_of(*await shelf.put_data(b"run"))
    async with opened(shelf) as payloads:
        readers = [asyncio.create_task(whole(payloads, spec)) for _ in range(20)]
        encoder.allow(4)
        assert set(await asyncio.gather(*readers)) == {b"p" * 4000}
        assert await whole(payloads, spec) == b"p" * 4000
    assert len(encoder.calls) == 1
    assert shelf.reads == 1


async def test_a_payload_is_read_while_it_grows_by_each_at_his_own_pace(encoder: Encoder):
    shelf = Shelf()
    spec = spec_of(*await shelf.put_data(b"run"))
    async with opened(shelf) as payloads:
        fast, slow = stretches(payloads, spec), stretches(payloads, spec)
        encoder.allow(1)
        assert await anext(fast) == b"p" * 999
        assert encoder.gave == 1
        assert await anext(slow) == b"p" * 999
        encoder.allow(2)
        more = len(await anext(fast))
        late = stretches(payloads, spec)
        begun = len(await anext(late))
        encoder.allow(1)
        assert 999 + more + len(b"".join([stretch async for stretch in fast])) == 4000
        assert 999 + len(b"".join([stretch async for stretch in slow])) == 4000
        assert begun + len(b"".join([stretch async for stretch in late])) == 4000
    assert len(encoder.calls) == 1


async def test_an_encoder_stops_when_its_last_reader_leaves_and_not_before(encoder: Encoder):
    shelf = Shelf()
    encoder.pieces = 100
    spec = spec_of(*await shelf.put_data(b"run"))
    async with opened(shelf) as payloads:
        first, second = stretches(payloads, spec), stretches(payloads, spec)
        encoder.allow(1)
        await anext(first)
        await anext(second)
        await first.aclose()
        encoder.allow(1)
        assert await anext(second) == b"p" * 1000, "of two pieces, one byte each time waits for the next"
        await second.aclose()
        assert payloads.find(spec.chunks, (), ["zstd"]) is None
        encoder.allow(100)
        await encoder.has_ended()
        assert encoder.gave <= 3, "it went on for nobody"
        await until(lambda: payloads._budget.used == 0)
        assert payloads.made(spec) is None
        encoder.allow(100)
        assert len(await whole(payloads, spec)) == 100_000
    assert len(encoder.calls) == 2


async def test_a_cancelled_reader_takes_nobody_with_it(encoder: Encoder):
    shelf = Shelf()
    spec = spec_of(*await shelf.put_data(b"run"))
    async with opened(shelf) as payloads:
        one, other = (asyncio.create_task(whole(payloads, spec)) for _ in range(2))
        encoder.allow(1)
        await until(lambda: encoder.gave == 1)
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        encoder.allow(3)
        assert await other == b"p" * 4000


async def test_a_reader_that_leaves_while_chunks_are_read_stops_that(encoder: Encoder):
    shelf = Shelf()
    shelf.gate = asyncio.Event()
    spec = spec_of(*await shelf.put_data(b"run", b"more"))
    async with opened(shelf) as payloads:
        reader = asyncio.create_task(whole(payloads, spec))
        await until(lambda: shelf.at_once == 2)
        assert payloads._budget.used > 0
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        await until(lambda: payloads._budget.used == 0 and shelf.at_once == 0)
        shelf.gate.set()
        encoder.allow(4)
        assert await whole(payloads, spec) == b"p" * 4000
    assert len(encoder.calls) == 1


# --- what goes wrong


async def test_an_error_of_the_store_reaches_every_reader_and_the_next_request_tries_anew():
    shelf = Shelf()
    spec = spec_of(*await shelf.put_data(b"run"), size=3, coding=RAW)
    async with opened(shelf) as payloads:
        shelf.error = StoreError("the disk is gone")
        answers = await asyncio.gather(*(whole(payloads, spec) for _ in range(3)), return_exceptions=True)
        assert [str(answer) for answer in answers] == ["the disk is gone"] * 3
        assert shelf.reads == 1
        assert payloads._budget.used == 0
        shelf.error = None
        assert await whole(payloads, spec) == b"run"


async def test_a_missing_base_is_said_to_be_missing():
    shelf = Shelf()
    ids, (absent,) = await shelf.put_data(b"run"), named("absent")
    async with opened(shelf) as payloads:
        with pytest.raises(ChunkMissing) as caught:
            await whole(payloads, PayloadSpec(ids, (absent,), Coding("hdiff", 3), 3, 6))
        assert caught.value.id == absent
        assert payloads._budget.used == 0


async def test_an_encoder_that_breaks_in_the_middle_never_looks_like_one_that_finished(monkeypatch: pytest.MonkeyPatch):
    def broken(coding: Coding, run: bytes, base: bytes = b"") -> Iterator[bytes]:
        yield b"begin"
        raise RuntimeError("no more")

    shelf = Shelf()
    spec = spec_of(*await shelf.put_data(b"run"))
    monkeypatch.setattr(under_test, "encode", broken)
    async with opened(shelf) as payloads:
        with pytest.raises(RuntimeError, match="no more"):
            await whole(payloads, spec)
        assert payloads.made(spec) is None
        monkeypatch.setattr(under_test, "encode", codecs.encode)
        assert await whole(payloads, spec)


# --- threads and memory


async def test_no_more_encoders_run_than_there_are_threads(encoder: Encoder):
    shelf = Shelf()
    ids = await shelf.put_data(*(noise(n, 100) for n in range(6)))
    async with opened(shelf, threads=2) as payloads:
        readers = [asyncio.create_task(whole(payloads, spec_of(id))) for id in ids]
        await until(lambda: encoder.running == 2)
        assert payloads.is_busy()
        encoder.allow(24)
        await asyncio.gather(*readers)
        assert not payloads.is_busy()
    assert len(encoder.calls) == 6
    assert encoder.most_running == 2


async def test_an_encoder_waits_for_memory_in_the_order_of_arrival(encoder: Encoder):
    shelf = Shelf()
    large, small, tiny = await shelf.put_data(b"large", b"small", b"tiny")
    first, second = spec_of(large, size=MIB), spec_of(small, size=MIB)
    third = spec_of(tiny, size=1)
    async with opened(shelf, threads=4, memory_bytes=working_bytes(first) + working_bytes(third)) as payloads:
        readers = [asyncio.create_task(whole(payloads, first))]
        await until(lambda: len(encoder.calls) == 1)
        readers += [asyncio.create_task(whole(payloads, second)), asyncio.create_task(whole(payloads, third))]
        await until(payloads.is_busy)
        await asyncio.sleep(0.05)
        assert len(encoder.calls) == 1, "what came later, though small, went before its turn"
        encoder.allow(12)
        await asyncio.gather(*readers)
    assert len(encoder.calls) == 3


async def test_what_is_larger_than_the_budget_runs_alone(encoder: Encoder):
    shelf = Shelf()
    ids = await shelf.put_data(*(noise(n, 10) for n in range(3)))
    async with opened(shelf, threads=4, memory_bytes=1000) as payloads:
        readers = [asyncio.create_task(whole(payloads, spec_of(id, size=MIB))) for id in ids]
        encoder.allow(12)
        await asyncio.gather(*readers)
    assert len(encoder.calls) == 3
    assert encoder.most_running == 1


async def test_who_waits_for_memory_and_leaves_does_not_hold_up_the_next(encoder: Encoder):
    shelf = Shelf()
    ids = await shelf.put_data(b"1", b"2", b"3")
    running, waiting, small = spec_of(ids[0], size=MIB), spec_of(ids[1], size=MIB), spec_of(ids[2], size=1)
    async with opened(shelf, threads=4, memory_bytes=working_bytes(running) + working_bytes(small)) as payloads:
        first = asyncio.create_task(whole(payloads, running))
        await until(lambda: len(encoder.calls) == 1)
        second, third = (asyncio.create_task(whole(payloads, spec)) for spec in (waiting, small))
        await until(payloads.is_busy)
        second.cancel()
        await until(lambda: len(encoder.calls) == 2)
        encoder.allow(8)
        assert await first == await third == b"p" * 4000


async def test_the_memory_of_a_stopped_encoder_is_free_only_when_it_ended(encoder: Encoder):
    shelf = Shelf()
    spec = spec_of(*await shelf.put_data(b"run"), size=MIB)
    async with opened(shelf, threads=1) as payloads:
        reader = asyncio.create_task(whole(payloads, spec))
        await until(lambda: encoder.running == 1)
        reader.cancel()
        await asyncio.wait([reader])
        assert payloads._budget.used == working_bytes(spec), "a thread cannot be cut off: it still holds its run"
        encoder.allow(1)
        await until(lambda: payloads._budget.used == 0)


async def test_a_lower_limit_stops_the_newest_encoders_and_those_that_could_never_begin(encoder: Encoder):
    shelf = Shelf()
    one, other, queued = (spec_of(id, size=MIB) for id in await shelf.put_data(b"1", b"2", b"3"))
    need = working_bytes(one)
    async with opened(shelf, threads=2, memory_bytes=2 * need) as payloads:
        readers = [asyncio.create_task(whole(payloads, spec)) for spec in (one, other)]
        await until(lambda: encoder.running == 2)
        readers.append(asyncio.create_task(whole(payloads, queued)))
        await until(payloads.is_busy)
        payloads.limit_to(need)
        with pytest.raises(StoreError, match="gave way"):
            await readers[1]
        payloads.limit_to(need - 1)
        for reader in (readers[0], readers[2]):
            with pytest.raises(StoreError, match="gave way"):
                await reader
        assert not payloads.has_room_for(one.coding, one.size, one.base_size)
        encoder.allow(8)
        await until(lambda: payloads._budget.used == 0)
        payloads.limit_to(need)
        assert payloads.has_room_for(one.coding, one.size, one.base_size)
        encoder.allow(4)
        assert await whole(payloads, one) == b"p" * 4000


@given(st.lists(st.integers(0, 40), max_size=30).map(lambda limits: [limit for limit, _ in groupby(limits)]))
async def test_what_is_held_and_not_about_to_end_never_exceeds_the_limit(limits: list[int]):
    stand_in, shelf = Encoder(), Shelf()
    ids = await shelf.put_data(*(noise(n, 10) for n in range(8)))
    need = working_bytes(spec_of(ids[0], size=MIB))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(under_test, "encode", stand_in)
        async with opened(shelf, threads=3, memory_bytes=3 * need) as payloads:
            readers = [asyncio.create_task(whole(payloads, spec_of(id, size=MIB))) for id in ids]
            for tenths in limits:
                payloads.limit_to(need * tenths // 10)
                going = sum(bytes for each, bytes in payloads._inside.items() if each.has_ended)
                assert payloads._budget.used - going <= max(need * tenths // 10, 0)
                await asyncio.sleep(0)
            stand_in.allow(10_000)
            payloads.limit_to(3 * need)
            await asyncio.gather(*readers, return_exceptions=True)
            assert await whole(payloads, spec_of(ids[0], size=MIB)) == b"p" * 4000


async def test_finished_payloads_are_kept_the_latest_used_longest():
    shelf = Shelf()
    data = [noise(n, 1000) for n in range(3)]
    ids = await shelf.put_data(*data)
    specs = [spec_of(id, coding=RAW) for id in ids]
    async with opened(shelf, kept_bytes=2000) as payloads:
        for spec in (specs[0], specs[1], specs[0], specs[2]):
            await whole(payloads, spec)
        assert shelf.reads == 3
        found = [payloads.find(spec.chunks, (), ["raw"]) == spec for spec in specs]
        assert found == [True, False, True]
        assert payloads._budget.used == 2000


async def test_a_slow_reader_gets_all_of_a_payload_that_is_too_large_to_keep():
    shelf = Shelf()
    data = noise(1, 3 * PIECE)
    ids = await shelf.put_data(data, b"other")
    async with opened(shelf, kept_bytes=10, memory_bytes=10) as payloads:
        spec = spec_of(ids[0], size=len(data), coding=RAW)
        slow = stretches(payloads, spec)
        pieces = [await anext(slow)]
        assert await whole(payloads, spec_of(ids[1], size=5, coding=RAW)) == b"other"
        assert payloads._budget.used == len(data), "what is being read counts"
        pieces += [stretch async for stretch in slow]
        assert b"".join(pieces) == data
        assert payloads._budget.used == 0


async def test_kept_payloads_give_way_to_encoders(encoder: Encoder):
    shelf = Shelf()
    ids = await shelf.put_data(b"1", b"2")
    small, large = spec_of(ids[0], size=10), spec_of(ids[1], size=MIB)
    async with opened(shelf, memory_bytes=working_bytes(large)) as payloads:
        encoder.allow(8)
        await whole(payloads, small)
        assert payloads._budget.used == 4000
        await whole(payloads, large)
        assert payloads.find(small.chunks, (), ["zstd"]) is None
        assert payloads.find(large.chunks, (), ["zstd"]) == large


async def test_however_small_they_are_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(under_test, "_KEPT", 2)
    shelf = Shelf()
    ids = await shelf.put_data(b"a", b"b", b"c")
    async with opened(shelf) as payloads:
        for id in ids:
            await whole(payloads, spec_of(id, size=1, coding=RAW))
        assert [payloads.find([id], (), ["raw"]) is not None for id in ids] == [False, True, True]


@given(st.integers(1, 64 * MIB), st.integers(0, 64 * MIB), st.sampled_from(["raw", "zstd:3", "zstd:19", "hdiff"]))
def test_an_encoder_is_counted_for_more_than_what_it_reads_and_makes(size: int, base_size: int, coding: str):
    spec = PayloadSpec(named("c"), (), Coding.parse(coding), size, base_size)
    assert working_bytes(spec) >= size + base_size + expected_payload(spec)


# --- arriving


async def adopted(payloads: Payloads, spec: PayloadSpec) -> Growing:
    growing = Growing(payloads, spec, asyncio.get_running_loop())
    await asyncio.sleep(0)
    return growing


async def test_an_adopted_payload_is_read_while_it_arrives_from_another_thread():
    shelf = Shelf()
    spec = PayloadSpec(named("a", "b"), (), Coding("hdiff", 0), 9000)
    async with opened(shelf) as payloads:
        growing = await adopted(payloads, spec)
        assert payloads.find(spec.chunks, (), ["hdiff"]) == spec
        reader = stretches(payloads, spec)
        with ThreadPoolExecutor(1) as elsewhere:
            await asyncio.wrap_future(elsewhere.submit(growing.add, b"first"))
            assert await anext(reader) == b"firs"
            await asyncio.wrap_future(elsewhere.submit(growing.add, b"second"))
            await asyncio.wrap_future(elsewhere.submit(growing.finish))
        assert b"".join([stretch async for stretch in reader]) == b"tsecond"
        assert await whole(payloads, spec) == b"firstsecond"
        made = payloads.made(spec)
        assert made is not None
        assert made.payload_bytes == 11
    assert shelf.reads == 0


@pytest.mark.parametrize("how", ["fail", "thrown away"])
async def test_readers_of_a_payload_that_breaks_off_are_told(how: str):
    shelf = Shelf()
    data = noise(1, 1000)
    spec = PayloadSpec(await shelf.put_data(data), (), Coding("zstd", 0), 1000)
    async with opened(shelf) as payloads:
        growing = await adopted(payloads, spec)
        growing.add(b"begin")
        reader = stretches(payloads, spec)
        assert await anext(reader) == b"begi"
        if how == "fail":
            growing.fail()
            growing.finish()
            growing.add(b"end")
        del growing
        with pytest.raises(StoreError, match="broke off"):
            await anext(reader)
        assert payloads.find(spec.chunks, (), ["zstd"]) is None
        assert payloads._budget.used == 0
        anew = await whole(payloads, spec)
        assert b"".join(bytes(piece) for piece in decoder_for("zstd", 1000).feed(memoryview(anew))) == data


async def test_what_fails_after_it_was_whole_stays_whole():
    async with opened(Shelf()) as payloads:
        spec = PayloadSpec(named("a"), (), Coding("zstd", 0), 10)
        growing = await adopted(payloads, spec)
        growing.add(b"all")
        growing.finish()
        growing.fail()
        del growing
        assert await whole(payloads, spec) == b"all"


async def test_the_same_payload_is_adopted_once():
    async with opened(Shelf()) as payloads:
        spec = PayloadSpec(named("a"), (), Coding("zstd", 0), 10)
        growing = await adopted(payloads, spec)
        again = await adopted(payloads, spec)
        again.add(b"other")
        growing.add(b"all")
        growing.finish()
        assert await whole(payloads, spec) == b"all"


async def test_an_arriving_payload_goes_on_when_its_readers_leave():
    async with opened(Shelf()) as payloads:
        spec = PayloadSpec(named("a"), (), Coding("zstd", 0), 10)
        growing = await adopted(payloads, spec)
        growing.add(b"be")
        reader = stretches(payloads, spec)
        await anext(reader)
        await reader.aclose()
        growing.add(b"gin")
        growing.finish()
        assert await whole(payloads, spec) == b"begin"


async def test_nothing_is_adopted_without_room_for_it():
    async with opened(Shelf(), memory_bytes=MIB) as payloads:
        fits, too_much = (PayloadSpec(named(name), (), Coding("zstd", 0), MIB) for name in "ab")
        growing = await adopted(payloads, fits)
        refused = PayloadSpec(named("c"), (), RAW, MIB)
        kept = [growing, await adopted(payloads, refused)]
        assert payloads.find(refused.chunks, (), ["raw"]) is None
        growing.finish()
        await asyncio.sleep(0)
        kept.append(await adopted(payloads, too_much))
        assert payloads.find(too_much.chunks, (), ["zstd"]) == too_much


async def test_an_arriving_payload_that_outgrows_the_memory_is_let_go():
    async with opened(Shelf(), memory_bytes=3 * PIECE) as payloads:
        spec = PayloadSpec(named("a"), (), Coding("hdiff", 0), PIECE)
        growing = await adopted(payloads, spec)
        reader = stretches(payloads, spec)
        growing.add(b"x" * 2 * PIECE)
        await anext(reader)
        growing.add(b"x" * 2 * PIECE)
        with pytest.raises(StoreError, match="no memory"):
            [stretch async for stretch in reader]
        assert payloads._budget.used == 0


# --- finding


async def test_the_payload_with_the_most_bytes_is_found_among_what_is_wanted():
    a, b, c, base, other = named("a", "b", "c", "base", "other")
    async with opened(Shelf()) as payloads:
        specs = [
            PayloadSpec((a,), (), Coding("zstd", 0), 10),
            PayloadSpec((a, b), (), Coding("zstd", 0), 20),
            PayloadSpec((a, b), (base,), Coding("hdiff", 0), 21),
            PayloadSpec((a, b, c), (), Coding("raw", 0), 30),
            PayloadSpec((b, c), (base, other), Coding("hdiff", 0), 40),
        ]
        growing = [await adopted(payloads, spec) for spec in specs]
        assert len(growing) == len(specs)
        every = ("raw", "zstd", "hdiff")
        assert payloads.find([a, b, c], [base, other], every) == specs[4]
        assert payloads.find([a, b, c], [base], every) == specs[3]
        assert payloads.find([a, b, c], [base], ["zstd", "hdiff"]) == specs[2]
        assert payloads.find([a, b], [], every) == specs[1]
        assert payloads.find([a], [base], every) == specs[0]
        assert payloads.find([b], [base], every) is None
        assert payloads.find([], [], every) is None


async def test_who_waits_for_a_change_is_woken_when_a_payload_begins(encoder: Encoder):
    shelf = Shelf()
    spec = spec_of(*await shelf.put_data(b"run"))
    async with opened(shelf) as payloads:
        for begin in (
            lambda: Growing(payloads, PayloadSpec(named("a"), (), RAW, 1), asyncio.get_running_loop()),
            lambda: asyncio.create_task(whole(payloads, spec)),
        ):
            waiting = asyncio.create_task(payloads.changed())
            await asyncio.sleep(0)
            assert not waiting.done()
            begun = begin()
            await asyncio.wait_for(waiting, 20)
            del begun
        encoder.allow(4)


# --- the end


async def test_closing_stops_encoders_and_tells_readers(encoder: Encoder):
    shelf = Shelf()
    ids = await shelf.put_data(*(noise(n, 10) for n in range(5)))
    payloads = Payloads(shelf, threads=1)
    readers = [asyncio.create_task(whole(payloads, spec_of(id))) for id in ids]
    growing = await adopted(payloads, PayloadSpec(named("a"), (), RAW, 1))
    await until(lambda: encoder.running == 1)
    closing = asyncio.create_task(payloads.close())
    answers = await asyncio.gather(*readers, return_exceptions=True)
    assert all(isinstance(answer, StoreError) for answer in answers)
    encoder.allow(1)
    await asyncio.wait_for(closing, 20)
    await payloads.close()
    assert encoder.running == 0
    assert len(encoder.calls) == 1, "what waited for the thread began for nobody"
    assert payloads._budget.used == 0
    growing.add(b"late")
    growing.finish()
    with pytest.raises(StoreError):
        await whole(payloads, spec_of(ids[0]))
    late = await adopted(payloads, PayloadSpec(named("b"), (), RAW, 1))
    late.finish()
    assert payloads.find(named("b"), (), ["raw"]) is None


# --- read in stretches


@pytest.mark.parametrize("cut", [[b"abc", b"d", b"efgh"], [b"ab"], [b"a", b"b"]])
async def test_every_byte_of_a_stretched_payload_is_read_once_and_only_its_last_one_waits(cut: list[bytes]) -> None:
    async with opened(Shelf()) as payloads:
        spec = PayloadSpec(named("a"), (), Coding("zstd", 0), 10)
        growing = await adopted(payloads, spec)
        reader, found = payloads.open(spec), []
        stretches = reader.stretches(1, 20.0)
        for at, piece in enumerate(cut):
            growing.add(piece)
            await until(lambda at=at: reader.size == len(b"".join(cut[: at + 1])))  # type: ignore[misc]
            if reader.size - reader.taken > 1:
                found.append(await anext(stretches))
        assert b"".join(stretch for stretch, _ in found) == b"".join(cut)[:-1]
        growing.finish()
        found += [each async for each in stretches]
        assert b"".join(stretch for stretch, _ in found) == b"".join(cut)
        assert [more for _, more in found] == [True] * (len(found) - 1) + [False]
        reader.close()
        reader.close()


async def test_a_reader_that_waits_in_vain_says_so() -> None:
    async with opened(Shelf()) as payloads:
        spec = PayloadSpec(named("a"), (), Coding("zstd", 0), 10)
        growing = await adopted(payloads, spec)
        reader = payloads.open(spec)
        with pytest.raises(TimeoutError):
            await anext(reader.stretches(1, 0.01))
        growing.fail()
        with pytest.raises(StoreError, match="broke off"):
            await anext(reader.stretches(1, 20.0))
