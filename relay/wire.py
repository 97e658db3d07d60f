"""The /v1 protocol: every path, header, media type, body and limit. Server and client read this one text.

docs/protocol.md tells the same for people; a change belongs into both.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from relay.content.frames import Span
from relay.content.identity import ManifestId
from relay.content.ranges import Ranges
from relay.trust.envelopes import ENVELOPE_MAX

VERSION = 1

# --- paths

HEALTH = "/v1/health"
METRICS = "/metrics"
MANIFEST = "/v1/manifests/sha256:{hex}"
MISSING = "/v1/missing"
BUNDLE_IN = "/v1/bundle"
BUNDLE_OUT = "/v1/bundle"
PACKAGES = "/v1/packages"
PACKAGE_ID = "/v1/packages/{id}"
PACKAGE = "/v1/packages/{id}/{version}"
CHUNK = "/v1/chunks/{hex}"

# --- media types

JSON = "application/json"
BUNDLE_TYPE = "application/vnd.waystation.bundle"
DOCUMENT_TYPE = "application/vnd.waystation.manifest+msgpack"
CHUNK_TYPE = "application/zstd"

# --- limits

DOCUMENT_MAX = 18 << 20
"""Bytes of an offer or manifest document: a manifest that does not compress, and its signature."""
SIGNATURE_MAX = ENVELOPE_MAX
"""Bytes of one DSSE envelope."""
JSON_MAX = 16 << 20
JSON_DEPTH = 16
BUNDLE_PAYLOAD_MAX = 64 << 20
"""Bytes of payload in one uploaded bundle."""
BUNDLE_BODY_MAX = BUNDLE_PAYLOAD_MAX + (4 << 20)
"""Bytes of one uploaded bundle in all: payloads and their headers."""
LEASE_SECONDS = 3600.0
ARRIVING_SECONDS = 10.0
"""How long a relay awaits a chunk that is on its way, before it tells the reader to ask again."""

_Hex = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Pairs = Annotated[Ranges, Meta(max_length=100_000)]


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a relay reads: unknown fields are refused."""


class Answer(msgspec.Struct, frozen=True):
    """What a client reads: fields that a newer relay adds are passed over."""


class ChunkRanges(Body, frozen=True):
    """Chunks of one manifest by index ranges."""

    manifest: _Hex
    ranges: _Pairs

    def span(self) -> Span:
        return Span(bytes.fromhex(self.manifest), self.ranges)


class Document(Body, frozen=True):
    """A manifest on the wire: its canonical JSON as one zstd frame (with the base manifest as prefix, where `base=`
    named one), and its DSSE envelope (empty where there is none).
    """

    manifest: bytes
    signature: bytes = b""


class OfferAnswer(Answer, frozen=True):
    """What the relay lacks of the offered manifest; everything else is held by the lease."""

    lease: str
    expires_in: float
    missing: Ranges


class MissingRequest(Body, frozen=True):
    """`lease` makes the relay hold, for that lease, everything that it does not name in its answer."""

    want: Annotated[tuple[ChunkRanges, ...], Meta(max_length=64)]
    lease: str | None = None


class MissingAnswer(Answer, frozen=True):
    missing: tuple[ChunkRanges, ...]


class RefusedRun(msgspec.Struct, frozen=True):
    """Chunks of an uploaded bundle that were not taken, and the problem code that says why."""

    manifest: str
    ranges: Ranges
    reason: str


class BundleAnswer(Answer, frozen=True):
    """How many chunks of the bundle are now durable, were there before, or were refused."""

    stored: int
    held: int
    refused: tuple[RefusedRun, ...] = ()


class PublishRequest(Body, frozen=True):
    manifest: _Hex


class PackageAnswer(Answer, frozen=True):
    """The pointer of one published package. `signature` is a DSSE envelope, or empty."""

    id: str
    version: str
    manifest: str
    nupkg_sha256: str
    size: int
    published: str
    signature: bytes = b""


class PackagesAnswer(Answer, frozen=True):
    packages: tuple[PackageAnswer, ...]


class ProblemAnswer(Answer, frozen=True):
    """A refused publish: which ranges are missing, where that is why."""

    code: str = ""
    missing: Ranges = ()


class BundleRequest(Body, frozen=True):
    """Which chunks to stream, in this order, and the encodings that the reader can decode."""

    want: Annotated[tuple[ChunkRanges, ...], Meta(max_length=64)]
    encodings: Annotated[tuple[str, ...], Meta(max_length=16)] = ("raw", "zstd")


class CpuRates(msgspec.Struct, frozen=True):
    """Bytes per second of one core, measured when the relay started. For planning."""

    sha256: float
    zstd_decode: float
    zstd_encode: float


class HealthAnswer(Answer, frozen=True):
    status: Literal["ok", "draining", "read-only"]
    versions: tuple[int, ...]
    time: float
    """The relay's clock, seconds since 1970."""
    site: str = ""
    reason: str = ""
    cpu: CpuRates | None = None


def manifest_path(id: ManifestId) -> str:
    return MANIFEST.format(hex=id)
