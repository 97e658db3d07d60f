"""What a relay holds of a package, and what it would take to send it the rest: asked and reckoned before a byte of it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final

from relay.encoding import planner
from relay.encoding.choose_bases import Held, worth_asking
from relay.encoding.codecs import Coding
from relay.encoding.planner import Choice, Line, Prefer, Row
from relay.package.identity import ManifestId
from relay.package.manifest import Manifest
from relay.package.ranges import Ranges, count, from_indexes, indexes
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.support.together import together
from relay.transfer.encoder_pool import Payloads
from relay.transfer.link_history import Connections, Meter, Remembered
from relay.transfer.run_queue import CORES, PlannedRun, RunQueue, forced

KNOWN_ASKED: Final = 3
"""Versions of the same package, the newest first, that a relay is asked for. Each costs some 100 bytes."""
ENCODED_SECONDS: Final = 5.0
"""Seconds of encoders, as they are reckoned, for which the runs of a plan are really encoded; the others stay estimates."""


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
        """What it lacks, as far as what it holds tells: chunks of packages that were not asked for may be there too."""
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
    """Make the relay keep what is built on for as long as `lease` lives; what is left of `held` (`base`, with which
    the offer was made, it keeps anyway).
    """
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


# --- a plan, in the open


@dataclass(frozen=True, slots=True)
class Explained:
    """Why a package is sent as it is. Bytes and seconds."""

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
    runs: tuple[PlannedRun, ...] = ()
    """What is sent, in this order. Where a payload was made, its bytes are exact; else they are an estimate."""
    prefer: Prefer | None = None
    """What was wanted of codings that are about as fast."""
    rows: tuple[Row, ...] = ()
    """What each coding would take for all runs."""

    @property
    def encoding(self) -> str:
        """The codings that are planned; empty where nothing is missing."""
        return ", ".join(dict.fromkeys(str(run.coding) for run in self.runs))


def line_of(remembered: Remembered | None, limit: float | None = None, prefer: Prefer | None = None) -> Line:
    if remembered is None:
        return Line(limit=limit, prefer=prefer)
    return Line(remembered.goodput, remembered.round_trip, limit, prefer)


async def explain(
    manifest: Manifest,
    missing: Ranges,
    held: Sequence[Held],
    line: Line,
    payloads: Payloads,
    *,
    remembered: Remembered | None = None,
    force: Coding | None = None,
) -> Explained:
    """What a sender would do now: its own queue says it. The first runs are really encoded.

    Args:
        manifest: of the package.
        missing: what is to be sent.
        held: what the relay holds, and what can be built on.
        line: to the relay.
        payloads: encoders.
        remembered: where the line's goodput comes from.
        force: the coding that was asked for, whatever the plan.
    """
    queue = RunQueue(manifest, payloads, Meter(line), Connections(line), force=force, explains=True)
    queue.begin(missing, held)
    planned = []
    while (run := await queue.plan()) is not None:
        planned.append(run)
    made = await _encode(planned, payloads)
    return explained(manifest, missing, held, line, list(zip(planned, made, strict=True)), remembered, force)


async def _encode(planned: Sequence[PlannedRun], payloads: Payloads) -> list[int | None]:
    """Bytes of the payloads, as many as are made in the time that is given to it."""
    spent = accumulate(run.choice.chosen.encode_seconds / CORES for run in planned)
    first = [run for run, seconds in zip(planned, spent, strict=True) if seconds <= ENCODED_SECONDS]
    made = await together(payloads.make(run.spec) for run in first)
    return [one.payload_bytes for one in made] + [None] * (len(planned) - len(made))


def explained(
    manifest: Manifest,
    missing: Ranges,
    held: Sequence[Held],
    line: Line,
    runs: Sequence[tuple[PlannedRun, int | None]],
    remembered: Remembered | None,
    force: Coding | None,
) -> Explained:
    """The arithmetic of these runs, each with the bytes of its payload where it was made."""
    size = manifest.size_of(indexes(missing))
    known = (line.rate, _told_of(line, remembered), line.round_trip)
    if not runs:
        return Explained("", "", count(missing), size, *known, "nothing is missing", prefer=line.prefer)
    planned = tuple(_with_payload(run, payload) for run, payload in runs)
    has_bases = any(run.run.bases for run in planned)
    versions = [str(one.manifest.package.version) for one in held if one.manifest.package.id == manifest.package.id]
    version, more = "".join(versions[:1]), len(held) - len(versions)
    base = " and ".join(part for part in (version, f"{more} other packages" if more else "") if part)
    note = forced(force, has_bases=has_bases)[1]
    rows = planner.add_up([run.choice for run in planned], line, CORES)
    return Explained(base if has_bases else "", version, count(missing), size, *known, note, planned, line.prefer, rows)


def _with_payload(run: PlannedRun, payload: int | None) -> PlannedRun:
    if payload is None:
        return run
    row, *others = run.choice.rows
    exact = replace(row, candidate=replace(row.candidate, payload_bytes=payload, exact=True))
    return replace(run, choice=Choice((exact, *others)))


def _told_of(line: Line, remembered: Remembered | None) -> str:
    """In words, where a line's goodput comes from."""
    if remembered is None or line.goodput is None:
        text = "assumed: this line was never measured"
    else:
        text = f"measured by {remembered.samples} bundle{'s' if remembered.samples != 1 else ''} sent before"
    return f"{text}; limited" if line.limit is not None and line.limit <= (line.goodput or planner.UNKNOWN) else text
