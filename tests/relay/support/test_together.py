"""Several works at once: the first result, and nobody looks at silence."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from relay.errors import UnreachableError
from relay.support.together import first_result, told_if_slow

FOR_EVER = 3600.0


async def silent() -> str:
    await asyncio.sleep(FOR_EVER)
    raise AssertionError


async def failing() -> str:
    raise UnreachableError("away")


async def good() -> str:
    return "good"


async def race(
    *works: Callable[[], Awaitable[str]], stagger: float = FOR_EVER
) -> tuple[tuple[int, str] | None, list[int]]:
    failed: list[int] = []
    found = await first_result(works, stagger=stagger, failed=lambda number, _: failed.append(number))  # type: ignore[arg-type]
    return found, failed


async def test_the_first_that_answers_is_not_accompanied() -> None:
    begun: list[str] = []

    async def another() -> str:
        begun.append("another")
        return "another"

    assert await race(good, another) == ((0, "good"), [])
    assert begun == []


async def test_one_that_fails_is_followed_by_the_next_at_once() -> None:
    assert await race(failing, failing, good) == ((2, "good"), [0, 1])


async def test_one_that_is_silent_is_followed_by_the_next_soon_and_cancelled_at_last() -> None:
    assert await race(silent, silent, good, stagger=0.01) == ((2, "good"), [])
    assert len(asyncio.all_tasks()) == 1


async def test_where_all_fail_there_is_no_result() -> None:
    assert await race(failing, failing) == (None, [0, 1])
    assert await race() == (None, [])


async def test_what_the_listener_raises_ends_all() -> None:
    def failed(_number: int, error: Exception) -> None:
        raise error

    with pytest.raises(UnreachableError):
        await first_result([silent, failing], stagger=0.0, failed=failed)
    assert len(asyncio.all_tasks()) == 1


async def test_what_takes_long_is_told_once() -> None:
    told: list[str] = []
    with told_if_slow(told.append, "waiting", 0.0):
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.02)
    assert told == ["waiting"]


async def test_what_is_quick_or_failed_at_once_is_not_told() -> None:
    told: list[str] = []
    with told_if_slow(told.append, "waiting", 0.01):
        pass
    try:
        with told_if_slow(told.append, "waiting", 0.01):
            raise ValueError
    except ValueError:
        await asyncio.sleep(0.05)
    assert told == []
