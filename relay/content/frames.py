"""Bundles: what one HTTP body carries. Frames in it, each an encoded run of chunks.

    bundle  = MAGIC (8 bytes), then frames; the last one is `End`, or the bundle was cut off
    frame   = u32 little-endian header length, header (MessagePack), payload (only of `Data`)

Everything here is free of I/O: the encoder makes bytes, the decoder is fed with them and says what it found.
Both cap every length before they take memory for it.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import xxhash

from relay.content import ranges as rg
from relay.content.chunk import Chunk
from relay.content.identity import ChunkId, ManifestId
from relay.content.manifest import Manifest
from relay.content.zstd import zstd
from relay.errors import ChunkInvalid, FrameError

MAGIC = b"WAYBNDL1"
HEADER_MAX = 1 << 20
"""Bytes of one frame header."""
RUN_MAX = 64 << 20
"""Bytes of tree stream in one run."""
PAYLOAD_MAX = RUN_MAX + (1 << 20)
"""Bytes of one payload: a run that does not compress, and what its encoding adds."""
WINDOW_LOG_MAX = 27
"""zstd window, as a power of two. A frame that asks for more is refused."""
LEVEL = 3
"""zstd level where nothing else is planned."""
_ENCODING_COST = 1 << 10
"""Bytes that an encoding may add to a run, beside 1/256 of it (zstd's own bound is n + n/256 + 64)."""
PLACES_MAX = 300_000
"""Chunks that the frames of one bundle may name together: more than a manifest can list."""
BATCH_BYTES = 8 << 20
"""Bytes of chunks that a decoder hands out at a time (and up to one chunk more): few bytes may inflate to many."""
_LENGTH = struct.Struct("<I")
_SLICE = 1 << 20

Encoding = Literal["raw", "zstd"]
ENCODINGS: tuple[Encoding, ...] = ("raw", "zstd")


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Chunks of one manifest, in this order: its digest (32 bytes) and index ranges."""

    manifest: bytes
    ranges: rg.Ranges

    @property
    def manifest_id(self) -> ManifestId:
        return ManifestId(self.manifest.hex())

    @classmethod
    def of(cls, manifest: ManifestId, indexes: Sequence[int]) -> Span:
        return cls(bytes.fromhex(manifest), rg.in_order(indexes))


class Data(msgspec.Struct, frozen=True, array_like=True, tag="data"):
    """An encoded run. `length` and `xxh3` (XXH3-64, seed 0) are of the payload that follows."""

    run: tuple[Span, ...]
    bases: tuple[Span, ...]
    encoding: str
    length: int
    xxh3: int


class Missing(msgspec.Struct, frozen=True, array_like=True, tag="missing"):
    """Chunks that were asked for and are not sent. `arriving`: they are on their way here, ask again."""

    run: tuple[Span, ...]
    reason: Literal["absent", "arriving"]


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="error"):
    """The sender cannot go on. `code` is one of the protocol's problem codes."""

    code: str


class End(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    """The bundle is whole: frames before this one, and the SHA-256 over all their headers."""

    frames: int
    sha256: bytes


Header = Data | Missing | Failed | End
_header_decoder = msgspec.msgpack.Decoder(Header)


# --- writing


class BundleWriter:
    """Makes the bytes around payloads, in order: `start`, then `frame`s, then `end`."""

    def __init__(self) -> None:
        self._frames = 0
        self._headers = hashlib.sha256()

    def start(self) -> bytes:
        return MAGIC

    def frame(self, header: Data | Missing | Failed) -> bytes:
        """The bytes that stand before the payload of `header`."""
        packed = msgspec.msgpack.encode(header)
        self._frames += 1
        self._headers.update(packed)
        return _LENGTH.pack(len(packed)) + packed

    def end(self) -> bytes:
        packed = msgspec.msgpack.encode(End(self._frames, self._headers.digest()))
        return _LENGTH.pack(len(packed)) + packed


def encode_run(data: Sequence[bytes], encoding: Encoding, *, level: int = LEVEL) -> tuple[Encoding, bytes]:
    """The payload of a run, and the encoding it has: `raw` where compressing would not make it smaller."""
    joined = b"".join(data)
    if encoding == "raw":
        return "raw", joined
    window = max(17, min(WINDOW_LOG_MAX, (len(joined) - 1).bit_length()))
    options: dict[int, int] = {
        zstd.CompressionParameter.compression_level: level,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
        zstd.CompressionParameter.window_log: window,
    }
    payload = zstd.compress(joined, options=options)
    return ("zstd", payload) if len(payload) < len(joined) else ("raw", joined)


def data_header(run: tuple[Span, ...], encoding: Encoding, payload: bytes) -> Data:
    return Data(run, (), encoding, len(payload), xxhash.xxh3_64_intdigest(payload))


# --- reading


@dataclass(frozen=True, slots=True)
class Received:
    """A verified chunk, and where it stands."""

    manifest: ManifestId
    index: int
    chunk: Chunk
    payload_bytes: int
    """Payload bytes that were read for it (where a run is compressed as one, up to its last byte)."""


@dataclass(frozen=True, slots=True)
class RunRefused:
    """A run, or the rest of one, that could not be taken; the frames after it may be good."""

    run: tuple[tuple[ManifestId, int], ...]
    error: FrameError | ChunkInvalid


@dataclass(frozen=True, slots=True)
class NotSent:
    """What the sender says it does not send."""

    run: tuple[tuple[ManifestId, int], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Aborted:
    """The sender's own word that it cannot go on."""

    code: str


@dataclass(frozen=True, slots=True)
class Whole:
    """The bundle ended as it should."""

    frames: int


Event = Received | RunRefused | NotSent | Aborted | Whole

Resolve = Callable[[ManifestId], Manifest | None]
"""Which manifests the receiver knows: a frame may speak of no other."""

Wanted = Callable[[ManifestId, int], bool]
"""Whether the receiver asked for this chunk."""


def _anything(manifest: ManifestId, index: int) -> bool:  # noqa: ARG001 - a receiver that takes every chunk it can name
    return True


class BundleDecoder:
    """Feed it the body as it comes, and walk what each piece of it holds to the end before the next piece.

    Each chunk is named at most once in a bundle, and no payload is larger than its run can need: so a bundle ends,
    whoever sends it.
    """

    def __init__(self, resolve: Resolve, wanted: Wanted = _anything) -> None:
        self._resolve = resolve
        self._wanted = wanted
        self._buffer = bytearray()
        self._need = len(MAGIC)
        self._step: Callable[[bytes], Iterable[Event]] = self._on_magic
        self._run: _RunDecoder | None = None
        self._payload_left = 0
        self._frames = 0
        self._headers = hashlib.sha256()
        self._named: set[tuple[ManifestId, int]] = set()
        self._broken: FrameError | None = None
        self.ended = False

    def feed(self, data: bytes) -> Iterator[list[Event]]:
        """What the next bytes hold: batches of events, none empty, each decoded when it is asked for.

        Raises:
            FrameError: they break the format, for good. What was found before comes before it.
        """
        batch: list[Event] = []
        size = 0
        try:
            for event in self._decode(memoryview(data)):
                batch.append(event)
                size += event.chunk.size if isinstance(event, Received) else 0
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        except FrameError as error:
            self._broken = error
        if batch:
            yield batch
        if self._broken is not None:
            raise self._broken

    def _decode(self, view: memoryview) -> Iterator[Event]:
        if self._broken is not None:
            raise self._broken
        while view:
            if self.ended:
                raise FrameError("bytes after the end of the bundle")
            if self._run is not None:
                taken = min(len(view), self._payload_left)
                self._payload_left -= taken
                yield from self._run.feed(view[:taken])
                view = view[taken:]
                if not self._payload_left:
                    yield from self._run.finish()
                    self._run = None
                continue
            taken = min(len(view), self._need - len(self._buffer))
            self._buffer += view[:taken]
            view = view[taken:]
            if len(self._buffer) == self._need:
                complete = bytes(self._buffer)
                self._buffer.clear()
                yield from self._step(complete)

    def finish(self) -> None:
        """The body is over.

        Raises:
            FrameError: it was cut off.
        """
        if not self.ended:
            raise FrameError("the bundle was cut off before its end frame")

    def _on_magic(self, data: bytes) -> Iterable[Event]:
        if data != MAGIC:
            raise FrameError(f"not a bundle: it starts with {data!r}")
        self._expect(_LENGTH.size, self._on_length)
        return ()

    def _on_length(self, data: bytes) -> Iterable[Event]:
        (length,) = _LENGTH.unpack(data)
        if not 0 < length <= HEADER_MAX:
            raise FrameError(f"frame header of {length} bytes: expected 1 to {HEADER_MAX}")
        self._expect(length, self._on_header)
        return ()

    def _on_header(self, packed: bytes) -> Iterable[Event]:
        try:
            header = _header_decoder.decode(packed)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FrameError(f"unreadable frame header: {error}") from error
        self._expect(_LENGTH.size, self._on_length)
        if isinstance(header, End):
            return self._on_end(header)
        self._frames += 1
        self._headers.update(packed)
        if isinstance(header, Data):
            self._on_data(header)
            return ()
        if isinstance(header, Missing):
            return self._on_missing(header)
        return (Aborted(header.code[:100]),)

    def _on_missing(self, header: Missing) -> Iterable[Event]:
        run = tuple(self._walk(header.run))
        if not run:
            raise FrameError("a missing frame with an empty run")
        return (NotSent(run, header.reason),)

    def _on_data(self, header: Data) -> None:
        if not 0 < header.length <= PAYLOAD_MAX:
            raise FrameError(f"payload of {header.length} bytes: expected 1 to {PAYLOAD_MAX}")
        if header.encoding not in ENCODINGS:
            raise FrameError(f"encoding {header.encoding[:20]!r}: expected one of {', '.join(ENCODINGS)}")
        if header.bases:
            raise FrameError(f"encoding {header.encoding} takes no bases")
        targets, size = [], 0
        for manifest, index in self._walk(header.run):
            entry = self._manifest(manifest).chunks[index]
            targets.append(_Target(manifest, index, ChunkId(entry.id), entry.size))
            size += entry.size
            if size > RUN_MAX:
                raise FrameError(f"a run of more than {RUN_MAX} bytes")
        if not targets:
            raise FrameError("a data frame with an empty run")
        if header.length > size + (size >> 8) + _ENCODING_COST:
            raise FrameError(f"payload of {header.length} bytes for a run of {size}")
        self._run = _RunDecoder(targets, header)
        self._payload_left = header.length

    def _on_end(self, header: End) -> Iterable[Event]:
        if header.frames != self._frames or header.sha256 != self._headers.digest():
            raise FrameError("the end frame does not match the frames before it")
        self.ended = True
        return (Whole(self._frames),)

    def _walk(self, run: tuple[Span, ...]) -> Iterator[tuple[ManifestId, int]]:
        for span in run:
            if len(span.manifest) != 32:
                raise FrameError("a manifest digest that is not 32 bytes")
            manifest = self._manifest(span.manifest_id)
            rg.check(span.ranges, len(manifest.chunks))
            if len(self._named) + rg.count(span.ranges) > PLACES_MAX:
                raise FrameError(f"a bundle that names more than {PLACES_MAX} chunks")
            for index in rg.indexes(span.ranges):
                place = (manifest.id, index)
                if not self._wanted(*place):
                    raise FrameError(f"chunk {index} of {manifest.id[:16]}… was not asked for")
                if place in self._named:
                    raise FrameError(f"chunk {index} of {manifest.id[:16]}… is named twice in one bundle")
                self._named.add(place)
                yield place

    def _manifest(self, id: ManifestId) -> Manifest:
        manifest = self._resolve(id)
        if manifest is None:
            raise FrameError(f"a frame speaks of manifest {id[:16]}…, which is not known here")
        return manifest

    def _expect(self, need: int, step: Callable[[bytes], Iterable[Event]]) -> None:
        self._need, self._step = need, step


@dataclass(frozen=True, slots=True)
class _Target:
    manifest: ManifestId
    index: int
    id: ChunkId
    size: int


class _RunDecoder:
    """Decodes one payload as it comes. Each chunk is handed out, verified, with its last byte."""

    def __init__(self, targets: list[_Target], header: Data) -> None:
        self._targets = deque(targets)
        self._left = sum(target.size for target in targets)
        self._pending = bytearray()
        self._fed = 0
        self._told = 0
        self._header = header
        self._xxh3 = xxhash.xxh3_64()
        self._zstd = _decompressor() if header.encoding == "zstd" else None
        self._dead = False

    def feed(self, data: memoryview) -> Iterator[Event]:
        self._xxh3.update(data)
        self._fed += len(data)
        if self._dead:
            return
        try:
            yield from self._decode(data)
        except FrameError as error:
            yield self._refuse(error)

    def finish(self) -> Iterator[Event]:
        if self._dead:
            return
        if self._targets:
            damaged = self._xxh3.intdigest() != self._header.xxh3
            why = "its payload was damaged on the way" if damaged else "its payload holds less than it names"
            yield self._refuse(FrameError(f"a run ended early: {why}"))
        elif self._zstd is not None and not self._zstd.eof:
            yield self._refuse(FrameError("a zstd payload without its end"))

    def _decode(self, data: memoryview) -> Iterator[Event]:
        if self._zstd is None:
            yield from self._take(data)
            return
        while not self._dead:
            if self._zstd.eof:
                if data:
                    raise FrameError("bytes after the zstd frame of a payload")
                return
            try:
                # One byte more than is left: a stream that holds more than its run shows it at once.
                found = self._zstd.decompress(data, max_length=min(_SLICE, self._left + 1))
            except (zstd.ZstdError, MemoryError) as error:
                raise FrameError(f"payload is not zstd within bounds: {error}") from error
            data = memoryview(self._zstd.unused_data if self._zstd.eof else b"")
            yield from self._take(memoryview(found))
            if not self._zstd.eof and self._zstd.needs_input:
                return

    def _take(self, data: memoryview) -> Iterator[Event]:
        if len(data) > self._left:
            raise FrameError("a payload holds more than its run names")
        self._left -= len(data)
        while data:
            target = self._targets[0]
            taken = min(len(data), target.size - len(self._pending))
            self._pending += data[:taken]
            data = data[taken:]
            if len(self._pending) < target.size:
                return
            content = bytes(self._pending)
            self._pending.clear()
            try:
                chunk = Chunk(target.id, content)
            except ChunkInvalid as error:
                yield self._refuse(error)
                return
            self._targets.popleft()
            yield Received(target.manifest, target.index, chunk, self._fed - self._told)
            self._told = self._fed

    def _refuse(self, error: FrameError | ChunkInvalid) -> RunRefused:
        self._dead = True
        self._pending.clear()
        return RunRefused(tuple((target.manifest, target.index) for target in self._targets), error)


def _decompressor() -> zstd.ZstdDecompressor:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG_MAX})


def plan_runs(sizes: Sequence[tuple[int, int]], run_bytes: int) -> list[list[int]]:
    """Split chunks, given as (index, size) in stream order, into runs of at most `run_bytes` (one chunk at least)."""
    runs: list[list[int]] = []
    filled = run_bytes
    for index, size in sizes:
        if filled + size > run_bytes:
            runs.append([])
            filled = 0
        runs[-1].append(index)
        filled += size
    return runs
