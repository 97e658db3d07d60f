"""What a relay holds of a package, and what it would take to send it the rest: asked and reckoned before a byte of it goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from relay.encoding import bundle, planner
from relay.encoding.bundle import RUN_AND_BASES_MAX, Span
from relay.encoding.choose_bases import Held, choose_bases, worth_asking
from relay.encoding.codecs import PLAIN, RAW, Coding, can_encode
from relay.encoding.planner import Candidate, Choice, Line, Rates, Ratios
from relay.package.identity import ManifestId
from relay.package.manifest import Manifest
from relay.package.ranges import Ranges, from_indexes, indexes
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.transfer.encoder_pool import Payloads, RunSpec
from relay.transfer.link_history import Remembered

CORES: Final = os.cpu_count() or 1
KNOWN_ASKED: Final = 3
"""Versions of the same package, the newest first, that a relay is asked for. Each costs some 100 bytes."""
PROBED_BYTES: Final = 64 << 20
"""Bytes of tree stream that are really encoded to explain a plan; more is reckoned from them."""
PREFIX: Final = Coding("zstd-prefix", 3)
_PREFIX_9: Final = Coding("zstd-prefix", 9)


def probes(*, has_bases: bool, is_thin: bool = True) -> tuple[Coding, ...]:
    """What takes milliseconds to be known exactly, and tells how the rest will do.

    What a prefix gains by trying harder tells how far moved code hides what is alike, and so what `hdiff` will gain; only
    a thin line has time for that.
    """
    if not has_bases:
        return (PLAIN,)
    return (PREFIX, _PREFIX_9) if is_thin else (PREFIX,)


@dataclass(frozen=True, slots=True)
class Survey:
    """What a relay said before anything was offered to it."""

    is_offered: bool
    """It keeps the manifest already."""
    is_whole: bool
    """It keeps every chunk of it, too."""
    base: Manifest | None
    """The newest other version that it keeps."""
    held: tuple[Held, ...]
    """What can be built on, the best first."""

    def missing(self, manifest: Manifest) -> Ranges:
        """What it lacks, as far as what it holds tells: chunks of packages that nobody asked for may be there too."""
        if self.is_whole:
            return ()
        there = {one.manifest.chunk_id(index) for one in self.held for index in indexes(one.ranges)}
        first = manifest.index_of
        return from_indexes(index for id, index in first.items() if id not in there)


async def survey(
    manifest: Manifest, relay: RelayClient, known: Sequence[Manifest] = (), others: Sequence[Manifest] = ()
) -> Survey:
    """Ask `relay` what it holds of `manifest`, of other versions of it (`known`), and of `others` that share parts with it.

    Raises:
        WaystationError: as `RelayClient.missing`.
    """
    versions = sorted((m for m in known if m.id != manifest.id), key=lambda m: m.package.version, reverse=True)
    lacking = await _lacking(relay, [manifest, *versions[:KNOWN_ASKED], *_useful(manifest, versions, others)])
    here = [one for one in versions[:KNOWN_ASKED] if lacking[one.id] is not None]
    if not here and versions[KNOWN_ASKED:]:
        rest = await _lacking(relay, versions[KNOWN_ASKED:])
        here = [one for one in versions[KNOWN_ASKED:] if rest[one.id] is not None]
        lacking |= rest
    shared = [one for one in others if lacking.get(one.id) is not None]
    return Survey(
        is_offered=lacking[manifest.id] is not None,
        is_whole=lacking[manifest.id] == (),
        base=here[0] if here else None,
        held=tuple(held_of(one, lacking[one.id] or ()) for one in [*here[:1], *shared]),
    )


def guess(manifest: Manifest, base: Manifest, known: Sequence[Manifest], others: Sequence[Manifest]) -> Survey:
    """Without asking: that the relay holds `base`, which it was sent before. An offer against it says whether it does."""
    shared = _useful(manifest, [base, *known], others)
    return Survey(is_offered=False, is_whole=False, base=base, held=tuple(held_of(one, ()) for one in [base, *shared]))


def held_of(manifest: Manifest, lacking: Ranges) -> Held:
    """All of `manifest` but `lacking`; a chunk that stands in it several times is named missing once."""
    gone = {manifest.chunk_id(index) for index in indexes(lacking)}
    return Held(manifest, from_indexes(i for i, id in enumerate(manifest.chunk_ids()) if id not in gone))


def _useful(manifest: Manifest, versions: Sequence[Manifest], others: Sequence[Manifest]) -> list[Manifest]:
    if not others:
        return []
    newest = set(versions[0].chunk_ids()) if versions else set()
    missing = [index for id, index in manifest.index_of.items() if id not in newest]
    asked = set(worth_asking(manifest, missing, others, versions[:1]))
    return [one for one in others if one.id in asked]


async def _lacking(relay: RelayClient, wanted: Sequence[Manifest]) -> dict[ManifestId, Ranges | None]:
    """What is missing of each; None where the relay does not keep it."""
    asked = [one for one in wanted if one.chunks]
    found: dict[ManifestId, Ranges | None] = {one.id: () for one in wanted}
    if not asked:
        return found
    answer = await relay.missing([everything(one) for one in asked])
    for each in answer.missing:
        if ManifestId(each.manifest) in found:
            found[ManifestId(each.manifest)] = each.ranges
    return found | {ManifestId(id): None for id in answer.unknown if ManifestId(id) in found}


def everything(manifest: Manifest) -> messages.ChunkRanges:
    return messages.ChunkRanges(manifest=manifest.id, ranges=((0, len(manifest.chunks)),))


async def confirm(relay: RelayClient, lease: str, held: Sequence[Held], base: Manifest | None) -> tuple[Held, ...]:
    """Make the relay keep what is built on for as long as `lease` lives; what is left of `held` (`base` it keeps anyway)."""
    asked = [one for one in held if base is None or one.manifest.id != base.id]
    if not asked:
        return tuple(held)
    answer = await relay.missing([everything(one.manifest) for one in asked], lease)
    lacking = {each.manifest: each.ranges for each in answer.missing}
    return tuple(
        held_of(one.manifest, lacking.get(one.manifest.id, ())) if one in asked else one
        for one in held
        if one.manifest.id not in answer.unknown
    )


# --- runs


def base_bytes(coding: Coding, size: int, line: Line) -> int:
    """Bytes of bases for a run of `size` bytes: its neighbourhood in the old tree, which is as good as all of it.

    Measured on the pairs of measures.md: 8 MiB around a short run, and twice the run around a long one, are within 1 % of
    the whole tree, at a third of the time; below that some pairs lose a fifth. On a thin line long runs get three times.
    """
    if not coding.needs_bases:
        return 0
    share = 3 if line.is_thin else 2
    least = 4 << 20 if size <= 1 << 20 else 8 << 20
    return min(RUN_AND_BASES_MAX - size, max(least, share * size))


@dataclass(frozen=True, slots=True)
class Run:
    """Chunks that are to travel as one, and what they may build on."""

    indexes: tuple[int, ...]
    size: int
    bases: tuple[Span, ...]
    base_size: int

    def without_bases(self) -> Run:
        return Run(self.indexes, self.size, (), 0)


class Runs:
    """Makes runs of one package for one relay."""

    def __init__(self, manifest: Manifest, held: Sequence[Held], missing: Collection[int]) -> None:
        self.manifest = manifest
        self.held = tuple(held)
        self._missing = missing
        self._manifests = {one.manifest.id: one.manifest for one in held}
        self._chosen: dict[tuple[tuple[int, ...], int], tuple[Span, ...]] = {}

    def make(self, run: Sequence[int], coding: Coding, line: Line) -> Run:
        """`run` with the bases that `coding` is to build on; none where there are none."""
        size = self.size(run)
        most = base_bytes(coding, size, line) if self.held else 0
        if most <= 0:
            return Run(tuple(run), size, (), 0)
        key = (tuple(run), most)
        if key not in self._chosen:
            self._chosen[key] = choose_bases(self.manifest, run, self.held, most=most, missing=self._missing)
        spans = self._chosen[key]
        return Run(tuple(run), size, spans, sum(self._sizes(spans)))

    def spec(self, run: Run, coding: Coding) -> RunSpec:
        """What `Payloads` makes of it."""
        run = run if coding.needs_bases else run.without_bases()
        return RunSpec(
            chunks=tuple(self.manifest.chunk_id(index) for index in run.indexes),
            bases=tuple(
                self._manifests[span.manifest_id].chunk_id(index)
                for span in run.bases
                for index in indexes(span.ranges)
            ),
            coding=coding,
            size=run.size,
            base_size=run.base_size,
        )

    def size(self, run: Sequence[int]) -> int:
        return sum(self.manifest.chunks[index].size for index in run)

    def forget(self) -> None:
        """Bases that were chosen for runs that are on their way."""
        self._chosen.clear()

    def _sizes(self, spans: Sequence[Span]) -> list[int]:
        return [
            self._manifests[span.manifest_id].chunks[index].size for span in spans for index in indexes(span.ranges)
        ]


async def probe(payloads: Payloads, runs: Runs, run: Run, ratios: Ratios, coding: Coding) -> tuple[Ratios, float, int]:
    """Encode `run` in `coding`, which is a cheap one: what that says of the content, the core's seconds, and the bytes."""
    spec = runs.spec(run, coding)
    if payloads.made(spec) is None:
        async for _ in payloads.pieces(spec):
            pass
    made = payloads.made(spec)
    if made is None:
        return ratios, 0.0, 0
    return ratios.with_seen(coding, made.payload_bytes / run.size), made.seconds, made.payload_bytes


