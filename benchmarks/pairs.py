"""What one site is sent for each new version, and for each first one: counted on the line, beside every peer and the bound.

Run: python -m benchmarks.pairs [--packages DIR] [--only PEER]… [--really] [--unknown] [--json]

All nupkgs of the folder are in one depot. Pairs are the versions of one id that follow each other there; for each a relay
of its own, a process, holds the predecessor and nothing else, and what it is sent goes through a proxy that counts both
directions. First sends are those of the newest version of each id. Then the peers do the same in the same run.

A thin line is planned for, but not awaited: the sender remembers 1 Mbit/s and is told that limit, and is not held to it,
unless `--really` makes the proxy carry no more. At 100 Mbit/s the proxy has that rate and 50 ms, and the sender remembers
it so. With `--unknown` it remembers neither: the first time that it sends anything there.

The exit status is 1 where a promise did not hold, or a peer that it is judged by is not here.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import groupby, pairwise

import msgspec

from benchmarks.lines import network
from benchmarks.peers import BOUND, PEERS, Comparison, compare, text_of
from benchmarks.support.programs import relay, waystation
from benchmarks.support.workload import SHARED
from orchestrator.depot.depot import Depot, open_depot
from orchestrator.replication.send import package_to_send, send_to, shipping_from
from relay.encoding.codecs import Coding
from relay.encoding.planner import Line
from relay.package.identity import PackageRef
from relay.package.manifest import Manifest
from relay.package.zip_reader import read_nuspec, walk
from relay.protocol.client import RelayClient
from relay.protocol.messages import EncodedBytes
from relay.support.console import print_json, run, table
from relay.support.rate_limit import Pacer
from relay.transfer.link_history import Lines, Meter
from relay.transfer.replicate import ReplicationResult

THIN = 125_000.0
"""Bytes per second: 1 Mbit/s."""
FAST = 12_500_000.0
"""Bytes per second: 100 Mbit/s."""
LATENCY = 0.025
"""Seconds, one way."""
CONTENT_SHARE, CONTENT_MORE = 1.15, 1 << 10
"""Content of a new version may take so much of the bound, and so many bytes more."""
ENTRY_BYTES, OVERHEAD_MORE = 48, 2 << 10
"""All else may take so much for each changed chunk or part, and so many bytes more."""
FIRST_SHARE = 1.05
"""A first send may take so much of zstd -19 --long over the sorted tree."""
FAST_SHARE = 0.92
"""A first send at 100 Mbit/s stays below so much of the nupkg."""


class Packed(msgspec.Struct, frozen=True):
    """One nupkg of the folder."""

    ref: PackageRef
    path: str

    def __str__(self) -> str:
        return str(self.ref)


class Ours(msgspec.Struct, frozen=True):
    """What crossed the line to one relay. Bytes.

    Attributes:
        content: payloads of frames.
        overhead: all else that the proxy counted: manifest, signature, headers of frames and of HTTP, both directions.
        told: what the sender says that it moved in all.
        chunks: of the new version, that its predecessor has not (at a first send: all).
        parts: likewise.
        encodings: content by encoding.
        fallbacks: deltas that were refused.
    """

    content: int
    overhead: int
    told: int
    chunks: int
    parts: int
    encodings: tuple[EncodedBytes, ...]
    fallbacks: int = 0

    @property
    def total(self) -> int:
        return self.content + self.overhead


class Check(msgspec.Struct, frozen=True):
    """One promise: what was seen, the most that it may be, and where that comes from; `most` None: nobody could say."""

    promise: str
    seen: int
    most: int | None
    why: str

    @property
    def held(self) -> bool:
        return self.most is not None and self.seen <= self.most


class Report(msgspec.Struct, frozen=True):
    """One pair, or one first send (`old` of the comparison is empty)."""

    comparison: Comparison
    ours: Ours
    checks: tuple[Check, ...]
    fast: Ours | None = None
    """Of a first send: what it took at 100 Mbit/s."""

    @property
    def held(self) -> bool:
        return all(check.held for check in self.checks)


# --- what is promised; pure


def judge_next(ours: Ours, peers: Comparison) -> tuple[Check, ...]:
    """A new version on a thin line."""
    bound = _bytes(peers, BOUND.name)
    best = peers.best
    changed = ours.chunks + ours.parts
    return (
        Check(
            "content",
            ours.content,
            None if bound is None else int(CONTENT_SHARE * bound) + CONTENT_MORE,
            f"{CONTENT_SHARE} x bound + {CONTENT_MORE}",
        ),
        Check(
            "manifest and headers",
            ours.overhead,
            ENTRY_BYTES * changed + OVERHEAD_MORE,
            f"{ENTRY_BYTES} x ({ours.chunks} chunks + {ours.parts} parts) + {OVERHEAD_MORE}",
        ),
        Check("in all", ours.total, best.bytes, f"the best peer, {best.peer}"),
    )


def judge_first(thin: Ours, fast: Ours, peers: Comparison) -> tuple[Check, ...]:
    """A first send, on a thin line and at 100 Mbit/s."""
    bound = _bytes(peers, BOUND.name)
    return (
        Check(
            "in all, thin line",
            thin.total,
            None if bound is None else int(FIRST_SHARE * bound),
            f"{FIRST_SHARE} x zstd -19 --long of the tree",
        ),
        # Below, not at.
        Check("in all, 100 Mbit/s", fast.total, int(FAST_SHARE * peers.nupkg) - 1, f"{FAST_SHARE} x nupkg"),
    )


def _bytes(peers: Comparison, name: str) -> int | None:
    return next((row.bytes for row in peers.rows if row.peer == name), None)


def changed(manifest: Manifest, old: Manifest | None) -> tuple[int, int]:
    """How many chunks and how many parts of `manifest` are not in `old` under the same name."""
    chunks = set(manifest.chunk_ids()) - set(old.chunk_ids() if old else ())
    return len(chunks), len(_named(manifest) - (_named(old) if old else set()))


def _named(manifest: Manifest) -> set[tuple[str, str]]:
    empty = ""
    return {
        (part.path, manifest.part_sha256(index) if part.size else empty) for index, part in enumerate(manifest.parts)
    }


# --- what is there


def find(folder: str) -> list[list[Packed]]:
    """All nupkgs in `folder`, by id; the versions of each in order."""
    found = [Packed(_ref(path), path) for path in glob.glob(os.path.join(glob.escape(folder), "*.nupkg"))]
    found.sort(key=lambda one: (one.ref.id.key, one.ref.version))
    return [list(versions) for _, versions in groupby(found, key=lambda one: one.ref.id)]


def _ref(path: str) -> PackageRef:
    with open(path, "rb") as file:
        nuspec = read_nuspec(file, walk(file))
    return PackageRef(nuspec.id, nuspec.version)


# --- sending, counted


class Way(msgspec.Struct, frozen=True):
    """A line to a relay.

    Attributes:
        rate: bytes per second.
        is_shaped: it really carries no more; else this is only planned with.
        is_known: the sender remembers it.
    """

    rate: float
    is_shaped: bool = False
    is_known: bool = True


class Planned(Pacer):
    """A limit that is planned with, and that nobody waits for."""

    def take(self, size: int) -> float:
        """Nothing to wait."""
        del size
        return 0.0


async def send_counted(
    home: str,
    package: PackageRef,
    url: str,
    *,
    way: Way,
    base: PackageRef | None = None,
) -> Ours:
    """Replicate a package of the depot in `home` to the relay at `url`, through a proxy. `base` is what it holds."""
    shape = network.Line(way.rate, LATENCY) if way.is_shaped else None
    port = int(url.rpartition(":")[2])
    async with AsyncExitStack() as stack:
        depot = await stack.enter_async_context(open_depot(_depot(home)))
        proxy = await stack.enter_async_context(network.CountingProxy("127.0.0.1", port, up=shape, down=shape))
        through = f"http://127.0.0.1:{proxy.port}"
        if way.is_known:
            await _remember(depot, through, Line(way.rate, 2 * LATENCY))
        pacer = None if way.is_shaped else Planned(way.rate)
        what = await package_to_send(depot, package)
        shipping = await stack.enter_async_context(shipping_from(depot))
        client = await stack.enter_async_context(RelayClient(through))
        done = await send_to(depot, what, client, lambda _done, _whole: None, shipping=shipping, pacer=pacer)
        old = None if base is None else await depot.manifest(depot.catalog.get(base))
        return _ours(done, proxy.counts.total, changed(what.manifest, old))


def _ours(done: ReplicationResult, crossed: int, changes: tuple[int, int]) -> Ours:
    return Ours(
        content=done.payload_bytes,
        overhead=crossed - done.payload_bytes,
        told=done.wire_bytes,
        chunks=changes[0],
        parts=changes[1],
        encodings=done.encodings,
        fallbacks=done.fallbacks,
    )


async def _remember(depot: Depot, url: str, line: Line) -> None:
    """As if this line had carried bundles before."""
    meter = Meter(line)
    meter.samples = 1
    await Lines(depot.store.documents).remember(url, meter)


async def hold(home: str, packages: Iterable[PackageRef], url: str) -> None:
    """Bring packages of the depot to a relay, uncounted, fast."""
    async with open_depot(_depot(home)) as depot, RelayClient(url) as client, shipping_from(depot) as own:
        shipping = replace(own, force=Coding("zstd", 1))
        for package in packages:
            what = await package_to_send(depot, package)
            await send_to(depot, what, client, lambda _done, _whole: None, shipping=shipping)


def _depot(home: str) -> str:
    return f"disk:{os.path.join(home, 'depot')}"


def origin(home: str, files: Sequence[str]) -> None:
    """Keys, and a depot with these nupkgs, by our own commands."""
    waystation("trust", "init", home=home)
    if files:
        waystation("package", "add", *files, home=home)


def next_version(home: str, old: Packed, new: Packed, way: Way) -> Ours:
    """One site that holds `old` is sent `new`."""
    with tempfile.TemporaryDirectory(prefix="relay-", dir=home) as store, relay(store) as served:
        run(hold(home, [old.ref], served.url))
        return run(send_counted(home, new.ref, served.url, way=way, base=old.ref))


def first_send(home: str, new: Packed, way: Way) -> Ours:
    """A site that holds nothing is sent `new`."""
    with tempfile.TemporaryDirectory(prefix="relay-", dir=home) as store, relay(store) as served:
        return run(send_counted(home, new.ref, served.url, way=way))


# --- the whole


def measure(folder: str, only: Sequence[str] = (), *, really: bool = False, is_known: bool = True) -> Iterator[Report]:
    """Every pair in `folder`, then every first send, one by one. `only`: peers to run, all where it is empty."""
    thin, fast = Way(THIN, really, is_known), Way(FAST, is_shaped=True, is_known=is_known)
    by_id = find(folder)
    with tempfile.TemporaryDirectory(prefix="waystation-pairs-") as home:
        origin(home, [one.path for versions in by_id for one in versions])
        for old, new in (pair for versions in by_id for pair in pairwise(versions)):
            ours = next_version(home, old, new, thin)
            peers = compare(old.path, new.path, only)
            yield Report(peers, ours, judge_next(ours, peers))
        for versions in by_id:
            new = versions[-1]
            ours, faster = first_send(home, new, thin), first_send(home, new, fast)
            peers = compare(None, new.path, only)
            yield Report(peers, ours, judge_first(ours, faster, peers), faster)


def told(report: Report) -> str:
    """One report for people: the peers' table, what we sent, and each promise."""
    ours = report.ours
    lines = [text_of(report.comparison), ""]
    for name, sent in (("", ours), ("at 100 Mbit/s", report.fast)):
        if sent is not None:
            lines.append(_told_ours(name, sent, report.comparison.nupkg))
    lines += [
        f"  {'held  ' if check.held else 'BROKEN'}  {check.promise}: {check.seen:,} of "
        f"{'-' if check.most is None else f'{check.most:,}'} ({check.why})"
        for check in report.checks
    ]
    return "\n".join(lines)


