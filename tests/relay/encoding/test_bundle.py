from __future__ import annotations

import asyncio
import hashlib
import struct
import tracemalloc
from itertools import chain, pairwise

import msgspec
import pytest
import xxhash
from harness.packages import cut_package, encode_run, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.encoding.bundle import (
    BATCH_BYTES,
    HEADER_MAX,
    MAGIC,
    PAYLOAD_MAX,
    PLACES_MAX,
    RUN_MAX,
    Aborted,
    BundleDecoder,
    BundleWriter,
    Data,
    End,
    Failed,
    Header,
    Missing,
    NotSent,
    Received,
    RunRefused,
    Span,
    Whole,
    data_header,
    plan_runs,
)
from relay.errors import ChunkInvalid, FrameError
from relay.package.chunk import CHUNK_MAX, Chunk
from relay.package.manifest import ChunkEntry, Manifest
from relay.support.zstd import zstd

MIB = 1 << 20
CUT = cut_package(
    {f"lib/{i}.dll": noise(i, 65536 + i) for i in range(3)}
    | {"content/text.txt": b"compresses well " * 9000, "content/small.txt": b"small"}
)
MANIFEST = CUT.manifest
COUNT = len(MANIFEST.chunks)
OTHER = cut_package({"other.txt": b"other"}).manifest


# --- making bundles


def data(indexes, encoding="zstd"):
    """Header and payload of one run, as bytes of a bundle; the header too, for the digest of the end."""
    encoding, payload = encode_run([CUT.chunk(i).data for i in indexes], encoding)
    return data_header((Span.of(MANIFEST.id, indexes),), encoding, payload), payload


def bundle(*parts):
    """A whole bundle of `(header, payload)` pairs or bare headers."""
    writer = BundleWriter()
    out = [writer.start()]
    for part in parts:
        header, payload = part if isinstance(part, tuple) else (part, b"")
        out += [writer.frame(header), payload]
    return b"".join([*out, writer.end()])


def header(struct_or_bytes):
    packed = struct_or_bytes if isinstance(struct_or_bytes, bytes) else msgspec.msgpack.encode(struct_or_bytes)
    return struct.pack("<I", len(packed)) + packed


def raw_run(payload, indexes=(0,), encoding="zstd", **changes):
    """A data frame that says what it likes."""
    said = Data((Span.of(MANIFEST.id, indexes),), (), encoding, len(payload), xxhash.xxh3_64_intdigest(payload))
    return msgspec.structs.replace(said, **changes), payload


GOOD = bundle(
    data([0, 1]), data([2], "raw"), Missing((Span.of(MANIFEST.id, [3]),), "arriving"), data(list(range(4, COUNT)))
)


# --- reading them


def decoder(wanted=None, manifest=MANIFEST):
    resolve = {manifest.id: manifest}.get
    return BundleDecoder(resolve) if wanted is None else BundleDecoder(resolve, wanted)


def read(body, pieces=None, **how):
    """All events, and the error that ended them, if any."""
    reader, events = decoder(**how), []
    try:
        for piece in [body] if pieces is None else pieces:
            for batch in reader.feed(piece):
                events += batch
        reader.finish()
    except FrameError as error:
        return events, error
    return events, None


def told(events):
    """Events without what depends on how the body was split."""
    for event in events:
        if isinstance(event, Received):
            assert event.chunk.id == MANIFEST.chunk_id(event.index)
            yield event.manifest, event.index, event.chunk.id
        elif isinstance(event, RunRefused):
            yield event.run, str(event.error)
        else:
            yield event


def received(events):
    return [event.index for event in events if isinstance(event, Received)]


def refused(body, match, **how):
    events, error = read(body, **how)
    assert error is not None
    assert match in str(error)
    return events


# --- what is good comes through


def test_a_bundle_gives_every_chunk_in_order_and_its_end():
    events, error = read(GOOD)
    assert error is None
    assert received(events) == [i for i in range(COUNT) if i != 3]
    assert [e for e in events if isinstance(e, NotSent)] == [NotSent(((MANIFEST.id, 3),), "arriving")]
    assert events[-1] == Whole(4)


