"""Leases: one transfer's hold at a relay. What a lease named, or was told is there, stays until it ends.

A lease names whole manifests: every chunk of them is held. It is written down when it is made and when it comes to name
more, so that a transfer goes on after the relay was killed; renewals are written at most once in a while.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable

import msgspec
from msgspec import structs

from relay.errors import UnknownLeaseError
from relay.package.identity import ManifestId
from relay.protocol.messages import LEASE_SECONDS
from relay.stores.contract import Documents

_FOLDER = "state/leases"
_WRITE_EVERY = LEASE_SECONDS / 6


class Lease(msgspec.Struct, frozen=True):
    """Who holds what, until when (seconds since 1970). Its id names the document."""

    kind: str
    manifests: frozenset[str]
    offered: frozenset[str]
    """Those whose missing chunks this lease's holder is bringing."""
    expires: float


class Leases:
    """The living leases of one relay."""

    def __init__(self, documents: Documents, clock: Callable[[], float] = time.time) -> None:
        self._documents = documents
        self._clock = clock
        self._living: dict[str, Lease] = {}
        self._written: dict[str, float] = {}

    async def load(self) -> None:
        """Take up the leases that an earlier process wrote; drop what ran out or cannot be read."""
        for name in await self._documents.list(_FOLDER):
            raw = await self._documents.read(name)
            try:
                self._living[name.rpartition("/")[2]] = msgspec.json.decode(raw or b"", type=Lease)
            except (msgspec.DecodeError, UnicodeDecodeError):
                await self._documents.remove(name)
        await self._drop_expired()

    async def open(self, kind: str, offered: Iterable[ManifestId], also: Iterable[ManifestId] = ()) -> str:
        """The id of a new lease that holds all of `offered`, and says that what is missing of it is on its way; it holds
        `also` too.
        """
        await self._drop_expired()
        id, named = secrets.token_hex(16), frozenset(offered)
        await self._write(id, Lease(kind, named | frozenset(also), named, self._clock() + LEASE_SECONDS))
        return id

    async def use(self, id: str, also: Iterable[ManifestId] = ()) -> Lease:
        """Renew a lease, and let it hold `also`.

        Raises:
            UnknownLeaseError: there is none of this id that lives.
        """
        lease = self._living.get(id)
        now = self._clock()
        if lease is None or lease.expires <= now:
            raise UnknownLeaseError
        named = lease.manifests | frozenset(also)
        grew = named != lease.manifests
        lease = self._living[id] = structs.replace(lease, manifests=named, expires=now + LEASE_SECONDS)
        if grew or now - self._written.get(id, 0.0) > _WRITE_EVERY:
            await self._write(id, lease)
        return lease

    def offered(self) -> set[ManifestId]:
        """Manifests whose missing chunks somebody is bringing."""
        now = self._clock()
        return {ManifestId(id) for lease in self._living.values() if lease.expires > now for id in lease.offered}

    def __len__(self) -> int:
        return len(self._living)

    async def _write(self, id: str, lease: Lease) -> None:
        await self._documents.write(f"{_FOLDER}/{id}", msgspec.json.encode(lease, order="deterministic"))
        self._living[id] = lease
        self._written[id] = self._clock()

    async def _drop_expired(self) -> None:
        now = self._clock()
        for id in [id for id, lease in self._living.items() if lease.expires <= now]:
            del self._living[id]
            self._written.pop(id, None)
            await self._documents.remove(f"{_FOLDER}/{id}")
