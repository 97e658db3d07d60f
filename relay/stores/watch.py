"""A look at a store's health and room, now and then: whoever asks hears how it is, and the audit trail what has changed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from relay.audit.acts import LowOnSpace, NoSpaceLeft, SpaceAgain, StoreReadOnly
from relay.audit.event import tell
from relay.stores.open import Store
from relay.stores.room import Room, SpaceState
from relay.support.console import size

SECONDS: Final = 10.0
"""Between two looks."""


@dataclass(frozen=True, slots=True)
class Sight:
    """How a store is.

    Attributes:
        space: `enough` where it has no bounds of its own.
        room: None where it has no bounds, or the file system does not say.
        low: bytes below which it is low on space.
        closed: why nothing is written any more until it is opened again; empty while all is well.
    """

    space: SpaceState = "enough"
    room: Room | None = None
    low: int = 0
    closed: str = ""

    @property
    def takes_nothing(self) -> bool:
        return bool(self.closed) or self.space == "full"

    @property
    def words(self) -> str:
        """What a person should hear of it; empty while all is well."""
        if self.closed or self.room is None or self.space == "enough":
            return self.closed
        what = "no space left" if self.space == "full" else "low on space"
        return f"{what}: {size(self.room.free)} are free, {size(self.room.floor)} of them are kept so"


class StoreWatch:
    """Remembers the last sight. `low` is in bytes, by default a multiple of the floor."""

    def __init__(self, store: Store, low: int | None = None) -> None:
        self._store, self._low = store, low
        self._last = Sight()

    async def watch(self) -> None:
        """Look, for ever."""
        while True:
            await self.look()
            await asyncio.sleep(SECONDS)

    async def look(self) -> Sight:
        """How the store is now. What has changed since the last look is told."""
        now = await asyncio.to_thread(self._see)
        before, self._last = self._last, now
        if now.closed and not before.closed:
            tell(StoreReadOnly(now.closed))
        if now.room is not None and now.space != before.space:
            kind = {"enough": SpaceAgain, "low": LowOnSpace, "full": NoSpaceLeft}[now.space]
            tell(kind(now.room.free, now.low, now.room.floor))
        return now

    def _see(self) -> Sight:
        closed = self._store.closed_to_writes()
        if self._store.room is not None:
            with suppress(OSError):
                room = self._store.room()
                return Sight(room.state(self._low), room, room.low_below(self._low), closed)
        return Sight(closed=closed)
