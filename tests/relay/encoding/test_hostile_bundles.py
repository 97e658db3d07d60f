"""Bundles with deltas and stretches: whole ones say the same however they are split; others never more than they must.

Three forms of hostility: broken on purpose, one by one; as large as they may be, in a process with 256 MiB and 10 s;
and at random, so many rounds for each decoder (more in `make soak`), from the seed of the run.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from harness.bundle_kit import (
    Pack,
    Reader,
    bundle,
    covers_list,
    damaged,
    edited,
    joined,
    mixed,
    patch,
    split,
    stretches,
)
from harness.paths import ROOT
from harness.seed import SOAK, chance
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.encoding import bundle as bundles
from relay.encoding.bundle import (
    BASES_FACTOR,
    BASES_MAX,
    PLACES_MAX,
    RUN_AND_BASES_MAX,
    Aborted,
    BaseMissingError,
    CutShortError,
    Data,
    Failed,
    Missing,
    More,
    NeedsBases,
    Received,
    RunRefused,
    Span,
    Whole,
)
from relay.encoding.codecs import DELTAS, ENCODINGS, Coding, decoder_for, encode
from relay.errors import ChunkInvalid, FrameError
from relay.support.zstd import zstd

HERE = Path(__file__).parent
OLD = Pack([mixed(i, 3000 + 500 * i) for i in range(4)], "Acme.Old")
NEW = Pack([edited(chunk.data, i, 5) for i, chunk in enumerate(OLD.chunks)] + [b"end"], "Acme.New")
COUNT = len(NEW.chunks)


def payload_of(encoding, indexes, bases):
    base = OLD.data(bases) if encoding in DELTAS else b""
    return joined([encode(Coding(encoding, 0 if encoding == "raw" else 3), NEW.data(indexes), base)])


def run(encoding, indexes, bases=(1, 0, 2), cuts=(), payload=None):
    """One run of NEW on chunks of OLD, in as many stretches as `cuts` ask for."""
    spans = [OLD.span(bases)] if encoding in DELTAS else []
    payload = payload_of(encoding, indexes, bases) if payload is None else payload
    return list(stretches([NEW.span(indexes)], spans, encoding, payload, cuts))


def read(body, cuts=(), **how):
    return Reader(OLD, NEW, **how).read(split(body, cuts))


class Sinks:
    """Keeps what every sink was told."""

    def __init__(self) -> None:
        self.runs = []

    def __call__(self, places, bases, encoding):
        self.runs.append(Sinks.One(places, bases, encoding))
        return self.runs[-1]

    class One:
        def __init__(self, places, bases, encoding) -> None:
            self.about = (places, bases, encoding)
            self.payload = b""
            self.ended = []

        def add(self, piece):
            assert not self.ended
            assert isinstance(piece, bytes)
            self.payload += piece

        def finish(self):
            self.ended.append("finished")

        def fail(self):
            self.ended.append("failed")


# --- what is good comes through


@given(
    st.lists(
        st.tuples(st.sampled_from(ENCODINGS), st.lists(st.integers(0, 9000), max_size=5)),
        min_size=COUNT,
        max_size=COUNT,
    ),
    st.lists(st.integers(0, 40_000), max_size=12),
)
@settings(deadline=None, max_examples=60)
def test_all_encodings_in_any_stretches_and_any_split_give_the_same_events(runs, cuts):
    made = [run(encoding, [i], (3, i % 4) if i % 4 != 3 else (3,), inner) for i, (encoding, inner) in enumerate(runs)]
    body = bundle(*made)
    found = read(body, cuts)
    assert found.error is None
    assert found.received == list(range(COUNT))
    assert found.events[-1] == Whole(sum(map(len, made)))
    in_one = bundle(*[run(encoding, [i], (3, i % 4) if i % 4 != 3 else (3,)) for i, (encoding, _) in enumerate(runs)])
    assert list(found.told)[:-1] == list(read(in_one).told)[:-1]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_byte_by_byte_and_in_stretches_of_one_byte_every_run_comes_out(encoding):
    whole = payload_of(encoding, [4, 0, 2], (0, 1, 2))
    body = bundle(run(encoding, [4, 0, 2], (0, 1, 2), range(len(whole))), run(encoding, [1, 3]))
    for cuts in ((), range(len(body))):
        found = read(body, cuts)
        assert found.error is None
        assert found.received == [4, 0, 2, 1, 3]


def test_what_a_run_builds_on_is_asked_before_it_alone_and_in_its_order():
    body = bundle(run("raw", [3]), run("hdiff", [0, 1], (2, 0)), run("zstd-prefix", [2], (1, 3)), run("zstd", [4]))
    found = read(body)  # the reader checks that the question ends its batch
    old = OLD.manifest.id
    assert [(event.bases, event.encoding) for event in found.asked] == [
        (((old, 2), (old, 0)), "hdiff"),
        (((old, 1), (old, 3)), "zstd-prefix"),
    ]
    assert [event.size for event in found.asked] == [len(OLD.data([2, 0])), len(OLD.data([1, 3]))]
    kinds = [type(event) for event in found.events]
    assert kinds == [Received, NeedsBases, Received, Received, NeedsBases, Received, Received, Whole]


def test_a_run_may_name_a_base_twice_and_bases_of_the_package_itself():
    base = OLD.data([1, 1]) + NEW.data([4])
    payload = joined([encode(Coding("hdiff", 3), NEW.data([1]), base)])
    spans = [OLD.span([1]), OLD.span([1]), NEW.span([4])]
    found = read(bundle(run("raw", [4]), stretches([NEW.span([1])], spans, "hdiff", payload)))
    assert found.error is None
    assert found.received == [4, 1]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_chunks_are_handed_out_while_the_payload_is_still_coming_in_stretches(encoding):
    pack, base = Pack([mixed(i, 300_000) for i in range(4)]), OLD.data([0, 1])
    payload = joined([encode(Coding(encoding, 0 if encoding == "raw" else 1), pack.data(range(4)), base)])
    bases = [OLD.span([0, 1])] if encoding in DELTAS else []
    made = list(stretches([pack.span(range(4))], bases, encoding, payload, range(0, len(payload), 10_000)))
    reader, writer, seen = Reader(OLD, pack), bundles.BundleWriter(), []
    for piece in [writer.start(), *(part for header, data in made for part in (writer.frame(header), data))]:
        for batch in reader.decoder.feed(piece):
            reader._take(batch)
        seen.append(len(reader.received))
    # One zstd block of delay, 128 KiB, is less than a chunk: at least every quarter of the stretches brings one.
    assert seen[len(seen) // 2] >= 1
    assert seen[len(seen) * 4 // 5] >= 2
    assert seen[-1] == 4


def test_bases_can_be_given_one_by_one():
    reader = Reader(OLD, NEW, answer=False)
    for batch in reader.decoder.feed(bundle(run("hdiff", [0], (2, 0, 1)))):
        reader._take(batch)
        if isinstance(batch[-1], NeedsBases):
            for _, index in batch[-1].bases:
                batch[-1].add(OLD.chunks[index].data)
    assert reader.received == [0]


def test_whoever_keeps_the_question_does_not_keep_the_bases():
    found = read(bundle(run("hdiff", [0])))
    assert found.received == [0]
    assert found.asked[0].take() is None


# --- bases that are not there


@pytest.mark.parametrize("encoding", sorted(DELTAS))
@pytest.mark.parametrize("cuts", [(), (5, 100, 300)])
def test_without_its_bases_a_run_is_refused_and_the_next_one_read(encoding, cuts):
    sinks = Sinks()
    found = read(bundle(run(encoding, [0, 1], cuts=cuts), run("zstd", [2])), answer=False, tap=sinks)
    assert found.error is None
    (refusal,) = found.refusals
    assert isinstance(refusal.error, BaseMissingError)
    assert refusal.run == ((NEW.manifest.id, 0), (NEW.manifest.id, 1))
    assert found.received == [2]
    assert [sink.about[2] for sink in sinks.runs] == ["zstd"]


@pytest.mark.parametrize(
    "chunks", [[], [b""], [OLD.chunks[0].data[:-1]], [OLD.chunks[0].data, b"x"], [OLD.chunks[1].data]]
)
def test_an_answer_of_another_length_is_no_answer(chunks):
    reader = Reader(OLD, NEW, answer=False)
    for batch in reader.decoder.feed(bundle(run("hdiff", [0], (0,)))):
        reader._take(batch)
        if isinstance(batch[-1], NeedsBases):
            batch[-1].provide(chunks)
    assert isinstance(reader.refusals[0].error, BaseMissingError)


@pytest.mark.parametrize("encoding", sorted(DELTAS))
def test_bases_that_are_not_what_the_sender_meant_give_no_wrong_chunk(encoding):
    """Another base of the same length: what comes out has another hash, and the run is refused."""
    reader = Reader(OLD, NEW, answer=False)
    for batch in reader.decoder.feed(bundle(run(encoding, [1], (1,)), run("raw", [2]))):
        reader._take(batch)
        if isinstance(batch[-1], NeedsBases):
            batch[-1].provide([OLD.chunks[1].data[::-1]])
    (refusal,) = reader.refusals
    assert isinstance(refusal.error, ChunkInvalid | FrameError)
    assert reader.received == [2]


def test_bases_in_another_order_give_no_wrong_chunk():
    reader = Reader(OLD, NEW, answer=False)
    for batch in reader.decoder.feed(bundle(run("hdiff", [0, 1], (0, 1)))):
        reader._take(batch)
        if isinstance(batch[-1], NeedsBases):
            batch[-1].provide([OLD.chunks[1].data, OLD.chunks[0].data])
    assert reader.received == []
    assert [refusal.run for refusal in reader.refusals] == [((NEW.manifest.id, 0), (NEW.manifest.id, 1))]


# --- handing on


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_sink_gets_the_payload_as_it_came(encoding):
    sinks, payload = Sinks(), payload_of(encoding, [0, 1], (1, 0, 2))
    body = bundle(run(encoding, [0, 1], cuts=(1, 50, 2000)), run("raw", [2]))
    for cuts in ((), range(0, len(body), 7)):
        sinks.runs.clear()
        assert read(body, cuts, tap=sinks).error is None
        assert [(sink.payload, sink.ended) for sink in sinks.runs] == [
            (payload, ["finished"]),
            (NEW.data([2]), ["finished"]),
        ]
        new, old = NEW.manifest.id, OLD.manifest.id
        bases = ((old, 1), (old, 0), (old, 2)) if encoding in DELTAS else ()
        assert sinks.runs[0].about == (((new, 0), (new, 1)), bases, encoding)


def test_a_sink_may_not_be_wanted():
    assert read(bundle(run("hdiff", [0])), tap=lambda *_: None).received == [0]


LAST = len(payload_of("hdiff", [0, 1], (1, 0, 2)))
assert LAST > 150  # so that there is a second stretch
FAULTS = {
    "its sender gives up in the middle": bundle(run("hdiff", [0, 1], cuts=(100,))[:1], Failed("store_failed")),
    "another run in the middle": bundle(run("hdiff", [0, 1], cuts=(100,))[:1], run("raw", [2])),
    "an end in the middle": bundle(run("hdiff", [0, 1], cuts=(100,))[:1]),
    "cut in a stretch": bundle(run("hdiff", [0, 1], cuts=(100,)))[: -LAST // 2],
    "cut between stretches": b"".join(
        [bundles.MAGIC, *(bundles.BundleWriter().frame(h) + p for h, p in run("hdiff", [0, 1], cuts=(100,))[:1])]
    ),
    "a stretch of nothing": bundle(run("hdiff", [0, 1], cuts=(100,))[:1], More(0, 0)),
    "a stretch longer than the run": bundle(run("hdiff", [0, 1], cuts=(100,))[:1], (More(2**20, 0), bytes(2**20))),
    "a lying chunk": bundle(run("hdiff", [0, 1], payload=payload_of("hdiff", [1, 0], (1, 0, 2)))),
    "not the format": bundle(run("hdiff", [0, 1], payload=bytes(500))),
    "too short": bundle(run("hdiff", [0, 1], payload=payload_of("hdiff", [0], (1, 0, 2)))),
    "too long": bundle(run("hdiff", [0], payload=payload_of("hdiff", [0, 1], (1, 0, 2)))),
    "without its end": bundle(run("hdiff", [0, 1], payload=payload_of("hdiff", [0, 1], (1, 0, 2))[:-1])),
    "bytes behind": bundle(run("hdiff", [0, 1], payload=payload_of("hdiff", [0, 1], (1, 0, 2)) + b"\0")),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_a_sink_is_told_once_that_its_run_fails(name, step):
    sinks = Sinks()
    found = read(FAULTS[name], range(0, len(FAULTS[name]), step), tap=sinks)
    assert found.error is not None or len(found.refusals) == 1
    assert sinks.runs[0].ended == ["failed"]
    assert all(sink.ended in (["failed"], ["finished"]) for sink in sinks.runs)
    found.decoder.abandon()
    found.decoder.abandon()
    assert sinks.runs[0].ended == ["failed"]


@given(st.integers(0, 20_000))
@settings(deadline=None)
def test_wherever_a_bundle_is_cut_each_sink_ends_once_and_what_was_verified_counts(end):
    body = bundle(run("raw", [4]), run("hdiff", [0, 1], cuts=(40, 90)), run("zstd-prefix", [2], cuts=(30,)))
    end %= len(body)
    sinks = Sinks()
    found = read(body[:end], range(0, end, 50), tap=sinks)
    assert isinstance(found.error, FrameError)
    assert found.received == [4, 0, 1, 2][: len(found.received)]
    assert all(len(sink.ended) == 1 for sink in sinks.runs)
    assert [sink.ended for sink in sinks.runs[:-1]] == [["finished"]] * (len(sinks.runs) - 1)


def test_a_reader_that_gives_up_tells_the_sink():
    sinks = Sinks()
    reader = Reader(OLD, NEW, tap=sinks)
    body = bundle(run("raw", [0, 1]))
    batches = reader.decoder.feed(body[:-1000])
    assert [event.index for event in next(batches)] == [0]
    reader.decoder.abandon()
    assert sinks.runs[0].ended == ["failed"]


# --- what is hostile, one by one


def test_a_sender_that_gives_up_in_a_run_leaves_what_was_verified_and_says_why():
    body = bundle(run("raw", [0, 1], cuts=(len(NEW.data([0])) + 5,))[:1], Failed("store_failed"), run("raw", [2]))
    found = read(body)
    assert found.error is None
    kinds = [type(event) for event in found.events]
    assert kinds == [Received, RunRefused, Aborted, Received, Whole]
    assert found.refusals[0].run == ((NEW.manifest.id, 1),)
    assert isinstance(found.refusals[0].error, CutShortError), "it says so itself: no lie"


def data(encoding="hdiff", spans=None, bases=None, length=10, **changes):
    spans = (NEW.span([0]),) if spans is None else spans
    bases = ((OLD.span([0]),) if encoding in DELTAS else ()) if bases is None else bases
    return msgspec.structs.replace(Data(tuple(spans), tuple(bases), encoding, length, 0), **changes), bytes(
        max(0, length)
    )


BIG = Pack([b"x"], "Acme.Big")
"""Stands for a manifest whose chunks are large: see `large`."""


def large(count, size):
    entry = msgspec.structs.replace(BIG.manifest.chunks[0], size=size)
    pack = Pack([b"x"], f"Acme.Big{count}")
    pack.manifest.chunks = (entry,) * count
    pack.manifest.body = msgspec.structs.replace(pack.manifest.body, chunks=pack.manifest.chunks)
    return pack


LARGE = large(20, 4 << 20)
TINY = large(200_000, 1)


def of(pack, start, stop):
    return Span(bytes.fromhex(pack.manifest.id), ((start, stop),))


def opened(*more):
    """A run that is in the middle of its payload, and what comes then."""
    return bundle(run("raw", [0], cuts=(10,))[:1], *more)


HOSTILE = {
    "the middle without a beginning": (bundle((More(3, 0), b"abc")), "without its beginning"),
    "the middle after an end": (bundle(run("raw", [0]), (More(3, 0), b"abc")), "without its beginning"),
    "a run in the middle": (opened(run("raw", [1])), "another frame in the middle"),
    "a missing frame in the middle": (opened(Missing((NEW.span([1]),), "absent")), "another frame in the middle"),
    "an end in the middle": (opened(), "another frame in the middle"),
    "a stretch of nothing": (opened(More(0, 0, more=True)), "payload of 0 bytes"),
    "a stretch of less than nothing": (opened(More(-5, 0)), "payload of -5 bytes"),
    "a stretch of 2^63": (opened(More(2**63, 0)), "payload of"),
    "stretches of more than the run can need": (opened((More(5000, 0), bytes(5000))), "for a run of"),
    "a delta without bases": (bundle(data(bases=())), "without bases"),
    "a delta on an empty span": (bundle(data(bases=[Span(bytes.fromhex(OLD.manifest.id), ())])), "without bases"),
    "bases of a plain run": (bundle(data("zstd", bases=[OLD.span([0])])), "takes no bases"),
    "bases of a raw run": (bundle(data("raw", bases=[OLD.span([0])])), "takes no bases"),
    "a base that is not known": (bundle(data(bases=[Span(bytes(32), ((0, 1),))])), "not known here"),
    "a base outside of its manifest": (bundle(data(bases=[of(OLD, 3, 5)])), "does not lie"),
    "a base range of 2^64 - 1": (bundle(data(bases=[of(OLD, 0, 2**64 - 1)])), "does not lie"),
    "a base digest that is too short": (bundle(data(bases=[Span(b"x", ((0, 1),))])), "not 32 bytes"),
    "run and bases too large": (bundle(data(bases=[of(LARGE, 0, 16)])), "a run and bases of more than"),
    "bases too large, in pieces": (bundle(data(bases=[of(LARGE, 0, 1)] * 16)), "a run and bases of more than"),
    "more bases than agreed": (bundle(data(bases=[of(TINY, 0, 200_000)] * 2)), "names more than"),
    "an encoding of another name": (bundle(data(encoding="hdiff2")), "encoding"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("answer", [True, False])
def test_frames_that_break_the_format_end_the_bundle(name, answer):
    body, match = HOSTILE[name]
    for cuts in ((), range(0, len(body), 9)):
        found = Reader(OLD, NEW, LARGE, TINY, answer=answer).read(split(body, cuts))
        assert match in str(found.error)
        assert not found.refusals or found.refusals[0].run


def test_run_and_bases_may_be_as_large_as_agreed_and_no_larger():
    room = RUN_AND_BASES_MAX - 15 * (4 << 20)
    for size, fits in ((room, True), (room + 1, False)):
        pack = large(21, size)
        header, _ = data("hdiff", [of(pack, 0, 1)], [of(LARGE, 0, 15)])
        asked = Reader(LARGE, pack, answer=False).read([bundle((header, bytes(10)))]).asked
        assert [event.size for event in asked] == ([15 * (4 << 20)] if fits else [])


def test_small_runs_cannot_have_a_receiver_read_bases_for_ever():
    """16 runs of a few bytes on almost 64 MiB each: then they are refused, and plain runs are not."""
    payload = b"x"
    runs = [data("hdiff", [of(TINY, i, i + 1)], [of(LARGE, 0, 15)], 1) for i in range(40)]
    plain = list(stretches([of(TINY, 100, 101)], [], "raw", payload))
    found = Reader(LARGE, TINY, answer=False).read([bundle(*runs, plain)])
    assert found.error is None
    asked = sum(event.size - BASES_FACTOR for event in found.asked)
    assert 0 < asked <= BASES_MAX < asked + 15 * (4 << 20)
    assert len(found.refusals) == 40
    assert found.received == [100]


def test_a_list_of_covers_that_lies_refuses_its_run_only():
    size = NEW.chunks[0].size
    lies = {
        "outside of its base": [(OLD.chunks[0].size, 0, 1)],
        "before its base": [(-1, 0, 1)],
        "outside of its run": [(0, size, 1)],
    }
    for covers in lies.values():
        payload = patch(covers_list(covers), bytes(size))
        found = read(bundle(run("hdiff", [0], (0,), payload=payload), run("raw", [1])))
        assert found.error is None
        assert "lies outside" in str(found.refusals[0].error)
        assert found.received == [1]


def test_a_run_in_another_encoding_than_it_says_is_refused():
    for encoding in ENCODINGS:
        for said in ENCODINGS:
            found = read(bundle(run(said, [0, 1], payload=payload_of(encoding, [0, 1], (1, 0, 2))), run("raw", [2])))
            # zstd is a special case of zstd-prefix: a frame that makes no use of its prefix.
            same = said == encoding or (said, encoding) == ("zstd-prefix", "zstd")
            assert found.received == ([0, 1, 2] if same else [2]), (said, encoding)


# --- what is hostile, as large as it may be: in a process that has 256 MiB and 10 s


def child(case, seconds=10):
    command = [sys.executable, str(HERE / "hostile_child.py"), case, str(seconds)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        check=False,
    )


def outcome(case):
    done = child(case)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.processes
def test_the_childs_limits_bite():
    memory = child("limit of memory")
    assert memory.returncode == 1
    assert "MemoryError" in memory.stderr
    assert child("limit of time", seconds=1).returncode < 0


@pytest.mark.processes
@pytest.mark.parametrize(
    ("case", "chunks"),
    [
        ("whole zstd", 17),
        ("whole prefix, even", 9),
        ("whole prefix, large base", 2),
        ("whole prefix, large run", 16),
        ("whole hdiff, even", 9),
        ("whole hdiff, large base", 2),
        ("whole hdiff, longest list", 9),
        ("as many places as allowed", 250_000),
        ("stretches of one byte", 100_000),
    ],
)
def test_the_largest_runs_are_taken_within_256_mib_and_10_s(case, chunks):
    found = outcome(case)
    assert (found["received"], found["refused"], found["error"]) == (chunks, {}, None)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("giant window zstd", "too much memory for decoding"),
        ("giant window prefix", "too much memory for decoding"),
        ("giant window hdiff", "too much memory for decoding"),
        ("bomb zstd", "more than its run needs"),
        ("bomb prefix", "more than its run needs"),
        ("bomb hdiff", "more than its run needs"),
        ("bomb list", "a list of covers holds more"),
        ("nothing zstd", "a run ended early"),
        ("nothing prefix", "a run ended early"),
        ("nothing hdiff", "a run ended early"),
        ("small runs on large bases", "small runs on more than"),
    ],
)
def test_the_largest_lies_are_refused_within_256_mib_and_10_s_and_the_next_run_taken(case, match):
    found = outcome(case)
    assert found["error"] is None
    assert found["received"] > 0
    ((refusal, _),) = found["refused"].items()
    assert match in refusal


@pytest.mark.processes
@pytest.mark.parametrize(
    ("case", "match"), [("bases of one byte", f"more than {PLACES_MAX} bases"), ("more without end", "for a run of")]
)
def test_the_largest_breaches_of_the_format_end_the_bundle_within_256_mib_and_10_s(case, match):
    assert match in outcome(case)["error"]


# --- what is hostile, at random


ROUNDS = 40_000 if SOAK else 600


def fuzz(name, once):
    """Call `once(rng)`, which says whether what it made was refused, again and again. Both must have happened."""
    rng, outcomes = chance(name), [0, 0]
    for _ in range(ROUNDS):
        outcomes[once(rng)] += 1
    print(f"{ROUNDS} rounds, {outcomes[True]} refused")
    assert outcomes[True]
    assert outcomes[False]


@functools.cache
def corpus(encoding):
    """Good payloads with their bases and runs, small enough for many rounds."""
    pairs = [(mixed(i, size), edited(mixed(i, size), i, 6)) for i, size in enumerate((0, 1, 9, 300, 4000, 20_000))]
    levels = (0,) if encoding == "raw" else (1, 19)
    return [
        (base, new, joined([encode(Coding(encoding, level), new, base)])) for base, new in pairs for level in levels
    ]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_damaged_payloads_give_no_more_than_their_run_and_nothing_but_frame_errors(encoding):
    def once(rng):
        base, new, payload = rng.choice(corpus(encoding))
        decoder, size = decoder_for(encoding, len(new), base), 0
        payload = damaged(payload, rng) if rng.random() < 0.97 else payload
        try:
            for piece in split(payload, [rng.randrange(len(payload) + 1) for _ in range(rng.randrange(4))]):
                for found in decoder.feed(memoryview(piece)):
                    size += len(found)
                    assert 0 <= size <= len(new)
        except FrameError:
            return True
        return not decoder.is_whole

    fuzz(encoding, once)


def test_damaged_lists_of_covers_give_no_more_than_their_run_and_nothing_but_frame_errors():
    """Damage behind the compression, which damage of whole payloads seldom reaches."""

    def once(rng):
        base, new, payload = rng.choice(corpus("hdiff"))
        length = int.from_bytes(payload[:4], "little")
        covers, difference = zstd.decompress(payload[4 : 4 + length]), zstd.decompress(payload[4 + length :])
        payload = patch(damaged(covers, rng), difference)
        decoder = decoder_for("hdiff", len(new), base)
        try:
            assert len(joined([decoder.feed(memoryview(payload))])) == len(new)
        except FrameError:
            return True
        return False

    fuzz("covers", once)


@functools.cache
def good_bundles():
    """Good bundles, and their frames apart."""
    every = [
        [
            run(encoding, [i], (i % 4,), (30, 31, 500) if i % 2 else ())
            for i, encoding in enumerate((*ENCODINGS, "raw"))
        ],
        [run("hdiff", [0, 1, 2, 3], (0, 1, 2, 3), range(0, 3000, 97)), run("zstd-prefix", [4], (3,))],
        [[(Missing((NEW.span([0, 1]),), "arriving"), b"")], run("zstd", [4, 2, 3]), [(Failed("store_failed"), b"")]],
    ]
    return [(bundle(*frames), [pair for frame in frames for pair in frame]) for frames in every]


def test_damaged_bundles_give_verified_chunks_and_nothing_but_refusals():
    def once(rng):
        body, parts = rng.choice(good_bundles())
        way = rng.randrange(4)
        if way == 0:
            body = damaged(body, rng)
        elif way == 1:  # frames lost, doubled, moved
            parts = list(parts)
            for _ in range(rng.randint(1, 3)):
                parts.insert(rng.randrange(len(parts) + 1), parts.pop(rng.randrange(len(parts))))
                parts[rng.randrange(len(parts))] = rng.choice(parts)
            body = bundle(parts)
        elif way == 2:  # payloads damaged, with lengths that are true
            body = bundle([_with(header, damaged(data, rng)) if data else (header, data) for header, data in parts])
        else:  # headers damaged, with lengths that are true
            at = rng.randrange(len(parts))
            body = bundle(
                [_lie(header, data, rng) if i == at else (header, data) for i, (header, data) in enumerate(parts)]
            )
        sinks = Sinks()
        reader = Reader(OLD, NEW, answer=rng.random() < 0.9, tap=sinks)
        reader.read(split(body, [rng.randrange(len(body) + 1) for _ in range(rng.randrange(4))]))
        assert all(isinstance(event, get_args(bundles.Event)) for event in reader.events)
        assert len(list(reader.told)) == len(reader.events)  # each chunk is the one that it is called
        assert len(set(reader.received)) == len(reader.received)
        assert all(isinstance(refusal.error, FrameError | ChunkInvalid) for refusal in reader.refusals)
        assert all(refusal.run for refusal in reader.refusals)
        assert all(len(sink.ended) == 1 for sink in sinks.runs)
        return reader.error is not None or bool(reader.refusals)

    fuzz("bundle", once)


def _with(header, payload):
    return msgspec.structs.replace(header, length=len(payload)), payload


def _lie(header, payload, rng):
    """A header in which one field says something else that can be said."""
    lies = {
        "run": [(), (NEW.span([0]),), (NEW.span([4, 0]),), (OLD.span([0]),), (NEW.span([0]), OLD.span([1]))],
        "bases": [(), (OLD.span([0]),), (OLD.span([3, 2, 1, 0]),), (NEW.span([0]),), (OLD.span([0]),) * 9],
        "encoding": [*ENCODINGS, "", "gzip"],
        "length": [0, 1, len(payload) - 1, len(payload) + 1, 2**31, 2**63, -1],
        "xxh3": [0, 2**64 - 1],
        "more": [True, False],
        "code": ["", "x" * 1000],
        "reason": ["absent", "arriving"],
    }
    field = rng.choice(header.__struct_fields__)
    return msgspec.structs.replace(header, **{field: rng.choice(lies[field])}), payload
