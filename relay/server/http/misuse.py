"""What tokens were used for that they are not for is limited. The log tells each refusal, as of any request."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from relay.server.http.problems import HttpRefusal

WINDOW_SECONDS: Final = 60.0
"""Over which misuse is counted."""
MOST: Final = 20
"""Refusals of one token in a window. What is refused beyond them is not looked at."""
TOKENS_MAX: Final = 10_000
"""Tokens that are counted at one time."""


@dataclass(slots=True)
class _Window:
    since: float
    count: int = 0


class Misuse:
    """Counts by token; requests without one count together."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: dict[tuple[str, str], _Window] = {}

    def count(self, token: str, code: str) -> None:
        """It is refused now, for this reason. Raises as `check`."""
        now = self._clock()
        window = self._windows.pop((token, code), None)
        if window is None or now - window.since >= WINDOW_SECONDS:
            window = _Window(now)
        window.count += 1
        self._windows[token, code] = window  # at the end: the one that was quiet for longest is forgotten first
        if len(self._windows) > TOKENS_MAX:
            del self._windows[next(iter(self._windows))]
        self.check(token, code)

    def check(self, token: str, code: str) -> None:
        """Before anything costly is done for a stranger.

        Raises:
            HttpRefusal: 429, this token had too many refusals of this kind.
        """
        window = self._windows.get((token, code))
        left = 0.0 if window is None else window.since + WINDOW_SECONDS - self._clock()
        if window is not None and window.count > MOST and left > 0:
            raise HttpRefusal(429, "too_many_refusals", retry_after=left)
