from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cut_package, noise

from relay import fetch as fetching
from relay.content.frames import Aborted, Event, NotSent, Received, RunRefused, Whole
from relay.content.manifest import Manifest
from relay.errors import (
    ChunkInvalid,
    FrameError,
    RefusedError,
    StoreError,
    UnreachableError,
    UntrustedError,
    WaystationError,
)
from relay.fetch import NoSourceLeftError, fetch

CUT = cut_package({f"lib/{i:02}.dll": noise(i, 65536 + i) for i in range(24)})
MANIFEST = CUT.manifest
EVERY = set(CUT.indexes)
PATIENCE = 30.0


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """Several requests from a small package, and no pauses worth noticing."""
    monkeypatch.setattr(fetching, "SEGMENT_BYTES", 200_000)
    monkeypatch.setattr(fetching, "_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(fetching, "_BUSY_SECONDS", 0.001)


def got(index: int) -> Received:
    chunk = CUT.chunk(index)
    return Received(MANIFEST.id, index, chunk, chunk.size)


@dataclass
class Source:
    """Serves everything, but for what its `script` says: one entry is used up by each request."""

    name: str = "relay"
    script: list[object] = field(default_factory=list)
    """None serves; `(n, trouble)` serves n chunks first: an exception is raised, an event or a list of them yielded."""
    always: object = None
    """What holds when the script is used up."""
    asked: list[list[int]] = field(default_factory=list)
    closed: int = 0

    async def stream(self, manifest: Manifest, indexes: Sequence[int]) -> AsyncGenerator[Event, None]:
        assert manifest is MANIFEST
        self.asked.append(list(indexes))
        step = self.script.pop(0) if self.script else self.always
        served, trouble = step if step is not None else (len(indexes), Whole(len(indexes)))
        try:
            for index in list(indexes)[:served]:
                await asyncio.sleep(0)
                yield got(index)
            if isinstance(trouble, BaseException):
                raise trouble
            rest = tuple((manifest.id, index) for index in list(indexes)[served:])
            if isinstance(trouble, str):
                if rest:
                    yield NotSent(rest, trouble)
            elif isinstance(trouble, list):
                for event in trouble:
                    yield event
            else:
                yield trouble
        finally:
            self.closed += 1


class Sink:
    """Takes what is delivered, and remembers it."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.failed: list[tuple[str, WaystationError]] = []

    async def deliver(self, batch: list[Received]) -> None:
        await asyncio.sleep(0)
        self.taken += [received.index for received in batch]

    async def on_failure(self, source: Source, error: WaystationError) -> None:
        self.failed.append((source.name, error))


async def run(*sources: Source, sink: Sink | None = None, wanted=EVERY, **options):
    sink = sink or Sink()
    async with asyncio.timeout(PATIENCE):
        tallies = await fetch(MANIFEST, wanted, sources, sink.deliver, on_failure=sink.on_failure, **options)
    return sink, tallies


def each_once(sink: Sink, wanted=EVERY) -> bool:
    return Counter(sink.taken) == Counter(wanted)


# --- when all is well


async def test_every_chunk_is_delivered_once_from_the_first_source():
    first, second = Source("first"), Source("second")
    sink, tallies = await run(first, second)
    assert each_once(sink)
    assert second.asked == []
    assert tallies["first"].chunks == len(EVERY)
    assert tallies["first"].bytes == sum(entry.size for entry in MANIFEST.chunks)
    assert len(tallies["first"].measured) == len(first.asked) > 3
    assert first.closed == len(first.asked)


async def test_only_what_is_wanted_is_asked_for():
    source = Source()
    sink, _ = await run(source, wanted={3, 5, 4})
    assert each_once(sink, {3, 4, 5})
    assert sorted(index for indexes in source.asked for index in indexes) == [3, 4, 5]


async def test_nothing_wanted_asks_nobody():
    source = Source()
    sink, tallies = await run(source, wanted=())
    assert (sink.taken, tallies, source.asked) == ([], {}, [])


async def test_no_more_requests_at_a_time_than_agreed():
    running = most = 0

    class Counting(Source):
        async def stream(self, manifest, indexes):
            nonlocal running, most
            running += 1
            most = max(most, running)
            try:
                await asyncio.sleep(0.001)
                for index in indexes:
                    yield got(index)
            finally:
                running -= 1

    await run(Counting(), connections=3)
    assert (running, most) == (0, 3)


# --- when sources fail


TROUBLES = [
    UnreachableError("gone"),
    UntrustedError("lies"),
    RefusedError("no"),
    FrameError("broken"),
    Aborted("store_failed"),
    RunRefused(((MANIFEST.id, 0),), ChunkInvalid("ab" * 32, "cd" * 32)),
    "absent",
    Whole(0),
]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: type(trouble).__name__)
@pytest.mark.parametrize("served", [0, 1])
async def test_a_source_that_fails_is_named_and_the_next_goes_on_with_what_is_missing(trouble, served):
    bad, good = Source("bad", always=(served, trouble)), Source("good")
    sink, tallies = await run(bad, good)
    assert each_once(sink)
    assert [name for name, _ in sink.failed] == ["bad"]
    assert tallies["bad"].error is sink.failed[0][1]
    assert tallies["good"].error is None
    assert tallies["bad"].chunks + tallies["good"].chunks == len(EVERY)
    # What came verified before the failure was kept, and not asked for again.
    assert tallies["bad"].chunks == served * len(bad.asked)
    assert len(bad.asked) <= fetching.CONNECTIONS


async def test_a_lying_source_is_not_asked_again_in_this_fetch():
    liar, good = Source("liar", [(0, UntrustedError("other bytes"))]), Source("good")
    _, tallies = await run(liar, good, connections=1)
    assert len(liar.asked) == 1
    assert isinstance(tallies["liar"].error, UntrustedError)


@pytest.mark.parametrize(
    "lie", [[Whole(0)], [], [got(0), got(0)], [got(23)], [NotSent(((MANIFEST.id, 0),), "arriving")]]
)
async def test_a_source_that_passes_over_chunks_or_sends_others_is_left(lie):
    """Also one that says nothing at all: it must not be asked for ever."""
    liar, good = Source("liar", always=(0, lie)), Source("good")
    sink, tallies = await run(liar, good, wanted={0, 1, 2}, connections=1)
    assert each_once(sink, {0, 1, 2})
    assert isinstance(tallies["liar"].error, FrameError)
    assert len(liar.asked) == 1


async def test_no_source_left_names_each_with_its_reason_and_keeps_what_came():
    one = Source("one", [None], always=(1, UnreachableError("the line broke")))
    two = Source("two", always=(0, UntrustedError("other bytes")))
    sink = Sink()
    with pytest.raises(NoSourceLeftError) as caught:
        await run(one, two, sink=sink, connections=1)
    assert "one: the line broke" in str(caught.value)
    assert "two: other bytes" in str(caught.value)
    assert set(caught.value.errors) == {"one", "two"}
    assert len(sink.taken) == len(set(sink.taken)) == len(one.asked[0]) + 1


async def test_without_any_source_the_error_says_so():
    with pytest.raises(NoSourceLeftError, match="there is none"):
        await run()


# --- chunks on their way


async def test_chunks_that_are_still_arriving_are_asked_for_again():
    source = Source(script=[(1, "arriving"), (0, "arriving"), (0, "arriving"), (2, "arriving")])
    sink, tallies = await run(source, connections=1)
    assert each_once(sink)
    assert tallies["relay"].error is None


async def test_a_source_where_nothing_arrives_any_more_is_left_for_the_next():
    stuck, good = Source("stuck", always=(0, "arriving")), Source("good")
    sink, tallies = await run(stuck, good, stall_seconds=0.05)
    assert each_once(sink)
    assert isinstance(tallies["stuck"].error, UnreachableError)


async def test_the_next_source_gets_its_own_patience():
    """It is not held against it that the one before it stood still."""
    stuck = Source("stuck", always=(0, "arriving"))
    slow = Source("slow", [(0, "arriving"), (0, "arriving")])
    sink, tallies = await run(stuck, slow, stall_seconds=0.1, connections=1)
    assert each_once(sink)
    assert tallies["slow"].error is None


async def test_a_source_that_asks_for_patience_gets_it():
    busy = UnreachableError("busy", retry_after=1.0)
    source, other = Source("busy", [(0, busy), (1, busy)]), Source("other")
    sink, tallies = await run(source, other)
    assert each_once(sink)
    assert other.asked == []
    assert tallies["busy"].error is None


async def test_patience_with_a_busy_source_ends():
    busy = Source("busy", always=(0, UnreachableError("busy", retry_after=0.0)))
    sink, tallies = await run(busy, Source("other"), stall_seconds=0.05)
    assert each_once(sink)
    assert tallies["busy"].error is not None


# --- what is not the sources' fault


class FullDisk(Sink):
    calls = 0

    async def deliver(self, batch):
        self.calls += 1
        raise StoreError("no room", full=True)


async def test_an_error_of_the_receiver_is_raised_as_itself_and_blames_no_source():
    sink, source = FullDisk(), Source()
    with pytest.raises(StoreError) as caught:
        await run(source, Source("other"), sink=sink)
    assert caught.value.full
    assert sink.failed == []
    assert source.closed == len(source.asked)


async def test_a_batch_that_could_not_be_delivered_is_not_delivered_again():
    sink = FullDisk()
    with pytest.raises(StoreError):
        await run(Source(), sink=sink, connections=1)
    assert sink.calls == 1


class BoomError(Exception):
    pass


async def test_a_worker_that_dies_of_something_else_ends_the_fetch_and_hangs_nobody():
    class Hanging(Source):
        async def stream(self, manifest, indexes):
            self.asked.append(list(indexes))
            if len(self.asked) == 1:
                yield got(indexes[0])
                await asyncio.sleep(3600)
            raise BoomError

    source, sink = Hanging(), Sink()
    with pytest.raises(BoomError):
        await run(source, sink=sink)
    assert len(source.asked) == 2
    assert sink.taken == [source.asked[0][0]]  # what had come was kept all the same


async def test_a_fetch_that_is_cancelled_keeps_what_came_and_closes_its_requests():
    class Slow(Source):
        async def stream(self, manifest, indexes):
            self.asked.append(list(indexes))
            try:
                yield got(indexes[0])
                await asyncio.sleep(3600)
            finally:
                self.closed += 1

    source, sink = Slow(), Sink()
    task = asyncio.create_task(run(source, sink=sink))
    while len(source.asked) < fetching.CONNECTIONS:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(sink.taken) == sorted(indexes[0] for indexes in source.asked)
    assert source.closed == len(source.asked)


# --- whatever happens

steps = st.one_of(
    st.none(),
    st.tuples(st.integers(0, 6), st.sampled_from([*TROUBLES, "arriving", "arriving"])),
    st.tuples(st.integers(0, 6), st.just(UnreachableError("busy", retry_after=0.5))),
)
scripts = st.lists(st.tuples(st.lists(steps, max_size=6), st.booleans()), max_size=4)


@given(scripts, st.sets(st.sampled_from(sorted(EVERY))), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_whatever_fails_either_all_is_delivered_once_or_no_source_is_left(scripts, wanted, connections):
    sources = [
        Source(f"relay {i}", list(script), always=None if steady else (0, UnreachableError("gone")))
        for i, (script, steady) in enumerate(scripts)
    ]
    sink = Sink()

    async def attempt():
        try:
            return (await run(*sources, sink=sink, wanted=wanted, connections=connections, stall_seconds=5.0))[1]
        except NoSourceLeftError as error:
            return error

    ended = asyncio.run(attempt())
    assert Counter(sink.taken) <= Counter(wanted)
    if isinstance(ended, NoSourceLeftError):
        assert set(sink.taken) < set(wanted)
        assert set(ended.errors) == {source.name for source in sources}
    else:
        assert each_once(sink, wanted)
        assert sum(tally.chunks for tally in ended.values()) == len(wanted)
    for source in sources:
        assert source.closed == len(source.asked)
    assert [name for name, _ in sink.failed] == list(dict.fromkeys(name for name, _ in sink.failed))


@given(st.sets(st.sampled_from(sorted(EVERY))))
def test_segments_hold_every_index_once_in_order_and_within_their_bound(wanted):
    segments = fetching._segments(MANIFEST, wanted)
    assert [index for segment in segments for index in segment] == sorted(wanted)
    for segment in segments:
        assert len(segment) == 1 or sum(MANIFEST.chunks[i].size for i in segment) <= fetching.SEGMENT_BYTES
