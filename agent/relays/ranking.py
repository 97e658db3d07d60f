"""Which relay is the closest: the candidates, their health, and the order in which to ask them.

Pure: no sockets, no files, no clock and no hidden chance; the same arguments always give the same answer.
`agent/relays/dns.py` does the look-ups and the measuring around it.

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

import ipaddress
import math
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

from relay.errors import UsageError

Origin: TypeAlias = Literal["site", "generic", "static"]
Scheme: TypeAlias = Literal["https", "http"]

FAILS_OUT = 3
"""Failures in a row after which a source looks ill."""
PASSES_IN = 2
"""Successes in a row after which an ill source looks well again. Both numbers are Kraken's (`lib/healthcheck`)."""
GAIN = 1.30
"""Ratio. Another source must be faster by more than this to take over from the one in use."""
CONFIDENCE = 3.0
"""Standard errors. A gain smaller than this many of them may be noise, and noise is no reason to change."""
ALPHA = 0.2
"""Weight of the newest sample in a moving average."""
VARIANCE_ALPHA = 0.05
"""Weight of the newest sample in the average's own noise. Slower, because a variance is itself noisy."""
VARIANCE_AT_FIRST = 0.05
"""Variance of ln(sample) assumed after one sample: about 22 % of noise."""
TYPICAL_PULL = 8 << 20
"""Bytes. What goodput is weighed with against the time to the first byte."""
SECONDS_FLOOR = 0.002
"""Seconds added to every estimate, so that half a millisecond on one switch is never "twice as fast"."""
GOODPUT_KEPT = 6 * 3600.0
"""Seconds. An older goodput no longer counts: a relay that was slow one morning gets a second chance."""
PROBE_ILL = 30.0
"""Seconds, mean time to the next check of a source that failed."""
PROBE_ILL_MAX = 600.0
"""Seconds, the same for one that has been failing for long."""
PROBE_WELL = 300.0
"""Seconds, mean time to the next measurement of a source that looks well."""

_TIER_OF_ORIGIN: dict[Origin, int] = {"site": 0, "generic": 1, "static": 2}
_STORES = ("disk:", "s3://")
_DEFAULT_PORT: dict[str, int] = {"https": 443, "http": 80}
_LABELS = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*", re.ASCII)
_PRINTABLE = re.compile(r"[!-~]{1,2048}", re.ASCII)
_SMALLEST, _LARGEST = 1e-6, 1e15  # seconds or bytes/s; outside of these a clock is broken, not a network


# --- names and candidates


def is_host_name(text: str) -> bool:
    """RFC 1123 host name in lower case, without the final dot; `_` too, as container networks have such names.

    A name whose last label is a number must be a whole IPv4 address: everything else reads it as one.
    """
    if len(text) > 253 or not _LABELS.fullmatch(text):
        return False
    return not text.rpartition(".")[2].isdigit() or _is_ip(text, 4)


def _is_ip(text: str, version: int | None = None) -> bool:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return False
    return version in {None, found.version} and "%" not in text


@dataclass(frozen=True)
class Source:
    """One place to fetch from: a relay, or a store that stands in for one (`disk:`, `s3://`).

    `url` names it (`https://fra1.example.net:7400`, always with host name and port) and is what TLS and the Host header
    go by.
    """

    url: str
    origin: Origin
    priority: int
    """SRV priority: lower comes first. 0 in the static list, which is one tier."""
    weight: int
    """SRV weight: the share inside the tier."""
    target: str
    """Host name or literal address; empty for a store."""
    address: str | None = None
    """Where to connect instead of asking the system's resolver for `target`."""
    remembered: bool = False
    """DNS did not answer this time; this is from the last good answer."""

    def __post_init__(self) -> None:
        """Hold no source that cannot be asked, wherever it came from.

        Raises:
            ValueError: a field does not follow its grammar.
        """
        if not (0 <= self.priority <= 0xFFFF and 0 <= self.weight <= 0xFFFF):
            raise ValueError("priority and weight are 16-bit numbers")
        if self.address is not None and not _is_ip(self.address):
            raise ValueError("the address is not an IP address")
        if not self.is_store and (not self.target or _parse_url(self.url)[1] != self.target):
            raise ValueError("the URL does not name the target")

    @property
    def is_store(self) -> bool:
        """Read by the store contract, not by the protocol; carries no mail."""
        return self.url.startswith(_STORES)

    @property
    def tier(self) -> tuple[int, int]:
        """Lower comes first."""
        return _TIER_OF_ORIGIN[self.origin], self.priority


