"""How a relay decides what to send to one reader: pure, so that every promise can be asked for its arithmetic."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relay.encoding.codecs import DELTAS, ENCODINGS, Coding
from relay.protocol.messages import CpuRates
from relay.transfer.choose_form import FAST_GOODPUT, Asked, Kept, Run, choose_way

MIB = 1 << 20
EVERYTHING = frozenset(ENCODINGS)
PLAIN = frozenset({"raw", "zstd"})
FIRST = Run(8 * MIB, 0, 3 * MIB, runs=4)
NEXT = Run(16 * MIB, 40 * MIB, 6 * MIB)
CPU = CpuRates(1e9, 800e6, 240e6, 55e6, 3.2e6, 18e6, 2)


def mbit(rate: float) -> float:
    return rate * 1e6 / 8


def test_who_says_nothing_gets_what_is_stored():
    assert Asked(PLAIN, 0.0, has_bases=False).wants_stored
    assert choose_way(Asked(PLAIN, 0.0, has_bases=False), FIRST, CPU) == "stored"


def test_a_fast_line_gets_what_is_stored_whatever_the_reader_holds():
    asked = Asked(EVERYTHING, FAST_GOODPUT, has_bases=True)
    assert asked.wants_stored
    assert choose_way(asked, NEXT, CPU) == "stored"


def test_a_thin_line_gets_a_difference_where_there_are_bases():
    for rate in (0.5, 1, 10):
        way = choose_way(Asked(EVERYTHING, mbit(rate), has_bases=True), NEXT, CPU)
        assert isinstance(way, Coding)
        assert way.needs_bases


def test_the_thinnest_line_gets_the_fewest_bytes():
    assert choose_way(Asked(EVERYTHING, mbit(0.5), has_bases=True), NEXT, CPU) == Coding("hdiff", 19)
    assert choose_way(Asked(PLAIN, mbit(0.5), has_bases=False), FIRST, CPU) == Coding("zstd", 19)


def test_without_bases_a_thin_line_gets_runs_and_a_core_is_not_kept_busy_for_little():
    way = choose_way(Asked(PLAIN, mbit(10), has_bases=False), FIRST, CPU)
    assert isinstance(way, Coding)
    assert way.encoding == "zstd"
    assert way.level < 19


def test_a_line_that_nobody_knows_gets_a_difference_that_is_made_fast():
    """A slow encoder would look like a thin line to whoever measures it."""
    assert choose_way(Asked(EVERYTHING, 0.0, has_bases=True), NEXT, CPU) == Coding("zstd-prefix", 3)


def test_what_is_made_already_is_sent_unless_something_much_smaller_can_be_made():
    thin = Asked(EVERYTHING, mbit(1), has_bases=True)
    assert choose_way(thin, NEXT, CPU, kept=Kept(Coding("hdiff", 19), MIB // 4)) == "kept"
    assert choose_way(thin, NEXT, CPU, kept=Kept(Coding("hdiff", 0))) == "kept"
    way = choose_way(thin, NEXT, CPU, kept=Kept(Coding("zstd", 3), 6 * MIB))
    assert isinstance(way, Coding)
    assert way.needs_bases


def test_a_payload_on_its_way_in_is_handed_on_to_who_says_nothing():
    assert choose_way(Asked(PLAIN, 0.0, has_bases=False), FIRST, CPU, kept=Kept(Coding("zstd", 0))) == "kept"


def test_while_encoders_wait_nothing_new_is_begun_but_what_is_there_is_sent():
    thin = Asked(EVERYTHING, mbit(1), has_bases=True)
    assert choose_way(thin, NEXT, CPU, busy=True) == "stored"
    assert choose_way(thin, NEXT, CPU, busy=True, kept=Kept(Coding("hdiff", 19), MIB)) == "kept"


@given(
    st.sets(st.sampled_from(ENCODINGS)).map(lambda some: frozenset({*some, "zstd"})),
    st.one_of(st.just(0.0), st.floats(1.0, 1e9)),
    st.integers(1, 64 * MIB),
    st.integers(0, 64 * MIB),
    st.floats(0.01, 1.0),
    st.integers(1, 500),
    st.booleans(),
)
def test_nothing_is_chosen_that_the_reader_cannot_decode_or_that_lacks_its_bases(
    encodings, goodput, size, base_size, stored, runs, busy
):
    run = Run(size, base_size, round(size * stored), runs)
    way = choose_way(Asked(encodings, goodput, has_bases=bool(base_size)), run, CPU, busy=busy)
    if isinstance(way, Coding):
        assert way.encoding in encodings
        assert base_size or way.encoding not in DELTAS
        assert not busy
    else:
        assert way == "stored"
