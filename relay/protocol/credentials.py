"""What a client shows to a relay and what it trusts, both of files that it follows: tokens and authorities."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from typing import Final

from relay.audit.acts import EndsSoon, HasEnded
from relay.audit.event import tell
from relay.errors import UsageError
from relay.protocol.followed import Current, Followed
from relay.protocol.messages import Ending

PLAIN_HTTP: Final = "WAYSTATION_PLAIN_HTTP"
"""The variable that names hosts and networks, with commas between them, which are given tokens over plain http."""
SOON: Final = timedelta(days=14)
"""What ends sooner is told as a warning."""


def token_from(file: str | None, environment: Callable[[str], str | None] = os.environ.get) -> Current[str | None]:
    """What gives the bearer token: from the file, which is followed, else from WAYSTATION_TOKEN, else none.

    Raises:
        UsageError: the file cannot be read or is empty.
    """
    if file is None:
        token = (environment("WAYSTATION_TOKEN") or "").strip() or None
        return lambda: token
    return Followed(f"token file {file!r}", (file,), partial(_read_token, file))


def _read_token(file: str) -> str:
    try:
        with open(file, encoding="utf-8-sig") as handle:
            token = handle.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"token file {file!r} cannot be read: {error}") from error
    if not token:
        raise UsageError(f"token file {file!r} is empty")
    if not token.isascii() or not token.isprintable():
        raise UsageError(f"token file {file!r} holds no token")
    return token


def tls_from(ca_file: str | None) -> Current[ssl.SSLContext]:
    """How to trust a relay's certificate: by the authorities in `ca_file` (PEM), or else by the system's. Both are
    followed.

    Raises:
        UsageError: the file cannot be used.
    """
    if ca_file is None:
        return system_trust
    return Followed(f"CA file {ca_file!r}", (ca_file,), partial(_read_authorities, ca_file))


def _read_authorities(ca_file: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"CA file {ca_file!r} cannot be used: {error}") from error
    now = datetime.now(UTC)
    for authority in context.get_ca_certs():
        ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(authority["notAfter"])), UTC)
        if ending(ends, now):
            tell(_told_of("authority", "", ca_file, ends, now))
    return context


def system_trust() -> ssl.SSLContext:
    """By the authorities that this system trusts now."""
    return _followed_system_trust()()


@cache
def _followed_system_trust() -> Followed[ssl.SSLContext]:
    paths = ssl.get_default_verify_paths()
    files = [path for path in (paths.cafile, paths.capath) if path is not None]
    return Followed("the system's trust store", files, ssl.create_default_context)


def ending(ends: datetime, now: datetime) -> str:
    """What to say of something that ends then, such as "ends in 3 days"; empty where that is far away."""
    if ends <= now:
        return f"has ended ({ends:%Y-%m-%d %H:%M} UTC)"
    if ends - now > SOON:
        return ""
    left = ends - now
    return f"ends in {left.days} days ({ends:%Y-%m-%d})" if left.days > 1 else f"ends at {ends:%Y-%m-%d %H:%M} UTC"


def words_of(one: Ending, now: datetime) -> str:
    """For people, such as "token 8e1d3c4f (fra-agents) ends in 3 days"; empty where that is far away."""
    return _words(one.what, one.id, one.name, datetime.fromtimestamp(one.ends, UTC), now)


def _words(what: str, id: str, name: str, ends: datetime, now: datetime) -> str:
    said = ending(ends, now)
    shown = f" {id}" * bool(id) + f" ({name})" * bool(name)
    return f"{what}{shown} {said}" if said else ""


class EndingsTold:
    """Warns in the log of what is about to end and of what has ended, once a day each."""

    def __init__(self) -> None:
        self._told: dict[str, datetime] = {}

    def tell(self, all: Iterable[Ending], now: datetime) -> None:
        """Say in the log what is due to be said."""
        for one in all:
            event = _told_of(one.what, one.id, one.name, datetime.fromtimestamp(one.ends, UTC), now)
            # By its words: those of a token that ends are others once it has ended.
            last = self._told.get(event.message)
            if event.message and (last is None or (now - last).total_seconds() >= 86400):
                self._told[event.message] = now
                tell(event)


def _told_of(what: str, id: str, name: str, ends: datetime, now: datetime) -> EndsSoon | HasEnded:
    kind = HasEnded if ends <= now else EndsSoon
    return kind(what, id, name, ends.isoformat(timespec="seconds"), _words(what, id, name, ends, now))


def may_be_shown(scheme: str, host: str, environment: Callable[[str], str | None] = os.environ.get) -> bool:
    """Whether a token may go there: over TLS, to this machine itself, or where $WAYSTATION_PLAIN_HTTP names the host."""
    named = [name.strip().lower() for name in (environment(PLAIN_HTTP) or "").split(",")]
    return scheme == "https" or is_loopback(host) or any(_names(name, host.lower()) for name in named)


def _names(name: str, host: str) -> bool:
    """Whether it is the host, or a network (10.0.0.0/8) that the host's literal address lies in."""
    try:
        return name == host or ("/" in name and ipaddress.ip_address(host) in ipaddress.ip_network(name))
    except ValueError:
        return False


def is_loopback(name: str) -> bool:
    """Whether a host name or address means this machine alone, without asking a resolver."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
