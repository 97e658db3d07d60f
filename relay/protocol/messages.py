"""The /v1 protocol: every path, header, media type, body and limit. Server and client read this one text.

docs/protocol.md tells the same for people; a change belongs into both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from relay.config import AGENT_NAME as AGENT_NAME  # noqa: PLC0414 - part of the protocol, too
from relay.package.identity import ManifestId
from relay.package.ranges import Ranges
from relay.trust.envelopes import ENVELOPE_MAX

VERSION = 1

# --- paths

HEALTH = "/v1/health"
METRICS = "/metrics"
LINE = "/v1/line"
MANIFEST = "/v1/manifests/sha256:{hex}"
MISSING = "/v1/missing"
BUNDLE_IN = "/v1/bundle"
BUNDLE_OUT = "/v1/bundle"
PACKAGES = "/v1/packages"
PACKAGE_ID = "/v1/packages/{id}"
PACKAGE = "/v1/packages/{id}/{version}"
NUPKG = "/v1/packages/{id}/{version}/nupkg"
REBUILD = "/v1/rebuilds/sha256:{hex}"
BLOB = "/v1/blobs/sha256:{hex}"
REPLICATIONS = "/v1/replications"
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
RECIPE_TYPE = "application/vnd.waystation.recipe"
NUPKG_TYPE = "application/octet-stream"
PROGRESS_TYPE = "application/x-ndjson"
PREFER_MINIMAL = "return=minimal"
"""`Prefer` of a publish (RFC 7240): 204 in place of an answer that tells the sender what it sent."""

# --- limits

DOCUMENT_MAX = 18 << 20
"""Bytes of an offer or manifest document: a manifest that does not compress, and its signature."""
RECIPE_BODY_MAX = 5 << 20
"""Bytes of a recipe on the wire: one that does not compress."""
NUPKG_SECONDS = 300.0
"""How long a client waits for the first byte of a nupkg, which may have to be made or fetched first."""
SIGNATURE_MAX = ENVELOPE_MAX
"""Bytes of one DSSE envelope."""
JSON_MAX = 16 << 20
RANGES_BODY_MAX = 4 << 20
"""Bytes of a request that names chunks, or one package: some 300,000 ranges. Larger JSON is mail."""
JSON_DEPTH = 16
BUNDLE_PAYLOAD_MAX = 64 << 20
"""Bytes of payload in one uploaded bundle."""
BUNDLE_BODY_MAX = BUNDLE_PAYLOAD_MAX + (4 << 20)
"""Bytes of one uploaded bundle in all: payloads and their headers."""
LINE_BYTES_MAX = 64 << 20
"""Bytes of one transfer that measures the line."""
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
PRESENCE_TYPE = "application/vnd.waystation.presence+json"
"""Payload type of a signed presence: the one letter that a relay reads."""
OPERATION_ID = r"\A[A-Za-z0-9][A-Za-z0-9._/-]{0,254}\Z"
"""deployment ULID/step/machine/action/attempt."""
DEPLOYMENT_ID = r"\A[0-9A-HJKMNP-TV-Z]{26}\Z"
"""A ULID: https://github.com/ulid/spec."""

_MOMENT_MAX = 253402300799.0
"""Seconds since 1970 of the last moment that a calendar can tell (the end of the year 9999)."""

