"""The runs of one package for one relay, in tree order: cut, tried, planned, and encoded ahead of the line on all cores.

What is planned next goes by what is known of the line by then; what is planned already stays as it is. `--explain` takes
plans out of the same queue, and has nothing sent.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Final

from relay.encoding import planner
from relay.encoding.bundle import Span
from relay.encoding.choose_bases import Held, choose_bases
from relay.encoding.codecs import LEVEL_MAX, PLAIN, Coding, can_encode
from relay.encoding.estimates import Rates, Ratios, codings_for
from relay.encoding.planner import RUN_BYTES_MIN, Choice, Line, Made, RunFacts, Schedule
from relay.errors import WaystationError
from relay.package.identity import ManifestId
from relay.package.manifest import Manifest
from relay.package.ranges import Ranges, indexes
from relay.transfer.encoder_pool import PayloadReader, Payloads, PayloadSpec
from relay.transfer.link_history import IN_FLIGHT, Connections, Meter

CORES: Final = os.cpu_count() or 1
_HARDEST: Final = Coding("zstd", LEVEL_MAX)
_CUT_AT_ONCE: Final = 4096
"""Chunks that are looked at for one run: more than the longest has."""


@dataclass(frozen=True, slots=True)
class CutRun:
    """Chunks that are to travel as one, and what they may build on."""

    indexes: tuple[int, ...]
    size: int
    bases: tuple[Span, ...] = ()
    base_size: int = 0


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run, how it goes, and why."""

    run: CutRun
    spec: PayloadSpec
    choice: Choice

    @property
    def coding(self) -> Coding:
        return self.choice.coding

    @property
    def bases(self) -> tuple[Span, ...]:
        return self.run.bases if self.coding.needs_bases else ()


@dataclass(frozen=True, slots=True)
class RunAhead:
    """A planned run whose payload is being made, or made already, and waits for the line."""

    planned: PlannedRun
    payload: PayloadReader

    @property
    def size(self) -> int:
        """Bytes of tree stream."""
        return self.planned.run.size

    @property
    def underway(self) -> int:
        """Bytes of the tree stream for which what was taken for the line stands."""
        whole = max(self.payload.size, self.planned.choice.chosen.payload_bytes)
        return self.size * self.payload.taken // max(whole, 1)


class BaseFinder:
    """Finds what the runs of one package may build on at one relay."""

    def __init__(self, manifest: Manifest, held: Sequence[Held], missing: Collection[int]) -> None:
        self.manifest = manifest
        self.held = tuple(held)
        self._missing = missing
        self._manifests = {one.manifest.id: one.manifest for one in held}

    def run(self, indexes: Sequence[int], line: Line | None = None) -> CutRun:
        """These chunks with bases, as many as suit the line; without a line, and where nothing is held, with none."""
        size = self.manifest.size_of(indexes)
        most = planner.base_bytes(size, line) if self.held and line is not None else 0
        spans = choose_bases(self.manifest, indexes, self.held, most=most, missing=self._missing)
        base_size = sum(self._manifests[m].chunks[index].size for m, index in _places(spans))
        return CutRun(tuple(indexes), size, spans, base_size)

    def spec(self, run: CutRun, coding: Coding) -> PayloadSpec:
        """What `Payloads` makes of it."""
        bases = run.bases if coding.needs_bases else ()
        return PayloadSpec(
            chunks=tuple(self.manifest.chunk_id(index) for index in run.indexes),
            bases=tuple(self._manifests[m].chunk_id(index) for m, index in _places(bases)),
            coding=coding,
            size=run.size,
            base_size=run.base_size if bases else 0,
        )


