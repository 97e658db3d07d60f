"""A package to many relays at once: the roots are sent to from here, the others fetch from the relay above them, all at
the same time, so that each byte leaves the origin once for each root.

The way to each relay is decided here, and watched: where a relay dies or fails, those below it are made to go on with
the next one above, or the origin itself sends them what they still lack.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec

from orchestrator.journal.events import LineBytes
from orchestrator.plan.plan import PlannedRelay
from orchestrator.plan.routes import ORIGIN, Replan, check_upstreams, in_order, line_name, next_upstream
from relay.errors import ConflictError, RefusedError, UnreachableError, WaystationError
from relay.package.manifest import Manifest
from relay.protocol import messages
from relay.support.persistence import Persistence
from relay.support.together import together
from relay.transfer.replicate import PATIENCE, ReplicationResult

if TYPE_CHECKING:
    from relay.protocol.client import RelayClient
    from relay.support.progress import Progress

PERSISTENCE: Final = Persistence(first_pause=0.2, failures=4)
"""With a relay that is lost and found again: as long as it holds more each time."""
GRACE_SECONDS: Final = 5.0
"""How long a relay may get nothing from one that failed before it is sent elsewhere."""

_OWN_FAULTS: Final = frozenset({"store_full", "store_failed", "conflict", "internal"})
"""Problem codes of a replication that no other source would mend."""

Send = Callable[[PlannedRelay, "RelayClient", "Progress"], Awaitable[ReplicationResult]]
"""Sends the package from here to one relay. Raises as `relay.transfer.replicate.replicate`."""
Heard = Callable[[str, int, int], None]
"""Called with (relay, bytes of the tree stream that are there, bytes of the whole), from the offer on."""
SourceUrl = Callable[[PlannedRelay, PlannedRelay], str]
"""The URL under which a relay reaches the one above it: (the one above, the relay)."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """One relay that holds and lists the package now.

    Attributes:
        relay: its name.
        source: where the last of it came from: a relay's name, or `ORIGIN`.
        package_bytes: of the nupkg.
        chunks: of the package.
        lines: where its bytes came over, in the order in which they were used.
        interruptions: how often the relay was lost and found again.
        sent: what the sender here has to say, where the last of it was sent from here.
    """

    relay: str
    url: str
    source: str
    package_bytes: int
    chunks: int
    chunks_sent: int
    lines: tuple[LineBytes, ...]
    fallbacks: int
    seconds: float
    interruptions: int
    sent: ReplicationResult | None = None

    @property
    def encodings(self) -> tuple[messages.EncodedBytes, ...]:
        """All lines together."""
        return messages.summed(encoded for line in self.lines for encoded in line.encodings)

    @property
    def wire_bytes(self) -> int:
        """Bytes that crossed to bring it here, on whichever line."""
        return sum(line.wire_bytes for line in self.lines)

    @property
    def payload_bytes(self) -> int:
        """Bytes of frame payloads among them."""
        return sum(encoded.payload_bytes for line in self.lines for encoded in line.encodings)


OnDelivered = Callable[[Delivered], Awaitable[None]]
OnFailed = Callable[[str, WaystationError], Awaitable[None]]
"""Called with a relay's name and its error. What it raises ends everything."""


@dataclass(frozen=True, slots=True)
class Cascaded:
    """What became of one package at several relays.

    `delivered` is in the order of the relays that were asked for, `failed` is by the relay's name.
    """

    delivered: tuple[Delivered, ...]
    failed: Mapping[str, WaystationError]
    replans: tuple[Replan, ...]


async def replicate_all(
    manifest: Manifest,
    relays: Sequence[PlannedRelay],
    clients: Mapping[str, RelayClient],
    send: Send,
    heard: Heard,
    *,
    delivered: OnDelivered | None = None,
    failed: OnFailed | None = None,
    patience: float = PATIENCE,
    source_url: SourceUrl = lambda above, relay: above.url,  # noqa: ARG005 - the same from everywhere
) -> Cascaded:
    """Bring a package to all `relays`; one that fails leaves the others alone.

    Args:
        manifest: of the package.
        relays: where to, and through whom (`upstream`); a relay and the one above it are both in it.
        clients: one for each, by name.
        send: from here.
        heard: how far each is.
        delivered: told of each relay as soon as it lists the package.
        failed: told of each relay as soon as it failed.
        patience: seconds that a relay may be away in the middle.
        source_url: where a relay finds the one above it.

    Raises:
        UsageError: relays that fetch from each other in a circle, or from one that is not among them.
        Exception: whatever `failed` raises. Relays that fetch go on by themselves.
    """
    check_upstreams({relay.name: relay.upstream or None for relay in relays})
    work = _Cascade(manifest, relays, clients, send, heard, delivered, failed, patience, source_url)
    await together(work.bring(relay) for relay in in_order(relays))
    found = (work.delivered.get(relay.name) for relay in relays)
    return Cascaded(tuple(one for one in found if one is not None), work.failed, tuple(work.replans))


