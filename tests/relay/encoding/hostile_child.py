"""Decode one hostile bundle in a process that may have 256 MiB of address space and SECONDS of a core, and say how.

Run by test_hostile_frames.py: python hostile_child.py CASE SECONDS. What a case sends is made while it is read: none of it is
held. Answers with one JSON object: what was received, the refusals, the error, and the peak of memory.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec
import xxhash
from harness.bundle_kit import EMPTY_BLOCK, ZSTD_HEAD, covers_list, giant_window, manifest_of

from relay.encoding.bundle import BundleDecoder, BundleWriter, Data, More, NeedsBases, Received, RunRefused, Span
from relay.errors import FrameError
from relay.package.chunk import CHUNK_MAX, Chunk
from relay.package.manifest import ChunkEntry, Manifest
from relay.support.zstd import zstd

MEMORY = 256 << 20
MIB = 1 << 20
PIECE = 64 << 10
ZEROS = Chunk.of(bytes(CHUNK_MAX))
DOT = Chunk.of(b".")
CONTENT = {ZEROS.id: ZEROS.data, DOT.id: DOT.data}
RUNS = manifest_of([ChunkEntry(ZEROS.id, CHUNK_MAX)] * 200, "Run")
BASES = manifest_of([ChunkEntry(ZEROS.id, CHUNK_MAX)] * 16, "Bases")
DOTS = manifest_of([ChunkEntry(DOT.id, 1)] * 250_000, "Dots")
Pieces = Iterator[bytes]


def span(manifest: Manifest, start: int, stop: int) -> Span:
    return Span(bytes.fromhex(manifest.id), ((start, stop),))


class Digest:
    """Sends frames, and the end that fits them."""

    def __init__(self) -> None:
        self.writer = BundleWriter()

    def frame(self, header: msgspec.Struct, pieces: Pieces | tuple[bytes, ...] = ()) -> Pieces:
        yield self.writer.frame(header)
        yield from pieces

    def run(self, encoding: str, mib: int, base_mib: int, length: int, pieces: Pieces, *, at: int = 0) -> Pieces:
        """A run of so many MiB of zeros on so many MiB of zeros; the digest of the payload is not looked at before its end."""
        bases = (span(BASES, 0, base_mib // 4),) if base_mib else ()
        yield from self.frame(Data((span(RUNS, at, at + mib // 4),), bases, encoding, length, 0), pieces)


def whole(frames: Callable[[Digest], Pieces]) -> Pieces:
    digest = Digest()
    yield digest.writer.start()
    yield from frames(digest)
    yield digest.writer.end()


def one(encoding: str, mib: int, base_mib: int, payload: Callable[[], Pieces]) -> Callable[[], Pieces]:
    """A bundle of one run, and a good one behind it, whose length is found by making the payload twice."""

    def frames(digest: Digest) -> Pieces:
        length = sum(map(len, payload()))
        yield from digest.run(encoding, mib, base_mib, length, payload())
        good = zstd.compress(ZEROS.data)
        yield from digest.run("zstd", 4, 0, len(good), iter([good]), at=100)

    return lambda: whole(frames)


def compressed(size: int, **options: int) -> Pieces:
    """A zstd frame over so many zeros, made piece by piece."""
    made = zstd.ZstdCompressor(options={zstd.CompressionParameter[name]: value for name, value in options.items()})
    for at in range(0, size, MIB):
        yield made.compress(bytes(min(MIB, size - at)))
    yield made.flush()


def hdiff(covers: bytes, difference: Callable[[], Pieces]) -> Callable[[], Pieces]:
    packed = zstd.compress(covers)

    def payload() -> Pieces:
        yield struct.pack("<I", len(packed)) + packed
        yield from difference()

    return payload


def blocks_of_nothing(size: int) -> Callable[[], Pieces]:
    piece = EMPTY_BLOCK * (PIECE // 3)

    def payload() -> Pieces:
        yield ZSTD_HEAD
        for _ in range(size // len(piece)):
            yield piece

    return payload


def small_runs_on_large_bases(digest: Digest) -> Pieces:
    payload = zstd.compress(b".")
    for i in range(1000):
        header = Data((span(DOTS, i, i + 1),), (span(BASES, 0, 15),), "zstd-prefix", len(payload), 0)
        yield from digest.frame(header, (payload,))


def bases_of_one_byte(digest: Digest) -> Pieces:
    yield from digest.frame(
        Data((span(RUNS, 0, 1),), (span(DOTS, 0, 250_000),) * 250, "zstd-prefix", 100, 0), (bytes(100),)
    )


def as_many_places_as_allowed(digest: Digest) -> Pieces:
    payload = zstd.compress(b"." * 250_000)
    yield from digest.frame(
        Data((span(DOTS, 0, 250_000),), (span(BASES, 0, 1),), "zstd-prefix", len(payload), 0), (payload,)
    )


def stretches_of_one_byte(digest: Digest) -> Pieces:
    payload = b"." * 100_000
    digest_of_dot = xxhash.xxh3_64_intdigest(b".")
    yield from digest.frame(Data((span(DOTS, 0, 100_000),), (), "raw", 1, digest_of_dot, more=True), (b".",))
    for i in range(1, len(payload)):
        yield from digest.frame(More(1, digest_of_dot, more=i + 1 < len(payload)), (b".",))


def more_without_end(digest: Digest) -> Pieces:
    yield from digest.frame(
        Data((span(RUNS, 0, 16),), (), "zstd", PIECE, 0, more=True), (ZSTD_HEAD.ljust(PIECE, b"\0"),)
    )
    while True:
        yield from digest.frame(More(PIECE // 3 * 3, 0, more=True), (EMPTY_BLOCK * (PIECE // 3),))


def too_much_memory() -> Pieces:
    held = [bytearray(MIB) for _ in range(MEMORY // MIB)]
    raise AssertionError(f"{len(held)} MiB were given: the limit does not bite")


def too_much_time() -> Pieces:
    while True:
        pass


LONG_LIST = covers_list([], count=699_048) + b"\0" * 2 * 699_048 + b"\1" * 699_048
CASES: dict[str, Callable[[], Pieces]] = {
    "limit of memory": too_much_memory,
    "limit of time": too_much_time,
    # As large as it may be, and good.
    "whole zstd": one("zstd", 64, 0, lambda: compressed(64 * MIB, window_log=26)),
    "whole prefix, even": one("zstd-prefix", 32, 32, lambda: compressed(32 * MIB, window_log=26)),
    "whole prefix, large base": one("zstd-prefix", 4, 60, lambda: compressed(4 * MIB, window_log=26)),
    "whole prefix, large run": one("zstd-prefix", 60, 4, lambda: compressed(60 * MIB, window_log=26)),
    "whole hdiff, even": one("hdiff", 32, 32, hdiff(covers_list([(0, 0, 32 * MIB)]), lambda: compressed(32 * MIB))),
    "whole hdiff, large base": one("hdiff", 4, 60, hdiff(covers_list([]), lambda: compressed(4 * MIB))),
    "whole hdiff, longest list": one("hdiff", 32, 32, hdiff(LONG_LIST, lambda: compressed(32 * MIB))),
    # As large as it may be, and bad.
    "giant window zstd": one("zstd", 64, 0, lambda: iter([giant_window(bytes(PIECE))])),
    "giant window prefix": one("zstd-prefix", 32, 32, lambda: iter([giant_window(bytes(PIECE))])),
    "giant window hdiff": one("hdiff", 32, 32, hdiff(covers_list([]), lambda: iter([giant_window(bytes(PIECE))]))),
    "bomb zstd": one("zstd", 64, 0, lambda: compressed(1024 * MIB)),
    "bomb prefix": one("zstd-prefix", 4, 60, lambda: compressed(1024 * MIB)),
    "bomb hdiff": one("hdiff", 4, 60, hdiff(covers_list([]), lambda: compressed(1024 * MIB))),
    "bomb list": one("hdiff", 32, 32, hdiff(bytes(32 * MIB), lambda: compressed(32 * MIB))),
    "nothing zstd": one("zstd", 64, 0, blocks_of_nothing(64 * MIB)),
    "nothing prefix": one("zstd-prefix", 32, 32, blocks_of_nothing(32 * MIB)),
    "nothing hdiff": one("hdiff", 32, 32, hdiff(covers_list([]), blocks_of_nothing(31 * MIB))),
    "small runs on large bases": lambda: whole(small_runs_on_large_bases),
    "bases of one byte": lambda: whole(bases_of_one_byte),
    "as many places as allowed": lambda: whole(as_many_places_as_allowed),
    "stretches of one byte": lambda: whole(stretches_of_one_byte),
    "more without end": lambda: whole(more_without_end),
}


def read(pieces: Pieces) -> dict[str, object]:
    manifests = {manifest.id: manifest for manifest in (RUNS, BASES, DOTS)}
    decoder = BundleDecoder(manifests.get)
    received, size, refusals, error = 0, 0, Counter[str](), None
    try:
        for piece in pieces:
            for batch in decoder.feed(piece):
                for event in batch:
                    if isinstance(event, NeedsBases):
                        event.provide(CONTENT[manifests[m].chunk_id(i)] for m, i in event.bases)
                    elif isinstance(event, Received):
                        received, size = received + 1, size + event.chunk.size
                    elif isinstance(event, RunRefused):
                        refusals[str(event.error)] += 1
        decoder.finish()
    except FrameError as broken:
        error = str(broken)
    return {"received": received, "bytes": size, "refused": refusals, "error": error}


def main() -> None:
    seconds = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    found = read(CASES[sys.argv[1]]())
    with open("/proc/self/status", encoding="ascii") as status:
        peaks = dict(line.split(":", 1) for line in status if line.startswith(("VmPeak", "VmHWM")))
    found["peak"] = {name: int(text.split()[0]) >> 10 for name, text in peaks.items()}
    found["seconds"] = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