class RunQueue:
    """Plans the runs of one package for one relay, and has some of them encoded ahead."""

    def __init__(
        self,
        manifest: Manifest,
        payloads: Payloads,
        meter: Meter,
        connections: Connections,
        *,
        force: Coding | None = None,
        explains: bool = False,
    ) -> None:
        """`explains`: a run that has to go in `force` is weighed up all the same."""
        self.alive: list[RunAhead] = []
        """Begun, and not whole at the relay yet as far as the sender says."""
        self.source_failed = False
        """Whether it was the source that could not be read."""
        self._payloads = payloads
        self._meter = meter
        self._connections = connections
        self._force = force
        self._explains = explains
        self._finder = BaseFinder(manifest, (), ())
        self._schedule = Schedule(CORES)
        self._ratios = Ratios()
        self._rates: Rates | None = None
        self._left: deque[int] = deque()
        self._plainly: deque[list[int]] = deque()
        """Runs that were refused as deltas."""
        self._whole = self._begun = 0
        self._ready: deque[RunAhead] = deque()
        self._planning = asyncio.Lock()
        """Held while one run is planned."""
        self._ahead: asyncio.Task[None] | None = None
        """What plans those behind the next one."""

    def begin(self, missing: Ranges, held: Sequence[Held]) -> None:
        """What is to be sent from here on, building on `held`."""
        lacking = list(indexes(missing))
        self._finder = BaseFinder(self._finder.manifest, held, lacking)
        self._schedule = Schedule(CORES)
        self._left, self._whole, self._begun = deque(lacking), self._finder.manifest.size_of(lacking), 0
        self._plainly.clear()

    def close(self) -> None:
        """Nothing of it is wanted any more."""
        if self._ahead is not None and not self._ahead.cancel() and not self._ahead.cancelled():
            # Taken note of, in case that nothing asked for a run since.
            self._ahead.exception()
        self._ahead = None
        for ahead in self.alive:
            ahead.payload.close()
        self.alive.clear()
        self._ready.clear()

    @property
    def has_more(self) -> bool:
        return bool(self._left or self._plainly or self._ready) or self._planning.locked()

    # --- for a sender

    async def next(self) -> RunAhead | None:
        """The next run, while those after it are tried, planned and encoded already: it waits for none of them. None when
        all are on their way.
        """
        if not self._ready:
            await self._plan_one(1)
        if self._ahead is not None and self._ahead.done():
            self._ahead.result()
        found = self._ready.popleft() if self._ready else None
        if (self._left or self._plainly) and (self._ahead is None or self._ahead.done()):
            self._ahead = asyncio.create_task(self._plan_ahead())
        return found

    async def _plan_ahead(self) -> None:
        while await self._plan_one(self._depth):
            pass

    async def _plan_one(self, most: int) -> bool:
        """One run more where fewer than `most` are ready; False where there are enough, or no more."""
        async with self._planning:
            if len(self._ready) >= most or (planned := await self.plan()) is None:
                return False
            self._ready.append(self._encode(planned))
            return True

    def put_back(self, ahead: RunAhead) -> None:
        """It comes first again, as nothing of it was taken for the line."""
        self._ready.appendleft(ahead)

    def again(self, ahead: RunAhead) -> None:
        """The relay took nothing of it: it comes first again, from its beginning."""
        self.finished(ahead)
        self._ready.appendleft(self._encode(ahead.planned))

    def plainly(self, refused: list[int]) -> None:
        """These chunks were refused as a delta."""
        self._plainly.append(refused)

    def finished(self, ahead: RunAhead) -> None:
        """All of it is on the line, or it goes anew."""
        ahead.payload.close()
        if ahead in self.alive:
            self.alive.remove(ahead)

    async def plan_anew(self) -> None:
        """The line is known now: what waits was planned for a thin one."""
        async with self._planning:
            if self._meter.line.kind.spares == "bytes":
                return
            while self._ready and not self._ready[-1].payload.has_failed:
                ahead = self._ready.pop()
                self.finished(ahead)
                self._left.extendleft(reversed(ahead.planned.run.indexes))
                self._begun -= ahead.size
            self._schedule = Schedule(CORES)

    @property
    def _depth(self) -> int:
        """Runs that may be ready or in the making, beside those on the line."""
        return CORES + max(2, self._connections.number) if self._meter.is_sure else 2

    def _encode(self, planned: PlannedRun) -> RunAhead:
        ahead = RunAhead(planned, self._payloads.open(planned.spec))
        self.alive.append(ahead)
        return ahead

    # --- the plan

    async def plan(self) -> PlannedRun | None:
        """The next run in tree order; None after the last."""
        if self._plainly:
            return await self._planned(self._finder.run(self._plainly.popleft()), PLAIN)
        if not self._left:
            return None
        run = self._finder.run(self._cut(), self._meter.line)
        return await self._planned(run, forced(self._force, has_bases=bool(run.bases))[0])

    def _cut(self) -> list[int]:
        line, has_bases = self._meter.line, bool(self._finder.held)
        most = planner.run_bytes(
            line if self._meter.is_sure else replace(line, goodput=None),
            self._whole,
            self._begun,
            has_bases=has_bases,
            connections=self._connections.number,
        )
        if not has_bases:
            # What hardly shrinks makes long payloads: a run is not to be more than the bundles in flight are.
            most = min(most, max(RUN_BYTES_MIN, int(IN_FLIGHT / self._ratios.of(_HARDEST))))
        sizes = (self._finder.manifest.chunks[index].size for index in islice(self._left, _CUT_AT_ONCE))
        run = [self._left.popleft() for _ in range(planner.run_length(sizes, most))]
        self._begun += self._finder.manifest.size_of(run)
        return run

    async def _planned(self, run: CutRun, force: Coding | None) -> PlannedRun:
        line, has_bases = self._meter.line, bool(run.bases)
        if force is None or self._explains:
            await self._try(run)
        codings = codings_for(has_bases=has_bases and (line.kind.delta_run > 0 or line.prefer == "bytes"))
        if force is not None and force not in codings:
            codings = (*codings, force)
        moment = self._schedule.moment(line, self._depth + self._connections.number - 1)
        choice = planner.plan_run(
            RunFacts(run.size, run.base_size, self._made(run, codings)),
            line,
            moment,
            ratios=self._ratios,
            rates=self._rates or Rates(),
            codings=codings,
            force=force,
        )
        self._schedule.add(choice, moment)
        return PlannedRun(run, self._finder.spec(run, choice.coding), choice)

    def _made(self, run: CutRun, codings: Sequence[Coding]) -> tuple[Made, ...]:
        found = []
        for coding in codings:
            spec = self._finder.spec(run, coding)
            known = self._payloads.made(spec)
            is_kept = self._payloads.find(spec.chunks, spec.bases, (coding.encoding,)) == spec
            if known or is_kept:
                found.append(Made(coding, known.payload_bytes if known else None, is_kept))
        return tuple(found)

    async def _try(self, run: CutRun) -> None:
        """Learn how the content does, and by the first run how fast this machine is.

        Where an encoder may be what is waited for, each run is tried: level 3 takes a tenth of the time of what it is weighed
        against.
        """
        line, has_bases = self._meter.line, bool(run.bases)
        tries_each = line.kind.tries_deltas if has_bases else line.kind.tries_plain
        for coding in planner.trials(line, has_bases=has_bases):
            if coding in self._ratios.seen and not tries_each:
                continue
            spec = self._finder.spec(run, coding)
            try:
                made = self._payloads.made(spec) or await self._payloads.make(spec)
            except WaystationError:
                self.source_failed = True
                raise
            self._ratios = self._ratios.with_seen(coding, made.payload_bytes / run.size)
            if coding == PLAIN and self._rates is None:
                self._rates = rates_of(run.size, made.seconds)


def forced(force: Coding | None, *, has_bases: bool) -> tuple[Coding | None, str]:
    """The coding that was asked for, or what stands in for a delta without a base; and what to say of it."""
    if force is None:
        return None, ""
    if force.needs_bases and not has_bases:
        return PLAIN, f"{force} was asked for, but there is nothing to build on: {PLAIN} in its place"
    if not can_encode(force.encoding):
        return PLAIN, f"{force} was asked for, but HDiffPatch is of no use here: {PLAIN} in its place"
    return force, f"{force} was asked for"


def rates_of(size: int, seconds: float) -> Rates:
    """What this machine does, by what it did just now; a disk that was slow is no measure of an encoder."""
    return Rates.measured(min(1e9, max(60e6, size / seconds))) if seconds and size >= RUN_BYTES_MIN else Rates()


def _places(spans: Iterable[Span]) -> Iterator[tuple[ManifestId, int]]:
    return ((span.manifest_id, index) for span in spans for index in indexes(span.ranges))