# --- a plan, in the open


@dataclass(frozen=True, slots=True)
class Explained:
    """Why a package is sent as it is. Bytes and seconds."""

    encoding: str
    """The coding that is planned; empty where nothing is missing."""
    base: str
    """In words, what is built on: a version, other packages; empty where nothing is."""
    base_version: str
    """The version that the relay holds, empty where none; what a comparison of files would have started from."""
    missing_chunks: int
    missing_bytes: int
    goodput: float
    """Bytes per second that were reckoned with."""
    goodput_from: str
    round_trip: float
    note: str
    choice: Choice | None


def line_of(remembered: Remembered | None, limit: float | None = None) -> Line:
    if remembered is None:
        return Line(limit=limit)
    return Line(remembered.goodput, remembered.round_trip, limit)


def told_of(line: Line, remembered: Remembered | None) -> str:
    """In words, where a line's goodput comes from."""
    if remembered is None or line.goodput is None:
        text = "assumed: this line was never measured"
    else:
        text = f"measured by {remembered.samples} bundle{'s' if remembered.samples != 1 else ''} sent before"
    return f"{text}; limited" if line.limit is not None and line.limit <= (line.goodput or planner.UNKNOWN) else text


async def explain(
    manifest: Manifest,
    missing: Ranges,
    held: Sequence[Held],
    line: Line,
    payloads: Payloads,
    *,
    remembered: Remembered | None = None,
    force: Coding | None = None,
    receivers: int = 1,
    run_bytes: Callable[[int], int],
) -> Explained:
    """Weigh up every coding over all that is missing. Level 3 is really encoded; what is not, is estimated.

    Args:
        manifest: of the package.
        missing: what is to be sent.
        held: what the relay holds, and what can be built on.
        line: to the relay.
        payloads: encoders.
        remembered: where the line's goodput comes from.
        force: the coding that was asked for, whatever the plan.
        receivers: relays that are sent the same.
        run_bytes: how long runs are, given the bytes of all.
    """
    lacking = list(indexes(missing))
    size = sum(manifest.chunks[index].size for index in lacking)
    known = (line.rate, told_of(line, remembered), line.round_trip)
    if not lacking:
        return Explained("", "", "", 0, 0, *known, "nothing is missing", None)
    runs = Runs(manifest, held, lacking)
    cut = bundle.plan_runs([(index, manifest.chunks[index].size) for index in lacking], run_bytes(size))
    candidates, has_bases = await _weigh(runs, cut, line, payloads, force)
    coding, note = forced(force, has_bases=has_bases)
    choice = planner.choose(candidates, line, receivers=receivers)
    if coding is not None:
        choice = _insist(choice, coding)
    base = next(
        (str(one.manifest.package.version) for one in held if one.manifest.package.id == manifest.package.id), ""
    )
    more = sum(one.manifest.package.id != manifest.package.id for one in held)
    text = " and ".join(part for part in (base, f"{more} other packages" if more else "") if part)
    return Explained(str(choice.coding), text if has_bases else "", base, len(lacking), size, *known, note, choice)


