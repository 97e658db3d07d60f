"""Of events that repeat, one is told at once and the number of the others each minute; none is lost, and none costs more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.audit.event import Told
from relay.audit.repeats import KINDS_MAX, SECONDS, Repeats


def refused(address: str, path: str = "/") -> Told:
    return Told("relay.request_refused", {"address": address, "path": path}, alike=("address",))


def test_a_flood_is_told_at_once_and_once_a_minute_with_its_count() -> None:
    repeats = Repeats()
    assert [repeats.admits(refused("a", f"/{n}"), n * 0.1) for n in range(313)] == [True] + [False] * 312
    assert repeats.due(SECONDS - 0.1) == []
    (more,) = repeats.due(SECONDS)
    assert more.fields == {"address": "a", "more": 312, "seconds": 60.0, "message": "312 more like this in 60 s"}
    assert not repeats.admits(refused("a"), SECONDS + 1), "it goes on: still one line a minute"
    assert repeats.due(2 * SECONDS)[0].fields["more"] == 1


def test_what_is_not_alike_is_told_apart() -> None:
    repeats = Repeats()
    assert repeats.admits(refused("a"), 0.0)
    assert repeats.admits(refused("b"), 0.0)
    assert all(repeats.admits(Told("relay.ready", {}), 0.0) for _ in range(10)), "acts are all told"


def test_what_was_quiet_for_a_minute_is_told_at_once_again() -> None:
    repeats = Repeats()
    assert repeats.admits(refused("a"), 0.0)
    assert repeats.due(SECONDS) == []
    assert repeats.next_due() is None
    assert repeats.admits(refused("a"), SECONDS + 1)


def test_more_kinds_than_one_can_tell_apart_are_one_kind() -> None:
    repeats = Repeats()
    told = sum(repeats.admits(refused(str(n)), 0.0) for n in range(10_000))
    assert told == KINDS_MAX + 1
    (others,) = repeats.due(SECONDS)
    assert others.fields["more"] == 10_000 - told
    assert "address" not in others.fields


@pytest.mark.parametrize("kinds", [2, 64])
@given(steps=st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 40)), max_size=60))
def test_every_event_is_told_or_counted(kinds: int, steps: list[tuple[str, float]]) -> None:
    repeats, now, told, counted = Repeats(kinds=kinds), 0.0, 0, 0
    for name, pause in steps:
        now += pause
        counted += sum(int(str(more.fields["more"])) for more in repeats.due(now))
        told += repeats.admits(refused(name), now)
    counted += sum(int(str(more.fields["more"])) for more in repeats.due(float("inf")))
    assert told + counted == len(steps)
