"""An event loop whose clock jumps to the next timer: hours take no time, and the same seed gives the same order."""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol

TURNS_MAX: Final = 60_000
"""Of the loop in one process. More means that it goes round and round."""


class Clock(Protocol):
    """Holds the time, in seconds since 1970."""

    now: float


class StuckError(Exception):
    """Nothing will ever happen any more, or nothing but the same."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs callbacks and timers only: nothing comes from outside."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.turns = 0
        self._selector = self
        self._scheduled: list[asyncio.TimerHandle]

    def time(self) -> float:
        return self._clock.now

    def select(self, timeout: float | None) -> list[Any]:
        """Of the selector that a loop has: the time until the next timer has passed."""
        self.turns += 1
        if timeout is None or self.turns > TURNS_MAX:
            raise StuckError("nothing can happen any more" if timeout is None else "it goes round and round")
        if timeout > 0:
            # Exactly: what is added to a clock of many digits may be nothing.
            self._clock.now = max(self._clock.now, self._scheduled[0].when())
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps."""
