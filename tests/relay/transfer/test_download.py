from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import pytest
from harness.packages import cut_package, noise
from harness.short_runs import shorten_segments
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.encoding.bundle import Aborted, BaseMissingError, CutShortError, Event, NotSent, Received, RunRefused, Whole
from relay.encoding.choose_bases import Held
from relay.encoding.holdings import Holdings
from relay.errors import (
    ChunkInvalid,
    FrameError,
    RefusedError,
    StoreError,
    UnreachableError,
    UntrustedError,
    WaystationError,
)
from relay.package.manifest import Manifest
from relay.support.persistence import Persistence
from relay.transfer import download as downloads
from relay.transfer import pace
from relay.transfer.download import (
    ChunkSource,
    DownloadLimits,
    NoSourceLeftError,
    OvertakenError,
    Receiver,
    StalledError,
    download,
)

CUT = cut_package({f"lib/{i:02}.dll": noise(i, 65536 + i) for i in range(24)})
MANIFEST = CUT.manifest
EVERY = set(CUT.indexes)
PATIENCE = 30.0


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """Several requests from a small package."""
    shorten_segments(monkeypatch, 200_000)


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

    async def stream(self, manifest: Manifest, indexes: Sequence[int], **how: object) -> AsyncGenerator[Event, None]:
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


