"""Bytes that no line compresses, for measuring it: fresh at each start, and then the same again and again."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterator
from functools import cache

PIECE = 64 << 10
_BLOCK = 1 << 20
"""Bytes. Longer than what compressors on lines look back (32 KiB: RFC 1951, as used by SSH and IPComp)."""


@cache
def _block() -> bytes:
    return os.urandom(_BLOCK)


def noise(size: int) -> Iterator[bytes]:
    """`size` bytes in pieces of at most `PIECE`."""
    block = _block()
    for start in range(0, size, PIECE):
        at = start % _BLOCK
        yield block[at : at + min(PIECE, size - start)]


async def noise_pieces(size: int) -> AsyncGenerator[bytes, None]:
    """As `noise`, for a line."""
    for piece in noise(size):
        yield piece
