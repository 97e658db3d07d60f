"""What follows from a measurement can be pasted, and says why."""

from __future__ import annotations

import pytest
from harness.files import parse_environment
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.support.conclusion import Outcome, of_line, of_transfer, rate_text
from orchestrator.files.values import bytes_per_second

URL = "https://relay.fra.example:7443"
MBIT = 125_000


def loaded(settings: str):
    text = f"environment: production\n{settings}\n    site: fra\n"
    return parse_environment(text.encode(), "e.yaml", "/").value.relays["NAME"]


@pytest.mark.parametrize(
    ("rates", "prefer", "limit", "words"),
    [
        ({1: 1 * MBIT}, "bytes", "800kbit", "a thin line: 1 Mbit/s to the relay; one connection fills it"),
        ({1: 40 * MBIT, 4: 90 * MBIT, 8: 91 * MBIT}, "bytes", "72Mbit", "it takes 4 connections"),
        ({1: 900 * MBIT}, "time", "720Mbit", "a local line"),
    ],
)
def test_a_line_ends_in_settings_that_an_environment_takes(
    rates: dict[int, float], prefer: str, limit: str, words: str
) -> None:
    found = of_line(URL, rates)
    assert (found.prefer, found.limit) == (prefer, limit)
    assert any(words in said for said in found.because)
    relay = loaded(found.settings)
    assert (relay.url, relay.prefer, relay.limit) == (URL, prefer, limit)


def test_the_fewest_bytes_of_what_is_about_as_fast_are_named() -> None:
    plain, delta = Outcome("zstd:3", 0.40, 4_000_000), Outcome("zstd-prefix", 0.42, 9_000)
    found = of_transfer(URL, 25 * MBIT, Outcome("planned (zstd-prefix)", 0.43, 9_000), [plain, delta])
    assert found.prefer == "bytes"
    assert found.because == (
        "the soonest: zstd:3, 0.40 s, 3.8 MiB",
        "the fewest bytes of what is about as fast: zstd-prefix, 0.42 s, 8.8 KiB",
    )


def test_what_is_late_for_the_sake_of_bytes_is_told_with_what_would_be_sooner() -> None:
    late = Outcome("planned (hdiff)", 2.0, 1_000)
    found = of_transfer(URL, 25 * MBIT, late, [Outcome("zstd:3", 1.0, 4_000_000)])
    assert found.prefer == "time"
    assert "package replicate --encoding zstd:3" in found.because[-1]
    assert loaded(found.settings).prefer == "time"


def test_what_was_planned_is_not_late_where_it_sent_the_same() -> None:
    planned, forced = Outcome("planned (zstd-prefix)", 0.46, 4_720), Outcome("zstd-prefix", 0.41, 4_690)
    found = of_transfer(URL, 25 * MBIT, planned, [forced])
    assert (found.prefer, len(found.because)) == ("bytes", 2)


@given(st.floats(min_value=200.0, max_value=12e9))
def test_a_limit_is_one_that_yaml_takes_and_no_more_than_was_measured(rate: float) -> None:
    assert 0 < bytes_per_second(rate_text(rate)) <= rate
