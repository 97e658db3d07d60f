from __future__ import annotations

import asyncio

import pytest
from harness.store_contract import ABSENT, DamageContract, ReaderContract, Subject, frame_of, some_chunks
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import ChunkInvalid, ChunkMissing, StoreError, UnreachableError
from relay.stores.layers import Cached, Failover, Failure, union, verdict
from relay.stores.memory import MemoryChunks
from relay.support.zstd import zstd


class Flaky(MemoryChunks):
    """A memory store that counts what it is asked, may be slow, and may fail."""

    def __init__(self, name="flaky"):
        super().__init__()
        self.name = name
        self.error = None
        self.put_error = None
        self.gate = None
        self.gets = 0
        self.asked = []
        self.closed = 0

    async def get(self, id):
        self.gets += 1
        if self.gate:
            await self.gate.wait()
        if self.error:
            raise self.error
        return await super().get(id)

    async def open(self, id):
        if self.error:
            raise self.error
        return await super().open(id)

    async def has_many(self, ids):
        asked = set(ids)
        self.asked.append(asked)
        if self.error:
            raise self.error
        return await super().has_many(asked)

    async def put_many(self, chunks):
        if self.put_error:
            raise self.put_error
        await super().put_many(chunks)

    async def close(self):
        self.closed += 1

    def spoil(self, id):
        self.stored[id] = self.stored[id][:-1] + b"?"


@pytest.fixture
def upstream():
    return Flaky("upstream")


@pytest.fixture
def local():
    return Flaky("local")


class TestCached(ReaderContract):
    @pytest.fixture
    def subject(self, upstream, local):
        return Subject(Cached(upstream, local), upstream.put_many)


class TestCachedLocally(ReaderContract):
    """What is held locally needs nobody upstream."""

    @pytest.fixture
    def subject(self, upstream, local):
        return Subject(Cached(upstream, local), local.put_many)


class TestFailoverFirst(ReaderContract, DamageContract):
    @pytest.fixture
    def subject(self):
        first, second = MemoryChunks(), MemoryChunks()

        def damage(id, change):
            first.stored[id] = change(first.stored[id])

        return Subject(Failover([first, second]), first.put_many, damage)


class TestFailoverLast(ReaderContract, DamageContract):
    @pytest.fixture
    def subject(self):
        first, last = MemoryChunks(), MemoryChunks()

        def damage(id, change):
            last.stored[id] = change(last.stored[id])

        return Subject(Failover([first, last]), last.put_many, damage)


# --- Cached


@pytest.mark.parametrize("way", ["get", "open"])
async def test_what_was_fetched_is_kept_and_not_fetched_again(upstream, local, way):
    [chunk] = some_chunks(1)
    await upstream.put(chunk)
    cached = Cached(upstream, local)
    for _ in range(3):
        await getattr(cached, way)(chunk.id)
    assert upstream.gets == 1
    assert (await local.get(chunk.id)).data == chunk.data


@pytest.mark.parametrize("way", ["get", "open"])
async def test_damage_in_the_cache_is_mended_from_upstream(upstream, local, way):
    [chunk] = some_chunks(1)
    await upstream.put(chunk)
    await local.put(chunk)
    local.spoil(chunk.id)
    cached = Cached(upstream, local)
    await getattr(cached, way)(chunk.id)
    assert (await local.get(chunk.id)).data == chunk.data
    assert upstream.gets == 1


async def test_many_who_ask_at_once_ask_upstream_once(upstream, local):
    [chunk] = some_chunks(1)
    await upstream.put(chunk)
    upstream.gate = asyncio.Event()
    cached = Cached(upstream, local)
    askers = [asyncio.create_task(cached.get(chunk.id)) for _ in range(20)]
    askers += [asyncio.create_task(cached.open(chunk.id)) for _ in range(5)]
    await asyncio.sleep(0)
    upstream.gate.set()
    got = await asyncio.gather(*askers)
    assert upstream.gets == 1
    assert {chunk.data for chunk in got[:20]} == {chunk.data}


async def test_one_asker_that_goes_away_does_not_take_the_flight_from_the_others(upstream, local):
    [chunk] = some_chunks(1)
    await upstream.put(chunk)
    upstream.gate = asyncio.Event()
    cached = Cached(upstream, local)
    first, second = (asyncio.create_task(cached.get(chunk.id)) for _ in range(2))
    while not upstream.gets:
        await asyncio.sleep(0)
    first.cancel()
    upstream.gate.set()
    assert (await second).data == chunk.data
    assert first.cancelled()
    assert upstream.gets == 1


async def test_a_failed_flight_is_not_remembered(upstream, local):
    [chunk] = some_chunks(1)
    cached = Cached(upstream, local)
    with pytest.raises(ChunkMissing):
        await cached.get(chunk.id)
    await upstream.put(chunk)
    assert (await cached.get(chunk.id)).data == chunk.data


@pytest.mark.parametrize("way", ["get", "open"])
async def test_a_cache_that_is_full_or_broken_does_not_stop_its_readers(upstream, local, way):
    [chunk] = some_chunks(1)
    await upstream.put(chunk)
    local.error = StoreError("disk failed")
    local.put_error = StoreError("no space", full=True)
    answer = await getattr(Cached(upstream, local), way)(chunk.id)
    data = answer.data if way == "get" else zstd.decompress(await frame_of(answer))
    assert data == chunk.data


