"""How fast sources go, and whether another one should be asked beside the one in use. Pure.

No rate is slow by itself: a source is too slow where another one would bring the rest much sooner. It is found out by
asking the other one for a little, beside the one in use, which goes on meanwhile.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import inf

WINDOW_SECONDS = 3.0
"""The stretch of time that a source is judged by."""
ENCODER_SECONDS = 8.0
"""The same where differences were asked for, until the first byte of them comes: an encoder may have to work for it."""
WORTH_SECONDS = 5.0
"""A source that will be done so soon is not judged at all: its rest costs less than a change."""
GAIN = 3.0
"""Another source must bring the rest in less than a third of the time: the first ones are asked for a reason."""


class Pace:
    """How many bytes a second came of late. `now` is seconds of any clock that never goes back."""

    def __init__(self, now: float) -> None:
        self.bytes = 0
        """In all."""
        self._began = now
        self._marks: deque[tuple[float, int]] = deque([(now, 0)])

    def begin(self, now: float) -> None:
        """Judge it from here on: what was before was not its time."""
        self._began = now
        self._marks = deque([(now, self.bytes)])

    def mark(self, now: float) -> None:
        """Take note of how much came, now and then."""
        self._marks.append((now, self.bytes))
        while len(self._marks) > 1 and self._marks[1][0] <= now - ENCODER_SECONDS:
            self._marks.popleft()

    def rate(self, now: float, window: float = WINDOW_SECONDS) -> float | None:
        """Bytes per second in the last `window` seconds; None where it was not asked for so long."""
        if now - self._began < window:
            return None
        then, before = next((mark for mark in reversed(self._marks) if mark[0] <= now - window), self._marks[0])
        return (self.bytes - before) / (now - then)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a source has before it: bytes of payload that are still to come, and at which rate they come."""

    payload: float
    rate: float

    @property
    def seconds(self) -> float:
        return self.payload / self.rate if self.rate > 0 else inf


def is_slow(outlook: Outlook) -> bool:
    """Whether it will take so long that another source is worth a look."""
    return outlook.seconds > WORTH_SECONDS


def is_sooner(other: Outlook, used: Outlook) -> bool:
    """Whether `other` would bring the rest so much sooner than the one in use that a change pays."""
    return is_slow(used) and other.rate > 0 and other.seconds * GAIN < used.seconds
