"""Runs, payloads and bundles as tests of the format make them: by its description, not by the code that is tested."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise

import msgspec
import xxhash

from relay.encoding.bundle import BundleDecoder, BundleWriter, Data, More, NeedsBases, Received, RunRefused, Span
from relay.errors import FrameError
from relay.package.chunk import Chunk
from relay.package.manifest import ChunkEntry, Manifest, ManifestBody, NupkgDigests, PackageName
from relay.support.zstd import zstd

# --- content


def manifest_of(entries: Sequence[ChunkEntry], name: str = "Acme.Web") -> Manifest:
    """A manifest of these chunks, as only they matter here."""
    digests = NupkgDigests(0, "0" * 64, "A" * 86 + "==")
    body = ManifestBody(1, PackageName(name, "1.0.0"), digests, tuple(entries), (), {})
    return Manifest(
        body, f"{name} {hashlib.sha256(''.join(entry.id for entry in entries).encode()).hexdigest()}".encode()
    )


class Pack:
    """Chunks and the manifest that names them."""

    def __init__(self, contents: Iterable[bytes], name: str = "Acme.Web") -> None:
        self.chunks = [Chunk.of(data) for data in contents]
        self.manifest = manifest_of([ChunkEntry(chunk.id, chunk.size) for chunk in self.chunks], name)

    def data(self, indexes: Iterable[int]) -> bytes:
        return b"".join(self.chunks[i].data for i in indexes)

    def span(self, indexes: Sequence[int]) -> Span:
        return Span.of(self.manifest.id, indexes)


def mixed(seed: int, size: int) -> bytes:
    """Bytes of which zstd makes about half, and no less."""
    return random.Random(seed).randbytes(size).translate(bytes(range(16)) * 16)


def edited(data: bytes, seed: int, edits: int) -> bytes:
    """`data` with so many small changes: bytes overwritten, taken out, put in."""
    rng, out = random.Random(seed), bytearray(data)
    for _ in range(edits):
        at = rng.randrange(len(out) + 1)
        out[at : at + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
    return bytes(out)


# --- the payload of `hdiff`, as docs/protocol.md tells it


def leb128(value: int) -> bytes:
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def zigzag(value: int) -> int:
    return 2 * value if value >= 0 else -2 * value - 1


def covers_list(covers: Sequence[tuple[int, int, int]], count: int | None = None) -> bytes:
    """The inflated list of `(old, new, length)`; `count` is what it says, true or not."""
    olds = [0, *(old + length for old, _, length in covers)]
    news = [0, *(new + length for _, new, length in covers)]
    numbers = [len(covers) if count is None else count]
    numbers += [zigzag(old - end) for (old, _, _), end in zip(covers, olds, strict=False)]
    numbers += [new - end for (_, new, _), end in zip(covers, news, strict=False)]
    numbers += [length for _, _, length in covers]
    return b"".join(map(leb128, numbers))


def patch(covers: bytes, difference: bytes) -> bytes:
    """A payload of a list of covers and a difference, both inflated."""
    packed = zstd.compress(covers)
    return struct.pack("<I", len(packed)) + packed + zstd.compress(difference)


def unpatch(payload: bytes, base: bytes, size: int) -> bytes:
    """The new bytes of a good payload: the description, word for word and byte by byte."""
    (length,) = struct.unpack_from("<I", payload)
    plain, difference = zstd.decompress(payload[4 : 4 + length]), zstd.decompress(payload[4 + length :])
    numbers, value, shift = [], 0, 0
    for byte in plain:
        value, shift = value | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            numbers.append(value)
            value = shift = 0
    count, columns = numbers[0], numbers[1:]
    predicted, old_end, new_end = bytearray(size), 0, 0
    for i in range(count):
        step, gap, run = columns[i], columns[count + i], columns[2 * count + i]
        old, new = old_end + (step // 2 if step % 2 == 0 else -(step + 1) // 2), new_end + gap
        for at in range(run):
            predicted[new + at] = base[old + at]
        old_end, new_end = old + run, new + run
    return bytes((a + b) % 256 for a, b in zip(predicted, difference, strict=True))


def decoded(decoder, payload: bytes, cuts: Iterable[int] = ()) -> bytes:
    """What a decoder gives for a payload that comes in these pieces. It must take it as whole."""
    out = bytearray()
    for piece in split(payload, cuts):
        for found in decoder.feed(memoryview(piece)):
            out += found
    assert decoder.is_whole
    return bytes(out)


def split(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def giant_window(content: bytes) -> bytes:
    """A zstd frame that asks for a window of 2^31 bytes: a header without a content size, and one raw block."""
    return struct.pack("<IBB", 0xFD2FB528, 0, (31 - 10) << 3) + struct.pack("<I", 1 | len(content) << 3)[:3] + content


EMPTY_BLOCK = b"\0\0\0"
"""A raw block of no bytes that is not the last one (RFC 8878, section 3.1.1.2)."""
ZSTD_HEAD = struct.pack("<IBB", 0xFD2FB528, 0, 7 << 3)
"""A frame header without a content size, window 2^17."""


# --- bundles


def stretches(run: Sequence[Span], bases: Sequence[Span], encoding: str, payload: bytes, cuts: Iterable[int] = ()):
    """`(header, piece)` pairs of one run whose payload comes in these stretches."""
    pieces = [piece for piece in split(payload, cuts) if piece] or [b""]
    for i, piece in enumerate(pieces):
        more, digest = i + 1 < len(pieces), xxhash.xxh3_64_intdigest(piece)
        if i == 0:
            yield Data(tuple(run), tuple(bases), encoding, len(piece), digest, more), piece
        else:
            yield More(len(piece), digest, more), piece


def bundle(*frames) -> bytes:
    """A whole bundle of `(header, payload)` pairs, bare headers, and iterables of pairs."""
    writer = BundleWriter()
    out = [writer.start()]
    for frame in frames:
        if isinstance(frame, msgspec.Struct):
            pairs = [(frame, b"")]
        elif isinstance(frame, tuple):
            pairs = [frame]
        else:
            pairs = frame
        for header, payload in pairs:
            out += [writer.frame(header), payload]
    return b"".join([*out, writer.end()])


class Reader:
    """Reads a bundle as a driver does, answers what runs build on, and keeps what came of it."""

    def __init__(self, *packs: Pack, answer: bool = True, tap=None, wanted=None) -> None:
        self.packs = {pack.manifest.id: pack for pack in packs}
        resolve = {pack.manifest.id: pack.manifest for pack in packs}.get
        more = {} if tap is None else {"tap": tap}
        self.decoder = BundleDecoder(resolve, wanted or (lambda *_: True), **more)
        self.answer = answer
        self.events = []
        self.asked = []
        self.error: FrameError | None = None

    def read(self, pieces: Iterable[bytes]) -> Reader:
        try:
            for piece in pieces:
                for batch in self.decoder.feed(piece):
                    self._take(batch)
            self.decoder.finish()
        except FrameError as error:
            self.error = error
        return self

    def _take(self, batch) -> None:
        assert batch
        assert not any(isinstance(event, NeedsBases) for event in batch[:-1])
        self.events += batch
        if isinstance(batch[-1], NeedsBases):
            self.asked.append(batch[-1])
            if self.answer:
                batch[-1].provide(self.packs[m].chunks[i].data for m, i in batch[-1].bases)

    @property
    def told(self) -> Iterator[tuple[object, ...]]:
        """Events without what depends on how the body was split."""
        for event in self.events:
            if isinstance(event, Received):
                # A chunk proves its own name when it is made; here that it is the right one.
                assert Chunk.of(event.chunk.data).id == self.packs[event.manifest].manifest.chunk_id(event.index)
                yield "received", event.manifest, event.index
            elif isinstance(event, RunRefused):
                yield "refused", event.run, str(event.error)
            elif isinstance(event, NeedsBases):
                yield "bases", event.bases, event.encoding
            else:
                yield (event,)

    @property
    def received(self) -> list[int]:
        return [event.index for event in self.events if isinstance(event, Received)]

    @property
    def refusals(self) -> list[RunRefused]:
        return [event for event in self.events if isinstance(event, RunRefused)]


# --- damage


def damaged(data: bytes, rng: random.Random) -> bytes:
    """`data` after one to four accidents: bits flipped, bytes lost, added, doubled, moved, or made extreme."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(out) + 1), rng.choice([1, 1, 2, 4, 8, rng.randrange(64)])
        kind = rng.randrange(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at : at + length]
        elif kind == 2:
            out[at:at] = rng.randbytes(length)
        elif kind == 3:
            out[at:at] = out[at : at + length]
        elif kind == 4:
            out[at : at + length] = bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFF])]) * length
        elif kind == 5:
            other = rng.randrange(len(out) + 1)
            out[at : at + length] = out[other : other + length]
        else:
            del out[at:]
    return bytes(out)


def joined(pieces: Iterable[Iterable[bytes]]) -> bytes:
    return b"".join(chain.from_iterable(pieces))
