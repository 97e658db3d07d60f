"""A whole file on its way out of a store: its last piece goes when all of them are known to be the right ones."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing

from relay.errors import ChunkInvalid
from relay.package.identity import parse_digest


async def checked_to_the_last(sha256: str, pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """`pieces`, each as it comes, the last one held back until the SHA-256 of all is that; `pieces` is closed by then.

    Raises:
        ChunkInvalid: it is another one. Earlier pieces may have been handed out.
    """
    digest, held = hashlib.sha256(), b""
    async with aclosing(pieces):
        async for piece in pieces:
            await asyncio.to_thread(digest.update, piece)
            if held:
                yield held
            held = piece
    if digest.hexdigest() != parse_digest(sha256):
        raise ChunkInvalid(sha256, digest.hexdigest())
    if held:
        yield held
