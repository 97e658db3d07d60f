from __future__ import annotations

import struct

import pytest

from relay.support.zstd import FrameFault, inflate_pieces, zstd

TEXT = b"some text, " * 20_000
FRAME = zstd.compress(TEXT)
SKIPPED = struct.pack("<2L", 0x184D2A50, 5) + b"hello"


def inflated(data: bytes, step: int = 1000, most: int = 4096, window_log: int = 23) -> bytes:
    pieces = (data[at : at + step] for at in range(0, len(data), step))
    found = list(inflate_pieces(pieces, most, window_log=window_log))
    assert all(0 < len(piece) <= most for piece in found)
    return b"".join(found)


@pytest.mark.parametrize("step", [1, 7, 1000, 1 << 20])
def test_frames_come_out_in_bounded_pieces_however_they_are_cut(step: int) -> None:
    assert inflated(FRAME, step) == TEXT
    assert inflated(FRAME + SKIPPED + FRAME, step) == TEXT * 2
    assert inflated(zstd.compress(b""), step) == b""


@pytest.mark.parametrize("data", [b"", FRAME[:-1], FRAME[:3], FRAME + FRAME[:-1], FRAME + b"\x28"])
def test_what_is_cut_off_is_refused(data: bytes) -> None:
    with pytest.raises(FrameFault, match="cut off"):
        inflated(data)


def test_what_is_no_zstd_is_refused() -> None:
    for data in (b"x" * 100, FRAME + b"x" * 100, FRAME[:20] + bytes(20) + FRAME[40:]):
        with pytest.raises(FrameFault):
            inflated(data)


def test_a_larger_window_is_refused_before_memory_is_taken() -> None:
    options = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}
    compressor = zstd.ZstdCompressor(options=options)
    frame = compressor.compress(TEXT) + compressor.flush()
    assert inflated(frame, window_log=27) == TEXT
    with pytest.raises(FrameFault, match="memory"):
        inflated(frame, window_log=26)


def test_very_many_frames_are_refused() -> None:
    assert inflated(zstd.compress(b"") * 4096) == b""
    with pytest.raises(FrameFault, match="more than 4096 frames"):
        inflated(zstd.compress(b"") * 4097)
