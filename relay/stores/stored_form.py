"""The stored form of a chunk: a file that plain `zstd -d` reads, and that says by itself whether it was damaged.

Two zstd frames stand one after another (RFC 8878, section 3.1):

    skippable frame   magic 0x184D2A50, u32 length, then our header: format, u32 size, u64 XXH3-64, 32 bytes id
    zstd frame        the chunk at level 3, its size in the frame header

Numbers are little-endian. Every bit of the header is either a constant or is checked against the frame or the name, so
that no flip goes unseen. The id stands in it so that two files with swapped names are found without decoding them.
What travels is the zstd frame alone.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import xxhash

from relay.errors import ChunkInvalid, UntrustedError
from relay.package.chunk import CHUNK_MAX, Chunk
from relay.package.identity import ChunkId
from relay.support.zstd import zstd

LEVEL: Final = 3
"""zstd level of the stored form: about 400 MB/s a core, so that taking a package in is not bound by it."""

FORMAT: Final = b"WSC1"
_LAYOUT: Final = struct.Struct("<II4sIQ32s")
_SKIPPABLE_MAGIC: Final = 0x184D2A50
_CONTENT_LENGTH: Final = _LAYOUT.size - 8

HEADER_SIZE: Final = _LAYOUT.size
"""Bytes before the zstd frame."""

FRAME_MAX: Final = CHUNK_MAX + (CHUNK_MAX >> 8) + 64
"""Bytes. Upper bound of a zstd frame over one chunk (`ZSTD_COMPRESSBOUND`)."""

STORED_MAX: Final = HEADER_SIZE + FRAME_MAX
"""Bytes. A stored file that is longer is damaged, and is not read into memory."""

_WINDOW_LOG_MAX: Final = 22
"""2^22 = CHUNK_MAX: a frame that wants a larger window is not one of ours."""


class DamageError(UntrustedError):
    """These bytes are not a sound stored form. `found` says in a few words what they are instead."""

    def __init__(self, found: str) -> None:
        super().__init__(f"not a sound stored chunk: {found}")
        self.found = found


@dataclass(frozen=True, slots=True)
class StoredHeader:
    """What the header says; nothing of it is proven yet."""

    id: ChunkId
    size: int
    """Bytes of the chunk itself."""
    xxh3: int
    """XXH3-64 (seed 0) of the zstd frame that follows."""


def encode_stored(chunk: Chunk) -> bytes:
    """Header and zstd frame of `chunk`."""
    return b"".join(stored_pieces(chunk))


def stored_pieces(chunk: Chunk) -> tuple[bytes, bytes]:
    """The same in two, for who writes them: several are under way at once, and a copy of each would be held, too."""
    frame = zstd.compress(chunk.data, LEVEL)
    xxh3 = xxhash.xxh3_64_intdigest(frame)
    name = bytes.fromhex(chunk.id)
    return _LAYOUT.pack(_SKIPPABLE_MAGIC, _CONTENT_LENGTH, FORMAT, chunk.size, xxh3, name), frame


def parse_stored_header(data: bytes) -> StoredHeader:
    """The header at the front of `data`.

    Raises:
        DamageError: too short, or not a header of this format.
    """
    if len(data) < HEADER_SIZE:
        raise DamageError("truncated")
    magic, length, form, size, xxh3, name = _LAYOUT.unpack_from(data)
    if (magic, length, form) != (_SKIPPABLE_MAGIC, _CONTENT_LENGTH, FORMAT) or size > CHUNK_MAX:
        raise DamageError("no header")
    return StoredHeader(ChunkId(name.hex()), size, xxh3)


def check_stored(id: ChunkId, header: StoredHeader, front: bytes, xxh3: int) -> None:
    """Hold the header against the name `id`, the `front` of the frame (18 bytes or more) and the frame's real `xxh3`.

    Raises:
        DamageError: one of them says something else.
    """
    if header.id != id:
        raise DamageError(header.id)
    if header.xxh3 != xxh3:
        raise DamageError("other XXH3-64")
    if _declared_size(front) != header.size:
        raise DamageError("other size")


def decode_stored(id: ChunkId, stored: bytes) -> Chunk:
    """The verified chunk in `stored`: its damage check, its bounds and its SHA-256.

    Raises:
        ChunkInvalid: damaged, larger than its header says, or other bytes than `id` names.
    """
    try:
        header = parse_stored_header(stored)
        frame = memoryview(stored)[HEADER_SIZE:]
        check_stored(id, header, bytes(frame[:18]), xxhash.xxh3_64_intdigest(frame))
        return Chunk(id, _inflate(frame, header.size))
    except DamageError as damage:
        raise ChunkInvalid(id, damage.found) from damage


def _declared_size(front: bytes) -> int | None:
    try:
        return zstd.get_frame_info(front).decompressed_size
    except zstd.ZstdError as error:
        raise DamageError("no zstd frame") from error


def _inflate(frame: memoryview, size: int) -> bytes:
    """Exactly one zstd frame that inflates to exactly `size` bytes; one byte more is never produced."""
    decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX})
    try:
        data = decoder.decompress(frame, max_length=size + 1)
    except zstd.ZstdError as error:
        raise DamageError("no zstd frame") from error
    if not decoder.eof or decoder.unused_data or len(data) != size:
        raise DamageError("other size")
    return data
