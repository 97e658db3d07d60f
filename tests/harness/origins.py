"""Where packages enter: a depot with keys in this process, and a home that is used by its commands alone."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.process import Process, run
from orchestrator.depot.depot import Added, Depot, open_depot
from orchestrator.trust.keyring import init_trust, load_signer
from relay.package.identity import NuGetVersion, PackageId, PackageRef
from relay.package.manifest import Manifest
from relay.stores.catalog import Provenance

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

    from relay.trust.keys import TrustPins


@dataclass(frozen=True)
class Keys:
    """A trust folder: the package key as a signer, and the pins that agents get."""

    folder: str
    pins: TrustPins
    signer: CryptoSigner

    @property
    def pins_file(self) -> str:
        return os.path.join(self.folder, "trust.json")


def trust_keys(folder: str | os.PathLike[str]) -> Keys:
    """Fresh keys in `folder`, which must not be there yet (or be empty and private)."""
    name = os.fspath(folder)
    pins = init_trust(name)
    return Keys(name, pins, load_signer(name, "package"))


@dataclass(frozen=True)
class Origin:
    """An open depot with keys. `added` are the packages it was made with, in that order."""

    depot: Depot
    keys: Keys
    added: list[Added]

    async def add(self, nupkg: str) -> Added:
        """Listed, and proved that it can be made again."""
        added = await self.depot.add(nupkg, self.keys.signer, Provenance("added", nupkg))
        await self.depot.recipe(added.manifest)
        return added

    async def signature(self, manifest: Manifest) -> bytes:
        return await self.depot.catalog.signature(manifest.id)


@asynccontextmanager
async def depot_with(folder: str | os.PathLike[str], *nupkgs: str) -> AsyncIterator[Origin]:
    """A disk depot in `folder`/depot with keys in `folder`/trust, and `nupkgs` added to it. One origin a folder."""
    name = os.fspath(folder)
    trust = os.path.join(name, "trust")
    if os.path.exists(os.path.join(trust, "trust.json")):
        raise ValueError("this folder has keys already: one origin a folder")
    os.makedirs(name, exist_ok=True)
    async with open_depot(f"disk:{os.path.abspath(os.path.join(name, 'depot'))}") as depot:
        origin = Origin(depot, trust_keys(trust), [])
        for nupkg in nupkgs:
            origin.added.append(await origin.add(nupkg))
        yield origin


class OriginHome:
    """A Waystation home with keys and a depot."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.run("trust", "init")

    @property
    def pins(self) -> Path:
        """What every machine is given: trust.json."""
        return self.home / "trust" / "trust.json"

    def run(self, *words: str) -> Any:
        return run(self.home, *words, "--json").json

    def add(self, *nupkgs: str | os.PathLike[str]) -> list[dict[str, Any]]:
        added: list[dict[str, Any]] = self.run("package", "add", *map(str, nupkgs))["packages"]
        return added

    def replicating(self, id: str, version: str, *relays: str) -> Process:
        urls = [word for url in relays for word in ("--relay", url)]
        return Process(self.home, "package", "replicate", id, version, *urls, "--json")

    def replicate(self, id: str, version: str, *relays: str) -> dict[str, dict[str, Any]]:
        """The ledger of each relay, by URL."""
        document = self.replicating(id, version, *relays).result().json
        return {entry["relay"]: entry for entry in document["relays"]}

    async def manifest(self, id: str, version: str) -> Manifest:
        """As the depot keeps it, read past all commands."""
        ref = PackageRef(PackageId.parse(id), NuGetVersion.parse(version))
        async with open_depot(f"disk:{self.home / 'depot'}") as depot:
            return await depot.manifest(depot.catalog.get(ref))