_Hex = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
_Epoch = Annotated[str, Meta(max_length=64)]
_Seconds = Annotated[float, Meta(ge=0.0, le=_MOMENT_MAX)]
_Pairs = Annotated[Ranges, Meta(max_length=100_000)]


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a relay reads: unknown fields are refused."""


class Answer(msgspec.Struct, frozen=True):
    """What a client reads: fields that a newer relay adds are passed over."""


class ChunkRanges(Body, frozen=True):
    """Chunks of one manifest by index ranges."""

    manifest: _Hex
    ranges: _Pairs


class Document(Body, frozen=True):
    """A manifest on the wire: its canonical JSON as one zstd frame (with the base manifest as prefix, where `base=`
    named one), and its DSSE envelope (empty where there is none).
    """

    manifest: bytes
    signature: bytes = b""
    packed_signature: bytes = b""
    """Of an offer: the envelope as `relay.protocol.packed_envelope` packs it, in place of `signature`. Most of an envelope repeats
    what the manifest says.
    """
    recipe: bytes = b""
    """Of an offer: how to make the identical nupkg again (`relay.package.recipe`), as one zstd frame, with the recipe of
    `base=` as prefix where both sides hold it; empty where the sender does not tell.
    """


class OfferAnswer(Answer, frozen=True, omit_defaults=True):
    """What the relay lacks of the offered manifest; everything else, and all of `base=` that is here, is held by the
    lease. `recipe_unread`: the recipe was made against another recipe of `base=` than the one here; put it plainly.
    """

    lease: str
    expires_in: float
    missing: Ranges
    recipe_unread: bool = False


class MissingRequest(Body, frozen=True):
    """`lease` makes the relay hold, for that lease, everything that it does not name in its answer."""

    want: Annotated[tuple[ChunkRanges, ...], Meta(max_length=64)]
    lease: str | None = None


class MissingAnswer(Answer, frozen=True):
    """`unknown`: manifests (in hex) that the relay does not keep; all of them is missing."""

    missing: tuple[ChunkRanges, ...]
    unknown: tuple[str, ...] = ()


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


class RecipeAnswer(Answer, frozen=True):
    """A recipe is kept. What the identical nupkg still takes here, where it is not here itself: whether the bytes that
    the recipe calls verbatim, and which encoders.
    """

    blob_missing: bool = False
    encoders_missing: tuple[str, ...] = ()


class BlobAnswer(Answer, frozen=True):
    """A blob is kept."""

    size: int


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


class ExactLacks(Answer, frozen=True):
    """Why an identical nupkg cannot be had: no recipe that gives it, encoders that are not there, bytes that no encoder
    makes and that are not there, chunks that are damaged or gone.
    """

    recipe: bool = False
    encoders: tuple[str, ...] = ()
    verbatim_bytes: int = 0
    chunks: bool = False


REASON_CHARS = 500
"""As much of another side's words as a person is shown."""


class ProblemAnswer(Answer, frozen=True):
    """A refused publish: which ranges are missing, where that is why. Of `not_exact`: what is lacking."""

    code: str = ""
    missing: Ranges = ()
    lacks: ExactLacks | None = None


class BundleRequest(Body, frozen=True):
    """Which chunks to stream, in this order, and the encodings that the reader can decode.

    `bases` are chunks that the reader holds and keeps until the answer has ended: the relay may build on those of them
    that it holds too. `goodput` is what the reader measured on this line of late, bytes per second of payload; 0 where
    it does not know.
    """

    want: Annotated[tuple[ChunkRanges, ...], Meta(max_length=64)]
    encodings: Annotated[tuple[str, ...], Meta(max_length=16)] = ("raw", "zstd")
    bases: Annotated[tuple[ChunkRanges, ...], Meta(max_length=64)] = ()
    goodput: Annotated[float, Meta(ge=0.0, le=1e12)] = 0.0


class CpuRates(msgspec.Struct, frozen=True):
    """Bytes per second of one core, measured when the relay started. For planning.

    zstd_decode and zstd_encode are at level 3; a rate of 0 was not measured.
    """

    sha256: float
    zstd_decode: float
    zstd_encode: float
    zstd_encode_9: float = 0.0
    zstd_encode_19: float = 0.0
    hdiff_encode: float = 0.0
    cores: int = 1


class ReplicationRequest(Body, frozen=True):
    """Fetch this package from another relay, and publish it. Idempotent: who asks again joins the one that runs.

    `source` is a relay's URL: one that this relay's own configuration names under `peers:`, or on loopback where this
    relay listens on loopback itself. `rate` is the most to take, bytes per second; 0: no limit.
    """

    id: Annotated[str, Meta(max_length=100)]
    version: Annotated[str, Meta(max_length=128)]
    manifest: _Hex
    source: Annotated[str, Meta(max_length=2048)]
    rate: Annotated[float, Meta(ge=0.0, le=1e12)] = 0.0


class EncodedBytes(msgspec.Struct, frozen=True):
    """One line of the ledger: what crossed one line in one encoding."""

    encoding: str
    chunks: _Count
    stream_bytes: _Count
    """Of the chunks themselves."""
    payload_bytes: _Count
    """Of the frames that carried them."""