def static_source(text: str) -> Source:
    """One entry of `relays:`: an http(s) URL without path and credentials, or a store's location.

    The URL is put in its one form (lower case, port written out), which is what `Source.url` is compared by.

    Raises:
        UsageError: it is not one of these. The text is not repeated where it may hold a password.
    """
    if text.startswith(_STORES):
        if text in _STORES or not text.isprintable():
            raise UsageError(f"relay {text[:80]!r} names no place in its store")
        return Source(url=text, origin="static", priority=0, weight=0, target="")
    if "@" in text:
        raise UsageError("a relay's URL carries no credentials", hint="Give a token beside it instead")
    try:
        scheme, host, port = _parse_url(text)
    except ValueError as error:
        expected = "http(s)://HOST[:PORT], disk:PATH or s3://BUCKET"
        raise UsageError(f"relay {text[:80]!r}: {error}", hint=f"Expected {expected}") from error
    return Source(url=_url(scheme, host, port), origin="static", priority=0, weight=0, target=host)


def srv_source(origin: Origin, scheme: Scheme, target: str, port: int, priority: int, weight: int) -> Source:
    """One SRV record (RFC 2782).

    Raises:
        ValueError: target or port cannot be right. A DNS answer is a stranger's text.
    """
    host = target.removesuffix(".").lower()
    if not is_host_name(host):
        raise ValueError("target is not a host name")
    if not 1 <= port <= 0xFFFF:
        raise ValueError("port is not between 1 and 65535")
    return Source(_url(scheme, host, port), origin, priority, weight, host)


def candidates(sources: Iterable[Source]) -> tuple[Source, ...]:
    """In tier order, each URL once: at the best place where it was named."""
    best: dict[str, Source] = {}
    for source in sorted(sources, key=lambda one: (one.tier, one.url)):
        best.setdefault(source.url, source)
    return tuple(best.values())


def by_weight(sources: Iterable[Source], rng: random.Random) -> list[Source]:
    """Weighted random order, as RFC 2782 has it: weight 0 is seldom chosen while others are there, but not never.

    The order of the arguments has no influence, because name servers rotate their answers.
    """
    pool = sorted(sources, key=lambda one: one.url)
    rng.shuffle(pool)
    pool.sort(key=lambda one: one.weight > 0)
    chosen = []
    while pool:
        mark = rng.randint(0, sum(one.weight for one in pool))
        running = 0
        for index, source in enumerate(pool):
            running += source.weight
            if running >= mark:
                chosen.append(pool.pop(index))
                break
    return chosen


def _parse_url(text: str) -> tuple[str, str, int]:
    if not _PRINTABLE.fullmatch(text):
        raise ValueError("not a plain ASCII URL")
    parts = urlsplit(text)
    if parts.scheme not in _DEFAULT_PORT:
        raise ValueError("unknown scheme")
    if parts.path not in {"", "/"} or "?" in text or "#" in text:
        raise ValueError("a relay's URL ends after the port")
    host, port = parts.hostname or "", parts.port
    if not (_is_ip(host, 6) if "[" in parts.netloc else is_host_name(host)):
        raise ValueError("not a host name or address")
    if port == 0:
        raise ValueError("port is not between 1 and 65535")
    return parts.scheme, host, port or _DEFAULT_PORT[parts.scheme]


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


# --- health


@dataclass(frozen=True)
class Average:
    """A moving average that knows how far it can be trusted.

    Of logarithms, so one stall of ten seconds among answers of ten milliseconds counts as one bad sample, not as a
    thousand. The first samples are averaged plainly, so that a start at an odd moment is soon forgotten.
    """

    mean: float
    """Geometric, in the samples' unit."""
    variance: float
    """Of ln(sample)."""
    count: int
    at: float
    """Clock of the newest sample."""

    def __post_init__(self) -> None:
        """Refuse what no samples can have given.

        Raises:
            ValueError: a number is out of range.
        """
        if not (_SMALLEST <= self.mean <= _LARGEST and 0 <= self.variance < math.inf and self.count >= 1):
            raise ValueError("not an average of samples")

    @property
    def error(self) -> float:
        """Standard error of ln(mean): of a plain average at first, of an exponential one later."""
        return math.sqrt(self.variance * max(1 / self.count, ALPHA / (2 - ALPHA)))

    def add(self, sample: float, now: float) -> Average:
        count = self.count + 1
        surprise = math.log(sample / self.mean)
        return Average(
            mean=_clamp(self.mean * math.exp(surprise * max(ALPHA, 1 / count))),
            variance=self.variance + (surprise**2 - self.variance) * max(VARIANCE_ALPHA, 1 / (count + 1)),
            count=count,
            at=now,
        )


@dataclass(frozen=True)
class Health:
    """What is known of one source. The clock is the caller's; it is kept over restarts, so it should be `time.time`."""

    ok: bool = True
    fails: int = 0
    """In a row, up to now."""
    passes: int = 0
    """In a row, up to now."""
    latency: Average | None = None
    """Seconds to the first byte."""
    throughput: Average | None = None
    """Goodput in bytes/s."""
    last_checked: float = 0.0
    out_since: float | None = None
    reason: str = ""
    """The last failure, for people."""

    @property
    def first_byte(self) -> float | None:
        """Seconds."""
        return self.latency.mean if self.latency else None

    @property
    def goodput(self) -> float | None:
        """Bytes/s."""
        return self.throughput.mean if self.throughput else None


