"""What an application costs whose libraries the relay holds already, as packages of their own: counted on the line.

Run: python -m benchmarks.application [--packages DIR]… [--json]

From the newest version of each package that is found, the assemblies of one framework are laid out as `dotnet publish`
does, with a small application's own files beside them, and packed by `package pack`. A relay, a process, is sent the
packages first, and then, through a proxy that counts both directions, the application. A thin line is planned for.

The exit status is 1 where it took more than 1 % of its nupkg.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from benchmarks.pairs import THIN, Ours, Packed, Way, find, hold, send_counted, told_ours
from benchmarks.support.programs import add, pack, ref, relay
from benchmarks.support.report import Check, add_json, parser, show
from benchmarks.support.workload import SHARED
from relay.support.console import run

SHARE_MAX = 0.01
"""Of the application's nupkg."""
OWN_BYTES = 16 << 10
"""Of the application's own assembly, which does not compress here: as one of 40 KiB would."""
APPLICATION = ref("Shop.Orders", "1.0.0")
FRAMEWORKS = (
    *(f"net{number}.0" for number in (10, 9, 8, 7, 6)),
    *("netcoreapp3.1", "netstandard2.1", "netstandard2.0"),
)
"""What an application for .NET 10 takes of a package, the best first."""
_ASSEMBLY = re.compile(r"lib/([^/]+)/([^/]+\.dll)", re.IGNORECASE)


class Result(msgspec.Struct, frozen=True):
    """What it came to. Bytes.

    Attributes:
        nupkg: of the application.
        assemblies: how many libraries' assemblies are in it.
        packages: how many packages they come from, which the relay holds.
        ours: what crossed the line for it.
    """

    nupkg: int
    assemblies: int
    packages: int
    ours: Ours

    @property
    def check(self) -> Check:
        return Check(f"at most {100 * SHARE_MAX:.0f} %", self.ours.total, int(SHARE_MAX * self.nupkg))


def assemblies(names: Iterable[str]) -> list[str]:
    """The parts of a package that an application for the newest framework takes."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := _ASSEMBLY.fullmatch(name):
            found.setdefault(match[1].lower(), []).append(name)
    return next((found[framework] for framework in FRAMEWORKS if framework in found), [])


def publish(libraries: Iterable[Packed], folder: str) -> tuple[list[Packed], int]:
    """Lay the application out in `folder`: the packages that gave something, and the number of their assemblies."""
    used, names = [], set()
    for library in libraries:
        with zipfile.ZipFile(library.path) as archive:
            taken = assemblies(archive.namelist())
            for part in taken:
                names.add(os.path.basename(part))
                Path(folder, os.path.basename(part)).write_bytes(archive.read(part))
        if taken:
            used.append(library)
    _write_own(folder, used)
    return used, len(names)


def _write_own(folder: str, used: Sequence[Packed]) -> None:
    """What the application itself is: its assembly, its settings, and the list of what it depends on."""
    name = str(APPLICATION.id)
    Path(folder, f"{name}.dll").write_bytes(random.Random(name).randbytes(OWN_BYTES))
    settings = {"Logging": {"LogLevel": {"Default": "Information"}}, "AllowedHosts": "*"}
    runtime = {
        "runtimeOptions": {"tfm": "net10.0", "framework": {"name": "Microsoft.NETCore.App", "version": "10.0.0"}}
    }
    depends = {
        "libraries": {
            f"{library.ref.id}/{library.ref.version}": {
                "type": "package",
                "sha512": hashlib.sha512(Path(library.path).read_bytes()).hexdigest(),
            }
            for library in used
        }
    }
    files = {"appsettings.json": settings, f"{name}.runtimeconfig.json": runtime, f"{name}.deps.json": depends}
    for file, content in files.items():
        Path(folder, file).write_text(json.dumps(content, indent=2), encoding="utf-8")


def measure(folders: Sequence[str]) -> Result:
    """Pack it of what lies in `folders`, and send it where its libraries are.

    Raises:
        ValueError: no package there has an assembly.
    """
    libraries = [versions[-1] for folder in folders for versions in find(folder)]
    with tempfile.TemporaryDirectory(prefix="waystation-application-") as home:
        files = os.path.join(home, "publish")
        os.mkdir(files)
        used, count = publish(libraries, files)
        if not used:
            raise ValueError(f"no package with an assembly lies in {' or '.join(folders)}")
        nupkg = os.path.join(home, "application.nupkg")
        pack(files, str(APPLICATION.id), str(APPLICATION.version), nupkg)
        add(home, *(library.path for library in used), nupkg)
        with relay(os.path.join(home, "relay")) as served:
            run(hold(home, [library.ref for library in used], served.url))
            ours = run(send_counted(home, APPLICATION, served.url, way=Way(THIN)))
        return Result(os.path.getsize(nupkg), count, len(used), ours)


def told(result: Result) -> str:
    """For people."""
    return (
        f"{APPLICATION}: nupkg {result.nupkg:,} bytes, {result.assemblies} assemblies of {result.packages} packages that "
        f"the relay holds, and {OWN_BYTES:,} bytes of its own\n"
        f"over the line: {told_ours(result.ours, result.nupkg)}\n{result.check}"
    )


def main() -> int:
    """Measure, print, and judge: the exit status."""
    command = parser("application", __doc__)
    shared = [os.path.join(SHARED, name) for name in ("packages", "graph")]
    command.add_argument("--packages", action="append", metavar="DIR", help="where nupkgs lie; may be repeated")
    add_json(command)
    options = command.parse_args()
    try:
        result = measure(options.packages or shared)
    except ValueError as error:
        command.error(str(error))
    document = {"format": 1, "held": result.check.held} | msgspec.to_builtins(result)
    show(told(result), document, as_json=options.as_json)
    return 0 if result.check.held else 1


if __name__ == "__main__":
    sys.exit(main())
