"""An event loop whose clock jumps to the next timer: hours take no time, and the same seed gives the same order."""

from __future__ import annotations

import asyncio
from collections import deque
from heapq import heappop
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

    _scheduled: list[asyncio.TimerHandle]
    _ready: deque[asyncio.Handle]

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.turns = 0

    def time(self) -> float:
        return self._clock.now

    def _run_once(self) -> None:
        """In the place of asyncio's own, which waits for sockets."""
        scheduled, ready = self._scheduled, self._ready
        self.turns += 1
        while scheduled and scheduled[0].cancelled():
            heappop(scheduled)
        if not ready:
            if not scheduled or self.turns > TURNS_MAX:
                raise StuckError("it goes round and round" if scheduled else "nothing can happen any more")
            # Exactly: what is added to a clock of many digits may be nothing.
            self._clock.now = max(self._clock.now, scheduled[0].when())
        while scheduled and scheduled[0].when() <= self._clock.now:
            ready.append(heappop(scheduled))
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is passed over when its time comes."""

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps."""
