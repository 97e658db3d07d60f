"""The transfer half of /v1: what a relay does with offers, bundles, publishing and reading. HTTP stands around it.

Order keeps it safe: a chunk is told of only when it is durable, a package is listed only when all its chunks are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

from relay.audit.acts import ChunksRefused
from relay.audit.event import tell
from relay.encoding.bundle import (
    PLACES_MAX,
    Aborted,
    BaseMissingError,
    BundleDecoder,
    Event,
    NeedsBases,
    NotSent,
    Received,
    RunRefused,
)
from relay.encoding.choose_bases import Held
from relay.encoding.holdings import BoundedHoldings, Holdings, answer, next_events
from relay.errors import (
    ChunkInvalid,
    ChunkMissing,
    FrameError,
    NotFoundError,
    UnknownLeaseError,
    UnreachableError,
    UntrustedError,
)
from relay.package.identity import ChunkId, ManifestId, PackageRef
from relay.package.manifest import Manifest, parse_wire, to_wire
from relay.package.ranges import Ranges, check, count, from_indexes, indexes
from relay.protocol import messages
from relay.protocol.connection import MissingChunksError
from relay.protocol.packed_envelope import unpack_envelope
from relay.rebuild.recipe_store import Recipes
from relay.server import metrics
from relay.server.arrivals import Arrivals, ArrivingChunks, Landing, adopting
from relay.server.bundle_answer import ANYBODY, Ground, Reader, give
from relay.server.leases import Leases
from relay.stores.catalog import Catalog, Pointer, Provenance
from relay.stores.contract import PIECE, StoredChunk
from relay.stores.open import Store
from relay.support.byte_budget import ByteBudget
from relay.transfer.encoder_pool import Payloads

log = logging.getLogger(__name__)

_KEPT_BYTES: Final = 12 << 20
"""Bytes of finished payloads that a relay keeps: all of a common package, and of a large one enough, as readers take what is
kept first, wherever in the package it stands, and so meet at the same runs. With 64 MiB a relay encoded no less."""
_BASES_BYTES: Final = 96 << 20
"""Bytes that the bases of all incoming runs take together, as they are read and as they are joined."""


class UnknownManifestError(NotFoundError):
    """A request speaks of a manifest that this relay does not keep."""

    def __init__(self) -> None:
        super().__init__("this manifest is not here", hint="Offer it first")


@dataclass(slots=True)
class _Outcome:
    incoming: metrics.Incoming
    held: int = 0
    refused: list[messages.RefusedRun] = field(default_factory=list)


class Transfer:
    """One relay's packages, as senders and readers meet them."""

    def __init__(
        self,
        store: Store,
        *,
        arriving_seconds: float = messages.ARRIVING_SECONDS,
        rates: messages.CpuRates | None = None,
    ) -> None:
        """`rates`: of this machine, to plan by."""
        self.catalog = Catalog(store.documents)
        self.leases = Leases(store.documents)
        self.store = store
        self._store = store.chunks
        self._recipes = Recipes(store)
        self._completing: set[ManifestId] = set()
        """Offered with chunks missing, and not published since."""
        self._reading = asyncio.Lock()
        """One offered manifest is read at a time: the largest takes 330 MB meanwhile."""
        self.arrivals = Arrivals()
        """Of all that lands chunks in this relay's name."""
        self._chunks = ArrivingChunks(self._store, self.arrivals, self._is_arriving)
        self.room = ByteBudget(_BASES_BYTES)
        self._arriving_seconds = arriving_seconds
        self.payloads = Payloads(self._store, kept_bytes=_KEPT_BYTES)
        self.rates = rates

    async def load(self) -> None:
        await self.catalog.load()
        await self.leases.load()

    async def close(self) -> None:
        """Stop what is being encoded. Twice is once."""
        await self.payloads.close()

    # --- taking

    async def offer(self, id: ManifestId, document: messages.Document, base: ManifestId | None) -> messages.OfferAnswer:
        """Keep a manifest, unlisted, and say what is missing of it.

        Raises:
            ManifestError: not a manifest, or not the one that the path names.
            ConflictError: another nupkg is published under its id and version.
            SignatureError: an envelope that does not unpack.
            RecipeError: a recipe that came without a base and is none of this manifest's.
            UnknownManifestError: `base` is not here.
        """
        prefix = (await self.manifest(base)).canonical if base else None
        async with self._reading:
            manifest = await asyncio.to_thread(parse_wire, document.manifest, prefix, id)
        self.catalog.check_free(manifest)
        signature = document.signature
        if document.packed_signature:
            signature = unpack_envelope(document.packed_signature, manifest)
        recipe = None
        if document.recipe:
            known = await self.manifest(base) if base else None
            recipe = await self._recipes.unpack(document.recipe, manifest, known)
        # The lease first: who finds the manifest here is to find its chunks on their way, not absent.
        lease = await self.leases.open("offer", [id], [base] if base else ())
        await self.catalog.keep_manifest(manifest, signature)
        if recipe is not None:
            await self._recipes.take(manifest, recipe)
        unread = bool(document.recipe) and recipe is None
        missing = await self._missing(manifest, read=True)
        if missing:
            self._completing.add(id)
        return messages.OfferAnswer(lease, messages.LEASE_SECONDS, missing, unread)

    async def missing(self, request: messages.MissingRequest) -> messages.MissingAnswer:
        """Which of the ranges are not here, and which manifests; with a lease, the others now stay.

        Without a lease, the first manifest is the one that may not have to be sent: its chunks are read, so that what was
        damaged on this disk is sent again. The others may be built on, and show damage when they are.

        Raises:
            UnknownLeaseError: offer first.
            FrameError: ranges outside of their manifest.
        """
        known = await self.catalog.manifests_of({ManifestId(want.manifest) for want in request.want})
        for want in request.want:
            if want.manifest in known:
                check(want.ranges, len(known[ManifestId(want.manifest)].chunks))
        if request.lease is not None:
            # The lease first: what is found here afterwards stays.
            await self.leases.use(request.lease, known)
        missing = []
        for want in request.want:
            manifest = known.get(ManifestId(want.manifest))
            read = request.lease is None and want is request.want[0]
            lacking = await self._missing(manifest, indexes(want.ranges), read=read) if manifest is not None else ()
            if lacking:
                missing.append(messages.ChunkRanges(manifest=want.manifest, ranges=lacking))
        unknown = dict.fromkeys(want.manifest for want in request.want if want.manifest not in known)
        return messages.MissingAnswer(tuple(missing), tuple(unknown))

    async def take_bundle(self, lease_id: str, body: AsyncIterator[bytes]) -> messages.BundleAnswer:
        """Store the chunks of one bundle as they verify, and tell at the end how it went.

        What was verified before an error or a cut line is kept.

        Raises:
            UnknownLeaseError: offer first.
            FrameError: the body is no bundle, or was cut off.
            StoreError: the medium failed.
        """
        lease = await self.leases.use(lease_id)
        known = await self.catalog.manifests_of(map(ManifestId, lease.manifests))
        if len(known) < len(lease.manifests):
            # The disk lost one of them since: what the lease promised cannot be kept, and its holder offers again.
            raise UnknownLeaseError
        incoming = metrics.Incoming(known, adopting(self.payloads, known))
        decoder = BundleDecoder(known.get, tap=incoming)
        outcome = _Outcome(incoming)
        async with AsyncExitStack() as stack:
            place = stack.enter_context(self.room.place())
            landing = await stack.enter_async_context(Landing(self._store, self.arrivals))
            bases = BoundedHoldings(self._store, known, place)
            try:
                async for piece in body:
                    batches = decoder.feed(piece)
                    while events := await next_events(batches):
                        await self._take_events(events, landing, outcome, bases)
                decoder.finish()
            finally:
                # Whoever reads on from a payload that broke off learns it now.
                decoder.abandon()
            await landing.flush()
        await self.leases.use(lease_id)
        return messages.BundleAnswer(landing.stored, outcome.held, tuple(outcome.refused))

    async def _take_events(self, events: Sequence[Event], landing: Landing, outcome: _Outcome, bases: Holdings) -> None:
        arrived = {event.chunk.id: event.chunk for event in events if isinstance(event, Received)}
        here = await self._store.has_many(arrived) if arrived else set()
        for chunk in arrived.values():
            if chunk.id in here:
                outcome.held += 1
            else:
                await landing.add(chunk)
        for event in events:
            match event:
                case RunRefused():
                    tell(ChunksRefused(_reason(event.error)))
                    outcome.incoming.refused(event)
                    outcome.refused.extend(_refused(event))
                case NeedsBases():
                    if not await answer(event, bases):
                        log.warning("bundle: the bases of a run cannot be given")
                case NotSent() | Aborted():
                    raise FrameError("a sender's bundle holds data frames only")

    async def publish(self, ref: PackageRef, request: messages.PublishRequest) -> Pointer:
        """List the package, now that all its chunks are here. Idempotent.

        Raises:
            UnknownManifestError: it was never offered.
            UntrustedError: the manifest is of another package.
            MissingChunksError: with the ranges.
            ConflictError: the name stands for another nupkg.
        """
        manifest = await self.manifest(ManifestId(request.manifest))
        if manifest.package != ref:
            raise UntrustedError("the manifest is of another package than the path names")
        self.catalog.check_free(manifest)
        missing = await self._missing(manifest)
        if missing:
            raise MissingChunksError(missing)
        self._completing.discard(manifest.id)
        return await self.catalog.publish(manifest, Provenance("replicated"))

    # --- giving

    async def document(self, id: ManifestId, base: ManifestId | None) -> tuple[messages.Document, bool]:
        """A manifest for the wire, and whether it was made against `base` (where that is here too)."""
        manifest = await self.manifest(id)
        prefix = await self.catalog.manifest(base) if base and base != id else None
        packed = await asyncio.to_thread(to_wire, manifest.canonical, prefix.canonical if prefix else None)
        return messages.Document(packed, await self.catalog.signature(id)), prefix is not None

    async def wanted(self, request: messages.BundleRequest) -> list[tuple[Manifest, tuple[int, ...]]]:
        """Check a request for chunks before the answer starts. Raises `UnknownManifestError`, `FrameError`."""
        found = [(await self.manifest(ManifestId(want.manifest)), want.ranges) for want in request.want]
        _check_places(found)
        return [(manifest, tuple(indexes(ranges))) for manifest, ranges in found]

    async def reader(self, request: messages.BundleRequest) -> Reader:
        """What a request says of its reader, of use here: bases that are not here, too, are passed over.

        Raises:
            FrameError: ranges outside of their manifest, or too many.
        """
        known = await self.catalog.manifests_of(ManifestId(base.manifest) for base in request.bases)
        named = [(known[ManifestId(one.manifest)], one.ranges) for one in request.bases if one.manifest in known]
        _check_places(named)
        held = tuple(Held(manifest, ranges) for manifest, ranges in named)
        return Reader(frozenset(request.encodings), held, request.goodput)

    def give(
        self, wanted: Sequence[tuple[Manifest, tuple[int, ...]]], reader: Reader = ANYBODY, piece: int = PIECE
    ) -> AsyncGenerator[bytes, None]:
        """One bundle, in pieces of about `piece` bytes at most. Chunks on their way here are awaited.

        Where the store's medium fails before a chunk has begun, the bundle says so and ends.
        """
        return give(wanted, reader, Ground(self._chunks, self.payloads, self._arriving_seconds, self.rates, piece))

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
            found = await self._chunks.open(manifest, manifest.index_of[id], self._arriving_seconds)
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

    def _is_arriving(self, manifest: Manifest) -> bool:
        """A package that was published before is on its way again where the disk lost some of it."""
        awaited = self.catalog.find(manifest.package) is None or manifest.id in self._completing
        return awaited and manifest.id in self.leases.offered()

    async def manifest(self, id: ManifestId) -> Manifest:
        """A manifest that is kept here. Raises `UnknownManifestError`."""
        manifest = await self.catalog.manifest(id)
        if manifest is None:
            raise UnknownManifestError
        return manifest

    async def _missing(self, manifest: Manifest, places: Iterable[int] | None = None, *, read: bool = False) -> Ranges:
        """Indexes that are not here, each chunk named once however often it stands in the stream.

        `read` those that are here, so that damage counts as missing.
        """
        first = manifest.index_of
        ids = manifest.chunk_ids() if places is None else [manifest.chunk_id(index) for index in places]
        here = await (self._store.sound_many(ids) if read else self._store.has_many(ids))
        return from_indexes(first[id] for id in ids if id not in here)


def _check_places(named: Iterable[tuple[Manifest, Ranges]]) -> None:
    """Raises `FrameError`: ranges outside of their manifest, or too many."""
    if sum(count(check(ranges, len(manifest.chunks))) for manifest, ranges in named) > PLACES_MAX:
        raise FrameError(f"one request that names more than {PLACES_MAX} chunks")


def _refused(event: RunRefused) -> list[messages.RefusedRun]:
    reason = _reason(event.error)
    by_manifest: dict[ManifestId, list[int]] = {}
    for manifest, index in event.run:
        by_manifest.setdefault(manifest, []).append(index)
    return [messages.RefusedRun(id, from_indexes(places), reason) for id, places in by_manifest.items()]


def _reason(error: FrameError | ChunkInvalid) -> str:
    if isinstance(error, BaseMissingError):
        return "base_missing"
    return "wrong_bytes" if isinstance(error, ChunkInvalid) else "bad_frame"
