"""Names of things: package ids, versions and digests. Text becomes one of these at the edge, or is refused.

The grammar of ids and versions is NuGet's (`NuGet.Versioning` and `NuGet.Packaging`), kept to ASCII, because
lower-casing differs between runtimes outside of it.
"""

from __future__ import annotations

import hashlib
import re
from typing import NewType

from relay.errors import IdentityError

Sha256 = NewType("Sha256", str)
"""64 lower-case hex digits."""

ChunkId = NewType("ChunkId", str)
"""The SHA-256 of a chunk's bytes, as 64 lower-case hex digits."""

ManifestId = NewType("ManifestId", str)
"""The SHA-256 of a manifest's canonical bytes, as 64 lower-case hex digits."""

_HEX64 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def parse_digest(text: str) -> Sha256:
    """`sha256:` + hex, or bare hex.

    Raises:
        IdentityError: not exactly 64 lower-case hex digits.
    """
    bare = text.removeprefix("sha256:")
    if not _HEX64.fullmatch(bare):
        raise IdentityError("SHA-256 digest", text, "64 lower-case hex digits, with or without 'sha256:' before them")
    return Sha256(bare)


def chunk_id(data: bytes | bytearray | memoryview) -> ChunkId:
    return ChunkId(hashlib.sha256(data).hexdigest())


def manifest_id(canonical: bytes) -> ManifestId:
    return ManifestId(hashlib.sha256(canonical).hexdigest())
