"""What crosses a line, and how: one table of lines, and one plan of a run. Pure, and a plan carries its arithmetic.

    seconds = max(encode, max(first byte, what is on the line before it) + payload ÷ goodput) + decode of the run

and on a line that nothing was sent over yet, the round trips that a connection takes to find its pace. A long encoder is
taken to need twice what was reckoned beyond its first moments, as others want the processors, too.

What is asked for is the moment when the last chunk is verified at the receiver. An origin that sends to a relay, a relay
that answers a relay or an agent, and `--explain` call the same `plan_run` with what they know. A plan goes by other plans
and never by the clock, so that what was planned beforehand is what is done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from relay.encoding.bundle import RUN_AND_BASES_MAX
from relay.encoding.codecs import PLAIN, RAW, Coding
from relay.encoding.estimates import PREFIX, PREFIX_HARDER, Candidate, Rates, Ratios, codings_for, estimate

# --- the table of lines


@dataclass(frozen=True, slots=True)
class LineClass:
    """Lines of about one speed, and what suits them.

    Attributes:
        name: for people.
        up_to: the most bytes per second of such a line.
        first_run: tree stream of the first run that builds on nothing; each run is as long as all before it, up to
        longest_run: the longest.
        delta_run: tree stream of a run that builds on bases; deltas lose a tenth by runs of 8 MiB (measured). 0: nothing
            is built on bases here.
        base_share: bytes of bases for each byte of a long run.
        segment: tree stream in one request of a reader, or one chunk.
        delta_segment: the same, where it names bases: two runs, so that one is encoded while the other is on the line.
        connections: of a sender at first, and of a reader.
        tries_plain, tries_deltas: whether each run is encoded in a cheap coding before it is planned. Parts of a package
            shrink very differently; on faster lines the first run stands for all.
        spares: what is taken of all that is there as soon: the fewest bytes, the least work, or a balance of both.
    """

    name: str
    up_to: float
    first_run: int
    longest_run: int
    delta_run: int
    base_share: int
    segment: int
    delta_segment: int
    connections: int
    tries_plain: bool
    tries_deltas: bool
    spares: Literal["bytes", "both", "work"]

    @property
    def names_bases(self) -> bool:
        """Whether a reader says what it holds: finding that out reads whole trees, and is lost where chunks go as stored."""
        return self.delta_run > 0 and self.spares != "work"


_MIB: Final = 1 << 20
LINES: tuple[LineClass, ...] = (
    # Each byte that is not sent is time for all that share the line: the longest runs, the most bases, the hardest levels.
    LineClass("thin", 250e3, 16 * _MIB, 16 * _MIB, 32 * _MIB, 3, 32 * _MIB, 64 * _MIB, 1, True, True, "bytes"),
    # Even the slowest encoder on one core is faster than the line: no run has to be short for its sake.
    LineClass("slow", 600e3, 16 * _MIB, 16 * _MIB, 16 * _MIB, 2, 32 * _MIB, 32 * _MIB, 1, True, True, "both"),
    # An encoder may keep it waiting: short runs first, and longer ones as what is ahead grows. One connection fills it.
    LineClass("middle", 2.5e6, _MIB, 16 * _MIB, 16 * _MIB, 2, 32 * _MIB, 32 * _MIB, 1, True, True, "both"),
    # One connection may not fill it. Trying each delta would take as long as sending it.
    LineClass("wide", 6e6, _MIB, 16 * _MIB, 16 * _MIB, 2, 16 * _MIB, 16 * _MIB, 2, True, False, "both"),
    # Trying takes as long as sending. A short run would cost 3 %, which is felt here; a long one would be waited for.
    LineClass("fast", 25e6, 2 * _MIB, 8 * _MIB, 16 * _MIB, 2, 6 * _MIB, 16 * _MIB, 2, False, False, "both"),
    # Processors are what is dear, and a relay's readers have its own in common: they get chunks as they are stored.
    LineClass("plentiful", 40e6, _MIB, 4 * _MIB, 4 * _MIB, 2, 6 * _MIB, 6 * _MIB, 2, False, False, "work"),
    # As fast as both ends read and check bases: what is new had better just go.
    LineClass("local", math.inf, _MIB, 4 * _MIB, 0, 2, 6 * _MIB, 6 * _MIB, 2, False, False, "work"),
)
"""From thin to fast. A line belongs to the first whose `up_to` it does not pass."""
UNKNOWN: Final = 125_000.0
"""Bytes per second that a line is taken for until it was measured: bytes that were sent in vain do not come back."""
RUN_BYTES_MIN = _MIB
"""The shortest runs that are planned: the first ones of a line that is not known, and of one that must not wait."""


Prefer = Literal["bytes", "time"]
"""`bytes`: the fewest, where times are within a tenth of the best. `time`: the soonest, whatever crosses for it."""


@dataclass(frozen=True, slots=True)
class Line:
    """What is known of the way to one receiver.

    Attributes:
        goodput: bytes of payload per second, of late; None where nothing was measured yet.
        round_trip: seconds.
        limit: the most that may be sent, bytes per second; None: no limit.
        prefer: what a person wants of encodings that are about as fast; None: what suits the line's class.
    """

    goodput: float | None = None
    round_trip: float = 0.0
    limit: float | None = None
    prefer: Prefer | None = None

    @property
    def rate(self) -> float:
        """Bytes per second to reckon with."""
        return max(1.0, min(self.goodput or UNKNOWN, self.limit or math.inf))

    @property
    def kind(self) -> LineClass:
        return class_of(self.rate)


def class_of(rate: float) -> LineClass:
    """The class of a line that carries `rate` bytes per second."""
    return next(one for one in LINES if rate <= one.up_to)


# --- the receiver's side


@dataclass(frozen=True, slots=True)
class RequestShape:
    """How a reader asks one source: how much at a time, in one request or in several, with what it holds or without."""

    segment_bytes: int
    one_at_a_time: bool
    with_bases: bool


def request_shape(goodput: float, *, can_have_bases: bool) -> RequestShape:
    """`goodput`: of the line, bytes per second; 0 where it is not known."""
    if not goodput and not can_have_bases:
        # Chunks come as they are stored, and several requests tell the most of a line that may be fast.
        return RequestShape(LINES[-1].segment, one_at_a_time=False, with_bases=False)
    kind = class_of(goodput or UNKNOWN)
    with_bases = can_have_bases and kind.names_bases
    return RequestShape(kind.delta_segment if with_bases else kind.segment, kind.connections == 1, with_bases)


# --- how long a run is

_READER_RUN: Final = 4 * _MIB
"""The longest run of a relay, but on lines whose first one may be longer: more of its readers come to want the same short
one, and an encoder of it holds less. 16 MiB would save 1.3 % of the bytes, for 1.8 times the relay's work (measured)."""


