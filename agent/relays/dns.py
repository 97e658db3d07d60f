"""Find relays by DNS: where to look, the look-ups, and what counts where they fail.

Two SRV questions are asked, the site's name and the generic one; a static list follows. A name server that says "no
such name" has answered; one that is silent or broken has not, and then the last good answer to that question counts.
DNS chooses, it never authenticates.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

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
from relay.network.names import KeptNames, Names
from relay.terminal.text import printable

if TYPE_CHECKING:
    from dns.asyncresolver import Resolver
    from dns.rdtypes.IN.SRV import SRV

    from agent.config import AgentConfig

RECORDS_MAX = 64
"""SRV records taken from one answer."""
ADDRESSES_MAX = 8
"""Addresses of one family taken for one target."""
LOOKUPS_AT_ONCE = 16
TTL_MIN, TTL_MAX = 5.0, 3600.0
"""Seconds. SRV records are asked for again no sooner and no later, though the zone may say so."""
TTL_NONE = 30.0
"""Seconds after which to ask again where no answer came, or the answer is that there is nothing, whatever the zone says:
an agent without relays must not wait for an hour.
"""
ROUND_SECONDS = 3.0
"""For a round of questions. There are two rounds at most: SRV, and with a resolver of our own the addresses."""
_REASON_CHARS = 200


# --- configuration


def check_discovery(config: AgentConfig) -> None:
    """Refuse at the edge what could only fail later.

    Raises:
        UsageError: a name, URL or resolver cannot be used.
    """
    for relay in config.relays:
        static_source(relay)
    if config.resolver is not None:
        _parse_resolver(config.resolver)
    _questions(config)


def _questions(config: AgentConfig) -> tuple[tuple[Origin, str], ...]:
    """The SRV names to ask, with the tier that their answers belong to.

    Raises:
        UsageError: a template does not give a DNS name.
    """
    wanted: tuple[tuple[Origin, str], ...] = (("site", config.srv_site), ("generic", config.srv_generic))
    filled = ((origin, _fill(template, config)) for origin, template in wanted)
    return tuple((origin, name) for origin, name in filled if name is not None)


def _fill(template: str, config: AgentConfig) -> str | None:
    """The template over `{site}` and `{domain}` as a name; None where it needs what is not set."""
    values = {"{site}": config.site, "{domain}": config.domain}
    if any(field in template and value is None for field, value in values.items()):
        return None
    name = template.replace("{site}", config.site or "").replace("{domain}", config.domain or "")
    name = name.removesuffix(".").lower()
    if not is_host_name(name):
        raise UsageError(f"{template!r} gives {name[:120]!r}, which is not a DNS name")
    return name


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
    """The last good answer to one question; no sources where the answer was that there are none.

    Attributes:
        name: the SRV name asked, so that another site's answer is never taken for this one's.
        at: `time.time()` when it came.
    """

    name: str
    sources: tuple[Source, ...]
    at: float


@dataclass(frozen=True)
class Found:
    """The answer of `find_sources`.

    Attributes:
        sources: in tier order, inside a tier drawn by weight.
        notes: what a person should know of how they were found.
        last: to be kept, and given to the next `find_sources`.
        ttl: seconds until it is worth asking again.
    """

    sources: tuple[Source, ...]
    notes: tuple[str, ...]
    last: tuple[LastAnswer, ...]
    ttl: float


@dataclass(frozen=True)
class _Reply:
    """What came back for one question. `sources` is None where nothing came that could be believed."""

    origin: Origin
    name: str
    sources: tuple[Source, ...] | None
    notes: tuple[str, ...] = ()
    ttl: float = TTL_NONE


class _DnsFailedError(UnreachableError):
    """No name server gave an answer, which is not the same as the answer "none"."""


async def find_sources(
    config: AgentConfig,
    last: Sequence[LastAnswer],
    rng: random.Random,
    *,
    now: float,
    round_seconds: float = ROUND_SECONDS,
    names: Names | None = None,
) -> Found:
    """Ask DNS, fall back to the last good answers where it fails, and add the static list.

    Never raises for what the network does: what is left is what was found, down to nothing.

    Args:
        config: says where to look; a name that needs what is not set is not asked.
        last: what the last call kept.
        rng: draws inside a tier.
        now: seconds since 1970.
        round_seconds: for a round of questions.
        names: looks the targets up where the configuration names a resolver; what it knows is not asked again.
    """
    questions = _questions(config)
    names = names or names_of(config, round_seconds)
    replies = await _ask_all(config, questions, round_seconds, names) if questions else []
    remembered = {answer.name: answer for answer in last}
    settled = [_settle(reply, remembered.get(reply.name), now) for reply in replies]
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


def names_of(config: AgentConfig, round_seconds: float = ROUND_SECONDS) -> KeptNames | None:
    """Looks relays up at the resolver that the configuration names; None where it names none."""

    async def look_up(host: str) -> tuple[Sequence[str], float]:
        return await _addresses(_resolver(config.resolver, round_seconds), host)

    return None if config.resolver is None else KeptNames(look_up)


async def _ask_all(
    config: AgentConfig, questions: Sequence[tuple[Origin, str]], seconds: float, names: Names | None
) -> list[_Reply]:
    from dns.exception import DNSException

    try:
        resolver = _resolver(config.resolver, seconds)
    except (DNSException, OSError) as error:
        note = f"the system's resolver cannot be used: {words_of(error)}"
        return [_Reply(origin, name, None, (note,)) for origin, name in questions]
    return await asyncio.gather(*(_ask(resolver, config, origin, name, names) for origin, name in questions))


def _resolver(configured: str | None, seconds: float) -> Resolver:
    from dns.asyncresolver import Resolver

    resolver = Resolver(configure=configured is None)
    if configured is not None:
        address, port = _parse_resolver(configured)
        resolver.nameservers, resolver.port = [address], port
    resolver.lifetime = seconds
    # A lost datagram must leave time to ask again, or the next server.
    resolver.timeout = seconds / 3
    return resolver


async def _ask(resolver: Resolver, config: AgentConfig, origin: Origin, name: str, names: Names | None) -> _Reply:
    try:
        records, ttl = await _look_up(resolver, name, "SRV")
    except _DnsFailedError as error:
        return _Reply(origin, name, None, (f"{name}: {error.message}",))
    if not records:
        return _Reply(origin, name, (), (f"{name}: no relay has this name",), ttl)
    sources, notes = _read(records, origin, config.scheme, name)
    reply = _Reply(origin, name, sources, notes, ttl)
    return await _with_addresses(names, reply) if names is not None and sources else reply


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


async def _with_addresses(names: Names, reply: _Reply) -> _Reply:
    """The reply with its targets' addresses; without those that have none.

    A target whose look-up failed is left out as well, but when that befalls all of them, DNS has failed.
    """
    targets = sorted({source.target for source in reply.sources or ()})
    gate = asyncio.Semaphore(LOOKUPS_AT_ONCE)
    found = dict(zip(targets, await asyncio.gather(*(_known(names, one, gate) for one in targets)), strict=True))
    notes = [f"{name}: its address could not be looked up" for name, some in found.items() if some is None]
    notes += [f"{name}: has no address" for name, some in found.items() if some == ()]
    # One that is left out may be there again sooner than the records about it change.
    ttl = min(reply.ttl, TTL_NONE) if notes else reply.ttl
    if all(some is None for some in found.values()):
        return replace(reply, sources=None, notes=(*reply.notes, *notes), ttl=ttl)
    placed = tuple(replace(source, addresses=some) for source in reply.sources or () if (some := found[source.target]))
    return replace(reply, sources=placed, notes=(*reply.notes, *notes), ttl=ttl)


async def _known(names: Names, target: str, gate: asyncio.Semaphore) -> tuple[str, ...] | None:
    """None where no server answered."""
    if is_address(target):
        return (target,)
    async with gate:
        try:
            return tuple(await names.addresses(target))
        except UnreachableError:
            return None


async def _addresses(resolver: Resolver, target: str) -> tuple[Sequence[str], float]:
    """IPv6 first: it is tried first (RFC 8305), with IPv4 soon behind it; and their seconds to live.

    Raises:
        _DnsFailedError: no server answered.
    """
    kinds = ("AAAA", "A")
    answers = await asyncio.gather(*(_look_up(resolver, target, kind) for kind in kinds), return_exceptions=True)
    came = [answer for answer in answers if not isinstance(answer, BaseException)]
    found = tuple(str(one) for some, _ in came for one in some[:ADDRESSES_MAX])
    for answer in answers:
        if isinstance(answer, BaseException) and not (found and isinstance(answer, _DnsFailedError)):
            raise answer
    with_some = [ttl for some, ttl in came if some] or [ttl for _, ttl in came]
    return found, min(*with_some, TTL_MAX)


async def _look_up(resolver: Resolver, name: str, kind: str) -> tuple[list[Any], float]:
    """All records of one kind, and their seconds to live: of the whole chain, where names stand for other names. "No
    such name" is an answer: no records.

    Raises:
        _DnsFailedError: no server answered, or none was able to.
    """
    from dns.exception import DNSException
    from dns.resolver import NXDOMAIN

    try:
        answer = await resolver.resolve(f"{name}.", kind, search=False, raise_on_no_answer=False)
    except NXDOMAIN:
        return [], TTL_NONE
    except (DNSException, OSError, EOFError) as error:
        raise _DnsFailedError(f"DNS failed, {words_of(error)}") from error
    return list(answer.rrset or ()), float(answer.chaining_result.minimum_ttl) if answer.rrset else TTL_NONE


def words_of(error: BaseException) -> str:
    """For people: one line, printable and short."""
    text = " ".join(str(error).split()) or type(error).__name__
    return printable(text)[:_REASON_CHARS]
