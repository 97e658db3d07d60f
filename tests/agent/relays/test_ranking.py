from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.relays.candidates import Source, by_weight, candidates, srv_source, static_source
from agent.relays.health import (
    FAILS_OUT,
    PROBE_ILL,
    PROBE_ILL_MAX,
    PROBE_WELL,
    UNKNOWN,
    Average,
    Health,
    ProbeResult,
    next_probe,
    record_failure,
    record_overtaken,
    record_probes,
    record_success,
)
from agent.relays.ranking import GOODPUT_KEPT, rank
from relay.errors import UsageError


def source(name: str, origin="site", priority=10, weight=0) -> Source:
    return srv_source(origin, "http", f"{name}.example.test", 7400, priority, weight)


def ill(now: float = 0.0, reason: str = "connection refused") -> Health:
    health = UNKNOWN
    for _ in range(FAILS_OUT):
        health = record_failure(health, now, reason)
    return health


def measured(first_byte: float, goodput: float | None = None, now: float = 0.0, times: int = 30) -> Health:
    """Without noise, so that only the 30 % matter."""
    health = UNKNOWN
    for _ in range(times):
        health = record_success(health, now, first_byte, goodput)
    return health


def urls(ranking) -> list[str]:
    return [ranked.source.url for ranked in ranking]


A, B, C = source("a"), source("b"), source("c")
LOWER = source("lower", priority=20)
GENERIC = source("generic", "generic", priority=0)
STATIC = static_source("http://static.example.test:7400")


# --- names


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://10.0.0.1:7400", "http://10.0.0.1:7400"),
        ("https://Relay.Example.Test/", "https://relay.example.test:443"),
        ("http://[2001:db8::1]:7400", "http://[2001:db8::1]:7400"),
        ("disk:/mnt/dfs/waystation", "disk:/mnt/dfs/waystation"),
        ("s3://bucket/prefix?endpoint=http://10.0.0.2:9000", "s3://bucket/prefix?endpoint=http://10.0.0.2:9000"),
    ],
)
def test_a_static_relay_takes_one_form(text, url):
    assert static_source(text).url == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "relay.example.test",
        "ftp://relay.example.test",
        "http://",
        "http://:7400",
        "http://relay.example.test:0",
        "http://relay.example.test:65536",
        "http://relay.example.test/feed",
        "http://relay.example.test?x=1",
        "http://relay.example.test#x",
        "http://relay .example.test",
        "http://relay\n.example.test",
        "http://-relay.example.test",
        "http://relay..test",
        "http://10.0.0.256",
        "http://[fe80::1%25eth0]:7400",
        "http://[::1",
        "http://ré.test",
        "disk:",
        "s3://",
        "disk:/mnt/\x00",
    ],
)
def test_a_static_relay_that_cannot_be_asked_is_refused(text):
    with pytest.raises(UsageError):
        static_source(text)


def test_credentials_in_a_url_are_refused_and_not_repeated():
    with pytest.raises(UsageError) as caught:
        static_source("https://user:hunter2@relay.example.test")
    assert "hunter2" not in str(caught.value)


@given(st.text(max_size=80))
def test_a_static_relay_is_refused_or_stable(text):
    try:
        first = static_source(text)
    except UsageError:
        return
    assert static_source(first.url) == first


@pytest.mark.parametrize(
    "target", ["", ".", "a b.test.", "a\\000.test.", "a/b.test.", "x" * 64 + ".test.", "1.2.3.4.5."]
)
def test_an_srv_target_that_is_no_host_name_is_refused(target):
    with pytest.raises(ValueError):
        srv_source("site", "https", target, 443, 0, 0)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_an_srv_port_out_of_range_is_refused(port):
    with pytest.raises(ValueError):
        srv_source("site", "https", "a.example.test.", port, 0, 0)


def test_a_looked_up_address_is_where_to_connect_and_the_name_stays_in_the_url():
    placed = replace(A, addresses=("192.0.2.1",))
    assert (placed.url, placed.addresses) == ("http://a.example.test:7400", ("192.0.2.1",))
    with pytest.raises(ValueError, match="address"):
        replace(A, addresses=("192.0.2.1", "b.example.test"))


