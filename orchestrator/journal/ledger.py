"""Every byte of an acquisition: by line, by encoding, and what sending in other ways would have taken. Pure.

One pass over a journal's entries. What a replication or a pull that failed had moved is in no entry; what came of it
counts as there before (`resumed_bytes` on machines). Sizes are bytes; a field is added, never renamed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal

import msgspec

from orchestrator.journal import events as ev
from orchestrator.journal.events import JournalEntry
from orchestrator.plan.plan import Plan
from orchestrator.plan.routes import ORIGIN, line_name
from relay.protocol.messages import EncodedBytes, summed

ARROW: Final = line_name(ORIGIN, "").removeprefix("origin")
"""Between the two ends in the name of a line."""


class ReplicatedView(msgspec.Struct, frozen=True):
    """A package at a relay. `wire_bytes` is what that took, over all tries; 0 where no chunk was sent."""

    relay: str
    package: str
    version: str
    package_bytes: int
    wire_bytes: int


class LineView(msgspec.Struct, frozen=True):
    """What crossed one line, such as `origin → fra` or `fra → web1`, questions and answers included.

    `overhead_bytes` is what is not payload, 0 where an old entry does not tell; `encodings`: the payload, by encoding.
    """

    line: str
    to: Literal["relay", "machine"]
    wire_bytes: int
    payload_bytes: int
    overhead_bytes: int
    encodings: tuple[EncodedBytes, ...]


class CrossedView(msgspec.Struct, frozen=True):
    """Many lines together. `fallbacks`: runs that were refused as differences and went plainly."""

    wire_bytes: int
    payload_bytes: int
    overhead_bytes: int
    encodings: tuple[EncodedBytes, ...]
    fallbacks: int


class AlternativesView(msgspec.Struct, frozen=True):
    """What other ways of sending what was not there yet would have taken.

    Attributes:
        whole_file: the nupkg once for each relay.
        per_machine: the nupkg once for each machine.
        machines: how many machines that would have been.
    """

    whole_file: int
    per_machine: int
    machines: int


class SavedView(msgspec.Struct, frozen=True):
    """The alternatives, less what crossed all lines to relays. Below 0 where they would have been cheaper."""

    whole_file: int
    per_machine: int


class LedgerView(msgspec.Struct, frozen=True):
    """Which bytes came from where, over all machines and tries.

    Attributes:
        replicated: each package at each relay.
        to_relays: wire bytes to each relay.
        from_relays: payload bytes that machines took from each relay.
        from_disk_bytes: what machines took from trees that they had.
        resumed_bytes: what they had from a pull that was interrupted.
        wire_bytes: what crossed the machines' lines.
        tree_bytes: of the trees that are now on their disks.
        machines: how many hold everything.
        already: trees that were there before.
        lines: each line that something crossed, those to relays first.
        sent: all lines to relays.
        pulled: all lines to machines.
        from_origin_bytes: wire bytes of the lines that begin at the origin.
    """

    replicated: tuple[ReplicatedView, ...]
    to_relays: dict[str, int]
    from_relays: dict[str, int]
    from_disk_bytes: int
    resumed_bytes: int
    wire_bytes: int
    tree_bytes: int
    machines: int
    already: int
    lines: tuple[LineView, ...]
    sent: CrossedView
    pulled: CrossedView
    from_origin_bytes: int
    alternatives: AlternativesView
    saved: SavedView


def ledger(entries: Iterable[JournalEntry], plan: Plan | None = None) -> LedgerView:
    """What the acquisition of a deployment moved. `plan` knows the names of relays, and sizes of packages."""
    events = [entry.event for entry in entries]
    replicated = [event for event in events if isinstance(event, ev.Replicated)]
    acquired = [event for event in events if isinstance(event, ev.Acquired)]
    sent = _by_name(line for event in replicated for line in _lines_to_relay(event))
    pulled = _by_name(line for event in acquired for line in _lines_to_machine(event, plan))
    packages = _packages(replicated)
    trees = [tree for event in acquired for tree in event.facts.trees]
    # A try after the first finds trees there because we brought them.
    first = {event.machine: event for event in reversed(acquired)}.values()
    last = {event.machine: {tree.path: tree.tree_bytes for tree in event.facts.trees} for event in acquired}
    others = _alternatives(replicated, acquired, plan)
    crossed = _crossed(sent, sum(event.fallbacks for event in replicated))
    return LedgerView(
        replicated=packages,
        to_relays=_total((one.relay, one.wire_bytes) for one in packages),
        from_relays=_total(item for tree in trees for item in tree.from_relays.items()),
        from_disk_bytes=sum(tree.from_disk_bytes for tree in trees),
        resumed_bytes=sum(tree.resumed_bytes for tree in trees),
        wire_bytes=sum(tree.wire_bytes for tree in trees),
        tree_bytes=sum(sum(sizes.values()) for sizes in last.values()),
        machines=len(last),
        already=sum(tree.already for event in first for tree in event.facts.trees),
        lines=(*sent, *pulled),
        sent=crossed,
        pulled=_crossed(pulled, sum(tree.fallbacks for tree in trees)),
        from_origin_bytes=sum(line.wire_bytes for line in sent if line.line.startswith(line_name(ORIGIN, ""))),
        alternatives=others,
        saved=SavedView(others.whole_file - crossed.wire_bytes, others.per_machine - crossed.wire_bytes),
    )


def together(name: str, lines: Sequence[LineView]) -> LineView:
    """Several lines of one kind as one of this name."""
    return LineView(
        name,
        lines[0].to,
        sum(line.wire_bytes for line in lines),
        sum(line.payload_bytes for line in lines),
        sum(line.overhead_bytes for line in lines),
        summed(encoded for line in lines for encoded in line.encodings),
    )


def _lines_to_relay(sent: ev.Replicated) -> Iterator[LineView]:
    for line in sent.lines:
        payload = sum(encoded.payload_bytes for encoded in line.encodings)
        around = max(0, line.wire_bytes - payload)
        yield LineView(line.line, "relay", line.wire_bytes, payload, around, line.encodings)
    if not sent.lines:
        # An entry from before lines were told: all was sent from the origin, in whichever encoding.
        yield LineView(line_name(ORIGIN, sent.relay), "relay", sent.wire_bytes, 0, 0, ())


def _lines_to_machine(acquired: ev.Acquired, plan: Plan | None) -> Iterator[LineView]:
    names = {relay.url.rstrip("/"): relay.name for relay in plan.relays} if plan else {}
    closest = {one.name: one.relays[0] for one in plan.machines if one.relays} if plan else {}
    for tree in acquired.facts.trees:
        sources = ", ".join(names.get(url.rstrip("/"), url) for url in tree.from_relays)
        name = line_name(sources or closest.get(acquired.machine, "relays"), acquired.machine)
        payload = sum(tree.from_relays.values())
        around = max(0, tree.wire_bytes - payload)
        yield LineView(name, "machine", tree.wire_bytes, payload, around, tree.encodings)


def _by_name(lines: Iterable[LineView]) -> tuple[LineView, ...]:
    """Each line that something crossed, once."""
    found: dict[str, list[LineView]] = {}
    for line in lines:
        if line.wire_bytes or line.payload_bytes or line.encodings:
            found.setdefault(line.line, []).append(line)
    return tuple(together(name, same) for name, same in found.items())


def _crossed(lines: Sequence[LineView], fallbacks: int) -> CrossedView:
    if not lines:
        return CrossedView(0, 0, 0, (), fallbacks)
    whole = together("", lines)
    return CrossedView(whole.wire_bytes, whole.payload_bytes, whole.overhead_bytes, whole.encodings, fallbacks)


def _packages(replicated: Iterable[ev.Replicated]) -> tuple[ReplicatedView, ...]:
    """Each package at each relay, with what all tries took."""
    found: dict[tuple[str, str, str], ReplicatedView] = {}
    for sent in replicated:
        key = (sent.relay, sent.package, sent.version)
        before = found[key].wire_bytes if key in found else 0
        found[key] = ReplicatedView(*key, sent.package_bytes, before + sent.wire_bytes)
    return tuple(found.values())


def _alternatives(
    replicated: Sequence[ev.Replicated], acquired: Iterable[ev.Acquired], plan: Plan | None
) -> AlternativesView:
    planned = plan.every_package() if plan else []
    nupkgs = {(one.id.lower(), one.version.lower()): one.nupkg_bytes for one in planned}
    nupkgs |= {(sent.package.lower(), sent.version.lower()): sent.package_bytes for sent in replicated}
    brought = {(sent.relay, sent.package, sent.version): sent.package_bytes for sent in replicated if sent.wire_bytes}
    pulled = {
        (event.machine, tree.path): (tree.package.lower(), tree.version.lower())
        for event in acquired
        for tree in event.facts.trees
        if not tree.already
    }
    return AlternativesView(
        whole_file=sum(brought.values()),
        per_machine=sum(nupkgs.get(package, 0) for package in pulled.values()),
        machines=len({machine for machine, _ in pulled}),
    )


def _total(counts: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The sum of each name's counts."""
    found: Counter[str] = Counter()
    for name, count in counts:
        found[name] += count
    return dict(found)
