"""The `hdiff` encoding: where the new bytes stand in the old ones, and how they differ there.

HDiffPatch (https://github.com/sisong/HDiffPatch) finds the matches ("covers"). What crosses the line is ours, because a
receiver of HDiffPatch's own patches has to trust the sizes written in them, and because its run lengths hide from zstd
what several differences have in common (measured: up to 12 % larger). It is what bsdiff does (Percival, "Naive
Differences of Executable Code", 2003), except that literal bytes stand in the one stream of differences:

    predicted  = for each byte of the new: the byte of the base that a cover says, else 0
    difference = (new - predicted) mod 256, byte by byte: mostly zeros, and alike where the same thing was moved
    payload    = u32 little-endian length of the first frame, zstd(covers), zstd(difference)
    covers     = count, then three columns of as many numbers: where in the base, from the end of the cover before
                 (zigzag: 0, -1, 1, -2 … as 0, 1, 2, 3 …); bytes without a cover before it; length
    numbers    = LEB128 (DWARF 5, section 7.6)

A decoder needs the base and a few slices of memory, hands out bytes as they come, and cannot be made to read or write
outside of what it was given.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Final, NamedTuple

from relay.encoding.zstd_stream import Inflater, window_log
from relay.errors import FrameError, RefusedError
from relay.support.zstd import zstd

COVERS_MAX: Final = 2 << 20
"""Bytes of the list of covers, inflated; for a shorter run an eighth of it, and a few: reading a list is work."""
_COVERS_SLACK: Final = 64
_NUMBER_BITS_MAX: Final = 42
_LENGTH: Final = struct.Struct("<I")
_SLICE: Final = 1 << 20
_LANE: Final = 8 << 10
"""Bytes that are added at once, as one long number: long enough for Python, short enough to be zeros more often."""


class Cover(NamedTuple):
    """`length` bytes of the new stream from `new` on are predicted by those of the base from `old` on."""

    old: int
    new: int
    length: int


class DeltaUnavailableError(RefusedError):
    """HDiffPatch is not here, or speaks otherwise than we understand. No byte was made; plain encodings can be."""


def covers_max(size: int) -> int:
    """Bytes that the list of covers of a run of `size` bytes may have, inflated."""
    return min(COVERS_MAX, (size >> 3) + _COVERS_SLACK)


# --- encoding


def find_covers(base: bytes, new: bytes) -> list[Cover]:
    """Where `new` resembles `base`, in the order of `new`, not overlapping there. Some 5 to 20 MB/s; releases the GIL.

    Where more are found than a list may hold, the shortest are left out.

    Raises:
        DeltaUnavailableError: HDiffPatch cannot be used.
    """
    try:
        import hdiffpatch
    except ImportError as error:
        raise DeltaUnavailableError("HDiffPatch is not installed", hint="Send without deltas.") from error
    try:
        covers = _parse_hdiff13(hdiffpatch.diff(base, new, None, validate=False))
        _check(covers, len(base), len(new))
    except (hdiffpatch.HDiffPatchError, ValueError, IndexError) as error:
        raise DeltaUnavailableError(f"HDiffPatch is of no use here: {error}", hint="Send without deltas.") from error
    return _fitting(covers, covers_max(len(new)))


def _fitting(covers: list[Cover], most: int) -> list[Cover]:
    """The longest of them, as many as a list of `most` bytes has room for (or a few less)."""
    while (size := len(_pack_covers(covers))) > most:
        longest = sorted(range(len(covers)), key=lambda i: covers[i].length, reverse=True)
        covers = [covers[i] for i in sorted(longest[: len(covers) * most // size * 15 // 16])]
    return covers


@cache
def can_encode() -> bool:
    """Whether HDiffPatch is here and makes what we understand. Tried once, on a few bytes."""
    base = bytes(range(256)) * 4
    try:
        covers = find_covers(base, b"new" + base)
    except DeltaUnavailableError:
        return False
    return sum(cover.length for cover in covers if cover.new == cover.old + 3) > len(base) // 2


def encode_patch(base: bytes, new: bytes, *, level: int) -> Iterator[bytes]:
    """The payload, in pieces as they are made: first the covers, then the differences.

    Raises:
        DeltaUnavailableError: as `find_covers`, before the first piece.
    """
    covers = find_covers(base, new)
    packed = zstd.compress(_pack_covers(covers), options=_options(level, covers_max(len(new))))
    yield _LENGTH.pack(len(packed)) + packed
    compressor = zstd.ZstdCompressor(options=_options(level, len(new)))
    compressor.set_pledged_input_size(len(new))
    predictor = _Predictor(base, covers)
    view = memoryview(new)
    for start in range(0, len(new), _SLICE):
        slice_ = view[start : start + _SLICE]
        piece = compressor.compress(subtract(slice_, predictor.take(len(slice_))))
        if piece:
            yield piece
    yield compressor.flush()


def _options(level: int, size: int) -> dict[int, int]:
    options: dict[int, int] = {
        zstd.CompressionParameter.compression_level: level,
        zstd.CompressionParameter.window_log: window_log(size),
        zstd.CompressionParameter.enable_long_distance_matching: 1,
    }
    if level >= 16:
        # Differences are long stretches of zeros: looking longer for the best match costs nothing there, and gains 1 to 4 %.
        options[zstd.CompressionParameter.target_length] = 999
    return options


def _pack_covers(covers: Sequence[Cover]) -> bytes:
    packed = bytearray(_number(len(covers)))
    end = 0
    for cover in covers:
        step = cover.old - end
        packed += _number(step << 1 if step >= 0 else (-step << 1) - 1)
        end = cover.old + cover.length
    end = 0
    for cover in covers:
        packed += _number(cover.new - end)
        end = cover.new + cover.length
    for cover in covers:
        packed += _number(cover.length)
    return bytes(packed)


def _number(value: int) -> bytes:
    packed = bytearray()
    while value > 0x7F:
        packed.append(value & 0x7F | 0x80)
        value >>= 7
    packed.append(value)
    return bytes(packed)


def _parse_hdiff13(patch: bytes) -> list[Cover]:
    """The covers in a patch that HDiffPatch made just now (its format "HDIFF13", nothing compressed).

    `serialize_compressed_diff` in libHDiffPatch/HDiff/diff.cpp: a head of 11 numbers, then the covers; numbers are big-endian
    groups of 7 bits, the first one of an old position with a sign.

    Raises:
        ValueError, IndexError: it is none.
    """
    if not patch.startswith(b"HDIFF13"):
        raise ValueError("it writes another format than this version of Waystation reads")
    at = patch.index(0) + 1
    head = []
    for _ in range(11):
        value, at = _hdiff_number(patch, at)
        head.append(value)
    count, covers = head[2], []
    old_end = new_end = 0
    for _ in range(count):
        is_behind = patch[at] >> 7
        step, at = _hdiff_number(patch, at, tag_bits=1)
        gap, at = _hdiff_number(patch, at)
        length, at = _hdiff_number(patch, at)
        cover = Cover(old_end - step if is_behind else old_end + step, new_end + gap, length)
        old_end, new_end = cover.old + length, cover.new + length
        if length:
            covers.append(cover)
    return covers


def _check(covers: Iterable[Cover], base_size: int, size: int) -> None:
    """Raises `ValueError` unless each lies within the base and the new stream, behind the one before."""
    end = 0
    for old, new, length in covers:
        if old < 0 or old + length > base_size or new < end or new + length > size:
            raise ValueError("its covers lie outside of what it was given")
        end = new + length


def _hdiff_number(data: bytes, at: int, *, tag_bits: int = 0) -> tuple[int, int]:
    bits = 7 - tag_bits
    byte = data[at]
    at += 1
    value, more = byte & ((1 << bits) - 1), byte >> bits & 1
    while more:
        byte = data[at]
        at += 1
        value, more = value << 7 | byte & 0x7F, byte >> 7
    return value, at


# --- decoding


class PatchDecoder:
    """Takes a payload as it comes and gives the new bytes as they can be known."""

    def __init__(self, base: bytes | bytearray, size: int) -> None:
        """`size`: bytes of the new stream."""
        self._base = base
        self._size = size
        self._head = bytearray()
        self._predictor: _Predictor | None = None
        self._difference = Inflater(size, window=window_log(size))

    @property
    def is_whole(self) -> bool:
        """Whether the payload came to its end."""
        return self._difference.is_whole

    def feed(self, data: memoryview) -> Iterator[bytes]:
        """New bytes, in slices of at most 1 MiB.

        Raises:
            FrameError: the payload breaks the format, or holds more than the run.
        """
        if self._predictor is None:
            data = self._take_head(data)
        if self._predictor is not None:
            for found in self._difference.feed(data):
                yield add(found, self._predictor.take(len(found)))

    def _take_head(self, data: memoryview) -> memoryview:
        """Gather the length and the covers; what is left of `data` behind them."""
        data = self._gather(data, _LENGTH.size)
        if len(self._head) < _LENGTH.size:
            return data
        (length,) = _LENGTH.unpack_from(self._head)
        # zstd adds at most 1/256 and a few bytes to what it cannot compress.
        most = covers_max(self._size)
        if not 0 < length <= most + (most >> 8) + _COVERS_SLACK:
            raise FrameError(f"a list of covers of {length} bytes for a run of {self._size}")
        data = self._gather(data, _LENGTH.size + length)
        if len(self._head) == _LENGTH.size + length:
            covers = _open_covers(bytes(self._head[_LENGTH.size :]), len(self._base), self._size)
            self._head.clear()
            self._predictor = _Predictor(self._base, covers)
        return data

    def _gather(self, data: memoryview, upto: int) -> memoryview:
        taken = max(0, min(len(data), upto - len(self._head)))
        self._head += data[:taken]
        return data[taken:]


def _open_covers(packed: bytes, base_size: int, size: int) -> Iterable[tuple[int, int, int]]:
    """Raises `FrameError` unless they are whole and every one lies within the base and the run."""
    most = covers_max(size)
    inflater = Inflater(most, window=window_log(most), what="a list of covers")
    plain = b"".join(inflater.feed(memoryview(packed)))
    if not inflater.is_whole:
        raise FrameError("a list of covers that is cut off")
    numbers = memoryview(_numbers(plain))
    count = numbers[0] if numbers else -1
    if len(numbers) != 1 + 3 * count:
        raise FrameError("a list of covers that is not whole")
    olds, news, lengths = (numbers[1 + at * count : 1 + (at + 1) * count] for at in range(3))
    # Sums in place of steps, in the same memory.
    old_end = new_end = 0
    for i in range(count):
        step, length = olds[i], lengths[i]
        old, new = old_end + (-(step + 1 >> 1) if step & 1 else step >> 1), new_end + news[i]
        old_end, new_end = old + length, new + length
        if old < 0 or old_end > base_size or new_end > size or not length:
            raise FrameError("a cover lies outside of its base or its run")
        olds[i], news[i] = old, new
    return zip(olds, news, lengths, strict=True)


def _numbers(plain: bytes) -> array[int]:
    numbers = array("Q")
    value = shift = 0
    for byte in plain:
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            numbers.append(value)
            value = shift = 0
        else:
            shift += 7
            if shift >= _NUMBER_BITS_MAX:
                raise FrameError("a number in a list of covers is too large")
    if shift:
        raise FrameError("a list of covers ends within a number")
    return numbers


class _Predictor:
    """The predicted stream, in order."""

    def __init__(self, base: bytes | bytearray, covers: Iterable[tuple[int, int, int]]) -> None:
        self._base = memoryview(base)
        self._covers = iter(covers)
        self._at = 0
        self._next = next(self._covers, None)

    def take(self, size: int) -> bytearray:
        """The next `size` bytes."""
        found, base = bytearray(size), self._base
        start, end = self._at, self._at + size
        self._at = end
        while self._next is not None:
            old, new, length = self._next
            if new >= end:
                break
            low, high = max(new, start), min(new + length, end)
            found[low - start : high - start] = base[old + low - new : old + high - new]
            if high < new + length:
                break
            self._next = next(self._covers, None)
        return found


# --- byte by byte, many at once
#
# A long number holds a byte in each 8 bits. The high bit of each is kept out of the sum, so that no carry crosses, and
# put back by exclusive or (Warren, "Hacker's Delight", 2nd edition, 2-18). Python's own arithmetic does some 300 MB/s;
# most lanes of a difference are zeros and cost a comparison.

_ZEROS: Final = bytes(_LANE)
_HIGH: Final = int.from_bytes(b"\x80" * _LANE, "little")
_LOW: Final = int.from_bytes(b"\x7f" * _LANE, "little")

Bytes = bytes | bytearray | memoryview


def add(left: Bytes, right: Bytes) -> bytes:
    """`(left + right) mod 256`, byte by byte.

    Raises:
        ValueError: they differ in length.
    """
    return b"".join(_add(one, other) for one, other in _lanes(left, right))


def subtract(left: Bytes, right: Bytes) -> bytes:
    """`(left - right) mod 256`, byte by byte.

    Raises:
        ValueError: they differ in length.
    """
    return b"".join(_subtract(one, other) for one, other in _lanes(left, right))


def _add(one: bytes, other: bytes) -> bytes:
    if one == _ZEROS:
        return other
    a, b = int.from_bytes(one, "little"), int.from_bytes(other, "little")
    # The masks of a whole lane do for the last, shorter one: numbers have no bits above their own.
    return (((a & _LOW) + (b & _LOW)) ^ ((a ^ b) & _HIGH)).to_bytes(len(one), "little")


def _subtract(one: bytes, other: bytes) -> bytes:
    if one == other:
        return bytes(len(one))
    high = _HIGH & ((1 << 8 * len(one)) - 1) if len(one) < _LANE else _HIGH
    a, b = int.from_bytes(one, "little"), int.from_bytes(other, "little")
    return (((a | high) - (b & _LOW)) ^ ((a ^ ~b) & high)).to_bytes(len(one), "little")


def _lanes(left: Bytes, right: Bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(left) != len(right):
        raise ValueError(f"{len(left)} bytes against {len(right)}")
    one, other = memoryview(left), memoryview(right)
    for start in range(0, len(left), _LANE):
        yield bytes(one[start : start + _LANE]), bytes(other[start : start + _LANE])
