"""Bytes that several share: some are refused where there are too few, others wait for their turn."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from relay.errors import UnreachableError

MakeWay = Callable[[int, bool], bool]
"""Called with bytes that are lacking, and whether to let go of all that can be let go of even where that is not enough.
Whether so many were let go of: they were given back to the budget meanwhile."""


class ByteBudget:
    """At most `limit` bytes at a time. All of it belongs to one event loop.

    A place takes what is free at once, or nothing; or one enters in turn, and leaves. `used` may be changed by a holder
    of bytes that are there in any case; `look` lets those in that wait for what became free.
    """

    def __init__(
        self,
        limit: int,
        *,
        turns: int = sys.maxsize,
        make_way: MakeWay = lambda lacking, at_any_cost: False,  # noqa: ARG005
    ) -> None:
        """`turns`: how many can have entered at a time; `make_way` lets go of bytes that are kept for no need."""
        self.limit = limit
        self.used = 0
        self._turns = turns
        self._make_way = make_way
        self._inside = 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._queue)

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place in it, with nothing taken yet; what it holds at last is given back."""
        place = Place(self)
        try:
            yield place
        finally:
            place.release()

    def has_room(self, size: int) -> bool:
        """Whether `size` bytes are free; they can be added to `used` then."""
        lacking = self.used + size - self.limit
        return lacking <= 0 or self._make_way(lacking, False)

    async def enter(self, size: int) -> None:
        """Wait for a turn and `size` bytes, first come, first served; `leave` with as many.

        One that is alone inside gets them, whatever the size: no other would ever make room.
        """
        ticket = asyncio.get_running_loop().create_future()
        asked = (size, ticket)
        self._queue.append(asked)
        self.look()
        try:
            await ticket
        except asyncio.CancelledError:
            if asked in self._queue:
                self._queue.remove(asked)
                self.look()
            else:
                self.leave(size)
            raise

    def leave(self, size: int) -> None:
        self._inside -= 1
        self.used -= size
        self.look()

    def look(self) -> None:
        """Let in all that can be let in now."""
        while self._queue and self._inside < self._turns:
            size, ticket = self._queue[0]
            if not self.has_room(size):
                if self._inside:
                    return
                self._make_way(size, True)
            self._queue.popleft()
            self._inside += 1
            self.used += size
            if not ticket.done():
                ticket.set_result(None)


class Place:
    """What one holds of a budget. Let go of as a whole."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._taken = 0
        self._entered: int | None = None

    def take(self, more: int) -> None:
        """Hold so many bytes more.

        Raises:
            UnreachableError: there are not so many left now.
        """
        if not self._budget.has_room(more):
            raise UnreachableError("too many bytes are in flight")
        self._budget.used += more
        self._taken += more

    async def enter(self, size: int, seconds: float) -> bool:
        """Hold `size` bytes in place of what was held; False, and nothing held, where they were not free in time."""
        self.release()
        try:
            async with asyncio.timeout(seconds):
                await self._budget.enter(size)
        except TimeoutError:
            return False
        self._entered = size
        return True

    def release(self) -> None:
        """Hold nothing. Twice is once."""
        taken, entered = self._taken, self._entered
        self._taken, self._entered = 0, None
        if entered is not None:
            self._budget.leave(entered)
        if taken:
            self._budget.used -= taken
            self._budget.look()
