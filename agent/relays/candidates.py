"""The relays, and stores in their place, that an agent may ask: where they are, and in which tier. Pure."""

from __future__ import annotations

import ipaddress
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

from relay.errors import UsageError

Origin: TypeAlias = Literal["site", "generic", "static"]
Scheme: TypeAlias = Literal["https", "http"]

_TIER_OF_ORIGIN: dict[Origin, int] = {"site": 0, "generic": 1, "static": 2}
_STORES = ("disk:", "s3://")
_DEFAULT_PORT: dict[str, int] = {"https": 443, "http": 80}
_LABELS = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*", re.ASCII)
_PRINTABLE = re.compile(r"[!-~]{1,2048}", re.ASCII)


def is_host_name(text: str) -> bool:
    """RFC 1123 host name in lower case, without the final dot; `_` too, as container networks have such names.

    A name whose last label is a number must be a whole IPv4 address: everything else reads it as one.
    """
    if len(text) > 253 or not _LABELS.fullmatch(text):
        return False
    return not text.rpartition(".")[2].isdigit() or is_address(text, 4)


def is_address(text: str, version: int | None = None) -> bool:
    """An IP address without a zone, of this version."""
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return False
    return version in {None, found.version} and "%" not in text


@dataclass(frozen=True)
class Source:
    """One place to fetch from: a relay, or a store that stands in for one (`disk:`, `s3://`).

    Attributes:
        url: names it (`https://fra1.example.net:7400`, always with host name and port); TLS and the Host header go by it.
        priority: of the SRV record, lower comes first; 0 in the static list, which is one tier.
        weight: of the SRV record, the share inside the tier.
        target: host name or literal address; empty for a store.
        addresses: where to connect instead of asking the system's resolver for `target`, the first to be tried in front.
        remembered: DNS did not answer this time; this is from the last good answer.
    """

    url: str
    origin: Origin
    priority: int
    weight: int
    target: str
    addresses: tuple[str, ...] = ()
    remembered: bool = False

    def __post_init__(self) -> None:
        """Hold no source that cannot be asked, wherever it came from.

        Raises:
            ValueError: a field does not follow its grammar.
        """
        if not (0 <= self.priority <= 0xFFFF and 0 <= self.weight <= 0xFFFF):
            raise ValueError("priority and weight are 16-bit numbers")
        if not all(map(is_address, self.addresses)):
            raise ValueError("one of the addresses is not an IP address")
        if not self.is_store and (not self.target or _parse_url(self.url)[1] != self.target):
            raise ValueError("the URL does not name the target")

    @property
    def is_store(self) -> bool:
        """Read by the store contract, not by the protocol; carries no mail."""
        return self.url.startswith(_STORES)

    @property
    def tier(self) -> tuple[int, int]:
        """Lower comes first."""
        return _TIER_OF_ORIGIN[self.origin], self.priority


def static_source(text: str) -> Source:
    """One entry of `relays:`: an http(s) URL without path and credentials, or a store's location.

    The URL is put in its one form (lower case, port written out), which is what `Source.url` is compared by.

    Raises:
        UsageError: it is not one of these. The text is not repeated where it may hold a password.
    """
    if text.startswith(_STORES):
        if text in _STORES or not text.isprintable():
            raise UsageError(f"relay {text[:80]!r} names no place in its store")
        return Source(url=text, origin="static", priority=0, weight=0, target="")
    if "@" in text:
        raise UsageError("a relay's URL carries no credentials", hint="Give a token beside it instead")
    try:
        scheme, host, port = _parse_url(text)
    except ValueError as error:
        expected = "http(s)://HOST[:PORT], disk:PATH or s3://BUCKET"
        raise UsageError(f"relay {text[:80]!r}: {error}", hint=f"Expected {expected}") from error
    return Source(url=_url(scheme, host, port), origin="static", priority=0, weight=0, target=host)


def srv_source(origin: Origin, scheme: Scheme, target: str, port: int, priority: int, weight: int) -> Source:
    """One SRV record (RFC 2782).

    Raises:
        ValueError: target or port cannot be right. A DNS answer is a stranger's text.
    """
    host = target.removesuffix(".").lower()
    if not is_host_name(host):
        raise ValueError("target is not a host name")
    if not 1 <= port <= 0xFFFF:
        raise ValueError("port is not between 1 and 65535")
    return Source(_url(scheme, host, port), origin, priority, weight, host)


def candidates(sources: Iterable[Source]) -> tuple[Source, ...]:
    """In tier order, each URL once: at the best place where it was named."""
    best: dict[str, Source] = {}
    for source in sorted(sources, key=lambda one: (one.tier, one.url)):
        best.setdefault(source.url, source)
    return tuple(best.values())


def by_weight(sources: Iterable[Source], rng: random.Random) -> list[Source]:
    """Weighted random order, as RFC 2782 has it: weight 0 is seldom chosen while others are there, but not never.

    The order of the arguments has no influence, because name servers rotate their answers.
    """
    pool = sorted(sources, key=lambda one: one.url)
    rng.shuffle(pool)
    pool.sort(key=lambda one: one.weight > 0)
    chosen = []
    while pool:
        mark = rng.randint(0, sum(one.weight for one in pool))
        running = 0
        for index, source in enumerate(pool):
            running += source.weight
            if running >= mark:
                chosen.append(pool.pop(index))
                break
    return chosen


def _parse_url(text: str) -> tuple[str, str, int]:
    if not _PRINTABLE.fullmatch(text):
        raise ValueError("not a plain ASCII URL")
    parts = urlsplit(text)
    if parts.scheme not in _DEFAULT_PORT:
        raise ValueError("unknown scheme")
    if parts.path not in {"", "/"} or "?" in text or "#" in text:
        raise ValueError("a relay's URL ends after the port")
    host, port = parts.hostname or "", parts.port
    if not (is_address(host, 6) if "[" in parts.netloc else is_host_name(host)):
        raise ValueError("not a host name or address")
    if port == 0:
        raise ValueError("port is not between 1 and 65535")
    return parts.scheme, host, port or _DEFAULT_PORT[parts.scheme]


def _url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