def _told_ours(name: str, sent: Ours, nupkg: int) -> str:
    by = ", ".join(f"{one.encoding} {one.payload_bytes:,}" for one in sent.encodings)
    text = (
        f"waystation{f' {name}' if name else ''}: {sent.total:,} bytes, {100 * sent.total / nupkg:.3f} % of the nupkg: "
        f"content {sent.content:,} ({by}), manifest and headers {sent.overhead:,}"
    )
    return f"{text}; {sent.fallbacks} runs again" if sent.fallbacks else text


def summary(reports: Sequence[Report]) -> str:
    """The tables of results: new versions beside every peer and as promised, and first sends."""
    parts = []
    pairs = [one for one in reports if one.comparison.old]
    firsts = [one for one in reports if not one.comparison.old]
    if pairs:
        headers = ["% of the nupkg", *(row.peer for row in pairs[0].comparison.rows), "waystation"]
        parts.append(table(headers, [_share_row(one) for one in pairs], right=frozenset(range(1, len(headers)))))
        headers = ["new version, thin line", "nupkg", "best peer", "bound", "content", "most", "rest", "most", "in all"]
        parts.append(_columns(headers, [_pair_row(one) for one in pairs]))
    if firsts:
        headers = ["first send", "nupkg", "bound", "thin line", "most", "100 Mbit/s", "most"]
        parts.append(_columns(headers, [_first_row(one) for one in firsts]))
    return "\n\n".join(parts)


