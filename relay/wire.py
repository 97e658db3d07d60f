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
ORDERS = "/v1/orders"
POLL = "/v1/agents/{name}/poll"
AGENTS = "/v1/agents"
REPORTS_IN = "/v1/agents/{name}/reports"
REPORTS_OUT = "/v1/reports"
LOGS_IN = "/v1/agents/{name}/logs"
LOGS_OUT = "/v1/logs"

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

POLL_SECONDS = 25.0
"""The longest that a relay keeps a poll, or a reader of reports and logs, waiting for news."""
LETTERS_MAX = 256
"""Orders, reports or pieces of logs in one request or answer."""
LETTERS_BYTES_MAX = 8 << 20
"""Bytes of letters in one answer, before base64. Clients keep their requests below it, too."""
POLL_BODY_MAX = 128 << 10
"""Bytes of a poll's body: a presence in base64 and what stands around it."""
AGENTS_BODY_MAX = 64 << 20
"""Bytes of an answer that tells of all agents."""
LOG_PIECE_MAX = 64 << 10
"""Bytes of one piece of a log."""
AGENT_NAME = r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z"
"""Names of agents and machines. They are compared lower-cased."""
OPERATION_ID = r"\A[A-Za-z0-9][A-Za-z0-9._/-]{0,254}\Z"
"""deployment ULID/step/machine/action/attempt."""
DEPLOYMENT_ID = r"\A[0-9A-HJKMNP-TV-Z]{26}\Z"
"""A ULID: https://github.com/ulid/spec."""

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


# --- mail

_AgentName = Annotated[str, Meta(pattern=AGENT_NAME)]
_Operation = Annotated[str, Meta(pattern=OPERATION_ID)]
_Deployment = Annotated[str, Meta(pattern=DEPLOYMENT_ID)]
_Envelope = Annotated[bytes, Meta(min_length=1, max_length=ENVELOPE_MAX)]
_Count = Annotated[int, Meta(ge=0, lt=1 << 53)]


class Cursor(Body, frozen=True):
    """How far a reader has read at one relay. The epoch changes when a relay lost its mail: then it begins anew."""

    epoch: Annotated[str, Meta(max_length=64)]
    number: _Count


class OrderLetter(Body, frozen=True):
    """A signed order on its way to `agent`. The relay reads the envelope as little as any other bytes."""

    agent: _AgentName
    operation: _Operation
    envelope: _Envelope


class OrdersRequest(Body, frozen=True):
    orders: Annotated[tuple[OrderLetter, ...], Meta(min_length=1, max_length=LETTERS_MAX)]


class TakenAnswer(Answer, frozen=True):
    """How many letters are durable now, and how many of them the relay held before, with the same bytes."""

    taken: int
    known: int = 0


class PollRequest(Body, frozen=True):
    """An agent that is there: its signed presence, and how far it has read this relay's mail."""

    presence: _Envelope
    after: Cursor | None = None
    wait: Annotated[float, Meta(ge=0.0, le=POLL_SECONDS)] = POLL_SECONDS


class NumberedOrder(Answer, frozen=True):
    number: int
    operation: str
    envelope: bytes


class PollAnswer(Answer, frozen=True):
    """Orders after the cursor, oldest first; none when the time was over."""

    epoch: str
    orders: tuple[NumberedOrder, ...] = ()


class AgentSeen(Answer, frozen=True):
    """An agent's presence at this relay: `age` is seconds since its poll ended, 0 while one is waiting;
    `presence_age` is seconds since the presence came.
    """

    name: str
    presence: bytes
    age: float
    presence_age: float


class AgentsAnswer(Answer, frozen=True):
    agents: tuple[AgentSeen, ...]


class ReadQuery(Body, frozen=True):
    """The query of a reader of reports or logs: `epoch` and `after` are its cursor."""

    deployment: _Deployment
    epoch: Annotated[str, Meta(max_length=64)] = ""
    after: _Count = 0
    wait: Annotated[float, Meta(ge=0.0, le=POLL_SECONDS)] = 0.0


class ReportLetter(Body, frozen=True):
    """A signed report; `number` counts the reports of one operation, from 1."""

    operation: _Operation
    number: _Count
    envelope: _Envelope


class ReportsRequest(Body, frozen=True):
    deployment: _Deployment
    reports: Annotated[tuple[ReportLetter, ...], Meta(min_length=1, max_length=LETTERS_MAX)]


class NumberedReport(Answer, frozen=True):
    """`number` is the relay's, for the cursor; `report` the operation's."""

    number: int
    agent: str
    operation: str
    report: int
    envelope: bytes


class ReportsAnswer(Answer, frozen=True):
    epoch: str
    reports: tuple[NumberedReport, ...] = ()


class LogPiece(Body, frozen=True):
    """Output of an operation from byte `offset` on."""

    operation: _Operation
    offset: _Count
    data: Annotated[bytes, Meta(min_length=1, max_length=LOG_PIECE_MAX)]


class LogsRequest(Body, frozen=True):
    deployment: _Deployment
    pieces: Annotated[tuple[LogPiece, ...], Meta(min_length=1, max_length=LETTERS_MAX)]


class NumberedPiece(Answer, frozen=True):
    number: int
    agent: str
    operation: str
    offset: int
    data: bytes


class LogsAnswer(Answer, frozen=True):
    epoch: str
    pieces: tuple[NumberedPiece, ...] = ()


def manifest_path(id: ManifestId) -> str:
    return MANIFEST.format(hex=id)
