"""Where a feed may send us: decisions over URLs and addresses, free of I/O.

By its specification a service index may name any absolute URL, so a feed could make us talk to whatever is near us.
Three rules hold for every request, also after a redirect and after name resolution:

- only the feed's own host and port, and those that the operator lists;
- https, unless the feed itself is http on loopback or by the operator's word;
- public addresses, unless the feed's URL is itself such an address or the operator allows private ones; where a proxy
  of the environment is on the way, it looks names up, and what it connects to is its own to check.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Literal

from yarl import URL

from relay.errors import RefusedError, UsageError
from relay.support.persistence import Persistence

AddressScope = Literal["public", "private", "loopback", "link-local", "reserved"]

# RFC 6052: the well-known prefix of NAT64, whose last 32 bits are the IPv4 address that is really reached.
_NAT64 = IPv6Network("64:ff9b::/96")

# What `inet_aton` reads as an address though it is none in canonical form: 2130706433, 127.1, 0x7f.0.0.1.
_NUMERIC_HOST = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9a-fA-F]*)\.?", re.ASCII)

PERSISTENCE = Persistence(first_pause=0.5, longest_pause=5.0, failures=4, patience=60.0, spread=0.5)
"""With a feed: some seconds of silence, a minute where it asks for time."""

_HOST_NAME = re.compile(r"[0-9A-Za-z_.-]{1,253}", re.ASCII)


class FeedPolicyError(RefusedError):
    """The feed names a place where we do not go. Nothing was sent there."""


@dataclass(frozen=True, slots=True)
class FeedPolicy:
    """What a download may do and how long it may take.

    Attributes:
        allow_hosts: `host` (at its scheme's own port) or `host:port`, beside the feed's own.
        allow_http: a feed may be plain http beyond loopback.
        allow_private: names may resolve to private addresses (RFC 1918, unique local, shared), not to link-local ones.
        connect_seconds: to a connection, TLS included.
        answer_seconds: from the request to the head of its answer, redirects apart.
        window_seconds: a body must bring `window_bytes` in every such stretch of time.
        window_bytes: see `window_seconds`.
        total_seconds: for everything.
        nupkg_max: bytes of a nupkg.
        json_max: bytes of a JSON document, before and after inflating.
        json_depth: nesting of a JSON document.
        redirects: hops of one request.
        persistence: how a feed's trouble is borne. What is optional is asked for once again at most.
    """

    allow_hosts: tuple[str, ...] = ()
    allow_http: bool = False
    allow_private: bool = False
    connect_seconds: float = 15.0
    answer_seconds: float = 60.0
    window_seconds: float = 30.0
    window_bytes: int = 30 << 10
    total_seconds: float = 3600.0
    nupkg_max: int = 4 << 30
    json_max: int = 16 << 20
    json_depth: int = 16
    redirects: int = 3
    persistence: Persistence = PERSISTENCE


@dataclass(frozen=True, slots=True)
class FeedCredentials:
    """User and password as NuGet feeds take them (Basic); for a token, feeds take any user."""

    user: str
    password: str = field(repr=False)

    @property
    def header(self) -> str:
        """The value of `Authorization`."""
        return f"Basic {base64.b64encode(f'{self.user}:{self.password}'.encode()).decode()}"


class FeedGate:
    """The policy applied to one feed: whatever is not checked here is not asked for."""

    def __init__(self, feed_url: str, policy: FeedPolicy) -> None:
        """Judge the feed's own URL first.

        Raises:
            UsageError: `feed_url` or an entry of `allow_hosts` cannot be read.
            FeedPolicyError: it is plain http where that is not allowed.
        """
        self.feed = _parse_feed_url(feed_url)
        self._policy = policy
        self._listed = frozenset(_parse_listed_host(entry) for entry in policy.allow_hosts)
        self._scopes = _allowed_scopes(self.feed, policy)
        self.check_url(self.feed)

    def check_url(self, url: URL) -> None:
        """Raises `FeedPolicyError` if no request may be sent to `url`."""
        host = url.raw_host or ""
        if url.scheme not in {"http", "https"} or not host:
            raise FeedPolicyError(f"the feed names {str(url)[:200]!r}, which is no http or https URL")
        if url.raw_user is not None or url.raw_password is not None:
            raise FeedPolicyError(f"the feed names a URL on {host} that carries credentials")
        self._check_host(url, host)
        if url.scheme == "http" and not self._may_be_plain(host):
            raise FeedPolicyError(
                f"the feed names plain http on {host}", hint="use https, or --allow-http with an http feed"
            )
        if _is_address(host):
            self.check_address(host, host)
        elif _NUMERIC_HOST.fullmatch(host):
            raise FeedPolicyError(f"the feed names the host {host!r}, which is no address in its usual form")

    def check_address(self, host: str, address: str) -> None:
        """Raises `FeedPolicyError` if `host`, being at `address`, may not be connected to."""
        scope = scope_of(address)
        if scope in self._scopes:
            return
        hint = "add --allow-private if that is meant" if scope == "private" else ""
        at = "is" if host == address else f"resolves to {address},"
        raise FeedPolicyError(f"the host {host} {at} a {scope} address", hint=hint)

    def is_own(self, url: URL) -> bool:
        """Whether `url` has the feed's own origin: the only one that sees credentials."""
        return url.origin() == self.feed.origin()

    def _check_host(self, url: URL, host: str) -> None:
        default = {"http": 80, "https": 443}[url.scheme]
        if (host, url.port) == (self.feed.raw_host, self.feed.port) or (host, url.port) in self._listed:
            return
        if url.port == default and (host, None) in self._listed:
            return
        named = url.host_port_subcomponent or host
        raise FeedPolicyError(
            f"the feed names another host, {named}", hint=f"add --allow-host {named} if that is meant"
        )

    def _may_be_plain(self, host: str) -> bool:
        return self.feed.scheme == "http" and (self._policy.allow_http or _is_loopback(host))


def scope_of(address: str) -> AddressScope:
    """What kind of address this is, looking through IPv6 forms that lead to an IPv4 address."""
    found = ip_address(address)
    if isinstance(found, IPv6Address):
        found = _embedded(found) or found
    if found.is_loopback:
        return "loopback"
    if found.is_link_local:
        return "link-local"
    if found.is_multicast or found.is_unspecified or found.is_reserved:
        return "reserved"
    return "public" if found.is_global else "private"


def _embedded(address: IPv6Address) -> IPv4Address | None:
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour


def _parse_feed_url(text: str) -> URL:
    url = _parse_url(text)
    if url is None or url.scheme not in {"http", "https"} or not url.raw_host:
        raise UsageError(f"{text[:200]!r} is not a feed's URL", hint="expected the https URL of a service index")
    if url.raw_user is not None or url.raw_password is not None:
        raise UsageError("a feed's URL must not carry credentials", hint="they would end in logs; give them by option")
    return url.with_fragment(None)


def _parse_listed_host(entry: str) -> tuple[str, int | None]:
    url = _parse_url(f"https://{entry}")
    # Whatever is not exactly a host and a port comes back as more, or written differently.
    if url is None or not url.raw_host or url.raw_user is not None or url.path_qs != "/" or url.raw_fragment:
        raise UsageError(f"{entry[:200]!r} is not a host or host:port")
    return url.raw_host, url.explicit_port


def _parse_url(text: str) -> URL | None:
    try:
        url = URL(text)
        _ = url.port
    except ValueError:
        return None
    # yarl takes nearly anything as a host, blanks and quotes too.
    host = url.raw_host or ""
    return url if _HOST_NAME.fullmatch(host) or _is_address(host) else None


def _allowed_scopes(feed: URL, policy: FeedPolicy) -> frozenset[AddressScope]:
    scopes: set[AddressScope] = {"public"}
    if policy.allow_private:
        scopes.add("private")
    host = feed.raw_host or ""
    if _is_address(host):
        scopes.add(scope_of(host))
    elif host == "localhost":
        scopes.add("loopback")
    return frozenset(scopes)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and scope_of(host) == "loopback")


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
