"""Two builds of one package side by side: which parts changed, what that costs on a line, and what made them differ. Pure.

What is told of a portable executable (PE) is read by the layout of "PE Format" (Microsoft Learn) and, for the metadata
root, ECMA-335 II.24.2. A deterministic compiler says so by a debug directory entry of type 16 ("Reproducible").
Part names, times and their cures: NuGet/Home#6229, #8601, and the design of #14785 (NuGet 7.9).
"""

from __future__ import annotations

import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from typing import Final, Literal, NamedTuple

from relay.content.bases import Held, choose_bases
from relay.content.chunking import is_container, mask
from relay.content.encodings import Coding, encode
from relay.content.frames import RUN_AND_BASES_MAX, Span, plan_runs
from relay.content.manifest import Manifest, to_wire
from relay.content.nupkg import is_root_nuspec
from relay.content.ranges import indexes

RUN_BYTES: Final = 16 << 20
"""Tree stream in one run, as a thin line has it."""
ASSEMBLY_MAX: Final = 32 << 20
"""Bytes. A larger part is not looked into."""
_AROUND: Final = 8 << 20
"""Bytes of the old part on either side of a piece of the new one, where a part is too large for one run."""
_SMALLEST: Final = Coding.parse("hdiff")
_PLAIN_SMALLEST: Final = Coding.parse("zstd:19")


# --- a package, opened


@dataclass(frozen=True, slots=True)
class ZipPart:
    """One part as it lies in the file. `compressed_sha256` is of its bytes there, `records` counts those around them.

    `stamped` is (year, month, day, hour, minute, second), empty where it could not be read.
    """

    path: str
    size: int
    compressed_size: int
    compressed_sha256: str
    stamped: tuple[int, ...]
    records: int


