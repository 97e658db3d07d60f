from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.encoding.planner import Line
from relay.errors import StoreError
from relay.package.identity import ManifestId, PackageId
from relay.stores.memory import MemoryDocuments
from relay.stores.open import open_store
from relay.transfer.link_history import CONNECTIONS_MAX, Connections, Lines, Meter, connections_for

URL = "https://relay.fra.example:7443"
MIB = 1 << 20


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def carried(
    meter: Meter, clock: Clock, size: int, seconds: float, *, waited: float = 0.0, is_first: bool = False
) -> None:
    flight = meter.begin(is_first=is_first)
    clock.now += seconds
    meter.end(flight, size, waited)


# --- what is learnt


def test_a_bundle_measures_the_line_without_its_round_trip() -> None:
    clock = Clock()
    meter = Meter(Line(round_trip=0.05), clock=clock)
    carried(meter, clock, MIB, 1.05)
    assert meter.line.goodput == pytest.approx(MIB)


def test_bundles_side_by_side_share_the_line_and_are_counted_together() -> None:
    clock = Clock()
    meter = Meter(Line(), clock=clock)
    one, other = meter.begin(), meter.begin()
    clock.now += 2.0
    meter.end(one, MIB, 0.0)
    meter.end(other, MIB, 0.0)
    assert meter.line.goodput == pytest.approx(MIB)


def test_a_bundle_that_waited_for_its_encoder_never_makes_a_line_slower() -> None:
    clock = Clock()
    meter = Meter(Line(goodput=10e6), clock=clock)
    carried(meter, clock, MIB, 2.0, waited=1.9)
    assert meter.line.goodput == 10e6
    carried(meter, clock, 20 * MIB, 1.0, waited=0.5)
    assert 20 * MIB < meter.line.goodput < 40 * MIB


def test_a_few_bytes_are_a_guess_that_more_bytes_correct_at_once() -> None:
    """A relay that was slow to answer once is no thin line."""
    clock = Clock()
    meter = Meter(Line(), clock=clock)
    carried(meter, clock, 20_000, 1.0)
    assert not meter.is_sure
    carried(meter, clock, MIB, 0.1)
    assert meter.line.goodput == pytest.approx(10 * MIB)
    assert meter.is_sure
    assert Meter(Line(goodput=1e6)).is_sure


def test_what_is_too_short_to_tell_tells_nothing() -> None:
    clock = Clock()
    meter = Meter(Line(), clock=clock)
    carried(meter, clock, 1000, 0.1)
    assert meter.line.goodput is None
    assert meter.samples == 0


def test_a_new_connection_that_finds_its_pace_is_not_taken_for_a_slow_line() -> None:
    """350 KB over 50 ms take some five round trips at any rate: that is 1.4 MB/s, and says so of no line."""
    clock = Clock()
    first, warm = Meter(Line(round_trip=0.05), clock=clock), Meter(Line(round_trip=0.05), clock=clock)
    carried(first, clock, 350_000, 0.28, is_first=True)
    carried(warm, clock, 350_000, 0.28)
    assert first.line.goodput is not None
    assert warm.line.goodput is not None
    assert first.line.goodput > 2 * warm.line.goodput


def test_what_the_first_bundle_of_a_new_line_leaves_open_the_second_says() -> None:
    """10 Mbit/s: behind a deep queue the first bundle does not lose the time that a new connection is allowed for."""
    clock = Clock()
    meter = Meter(Line(round_trip=0.1), clock=clock)
    carried(meter, clock, 400_000, 0.45, is_first=True)
    assert meter.line.goodput is not None
    assert meter.line.goodput > 2_500_000
    carried(meter, clock, MIB, 0.1 + MIB / 1.25e6)
    assert meter.line.goodput == pytest.approx(1.25e6)


def test_what_a_new_connection_leaves_open_does_not_change_what_is_known() -> None:
    """Behind something that keeps the line busy from the start, no time is lost; elsewhere several round trips are."""
    clock = Clock()
    meter = Meter(Line(goodput=2e6, round_trip=0.05), clock=clock)
    carried(meter, clock, 350_000, 0.28, is_first=True)
    assert meter.line.goodput == 2e6
    carried(meter, clock, 350_000, 2.0, is_first=True)
    assert meter.line.goodput < 1.5e6


def test_a_line_that_changed_is_followed_within_a_few_bundles() -> None:
    clock = Clock()
    meter = Meter(Line(goodput=10e6), clock=clock)
    for _ in range(6):
        carried(meter, clock, MIB, MIB / 1e6)
    assert meter.line.goodput == pytest.approx(1e6, rel=0.2)


def test_one_that_broke_off_measures_nothing_and_leaves_no_trace() -> None:
    clock = Clock()
    meter = Meter(Line(), clock=clock)
    meter.drop(meter.begin())
    carried(meter, clock, MIB, 1.0)
    assert meter.line.goodput == pytest.approx(MIB)


@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.floats(0, 1e4), st.floats(0, 1e4), st.booleans()), max_size=20))
def test_a_goodput_is_always_a_positive_number(bundles: list[tuple[int, float, float, bool]]) -> None:
    clock = Clock()
    meter = Meter(Line(round_trip=0.05), clock=clock)
    for size, seconds, waited, is_first in bundles:
        carried(meter, clock, size, seconds, waited=waited, is_first=is_first)
    assert meter.line.goodput is None or 0 < meter.line.goodput < float("inf")


