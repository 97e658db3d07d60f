"""Peers that are slow in every way they can be, beside readers on thin lines and one good client, all at one relay.

The slow ones never end: who is cut off comes back. Each sends what it has to say at first and then just fast enough not to
be cut off, or reads a few bytes a second. Readers on thin lines say so, so that the relay encodes for them; each begins at
another place of the package, so that none gets what was made for another. All of them are one process, the good client is
another.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager, suppress
from itertools import cycle
from multiprocessing import get_context
from urllib.parse import urlsplit

import msgspec

from relay.package.identity import PackageRef
from relay.package.manifest import Manifest
from relay.package.ranges import from_indexes
from relay.protocol import messages
from relay.protocol.client import RelayClient

PER_ADDRESS = 50
"""Connections from one loopback address: below what a relay allows."""
FIRST_BYTES = 128 << 10
STEP_SECONDS = 1.0
STEP_BYTES = 17 << 10
"""What a slow peer sends at first, and then at a time: a little more than a relay asks of who has no token."""
READ_BYTES = 256
"""What a slow peer reads at a time."""
COME_SECONDS = 10.0
"""Until all have come."""
THIN = 250_000.0
"""Bytes a second that a reader on a thin line reads, and says it reads."""
THIN_BYTES = 64 << 10
"""What it reads at a time."""
TO_READ = 12_000_000
"""Bytes of the package in one request of such a reader."""
GOOD_SECONDS = 0.05
"""Between two requests of the good client."""


class Crowd(msgspec.Struct, frozen=True):
    """Seconds of the good client's requests, and what the others came to while it asked."""

    slow: int
    thin: int
    requests: int
    median: float
    p99: float
    slow_connections: int
    thin_bytes: int


async def crowd(url: str, package: PackageRef, *, slow: int, thin: int, seconds: float) -> Crowd:
    """Keep the relay at `url` busy for so long.

    Raises:
        UnreachableError: it does not answer the good client.
    """
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        others = loop.run_in_executor(pool, _press, url, package, slow, thin, COME_SECONDS + seconds)
        await asyncio.sleep(COME_SECONDS)
        async with RelayClient(url) as client:
            spent = sorted(await _ask_well(client, package, seconds))
        connections, thin_bytes = await others
    p99 = spent[min(len(spent) - 1, len(spent) * 99 // 100)]
    return Crowd(slow, thin, len(spent), statistics.median(spent), p99, connections, thin_bytes)


def _press(url: str, package: PackageRef, slow: int, thin: int, seconds: float) -> tuple[int, int]:
    """All but the good client. Connections of the slow ones, and bytes on thin lines."""
    return asyncio.run(_press_for(url, package, slow, thin, seconds))


async def _press_for(url: str, package: PackageRef, slow: int, thin: int, seconds: float) -> tuple[int, int]:
    async with RelayClient(url) as client:
        pointer = await client.package(package.id, package.version)
        manifest = (await client.manifest(pointer.manifest)).manifest
    counts = _Counts()
    ways = zip(range(slow), cycle(_slow_ways(manifest)), strict=False)
    tasks = [asyncio.create_task(_come_back(counts, url, _address(number), way)) for number, way in ways]
    tasks += [asyncio.create_task(_read_thin(counts, url, manifest, number, thin)) for number in range(thin)]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return counts.connections, counts.thin_bytes


class _Counts:
    def __init__(self) -> None:
        self.connections = 0
        self.thin_bytes = 0


def _address(number: int) -> str:
    return f"127.0.{1 + number // PER_ADDRESS // 200}.{1 + number // PER_ADDRESS % 200}"


async def _ask_well(client: RelayClient, package: PackageRef, seconds: float) -> list[float]:
    spent, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.monotonic()
        await client.package(package.id, package.version)
        spent.append(time.monotonic() - began)
        await asyncio.sleep(GOOD_SECONDS)
    return spent


# --- slow ones


Way = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def _slow_ways(manifest: Manifest) -> Sequence[Way]:
    largest = max(range(len(manifest.chunks)), key=lambda index: manifest.chunks[index].size)
    return (
        _sending(_request("PUT /v1/line", 30_000_000)),
        _sending(_request("POST /v1/missing", 900_000, _JSON) + b"[ "),
        _reading(_request(f"GET /v1/chunks/{manifest.chunk_id(largest)}")),
        _reading(_bundle_request(manifest, range(len(manifest.chunks)))),
    )


_JSON = "Content-Type: application/json"


def _bundle_request(manifest: Manifest, wanted: Iterable[int], *more: str, goodput: float = 0.0) -> bytes:
    want = (messages.ChunkRanges(manifest.id, from_indexes(wanted)),)
    body = msgspec.json.encode(messages.BundleRequest(want, goodput=goodput))
    return _request("POST /v1/bundle", len(body), _JSON, *more) + body


def _request(what: str, length: int = 0, *headers: str) -> bytes:
    """Its head; a body of `length` bytes has to follow."""
    lines = [f"{what} HTTP/1.1", "Host: localhost", *headers, *([f"Content-Length: {length}"] if length else [])]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _sending(begin: bytes) -> Way:
    async def way(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(begin + b" " * FIRST_BYTES)
        while not writer.is_closing():
            await writer.drain()
            await asyncio.sleep(STEP_SECONDS)
            writer.write(b" " * STEP_BYTES)

    return way


def _reading(request: bytes) -> Way:
    async def way(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(request)
        while await reader.read(READ_BYTES):
            await asyncio.sleep(STEP_SECONDS)

    return way


async def _come_back(counts: _Counts, url: str, address: str, way: Way) -> None:
    while True:
        with suppress(OSError):
            async with _connected(url, READ_BYTES, (address, 0)) as (reader, writer):
                counts.connections += 1
                await way(reader, writer)
        await asyncio.sleep(STEP_SECONDS)


@asynccontextmanager
async def _connected(
    url: str, limit: int, address: tuple[str, int] | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, read `limit` bytes ahead. Raises `OSError`."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, local_addr=address, limit=limit)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


# --- thin lines


async def _read_thin(counts: _Counts, url: str, manifest: Manifest, number: int, of: int) -> None:
    """Ask for one stretch of the package after another, for ever."""
    total = len(manifest.chunks)
    at = total * number // of
    while True:
        end, size = at, 0
        while end < total and size < TO_READ:
            size += manifest.chunks[end].size
            end += 1
        with suppress(OSError):
            async with _connected(url, THIN_BYTES) as (reader, writer):
                writer.write(_bundle_request(manifest, range(at, end), "Connection: close", goodput=THIN))
                while piece := await reader.read(THIN_BYTES):
                    counts.thin_bytes += len(piece)
                    await asyncio.sleep(len(piece) / THIN)
        at = end if end < total else 0