def forced(force: Coding | None, *, has_bases: bool) -> tuple[Coding | None, str]:
    """The coding that was asked for, or what stands in for a delta without a base; and what to say of it."""
    if force is None:
        return None, ""
    if force.needs_bases and not has_bases:
        return PLAIN, f"{force} was asked for, but there is nothing to build on: {PLAIN} in its place"
    if not can_encode(force.encoding):
        return PLAIN, f"{force} was asked for, but HDiffPatch is of no use here: {PLAIN} in its place"
    return force, f"{force} was asked for"


def _insist(choice: Choice, coding: Coding) -> Choice:
    rows = [
        planner.Row(
            row.candidate,
            row.line_seconds,
            row.seconds,
            row.candidate.coding == coding,
            "" if row.candidate.coding == coding else f"{coding} was asked for",
        )
        for row in choice.rows
    ]
    return Choice(coding, choice.line, tuple(sorted(rows, key=lambda row: (not row.chosen, row.seconds))))


async def _weigh(
    runs: Runs, cut: Sequence[Sequence[int]], line: Line, payloads: Payloads, force: Coding | None
) -> tuple[list[Candidate], bool]:
    ratios, rates = Ratios(), Rates()
    exact: dict[Coding, int] = {RAW: sum(runs.size(run) for run in cut)}
    whole = exact[RAW]
    probed = [run for run, start in zip(cut, _starts(runs, cut), strict=True) if start < PROBED_BYTES]
    has_bases = any(runs.make(run, PREFIX, line).bases for run in probed)
    for coding in {PLAIN: None} | dict.fromkeys(probes(has_bases=has_bases)):
        payload = seconds = 0.0
        made = [runs.make(run, coding, line) for run in probed]
        for run in made:
            # A run without anything to build on goes plainly.
            used = coding if not coding.needs_bases or run.bases else PLAIN
            _, took, size = await probe(payloads, runs, run, ratios, used)
            payload, seconds = payload + size, seconds + took
        size = sum(run.size for run in made)
        ratios = ratios.with_seen(coding, payload / max(size, 1))
        if len(probed) == len(cut):
            exact[coding] = round(payload)
        if coding == PLAIN and seconds > 0:
            rates = Rates.measured(size / seconds)
    codings = list(planner.codings_for(has_bases and line.rate < planner.BASES_PAY))
    if force is not None and force not in codings and (has_bases or not force.needs_bases):
        codings.append(force)
    candidates = []
    for coding in codings:
        base = 0
        if coding.needs_bases:
            base = sum(runs.make(run, coding, line).base_size for run in probed)
            base = base * whole // max(sum(runs.size(run) for run in probed), 1)
        candidates.append(
            planner.estimate(
                coding,
                whole,
                base,
                ratios=ratios,
                rates=rates,
                runs=len(cut),
                cores=CORES,
                exact=exact.get(coding),
            )
        )
    return candidates, has_bases


def _starts(runs: Runs, cut: Sequence[Sequence[int]]) -> list[int]:
    starts, at = [], 0
    for run in cut:
        starts.append(at)
        at += runs.size(run)
    return starts
