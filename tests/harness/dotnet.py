"""NuGet itself as the measure: what the real dotnet client restores, and lays down."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from harness.nupkgs import Raw, canonical_zip
from harness.packages import nuspec
from harness.paths import SHARED

CLIENT: Final = SHARED / "clients" / "dotnet-client.tar.xz"

needs_dotnet = pytest.mark.skipif(not CLIENT.is_file(), reason="no dotnet client in ../shared/data")

_PROJECT: Final = """<Project Sdk="Microsoft.NET.Sdk">
  <PropertyGroup>
    <TargetFramework>net10.0</TargetFramework>
    <RestoreSources>{folder}/feed</RestoreSources>
    <RestorePackagesPath>{folder}/packages</RestorePackagesPath>
  </PropertyGroup>
  <ItemGroup><PackageReference Include="{id}" Version="[{version}]" /></ItemGroup>
</Project>"""
_ALL: Final = """<Project>
  <ItemGroup>{projects}</ItemGroup>
  <Target Name="All"><MSBuild Projects="@(One)" Targets="Restore" ContinueOnError="true" /></Target>
</Project>"""


def restore(folder: Path, nupkgs: Mapping[str, bytes], id: str, version: str) -> dict[str, dict[str, bytes] | None]:
    """What one run of dotnet lays down of each nupkg, which all are `id` and `version`; None where it does not restore.

    Each has a feed of its own, in which B 1.0.0 and 2.0.0 stand as well.
    """
    places = {name: folder / str(number) for number, name in enumerate(nupkgs)}
    for name, place in places.items():
        _write_project(place, nupkgs[name], id, version)
    projects = "".join(f'<One Include="{place}/one.csproj" />' for place in places.values())
    (folder / "all.proj").write_text(_ALL.format(projects=projects))
    (folder / "nuget.config").write_text("<configuration><packageSources><clear /></packageSources></configuration>")
    shutil.unpack_archive(CLIENT, folder, filter="data")
    command = f". '{folder}/dotnet-client/env.sh' && cd '{folder}' && dotnet msbuild all.proj -t:All -v:q -nologo"
    environment = {"PATH": os.environ["PATH"], "CLIENT_HOME": str(folder / "home")}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert any(map(_is_restored, places.values())), done.stdout + done.stderr
    return {name: _laid(place, id, version) if _is_restored(place) else None for name, place in places.items()}


def _write_project(place: Path, nupkg: bytes, id: str, version: str) -> None:
    (place / "feed").mkdir(parents=True)
    (place / "feed" / f"{id}.{version}.nupkg").write_bytes(nupkg)
    for other in ("1.0.0", "2.0.0"):
        (place / "feed" / f"B.{other}.nupkg").write_bytes(canonical_zip(Raw("B.nuspec", nuspec("B", other))))
    (place / "one.csproj").write_text(_PROJECT.format(folder=place, id=id, version=version))


def _is_restored(place: Path) -> bool:
    assets = place / "obj" / "project.assets.json"
    logs = json.loads(assets.read_bytes()).get("logs", []) if assets.is_file() else [{"level": "Error"}]
    return not any(entry["level"] == "Error" for entry in logs)


def _laid(place: Path, id: str, version: str) -> dict[str, bytes]:
    """Without what NuGet writes there itself."""
    tree = place / "packages" / id.lower() / version
    own = {f"{id}.{version}.nupkg".lower(), f"{id}.{version}.nupkg.sha512".lower(), ".nupkg.metadata"}
    files = {path.relative_to(tree).as_posix(): path for path in tree.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in own}
