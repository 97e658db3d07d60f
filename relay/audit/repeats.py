"""Events that repeat: one is told at once, and at the end of each minute how many more there were. Pure: it is told the time.

A flood costs one line a minute for each kind of it, and memory for so many kinds only: beyond them, the rest is one kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from relay.audit.event import Told
from relay.audit.shown import Value

SECONDS: Final = 60.0
"""Over which events that are alike are one."""
KINDS_MAX: Final = 64
"""Of one event, that are told apart at one time."""

_Kind = tuple[str, tuple[Value, ...] | None]
"""The event's name, and its fields by which it is alike to others; None: of too many kinds."""


@dataclass(slots=True)
class _Window:
    """`until` is the time at which it is told how many were `held`; `shown` is what they have in common."""

    until: float
    shown: Told
    held: int = 0


class Repeats:
    """What of the events of one log is told now, and what is only counted."""

    def __init__(self, seconds: float = SECONDS, kinds: int = KINDS_MAX) -> None:
        self._seconds, self._most = seconds, kinds
        self._windows: dict[_Kind, _Window] = {}

    def admits(self, told: Told, now: float) -> bool:
        """Whether to tell it. Where not, it was counted."""
        if told.alike is None:
            return True
        kind: _Kind = (told.name, tuple(told.fields.get(name) for name in told.alike))
        if kind not in self._windows and sum(name == told.name for name, _ in self._windows) >= self._most:
            kind = (told.name, None)
        window = self._windows.get(kind)
        if window is None:
            self._windows[kind] = _Window(now + self._seconds, _in_common(told, kind))
            return True
        window.held += 1
        return False

    def due(self, now: float) -> list[Told]:
        """What is to be told of windows that are over by `now`. One in which nothing repeated is forgotten."""
        over = {kind: window for kind, window in self._windows.items() if window.until <= now}
        for kind, window in over.items():
            if window.held:
                # What follows in a flood is not the first of its kind.
                self._windows[kind] = _Window(now + self._seconds, window.shown)
            else:
                del self._windows[kind]
        return [self._more(window) for window in over.values() if window.held]

    def next_due(self) -> float | None:
        """When to ask again; None where nothing waits."""
        return min((window.until for window in self._windows.values()), default=None)

    def _more(self, window: _Window) -> Told:
        words = f"{window.held} more like this in {self._seconds:.0f} s"
        more: dict[str, Value] = {"more": window.held, "seconds": self._seconds, "message": words}
        return replace(window.shown, fields={**window.shown.fields, **more})


def _in_common(told: Told, kind: _Kind) -> Told:
    names = () if kind[1] is None else told.alike or ()
    return replace(told, fields={name: told.fields[name] for name in names if name in told.fields})
