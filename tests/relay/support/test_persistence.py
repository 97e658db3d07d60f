from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import RefusedError, UnreachableError
from relay.support.persistence import ASKED_MAX, Bearing, Persistence, seconds_asked

GONE = UnreachableError("gone")
BUSY = UnreachableError("busy", retry_after=1.0)
AT_ONCE = Persistence(first_pause=0.0, failures=3)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def pauses(bearing: Bearing, number: int) -> list[float | None]:
    return [bearing.pause_after(GONE) for _ in range(number)]


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("inf", None),
        ("nan", None),
        ("0x10", None),
        ("\u0663", None),
        ("Wed, 99 Foo 2026 07:28:00 GMT", None),
        ("0", 0.0),
        (" 120 ", 120.0),
        ("1.5", 1.5),
        ("86400", ASKED_MAX),
        ("9" * 5000, ASKED_MAX),
        ("Mon, 30 Nov 2026 12:00:30 GMT", 30.0),
        ("Monday, 30-Nov-26 12:00:30 GMT", 30.0),
        ("Mon Nov 30 12:00:30 2026", 30.0),
        ("Mon, 30 Nov 2026 11:59:00 GMT", 0.0),
        ("Wed, 21 Oct 2099 07:28:00 GMT", ASKED_MAX),
        ("Fri, 31 Dec 99999 23:59:59 GMT", None),
    ],
)
def test_what_the_other_side_asks_for_is_read_in_every_form_and_within_an_hour(
    said: str | None, seconds: float | None
) -> None:
    assert seconds_asked(said, datetime(2026, 11, 30, 12, 0, 0, tzinfo=UTC)) == seconds


@given(st.text())
def test_no_text_of_the_other_side_asks_for_more(said: str) -> None:
    assert 0.0 <= (seconds_asked(said) or 0.0) <= ASKED_MAX


def test_pauses_double_up_to_the_longest_and_the_last_failure_ends_it() -> None:
    assert pauses(Bearing(Persistence(1.0, 5.0, failures=4)), 5) == [1.0, 2.0, 4.0, 5.0, None]


def test_without_a_number_of_failures_it_never_ends() -> None:
    assert pauses(Bearing(Persistence(1.0, 5.0)), 5000)[-1] == 5.0


def test_a_gain_begins_anew() -> None:
    bearing = Bearing(Persistence(1.0, 5.0, failures=2))
    assert pauses(bearing, 2) == [1.0, 2.0]
    bearing.gain()
    assert pauses(bearing, 3) == [1.0, 2.0, None]


def test_what_was_gained_is_looked_at_with_each_failure_and_only_more_than_ever_counts() -> None:
    have = [0, 5, 5, 3, 5, 6]
    bearing = Bearing(Persistence(1.0, 50.0), lambda: have.pop(0))
    assert pauses(bearing, 5) == [1.0, 2.0, 4.0, 8.0, 1.0]


def test_a_side_that_asks_for_patience_gets_it_for_so_long_without_a_gain() -> None:
    clock = Clock()
    bearing = Bearing(Persistence(0.1, 5.0, failures=0, patience=10.0), clock=clock)
    clock.now += 9.0
    assert bearing.pause_after(BUSY) == 1.0
    bearing.gain()
    clock.now += 9.0
    assert (bearing.pause_after(BUSY), bearing.has_patience) == (1.0, True)
    clock.now += 2.0
    assert (bearing.pause_after(BUSY), bearing.has_patience) == (None, False)


@given(st.floats(0.0, 10.0), st.floats(0.0, 10.0), st.floats(0.0, 1.0), st.floats(0.0, 3600.0), st.integers(1, 5000))
def test_no_pause_is_longer_than_is_allowed_nor_shorter_than_was_asked_for(
    first: float, longest: float, spread: float, asked: float, failures: int
) -> None:
    pause = Persistence(first, longest, longest_asked=60.0, spread=spread).pause(failures, asked)
    least = max(min(first, longest) * (1.0 - spread) * 0.999, min(asked, 60.0))
    assert least <= pause <= max(longest, min(asked, 60.0))


async def failing(errors: list[Exception]) -> str:
    if errors:
        raise errors.pop(0)
    return "done"


async def test_what_succeeds_in_time_is_returned() -> None:
    errors: list[Exception] = [GONE, GONE, GONE]
    assert await AT_ONCE.call(lambda: failing(errors)) == "done"


async def test_the_last_error_is_raised_as_it_is() -> None:
    last = UnreachableError("for good")
    errors: list[Exception] = [GONE, GONE, GONE, last, GONE]
    with pytest.raises(UnreachableError) as caught:
        await AT_ONCE.call(lambda: failing(errors))
    assert caught.value is last
    assert len(errors) == 1


async def test_an_error_that_another_try_cannot_help_is_raised_at_once() -> None:
    errors: list[Exception] = [RefusedError("no"), GONE]
    with pytest.raises(RefusedError):
        await AT_ONCE.call(lambda: failing(errors))
    assert errors == [GONE]


async def test_tries_end_with_the_time_for_all_of_them() -> None:
    async with asyncio.timeout(30):
        with pytest.raises(UnreachableError):
            await Persistence(0.01, 0.01).call(lambda: failing([GONE]), seconds=0.1)


async def test_a_task_that_is_cancelled_in_a_pause_ends() -> None:
    errors: list[Exception] = [GONE] * 2
    task = asyncio.create_task(Persistence(3600.0, 3600.0).call(lambda: failing(errors)))
    while len(errors) == 2:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
