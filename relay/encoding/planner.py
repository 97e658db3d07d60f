"""Which encoding to send a run in, over this line, to these receivers: by time. Pure, and its answer carries its arithmetic.

    seconds = max(encode, max(first byte, what is on the line before it) + payload ÷ goodput) + decode of the last run

and on a line that nothing was sent over yet, the round trips that a connection takes to find its pace. A long encoder is
taken to need twice what was reckoned beyond its first moments, as others want the processors, too.

What is asked for is the moment when the last chunk is verified at the receiver. An encoding that several receivers share
(the same chunks, the same bases) is made once; one that was made before is there already.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from relay.encoding.codecs import AT_ONCE, RAW, Coding, Encoding, can_encode

THIN = 250_000.0
"""Bytes per second. Below it the bytes are what counts: whoever shares such a line is glad of each that is not sent."""
UNKNOWN = 125_000.0
"""Bytes per second that a line is taken for until it was measured: bytes that were sent in vain do not come back."""
FAST = 6_000_000.0
"""Bytes per second. From here on CPU is what is dear."""
BASES_PAY = 40_000_000.0
"""Bytes per second. Above it a line is as fast as both ends read and check bases: what is new had better just go."""
_THIN_PATIENCE = 0.3
"""Seconds later that a smaller payload may be there on a thin line, beside a tenth."""
_FIRST_FLIGHT: Final = 14_600
"""Bytes that a new connection sends before it waits: ten segments (RFC 6928)."""
_HARDLY: Final = 0.97
"""What level 3 leaves of something that does not compress."""
_BUSY: Final = 2.0
"""Times as long as reckoned that an encoder may take, as others want the processors, too: one that would just keep up with
the line gains a few bytes, and may lose much time."""
_TURN: Final = 0.3
"""Seconds of an encoder that count as they are reckoned."""
_SAME: Final = 1.04
"""Times that differ by less are the same."""
_SAME_BYTES: Final = 1.02
"""Times the smallest payload: more is really more."""
_SAME_SECONDS: Final = 0.005
PLENTIFUL: Final = 25_000_000.0
"""Bytes per second. Above it, of what is there as soon, the one with the least work is taken and not the smallest."""

PLAIN_CODINGS: Final = (RAW, *(Coding("zstd", level) for level in (3, 6, 9, 12, 19)))
DELTA_CODINGS: Final = (
    *(Coding("zstd-prefix", level) for level in (3, 9, 12)),
    *(Coding("hdiff", level) for level in (3, 9, 19)),
)
"""What is weighed up. Levels between them are never first on any line (measured on the packages of measures.md)."""


@dataclass(frozen=True, slots=True)
class Line:
    """What is known of the way to one receiver.

    Attributes:
        goodput: bytes of payload per second, of late; None where nothing was measured yet.
        round_trip: seconds.
        limit: the most that may be sent, bytes per second; None: no limit.
    """

    goodput: float | None = None
    round_trip: float = 0.0
    limit: float | None = None

    @property
    def rate(self) -> float:
        """Bytes per second to reckon with."""
        return max(1.0, min(self.goodput or UNKNOWN, self.limit or math.inf))

    @property
    def is_thin(self) -> bool:
        return self.rate <= THIN


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to send a run.

    Attributes:
        payload_bytes: of the whole run in this encoding; `exact` where it was made, else an estimate.
        encode_seconds: until the last byte of it is made on this machine, all cores; 0 where it is kept.
        decode_seconds: at the receiver, of the last run.
        start_seconds: until the first byte of it is made.
    """

    coding: Coding
    payload_bytes: int
    encode_seconds: float
    decode_seconds: float
    exact: bool = False
    start_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table that explains a choice."""

    candidate: Candidate
    line_seconds: float
    seconds: float
    chosen: bool
    why_not: str
    """Empty for the chosen one."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The encoding to use, and why."""

    coding: Coding
    line: Line
    rows: tuple[Row, ...] = field(default=())
    """The chosen one first, then by time."""

    @property
    def chosen(self) -> Candidate:
        return self.rows[0].candidate


