"""NuGet's own client out of ../shared/data/clients, as an oracle: what it lays down of a nupkg."""

from __future__ import annotations

import os
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

from harness.paths import SHARED

ARCHIVE = SHARED / "clients" / "dotnet-client.tar.xz"
VERSION = "1.0.0"
_PROJECT = """<Project Sdk="Microsoft.NET.Sdk"><PropertyGroup><TargetFramework>net10.0</TargetFramework></PropertyGroup>
<ItemGroup>{items}</ItemGroup></Project>"""
_CONFIG = '<configuration><packageSources><clear/><add key="here" value="{feed}"/></packageSources></configuration>'
_RESTORE = '. "$0/dotnet-client/env.sh" && cd "$1" && dotnet restore'
_MARK = ".nupkg.metadata"
"""What the client writes last: without it, a package is not installed."""


class DotnetClient:
    """The client, unpacked in `folder`. Each restore has a home of its own below it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._restores = 0
        with tarfile.open(ARCHIVE) as archive:
            archive.extraction_filter = getattr(tarfile, "tar_filter", None)
            archive.extractall(folder)  # noqa: S202 - the project's own data

    def lay_down(self, nupkgs: Mapping[str, bytes]) -> dict[str, dict[str, bytes] | None]:
        """The files of each package, by id, as the client lays them down; None where it refuses the package.

        What the client makes itself is left out: its marks, the nupkg, and the nuspec under a name of its own.
        A package that it refuses ends a restore: those that came to nothing are tried again alone.
        """
        found = self._restore(nupkgs)
        if len(nupkgs) > 1:
            found |= {id: self._restore({id: nupkgs[id]})[id] for id, files in found.items() if files is None}
        return found

    def _restore(self, nupkgs: Mapping[str, bytes]) -> dict[str, dict[str, bytes] | None]:
        self._restores += 1
        home = self._folder / str(self._restores)
        feed, project = home / "feed", home / "project"
        feed.mkdir(parents=True)
        project.mkdir()
        for id, data in nupkgs.items():
            (feed / f"{id}.{VERSION}.nupkg").write_bytes(data)
        items = "".join(f'<PackageDownload Include="{id}" Version="[{VERSION}]" />' for id in nupkgs)
        (project / "p.csproj").write_text(_PROJECT.format(items=items))
        (project / "nuget.config").write_text(_CONFIG.format(feed=feed))
        command = ["bash", "-c", _RESTORE, self._folder, project]
        subprocess.run(command, env=os.environ | {"CLIENT_HOME": str(home)}, capture_output=True, check=False)
        return {id: _files_of(home / "packages" / id.lower() / VERSION, id.lower()) for id in nupkgs}


def _files_of(folder: Path, id: str) -> dict[str, bytes] | None:
    if not (folder / _MARK).exists():
        return None
    made = {_MARK, f"{id}.{VERSION}.nupkg", f"{id}.{VERSION}.nupkg.sha512", f"{id}.nuspec"}
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {path: file.read_bytes() for path, file in files.items() if path not in made}