async def test_upstream_is_not_asked_for_what_the_cache_has(upstream, local):
    chunks = some_chunks(4)
    await local.put_many(chunks[:2])
    await upstream.put_many(chunks[2:])
    cached = Cached(upstream, local)
    assert await cached.has_many([chunk.id for chunk in chunks[:2]]) == {chunk.id for chunk in chunks[:2]}
    assert upstream.asked == []
    assert await cached.has_many([chunk.id for chunk in chunks]) == {chunk.id for chunk in chunks}
    assert upstream.asked == [{chunk.id for chunk in chunks[2:]}]


async def test_closing_a_cache_ends_its_flights_and_closes_both(upstream, local):
    upstream.gate = asyncio.Event()
    cached = Cached(upstream, local)
    asker = asyncio.create_task(cached.get(ABSENT))
    while not upstream.gets:
        await asyncio.sleep(0)
    await cached.close()
    with pytest.raises(asyncio.CancelledError):
        await asker
    assert (upstream.closed, local.closed) == (1, 1)


# --- Failover


@pytest.mark.parametrize("way", ["get", "open"])
@pytest.mark.parametrize("trouble", ["missing", "damaged", "failed", "unreachable"])
async def test_the_next_one_is_asked_whatever_is_wrong_with_the_first(trouble, way):
    [chunk] = some_chunks(1)
    first, second = Flaky("first"), Flaky("second")
    await second.put(chunk)
    if trouble == "damaged":
        await first.put(chunk)
        first.spoil(chunk.id)
    elif trouble == "failed":
        first.error = StoreError("disk failed")
    elif trouble == "unreachable":
        first.error = UnreachableError("no route")
    answer = await getattr(Failover([first, second]), way)(chunk.id)
    assert answer.id == chunk.id


async def test_a_chunk_is_missing_only_if_all_say_so():
    first, second = Flaky("first"), Flaky("second")
    group = Failover([first, second])
    with pytest.raises(ChunkMissing):
        await group.get(ABSENT)
    second.error = UnreachableError("no route", retry_after=7)
    with pytest.raises(StoreError, match=r"first: .*not here; second: no route") as failed:
        await group.get(ABSENT)
    assert failed.value.retry_after == 7


async def test_damage_everywhere_is_told_as_damage_with_what_the_others_said():
    [chunk] = some_chunks(1)
    first, second = Flaky("first"), Flaky("second")
    await first.put(chunk)
    first.spoil(chunk.id)
    with pytest.raises(ChunkInvalid) as invalid:
        await Failover([first, second]).get(chunk.id)
    assert "second: " in invalid.value.__notes__[0]


async def test_has_many_is_a_union_and_survives_the_dead():
    chunks = some_chunks(6)
    first, dead, last = Flaky("first"), Flaky("dead"), Flaky("last")
    await first.put_many(chunks[:2])
    await last.put_many(chunks[1:4])
    dead.error = UnreachableError("no route")
    ids = [chunk.id for chunk in chunks]
    for order in ([first, dead, last], [dead, first, last], [last, first, dead]):
        assert await Failover(order).has_many(ids) == set(ids[:4])


async def test_has_many_of_only_dead_members_is_an_error_not_nothing():
    dead, other = Flaky("dead"), Flaky("other")
    dead.error = StoreError("disk failed", retry_after=9)
    other.error = UnreachableError("no route", retry_after=3)
    with pytest.raises(StoreError, match="dead: disk failed; other: no route") as failed:
        await Failover([dead, other]).has_many([ABSENT])
    assert failed.value.retry_after == 3


async def test_closing_a_group_closes_every_member():
    members = [Flaky(), Flaky()]
    await Failover(members).close()
    assert [member.closed for member in members] == [1, 1]


FAILURES = st.sampled_from(
    [
        Failure("a", ChunkMissing(ABSENT)),
        Failure("b", ChunkInvalid(ABSENT, "flipped")),
        Failure("c", StoreError("disk failed", retry_after=5)),
        Failure("d", UnreachableError("no route")),
    ]
)


@given(failures=st.lists(FAILURES, max_size=6))
def test_a_verdict_never_claims_more_than_the_members_proved(failures):
    judged = verdict(ABSENT, failures)
    kinds = {type(failure.error) for failure in failures}
    if kinds <= {ChunkMissing}:
        assert type(judged) is ChunkMissing
    elif kinds <= {ChunkMissing, ChunkInvalid}:
        assert type(judged) is ChunkInvalid
    else:
        assert type(judged) is StoreError
        assert all(failure.member + ": " in str(judged) for failure in failures)


@given(held=st.lists(st.sets(st.integers(0, 9)), min_size=1, max_size=4), wanted=st.sets(st.integers(0, 9)))
async def test_a_union_asks_nobody_twice_for_the_same(held, wanted):
    chunks = some_chunks(10)
    members = [Flaky() for _ in held]
    for member, indexes in zip(members, held, strict=True):
        await member.put_many([chunks[index] for index in indexes])
    found = await union(members, {chunks[index].id for index in wanted})
    assert found == {chunks[index].id for index in wanted & set().union(*held)}
    seen = set()
    for member in members:
        for asked in member.asked:
            assert not asked & seen
            seen |= asked & set(member.stored)