@given(st.lists(st.integers(1, len(GOOD) - 1), max_size=12))
def test_any_split_of_the_bytes_gives_the_same_events(cuts):
    edges = [0, *sorted(cuts), len(GOOD)]
    pieces = [GOOD[a:b] for a, b in pairwise(edges)]
    events, error = read(GOOD, pieces)
    assert error is None
    assert list(told(events)) == list(told(read(GOOD)[0]))


def test_byte_by_byte_gives_the_same_events():
    body = bundle(data([COUNT - 1]), Missing((Span.of(MANIFEST.id, [0]),), "absent"))
    events, error = read(body, [bytes([byte]) for byte in body])
    assert error is None
    assert list(told(events)) == list(told(read(body)[0]))


def test_a_chunk_is_handed_out_with_its_last_byte_in_the_middle_of_a_run():
    body = bundle(data([0, 1, 2], "raw"))
    at = body.index(CUT.chunk(1).data)
    reader = decoder()
    assert [e.index for batch in reader.feed(body[:at]) for e in batch] == [0]
    end = at + MANIFEST.chunks[1].size
    assert [e for batch in reader.feed(body[at : end - 1]) for e in batch] == []
    assert [e.index for batch in reader.feed(body[end - 1 : end]) for e in batch] == [1]


@given(st.permutations(range(COUNT)))
@settings(max_examples=20)
def test_a_run_may_have_any_order(order):
    events, error = read(bundle(data(order)))
    assert error is None
    assert received(events) == order


@pytest.mark.parametrize("encoding", ["raw", "zstd"])
def test_payload_bytes_add_up_to_what_crossed_the_line(encoding):
    head, payload = data(list(range(COUNT)), encoding)
    events, _ = read(bundle((head, payload)))
    counted = sum(event.payload_bytes for event in events if isinstance(event, Received))
    assert len(payload) - 64 <= counted <= len(payload)


def test_what_does_not_compress_travels_raw():
    assert encode_run([noise("noise", 70_000)], "zstd")[0] == "raw"
    assert encode_run([b"text " * 9000], "zstd")[0] == "zstd"


def test_the_senders_own_word_that_it_cannot_go_on_is_told():
    events, error = read(bundle(Failed("store_failed")))
    assert (events[0], error) == (Aborted("store_failed"), None)


# --- what is damaged is seen


@given(st.integers(0, len(GOOD) - 1))
def test_every_truncation_is_a_frame_error_at_the_end(end):
    events, error = read(GOOD[:end])
    assert isinstance(error, FrameError)
    assert list(told(events)) == list(told(read(GOOD)[0]))[: len(events)]


def payload_places():
    """Offsets of GOOD that lie in payloads."""
    at, places = len(MAGIC), set()
    while at < len(GOOD):
        (length,) = struct.unpack_from("<I", GOOD, at)
        said = msgspec.msgpack.decode(GOOD[at + 4 : at + 4 + length], type=Header)
        at += 4 + length
        if isinstance(said, Data):
            places.update(range(at, at + said.length))
            at += said.length
    return places


IN_PAYLOAD = payload_places()
OUTSIDE = sorted(set(range(len(GOOD))) - IN_PAYLOAD)


def flipped(at, bit):
    return GOOD[:at] + bytes([GOOD[at] ^ 1 << bit]) + GOOD[at + 1 :]


@pytest.mark.parametrize("bit", range(8))
def test_every_flip_of_a_bit_outside_of_the_payloads_is_refused(bit):
    for at in OUTSIDE:
        events, error = read(flipped(at, bit))
        assert isinstance(error, FrameError), (at, bit)
        list(told(events))  # what came before it was verified


@given(st.sampled_from(sorted(IN_PAYLOAD)), st.integers(0, 7))
@settings(max_examples=150)
def test_a_flip_in_a_payload_yields_verified_chunks_only_and_names_the_rest(at, bit):
    events, error = read(flipped(at, bit))
    assert error is None
    named = [index for event in events if isinstance(event, RunRefused) for _, index in event.run]
    assert sorted([*received(events), *named, 3]) == list(range(COUNT))
    list(told(events))


def test_frames_after_a_refused_run_still_count():
    at = GOOD.index(CUT.chunk(2).data)
    events, error = read(flipped(at, 0))
    assert error is None
    (refusal,) = [event for event in events if isinstance(event, RunRefused)]
    assert isinstance(refusal.error, ChunkInvalid)
    assert refusal.run == ((MANIFEST.id, 2),)
    assert received(events) == [i for i in range(COUNT) if i not in {2, 3}]


