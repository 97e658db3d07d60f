"""From which other relays this one fetches: those that its own configuration names, and nobody else.

A relay stands where its callers may not reach: without this rule, who may write packages could make it send requests
to any host inside (server-side request forgery). Its client follows no redirect.
"""

from __future__ import annotations

import os
import ssl
from urllib.parse import urlsplit

from relay.config import Peer, RelayConfig, split_listen
from relay.errors import UsageError
from relay.protocol.client import RelayClient
from relay.protocol.credentials import is_loopback, tls_from, token_from
from relay.protocol.followed import Current
from relay.server.http.problems import HttpRefusal


class Peers:
    """The relays that one relay may fetch from."""

    def __init__(self, config: RelayConfig) -> None:
        """Read `peers:` and `parent:`, which is a peer, too.

        Raises:
            UsageError: a URL, a token's place or a CA file that cannot be used.
        """
        peers = (*config.peers, *([config.parent] if config.parent else ()))
        self._known = {_key(peer.url): (peer, _tls(peer)) for peer in peers}
        self._on_loopback = is_loopback(split_listen(config.listen)[0])

    def replace(self, others: Peers) -> None:
        """From now on, these: what is being fetched goes on. Where the relay listens does not change while it does."""
        self._known = others._known

    def open(self, source: str) -> RelayClient:
        """A client for the relay at `source`. Contacts nobody. Tokens are read now, so that a new one counts.

        Raises:
            HttpRefusal: 403 `unknown_peer`.
            UsageError: the token cannot be read.
        """
        try:
            key = _key(source)
        except UsageError:
            raise HttpRefusal(403, "unknown_peer") from None
        if key in self._known:
            peer, tls = self._known[key]
            return RelayClient(peer.url, token=_token(peer), tls=tls, plain_http=peer.plain_http)
        if not self._on_loopback or not is_loopback(key[1]):
            raise HttpRefusal(403, "unknown_peer")
        return RelayClient(source)


def _tls(peer: Peer) -> Current[ssl.SSLContext]:
    if peer.token is not None and bool(peer.token.file) == bool(peer.token.env):
        raise UsageError(f"peers: the token of {peer.url} has both or neither of file and env: expected one of them")
    return tls_from(peer.ca_file or None)


def _key(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: what two spellings of one URL have in common. Raises `UsageError`."""
    parts = urlsplit(RelayClient(url).url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _token(peer: Peer) -> str | Current[str | None] | None:
    """Raises `UsageError`."""
    if peer.token is None:
        return None
    if peer.token.file:
        return token_from(peer.token.file)
    token = os.environ.get(peer.token.env, "").strip()
    if not token:
        raise UsageError(f"peers: the variable {peer.token.env} with the token of {peer.url} is empty")
    return token