def run_bytes(
    line: Line,
    whole: int,
    begun: int = 0,
    *,
    has_bases: bool = False,
    connections: int = 1,
    to_reader: bool = False,
) -> int:
    """How long the next run should be, of `whole` bytes to send in all, `begun` of which were planned before.

    `to_reader`: a relay sends it, to one of many.
    """
    kind = line.kind
    longest = min(kind.longest_run, max(kind.first_run, _READER_RUN)) if to_reader else kind.longest_run
    if kind.spares == "work":
        # As many as keep all connections busy.
        return min(longest, max(RUN_BYTES_MIN, whole // (2 * max(connections, 2))))
    if has_bases:
        return kind.delta_run
    return min(longest, max(RUN_BYTES_MIN if line.goodput is None else kind.first_run, begun))


def run_length(sizes: Iterable[int], most: int) -> int:
    """How many of the next chunks make a run of at most `most` bytes: one at least.

    A few bytes before a long chunk are no run: they would say nothing of the content, nor of the encoders.
    """
    size = count = 0
    for each in sizes:
        if size >= min(RUN_BYTES_MIN, most) // 4 and size + each > most:
            break
        size += each
        count += 1
    return count


def base_bytes(size: int, line: Line) -> int:
    """Bytes of bases for a run of `size` bytes: its neighbourhood in the old tree, which is as good as all of it.

    Measured on the pairs of measures.md: 8 MiB around a short run, and twice the run around a long one, are within 1 % of
    the whole tree, at a third of the time; below that some pairs lose a fifth. On a thin line long runs get three times.
    """
    least = 4 * _MIB if size <= _MIB else 8 * _MIB
    return max(0, min(RUN_AND_BASES_MAX - size, max(least, line.kind.base_share * size)))


# --- the plan of one run


@dataclass(frozen=True, slots=True)
class Made:
    """A payload of just this run that was made before. Level 0 is one that is not known, of what came from elsewhere."""

    coding: Coding
    payload_bytes: int | None
    """None where it is not whole yet."""
    is_kept: bool = True
    """Whether it is still here, or on its way here; else its size is all that is known."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What is to be sent next.

    Attributes:
        size: bytes of tree stream.
        base_size: bytes of the bases that there are for it.
        made: payloads of it.
        stored_size: bytes in the stored form, or about so many; 0 where it cannot go in it.
    """

    size: int
    base_size: int = 0
    made: tuple[Made, ...] = ()
    stored_size: int = 0


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
    """How a run goes, and why."""

    rows: tuple[Row, ...]
    """The chosen one first, then by time."""

    @property
    def chosen(self) -> Candidate:
        return self.rows[0].candidate

    @property
    def coding(self) -> Coding:
        return self.chosen.coding


@dataclass(frozen=True, slots=True)
class Moment:
    """When a run is planned, as far as plans say. Seconds.

    Attributes:
        now: since the transfer began.
        waiting: for which the line is busy with what was planned before.
        queueing: for which all cores are.
    """

    now: float = 0.0
    waiting: float = 0.0
    queueing: float = 0.0


AT_ONCE: Final = Moment()


def plan_run(
    run: RunFacts,
    line: Line,
    moment: Moment = AT_ONCE,
    *,
    ratios: Ratios,
    rates: Rates,
    codings: Sequence[Coding],
    force: Coding | None = None,
) -> Choice:
    """How to send `run`: in one of `codings`, by a payload that was made before, or as its chunks are stored.

    Args:
        run: what is sent.
        line: to its receiver.
        moment: what was planned before it.
        ratios: how the content shrinks.
        rates: of the processors.
        codings: that may be made now.
        force: the coding that was asked for, whatever the plan.
    """
    known = {one.coding: one for one in run.made}
    candidates = [_candidate(run, coding, known.pop(coding, None), ratios, rates) for coding in codings]
    candidates += [_candidate(run, one.coding.at_a_level, one, ratios, rates) for one in known.values() if one.is_kept]
    if run.stored_size:
        candidates.append(Candidate(PLAIN, run.stored_size, 0.0, 0.0, source="stored"))
        if takes_stored(line, has_bases=run.base_size > 0):
            # Smaller than the stored form, and made already: at no speed of the line it is worse.
            candidates = [one for one in candidates if one.source == "kept"] or candidates[-1:]
    return _insist(choose(candidates, line, moment), force)


def _candidate(run: RunFacts, coding: Coding, made: Made | None, ratios: Ratios, rates: Rates) -> Candidate:
    return estimate(
        coding,
        run.size,
        run.base_size,
        ratios=ratios,
        rates=rates,
        exact=made.payload_bytes if made else None,
        is_kept=made is not None and made.is_kept,
    )


def _insist(choice: Choice, force: Coding | None) -> Choice:
    if force is None or choice.coding == force:
        return choice
    rows = [
        replace(row, chosen=True, why_not="")
        if row.candidate.coding == force
        else replace(row, chosen=False, why_not=f"{force} was asked for")
        for row in choice.rows
    ]
    return Choice(tuple(sorted(rows, key=lambda row: (not row.chosen, row.seconds))))


# --- what a relay's readers have to themselves: it has one store, and its processors, for all of them

_WORTH_SHARE: Final = 16
"""Bases of less than this part of a run are not worth it to a relay's reader."""
_DEAR: Final = Coding("zstd", 19)
"""What keeps a core busy for seconds to save a few hundredths: for lines where bytes are all that counts."""
_RUN_SHARE: Final = 0.9
"""Bytes of a run as one zstd frame where its chunks, each for itself, are 1."""
_PREFIX_SHARE: Final = 0.35
"""Of the same, with the version before as prefix: typical of packages of code."""


def takes_stored(line: Line, *, has_bases: bool) -> bool:
    """Whether a relay's reader gets chunks as they are stored: its line is plentiful, or nothing is known that speaks
    against it.
    """
    return not has_bases if line.goodput is None else line.kind.spares == "work"


def codings_to_answer(run: RunFacts, line: Line, encodings: Iterable[str]) -> tuple[Coding, ...]:
    """What a relay weighs up for a run to a reader who can decode `encodings`."""
    found = codings_for(run.base_size * _WORTH_SHARE >= run.size, frozenset(encodings) - {"raw"})
    if line.goodput is None:
        # A line that is not known may be fast: a slow encoder would hide that from the reader, who measures it.
        return tuple(coding for coding in found if coding == PREFIX)
    return found if line.kind.spares == "bytes" else tuple(coding for coding in found if coding != _DEAR)


def ratios_of_stored(run: RunFacts) -> Ratios:
    """How a run shrinks, by what its stored form takes."""
    stored = min(1.0, run.stored_size / max(run.size, 1))
    return Ratios({PLAIN: stored * _RUN_SHARE, PREFIX: stored * _PREFIX_SHARE})


def trials(line: Line, *, has_bases: bool) -> tuple[Coding, ...]:
    """What takes milliseconds to be known exactly, and tells how the rest will do.

    What a prefix gains by trying harder tells how far moved code hides what is alike, and so what `hdiff` will gain; only
    a thin line has time for that.
    """
    if not has_bases:
        return (PLAIN,)
    return (PREFIX, PREFIX_HARDER) if line.kind.spares == "bytes" else (PREFIX,)


# --- the moment of a run


class Schedule:
    """How the runs of one transfer will follow each other, by their plans: encoders side by side, then the line."""

    def __init__(self, cores: int) -> None:
        # When each core has nothing to do; when each run has crossed, and the bytes of its payload.
        self._free = [0.0] * max(1, cores)
        self._runs: list[tuple[float, int]] = []

    def moment(self, line: Line, ahead: int) -> Moment:
        """Of the next run, which is planned when all but `ahead` of those before it have crossed."""
        across = max(0, len(self._runs) - ahead)
        now = self._runs[across - 1][0] if across else 0.0
        waiting = sum(size for _, size in self._runs[across:]) / line.rate
        return Moment(now, waiting, max(0.0, min(self._free) - now))

    def add(self, choice: Choice, moment: Moment) -> None:
        """The next run goes so."""
        chosen, start = choice.chosen, moment.now
        if chosen.needs_encoder:
            core = self._free.index(min(self._free))
            start = max(start, self._free[core])
            self._free[core] = start + chosen.encode_seconds
        line_free = self._runs[-1][0] if self._runs else 0.0
        crossed = max(start + chosen.start_seconds, line_free) + choice.rows[0].line_seconds
        self._runs.append((max(start + chosen.encode_seconds, crossed), chosen.payload_bytes))


# --- by time

_THIN_PATIENCE: Final = 0.3
"""Seconds later that a smaller payload may be there on a thin line, beside a tenth."""
FIRST_FLIGHT: Final = 14_600
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
_ALIKE: Final = 1.1
"""The same, where bytes are preferred: what is saved is worth a tenth of the time."""
_SAME_BYTES: Final = 1.02
"""Times the smallest payload: more is really more."""
_SAME_SECONDS: Final = 0.005


def choose(candidates: Sequence[Candidate], line: Line, moment: Moment = AT_ONCE) -> Choice:
    """The candidate with which the last chunk is there first.

    Of several that are as good as that, the smallest; on a fast line the one that takes the least CPU, unless a person
    prefers otherwise.

    Args:
        candidates: at least one.
        line: that they are to cross.
        moment: what keeps the line and the cores busy.
    """
    spares = _spares(line)
    timed = [(_seconds(candidate, line, moment), candidate) for candidate in candidates]
    wasteful = _wasteful(candidates) + (_less_hard(candidates) if spares == "bytes" else [])
    best = min(seconds for seconds, candidate in timed if candidate not in wasteful)
    bearable = best * (_ALIKE if line.prefer == "bytes" else _SAME) + _SAME_SECONDS
    if spares == "bytes":
        bearable = moment.waiting + (best - moment.waiting) * 1.1 + _THIN_PATIENCE
    good = [one for one in timed if one[0] <= bearable and one[1] not in wasteful]
    if spares == "bytes":
        chosen = min(good, key=lambda one: (one[1].payload_bytes, one[0], one[1].coding))
    else:
        smallest = min(candidate.payload_bytes for _, candidate in good)
        # What is hardly smaller is not worth the work; where bytes are plentiful nothing is.
        most = math.inf if spares == "work" else _SAME_BYTES * smallest
        some = [one for one in good if one[1].payload_bytes <= most]
        chosen = min(some, key=lambda one: (one[1].encode_seconds, one[1].payload_bytes, one[1].coding))
    rows = [
        Row(
            one[1],
            _on(line, one[1], moment),
            one[0],
            one is chosen,
            "" if one is chosen else _why_not(one, chosen),
        )
        for one in timed
    ]
    return Choice(tuple(sorted(rows, key=lambda row: (not row.chosen, row.seconds))))


def _spares(line: Line) -> Literal["bytes", "both", "work"]:
    """What is taken of all that is there as soon."""
    of_class = line.kind.spares
    if line.prefer == "bytes" and of_class == "work":
        return "both"
    return "both" if line.prefer == "time" and of_class == "bytes" else of_class


def _less_hard(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Differences that are packed less hard than they could be: finding them takes the time, and not packing them."""
    hardest = max((one.coding for one in candidates if one.coding.encoding == "hdiff"), default=None)
    return [one for one in candidates if one.coding.encoding == "hdiff" and one.coding != hardest]


def _wasteful(candidates: Sequence[Candidate]) -> list[Candidate]:
    """What goes as it is though it would shrink at next to no cost: a line has others on it, however fast it is."""
    easy = min((one.payload_bytes for one in candidates if one.coding == PLAIN), default=None)
    return [one for one in candidates if easy is not None and one.coding == RAW and easy < _HARDLY * one.payload_bytes]


def _on(line: Line, candidate: Candidate, moment: Moment) -> float:
    """Seconds on the line. One that nothing was sent over yet has to find its pace: TCP's slow start, RFC 5681."""
    payload = candidate.payload_bytes
    seconds = payload / line.rate
    if moment.waiting or not line.round_trip:
        return seconds
    return seconds + line.round_trip * math.log2(1 + min(payload, 2 * line.rate * line.round_trip) / FIRST_FLIGHT)


def _seconds(candidate: Candidate, line: Line, moment: Moment) -> float:
    queueing = moment.queueing if candidate.needs_encoder else 0.0
    sent = max(moment.waiting, queueing + candidate.start_seconds) + _on(line, candidate, moment)
    return max(_likely(queueing + candidate.encode_seconds), sent) + candidate.decode_seconds


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


# --- all runs together


def add_up(choices: Sequence[Choice], line: Line, cores: int) -> tuple[Row, ...]:
    """One table of several runs: what each coding takes for all of them, against what was planned.

    A run that cannot go in a coding counts as it was planned. The codings that were chosen for some run come first.
    """
    chosen = list(dict.fromkeys(choice.coding for choice in choices))
    codings = dict.fromkeys([*chosen, *(row.candidate.coding for choice in choices for row in choice.rows)])
    planned = _together([choice.chosen for choice in choices], line, cores)
    rows = []
    for coding in codings:
        each = [
            next((row.candidate for row in choice.rows if row.candidate.coding == coding), choice.chosen)
            for choice in choices
        ]
        seconds, candidate = _together(each, line, cores)
        candidate = replace(candidate, coding=coding)
        is_chosen = coding in chosen
        why_not = "" if is_chosen else _why_not((seconds, candidate), planned)
        rows.append(Row(candidate, candidate.payload_bytes / line.rate, seconds, is_chosen, why_not))
    return tuple(sorted(rows, key=lambda row: (not row.chosen, row.seconds)))


def _together(candidates: Sequence[Candidate], line: Line, cores: int) -> tuple[float, Candidate]:
    lanes = max(1, min(cores, len(candidates)))
    whole = replace(
        candidates[-1],
        payload_bytes=sum(one.payload_bytes for one in candidates),
        encode_seconds=sum(one.encode_seconds for one in candidates) / lanes,
        exact=all(one.exact for one in candidates),
        start_seconds=candidates[0].start_seconds,
    )
    return _seconds(whole, line, AT_ONCE), whole
