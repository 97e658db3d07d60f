"""How a relay sends chunks to one reader: as they lie in the store, or encoded for this line. Pure.

The stored form costs no CPU and no waiting, and is as good as anything on a fast line; on a thin one, bytes are time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

from relay.encoding.codecs import RAW, Coding
from relay.encoding.planner import THIN, Candidate, Line, Rates, Ratios, choose, codings_for, estimate
from relay.protocol.messages import CpuRates

FAST_GOODPUT: Final = 25e6
"""Bytes per second from which on everybody gets the stored form: a relay's readers have its CPU in common."""
ASSUMED_GOODPUT: Final = 1.25e6
"""Bytes per second of a line that nobody has measured, where the reader names bases: it asks for few bytes, then."""
DELTA_RUN_BYTES: Final = 16 << 20
"""Tree stream in one run that builds on bases: leaves room for the bases around it."""
PLAIN_RUN_BYTES: Final = 8 << 20
"""Tree stream in one run without bases: short enough that the next is encoded while this one is sent."""

_DEAR: Final = (Coding("zstd", 19),)
"""What keeps a core busy for seconds to save a few hundredths: for lines where bytes are all that counts."""
_FIRST_CODING: Final = Coding("zstd-prefix", 3)
_WORTH_SHARE: Final = 16
"""Bases of less than this part of a run are not worth it."""
_RUN_SHARE: Final = 0.9
"""Bytes of a run as one zstd frame where its chunks, each for itself, are 1."""
_PREFIX_SHARE: Final = 0.35
"""Of the same, with the version before as prefix: typical of packages of code."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A reader and its line.

    Attributes:
        encodings: that it can decode.
        goodput: bytes per second, as it measured; 0 where it does not know.
        has_bases: whether it named chunks to build on.
    """

    encodings: Collection[str]
    goodput: float
    has_bases: bool

    @property
    def wants_stored(self) -> bool:
        """Whether nothing has to be planned: the line is fast, or nothing is known that speaks against it."""
        return self.goodput >= FAST_GOODPUT or (not self.goodput and not self.has_bases)


@dataclass(frozen=True, slots=True)
class Run:
    """What is to be sent next.

    Attributes:
        size: bytes of tree stream.
        base_size: bytes of the bases that there are for it.
        stored_size: bytes in the stored form, or about so many.
        runs: how many like it are to come, itself included: they are encoded on all cores.
    """

    size: int
    base_size: int
    stored_size: int
    runs: int = 1


@dataclass(frozen=True, slots=True)
class Kept:
    """A payload of just this run that is here, is being made or is on its way here; `payload_bytes` where it is whole."""

    coding: Coding
    payload_bytes: int | None = None


Way = Coding | Literal["stored", "kept"]


def choose_way(asked: Asked, run: Run, cpu: CpuRates | None, *, kept: Kept | None = None, busy: bool = False) -> Way:
    """How to send `run`: by the payload that is `kept`, as its chunks are `stored`, or in a coding to be made now.

    Args:
        asked: who asks.
        run: what is sent.
        cpu: of this machine, where it was measured.
        kept: costs nothing but its bytes.
        busy: encoders wait for their turn: nothing new is begun for whoever can do with what is stored.
    """
    if asked.wants_stored:
        # Smaller than the stored form, and made already: at no speed of the line it is worse.
        return "stored" if kept is None else "kept"
    rates = _rates(cpu)
    ratios = _ratios(run)
    ways: list[tuple[Candidate, Way]] = [(_stored(run), "stored")]
    if kept is not None:
        # The level of what came from elsewhere is not known.
        coding = kept.coding if kept.coding.level else Coding.parse(kept.coding.encoding)
        candidate = estimate(
            coding, run.size, run.base_size, ratios=ratios, rates=rates, exact=kept.payload_bytes, is_kept=True
        )
        ways.append((candidate, "kept"))
    if not busy:
        ways += [
            (
                estimate(
                    coding,
                    run.size * run.runs,
                    run.base_size * run.runs,
                    ratios=ratios,
                    rates=rates,
                    runs=run.runs,
                    cores=cpu.cores if cpu else 1,
                ),
                coding,
            )
            for coding in _codings(asked, run)
        ]
    # All runs that are like this one are weighed up together: their encoders work side by side.
    ways = [(candidate if isinstance(way, Coding) else _times(candidate, run.runs), way) for candidate, way in ways]
    chosen = choose([candidate for candidate, _ in ways], Line(goodput=asked.goodput or ASSUMED_GOODPUT)).chosen
    return next(way for candidate, way in ways if candidate is chosen)


def _codings(asked: Asked, run: Run) -> list[Coding]:
    has_bases = run.base_size * _WORTH_SHARE >= run.size
    codings = [coding for coding in codings_for(has_bases, asked.encodings) if coding != RAW]
    if asked.goodput > THIN:
        codings = [coding for coding in codings if coding not in _DEAR]
    # A line that nobody knows may be fast: a slow encoder would hide that from whoever measures it.
    return codings if asked.goodput else [coding for coding in codings if coding == _FIRST_CODING]


def _stored(run: Run) -> Candidate:
    return Candidate(Coding("zstd", 3), run.stored_size, 0.0, 0.0)


def _times(candidate: Candidate, runs: int) -> Candidate:
    return Candidate(
        candidate.coding,
        candidate.payload_bytes * runs,
        candidate.encode_seconds * runs,
        candidate.decode_seconds,
        candidate.exact,
        candidate.start_seconds,
    )


def _ratios(run: Run) -> Ratios:
    stored = min(1.0, run.stored_size / max(run.size, 1))
    return Ratios({Coding("zstd", 3): stored * _RUN_SHARE, _FIRST_CODING: stored * _PREFIX_SHARE})


def _rates(cpu: CpuRates | None) -> Rates:
    if cpu is None:
        return Rates()
    return Rates.measured(cpu.zstd_encode, cpu.zstd_encode_9, cpu.zstd_encode_19, cpu.hdiff_encode)