class Sink(Receiver):
    """Takes what is delivered, and remembers it. It pauses for no time worth noticing."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.failed: list[tuple[str, WaystationError]] = []
        self.find_bases: Callable[[], Awaitable[Holdings | None]] = super().bases
        self.known_goodput = 0.0

    async def take(self, batch: Sequence[Received]) -> None:
        await asyncio.sleep(0)
        self.taken += [received.index for received in batch]

    async def bases(self) -> Holdings | None:
        return await self.find_bases()

    def goodput(self, source: str) -> float:
        return self.known_goodput

    async def left(self, source: ChunkSource, error: WaystationError) -> None:
        self.failed.append((source.name, error))


async def run(
    *sources: Source,
    sink: Sink | None = None,
    wanted=EVERY,
    find_bases=None,
    goodput=0.0,
    stall_seconds=PATIENCE,
    failures=0,
    **limits,
):
    sink = sink or Sink()
    persistence = Persistence(0.001, 0.001, longest_asked=0.001, failures=failures, patience=stall_seconds)
    sink.limits = DownloadLimits(persistence=persistence, **limits)
    sink.find_bases, sink.known_goodput = find_bases or sink.find_bases, goodput
    async with asyncio.timeout(PATIENCE):
        return sink, await download(MANIFEST, wanted, sources, sink)


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
    assert len(tallies["first"].timings) == len(first.asked) > 3
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
        async def stream(self, manifest, indexes, **how):
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
    assert len(bad.asked) <= downloads.CONNECTIONS


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
    assert isinstance(tallies["stuck"].error, StalledError)


async def test_a_source_that_stands_still_is_left_however_many_failures_are_borne():
    stuck = Source("stuck", always=(0, "arriving"))
    with pytest.raises(NoSourceLeftError) as caught:
        await run(stuck, failures=1000, stall_seconds=0.05)
    assert isinstance(caught.value.errors["stuck"], StalledError)


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


@pytest.mark.parametrize(("failing", "is_borne"), [(2, True), (3, False)])
async def test_so_many_failures_in_a_row_are_borne_as_the_receiver_says(failing, is_borne):
    gone = UnreachableError("gone")
    script = [(1, gone), *[(0, gone)] * (failing - 1), (1, gone), None]
    source, other = Source("first", script), Source("other")
    sink, tallies = await run(source, other, failures=2, asks_whole=True)
    assert each_once(sink)
    assert (tallies["first"].error is None) == is_borne
    assert (other.asked == []) == is_borne


async def test_a_lie_is_never_borne():
    liar, good = Source("liar", [(0, UntrustedError("other bytes"))]), Source("good")
    _, tallies = await run(liar, good, failures=5)
    assert isinstance(tallies["liar"].error, UntrustedError)


# --- a source that is slow, and no more than that


@pytest.fixture
def impatient(monkeypatch):
    """What takes seconds takes hundredths of them here."""
    for name, value in {"LOOK_SECONDS": 0.01, "WINDOW_SECONDS": 0.05, "TRY_BYTES": 100_000, "END_SECONDS": 0.1}.items():
        monkeypatch.setattr(downloads, name, value)
    monkeypatch.setattr(pace, "WORTH_SECONDS", 0.05)


@dataclass
class Dripping(Source):
    """A chunk now and then, as soon as `served` chunks have come."""

    served: int = 0
    seconds: float = 0.1

    async def stream(self, manifest: Manifest, indexes: Sequence[int], **how: object) -> AsyncGenerator[Event, None]:
        self.asked.append(list(indexes))
        try:
            for index in indexes:
                if self.served <= 0:
                    await asyncio.sleep(self.seconds)
                self.served -= 1
                yield got(index)
            yield Whole(len(indexes))
        finally:
            self.closed += 1


@pytest.mark.parametrize("served", [0, 5], ids=["from the start", "after some chunks"])
@pytest.mark.parametrize("seconds", [0.1, 3600.0], ids=["dripping", "silent"])
async def test_a_slow_source_is_overtaken_by_one_that_brings_the_rest_sooner(impatient, served, seconds):
    slow, fast = Dripping("slow", served=served, seconds=seconds), Source("fast")
    sink, tallies = await run(slow, fast)
    assert each_once(sink)
    assert [name for name, _ in sink.failed] == ["slow"]
    assert isinstance(sink.failed[0][1], OvertakenError)
    assert tallies["slow"].overtaken
    assert tallies["slow"].error is None, "it is no failure: where the others fail, it is asked again"
    assert tallies["fast"].chunks > tallies["slow"].chunks
    assert slow.closed == len(slow.asked), "its requests ended with the download"


async def test_a_source_that_waits_for_ever_is_overtaken(impatient, monkeypatch):
    monkeypatch.setattr(downloads, "WAITING_SECONDS", 0.0)
    stuck, good = Source("stuck", always=(0, "arriving")), Source("good")
    sink, tallies = await run(stuck, good)
    assert each_once(sink)
    assert tallies["stuck"].overtaken


async def test_a_source_that_was_measured_as_slow_is_not_even_tried(impatient):
    slow, slower = Dripping("slow", seconds=0.01), Source("slower")
    sink, _ = await run(slow, slower, goodput=1.0)
    assert each_once(sink)
    assert slower.asked == []


async def test_a_source_that_is_no_faster_is_tried_with_a_little_and_left_alone(impatient):
    slow, same = Dripping("slow", seconds=0.02), Dripping("same", seconds=0.02)
    sink, tallies = await run(slow, same)
    assert each_once(sink)
    assert sink.failed == []
    assert same.asked
    assert all(len(indexes) <= 3 for indexes in same.asked)
    assert not tallies["slow"].overtaken


async def test_a_slow_source_is_asked_again_where_the_fast_one_fails(impatient):
    slow = Dripping("slow", seconds=0.05)
    fickle = Source("fickle", [None, (1, UnreachableError("gone"))], always=(0, UnreachableError("gone")))
    sink, tallies = await run(slow, fickle)
    assert each_once(sink)
    assert tallies["fickle"].chunks >= 1
    assert tallies["slow"].chunks >= 1
    assert isinstance(tallies["fickle"].error, UnreachableError)


async def test_of_two_that_stand_still_neither_keeps_the_third_from_being_asked(impatient):
    stuck, stuck_too, good = Dripping("stuck", seconds=3600.0), Dripping("stuck too", seconds=3600.0), Source("good")
    sink, tallies = await run(stuck, stuck_too, good)
    assert each_once(sink)
    assert tallies["good"].chunks > 20


async def test_a_lie_of_a_source_that_is_only_tried_is_told(impatient):
    slow, liar, good = Dripping("slow", seconds=0.1), Source("liar", always=(0, UntrustedError("lies"))), Source("good")
    sink, tallies = await run(slow, liar, good)
    assert each_once(sink)
    assert isinstance(tallies["liar"].error, UntrustedError)


async def test_one_that_cannot_be_tried_is_not_left_for_that(impatient):
    slow, away = Dripping("slow", seconds=0.02), Source("away", always=(0, UnreachableError("not now")))
    sink, tallies = await run(slow, away)
    assert each_once(sink)
    assert away.asked
    assert tallies["away"].error is None


async def test_an_answer_that_has_everything_and_no_end_is_ended_and_told(impatient):
    class Endless(Source):
        async def stream(self, manifest, indexes, **how):
            for index in indexes:
                yield got(index)
            await asyncio.sleep(3600)

    sink, tallies = await run(Endless(), connections=1, asks_whole=True)
    assert each_once(sink)
    assert "does not end" in tallies["relay"].error.message
    assert [name for name, _ in sink.failed] == ["relay"]


# --- receivers that differ


async def test_a_receiver_that_asks_for_the_whole_asks_once_with_what_is_held_whatever_the_line():
    source = Differing()
    await run(source, asks_whole=True, find_bases=held_here, goodput=LAN)
    [(indexes, with_bases, _)] = source.asked_with
    assert (indexes, with_bases) == (sorted(EVERY), True)


async def test_chunks_are_taken_one_by_one_where_the_receiver_wants_them_so():
    class One(Sink):
        async def take(self, batch):
            assert len(batch) == 1
            await super().take(batch)

    sink, _ = await run(Source(), sink=One(), batch_bytes=0)
    assert each_once(sink)


async def test_the_receiver_hears_of_each_run_and_takes_its_payload_while_it_comes():
    class Tapping(Sink):
        heard: ClassVar[list] = []
        pieces: ClassVar[list] = []

        def tap(self, run, bases, encoding):
            self.heard.append((len(run), len(bases), encoding))
            ends = {"finish": lambda: self.pieces.append("end"), "fail": lambda: self.pieces.append("failed")}
            return SimpleNamespace(add=self.pieces.append, **ends)

    class Announcing(Source):
        async def stream(self, manifest, indexes, *, tap, **how):
            sink = tap(((manifest.id, indexes[0]),), (), "zstd")
            sink.add(b"stretch")
            sink.finish()
            sink.fail()
            async for event in super().stream(manifest, indexes, **how):
                yield event

    sink, tallies = await run(Announcing(), sink=Tapping(), connections=1)
    assert each_once(sink)
    requests = len(tallies["relay"].timings)
    assert sink.heard == [(1, 0, "zstd")] * requests
    assert sink.pieces == [b"stretch", "end", "failed"] * requests


async def test_what_a_source_did_can_be_read_meanwhile():
    tallies = {}

    class Watching(Sink):
        async def take(self, batch):
            await super().take(batch)
            assert tallies["relay"].chunks == len(self.taken) - len(batch)

    sink = Watching()
    await download(MANIFEST, EVERY, [Source()], sink, tallies)
    assert tallies["relay"].chunks == len(EVERY)


# --- what is not the sources' fault


class FullDisk(Sink):
    calls = 0

    async def take(self, batch):
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
        async def stream(self, manifest, indexes, **how):
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
        async def stream(self, manifest, indexes, **how):
            self.asked.append(list(indexes))
            try:
                yield got(indexes[0])
                await asyncio.sleep(3600)
            finally:
                self.closed += 1

    source, sink = Slow(), Sink()
    task = asyncio.create_task(run(source, sink=sink))
    while len(source.asked) < downloads.CONNECTIONS:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(sink.taken) == sorted(indexes[0] for indexes in source.asked)
    assert source.closed == len(source.asked)


# --- differences from what is held here

OLDER = cut_package({f"lib/{i:02}.dll": noise(f"older {i}", 65536 + i) for i in range(24)}, version="0.9.0")
HOLDINGS = SimpleNamespace(held=(Held(OLDER.manifest, ((0, len(OLDER.indexes)),)),), load=None)
THIN, LAN = 100_000.0, 100e6


class Differing(Source):
    """Sends differences to whoever names bases, as long as `wrong` says nothing else; plain chunks to others."""

    def __init__(self, name: str = "relay", wrong: object = None, plain: object = None) -> None:
        super().__init__(name)
        self.wrong, self.plain = wrong, plain
        self.asked_with: list[tuple[list[int], bool, float]] = []

    async def stream(self, manifest, indexes, *, bases=None, goodput=0.0, tap=None):
        self.asked.append(list(indexes))
        self.asked_with.append((list(indexes), bases is not None, goodput))
        run = tuple((manifest.id, index) for index in indexes)
        try:
            await asyncio.sleep(0)
            error = self.plain if bases is None else self.wrong
            if bases is None:
                for place in run:
                    tap((place,), (), "zstd")
            elif not isinstance(error, BaseMissingError):
                tap(run, ((OLDER.manifest.id, 0),), "hdiff")
            if error is not None:
                yield RunRefused(run[1:], error)
            for index in indexes[: 1 if error is not None else None]:
                yield got(index)
            yield Whole(1)
        finally:
            self.closed += 1


async def held_here():
    return HOLDINGS


@pytest.mark.parametrize(
    "error", [FrameError("nonsense"), ChunkInvalid("ab" * 32, "cd" * 32), BaseMissingError("gone")]
)
async def test_a_difference_that_fails_is_asked_for_again_plainly_of_the_same_source(error):
    source, other = Differing(wrong=error), Source("other")
    sink, tallies = await run(source, other, find_bases=held_here, goodput=THIN)
    assert each_once(sink)
    assert other.asked == []
    assert sink.failed == []
    [(_, first, _), (_, second, _)] = source.asked_with
    assert (first, second) == (True, False)
    assert tallies["relay"].fallbacks == 1
    if not isinstance(error, BaseMissingError):
        assert {name: each.chunks for name, each in tallies["relay"].encodings.items()} == {
            "hdiff": 1,
            "zstd": len(EVERY) - 1,
        }


async def test_a_source_whose_plain_bytes_are_wrong_too_is_left():
    liar, good = Differing("liar", FrameError("nonsense"), ChunkInvalid("ab" * 32, "cd" * 32)), Source("good")
    sink, tallies = await run(liar, good, find_bases=held_here, goodput=THIN)
    assert each_once(sink)
    assert [with_bases for _, with_bases, _ in liar.asked_with] == [True, False]
    assert isinstance(tallies["liar"].error, UntrustedError)
    assert tallies["liar"].fallbacks == 1


async def test_a_source_whose_differences_fail_again_and_again_is_asked_for_none_any_more(monkeypatch):
    shorten_segments(monkeypatch, 200_000, 140_000)
    source = Differing(wrong=FrameError("nonsense"))
    sink, tallies = await run(source, find_bases=held_here, goodput=THIN)
    assert each_once(sink)
    assert tallies["relay"].fallbacks == downloads.FALLBACKS_MAX
    assert sum(with_bases for _, with_bases, _ in source.asked_with) == downloads.FALLBACKS_MAX
    assert len(source.asked) > 2 * downloads.FALLBACKS_MAX


async def test_a_refused_run_is_a_lie_where_no_bases_were_named():
    liar, good = Differing("liar", plain=FrameError("nonsense")), Source("good")
    sink, tallies = await run(liar, good, connections=1)
    assert each_once(sink)
    assert isinstance(tallies["liar"].error, FrameError)
    assert tallies["liar"].fallbacks == 0


async def test_what_is_held_is_looked_for_once_and_only_where_a_line_is_not_fast():
    looked = 0

    async def find():
        nonlocal looked
        looked += 1
        await asyncio.sleep(0.001)
        return HOLDINGS

    fast = Differing()
    await run(fast, find_bases=find, goodput=LAN)
    assert looked == 0
    assert not any(with_bases for _, with_bases, _ in fast.asked_with)
    medium = Differing()
    await run(medium, find_bases=find, goodput=10e6, connections=3)
    assert looked == 1
    assert all(with_bases for _, with_bases, _ in medium.asked_with)


async def test_who_holds_nothing_names_nothing():
    for nothing in (None, SimpleNamespace(held=(), load=None)):

        async def find(found=nothing):
            return found

        source = Differing()
        await run(source, find_bases=find, goodput=THIN)
        assert not any(with_bases for _, with_bases, _ in source.asked_with)


async def test_a_thin_line_has_one_request_at_a_time_and_the_source_is_told_of_it():
    running = most = 0

    class Counting(Differing):
        async def stream(self, manifest, indexes, **how):
            nonlocal running, most
            running += 1
            most = max(most, running)
            async for event in super().stream(manifest, indexes, **how):
                await asyncio.sleep(0)
                yield event
            running -= 1

    source = Counting()
    await run(source, goodput=THIN, connections=4)
    assert most == 1
    assert {goodput for _, _, goodput in source.asked_with} == {THIN}


async def test_a_relay_that_broke_off_for_a_moment_is_asked_again():
    source, other = Source("relay", [(1, Aborted("busy")), (0, Aborted("busy"))]), Source("other")
    sink, tallies = await run(source, other, connections=1)
    assert each_once(sink)
    assert other.asked == []
    assert tallies["relay"].error is None


async def test_a_pace_that_something_else_set_never_makes_a_line_look_thinner(monkeypatch):
    monkeypatch.setattr(downloads, "_TELLING_BYTES", 1)
    shorten_segments(monkeypatch, 200_000, 300_000)

    class Slow(Differing):
        async def stream(self, manifest, indexes, **how):
            await asyncio.sleep(0.05)
            async for event in super().stream(manifest, indexes, **how):
                yield event

    source = Slow()
    _, tallies = await run(source, find_bases=held_here, goodput=2e6)
    assert len(source.asked) > 2
    assert not any(timing.is_steady for timing in tallies["relay"].timings)
    assert all(goodput >= 2e6 for _, _, goodput in source.asked_with)


# --- whatever happens

steps = st.one_of(
    st.none(),
    st.tuples(st.integers(0, 6), st.sampled_from([*TROUBLES, "arriving", "arriving"])),
    st.tuples(st.integers(0, 6), st.just(UnreachableError("busy", retry_after=0.5))),
)
scripts = st.lists(st.tuples(st.lists(steps, max_size=6), st.booleans()), max_size=4)


@pytest.mark.long
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


@given(st.sets(st.sampled_from(sorted(EVERY))), st.sets(st.sampled_from(sorted(EVERY))))
def test_segments_hold_every_index_once_in_order_of_one_kind_and_within_their_bound(wanted, plainly):
    run = downloads._Download(MANIFEST, wanted, [], Sink(), {})
    run._todo.extend(sorted(wanted))
    run._plainly = plainly
    segments = []
    while run._todo:
        segment, is_plain = run._next_segment(200_000)
        segments.append(segment)
        assert {index in plainly for index in segment} == {is_plain}
        assert len(segment) == 1 or sum(MANIFEST.chunks[i].size for i in segment) <= 200_000
    assert [index for segment in segments for index in segment] == sorted(wanted)


async def test_a_run_that_its_sender_itself_cuts_short_is_no_lie_and_is_asked_for_again():
    cut_short = RunRefused(
        tuple((MANIFEST.id, index) for index in range(2)), CutShortError("its sender could not go on")
    )
    source, other = Source("relay", [(0, [cut_short, Aborted("busy")])]), Source("other")
    sink, tallies = await run(source, other, connections=1)
    assert each_once(sink)
    assert other.asked == []
    assert tallies["relay"].error is None
    assert tallies["relay"].fallbacks == 0
