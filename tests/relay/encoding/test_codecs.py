"""Encodings by their names, and every payload through its decoder: as made, as cut, as changed on purpose."""

from __future__ import annotations

import pytest
from harness.bundle_kit import EMPTY_BLOCK, ZSTD_HEAD, decoded, edited, giant_window, joined, mixed
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay.encoding.codecs import DELTAS, ENCODINGS, LEVEL_MAX, PLAIN, RAW, Coding, can_encode, decoder_for, encode
from relay.encoding.zstd_stream import WINDOW_LOG_MAX, window_log
from relay.errors import FrameError, UsageError
from relay.support.zstd import zstd

TEXT = b"".join(b"line %d of a text that compresses\n" % i for i in range(3000))
SPLITS = st.lists(st.integers(0, 3000), max_size=8)


def payload_of(encoding, run, base, level=3):
    return joined([encode(Coding(encoding, 0 if encoding == "raw" else level), run, base)])


# --- names


@pytest.mark.parametrize(
    ("text", "coding"),
    [
        ("raw", RAW),
        ("zstd", PLAIN),
        ("zstd:19", Coding("zstd", 19)),
        ("zstd-prefix", Coding("zstd-prefix", 3)),
        ("zstd-prefix:1", Coding("zstd-prefix", 1)),
        ("hdiff", Coding("hdiff", 19)),
        ("hdiff:9", Coding("hdiff", 9)),
    ],
)
def test_a_coding_is_read_as_it_is_written(text, coding):
    assert Coding.parse(text) == coding
    assert Coding.parse(str(coding)) == coding


@pytest.mark.parametrize(
    "text",
    ["", "gzip", "raw:1", "zstd:", "zstd:0", "zstd:20", "zstd:-1", "zstd:³", "zstd:3:4", " zstd", "ZSTD", "zstd:1_0"],
)
def test_what_is_no_coding_is_told_with_what_would_be(text):
    with pytest.raises(UsageError, match="zstd-prefix"):
        Coding.parse(text)


def test_only_deltas_build_on_bases():
    assert {Coding(encoding, 0).encoding for encoding in ENCODINGS if Coding(encoding, 0).needs_bases} == DELTAS


def test_every_encoding_can_be_made_here():
    assert all(can_encode(encoding) for encoding in ENCODINGS)


def test_the_window_covers_what_it_must_and_never_more_than_agreed():
    for log in range(18, 28):
        assert window_log(1 << log) == log
        assert window_log((1 << log) + 1) == min(log + 1, WINDOW_LOG_MAX)
    assert window_log(0) == window_log(1) == window_log(1 << 17) == 17
    assert window_log(1 << 40) == WINDOW_LOG_MAX


# --- what goes in comes out


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(deadline=None)
@given(base=st.binary(max_size=400), own=st.binary(max_size=200), at=st.integers(0, 400), cuts=SPLITS)
@example(base=b"", own=b"", at=0, cuts=[])
@example(base=b"1234567", own=b"1234567", at=0, cuts=[])
@example(base=b"12345678", own=b"", at=0, cuts=[1])
@example(base=TEXT[:9000], own=b"", at=0, cuts=[])
@example(base=TEXT[:9000], own=TEXT[:20_000], at=100, cuts=[5])
def test_any_run_on_any_base_comes_out_however_it_was_split(encoding, base, own, at, cuts):
    run = base[:at] + own + base[at:]
    payload = payload_of(encoding, run, base)
    assert decoded(decoder_for(encoding, len(run), base), payload, cuts) == run
    assert decoded(decoder_for(encoding, len(run), bytearray(base)), payload, range(len(payload))) == run
    assert len(payload) <= len(run) + (len(run) >> 8) + 1024


@pytest.mark.long
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("level", [1, 9, LEVEL_MAX])
def test_a_run_of_megabytes_comes_out_at_every_level(encoding, level):
    run = edited(TEXT * 16, 1, 1000)
    base = edited(TEXT * 20, 2, 1000)
    payload = payload_of(encoding, run, base, level)
    assert decoded(decoder_for(encoding, len(run), base), payload) == run
    if encoding in DELTAS:
        assert len(payload) < len(payload_of("zstd", run, b"", level))


