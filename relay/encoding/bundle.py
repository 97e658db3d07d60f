"""Bundles: what one HTTP body carries. Frames in it, each an encoded run of chunks.

    bundle  = MAGIC (8 bytes), then frames; the last one is `End`, or the bundle was cut off
    frame   = u32 little-endian header length, header (MessagePack), payload (only of `Data` and `More`)

The payload of a run may come in several stretches, each with a header that says its length: so a sender need not have
encoded the end of a run before its beginning is on the line.

Everything here is free of I/O: the writer makes bytes, the decoder is fed with them and says what it found.
Both cap every length before they take memory for it.
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal, Protocol

import msgspec
import xxhash

from relay.encoding.codecs import DELTAS, ENCODINGS, Decoder, Encoding, decoder_for
from relay.errors import ChunkInvalid, FrameError
from relay.package import ranges as rg
from relay.package.chunk import Chunk
from relay.package.identity import ChunkId, ManifestId
from relay.package.manifest import ChunkEntry, Manifest

MAGIC = b"WAYBNDL1"
HEADER_MAX = 1 << 20
"""Bytes of one frame header."""
RUN_MAX = 64 << 20
"""Bytes of tree stream in one run."""
RUN_AND_BASES_MAX = 64 << 20
"""Bytes of one run and its bases together."""
PAYLOAD_MAX = RUN_MAX + (1 << 20)
"""Bytes of one payload: a run that does not compress, and what its encoding adds."""
_ENCODING_COST = 1 << 10
"""Bytes that an encoding may add to a run, beside 1/256 of it (zstd's own bound is n + n/256 + 64)."""
PLACES_MAX = 300_000
"""Chunks that the frames of one bundle may name together, and the bases of one run: more than a manifest can list."""
BASES_MAX = 1 << 30
"""Bytes of bases in one bundle, beside `BASES_FACTOR` times the bytes of its runs: reading them is work."""
BASES_FACTOR = 64
"""Bytes of bases for each byte of a run, above which they count against `BASES_MAX`."""
BATCH_BYTES = 2 << 20
"""Bytes of chunks that a decoder hands out at a time (and up to one chunk more): few bytes may inflate to many."""
_LENGTH = struct.Struct("<I")


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
    """An encoded run. `length` and `xxh3` (XXH3-64, seed 0) are of the stretch of payload that follows this header.

    `more`: the payload goes on in the next frame, which is then `More` (or `Failed`, where the sender cannot go on).
    """

    run: tuple[Span, ...]
    bases: tuple[Span, ...]
    encoding: str
    length: int
    xxh3: int
    more: bool = False


class More(msgspec.Struct, frozen=True, array_like=True, tag="more"):
    """The next stretch of the payload that began in the frame before."""

    length: int
    xxh3: int
    more: bool = False


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


Header = Data | More | Missing | Failed | End
_header_decoder = msgspec.msgpack.Decoder(Header)


# --- writing


class BundleWriter:
    """Makes the bytes around payloads, in order: `start`, then `frame`s, then `end`."""

    def __init__(self) -> None:
        self._frames = 0
        self._headers = hashlib.sha256()

    def start(self) -> bytes:
        return MAGIC

    def frame(self, header: Data | More | Missing | Failed) -> bytes:
        """The bytes that stand before the payload of `header`."""
        packed = msgspec.msgpack.encode(header)
        self._frames += 1
        self._headers.update(packed)
        return _LENGTH.pack(len(packed)) + packed

    def end(self) -> bytes:
        packed = msgspec.msgpack.encode(End(self._frames, self._headers.digest()))
        return _LENGTH.pack(len(packed)) + packed


def data_header(
    run: tuple[Span, ...],
    encoding: Encoding,
    payload: bytes | memoryview,
    *,
    bases: tuple[Span, ...] = (),
    more: bool = False,
    goes_on: bool = False,
) -> Data | More:
    """The header of a run whose payload is, or begins with, `payload`; of its next stretch, where it `goes_on`."""
    stretch = (len(payload), xxhash.xxh3_64_intdigest(payload), more)
    return More(*stretch) if goes_on else Data(run, bases, encoding, *stretch)


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
    """A run, or the rest of one, that could not be taken; the frames after it may be good.

    It names one chunk at least: the last one, where all of them were verified before their payload broke its format.
    """

    run: tuple[tuple[ManifestId, int], ...]
    error: FrameError | ChunkInvalid


@dataclass(frozen=True, slots=True)
class NotSent:
    """What the sender says it does not send."""

    run: tuple[tuple[ManifestId, int], ...]
    reason: str


class CutShortError(FrameError):
    """Of a run that its sender itself says it cannot finish: the `Aborted` that follows tells why. No lie."""


@dataclass(frozen=True, slots=True)
class Aborted:
    """The sender's own word that it cannot go on."""

    code: str


@dataclass(frozen=True, slots=True)
class Whole:
    """The bundle ended as it should."""

    frames: int


Places = tuple[tuple[ManifestId, int], ...]
"""Chunks in order: manifest and index of each."""


class NeedsBases:
    """The run that comes next builds on these chunks. Give them before the decoder is asked for more.

    Without all of them the run is refused, and the next one read. So it is with chunks of other lengths.
    """

    __slots__ = ("_base", "_filled", "bases", "encoding", "size")

    def __init__(self, bases: Places, encoding: Encoding, size: int) -> None:
        self.bases = bases
        """In this order, some of them perhaps named more than once."""
        self.encoding = encoding
        self.size = size
        """Bytes of all of them together."""
        self._base = bytearray()
        self._filled = 0

    def provide(self, chunks: Iterable[bytes]) -> None:
        """All verified chunks, in the order of `bases`."""
        for chunk in chunks:
            self.add(chunk)

    def add(self, chunk: bytes) -> None:
        """The next verified chunk. It is copied: whoever gives one after the other needs to hold but one."""
        if not self._filled:
            self._base = bytearray(self.size)
        if self._filled + len(chunk) <= self.size:
            self._base[self._filled : self._filled + len(chunk)] = chunk
        self._filled += len(chunk)

    def take(self) -> bytearray | None:
        """All of them one after another, once: whoever keeps this event shall not keep the bases. None if incomplete."""
        base, self._base = self._base, bytearray()
        return base if self._filled == self.size == len(base) else None


class BaseMissingError(FrameError):
    """A run builds on chunks that are not here (any more). Plain encodings of it can be taken."""


Event = Received | RunRefused | NotSent | Aborted | NeedsBases | Whole

Resolve = Callable[[ManifestId], Manifest | None]
"""Which manifests the receiver knows: a frame may speak of no other."""

Wanted = Callable[[ManifestId, int], bool]
"""Whether the receiver asked for this chunk."""

Offered = Callable[[ManifestId, int], bool]
"""Whether the receiver named this chunk as a base."""


class Sink(Protocol):
    """Gets the payload of one run as it came, stretch by stretch, behind the decoder."""

    def add(self, piece: bytes) -> None:
        """Bytes that were decoded without fault."""

    def finish(self) -> None:
        """All chunks of the run were verified."""

    def fail(self) -> None:
        """The run was refused or cut off. Nothing follows."""


Tap = Callable[[Places, Places, Encoding], Sink | None]
"""Asked with (run, bases, encoding) when a run begins: who wants its payload as it came?"""


def _encoding(name: str) -> Encoding:
    if name not in ENCODINGS:
        raise FrameError(f"encoding {name[:20]!r}: expected one of {', '.join(ENCODINGS)}")
    return name


class BundleDecoder:
    """Feed it the body as it comes, and walk what each piece of it holds to the end before the next piece.

    Each chunk is named at most once in a bundle, and no payload is larger than its run can need: so a bundle ends,
    whoever sends it.
    """

    def __init__(
        self,
        resolve: Resolve,
        wanted: Wanted = lambda *_: True,
        tap: Tap = lambda *_: None,
        offered: Offered = lambda *_: True,
    ) -> None:
        self._resolve = resolve
        self._wanted = wanted
        self._offered = offered
        self._tap = tap
        self._unread = memoryview(b"")
        """Of what was fed last."""
        self._events = self._read()
        self._run: _RunDecoder | None = None
        self._frames = 0
        self._headers = hashlib.sha256()
        self._named: set[tuple[ManifestId, int]] = set()
        self._bases_left = BASES_MAX
        self._broken: FrameError | None = None
        self.ended = False

    def feed(self, data: bytes) -> Iterator[list[Event]]:
        """What the next bytes hold: batches of events, none empty, each decoded when it is asked for.

        Raises:
            FrameError: they break the format, for good. What was found before comes before it.
        """
        self._unread = memoryview(data)
        batch: list[Event] = []
        size = 0
        try:
            for event in self._events:
                if event is None:
                    break
                batch.append(event)
                size += event.chunk.size if isinstance(event, Received) else 0
                if size >= BATCH_BYTES or isinstance(event, NeedsBases):
                    yield batch
                    batch, size = [], 0
        except FrameError as error:
            self._broken = error
            self.abandon()
        if batch:
            yield batch
        if self._broken is not None:
            raise self._broken

    def finish(self) -> None:
        """The body is over.

        Raises:
            FrameError: it was cut off.
        """
        self.abandon()
        if not self.ended:
            raise FrameError("the bundle was cut off before its end frame")

    def abandon(self) -> None:
        """Nothing more will come. What was handed out counts; harmless where the bundle came to its end."""
        if self._run is not None:
            self._run.abandon(FrameError("the bundle was cut off in a run"))
            self._run = None

    # --- the format, top down: what is read yields None where it has to wait for more bytes

    def _read(self) -> Iterator[Event | None]:
        magic = yield from self._take(len(MAGIC))
        if magic != MAGIC:
            raise FrameError(f"not a bundle: it starts with {magic!r}")
        while not self.ended:
            match (yield from self._read_header()):
                case Data() as header:
                    yield from self._read_run(header)
                case More():
                    raise FrameError("the middle of a payload without its beginning")
                case Missing() as header:
                    yield self._not_sent(header)
                case Failed() as header:
                    yield Aborted(header.code[:100])
                case End() as header:
                    yield self._end(header)
        while not self._unread:
            yield None
        raise FrameError("bytes after the end of the bundle")

    def _read_run(self, header: Data) -> Iterator[Event | None]:
        encoding = _encoding(header.encoding)
        targets, size = [], 0
        for manifest, index in self._walk(header.run):
            entry = self._manifest(manifest).chunks[index]
            targets.append((manifest, index, entry))
            size += entry.size
            if size > RUN_MAX:
                raise FrameError(f"a run of more than {RUN_MAX} bytes")
        if not targets:
            raise FrameError("a data frame with an empty run")
        self._run = run = _RunDecoder(targets, size)
        run.begin_stretch(header)
        yield from self._begin_run(run, header, encoding, size)
        yield from self._read_payload(run, header.length)
        more = header.more
        while more:
            following = yield from self._read_header()
            if isinstance(following, Failed):
                yield from run.abandon(CutShortError("its sender could not go on"))
                yield Aborted(following.code[:100])
                break
            if not isinstance(following, More):
                raise FrameError("another frame in the middle of a payload")
            run.begin_stretch(following)
            yield from self._read_payload(run, following.length)
            more = following.more
        yield from run.finish()
        self._run = None

    def _begin_run(self, run: _RunDecoder, header: Data, encoding: Encoding, size: int) -> Iterator[Event]:
        bases, base_size = self._bases(header, size)
        base: bytes | bytearray = b""
        if bases:
            self._bases_left -= max(0, base_size - BASES_FACTOR * size)
            if self._bases_left < 0:
                yield from run.abandon(FrameError(f"a bundle of small runs on more than {BASES_MAX} bytes of bases"))
                return
            wanted = NeedsBases(bases, encoding, base_size)
            yield wanted
            answer = wanted.take()
            if answer is None:
                yield from run.abandon(BaseMissingError("a run builds on chunks that are not here"))
                return
            base = answer
        run.begin(decoder_for(encoding, size, base), self._tap(run.places, bases, encoding))

    def _read_payload(self, run: _RunDecoder, left: int) -> Iterator[Event | None]:
        while left:
            if not self._unread:
                yield None
            piece, self._unread = self._unread[:left], self._unread[left:]
            left -= len(piece)
            yield from run.feed(piece)
        run.end_stretch()

    def _read_header(self) -> Generator[None, None, Header]:
        (length,) = _LENGTH.unpack((yield from self._take(_LENGTH.size)))
        if not 0 < length <= HEADER_MAX:
            raise FrameError(f"frame header of {length} bytes: expected 1 to {HEADER_MAX}")
        packed = yield from self._take(length)
        try:
            header = _header_decoder.decode(packed)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FrameError(f"unreadable frame header: {error}") from error
        if not isinstance(header, End):
            self._frames += 1
            self._headers.update(packed)
        return header

    def _take(self, size: int) -> Generator[None, None, bytes]:
        """Just so many bytes."""
        taken = bytearray()
        while len(taken) < size:
            if not self._unread:
                yield None
            left = size - len(taken)
            taken += self._unread[:left]
            self._unread = self._unread[left:]
        return bytes(taken)

    # --- what headers say

    def _not_sent(self, header: Missing) -> NotSent:
        run = tuple(self._walk(header.run))
        if not run:
            raise FrameError("a missing frame with an empty run")
        return NotSent(run, header.reason)

    def _end(self, header: End) -> Whole:
        if (header.frames, header.sha256) != (self._frames, self._headers.digest()):
            raise FrameError("the end frame does not match the frames before it")
        self.ended = True
        return Whole(self._frames)

    def _bases(self, header: Data, size: int) -> tuple[Places, int]:
        """The bases of a run of `size` bytes, and their bytes."""
        if header.encoding not in DELTAS:
            if header.bases:
                raise FrameError(f"encoding {header.encoding[:20]} takes no bases")
            return (), 0
        bases: list[tuple[ManifestId, int]] = []
        base_size = 0
        for span in header.bases:
            manifest = self._span_manifest(span)
            if len(bases) + rg.count(span.ranges) > PLACES_MAX:
                raise FrameError(f"a run that names more than {PLACES_MAX} bases")
            for index in rg.indexes(span.ranges):
                if not self._offered(manifest.id, index):
                    raise FrameError(f"a run builds on chunk {index} of {manifest.id[:16]}…, which was never offered")
                base_size += manifest.chunks[index].size
                if size + base_size > RUN_AND_BASES_MAX:
                    raise FrameError(f"a run and bases of more than {RUN_AND_BASES_MAX} bytes")
                bases.append((manifest.id, index))
        if not bases:
            raise FrameError(f"encoding {header.encoding} without bases")
        return tuple(bases), base_size

    def _walk(self, run: tuple[Span, ...]) -> Iterator[tuple[ManifestId, int]]:
        for span in run:
            manifest = self._span_manifest(span)
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

    def _span_manifest(self, span: Span) -> Manifest:
        if len(span.manifest) != 32:
            raise FrameError("a manifest digest that is not 32 bytes")
        manifest = self._manifest(span.manifest_id)
        rg.check(span.ranges, len(manifest.chunks))
        return manifest

    def _manifest(self, id: ManifestId) -> Manifest:
        manifest = self._resolve(id)
        if manifest is None:
            raise FrameError(f"a frame speaks of manifest {id[:16]}…, which is not known here")
        return manifest


class _RunDecoder:
    """Decodes one payload as it comes. Each chunk is handed out, verified, with its last byte."""

    def __init__(self, targets: Iterable[tuple[ManifestId, int, ChunkEntry]], size: int) -> None:
        self._decoder: Decoder | None = None
        self._sink: Sink | None = None
        self._targets = deque(targets)
        self._last = self._targets[-1][:2]
        self._payload_max = size + (size >> 8) + _ENCODING_COST
        self._size = size
        self._pending = BytesIO()
        self._announced = 0
        self._fed = 0
        self._told = 0
        self._xxh3 = xxhash.xxh3_64()
        self._said = 0
        self._damaged = False
        self._dead = False

    @property
    def places(self) -> Places:
        """The chunks that are still to come."""
        return tuple((manifest, index) for manifest, index, _ in self._targets)

    def begin(self, decoder: Decoder, sink: Sink | None) -> None:
        self._decoder, self._sink = decoder, sink

    def begin_stretch(self, header: Data | More) -> None:
        """Raises `FrameError`: the payload is empty, or longer than its run can need."""
        if not 0 < header.length <= PAYLOAD_MAX:
            raise FrameError(f"payload of {header.length} bytes: expected 1 to {PAYLOAD_MAX}")
        self._announced += header.length
        if self._announced > self._payload_max:
            raise FrameError(f"payload of {self._announced} bytes for a run of {self._size}")
        self._said = header.xxh3
        self._xxh3.reset()

    def end_stretch(self) -> None:
        self._damaged = self._damaged or self._xxh3.intdigest() != self._said

    def feed(self, data: memoryview) -> Iterator[Event]:
        self._xxh3.update(data)
        self._fed += len(data)
        if self._dead or self._decoder is None:
            return
        try:
            for found in self._decoder.feed(data):
                yield from self._take(memoryview(found))
        except (FrameError, ChunkInvalid) as error:
            yield from self.abandon(error)
            return
        if self._sink is not None:
            self._sink.add(bytes(data))

    def finish(self) -> Iterable[Event]:
        if self._dead or self._decoder is None:
            return ()
        if self._targets:
            why = "its payload was damaged on the way" if self._damaged else "its payload holds less than it names"
            return self.abandon(FrameError(f"a run ended early: {why}"))
        if not self._decoder.is_whole:
            return self.abandon(FrameError("a payload without its end"))
        if self._sink is not None:
            self._sink.finish()
        return ()

    def abandon(self, error: FrameError | ChunkInvalid) -> Iterable[Event]:
        """Take nothing more of this run: its refusal, if it was not refused before. What was handed out of it counts."""
        if self._dead:
            return ()
        self._dead = True
        # The refusal may be kept for long; the bases and the window need not be.
        self._decoder = None
        self._pending = BytesIO()
        if self._sink is not None:
            self._sink.fail()
        return (RunRefused(self.places or (self._last,), error),)

    def _take(self, data: memoryview) -> Iterator[Event]:
        """Raises `ChunkInvalid`: a chunk has other bytes than its name says."""
        while data:
            manifest, index, entry = self._targets[0]
            taken = min(len(data), entry.size - self._pending.tell())
            self._pending.write(data[:taken])
            data = data[taken:]
            if self._pending.tell() < entry.size:
                return
            # Its buffer becomes the chunk, without a copy.
            pending, self._pending = self._pending, BytesIO()
            chunk = Chunk(ChunkId(entry.id), pending.getvalue())
            self._targets.popleft()
            yield Received(manifest, index, chunk, self._fed - self._told)
            self._told = self._fed


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