def test_damage_on_the_way_is_told_from_a_lie():
    payload = encode_run([CUT.chunk(0).data[:-1]], "raw")[1]
    lie, _ = read(bundle(raw_run(payload, encoding="raw")))
    damage, _ = read(bundle(raw_run(payload, encoding="raw", xxh3=1)))
    assert "holds less" in str(lie[0].error)
    assert "damaged on the way" in str(damage[0].error)


def test_chunks_that_were_swapped_are_refused():
    payload = CUT.chunk(1).data + CUT.chunk(0).data
    events, error = read(bundle(raw_run(payload, (0, 1), encoding="raw")))
    assert error is None
    assert received(events) == []
    assert isinstance(events[0].error, ChunkInvalid)


def test_after_an_error_nothing_more_is_taken():
    reader = decoder()
    with pytest.raises(FrameError):
        list(reader.feed(b"not a bundle"))
    with pytest.raises(FrameError):
        list(reader.feed(GOOD))
    with pytest.raises(FrameError):
        reader.finish()


def test_what_was_found_before_an_error_comes_before_it():
    said, payload = data([0])
    events = refused(MAGIC + header(said) + payload + header(b"\xc1"), "unreadable")
    assert received(events) == [0]


async def test_an_error_in_a_thread_comes_out_as_itself():
    body = bundle(data([0, 1], "raw"))
    batches = decoder().feed(body + b"more")
    assert received(await asyncio.to_thread(next, batches, None)) == [0, 1]
    with pytest.raises(FrameError, match="after the end"):
        await asyncio.to_thread(next, batches, None)
    assert await asyncio.to_thread(next, batches, None) is None


# --- what is hostile is refused, within bounded memory


def span(*ranges, manifest=None):
    return (Span(bytes.fromhex(manifest or MANIFEST.id), tuple(ranges)),)


def missing(run):
    return Missing(run, "absent")


