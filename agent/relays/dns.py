"""Find relays by DNS: where to look, the look-ups, and what counts where they fail.

Two SRV questions are asked, the site's name and the generic one; a static list follows. A name server that says "no
such name" has answered; one that is silent or broken has not, and then the last good answer to that question counts.
DNS chooses, it never authenticates.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING

from agent.relays.candidates import (
    Origin,
    Scheme,
    Source,
    by_weight,
    candidates,
    is_address,
    is_host_name,
    srv_source,
    static_source,
)
from relay.errors import UnreachableError, UsageError

if TYPE_CHECKING:
    from dns.asyncresolver import Resolver
    from dns.rdtypes.IN.SRV import SRV

    from agent.config import AgentConfig

RECORDS_MAX = 64
"""SRV records taken from one answer."""
ADDRESSES_MAX = 8
"""Addresses of one family taken for one target."""
LOOKUPS_AT_ONCE = 16
TTL_MIN, TTL_MAX = 30.0, 3600.0
"""Seconds. Look again no sooner and no later, whatever the zone says."""
_REASON_CHARS = 200


# --- configuration


@dataclass(frozen=True)
class DiscoveryConfig:
    """Where to look. Names are templates over `{site}` and `{domain}`; one that needs what is not set is not asked."""

    site: str | None = None
    domain: str | None = None
    resolver: str | None = None
    """`IP:port` (or `[IPv6]:port`) of a name server, asked instead of the system's, also for the targets' addresses."""
    scheme: Scheme = "https"
    site_name: str = "_waystation._tcp.{site}._sites.{domain}"
    generic_name: str = "_waystation._tcp.{domain}"
    relays: tuple[str, ...] = ()
    """URLs (`https://HOST:PORT`) or store locations (`disk:`, `s3://`), behind whatever DNS says."""
    timeout: float = 3.0
    """Seconds for a round of questions. There are two rounds at most: SRV, and with `resolver` the addresses."""

    def __post_init__(self) -> None:
        """Refuse at the edge what could only fail later.

        Raises:
            UsageError: a name, URL, resolver, scheme or timeout that cannot be used.
        """
        if self.scheme not in {"https", "http"}:
            raise UsageError(f"scheme: expected https or http, not {self.scheme!r}")
        if not self.timeout > 0:
            raise UsageError("timeout: expected seconds above 0")
        for relay in self.relays:
            static_source(relay)
        if self.resolver is not None:
            _parse_resolver(self.resolver)
        self.questions()

    def questions(self) -> tuple[tuple[Origin, str], ...]:
        """The SRV names to ask, with the tier that their answers belong to.

        Raises:
            UsageError: a template does not give a DNS name.
        """
        wanted: tuple[tuple[Origin, str], ...] = (("site", self.site_name), ("generic", self.generic_name))
        filled = ((origin, self._fill(template)) for origin, template in wanted)
        return tuple((origin, name) for origin, name in filled if name is not None)

    def _fill(self, template: str) -> str | None:
        name = template
        for field_name, value in (("{site}", self.site), ("{domain}", self.domain)):
            if field_name not in name:
                continue
            if value is None:
                return None
            name = name.replace(field_name, value)
        name = name.removesuffix(".").lower()
        if not is_host_name(name):
            raise UsageError(f"{template!r} gives {name[:120]!r}, which is not a DNS name")
        return name


def discovery_of(config: AgentConfig) -> DiscoveryConfig:
    """Where agent.yaml says to look for relays. Raises `UsageError` where a value cannot be right."""
    return DiscoveryConfig(
        site=config.site,
        domain=config.domain,
        resolver=config.resolver,
        scheme=config.scheme,
        site_name=config.srv_site,
        generic_name=config.srv_generic,
        relays=config.relays,
    )


def _parse_resolver(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        host, port = text, "53"
    try:
        address, number = str(ip_address(host.removeprefix("[").removesuffix("]"))), int(port)
    except ValueError as error:
        raise UsageError(f"resolver {text[:80]!r}: expected IP:PORT of a name server") from error
    if not 1 <= number <= 0xFFFF:
        raise UsageError(f"resolver {text[:80]!r}: port is not between 1 and 65535")
    return address, number


# --- look-ups


@dataclass(frozen=True)
class LastAnswer:
    """The last good answer to one question; no sources where the answer was that there are none."""

    name: str
    """The SRV name asked, so that another site's answer is never taken for this one's."""
    sources: tuple[Source, ...]
    at: float
    """`time.time()` when it came."""


@dataclass(frozen=True)
class Found:
    sources: tuple[Source, ...]
    """In tier order, inside a tier drawn by weight."""
    notes: tuple[str, ...]
    """What a person should know of how they were found."""
    last: tuple[LastAnswer, ...]
    """To be kept, and given to the next `find_sources`."""
    ttl: float
    """Seconds until it is worth asking again."""


@dataclass(frozen=True)
class _Reply:
    """What came back for one question. `sources` is None where nothing came that could be believed."""

    origin: Origin
    name: str
    sources: tuple[Source, ...] | None
    notes: tuple[str, ...] = ()
    ttl: float = TTL_MIN


class _DnsFailedError(UnreachableError):
    """No name server gave an answer, which is not the same as the answer "none"."""


async def find_sources(
    config: DiscoveryConfig, last: Sequence[LastAnswer], rng: random.Random, *, now: float | None = None
) -> Found:
    """Ask DNS, fall back to the last good answers where it fails, and add the static list.

    Never raises for what the network does: whatever is left is what was found, down to nothing.
    """
    questions = config.questions()
    replies = await _ask_all(config, questions) if questions else []
    remembered = {answer.name: answer for answer in last}
    clock = time.time() if now is None else now
    settled = [_settle(reply, remembered.get(reply.name), clock) for reply in replies]
    static = [static_source(text) for text in config.relays]
    sources = candidates([source for found, _, _ in settled for source in found] + static)
    notes = tuple(note for _, _, some in settled for note in some)
    return Found(
        sources=_drawn(sources, rng),
        notes=notes if sources else (*notes, "no relay is known: neither by DNS nor by a static list"),
        last=tuple(answer for _, answer, _ in settled if answer),
        ttl=min(max(min((reply.ttl for reply in replies), default=TTL_MAX), TTL_MIN), TTL_MAX),
    )


def _settle(
    reply: _Reply, before: LastAnswer | None, now: float
) -> tuple[tuple[Source, ...], LastAnswer | None, tuple[str, ...]]:
    """The sources that count, the answer to keep, and the notes: pure."""
    if reply.sources is not None:
        return reply.sources, LastAnswer(reply.name, reply.sources, now), reply.notes
    if before is None:
        return (), None, reply.notes
    note = f"{reply.name}: the last good answer is used, {max(now - before.at, 0) / 60:.0f} min old"
    # The configuration may have changed its mind about what this name is for.
    kept = tuple(replace(source, origin=reply.origin, remembered=True) for source in before.sources)
    return kept, before, (*reply.notes, note)


def _drawn(sources: Sequence[Source], rng: random.Random) -> tuple[Source, ...]:
    by_tier: dict[tuple[int, int], list[Source]] = {}
    for source in sources:
        by_tier.setdefault(source.tier, []).append(source)
    return tuple(source for tier in by_tier.values() for source in by_weight(tier, rng))


async def _ask_all(config: DiscoveryConfig, questions: Sequence[tuple[Origin, str]]) -> list[_Reply]:
    from dns.exception import DNSException

    try:
        resolver = _resolver(config)
    except (DNSException, OSError) as error:
        note = f"the system's resolver cannot be used: {words_of(error)}"
        return [_Reply(origin, name, None, (note,)) for origin, name in questions]
    return await asyncio.gather(*(_ask(resolver, config, origin, name) for origin, name in questions))


def _resolver(config: DiscoveryConfig) -> Resolver:
    from dns.asyncresolver import Resolver

    resolver = Resolver(configure=config.resolver is None)
    if config.resolver is not None:
        address, port = _parse_resolver(config.resolver)
        resolver.nameservers, resolver.port = [address], port
    resolver.lifetime = config.timeout
    # A lost datagram must leave time to ask again, or the next server.
    resolver.timeout = config.timeout / 3
    return resolver


async def _ask(resolver: Resolver, config: DiscoveryConfig, origin: Origin, name: str) -> _Reply:
    try:
        records, ttl = await _srv(resolver, name)
    except _DnsFailedError as error:
        return _Reply(origin, name, None, (f"{name}: {error.message}",))
    if not records:
        return _Reply(origin, name, (), (f"{name}: no relay has this name",), ttl)
    sources, notes = _read(records, origin, config.scheme, name)
    if config.resolver is not None and sources:
        return await _with_addresses(resolver, _Reply(origin, name, sources, notes, ttl))
    return _Reply(origin, name, sources, notes, ttl)


async def _srv(resolver: Resolver, name: str) -> tuple[list[SRV], float]:
    """The records and their seconds to live; no records where there is no such name.

    Raises:
        _DnsFailedError: no server answered.
    """
    import dns.rdtypes.IN.SRV

    answers, ttl = await _look_up(resolver, name, "SRV")
    return [one for one in answers if isinstance(one, dns.rdtypes.IN.SRV.SRV)], ttl


def _read(
    records: Sequence[SRV], origin: Origin, scheme: Scheme, name: str
) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    """SRV records as sources, and what was wrong with the others: pure."""
    notes, sources = [], []
    if len(records) > RECORDS_MAX:
        notes.append(f"{name}: {len(records)} records, the first {RECORDS_MAX} by priority are taken")
    for one in sorted(records, key=lambda record: record.priority)[:RECORDS_MAX]:
        target = one.target.to_text()
        if target == ".":
            # RFC 2782: the service is decidedly not available at this name. A good answer, and an empty one.
            notes.append(f"{name}: says that there is no relay here")
            continue
        try:
            sources.append(srv_source(origin, scheme, target, one.port, one.priority, one.weight))
        except ValueError as error:
            notes.append(f"{name}: a record was left out, its {error}")
    return tuple(sources), tuple(notes)


async def _with_addresses(resolver: Resolver, reply: _Reply) -> _Reply:
    """The reply with its targets' addresses; without those that have none.

    A target whose look-up failed is left out as well, but when that befalls all of them, DNS has failed.
    """
    targets = sorted({source.target for source in reply.sources or ()})
    gate = asyncio.Semaphore(LOOKUPS_AT_ONCE)
    found = dict(zip(targets, await asyncio.gather(*(_addresses(resolver, one, gate) for one in targets)), strict=True))
    notes = [f"{name}: its address could not be looked up" for name, some in found.items() if some is None]
    notes += [f"{name}: has no address" for name, some in found.items() if some == ()]
    if all(some is None for some in found.values()):
        return replace(reply, sources=None, notes=(*reply.notes, *notes), ttl=TTL_MIN)
    placed = tuple(replace(source, addresses=some) for source in reply.sources or () if (some := found[source.target]))
    return replace(reply, sources=placed, notes=(*reply.notes, *notes))


async def _addresses(resolver: Resolver, target: str, gate: asyncio.Semaphore) -> tuple[str, ...] | None:
    """IPv6 first: it is tried first (RFC 8305), with IPv4 soon behind it. None where no server answered."""
    if is_address(target):
        return (target,)
    async with gate:
        answers = await asyncio.gather(*(_texts(resolver, target, kind) for kind in ("AAAA", "A")))
    found = tuple(text for some in answers for text in (some or [])[:ADDRESSES_MAX])
    return None if not found and None in answers else found


async def _texts(resolver: Resolver, name: str, kind: str) -> list[str] | None:
    try:
        answers, _ = await _look_up(resolver, name, kind)
    except _DnsFailedError:
        return None
    return [str(one) for one in answers]


async def _look_up(resolver: Resolver, name: str, kind: str) -> tuple[list[object], float]:
    """All records of one kind, and their seconds to live. "No such name" is an answer: no records.

    Raises:
        _DnsFailedError: no server answered, or none was able to.
    """
    from dns.exception import DNSException
    from dns.resolver import NXDOMAIN, NoAnswer

    try:
        answer = await resolver.resolve(f"{name}.", kind, search=False)
    except (NXDOMAIN, NoAnswer):
        return [], TTL_MIN
    except (DNSException, OSError, EOFError) as error:
        raise _DnsFailedError(f"DNS failed, {words_of(error)}") from error
    return list(answer), float(answer.rrset.ttl if answer.rrset else TTL_MIN)


def words_of(error: BaseException) -> str:
    """For people: one line, printable and short."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(char for char in text if char.isprintable())[:_REASON_CHARS]