def _share_row(report: Report) -> list[str]:
    peers = report.comparison
    sent = [*(row.bytes for row in peers.rows), report.ours.total]
    return [_name(report), *("-" if count is None else f"{100 * count / peers.nupkg:.3f}" for count in sent)]


def _pair_row(report: Report) -> list[str]:
    peers, ours = report.comparison, report.ours
    content, rest, _ = report.checks
    bound = _bytes(peers, BOUND.name)
    best = f"{peers.best.peer} {_number(peers.best.bytes)}"
    figures = [bound, ours.content, content.most, ours.overhead, rest.most, ours.total]
    return [_name(report), _number(peers.nupkg), best, *map(_number, figures), _verdict(report)]


def _first_row(report: Report) -> list[str]:
    peers = report.comparison
    thin, fast = report.checks
    figures = [peers.nupkg, _bytes(peers, BOUND.name), thin.seen, thin.most, fast.seen, fast.most]
    return [_name(report), *map(_number, figures), _verdict(report)]


def _columns(headers: list[str], rows: list[list[str]]) -> str:
    headers = [*headers, ""]
    return table(headers, rows, right=frozenset(range(1, len(headers) - 1)))


def _name(report: Report) -> str:
    name = report.comparison.new.removesuffix(".nupkg")
    return name if len(name) <= 34 else f"…{name[-33:]}"