HOSTILE = {
    "another magic": (b"WAYBNDL2" + GOOD[8:], "not a bundle"),
    "an empty header": (MAGIC + struct.pack("<I", 0), "header of 0 bytes"),
    "a giant header": (MAGIC + struct.pack("<I", 2**32 - 1), "header of 4294967295 bytes"),
    "a header above the bound": (MAGIC + struct.pack("<I", HEADER_MAX + 1), "expected 1 to"),
    "a header of nested arrays": (MAGIC + header(b"\x91" * HEADER_MAX), "unreadable"),
    "a header of nested maps": (MAGIC + header(b"\x81\x01" * (HEADER_MAX // 2)), "unreadable"),
    "a header that says it is huge": (MAGIC + header(b"\xdd\xff\xff\xff\xff"), "unreadable"),
    "a header with a huge text": (MAGIC + header(b"\x92\xa5error\xdb\xff\xff\xff\xff"), "unreadable"),
    "a text that is not UTF-8": (MAGIC + header(b"\x92\xa5error\xa2\xff\xfe"), "unreadable"),
    "a frame of an unknown type": (MAGIC + header(msgspec.msgpack.encode(["delta", 1])), "unreadable"),
    "bytes after the header's value": (MAGIC + header(msgspec.msgpack.encode(End(0, b"")) + b"\0"), "unreadable"),
    "a range of a thousand million": (MAGIC + header(missing(span((0, 10**9)))), "does not lie"),
    "a range of 2^64 - 1": (MAGIC + header(missing(span((0, 2**64 - 1)))), "does not lie"),
    "a range from below 0": (MAGIC + header(missing(span((-(2**63), 1)))), "does not lie"),
    "an empty range": (MAGIC + header(missing(span((1, 1)))), "does not lie"),
    "a backward range": (MAGIC + header(missing(span((2, 1)))), "does not lie"),
    "ranges that overlap": (MAGIC + header(missing(span((0, 2), (1, 3)))), "overlap"),
    "too many ranges": (MAGIC + header(missing(span(*[(0, 1)] * 100_001))), "ranges in one list"),
    "a manifest that is not known": (MAGIC + header(missing(span((0, 1), manifest=OTHER.id))), "not known here"),
    "a digest that is too short": (MAGIC + header(missing((Span(b"short", ((0, 1),)),))), "not 32 bytes"),
    "a missing frame about nothing": (MAGIC + header(missing(())), "empty run"),
    "a chunk that is missing twice": (bundle(missing(span((0, 1))), missing(span((0, 1)))), "twice"),
    "a chunk that is sent twice": (bundle(data([0]), data([0])), "twice"),
    "a chunk that is sent and missing": (bundle(data([0]), missing(span((0, 1)))), "twice"),
    "a chunk twice in one run": (MAGIC + header(missing(span((0, 1)) * 2)), "twice"),
    "a run of nothing": (bundle(raw_run(b"x", ())), "empty run"),
    "a payload of nothing": (bundle(raw_run(b"")), "payload of 0 bytes"),
    "a payload of less than nothing": (bundle(raw_run(b"x", length=-1)), "payload of -1 bytes"),
    "a payload above the bound": (bundle(raw_run(b"x", length=PAYLOAD_MAX + 1)), "payload of"),
    "a payload of 2^63": (bundle(raw_run(b"x", length=2**63)), "payload of"),
    "a payload far above what its run needs": (bundle(raw_run(b"x", length=PAYLOAD_MAX)), "for a run of"),
    "an unknown encoding": (bundle(raw_run(b"x", encoding="hdiff" * 100)), "encoding"),
    "bases where there are none": (bundle(raw_run(b"x", bases=span((1, 2)))), "takes no bases"),
    "an end that lies about the frames": (MAGIC + header(End(7, hashlib.sha256().digest())), "does not match"),
    "an end that lies about the headers": (MAGIC + header(End(0, bytes(32))), "does not match"),
    "bytes after the end": (GOOD + b"\0", "after the end"),
    "a second bundle after the end": (GOOD + GOOD, "after the end"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames_are_refused_within_bounded_memory(name):
    body, match = HOSTILE[name]
    tracemalloc.start()
    try:
        refused(body, match)
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()


def test_a_chunk_that_was_not_asked_for_is_refused():
    events = refused(bundle(data([0]), data([1])), "not asked for", wanted=lambda _, index: index == 0)
    assert received(events) == [0]
    refused(bundle(missing(span((1, 2)))), "not asked for", wanted=lambda _, index: index == 0)


def test_a_payload_that_lies_about_its_content_is_refused_and_the_next_frame_read():
    inside = CUT.chunk(0).data
    liars = {
        "not zstd at all": (noise("x", 3000), "not zstd"),
        "more than its run": (zstd.compress(inside + b"!"), "more than its run"),
        "less than its run": (zstd.compress(inside[:-1]), "less than it names"),
        "cut off": (
            zstd.compress(inside, options={zstd.CompressionParameter.checksum_flag: 1})[:-2],
            "without its end",
        ),
        "followed by bytes": (zstd.compress(inside) + b"tail", "after the zstd frame"),
        "two zstd frames": (zstd.compress(inside[:9]) + zstd.compress(inside[9:]), "after the zstd frame"),
    }
    for name, (payload, match) in liars.items():
        events, error = read(bundle(raw_run(payload), data([1])))
        assert error is None, name
        refusal = next(event for event in events if isinstance(event, RunRefused))
        assert match in str(refusal.error), name
        assert received(events)[-1:] == [1], name


def test_a_window_above_the_bound_is_refused():
    options = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.compression_level: 1}
    engine = zstd.ZstdCompressor(options=options)
    inside = CUT.chunk(0).data
    payload = engine.compress(inside[:100]) + engine.compress(inside[100:]) + engine.flush()
    tracemalloc.start()
    try:
        events, error = read(bundle(raw_run(payload), data([1])))
        assert tracemalloc.get_traced_memory()[1] < 32 * MIB
    finally:
        tracemalloc.stop()
    assert error is None
    assert "not zstd within bounds" in str(events[0].error)
    assert received(events) == [1]


def test_a_bomb_in_a_payload_is_refused_without_inflating_it():
    bomb = zstd.compress(bytes(512 * MIB))
    assert len(bomb) < MANIFEST.chunks[0].size
    tracemalloc.start()
    try:
        events, error = read(bundle(raw_run(bomb), data([1])))
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()
    assert error is None
    assert [type(event) for event in events[:2]] == [RunRefused, Received]


def big(count, size=CHUNK_MAX, id=None):
    """A manifest of many chunks with one content, as only its bounds matter here."""
    zeros = id or Chunk.of(bytes(size)).id
    body = msgspec.structs.replace(MANIFEST.body, chunks=(ChunkEntry(zeros, size),) * count)
    return Manifest(body, repr((count, size)).encode())


def test_a_run_of_more_than_agreed_is_refused():
    manifest = big(RUN_MAX // CHUNK_MAX + 1)
    run = (Span(bytes.fromhex(manifest.id), ((0, len(manifest.chunks)),)),)
    refused(MAGIC + header(Data(run, (), "zstd", 100, 0)), "a run of more than", manifest=manifest)


def test_a_small_body_that_inflates_hugely_is_handed_out_piece_by_piece():
    """512 MiB of verified chunks in some 60 KB: never more than a batch of them is held."""
    manifest = big(128)
    payload = zstd.compress(bytes(CHUNK_MAX))
    said = [
        Data(
            (Span(bytes.fromhex(manifest.id), ((i, i + 1),)),),
            (),
            "zstd",
            len(payload),
            xxhash.xxh3_64_intdigest(payload),
        )
        for i in range(128)
    ]
    body = bundle(*[(each, payload) for each in said])
    assert len(body) < MIB
    reader, seen = decoder(manifest=manifest), 0
    tracemalloc.start()
    try:
        for batch in reader.feed(body):
            held = sum(event.chunk.size for event in batch if isinstance(event, Received))
            assert held <= BATCH_BYTES + CHUNK_MAX
            seen += held
        reader.finish()
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()
    assert seen == 512 * MIB


def test_a_bundle_cannot_name_more_chunks_than_agreed():
    manifests = [big(PLACES_MAX // 2, 1), big(PLACES_MAX // 2 + 1, 1)]
    resolve = {manifest.id: manifest for manifest in manifests}.get
    said = tuple(Span(bytes.fromhex(m.id), ((0, len(m.chunks)),)) for m in manifests)
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match="names more than"):
            list(BundleDecoder(resolve).feed(MAGIC + header(missing(said))))
        assert tracemalloc.get_traced_memory()[1] < 128 * MIB
    finally:
        tracemalloc.stop()
    again, piece = BundleDecoder(resolve), header(missing(said[:1]))
    assert len(list(again.feed(MAGIC + piece))) == 1
    with pytest.raises(FrameError):
        list(again.feed(piece))


@given(st.binary(max_size=300))
def test_any_bytes_after_the_magic_are_refused(junk):
    _, error = read(MAGIC + junk)
    assert isinstance(error, FrameError)


@pytest.mark.long
@given(
    st.recursive(st.none() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=40) | st.text(max_size=5), st.lists)
)
def test_any_message_as_a_header_is_refused_or_understood(value):
    for packed in (value, ["data", value], ["missing", value, "absent"], ["missing", [[MANIFEST.id, value]], "absent"]):
        _, error = read(MAGIC + header(msgspec.msgpack.encode(packed)))
        assert isinstance(error, FrameError)


# --- planning


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 150))
def test_runs_keep_order_and_their_bound(sizes, bound):
    runs = plan_runs(list(enumerate(sizes)), bound)
    assert list(chain.from_iterable(runs)) == list(range(len(sizes)))
    for run in runs:
        assert run
        assert len(run) == 1 or sum(sizes[i] for i in run) <= bound
    for run, following in pairwise(runs):
        assert sum(sizes[i] for i in run) + sizes[following[0]] > bound


# --- bases


@pytest.mark.parametrize("encoding", ["zstd-prefix", "hdiff"])
def test_a_base_that_the_receiver_never_offered_breaks_the_bundle(encoding):
    """Though its manifest is known here: it is the one that is being read."""
    writer = BundleWriter()
    header = Data((Span.of(MANIFEST.id, [1]),), (Span.of(MANIFEST.id, [0]),), encoding, 1, 0)
    body = writer.start() + writer.frame(header) + b"x" + writer.end()
    decoder = BundleDecoder({MANIFEST.id: MANIFEST}.get, offered=lambda _manifest, index: index != 0)

    with pytest.raises(FrameError, match="never offered"):
        list(decoder.feed(body))
