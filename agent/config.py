"""agent.yaml: strict, every key optional. What an option of a command names wins over the file."""

from __future__ import annotations

from typing import Literal

import msgspec


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """agent.yaml. Every key is optional."""

    name: str = ""
    """Of this machine. Default: its host name."""
    site: str | None = None
    domain: str | None = None
    """Where it stands, and where the SRV records are."""
    resolver: str | None = None
    """HOST:PORT of a DNS server in place of the system's; it then resolves the relays' names, too."""
    scheme: Literal["https", "http"] = "https"
    """`https` or `http`, for relays found by SRV."""
    relays: tuple[str, ...] = ()
    """Asked after what DNS says: URLs, or stores such as `disk:/mnt/dfs/waystation`."""
    token_file: str | None = None
    """The relays' bearer token. It is read again when the file changes, as are the others."""
    tokens: dict[str, str] = {}
    """Files with the tokens of single relays, in place of `token_file`: `relay.iad.example.net: /etc/…`. A relay is named
    by HOST, HOST:PORT or URL.
    """
    plain_http: tuple[str, ...] = ()
    """Relays (HOST, HOST:PORT or URL) that are given their token over plain http, too. Default: those on this machine."""
    ca_file: str | None = None
    """PEM of the authority that signs the relays' certificates, where it is a private one."""
    srv_site: str = "_waystation._tcp.{site}._sites.{domain}"
    """The SRV name of the site's relays, as a template over `{site}` and `{domain}`."""
    srv_generic: str = "_waystation._tcp.{domain}"
    """The SRV name of the relays that serve every site, likewise."""
    interpreters: dict[str, str] = {}
    """What runs scripts that have no `#!` line, by extension: `.py: /usr/bin/python3`."""
    service_command: tuple[str, ...] = ()
    """How services are controlled, as a list with `{action}` and `{service}`. Default: the system's, `systemctl`."""
    roots: tuple[str, ...] = ()
    """Absolute folders in which packages may be installed by order. Default: any."""
