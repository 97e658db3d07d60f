"""One answer to a reader: a bundle of chunks that stand in the store, are being encoded for it, or still arrive.

What to send is decided in `relay.encoding.planner`; here it is read, awaited and put into frames. Runs are encoded a few
ahead of the one that is on the line; payloads that are here already, or come in at this moment, are handed on as they are.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import groupby, islice, takewhile
from operator import itemgetter
from typing import Final

from relay.encoding import planner
from relay.encoding.bundle import BundleWriter, Data, Failed, Missing, Span, data_header
from relay.encoding.choose_bases import Held, choose_bases
from relay.encoding.estimates import Rates
from relay.encoding.planner import Choice, Line, Made, RunFacts, Schedule
from relay.errors import ChunkInvalid, ChunkMissing, StoreError
from relay.package.identity import ChunkId, ManifestId
from relay.package.manifest import Manifest
from relay.package.ranges import from_indexes, indexes
from relay.protocol.messages import CpuRates
from relay.server import metrics
from relay.server.arrivals import ArrivingChunks
from relay.stores.contract import PIECE, StoredChunk
from relay.support.together import any_of
from relay.transfer.encoder_pool import PayloadReader, Payloads, PayloadSpec

log = logging.getLogger(__name__)

_AHEAD: Final = max(1, min(4, (os.cpu_count() or 1) - 1))
"""Runs that are encoded while another one is on the line."""
_LOOK_AT: Final = 1024
"""Chunks of what comes next, among which a payload that is here already is looked for."""
_ARRIVED_MIN: Final = 1 << 20
"""Bytes of a package that still arrives, below which nothing is encoded: the rest of its run will come soon."""


@dataclass(frozen=True, slots=True)
class Reader:
    """What a reader says of itself: what it can decode, which chunks it holds, bytes per second (0: it does not know)."""

    encodings: frozenset[str] = frozenset({"raw", "zstd"})
    bases: tuple[Held, ...] = ()
    goodput: float = 0.0

    @property
    def line(self) -> Line:
        return Line(self.goodput or None)

    @property
    def takes_stored(self) -> bool:
        """Whether nothing is encoded for it."""
        return planner.takes_stored(self.line, has_bases=bool(self.bases))


ANYBODY: Final = Reader()


@dataclass(frozen=True, slots=True)
class Ground:
    """Where chunks and payloads come from. `patience`: seconds to wait for a chunk that arrives; `piece`: bytes at most
    that are handed out at a time.
    """

    chunks: ArrivingChunks
    payloads: Payloads
    patience: float
    rates: CpuRates | None = None
    piece: int = PIECE


async def give(
    wanted: Sequence[tuple[Manifest, tuple[int, ...]]], reader: Reader, ground: Ground
) -> AsyncGenerator[bytes, None]:
    """The bundle, piece by piece. Where the store's medium fails, it says so and ends."""
    writer = BundleWriter()
    yield writer.start()
    for manifest, places in wanted:
        giving = _Giving(manifest, places, reader, ground, writer)
        try:
            async with aclosing(giving.run()) as pieces:
                async for piece in pieces:
                    yield piece
        except _CannotGoOnError as error:
            yield writer.frame(Failed(str(error)))
            break
    yield writer.end()


class _CannotGoOnError(Exception):
    """With the problem's code."""


class _NotYetError(Exception):
    """A chunk has not arrived in time."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A run that is on its way through an encoder, or comes from elsewhere."""

    spec: PayloadSpec
    indexes: tuple[int, ...]
    bases: tuple[Span, ...]
    payload: PayloadReader
    is_kept: bool = False


