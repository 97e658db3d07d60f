"""Which way a package takes to each relay, and which way it takes instead when one on the way fails. Pure.

Relays with `from:` fetch from another relay, all others are sent to by the origin: a forest whose roots hang on the
origin, so that each byte leaves the origin once for each root, however many relays there are.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.files.environment import Environment, EnvironmentFile, Relay, SecretFrom, Token
from orchestrator.files.values import bytes_per_second
from orchestrator.plan.plan import PlannedRelay, SecretSource
from relay.errors import UsageError
from relay.written.yaml_positions import Mistake, shown

ORIGIN = ""
"""Stands where a relay's name would: the package is sent from here."""

Upstreams = Mapping[str, str]
"""From a relay's name to the one that it fetches from; who is not named is sent to by the origin."""


@dataclass(frozen=True, slots=True)
class Replan:
    """A relay that could not go on with `left`, and got the package from `taken` instead (`ORIGIN`: from the origin)."""

    relay: str
    left: str
    taken: str
    reason: str

    def __str__(self) -> str:
        return f"{self.relay} fetched from {self.taken or 'the origin'} in place of {self.left}: {self.reason}"


def wrong_ways(file: EnvironmentFile) -> list[Mistake]:
    """Every `from:` and `limit:` of the file that cannot be, where it stands."""
    wrong = [file.at("relays", name, "from").mistake(text) for name, text in wrong_upstreams(file.value).items()]
    return wrong + [
        file.at("relays", name, "limit").mistake(f"{shown(relay.limit)}: expected a rate above 0, such as 50Mbit")
        for name, relay in file.value.relays.items()
        if relay.limit is not None and not limit_of(relay)
    ]


def planned_relay(file: EnvironmentFile, name: str, upstream: str) -> PlannedRelay:
    """A relay of the file, as a plan has it."""
    relay = file.value.relays[name]
    token = None if relay.token is None else secret_source(file, relay.token)
    ca_file = os.path.normpath(os.path.join(file.folder, relay.ca_file)) if relay.ca_file else ""
    return PlannedRelay(
        name,
        relay.url,
        relay.site or "",
        relay.generic,
        token,
        ca_file,
        upstream,
        limit_of(relay),
        relay.plain_http,
        relay.prefer,
    )


def secret_source(file: EnvironmentFile, written: Token | SecretFrom) -> SecretSource:
    """Where a token or secret of the file is read."""
    return SecretSource(
        os.path.normpath(os.path.join(file.folder, written.file)) if written.file else "", written.env or ""
    )


def limit_of(relay: Relay) -> float:
    """`limit:` in bytes per second; 0: none."""
    return 0.0 if relay.limit is None else bytes_per_second(relay.limit)


def wrong_upstreams(environment: Environment) -> dict[str, str]:
    """What is wrong with `from:`, by the relay where it stands: no such relay, or a circle (told once)."""
    relays = environment.relays
    wrong: dict[str, str] = {}
    told: set[str] = set()
    for name, relay in relays.items():
        upstream = relay.from_
        if upstream is None or name in told:
            continue
        if upstream not in relays:
            others = ", ".join(other for other in relays if other != name)
            wrong[name] = f"there is no relay {shown(upstream)}{f': expected one of {others}' if others else ''}"
            continue
        circle = _circle(name, {one: value.from_ for one, value in relays.items()})
        if circle:
            told.update(circle)
            wrong[name] = (
                "is the relay itself: leave it out, and the origin sends"
                if len(circle) == 1
                else f"leads in a circle, {' → '.join([*circle, name])}: one of them must get packages from the origin"
            )
    return wrong


def upstreams_of(environment: Environment) -> dict[str, str]:
    """`from:` of every relay, but for what is wrong: such a relay hangs on the origin."""
    written = {name: relay.from_ for name, relay in environment.relays.items()}
    return {
        name: upstream
        for name, upstream in written.items()
        if upstream is not None and upstream in written and not _circle(name, written)
    }


def check_upstreams(upstreams: Mapping[str, str | None]) -> None:
    """Raises `UsageError`: a relay that is not there, or a circle."""
    for name, upstream in upstreams.items():
        if upstream and upstream not in upstreams:
            raise UsageError(f"relay {name} fetches from {shown(upstream)}, which is not there")
        if _circle(name, upstreams):
            raise UsageError(f"relay {name} fetches from itself, by way of others or not")


def _circle(name: str, upstreams: Mapping[str, str | None]) -> list[str]:
    """The relays of the circle that `name` is on, from it on; none where it is on none."""
    way = [name]
    while (upstream := upstreams.get(way[-1])) is not None:
        if upstream == name:
            return way
        if upstream in way:
            return []
        way.append(upstream)
    return []


def lineage(relay: str, upstreams: Upstreams) -> list[str]:
    """The relay, then the one that it fetches from, and so on to the root. Without circles, as checked before."""
    way = [relay]
    while upstreams.get(way[-1]):
        way.append(upstreams[way[-1]])
    return way


def in_order(relays: Sequence[PlannedRelay]) -> list[PlannedRelay]:
    """Each after the one that it fetches from; else as they were."""
    upstreams = {relay.name: relay.upstream for relay in relays}
    place = {relay.name: number for number, relay in enumerate(relays)}
    return sorted(relays, key=lambda one: [place.get(name, -1) for name in reversed(lineage(one.name, upstreams))])


def next_upstream(relay: str, upstreams: Upstreams, out: Collection[str]) -> str:
    """The nearest relay above `relay` that is not `out`; `ORIGIN` where there is none.

    `out` are relays that failed, or with which this one could not go on.
    """
    for above in lineage(relay, upstreams)[1:]:
        if above not in out:
            return above
    return ORIGIN


def line_name(upstream: str, relay: str) -> str:
    """What the ledger calls the way between two: `origin → fra`."""
    return f"{upstream or 'origin'} → {relay}"
