"""From runs to bundles on the line: one connection carries one bundle after another, each some runs of the queue.

Runs go as they are made. What a bundle's answer says of the line goes into the plan of what comes next.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from relay.encoding.bundle import BundleWriter, Span, data_header
from relay.encoding.choose_bases import Held
from relay.encoding.codecs import Coding
from relay.errors import FrameError, RefusedError, UnreachableError, WaystationError, first_of
from relay.package.manifest import Manifest
from relay.package.ranges import Ranges, check, count, indexes
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.support.progress import Progress
from relay.support.rate_limit import PIECE, Pacer
from relay.transfer.encoder_pool import Payloads
from relay.transfer.link_history import IN_FLIGHT, Connections, Meter
from relay.transfer.run_queue import PlannedRun, RunAhead, RunQueue

BUNDLE_SECONDS = 10.0
"""Time on the line of one bundle, as far as the line is known: its answer says how the line is."""
BUNDLE_PAYLOAD_MIN = 1 << 20
BUNDLE_PAYLOAD = IN_FLIGHT
"""Payload bytes of all bundles in flight together, about. A bundle that was answered is durable at the relay: those in
flight are all that can cross twice, whichever side is killed."""
_WRITE: Final = 256 << 10
_READY_SECONDS: Final = 2.0
"""How long a bundle waits for its next run; a relay takes a sender that says nothing for one that is gone."""
_BUSY_SECONDS: Final = 5.0
"""The longest pause of one connection where a relay bears fewer of them."""


@dataclass(slots=True)
class Sent:
    """What crossed the line so far: each run, with the bytes of its payload."""

    runs: list[tuple[PlannedRun, int]] = field(default_factory=list)
    fallbacks: int = 0

    @property
    def encodings(self) -> tuple[messages.EncodedBytes, ...]:
        return messages.summed(
            messages.EncodedBytes(one.coding.encoding, len(one.run.indexes), one.run.size, payload)
            for one, payload in self.runs
        )

    @property
    def payload_bytes(self) -> int:
        return sum(payload for _, payload in self.runs)


@dataclass(slots=True)
class _Flying:
    """One bundle, and what it carries."""

    limit: int
    runs: list[RunAhead] = field(default_factory=list)
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
        explains: bool = False,
    ) -> None:
        self.sent = Sent()
        self.lacking = len(manifest.chunks)
        """Chunks that the relay lacked when it was asked last."""
        self.connections = Connections(meter.line)
        self._manifest = manifest
        self._relay = relay
        self._meter = meter
        self._pacer = pacer
        self._progress = progress
        self.queue = RunQueue(manifest, payloads, meter, self.connections, force=force, explains=explains)
        self._there = self._told = self._open = 0

    # --- progress

    def report(self, missing: Ranges) -> None:
        """Tell how much is at the relay, given what it misses."""
        self.lacking = count(missing)
        self._there = self._manifest.stream_size - self._manifest.size_of(indexes(missing))
        self._told = 0
        self._tell()

    def _tell(self) -> None:
        """Bytes of runs that are on the line stand for themselves; what was told is never taken back."""
        whole = self._manifest.stream_size
        underway = sum(ahead.underway for ahead in self.queue.alive)
        self._told = max(self._told, min(self._there + underway, whole))
        if self._progress:
            self._progress(self._told, whole)

    # --- sending

    async def send(self, lease: str, missing: Ranges, held: Sequence[Held] = ()) -> None:
        """Everything in `missing`, in tree order, building on `held`; or the first error."""
        self.queue.begin(missing, held)
        self.report(missing)
        try:
            # Again, where a connection put a run back and ended, being one too many, when the others had ended before.
            while self.queue.has_more:
                self._open = 0
                async with asyncio.TaskGroup() as group:
                    self._open_connections(group, lease, 0)
        except BaseExceptionGroup as errors:
            raise first_of(errors) from None
        finally:
            self.queue.close()

    def _open_connections(self, group: asyncio.TaskGroup, lease: str, there: int) -> None:
        for number in range(there, self.connections.number):
            if self.queue.has_more:
                group.create_task(self._connection(group, lease, number))

    async def _connection(self, group: asyncio.TaskGroup, lease: str, number: int) -> None:
        """One bundle after another. `number` counts the connections: those beyond what the line bears end."""
        self._open += 1
        is_first = True
        while number < self.connections.number and (ahead := await self.queue.next()) is not None:
            is_known = self._meter.is_sure
            # The first bundle measures the line, and not the encoder that is slower than most.
            await (ahead.payload.ready() if is_known else ahead.payload.ready(math.inf))
            flying = _Flying(self._bundle_bytes())
            try:
                answer = await self._carry(lease, ahead, flying, is_first=is_first)
            except UnreachableError as error:
                if error.retry_after is None or self._open == 1 or self.queue.source_failed:
                    raise
                # Too many at a time for this relay; the others go on.
                self._take_back(flying)
                self.connections.failed()
                await asyncio.sleep(0 if number else min(error.retry_after, _BUSY_SECONDS))
                continue
            is_first = False
            self._check_taken(answer, flying)
            if not is_known:
                await self.queue.plan_anew()
            if self._meter.is_open:
                # How fast the line is, the next one will say: this one had to find its pace.
                continue
            before = self.connections.number
            self.connections.after(self._meter.line, flying.payload)
            self._open_connections(group, lease, before)
        self._open -= 1

    async def _carry(self, lease: str, ahead: RunAhead, flying: _Flying, *, is_first: bool) -> messages.BundleAnswer:
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
            if ahead not in self.queue.alive:
                self._there -= ahead.size
            self.queue.again(ahead)

    def _bundle_bytes(self) -> int:
        """Payload after which the bundle ends. On a line that is not known, after its first run."""
        if not self._meter.is_sure:
            return 1
        together = min(BUNDLE_PAYLOAD, int(self._meter.line.rate * BUNDLE_SECONDS))
        return max(BUNDLE_PAYLOAD_MIN, together // self.connections.number)

    def _check_taken(self, answer: messages.BundleAnswer, flying: _Flying) -> None:
        """A delta that was refused is followed by a plain run; a plain one that is refused ends it all."""
        refused = {index for run in answer.refused for index in indexes(self._checked(run))}
        if not refused:
            return
        for ahead in flying.runs:
            lost = [index for index in ahead.planned.run.indexes if index in refused]
            if lost and ahead.planned.coding.needs_bases:
                self.sent.fallbacks += 1
                self.queue.plainly(lost)
                self._there -= self._manifest.size_of(lost)
                refused.difference_update(lost)
        if refused:
            raise RefusedError(
                f"relay {self._relay.url} refuses {len(refused)} chunks of {self._manifest.package}: "
                f"{answer.refused[0].reason[: messages.REASON_CHARS]}"
            )

    def _checked(self, run: messages.RefusedRun) -> Ranges:
        """Raises `FrameError`: it speaks of what this package has not."""
        if run.manifest != self._manifest.id:
            raise FrameError(f"relay {self._relay.url} refuses chunks of another package than was sent")
        return check(run.ranges, len(self._manifest.chunks))

    # --- one bundle

    async def _bundle(self, ahead: RunAhead | None, flying: _Flying) -> AsyncIterator[bytes]:
        writer = BundleWriter()
        head = writer.start()
        while ahead is not None:
            flying.runs.append(ahead)
            goes_on, asked = False, time.monotonic()
            span, planned = Span.of(self._manifest.id, ahead.planned.run.indexes), ahead.planned
            async for stretch, more in self._stretches(ahead):
                flying.waited += time.monotonic() - asked
                header = data_header(
                    (span,), planned.coding.encoding, stretch, bases=planned.bases, more=more, goes_on=goes_on
                )
                async for piece in self._paced(head + writer.frame(header), stretch, flying):
                    yield piece
                flying.payload += len(stretch)
                head, goes_on = b"", True
                self._tell()
                asked = time.monotonic()
            self._finished(ahead)
            asked = time.monotonic()
            ahead = await self._next_soon(flying.limit - flying.payload)
            flying.waited += time.monotonic() - asked
        yield writer.end()

    async def _stretches(self, ahead: RunAhead) -> AsyncIterator[tuple[bytes, bool]]:
        try:
            async for found in ahead.payload.stretches():
                yield found
        except WaystationError:
            self.queue.source_failed = True
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

    def _finished(self, ahead: RunAhead) -> None:
        self.queue.finished(ahead)
        self._there += ahead.size
        self.sent.runs.append((ahead.planned, ahead.payload.taken))
        self._tell()

    async def _next_soon(self, room: int) -> RunAhead | None:
        """The next run, where it has something to send soon and its payload has room in this bundle; else None."""
        ahead = await self.queue.next() if room > 0 else None
        if ahead is None:
            return None
        if ahead.planned.choice.chosen.payload_bytes > room:
            # What is in flight can cross twice: it is not to be more than the bundles are allowed.
            self.queue.put_back(ahead)
            return None
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await ahead.payload.ready()
        except TimeoutError:
            self.queue.put_back(ahead)
            return None
        return ahead
