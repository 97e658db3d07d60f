"""A home where packages enter, used by its commands alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from harness.process import Process, run
from orchestrator.depot.depot import open_depot
from relay.package.identity import NuGetVersion, PackageId, PackageRef
from relay.package.manifest import Manifest


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
