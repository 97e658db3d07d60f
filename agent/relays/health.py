"""What is known of each source: how often it failed, how fast it answered, and when to look again. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace

from relay.terminal.text import printable

FAILS_OUT = 3
"""Failures in a row after which a source looks ill."""
PASSES_IN = 2
"""Successes in a row after which an ill source looks well again. Both numbers are Kraken's (`lib/healthcheck`)."""
ALPHA = 0.2
"""Weight of the newest sample in a moving average."""
VARIANCE_ALPHA = 0.05
"""Weight of the newest sample in the average's own noise. Slower, because a variance is itself noisy."""
VARIANCE_AT_FIRST = 0.05
"""Variance of ln(sample) assumed after one sample: about 22 % of noise."""
PROBE_ILL = 30.0
"""Seconds, mean time to the next check of a source that failed."""
PROBE_ILL_MAX = 600.0
"""Seconds, the same for one that has been failing for long."""
PROBE_WELL = 300.0
"""Seconds, mean time to the next measurement of a source that looks well."""
_SMALLEST, _LARGEST = 1e-6, 1e15  # seconds or bytes/s; outside of these a clock is broken, not a network


@dataclass(frozen=True)
class Average:
    """A moving average that knows how far it can be trusted.

    Of logarithms, so one stall of ten seconds among answers of ten milliseconds counts as one bad sample, not as a
    thousand. The first samples are averaged plainly, so that a start at an odd moment is soon forgotten.

    Attributes:
        mean: geometric, in the samples' unit.
        variance: of ln(sample).
        at: clock of the newest sample.
    """

    mean: float
    variance: float
    count: int
    at: float

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
    """What is known of one source. The clock is the caller's; it is kept over restarts, so it should be `time.time`.

    Attributes:
        fails, passes: in a row, up to now.
        latency: seconds to the first byte.
        throughput: goodput in bytes/s.
        reason: the last failure, for people.
    """

    ok: bool = True
    fails: int = 0
    passes: int = 0
    latency: Average | None = None
    throughput: Average | None = None
    last_checked: float = 0.0
    out_since: float | None = None
    reason: str = ""

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
    is_final: bool = False
    """It will not pass by itself, such as a token that is refused: one such failure puts a source out."""

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


def record_failure(health: Health, now: float, reason: str, *, is_final: bool = False) -> Health:
    """It could not be reached, or could not serve. Not for a missing chunk: that is an answer.

    `is_final`: it counts for as many failures as put a source out.
    """
    fails = max(health.fails + 1, FAILS_OUT if is_final else 0)
    ok = health.ok and fails < FAILS_OUT
    since = now if health.ok and not ok else health.out_since
    return replace(health, ok=ok, fails=fails, passes=0, last_checked=now, out_since=since, reason=_plain(reason))


def record_overtaken(health: Health, now: float, goodput: float, reason: str) -> Health:
    """It was so slow, at `goodput` bytes/s, that another source was asked in its place: a failure that was measured."""
    failed = record_failure(health, now, reason)
    return replace(failed, throughput=_sampled(failed.throughput, goodput, now))


def record_probes(healths: Mapping[str, Health], results: Mapping[str, ProbeResult], now: float) -> dict[str, Health]:
    """All healths by URL, with the probes' results taken in."""
    after = dict(healths)
    for url, result in results.items():
        before = after.get(url, UNKNOWN)
        after[url] = (
            record_success(before, now, result.first_byte, None)
            if result.ok
            else record_failure(before, now, result.reason, is_final=result.is_final)
        )
    return after


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
    return printable(reason)[:200]
