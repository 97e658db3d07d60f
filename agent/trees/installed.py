"""What an agent knows between runs, in its home: which trees it installed, and their manifests.

<home>/agent.yaml            configuration
<home>/trust.json            the keys that it believes
<home>/relays.json           what it knows of the relays
<home>/trees/<ulid>.json     one installed tree
<home>/manifests/<sha256>    their manifests
<home>/signatures/<sha256>   the envelopes that vouch for them, by the manifest's digest
<home>/settled/<hash>.json   what was found good under one root, and how it was made so
<home>/cursors.json          how far the mail of each relay was taken
<home>/scripts/              root of the packages that hold scripts
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from agent.config import AgentConfig
from agent.disk import REMOVED, damage_of, disk_errors, read_json, remove_all, remove_folder
from agent.relays.dns import check_discovery
from agent.relays.tokens import relay_key
from relay.errors import IdentityError, ManifestError, UsageError
from relay.folders import make_folder
from relay.package import manifest as manifests
from relay.package.identity import ManifestId, PackageRef, parse_digest
from relay.package.manifest import Manifest
from relay.protocol.followed import Followed
from relay.protocol.messages import Cursor
from relay.support.durable import sync_folder, write_durably
from relay.trust.envelopes import ENVELOPE_MAX
from relay.trust.keys import TrustPins, parse_pins
from relay.written.decode import fit
from relay.written.yaml_positions import load_settings

CURSORS = "cursors.json"


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


class Settled(msgspec.Struct, frozen=True):
    """A tree that was found good: what `settle` remembers of a root.

    `fingerprint` is of all that was done to make it run; `before` is the path of the tree that was good before it.
    """

    root: str
    path: str
    manifest: str
    fingerprint: str
    before: str = ""


@dataclass(frozen=True)
class AgentState:
    """Reads and writes an agent's home. Blocking, small files."""

    home: str

    @property
    def scripts_root(self) -> str:
        """Where packages of scripts are installed."""
        return os.path.join(self.home, "scripts")

    def config(self) -> AgentConfig:
        """Raises `UsageError`."""
        path = os.path.join(self.home, "agent.yaml")
        config: AgentConfig = fit(load_settings(path), AgentConfig).value if os.path.exists(path) else AgentConfig()
        try:
            check_config(config)
        except UsageError as error:
            raise UsageError(f"{path}: {error.message}", hint=error.hint) from error
        for root in config.roots:
            if not os.path.isabs(root):
                raise UsageError(f"{path}: roots: expected absolute folders, not {root!r}")
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

    def followed_pins(self) -> Followed[TrustPins]:
        """The pinned keys of now, for a process that lives long. Raises as `pins`, and where there are none."""

        def read() -> TrustPins:
            pins = self.pins()
            if pins is None:
                raise UsageError(
                    f"{self.home} holds no trust.json, so every order would be refused",
                    hint="Put the origin's trust.json beside agent.yaml, or use 'agent init --trust FILE'",
                )
            return pins

        path = os.path.join(self.home, "trust.json")
        return Followed(path, (path,), read)

    def trees(self) -> list[TreeRecord]:
        """Installed trees that are still there, newest first."""
        found = []
        for name in _names(os.path.join(self.home, "trees")):
            if not name.endswith(".json"):
                continue
            record = read_json(os.path.join(self.home, "trees", name), TreeRecord)
            if record is not None and os.path.isdir(record.path):
                found.append(record)
        return sorted(found, key=lambda record: record.ulid, reverse=True)

    def damages(self) -> list[str]:
        """What of the home cannot be read, and what mends it: a sentence each. Work goes on as if it were not there."""
        trees, settled = os.path.join(self.home, "trees"), os.path.join(self.home, "settled")
        kinds: tuple[tuple[list[str], object, str], ...] = (
            (
                _files(trees),
                TreeRecord,
                "The tree that it named is not known any more: pull its package again, then remove it",
            ),
            (_files(settled), Settled, "Its root counts as not settled until the next deployment writes it anew"),
            (
                [os.path.join(self.home, CURSORS)],
                dict[str, Cursor],
                "Letters are read again from the first: none is obeyed twice",
            ),
        )
        return [
            f"{path} is damaged ({damage}). {mends}"
            for paths, type, mends in kinds
            for path in paths
            if (damage := damage_of(path, type))
        ]

    def manifest(self, record: TreeRecord) -> Manifest | None:
        """The manifest of an installed tree; None where it is lost or damaged."""
        try:
            with open(os.path.join(self.home, "manifests", parse_digest(record.manifest)), "rb") as file:
                return manifests.parse_named(file.read(), record.manifest)
        except (OSError, ManifestError, IdentityError):
            return None

    def signature(self, manifest: str) -> bytes:
        """The envelope that came with a manifest, not verified; empty where none is kept."""
        try:
            with open(os.path.join(self.home, "signatures", parse_digest(manifest)), "rb") as file:
                return file.read(ENVELOPE_MAX)
        except (OSError, IdentityError):
            return b""

    def keep_signature(self, manifest: ManifestId, envelope: bytes) -> None:
        """Keep the envelope that vouches for a manifest. Raises `StoreError`."""
        self._write("signatures", manifest, envelope)

    def record(
        self, manifest: Manifest, *, ulid: str, root: str, path: str, label: str, signature: bytes = b""
    ) -> TreeRecord:
        """Note an installed tree, and the envelope that vouches for it. Raises `StoreError`."""
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
        self._write("manifests", manifest.id, manifest.canonical)
        if signature:
            self._write("signatures", manifest.id, signature)
        self._write("trees", f"{ulid}.json", msgspec.json.encode(record))
        return record

    def installed(self, root: str, manifest_id: ManifestId) -> TreeRecord | None:
        """The newest tree of this manifest under this root."""
        return next((each for each in self.trees() if each.manifest == manifest_id and each.root == root), None)

    def find(self, manifest: str) -> TreeRecord | None:
        """The newest tree of this manifest, wherever it is."""
        return next((record for record in self.trees() if record.manifest == manifest), None)

    def settled(self, root: str) -> Settled | None:
        """What was last found good under this root; None where nothing was."""
        return read_json(os.path.join(self.home, "settled", _settled_name(root)), Settled)

    def settle(self, record: TreeRecord, fingerprint: str) -> Settled:
        """Remember that this tree is good, and which was before it. Raises `StoreError`."""
        last = self.settled(record.root)
        # Another tree of the same manifest was damaged, and is nothing to go back to.
        before = "" if last is None else last.before if last.manifest == record.manifest else last.path
        settled = Settled(record.root, record.path, record.manifest, fingerprint, before)
        self._write("settled", _settled_name(record.root), msgspec.json.encode(settled))
        return settled

    def prune(self, root: str, keep: int, spared: Collection[str]) -> list[TreeRecord]:
        """Remove the trees under `root` but the newest `keep` and those whose paths are `spared`; which are gone.

        Of several trees of one manifest only the newest is kept: those before it were damaged, or it would not be there.
        """
        _finish_removals(os.path.join(root, "releases"))
        here = [record for record in self.trees() if record.root == root]
        kept = list({record.manifest: record for record in reversed(here)}.values())
        kept = sorted(kept, key=lambda record: record.ulid, reverse=True)[:keep]
        gone = [record for record in here if record not in kept and record.path not in spared]
        for record in gone:
            # The record first: a tree without one takes room, a record without its tree would be built upon.
            with suppress(OSError):
                os.unlink(os.path.join(self.home, "trees", f"{record.ulid}.json"))
                remove_folder(record.path)
        self._forget_manifests({record.manifest for record in gone})
        return gone

    def _forget_manifests(self, manifests: set[str]) -> None:
        for manifest in manifests - {record.manifest for record in self.trees()}:
            for folder in ("manifests", "signatures"):
                with suppress(OSError):
                    os.unlink(os.path.join(self.home, folder, manifest))

    def newest_of(self, ref: PackageRef) -> Iterator[tuple[str, Manifest]]:
        """Installed trees and their manifests, of the same package first, newest first: where to look for chunks."""
        for record in sorted(self.trees(), key=lambda record: record.package.lower() != ref.id.key):
            if manifest := self.manifest(record):
                yield record.path, manifest

    def _write(self, folder: str, name: str, data: bytes) -> None:
        path = os.path.join(self.home, folder)
        with disk_errors(self.home):
            if not os.path.isdir(path):
                make_folder(path, mode=0o700)
                sync_folder(self.home)
            write_durably(os.path.join(path, name), data, mode=0o600)


def _settled_name(root: str) -> str:
    return f"{hashlib.sha256(root.encode()).hexdigest()[:40]}.json"


def check_config(config: AgentConfig) -> None:
    """Whether relays can be looked for, and are named as they must be. Raises `UsageError`."""
    check_discovery(config)
    for relay in (*config.tokens, *config.plain_http):
        relay_key(relay)


def _finish_removals(releases: str) -> None:
    """Those that a crash interrupted."""
    for name in _names(releases):
        if name.startswith(REMOVED):
            remove_all(os.path.join(releases, name))


def _files(folder: str) -> list[str]:
    """The JSON files in `folder`; what stands in the folder's own place, where it is none."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        return [folder]
    return [os.path.join(folder, name) for name in sorted(_names(folder)) if name.endswith(".json")]


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
