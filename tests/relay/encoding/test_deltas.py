"""The `hdiff` payload: what goes in comes out, and what was made to hurt is refused."""

from __future__ import annotations

import struct
import sys
import tracemalloc

import hdiffpatch
import pytest
from harness.bundle_kit import covers_list, decoded, edited, giant_window, mixed, patch, split, unpatch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay.encoding import deltas
from relay.encoding.codecs import Coding, can_encode, encode
from relay.encoding.deltas import (
    COVERS_MAX,
    Cover,
    DeltaUnavailableError,
    PatchDecoder,
    add,
    encode_patch,
    find_covers,
    subtract,
)
from relay.errors import FrameError
from relay.support.zstd import zstd

MIB = 1 << 20
BASE = bytes(range(256)) * 8
SPLITS = st.lists(st.integers(0, 4000), max_size=8)


def encoded(base, new, level=3):
    return b"".join(encode_patch(base, new, level=level))


@st.composite
def pairs(draw):
    """A base, and something new that holds stretches of it, changed a little, among bytes of its own."""
    base = draw(st.binary(max_size=600))
    new = bytearray()
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(base)))
        piece = bytearray(base[start : start + draw(st.integers(0, 300))])
        if piece and draw(st.booleans()):
            step = draw(st.integers(1, 40))
            piece[::step] = bytes((byte + draw(st.integers(0, 255))) % 256 for byte in piece[::step])
        new += piece + draw(st.binary(max_size=20))
    return base, bytes(new)


# --- what goes in comes out


@settings(deadline=None)
@given(pairs(), SPLITS)
@example((b"", b""), [])
@example((b"", b"x"), [])
@example((b"x", b""), [])
@example((b"x", b"x"), [1, 2, 3, 4, 5])
@example((BASE, BASE), [])
@example((BASE * 3, BASE[500:700]), [])
@example((b"\0", BASE), [])
def test_what_was_encoded_comes_out_however_it_was_split(pair, cuts):
    base, new = pair
    assert decoded(PatchDecoder(base, len(new)), encoded(base, new), cuts) == new


@settings(deadline=None)
@given(pairs())
def test_a_payload_is_laid_out_as_the_protocol_says(pair):
    base, new = pair
    assert unpatch(encoded(base, new), base, len(new)) == new


@settings(deadline=None)
@given(st.binary(max_size=300), st.binary(max_size=300), SPLITS)
def test_bytes_that_have_nothing_in_common_come_out_too(base, new, cuts):
    payload = encoded(base, new)
    assert decoded(PatchDecoder(base, len(new)), payload, cuts) == new
    assert len(payload) <= len(new) + (len(new) >> 8) + 1024


