"""What a relay counts, in Prometheus' text form."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, generate_latest

RECEIVED = Counter("waystation_received_bytes", "Bytes of bundles received")
SENT = Counter("waystation_sent_bytes", "Bytes of bundles and chunks sent")
CHUNKS = Counter("waystation_chunks", "Chunks by what became of them", ["outcome"])
LETTERS = Counter(
    "waystation_mail_letters", "Letters posted, by kind and by whether they were new", ["kind", "outcome"]
)
MAIL_BYTES = Gauge("waystation_mail_kept_bytes", "Bytes that the kept letters count for")
AGENTS = Gauge("waystation_agents", "Agents whose presence is told")


async def counted(pieces: AsyncIterator[bytes], counter: Counter) -> AsyncIterator[bytes]:
    """`pieces` as they are, their bytes added to `counter`."""
    async for piece in pieces:
        counter.inc(len(piece))
        yield piece


async def answer(request: web.Request) -> web.StreamResponse:  # noqa: ARG001 - the signature of a handler
    """`GET /metrics`."""
    return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})
