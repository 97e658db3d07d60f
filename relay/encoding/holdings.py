"""What stands around a decoder of runs at its receiver: the thread it works in, and the chunks it builds on.

Those are verified, or not given at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final, Protocol

from relay.encoding.bundle import Event, NeedsBases, Places
from relay.encoding.choose_bases import Held
from relay.errors import ChunkInvalid, ChunkMissing
from relay.package.identity import ChunkId, ManifestId
from relay.package.manifest import Manifest
from relay.stores.contract import ChunkReader
from relay.support.byte_budget import Place

log = logging.getLogger(__name__)

_ROOM_SECONDS: Final = 20.0
"""How long a run on its way in waits for memory for its bases, before it is refused and a plain one follows."""
_AT_ONCE: Final = 4
"""Chunks that are read at a time."""


class Holdings(Protocol):
    """What one receiver says that it holds, and keeps until its transfer has ended."""

    @property
    def held(self) -> Sequence[Held]:
        """The best bases first."""

    async def load(self, places: Places) -> list[bytes]:
        """The chunks at `places`, in that order, each as its name says.

        Raises:
            ChunkMissing: one of them is not here (any more).
            ChunkInvalid: one has other bytes by now.
            StoreError: the medium failed.
        """


class StoreHoldings:
    """Chunks of a store."""

    def __init__(self, store: ChunkReader, manifests: Mapping[ManifestId, Manifest], held: Sequence[Held] = ()) -> None:
        """`manifests`: every one that a base may be named by."""
        self.held = tuple(held)
        self._store = store
        self._manifests = manifests

    async def load(self, places: Places) -> list[bytes]:
        ids = [self._manifests[manifest].chunk_id(index) for manifest, index in places]
        found: dict[ChunkId, bytes] = {}
        for some in _in_groups(dict.fromkeys(ids), _AT_ONCE):
            for chunk in await asyncio.gather(*map(self._store.get, some)):
                found[chunk.id] = chunk.data
        return [found[id] for id in ids]


class BoundedHoldings(StoreHoldings):
    """Chunks of a store, those of one run at a time, within what `place` can get of a budget."""

    def __init__(
        self, store: ChunkReader, manifests: Mapping[ManifestId, Manifest], place: Place, held: Sequence[Held] = ()
    ) -> None:
        super().__init__(store, manifests, held)
        self._place = place

    async def load(self, places: Places) -> list[bytes]:
        # Once as they are read, once as they are joined.
        if not await self._place.enter(2 * size_of(places, self._manifests), _ROOM_SECONDS):
            # A run whose bases are not given is refused, and a plain one follows.
            log.warning("no memory for the bases of a run")
            raise ChunkMissing(self._manifests[places[0][0]].chunk_id(places[0][1]))
        return await super().load(places)


async def answer(needs: NeedsBases, holdings: Holdings | None) -> bool:
    """Give a decoder the bases that it asks for; False where they are not here, and so its run will be refused.

    Raises:
        StoreError: the medium failed.
    """
    if holdings is None:
        return False
    try:
        needs.provide(await holdings.load(needs.bases))
    except (ChunkMissing, ChunkInvalid):
        return False
    return True


async def next_events(batches: Iterator[list[Event]]) -> list[Event] | None:
    """The next batch, decoded in a thread; None at the end.

    A caller that is cancelled meanwhile waits for the thread: afterwards the decoder is at rest.

    Raises:
        FrameError: as the decoder.
    """
    work = asyncio.ensure_future(asyncio.to_thread(next, batches, None))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


def size_of(places: Places, manifests: Mapping[ManifestId, Manifest]) -> int:
    """Bytes of all of them together."""
    return sum(manifests[manifest].chunks[index].size for manifest, index in places)


def _in_groups(ids: Iterable[ChunkId], size: int) -> Iterator[list[ChunkId]]:
    rest = iter(ids)
    while group := list(islice(rest, size)):
        yield group
