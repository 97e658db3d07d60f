"""The manifest: the list of a package's parts and chunks in one canonical form, named by its SHA-256."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from relay.errors import ManifestError, WaystationError
from relay.package import chunking
from relay.package.chunk import CHUNK_MAX, Chunk
from relay.package.identity import (
    ChunkId,
    ManifestId,
    NuGetVersion,
    PackageId,
    PackageRef,
    Sha256,
    manifest_id,
    parse_digest,
)
from relay.package.part_names import NameLimits, check_paths
from relay.package.zip_reader import Entry
from relay.support.json_bounds import JsonTooDeepError, check_depth
from relay.support.zstd import FrameFault, inflate, prefix, zstd

MANIFEST_MAX = 64 << 20
"""Bytes of canonical JSON: 250,000 parts whose paths have 150 characters each."""
PACKED_MAX = 16 << 20
"""Bytes of a manifest on the wire, without a base: what half as much again would be for those parts."""
DEPTH_MAX = 16
"""Nesting of the canonical JSON."""
PARTS_MAX = 250_000
_CONTAINERS_MAX = 3 * PARTS_MAX
"""Objects and lists of the canonical JSON, each of which takes more memory than bytes. No package has as many chunks."""
PACKAGE_MAX = 4 << 30
"""Bytes of the tree stream, and of the nupkg."""

_WINDOW_LOG_MAX = 26
"""64 MiB: as far back as the same line of the largest base lies."""

_Hex = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Size = Annotated[int, Meta(ge=0, le=PACKAGE_MAX)]


class PackageName(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Id as its author writes it, version normalised."""

    id: str
    version: str


class NupkgDigests(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The package file itself: bytes, SHA-256 in hex, SHA-512 in base64 (as NuGet writes it)."""

    size: _Size
    sha256: _Hex
    sha512: Annotated[str, Meta(pattern=r"\A[A-Za-z0-9+/]{86}==\Z")]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One entry of the zip, inflated. `sha256` is there only where the part is not exactly one chunk."""

    path: str
    size: _Size
    sha256: _Hex | None = None
    executable: bool = False


class ChunkEntry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`[id, size]` of one chunk, in stream order."""

    id: _Hex
    size: Annotated[int, Meta(ge=1, le=CHUNK_MAX)]


class ManifestBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is written. See content.md of the design, or docs/protocol.md, for each field."""

    format: int
    package: PackageName
    nupkg: NupkgDigests
    chunks: tuple[ChunkEntry, ...]
    parts: tuple[Part, ...]
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of one part's bytes: `length` bytes from `offset` of part number `part`."""

    part: int
    offset: int
    length: int


class Manifest:
    """A manifest that was checked: canonical, consistent, and within every bound. Cheap to ask."""

    def __init__(self, body: ManifestBody, canonical: bytes) -> None:
        self.body = body
        self.chunks, self.parts, self.nupkg = body.chunks, body.parts, body.nupkg
        self.canonical = canonical
        self.id: ManifestId = manifest_id(canonical)
        self.package = PackageRef(PackageId.parse(body.package.id), NuGetVersion.parse(body.package.version))

    def chunk_id(self, index: int) -> ChunkId:
        return ChunkId(self.body.chunks[index].id)

    def chunk_ids(self) -> list[ChunkId]:
        return [ChunkId(entry.id) for entry in self.body.chunks]

    def size_of(self, places: Iterable[int]) -> int:
        """Bytes of these chunks."""
        return sum(self.body.chunks[index].size for index in places)

    @cached_property
    def index_of(self) -> dict[ChunkId, int]:
        """The first place of each chunk in the stream (a chunk may stand in several)."""
        found: dict[ChunkId, int] = {}
        for index, entry in enumerate(self.body.chunks):
            found.setdefault(ChunkId(entry.id), index)
        return found

    @cached_property
    def chunk_starts(self) -> list[int]:
        """Offset of each chunk in the tree stream, bytes."""
        return [0, *accumulate(entry.size for entry in self.body.chunks)][:-1]

    @cached_property
    def part_starts(self) -> list[int]:
        """Offset of each part in the tree stream, bytes."""
        return [0, *accumulate(part.size for part in self.body.parts)][:-1]

    @cached_property
    def stream_size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.body.parts)

    def is_in_tree(self, part: int) -> bool:
        """Whether the part is a file of the tree. The others belong to the container."""
        return not chunking.is_container(self.body.parts[part].path)

    @cached_property
    def tree_parts(self) -> list[int]:
        """The parts that are files of the tree, in stream order."""
        return [index for index in range(len(self.body.parts)) if self.is_in_tree(index)]

    @property
    def tree_paths(self) -> list[str]:
        return [self.body.parts[index].path for index in self.tree_parts]

    @cached_property
    def tree_size(self) -> int:
        """Bytes of the tree's files."""
        return sum(self.body.parts[index].size for index in self.tree_parts)

    @cached_property
    def tree_chunks(self) -> list[int]:
        """The chunks that an agent asks for, in stream order: those with bytes of the tree's files."""
        return [
            index
            for index, extents in enumerate(self.extents)
            if any(self.is_in_tree(extent.part) for extent in extents)
        ]

    @property
    def left_out(self) -> list[str]:
        """Paths of the parts that no tree has."""
        return [part.path for index, part in enumerate(self.body.parts) if not self.is_in_tree(index)]

    @cached_property
    def extents(self) -> list[list[Extent]]:
        """For each chunk, where its bytes lie in the parts, in order."""
        result: list[list[Extent]] = []
        part, into = 0, 0
        for entry in self.body.chunks:
            left, found = entry.size, []
            while left:
                room = self.body.parts[part].size - into
                if room == 0:
                    part, into = part + 1, 0
                    continue
                length = min(left, room)
                found.append(Extent(part, into, length))
                into += length
                left -= length
            result.append(found)
        return result

    def part_sha256(self, index: int) -> Sha256:
        """The digest of a part: its own, or the name of the one chunk that it is."""
        part = self.body.parts[index]
        if part.sha256 is not None:
            return Sha256(part.sha256)
        return Sha256(self.body.chunks[self.chunk_at[self.part_starts[index]]].id)

    @cached_property
    def chunk_at(self) -> dict[int, int]:
        """The index of the chunk that starts at an offset of the stream."""
        return {start: index for index, start in enumerate(self.chunk_starts)}

    def __repr__(self) -> str:
        return f"Manifest({self.package}, {self.id[:12]}…, {len(self.chunks)} chunks)"


