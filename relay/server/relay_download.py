"""One package from another relay into this one: its manifest, then every missing chunk in one request, then the pointer.

The manifest stands here with an offer's lease before the first chunk comes, chunks land as they verify and payloads are
kept as they come: readers of this relay, machines and relays below alike, get them while they still arrive.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from relay.audit.event import tell
from relay.encoding.bundle import Places, Received, Sink
from relay.encoding.choose_bases import MOSTLY_NEW, OTHERS_MAX, Held, worth_asking
from relay.encoding.codecs import Encoding
from relay.encoding.holdings import BoundedHoldings, Holdings
from relay.encoding.planner import Line
from relay.errors import (
    NotFoundError,
    RefusedError,
    StoreError,
    UnreachableError,
    UntrustedError,
)
from relay.package.identity import ManifestId, PackageRef
from relay.package.manifest import Manifest, to_wire
from relay.package.ranges import indexes
from relay.protocol import messages
from relay.protocol.client import ManifestDocument, RelayClient
from relay.protocol.connection import MissingChunksError
from relay.rebuild.recipe_store import Recipes, no_nupkg
from relay.server import metrics
from relay.server.arrivals import Landing, adopting
from relay.server.packages import Transfer
from relay.stores.catalog import Pointer
from relay.stores.open import Store
from relay.support.byte_budget import Place
from relay.support.persistence import Persistence
from relay.support.rate_limit import Pacer
from relay.transfer.download import (
    DownloadLimits,
    NoSourceLeftError,
    Receiver,
    SourceTally,
    download,
    sum_encodings,
)
from relay.transfer.link_history import Lines, Meter
from relay.transfer.probe import line_of

UNKNOWN_SECONDS = 20.0
"""For a source that does not know the package yet: its own copy may be on the way to it."""
PERSISTENCE = Persistence(first_pause=0.5, longest_pause=10.0, longest_asked=10.0, failures=4, patience=60.0)
"""With the source. Its patience is also for chunks that are still on their way there, and none comes."""
_UNTIL_KNOWN = Persistence(first_pause=0.5, longest_pause=0.5)
_RENEW_SECONDS = 60.0


@dataclass(slots=True)
class DownloadState:
    """How far it is: written by the one task that downloads, read by all that watch."""

    whole: int = 0
    here: int = 0
    tallies: dict[str, SourceTally] = field(default_factory=dict)
    wire_bytes: Callable[[], int] = lambda: 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the offer stands here: relays below may ask."""

    @property
    def fallbacks(self) -> int:
        return sum(tally.fallbacks for tally in self.tallies.values())

    @property
    def encodings(self) -> tuple[messages.EncodedBytes, ...]:
        return tuple(sum_encodings(self.tallies.values()))


