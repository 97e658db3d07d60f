"""What a payload will take before it is made: its bytes and its seconds, by what was seen of the content and of the machine."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from relay.encoding.codecs import AT_ONCE, PLAIN, RAW, Coding, Encoding, can_encode

Source = Literal["encoder", "kept", "stored"]
PREFIX: Final = Coding("zstd-prefix", 3)
PREFIX_HARDER: Final = Coding("zstd-prefix", 9)
PLAIN_CODINGS: Final = (RAW, *(Coding("zstd", level) for level in (3, 6, 9, 12, 19)))
DELTA_CODINGS: Final = (
    *(Coding("zstd-prefix", level) for level in (3, 9, 12)),
    *(Coding("hdiff", level) for level in (3, 9, 19)),
)
"""What is weighed up. Levels between them are never first on any line (measured on the packages of measures.md)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to send a run.

    Attributes:
        payload_bytes: of the whole run in this encoding; `exact` where it was made, else an estimate.
        encode_seconds: until the last byte of it is made on one core of this machine.
        decode_seconds: at the receiver.
        start_seconds: until the first byte of it is made.
        source: whether an encoder makes it now, its payload is `kept` already, or its chunks go as they are `stored`.
    """

    coding: Coding
    payload_bytes: int
    encode_seconds: float
    decode_seconds: float
    exact: bool = False
    start_seconds: float = 0.0
    source: Source = "encoder"

    @property
    def needs_encoder(self) -> bool:
        """Whether it has to wait for a core."""
        return self.source == "encoder" and self.coding != RAW


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
        match coding.encoding:
            case "raw":
                return loaded
            case "zstd":
                return loaded + size / self._level(coding.level)
            case "zstd-prefix":
                return loaded + _at(_PREFIX_COST, coding.level) * (base_size + size) / self.prefix
            case "hdiff":
                dense = min(1.0, _DIFFERENCES + 2.5 * prefix_ratio)
                return self.start_seconds(coding, size, base_size) + dense * size / self._level(coding.level)

    def start_seconds(self, coding: Coding, size: int, base_size: int) -> float:
        """Until the first byte."""
        loaded = (size + base_size) / self.load
        match coding.encoding:
            case "raw":
                return loaded
            case "zstd":
                return loaded + (size if coding.level <= AT_ONCE else min(size, 1 << 20)) / self._level(coding.level)
            case "zstd-prefix":
                return loaded + _at(_PREFIX_COST, coding.level) * base_size / self.prefix
            case "hdiff":
                return loaded + (size + base_size) / self.hdiff

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
        plain = self.seen.get(PLAIN, _TYPICAL_RATIO["zstd"])
        prefix = self.seen.get(PREFIX, _TYPICAL_RATIO["zstd-prefix"])
        match coding.encoding:
            case "raw":
                return 1.0
            case "zstd":
                # What does not shrink at level 3 does not at 19 either.
                return plain * _gain(_at(_OF_ZSTD_3, coding.level), plain)
            case "zstd-prefix" if coding.level > 9 and PREFIX_HARDER in self.seen:
                return self.seen[PREFIX_HARDER] * _at(_OF_PREFIX_3, coding.level) / _OF_PREFIX_3[9]
            case "zstd-prefix":
                return prefix * _gain(_at(_OF_PREFIX_3, coding.level), prefix)
            case "hdiff":
                return prefix * self._hdiff_gain(prefix) * _at(_OF_HDIFF_19, coding.level)

    def _hdiff_gain(self, prefix: float) -> float:
        """Of `hdiff:19` against a prefix: where trying harder gains, differences gain much more.

        Fitted on the pairs of measures.md: the fourth power of what level 9 leaves of level 3.
        """
        harder = self.seen.get(PREFIX_HARDER)
        if harder is None or not prefix:
            return 0.5  # typical
        return min(0.95, max(0.1, (harder / prefix) ** 4))

    def with_seen(self, coding: Coding, ratio: float) -> Ratios:
        """What was seen last counts: parts of a package shrink very differently."""
        return Ratios({**self.seen, coding: ratio})


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
    exact: int | None = None,
    is_kept: bool = False,
) -> Candidate:
    """What it will take to send a run of `size` bytes in this coding.

    Args:
        coding: how.
        size: bytes of the run.
        base_size: bytes of its bases; only deltas need them.
        ratios: how the content shrinks.
        rates: of one core here, and there for decoding.
        exact: bytes of the payload, where it was made before.
        is_kept: it is there and need not be made.
    """
    base_size = base_size if coding.needs_bases else 0
    exact = size if coding == RAW else exact
    return Candidate(
        coding,
        max(1, round(size * ratios.of(coding))) if exact is None else exact,
        0.0 if is_kept else rates.encode_seconds(coding, size, base_size, prefix_ratio=ratios.of(PREFIX)),
        rates.decode_seconds(coding, size, base_size),
        exact is not None,
        0.0 if is_kept else rates.start_seconds(coding, size, base_size),
        "kept" if is_kept else "encoder",
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
