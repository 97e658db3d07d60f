"""A nupkg cut into chunks: what enters a depot, and what is compared with what is there."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterator
from typing import BinaryIO

from relay.errors import UsageError
from relay.package import chunking
from relay.package.chunk import Chunk
from relay.package.chunking import PartDigest
from relay.package.manifest import Manifest, ManifestBuilder, NupkgDigests
from relay.package.nuspec import Nuspec
from relay.package.zip_reader import DEFAULT_LIMITS, Entry, WalkLimits, read_nuspec, read_part, walk

BATCH_BYTES = 8 << 20
"""Chunks that are handed over in one go."""
_READ = 1 << 20
_EXECUTABLE_STARTS = (b"\x7fELF", b"#!")


def open_nupkg(path: str) -> BinaryIO:
    """Raises `UsageError` where `path` cannot be read."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="Expected the path of a .nupkg file") from error


def digests_of(file: BinaryIO) -> NupkgDigests:
    """What the whole file hashes to. Blocking."""
    sha256, sha512 = hashlib.sha256(), hashlib.sha512()
    size = 0
    file.seek(0)
    while piece := file.read(_READ):
        sha256.update(piece)
        sha512.update(piece)
        size += len(piece)
    return NupkgDigests(size, sha256.hexdigest(), b64encode(sha512.digest()).decode())


def read_directory(file: BinaryIO, limits: WalkLimits = DEFAULT_LIMITS) -> tuple[list[Entry], Nuspec]:
    """The parts, checked, and the nuspec. Raises `ArchiveError`, `MetadataError`. Blocking."""
    entries = list(walk(file, limits))
    return entries, read_nuspec(file, entries)


def compressed_digest(file: BinaryIO, entry: Entry) -> str:
    """SHA-256 (hex) of a part's bytes as they lie in the file. Blocking."""
    file.seek(entry.data_offset)
    digest, left = hashlib.sha256(), entry.compressed_size
    while left and (piece := file.read(min(left, _READ))):
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()


class NupkgCutter:
    """Turns one nupkg into batches of chunks, and in the end into its manifest. Blocking."""

    def __init__(self, file: BinaryIO, entries: list[Entry], builder: ManifestBuilder) -> None:
        self._file = file
        self._entries = sorted(entries, key=lambda entry: chunking.stream_key(entry.path))
        self._builder = builder
        self._starts: dict[str, bytes] = {}
        self._cuts = chunking.cut(self._entries, lambda e: e.path, lambda e: e.size, self._read)

    def next_batch(self) -> list[Chunk]:
        """Some `BATCH_BYTES` of chunks in stream order; empty at the end."""
        batch: list[Chunk] = []
        size = 0
        for found in self._cuts:
            if isinstance(found, PartDigest):
                self._builder.saw_part(found)
                continue
            self._builder.saw_chunk(found)
            batch.append(found)
            size += found.size
            if size >= BATCH_BYTES:
                break
        return batch

    def manifest(self) -> Manifest:
        return self._builder.build(self._entries, [self._is_executable(entry) for entry in self._entries])

    def _read(self, entry: Entry) -> Iterator[bytes]:
        start = b""
        for piece in read_part(self._file, entry):
            if len(start) < 4:
                start += piece[:4]
            yield piece
        self._starts[entry.path] = start[:4]

    def _is_executable(self, entry: Entry) -> bool:
        return entry.executable_bit or self._starts.get(entry.path, b"").startswith(_EXECUTABLE_STARTS)
