"""Two builds of one package side by side: which parts changed, and what that costs on a line. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

from relay.encoding.bundle import RUN_AND_BASES_MAX, Span, plan_runs
from relay.encoding.choose_bases import Held, choose_bases
from relay.encoding.codecs import Coding, encode
from relay.package.chunking import is_container, mask
from relay.package.manifest import Manifest, to_wire
from relay.package.ranges import indexes

RUN_BYTES: Final = 16 << 20
"""Tree stream in one run, as a thin line has it."""
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
class OpenedPackage:
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


def compare_parts(old: OpenedPackage, new: OpenedPackage) -> list[PartChange]:
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
    """Container parts with names that mean nothing (`….psmdcp`) are told apart by their folder and extension."""
    if not is_container(path):
        return ""
    folder, _, name = path.lower().rpartition("/")
    return f"{folder}/{name.rpartition('.')[2]}"


def _mode(package: OpenedPackage, path: str) -> bool:
    return package.manifest.parts[package.index_of[path]].executable


# --- what that costs on a line


@dataclass(frozen=True, slots=True)
class BasedRun:
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


def plan(old: Manifest, new: Manifest) -> list[BasedRun]:
    """The runs in which the new package goes to a relay that holds all of the old one, and nothing else."""
    lacking = new_chunks(old, new)
    held = [Held(old, ((0, len(old.chunks)),))] if old.chunks else []
    runs = []
    for run in plan_runs([(index, new.chunks[index].size) for index in lacking], RUN_BYTES):
        size = sum(new.chunks[index].size for index in run)
        bases = choose_bases(new, run, held, most=RUN_AND_BASES_MAX - size, missing=lacking)
        runs.append(BasedRun(tuple(run), bases, size))
    return runs


def payload_bytes(old: OpenedPackage, new: OpenedPackage, run: BasedRun, coding: Coding) -> int:
    """Bytes of one run, really encoded. Without bases a delta is no way to send: then it is the plain form. Blocking."""
    base = b"".join(_chunk(old, index) for span in run.bases for index in indexes(span.ranges))
    data = b"".join(_chunk(new, index) for index in run.chunks)
    if coding.needs_bases and not base:
        coding = Coding("zstd", coding.level)
    return _encoded(coding, data, base if coding.needs_bases else b"")


def _chunk(package: OpenedPackage, index: int) -> bytes:
    return package.read(package.manifest.chunk_starts[index], package.manifest.chunks[index].size)


def manifest_bytes(old: Manifest, new: Manifest) -> int:
    """Bytes of the new manifest on the wire, as the difference from the old one."""
    return 0 if old.id == new.id else len(to_wire(new.canonical, old.canonical))


def rsync_like_bytes(old: OpenedPackage, new: OpenedPackage) -> int:
    """What goes over where only the zip's own bytes are compared: every part whose compressed bytes are not in the old file.

    A little less than what such tools really send, as the records around the parts are not counted.
    """
    held = {part.compressed_sha256 for part in old.zip_parts}
    return sum(part.compressed_size for part in new.zip_parts if part.compressed_sha256 not in held)


def delta_bytes(base: bytes, new: bytes) -> int:
    """The size of `new` as its smallest difference from `base`; 0 where they are equal. Blocking."""
    if base == new:
        return 0
    return _encoded(_SMALLEST, new, base) if base else plain_bytes(new)


def plain_bytes(data: bytes) -> int:
    """The size of `data` as its smallest form that builds on nothing. Blocking."""
    return _encoded(_PLAIN_SMALLEST, data)


def part_delta_bytes(old: OpenedPackage, new: OpenedPackage, change: PartChange) -> int:
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
