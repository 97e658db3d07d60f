"""Letters on their way to several relays at once: no two lanes work at one relay, so one that hangs holds up its own alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from relay.protocol.connection import Connection
from relay.support.persistence import Persistence

LANES = 2
"""As many as relays get a letter at once."""
HANG_SECONDS = 2.0
"""A relay that takes longer over what it is given counts as away, until it answers."""
PERSISTENCE = Persistence(first_pause=0.3, longest_pause=15.0, spread=2 / 3)
"""With a relay that takes nothing."""

Relays = Callable[[], Sequence[Connection]]
"""The relays to give mail to, the one to ask first in front."""


class Lanes:
    """Serves the relays that something is due at, in their order."""

    def __init__(
        self,
        relays: Relays,
        is_due: Callable[[str, int], bool],
        give: Callable[[Connection, int], Awaitable[bool]],
        look_seconds: float,
    ) -> None:
        """Nothing runs yet.

        Args:
            relays: all of them.
            is_due: whether something is, at the relay of this URL, which is so many places behind the first that is well.
            give: all of it, to this relay at this place; False where it does not take it.
            look_seconds: between two looks where nothing wakes a lane.
        """
        self._relays = relays
        self._is_due = is_due
        self._give = give
        self._look_seconds = look_seconds
        self._wakes = [asyncio.Event() for _ in range(LANES)]
        self._busy: dict[str, float] = {}
        """Relays that are just being served, and since when."""
        self._fails: dict[str, int] = {}
        self._rests: dict[str, float] = {}
        """Relays that took nothing, and until when they are left alone."""

    def wake(self) -> None:
        """Something is new."""
        for wakes in self._wakes:
            wakes.set()

    async def run(self) -> None:
        """Serve, for ever."""
        async with asyncio.TaskGroup() as tasks:
            for wakes in self._wakes:
                tasks.create_task(self._lane(wakes))

    def fails(self, url: str) -> int:
        """How often in a row a relay took nothing."""
        return self._fails.get(url, 0)

    async def _lane(self, wakes: asyncio.Event) -> None:
        while True:
            wakes.clear()
            found = self._next()
            if found is not None:
                await self._serve(*found)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(self._seconds_to_change()):
                    await wakes.wait()

    def _next(self) -> tuple[Connection, int] | None:
        """The first at which something is due, and that no other lane serves; and its place."""
        now = time.monotonic()
        well = [relay for relay in self._relays() if not self._is_away(relay.url, now)]
        free = ((relay, place) for place, relay in enumerate(well) if relay.url not in self._busy)
        return next(((relay, place) for relay, place in free if self._is_due(relay.url, place)), None)

    def _is_away(self, url: str, now: float) -> bool:
        return now < self._rests.get(url, 0.0) or now - self._busy.get(url, now) > HANG_SECONDS

    async def _serve(self, relay: Connection, place: int) -> None:
        self._busy[relay.url] = time.monotonic()
        taken = False
        try:
            taken = await self._give(relay, place)
        finally:
            del self._busy[relay.url]
            self._fails[relay.url] = 0 if taken else self.fails(relay.url) + 1
        if not taken:
            self._rests[relay.url] = time.monotonic() + PERSISTENCE.pause(self._fails[relay.url])

    def _seconds_to_change(self) -> float:
        """Until a relay is well again, or counts as one that hangs."""
        now = time.monotonic()
        moments = [*self._rests.values(), *(since + HANG_SECONDS for since in self._busy.values())]
        return min((moment - now for moment in moments if moment > now), default=self._look_seconds) + 0.01
