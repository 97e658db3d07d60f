"""From parts to the tree stream, and from the tree stream to chunks. Format 1; its bounds are settled here.

The stream's order brings like to like: parts are sorted by their masked file name first, so that the same library
built for five frameworks stands side by side, and `…/10.0.13/x.dll` meets `…/10.0.14/x.dll`.

A large part is a chunk of its own, whatever stands around it, so that one library is one chunk in every package.
Above 4 MiB it is cut by content (FastCDC, Xia et al., USENIX ATC 2016, as in the PyPI package `fastcdc`).
Small neighbours are gathered; where a gathering ends depends on the name of its last part, not on what came before,
so that a new small part moves one boundary and not all that follow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

import xxhash

from relay.package.chunk import CHUNK_MAX, Chunk
from relay.package.identity import Sha256

FORMAT = 1
"""Fixes the order of parts and the bounds of chunks: the same nupkg gives the same manifest everywhere."""

LARGE_PART = 64 << 10
"""Bytes. From here on a part is a chunk of its own."""
CDC_MIN, CDC_AVERAGE, CDC_MAX = 1 << 20, 2 << 20, CHUNK_MAX
"""Bytes. The bounds for parts above `CDC_MAX`."""
GATHER_MIN, GATHER_MAX = 256 << 10, 1 << 20
"""Bytes. Small parts are gathered until the lower bound and a boundary by name, or the upper bound."""
GATHER_EVERY = 8
"""One masked path in so many ends a gathering."""

_DIGITS_AND_DOTS = re.compile(r"[0-9.]+")
_CONTAINER = re.compile(
    r"\[Content_Types\]\.xml|\.signature\.p7s|[^/]*(?i:\.nuspec)|(?i:_rels)/\.rels|(?i:package/services/metadata)/.+\.psmdcp",
    re.DOTALL,
)
_LAST_FOLDERS = ("_rels/", "package/")
_LAST_FILES = ("[content_types].xml", ".signature.p7s")
_CDC_BUFFER = 2 * CDC_MAX

P = TypeVar("P")


def mask(text: str) -> str:
    """`text` with each run of digits and dots as one mark, so that versions do not matter."""
    return _DIGITS_AND_DOTS.sub("#", text)


def is_container(path: str) -> bool:
    """Whether the part belongs to the zip container and not to the tree of files: what OPC adds (NuGet leaves out the
    same, wherever they lie), the signature of the nupkg, and the root nuspec.
    """
    return _CONTAINER.fullmatch(path) is not None


def comes_last(path: str) -> bool:
    """Whether the part stands at the stream's end, in chunks that it shares with no other: what belongs to the container,
    and whatever has a name like it. That is part of the format; some of it are files of the tree.
    """
    lowered = path.lower()
    is_root_nuspec = "/" not in lowered and lowered.endswith(".nuspec")
    return is_root_nuspec or lowered.startswith(_LAST_FOLDERS) or lowered in _LAST_FILES


def stream_key(path: str) -> tuple[bool, str, str, str]:
    """The sort key of the tree stream: what comes last, then masked name, masked path, path."""
    return (comes_last(path), mask(path.rpartition("/")[2]), mask(path), path)


def ends_gathering(path: str) -> bool:
    return xxhash.xxh3_64_intdigest(mask(path).encode()) % GATHER_EVERY == 0


@dataclass(frozen=True, slots=True)
class PartDigest:
    """What was learnt of one part (by its place in stream order) as it passed."""

    index: int
    sha256: Sha256


def cut(
    parts: Sequence[P],
    path_of: Callable[[P], str],
    size_of: Callable[[P], int],
    read: Callable[[P], Iterable[bytes]],
) -> Iterator[Chunk | PartDigest]:
    """Cut `parts`, given in stream order, into chunks. Each part's `PartDigest` follows the last chunk that holds it.

    Holds at most 16 MiB at a time, twice the buffer that cutting by content needs. Errors of `read` pass through.
    """
    waiting: list[PartDigest] = []
    gathered = bytearray()

    def flush() -> Iterator[Chunk | PartDigest]:
        if gathered:
            yield Chunk.of(bytes(gathered))
            gathered.clear()
        yield from waiting
        waiting.clear()

    is_last = False
    for index, part in enumerate(parts):
        path, size = path_of(part), size_of(part)
        if comes_last(path) != is_last:
            is_last = True
            yield from flush()
        if size >= LARGE_PART:
            yield from flush()
            yield from _cut_large(index, size, read(part))
            continue
        if len(gathered) + size > GATHER_MAX:
            yield from flush()
        data = b"".join(read(part))
        gathered += data
        waiting.append(PartDigest(index, Sha256(sha256(data).hexdigest())))
        if len(gathered) >= GATHER_MIN and ends_gathering(path):
            yield from flush()
    yield from flush()


def _cut_large(index: int, size: int, pieces: Iterable[bytes]) -> Iterator[Chunk | PartDigest]:
    if size <= CDC_MAX:
        chunk = Chunk.of(b"".join(pieces))
        yield chunk
        yield PartDigest(index, Sha256(chunk.id))
        return
    digest = sha256()
    for data in _cut_by_content(pieces):
        digest.update(data)
        yield Chunk.of(data)
    yield PartDigest(index, Sha256(digest.hexdigest()))


def _cut_by_content(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """FastCDC over a stream: where a chunk ends depends on its own bytes alone, so a buffer that holds `CDC_MAX`
    bytes from its start gives the same cut as the whole part would.
    """
    from fastcdc import fastcdc

    buffer = bytearray()
    source = iter(pieces)
    exhausted = False
    while not exhausted or buffer:
        while not exhausted and len(buffer) < _CDC_BUFFER:
            piece = next(source, None)
            if piece is None:
                exhausted = True
            else:
                buffer += piece
        view = bytes(buffer)
        consumed = 0
        for found in fastcdc(view, CDC_MIN, CDC_AVERAGE, CDC_MAX):
            if not exhausted and len(view) - found.offset < CDC_MAX:
                break
            yield view[found.offset : found.offset + found.length]
            consumed = found.offset + found.length
        del buffer[:consumed]