def test_a_source_that_does_not_hang_together_cannot_be_made():
    for broken in (
        {"target": "other.example.test"},
        {"addresses": ("not an address",)},
        {"weight": -1},
        {"url": "http://"},
    ):
        with pytest.raises(ValueError):
            replace(A, **broken)


@pytest.mark.processes
def test_ranking_and_look_ups_load_neither_dns_nor_aiohttp():
    code = (
        "import sys, agent.relays.ranking, agent.relays.dns; print(*{'dns', 'aiohttp', 'msgspec'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# --- tiers and weights


def test_tiers_are_the_sites_answers_by_priority_then_generic_then_static():
    assert candidates([STATIC, GENERIC, LOWER, A]) == (A, LOWER, GENERIC, STATIC)


def test_a_relay_named_twice_stands_at_its_best_place():
    again = source("a", "generic", priority=0)
    assert candidates([again, A, replace(A, priority=99)]) == (A,)


def test_weights_are_the_shares_of_first_place():
    heavy, light = source("heavy", weight=30), source("light", weight=10)
    rng = random.Random(1)
    first = Counter(by_weight([light, heavy], rng)[0].target for _ in range(4000))
    # 0.25 with a standard error of 0.007; RFC 2782 counts 0..sum inclusive, which shifts it by less than 0.02.
    assert 0.21 < first[light.target] / 4000 < 0.29


def test_weight_zero_is_chosen_seldom_but_not_never():
    zero, heavy = source("zero", weight=0), source("heavy", weight=9)
    rng = random.Random(1)
    first = Counter(by_weight([heavy, zero], rng)[0].target for _ in range(4000))
    # RFC 2782: 0 of 0..9, so one in ten.
    assert 0.07 < first[zero.target] / 4000 < 0.13


def test_equal_weights_of_zero_share_equally():
    rng = random.Random(1)
    first = Counter(by_weight([A, B, C], rng)[0].target for _ in range(3000))
    assert all(800 < first[one.target] < 1200 for one in (A, B, C))


@given(st.permutations([A, B, C, source("d", weight=5), source("e", weight=50)]), st.integers())
def test_a_name_server_that_rotates_its_answers_does_not_change_the_draw(rotated, seed):
    assert by_weight(rotated, random.Random(seed)) == by_weight(sorted(rotated, key=str), random.Random(seed))


@given(st.lists(st.integers(0, 65535), max_size=20), st.integers())
def test_the_weighted_order_loses_and_invents_none(weights, seed):
    some = [source(f"n{index}", weight=weight) for index, weight in enumerate(weights)]
    assert Counter(by_weight(some, random.Random(seed))) == Counter(some)


def test_unmeasured_equals_are_spread_over_the_fleet_and_stable_for_each_agent():
    fleet = [f"agent{number}" for number in range(300)]
    first = Counter(rank([A, B], {}, None, 0, name)[0].source.url for name in fleet)
    assert min(first[A.url], first[B.url]) > 100
    for name in fleet[:20]:
        # A name server rotates its answers; that must not matter.
        assert rank([A, B, C], {}, None, 0, name) == rank([C, A, B], {}, None, 99, name)


# --- health


def test_three_failures_in_a_row_are_out_and_two_are_not():
    health = record_failure(record_failure(UNKNOWN, 1, "x"), 2, "x")
    assert health.ok
    health = record_failure(health, 3, "x")
    assert not health.ok
    assert health.out_since == 3


def test_a_success_between_failures_starts_the_count_again():
    health = record_failure(record_failure(UNKNOWN, 1, "x"), 2, "x")
    health = record_success(health, 3, None, None)
    health = record_failure(record_failure(health, 4, "x"), 5, "x")
    assert health.ok


def test_two_successes_in_a_row_are_in_again_and_one_is_not():
    once = record_success(ill(), 1, 0.01, None)
    assert not once.ok
    assert not record_success(record_failure(once, 2, "x"), 3, None, None).ok
    twice = record_success(once, 2, 0.01, None)
    assert twice.ok
    assert twice.out_since is None


@given(st.lists(st.booleans(), max_size=40))
def test_health_follows_the_last_run_of_results(results):
    health = UNKNOWN
    expected = True
    for now, good in enumerate(results):
        health = record_success(health, now, None, None) if good else record_failure(health, now, "x")
        recent = results[: now + 1]
        if recent[-3:] == [False] * 3:
            expected = False
        elif recent[-2:] == [True] * 2:
            expected = True
        assert health.ok is expected
        assert (health.out_since is None) is expected


def test_probe_results_count_like_any_other():
    healths = {A.url: UNKNOWN}
    for now in range(3):
        healths = record_probes(healths, {A.url: ProbeResult(None, "refused"), B.url: ProbeResult(0.02)}, now)
    assert not healths[A.url].ok
    assert healths[B.url].first_byte == pytest.approx(0.02)


@given(
    st.lists(st.one_of(st.floats(), st.none()), max_size=30), st.lists(st.one_of(st.floats(), st.none()), max_size=30)
)
def test_no_measurement_however_odd_breaks_the_ranking(first_bytes, goodputs):
    healths = {A.url: UNKNOWN, B.url: measured(0.02, 1e6)}
    for now, (first_byte, goodput) in enumerate(zip(first_bytes, goodputs, strict=False)):
        healths[A.url] = record_success(healths[A.url], now, first_byte, goodput)
        assert Counter(urls(rank([A, B], healths, A.url, now, "me"))) == Counter([A.url, B.url])


@given(st.floats(0.001, 10), st.lists(st.floats(0.001, 10), min_size=1, max_size=50))
def test_an_average_stays_between_its_samples(first, others):
    average = Average(first, 0.0, 1, 0)
    for sample in others:
        average = average.add(sample, 1)
    assert min(first, *others) * 0.999 <= average.mean <= max(first, *others) * 1.001


# --- ranking


def test_a_healthy_lower_tier_never_beats_a_healthy_upper_tier():
    healths = {A.url: measured(1.0, 1e5), LOWER.url: measured(0.001, 1e9), GENERIC.url: measured(0.001, 1e9)}
    everyone = [GENERIC, STATIC, LOWER, A]
    assert urls(rank(everyone, healths, LOWER.url, 0, "me")) == urls_of(A, LOWER, GENERIC, STATIC)


def urls_of(*sources: Source) -> list[str]:
    return [one.url for one in sources]


def test_an_ill_upper_tier_gives_way_and_stands_last():
    ranking = rank([A, LOWER, GENERIC], {A.url: ill()}, A.url, 60, "me")
    assert urls(ranking) == urls_of(LOWER, GENERIC, A)
    assert [ranked.usable for ranked in ranking] == [True, True, False]
    assert "connection refused" in ranking[-1].why


def test_the_better_tier_is_used_again_after_two_successes_and_not_after_one():
    once = record_success(ill(), 1, 0.01, None)
    assert rank([A, GENERIC], {A.url: once}, GENERIC.url, 1, "me")[0].source == GENERIC
    twice = record_success(once, 2, 0.01, None)
    assert rank([A, GENERIC], {A.url: twice}, GENERIC.url, 2, "me")[0].source == A


def test_if_all_look_ill_all_are_tried_in_tier_order():
    healths = {one.url: ill() for one in (A, LOWER, GENERIC, STATIC)}
    ranking = rank([STATIC, GENERIC, LOWER, A], healths, GENERIC.url, 10, "me")
    assert urls(ranking) == urls_of(A, LOWER, GENERIC, STATIC)
    assert all(ranked.usable for ranked in ranking)


def test_inside_a_tier_the_faster_comes_first():
    healths = {A.url: measured(0.09), B.url: measured(0.01), C.url: measured(0.03)}
    assert urls(rank([A, B, C], healths, None, 0, "me")) == urls_of(B, C, A)


def test_goodput_outweighs_the_first_byte_in_a_typical_pull():
    healths = {A.url: measured(0.005, 1e6), B.url: measured(0.050, 50e6)}
    assert rank([A, B], healths, A.url, 0, "me")[0].source == B


def test_goodput_counts_only_when_all_have_one():
    healths = {A.url: measured(0.050, 50e6), B.url: measured(0.005)}
    assert rank([A, B], healths, None, 0, "me")[0].source == B


def test_an_old_goodput_is_forgotten():
    healths = {A.url: measured(0.005, 1e6), B.url: measured(0.050, 50e6)}
    assert rank([A, B], healths, None, GOODPUT_KEPT + 1, "me")[0].source == A


@pytest.mark.parametrize(("other", "changes"), [(0.100, False), (0.080, False), (0.070, True)])
def test_a_change_needs_a_gain_above_30_percent(other, changes):
    healths = {A.url: measured(0.100), B.url: measured(other)}
    for seed in "abcdef":
        assert rank([A, B], healths, A.url, 0, seed)[0].source == (B if changes else A)


def test_one_lucky_sample_does_not_take_over():
    healths = {A.url: measured(0.100), B.url: measured(0.060, times=1)}
    assert rank([A, B], healths, A.url, 0, "me")[0].source == A
    healths[B.url] = measured(0.060)
    assert rank([A, B], healths, A.url, 0, "me")[0].source == B


def test_among_equally_fast_ones_the_weights_decide():
    heavy, light = source("heavy", weight=90), source("light", weight=10)
    healths = {heavy.url: measured(0.011), light.url: measured(0.010)}
    first = Counter(rank([heavy, light], healths, None, 0, f"agent{number}")[0].source.target for number in range(500))
    assert first[heavy.target] > 400
    assert first[light.target] > 10


@given(
    st.lists(st.sampled_from(["well", "ill", "fast", "slow"]), min_size=1, max_size=12),
    st.integers(0, 20),
    st.text(max_size=5),
)
def test_every_source_is_ranked_once_and_usable_ones_come_first(states, used, seed):
    kinds = {"well": UNKNOWN, "ill": ill(), "fast": measured(0.01, times=3), "slow": measured(0.5, times=3)}
    origins = ["site", "generic", "static"]
    everyone = [source(f"n{index}", origins[index % 3], priority=index % 2) for index in range(len(states))]
    healths = {one.url: kinds[state] for one, state in zip(everyone, states, strict=True)}
    ranking = rank(everyone, healths, everyone[used % len(everyone)].url, 1, seed)
    assert Counter(urls(ranking)) == Counter(urls_of(*everyone))
    usable = [ranked.usable for ranked in ranking]
    assert usable == sorted(usable, reverse=True)
    assert usable[0]
    well = [ranked.source.tier for ranked in ranking if healths[ranked.source.url].ok]
    assert well == sorted(well)
    assert all(ranked.why for ranked in ranking)


def test_a_remembered_answer_says_so():
    assert "last good answer" in rank([replace(A, remembered=True)], {}, None, 0, "me")[0].why


def test_one_hard_failure_leaves_the_ranking():
    healths = {A.url: record_failure(UNKNOWN, 0, "connection refused")}
    assert urls(rank([A, LOWER, GENERIC], healths, A.url, 0, "me")) == urls_of(A, LOWER, GENERIC)


# --- coming back


@given(st.integers(0, 30), st.booleans(), st.floats(0, 1e6), st.floats(0, 1e6), st.integers())
def test_the_next_probe_lies_ahead_and_within_bounds(fails, good_then, checked, now, seed):
    health = UNKNOWN
    for _ in range(fails):
        health = record_failure(health, checked, "x")
    if good_then:
        health = record_success(health, checked, None, None)
    assert now < next_probe(health, now, random.Random(seed)) <= now + 1.5 * PROBE_ILL_MAX


def test_an_ill_source_is_asked_more_and_more_seldom_and_soon_again_once_it_answers():
    def mean_wait(health: Health) -> float:
        rng = random.Random(1)
        return sum(next_probe(health, 0.0, rng) for _ in range(500)) / 500

    fresh, old = ill(), replace(ill(), fails=100)
    assert mean_wait(fresh) == pytest.approx(PROBE_ILL, rel=0.1)
    assert mean_wait(old) == pytest.approx(PROBE_ILL_MAX, rel=0.1)
    assert mean_wait(record_success(old, 0.0, None, None)) == pytest.approx(PROBE_ILL, rel=0.1)
    assert mean_wait(record_success(UNKNOWN, 0.0, None, None)) == pytest.approx(PROBE_WELL, rel=0.1)


@pytest.mark.parametrize("now", [0.0, 86_400.0])
def test_a_fleet_does_not_come_back_all_at_once(now):
    """At once after the failure, and overdue after all machines were off for a day."""
    times = sorted(next_probe(ill(), now, random.Random(number)) for number in range(1000))
    fullest = max(sum(start <= one < start + 1 for one in times) for start in times)
    assert fullest < 150


# --- no flapping


ROUNDS = 10_000


def simulate(means: dict[str, float], seed: int, rounds: int = ROUNDS) -> tuple[int, int, list[str]]:
    """Both relays are probed each round: lognormal noise (sigma 1: one answer in six is 2.7 times the usual) with a
    tenfold stall in one of 20. Returns the switches of `rank`, of a plain "the lower average wins", and who was used.
    """
    rng = random.Random(seed)
    sources = [source(name) for name in means]
    healths = {one.url: UNKNOWN for one in sources}
    current = naive = None
    switches = naive_switches = 0
    used = []
    for now in range(rounds):
        for one, mean in zip(sources, means.values(), strict=True):
            stall = 10 if rng.random() < 0.05 else 1
            healths[one.url] = record_success(healths[one.url], now, mean * rng.lognormvariate(0, 1) * stall, None)
        first = rank(sources, healths, current, now, "me")[0].source.url
        switches += current not in {None, first}
        current = first
        lower = min(healths, key=lambda url: healths[url].first_byte or 0)
        naive_switches += naive not in {None, lower}
        naive = lower
        used.append(first)
    return switches, naive_switches, used


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_equal_relays_with_heavy_noise_do_not_flap(seed):
    switches, naive, _ = simulate({"a": 0.05, "b": 0.05}, seed)
    assert naive > 1000, "the noise would have made a simple chooser flap"
    assert switches <= 25


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_relay_twice_as_fast_is_found_and_kept(seed):
    _, _, used = simulate({"a": 0.10, "b": 0.05}, seed)
    assert set(used[500:]) == {B.url}


def test_a_relay_that_was_overtaken_stands_behind_the_one_that_overtook_it():
    """Its pace was measured, so no probe that it answers well brings it back in front."""
    slow, fast = source("slow"), source("fast")
    before = record_success(UNKNOWN, 1.0, 0.001, None)
    overtaken = record_overtaken(before, 2.0, 1200.0, "1,200 bytes in a second")
    healths = {
        slow.url: record_success(overtaken, 3.0, 0.001, None),
        fast.url: record_success(UNKNOWN, 2.0, 0.005, 10e6),
    }

    assert (overtaken.ok, overtaken.fails, overtaken.goodput) == (True, 1, 1200.0)
    assert [ranked.source for ranked in rank([slow, fast], healths, fast.url, 4.0, "m1")] == [fast, slow]
    assert [ranked.source for ranked in rank([slow, fast], healths, slow.url, 4.0, "m1")] == [fast, slow]


def test_a_relay_in_use_that_gets_worse_is_left():
    rng = random.Random(7)
    healths = {A.url: UNKNOWN, B.url: UNKNOWN}
    current = A.url
    for now in range(600):
        means = {A.url: 0.02 if now < 300 else 0.2, B.url: 0.04}
        for url, mean in means.items():
            healths[url] = record_success(healths[url], now, mean * rng.lognormvariate(0, 0.5), None)
        current = rank([A, B], healths, current, now, "me")[0].source.url
        if now == 299:
            assert current == A.url
    assert current == B.url
