"""Where every byte came from, what crossed the WAN, what was promised and whether it held. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from relay.support.console import size, table

MIB = 1 << 20
LITTLE = 0.12
"""Share of a package that one changed file may move: three chunks of the largest kind, of the packages here."""
_HURRY = 0.1
"""What a lower level than 3 may cost, where this machine is too busy for its line: a sender chooses by time."""
_ROUND = 16 << 10
"""Bytes that questions and answers of one transfer may take beside its content."""


@dataclass(frozen=True, slots=True)
class Added:
    """A version as the depot took it in.

    Attributes:
        package: id and version, a long id without its beginning.
        nupkg_bytes: of the file, which is what would be sent to each machine otherwise.
        new_chunks: chunks that the depot did not hold before.
        new_bytes: what the depot keeps of them, each on its own at zstd level 3.
        manifest_bytes: of its manifest, not compressed.
    """

    package: str
    nupkg_bytes: int
    new_chunks: int
    new_bytes: int
    manifest_bytes: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """What crossed lines in one encoding: chunks, their bytes in the tree, and the payload that carried them."""

    encoding: str
    chunks: int
    tree_bytes: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Sent:
    """From the origin to one relay: bytes in both directions, as counted on the line and as told by the command."""

    relay: str
    chunks: int
    counted: int
    told: int
    encodings: tuple[Encoded, ...] = ()


@dataclass(frozen=True, slots=True)
class Taken:
    """What one machine took from one relay: of the tree, and as it came over the line."""

    chunks: int
    tree_bytes: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class Pull:
    """One package onto one machine."""

    machine: str
    site: str
    tree_bytes: int
    disk_bytes: int
    relays: Mapping[str, Taken]
    encodings: tuple[Encoded, ...] = ()

    def from_relay(self, relay: str) -> int:
        return self.relays.get(relay, Taken(0, 0, 0)).tree_bytes

    @property
    def from_elsewhere(self) -> int:
        """Payload bytes that came from relays of other sites, over the WAN."""
        return sum(taken.payload_bytes for relay, taken in self.relays.items() if relay != self.site)


@dataclass(frozen=True, slots=True)
class Kill:
    """A relay's end in the middle of its work.

    Attributes:
        share: what its machines had received from it when it was killed, of what they wanted.
        twice_bytes: on the lines to its machines in all, beyond what the undisturbed ones needed.
    """

    relay: str
    share: float
    twice_bytes: int


@dataclass(frozen=True, slots=True)
class Delivery:
    """One version from the origin to every machine.

    Attributes:
        local: bytes counted from each relay to the machines of its own site.
        across: bytes counted from each relay to the machines of the other site, over the WAN.
        one_file_changed: against the version before it.
        returned: a relay that was away before, to which its machines had to come back.
    """

    added: Added
    sent: tuple[Sent, ...]
    pulls: tuple[Pull, ...]
    local: Mapping[str, int]
    across: Mapping[str, int]
    one_file_changed: bool = False
    kill: Kill | None = None
    returned: str | None = None

    @property
    def wan_bytes(self) -> int:
        return sum(sent.counted for sent in self.sent) + sum(self.across.values())

    @property
    def each_bytes(self) -> int:
        """What sending the nupkg to each machine would have put on the WAN."""
        return len(self.pulls) * self.added.nupkg_bytes


@dataclass(frozen=True, slots=True)
class Way:
    """Another way to bring a new version to a site that has the one before: what it sent; None where it is not here."""

    name: str
    bytes: int | None


@dataclass(frozen=True, slots=True)
class Beside:
    """What one site was sent for a new version, beside what others send.

    Attributes:
        package: id and version.
        nupkg_bytes: of the file.
        sent_bytes: both directions of the line from the origin, of the site that was sent more.
        ways: the others, each of which was really run.
    """

    package: str
    nupkg_bytes: int
    sent_bytes: int
    ways: tuple[Way, ...]


@dataclass(frozen=True, slots=True)
class Promise:
    """One thing that the product promises, what was seen, and whether it held."""

    text: str
    seen: str
    held: bool


@dataclass(slots=True)
class Ledger:
    """All deliveries, and how many trees were compared byte by byte with their nupkg."""

    deliveries: list[Delivery] = field(default_factory=list)
    trees_checked: int = 0
    trees_wrong: list[str] = field(default_factory=list)
    beside: list[Beside] = field(default_factory=list)

    @property
    def wan_bytes(self) -> int:
        return sum(delivery.wan_bytes for delivery in self.deliveries)

    @property
    def each_bytes(self) -> int:
        return sum(delivery.each_bytes for delivery in self.deliveries)

    @property
    def relays(self) -> list[str]:
        return list(dict.fromkeys(sent.relay for delivery in self.deliveries for sent in delivery.sent))

    @property
    def machines(self) -> list[str]:
        return list(dict.fromkeys(pull.machine for delivery in self.deliveries for pull in delivery.pulls))


# --- promises


def promises(ledger: Ledger) -> list[Promise]:
    """Everything that the demo is there to show, judged."""
    judged = [_every_tree_is_whole(ledger)]
    for delivery in ledger.deliveries:
        judged += _only_what_is_new(delivery)
        if delivery.kill:
            judged += _survives(delivery, delivery.kill)
        elif delivery.returned:
            judged.append(_comes_back(delivery, delivery.returned))
    judged.append(_counts_agree(ledger.deliveries))
    judged += [_sends_least(beside) for beside in ledger.beside]
    return judged


def _every_tree_is_whole(ledger: Ledger) -> Promise:
    expected = sum(len(delivery.pulls) for delivery in ledger.deliveries)
    seen = f"{ledger.trees_checked} of {expected} trees" + "".join(f"; {wrong}" for wrong in ledger.trees_wrong)
    held = ledger.trees_checked == expected > 0 and not ledger.trees_wrong
    return Promise("every tree on every machine is what was packed, byte by byte", seen, held)


def _only_what_is_new(delivery: Delivery) -> Iterator[Promise]:
    """The bound of the road: its new chunks at zstd level 3 and the manifest, once per site; and a tenth."""
    added = delivery.added
    bound = len(delivery.sent) * ((added.new_bytes + added.manifest_bytes) * (1 + _HURRY) + _ROUND)
    counted = sum(sent.counted for sent in delivery.sent)
    yield Promise(
        f"{added.package} crosses once per site, of it only what is new",
        f"{size(counted)} of at most {size(bound)}",
        counted <= bound and all(sent.chunks == added.new_chunks for sent in delivery.sent),
    )
    most = max((sum(taken.chunks for taken in pull.relays.values()) for pull in delivery.pulls), default=0)
    kept = min((pull.disk_bytes / pull.tree_bytes for pull in delivery.pulls), default=0.0)
    # A chunk that stands twice in a tree is taken once.
    fits = all(
        pull.disk_bytes + sum(t.tree_bytes for t in pull.relays.values()) <= pull.tree_bytes for pull in delivery.pulls
    )
    yield Promise(
        "  and its machines take only what they lack",
        f"chunks each: {most}; {100 * kept:.1f} % from own disk",
        0 < most <= added.new_chunks and fits,
    )
    if delivery.one_file_changed:
        share = counted / (len(delivery.sent) * added.nupkg_bytes)
        yield Promise(
            "  and one changed file moves little, to relays and to machines",
            f"{100 * share:.1f} % and {100 * (1 - kept):.1f} %",
            share <= LITTLE and 1 - kept <= LITTLE,
        )


def _survives(delivery: Delivery, kill: Kill) -> Iterator[Promise]:
    yield Promise(
        f"relay {kill.relay} dies in mid-pull, between 20 and 80 %",
        f"killed at {100 * kill.share:.0f} %",
        0.2 <= kill.share <= 0.8,
    )
    hit = [pull for pull in delivery.pulls if pull.site == kill.relay]
    went_on = [p for p in hit if p.from_relay(kill.relay) and p.from_elsewhere]
    yield Promise(
        "its machines go on at the other relay, keeping what they have",
        f"{len(went_on)} of {len(hit)} took from both",
        len(went_on) == len(hit) > 0,
    )
    allowed = len(hit) * (0.05 * delivery.added.new_bytes + 8 * MIB)
    yield Promise(
        "little crosses twice (5 % + 8 MiB a machine)",
        f"{size(max(0, kill.twice_bytes))} for {len(hit)} machines",
        kill.twice_bytes <= allowed,
    )


def _comes_back(delivery: Delivery, relay: str) -> Promise:
    own = [pull for pull in delivery.pulls if pull.site == relay]
    back = [pull for pull in own if set(pull.relays) == {relay}]
    return Promise(
        f"the next pull returns to relay {relay}", f"{len(back)} of {len(own)} machines", len(back) == len(own) > 0
    )


def _counts_agree(deliveries: Sequence[Delivery]) -> Promise:
    apart = [abs(sent.counted - sent.told) / max(sent.counted, 1) for each in deliveries for sent in each.sent]
    worst = max(apart, default=1.0)
    return Promise(
        "the product's own count is the line's, each time (within 1 %)", f"{100 * worst:.2f} % apart", worst <= 0.01
    )


def _sends_least(beside: Beside) -> Promise:
    least, name = min((way.bytes, way.name) for way in beside.ways if way.bytes is not None)
    return Promise(
        f"{beside.package}: a site is sent less than by each other way",
        f"{size(beside.sent_bytes)}, {name} {size(least)}",
        beside.sent_bytes < least,
    )


# --- tables


def by_package(ledger: Ledger) -> str:
    """What crossed the WAN for each version, and what sending it to each machine would have cost."""
    sites = [f"to {relay}" for relay in ledger.relays]
    headers = ["over the WAN", "nupkg", *sites, "site to site", "in all", "nupkgs instead"]
    rows = {
        one.added.package: [
            one.added.nupkg_bytes,
            *(sum(sent.counted for sent in one.sent if sent.relay == relay) for relay in ledger.relays),
            sum(one.across.values()),
            one.wan_bytes,
            one.each_bytes,
        ]
        for one in ledger.deliveries
    }
    return _summed(headers, rows)


def by_relay(ledger: Ledger) -> str:
    """What each relay took and gave."""
    headers = ["relay", "from the origin", "own ledger", "to its own site", "to the other site", "given per byte taken"]
    rows = {}
    for relay in ledger.relays:
        sent = [each for one in ledger.deliveries for each in one.sent if each.relay == relay]
        rows[relay] = [
            sum(each.counted for each in sent),
            sum(each.told for each in sent),
            sum(one.local.get(relay, 0) for one in ledger.deliveries),
            sum(one.across.get(relay, 0) for one in ledger.deliveries),
        ]
    return _summed(headers, rows, lambda taken, _, local, across: f"{(local + across) / max(taken, 1):.1f}")


def by_machine(ledger: Ledger) -> str:
    """Where the bytes of each machine's trees came from, and which of them had to cross the WAN."""
    headers = ["machine", "trees", "own disk", *(f"relay {relay}" for relay in ledger.relays), "of that over the WAN"]
    rows = {}
    for machine in ledger.machines:
        pulls = [pull for one in ledger.deliveries for pull in one.pulls if pull.machine == machine]
        rows[machine] = [
            sum(pull.tree_bytes for pull in pulls),
            sum(pull.disk_bytes for pull in pulls),
            *(sum(pull.from_relay(relay) for pull in pulls) for relay in ledger.relays),
            sum(pull.from_elsewhere for pull in pulls),
        ]
    return _summed(headers, rows)


