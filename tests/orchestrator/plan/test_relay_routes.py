"""Which way a package takes: a forest without circles, and the nearest living relay where one fails."""

from __future__ import annotations

import pytest
from harness.files import parse_environment
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.files.environment import EnvironmentFile
from orchestrator.files.values import bytes_per_second
from orchestrator.plan.plan import PlannedRelay
from orchestrator.plan.routes import (
    ORIGIN,
    Replan,
    check_upstreams,
    in_order,
    line_name,
    lineage,
    next_upstream,
    upstreams_of,
    wrong_upstreams,
)
from relay.errors import UsageError


def environment(relays: dict[str, str | None]) -> EnvironmentFile:
    lines = [
        f"  {name}: {{ url: 'http://{name}', site: {name}{f', from: {above}' if above else ''} }}\n"
        for name, above in relays.items()
    ]
    return parse_environment(f"environment: p\nrelays:\n{''.join(lines)}".encode(), "p.yaml", "/srv")


@st.composite
def any_upstreams(draw: st.DrawFn) -> dict[str, str | None]:
    """`from:` as anybody may write it: relays that are not there, itself, circles."""
    names = [f"r{number}" for number in range(draw(st.integers(1, 8)))]
    return {name: draw(st.sampled_from([None, "nobody", *names])) for name in names}


@st.composite
def forests(draw: st.DrawFn) -> dict[str, str]:
    names = [f"r{number}" for number in range(draw(st.integers(1, 10)))]
    return {
        name: draw(st.sampled_from(names[:number]))
        for number, name in enumerate(names)
        if number and draw(st.booleans())
    }


@given(any_upstreams())
def test_what_is_not_refused_leads_to_the_origin(written: dict[str, str | None]) -> None:
    file = environment(written)
    wrong, good = wrong_upstreams(file.value), upstreams_of(file.value)
    for name in written:
        assert len(lineage(name, good)) == len(set(lineage(name, good)))
    refused = {name for name, above in written.items() if above and name not in good}
    assert bool(wrong) == bool(refused)
    if not wrong:
        check_upstreams(written)
    else:
        with pytest.raises(UsageError):
            check_upstreams(written)


@given(any_upstreams())
def test_each_circle_is_told_once(written: dict[str, str | None]) -> None:
    wrong = wrong_upstreams(environment(written).value)
    circles = set()
    for name in written:
        way = [name]
        while (above := written.get(way[-1])) is not None and above not in way:
            way.append(above)
        if above == name:
            circles.add(frozenset(way))
    unknown = sum(above == "nobody" for above in written.values())
    assert len(wrong) == len(circles) + unknown


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"a": "b"}, {"a": "there is no relay 'b'"}),
        ({"a": "zz", "b": None}, {"a": "there is no relay 'zz': expected one of b"}),
        ({"a": "a"}, {"a": "is the relay itself: leave it out, and the origin sends"}),
        (
            {"a": "b", "b": "c", "c": "a", "d": "a"},
            {"a": "leads in a circle, a → b → c → a: one of them must get packages from the origin"},
        ),
    ],
)
def test_a_wrong_upstream_is_told_in_words(written: dict[str, str | None], expected: dict[str, str]) -> None:
    assert wrong_upstreams(environment(written).value) == expected


@given(forests(), st.data())
def test_a_relay_goes_on_with_the_nearest_living_one_above(upstreams: dict[str, str], data: st.DataObject) -> None:
    names = sorted({*upstreams, *upstreams.values()}) or ["r0"]
    relay = data.draw(st.sampled_from(names))
    out = set(data.draw(st.lists(st.sampled_from(names))))
    above = lineage(relay, upstreams)[1:]
    found = next_upstream(relay, upstreams, out)
    if found == ORIGIN:
        assert set(above) <= out
    else:
        assert found not in out
        assert set(above[: above.index(found)]) <= out


@given(forests(), st.randoms())
def test_each_relay_comes_after_the_one_above_it(upstreams: dict[str, str], random: st.randoms) -> None:  # type: ignore[valid-type]
    names = sorted({"r0", *upstreams, *upstreams.values()})
    random.shuffle(names)  # type: ignore[attr-defined]
    relays = [PlannedRelay(name, f"http://{name}", name, upstream=upstreams.get(name, "")) for name in names]
    ordered = [relay.name for relay in in_order(relays)]
    assert sorted(ordered) == sorted(names)
    assert all(ordered.index(above) < ordered.index(name) for name, above in upstreams.items())


def test_lines_and_re_plans_are_told_in_words() -> None:
    assert line_name(ORIGIN, "fra") == "origin → fra"
    assert line_name("fra", "iad") == "fra → iad"
    assert str(Replan("iad", "fra", ORIGIN, "it died")) == "iad fetched from the origin in place of fra: it died"


@pytest.mark.parametrize(
    ("rate", "expected"), [(20, 2_500_000), ("50Mbit", 6_250_000), ("800kbit", 100_000), ("1Gbit", 125_000_000)]
)
def test_rates_are_bytes_per_second(rate: int | str, expected: float) -> None:
    assert bytes_per_second(rate) == expected


@pytest.mark.parametrize("rate", ["fast", "50", "-1Mbit", "1.5Gbit"])
def test_what_is_no_rate_is_refused(rate: str) -> None:
    with pytest.raises(ValueError, match="not a rate"):
        bytes_per_second(rate)
