"""Every event of a relay, and those that all houses share. The docstring of each says when it is told."""

from __future__ import annotations

import logging
from typing import ClassVar

from relay.audit.event import Caller, Event

# --- the process


class RelayStarted(Event, frozen=True, tag="relay.started"):
    """A relay begins: with its version, its store, and how many tokens it knows."""

    version: str
    pid: int
    listen: str
    store: str
    site: str
    tokens: int


class RelayReady(Event, frozen=True, tag="relay.ready"):
    """It listens, and answers."""

    url: str
    site: str


class RelayDraining(Event, frozen=True, tag="relay.draining"):
    """It was told to stop: it takes no new connection, and lets what runs come to its end."""

    connections: int
    seconds: float


class RelayStopped(Event, frozen=True, tag="relay.stopped"):
    """Everything is given back. `cut`: connections that had not come to their end."""

    cut: int


class Reloaded(Event, frozen=True, tag="relay.reloaded"):
    """The configuration was read again, and is in force: what differs."""

    changes: tuple[str, ...]


class ReloadRefused(Event, frozen=True, tag="relay.reload_refused"):
    """The configuration was read again and cannot be used: the one that was in force stays so."""

    level: ClassVar[int] = logging.ERROR
    why: str


# --- who is refused


class _Problem(Event, frozen=True):
    """A request that was answered with a problem. `code` says why, `id` is what its sender was shown."""

    by: Caller
    method: str
    path: str
    status: int
    code: str
    id: str
    why: str


class RequestRefused(_Problem, frozen=True, tag="relay.request_refused"):
    """A request was answered with 4xx, 503 or 507: `code` says why, `id` is what its sender was shown, `path` is without its query."""

    level: ClassVar[int] = logging.WARNING
    alike: ClassVar[tuple[str, ...]] = ("address", "token", "code")


class NothingThere(_Problem, frozen=True, tag="relay.nothing_there"):
    """A request named something that is not there (404)."""

    alike: ClassVar[tuple[str, ...]] = ("address", "token", "code")


class RequestFailed(_Problem, frozen=True, tag="relay.request_failed"):
    """A request was answered with 500, with the traceback of what failed."""

    level: ClassVar[int] = logging.ERROR
    alike: ClassVar[tuple[str, ...]] = ("code", "why")


class AnswerBroken(Event, frozen=True, tag="relay.answer_broken"):
    """An answer that had begun could not be ended: its connection was cut."""

    level: ClassVar[int] = logging.WARNING
    alike: ClassVar[tuple[str, ...]] = ("address", "token", "why")
    by: Caller
    method: str
    path: str
    why: str


class ConnectionRefused(Event, frozen=True, tag="relay.connection_refused"):
    """A connection was reset at once: there were `limit` of them, by the limit that `why` names."""

    level: ClassVar[int] = logging.WARNING
    alike: ClassVar[tuple[str, ...]] = ("address", "why")
    address: str
    why: str
    limit: int


class ConnectionCut(Event, frozen=True, tag="relay.connection_cut"):
    """A connection was closed because its peer sent no request (`no_request`), or read nothing (`not_read`)."""

    level: ClassVar[int] = logging.WARNING
    alike: ClassVar[tuple[str, ...]] = ("address", "token", "why")
    by: Caller
    why: str


class HandshakeFailed(Event, frozen=True, tag="relay.handshake_failed"):
    """A connection ended before its TLS handshake was done."""

    level: ClassVar[int] = logging.WARNING
    alike: ClassVar[tuple[str, ...]] = ("address", "why")
    address: str
    why: str


# --- packages


class PackageOffered(Event, frozen=True, tag="relay.package_offered"):
    """A package was announced; `missing` chunks of `chunks` are not here yet."""

    by: Caller
    package: str
    version: str
    manifest: str
    chunks: int
    missing: int


class PackagePublished(Event, frozen=True, tag="relay.package_published"):
    """A package is whole and listed. Published again, it is told again."""

    by: Caller
    package: str
    version: str
    manifest: str
    nupkg_sha256: str
    size: int


class PackageConflict(Event, frozen=True, tag="relay.package_conflict"):
    """Alarm: somebody brought other bytes under the name of a package that is here. They were refused."""

    level: ClassVar[int] = logging.ERROR
    by: Caller
    path: str
    why: str


class ChunksRefused(Event, frozen=True, tag="relay.chunks_refused"):
    """Chunks that came were not what they were said to be, or could not be put together; their sender sends them again."""

    level: ClassVar[int] = logging.WARNING
    alike: ClassVar[tuple[str, ...]] = ("why",)
    why: str


class ReplicationBegun(Event, frozen=True, tag="relay.replication_begun"):
    """The relay begins to fetch a package from another relay, as it was asked to."""

    by: Caller
    package: str
    version: str
    manifest: str
    source: str


