"""The transfer half of /v1: what a relay does with offers, bundles, publishing and reading. HTTP stands around it.

Order keeps it safe: a chunk is told of only when it is durable, a package is listed only when all its chunks are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

from relay import wire
from relay.catalog import Catalog, Pointer, Provenance
from relay.content import manifest as manifests
from relay.content.chunk import Chunk
from relay.content.frames import (
    PLACES_MAX,
    Aborted,
    BundleDecoder,
    BundleWriter,
    Data,
    Event,
    Failed,
    Missing,
    NotSent,
    Received,
    RunRefused,
    Span,
)
from relay.content.identity import ChunkId, ManifestId, PackageRef
from relay.content.manifest import Manifest
from relay.content.ranges import Ranges, check, count, from_indexes, indexes
from relay.errors import (
    ChunkInvalid,
    ChunkMissing,
    ConflictError,
    FrameError,
    NotFoundError,
    StoreError,
    UnreachableError,
    UntrustedError,
)
from relay.server.arrivals import Arrivals, Landing
from relay.server.leases import Leases
from relay.stores.contract import StoredChunk
from relay.stores.locations import Store

log = logging.getLogger(__name__)


class UnknownManifestError(NotFoundError):
    """A request speaks of a manifest that this relay does not keep."""

    def __init__(self) -> None:
        super().__init__("this manifest is not here", hint="Offer it first")


class ChunksMissingError(ConflictError):
    """A publish came too early."""

    def __init__(self, missing: Ranges) -> None:
        super().__init__("chunks of this package are missing")
        self.missing = missing


@dataclass(slots=True)
class _Outcome:
    held: int = 0
    refused: list[wire.RefusedRun] = field(default_factory=list)


class Transfer:
    """One relay's packages, as senders and readers meet them."""

    def __init__(self, store: Store, *, arriving_seconds: float = wire.ARRIVING_SECONDS) -> None:
        self.catalog = Catalog(store.documents)
        self.leases = Leases(store.documents)
        self.closed_to_writes = store.closed_to_writes
        self._store = store.chunks
        self._arrivals = Arrivals()
        self._arriving_seconds = arriving_seconds

    async def load(self) -> None:
        await self.catalog.load()
        await self.leases.load()

    # --- taking

    async def offer(self, id: ManifestId, document: wire.Document, base: ManifestId | None) -> wire.OfferAnswer:
        """Keep a manifest, unlisted, and say what is missing of it.

        Raises:
            ManifestError: not a manifest, or not the one that the path names.
            ConflictError: another nupkg is published under its id and version.
            UnknownManifestError: `base` is not here.
        """
        prefix = (await self._manifest(base)).canonical if base else None
        manifest = await asyncio.to_thread(_open_document, document, prefix, id)
        self.catalog.check_free(manifest)
        # The lease first: who finds the manifest here is to find its chunks on their way, not absent.
        lease = await self.leases.open("offer", [id])
        await self.catalog.keep_manifest(manifest, document.signature)
        return wire.OfferAnswer(lease.id, wire.LEASE_SECONDS, await self._missing(manifest))

    async def missing(self, request: wire.MissingRequest) -> wire.MissingAnswer:
        """Which of the ranges are not here; with a lease, the others now stay. Raises `UnknownManifestError`."""
        answer = []
        for want in request.want:
            manifest = await self._manifest(ManifestId(want.manifest))
            check(want.ranges, len(manifest.chunks))
            lacking = await self._missing(manifest, indexes(want.ranges))
            if lacking:
                answer.append(wire.ChunkRanges(manifest=manifest.id, ranges=lacking))
        if request.lease is not None:
            await self.leases.use(request.lease, [ManifestId(want.manifest) for want in request.want])
        return wire.MissingAnswer(tuple(answer))

    async def take_bundle(self, lease_id: str, body: AsyncIterator[bytes]) -> wire.BundleAnswer:
        """Store the chunks of one bundle as they verify, and tell at the end how it went.

        What was verified before an error or a cut line is kept.

        Raises:
            UnknownLeaseError: offer first.
            FrameError: the body is no bundle, or was cut off.
            StoreError: the medium failed.
        """
        lease = await self.leases.use(lease_id)
        known = await self.catalog.manifests_of(lease.manifests)
        decoder = BundleDecoder(known.get)
        outcome = _Outcome()
        async with Landing(self._store, self._arrivals) as landing:
            async for piece in body:
                batches = decoder.feed(piece)
                while events := await asyncio.to_thread(next, batches, None):
                    await self._take_events(events, landing, outcome)
            decoder.finish()
            await landing.flush()
        await self.leases.use(lease_id)
        return wire.BundleAnswer(landing.stored, outcome.held, tuple(outcome.refused))

    async def _take_events(self, events: Sequence[Event], landing: Landing, outcome: _Outcome) -> None:
        arrived = [event.chunk for event in events if isinstance(event, Received)]
        here = await self._store.has_many(chunk.id for chunk in arrived) if arrived else set()
        for chunk in _each_once(arrived):
            if chunk.id in here:
                outcome.held += 1
            else:
                await landing.add(chunk)
        for event in events:
            if isinstance(event, RunRefused):
                log.warning("bundle: run refused: %s", event.error)
                outcome.refused.extend(_refused(event))
            elif isinstance(event, NotSent | Aborted):
                raise FrameError("a sender's bundle holds data frames only")

    async def publish(self, ref: PackageRef, request: wire.PublishRequest) -> Pointer:
        """List the package, now that all its chunks are here. Idempotent.

        Raises:
            UnknownManifestError: it was never offered.
            UntrustedError: the manifest is of another package.
            ChunksMissingError: with the ranges.
            ConflictError: the name stands for another nupkg.
        """
        manifest = await self._manifest(ManifestId(request.manifest))
        if manifest.package != ref:
            raise UntrustedError("the manifest is of another package than the path names")
        self.catalog.check_free(manifest)
        missing = await self._missing(manifest)
        if missing:
            raise ChunksMissingError(missing)
        return await self.catalog.publish(manifest, Provenance("replicated"))

    # --- giving

    async def document(self, id: ManifestId, base: ManifestId | None) -> tuple[wire.Document, bool]:
        """A manifest for the wire, and whether it was made against `base` (where that is here too)."""
        manifest = await self._manifest(id)
        prefix = await self.catalog.manifest(base) if base and base != id else None
        packed = await asyncio.to_thread(manifests.to_wire, manifest.canonical, prefix.canonical if prefix else None)
        return wire.Document(packed, await self.catalog.signature(id)), prefix is not None

    async def wanted(self, request: wire.BundleRequest) -> list[tuple[Manifest, tuple[int, ...]]]:
        """Check a request for chunks before the answer starts. Raises `UnknownManifestError`, `FrameError`."""
        found = []
        asked = 0
        for want in request.want:
            manifest = await self._manifest(ManifestId(want.manifest))
            asked += count(check(want.ranges, len(manifest.chunks)))
            if asked > PLACES_MAX:
                raise FrameError(f"one request for more than {PLACES_MAX} chunks")
            found.append((manifest, tuple(indexes(want.ranges))))
        return found

    async def give(self, wanted: Sequence[tuple[Manifest, tuple[int, ...]]]) -> AsyncIterator[bytes]:
        """One bundle: each chunk in its stored form as a frame of its own. Chunks on their way here are awaited.

        Where the store's medium fails before a chunk has begun, the bundle says so and ends.
        """
        writer = BundleWriter()
        yield writer.start()
        for manifest, places in wanted:
            absent: list[int] = []
            for position, index in enumerate(places):
                try:
                    stored = await self._open(manifest, index)
                except TimeoutError:
                    # Not here yet: the reader asks again, and so learns of what came in between.
                    yield writer.frame(Missing((Span.of(manifest.id, places[position:]),), "arriving"))
                    break
                except StoreError as error:
                    log.warning("store: %s", error)
                    yield writer.frame(Failed("store_failed"))
                    yield writer.end()
                    return
                if stored is None:
                    absent.append(index)
                    continue
                run = (Span.of(manifest.id, (index,)),)
                head = writer.frame(Data(run, (), "zstd", stored.length, stored.xxh3))
                async for piece in stored.pieces():
                    yield head + piece if head else piece
                    head = b""
            if absent:
                yield writer.frame(Missing((Span.of(manifest.id, absent),), "absent"))
        yield writer.end()

    async def chunk(self, id: ChunkId) -> StoredChunk:
        """One chunk, awaited where it is on its way here.

        Raises:
            ChunkMissing: not here, and nobody brings it.
            ChunkInvalid: damaged.
            UnreachableError: it has not arrived yet: ask again.
        """
        try:
            return await self._store.open(id)
        except ChunkMissing:
            manifest = await self._offered_with(id)
            if manifest is None:
                raise
        try:
            found = await self._open(manifest, manifest.index_of[id])
        except TimeoutError as error:
            raise UnreachableError("this chunk is still on its way here", retry_after=1.0) from error
        if found is None:
            raise ChunkMissing(id)
        return found

    async def _offered_with(self, id: ChunkId) -> Manifest | None:
        """A manifest that holds this chunk, and that somebody is bringing."""
        for offered in self.leases.offered():
            manifest = await self.catalog.manifest(offered)
            if manifest is not None and id in manifest.index_of:
                return manifest
        return None

    # --- the ground

    async def _open(self, manifest: Manifest, index: int) -> StoredChunk | None:
        """The chunk; None where it is not here and nobody brings it; TimeoutError where it has not arrived yet."""
        id = manifest.chunk_id(index)
        # Asked before looking: while we look, the last chunks may land and the package be published.
        is_arriving = self._is_arriving(manifest)
        found = await self._open_here(id)
        if found is not None or not is_arriving:
            return found
        flight = self._arrivals.flight(id)
        found = await self._open_here(id)
        if found is not None:
            return found
        await asyncio.wait_for(flight.wait(), self._arriving_seconds)
        return await self._open_here(id)

    def _is_arriving(self, manifest: Manifest) -> bool:
        published = self.catalog.find(manifest.package)
        return published is None and manifest.id in self.leases.offered()

    async def _open_here(self, id: ChunkId) -> StoredChunk | None:
        try:
            return await self._store.open(id)
        except ChunkMissing:
            return None
        except ChunkInvalid as error:
            log.warning("store: %s", error)
            return None

    async def _manifest(self, id: ManifestId) -> Manifest:
        manifest = await self.catalog.manifest(id)
        if manifest is None:
            raise UnknownManifestError
        return manifest

    async def _missing(self, manifest: Manifest, places: Iterable[int] | None = None) -> Ranges:
        """Indexes that are not here, each chunk named once however often it stands in the stream."""
        first = manifest.index_of
        ids = manifest.chunk_ids() if places is None else [manifest.chunk_id(index) for index in places]
        here = await self._store.has_many(ids)
        return from_indexes(first[id] for id in ids if id not in here)


def _open_document(document: wire.Document, prefix: bytes | None, id: ManifestId) -> Manifest:
    return manifests.parse_named(manifests.from_wire(document.manifest, prefix), id)


def _each_once(chunks: Iterable[Chunk]) -> list[Chunk]:
    return list({chunk.id: chunk for chunk in chunks}.values())


def _refused(event: RunRefused) -> list[wire.RefusedRun]:
    reason = "wrong_bytes" if isinstance(event.error, ChunkInvalid) else "bad_frame"
    by_manifest: dict[ManifestId, list[int]] = {}
    for manifest, index in event.run:
        by_manifest.setdefault(manifest, []).append(index)
    return [wire.RefusedRun(id, from_indexes(places), reason) for id, places in by_manifest.items()]