def encode(body: ManifestBody) -> bytes:
    """The canonical form: sorted keys, no spaces, UTF-8, absent rather than null."""
    return msgspec.json.encode(body, order="sorted")


def parse(canonical: bytes) -> Manifest:
    """Take a manifest from outside.

    Raises:
        ManifestError: too large, too deep, not canonical, or not consistent in itself.
    """
    if len(canonical) > MANIFEST_MAX:
        raise ManifestError(f"manifest of {len(canonical)} bytes: expected at most {MANIFEST_MAX}")
    try:
        check_depth(canonical, DEPTH_MAX, _CONTAINERS_MAX)
        body = msgspec.json.decode(canonical, type=ManifestBody)
    except (msgspec.DecodeError, JsonTooDeepError, UnicodeDecodeError) as error:
        raise ManifestError(f"not a manifest: {error}") from error
    if body.format != chunking.FORMAT:
        raise ManifestError(
            f"manifest of format {body.format}: this version understands format {chunking.FORMAT}",
            hint="Update this side of Waystation",
        )
    if encode(body) != canonical:
        raise ManifestError("manifest is not in canonical form (sorted keys, no spaces, no duplicates)")
    try:
        manifest = Manifest(body, canonical)
        _check(manifest)
    except ManifestError:
        raise
    except WaystationError as error:
        raise ManifestError(f"manifest names what no package may hold: {error}") from error
    return manifest


def _demand(is_so: bool, fault: str) -> None:  # noqa: FBT001 - it reads as a sentence
    if not is_so:
        raise ManifestError(fault)


def _check(manifest: Manifest) -> None:
    body, size = manifest.body, manifest.stream_size
    _demand(
        manifest.package.version.normalized == body.package.version,
        f"version {body.package.version!r} is not normalised",
    )
    _demand(len(body.parts) <= PARTS_MAX, f"{len(body.parts)} parts: expected at most {PARTS_MAX}")
    _demand(size <= PACKAGE_MAX, f"{size} bytes of parts: expected at most {PACKAGE_MAX}")
    _demand(sum(entry.size for entry in body.chunks) == size, "chunks and parts do not cover the same stream")
    keys = [chunking.stream_key(part.path) for part in body.parts]
    is_ordered = all(before < after for before, after in pairwise(keys))
    _demand(is_ordered, "parts are not in stream order, or one is named twice")
    check_paths([part.path for part in body.parts], NameLimits())
    last = next((start for key, start in zip(keys, manifest.part_starts, strict=True) if key[0]), size)
    _demand(
        last == size or last in manifest.chunk_at, "a chunk holds both files of the tree and parts of the container"
    )
    _demand(len(set(body.chunks)) == len({entry.id for entry in body.chunks}), "one chunk has two sizes")
    for start, part in zip(manifest.part_starts, manifest.parts, strict=True):
        index = manifest.chunk_at.get(start)
        is_one_chunk = part.size > 0 and index is not None and manifest.chunks[index].size == part.size
        _demand(not is_one_chunk or part.sha256 is None, "a part that is one chunk repeats its digest")
        _demand(is_one_chunk or part.sha256 is not None, "a part that is not one chunk has no digest")


