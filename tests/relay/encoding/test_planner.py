"""The planner is pure: what it chooses follows from bytes, rates and the line, and it can say why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.encoding import planner
from relay.encoding.codecs import PLAIN, RAW, Coding
from relay.encoding.planner import Candidate, Line, Rates, Ratios, choose, codings_for, estimate

MBIT = 1e6 / 8
HDIFF, PREFIX, HARD = Coding("hdiff", 19), Coding("zstd-prefix", 3), Coding("zstd", 19)


def first_send(rate: float, size: int, plain: float, cores: int = 2) -> Coding:
    """What a first send of `size` bytes that level 3 shrinks to `plain` goes as."""
    ratios = Ratios({PLAIN: plain})
    candidates = [
        estimate(coding, size, ratios=ratios, rates=Rates(), runs=8, cores=cores) for coding in codings_for(False)
    ]
    return choose(candidates, Line(rate * MBIT)).coding


def next_version(rate: float, size: int, base: int, prefix: float, harder: float) -> Coding:
    ratios = Ratios({PREFIX: prefix, Coding("zstd-prefix", 9): harder})
    candidates = [estimate(coding, size, base, ratios=ratios, rates=Rates()) for coding in codings_for(True)]
    return choose(candidates, Line(rate * MBIT, 0.05)).coding


# --- what is chosen


def test_on_a_thin_line_a_first_send_is_compressed_as_hard_as_can_be() -> None:
    assert first_send(1, 27_000_000, 0.42) == HARD


@pytest.mark.parametrize("rate", [100, 1000])
def test_on_a_fast_line_nobody_waits_for_the_hardest_level(rate: float) -> None:
    coding = first_send(rate, 27_000_000, 0.42)
    assert coding.encoding == "zstd"
    assert coding.level <= 12


def test_the_faster_the_line_the_less_is_compressed() -> None:
    levels = [first_send(rate, 27_000_000, 0.42).level for rate in (1, 10, 100, 1000, 10_000, 1_000_000)]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] == 19
    assert levels[-1] == 3


def test_what_does_not_compress_goes_as_it_is() -> None:
    assert first_send(100, 27_000_000, 1.0) == RAW


def test_what_shrinks_does_not_go_as_it_is_however_fast_the_line() -> None:
    assert first_send(1e9, 27_000_000, 0.9).encoding == "zstd"
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
    assert next_version(10, 27_000_000, 27_000_000, 0.0083, 0.0081).encoding == "zstd-prefix"


def test_a_line_that_nothing_was_sent_over_yet_takes_round_trips_to_find_its_pace() -> None:
    short, long = Candidate(PLAIN, 100_000, 0.0, 0.0), Candidate(RAW, 3_000_000, 0.0, 0.0)
    near, far = (choose([short, long], Line(1000 * MBIT, trip)).rows for trip in (0.0, 0.05))
    assert near[1].seconds - near[0].seconds < 0.03
    assert far[1].seconds - far[0].seconds > 0.15
    assert choose([short], Line(1000 * MBIT, 0.05), waiting=1.0).rows[0].line_seconds == pytest.approx(0.0008)


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
    assert Line().rate == planner.UNKNOWN
    assert Line().is_thin
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
    assert choose([hard, fast], line, waiting=6.0).coding == HARD


def test_an_encoder_that_would_just_keep_up_with_the_line_is_not_relied_upon() -> None:
    just, surely = Candidate(HARD, 10_000_000, 7.9, 0.0), Candidate(HARD, 10_000_000, 3.9, 0.0)
    easy = Candidate(PLAIN, 11_000_000, 0.1, 0.0)
    assert choose([just, easy], Line(10 * MBIT)).coding == PLAIN
    assert choose([surely, easy], Line(10 * MBIT)).coding == HARD


def test_receivers_behind_one_uplink_make_bytes_dearer() -> None:
    hard, fast = Candidate(HARD, 800_000, 1.5, 0.0), Candidate(PLAIN, 1_000_000, 0.1, 0.0)
    assert choose([hard, fast], Line(10 * MBIT)).coding == PLAIN
    assert choose([hard, fast], Line(10 * MBIT), receivers=10).coding == HARD


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


@given(candidates_, st.floats(1.0, 1e10), st.integers(1, 50), st.floats(0, 1e4))
def test_the_choice_is_never_much_later_than_the_best_and_always_one_of_them(
    candidates: list[Candidate], rate: float, receivers: int, waiting: float
) -> None:
    choice = choose(candidates, Line(rate), receivers=receivers, waiting=waiting)
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
        and (not Line(rate).is_thin or row.candidate.coding.encoding != "hdiff" or row.candidate.coding == hardest)
    )
    assert choice.rows[0].seconds <= best * 1.1 + 0.31


# --- what is reckoned


@given(
    st.sampled_from([*codings_for(True), Coding("zstd", 15), Coding("hdiff", 1), Coding("zstd-prefix", 19)]),
    st.integers(1, 1 << 32),
    st.integers(0, 1 << 32),
    st.floats(0.0001, 1.0),
    st.integers(1, 500),
    st.integers(1, 64),
)
def test_estimates_are_sane_whatever_is_asked(
    coding: Coding, size: int, base: int, plain: float, runs: int, cores: int
) -> None:
    found = estimate(coding, size, base, ratios=Ratios({PLAIN: plain}), rates=Rates(), runs=runs, cores=cores)
    assert 1 <= found.payload_bytes <= max(1.2 * size, 1)
    assert found.encode_seconds >= 0
    assert found.decode_seconds >= 0
    assert not found.exact


def test_what_was_seen_counts_more_than_what_is_typical() -> None:
    ratios = Ratios({PLAIN: 0.5})
    assert ratios.of(HARD) == pytest.approx(0.4)
    assert ratios.with_seen(HARD, 0.3).of(HARD) == pytest.approx(0.3)
    assert ratios.with_seen(HARD, 0.3).with_seen(HARD, 0.5).of(HARD) == pytest.approx(0.4)


def test_what_does_not_shrink_at_level_3_is_not_hoped_to_shrink_at_19() -> None:
    assert Ratios({PLAIN: 1.0}).of(HARD) == pytest.approx(1.0)


def test_encoders_side_by_side_share_the_work() -> None:
    alone = estimate(HARD, 64 << 20, ratios=Ratios(), rates=Rates(), runs=8, cores=1)
    four = estimate(HARD, 64 << 20, ratios=Ratios(), rates=Rates(), runs=8, cores=4)
    one_run = estimate(HARD, 64 << 20, ratios=Ratios(), rates=Rates(), runs=1, cores=4)
    assert four.encode_seconds == pytest.approx(alone.encode_seconds / 4)
    assert one_run.encode_seconds == pytest.approx(alone.encode_seconds)


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
    monkeypatch.setattr(planner, "can_encode", lambda encoding: encoding != "hdiff")
    codings = codings_for(has_bases=True)
    assert codings
    assert "hdiff" not in {coding.encoding for coding in codings}
    assert "zstd-prefix" in {coding.encoding for coding in codings}
