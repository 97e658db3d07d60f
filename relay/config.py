"""relay.yaml: strict, every key optional. What an option of `relay serve` names wins over the file."""

from __future__ import annotations

import os
from datetime import datetime
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from relay.errors import UsageError
from relay.folders import check_folder

Scope = Literal["read", "write", "agent", "order"]
"""`read` packages; `write` packages; `agent` poll and report; `order` post orders and read reports."""

AGENT_NAME: Final = r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z"
"""Names of agents and machines. They are compared lower-cased."""

_Text = Annotated[str, Meta(min_length=1, max_length=4096, description="text of 1 to 4096 characters")]


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PEM files of the relay's certificate chain and its key."""

    certificate: _Text
    key: _Text


class PeerToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the bearer token is that a peer wants: exactly one of the two."""

    file: str = ""
    env: str = ""


class Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A relay that this one may be told to fetch packages from."""

    url: str
    token: PeerToken | None = None
    """Of the scope `read`, where the peer asks for one."""
    ca_file: str = ""
    """PEM of its authority, where it is a private one."""
    plain_http: bool = False
    """It is given its token over plain http, too."""


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A native deflate engine that makes nupkgs' bytes again. It is loaded only if its SHA-256 is pinned."""

    path: str
    """Of the file, or of a folder with some of them (`*.so`)."""
    encoder: str = ""
    """Which one it is, and with `sha256` its pin: neither is needed where Waystation itself pins it."""
    sha256: str = ""


class TokenRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry under `tokens:`. `sha256` is that of the token's secret part, in hex."""

    id: Annotated[str, Meta(pattern=r"\A[0-9a-f]{8}\Z", description="8 hex digits")]
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1)]
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z", description="64 hex digits")]
    created: Annotated[datetime, Meta(tz=True)]
    expires: Annotated[datetime, Meta(tz=True)]
    name: str = ""
    agent: Annotated[str, Meta(pattern=AGENT_NAME, description="an agent's name")] | msgspec.UnsetType = msgspec.UNSET
    """The only agent as which it may poll and report; not there: any."""


class RelayConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of relay.yaml."""

    listen: str = "127.0.0.1:7400"
    """HOST:PORT; port 0 takes a free one."""
    store: str = ""
    """`disk:/absolute/path`, a path, `s3://bucket/prefix`, or `memory:`. Default: `relay` in `$WAYSTATION_HOME`."""
    free_floor: Annotated[int, Meta(ge=0)] | None = None
    """Bytes of the store's file system that are kept free. Default: the larger of 1 % and 1 GiB."""
    low_space: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Free bytes below which the relay says that it is low on space. Default: twice `free_floor`."""
    site: str = ""
    """What DNS calls this place."""
    tokens: tuple[TokenRecord, ...] = ()
    """Who may call, see below."""
    tls: Tls | None = None
    """`certificate` and `key`: PEM files. TLS 1.3. What they hold is read again when they change."""
    peers: tuple[Peer, ...] = ()
    """Relays that this one may be told to fetch packages from: `url`, `token` (`file` or `env`, scope `read`), `ca_file`,
    `plain_http: true` where the token may go over plain http. On loopback, loopback needs none.
    """
    parent: Peer | None = None
    """The relay to take from, once, what an identical nupkg needs and cannot be made here: as one of `peers`."""
    engines: tuple[Engine, ...] = ()
    """Deflate engines beside those that are found by themselves: `path`, `encoder`, `sha256`."""
    limits: dict[str, float] = msgspec.field(default_factory=dict)
    """Named limits in place of their defaults, such as `drain_seconds: 60`."""


def home() -> str:
    """Waystation's own folder: `$WAYSTATION_HOME`, else `~/.local/share/waystation`. What makes it, makes it private.

    Raises:
        RefusedError: another user or a group can write there, and so put other keys into the place of ours.
    """
    folder = os.path.abspath(os.environ.get("WAYSTATION_HOME") or os.path.expanduser("~/.local/share/waystation"))
    check_folder(folder, private=True)
    return folder


def split_listen(text: str) -> tuple[str, int]:
    """`HOST:PORT` or `[HOST]:PORT`. Raises `UsageError`."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"listen: {text!r} is not HOST:PORT", hint="For example 127.0.0.1:7400")
    return host, int(port)
