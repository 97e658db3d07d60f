"""What is found out when a package is published: how its nupkg can be made again, and the proof that it can."""

from __future__ import annotations

import asyncio
import hashlib
import os
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, suppress
from typing import BinaryIO, Final, TypeVar

from relay.engines.encoders import EncoderDiedError, Encoders
from relay.package.manifest import Manifest
from relay.package.part_reader import PIECE
from relay.package.recipe import (
    ENCODER_FEEDINGS,
    RECIPE_MAX,
    STORED_AS_IS,
    VERBATIM,
    Canonical,
    Feeding,
    LiteralRecords,
    Recipe,
    encode_recipe,
    opaque,
    steps,
)
from relay.package.zip_reader import Entry, read_part, walk
from relay.package.zip_records import DEFLATED, STORED
from relay.rebuild.zip_layout import Layout, compose, describe, pieces_of, verbatim_bytes
from relay.support.progress import Progress
from relay.support.together import together

_OPAQUE_FROM: Final = 0.95
"""Share of the nupkg that is verbatim, from which on the nupkg itself is the better blob: it needs no rebuild."""
_SYNC_END: Final = b"\0\0\xff\xff\3\0"
"""How deflate ends that was flushed before: an empty stored block, then an empty last one (RFC 1951)."""

T = TypeVar("T")


async def find_recipe(
    path: str | os.PathLike[str], manifest: Manifest, encoders: Encoders, progress: Progress | None = None
) -> Recipe:
    """How the nupkg at `path` can be made again with these encoders. The answer was proved: all of it, byte for byte.

    Parts are tried side by side, each with the encoder of most bytes so far first; one is given up at the first byte
    that differs. Where encoders make next to nothing of a nupkg, or the whole does not come out, it is opaque.

    Args:
        path: of the file that `manifest` was made of; it must not change meanwhile.
        manifest: its.
        encoders: what to try; those that are missing here are not found.
        progress: is told after each part.

    Raises:
        ArchiveError: the file is not a package.
        OSError: it cannot be read.
    """
    with _opened(path) as file:
        entries = await asyncio.to_thread(walk, file)
        forms = await asyncio.to_thread(lambda: list(describe(file, entries, manifest)))
        if not forms:
            return opaque(manifest)
        made = await _find_encoders(path, manifest, entries, encoders, progress)
        verbatim = sum(entry.compressed_size for entry, way in zip(entries, made, strict=True) if way[0] == VERBATIM)
        if verbatim > _OPAQUE_FROM * manifest.nupkg.size:
            return opaque(manifest)
        for records in forms:
            recipe = await asyncio.to_thread(_complete, file, records, entries, manifest, made)
            small = len(encode_recipe(recipe)) <= RECIPE_MAX
            if small and await asyncio.to_thread(_gives, file, recipe, entries, manifest, made):
                return recipe
    return opaque(manifest)


def _complete(
    file: BinaryIO,
    records: Canonical | LiteralRecords,
    entries: Sequence[Entry],
    manifest: Manifest,
    made: Sequence[tuple[str, Feeding]],
) -> Recipe:
    """The recipe, its blob named."""
    recipe = compose(records, entries, manifest, made, bytes(32))
    digest = hashlib.sha256()
    for data in verbatim_bytes(file, entries, recipe, manifest):
        digest.update(data)
    has_blob = any(way[0] == VERBATIM for way in made)
    return compose(records, entries, manifest, made, digest.digest() if has_blob else None)


def _gives(
    file: BinaryIO,
    recipe: Recipe,
    entries: Sequence[Entry],
    manifest: Manifest,
    made: Sequence[tuple[str, Feeding]],
) -> bool:
    """Whether the recipe, read as a rebuild reads it, gives the file's SHA-512.

    The parts' bytes are taken out of the file: each of them was compared with what its encoder makes, just now, to the
    last byte. All that is left to be wrong is what stands around them, their order, and which encoder is named where.
    """
    layout, digest = Layout(recipe, manifest), hashlib.sha512()
    for step, entry, way in zip(steps(recipe, manifest), entries, made, strict=True):
        if (manifest.parts[step.part].path, (step.encoder, step.feeding)) != (entry.path, way):
            return False
        digest.update(layout.before(entry.crc32, entry.compressed_size))
        for piece in pieces_of(file, entry.data_offset, entry.compressed_size):
            digest.update(piece)
    digest.update(layout.after())
    return b64encode(digest.digest()).decode() == manifest.nupkg.sha512


async def _find_encoders(
    path: str | os.PathLike[str],
    manifest: Manifest,
    entries: Sequence[Entry],
    encoders: Encoders,
    progress: Progress | None,
) -> list[tuple[str, Feeding]]:
    """Encoder and feeding of each entry.

    Small parts often come out the same from several encoders. As the largest are settled first, and the encoder of most
    bytes is tried first, a package names no more encoders than it must.
    """
    fitted = Counter[str]()
    largest_first = iter(sorted(range(len(entries)), key=lambda index: -entries[index].compressed_size))
    found: list[tuple[str, Feeding]] = [(VERBATIM, "")] * len(entries)
    done = 0

    async def work() -> None:
        nonlocal done
        for index in largest_first:
            entry = entries[index]
            names = sorted(encoders.names(), key=lambda name: -fitted[name])
            found[index] = name, _ = await _find_encoder(path, entry, names, encoders)
            fitted[name] += entry.compressed_size
            done += entry.compressed_size
            if progress:
                progress(done, manifest.nupkg.size)

    await together(work() for _ in range(encoders.workers))
    return found


async def _find_encoder(
    path: str | os.PathLike[str], entry: Entry, names: list[str], encoders: Encoders
) -> tuple[str, Feeding]:
    if entry.method == STORED or not entry.compressed_size:
        return STORED_AS_IS, ""
    if entry.method != DEFLATED:
        return VERBATIM, ""
    raw = await asyncio.to_thread(_raw_end, path, entry)
    flushed = raw == _SYNC_END
    for feeding in ENCODER_FEEDINGS:
        for name in names:
            if (feeding != "whole") == flushed and await _fits(path, entry, name, feeding, encoders):
                return name, feeding
    return VERBATIM, ""


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    return open(path, "rb")


def _raw_end(path: str | os.PathLike[str], entry: Entry) -> bytes:
    with _opened(path) as file:
        size = min(len(_SYNC_END), entry.compressed_size)
        file.seek(entry.data_offset + entry.compressed_size - size)
        return file.read(size)


async def _fits(path: str | os.PathLike[str], entry: Entry, name: str, feeding: Feeding, encoders: Encoders) -> bool:
    """Whether the encoder makes just the entry's bytes. One that dies over them twice does not."""
    for _ in range(2):
        with suppress(EncoderDiedError):
            return await _makes(path, entry, name, feeding, encoders)
    return False


async def _makes(path: str | os.PathLike[str], entry: Entry, name: str, feeding: Feeding, encoders: Encoders) -> bool:
    left = entry.compressed_size
    with _opened(path) as file:
        file.seek(entry.data_offset)
        async with (
            aclosing(_content(path, entry)) as content,
            aclosing(encoders.encode(name, feeding, content)) as made,
        ):
            async for data in made:
                left -= len(data)
                if left < 0 or file.read(len(data)) != data:
                    return False
    return left == 0


async def _content(path: str | os.PathLike[str], entry: Entry) -> AsyncGenerator[bytes, None]:
    with _opened(path) as file:
        async for data in _in_threads(read_part(file, entry, PIECE)):
            yield data


async def _in_threads(pieces: Iterator[T]) -> AsyncIterator[T]:
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece
