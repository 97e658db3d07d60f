"""Every byte of an acquisition: by line, by encoding, and what sending in other ways would have taken. Pure.

One pass over a journal's entries. What a replication or a pull that failed had moved is in no entry; what came of it
counts as there before (`resumed_bytes` on machines). Sizes are bytes; a field is added, never renamed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from orchestrator.journal import events as ev
from orchestrator.journal.events import JournalEntry
from orchestrator.plan.plan import Plan
from orchestrator.plan.routes import ORIGIN, line_name
from relay.protocol.messages import EncodedBytes, summed

ARROW: Final = line_name(ORIGIN, "").removeprefix("origin")
"""Between the two ends in the name of a line."""


class View(msgspec.Struct, frozen=True):
    """A part of what is printed."""


class ReplicatedView(View, frozen=True):
    """A package at a relay. `wire_bytes` is what that took, over all tries; 0 where no chunk was sent."""

    relay: str
    package: str
    version: str
    package_bytes: int
    wire_bytes: int


class LineView(View, frozen=True):
    """What crossed one line, such as `origin → fra` or `fra → web1`, questions and answers included.

    `overhead_bytes` is what is not payload, 0 where an old entry does not tell; `encodings`: the payload, by encoding.
    """

    line: str
    to: Literal["relay", "machine"]
    wire_bytes: int
    payload_bytes: int
    overhead_bytes: int
    encodings: tuple[EncodedBytes, ...]


class CrossedView(View, frozen=True):
    """Many lines together. `fallbacks`: runs that were refused as differences and went plainly."""

    wire_bytes: int
    payload_bytes: int
    overhead_bytes: int
    encodings: tuple[EncodedBytes, ...]
    fallbacks: int


class AlternativesView(View, frozen=True):
    """What other ways of sending what was not there yet would have taken.

    Attributes:
        whole_file: the nupkg once for each relay.
        per_machine: the nupkg once for each machine.
        machines: how many machines that would have been.
    """

    whole_file: int
    per_machine: int
    machines: int


class SavedView(View, frozen=True):
    """The alternatives, less what crossed all lines to relays. Below 0 where they would have been cheaper."""

    whole_file: int
    per_machine: int


class LedgerView(View, frozen=True):
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
    book = _Book(plan)
    for entry in entries:
        match entry.event:
            case ev.Replicated() as sent:
                book.replicated(sent)
            case ev.Acquired() as acquired:
                book.acquired(acquired)
            case _:
                pass
    return book.view()


@dataclass(slots=True)
class _Lines:
    """Lines of one kind, and what crossed each."""

    to: Literal["relay", "machine"]
    fallbacks: int = 0
    _found: dict[str, LineView] = field(default_factory=dict)

    def add(
        self, line: str, wire_bytes: int, payload_bytes: int, encodings: Sequence[EncodedBytes], around: int
    ) -> None:
        if not (wire_bytes or payload_bytes or encodings):
            return
        known = self._found.get(line) or LineView(line, self.to, 0, 0, 0, ())
        self._found[line] = LineView(
            line,
            self.to,
            known.wire_bytes + wire_bytes,
            known.payload_bytes + payload_bytes,
            known.overhead_bytes + max(0, around),
            summed([*known.encodings, *encodings]),
        )

    @property
    def views(self) -> tuple[LineView, ...]:
        return tuple(self._found.values())

    def together(self) -> CrossedView:
        return CrossedView(
            sum(line.wire_bytes for line in self.views),
            sum(line.payload_bytes for line in self.views),
            sum(line.overhead_bytes for line in self.views),
            summed(encoded for line in self.views for encoded in line.encodings),
            self.fallbacks,
        )


class _Book:
    def __init__(self, plan: Plan | None) -> None:
        packages = [*plan.packages.values(), *([plan.scripts] if plan.scripts else [])] if plan else []
        self._nupkgs = {(one.id.lower(), one.version.lower()): one.nupkg_bytes for one in packages}
        self._names = {relay.url.rstrip("/"): relay.name for relay in plan.relays} if plan else {}
        self._closest = {one.name: one.relays[0] for one in plan.machines if one.relays} if plan else {}
        self._replicated: dict[tuple[str, str, str], ReplicatedView] = {}
        self._brought: dict[tuple[str, str, str], int] = {}
        """Sizes of nupkgs that the relay did not hold before."""
        self._trees: dict[str, dict[str, int]] = {}
        self._pulled: dict[tuple[str, str], tuple[str, str]] = {}
        """Package and version of each (machine, tree) that was not there before."""
        self._from_relays: dict[str, int] = {}
        self._disk = self._resumed = self._wire = self._already = 0
        self._to_relays, self._to_machines = _Lines("relay"), _Lines("machine")

    def replicated(self, sent: ev.Replicated) -> None:
        key = (sent.relay, sent.package, sent.version)
        before = self._replicated[key].wire_bytes if key in self._replicated else 0
        self._replicated[key] = ReplicatedView(*key, sent.package_bytes, before + sent.wire_bytes)
        self._nupkgs[sent.package.lower(), sent.version.lower()] = sent.package_bytes
        if sent.wire_bytes:
            self._brought[key] = sent.package_bytes
        self._to_relays.fallbacks += sent.fallbacks
        for line in sent.lines:
            payload = sum(encoded.payload_bytes for encoded in line.encodings)
            self._to_relays.add(line.line, line.wire_bytes, payload, line.encodings, line.wire_bytes - payload)
        if not sent.lines:
            # An entry from before lines were told: all was sent from the origin, in whichever encoding.
            self._to_relays.add(line_name(ORIGIN, sent.relay), sent.wire_bytes, 0, (), 0)

    def acquired(self, acquired: ev.Acquired) -> None:
        machine = acquired.machine
        first = machine not in self._trees
        self._trees[machine] = {tree.path: tree.tree_bytes for tree in acquired.facts.trees}
        for tree in acquired.facts.trees:
            self._disk += tree.from_disk_bytes
            self._resumed += tree.resumed_bytes
            self._wire += tree.wire_bytes
            self._already += tree.already and first  # later it is there because we brought it
            if not tree.already:
                self._pulled[machine, tree.path] = (tree.package.lower(), tree.version.lower())
            for relay, count in tree.from_relays.items():
                self._from_relays[relay] = self._from_relays.get(relay, 0) + count
            payload = sum(tree.from_relays.values())
            sources = [self._names.get(url.rstrip("/"), url) for url in tree.from_relays]
            upstream = ", ".join(sources) or self._closest.get(machine, "relays")
            around = tree.wire_bytes - payload
            self._to_machines.add(line_name(upstream, machine), tree.wire_bytes, payload, tree.encodings, around)
            self._to_machines.fallbacks += tree.fallbacks

    def view(self) -> LedgerView:
        to_relays: dict[str, int] = {}
        for one in self._replicated.values():
            to_relays[one.relay] = to_relays.get(one.relay, 0) + one.wire_bytes
        sent, lines = self._to_relays.together(), self._to_relays.views
        alternatives = AlternativesView(
            whole_file=sum(self._brought.values()),
            per_machine=sum(self._nupkgs.get(package, 0) for package in self._pulled.values()),
            machines=len({machine for machine, _ in self._pulled}),
        )
        return LedgerView(
            replicated=tuple(self._replicated.values()),
            to_relays=to_relays,
            from_relays=self._from_relays,
            from_disk_bytes=self._disk,
            resumed_bytes=self._resumed,
            wire_bytes=self._wire,
            tree_bytes=sum(sum(sizes.values()) for sizes in self._trees.values()),
            machines=len(self._trees),
            already=self._already,
            lines=lines + self._to_machines.views,
            sent=sent,
            pulled=self._to_machines.together(),
            from_origin_bytes=sum(line.wire_bytes for line in lines if line.line.startswith(line_name(ORIGIN, ""))),
            alternatives=alternatives,
            saved=SavedView(
                alternatives.whole_file - sent.wire_bytes,
                alternatives.per_machine - sent.wire_bytes,
            ),
        )