def summed(encodings: Iterable[EncodedBytes]) -> tuple[EncodedBytes, ...]:
    """One for each encoding, by name."""
    found: dict[str, EncodedBytes] = {}
    for one in encodings:
        before = found.get(one.encoding) or EncodedBytes(one.encoding, 0, 0, 0)
        found[one.encoding] = EncodedBytes(
            one.encoding,
            before.chunks + one.chunks,
            before.stream_bytes + one.stream_bytes,
            before.payload_bytes + one.payload_bytes,
        )
    return tuple(found[name] for name in sorted(found))


class ReplicationProgress(Answer, frozen=True):
    """One line of the answer to a replication: newline-delimited JSON. The last one is `done` or `failed`.

    `bytes` of `whole` bytes of tree stream are here. `code` says what failed, in the protocol's problem codes.
    """

    state: Literal["waiting", "running", "done", "failed"]
    bytes: _Count = 0
    whole: _Count = 0
    wire_bytes: _Count = 0
    encodings: tuple[EncodedBytes, ...] = ()
    fallbacks: _Count = 0
    seconds: _Seconds = 0.0
    code: str = ""
    reason: str = ""


class Ending(Answer, frozen=True, omit_defaults=True):
    """Something that ends: a token of the relay's callers, or its certificate. `ends` is in seconds since 1970."""

    what: Literal["token", "certificate"]
    id: str = ""
    name: str = ""
    ends: _Seconds = 0.0


class HealthAnswer(Answer, frozen=True):
    """`token` is the caller's own. `endings`: what has ended or ends within 14 days; told to callers with a token."""

    status: Literal["ok", "draining", "read-only"]
    versions: tuple[int, ...]
    time: float
    """The relay's clock, seconds since 1970."""
    site: str = ""
    reason: str = ""
    cpu: CpuRates | None = None
    space: Literal["enough", "low", "full"] = "enough"
    """Of the relay's store: when it is `full`, the relay is read-only."""
    token: Ending | None = None
    certificate: Ending | None = None
    endings: tuple[Ending, ...] = ()


class LineAnswer(Answer, frozen=True):
    """How many bytes came, and in how many seconds of the relay's."""

    bytes: int
    seconds: float


# --- mail

_AgentName = Annotated[str, Meta(pattern=AGENT_NAME)]
_Operation = Annotated[str, Meta(pattern=OPERATION_ID)]
_Deployment = Annotated[str, Meta(pattern=DEPLOYMENT_ID)]
_Envelope = Annotated[bytes, Meta(min_length=1, max_length=ENVELOPE_MAX)]


class Cursor(Body, frozen=True):
    """How far a reader has read at one relay. The epoch changes when a relay lost its mail: then it begins anew."""

    epoch: _Epoch
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

    taken: _Count
    known: _Count = 0


class PollRequest(Body, frozen=True):
    """An agent that is there: its signed presence, and how far it has read this relay's mail."""

    presence: _Envelope
    after: Cursor | None = None
    wait: Annotated[float, Meta(ge=0.0, le=POLL_SECONDS)] = POLL_SECONDS


class NumberedOrder(Answer, frozen=True):
    number: _Count
    operation: str
    envelope: bytes


class PollAnswer(Answer, frozen=True):
    """Orders after the cursor, oldest first; none when the time was over."""

    epoch: _Epoch
    orders: tuple[NumberedOrder, ...] = ()


class AgentSeen(Answer, frozen=True):
    """An agent's presence at this relay: `age` is seconds since its poll ended, 0 while one is waiting;
    `presence_age` is seconds since the presence came.
    """

    name: str
    presence: bytes
    age: _Seconds
    presence_age: _Seconds


class AgentsAnswer(Answer, frozen=True):
    agents: tuple[AgentSeen, ...]


class ReadQuery(Body, frozen=True):
    """The query of a reader of reports or logs: `epoch` and `after` are its cursor."""

    deployment: _Deployment
    epoch: _Epoch = ""
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

    number: _Count
    agent: str
    operation: str
    report: _Count
    envelope: bytes


class ReportsAnswer(Answer, frozen=True):
    epoch: _Epoch
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
    number: _Count
    agent: str
    operation: str
    offset: _Count
    data: bytes


class LogsAnswer(Answer, frozen=True):
    epoch: _Epoch
    pieces: tuple[NumberedPiece, ...] = ()


def manifest_path(id: ManifestId) -> str:
    return MANIFEST.format(hex=id)