class _Giving:
    """The chunks of one manifest for one reader."""

    def __init__(
        self, manifest: Manifest, places: Sequence[int], reader: Reader, ground: Ground, writer: BundleWriter
    ) -> None:
        self._manifest = manifest
        self._left = dict.fromkeys(places)
        self._reader = reader
        cpu = ground.rates
        self._rates = (
            Rates.measured(cpu.zstd_encode, cpu.zstd_encode_9, cpu.zstd_encode_19, cpu.hdiff_encode) if cpu else Rates()
        )
        self._schedule = Schedule(cpu.cores if cpu else 1)
        self._whole, self._begun = manifest.size_of(places), 0
        self._ground = ground
        self._writer = writer
        self._absent: list[int] = []
        # Asked before looking: while we look, the last chunks may land and the package be published.
        self._arrives = ground.chunks.is_arriving(manifest)
        self._bases = _Bases((), ())
        self._as_stored: set[int] = set()
        """Of runs that could not be encoded: what the store says of each of their chunks shows then."""
        self._wait_until: float | None = None

    async def run(self) -> AsyncGenerator[bytes, None]:
        needs_no_plan = self._reader.takes_stored and not self._arrives
        pieces = self._all_stored() if needs_no_plan else self._planned()
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece
        except _NotYetError:
            # The reader asks again, and so learns of what came in between.
            yield self._writer.frame(Missing((Span.of(self._manifest.id, list(self._left)),), "arriving"))
        if self._absent:
            yield self._writer.frame(Missing((Span.of(self._manifest.id, self._absent),), "absent"))

    async def _all_stored(self) -> AsyncGenerator[bytes, None]:
        for index in self._left:
            async for piece in self._stored(index, await self._open(index)):
                yield piece

    async def _planned(self) -> AsyncGenerator[bytes, None]:
        self._bases = await _Bases.of(self._reader.bases, self._ground.chunks, only_named=self._reader.takes_stored)
        ahead: deque[_Encoded] = deque()
        try:
            while self._left or ahead:
                plain = await self._fill(ahead)
                if ahead:
                    async for piece in self._encoded(ahead.popleft()):
                        yield piece
                for index in plain:
                    stored = await self._open(index)
                    if stored is None and self._arrives:
                        await self._wait_for(index)
                        # Look again at what there is: a chunk out of a run that comes in now is not sent by itself.
                        break
                    async for piece in self._stored(index, stored):
                        yield piece
                    self._take((index,))
        finally:
            for run in ahead:
                run.payload.close()

    async def _fill(self, ahead: deque[_Encoded]) -> tuple[int, ...]:
        """Begin the next runs, a few ahead; where none can be, the chunks to send in their stored form."""
        while self._left and len(ahead) <= _AHEAD:
            found = await self._next()
            if not isinstance(found, _Encoded):
                return () if ahead else found
            ahead.append(found)
            self._take(found.indexes)
        return ()

    def _take(self, indexes: Iterable[int]) -> None:
        self._wait_until = None
        for index in indexes:
            self._left.pop(index, None)

    # --- what comes next

    async def _next(self) -> _Encoded | tuple[int, ...]:
        """The next run: with its payload, or (in their stored form) as indexes. One at least."""
        kept = await self._kept()
        if kept is not None:
            return kept
        first = next(iter(self._left))
        if self._reader.takes_stored or first in self._as_stored:
            return (first,)
        line = self._reader.line
        most = planner.run_bytes(line, self._whole, self._begun, has_bases=bool(self._bases.held), to_reader=True)
        run = await self._here(most)
        size = self._manifest.size_of(run)
        if self._arrives and (kept := await self._kept()) is not None:
            # It began to come in while we looked at what had landed.
            return kept
        if not run or (self._arrives and size < _ARRIVED_MIN):
            return run or (first,)
        bases = await self._choose_bases(run, size)
        plan = self._plan(RunFacts(size, self._bases.size_of(bases), stored_size=self._stored_size(size)))
        chosen = plan.chosen
        if chosen.source == "stored":
            return run
        spec = PayloadSpec(
            tuple(self._manifest.chunk_id(index) for index in run),
            self._bases.ids_of(bases) if chosen.coding.needs_bases else (),
            chosen.coding,
            size,
            self._bases.size_of(bases) if chosen.coding.needs_bases else 0,
        )
        return self._encode(plan, spec, run, bases if chosen.coding.needs_bases else ())

    async def _kept(self) -> _Encoded | None:
        """A payload of some of what is left that is here, being made or on its way here, if it is no worse than others."""
        ids = self._manifest.chunk_id
        near = [index for index in islice(self._left, _LOOK_AT) if index not in self._as_stored]
        places = {ids(index): index for index in reversed(near)}
        payloads = self._ground.payloads
        spec = payloads.find(places.keys(), self._bases.sizes.keys(), self._reader.encodings)
        if spec is None:
            return None
        run = tuple(places[id] for id in spec.chunks)
        bases = await self._choose_bases(run, spec.size)
        made = payloads.made(spec)
        facts = RunFacts(
            spec.size,
            max(spec.base_size, self._bases.size_of(bases)),
            (Made(spec.coding, None if made is None else made.payload_bytes),),
            self._stored_size(spec.size),
        )
        plan = self._plan(facts)
        if plan.chosen.source != "kept":
            return None
        return self._encode(plan, spec, run, self._bases.spans_of(spec.bases))

    def _plan(self, run: RunFacts) -> Choice:
        line, payloads = self._reader.line, self._ground.payloads
        codings = () if payloads.is_busy() else planner.codings_to_answer(run, line, self._reader.encodings)
        return planner.plan_run(
            run,
            line,
            self._schedule.moment(line, _AHEAD + 1),
            ratios=planner.ratios_of_stored(run),
            rates=self._rates,
            # Encoders wait for their turn: nothing new is begun for readers, who can do with what is stored. And where
            # connections hold much, an encoder that holds less will do.
            codings=tuple(each for each in codings if payloads.has_room_for(each, run.size, run.base_size)),
        )

    def _encode(self, plan: Choice, spec: PayloadSpec, run: tuple[int, ...], bases: tuple[Span, ...]) -> _Encoded:
        self._begun += spec.size
        self._schedule.add(plan, self._schedule.moment(self._reader.line, _AHEAD + 1))
        return _Encoded(spec, run, bases, self._ground.payloads.open(spec), plan.chosen.source == "kept")

    async def _here(self, most: int) -> tuple[int, ...]:
        """Of what comes next, up to `most` bytes, as far as it is here without a gap."""
        next_ones = list(takewhile(lambda index: index not in self._as_stored, islice(self._left, _LOOK_AT)))
        sizes = (self._manifest.chunks[index].size for index in next_ones)
        run = next_ones[: planner.run_length(sizes, most)]
        here = await self._ground.chunks.has_many(self._manifest.chunk_id(index) for index in run)
        gap = next((at for at, index in enumerate(run) if self._manifest.chunk_id(index) not in here), len(run))
        return tuple(run[:gap])

    async def _choose_bases(self, run: Sequence[int], size: int) -> tuple[Span, ...]:
        if not self._bases.held:
            return ()
        most = planner.base_bytes(size, self._reader.line)
        return await asyncio.to_thread(
            lambda left: choose_bases(self._manifest, run, self._bases.held, most=most, missing=left),
            list(self._left),
        )

    def _stored_size(self, size: int) -> int:
        """About what the stored form of so much tree stream takes: as in the nupkg, which is deflated."""
        whole = self._manifest.stream_size
        return round(size * min(1.0, self._manifest.nupkg.size / whole)) if whole else size

    # --- on the line

    async def _encoded(self, run: _Encoded) -> AsyncGenerator[bytes, None]:
        writer, begun = self._writer, False
        spans, encoding = (Span.of(self._manifest.id, run.indexes),), run.spec.coding.encoding
        run.payload.most = self._ground.piece
        try:
            async for stretch, more in run.payload.stretches(1, self._ground.patience):
                header = data_header(spans, encoding, stretch, bases=run.bases, more=more, goes_on=begun)
                if not begun:
                    metrics.PAYLOADS.labels("kept" if run.is_kept else "encoded").inc()
                begun = True
                metrics.sent(encoding, len(stretch), 0 if more else run.spec.size)
                stretch = writer.frame(header) + stretch  # noqa: PLW2901 - one of the two is held while it is written
                yield stretch
        except (ChunkMissing, ChunkInvalid, StoreError, TimeoutError) as error:
            log.warning("payload: %s", str(error) or "it stands still")
            if begun:
                # What follows can be had, but not in this bundle: the reader asks again.
                raise _CannotGoOnError("busy") from error
        finally:
            run.payload.close()
        if not begun:
            metrics.FALLBACKS.labels("sent").inc()
            self._as_stored.update(run.indexes)
            self._left = dict.fromkeys([*run.indexes, *self._left])

    async def _wait_for(self, index: int) -> None:
        """Until a chunk has landed, or a payload begins to come in that perhaps holds it.

        Raises:
            _NotYetError: neither came in time.
        """
        clock = asyncio.get_running_loop().time
        flight = self._ground.chunks.flight(self._manifest.chunk_id(index))
        if await self._open(index) is not None:
            return
        if self._wait_until is None:
            self._wait_until = clock() + self._ground.patience
        if not await any_of(self._wait_until - clock(), flight.wait(), self._ground.payloads.changed()):
            raise _NotYetError

    async def _open(self, index: int) -> StoredChunk | None:
        try:
            return await self._ground.chunks.here(self._manifest.chunk_id(index))
        except StoreError as error:
            log.warning("store: %s", error)
            raise _CannotGoOnError("store_failed") from error

    async def _stored(self, index: int, stored: StoredChunk | None) -> AsyncGenerator[bytes, None]:
        if stored is None:
            self._absent.append(index)
            return
        run = (Span.of(self._manifest.id, (index,)),)
        head = self._writer.frame(Data(run, (), "zstd", stored.length, stored.xxh3))
        async for piece in stored.pieces(self._ground.piece):
            # One piece is held here while the reader takes it, not two.
            piece, head = (head + piece if head else piece), b""  # noqa: PLW2901
            yield piece
        metrics.sent("stored", stored.length, stored.size)


