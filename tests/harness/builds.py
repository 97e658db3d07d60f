"""Two builds of one package, made for comparing them: nupkgs with their container, and executables."""

from __future__ import annotations

import random
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from harness.packages import noise, nuspec
from harness.paths import SHARED
from orchestrator.compare.diff import OpenedPackage
from orchestrator.compare.read_package import NamedPackage, opened_packages

REAL = SHARED / "packages"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
RANDOM = "package/services/metadata/core-properties/%s.psmdcp"


def real(name: str) -> str:
    path = REAL / f"{name}.nupkg"
    if not path.exists():
        pytest.skip(f"no {name} in ../shared/data/packages")
    return str(path)


@contextmanager
def opener() -> Iterator[Callable[..., list[OpenedPackage]]]:
    """A function that opens nupkgs as the commands do."""
    with ExitStack() as stack:

        def open_(*paths: str) -> list[OpenedPackage]:
            named = [NamedPackage(path, path) for path in paths]
            return stack.enter_context(opened_packages(named, "", lambda _: lambda *_: None))

        yield open_


def write(
    path: Path,
    files: Mapping[str, bytes],
    *,
    time: tuple[int, int, int, int, int, int] = (1980, 1, 1, 0, 0, 0),
    level: int = 6,
    version: str = "1.0.0",
    psmdcp: str = "",
    commit: str = "",
) -> str:
    """A nupkg with a container as NuGet makes it, in this order."""
    spec = nuspec("Acme.Web", version)
    if commit:
        spec = spec.replace(b"</metadata>", f'<repository type="git" commit="{commit}" /></metadata>'.encode())
    parts = {"_rels/.rels": f"<Relationships>/{RANDOM % psmdcp}</Relationships>".encode(), "Acme.Web.nuspec": spec}
    parts |= files
    if psmdcp:
        parts[RANDOM % psmdcp] = b"<coreProperties />" * 20
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            info = zipfile.ZipInfo(name, time)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data, compresslevel=level)
    return str(path)


def executable(
    code: bytes = b"",
    *,
    time: int = 0x60000000,
    mvid: bytes = bytes(range(16)),
    deterministic: bool = True,
    pdb: str = "/_/src/Web.pdb",
    version: str = f"1.0.0+{COMMIT}",
    certificate: bytes = b"",
    managed: bool = True,
) -> bytes:
    """A PE file with one section, laid out by "PE Format"; nothing runs it."""
    at, address = 512, 0x2000
    body = bytearray()

    def put(data: bytes) -> int:
        """Its address in the loaded image."""
        place = address + len(body)
        body.extend(data + bytes(-len(data) % 4))
        return place

    put(code or random.Random("code").randbytes(20_000))
    guids = b"BSJB" + struct.pack("<2H2I", 1, 1, 0, 12) + b"v4.0.30319\0\0" + struct.pack("<2H", 0, 1)
    guids += struct.pack("<2I", len(guids) + 16, 16) + b"#GUID\0\0\0" + mvid
    metadata = put(guids)
    cli = put(struct.pack("<I2H2I", 72, 2, 5, metadata, len(guids)) + bytes(56))
    view = b"RSDS" + mvid[::-1] + struct.pack("<I", 1) + pdb.encode() + b"\0"
    entries = [(2, len(view), put(view))] + ([(16, 0, 0)] if deterministic else [])
    debug = put(
        b"".join(
            struct.pack("<2I2H4I", 0, time, 0, 0, kind, size, rva, rva - address + at if rva else 0)
            for kind, size, rva in entries
        )
    )
    told = "ProductVersion\0".encode("utf-16-le") + b"\0\0" + f"{version}\0".encode("utf-16-le")
    resources = put(bytes(16) + told)
    body.extend(bytes(-len(body) % 512))
    directories = [(0, 0)] * 16
    directories[2] = (resources, 16 + len(told))
    directories[6] = (debug, 28 * len(entries))
    directories[14] = (cli, 72) if managed else (0, 0)
    directories[4] = (at + len(body), len(certificate)) if certificate else (0, 0)
    optional = struct.pack("<H", 0x10B) + bytes(90) + struct.pack("<I", 16)
    optional += b"".join(struct.pack("<2I", *each) for each in directories)
    head = b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0"
    head += struct.pack("<2H3I2H", 0x14C, 1, time, 0, 0, len(optional), 0x2102) + optional
    head += struct.pack("<8s4I", b".text", len(body), address, len(body), at) + bytes(16)
    return head.ljust(at, b"\0") + bytes(body) + certificate


FILES = {
    "lib/a/web.dll": noise("web", 300_000),
    "lib/a/10.0.13/old.dll": noise("old", 100_000),
    "content/logo.png": noise("logo", 80_000),
    "content/keep.txt": b"keep\n" * 1000,
    "content/drop.txt": b"drop\n" * 10,
}
