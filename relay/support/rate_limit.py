"""Not faster than allowed: a bucket of tokens, one for each byte (Turner, "New Directions in Communications", 1986)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

BURST_SECONDS: Final = 0.05
"""What may be sent at once, in seconds of the rate: enough that coarse timers cost no speed."""
PIECE: Final = 16 << 10
"""Bytes. A sender that is held back writes in pieces of this size at most, so that a line is used evenly."""


class Pacer:
    """Holds senders back to `rate` bytes per second together. Shared by all connections to one place.

    Times are given out in the order of asking, and what was not used within the burst is lost.
    """

    def __init__(
        self, rate: float, *, clock: Callable[[], float] = time.monotonic, burst: float = BURST_SECONDS
    ) -> None:
        """`rate` above 0; `burst` in seconds of it."""
        if not rate > 0:
            raise ValueError(f"a rate of {rate} bytes per second lets nothing through")
        self.rate = rate
        self._clock, self._burst = clock, burst
        self._free_at = clock()

    def take(self, size: int) -> float:
        """Book `size` bytes; the seconds to wait before they may go."""
        now = self._clock()
        self._free_at = max(self._free_at, now - self._burst) + size / self.rate
        return max(0.0, self._free_at - now)

    async def wait(self, size: int) -> float:
        """Book `size` bytes and return when they may go; the seconds waited."""
        seconds = self.take(size)
        if seconds:
            await asyncio.sleep(seconds)
        return seconds