def by_encoding(ledger: Ledger) -> str:
    """How content was encoded, by line: from the origin to each relay, and from relays to machines."""
    headers = ["content", "encoding", *(f"to {relay}" for relay in ledger.relays), "to the machines"]
    rows = []
    for one in ledger.deliveries:
        lines = [_payloads(sent for sent in one.sent if sent.relay == relay) for relay in ledger.relays]
        lines.append(_payloads(one.pulls))
        for number, name in enumerate(dict.fromkeys(name for line in lines for name in line)):
            label = "" if number else one.added.package
            rows.append([label, name, *(size(line[name]) if name in line else "-" for line in lines)])
    return _ruled(table(headers, rows, right=frozenset(range(2, len(headers)))))


def beside(ledger: Ledger) -> str:
    """What one site was sent for each new version, beside other ways."""
    headers = ["to a site that has the version before", "sent by", "bytes", "of the nupkg"]
    rows = []
    for each in ledger.beside:
        for number, way in enumerate([Way("waystation", each.sent_bytes), *each.ways]):
            told = ["not installed here", ""]
            if way.bytes is not None:
                told = [f"{way.bytes:,}", f"{100 * way.bytes / each.nupkg_bytes:.2f} %"]
            rows.append(["" if number else each.package, way.name, *told])
    return _ruled(table(headers, rows, right=frozenset({2, 3})))