@pytest.mark.parametrize("size", range(10))
@pytest.mark.parametrize("encoding", sorted(DELTAS))
def test_a_base_of_a_few_bytes_is_a_base(encoding, size):
    base = b"abcdefghij"[:size]
    for run in (base, b"x", base * 100, b"other bytes"):
        assert decoded(decoder_for(encoding, len(run), base), payload_of(encoding, run, base)) == run


def test_a_prefix_makes_what_the_base_holds_vanish():
    base = mixed(3, 300_000)
    assert len(payload_of("zstd-prefix", base, base)) < 200 < len(payload_of("zstd", base, b"")) // 100
    for size in (1 << 17, (1 << 17) + 1, 1 << 18):  # a base of as much as the window, and the run behind it
        run = base[:size]
        payload = payload_of("zstd-prefix", run, run)
        assert len(payload) < 200
        assert decoded(decoder_for("zstd-prefix", size, run), payload) == run


@pytest.mark.long
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_first_pieces_of_a_long_run_come_before_the_last_bytes_were_encoded(encoding):
    run = mixed(4, 4 << 20)
    # Up to level 12 a whole run takes less time than its first bytes on a line.
    level = {"raw": 0, "zstd": 16}.get(encoding, 1)
    sizes = [len(piece) for piece in encode(Coding(encoding, level), run, run[:100_000])]
    assert encoding == "raw" or len(sizes) > 3
    assert sum(sizes[:-1]) * 2 > sum(sizes) or encoding == "raw"


# --- what is hostile


RUN = TEXT[:5000]
BASE = TEXT[2500:9000]
ZSTD_LIKE = ("zstd", "zstd-prefix")


def refusal(encoding, payload, *, size=5000, base=BASE):
    with pytest.raises(FrameError) as told:
        decoded(decoder_for(encoding, size, base), payload)
    return str(told.value)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_payload_of_more_than_its_run_is_refused(encoding):
    assert (
        "more than its run" in refusal(encoding, payload_of(encoding, RUN, BASE), size=len(RUN) - 1)
        or encoding == "hdiff"
    )
    refusal(encoding, payload_of(encoding, RUN + TEXT, BASE))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bytes_after_a_payload_are_refused(encoding):
    for tail in (b"\0", payload_of(encoding, RUN, BASE)):
        refusal(encoding, payload_of(encoding, RUN, BASE) + tail)


@pytest.mark.parametrize("encoding", [encoding for encoding in ENCODINGS if encoding != "raw"])
def test_a_payload_that_is_cut_is_not_whole(encoding):
    payload = payload_of(encoding, RUN, BASE)
    for end in range(len(payload)):
        decoder = decoder_for(encoding, len(RUN), BASE)
        found = joined([decoder.feed(memoryview(payload)[:end])])
        assert RUN.startswith(found)
        assert not decoder.is_whole


@pytest.mark.parametrize("encoding", ZSTD_LIKE)
def test_a_window_of_2_to_the_31_is_refused(encoding):
    assert "within bounds" in refusal(encoding, giant_window(RUN))


@pytest.mark.parametrize("encoding", ZSTD_LIKE)
def test_the_window_is_bounded_by_run_and_bases_and_not_by_what_a_frame_asks_for(encoding):
    made = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 18})
    payload = made.compress(RUN[:9]) + made.compress(RUN[9:]) + made.flush()
    assert "within bounds" in refusal(encoding, payload)


@pytest.mark.parametrize("encoding", ZSTD_LIKE)
def test_blocks_of_nothing_give_nothing_and_never_end(encoding):
    decoder = decoder_for(encoding, len(RUN), BASE)
    payload = ZSTD_HEAD + EMPTY_BLOCK * 100_000
    assert joined([decoder.feed(memoryview(payload))]) == b""
    assert not decoder.is_whole


@pytest.mark.parametrize("encoding", ZSTD_LIKE)
def test_a_skippable_frame_is_no_payload(encoding):
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    refusal(encoding, skippable + payload_of(encoding, RUN, BASE))


@pytest.mark.parametrize("encoding", sorted(DELTAS))
def test_with_another_base_something_else_comes_or_a_refusal_and_never_more_than_the_run(encoding):
    payload = payload_of(encoding, RUN, BASE)
    for base in (BASE[1:], BASE[::-1], b"", b"x" * 100_000):
        try:
            found = decoded(decoder_for(encoding, len(RUN), base), payload)
        except (FrameError, AssertionError):
            continue
        assert found != RUN
        assert len(found) <= len(RUN)