class _SourceFailedError(Exception):
    """The relay is well, and cannot go on with the source that it was given."""


class _Cascade:
    def __init__(
        self,
        manifest: Manifest,
        relays: Sequence[PlannedRelay],
        clients: Mapping[str, RelayClient],
        send: Send,
        heard: Heard,
        on_delivered: OnDelivered | None,
        on_failed: OnFailed | None,
        patience: float,
        source_url: SourceUrl,
    ) -> None:
        self.delivered: dict[str, Delivered] = {}
        self.failed: dict[str, WaystationError] = {}
        self.replans: list[Replan] = []
        self._manifest = manifest
        self._relays = {relay.name: relay for relay in relays}
        self._upstreams = {relay.name: relay.upstream for relay in relays}
        self._clients = clients
        self._send = send
        self._heard = heard
        self._on_delivered = on_delivered
        self._on_failed = on_failed
        self._patience = patience
        self._source_url = source_url
        self._offered: set[str] = set()
        self._here: dict[str, int] = {}
        self._stirred = {relay.name: asyncio.Event() for relay in relays}
        """Set when the relay has the offer, and when it failed."""

    async def bring(self, relay: PlannedRelay) -> None:
        """To one relay, by whatever way is left."""
        book = _Book()
        try:
            source = await self._by_any_way(relay, book)
        except WaystationError as error:
            self.failed[relay.name] = error
            self._stirred[relay.name].set()
            if self._on_failed:
                await self._on_failed(relay.name, error)
            return
        done = self.delivered[relay.name] = Delivered(
            relay=relay.name,
            url=self._clients[relay.name].url,
            source=source,
            package_bytes=self._manifest.nupkg.size,
            chunks=len(self._manifest.chunks),
            chunks_sent=book.chunks_sent,
            lines=book.lines(),
            fallbacks=book.fallbacks,
            seconds=time.monotonic() - book.began,
            interruptions=book.interruptions,
            sent=book.sent,
        )
        self._stir(relay.name)
        if self._on_delivered:
            await self._on_delivered(done)

    async def _by_any_way(self, relay: PlannedRelay, book: _Book) -> str:
        """The relay that it came from at last, or `ORIGIN`. Raises `WaystationError`: the relay itself failed."""
        out: set[str] = set()
        upstream = relay.upstream
        while upstream != ORIGIN:
            try:
                await self._until_offered(upstream)
                await self._from_relay(relay, upstream, book)
                return upstream
            except _SourceFailedError as error:
                out.add(upstream)
                taken = next_upstream(relay.name, self._upstreams, out | set(self.failed))
                self.replans.append(Replan(relay.name, upstream, taken, str(error)))
                upstream = taken
        await self._from_origin(relay, book)
        return ORIGIN

    async def _until_offered(self, upstream: str) -> None:
        await self._stirred[upstream].wait()
        if upstream not in self._offered:
            raise _SourceFailedError(f"it failed: {self.failed[upstream].message}")

    def _stir(self, relay: str) -> None:
        self._offered.add(relay)
        self._stirred[relay].set()

    def _told(self, relay: str, here: int, whole: int) -> None:
        self._stir(relay)
        # Who goes on elsewhere begins to tell anew; what came stayed.
        self._here[relay] = max(here, self._here.get(relay, 0))
        self._heard(relay, self._here[relay], whole)

    # --- from here

    async def _from_origin(self, relay: PlannedRelay, book: _Book) -> None:
        client = self._clients[relay.name]
        before = client.traffic.total
        try:
            done = await self._send(relay, client, lambda here, whole: self._told(relay.name, here, whole))
        except WaystationError:
            book.add(line_name(ORIGIN, relay.name), client.traffic.total - before, ())
            raise
        book.add(line_name(ORIGIN, relay.name), done.wire_bytes, tuple(done.encodings))
        book.fallbacks += done.fallbacks
        book.interruptions += done.interruptions
        book.sent = done

    # --- from a relay

    async def _from_relay(self, relay: PlannedRelay, upstream: str, book: _Book) -> None:
        """Raises `_SourceFailedError`, or `WaystationError` where the relay itself failed."""
        client = self._clients[relay.name]
        request = messages.ReplicationRequest(
            id=str(self._manifest.package.id),
            version=self._manifest.package.version.normalized,
            manifest=self._manifest.id,
            source=self._source_url(self._relays[upstream], relay),
            rate=relay.limit,
        )
        watch = _Watch()
        try:
            await self._follow(relay, upstream, client, request, watch, book)
        finally:
            watch.settle(line_name(upstream, relay.name), book)

    async def _follow(
        self,
        relay: PlannedRelay,
        upstream: str,
        client: RelayClient,
        request: messages.ReplicationRequest,
        watch: _Watch,
        book: _Book,
    ) -> None:
        """Until it is done; a relay that went away is asked again when it is back."""
        from relay.protocol.connection import TokenRefusedError

        # One that was never there is a wrong address, not an interruption: said at once.
        tries = PERSISTENCE.tries(
            lambda error: isinstance(error, UnreachableError) and watch.reached, gained=lambda: watch.here
        )
        async for attempt in tries:
            if attempt.num > 1:
                book.interruptions += 1
                await client.wait_until_ready(self._patience)
            with attempt:
                try:
                    await self._listen(relay, upstream, client, request, watch)
                except (TokenRefusedError, ConflictError):
                    raise
                except RefusedError as error:
                    # It does not fetch from there, by its own rules; to us it answers.
                    raise _SourceFailedError(error.message) from error

    async def _listen(
        self,
        relay: PlannedRelay,
        upstream: str,
        client: RelayClient,
        request: messages.ReplicationRequest,
        watch: _Watch,
    ) -> None:
        async with aclosing(client.replication(request)) as lines:
            async for progress in lines:
                watch.heard(progress)
                if progress.whole:
                    self._told(relay.name, watch.here, progress.whole)
                if progress.state == "done":
                    return
                if progress.state == "failed":
                    raise _verdict(progress, client.url)
                if upstream in self.failed and watch.idle_seconds > GRACE_SECONDS:
                    raise _SourceFailedError(f"it failed: {self.failed[upstream].message}")


