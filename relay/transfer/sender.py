"""From chunks to bundles on the line: runs are planned, encoded ahead on all cores, and sent as they are made.

One connection carries one bundle after another, each some runs in tree order. What is planned next goes by what the line
did up to then; what is planned already stays as it is.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from relay.encoding import bundle, planner
from relay.encoding.bundle import BundleWriter, Span
from relay.encoding.choose_bases import Held
from relay.encoding.codecs import LEVEL_MAX, PLAIN, Coding
from relay.encoding.planner import BASES_PAY, FAST, PLENTIFUL, Candidate, Line, Rates, Ratios
from relay.errors import RefusedError, UnreachableError, WaystationError, first_of
from relay.package.manifest import Manifest
from relay.package.ranges import Ranges, count, indexes
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.support.rate_limit import PIECE, Pacer
from relay.transfer.encoder_pool import Payloads
from relay.transfer.link_history import IN_FLIGHT, Connections, Meter
from relay.transfer.probe import CORES, PREFIX, Run, Runs, forced, probe, probes

RUN_BYTES = 16 << 20
"""Tree stream in one run, at most. zstd's best level gains 1 % by longer ones, and holds several times as much."""
DELTA_RUN_BYTES = 32 << 20
"""The same of one that builds on bases, on a thin line."""
RUN_BYTES_MIN = 1 << 20
"""The shortest runs that are planned: the first ones of a line that is not known, and of one that must not wait."""
BUNDLE_SECONDS = 10.0
"""Time on the line of one bundle, as far as the line is known: its answer says how the line is."""
BUNDLE_PAYLOAD_MIN = 1 << 20
BUNDLE_PAYLOAD = IN_FLIGHT
"""Payload bytes of all bundles in flight together, about. A bundle that was answered is durable at the relay: those in
flight are all that can cross twice, whoever is killed."""
_SLOW: Final = 600_000.0
"""Bytes per second below which even the slowest encoder on one core is faster than the line."""
_HARDEST: Final = Coding("zstd", LEVEL_MAX)
_WRITE: Final = 256 << 10
_STRETCH: Final = 1 << 20
"""Bytes of payload under one header, at most."""
_STRETCH_MIN: Final = 128 << 10
"""The same, at least, but for the last one."""
_READY_SECONDS: Final = 2.0
"""How long a bundle waits for its next run; a relay takes a sender that says nothing for one that is gone."""
_BUSY_SECONDS: Final = 5.0
"""The longest pause of one connection where a relay bears fewer of them."""

Progress = Callable[[int, int], None]
"""Called with (bytes of the tree stream now at the relay, bytes of the whole)."""