def choose(candidates: Sequence[Candidate], line: Line, *, receivers: int = 1, waiting: float = 0.0) -> Choice:
    """The candidate with which the last chunk is there first.

    Of several that are as good as that, the smallest; on a fast line the one that takes the least CPU.

    Args:
        candidates: at least one.
        line: the slowest of the lines, where several receivers share an encoding.
        receivers: that share it: their payloads leave through one uplink where that is what limits.
        waiting: seconds for which the line is busy with what was encoded before.
    """
    timed = [
        (_seconds(candidate, _on(line, candidate, receivers, waiting), waiting), candidate) for candidate in candidates
    ]
    wasteful = _wasteful(candidates) + (_less_hard(candidates) if line.is_thin else [])
    best = min(seconds for seconds, candidate in timed if candidate not in wasteful)
    bearable = best * _SAME + _SAME_SECONDS
    if line.is_thin:
        bearable = waiting + (best - waiting) * 1.1 + _THIN_PATIENCE
    good = [one for one in timed if one[0] <= bearable and one[1] not in wasteful]
    if line.is_thin:
        chosen = min(good, key=lambda one: (one[1].payload_bytes, one[0], one[1].coding))
    else:
        smallest = min(candidate.payload_bytes for _, candidate in good)
        # What is hardly smaller is not worth the work; where bytes are plentiful nothing is.
        most = math.inf if line.rate >= PLENTIFUL else _SAME_BYTES * smallest
        some = [one for one in good if one[1].payload_bytes <= most]
        chosen = min(some, key=lambda one: (one[1].encode_seconds, one[1].payload_bytes, one[1].coding))
    rows = [
        Row(
            candidate,
            _on(line, candidate, receivers, waiting),
            seconds,
            candidate is chosen[1],
            "" if candidate is chosen[1] else _why_not((seconds, candidate), chosen),
        )
        for seconds, candidate in timed
    ]
    rows.sort(key=lambda row: (not row.chosen, row.seconds))
    return Choice(chosen[1].coding, line, tuple(rows))