def _payloads(several: Iterable[Sent | Pull]) -> Counter[str]:
    """Bytes of payload by encoding, summed up."""
    found: Counter[str] = Counter()
    for encoded in (encoded for one in several for encoded in one.encodings):
        found[encoded.encoding] += encoded.payload_bytes
    return found


def _summed(headers: list[str], rows: Mapping[str, Sequence[int]], ratio: Callable[..., str] | None = None) -> str:
    """Sizes with their totals, a rule under the head and above the total; `ratio` is a last column made of a row."""
    totals = [sum(column) for column in zip(*rows.values(), strict=True)]
    cells = [
        [name, *map(size, figures), *([ratio(*figures)] if ratio else [])]
        for name, figures in [*rows.items(), ("all", totals)]
    ]
    *lines, last = _ruled(table(headers, cells, right=frozenset(range(1, len(headers))))).splitlines()
    return "\n".join([*lines, lines[1], last])


def _ruled(text: str) -> str:
    """With a rule under the head."""
    head, *lines = text.splitlines()
    return "\n".join([head, "-" * max(map(len, [head, *lines])), *lines])


def report(ledger: Ledger, judged: Sequence[Promise], seconds: float) -> dict[str, object]:
    """The same as one JSON document."""
    return {
        "format": 1,
        "held": all(promise.held for promise in judged),
        "seconds": seconds,
        "wan_bytes": ledger.wan_bytes,
        "nupkg_to_each_machine_bytes": ledger.each_bytes,
        "trees_checked": ledger.trees_checked,
        "deliveries": [asdict(d) | {"wan_bytes": d.wan_bytes, "each_bytes": d.each_bytes} for d in ledger.deliveries],
        "beside": [asdict(beside) for beside in ledger.beside],
        "promises": [asdict(promise) for promise in judged],
    }
