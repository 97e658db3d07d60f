"""One package from another relay into this one: its manifest, then every missing chunk in one request, then the pointer.

The manifest stands here with an offer's lease before the first chunk comes, chunks land as they verify and payloads are
kept as they come: so who reads from here, machines and relays below alike, gets them while they still arrive.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from relay.encoding.bundle import (
    Aborted,
    BaseMissingError,
    CutShortError,
    Event,
    NotSent,
    Places,
    Received,
    RunRefused,
    Sink,
    Tap,
)
from relay.encoding.choose_bases import MOSTLY_NEW, OTHERS_MAX, Held, worth_asking
from relay.encoding.codecs import DELTAS, Encoding
from relay.encoding.holdings import Holdings, StoreHoldings, size_of
from relay.encoding.planner import Line
from relay.errors import (
    ChunkMissing,
    FrameError,
    NotFoundError,
    RefusedError,
    StoreError,
    UnreachableError,
    UntrustedError,
)
from relay.package import manifest as manifests
from relay.package.identity import ManifestId, PackageRef
from relay.package.manifest import Manifest
from relay.package.ranges import indexes
from relay.protocol import messages
from relay.protocol.client import ManifestDocument, RelayClient
from relay.rebuild.recipe_store import Recipes
from relay.server import metrics
from relay.server.arrivals import Landing, Place, adopting
from relay.server.packages import ChunksMissingError, Transfer
from relay.stores.catalog import Pointer
from relay.stores.open import Store
from relay.support.rate_limit import Pacer
from relay.transfer.link_history import Lines, Meter

log = logging.getLogger(__name__)

_RENEW_SECONDS = 60.0
_ROOM_SECONDS = 20.0
"""For memory for the bases of a run."""
_TELLING_BYTES = 256 << 10
"""Payload from which on a request says something about its line."""


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """How long a relay bears with its source. Seconds."""

    unknown_seconds: float = 20.0
    """For a source that does not know the package yet: its own copy may be on the way to it."""
    pause_seconds: float = 0.5
    """Before the next try, doubled with each that brought nothing."""
    fruitless_max: int = 3
    """Tries in a row, after the first, that may bring nothing."""
    retry_after_max: float = 10.0
    """The longest pause that a busy source may ask for."""
    stall_seconds: float = 60.0
    """For a source where the chunks are still on their way, and none comes."""


@dataclass(slots=True)
class Told:
    """How far it is: written by the one task that fetches, read by all that watch."""

    whole: int = 0
    here: int = 0
    fallbacks: int = 0
    wire_bytes: Callable[[], int] = lambda: 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the offer stands here: relays below may ask."""
    _chunks: Counter[str] = field(default_factory=Counter)
    _stream: Counter[str] = field(default_factory=Counter)
    _payload: Counter[str] = field(default_factory=Counter)

    def count(self, encoding: str, size: int, payload: int) -> None:
        """A chunk came."""
        self._chunks[encoding] += 1
        self._stream[encoding] += size
        self._payload[encoding] += payload

    def encodings(self) -> tuple[messages.EncodedBytes, ...]:
        return tuple(
            messages.EncodedBytes(name, chunks, self._stream[name], self._payload[name])
            for name, chunks in sorted(self._chunks.items())
        )


class AbsentError(UnreachableError):
    """The source lacks what it should hold."""


class StalledError(UnreachableError):
    """Nothing came for so long that asking again is no use."""


class _Pace:
    """How fast the payload of one request came, from its first chunk on."""

    def __init__(self) -> None:
        self.is_steady = True
        """Whether it was the line that set the pace, and neither an encoder nor chunks that had to arrive first."""
        self.size = 0
        self._first = 0.0

    def came(self, payload_bytes: int) -> None:
        if not self._first:
            self._first = time.monotonic()
        else:
            self.size += payload_bytes

    @property
    def goodput(self) -> float:
        """Bytes per second."""
        return self.size / max(time.monotonic() - self._first, 1e-6)


