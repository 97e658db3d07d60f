"""Bring one package from one place to another: offer the manifest, send what is missing, publish last."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from relay import wire
from relay.client import LeaseLostError, MissingChunksError, RelayClient
from relay.content import frames
from relay.content.frames import BundleWriter, Encoding, Span
from relay.content.manifest import Manifest
from relay.content.ranges import Ranges, count, indexes
from relay.errors import NotFoundError, RefusedError, UnreachableError, WaystationError, first_of
from relay.stores.contract import ChunkReader

RUN_BYTES = 8 << 20
"""Tree stream in one run as sent here, at most: longer ones win little at level 3."""
CONNECTIONS = 2
"""Bundles in flight to one relay: one is made durable there while the other is on the line."""
BUNDLE_PAYLOAD = 4 << 20
"""Payload bytes of a bundle, which is one run; a run that stays larger is split, down to one chunk. A bundle that was
answered is durable at the relay: those in flight are all that can cross twice, whoever is killed."""
FRUITLESS_MAX = 3
"""Tries in a row, after the first, that may end without the relay holding more than before."""
PATIENCE = 60.0
"""Seconds that a relay may be away before its replication is given up."""
_PAUSE = 0.2
"""Seconds before the next try, doubled with each fruitless one: what is sent in vain crosses the line all the same."""
_WRITE = 128 << 10

Progress = Callable[[int, int], None]
"""Called with (bytes of the tree stream now at the relay, bytes of the whole)."""


@dataclass(frozen=True, slots=True)
class Replicated:
    """What one replication moved."""

    relay: str
    package_bytes: int
    """Bytes of the nupkg."""
    chunks: int
    """Chunks of the package."""
    chunks_sent: int
    wire_bytes: int
    """Bytes that crossed the line in both directions: bodies and heads of HTTP."""
    payload_bytes: int
    """Bytes of frame payloads sent: the content alone."""
    seconds: float
    interruptions: int
    """How often the relay was lost and found again."""


async def replicate(
    manifest: Manifest,
    signature: bytes,
    source: ChunkReader,
    relay: RelayClient,
    *,
    known: Sequence[Manifest] = (),
    progress: Progress | None = None,
    patience: float = PATIENCE,
) -> Replicated:
    """Make `relay` hold and list the package. Running it again sends only what is still missing, at last nothing.

    `known` are manifests of other versions at hand: against one that the relay lists too, the new one is sent as a
    difference.

    Raises:
        UnreachableError: the relay was not there at the start, or was away for longer than `patience` seconds, or
            comes and goes without taking more.
        ConflictError: it lists other bytes under this id and version.
        RefusedError: it refuses the token, or chunks that were sent.
        ChunkMissing, ChunkInvalid, StoreError: the source lacks, or damaged, or cannot read what it should have.
    """
    started, before = time.monotonic(), relay.traffic.total
    gained = started
    sender = _Sender(manifest, source, relay, progress)
    interruptions = fruitless = 0
    fewest = len(manifest.chunks) + 1
    while True:
        try:
            await _bring(sender, signature, known)
            break
        except (UnreachableError, LeaseLostError) as error:
            # A relay that was never there is a wrong address, not an interruption: said at once.
            if sender.source_failed or not sender.reached:
                raise
            interruptions += 1
            # What was sent is no measure: a relay without room takes bundle after bundle and keeps nothing.
            if sender.lacking < fewest:
                gained, fewest, fruitless = time.monotonic(), sender.lacking, 0
            else:
                fruitless += 1
            pause = getattr(error, "retry_after", None)
            is_busy = pause is not None and time.monotonic() - gained < patience
            if fruitless > FRUITLESS_MAX and not is_busy:
                raise
            await asyncio.sleep(min(max(pause or 0.0, _PAUSE * 2**fruitless), patience))
            await relay.wait_until_ready(patience)
    return Replicated(
        relay=relay.url,
        package_bytes=manifest.nupkg.size,
        chunks=len(manifest.chunks),
        chunks_sent=sender.chunks_sent,
        wire_bytes=relay.traffic.total - before,
        payload_bytes=sender.payload_bytes,
        seconds=time.monotonic() - started,
        interruptions=interruptions,
    )


async def _bring(sender: _Sender, signature: bytes, known: Sequence[Manifest]) -> None:
    manifest, relay = sender.manifest, sender.relay
    is_published = await _is_published(manifest, signature, relay)
    sender.reached = True
    if is_published and await _is_whole(manifest, relay):
        sender.report(())
        return
    offer = await relay.offer(manifest, signature, await _common_base(manifest, known, relay))
    missing = offer.missing
    sent: set[int] = set()
    while True:
        await sender.send(offer.lease, missing)
        sent.update(indexes(missing))
        try:
            await relay.publish(manifest)
            return
        except MissingChunksError as error:
            if not sent.isdisjoint(indexes(error.missing)):
                raise RefusedError(f"relay {relay.url} does not keep the chunks that it is sent") from error
            missing = error.missing


async def _is_published(manifest: Manifest, signature: bytes, relay: RelayClient) -> bool:
    try:
        pointer = await relay.package(manifest.package.id, manifest.package.version)
    except NotFoundError:
        return False
    return pointer.manifest == manifest.id and pointer.signature == signature


async def _is_whole(manifest: Manifest, relay: RelayClient) -> bool:
    """Whether the relay still has all of it: a chunk that was found damaged there is put aside, and sent again."""
    every = wire.ChunkRanges(manifest=manifest.id, ranges=((0, len(manifest.chunks)),))
    return not manifest.chunks or not await relay.missing((every,))


async def _common_base(manifest: Manifest, known: Sequence[Manifest], relay: RelayClient) -> Manifest | None:
    """The newest manifest that both sides hold."""
    if not known:
        return None
    listed = {pointer.manifest for pointer in await relay.packages(manifest.package.id)}
    return max((m for m in known if m.id in listed), key=lambda m: m.package.version, default=None)


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A run that is ready to be sent."""

    run: list[int]
    size: int
    encoding: Encoding
    payload: bytes