class RelayDownload(Receiver):
    """One package on its way from one source. Used once."""

    limits = DownloadLimits(connections=1, asks_whole=True, batch_bytes=0, persistence=PERSISTENCE)

    def __init__(
        self,
        package: PackageRef,
        request: messages.ReplicationRequest,
        source: RelayClient,
        transfer: Transfer,
        store: Store,
        state: DownloadState,
        pacer: Pacer | None = None,
    ) -> None:
        """`pacer`: the limit of the line, shared by all that is downloaded over it."""
        self._package = package
        self._id = ManifestId(request.manifest)
        self._source = source
        self._transfer = transfer
        self._store = store
        self._state = state
        self._pacer = pacer
        self._paced = 0
        self._renewed = time.monotonic()
        self._lines = Lines(store.documents)
        self._meter = Meter(Line())
        state.wire_bytes = lambda: source.traffic.total

    async def run(self) -> None:
        """Bring it, and list it.

        Raises:
            UnreachableError: the source is not there, lacks it, or nothing comes.
            UntrustedError: the source lies.
            RefusedError: the source refuses us.
            ConflictError: another nupkg is listed here under this id and version.
            StoreError: our own medium failed.
        """
        self._meter.line = line_of(await self._lines.recall(self._source.url))
        try:
            with self._transfer.room.place() as place:
                await self._bring(place)
        finally:
            metrics.FALLBACKS.labels("received").inc(self._state.fallbacks)
        self._learn()
        await self._lines.remember(self._source.url, self._meter)

    async def _bring(self, place: Place) -> None:
        document = await self._document()
        manifest = document.manifest
        if manifest.package != self._package:
            raise UntrustedError("the manifest is of another package than was named")
        packed = await asyncio.to_thread(to_wire, manifest.canonical)
        offer = await self._transfer.offer(manifest.id, messages.Document(packed, document.signature), None)
        # Before relays below hear of the offer: so it is here when they ask for it.
        await self._take_recipe(manifest)
        missing = set(indexes(offer.missing))
        asked: set[int] = set()
        while True:
            self._lacks(manifest, missing)
            await self._download(manifest, missing, offer.lease, place)
            asked |= missing
            try:
                await self._transfer.publish(self._package, messages.PublishRequest(manifest=manifest.id))
                break
            except MissingChunksError as error:
                missing = set(indexes(error.missing))
                if not asked.isdisjoint(missing):
                    raise StoreError("the store does not keep what is put into it") from error
        # Once more, where the source had none at first: perhaps it has one by now.
        await self._take_recipe(manifest)

    # --- the manifest

    async def _document(self) -> ManifestDocument:
        """From the source, as soon as it knows it."""
        base = await self._newest_other()

        async def ask() -> ManifestDocument:
            return await PERSISTENCE.call(lambda: self._source.manifest(self._id, base))

        try:
            return await _UNTIL_KNOWN.call(ask, lambda error: isinstance(error, NotFoundError), seconds=UNKNOWN_SECONDS)
        except NotFoundError as error:
            raise UnreachableError(f"{self._source.url} does not know the package") from error

    async def _newest_other(self) -> Manifest | None:
        """The newest other version of the package that is here."""
        others = [p for p in self._transfer.catalog.of_id(self._package.id) if p.ref != self._package]
        newest: Pointer | None = max(others, key=lambda pointer: pointer.ref.version, default=None)
        return None if newest is None else await self._transfer.catalog.manifest(newest.manifest_id)

    async def _take_recipe(self, manifest: Manifest) -> None:
        """How the identical nupkg is made again, where the source knows. The package is as good without it."""
        recipes = Recipes(self._store)
        if await recipes.find(manifest) is not None:
            return
        try:
            recipe = await self._source.recipe(manifest)
        except (UnreachableError, RefusedError, UntrustedError) as error:
            tell(no_nupkg(manifest.package, f"no recipe from {self._source.url}: {error}"))
            return
        if recipe is not None:
            await recipes.take(manifest, recipe)

    # --- chunks

    def _lacks(self, manifest: Manifest, missing: set[int]) -> None:
        """What is missing now; from here on others may ask us for it."""
        whole = self._state.whole = manifest.stream_size
        self._state.here = max(self._state.here, whole - sum(manifest.chunks[index].size for index in missing))
        self._state.news.set()

    async def _download(self, manifest: Manifest, missing: set[int], lease: str, place: Place) -> None:
        """Everything that is missing, in as many requests as it takes; one, where nothing goes wrong."""
        self._lease, self._holdings = lease, await self._find_holdings(manifest, missing, lease, place)
        held = () if self._holdings is None else self._holdings.held
        known = {one.manifest.id: one.manifest for one in held} | {manifest.id: manifest}
        self._tap = metrics.Incoming(known, adopting(self._transfer.payloads, known))
        try:
            async with Landing(self._store.chunks, self._transfer.arrivals) as self._landing:
                await download(manifest, missing, [self._source], self, self._state.tallies)
                await self._landing.flush()
        except NoSourceLeftError as error:
            raise error.errors[self._source.name] from None

    async def _find_holdings(self, manifest: Manifest, missing: set[int], lease: str, place: Place) -> Holdings | None:
        """What the source may build on: the newest other version, and packages that hold parts of this one."""
        known: dict[ManifestId, Manifest] = {}
        newest = await self._newest_other()
        if newest is not None and missing:
            known[newest.id] = newest
        if manifest.size_of(missing) > MOSTLY_NEW * manifest.stream_size:
            others = await self._others()
            asked = await asyncio.to_thread(worth_asking, manifest, sorted(missing), others)
            known |= {other.id: other for other in others if other.id in asked}
        if not known:
            return None
        # Held before the source builds on them.
        await self._transfer.leases.use(lease, known)
        held = [Held(each, ((0, len(each.chunks)),)) for each in known.values()]
        return BoundedHoldings(self._store.chunks, known, place, held)

    async def _others(self) -> list[Manifest]:
        """The newest version of packages of other names that are here."""
        newest = {pointer.id.lower(): pointer for pointer in self._transfer.catalog.all()}
        newest.pop(self._package.id.key, None)
        some = sorted(newest.values(), key=lambda pointer: pointer.published, reverse=True)[:OTHERS_MAX]
        found = [await self._transfer.catalog.manifest(pointer.manifest_id) for pointer in some]
        return [manifest for manifest in found if manifest is not None]

    # --- as the receiver of the download

    async def take(self, batch: Sequence[Received]) -> None:
        """As `Receiver`: into the store, and no faster than allowed: what the source then cannot send, it does not."""
        for received in batch:
            await self._landing.add(received.chunk)
            self._state.here += received.chunk.size
            metrics.RECEIVED.inc(received.payload_bytes)
            metrics.CHUNKS.labels("stored").inc()
        if self._pacer is not None:
            crossed = self._source.traffic.received
            await self._pacer.wait(crossed - self._paced)
            self._paced = crossed
        if time.monotonic() - self._renewed > _RENEW_SECONDS:
            self._renewed = time.monotonic()
            await self._transfer.leases.use(self._lease)

    async def bases(self) -> Holdings | None:
        """As `Receiver`."""
        return self._holdings

    def tap(self, run: Places, bases: Places, encoding: Encoding) -> Sink | None:
        """As `Receiver`: to readers of this relay who can take a payload as it is."""
        return self._tap(run, bases, encoding)

    def goodput(self, source: str) -> float:  # noqa: ARG002 - there is one
        """As `Receiver`: no more than the limit."""
        known = self._meter.line.goodput or 0.0
        rate = self._pacer.rate if self._pacer else 0.0
        return min(known or rate, rate) if rate else known

    # --- the line

    def _learn(self) -> None:
        """What the requests say of the line: where something else set the pace, the line is at least so fast."""
        timings = [] if self._pacer else [each for tally in self._state.tallies.values() for each in tally.timings]
        for timing in timings:
            known = self._meter.line.goodput
            if timing.goodput is None or not (timing.is_steady or (known and timing.goodput > known)):
                continue
            goodput = (known + timing.goodput) / 2 if known and timing.is_steady else timing.goodput
            self._meter.line = replace(self._meter.line, goodput=goodput)
            self._meter.samples += 1
