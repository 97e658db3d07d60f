from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.support.rate_limit import BURST_SECONDS, Pacer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(
    st.floats(1.0, 1e9),
    st.lists(st.tuples(st.integers(1, 1 << 20), st.floats(0.0, 10.0)), min_size=1, max_size=50),
)
def test_never_more_than_the_rate_and_one_burst(rate: float, sends: list[tuple[int, float]]) -> None:
    """Whoever waits as told has sent, up to any moment, no more than rate x time and one burst."""
    clock = Clock()
    pacer = Pacer(rate, clock=clock)
    begun, total = clock.now, 0
    for size, idle in sends:
        clock.now += idle
        clock.now += pacer.take(size)
        total += size
        assert total <= rate * (clock.now - begun + BURST_SECONDS) * 1.000001 + 1e-3


def test_who_never_pauses_gets_the_whole_rate() -> None:
    clock = Clock()
    pacer = Pacer(1000.0, clock=clock)
    for _ in range(100):
        clock.now += pacer.take(100)
    assert clock.now - 100.0 == pytest.approx(10.0, abs=BURST_SECONDS + 0.1)


def test_what_was_not_used_is_not_saved_up() -> None:
    clock = Clock()
    pacer = Pacer(1000.0, clock=clock)
    clock.now += 3600
    pacer.take(int(1000 * BURST_SECONDS))
    assert pacer.take(1000) == pytest.approx(1.0)


async def test_connections_to_one_place_share_its_limit() -> None:
    pacer = Pacer(1e6)
    waited = await asyncio.gather(*(pacer.wait(40_000) for _ in range(5)))
    assert max(waited) >= 0.1
    assert waited == sorted(waited)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_lets_nothing_through_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="lets nothing through"):
        Pacer(rate)
