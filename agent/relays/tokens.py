"""Which bearer token goes to which relay: one for all, and others for relays that have lists of their own."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from agent.relays.candidates import static_source
from relay.errors import UsageError
from relay.protocol.credentials import token_from
from relay.protocol.followed import Current


def relay_key(text: str) -> str:
    """A relay as a configuration names it, in one form: a URL, HOST:PORT, or HOST (at every port).

    Raises:
        UsageError: it is none of these.
    """
    try:
        url = static_source(text if "://" in text else f"https://{text}").url
        has_port = urlsplit(text if "://" in text else f"//{text}").port is not None
    except (UsageError, ValueError):
        url, has_port = "disk:", False
    if url.startswith(("disk:", "s3:")):
        raise UsageError(f"{text[:80]!r} names no relay", hint="Expected HOST, HOST:PORT or https://HOST:PORT")
    if "://" in text:
        return url
    return url.removeprefix("https://") if has_port else urlsplit(url).hostname or ""


def keys_of(url: str) -> tuple[str, str, str]:
    """How a relay may be named: the most exact name first."""
    parts = urlsplit(url)
    return url, parts.netloc, parts.hostname or ""


class Tokens:
    """The token for each relay, of files that are followed."""

    def __init__(self, default: str | None, files: Mapping[str, str]) -> None:
        """`default` is the file with the token for all relays that `files` does not name.

        Raises:
            UsageError: a file cannot be read, or a key names no relay.
        """
        self._named = {relay_key(name): token_from(file) for name, file in files.items()}
        self._default = token_from(default)

    def of(self, url: str) -> Current[str | None]:
        """What gives the token for the relay at `url` now."""
        return next((self._named[key] for key in keys_of(url) if key in self._named), self._default)
