"""Which relay is the closest: the order in which to ask candidates, by their tiers and their health.

Pure: no sockets, no files, no clock and no hidden chance; the same arguments always give the same answer.
`agent/relays/dns.py` does the look-ups around it, `agent/relays/probe.py` the measuring.

Order, from the first word to the last:

1. A source that looks ill (3 failures in a row) stands behind every one that looks well, until 2 successes in a row.
   If all look ill, all are tried.
2. Tiers: the site's answers by SRV priority, then the generic name's, then the static list. No measurement lifts a
   source over a tier that looks well: an operator's priority is a decision, a latency is only a hint.
3. Inside a tier, what was measured: seconds for a typical pull. Sources within 30 % of the best count as equally
   good, and then weights decide (RFC 2782), so that a fleet spreads instead of crowding the one that is best by a hair.
4. The source in use stays in front of its tier until another is more than 30 % faster, and by more than the noise of
   both measurements can explain.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

from agent.relays.candidates import Source, by_weight, candidates
from agent.relays.health import PASSES_IN, UNKNOWN, Average, Health

GAIN = 1.30
"""Ratio. Another source must be faster by more than this to take over from the one in use."""
CONFIDENCE = 3.0
"""Standard errors. A gain smaller than this many of them may be noise, and noise is no reason to change."""
TYPICAL_PULL = 8 << 20
"""Bytes. What goodput is weighed with against the time to the first byte."""
SECONDS_FLOOR = 0.002
"""Seconds added to every estimate, so that half a millisecond on one switch is never "twice as fast"."""
GOODPUT_KEPT = 6 * 3600.0
"""Seconds. An older goodput no longer counts: a relay that was slow one morning gets a second chance."""


@dataclass(frozen=True)
class Ranked:
    """A source at its place, and `why` for people. Not `usable`: it looks ill while others look well."""

    source: Source
    why: str
    usable: bool


Ranking: TypeAlias = tuple[Ranked, ...]


@dataclass(frozen=True)
class _Estimate:
    """Seconds for a typical pull, and the standard error of their logarithm."""

    seconds: float
    error: float


def rank(
    sources: Iterable[Source],
    healths: Mapping[str, Health],
    current: str | None,
    now: float,
    seed: str,
) -> Ranking:
    """Every source once, the one to ask first in front.

    Args:
        sources: from DNS and the static list, in any order.
        healths: by URL; a source without one is unknown, and so well.
        current: URL of the source in use.
        now: the clock that `healths` were recorded with.
        seed: the agent's name. It fixes this agent's draw among equals, so that looking again changes nothing.
    """
    everyone = candidates(sources)
    well = [source for source in everyone if healths.get(source.url, UNKNOWN).ok]
    ill = [source for source in everyone if source not in well]
    front = [
        Ranked(source, f"{_place(source)}: {why}", usable=True)
        for tier in _tiers(well)
        for source, why in _rank_tier(tier, healths, current, now, seed)
    ]
    back = [
        Ranked(source, f"{_place(source)}: {_illness(healths[source.url], now, alone=not well)}", usable=not well)
        for tier in _tiers(ill)
        for source in _share(tier, seed)
    ]
    return (*front, *back)


def _tiers(ordered: Sequence[Source]) -> list[list[Source]]:
    return [list(group) for _, group in groupby(ordered, key=lambda one: one.tier)]


def _share(tier: Sequence[Source], seed: str) -> list[Source]:
    rng = random.Random(f"{seed} {tier[0].tier}")  # noqa: S311 - spreads load, guards nothing
    return by_weight(tier, rng)


def _rank_tier(
    tier: Sequence[Source], healths: Mapping[str, Health], current: str | None, now: float, seed: str
) -> list[tuple[Source, str]]:
    """The well ones of one tier, in order, with the reason in words."""
    estimates = _estimates([(one.url, healths.get(one.url, UNKNOWN)) for one in tier], now)
    best = min((one.seconds for one in estimates.values()), default=0.0)
    ordered: list[tuple[Source, str]] = []
    slower: list[tuple[Source, str]] = []
    unmeasured: list[tuple[Source, str]] = []
    for source in _share(tier, seed):
        estimate = estimates.get(source.url)
        if estimate is None:
            unmeasured.append((source, f"not measured yet, placed by weight {source.weight}"))
        elif estimate.seconds <= best * GAIN:
            ordered.append((source, f"among the fastest, {_figures(healths[source.url])}"))
        else:
            slower.append((source, f"slower, {_figures(healths[source.url])}"))
    slower.sort(key=lambda one: estimates[one[0].url].seconds)
    ordered += slower + unmeasured
    return _lead(ordered, estimates, healths, current)


def _lead(
    ordered: list[tuple[Source, str]],
    estimates: Mapping[str, _Estimate],
    healths: Mapping[str, Health],
    current: str | None,
) -> list[tuple[Source, str]]:
    """Put the source in use in front, or the one that is worth the change."""
    used = next((source for source, _ in ordered if source.url == current), None)
    if used is None:
        return ordered
    mine = estimates.get(used.url)
    if mine is None:
        return _moved_to_front(ordered, used, "in use, not measured yet")
    winner = next((one for one, _ in ordered if one.url in estimates and _gains(estimates[one.url], mine)), None)
    if winner is None:
        return _moved_to_front(ordered, used, f"in use, none is 30 % faster, {_figures(healths[used.url])}")
    why = f"more than 30 % faster than {used.url}, {_figures(healths[winner.url])}"
    return _moved_to_front(ordered, winner, why)


def _moved_to_front(ordered: list[tuple[Source, str]], first: Source, why: str) -> list[tuple[Source, str]]:
    return [(first, why), *(one for one in ordered if one[0] is not first)]


def _estimates(measured: Sequence[tuple[str, Health]], now: float) -> dict[str, _Estimate]:
    """By URL, for those that were measured.

    Like is compared with like: goodput counts only when all of them have one, otherwise the first byte alone.
    """
    timed = {url: (health.latency, health.throughput) for url, health in measured if health.latency}
    all_have = all(goodput and abs(now - goodput.at) <= GOODPUT_KEPT for _, goodput in timed.values())
    return {url: _estimate(latency, goodput if all_have else None) for url, (latency, goodput) in timed.items()}


def _estimate(latency: Average, goodput: Average | None) -> _Estimate:
    parts = [(latency.mean, latency.error)]
    if goodput:
        parts.append((TYPICAL_PULL / goodput.mean, goodput.error))
    seconds = SECONDS_FLOOR + sum(part for part, _ in parts)
    # Errors of independent parts, each by its share of the sum (first-order propagation).
    return _Estimate(seconds, math.hypot(*(error * part / seconds for part, error in parts)))


def _gains(candidate: _Estimate, current: _Estimate) -> bool:
    advantage = math.log(current.seconds / candidate.seconds)
    return advantage > max(math.log(GAIN), CONFIDENCE * math.hypot(candidate.error, current.error))


# --- words


def _place(source: Source) -> str:
    words = {
        "site": f"the site's relay, priority {source.priority}",
        "generic": f"generic name, priority {source.priority}",
        "static": "static list",
    }[source.origin]
    return f"{words} (DNS failed, from the last good answer)" if source.remembered else words


def _figures(health: Health) -> str:
    if health.first_byte is None:
        return "not measured yet"
    words = f"first byte {_seconds(health.first_byte)}"
    return words if health.goodput is None else f"{words}, {health.goodput / 1e6:.3g} MB/s"


def _illness(health: Health, now: float, *, alone: bool) -> str:
    since = f" for {_seconds(max(now - health.out_since, 0.0))}" if health.out_since is not None else ""
    passed = f"answers again, {health.passes} of {PASSES_IN}"
    state = passed if health.passes else f"failed {health.fails} times in a row"
    words = f"looks ill{since}, {state}" + (f", last: {health.reason}" if health.reason else "")
    return f"{words}; all look ill, so it is tried" if alone else words


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.0f} h"