def run_bytes(line: Line, whole: int, begun: int = 0, *, has_bases: bool = False, connections: int = 1) -> int:
    """How long the next run should be, of `whole` bytes to send in all, `begun` of which were planned before.

    A line that nothing waits for gets the longest. One that an encoder may keep waiting gets short ones first, and
    longer ones as what is ahead grows. A fast one gets as many as keep all its connections busy. Deltas lose much by
    being short (measured: a tenth in runs of 8 MiB), so they are as long as leaves room for as much of bases.
    """
    if line.rate >= PLENTIFUL:
        return min(RUN_BYTES, max(RUN_BYTES_MIN, min(4 << 20, whole // (2 * max(connections, 2)))))
    if line.rate >= FAST and not has_bases:
        # A short one first, that nothing waits for; short ones cost 3 %, which is felt here.
        return min(RUN_BYTES // 2, max(2 * RUN_BYTES_MIN, begun))
    if has_bases:
        return DELTA_RUN_BYTES if line.is_thin else DELTA_RUN_BYTES // 2
    if line.goodput is None:
        return min(RUN_BYTES, max(RUN_BYTES_MIN, 2 * begun))
    if line.rate < _SLOW:
        return RUN_BYTES
    return min(RUN_BYTES, max(RUN_BYTES_MIN, begun))


@dataclass(slots=True)
class Sent:
    """What crossed the line so far."""

    chunks: int = 0
    payload_bytes: int = 0
    fallbacks: int = 0
    by_encoding: dict[str, messages.EncodedBytes] = field(default_factory=dict)

    def add(self, encoding: str, chunks: int, size: int, payload: int) -> None:
        self.chunks += chunks
        self.payload_bytes += payload
        known = self.by_encoding.get(encoding, messages.EncodedBytes(encoding, 0, 0, 0))
        self.by_encoding[encoding] = messages.EncodedBytes(
            encoding, known.chunks + chunks, known.stream_bytes + size, known.payload_bytes + payload
        )


class Ahead:
    """A run whose payload is being made, or made already, and waits for the line."""

    def __init__(self, run: Run, coding: Coding, pieces: AsyncIterator[bytes], expected: int, ends_at: float) -> None:
        self.run = run
        self.coding = coding
        self.expected = expected
        """Bytes of the payload; reckoned, until it is whole."""
        self.ends_at = ends_at
        """When its encoder is expected to end."""
        self.sent = 0
        self.is_whole = False
        self._pieces: deque[bytes] = deque()
        self._size = self._waiting = 0
        self._error: BaseException | None = None
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._pump(pieces))

    @property
    def left(self) -> int:
        """Bytes that are still to be sent."""
        return max(0, self.expected - self.sent)

    async def ready(self) -> None:
        """Return when there is something to send, or to raise."""
        while not self._has_news:
            self._news.clear()
            await self._news.wait()

    async def made(self) -> None:
        """Return when all of it is there, or when there is something to raise."""
        while not (self.is_whole or self._error is not None):
            self._news.clear()
            await self._news.wait()

    async def stretches(self) -> AsyncIterator[tuple[bytes, bool]]:
        """The payload in stretches, each with whether more follows. Raises what the encoder or its store raised."""
        more = True
        while more:
            await self.ready()
            if self._error is not None:
                raise self._error
            stretch = b"".join(self._take())
            more = not (self.is_whole and not self._pieces)
            self.sent += len(stretch)
            yield stretch, more

    async def close(self) -> None:
        """Nobody wants it any more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._pieces.clear()

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    @property
    def _has_news(self) -> bool:
        # One piece stays behind until it is known whether another follows it; and a few bytes are not worth a header.
        return self.is_whole or self._error is not None or (len(self._pieces) > 1 and self._waiting >= _STRETCH_MIN)

    def _take(self) -> Iterator[bytes]:
        size = 0
        while len(self._pieces) > (0 if self.is_whole else 1) and (not size or size + len(self._pieces[0]) <= _STRETCH):
            size += len(self._pieces[0])
            self._waiting -= len(self._pieces[0])
            yield self._pieces.popleft()

    async def _pump(self, pieces: AsyncIterator[bytes]) -> None:
        try:
            async for piece in pieces:
                self._pieces.append(piece)
                self._waiting += len(piece)
                self._size += len(piece)
                self.expected = max(self.expected, self._size)
                self._news.set()
            self.is_whole, self.expected = True, self._size
        except WaystationError as error:
            self._error = error
        finally:
            self._news.set()


@dataclass(slots=True)
class _Flying:
    """One bundle, and what it carries."""

    limit: int
    runs: list[Ahead] = field(default_factory=list)
    payload: int = 0
    waited: float = 0.0


class Sender:
    """Sends chunks of one package to one relay."""

    def __init__(
        self,
        manifest: Manifest,
        payloads: Payloads,
        relay: RelayClient,
        meter: Meter,
        *,
        force: Coding | None = None,
        pacer: Pacer | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.sent = Sent()
        self.lacking = len(manifest.chunks)
        """Chunks that the relay lacked when it was asked last."""
        self.source_failed = False
        self.connections = Connections(meter.line)
        self._manifest = manifest
        self._payloads = payloads
        self._relay = relay
        self._meter = meter
        self._force = force
        self._pacer = pacer
        self._progress = progress
        self._there = 0
        self._told = 0
        self._ratios = Ratios()
        self._rates = Rates()
        self._probed: set[Coding] = set()
        self._runs = Runs(manifest, (), ())
        self._left: deque[int] = deque()
        self._again: deque[list[int]] = deque()
        """Runs that were refused as deltas: they go plainly."""
        self._whole = self._begun = 0
        self._queue: deque[Ahead] = deque()
        self._alive: list[Ahead] = []
        self._planning = asyncio.Lock()
        self._open = 0

    # --- what is told

    def report(self, missing: Ranges) -> None:
        """Tell how much is at the relay, given what it misses."""
        self.lacking = count(missing)
        self._there = self._manifest.stream_size - self._runs.size(tuple(indexes(missing)))
        self._told = 0
        self._tell(0)

    def _tell(self, more: int) -> None:
        """`more` bytes of runs that are on the line stand for themselves; what was told is never taken back."""
        whole = self._manifest.stream_size
        self._told = max(self._told, min(self._there + more, whole))
        if self._progress:
            self._progress(self._told, whole)

    # --- sending

    async def send(self, lease: str, missing: Ranges, held: Sequence[Held] = ()) -> None:
        """Everything in `missing`, in tree order, building on `held`; or the first error."""
        lacking = list(indexes(missing))
        self._runs = Runs(self._manifest, held, lacking)
        self.report(missing)
        self._left, self._whole, self._begun = deque(lacking), self._runs.size(lacking), 0
        self._again.clear()
        self._open = 0
        try:
            async with asyncio.TaskGroup() as group:
                self._open_connections(group, lease, 0)
        except BaseExceptionGroup as errors:
            raise first_of(errors) from None
        finally:
            for ahead in self._alive:
                await ahead.close()
            self._alive.clear()
            self._queue.clear()

    def _open_connections(self, group: asyncio.TaskGroup, lease: str, there: int) -> None:
        for number in range(there, self.connections.number):
            if self._left or self._again or self._queue:
                group.create_task(self._connection(group, lease, number))

    async def _connection(self, group: asyncio.TaskGroup, lease: str, number: int) -> None:
        """One bundle after another. `number` counts the connections: those beyond what the line bears end."""
        self._open += 1
        is_first = True
        while number < self.connections.number and (ahead := await self._next()) is not None:
            is_known = self._meter.is_sure
            # The first bundle measures the line, and not the encoder that is slower than most.
            await (ahead.ready() if is_known else ahead.made())
            flying = _Flying(self._bundle_bytes())
            try:
                answer = await self._carry(lease, ahead, flying, is_first=is_first)
            except UnreachableError as error:
                if error.retry_after is None or self._open == 1 or self.source_failed:
                    raise
                # Too many at a time for this relay; the others go on.
                self._take_back(flying)
                self.connections.failed()
                await asyncio.sleep(0 if number else min(error.retry_after, _BUSY_SECONDS))
                continue
            is_first = False
            self._check_taken(answer, flying)
            self._learn(flying)
            if not is_known:
                await self._plan_anew()
            if self._meter.is_open:
                # How fast the line is, the next one will say: this one had to find its pace.
                continue
            before = self.connections.number
            self.connections.after(self._meter.line, flying.payload)
            self._open_connections(group, lease, before)
        self._open -= 1

    async def _carry(self, lease: str, ahead: Ahead, flying: _Flying, *, is_first: bool) -> messages.BundleAnswer:
        flight = self._meter.begin(is_first=is_first)
        try:
            answer = await self._relay.put_bundle(lease, self._bundle(ahead, flying))
        except BaseException:
            self._meter.drop(flight)
            raise
        self._meter.end(flight, flying.payload, flying.waited)
        return answer

    def _take_back(self, flying: _Flying) -> None:
        """The relay took nothing of this bundle: its runs go with another one, from their beginning."""
        for ahead in reversed(flying.runs):
            if ahead in self._alive:
                self._alive.remove(ahead)
            else:
                self._there -= ahead.run.size
            self._queue.appendleft(self._make(ahead.run, ahead.coding, None))

    async def _bundle(self, ahead: Ahead | None, flying: _Flying) -> AsyncIterator[bytes]:
        writer = BundleWriter()
        start = writer.start()
        while ahead is not None:
            flying.runs.append(ahead)
            head = start
            asked = time.monotonic()
            async for stretch, more in self._stretches(ahead):
                flying.waited += time.monotonic() - asked
                header = self._header(ahead, stretch, more=more, is_first=ahead.sent == len(stretch))
                async for piece in self._paced(head + writer.frame(header), stretch, flying):
                    yield piece
                flying.payload += len(stretch)
                head = b""
                self._tell(self._underway())
                asked = time.monotonic()
            self._finished(ahead)
            start = b""
            asked = time.monotonic()
            ahead = await self._next_soon() if flying.payload < flying.limit else None
            flying.waited += time.monotonic() - asked
        yield writer.end()

    def _header(self, ahead: Ahead, stretch: bytes, *, more: bool, is_first: bool) -> bundle.Data | bundle.More:
        if not is_first:
            return bundle.more_header(stretch, more=more)
        span = Span.of(self._manifest.id, ahead.run.indexes)
        bases = ahead.run.bases if ahead.coding.needs_bases else ()
        return bundle.data_header((span,), ahead.coding.encoding, stretch, bases=bases, more=more)

    async def _stretches(self, ahead: Ahead) -> AsyncIterator[tuple[bytes, bool]]:
        try:
            async for found in ahead.stretches():
                yield found
        except WaystationError:
            self.source_failed = True
            raise

    async def _paced(self, head: bytes, payload: bytes, flying: _Flying) -> AsyncIterator[bytes]:
        """Both in pieces, not faster than allowed. The header goes with the first of its payload, as one write."""
        size = PIECE if self._pacer else _WRITE
        view = memoryview(payload)
        for start in range(0, len(view), size):
            piece = view[start : start + size]
            if self._pacer:
                flying.waited += await self._pacer.wait(len(head) + len(piece))
            yield head + piece
            head = b""

    def _bundle_bytes(self) -> int:
        """Payload after which the bundle ends. On a line that is not known, after its first run."""
        line = self._meter.line
        if not self._meter.is_sure:
            return 1
        together = min(BUNDLE_PAYLOAD, int(line.rate * BUNDLE_SECONDS))
        return max(BUNDLE_PAYLOAD_MIN, together // self.connections.number)

    def _underway(self) -> int:
        """Bytes of the tree stream that are on the line, of runs that are not whole there yet."""
        return sum(
            ahead.run.size * ahead.sent // max(ahead.expected, ahead.sent, 1) for ahead in self._alive if ahead.sent
        )

    def _finished(self, ahead: Ahead) -> None:
        self._alive.remove(ahead)
        self._there += ahead.run.size
        self.sent.add(ahead.coding.encoding, len(ahead.run.indexes), ahead.run.size, ahead.sent)
        if ahead.coding == PLAIN or ahead.coding.needs_bases:
            # Other levels follow from this one: seen on other content, they could not be weighed against each other.
            self._ratios = self._ratios.with_seen(ahead.coding, ahead.sent / ahead.run.size)
        self._tell(self._underway())

    def _check_taken(self, answer: messages.BundleAnswer, flying: _Flying) -> None:
        """A delta that was refused is followed by a plain run; a plain one that is refused ends it all."""
        refused = {index for run in answer.refused for index in indexes(run.ranges)}
        if not refused:
            return
        for ahead in flying.runs:
            lost = [index for index in ahead.run.indexes if index in refused]
            if lost and ahead.coding.needs_bases:
                self.sent.fallbacks += 1
                self._again.append(lost)
                self._there -= self._runs.size(lost)
                refused.difference_update(lost)
        if refused:
            raise RefusedError(
                f"relay {self._relay.url} refuses {len(refused)} chunks of {self._manifest.package}: "
                f"{answer.refused[0].reason}"
            )

    def _learn(self, flying: _Flying) -> None:
        for ahead in flying.runs:
            made = self._payloads.made(self._runs.spec(ahead.run, ahead.coding))
            if made is not None and ahead.coding == PLAIN and made.seconds > 0:
                self._rates = _rates_from(ahead.run.size, made.seconds)

    # --- planning

    async def _next(self) -> Ahead | None:
        """The next run in tree order, while those after it are encoded already; None when all are on their way."""
        async with self._planning:
            while len(self._queue) < self._depth and (self._left or self._again):
                self._queue.append(await self._begin())
            return self._queue.popleft() if self._queue else None

    async def _next_soon(self) -> Ahead | None:
        """As `_next`, where it has something to send soon; None also where the bundle had better end."""
        ahead = await self._next()
        if ahead is None:
            return None
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await ahead.ready()
        except TimeoutError:
            self._queue.appendleft(ahead)
            return None
        return ahead

    async def _plan_anew(self) -> None:
        """Now that the line is known: what waits was planned for a thin one."""
        async with self._planning:
            if self._meter.line.is_thin:
                return
            while self._queue and not self._queue[-1].has_failed:
                ahead = self._queue.pop()
                self._alive.remove(ahead)
                self._left.extendleft(reversed(ahead.run.indexes))
                self._begun -= ahead.run.size
                await ahead.close()

    @property
    def _depth(self) -> int:
        """Runs that may be ready or in the making, beside those on the line."""
        return CORES + max(2, self.connections.number) if self._meter.is_sure else 2

    async def _begin(self) -> Ahead:
        if self._again:
            indexes_ = self._again.popleft()
            return self._make(self._runs.make(indexes_, PLAIN, self._meter.line), PLAIN, None)
        run = self._cut()
        coding, candidate = await self._choose(run)
        return self._make(self._runs.make(run, coding, self._meter.line), coding, candidate)

    def _cut(self) -> list[int]:
        line = self._meter.line
        most = run_bytes(
            line if self._meter.is_sure else replace(line, goodput=None),
            self._whole,
            self._begun,
            has_bases=bool(self._runs.held),
            connections=self.connections.number,
        )
        if not self._runs.held:
            # What hardly shrinks makes long payloads: a run is not to be more than the bundles in flight are.
            most = min(most, max(RUN_BYTES_MIN, int(BUNDLE_PAYLOAD / self._ratios.of(_HARDEST))))
        run = [self._left.popleft()]
        size = self._runs.size(run)
        # A few bytes before a long chunk are no run: they would say nothing of the content, nor of the encoders.
        while self._left and (size < RUN_BYTES_MIN // 4 or size + self._manifest.chunks[self._left[0]].size <= most):
            size += self._manifest.chunks[self._left[0]].size
            run.append(self._left.popleft())
        self._begun += size
        return run

    async def _choose(self, run: list[int]) -> tuple[Coding, Candidate | None]:
        line = self._meter.line
        has_bases = bool(self._runs.make(run, PREFIX, line).bases)
        coding, _ = forced(self._force, has_bases=has_bases)
        if coding is not None:
            return coding, None
        has_bases = has_bases and line.rate < BASES_PAY
        ratios = await self._probe(run, has_bases=has_bases)
        now = time.monotonic()
        busy = sorted(ahead.ends_at for ahead in self._alive if not ahead.is_whole)
        queueing = max(0.0, busy[len(busy) - CORES] - now) if len(busy) >= CORES else 0.0
        waiting = sum(ahead.left for ahead in self._alive) / line.rate
        candidates = [self._candidate(run, each, queueing, ratios) for each in planner.codings_for(has_bases)]
        choice = planner.choose(candidates, line, waiting=waiting)
        return choice.coding, choice.chosen

    def _candidate(self, run: list[int], coding: Coding, queueing: float, ratios: Ratios) -> Candidate:
        made = self._runs.make(run, coding, self._meter.line)
        spec = self._runs.spec(made, coding)
        known = self._payloads.made(spec)
        is_kept = self._payloads.find(spec.chunks, spec.bases, (coding.encoding,)) == spec
        found = planner.estimate(
            coding,
            made.size,
            made.base_size,
            ratios=ratios,
            rates=self._rates,
            exact=known.payload_bytes if known else None,
            is_kept=is_kept,
        )
        if is_kept or not queueing or coding.encoding == "raw":
            return found
        return Candidate(
            coding,
            found.payload_bytes,
            found.encode_seconds + queueing,
            found.decode_seconds,
            found.exact,
            found.start_seconds + queueing,
        )

    async def _probe(self, run: list[int], *, has_bases: bool) -> Ratios:
        """Learn by the first run how the content does, and how fast this machine is; what to expect of this run.

        Where an encoder may be what is waited for, each run is tried: parts of a package shrink very differently, and
        level 3 takes a tenth of the time of what it is weighed against.
        """
        line = self._meter.line
        tries_each = not has_bases and line.rate < FAST
        here = 0.0
        for coding in probes(has_bases=has_bases, is_thin=line.is_thin):
            if coding in self._probed and not tries_each:
                continue
            made = self._runs.make(run, coding, line)
            try:
                self._ratios, seconds, size = await probe(self._payloads, self._runs, made, self._ratios, coding)
            except WaystationError:
                self.source_failed = True
                raise
            if seconds and coding == PLAIN and coding not in self._probed:
                self._rates = _rates_from(made.size, seconds)
            self._probed.add(coding)
            here = size / made.size
        return Ratios({PLAIN: here}) if tries_each and here else self._ratios

    def _make(self, run: Run, coding: Coding, candidate: Candidate | None) -> Ahead:
        spec = self._runs.spec(run, coding)
        found = candidate or planner.estimate(coding, run.size, run.base_size, ratios=self._ratios, rates=self._rates)
        pieces = self._payloads.pieces(spec)
        ahead = Ahead(run, coding, pieces, found.payload_bytes, time.monotonic() + found.encode_seconds)
        self._alive.append(ahead)
        return ahead


def _rates_from(size: int, seconds: float) -> Rates:
    """What this machine does, by what it did just now; a disk that was slow is no measure of an encoder."""
    return Rates.measured(min(1e9, max(60e6, size / seconds))) if size >= RUN_BYTES_MIN else Rates()
