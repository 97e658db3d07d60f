"""Small packages, made for a test: nupkgs, and manifests with their chunks."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random

from relay.encoding.codecs import Coding, Encoding, encode
from relay.package import chunking
from relay.package.chunk import Chunk
from relay.package.chunking import PartDigest
from relay.package.identity import ChunkId, NuGetVersion, PackageId, PackageRef
from relay.package.manifest import Manifest, ManifestBuilder, NupkgDigests
from relay.package.zip_reader import Entry


def noise(seed: int | str, size: int) -> bytes:
    """`size` bytes that do not compress, the same for the same `seed`."""
    return Random(seed).randbytes(size)


SMALL = {
    "a.bin": noise("a", 70_000),
    "b.bin": noise("b", 80_000),
    "c.bin": bytes(90_000),
    "run.sh": b"#!/bin/sh\n",
    "empty": b"",
    "text/readme.txt": b"Read me.\n" * 100,
}
"""Files of a package that is quick to send and has a bit of everything: several chunks, zeros, a program, nothing, a folder."""
SMALL_TREE = {path: (data, path == "run.sh") for path, data in SMALL.items()}
"""What a machine then has: by path, the bytes and whether it may be run."""


def nuspec(id: str = "Acme.Web", version: str = "1.0.0") -> bytes:
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        '<package xmlns="http://schemas.microsoft.com/packaging/2013/05/nuspec.xsd"><metadata>'
        f"<id>{id}</id><version>{version}</version><authors>Acme</authors><description>For tests</description>"
        "</metadata></package>"
    ).encode()


def _parts(files: Mapping[str, bytes], id: str, version: str) -> dict[str, bytes]:
    return {
        f"{id}.nuspec": nuspec(id, version),
        "[Content_Types].xml": b'<?xml version="1.0"?><Types xmlns="x" />',
        "_rels/.rels": b'<?xml version="1.0"?><Relationships xmlns="x" />',
        **files,
    }


def make_nupkg(
    path: str | os.PathLike[str], files: Mapping[str, bytes], id: str = "Acme.Web", version: str = "1.0.0"
) -> str:
    """Write a nupkg of `files` and its container parts; its path. The same files give the same bytes.

    Where `path` is a folder, the file in it is named as NuGet names it. Parts are stored, not deflated.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        name = os.path.join(name, f"{id}.{version}.nupkg")
    with zipfile.ZipFile(name, "w") as archive:
        for part, data in _parts(files, id, version).items():
            archive.writestr(zipfile.ZipInfo(part), data)
    return name


@dataclass(frozen=True)
class Cut:
    """A package that was cut without any store: its manifest, and its chunks by id."""

    manifest: Manifest
    chunks: Mapping[ChunkId, Chunk]

    def chunk(self, index: int) -> Chunk:
        return self.chunks[self.manifest.chunk_id(index)]

    @property
    def indexes(self) -> range:
        return range(len(self.manifest.chunks))

    @property
    def stream(self) -> bytes:
        return b"".join(self.chunk(index).data for index in self.indexes)


def cut_package(files: Mapping[str, bytes], id: str = "Acme.Web", version: str = "1.0.0") -> Cut:
    """Manifest and chunks of a package of `files`, as adding it would make them. No file is written, no zip is made."""
    parts = _parts(files, id, version)
    entries = [Entry(path, len(data), len(data), 0, 0, 0, False) for path, data in parts.items()]
    entries.sort(key=lambda entry: chunking.stream_key(entry.path))
    digests = NupkgDigests(sum(map(len, parts.values())), Chunk.of(repr(parts).encode()).id, "A" * 86 + "==")
    builder = ManifestBuilder(PackageRef(PackageId.parse(id), NuGetVersion.parse(version)), digests, {})
    chunks: dict[ChunkId, Chunk] = {}
    for found in chunking.cut(entries, lambda e: e.path, lambda e: e.size, lambda e: [parts[e.path]]):
        if isinstance(found, PartDigest):
            builder.saw_part(found)
        else:
            builder.saw_chunk(found)
            chunks[found.id] = found
    return Cut(builder.build(entries, [False] * len(entries)), chunks)


def encode_run(chunks: Iterable[bytes], coding: str = "zstd", base: bytes = b"") -> tuple[Encoding, bytes]:
    """The payload of a run as a sender sends it, and the encoding it has: `raw` where `coding` makes nothing smaller."""
    run = b"".join(chunks)
    parsed = Coding.parse(coding)
    payload = b"".join(encode(parsed, run, base))
    return (parsed.encoding, payload) if len(payload) < len(run) else ("raw", run)


def deflated(
    folder: str | os.PathLike[str],
    files: Mapping[str, bytes],
    id: str = "Acme.Web",
    version: str = "1.0.0",
    level: int = 6,
) -> str:
    """A nupkg of `files` by Python's zipfile: at level 6 classic zlib made it, at 1 no encoder of ours did. Its path."""
    path = os.path.join(folder, f"{id}.{version}.nupkg")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{id}.nuspec"), nuspec(id, version))
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED, level)
    return path


def words(seed: int, size: int) -> bytes:
    """Words that deflate to about the half, and otherwise at each level."""
    random = Random(seed)
    known = [random.randbytes(random.randrange(2, 9)).hex().encode() for _ in range(3000)]
    return b" ".join(random.choices(known, k=size // 4))[:size]