class _Bounded:
    """Holdings that are read when there is memory for them: once as they are read, once as they are joined."""

    def __init__(self, holdings: StoreHoldings, known: Mapping[ManifestId, Manifest], place: Place) -> None:
        self.held: Sequence[Held] = holdings.held
        self._holdings = holdings
        self._known = known
        self._place = place

    async def load(self, places: Places) -> list[bytes]:
        """As `Holdings.load`."""
        if not await self._place.take(2 * size_of(places, self._known), _ROOM_SECONDS):
            # A run whose bases are not given is refused, and asked for plainly.
            raise ChunkMissing(self._known[places[0][0]].chunk_id(places[0][1]))
        return await self._holdings.load(places)


class Fetching:
    """One package on its way from one source. Used once."""

    def __init__(
        self,
        package: PackageRef,
        request: messages.ReplicationRequest,
        source: RelayClient,
        transfer: Transfer,
        store: Store,
        told: Told,
        limits: FetchLimits,
        pacer: Pacer | None = None,
    ) -> None:
        """`pacer`: the limit of the line, shared by all that is fetched over it."""
        self._package = package
        self._id = ManifestId(request.manifest)
        self._source = source
        self._transfer = transfer
        self._store = store
        self._told = told
        self._limits = limits
        self._missing: set[int] = set()
        self._plain: set[int] = set()
        """Chunks whose difference from bases failed."""
        self._encoding: dict[int, Encoding] = {}
        self._last = self._renewed = time.monotonic()
        """When something came last."""
        self._pacer = pacer
        self._paced = 0
        self._rate = pacer.rate if pacer else 0.0
        self._lines = Lines(store.documents)
        self._meter = Meter(Line())
        told.wire_bytes = lambda: source.traffic.total

    async def run(self) -> None:
        """Bring it, and list it.

        Raises:
            UnreachableError: the source is not there, lacks it, or nothing comes.
            UntrustedError: the source lies.
            RefusedError: the source refuses us.
            ConflictError: another nupkg is listed here under this id and version.
            StoreError: our own medium failed.
        """
        remembered = await self._lines.recall(self._source.url)
        if remembered is not None:
            self._meter.line = Line(remembered.goodput, remembered.round_trip)
        with self._transfer.room.place() as place:
            await self._bring(place)
        await self._lines.remember(self._source.url, self._meter)

    async def _bring(self, place: Place) -> None:
        document = await self._document()
        manifest = document.manifest
        if manifest.package != self._package:
            raise UntrustedError("the manifest is of another package than was named")
        packed = await asyncio.to_thread(manifests.to_wire, manifest.canonical, None)
        offer = await self._transfer.offer(manifest.id, messages.Document(packed, document.signature), None)
        # Before relays below hear of the offer: so it is here when they ask for it.
        await self._fetch_recipe(manifest)
        missing = set(indexes(offer.missing))
        asked: set[int] = set()
        while True:
            self._lacks(manifest, missing)
            await self._fetch(manifest, offer.lease, place)
            asked |= missing
            try:
                await self._transfer.publish(self._package, messages.PublishRequest(manifest=manifest.id))
                break
            except ChunksMissingError as error:
                missing = set(indexes(error.missing))
                if not asked.isdisjoint(missing):
                    raise StoreError("the store does not keep what is put into it") from error
        # Once more, where the source had none at first: perhaps it has one by now.
        await self._fetch_recipe(manifest)

    # --- the manifest

    async def _document(self) -> ManifestDocument:
        """From the source, as soon as it knows it."""
        base = await self._newest_other()
        patience = time.monotonic() + self._limits.unknown_seconds
        tries = 0
        while True:
            try:
                return await self._source.manifest(self._id, base)
            except NotFoundError as error:
                if time.monotonic() > patience:
                    raise AbsentError(f"{self._source.url} does not know the package") from error
                await asyncio.sleep(self._limits.pause_seconds)
            except UnreachableError as error:
                tries += 1
                if tries > self._limits.fruitless_max:
                    raise
                await self._pause(tries - 1, error)

    async def _newest_other(self) -> Manifest | None:
        """The newest other version of the package that is here."""
        others = [p for p in self._transfer.catalog.of_id(self._package.id) if p.ref != self._package]
        newest: Pointer | None = max(others, key=lambda pointer: pointer.ref.version, default=None)
        return None if newest is None else await self._transfer.catalog.manifest(newest.manifest_id)

    async def _fetch_recipe(self, manifest: Manifest) -> None:
        """How the identical nupkg is made again, where the source knows. The package is as good without it."""
        recipes = Recipes(self._store)
        if await recipes.find(manifest) is not None:
            return
        try:
            recipe = await self._source.recipe(manifest)
        except (UnreachableError, RefusedError, UntrustedError) as error:
            log.info("no recipe of %s from %s: %s", manifest.package, self._source.url, error)
            return
        if recipe is not None:
            await recipes.take(manifest, recipe)

    # --- chunks

    async def _fetch(self, manifest: Manifest, lease: str, place: Place) -> None:
        """Everything that is missing, in as many requests as it takes; one, where nothing goes wrong."""
        holdings = await self._holdings(manifest, lease, place)
        fruitless = 0
        self._last = time.monotonic()
        while self._missing:
            before = self._owed
            wanted = sorted(self._missing - self._plain) or sorted(self._missing)
            bases = None if self._plain.issuperset(wanted) else holdings
            try:
                await self._ask(manifest, lease, wanted, bases)
            except (StoreError, StalledError):
                raise
            except UnreachableError as error:
                fruitless = 0 if self._owed < before else fruitless + 1
                if fruitless > self._limits.fruitless_max:
                    raise
                await self._pause(fruitless, error)

    @property
    def _owed(self) -> int:
        """Falls with every chunk that comes, and with every one that will be asked for plainly."""
        return 2 * len(self._missing) - len(self._plain)

    async def _ask(self, manifest: Manifest, lease: str, wanted: Sequence[int], bases: Holdings | None) -> None:
        """One request. What came of it counts, however it ends."""
        known = {manifest.id: manifest} | {one.manifest.id: one.manifest for one in (bases.held if bases else ())}
        pace = _Pace()
        owed = set(wanted)
        stream = self._source.stream(
            manifest,
            wanted,
            bases=bases,
            goodput=self._goodput,
            tap=self._listening(metrics.Incoming(known, adopting(self._transfer.payloads, known)), pace),
        )
        async with Landing(self._store.chunks, self._transfer.arrivals) as landing:
            async with aclosing(stream) as events:
                async for event in events:
                    if isinstance(event, Received):
                        owed.discard(event.index)
                        await landing.add(event.chunk)
                        self._came(event)
                        pace.came(event.payload_bytes)
                        await self._keep_limit(lease)
                    else:
                        owed.difference_update(self._heed(manifest, event, pace))
            await landing.flush()
        if owed:
            raise FrameError(f"{self._source.url} left out {len(owed)} chunks without a word")
        self._learn(pace)
        if self._missing.issuperset(wanted) and self._plain.isdisjoint(wanted):
            # All of it is still on its way to the source, which waits itself before it says so.
            await asyncio.sleep(self._limits.pause_seconds)
            if time.monotonic() - self._last > self._limits.stall_seconds:
                raise StalledError(f"{self._source.url} still waits for chunks, and none comes")

    def _came(self, event: Received) -> None:
        if event.index not in self._missing:
            return
        self._last = time.monotonic()
        self._missing.discard(event.index)
        self._plain.discard(event.index)
        self._told.here += event.chunk.size
        metrics.RECEIVED.inc(event.payload_bytes)
        metrics.CHUNKS.labels("stored").inc()
        self._told.count(self._encoding.get(event.index, "zstd"), event.chunk.size, event.payload_bytes)

    def _heed(self, manifest: Manifest, event: Event, pace: _Pace) -> Iterable[int]:
        """The chunks that an event speaks of and does not bring. Raises what it means that cannot be borne."""
        if isinstance(event, RunRefused):
            if isinstance(event.error, CutShortError):
                return ()
            if not self._is_delta(event):
                raise event.error
            run = {index for _, index in event.run}
            self._plain |= run & self._missing
            self._told.fallbacks += 1
            metrics.FALLBACKS.labels("received").inc()
            return run
        if isinstance(event, Aborted):
            # Busy: what it was sending came from elsewhere, and may be there in a moment.
            again = self._limits.pause_seconds if event.code == "busy" else None
            raise UnreachableError(f"{self._source.url} broke off ({event.code})", retry_after=again)
        if isinstance(event, NotSent):
            if event.reason != "arriving":
                raise AbsentError(f"{self._source.url} lacks {len(event.run)} chunks of {manifest.package}")
            pace.is_steady = False
            return [index for _, index in event.run]
        return ()

    def _is_delta(self, event: RunRefused) -> bool:
        return isinstance(event.error, BaseMissingError) or any(
            self._encoding.get(index) in DELTAS for _, index in event.run
        )

    def _listening(self, tap: Tap, pace: _Pace) -> Tap:
        """`tap`, and in which encoding each chunk comes."""

        def begin(run: Places, bases: Places, encoding: Encoding) -> Sink | None:
            # An encoder behind the line may be what sets the pace.
            pace.is_steady = pace.is_steady and len(run) == 1 and not bases
            self._encoding.update((index, encoding) for _, index in run)
            return tap(run, bases, encoding)

        return begin

    async def _holdings(self, manifest: Manifest, lease: str, place: Place) -> Holdings | None:
        """What the source may build on: the newest other version, and packages that hold parts of this one."""
        known: dict[ManifestId, Manifest] = {}
        newest = await self._newest_other()
        if newest is not None and self._missing:
            known[newest.id] = newest
        if manifest.size_of(self._missing) > MOSTLY_NEW * manifest.stream_size:
            others = await self._others()
            asked = await asyncio.to_thread(worth_asking, manifest, sorted(self._missing), others)
            known |= {other.id: other for other in others if other.id in asked}
        if not known:
            return None
        # Held before anybody builds on them.
        await self._transfer.leases.use(lease, known)
        held = [Held(each, ((0, len(each.chunks)),)) for each in known.values()]
        return _Bounded(StoreHoldings(self._store.chunks, known, held), known, place)

    async def _others(self) -> list[Manifest]:
        """The newest version of packages of other names that are here."""
        newest = {pointer.id.lower(): pointer for pointer in self._transfer.catalog.all()}
        newest.pop(self._package.id.key, None)
        some = sorted(newest.values(), key=lambda pointer: pointer.published, reverse=True)[:OTHERS_MAX]
        found = [await self._transfer.catalog.manifest(pointer.manifest_id) for pointer in some]
        return [manifest for manifest in found if manifest is not None]

    # --- pace

    @property
    def _goodput(self) -> float:
        """What the source may count on, bytes per second; 0 where nothing is known."""
        known = self._meter.line.goodput or 0.0
        return min(known or self._rate, self._rate) if self._rate else known

    def _learn(self, pace: _Pace) -> None:
        """What one request says of the line: where something else set the pace, the line is at least so fast."""
        known = self._meter.line.goodput
        if self._rate or pace.size < _TELLING_BYTES or not (pace.is_steady or (known and pace.goodput > known)):
            return
        goodput = (known + pace.goodput) / 2 if known and pace.is_steady else pace.goodput
        self._meter.line = replace(self._meter.line, goodput=goodput)
        self._meter.samples += 1

    async def _keep_limit(self, lease: str) -> None:
        """Read no faster than was allowed: what the source then cannot send, it does not."""
        if self._pacer is not None:
            received = self._source.traffic.received
            await self._pacer.wait(received - self._paced)
            self._paced = received
        if time.monotonic() - self._renewed > _RENEW_SECONDS:
            self._renewed = time.monotonic()
            await self._transfer.leases.use(lease)

    async def _pause(self, tries: int, error: UnreachableError) -> None:
        pause = self._limits.pause_seconds * 2**tries
        await asyncio.sleep(max(pause, min(error.retry_after or 0.0, self._limits.retry_after_max)))

    def _lacks(self, manifest: Manifest, missing: set[int]) -> None:
        """What is missing now; from here on others may ask us for it."""
        self._missing = missing
        whole = manifest.stream_size
        self._told.whole = whole
        self._told.here = max(self._told.here, whole - manifest.size_of(missing))
        self._told.news.set()