def _verdict(progress: messages.ReplicationProgress, url: str) -> Exception:
    """Whose fault it is, and so what comes next."""
    reason, code = progress.reason[: messages.REASON_CHARS], progress.code[: messages.REASON_CHARS]
    if progress.code == "conflict":
        return ConflictError(f"relay {url} holds other bytes under this id and version; nothing was changed")
    if progress.code in _OWN_FAULTS:
        return _RelayFailedError(f"relay {url} failed: {reason} ({code})")
    return _SourceFailedError(f"{reason} ({code})")


class _RelayFailedError(WaystationError):
    """A relay's own word that it cannot take the package, from wherever it comes."""


def document_of(done: Delivered) -> dict[str, Any]:
    """One relay's part of `package replicate --json`."""
    exact_bytes = done.sent.exact_bytes if done.sent else 0
    return {
        "relay": done.url,
        "name": done.relay,
        "source": done.source,
        "package_bytes": done.package_bytes,
        "chunks": done.chunks,
        "chunks_sent": done.chunks_sent,
        "wire_bytes": done.wire_bytes,
        "payload_bytes": done.payload_bytes,
        "overhead_bytes": max(0, done.wire_bytes - done.payload_bytes - exact_bytes),
        "seconds": done.seconds,
        "interruptions": done.interruptions,
        "encodings": msgspec.to_builtins(done.encodings),
        "fallbacks": done.fallbacks,
        "goodput": done.sent.goodput if done.sent else 0.0,
        "exact_bytes": exact_bytes,
        "lines": [
            {"line": one.line, "wire_bytes": one.wire_bytes, "encodings": msgspec.to_builtins(one.encodings)}
            for one in done.lines
        ],
    }


# --- counting


@dataclass(slots=True)
class _Book:
    """What one relay got, and over which lines."""

    began: float = field(default_factory=time.monotonic)
    fallbacks: int = 0
    interruptions: int = 0
    chunks_sent: int = 0
    sent: ReplicationResult | None = None
    _wire: dict[str, int] = field(default_factory=dict)
    _encodings: dict[str, list[messages.EncodedBytes]] = field(default_factory=dict)

    def add(self, line: str, wire_bytes: int, encodings: Sequence[messages.EncodedBytes]) -> None:
        self._wire[line] = self._wire.get(line, 0) + wire_bytes
        self._encodings.setdefault(line, []).extend(encodings)
        self.chunks_sent += sum(encoded.chunks for encoded in encodings)

    def lines(self) -> tuple[LineBytes, ...]:
        return tuple(
            LineBytes(line, wire_bytes, messages.summed(self._encodings[line]))
            for line, wire_bytes in self._wire.items()
        )


class _Watch:
    """What a relay says of its own fetching. Each time it begins anew, it counts from nothing."""

    def __init__(self) -> None:
        self.reached = False
        self.here = 0
        """Most bytes that it told of: it may begin anew, yet what came stays."""
        self._last: messages.ReplicationProgress | None = None
        self._ended: list[messages.ReplicationProgress] = []
        self._moved = time.monotonic()

    def heard(self, progress: messages.ReplicationProgress) -> None:
        self.reached = True
        if self._last is not None and progress.seconds < self._last.seconds:
            # Its clock went back: what we joined is not what we watched before.
            self._ended.append(self._last)
        if progress.bytes > self.here:
            self.here, self._moved = progress.bytes, time.monotonic()
        self._last = progress

    @property
    def idle_seconds(self) -> float:
        """Since something came."""
        return time.monotonic() - self._moved

    def settle(self, line: str, book: _Book) -> None:
        """Write down all that was heard."""
        for progress in [*self._ended, *([self._last] if self._last else [])]:
            book.add(line, progress.wire_bytes, progress.encodings)
            book.fallbacks += progress.fallbacks
