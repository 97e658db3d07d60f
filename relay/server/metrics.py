"""What a relay counts, in Prometheus' text form."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Literal

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, generate_latest

from relay.encoding.bundle import BaseMissingError, Places, RunRefused, Sink, Tap
from relay.encoding.codecs import Encoding
from relay.encoding.holdings import size_of
from relay.package.identity import ManifestId
from relay.package.manifest import Manifest
from relay.protocol.messages import Ending
from relay.server.http import counts
from relay.stores.watch import Sight

RECEIVED = Counter("waystation_received_bytes", "Bytes of bundles received")
SENT = Counter("waystation_sent_bytes", "Bytes of bundles and chunks sent")
CHUNKS = Counter("waystation_chunks", "Chunks by what became of them", ["outcome"])
PAYLOAD = Counter(
    "waystation_payload_bytes", "Bytes of frame payloads, by direction and encoding", ["direction", "encoding"]
)
CONTENT = Counter(
    "waystation_content_bytes", "Bytes of the chunks in them, by direction and encoding", ["direction", "encoding"]
)
FALLBACKS = Counter("waystation_fallbacks", "Encoded runs that failed and were followed by plain ones", ["direction"])
REPLICATIONS = Counter("waystation_replications", "Packages fetched from another relay, by how it ended", ["outcome"])
PAYLOADS = Counter("waystation_payloads", "Payloads of runs by where they came from", ["outcome"])
REFUSALS, CONNECTIONS_REFUSED = counts.REFUSALS, counts.CONNECTIONS_REFUSED
EVENTS_MERGED = Counter(
    "waystation_events_merged", "Events that were counted in place of being told, as they repeat", ["event"]
)
LETTERS = Counter(
    "waystation_mail_letters", "Letters posted, by kind and by whether they were new", ["kind", "outcome"]
)
MAIL_BYTES = Gauge("waystation_mail_kept_bytes", "Bytes that the kept letters count for")
AGENTS = Gauge("waystation_agents", "Agents whose presence is told")
ENDS = Gauge(
    "waystation_ends_timestamp_seconds",
    "When a token of the relay's callers, or its certificate, ends: seconds since 1970",
    ["what", "id", "name"],
)
ENDS_IN = Gauge(
    "waystation_ends_in_seconds",
    "Seconds until a token of the relay's callers, or its certificate, ends; below 0 once it has",
    ["what", "id", "name"],
)
DISK_FREE = Gauge("waystation_disk_free_bytes", "Bytes that are free on the store's file system")
DISK_FLOOR = Gauge("waystation_disk_floor_bytes", "Bytes of them that are kept free")
DISK_LOW = Gauge("waystation_disk_low", "1 where the store is low on space or full")
READ_ONLY = Gauge("waystation_read_only", "1 where the store takes nothing more")


def sent(encoding: Encoding | Literal["stored"], payload: int, content: int) -> None:
    """Something goes out: bytes of its payload and of the chunks in it. `stored`: a chunk as it stands in the store."""
    PAYLOAD.labels("sent", encoding).inc(payload)
    CONTENT.labels("sent", encoding).inc(content)


class Incoming:
    """A tap that counts what comes in by encoding, and hands it on to another one."""

    def __init__(self, known: Mapping[ManifestId, Manifest], tap: Tap) -> None:
        self._known = known
        self._tap = tap
        self._deltas: set[tuple[ManifestId, int]] = set()

    def __call__(self, run: Places, bases: Places, encoding: Encoding) -> Sink:
        """As `Tap`."""
        if bases:
            self._deltas.add(run[-1])
        return _Counting(encoding, size_of(run, self._known), self._tap(run, bases, encoding))

    def refused(self, event: RunRefused) -> None:
        """Count it where it was a difference: its sender falls back to a plain run."""
        if isinstance(event.error, BaseMissingError) or event.run[-1] in self._deltas:
            FALLBACKS.labels("received").inc()


class _Counting:
    def __init__(self, encoding: Encoding, size: int, behind: Sink | None) -> None:
        self._payload = PAYLOAD.labels("received", encoding)
        self._content = CONTENT.labels("received", encoding)
        self._size = size
        self._behind = behind

    def add(self, piece: bytes) -> None:
        self._payload.inc(len(piece))
        if self._behind is not None:
            self._behind.add(piece)

    def finish(self) -> None:
        self._content.inc(self._size)
        if self._behind is not None:
            self._behind.finish()

    def fail(self) -> None:
        if self._behind is not None:
            self._behind.fail()


async def counted(pieces: AsyncGenerator[bytes, None], counter: Counter) -> AsyncGenerator[bytes, None]:
    """`pieces` as they are, their bytes added to `counter`."""
    async with aclosing(pieces):
        async for piece in pieces:
            counter.inc(len(piece))
            yield piece


def merged(event: str) -> None:
    """An event of this name was counted in place of being told."""
    EVENTS_MERGED.labels(event).inc()


def answer(endings: Iterable[Ending], store: Sight, now: float) -> web.StreamResponse:
    """To `GET /metrics`."""
    ENDS.clear()
    ENDS_IN.clear()
    for one in endings:
        ENDS.labels(one.what, one.id, one.name).set(one.ends)
        ENDS_IN.labels(one.what, one.id, one.name).set(one.ends - now)
    if store.room is not None:
        DISK_FREE.set(store.room.free)
        DISK_FLOOR.set(store.room.floor)
    DISK_LOW.set(store.space != "enough")
    READ_ONLY.set(store.takes_nothing)
    return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})
