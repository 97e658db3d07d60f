"""An event loop whose clock jumps to the next timer: hours take no time, and the same seed gives the same order.

Half of what a seed costs is the loop: calls and timers are as plain as they can be, and tasks are kept by their loop, so
that nobody looks for them among all that ever ran.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from heapq import heappop, heappush
from typing import Any, Final, Protocol

TURNS_MAX: Final = 60_000
"""Of the loop in one process. More means that it goes round and round."""


class Clock(Protocol):
    """Holds the time, in seconds since 1970."""

    now: float


class StuckError(Exception):
    """Nothing will ever happen any more, or nothing but the same."""


class _Call(asyncio.TimerHandle):
    """Something to be called: soon, or when its time has come."""

    __slots__ = ("arguments", "call", "context", "is_off")

    def __init__(self, call: Callable[..., object], arguments: tuple[Any, ...], context: Context | None) -> None:
        self.call = call
        self.arguments = arguments
        self.context = context
        self.is_off = False

    def cancel(self) -> None:
        """It is passed over when its time comes."""
        self.is_off = True

    def cancelled(self) -> bool:
        return self.is_off


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs callbacks and timers only: nothing comes from outside. What a callback raises ends the run."""

    _stopping: bool

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._soon: list[_Call] = []
        self._timers: list[tuple[float, int, _Call]] = []
        self._timers_made = 0
        self._tasks: list[asyncio.Task[Any]] = []
        self.turns = 0

    def time(self) -> float:
        return self._clock.now

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> _Call:
        call = _Call(callback, args, context)
        self._soon.append(call)
        return call

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> _Call:
        """Of those for the same moment, the first is called first."""
        call = _Call(callback, args, context)
        self._timers_made += 1
        heappush(self._timers, (when, self._timers_made, call))
        return call

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> _Call:
        return self.call_at(self._clock.now + delay, callback, *args, context=context)

    def create_task(self, coro: Any, *, name: object = None, context: Context | None = None) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, context=context)
        self._tasks.append(task)
        return task

    def bury(self) -> None:
        """End all that is left, and close."""
        self.turns = 0
        for _ in range(100):
            left = [task for task in self._tasks if not task.done()]
            if not left:
                break
            for task in left:
                task.cancel()
            self.call_soon(self.stop)
            self.run_forever()
        self._tasks.clear()
        self._soon.clear()
        self._timers.clear()
        self.close()

    def _run_once(self) -> None:
        """In the place of asyncio's own, which waits for sockets: turn after turn, until somebody stops it."""
        while not self._stopping:
            self.turns += 1
            if not self._soon:
                self._jump()
            timers, now = self._timers, self._clock.now
            while timers and timers[0][0] <= now:
                self._soon.append(heappop(timers)[2])
            # What these calls ask for is for the next turn.
            calls, self._soon = self._soon, []
            for call in calls:
                if call.is_off:
                    continue
                if call.context is None:
                    call.call(*call.arguments)
                else:
                    call.context.run(call.call, *call.arguments)

    def _jump(self) -> None:
        """To the next timer. Raises `StuckError`."""
        timers = self._timers
        while timers and timers[0][2].is_off:
            heappop(timers)
        if not timers or self.turns > TURNS_MAX:
            raise StuckError("it goes round and round" if timers else "nothing can happen any more")
        # Exactly: what is added to a clock of many digits may be nothing.
        self._clock.now = max(self._clock.now, timers[0][0])

    def _process_events(self, event_list: list[Any]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps."""