UNKNOWN = Health()
"""Of a source never asked: it counts as well until shown otherwise."""


@dataclass(frozen=True)
class ProbeResult:
    """One check: `first_byte` in seconds, or the reason why there is none."""

    first_byte: float | None
    reason: str = ""

    @property
    def ok(self) -> bool:
        return self.first_byte is not None


def record_success(health: Health, now: float, first_byte: float | None, goodput: float | None) -> Health:
    """It answered. `first_byte` in seconds, `goodput` in bytes/s, None for what was not measured."""
    passes = health.passes + 1
    ok = health.ok or passes >= PASSES_IN
    return replace(
        health,
        ok=ok,
        fails=0,
        passes=passes,
        latency=_sampled(health.latency, first_byte, now),
        throughput=_sampled(health.throughput, goodput, now),
        last_checked=now,
        out_since=None if ok else health.out_since,
        reason="" if ok else health.reason,
    )


def record_failure(health: Health, now: float, reason: str) -> Health:
    """It could not be reached, or could not serve. Not for a missing chunk: that is an answer."""
    fails = health.fails + 1
    ok = health.ok and fails < FAILS_OUT
    since = now if health.ok and not ok else health.out_since
    return replace(health, ok=ok, fails=fails, passes=0, last_checked=now, out_since=since, reason=_plain(reason))


def record_probes(healths: Mapping[str, Health], results: Mapping[str, ProbeResult], now: float) -> dict[str, Health]:
    """All healths by URL, with the probes' results taken in."""
    after = dict(healths)
    for url, result in results.items():
        before = after.get(url, UNKNOWN)
        after[url] = (
            record_success(before, now, result.first_byte, None)
            if result.ok
            else record_failure(before, now, result.reason)
        )
    return after


def known(healths: Mapping[str, Health], sources: Iterable[Source]) -> dict[str, Health]:
    """Only the healths of these sources, so that what is kept does not grow with every relay that ever was."""
    return {source.url: healths[source.url] for source in sources if source.url in healths}


def next_probe(health: Health, now: float, rng: random.Random) -> float:
    """The clock at which to check it again, spread by chance: a fleet that lost its relay together must not come back
    together. A source that fails for long is asked more and more seldom; one success brings the short time back.
    """
    interval = _probe_interval(health)
    wait = interval * rng.uniform(0.5, 1.5)
    due = health.last_checked + wait
    # Overdue after a restart, or a clock that was set back: soon, but still not all at once.
    return due if now < due <= now + wait else now + wait / 3


def _probe_interval(health: Health) -> float:
    if health.ok and not health.fails:
        return PROBE_WELL
    beyond = min(max(health.fails - FAILS_OUT, 0), 10)
    return min(PROBE_ILL * 2.0**beyond, PROBE_ILL_MAX)


def _sampled(average: Average | None, sample: float | None, now: float) -> Average | None:
    if sample is None or not math.isfinite(sample):
        return average
    sample = _clamp(sample)
    return average.add(sample, now) if average else Average(sample, VARIANCE_AT_FIRST, 1, now)


def _clamp(value: float) -> float:
    return min(max(value, _SMALLEST), _LARGEST)


def _plain(reason: str) -> str:
    return "".join(char if char.isprintable() else " " for char in reason)[:200]


# --- ranking


@dataclass(frozen=True)
class Ranked:
    """A source at its place, and `why` for people. Not `usable`: it looks ill while others look well."""

    source: Source
    why: str
    usable: bool


Ranking: TypeAlias = tuple[Ranked, ...]


@dataclass(frozen=True)
class _Estimate:
    seconds: float
    """For a typical pull."""
    error: float
    """Standard error of ln(seconds)."""


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


def order_for_pull(ranking: Ranking, exclude: Collection[str]) -> tuple[Source, ...]:
    """The sources to ask in this pull, in order, without the URLs that failed hard in it.

    The ill ones stand at the end: better an unlikely source than none. One refused connection moves this pull on at
    once; the kept ranking changes only by `record_failure`.
    """
    return tuple(ranked.source for ranked in ranking if ranked.source.url not in exclude)


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
    timed = [(url, health) for url, health in measured if health.latency]
    goodput = all(one.throughput and abs(now - one.throughput.at) <= GOODPUT_KEPT for _, one in timed)
    return {url: _estimate(health, goodput=goodput) for url, health in timed}


def _estimate(health: Health, *, goodput: bool) -> _Estimate:
    parts = []
    if health.latency:
        parts.append((health.latency.mean, health.latency.error))
    if goodput and health.throughput:
        parts.append((TYPICAL_PULL / health.throughput.mean, health.throughput.error))
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