def _number(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def _verdict(report: Report) -> str:
    broken = [check.promise for check in report.checks if not check.held]
    return f"BROKEN: {', '.join(broken)}" if broken else "held"


def document(reports: Sequence[Report]) -> dict[str, object]:
    """All of it for programs."""
    return {
        "format": 1,
        "held": all(one.held for one in reports),
        "reports": [
            msgspec.to_builtins(one)
            | {"held": one.held, "checks": [msgspec.to_builtins(c) | {"held": c.held} for c in one.checks]}
            for one in reports
        ],
    }


def main() -> int:
    """Measure, print, and judge: the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pairs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", default=os.path.join(SHARED, "packages"), metavar="DIR", help="where nupkgs lie")
    parser.add_argument("--only", action="append", default=[], choices=[peer.name for peer in PEERS], metavar="PEER")
    parser.add_argument("--really", action="store_true", help="let the thin line carry no more than 1 Mbit/s")
    parser.add_argument("--unknown", action="store_true", help="the lines were never measured before")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    reports: list[Report] = []
    for report in measure(options.packages, options.only, really=options.really, is_known=not options.unknown):
        reports.append(report)
        print(f"{told(report)}\n", file=sys.stderr if options.as_json else sys.stdout, flush=True)
    if not reports:
        parser.error(f"no nupkg lies in {options.packages}")
    if options.as_json:
        print_json(document(reports))
    else:
        print(summary(reports))
    return 0 if all(one.held for one in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
