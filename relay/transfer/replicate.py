"""Bring one package from one place to another: ask what is there, offer the manifest, send what is missing, publish last."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace

from relay.encoding.choose_bases import Held
from relay.encoding.codecs import Coding
from relay.encoding.planner import Line, Prefer
from relay.errors import NotFoundError, RefusedError, UnreachableError
from relay.package.identity import PackageRef
from relay.package.manifest import Manifest
from relay.package.ranges import Ranges, indexes
from relay.package.recipe import opaque
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.protocol.connection import LeaseLostError, MissingChunksError
from relay.rebuild.nupkgs import Nupkgs
from relay.rebuild.recipe_store import Recipes
from relay.stores.contract import ChunkReader
from relay.support.persistence import Persistence
from relay.support.progress import Progress
from relay.support.rate_limit import Pacer
from relay.transfer.encoder_pool import Payloads
from relay.transfer.link_history import Lines, Meter, Remembered
from relay.transfer.probe import Explained, Survey, confirm, explain, explained, guess, line_of, survey
from relay.transfer.sender import Sender

PATIENCE = 60.0
"""Seconds that a relay may be away before its replication is given up."""
PERSISTENCE = Persistence(first_pause=0.2, failures=4, patience=PATIENCE)
"""Pauses grow, as what is sent in vain crosses the line all the same."""


@dataclass(frozen=True, slots=True)
class Shipping:
    """What is at hand for sending packages, and how it is to be done. One may serve many replications at a time.

    Attributes:
        payloads: encoders over the source, shared by all relays: what two of them need alike is encoded once. None: own
            ones, for this replication.
        lines: the memory of lines; None: each line is a new one.
        known: manifests of other versions of the package: against one that the relay keeps too, the new one travels as
            a difference, and its chunks build on that one's.
        others: manifests of other packages at hand, whose parts may be found again in this one.
        force: the encoding to use, whatever the plan; a delta without a base goes as zstd.
        pacer: the limit of the line, shared by all that is sent over it.
        prefer: what is wanted of encodings that are about as fast.
        explains: whether the result carries the plan of each run that was sent, with its whole arithmetic.
        recipes: how nupkgs are made again, to be sent along.
        nupkgs: where given, the relay gets what it takes to make the identical nupkg by itself: the bytes that no
            encoder makes, or the whole file where it lacks an encoder.
    """

    payloads: Payloads | None = None
    lines: Lines | None = None
    known: Sequence[Manifest] = ()
    others: Sequence[Manifest] = ()
    force: Coding | None = None
    pacer: Pacer | None = None
    prefer: Prefer = "bytes"
    explains: bool = False
    recipes: Recipes | None = None
    nupkgs: Nupkgs | None = None


@dataclass(frozen=True, slots=True)
class ReplicationResult:
    """What one replication moved."""

    relay: str
    package_bytes: int
    """Bytes of the nupkg: what sending the whole file would have cost."""
    chunks: int
    """Chunks of the package."""
    chunks_sent: int
    wire_bytes: int
    """Bytes that crossed the line in both directions: bodies and heads of HTTP."""
    payload_bytes: int
    """Bytes of frame payloads sent: the content alone."""
    overhead_bytes: int
    """The rest of `wire_bytes`: manifest, signature, headers, questions and answers."""
    seconds: float
    interruptions: int
    """How often the relay was lost and found again."""
    encodings: tuple[messages.EncodedBytes, ...] = ()
    fallbacks: int = 0
    """Runs that were refused as deltas and went plainly."""
    goodput: float = 0.0
    """Bytes per second that the line was found to carry; 0 where nothing was learnt."""
    explained: Explained | None = None
    """Where it was asked for."""
    exact_bytes: int = 0
    """Bytes of the nupkg itself that the relay was given, so that it can make or serve the identical one."""


async def replicate(
    manifest: Manifest,
    signature: bytes,
    source: ChunkReader,
    relay: RelayClient,
    shipping: Shipping | None = None,
    *,
    progress: Progress | None = None,
    patience: float = PATIENCE,
) -> ReplicationResult:
    """Make `relay` hold and list the package. Running it again sends only what is still missing, at last nothing.

    Raises:
        UnreachableError: the relay was not there at the start, or was away for longer than `patience` seconds, or
            comes and goes without taking more.
        ConflictError: it lists other bytes under this id and version.
        RefusedError: it refuses the token, or chunks that were sent.
        ChunkMissing, ChunkInvalid, StoreError: the source lacks, or damaged, or cannot read what it should have.
    """
    shipping = shipping or Shipping()
    async with AsyncExitStack() as stack:
        if shipping.payloads is None:
            shipping = replace(shipping, payloads=_own_payloads(source, stack))
        return await _Replication(manifest, signature, relay, shipping, progress, patience).run()


async def plan(
    manifest: Manifest, source: ChunkReader, relay: RelayClient, shipping: Shipping | None = None
) -> Explained:
    """What `replicate` would do, and why. Nothing is sent but questions. Raises as `replicate`."""
    shipping = shipping or Shipping()
    async with AsyncExitStack() as stack:
        payloads = shipping.payloads or _own_payloads(source, stack)
        remembered = await shipping.lines.recall(relay.url) if shipping.lines else None
        there = await survey(manifest, relay, shipping.known, shipping.others)
        line = line_of(remembered, shipping.pacer.rate if shipping.pacer else None, shipping.prefer)
        missing = there.missing(manifest)
        return await explain(
            manifest,
            missing,
            await payloads.sound(there.held),
            line,
            payloads,
            remembered=remembered,
            force=shipping.force,
        )


def _version_before(package: PackageRef, known: Sequence[Manifest]) -> Manifest | None:
    """The newest of `known` that is older than this; where none is, the newest."""
    older = [one for one in known if one.package.version < package.version]
    return max(older or known, key=lambda one: one.package.version, default=None)


def _own_payloads(source: ChunkReader, stack: AsyncExitStack) -> Payloads:
    payloads = Payloads(source)
    stack.push_async_callback(payloads.close)
    return payloads


class _Replication:
    """One package on its way to one relay, through all interruptions."""

    def __init__(
        self,
        manifest: Manifest,
        signature: bytes,
        relay: RelayClient,
        shipping: Shipping,
        progress: Progress | None,
        patience: float,
    ) -> None:
        self._manifest = manifest
        self._signature = signature
        self._relay = relay
        self._shipping = shipping
        self._progress = progress
        self._patience = patience
        self._reached = False
        """Whether the relay answered anything yet."""
        self._has_guessed = False
        self._basis: tuple[Ranges, Sequence[Held], Line] | None = None
        """What was missing at first, what could be built on, and what was known of the line by then."""
        self._exact_bytes = 0

    async def run(self) -> ReplicationResult:
        started, before = time.monotonic(), self._relay.traffic.total
        lines, pacer = self._shipping.lines, self._shipping.pacer
        remembered = await lines.recall(self._relay.url) if lines else None
        meter = Meter(line_of(remembered, pacer.rate if pacer else None, self._shipping.prefer))
        sender = Sender(
            self._manifest,
            self._payloads,
            self._relay,
            meter,
            force=self._shipping.force,
            pacer=pacer,
            progress=self._progress,
            explains=self._shipping.explains,
        )
        interruptions = await self._persist(sender, meter)
        if lines is not None:
            await lines.remember(self._relay.url, meter)
            await lines.remember_sent(self._relay.url, self._manifest.package.id, self._manifest.id)
        crossed = self._relay.traffic.total - before
        return ReplicationResult(
            relay=self._relay.url,
            package_bytes=self._manifest.nupkg.size,
            chunks=len(self._manifest.chunks),
            chunks_sent=sum(one.chunks for one in sender.sent.encodings),
            wire_bytes=crossed,
            payload_bytes=sender.sent.payload_bytes,
            overhead_bytes=max(0, crossed - sender.sent.payload_bytes - self._exact_bytes),
            seconds=time.monotonic() - started,
            interruptions=interruptions,
            encodings=sender.sent.encodings,
            fallbacks=sender.sent.fallbacks,
            goodput=meter.line.goodput or 0.0,
            explained=self._explained(sender, remembered),
            exact_bytes=self._exact_bytes,
        )

    @property
    def _payloads(self) -> Payloads:
        assert self._shipping.payloads is not None  # noqa: S101 - `replicate` gave some
        return self._shipping.payloads

    def _explained(self, sender: Sender, remembered: Remembered | None) -> Explained | None:
        if self._basis is None or not self._shipping.explains:
            return None
        missing, held, line = self._basis
        return explained(self._manifest, missing, held, line, sender.sent.runs, remembered, self._shipping.force)

    async def _persist(self, sender: Sender, meter: Meter) -> int:
        """Try until it is done; how often the relay was lost and found again."""

        def may_help(error: Exception) -> bool:
            # A relay that was never there is a wrong address, not an interruption: said at once.
            # One whose disk lost what it was given is offered everything again.
            is_lost = isinstance(error, UnreachableError | LeaseLostError | NotFoundError)
            return is_lost and self._reached and not sender.queue.source_failed

        persistence = replace(PERSISTENCE, longest_asked=self._patience, patience=self._patience)
        # What was sent is no measure: a relay without room takes bundle after bundle and keeps nothing.
        async for attempt in persistence.tries(may_help, gained=lambda: -sender.lacking):
            if attempt.num > 1:
                sender.connections.failed()
                await self._relay.wait_until_ready(self._patience)
            with attempt:
                await self._bring(sender, meter)
                await self._give_exact()
        return attempt.num - 1

    async def _bring(self, sender: Sender, meter: Meter) -> None:
        manifest, relay = self._manifest, self._relay
        there, offer = await self._offer_unasked()
        base = there.base
        if offer is None:
            asked = time.monotonic()
            there = await survey(manifest, relay, self._shipping.known, self._shipping.others)
            self._reached = True
            meter.round_trip(time.monotonic() - asked)
            if there.is_whole and await self._is_published():
                sender.report(())
                self._basis = self._basis or ((), there.held, meter.line)
                return
            asked = time.monotonic()
            # Against itself, where the relay keeps it already: nothing of it crosses.
            base = manifest if there.is_offered else there.base
            offer = await self._offer(base)
            meter.round_trip(time.monotonic() - asked)
        missing, held = offer.missing, there.held
        if missing:
            held = await self._payloads.sound(await confirm(relay, offer.lease, there.held, base))
        self._basis = self._basis or (missing, held, meter.line)
        sent: set[int] = set()
        while True:
            await sender.send(offer.lease, missing, held)
            sent.update(indexes(missing))
            try:
                await relay.publish(manifest)
                return
            except MissingChunksError as error:
                if not sent.isdisjoint(indexes(error.missing)):
                    raise RefusedError(f"relay {relay.url} does not keep the chunks that it is sent") from error
                missing = error.missing

    async def _offer_unasked(self) -> tuple[Survey, messages.OfferAnswer | None]:
        """Offer against the version that this relay was sent last, without a question before: a round trip less.

        Where nothing is remembered, the version before this one stands in: most relays hold it. Once: where it turns
        out to be wrong, everything is asked.
        """
        nothing = Survey(is_offered=False, is_whole=False, base=None, held=())
        lines, package = self._shipping.lines, self._manifest.package
        if lines is None or self._reached or self._has_guessed:
            return nothing, None
        self._has_guessed = True
        sent = await lines.recall_sent(self._relay.url, package.id)
        known = self._shipping.known
        base = _version_before(package, known) if sent is None else next((one for one in known if one.id == sent), None)
        if base is None or base.id == self._manifest.id:
            return nothing, None
        try:
            offer = await self._offer(base)
        except NotFoundError:
            return nothing, None
        self._reached = True
        return guess(self._manifest, base, self._shipping.known, self._shipping.others), offer

    async def _offer(self, base: Manifest | None) -> messages.OfferAnswer:
        """With the recipe against the one of `base`. Where the relay keeps another one of `base`, it goes plainly after."""
        recipes = self._shipping.recipes
        packed = b"" if recipes is None else await recipes.pack(self._manifest, base)
        answer = await self._relay.offer(self._manifest, self._signature, base, packed)
        recipe = await recipes.find(self._manifest) if recipes is not None and answer.recipe_unread else None
        if recipe is not None:
            await self._relay.put_recipe(self._manifest, recipe)
        return answer

    async def _give_exact(self) -> None:
        """Whatever the relay lacks to make the identical nupkg, where that was asked for."""
        nupkgs, manifest = self._shipping.nupkgs, self._manifest
        if nupkgs is None:
            return
        recipe = await nupkgs.recipes.find(manifest) or opaque(manifest)
        lacks = await self._relay.put_recipe(manifest, recipe)
        if not lacks.blob_missing and not lacks.encoders_missing:
            return
        sha256, size = manifest.nupkg.sha256, manifest.nupkg.size
        if recipe.verbatim is not None and not lacks.encoders_missing:
            sha256, size = recipe.verbatim.id, recipe.verbatim.size
        async with aclosing(self._paced(nupkgs.blob(sha256, manifest))) as pieces:
            await self._relay.put_blob(sha256, manifest, pieces)
        self._exact_bytes += size

    async def _paced(self, pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async with aclosing(pieces):
            async for piece in pieces:
                if self._shipping.pacer is not None:
                    await self._shipping.pacer.wait(len(piece))
                yield piece

    async def _is_published(self) -> bool:
        package = self._manifest.package
        try:
            pointer = await self._relay.package(package.id, package.version)
        except NotFoundError:
            return False
        return pointer.manifest == self._manifest.id and pointer.signature == self._signature