class ReplicationEnded(Event, frozen=True, tag="relay.replication_ended"):
    """The package is here, or was before."""

    package: str
    version: str
    source: str
    bytes: int
    wire_bytes: int
    seconds: float


class ReplicationFailed(Event, frozen=True, tag="relay.replication_failed"):
    """The package could not be fetched. What came is kept."""

    level: ClassVar[int] = logging.WARNING
    package: str
    version: str
    source: str
    wire_bytes: int
    seconds: float
    code: str
    why: str


class NupkgMade(Event, frozen=True, tag="relay.nupkg_made"):
    """The identical nupkg of a package is here now: made of its chunks, or taken from `source`."""

    package: str
    version: str
    sha256: str
    source: str


class NupkgNotMade(Event, frozen=True, tag="relay.nupkg_not_made"):
    """The identical nupkg could not be made, or a part of what it takes could not be had."""

    level: ClassVar[int] = logging.WARNING
    alike: ClassVar[tuple[str, ...]] = ("package", "version", "why")
    package: str
    version: str
    why: str


# --- mail


class OrderPosted(Event, frozen=True, tag="relay.order_posted"):
    """An order for an agent was left here. `known`: it, and all that came with it, was here before."""

    by: Caller
    agent: str
    operation: str
    known: bool


class OrderTaken(Event, frozen=True, tag="relay.order_taken"):
    """An agent was given an order."""

    by: Caller
    agent: str
    operation: str


class ReportPosted(Event, frozen=True, tag="relay.report_posted"):
    """An agent left a report; of those on its way, the first is told."""

    alike: ClassVar[tuple[str, ...]] = ("agent", "operation")
    by: Caller
    agent: str
    operation: str


class MailLost(Event, frozen=True, tag="relay.mail_lost"):
    """Mail that was kept is damaged, and was put aside: its readers begin anew."""

    level: ClassVar[int] = logging.ERROR
    why: str


# --- the store


class _Space(Event, frozen=True):
    """Bytes of the store's disk."""

    free: int
    low: int
    floor: int


class LowOnSpace(_Space, frozen=True, tag="relay.low_on_space"):
    """The store's disk has fewer than `low` bytes free. Below `floor` it takes nothing more."""

    level: ClassVar[int] = logging.WARNING


class NoSpaceLeft(_Space, frozen=True, tag="relay.no_space_left"):
    """The floor is reached: the relay takes no chunk more (507), and serves on."""

    level: ClassVar[int] = logging.ERROR


class SpaceAgain(_Space, frozen=True, tag="relay.space_again"):
    """There is room on the store's disk again, above `low`."""


class StoreReadOnly(Event, frozen=True, tag="relay.store_read_only"):
    """The store takes nothing more until the relay is started again."""

    level: ClassVar[int] = logging.ERROR
    why: str


class SyncFailed(Event, frozen=True, tag="store.sync_failed"):
    """The disk did not keep what was written. After `in_a_row` has reached 2, nothing more is written."""

    level: ClassVar[int] = logging.ERROR
    root: str
    why: str
    in_a_row: int


class Quarantined(Event, frozen=True, tag="store.quarantined"):
    """A damaged file was found, and put aside; the chunk counts as missing."""

    level: ClassVar[int] = logging.WARNING
    path: str
    aside: str


class NotQuarantined(Event, frozen=True, tag="store.not_quarantined"):
    """A damaged file was found, and could not be put aside."""

    level: ClassVar[int] = logging.ERROR
    alike: ClassVar[tuple[str, ...]] = ("path",)
    path: str
    why: str


class DocumentDamaged(Event, frozen=True, tag="store.document_damaged"):
    """A small file of the store is damaged, and counts as absent."""

    level: ClassVar[int] = logging.WARNING
    alike: ClassVar[tuple[str, ...]] = ("path",)
    path: str
    why: str


# --- what is followed


class _Ending(Event, frozen=True):
    """Of a token or a certificate. `message` says all of it."""

    what: str
    id: str
    name: str
    ends: str
    message: str


class EndsSoon(_Ending, frozen=True, tag="credential.ends_soon"):
    """A token or a certificate ends within 14 days; once a day."""

    level: ClassVar[int] = logging.WARNING


class HasEnded(_Ending, frozen=True, tag="credential.has_ended"):
    """A token or a certificate has ended; once a day."""

    level: ClassVar[int] = logging.ERROR


class ReadAgain(Event, frozen=True, tag="file.read_again"):
    """A file that is followed (a token, an authority, a certificate, trust.json) has changed, and counts."""

    what: str


class NotReadAgain(Event, frozen=True, tag="file.not_read_again"):
    """A file that is followed cannot be used: what it held before stays in force."""

    level: ClassVar[int] = logging.WARNING
    what: str
    why: str
