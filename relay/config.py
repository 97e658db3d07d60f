"""relay.yaml: strict, every key optional. What an option of `relay serve` names wins over the file."""

from __future__ import annotations

import os
from typing import Annotated, Any, TypeVar

import msgspec

from relay.errors import UsageError

T = TypeVar("T")

CONFIG_MAX = 1 << 20
"""Bytes of a configuration file."""


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PEM files of the relay's certificate chain and its key."""

    certificate: str
    key: str


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


class RelayConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of relay.yaml."""

    listen: str = "127.0.0.1:7400"
    """HOST:PORT; port 0 takes a free one."""
    store: str = ""
    """`disk:/absolute/path`, a path, or `memory:`. Default: `relay` in `$WAYSTATION_HOME`."""
    free_floor: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Bytes of the store's file system that are kept free. Default: the larger of 1 % and 1 GiB."""
    site: str = ""
    """What DNS calls this place."""
    tokens: list[Any] = msgspec.field(default_factory=list)
    """Who may call, see below."""
    tls: Tls | None = None
    """`certificate` and `key`: PEM files. TLS 1.3. What they hold is read again when they change."""
    peers: list[Peer] = msgspec.field(default_factory=list)
    """Relays that this one may be told to fetch packages from: `url`, `token` (`file` or `env`, scope `read`), `ca_file`,
    `plain_http: true` where the token may go over plain http. On loopback, loopback needs none.
    """
    parent: Peer | None = None
    """The relay to take from, once, what an identical nupkg needs and cannot be made here: as one of `peers`."""
    engines: list[Engine] = msgspec.field(default_factory=list)
    """Deflate engines beside those that are found by themselves: `path`, `encoder`, `sha256`."""
    limits: dict[str, float] = msgspec.field(default_factory=dict)
    """Named limits in place of their defaults, such as `drain_seconds: 60`."""


def home() -> str:
    """Waystation's own folder: `$WAYSTATION_HOME`, else `~/.local/share/waystation`."""
    return os.path.abspath(os.environ.get("WAYSTATION_HOME") or os.path.expanduser("~/.local/share/waystation"))


def load_yaml(path: str, type: type[T]) -> T:
    """A strict YAML file as `type`.

    Raises:
        UsageError: it cannot be read, is no YAML mapping, or does not fit (with the path of the wrong key).
    """
    import yaml

    try:
        with open(path, "rb") as file:
            text = file.read(CONFIG_MAX + 1)
        if len(text) > CONFIG_MAX:
            raise UsageError(f"{path}: more than {CONFIG_MAX} bytes")
        document = yaml.safe_load(text)
        return msgspec.convert({} if document is None else document, type)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from error
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {error}") from error


def split_listen(text: str) -> tuple[str, int]:
    """`HOST:PORT` or `[HOST]:PORT`. Raises `UsageError`."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"listen: {text!r} is not HOST:PORT", hint="For example 127.0.0.1:7400")
    return host, int(port)
