from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import UnreachableError
from relay.support.byte_budget import ByteBudget

PATIENCE = 30.0


async def settle() -> None:
    """Let every task run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


# --- at once


@given(st.integers(0, 100), st.lists(st.integers(0, 50)))
def test_it_is_never_exceeded_and_always_given_back(limit: int, sizes: list[int]) -> None:
    budget = ByteBudget(limit)
    with budget.place() as place:
        for size in sizes:
            before = budget.used
            try:
                place.take(size)
            except UnreachableError:
                assert before + size > limit
                assert budget.used == before
            assert budget.used <= limit
    assert budget.used == 0


def test_bytes_that_are_kept_for_no_need_give_way_only_where_that_is_enough() -> None:
    kept = 40

    def make_way(lacking: int, at_any_cost: bool) -> bool:
        nonlocal kept
        if lacking > kept:
            return False
        kept -= lacking
        budget.used -= lacking
        return True

    budget = ByteBudget(100, make_way=make_way)
    with budget.place() as place:
        place.take(100)
        with pytest.raises(UnreachableError):
            place.take(41)
        assert (kept, budget.used) == (40, 100)
        place.take(30)
        assert (kept, budget.used) == (10, 100)


# --- in turn


async def test_turns_are_given_first_come_first_served_and_to_one_that_is_alone() -> None:
    budget = ByteBudget(100)
    inside: list[str] = []

    async def enter(name: str, size: int) -> None:
        await budget.enter(size)
        inside.append(name)

    async with asyncio.timeout(PATIENCE):
        await enter("a giant, alone", 1000)
        waiting = [asyncio.create_task(enter(name, size)) for name, size in (("b", 90), ("c", 5), ("d", 20))]
        await settle()
        assert (inside, budget.waiting) == (["a giant, alone"], 3)
        budget.leave(1000)
        await asyncio.gather(*waiting[:2])
        await settle()
        assert inside[1:] == ["b", "c"]
        waiting[2].cancel()
        await asyncio.wait(waiting)
        budget.leave(90)
        budget.leave(5)
    assert (budget.used, budget.waiting) == (0, 0)


async def test_one_that_gives_up_waiting_stands_in_no_others_way() -> None:
    budget = ByteBudget(100)
    await budget.enter(60)
    patient, small = asyncio.create_task(budget.enter(90)), asyncio.create_task(budget.enter(30))
    await settle()
    patient.cancel()
    async with asyncio.timeout(PATIENCE):
        await small
    budget.leave(30)
    budget.leave(60)
    assert budget.used == 0


async def test_a_turn_that_came_as_its_waiter_was_cancelled_is_given_on() -> None:
    budget = ByteBudget(100)
    await budget.enter(100)
    first, second = asyncio.create_task(budget.enter(100)), asyncio.create_task(budget.enter(100))
    await settle()
    budget.leave(100)
    first.cancel()
    async with asyncio.timeout(PATIENCE):
        await second
        with pytest.raises(asyncio.CancelledError):
            await first
    budget.leave(100)
    assert budget.used == 0


async def test_no_more_enter_than_there_are_turns() -> None:
    budget = ByteBudget(100, turns=2)
    await budget.enter(1)
    await budget.enter(1)
    third = asyncio.create_task(budget.enter(1))
    await settle()
    assert not third.done()
    budget.leave(1)
    async with asyncio.timeout(PATIENCE):
        await third


async def test_bytes_that_were_taken_at_once_keep_the_others_waiting() -> None:
    budget = ByteBudget(100)
    await budget.enter(10)
    with budget.place() as place:
        place.take(60)
        waiting = asyncio.create_task(budget.enter(40))
        await settle()
        assert not waiting.done()
    async with asyncio.timeout(PATIENCE):
        await waiting


async def test_a_place_holds_one_turn_at_a_time_and_nothing_where_it_came_too_late() -> None:
    budget = ByteBudget(100)
    await budget.enter(50)
    with budget.place() as place:
        async with asyncio.timeout(PATIENCE):
            assert await place.enter(50, PATIENCE)
            assert await place.enter(20, PATIENCE)
            assert budget.used == 70
            assert not await place.enter(90, 0.01)
        assert budget.used == 50
        place.release()
        place.release()
    budget.leave(50)
    assert budget.used == 0
