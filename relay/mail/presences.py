"""Which agents are there: what their polls said last, and how long ago. In memory only: after a restart the next polls
say it again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from relay.errors import UnreachableError
from relay.protocol import messages

FORGET_SECONDS: Final = 24 * 3600.0
"""How long an agent that polls no more is told of."""
PRESENCE_BYTES: Final = 32 << 20
"""Bytes of all presences together."""


@dataclass(slots=True)
class _Seen:
    presence: bytes
    came: float
    left: float
    polls: int = 0
    """How many are waiting now."""


class Presences:
    """The agents of one relay, by lower-cased name."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._seen)

    @contextlib.contextmanager
    def polling(self, name: str, presence: bytes) -> Iterator[None]:
        """While `name` waits at this relay.

        Raises:
            UnreachableError: there are too many agents here.
        """
        now = self._clock()
        self._make_room(name, len(presence), now)
        seen = self._seen.setdefault(name, _Seen(b"", now, now))
        self._bytes += len(presence) - len(seen.presence)
        seen.presence, seen.came = presence, now
        seen.polls += 1
        try:
            yield
        finally:
            seen.polls -= 1
            seen.left = self._clock()

    def all(self) -> tuple[messages.AgentSeen, ...]:
        """By name."""
        now = self._clock()
        self._forget(now)
        return tuple(
            messages.AgentSeen(
                name=name,
                presence=seen.presence,
                age=0.0 if seen.polls else now - seen.left,
                presence_age=now - seen.came,
            )
            for name, seen in sorted(self._seen.items())
        )

    def _make_room(self, name: str, size: int, now: float) -> None:
        if self._fits(name, size):
            return
        self._forget(now)
        absent = sorted((seen.left, other) for other, seen in self._seen.items() if not seen.polls and other != name)
        while absent and not self._fits(name, size):
            self._remove(absent.pop(0)[1])
        if not self._fits(name, size):
            raise UnreachableError("too many agents are at this relay")

    def _fits(self, name: str, size: int) -> bool:
        before = self._seen.get(name)
        more = size - (len(before.presence) if before else 0)
        return len(self._seen) + (before is None) <= self._most and self._bytes + more <= PRESENCE_BYTES

    def _forget(self, now: float) -> None:
        absent = {name: seen.left for name, seen in self._seen.items() if not seen.polls}
        for name in [name for name, left in absent.items() if now - left > FORGET_SECONDS]:
            self._remove(name)

    def _remove(self, name: str) -> None:
        self._bytes -= len(self._seen.pop(name).presence)
