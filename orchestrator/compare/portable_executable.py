"""What a portable executable (PE) says of its own making, and its bytes that differ where the code does not. Pure.

It is read by the layout of "PE Format" (Microsoft Learn) and, for the metadata root, ECMA-335 II.24.2. A deterministic
compiler says so by a debug directory entry of type 16 ("Reproducible").
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, NamedTuple


class Stamp(NamedTuple):
    """Bytes of a PE file that can differ where the code does not."""

    kind: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Assembly:
    """What a PE file says of its own making.

    Attributes:
        managed: whether it carries .NET metadata.
        deterministic: whether its maker says that the same source gives the same bytes.
        time: when it was built, seconds since 1970; a part of a hash where it is deterministic.
        pdb_path: where its symbols were when it was built, as written there.
        version: the product version, which .NET takes from AssemblyInformationalVersion.
        commit: the hash of a commit in that version.
        signature_bytes: of its Authenticode signature.
        stamps: in the file's order.
    """

    managed: bool
    deterministic: bool
    time: int
    pdb_path: str
    version: str
    commit: str
    signature_bytes: int
    stamps: tuple[Stamp, ...]

    @property
    def builds_path_in(self) -> bool:
        """Whether `pdb_path` is that of a folder on the build machine; `/_/` is what a mapped one begins with."""
        return bool(_ABSOLUTE.match(self.pdb_path)) and not self.pdb_path.startswith("/_")


_ABSOLUTE: Final = re.compile(r"/|\\\\|[A-Za-z]:[\\/]")
_SECTIONS_MAX: Final = 96
_DEBUG_MAX: Final = 64
_STREAMS_MAX: Final = 16
_HASH_MAX: Final = 1024
_PATH_MAX: Final = 4096
_RESOURCES_MAX: Final = 4 << 20
_COMMITS_MAX: Final = 64
_EXPORTS, _RESOURCES, _CERTIFICATES, _DEBUG, _CLI = 0, 2, 4, 6, 14
_CODE_VIEW, _REPRODUCIBLE, _PDB_CHECKSUM = 2, 16, 19
_NO_TIMES: Final = frozenset({0, 0xFFFFFFFF})
_PRODUCT_VERSION: Final = re.compile(
    re.escape("ProductVersion\0".encode("utf-16-le")) + rb"(?:\0\0){0,2}((?:[\x20-\x7e]\0){1,256})"
)
_COMMIT: Final = re.compile(r"(?<![0-9a-f])(?:[0-9a-f]{64}|[0-9a-f]{40})(?![0-9a-f])|(?<=[+.])g?[0-9a-f]{7,12}$")
"""A whole hash, or a short one at the end of a version: 1.4.2+3c877565bc."""


def read_assembly(data: bytes) -> Assembly | None:
    """What a PE file says of itself; None where `data` is none, or a damaged one. Never raises, whatever the bytes."""
    if not data.startswith(b"MZ"):
        return None
    try:
        return _PortableExecutable(data).assembly()
    except struct.error:
        return None


class _PortableExecutable:
    """Reads by offsets that the file itself names: each is checked by reading there, each list has a most."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._header = int(self._at("<I", 0x3C)[0])
        if data[self._header : self._header + 4] != b"PE\0\0":
            raise struct.error
        self._optional = self._header + 24
        (magic,) = self._at("<H", self._optional)
        if magic not in {0x10B, 0x20B}:
            raise struct.error
        directories = self._optional + (96 if magic == 0x10B else 112)
        (count,) = self._at("<I", directories - 4)
        self._directories = [self._pair(directories + 8 * i) for i in range(min(count, 16))]
        sections, size = self._at("<H", self._header + 6)[0], self._at("<H", self._header + 20)[0]
        first = self._optional + size
        self._sections = [self._at("<8s4I", first + 40 * i) for i in range(min(sections, _SECTIONS_MAX))]

    def assembly(self) -> Assembly:
        debug = list(self._debug_entries())
        types = {entry[4] for entry in debug}
        pdb = next((self._code_view(entry) for entry in debug if entry[4] == _CODE_VIEW), None)
        version = self._product_version()
        commit = found[0] if (found := _COMMIT.search(version)) else ""
        certificate, certificate_size = self._directory(_CERTIFICATES)
        (time,) = self._at("<I", self._header + 8)
        stamps = [
            Stamp("time", self._header + 8, 4),
            Stamp("checksum", self._optional + 64, 4),
            *self._debug_stamps(),
            *self._directory_times(),
            *self._metadata_stamps(),
            *self._commit_stamps(commit),
            *((Stamp("authenticode", certificate, certificate_size),) if certificate_size else ()),
        ]
        length = len(self._data)
        held = {Stamp(s.kind, s.start, min(s.size, length - s.start)) for s in stamps if s.start < length and s.size}
        return Assembly(
            managed=self._directory(_CLI)[1] > 0,
            deterministic=_REPRODUCIBLE in types or time in _NO_TIMES,
            time=time,
            pdb_path=pdb or "",
            version=version,
            commit=commit,
            signature_bytes=min(certificate_size, max(length - certificate, 0)),
            stamps=tuple(sorted(held, key=lambda stamp: (stamp.start, stamp.size))),
        )

    def _at(self, form: str, offset: int) -> tuple[int, ...]:
        return struct.unpack_from(form, self._data, offset)

    def _pair(self, offset: int) -> tuple[int, int]:
        first, second = self._at("<2I", offset)
        return first, second

    def _directory(self, index: int) -> tuple[int, int]:
        return self._directories[index] if index < len(self._directories) else (0, 0)

    def _offset(self, address: int) -> int:
        """Where an address of the loaded image lies in the file."""
        for _, virtual_size, virtual, raw_size, raw in self._sections:
            if virtual <= address < virtual + max(virtual_size, raw_size):
                return raw + address - virtual
        raise struct.error

    def _debug_places(self) -> Iterator[int]:
        address, size = self._directory(_DEBUG)
        if size:
            start = self._offset(address)
            yield from (start + 28 * i for i in range(min(size // 28, _DEBUG_MAX)))

    def _debug_entries(self) -> Iterator[tuple[int, ...]]:
        """Characteristics, time, major, minor, type, size, address, offset."""
        return (self._at("<2I2H4I", place) for place in self._debug_places())

    def _debug_stamps(self) -> Iterator[Stamp]:
        for place in self._debug_places():
            yield Stamp("time", place + 4, 4)
            *_, type, size, _, at = self._at("<2I2H4I", place)
            if type == _CODE_VIEW and self._data[at : at + 4] == b"RSDS":
                yield Stamp("pdb id", at + 4, 20)
                yield Stamp("pdb path", at + 24, min(max(size - 24, 0), _PATH_MAX))
            elif type in {_REPRODUCIBLE, _PDB_CHECKSUM}:
                yield Stamp("pdb id", at, min(size, _HASH_MAX))

    def _code_view(self, entry: tuple[int, ...]) -> str:
        size, at = entry[5], entry[7]
        if self._data[at : at + 4] != b"RSDS":
            return ""
        path = self._data[at + 24 : at + min(size, _PATH_MAX)]
        return path.split(b"\0", 1)[0].decode("utf-8", "replace")

    def _directory_times(self) -> Iterator[Stamp]:
        for index in (_EXPORTS, _RESOURCES):
            address, size = self._directory(index)
            if size >= 8:
                yield Stamp("time", self._offset(address) + 4, 4)

    def _metadata_stamps(self) -> Iterator[Stamp]:
        """The module's id (MVID), which is the first of the GUID heap, and the strong name."""
        address, size = self._directory(_CLI)
        if not size:
            return
        header = self._offset(address)
        strong_name, strong_name_size = self._pair(header + 32)
        if strong_name_size:
            yield Stamp("strong name", self._offset(strong_name), min(strong_name_size, _HASH_MAX))
        root = self._offset(self._pair(header + 8)[0])
        at = root + 16 + min(self._at("<I", root + 12)[0], 256)
        (streams,) = self._at("<H", at + 2)
        at += 4
        for _ in range(min(streams, _STREAMS_MAX)):
            offset, length = self._pair(at)
            name = self._data[at + 8 : at + 40].split(b"\0", 1)[0]
            if name == b"#GUID" and length >= 16:
                yield Stamp("mvid", root + offset, 16)
            at += 8 + (len(name) // 4 + 1) * 4

    def _product_version(self) -> str:
        address, size = self._directory(_RESOURCES)
        if not size:
            return ""
        start = self._offset(address)
        found = _PRODUCT_VERSION.search(self._data, start, start + min(size, _RESOURCES_MAX))
        return found[1].decode("utf-16-le") if found else ""

    def _commit_stamps(self, commit: str) -> Iterator[Stamp]:
        if not commit:
            return
        for form in (commit.encode(), commit.encode("utf-16-le")):
            at, left = self._data.find(form), _COMMITS_MAX
            while at >= 0 and left:
                yield Stamp("commit", at, len(form))
                at, left = self._data.find(form, at + len(form)), left - 1


def without_stamps(data: bytes, assembly: Assembly) -> bytes:
    """The file with zeros in place of every stamp: equal for two builds of the same code."""
    plain = bytearray(data)
    for stamp in assembly.stamps:
        plain[stamp.start : stamp.start + stamp.size] = bytes(stamp.size)
    return bytes(plain)


def rebuilt(data: bytes, assembly: Assembly, kinds: Iterable[str]) -> bytes:
    """The file as another build of the same source might leave it: other stamps of these kinds, the same each time."""
    wanted, other = set(kinds), bytearray(data)
    for stamp in assembly.stamps:
        if stamp.kind in wanted:
            text = _noise(f"{stamp.kind} {stamp.size}", stamp.size)
            if stamp.kind == "commit":
                is_wide = data[stamp.start + 1] == 0
                hexed = text.hex().encode()[: stamp.size >> is_wide]
                text = hexed.decode().encode("utf-16-le") if is_wide else hexed
            other[stamp.start : stamp.start + stamp.size] = text
    return bytes(other)


def _noise(seed: str, size: int) -> bytes:
    return b"".join(sha256(f"{seed} {i}".encode()).digest() for i in range(-(-size // 32)))[:size]