class ManifestBuilder:
    """Collects what passes while a nupkg is cut, and ends in its manifest."""

    def __init__(self, package: PackageRef, nupkg: NupkgDigests, metadata: dict[str, Any]) -> None:
        self._package = package
        self._nupkg = nupkg
        self._metadata = metadata
        self._chunks: list[ChunkEntry] = []
        self._digests: dict[int, Sha256] = {}

    def saw_chunk(self, chunk: Chunk) -> None:
        self._chunks.append(ChunkEntry(chunk.id, chunk.size))

    def saw_part(self, digest: chunking.PartDigest) -> None:
        self._digests[digest.index] = digest.sha256

    def build(self, entries: Sequence[Entry], executable: Iterable[bool]) -> Manifest:
        """The finished manifest; `entries` in stream order. Raises `ManifestError` where it would break a bound."""
        one_chunk = {
            (start, entry.size)
            for start, entry in zip(
                accumulate((entry.size for entry in self._chunks), initial=0), self._chunks, strict=False
            )
        }
        starts = accumulate((entry.size for entry in entries), initial=0)
        parts = tuple(
            Part(entry.path, entry.size, None if (start, entry.size) in one_chunk else self._digests[i], run)
            for i, (entry, run, start) in enumerate(zip(entries, executable, starts, strict=False))
        )
        body = ManifestBody(
            format=chunking.FORMAT,
            package=PackageName(str(self._package.id), self._package.version.normalized),
            nupkg=self._nupkg,
            chunks=tuple(self._chunks),
            parts=parts,
            metadata=self._metadata,
        )
        canonical = encode(body)
        if len(canonical) > PACKED_MAX:
            to_wire(canonical)
        return parse(canonical)


def parse_named(canonical: bytes, expected: str) -> Manifest:
    """A manifest that must carry the digest it was asked by.

    Raises:
        ManifestError: another digest, or not a manifest.
    """
    wanted = parse_digest(expected)
    found = manifest_id(canonical)
    if str(found) != wanted:
        raise ManifestError(f"manifest has another digest: expected {wanted[:16]}…, found {found[:16]}…")
    return parse(canonical)


def parse_wire(data: bytes, base: bytes | None, expected: str) -> Manifest:
    """As `from_wire` and `parse_named`."""
    return parse_named(from_wire(data, base), expected)


def to_wire(canonical: bytes, base: bytes | None = None) -> bytes:
    """The manifest as one zstd frame; with `base` (another manifest's canonical bytes) as prefix, what both say vanishes.

    Raises:
        ManifestError: it takes more than `PACKED_MAX`.
    """
    size = len(canonical) + len(base or b"")
    is_large = len(canonical) > 1 << 20
    options: dict[int, int] = {
        zstd.CompressionParameter.compression_level: 3 if is_large else 19,
        # Finds the same lines in a large base, which the tables of a quick level do not: 9 kB in place of 4 MB.
        zstd.CompressionParameter.enable_long_distance_matching: int(is_large),
        zstd.CompressionParameter.window_log: max(17, min(_WINDOW_LOG_MAX, max(size - 1, 1).bit_length())),
    }
    packed = zstd.compress(canonical, options=options, zstd_dict=prefix(base))
    _check_packed(packed)
    return packed


def from_wire(data: bytes, base: bytes | None = None) -> bytes:
    """The canonical bytes again, at most `MANIFEST_MAX`. They are not yet checked: see `parse_named`.

    Raises:
        ManifestError: not one whole zstd frame within the bounds, or another base than it was made with.
    """
    _check_packed(data)
    try:
        return inflate(data, MANIFEST_MAX, window_log=_WINDOW_LOG_MAX, base=base)
    except FrameFault as fault:
        raise ManifestError(f"a manifest {fault}") from fault


def _check_packed(data: bytes) -> None:
    _demand(len(data) <= PACKED_MAX, f"a manifest of {len(data)} bytes when packed: expected at most {PACKED_MAX}")