def _less_hard(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Differences that are packed less hard than they could be: finding them takes the time, and not packing them."""
    hardest = max((one.coding for one in candidates if one.coding.encoding == "hdiff"), default=None)
    return [one for one in candidates if one.coding.encoding == "hdiff" and one.coding != hardest]


def _wasteful(candidates: Sequence[Candidate]) -> list[Candidate]:
    """What goes as it is though it would shrink at next to no cost: a line has others on it, however fast it is."""
    easy = min((one.payload_bytes for one in candidates if one.coding == _ZSTD_3), default=None)
    return [one for one in candidates if easy is not None and one.coding == RAW and easy < _HARDLY * one.payload_bytes]


def _on(line: Line, candidate: Candidate, receivers: int, waiting: float) -> float:
    """Seconds on the line. One that nothing was sent over yet has to find its pace: TCP's slow start, RFC 5681."""
    payload = candidate.payload_bytes
    seconds = payload * receivers / line.rate
    if waiting or not line.round_trip:
        return seconds
    return seconds + line.round_trip * math.log2(1 + min(payload, 2 * line.rate * line.round_trip) / _FIRST_FLIGHT)


def _seconds(candidate: Candidate, on_line: float, waiting: float) -> float:
    sent = max(waiting, candidate.start_seconds) + on_line
    return max(_likely(candidate.encode_seconds), sent) + candidate.decode_seconds


def _likely(encode_seconds: float) -> float:
    """What an encoder takes where others want the processors, too; a short one has found its turn by then."""
    return encode_seconds + (_BUSY - 1.0) * max(0.0, encode_seconds - _TURN)


def _why_not(it: tuple[float, Candidate], chosen: tuple[float, Candidate]) -> str:
    seconds, more = it[0] - chosen[0], it[1].payload_bytes - chosen[1].payload_bytes
    if seconds <= 0:
        return f"{more} bytes more, and as good as no sooner" if more > 0 else "more CPU, and as good as no sooner"
    # Where its own encoder is what it waits for, that is the reason; else its bytes.
    if _likely(it[1].encode_seconds) + it[1].decode_seconds >= it[0] * 0.9:
        return f"{seconds:.2f} s later: its encoder is slower than the line"
    return f"{seconds:.2f} s later: {more} bytes more" if more > 0 else f"{seconds:.2f} s later: it begins late"


# --- what a payload will take, before it is made


@dataclass(frozen=True, slots=True)
class Rates:
    """What one core does, bytes per second. The defaults are typical; what was measured stands in their place.

    Attributes:
        zstd: of levels 3, 9 and 19; the others lie between them.
        prefix: zstd with a prefix at level 3, of run and bases together.
        hdiff: looking for matches, of run and bases together.
        decode: zstd, at the receiver.
        patch: `hdiff`, at the receiver.
        load: chunks out of a store, checked and joined; here before anything is encoded, there the bases.
    """

    zstd: Mapping[int, float] = field(default_factory=lambda: _TYPICAL_ZSTD)
    prefix: float = 600e6
    hdiff: float = 18e6
    decode: float = 800e6
    patch: float = 350e6
    load: float = 300e6

    @classmethod
    def measured(cls, level_3: float, level_9: float = 0.0, level_19: float = 0.0, hdiff: float = 0.0) -> Rates:
        """With what a machine found of itself; 0 is what it did not measure, and follows from level 3."""
        typical = cls()
        speed = (level_3 or _TYPICAL_ZSTD[3]) / _TYPICAL_ZSTD[3]
        zstd = {level: rate * speed for level, rate in _TYPICAL_ZSTD.items()}
        zstd |= {level: rate for level, rate in ((9, level_9), (19, level_19)) if rate}
        return cls(
            zstd,
            typical.prefix * speed,
            hdiff or typical.hdiff * speed,
            typical.decode * speed,
            typical.patch * speed,
            typical.load * speed,
        )

    def encode_seconds(self, coding: Coding, size: int, base_size: int, *, prefix_ratio: float = 0.15) -> float:
        """Of one core. `prefix_ratio`: what a prefix leaves of the run; where that is much, differences are dense."""
        loaded = (size + base_size) / self.load
        if coding.encoding == "raw":
            return loaded
        if coding.encoding == "zstd":
            return loaded + size / self._level(coding.level)
        if coding.encoding == "zstd-prefix":
            return loaded + _at(_PREFIX_COST, coding.level) * (base_size + size) / self.prefix
        dense = min(1.0, _DIFFERENCES + 2.5 * prefix_ratio)
        return self.start_seconds(coding, size, base_size) + dense * size / self._level(coding.level)

    def start_seconds(self, coding: Coding, size: int, base_size: int) -> float:
        """Until the first byte."""
        loaded = (size + base_size) / self.load
        if coding.encoding == "hdiff":
            return loaded + (size + base_size) / self.hdiff
        if coding.encoding == "zstd-prefix":
            return loaded + _at(_PREFIX_COST, coding.level) * base_size / self.prefix
        if coding.encoding == "raw":
            return loaded
        return loaded + (size if coding.level <= AT_ONCE else min(size, 1 << 20)) / self._level(coding.level)

    def decode_seconds(self, coding: Coding, size: int, base_size: int) -> float:
        if coding.encoding == "raw":
            return 0.0
        return base_size / self.load + size / (self.patch if coding.encoding == "hdiff" else self.decode)

    def _level(self, level: int) -> float:
        """Between two levels that are known, by equal ratios."""
        level = max(level, 1)
        if level in self.zstd:
            return self.zstd[level]
        below = max((known for known in self.zstd if known < level), default=min(self.zstd))
        above = min((known for known in self.zstd if known > level), default=max(self.zstd))
        if below == above:
            return self.zstd[below]
        share = (level - below) / (above - below)
        return math.exp((1 - share) * math.log(self.zstd[below]) + share * math.log(self.zstd[above]))


_TYPICAL_ZSTD: Final[Mapping[int, float]] = {1: 330e6, 3: 240e6, 6: 80e6, 9: 55e6, 12: 28e6, 19: 3.2e6}
_DIFFERENCES: Final = 0.1
"""Share of its own time that zstd takes for differences at least: they are zeros for the most part."""

_PREFIX_COST: Final[Mapping[int, float]] = {1: 1.0, 9: 3.5, 12: 10.0, 19: 100.0}
"""Time with a prefix against that of level 3: the tables for the prefix are filled at the level's own pace."""
_TYPICAL_RATIO: Final[Mapping[Encoding, float]] = {"raw": 1.0, "zstd": 0.4, "zstd-prefix": 0.15, "hdiff": 0.08}
_OF_ZSTD_3: Final[Mapping[int, float]] = {1: 1.1, 3: 1.0, 6: 0.95, 9: 0.925, 12: 0.91, 15: 0.9, 19: 0.8}
_OF_PREFIX_3: Final[Mapping[int, float]] = {3: 1.0, 9: 0.9, 12: 0.88, 19: 0.8}
_OF_HDIFF_19: Final[Mapping[int, float]] = {3: 1.25, 9: 1.1, 19: 1.0}
"""Bytes against those of level 3, typical of packages of code (measures.md of the design)."""


@dataclass(frozen=True, slots=True)
class Ratios:
    """How far the content at hand shrinks: what was seen of it, payload by size, by coding."""

    seen: Mapping[Coding, float] = field(default_factory=dict)

    def of(self, coding: Coding) -> float:
        """What to expect of `coding`: what was seen, or what follows from level 3 of the same kind."""
        if coding in self.seen:
            return self.seen[coding]
        if coding.encoding == "raw":
            return 1.0
        if coding.encoding == "zstd":
            plain = self.seen.get(_ZSTD_3, _TYPICAL_RATIO["zstd"])
            # What does not shrink at level 3 does not at 19 either.
            return plain * _gain(_at(_OF_ZSTD_3, coding.level), plain)
        prefix = self.seen.get(_PREFIX_3, _TYPICAL_RATIO["zstd-prefix"])
        if coding.encoding == "zstd-prefix" and coding.level > 9 and _PREFIX_9 in self.seen:
            return self.seen[_PREFIX_9] * _at(_OF_PREFIX_3, coding.level) / _OF_PREFIX_3[9]
        if coding.encoding == "zstd-prefix":
            return prefix * _gain(_at(_OF_PREFIX_3, coding.level), prefix)
        return prefix * self._hdiff_gain(prefix) * _at(_OF_HDIFF_19, coding.level)

    def _hdiff_gain(self, prefix: float) -> float:
        """Of `hdiff:19` against a prefix: where trying harder gains, differences gain much more.

        Fitted on the pairs of measures.md: the fourth power of what level 9 leaves of level 3.
        """
        harder = self.seen.get(_PREFIX_9)
        if harder is None or not prefix:
            return _TYPICAL_HDIFF_GAIN
        return min(0.95, max(0.1, (harder / prefix) ** 4))

    def with_seen(self, coding: Coding, ratio: float) -> Ratios:
        """After one more payload; what was seen last counts for half."""
        before = self.seen.get(coding, ratio)
        return Ratios({**self.seen, coding: (before + ratio) / 2})


_ZSTD_3: Final = Coding("zstd", 3)
_PREFIX_3: Final = Coding("zstd-prefix", 3)
_PREFIX_9: Final = Coding("zstd-prefix", 9)
_TYPICAL_HDIFF_GAIN: Final = 0.5


def _at(factors: Mapping[int, float], level: int) -> float:
    """Of the highest level that is known and not above."""
    return factors[max((known for known in factors if known <= max(level, 1)), default=min(factors))]


def _gain(factor: float, ratio: float) -> float:
    return 1.0 - (1.0 - factor) * min(1.0, max(0.0, (1.0 - ratio) / 0.1))


def estimate(
    coding: Coding,
    size: int,
    base_size: int = 0,
    *,
    ratios: Ratios,
    rates: Rates,
    runs: int = 1,
    cores: int = 1,
    exact: int | None = None,
    is_kept: bool = False,
) -> Candidate:
    """What it will take to send `size` bytes in this coding.

    Args:
        coding: how.
        size: bytes of all runs together.
        base_size: bytes of all their bases together; only deltas need them.
        ratios: how the content shrinks.
        rates: of one core here (and there, for decoding).
        runs: as many of about the same size.
        cores: that encode them side by side.
        exact: bytes of the payload, where it was made before.
        is_kept: it is there and need not be made.
    """
    base_size = base_size if coding.needs_bases else 0
    run, base = size / max(runs, 1), base_size / max(runs, 1)
    lanes = max(1, min(runs, cores))
    payload = exact if exact is not None else max(1, round(size * ratios.of(coding)))
    return Candidate(
        coding,
        payload,
        0.0 if is_kept else rates.encode_seconds(coding, size, base_size, prefix_ratio=ratios.of(_PREFIX_3)) / lanes,
        rates.decode_seconds(coding, round(run), round(base)),
        exact is not None,
        0.0 if is_kept else rates.start_seconds(coding, round(run), round(base)),
    )


def codings_for(has_bases: bool, encodings: Collection[str] | None = None) -> tuple[Coding, ...]:  # noqa: FBT001 - a fact
    """What can be made here and weighed up, with bases or without; of these encodings only, where the receiver knows no
    others.
    """
    codings = (*PLAIN_CODINGS, *DELTA_CODINGS) if has_bases else PLAIN_CODINGS
    return tuple(
        coding
        for coding in codings
        if (encodings is None or coding.encoding in encodings) and can_encode(coding.encoding)
    )