class _Bases:
    """The chunks that a reader holds: `sizes` of all that it named, `held` those of them that are here, too."""

    def __init__(self, named: Sequence[Held], held: Sequence[Held]) -> None:
        self.held = held
        self.sizes: dict[ChunkId, int] = {}
        self._manifests = {one.manifest.id: one.manifest for one in named}
        self._places: dict[ChunkId, tuple[ManifestId, int]] = {}
        for one in named:
            for index in indexes(one.ranges):
                id = one.manifest.chunk_id(index)
                self.sizes.setdefault(id, one.manifest.chunks[index].size)
                self._places.setdefault(id, (one.manifest.id, index))

    @classmethod
    async def of(cls, named: Sequence[Held], chunks: ArrivingChunks, *, only_named: bool) -> _Bases:
        """`only_named`: nothing will be encoded, so that what is here need not be known."""
        held = []
        for one in () if only_named else named:
            places = list(indexes(one.ranges))
            here = await chunks.has_many(one.manifest.chunk_id(index) for index in places)
            kept = [index for index in places if one.manifest.chunk_id(index) in here]
            if kept:
                held.append(Held(one.manifest, from_indexes(kept)))
        return cls(named, held)

    def ids_of(self, spans: Iterable[Span]) -> tuple[ChunkId, ...]:
        return tuple(
            self._manifests[span.manifest_id].chunk_id(index) for span in spans for index in indexes(span.ranges)
        )

    def size_of(self, spans: Iterable[Span]) -> int:
        return sum(self.sizes[id] for id in self.ids_of(spans))

    def spans_of(self, ids: Iterable[ChunkId]) -> tuple[Span, ...]:
        by_manifest = groupby((self._places[id] for id in ids), key=itemgetter(0))
        return tuple(Span.of(manifest, [index for _, index in places]) for manifest, places in by_manifest)
