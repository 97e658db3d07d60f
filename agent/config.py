"""agent.yaml: strict, every key optional. What an option of a command names wins over the file."""

from __future__ import annotations

from typing import Literal

import msgspec


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """agent.yaml. Every key is optional."""

    name: str = ""
    """Of this machine; by default its host name."""
    site: str | None = None
    domain: str | None = None
    resolver: str | None = None
    """HOST:PORT of a DNS server in place of the system's; it then resolves the relays' names too."""
    scheme: Literal["https", "http"] = "https"
    relays: tuple[str, ...] = ()
    """Used after what DNS says: URLs, or stores (disk:/mnt/dfs/waystation)."""
    token_file: str | None = None
    ca_file: str | None = None
    """PEM file of the authority that signs the relays' certificates, where it is a private one."""
    srv_site: str = "_waystation._tcp.{site}._sites.{domain}"
    srv_generic: str = "_waystation._tcp.{domain}"
    interpreters: dict[str, str] = {}
    """What runs scripts without a shebang, by extension (`.py: /usr/bin/python3`)."""
    service_command: tuple[str, ...] = ()
    """How the service manager is called, e.g. [sv, "{action}", "{service}"]; by default the system's."""
    roots: tuple[str, ...] = ()
    """Absolute folders in which packages may be installed by order; empty: anywhere."""
