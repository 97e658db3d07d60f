"""What a relay counts, in Prometheus' text form."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, Counter, generate_latest

RECEIVED = Counter("waystation_received_bytes", "Bytes of bundles received")
SENT = Counter("waystation_sent_bytes", "Bytes of bundles and chunks sent")
CHUNKS = Counter("waystation_chunks", "Chunks by what became of them", ["outcome"])


async def counted(pieces: AsyncIterator[bytes], counter: Counter) -> AsyncIterator[bytes]:
    """`pieces` as they are, their bytes added to `counter`."""
    async for piece in pieces:
        counter.inc(len(piece))
        yield piece


async def answer(request: web.Request) -> web.StreamResponse:  # noqa: ARG001 - the signature of a handler
    """`GET /metrics`."""
    return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})
