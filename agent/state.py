"""What an agent knows between runs, in its home: which trees it installed, and their manifests.

<home>/agent.yaml            configuration
<home>/trust.json            the keys that it believes
<home>/relays.json           what it knows of the relays
<home>/trees/<ulid>.json     one installed tree
<home>/manifests/<sha256>    their manifests
"""

from __future__ import annotations

import errno
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import msgspec

from relay.config import load_yaml
from relay.content import manifest as manifests
from relay.content.identity import ManifestId, PackageRef, parse_digest
from relay.content.manifest import Manifest
from relay.durable import sync_folder, write_durably
from relay.errors import IdentityError, ManifestError, StoreError, UsageError
from relay.trust.keys import TrustPins, parse_pins

if TYPE_CHECKING:
    from agent.discovery import DiscoveryConfig


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

    def discovery(self) -> DiscoveryConfig:
        """Where to look for relays. Raises `UsageError` where a value can be nobody's."""
        from agent.discovery import DiscoveryConfig

        return DiscoveryConfig(
            site=self.site,
            domain=self.domain,
            resolver=self.resolver,
            scheme=self.scheme,
            site_name=self.srv_site,
            generic_name=self.srv_generic,
            relays=self.relays,
        )


class TreeRecord(msgspec.Struct, frozen=True):
    """One installed tree."""

    ulid: str
    root: str
    path: str
    package: str
    version: str
    manifest: str
    label: str
    installed: str


class AgentState:
    """Reads and writes an agent's home. Blocking, small files."""

    def __init__(self, home: str) -> None:
        self.home = home

    def config(self) -> AgentConfig:
        """Raises `UsageError`."""
        path = os.path.join(self.home, "agent.yaml")
        config: AgentConfig = load_yaml(path, AgentConfig) if os.path.exists(path) else AgentConfig()
        try:
            config.discovery()
        except UsageError as error:
            raise UsageError(f"{path}: {error.message}", hint=error.hint) from error
        return config

    def pins(self) -> TrustPins | None:
        """The pinned keys; None where no trust.json was given. Raises `UsageError`, `SignatureError`."""
        path = os.path.join(self.home, "trust.json")
        try:
            with open(path, "rb") as file:
                return parse_pins(file.read(1 << 20))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error

    def trees(self) -> list[TreeRecord]:
        """Installed trees that are still there, newest first."""
        found = []
        for name in _names(os.path.join(self.home, "trees")):
            if not name.endswith(".json"):
                continue
            record = self._read_record(name)
            if record is not None and os.path.isdir(record.path):
                found.append(record)
        return sorted(found, key=lambda record: record.ulid, reverse=True)

    def manifest(self, record: TreeRecord) -> Manifest | None:
        """The manifest of an installed tree; None where it is lost or damaged."""
        return self._read_manifest(record.manifest)

    def record(self, manifest: Manifest, *, ulid: str, root: str, path: str, label: str) -> TreeRecord:
        """Note an installed tree. Raises `StoreError`."""
        record = TreeRecord(
            ulid=ulid,
            root=root,
            path=path,
            package=str(manifest.package.id),
            version=manifest.package.version.normalized,
            manifest=manifest.id,
            label=label,
            installed=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        try:
            self._write("manifests", manifest.id, manifest.canonical)
            self._write("trees", f"{ulid}.json", msgspec.json.encode(record))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StoreError(f"{self.home}: {error.strerror or error}", full=full) from error
        return record

    def installed(self, root: str, manifest_id: ManifestId) -> TreeRecord | None:
        """The newest tree of this manifest under this root."""
        for record in self.trees():
            if record.manifest == manifest_id and record.root == root:
                return record
        return None

    def newest_of(self, ref: PackageRef) -> list[TreeRecord]:
        """Installed trees, those of the same package first, newest first: where to look for chunks."""
        return sorted(self.trees(), key=lambda record: record.package.lower() != ref.id.key)

    def _read_record(self, name: str) -> TreeRecord | None:
        try:
            with open(os.path.join(self.home, "trees", name), "rb") as file:
                return msgspec.json.decode(file.read(), type=TreeRecord)
        except (OSError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
            return None

    def _read_manifest(self, id: str) -> Manifest | None:
        try:
            with open(os.path.join(self.home, "manifests", parse_digest(id)), "rb") as file:
                return manifests.parse_named(file.read(), id)
        except (OSError, ManifestError, IdentityError):
            return None

    def _write(self, folder: str, name: str, data: bytes) -> None:
        path = os.path.join(self.home, folder)
        if not os.path.isdir(path):
            os.makedirs(self.home, mode=0o700, exist_ok=True)
            os.makedirs(path, mode=0o700, exist_ok=True)
            sync_folder(self.home)
        write_durably(os.path.join(path, name), data, mode=0o600)


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
