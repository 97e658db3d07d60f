"""Nupkgs to take apart and make again: real ones, and manifests of any zip that passes the walk."""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import zlib
from base64 import b64encode
from collections.abc import AsyncIterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from random import Random

from harness.paths import SHARED
from relay.package import chunking
from relay.package.chunk import Chunk
from relay.package.chunking import PartDigest
from relay.package.identity import NuGetVersion, PackageId, PackageRef
from relay.package.manifest import Manifest, ManifestBuilder, NupkgDigests
from relay.package.recipe import Opaque, Recipe
from relay.package.zip_reader import Entry, read_part, walk
from relay.rebuild.zip_layout import verbatim_bytes

DATA = SHARED
NUPKGS = sorted(DATA.glob("*/*.nupkg"))
ENGINES = {name: next(iter(sorted(DATA.glob(f"engines/{name}.*.so"))), None) for name in ("dotnet-10", "dotnet-9")}
ENGINE_FILES = [str(path) for path in ENGINES.values() if path]
NO_DATA = "no real packages or engines in ../shared/data"


@dataclass(frozen=True)
class Taken:
    """A nupkg that was taken apart: what a relay that only got chunks knows of it, and the original."""

    nupkg: bytes
    entries: tuple[Entry, ...]
    manifest: Manifest
    chunks: list[Chunk]

    async def chunk(self, index: int) -> Chunk:
        return self.chunks[index]

    def verbatim(self, recipe: Recipe) -> AsyncIterator[bytes] | None:
        """The recipe's blob, as a relay got it."""
        return None if recipe.verbatim is None else stream(self.verbatim_bytes(recipe))

    def verbatim_bytes(self, recipe: Recipe) -> bytes:
        entries = () if isinstance(recipe.records, Opaque) else self.entries
        return b"".join(verbatim_bytes(BytesIO(self.nupkg), entries, recipe, self.manifest))


async def stream(data: bytes, piece: int = 100_000) -> AsyncIterator[bytes]:
    for at in range(0, len(data), piece):
        yield data[at : at + piece]


def take(nupkg: bytes | str | os.PathLike[str], id: str = "A", version: str = "1.0.0") -> Taken:
    """Take a nupkg apart, as adding it to a depot does."""
    data = nupkg if isinstance(nupkg, bytes) else Path(nupkg).read_bytes()
    file = BytesIO(data)
    walked = walk(file)
    digests = NupkgDigests(
        len(data), hashlib.sha256(data).hexdigest(), b64encode(hashlib.sha512(data).digest()).decode()
    )
    builder = ManifestBuilder(PackageRef(PackageId.parse(id), NuGetVersion.parse(version)), digests, {})
    entries = sorted(walked, key=lambda entry: chunking.stream_key(entry.path))
    chunks: list[Chunk] = []
    for found in chunking.cut(entries, lambda e: e.path, lambda e: e.size, lambda e: read_part(file, e)):
        if isinstance(found, PartDigest):
            builder.saw_part(found)
        else:
            builder.saw_chunk(found)
            chunks.append(found)
    return Taken(data, walked, builder.build(entries, [False] * len(entries)), chunks)


NUSPEC = b"<package><metadata><id>A</id><version>1.0.0</version></metadata></package>"


@dataclass(frozen=True)
class Raw:
    """A part of a crafted nupkg, deflated already unless stored."""

    name: str
    content: bytes
    deflated: bytes | None = None


def canonical_zip(*parts: Raw) -> bytes:
    """A nupkg as .NET lays it out: nothing but local records, a directory in their order, and the end."""
    body, directory = bytearray(), bytearray()
    for part in parts:
        data = part.content if part.deflated is None else part.deflated
        method = 0 if part.deflated is None else 8
        form = struct.pack(
            "<5H3L", 20, 0, method, 0x6C21, 0x5B21, zlib.crc32(part.content), len(data), len(part.content)
        )
        name = part.name.encode()
        record = form + struct.pack("<2H", len(name), 0)
        directory += b"PK\1\2\x14\0" + record + struct.pack("<3H2L", 0, 0, 0, 0, len(body)) + name
        body += b"PK\3\4" + record + name + data
    count = len(parts)
    return bytes(body + directory) + struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0
    )


def mixture(seed: int, size: int) -> bytes:
    """`size` bytes of all kinds: text, tables, noise, repeats and zeros in turn."""
    random = Random(seed)
    words = [random.randbytes(random.randrange(1, 9)).hex().encode() for _ in range(300)]
    made = bytearray()
    while len(made) < size:
        kind = random.randrange(5)
        if kind == 0:
            made += b" ".join(random.choices(words, k=random.randrange(1, 4000)))
        elif kind == 1:
            made += b"".join(struct.pack("<IHHI", n * 24, n & 15, n >> 5, 0x06000001 + n) for n in range(1500))
        elif kind == 2:
            made += random.randbytes(random.randrange(20_000))
        elif kind == 3:
            made += (random.randbytes(random.randrange(1, 40)) * random.randrange(1, 6000))[:100_000]
        else:
            made += bytes(random.choices(b"abcd", k=random.randrange(20_000)))
    return bytes(made[:size])


class _Stream(ctypes.Structure):
    _fields_ = (
        ("next_in", ctypes.c_void_p), ("next_out", ctypes.c_void_p), ("message", ctypes.c_void_p),
        ("state", ctypes.c_void_p), ("available_in", ctypes.c_uint32), ("available_out", ctypes.c_uint32),
    )  # fmt: skip


def as_dotnet(encoder: str, content: bytes, feeding: str = "whole", buffer: int = 8192) -> bytes:
    """What `DeflateStream` makes: each write truly is one, however long. Says nothing of how ours works."""
    engine = ctypes.CDLL(str(ENGINES[encoder]))
    stream = _Stream()
    assert engine.CompressionNative_DeflateInit2_(ctypes.byref(stream), 6, 8, -15, 8, 0) == 0
    output = ctypes.create_string_buffer(buffer)
    held = ctypes.create_string_buffer(content, max(1, len(content)))
    made = bytearray()

    def deflate(flush: int) -> int:
        stream.next_out, stream.available_out = ctypes.addressof(output), buffer
        result: int = engine.CompressionNative_Deflate(ctypes.byref(stream), flush)
        made.extend(output.raw[: buffer - stream.available_out])
        return result

    step = int(feeding.removeprefix("sync-")) if feeding.startswith("sync-") else max(1, len(content))
    for at in range(0, len(content), step):
        stream.next_in = ctypes.addressof(held) + at
        stream.available_in = min(step, len(content) - at)
        while stream.available_in:
            deflate(0)
    while feeding != "whole" and deflate(2) == 0:
        pass
    while deflate(4) != 1:
        pass
    engine.CompressionNative_DeflateEnd(ctypes.byref(stream))
    return bytes(made)


def as_zlib(content: bytes, level: int = 6) -> bytes:
    engine = zlib.compressobj(level, zlib.DEFLATED, -15, 8)
    return engine.compress(content) + engine.flush()
