"""The planner is pure: what it chooses follows from bytes, rates and the line, and it can say why."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.encoding import estimates, planner
from relay.encoding.codecs import DELTAS, ENCODINGS, PLAIN, RAW, Coding
from relay.encoding.estimates import PREFIX, Candidate, Rates, Ratios, codings_for, estimate
from relay.encoding.planner import (
    LINES,
    RUN_BYTES_MIN,
    UNKNOWN,
    Choice,
    Line,
    Made,
    Moment,
    RunFacts,
    Schedule,
    add_up,
    choose,
    class_of,
    codings_to_answer,
    plan_run,
    request_shape,
    run_bytes,
    run_length,
    takes_stored,
)

MBIT = 1e6 / 8
MIB = 1 << 20
HDIFF, HARD = Coding("hdiff", 19), Coding("zstd", 19)


def first_send(rate: float, size: int, plain: float) -> list[Choice]:
    """How eight runs of `size` bytes in all go, that level 3 shrinks to `plain`."""
    line, schedule, found = Line(rate * MBIT), Schedule(cores=2), []
    for _ in range(8):
        moment = schedule.moment(line, ahead=4)
        found.append(send(RunFacts(size // 8), line, Ratios({PLAIN: plain}), moment))
        schedule.add(found[-1], moment)
    return found


def next_version(rate: float, size: int, base: int, prefix: float, harder: float) -> Coding:
    ratios = Ratios({PREFIX: prefix, Coding("zstd-prefix", 9): harder})
    return send(RunFacts(size, base), Line(rate * MBIT, 0.05), ratios).coding


def send(run: RunFacts, line: Line, ratios: Ratios, moment: Moment = planner.AT_ONCE) -> Choice:
    codings = codings_for(has_bases=run.base_size > 0 and line.kind.delta_run > 0)
    return plan_run(run, line, moment, ratios=ratios, rates=Rates(), codings=codings)


# --- what is chosen


def test_on_a_thin_line_a_first_send_is_compressed_as_hard_as_can_be() -> None:
    assert {choice.coding for choice in first_send(1, 27_000_000, 0.42)} == {HARD}


@pytest.mark.parametrize("rate", [100, 1000])
def test_on_a_fast_line_the_hardest_level_is_not_waited_for(rate: float) -> None:
    for choice in first_send(rate, 27_000_000, 0.42):
        assert choice.coding.encoding == "zstd"
        assert choice.coding.level <= 12


def test_the_faster_the_line_the_less_is_compressed() -> None:
    rates = (1, 10, 100, 1000, 10_000, 1_000_000)
    sums = [sum(choice.coding.level for choice in first_send(rate, 27_000_000, 0.42)) for rate in rates]
    assert sums == sorted(sums, reverse=True)
    assert sums[0] == 8 * 19
    assert sums[-1] == 8 * 3


def test_what_does_not_compress_goes_as_it_is() -> None:
    assert {choice.coding for choice in first_send(100, 27_000_000, 1.0)} == {RAW}


def test_what_shrinks_does_not_go_as_it_is_however_fast_the_line() -> None:
    assert {choice.coding.encoding for choice in first_send(1e9, 27_000_000, 0.9)} == {"zstd"}
    choice = choose([Candidate(RAW, 1000, 0.0, 0.0), Candidate(PLAIN, 500, 1.0, 0.0)], Line(1e12))
    assert choice.coding == PLAIN
    assert choice.rows[1].why_not == "500 bytes more, and as good as no sooner"


def test_moved_code_goes_as_differences_where_bytes_are_dear_and_with_a_prefix_where_time_is() -> None:
    """EF Core 10.0.14 to 10.0.15: a prefix leaves 484 KB, level 9 of it 363 KB, differences 89 KB."""
    assert next_version(1, 2_860_000, 8_000_000, 0.169, 0.127).encoding == "hdiff"
    assert next_version(10, 2_860_000, 8_000_000, 0.169, 0.127).encoding == "zstd-prefix"
    assert next_version(1000, 2_860_000, 8_000_000, 0.169, 0.127) == PLAIN, "loading bases at both ends takes time too"


def test_what_a_prefix_does_well_is_not_searched_for_differences() -> None:
    """AspNetCore 10.0.13 to 10.0.14: trying harder gains nothing, so hdiff would not either."""
    assert next_version(10, 27_000_000, 27_000_000, 0.0083, 0.0079).encoding == "zstd-prefix"


def test_a_line_that_nothing_was_sent_over_yet_takes_round_trips_to_find_its_pace() -> None:
    short, long = Candidate(PLAIN, 100_000, 0.0, 0.0), Candidate(RAW, 3_000_000, 0.0, 0.0)
    near, far = (choose([short, long], Line(1000 * MBIT, trip)).rows for trip in (0.0, 0.05))
    assert near[1].seconds - near[0].seconds < 0.03
    assert far[1].seconds - far[0].seconds > 0.15
    assert choose([short], Line(1000 * MBIT, 0.05), Moment(waiting=1.0)).rows[0].line_seconds == pytest.approx(0.0008)


def test_of_equals_the_smallest_goes_and_on_a_fast_line_what_costs_the_least_cpu() -> None:
    small, cheap = Candidate(HARD, 970_000, 0.5, 0.0), Candidate(PLAIN, 1_000_000, 0.1, 0.0)
    assert choose([small, cheap], Line(5 * MBIT)).coding == HARD
    hardly_smaller = Candidate(HARD, 990_000, 0.5, 0.0)
    assert choose([hardly_smaller, cheap], Line(5 * MBIT)).coding == PLAIN
    assert choose([hardly_smaller, cheap], Line(1 * MBIT)).coding == HARD
    small, cheap = Candidate(HARD, 97_000_000, 1.5, 0.0), Candidate(PLAIN, 100_000_000, 1.0, 0.0)
    assert choose([small, cheap], Line(100 * MBIT)).coding == HARD
    assert choose([small, cheap], Line(300 * MBIT)).coding == PLAIN


def test_a_line_that_was_never_measured_is_taken_for_a_thin_one() -> None:
    assert Line().rate == UNKNOWN
    assert Line().kind.name == "thin"
    assert Line(goodput=None, limit=50.0).rate == 50.0


def test_a_limit_counts_as_the_line_does() -> None:
    slow = Candidate(HARD, 1_000_000, 4.0, 0.0)
    fast = Candidate(PLAIN, 1_300_000, 0.1, 0.0)
    assert choose([slow, fast], Line(100 * MBIT)).coding == PLAIN
    assert choose([slow, fast], Line(100 * MBIT, limit=1 * MBIT)).coding == HARD


def test_what_is_kept_already_costs_no_encoder() -> None:
    line = Line(100 * MBIT)
    made = estimate(HARD, 8 << 20, ratios=Ratios(), rates=Rates(), exact=2_500_000, is_kept=True)
    anew = estimate(HARD, 8 << 20, ratios=Ratios(), rates=Rates())
    plain = estimate(PLAIN, 8 << 20, ratios=Ratios(), rates=Rates())
    assert choose([plain, anew], line).coding == PLAIN
    assert choose([plain, made], line).coding == HARD


def test_an_encoder_may_take_its_time_while_the_line_is_busy_with_what_is_ahead() -> None:
    line = Line(10 * MBIT)
    hard = Candidate(HARD, 2_000_000, 3.0, 0.0, start_seconds=0.3)
    fast = Candidate(PLAIN, 2_500_000, 0.05, 0.0)
    assert choose([hard, fast], line).coding == PLAIN
    assert choose([hard, fast], line, Moment(waiting=6.0)).coding == HARD


def test_an_encoder_that_would_just_keep_up_with_the_line_is_not_relied_upon() -> None:
    just, surely = Candidate(HARD, 10_000_000, 7.9, 0.0), Candidate(HARD, 10_000_000, 3.9, 0.0)
    easy = Candidate(PLAIN, 11_000_000, 0.1, 0.0)
    assert choose([just, easy], Line(10 * MBIT)).coding == PLAIN
    assert choose([surely, easy], Line(10 * MBIT)).coding == HARD


def test_an_encoder_that_has_to_wait_for_a_core_is_reckoned_with() -> None:
    line, hard, easy = Line(10 * MBIT), Candidate(HARD, 2_000_000, 0.3, 0.0), Candidate(PLAIN, 2_500_000, 0.0, 0.0)
    assert choose([hard, easy], line).coding == HARD
    kept = Candidate(PLAIN, 2_500_000, 0.0, 0.0, source="kept")
    assert choose([hard, kept], line, Moment(queueing=5.0)).coding == PLAIN


# --- what it says


def test_the_rows_tell_the_arithmetic_and_why_not() -> None:
    choice = choose(
        [Candidate(PLAIN, 1_250_000, 0.1, 0.2), Candidate(HARD, 1_000_000, 9.0, 0.1), Candidate(RAW, 5_000_000, 0, 0)],
        Line(10 * MBIT),
    )
    best, *rest = choice.rows
    assert (best.candidate.coding, best.chosen, best.why_not) == (PLAIN, True, "")
    assert best.line_seconds == pytest.approx(1.0)
    assert best.seconds == pytest.approx(1.2)
    why = {row.candidate.coding: row.why_not for row in rest}
    assert "its encoder is slower than the line" in why[HARD]
    assert "3750000 bytes more" in why[RAW]
    assert choice.chosen is best.candidate


candidates_ = st.lists(
    st.builds(
        Candidate,
        st.sampled_from(codings_for(True)),
        st.integers(1, 1 << 32),
        st.floats(0, 1e4),
        st.floats(0, 1e3),
    ),
    min_size=1,
    max_size=8,
)


@given(candidates_, st.floats(1.0, 1e10), st.floats(0, 1e4), st.floats(0, 1e4))
def test_the_choice_is_never_much_later_than_the_best_and_always_one_of_them(
    candidates: list[Candidate], rate: float, waiting: float, queueing: float
) -> None:
    choice = choose(candidates, Line(rate), Moment(0.0, waiting, queueing))
    assert choice.chosen in candidates
    assert choice.chosen.coding == choice.coding
    assert len(choice.rows) == len(candidates)
    assert sum(row.chosen for row in choice.rows) == 1
    smallest = min((one.payload_bytes for one in candidates if one.coding == PLAIN), default=1 << 60)
    hardest = max((one.coding for one in candidates if one.coding.encoding == "hdiff"), default=None)
    # What would shrink does not go as it is, however fast the line; on a thin one differences are packed as hard as can be.
    best = min(
        row.seconds
        for row in choice.rows
        if (row.candidate.coding != RAW or smallest >= 0.97 * row.candidate.payload_bytes)
        and (
            class_of(rate).name != "thin" or row.candidate.coding.encoding != "hdiff" or row.candidate.coding == hardest
        )
    )
    assert choice.rows[0].seconds <= best * 1.1 + 0.31


# --- what is reckoned


@given(
    st.sampled_from([*codings_for(True), Coding("zstd", 15), Coding("hdiff", 1), Coding("zstd-prefix", 19)]),
    st.integers(1, 1 << 32),
    st.integers(0, 1 << 32),
    st.floats(0.0001, 1.0),
)
def test_estimates_are_sane_whatever_is_asked(coding: Coding, size: int, base: int, plain: float) -> None:
    found = estimate(coding, size, base, ratios=Ratios({PLAIN: plain}), rates=Rates())
    assert 1 <= found.payload_bytes <= max(1.2 * size, 1)
    assert found.encode_seconds >= 0
    assert found.decode_seconds >= 0
    assert found.exact == (coding == RAW)


def test_what_was_seen_counts_more_than_what_is_typical() -> None:
    ratios = Ratios({PLAIN: 0.5})
    assert ratios.of(HARD) == pytest.approx(0.4)
    assert ratios.with_seen(HARD, 0.3).of(HARD) == pytest.approx(0.3)
    assert ratios.with_seen(HARD, 0.3).with_seen(HARD, 0.5).of(HARD) == pytest.approx(0.5)


def test_what_does_not_shrink_at_level_3_is_not_hoped_to_shrink_at_19() -> None:
    assert Ratios({PLAIN: 1.0}).of(HARD) == pytest.approx(1.0)


def test_encoders_side_by_side_share_the_work() -> None:
    def queueing(cores: int) -> float:
        line, schedule = Line(1e9), Schedule(cores)
        for _ in range(4):
            moment = schedule.moment(line, ahead=4)
            schedule.add(choose([Candidate(HARD, 1000, 8.0, 0.0)], line, moment), moment)
        return schedule.moment(line, ahead=4).queueing

    assert [queueing(cores) for cores in (1, 2, 4, 8)] == [32.0, 16.0, 8.0, 0.0]


def test_a_run_waits_for_those_that_are_planned_and_not_across_yet() -> None:
    line, schedule = Line(1e6), Schedule(cores=2)
    for _ in range(6):
        moment = schedule.moment(line, ahead=4)
        schedule.add(choose([Candidate(RAW, 1_000_000, 0.0, 0.0)], line, moment), moment)
    moment = schedule.moment(line, ahead=4)
    assert (moment.now, moment.waiting, moment.queueing) == (2.0, 4.0, 0.0)


def test_measured_rates_take_the_place_of_typical_ones() -> None:
    slow = Rates.measured(24e6)
    assert slow.encode_seconds(HARD, 3_200_000, 0) == pytest.approx(10.0, rel=0.02)
    own = Rates.measured(240e6, level_19=1e6, hdiff=5e6)
    assert own.encode_seconds(HARD, 1_000_000, 0) == pytest.approx(1.0, rel=0.02)
    assert own.start_seconds(HDIFF, 5_000_000, 5_000_000) == pytest.approx(2.0, rel=0.02)
    assert Rates.measured(0.0) == Rates.measured(Rates().zstd[3])


def test_only_what_the_receiver_knows_is_weighed_up() -> None:
    assert {coding.encoding for coding in codings_for(True, ("raw", "zstd"))} == {"raw", "zstd"}
    assert not any(coding.needs_bases for coding in codings_for(False))


def test_what_cannot_be_made_here_is_not_planned(monkeypatch):
    monkeypatch.setattr(estimates, "can_encode", lambda encoding: encoding != "hdiff")
    codings = codings_for(has_bases=True)
    assert codings
    assert "hdiff" not in {coding.encoding for coding in codings}
    assert "zstd-prefix" in {coding.encoding for coding in codings}


# --- the table


def test_the_table_goes_from_thin_to_fast_and_every_line_has_one_class() -> None:
    assert [one.up_to for one in LINES] == sorted({one.up_to for one in LINES})
    assert [class_of(one.up_to) for one in LINES] == list(LINES)
    assert class_of(1e300) is LINES[-1]


@given(
    st.one_of(st.none(), st.floats(1.0, 1e10)), st.integers(1, 1 << 32), st.integers(0, 1 << 32), st.booleans(),
    st.integers(1, 8),
)  # fmt: skip
def test_a_run_is_never_shorter_or_longer_than_the_table_allows(
    goodput: float | None, whole: int, begun: int, has_bases: bool, connections: int
) -> None:
    line = Line(goodput)
    most = run_bytes(line, whole, begun, has_bases=has_bases and line.kind.delta_run > 0, connections=connections)
    assert RUN_BYTES_MIN <= most <= max(line.kind.longest_run, line.kind.delta_run)


def test_runs_grow_as_what_is_ahead_does() -> None:
    line, begun, found = Line(8 * MBIT), 0, []
    while begun < 64 * MIB:
        found.append(run_bytes(line, 64 * MIB, begun))
        begun += found[-1]
    assert [size // MIB for size in found[:6]] == [1, 1, 2, 4, 8, 16]
    assert run_bytes(Line(1 * MBIT), 64 * MIB) == 16 * MIB, "nothing waits on a thin line"
    assert run_bytes(Line(), 64 * MIB) == MIB, "but one that is not known may be a fast one"


def test_a_relay_encodes_short_runs_for_its_many_readers_where_bytes_are_not_all_that_counts() -> None:
    longest = [run_bytes(Line(rate), 64 * MIB, 64 * MIB, to_reader=True) // MIB for rate in (100e3, 500e3, 2e6, 20e6)]
    assert longest == [16, 16, 4, 4]


def test_a_few_bytes_before_a_long_chunk_are_no_run() -> None:
    assert run_length([1000, 5 * MIB, 10], 4 * MIB) == 2
    assert run_length([3 * MIB, 2 * MIB], 4 * MIB) == 1
    assert run_length([9 * MIB], 4 * MIB) == 1
    assert run_length([], 4 * MIB) == 0


@pytest.mark.parametrize("can_have_bases", [True, False])
@pytest.mark.parametrize("goodput", [0.0, *(one.up_to for one in LINES[:-1]), 1e9])
def test_a_reader_asks_by_the_same_table(goodput: float, can_have_bases: bool) -> None:
    how, kind = request_shape(goodput, can_have_bases=can_have_bases), class_of(goodput or UNKNOWN)
    assert how.with_bases == (can_have_bases and kind.names_bases)
    if goodput or can_have_bases:
        assert how.one_at_a_time == (kind.connections == 1)
        assert how.segment_bytes >= run_bytes(Line(goodput or None), 1 << 30, 1 << 30, has_bases=how.with_bases) // 2
    else:
        assert not how.one_at_a_time


# --- what a relay answers to a reader

EVERYTHING = frozenset(ENCODINGS)
SIMPLE = frozenset({"raw", "zstd"})
FIRST = RunFacts(8 * MIB, stored_size=3 * MIB)
NEXT = RunFacts(16 * MIB, 32 * MIB, stored_size=6 * MIB)


def answer(run: RunFacts, rate: float, encodings: frozenset[str] = EVERYTHING, *, busy: bool = False) -> Candidate:
    line = Line(rate * MBIT or None)
    codings = () if busy else codings_to_answer(run, line, encodings)
    ratios = planner.ratios_of_stored(run)
    return plan_run(run, line, ratios=ratios, rates=Rates(), codings=codings).chosen


def with_made(run: RunFacts, coding: Coding, size: int | None = None) -> RunFacts:
    return RunFacts(run.size, run.base_size, (Made(coding, size),), run.stored_size)


def test_a_reader_that_says_nothing_gets_what_is_stored() -> None:
    assert takes_stored(Line(), has_bases=False)
    assert answer(FIRST, 0, SIMPLE).source == "stored"


def test_a_plentiful_line_gets_what_is_stored_whatever_the_reader_holds() -> None:
    assert takes_stored(Line(201 * MBIT), has_bases=True)
    assert answer(NEXT, 201).source == "stored"


def test_a_thin_line_gets_a_difference_where_there_are_bases() -> None:
    for rate in (0.5, 1, 10):
        assert answer(NEXT, rate).coding.needs_bases


def test_the_thinnest_line_gets_the_fewest_bytes() -> None:
    assert answer(NEXT, 0.5).coding == HDIFF
    assert answer(FIRST, 0.5, SIMPLE).coding == HARD


def test_without_bases_a_middle_line_gets_runs_and_a_core_is_not_kept_busy_for_little() -> None:
    found = answer(FIRST, 10, SIMPLE)
    assert (found.coding.encoding, found.source) == ("zstd", "encoder")
    assert found.coding.level < 19


def test_a_line_that_is_not_known_gets_a_difference_that_is_made_fast() -> None:
    """A slow encoder would look like a thin line to the reader, who measures it."""
    assert answer(NEXT, 0).coding == PREFIX


def test_what_is_made_already_is_sent_unless_something_much_smaller_can_be_made() -> None:
    assert answer(with_made(NEXT, HDIFF, MIB // 4), 1).source == "kept"
    assert answer(with_made(NEXT, Coding("hdiff", 0)), 1).source == "kept"
    found = answer(with_made(NEXT, PLAIN, 6 * MIB), 1)
    assert found.source == "encoder"
    assert found.coding.needs_bases


def test_a_payload_on_its_way_in_is_handed_on_to_a_reader_that_says_nothing() -> None:
    assert answer(with_made(FIRST, Coding("zstd", 0)), 0, SIMPLE).source == "kept"


def test_while_encoders_wait_nothing_new_is_begun_but_what_is_there_is_sent() -> None:
    assert answer(NEXT, 1, busy=True).source == "stored"
    assert answer(with_made(NEXT, HDIFF, MIB), 1, busy=True).source == "kept"


@given(
    st.sets(st.sampled_from(ENCODINGS)).map(lambda some: frozenset({*some, "zstd"})),
    st.one_of(st.just(0.0), st.floats(1e-5, 1e4)),
    st.integers(1, 64 * MIB),
    st.integers(0, 64 * MIB),
    st.floats(0.01, 1.0),
    st.booleans(),
)
def test_nothing_is_chosen_that_the_reader_cannot_decode_or_that_lacks_its_bases(
    encodings: frozenset[str], rate: float, size: int, base_size: int, stored: float, busy: bool
) -> None:
    found = answer(RunFacts(size, base_size, stored_size=max(1, round(size * stored))), rate, encodings, busy=busy)
    if found.source == "encoder":
        assert found.coding.encoding in encodings
        assert base_size or found.coding.encoding not in DELTAS
        assert not busy
    else:
        assert found.source == "stored"


# --- several runs together


def test_a_table_of_several_runs_sums_them_and_names_all_that_were_chosen() -> None:
    line = Line(10 * MBIT)
    one = choose([Candidate(PLAIN, 1_000_000, 0.1, 0.0), Candidate(HARD, 900_000, 9.0, 0.0)], line)
    other = choose([Candidate(PLAIN, 500_000, 0.1, 0.0), Candidate(PREFIX, 1000, 0.1, 0.1)], line)
    rows = {row.candidate.coding: row for row in add_up([one, other], line, cores=2)}
    assert {coding: row.candidate.payload_bytes for coding, row in rows.items()} == {
        PLAIN: 1_500_000,
        PREFIX: 1_001_000,
        HARD: 901_000,
    }
    assert {coding for coding, row in rows.items() if row.chosen} == {PLAIN, PREFIX}
    assert "its encoder is slower than the line" in rows[HARD].why_not


# --- what a person prefers


@pytest.mark.parametrize("mbit", [3, 10, 40, 150, 250, 1000])
def test_bytes_are_preferred_where_times_are_within_a_tenth(mbit: int) -> None:
    """A second of the line, or a difference of 9 kB that takes about as long to be put together again."""
    plain, delta = Candidate(PLAIN, mbit * MBIT, 0.0, 0.0), Candidate(PREFIX, 9_000, 0.0, 0.0)
    about_as_fast, late = replace(delta, decode_seconds=1.0), replace(delta, decode_seconds=1.6)
    far_sooner = replace(delta, decode_seconds=0.2)
    frugal, hasty = Line(mbit * MBIT, prefer="bytes"), Line(mbit * MBIT, prefer="time")
    assert [choose([plain, one], frugal).coding for one in (about_as_fast, late)] == [PREFIX, PLAIN]
    assert [choose([plain, one], hasty).coding for one in (far_sooner, late)] == [PREFIX, PLAIN]
    some_later = replace(delta, decode_seconds=1.07)
    assert [choose([plain, some_later], line).coding for line in (frugal, hasty)] == [PREFIX, PLAIN]


def test_without_a_wish_a_line_goes_by_its_class() -> None:
    """A relay's readers have its processors in common."""
    plain, delta = Candidate(PLAIN, 4_000_000, 0.02, 0.01), Candidate(PREFIX, 9_000, 0.13, 0.01)
    assert choose([plain, delta], Line(250 * MBIT)).coding == PLAIN
    assert choose([plain, delta], Line(250 * MBIT, prefer="bytes")).coding == PREFIX