def test_any_level_and_a_length_across_all_slices_come_out_byte_by_byte_or_at_once():
    base = mixed(1, MIB + MIB // 2)
    new = edited(base, 2, 300)
    assert len(new) > MIB
    for level in (1, 19):
        payload = encoded(base, new, level)
        assert len(payload) < len(new) // 50
        assert decoded(PatchDecoder(base, len(new)), payload) == new
        assert decoded(PatchDecoder(base, len(new)), payload, range(len(payload))) == new


def test_what_was_moved_and_changed_everywhere_costs_little():
    """What exact matches cannot do: addresses that all moved by the same amount (bsdiff's idea)."""
    table = b"".join(struct.pack("<Q", 0x400000 + 24 * i) for i in range(20_000))
    moved = b"".join(struct.pack("<Q", 0x400040 + 24 * i) for i in range(20_000))
    assert len(encoded(table, moved, 19)) < len(moved) // 100


def test_the_shortest_covers_are_left_out_where_there_are_too_many(monkeypatch):
    base = edited(bytes(100_000), 5, 30_000)
    pieces = [base[1000 * i : 1000 * i + 40 * i] for i in range(20, 2, -1)]
    new = b"".join(bytes([255 - i]) * 50 + piece for i, piece in enumerate(pieces))
    found = find_covers(base, new)
    monkeypatch.setattr(deltas, "COVERS_MAX", 40)
    fewer = find_covers(base, new)
    assert 3 < len(fewer) < len(found)
    longest = sorted(found, key=lambda cover: -cover.length)[: len(fewer)]
    assert fewer == sorted(longest, key=lambda cover: cover.new)
    payload = encoded(base, new)
    assert decoded(PatchDecoder(base, len(new)), payload) == new


# --- byte by byte


@settings(deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=200), st.integers(0, 130))
def test_adding_and_subtracting_are_what_they_are_for_each_byte(left, right, repeat):
    size = min(len(left), len(right))
    left, right = left[:size] * repeat, right[:size] * repeat
    assert add(left, right) == bytes((a + b) % 256 for a, b in zip(left, right, strict=True))
    assert subtract(left, right) == bytes((a - b) % 256 for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("size", [0, 1, 8191, 8192, 8193, 16384, 20_000])
def test_every_pair_of_bytes_adds_and_subtracts_at_every_edge_of_a_lane(size):
    for shift in (0, 1, 77, 128, 255):
        left = (bytes(range(256)) * 80)[:size]
        right = bytes((byte * 7 + shift) % 256 for byte in left)
        assert add(memoryview(left), bytearray(right)) == bytes((a + b) % 256 for a, b in zip(left, right, strict=True))
        assert subtract(left, right) == bytes((a - b) % 256 for a, b in zip(left, right, strict=True))
    zeros = bytes(size)
    full = b"\xff" * size
    assert add(zeros, full) == full
    assert subtract(full, full) == zeros
    assert subtract(zeros, full) == b"\1" * size


def test_unequal_lengths_are_the_callers_fault():
    with pytest.raises(ValueError, match="against"):
        add(b"a", b"")
    with pytest.raises(ValueError, match="against"):
        subtract(b"", b"a")


# --- what is hostile


SIZE = 1000
"""Bytes of the run that hostile payloads are for; the base is `BASE`."""
NOTHING = bytes(SIZE)
ONE = (0, 0, 10)


def refused(payload, cuts):
    """How many bytes were given before the payload was refused, as it must be."""
    decoder, size = PatchDecoder(BASE, SIZE), 0
    with pytest.raises(FrameError):  # noqa: PT012 - what comes before the error is the point
        for piece in split(payload, cuts):
            for found in decoder.feed(memoryview(piece)):
                size += len(found)
    return size


HOSTILE_LISTS = {
    "before the base": covers_list([(-1, 0, 10)]),
    "far before the base": covers_list([(-(2**40), 0, 10)]),
    "from the end of the base on": covers_list([(len(BASE), 0, 1)]),
    "over the end of the base": covers_list([(len(BASE) - 5, 0, 6)]),
    "over the end of the base, backwards": covers_list([(2000, 0, 10), (len(BASE) - 5, 10, 6)]),
    "behind the run": covers_list([(0, SIZE, 1)]),
    "over the end of the run": covers_list([(0, SIZE - 5, 6)]),
    "longer than the run": covers_list([(0, 0, SIZE + 1)]),
    "2^41 long": covers_list([(0, 0, 2**41)]),
    "2^41 behind": covers_list([(0, 2**41, 1)]),
    "of no length": covers_list([(0, 0, 0)]),
    "a number of 2^42": covers_list([(0, 0, 2**42)]),
    "a number of 2^64": covers_list([(0, 2**64, 1)]),
    "a number without an end": covers_list([ONE]) + b"\x80" * 40,
    "a number that is cut": covers_list([ONE])[:-1] + b"\x8a",
    "nothing at all": b"",
    "a count of none, and one": covers_list([ONE], count=0),
    "a count of more": covers_list([ONE], count=2),
    "a count of far more": covers_list([ONE], count=2**41),
    "a count of fewer": covers_list([ONE, (20, 20, 10)], count=1),
    "numbers left over": covers_list([ONE]) + b"\1",
    "more than a run can need": covers_list([(0, i, 1) for i in range(SIZE // 10)]),
    "a bomb": b"\0" * (64 * MIB),
}


@pytest.mark.parametrize("name", HOSTILE_LISTS)
def test_a_hostile_list_of_covers_is_refused_before_a_byte_is_given(name):
    payload = patch(HOSTILE_LISTS[name], NOTHING)
    for cuts in ([], range(len(payload))):
        tracemalloc.start()
        try:
            assert refused(payload, cuts) == 0
            assert tracemalloc.get_traced_memory()[1] < 8 * MIB
        finally:
            tracemalloc.stop()


def test_covers_cannot_overlap_or_go_back_as_their_gaps_have_no_sign():
    """A negative gap cannot be written: it would be a number of 2^64 and is refused as that."""
    with pytest.raises(FrameError, match="too large"):
        decoded(PatchDecoder(BASE, SIZE), patch(covers_list([ONE, (20, 2**64 - 5, 10)]), NOTHING))
    with pytest.raises(ValueError, match="lie outside"):
        deltas._check([Cover(0, 0, 10), Cover(0, 9, 10)], 100, 100)


GOOD = patch(covers_list([ONE, (500, 100, 200)]), NOTHING)
(COVERS_LENGTH,) = struct.unpack_from("<I", GOOD)
DIFFERENCE_AT = 4 + COVERS_LENGTH
HOSTILE_PAYLOADS = {
    "a list of no bytes": struct.pack("<I", 0) + GOOD[4:],
    "a list of 2^32 - 1 bytes": struct.pack("<I", 2**32 - 1) + GOOD[4:],
    "a list longer than a run can need": struct.pack("<I", SIZE + 1000) + GOOD[4:],
    "a list that is shorter than said": struct.pack("<I", COVERS_LENGTH + 3) + GOOD[4:],
    "a list that is longer than said": struct.pack("<I", COVERS_LENGTH - 3) + GOOD[4:],
    "a list that is no zstd": GOOD[:4] + b"\0" * COVERS_LENGTH + GOOD[DIFFERENCE_AT:],
    "a list with a window of 2^31": struct.pack("<I", len(giant_window(b"\0" * 9)))
    + giant_window(b"\0" * 9)
    + GOOD[DIFFERENCE_AT:],
    "a difference with a window of 2^31": GOOD[:DIFFERENCE_AT] + giant_window(NOTHING),
    "a difference that is no zstd": GOOD[:DIFFERENCE_AT] + b"no zstd at all",
    "a difference that is longer": GOOD[:DIFFERENCE_AT] + zstd.compress(bytes(SIZE + 1)),
    "a difference that is a bomb": GOOD[:DIFFERENCE_AT] + zstd.compress(bytes(64 * MIB)),
    "bytes after its end": GOOD + b"\0",
    "a second difference": GOOD + GOOD[DIFFERENCE_AT:],
}


@pytest.mark.parametrize("name", HOSTILE_PAYLOADS)
def test_a_hostile_payload_is_refused(name):
    for cuts in ([], range(len(HOSTILE_PAYLOADS[name]))):
        tracemalloc.start()
        try:
            assert refused(HOSTILE_PAYLOADS[name], cuts) <= SIZE
            assert tracemalloc.get_traced_memory()[1] < 8 * MIB
        finally:
            tracemalloc.stop()


def test_a_payload_that_is_cut_anywhere_is_never_whole_and_what_it_gives_is_a_beginning():
    new = edited(BASE, 8, 40)
    payload = encoded(BASE, new)
    for end in range(len(payload)):
        decoder, out = PatchDecoder(BASE, len(new)), bytearray()
        for found in decoder.feed(memoryview(payload)[:end]):
            out += found
        assert new.startswith(bytes(out))
        # zstd's frames carry no checksum here: with the last byte missing all content may be there, but no end.
        assert not decoder.is_whole


@settings(deadline=None)
@given(pairs(), st.binary(max_size=600))
def test_another_base_gives_other_bytes_or_is_refused_and_never_more_than_the_run(pair, other):
    base, new = pair
    payload = encoded(base, new)
    try:
        assert len(decoded(PatchDecoder(other, len(new)), payload)) == len(new)
    except FrameError:
        assert len(other) < len(base)


# --- memory


@pytest.mark.long
def test_decoding_takes_a_few_slices_beside_the_base():
    base = mixed(9, 8 * MIB)
    new = edited(base, 10, 500)
    payload = encoded(base, new)
    tracemalloc.start()
    try:
        decoder, size = PatchDecoder(base, len(new)), 0
        for at in range(0, len(payload), 65536):
            for found in decoder.feed(memoryview(payload)[at : at + 65536]):
                size += len(found)
        assert size == len(new) > 7 * MIB
        assert tracemalloc.get_traced_memory()[1] < 6 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.long
def test_encoding_takes_a_few_slices_beside_what_hdiffpatch_takes():
    base = mixed(9, 8 * MIB)
    new = edited(base, 10, 500)
    tracemalloc.start()
    try:
        size = sum(map(len, encode_patch(base, new, level=3)))
        assert 0 < size < len(new) // 20
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.long
def test_the_longest_list_of_covers_stays_within_bounds():
    """2 MiB of numbers, the most that are allowed, for a run that is long enough for them."""
    size = 16 * MIB
    count = (COVERS_MAX - 4) // 3
    plain = covers_list([], count=count) + b"\0" * count + b"\0" * count + b"\1" * count
    assert COVERS_MAX - 8 < len(plain) <= COVERS_MAX
    base = b"b" * count
    payload = patch(plain, bytes(size))
    assert len(payload) < 10_000
    assert decoded(PatchDecoder(base, size), payload) == base + bytes(size - count)


# --- HDiffPatch is missing, or not what it was


@pytest.fixture
def fresh():
    """`can_encode` remembers: not across these tests."""
    deltas.can_encode.cache_clear()
    yield
    deltas.can_encode.cache_clear()


@pytest.fixture(
    params=["missing", "another format", "no head", "a list that is cut", "covers from elsewhere", "failing"]
)
def another_hdiffpatch(request, monkeypatch, fresh):
    real = hdiffpatch.diff

    def fail(*_):
        raise hdiffpatch.HDiffPatchError("out of order")

    made = {
        "another format": lambda patch: b"HDIFF14" + patch[7:],
        "no head": lambda patch: b"HDIFF13&\0\1",
        "a list that is cut": lambda patch: patch[:20],
        "covers from elsewhere": lambda _: b"HDIFF13&\0" + bytes([0, 0, 1, *[0] * 8]) + b"\x7f\x7f\x7f" * 2,
        "failing": fail,
    }
    if request.param == "missing":
        monkeypatch.setitem(sys.modules, "hdiffpatch", None)
    else:
        monkeypatch.setattr(hdiffpatch, "diff", lambda *a, **k: made[request.param](real(*a, **k)))


def test_without_hdiffpatch_as_we_know_it_no_byte_is_made_and_plain_encodings_still_are(another_hdiffpatch):
    assert not can_encode("hdiff")
    assert can_encode("zstd")
    assert can_encode("zstd-prefix")
    with pytest.raises(DeltaUnavailableError):
        next(encode(Coding("hdiff", 3), edited(BASE, 1, 5), BASE))
    assert b"".join(encode(Coding("zstd", 3), BASE, b""))


def test_decoding_needs_no_hdiffpatch(monkeypatch, fresh):
    new = edited(BASE, 11, 20)
    payload = encoded(BASE, new)
    monkeypatch.setitem(sys.modules, "hdiffpatch", None)
    assert decoded(PatchDecoder(BASE, len(new)), payload) == new


def test_hdiffpatch_as_installed_can_be_used(fresh):
    assert can_encode("hdiff")