@dataclass(frozen=True)
class Package:
    """A package to be compared. `zip_parts` are in the file's order; `read(offset, size)` gives bytes of the tree stream."""

    name: str
    manifest: Manifest
    zip_parts: tuple[ZipPart, ...]
    read: Callable[[int, int], bytes]

    @cached_property
    def index_of(self) -> Mapping[str, int]:
        """A part's place in the manifest, by its path."""
        return {part.path: index for index, part in enumerate(self.manifest.parts)}

    @cached_property
    def zip_part(self) -> Mapping[str, ZipPart]:
        return {part.path: part for part in self.zip_parts}

    def part(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """Bytes of a part, inflated; to its end where no `size` is given."""
        index = self.index_of[path]
        whole = self.manifest.parts[index].size
        offset = min(max(offset, 0), whole)
        size = whole - offset if size is None else min(size, whole - offset)
        return self.read(self.manifest.part_starts[index] + offset, size)


# --- which parts changed

Change = Literal["added", "changed", "moved", "copied", "removed"]
CHANGES: Final[tuple[Change, ...]] = ("added", "changed", "moved", "copied", "removed")


@dataclass(frozen=True, slots=True)
class PartChange:
    """One part that is not where and what it was. Sizes are bytes, 0 where there is no such part.

    `moved` and `copied` parts have the same bytes under another path (and the old one went, or stays). A `changed` part
    whose `old_path` differs was renamed as well. `delta_bytes` is what its own difference takes, where that was measured.
    """

    change: Change
    path: str
    old_path: str
    size: int
    old_size: int
    compressed_size: int
    container: bool
    delta_bytes: int | None = None


def compare_parts(old: Package, new: Package) -> list[PartChange]:
    """What changed, in the order of the new tree stream, then what was removed. Unchanged parts are left out."""
    old_digests = {part.path: old.manifest.part_sha256(i) for i, part in enumerate(old.manifest.parts)}
    new_digests = {part.path: new.manifest.part_sha256(i) for i, part in enumerate(new.manifest.parts)}
    gone = [path for path in old_digests if path not in new_digests]
    fresh = [path for path in new_digests if path not in old_digests]
    moved = _pair(gone, fresh, old_digests.__getitem__, new_digests.__getitem__)
    holders = {digest: path for path, digest in old_digests.items()}
    copied = {path: holders[new_digests[path]] for path in fresh if path not in moved and new_digests[path] in holders}
    rest_old = [path for path in gone if path not in moved.values()]
    rest_new = [path for path in fresh if path not in moved and path not in copied]
    renamed = _pair(rest_old, rest_new, mask, mask)
    renamed |= _pair(
        [path for path in rest_old if path not in renamed.values()],
        [path for path in rest_new if path not in renamed],
        _container_kind,
        _container_kind,
    )

    def told(change: Change, path: str, old_path: str) -> PartChange:
        after = new.manifest.parts[new.index_of[path]] if path in new_digests and change != "removed" else None
        before = old.manifest.parts[old.index_of[old_path]] if old_path else None
        zipped = new.zip_part.get(path) if after else None
        return PartChange(
            change,
            path,
            old_path,
            after.size if after else 0,
            before.size if before else 0,
            zipped.compressed_size if zipped else 0,
            is_container(path),
        )

    found = []
    for path, digest in new_digests.items():
        if path in moved:
            found.append(told("moved", path, moved[path]))
        elif path in copied:
            found.append(told("copied", path, copied[path]))
        elif path in renamed:
            found.append(told("changed", path, renamed[path]))
        elif path not in old_digests:
            found.append(told("added", path, ""))
        elif digest != old_digests[path] or _mode(old, path) != _mode(new, path):
            found.append(told("changed", path, path))
    removed = [path for path in rest_old if path not in renamed.values()]
    return found + [told("removed", path, path) for path in removed]


def _pair(
    gone: Iterable[str], fresh: Iterable[str], old_key: Callable[[str], str], new_key: Callable[[str], str]
) -> dict[str, str]:
    """New paths to old ones with the same key, in order; paths whose key is empty pair with none."""
    waiting: defaultdict[str, list[str]] = defaultdict(list)
    for path in gone:
        waiting[old_key(path)].append(path)
    pairs = {}
    for path in fresh:
        key = new_key(path)
        if key and waiting.get(key):
            pairs[path] = waiting[key].pop(0)
    return pairs


def _container_kind(path: str) -> str:
    """Container parts with names that mean nothing (`….psmdcp`) are told by their folder and extension."""
    if not is_container(path):
        return ""
    folder, _, name = path.lower().rpartition("/")
    return f"{folder}/{name.rpartition('.')[2]}"


def _mode(package: Package, path: str) -> bool:
    return package.manifest.parts[package.index_of[path]].executable


# --- what that costs on a line


@dataclass(frozen=True, slots=True)
class Run:
    """Chunks of the new package that go together, and the chunks of the old one that they build on. Sizes are bytes."""

    chunks: tuple[int, ...]
    bases: tuple[Span, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Chunks:
    """How many chunks a holder of the old package has of the new one, and how many are new to it. Sizes are bytes."""

    kept: int
    kept_bytes: int
    new: int
    new_bytes: int


def new_chunks(old: Manifest, new: Manifest) -> list[int]:
    """Chunks of `new` that a holder of `old` lacks, each named once, in stream order."""
    held = set(old.chunk_ids())
    return [index for id, index in new.index_of.items() if id not in held]


def count_chunks(old: Manifest, new: Manifest) -> Chunks:
    """Each chunk counted once, however often it stands in the package."""
    lacking = set(new_chunks(old, new))
    sizes = {index: new.chunks[index].size for index in new.index_of.values()}
    lacking_bytes = sum(sizes[index] for index in lacking)
    return Chunks(len(sizes) - len(lacking), sum(sizes.values()) - lacking_bytes, len(lacking), lacking_bytes)


def plan(old: Manifest, new: Manifest) -> list[Run]:
    """The runs in which the new package goes to a relay that holds all of the old one, and nothing else."""
    lacking = new_chunks(old, new)
    held = [Held(old, ((0, len(old.chunks)),))] if old.chunks else []
    runs = []
    for run in plan_runs([(index, new.chunks[index].size) for index in lacking], RUN_BYTES):
        size = sum(new.chunks[index].size for index in run)
        bases = choose_bases(new, run, held, most=RUN_AND_BASES_MAX - size, missing=lacking)
        runs.append(Run(tuple(run), bases, size))
    return runs


def payload_bytes(old: Package, new: Package, run: Run, coding: Coding) -> int:
    """Bytes of one run, really encoded. Without bases a delta is no way to send: then it is the plain form. Blocking."""
    base = b"".join(_chunk(old, index) for span in run.bases for index in indexes(span.ranges))
    data = b"".join(_chunk(new, index) for index in run.chunks)
    if coding.needs_bases and not base:
        coding = Coding("zstd", coding.level)
    return _encoded(coding, data, base if coding.needs_bases else b"")


def _chunk(package: Package, index: int) -> bytes:
    return package.read(package.manifest.chunk_starts[index], package.manifest.chunks[index].size)


def manifest_bytes(old: Manifest, new: Manifest) -> int:
    """Bytes of the new manifest on the wire, as the difference from the old one."""
    return 0 if old.id == new.id else len(to_wire(new.canonical, old.canonical))


def rsync_like_bytes(old: Package, new: Package) -> int:
    """What goes over where only the zip's own bytes are compared: every part whose compressed bytes are not in the old file.

    A little less than what such tools really send, as the records around the parts are not counted.
    """
    held = {part.compressed_sha256 for part in old.zip_parts}
    return sum(part.compressed_size for part in new.zip_parts if part.compressed_sha256 not in held)


def delta_bytes(base: bytes, new: bytes) -> int:
    """The size of `new` as its smallest difference from `base`; 0 where they are equal. Blocking."""
    if base == new:
        return 0
    return _encoded(_SMALLEST, new, base) if base else _encoded(_PLAIN_SMALLEST, new)


def part_delta_bytes(old: Package, new: Package, change: PartChange) -> int:
    """What the difference of one part takes, sent alone. A part longer than a run is taken in pieces. Blocking."""
    if change.change not in {"added", "changed"}:
        return 0
    total = 0
    for start in range(0, change.size, RUN_BYTES):
        before = min(start, _AROUND)
        base = b""
        if change.old_path:
            base = old.part(change.old_path, start - before, before + RUN_BYTES + _AROUND)
        piece = new.part(change.path, start, RUN_BYTES)
        if base[before : before + len(piece)] != piece:
            total += delta_bytes(base, piece)
    return total


def _encoded(coding: Coding, data: bytes, base: bytes = b"") -> int:
    return sum(map(len, encode(coding, data, base)))


# --- what an assembly carries besides its code


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


# --- lint

Rule = Literal[
    "random-part-name",
    "pack-time",
    "member-order",
    "encoder",
    "assembly-stamp",
    "build-path",
    "commit-stamp",
    "authenticode",
    "signature",
]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that makes two builds of the same source differ.

    Attributes:
        rule: a short stable word.
        part: its path; empty where it concerns several parts, or the package.
        what: for people.
        mend: what to set or to do.
        our_bytes: what it costs a line as we send it; None where only a second build would tell.
        zip_bytes: the same where only the zip's own bytes are compared (rsync, Octodiff, casync).
        is_note: whether it may well be so by purpose.
    """

    rule: Rule
    part: str
    what: str
    mend: str
    our_bytes: int | None
    zip_bytes: int | None
    is_note: bool = False


@dataclass(frozen=True, slots=True)
class Lint:
    """What was found, mendable things first. `other_parts` counts those that changed for no reason of these; None alone."""

    findings: tuple[Finding, ...]
    other_parts: int | None

    @property
    def can_be_mended(self) -> bool:
        return any(not finding.is_note for finding in self.findings)


MENDS: Final[Mapping[Rule, str]] = {
    "random-part-name": "pack with NuGet 7.9 or newer: <Deterministic>true</Deterministic>, or nuget pack -Deterministic",
    "pack-time": "pack with NuGet 7.9 or newer and give it the time of the commit: <DeterministicTimestamp>, or the "
    "variable SOURCE_DATE_EPOCH",
    "member-order": "pack the same list of files in the same order, on the same system",
    "encoder": "pack with the same .NET SDK on the same system: each has a deflate of its own",
    "assembly-stamp": "build with <Deterministic>true</Deterministic> and without * in AssemblyVersion; link native code "
    "with /Brepro",
    "build-path": "build with <ContinuousIntegrationBuild>true</ContinuousIntegrationBuild>, which sets "
    "<DeterministicSourcePaths>: paths then begin with /_/",
    "commit-stamp": "nothing, if versions should name their commit; else "
    "<IncludeSourceRevisionInInformationalVersion>false</IncludeSourceRevisionInInformationalVersion>",
    "authenticode": "nothing, if files must be signed: each signature carries its time",
    "signature": "nothing: a signature carries its time",
}
_RANDOM_NAME: Final = re.compile(r"[0-9a-f]{32}\.psmdcp", re.IGNORECASE)
_RELATIONSHIPS: Final = "_rels/.rels"
_SIGNATURE: Final = ".signature.p7s"
_NO_DAY: Final = (1980, 1, 1)
_NUSPEC_MAX: Final = 1 << 20
_NUSPEC_COMMIT: Final = re.compile(rb'commit="([0-9a-f]{64}|[0-9a-f]{40})"')
_OTHER_HEX: Final = bytes.maketrans(b"0123456789abcdef", b"83f1c6d09e4a7b25")
_OF_A_BUILD: Final = frozenset({"time", "checksum", "pdb id", "mvid", "strong name"})
"""Stamps that come new with each build that is not deterministic."""
_SHOWN: Final = 3

Progress = Callable[[int, int], None]
"""Called with (bytes of parts looked at, bytes of all)."""


class _Group:
    """Parts to which one note applies, and what they cost together: differences of many parts share much."""

    def __init__(self, rule: Rule, what: str) -> None:
        self._rule = rule
        self._what = what
        self._paths: list[str] = []
        self._ours: int | None = 0
        self._zips: int | None = None
        self._base = bytearray()
        self._data = bytearray()

    def add(self, path: str, zip_bytes: int | None = None, *, base: bytes = b"", data: bytes = b"") -> None:
        """One more part. `base` and `data` are what the note changed, from and to; nothing where that is not known."""
        self._paths.append(path)
        if zip_bytes is not None:
            self._zips = zip_bytes + (self._zips or 0)
        if not base:
            self._ours = None
        self._base += base
        self._data += data
        if len(self._data) >= RUN_BYTES:
            self._measure()

    def note(self) -> Iterator[Finding]:
        """The one finding of all parts, if there are any."""
        if self._base:
            self._measure()
        if self._paths:
            what = f"{_several(self._paths)}: {self._what}"
            part = self._paths[0] if len(self._paths) == 1 else ""
            yield Finding(self._rule, part, what, MENDS[self._rule], self._ours, self._zips, is_note=True)

    def _measure(self) -> None:
        if self._ours is not None:
            self._ours += delta_bytes(bytes(self._base), bytes(self._data))
        self._base.clear()
        self._data.clear()


def _several(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:_SHOWN])
    return shown if len(paths) <= _SHOWN else f"{shown} and {len(paths) - _SHOWN} more"


def _groups() -> tuple[_Group, _Group, _Group]:
    return (
        _Group("build-path", "a path of the build machine in the debug directory"),
        _Group("commit-stamp", "the hash of a commit in the version"),
        _Group("authenticode", "signed file by file"),
    )


def lint_alone(package: Package, progress: Progress | None = None) -> Lint:
    """What will make the next build of the same source differ.

    What it costs is tried: the same part with other stamps. Blocking.
    """
    found = [*_random_name_alone(package), *_time_alone(package)]
    placed, committed, signed = groups = _groups()
    done, whole = 0, package.manifest.stream_size
    for part in package.manifest.parts:
        done += part.size
        data = _worth_reading(package, part.path)
        zipped = _compressed(package, part.path)
        if (assembly := read_assembly(data)) is not None:
            if not assembly.deterministic:
                cost = delta_bytes(data, rebuilt(data, assembly, _OF_A_BUILD))
                found.append(_not_deterministic(part.path, assembly, cost, zipped))
            if assembly.builds_path_in:
                placed.add(part.path)
            if assembly.commit:
                committed.add(part.path, zipped, base=data, data=rebuilt(data, assembly, _OF_A_BUILD | {"commit"}))
            if assembly.signature_bytes:
                signed.add(part.path, zipped)
        elif _NUSPEC_COMMIT.search(data):
            other = _NUSPEC_COMMIT.sub(lambda match: b'commit="' + match[1].translate(_OTHER_HEX) + b'"', data)
            committed.add(part.path, zipped, base=data, data=other)
        if progress:
            progress(done, whole)
    found += [note for group in groups for note in group.note()]
    if _SIGNATURE in package.index_of:
        size = package.zip_part[_SIGNATURE].size
        found.append(_signature(_encoded(_PLAIN_SMALLEST, package.part(_SIGNATURE)), size))
    return Lint(_in_order(found), None)


def lint_pair(old: Package, new: Package, progress: Progress | None = None) -> Lint:
    """What made two builds differ, as far as it is not their source; costs are measured. Blocking."""
    found = [*_random_name_pair(old, new), *_time_pair(old, new), *_order_pair(old, new), *_encoder_pair(old, new)]
    placed, committed, signed = groups = _groups()
    changes = compare_parts(old, new)
    done, whole, explained = 0, max(sum(change.size for change in changes), 1), 0
    for change in changes:
        if change.change == "changed":
            explained += _is_of_names(change, found)
            data, base = _worth_reading(new, change.path), _worth_reading(old, change.old_path)
            after, before = read_assembly(data), read_assembly(base)
            if after and before:
                zipped, both = change.compressed_size, {"base": base, "data": data}
                same_code = without_stamps(data, after) == without_stamps(base, before)
                explained += same_code
                # Where the code changed too, nobody can tell what the stamps alone would have cost.
                known = both if same_code else {}
                if not (after.deterministic and before.deterministic):
                    cost = delta_bytes(base, data) if same_code else None
                    found.append(_not_deterministic(change.path, after, cost, zipped))
                if after.pdb_path != before.pdb_path and (after.builds_path_in or before.builds_path_in):
                    placed.add(change.path, zipped, **known)
                if after.commit != before.commit:
                    committed.add(change.path, zipped, **known)
                if after.signature_bytes and before.signature_bytes:
                    signatures = _certificate(base, before), _certificate(data, after)
                    signed.add(change.path, zipped, base=signatures[0], data=signatures[1])
            elif _NUSPEC_COMMIT.findall(data) != _NUSPEC_COMMIT.findall(base):
                committed.add(change.path, change.compressed_size, base=base, data=data)
                explained += _NUSPEC_COMMIT.sub(b"", data) == _NUSPEC_COMMIT.sub(b"", base)
            elif change.path == _SIGNATURE:
                explained += 1
                found.append(_signature(part_delta_bytes(old, new, change), change.size))
        done += change.size
        if progress:
            progress(done, whole)
    found += [note for group in groups for note in group.note()]
    moved = sum(change.change in {"moved", "copied"} for change in changes)
    return Lint(_in_order(found), len(changes) - explained - moved)


def _in_order(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """What can be mended first, the dearest first."""
    return tuple(sorted(found, key=lambda each: (each.is_note, -(each.zip_bytes or 0), each.rule, each.part)))


def _worth_reading(package: Package, path: str) -> bytes:
    """The part, where it may say something of its own making; else nothing."""
    size = package.manifest.parts[package.index_of[path]].size
    if is_root_nuspec(path):
        return package.part(path) if size <= _NUSPEC_MAX else b""
    is_executable = size <= ASSEMBLY_MAX and package.part(path, 0, 2) == b"MZ"
    return package.part(path) if is_executable else b""


def _compressed(package: Package, path: str) -> int:
    return package.zip_part[path].compressed_size


def _certificate(data: bytes, assembly: Assembly) -> bytes:
    place = next(stamp for stamp in assembly.stamps if stamp.kind == "authenticode")
    return data[place.start : place.start + place.size]


def _not_deterministic(path: str, assembly: Assembly, our_bytes: int | None, zip_bytes: int) -> Finding:
    built = datetime.fromtimestamp(assembly.time, UTC).date().isoformat()
    kind = "assembly" if assembly.managed else "native file"
    what = f"the {kind} is not built deterministically: it is stamped {built}, and anew with each build"
    return Finding("assembly-stamp", path, what, MENDS["assembly-stamp"], our_bytes, zip_bytes)


def _signature(our_bytes: int, zip_bytes: int) -> Finding:
    what = "the package is signed"
    return Finding("signature", _SIGNATURE, what, MENDS["signature"], our_bytes, zip_bytes, is_note=True)


def _random_name(package: Package) -> str:
    """The part that NuGet named by a GUID, or nothing."""
    paths = (path for path in package.index_of if is_container(path))
    return next((path for path in paths if _RANDOM_NAME.fullmatch(path.rpartition("/")[2])), "")


def _random_name_alone(package: Package) -> Iterator[Finding]:
    if path := _random_name(package):
        name = path.rpartition("/")[2]
        other = name[:32].lower().encode().translate(_OTHER_HEX) + name[32:].encode()
        relationships = package.part(_RELATIONSHIPS) if _RELATIONSHIPS in package.index_of else b""
        cost = delta_bytes(relationships, relationships.replace(name.encode(), other))
        yield _named_at_random(package, path, "a name that is new with each pack", cost)


def _random_name_pair(old: Package, new: Package) -> Iterator[Finding]:
    before, after = _random_name(old), _random_name(new)
    if before != after and (path := after or before):
        both = _RELATIONSHIPS in old.index_of and _RELATIONSHIPS in new.index_of
        cost = delta_bytes(old.part(_RELATIONSHIPS), new.part(_RELATIONSHIPS)) if both else 0
        yield _named_at_random(new if after else old, path, "one of the two names is random, or both", cost)


def _named_at_random(package: Package, path: str, what: str, our_bytes: int) -> Finding:
    parts = [package.zip_part[p] for p in (path, _RELATIONSHIPS) if p in package.zip_part]
    zip_bytes = sum(part.compressed_size + part.records for part in parts)
    what = f"{what}; the relationship to it in {_RELATIONSHIPS} follows"
    return Finding("random-part-name", path, what, MENDS["random-part-name"], our_bytes, zip_bytes)


def _is_of_names(change: PartChange, found: Iterable[Finding]) -> bool:
    """Whether the part changed because another has a random name."""
    names = any(finding.rule == "random-part-name" for finding in found)
    return names and change.path == _RELATIONSHIPS


def _time_alone(package: Package) -> Iterator[Finding]:
    times = {part.stamped for part in package.zip_parts if part.stamped and part.stamped[:3] != _NO_DAY}
    if times:
        what = f"the parts carry {_times(times)}: if that is when it was packed, it is new with each pack"
        # NuGet from 7.9 on may have been given this time on purpose: the file cannot tell.
        may_be_given = len(times) == 1 and not _random_name(package)
        yield _stamped(what, _records(package), is_note=may_be_given)


def _time_pair(old: Package, new: Package) -> Iterator[Finding]:
    pairs = [(old.zip_part[path], part) for path, part in new.zip_part.items() if path in old.zip_part]
    differing = [(before, after) for before, after in pairs if before.stamped != after.stamped]
    if differing:
        before, after = (_times({pair[i].stamped for pair in differing}) for i in (0, 1))
        what = f"{len(differing)} of {len(pairs)} parts carry other times: {after}, before {before}"
        yield _stamped(what, sum(part.records for _, part in differing))


def _stamped(what: str, records: int, *, is_note: bool = False) -> Finding:
    return Finding("pack-time", "", what, MENDS["pack-time"], 0, records, is_note)


def _times(times: Iterable[tuple[int, ...]]) -> str:
    known = sorted(time for time in times if time)
    if not known:
        return "no time"
    first = "{:04}-{:02}-{:02} {:02}:{:02}:{:02}".format(*known[0])
    return f"the time {first}" if len(known) == 1 else f"{len(known)} times from {first} on"


def _records(package: Package) -> int:
    return sum(part.records for part in package.zip_parts)


def _order_pair(old: Package, new: Package) -> Iterator[Finding]:
    before = [path for path in old.zip_part if path in new.zip_part]
    after = [path for path in new.zip_part if path in old.zip_part]
    if before != after:
        first = next(path for path, other in zip(after, before, strict=True) if path != other)
        what = f"the parts lie in another order, from {first} on"
        yield Finding("member-order", "", what, MENDS["member-order"], 0, _records(new))


def _encoder_pair(old: Package, new: Package) -> Iterator[Finding]:
    """Parts with the same bytes that another deflate packed."""
    differing = [
        part
        for path, part in new.zip_part.items()
        if path in old.zip_part
        and part.compressed_sha256 != old.zip_part[path].compressed_sha256
        and new.manifest.part_sha256(new.index_of[path]) == old.manifest.part_sha256(old.index_of[path])
    ]
    if differing:
        what = f"the same bytes, compressed otherwise: {_several([part.path for part in differing])}"
        zip_bytes = sum(part.compressed_size for part in differing)
        yield Finding("encoder", "", what, MENDS["encoder"], 0, zip_bytes)
