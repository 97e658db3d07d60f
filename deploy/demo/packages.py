"""Packages with real weight: real ones where they are at hand, else packed from what every machine with Python has."""

from __future__ import annotations

import hashlib
import shutil
import sysconfig
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from benchmarks.peers import compare
from benchmarks.support.workload import installed_files
from relay.package.chunking import is_container

OTHER_WAYS = {"rdiff": "rdiff, as Octodiff", "rsync": "rsync", "nupkg": "the whole file"}
"""Peers that every new version is sent by, too, and what the demo calls them."""
PACKED_BYTES = 32 << 20
"""Of files in a package that the demo packs itself, about."""

_REAL = {
    "web": ("Shop.Web", "1.0.0", "1.0.1"),
    "runtime": ("Microsoft.AspNetCore.App.Runtime.linux-x64", "10.0.13", "10.0.14"),
}
_PACKED = {"web": ("Demo.Web", "1.0.0", "1.0.1"), "runtime": ("Demo.Runtime", "1.0.0", "1.0.1")}
_CHANGE = {"web": "one file was edited", "runtime": "its maker built all of it anew"}
_LABEL_MAX = 20


@dataclass(frozen=True, slots=True)
class Nupkg:
    """One version. `role` is what the demo calls the package, `folder` what it is still to be packed from, if at all."""

    role: str
    id: str
    version: str
    path: Path
    folder: Path | None = None

    def __str__(self) -> str:
        return f"{self.id} {self.version}"

    @property
    def label(self) -> str:
        """For tables: a long id without its beginning."""
        return str(self) if len(self.id) <= _LABEL_MAX else f"...{self.id[-_LABEL_MAX:]} {self.version}"

    @property
    def size(self) -> int:
        return self.path.stat().st_size


def find(name: str, shelf: Path) -> tuple[Nupkg, Nupkg] | None:
    """Two versions of the real package `name` on `shelf`; None where they are not there."""
    id, *versions = _REAL[name]
    first, second = (Nupkg(name, id, version, _on_shelf(shelf, f"{id}.{version}.nupkg")) for version in versions)
    return (first, second) if first.path.is_file() and second.path.is_file() else None


def gather(name: str, folder: Path) -> tuple[Nupkg, Nupkg]:
    """Two folders to pack below `folder`: files of this Python, and the same with one of them changed. Blocking."""
    id, *versions = _PACKED[name]
    folders = [folder / f"{id}-{version}" for version in versions]
    installed_files(str(folders[0]), PACKED_BYTES, sysconfig.get_path("stdlib" if name == "web" else "purelib"))
    shutil.copytree(folders[0], folders[1])
    files = [path for path in folders[1].rglob("*") if path.is_file()]
    # Where extensions fill the whole, there is no source among them.
    sources = [path for path in files if path.suffix == ".py"]
    changed = max(sources or files, key=lambda path: path.stat().st_size)
    with changed.open("ab") as file:
        file.write(b"# The next version.\n")
    first, second = (
        Nupkg(name, id, version, folder / f"{id}.{version}.nupkg", files)
        for version, files in zip(versions, folders, strict=True)
    )
    return first, second


def told_change(new: Nupkg) -> str:
    """In words, how a new version differs from the one before; of files that were packed here, honestly."""
    if new.folder is not None:
        return (
            "packed here of Python's own files, one of which has a line more. No real rebuild, which changes them all"
        )
    return _CHANGE[new.role]


def other_ways(old: Nupkg, new: Nupkg) -> dict[str, int | None]:
    """What each of `OTHER_WAYS` really sends where `old` is and `new` is to be; None where it is not here. Blocking."""
    found = compare(str(old.path), str(new.path), only=tuple(OTHER_WAYS))
    return {name: found.of(peer).bytes for peer, name in OTHER_WAYS.items()}


def digests_of(nupkg: Path) -> dict[str, bytes]:
    """SHA-256 of each file that an installed tree should hold, by its path, as Python's zipfile reads the nupkg."""
    with zipfile.ZipFile(nupkg) as archive:
        return {
            unquote(name): hashlib.sha256(archive.read(name)).digest()
            for name in archive.namelist()
            if not is_container(name)
        }


def differences(tree: Path, wanted: Mapping[str, bytes]) -> list[str]:
    """Paths that are missing in the tree, of which it knows too much, or whose bytes are others."""
    there = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    odd = [p for p in wanted.keys() & there if hashlib.sha256((tree / p).read_bytes()).digest() != wanted[p]]
    return sorted([*odd, *(wanted.keys() ^ there)])


def _on_shelf(shelf: Path, name: str) -> Path:
    """The file in any case of letters: feeds lower the names, people do not."""
    return next((path for path in shelf.glob("*.nupkg") if path.name.lower() == name.lower()), shelf / name)
