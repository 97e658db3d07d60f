"""Several works at once, works that several wait for, and several things of which the first is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

from relay.errors import first_of

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All at once; the first that fails ends the others, and its error is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        raise first_of(errors) from None
    return [task.result() for task in tasks]


async def any_of(seconds: float, *works: Awaitable[object]) -> bool:
    """Wait until one of `works` has ended, for at most `seconds`; whether one has. The others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    return bool(done)


async def first_result(
    works: Sequence[Callable[[], Coroutine[Any, Any, T]]], *, stagger: float, failed: Callable[[int, Exception], None]
) -> tuple[int, T] | None:
    """The first result, and the number of the work that gave it; None where all failed. The others are cancelled.

    Args:
        works: each begins `stagger` seconds after the one before it, or at once when one has failed.
        stagger: seconds.
        failed: hears of each that failed; what it raises ends all.
    """
    running: dict[asyncio.Task[T], int] = {}
    left = list(enumerate(works))
    try:
        while left or running:
            if left:
                number, work = left.pop(0)
                running[asyncio.create_task(work())] = number
            timeout = stagger if left else None
            done, _ = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=running.__getitem__):
                number, error = running.pop(task), task.exception()
                if error is None:
                    return number, task.result()
                if not isinstance(error, Exception):
                    raise error
                failed(number, error)
        return None
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@contextmanager
def told_if_slow(tell: Callable[[str], None], words: str, seconds: float = 2.0) -> Iterator[None]:
    """Say what is waited for, once, where the block takes longer than `seconds`: a person must not look at silence."""
    timer = asyncio.get_running_loop().call_later(seconds, tell, words)
    try:
        yield
    finally:
        timer.cancel()


class Flights(Generic[K, T]):
    """Works that several may wait for: each is under way once, however many ask for it."""

    def __init__(self) -> None:
        self._tasks: dict[K, asyncio.Task[T]] = {}

    async def join(self, key: K, begin: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What the work on `key` gives or raises. It begins where none is under way."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(begin())
            task.add_done_callback(lambda done: self._land(key, done))
        # Shielded: one that goes away must not take the work from the others.
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Stop all that is under way. Twice is once."""
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _land(self, key: K, task: asyncio.Task[T]) -> None:
        self._tasks.pop(key, None)
        if not task.cancelled():
            # All that waited may be gone: the error was for them, and asyncio should not complain of it.
            task.exception()


class News(Generic[K]):
    """Events by name: those that wait for one thing hang on one event."""

    def __init__(self) -> None:
        # Weak: an event without a waiter is forgotten by itself.
        self._events: WeakValueDictionary[K, asyncio.Event] = WeakValueDictionary()

    def of(self, key: K) -> asyncio.Event:
        """Set as soon as `key` is told of. Take it first, then look whether it is needed, then wait."""
        event = self._events.get(key)
        if event is None:
            event = self._events[key] = asyncio.Event()
        return event

    def tell(self, keys: Iterable[K]) -> None:
        """Wake all that wait for these."""
        for key in keys:
            event = self._events.pop(key, None)
            if event is not None:
                event.set()
