"""Progress bars as rows of text: a few bars in full, and one row for all of them where they are more."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from relay.terminal.text import size

MOST_ROWS: Final = 10
"""However high the terminal is: lines are to be read beside them."""
_RATE_SECONDS: Final = 5.0
"""The stretch of time that a rate is told of."""
_LEAST_NAME: Final = 6
_LEAST_BAR: Final = 8
"""Columns. A shorter bar shows nothing that its figures do not."""


@dataclass(slots=True)
class _Track:
    """How far one thing is. Bytes; `whole` is 0 while it is not known."""

    name: str
    done: int = 0
    whole: int = 0
    steps: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def is_over(self) -> bool:
        return 0 < self.whole <= self.done

    def move(self, done: int, whole: int, now: float) -> None:
        self.done, self.whole = done, whole
        self.steps.append((now, done))
        while len(self.steps) > 2 and now - self.steps[1][0] > _RATE_SECONDS:
            self.steps.popleft()

    def rate(self, now: float) -> float:
        """Bytes a second, lately."""
        if len(self.steps) < 2:
            return 0.0
        since, before = self.steps[0]
        return (self.done - before) / max(now - since, 0.1)


class Bars:
    """Bars by name. Safe for several threads: each bar is moved by one of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tracks: dict[str, _Track] = {}

    def bar(self, name: str) -> Callable[[int, int], None]:
        """What moves the bar of this name: called with what is done, and with the whole. A name has one bar."""
        track = self._tracks.setdefault(name, _Track(name))
        return lambda done, whole: track.move(done, whole, self._clock())

    def rows(self, width: int, height: int) -> Sequence[str]:
        """As `relay.terminal.screen.Display`: what is not over goes first where there is no room for all."""
        tracks = list(self._tracks.values())
        room = max(1, min(MOST_ROWS, height // 2))
        if len(tracks) <= room:
            return self._drawn(tracks, width)
        under_way = [track for track in tracks if not track.is_over]
        return [*self._drawn(under_way[: room - 1], width), _all_of(tracks)]

    def _drawn(self, tracks: Sequence[_Track], width: int) -> list[str]:
        now = self._clock()
        figures = [_figures(track, now) for track in tracks]
        most = max(map(len, figures), default=0)
        names = min(
            max((len(track.name) for track in tracks), default=0), max(width - most - _LEAST_BAR - 4, _LEAST_NAME)
        )
        return [_row(track, told, names, most, width) for track, told in zip(tracks, figures, strict=True)]


def _row(track: _Track, figures: str, names: int, most: int, width: int) -> str:
    name = track.name if len(track.name) <= names else f"{track.name[: names - 1]}…"
    room = min(width - names - most - 4, 40)
    if room < _LEAST_BAR:
        return f"{name:{names}}  {figures}"
    filled = room * min(track.done, track.whole) // track.whole if track.whole else 0
    return f"{name:{names}}  {'━' * filled}{'─' * (room - filled)}  {figures}"


def _figures(track: _Track, now: float) -> str:
    if not track.whole:
        return size(track.done) if track.done else "waiting"
    told = f"{size(track.done)} of {size(track.whole)}"
    rate = track.rate(now)
    if track.is_over or rate <= 0:
        return told
    return f"{told}  {size(rate)}/s  {_clock_text((track.whole - track.done) / rate)}"


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(min(round(seconds), 359999), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _all_of(tracks: Sequence[_Track]) -> str:
    over = sum(track.is_over for track in tracks)
    done, whole = sum(track.done for track in tracks), sum(track.whole for track in tracks)
    return f"{size(done)} of {size(whole)}, {over} of {len(tracks)} through"