class _Sender:
    """Encodes and sends chunks of one package to one relay, several bundles at once."""

    def __init__(self, manifest: Manifest, source: ChunkReader, relay: RelayClient, progress: Progress | None) -> None:
        self.manifest = manifest
        self.relay = relay
        self.chunks_sent = 0
        self.payload_bytes = 0
        self.lacking = len(manifest.chunks)
        """Chunks that the relay lacked when it was asked last."""
        self.source_failed = False
        self.reached = False
        """Whether the relay answered anything yet."""
        self._source = source
        self._progress = progress
        self._there = 0
        self._dense = False
        """Whether runs compress so little that a whole one is too much for a bundle."""

    async def send(self, lease: str, missing: Ranges) -> None:
        """Everything in `missing`, in tree order, or the first error."""
        self.report(missing)
        chunks = self.manifest.chunks
        runs = deque(frames.plan_runs([(i, chunks[i].size) for i in indexes(missing)], RUN_BYTES))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(CONNECTIONS, len(runs))):
                    group.create_task(self._send_bundles(lease, runs))
        except BaseExceptionGroup as errors:
            raise first_of(errors) from None

    def report(self, missing: Ranges) -> None:
        """Tell how much is at the relay, given what it misses."""
        whole = self.manifest.stream_size
        self.lacking = count(missing)
        self._there = whole - sum(self.manifest.chunks[i].size for i in indexes(missing))
        if self._progress:
            self._progress(self._there, whole)

    async def _send_bundles(self, lease: str, runs: deque[list[int]]) -> None:
        """One bundle after another; while one is on its way, the next one's run is encoded."""
        async with asyncio.TaskGroup() as group:
            ahead = group.create_task(self._encode_next(runs))
            while (encoded := await ahead) is not None:
                ahead = group.create_task(self._encode_next(runs))
                answer = await self.relay.put_bundle(lease, self._bundle(encoded))
                self._check_taken(answer)

    async def _encode_next(self, runs: deque[list[int]]) -> _Encoded | None:
        while runs:
            run = runs.popleft()
            size = self._size(run)
            if self._dense and size > BUNDLE_PAYLOAD and len(run) > 1:
                runs.extendleft(self._halves(run))
                continue
            encoding, payload = await asyncio.to_thread(frames.encode_run, await self._read(run), "zstd")
            # What comes next is probably like this: it need not be encoded to learn that it has to be split.
            self._dense = len(payload) > size // 2
            if len(payload) <= BUNDLE_PAYLOAD or len(run) == 1:
                return _Encoded(run, size, encoding, payload)
            runs.extendleft(self._halves(run))
        return None

    def _halves(self, run: list[int]) -> list[list[int]]:
        """The run in two or three, as `extendleft` wants them: the last one first."""
        sizes = [(index, self.manifest.chunks[index].size) for index in run]
        return frames.plan_runs(sizes, -(-self._size(run) // 2))[::-1]

    def _size(self, run: list[int]) -> int:
        return sum(self.manifest.chunks[index].size for index in run)

    async def _read(self, run: Sequence[int]) -> list[bytes]:
        try:
            return [(await self._source.get(self.manifest.chunk_id(i))).data for i in run]
        except WaystationError:
            self.source_failed = True
            raise

    async def _bundle(self, encoded: _Encoded) -> AsyncIterator[bytes]:
        writer = BundleWriter()
        span = Span.of(self.manifest.id, encoded.run)
        yield writer.start() + writer.frame(frames.data_header((span,), encoded.encoding, encoded.payload))
        view = memoryview(encoded.payload)
        for start in range(0, len(view), _WRITE):
            yield bytes(view[start : start + _WRITE])
        self._sent(len(encoded.run), encoded.size, len(encoded.payload))
        yield writer.end()

    def _check_taken(self, answer: wire.BundleAnswer) -> None:
        refused = sum(count(run.ranges) for run in answer.refused)
        if refused:
            raise RefusedError(
                f"relay {self.relay.url} refuses {refused} chunks of {self.manifest.package}: "
                f"{answer.refused[0].reason}"
            )

    def _sent(self, chunks: int, size: int, payload: int) -> None:
        self.chunks_sent += chunks
        self.payload_bytes += payload
        self._there += size
        if self._progress:
            self._progress(self._there, self.manifest.stream_size)