def test_the_shortest_answer_is_the_round_trip() -> None:
    meter = Meter(Line())
    meter.round_trip(0.08)
    meter.round_trip(0.05)
    meter.round_trip(0.2)
    assert meter.line.round_trip == 0.05


# --- what is remembered


async def test_a_line_is_remembered_across_processes(tmp_path) -> None:
    clock = Clock()
    meter = Meter(Line(round_trip=0.05), clock=clock)
    carried(meter, clock, MIB, 1.05)
    store = await open_store(f"disk:{tmp_path}")
    await Lines(store.documents).remember(URL, meter)
    await store.close()
    store = await open_store(f"disk:{tmp_path}")
    found = await Lines(store.documents).recall(URL)
    assert found is not None
    assert (found.goodput, found.round_trip, found.samples) == (pytest.approx(MIB), 0.05, 1)
    assert await Lines(store.documents).recall("https://other.example") is None
    await store.close()


async def test_a_line_that_was_not_used_for_long_is_a_new_one() -> None:
    documents, clock = MemoryDocuments(), Clock(1e9)
    meter = Meter(Line(goodput=1e6))
    meter.samples = 1
    await Lines(documents, clock=clock).remember(URL, meter)
    assert await Lines(documents, clock=clock).recall(URL) is not None
    clock.now += 31 * 86400
    assert await Lines(documents, clock=clock).recall(URL) is None


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b'{"url": 1}', b"\xff", b'{"url":"x","goodput":1,"round_trip":0,"at":1}']
)
async def test_a_damaged_memory_is_no_memory(damaged: bytes) -> None:
    documents = MemoryDocuments()
    meter = Meter(Line(goodput=1e6))
    meter.samples = 1
    await Lines(documents).remember(URL, meter)
    (name,) = await documents.list("state/lines")
    await documents.write(name, damaged)
    assert await Lines(documents).recall(URL) is None


async def test_a_line_that_was_not_measured_is_not_remembered() -> None:
    documents = MemoryDocuments()
    await Lines(documents).remember(URL, Meter(Line(goodput=1e6)))
    assert await documents.list("state/lines") == []


async def test_a_store_that_cannot_be_written_is_no_trouble() -> None:
    class Full(MemoryDocuments):
        async def write(self, name: str, data: bytes) -> None:
            raise StoreError("no space left", full=True)

    lines, meter = Lines(Full()), Meter(Line(goodput=1e6))
    meter.samples = 1
    await lines.remember(URL, meter)
    await lines.remember_sent(URL, PackageId("Acme.Web"), ManifestId("ab" * 32))
    assert await lines.recall(URL) is None


async def test_what_was_sent_last_is_a_guess_of_what_is_there() -> None:
    lines, id = Lines(MemoryDocuments()), PackageId("Acme.Web")
    assert await lines.recall_sent(URL, id) is None
    await lines.remember_sent(URL, id, ManifestId("ab" * 32))
    await lines.remember_sent(URL, id, ManifestId("cd" * 32))
    assert await lines.recall_sent(URL, PackageId("ACME.web")) == "cd" * 32
    assert await lines.recall_sent("https://other.example", id) is None


# --- how many connections


def test_a_thin_line_and_one_that_is_not_known_get_one_connection() -> None:
    assert connections_for(Line()) == 1
    assert connections_for(Line(goodput=1e6, round_trip=0.2)) == 1


def test_the_longer_and_faster_a_line_the_more_connections() -> None:
    assert connections_for(Line(goodput=100e6, round_trip=0.0005)) == 2
    assert 2 < connections_for(Line(goodput=12.5e6, round_trip=0.05)) < CONNECTIONS_MAX
    assert connections_for(Line(goodput=125e6, round_trip=0.05)) == CONNECTIONS_MAX


def test_connections_grow_while_that_helps_and_stay_where_it_does_not() -> None:
    connections = Connections(Line(goodput=12.5e6, round_trip=0.05))
    begun = connections.number
    for goodput in (12.5e6, 16e6, 20e6):
        for _ in range(connections.number):
            connections.after(Line(goodput=goodput, round_trip=0.05))
    grown = connections.number
    assert grown > begun
    for _ in range(50):
        connections.after(Line(goodput=20e6, round_trip=0.05))
    assert connections.number == grown


def test_large_bundles_do_not_fly_by_the_dozen() -> None:
    """What is in flight when somebody is killed crosses twice."""
    connections = Connections(Line(goodput=40e6, round_trip=0.02))
    for goodput in (40e6, 60e6, 90e6, 120e6, 180e6):
        for _ in range(8):
            connections.after(Line(goodput=goodput, round_trip=0.02), 4 * MIB)
    assert connections.number <= 5
    connections.after(Line(goodput=40e6, round_trip=0.001), 4 * MIB)
    assert connections.number == 2


def test_a_line_that_turns_out_to_be_thin_gets_one_connection_again() -> None:
    connections = Connections(Line(goodput=8e6, round_trip=0.05))
    assert connections.number > 1
    for _ in range(connections.number):
        connections.after(Line(goodput=1.2e6, round_trip=0.05), MIB)
    assert connections.number == 1


def test_a_failure_halves_the_connections() -> None:
    connections = Connections(Line(goodput=125e6, round_trip=0.05))
    connections.failed()
    assert connections.number == CONNECTIONS_MAX // 2
    for _ in range(10):
        connections.failed()
    assert connections.number == 1
