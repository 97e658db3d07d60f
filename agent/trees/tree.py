"""Build a package's tree beside the running one, out of verified chunks, so that a crash costs only what was in flight.

    <root>/releases/.incoming-<manifest digest>/    tree/  manifest.json  target  chunks  lock
    <root>/releases/<label>-<ulid>/                 the finished tree, renamed into place
    <root>/current                                  a link to one of them, moved by `switch`

`chunks` says which chunks were written (their indexes, little-endian u32, appended after each write). It is a hint:
when a build is taken up again, each chunk that it names is read back and hashed.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property

from agent import platform
from agent.disk import disk_errors, remove_folder
from relay.encoding.bundle import Places
from relay.encoding.choose_bases import Held
from relay.errors import ChunkInvalid, ChunkMissing, LockedError, StoreError
from relay.folders import is_ours, make_closed_folder, make_folder
from relay.package.chunk import Chunk
from relay.package.identity import ChunkId, ManifestId, chunk_id
from relay.package.manifest import Extent, Manifest, Part
from relay.package.ranges import from_indexes
from relay.support.durable import sync_folder, write_durably

EXTRA = "not part of the package"
"""What `check_tree` says of a file that something else put there: the package's own are untouched by it."""
_INDEX = struct.Struct("<I")
_ROOM_TO_SPARE = 16 << 20
"""Bytes that must stay free beside the tree itself, for folders and the agent's own state."""


class IncomingTree:
    """One build in progress. Blocking: call it in a thread. One process at a time (`lock`)."""

    def __init__(self, root: str, manifest: Manifest, target: str) -> None:
        """Start the build of `manifest` under `root`, or take it up where a crash left it.

        `target` is the folder's name in `releases/` in the end; a build that is taken up keeps the one it began with.

        Raises:
            LockedError: another process builds the same tree under this root.
            StoreError: the file system says no; `full` where it has no room for the tree, and then nothing is left of it.
            RefusedError: another user could write into the root or a folder of it.
        """
        self.manifest = manifest
        self.target = target
        self.releases = os.path.join(os.path.abspath(root), "releases")
        self.folder = _incoming(root, manifest)
        self.tree = os.path.join(self.folder, "tree")
        self.have: set[int] = set()
        # Two threads may write; a third may close or clear while one of them still does, or finishes.
        self._writing = threading.Lock()
        self._lock: int | None = None
        self._map: int | None = None
        try:
            with disk_errors(self.releases, full_hint=_FULL_HINT):
                self._open()
        except BaseException:
            self.close()
            raise

    @property
    def missing(self) -> list[int]:
        """Indexes of the chunks that are still to be written, each chunk once, in tree order."""
        return sorted(self.wanted - self.have)

    @cached_property
    def wanted(self) -> frozenset[int]:
        """The first index of every chunk of the tree."""
        return frozenset(self.manifest.index_of[id] for id in self._places)

    @property
    def is_moved(self) -> bool:
        """Whether a crash came between the last rename and the end: the tree stands where it belongs."""
        return not os.path.isdir(self.tree) and os.path.isdir(self._final)

    @property
    def _final(self) -> str:
        return os.path.join(self.releases, self.target)

    def write(self, chunk: Chunk) -> None:
        """Put a verified chunk everywhere it belongs. Raises `StoreError`."""
        index = self.manifest.index_of[chunk.id]
        with self._writing:
            if self._map is None:
                raise StoreError(f"the build in {self.folder} was given up")
            with disk_errors(self.folder, full_hint=_FULL_HINT):
                for place in self._places[chunk.id]:
                    self._write_at(place, chunk.data)
                os.write(self._map, _INDEX.pack(index))
            self.have.add(index)

    def finish(self) -> str:
        """Make the tree durable and rename it into place; its path.

        Raises:
            StoreError: it is not durable, and must not be built upon: after a failed sync, what can be read back is not
                what is on the disk. `clear` it.
        """
        assert not self.missing, "finish before all chunks are written"  # noqa: S101 - the caller's promise
        with self._writing, disk_errors(self.folder, full_hint=_FULL_HINT):
            if not self.is_moved:
                self._make_empty_parts()
                self._set_modes()
                platform.sync_tree(self.tree, self._files(), self._folders())
                os.rename(self.tree, self._final)
            sync_folder(self.releases)
        return self._final

    def clear(self) -> None:
        """Remove what the build needed; the tree itself stands elsewhere by now. (Also gives up a build.)"""
        with self._writing:
            remove_folder(self.folder)
            self._close()

    def close(self) -> None:
        """Let go of it; the build can be taken up again."""
        with self._writing:
            self._close()

    def _close(self) -> None:
        for descriptor in (self._map, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._lock = self._map = None

    # --- beginning

    def _open(self) -> None:
        make_folder(self.releases)
        make_closed_folder(self.folder)
        self._lock = platform.lock_file(os.path.join(self.folder, "lock"))
        if self._lock is None:
            raise LockedError(
                f"another process builds {self.manifest.package} in {self.releases} right now",
                hint="Wait until it is done",
            )
        self._begin()
        self._map = os.open(os.path.join(self.folder, "chunks"), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.have = self._take_up(self._map)
        self._check_room()

    def _begin(self) -> None:
        named = os.path.join(self.folder, "target")
        if os.path.exists(named):
            with open(named, encoding="utf-8") as file:
                self.target = file.read()
        else:
            write_durably(os.path.join(self.folder, "manifest.json"), self.manifest.canonical, mode=0o600)
            write_durably(named, self.target.encode(), mode=0o600)
        if self.is_moved and not is_whole(self._final, self.manifest):
            # It was never recorded, so nothing of ours names it; the crash took some of it along.
            remove_folder(self._final)
        if not self.is_moved:
            os.makedirs(self.tree, mode=0o755, exist_ok=True)

    def _take_up(self, map: int) -> set[int]:
        noted = platform.read_at(map, os.fstat(map).st_size, 0)
        whole = len(noted) - len(noted) % _INDEX.size
        # A torn tail would shift every entry that is appended after it.
        os.ftruncate(map, whole)
        if self.is_moved:
            return set(self.wanted)
        indexes = {index for (index,) in _INDEX.iter_unpack(noted[:whole])}
        return {index for index in indexes & self.wanted if self._is_written(index)}

    def _is_written(self, index: int) -> bool:
        id = self.manifest.chunk_id(index)
        return all(chunk_id(read_chunk(self.tree, self.manifest, place) or b"") == id for place in self._places[id])

    def _check_room(self) -> None:
        missing = self.missing
        if not missing:
            return
        chunks = self.manifest.chunks
        need = sum(chunks[i].size * len(self._places[self.manifest.chunk_id(i)]) for i in missing) + _ROOM_TO_SPARE
        free = platform.free_bytes(self.folder)
        if free < need:
            self.clear()
            raise StoreError(
                f"{self.manifest.package} needs {need >> 20} MiB under {self.releases}, {free >> 20} MiB are free",
                full=True,
                hint=_FULL_HINT,
            )

    # --- writing

    @cached_property
    def _places(self) -> dict[ChunkId, list[int]]:
        """Where in the tree's stream each chunk stands."""
        placed: dict[ChunkId, list[int]] = {}
        for i in self.manifest.tree_chunks:
            placed.setdefault(self.manifest.chunk_id(i), []).append(i)
        return placed

    def _write_at(self, place: int, data: bytes) -> None:
        view = memoryview(data)
        for extent in self.manifest.extents[place]:
            if self.manifest.is_in_tree(extent.part):
                with self._open_part(extent.part) as descriptor:
                    platform.write_at(descriptor, view[: extent.length], extent.offset)
            view = view[extent.length :]

    @contextmanager
    def _open_part(self, part: int) -> Iterator[int]:
        """A descriptor of the part's file, which is made, with its whole size, where it is not there."""
        path = self._path(part)
        try:
            descriptor = platform.open_for_writing(path)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
            descriptor = platform.open_for_writing(path)
        try:
            size = self.manifest.parts[part].size
            if os.fstat(descriptor).st_size != size:
                os.ftruncate(descriptor, size)
            yield descriptor
        finally:
            os.close(descriptor)

    # --- finishing

    def _make_empty_parts(self) -> None:
        for part in self.manifest.tree_parts:
            if self.manifest.parts[part].size == 0:
                with self._open_part(part):
                    pass

    def _set_modes(self) -> None:
        """The user of a service must be able to read what was installed for it, and the umask may forbid that."""
        for part in self.manifest.tree_parts:
            platform.set_mode(self._path(part), executable=self.manifest.parts[part].executable)
        for folder in self._folders():
            platform.set_mode(folder, executable=True)

    def _path(self, part: int) -> str:
        return os.path.join(self.tree, self.manifest.parts[part].path)

    def _files(self) -> Iterator[str]:
        return (self._path(part) for part in self.manifest.tree_parts)

    def _folders(self) -> Iterator[str]:
        return (folder for folder, _, _ in os.walk(self.tree))


def clear_leftovers(root: str, manifest: Manifest) -> None:
    """Remove what a crash left of a build whose tree stands and is recorded. Not while another process is at it."""
    folder = _incoming(root, manifest)
    with suppress(OSError):
        if os.path.islink(folder) or not is_ours(folder):
            return
        lock = platform.lock_file(os.path.join(folder, "lock"))
        if lock is not None:
            remove_folder(folder)
            os.close(lock)


def _incoming(root: str, manifest: Manifest) -> str:
    return os.path.join(os.path.abspath(root), "releases", f".incoming-{manifest.id}")


def read_chunk(tree: str, manifest: Manifest, index: int) -> bytes | None:
    """The bytes of one chunk out of a tree of `manifest`, not verified; None where the files are not as they should be,
    or the chunk holds a part that trees leave out.
    """
    try:
        return b"".join(_read_extent(tree, manifest, extent) for extent in manifest.extents[index])
    except OSError:
        return None


def _read_extent(tree: str, manifest: Manifest, extent: Extent) -> bytes:
    """Raises `OSError`, also where the file ends before."""
    path = os.path.join(tree, manifest.parts[extent.part].path)
    with os.fdopen(platform.open_for_reading(path), "rb", buffering=0) as file:
        piece = platform.read_at(file.fileno(), extent.length, extent.offset)
    if len(piece) != extent.length:
        raise OSError(f"{path} is shorter than it was")
    return piece


def take_from(tree: str, held: Manifest, wanted: set[ChunkId]) -> Iterator[Chunk]:
    """Those of `wanted` that the installed `tree` of `held` still has, hashed as they are read: an edited file is passed over."""
    for index in held.tree_chunks:
        id = held.chunk_id(index)
        if id not in wanted or held.index_of[id] != index:
            continue
        data = read_chunk(tree, held, index)
        if data is None:
            continue
        with suppress(ChunkInvalid):
            yield Chunk(id, data)


class TreeHoldings:
    """Chunks of installed trees, read through their manifests, for a sender of differences from them.

    Nothing keeps a tree from being edited or removed meanwhile: each chunk is hashed whenever it is read.
    """

    def __init__(self, trees: Sequence[tuple[str, Manifest]]) -> None:
        """`trees`: folders and their manifests, the best bases first. Reads every byte of them; blocking."""
        self._trees = {manifest.id: (tree, manifest) for tree, manifest in trees}
        self.held = tuple(
            Held(manifest, ranges)
            for tree, manifest in self._trees.values()
            if (ranges := from_indexes(_good_chunks(tree, manifest)))
        )

    async def load(self, places: Places) -> list[bytes]:
        """The chunks at `places`, in that order.

        Raises:
            ChunkMissing, ChunkInvalid: one is not there, or not as it was.
        """
        return await asyncio.to_thread(lambda: [self._read(id, index) for id, index in places])

    def _read(self, id: ManifestId, index: int) -> bytes:
        tree, manifest = self._trees[id]
        data = read_chunk(tree, manifest, index)
        if data is None:
            raise ChunkMissing(manifest.chunk_id(index))
        return Chunk(manifest.chunk_id(index), data).data


def _good_chunks(tree: str, manifest: Manifest) -> Iterator[int]:
    for index in manifest.tree_chunks:
        data = read_chunk(tree, manifest, index)
        if data is not None and chunk_id(data) == manifest.chunk_id(index):
            yield index


def check_tree(tree: str, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Compare an installed tree with its manifest, every byte: (path, what is wrong) for each difference.

    A folder that is missing is told by its files. Owners do not count: what they could change, the content tells.
    """
    yield from _damages(tree, manifest)
    expected = {*manifest.tree_paths} | _folders_of(manifest)
    for path in _files_below(tree):
        if path not in expected:
            yield path, EXTRA


def damage_in(tree: str, manifest: Manifest) -> str:
    """The first file or folder of the package that is not as it was installed, and how; empty for a whole tree.

    Reads every byte of it; what lies beside the package's own files does not count.
    """
    return next((f"{path}: {problem}" for path, problem in _damages(tree, manifest)), "")


def is_whole(tree: str, manifest: Manifest) -> bool:
    """Whether every file of the package is in the installed tree as it should be; others may lie beside them."""
    return not damage_in(tree, manifest)


def _damages(tree: str, manifest: Manifest) -> Iterator[tuple[str, str]]:
    if problem := _folder_problem(tree):
        yield ".", problem
    for folder in sorted(_folders_of(manifest)):
        if problem := _folder_problem(os.path.join(tree, folder)):
            yield folder, problem
    for index in manifest.tree_parts:
        part = manifest.parts[index]
        if problem := _file_problem(os.path.join(tree, part.path), part, manifest.part_sha256(index)):
            yield part.path, problem


def _folders_of(manifest: Manifest) -> set[str]:
    """Every folder that the package's files stand in, below the tree's own."""
    found: set[str] = set()
    for path in manifest.tree_paths:
        folder = os.path.dirname(path)
        while folder and folder not in found:
            found.add(folder)
            folder = os.path.dirname(folder)
    return found


def _folder_problem(path: str) -> str:
    try:
        found = os.lstat(path)
    except OSError:
        return ""
    if not stat.S_ISDIR(found.st_mode):
        return "not a folder"
    return _mode_problem(found, executable=True)


def _file_problem(path: str, part: Part, sha256: str) -> str:
    try:
        found = os.lstat(path)
    except OSError:
        return "missing"
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    if found.st_size != part.size:
        return f"{found.st_size} bytes, expected {part.size}"
    if bool(found.st_mode & 0o111) != part.executable:
        return "not executable" if part.executable else "executable"
    return _mode_problem(found, executable=part.executable) or _content_problem(path, sha256)


def _mode_problem(found: os.stat_result, *, executable: bool) -> str:
    if platform.has_mode(found, executable=executable):
        return ""
    return f"its permissions are {stat.S_IMODE(found.st_mode):04o}, expected {0o755 if executable else 0o644:04o}"


def _content_problem(path: str, sha256: str) -> str:
    try:
        with os.fdopen(platform.open_for_reading(path), "rb", buffering=0) as file:
            return "" if hashlib.file_digest(file, "sha256").hexdigest() == sha256 else "other content"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _files_below(tree: str) -> Iterator[str]:
    for folder, folders, files in os.walk(tree):
        for name in files + [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            yield os.path.relpath(os.path.join(folder, name), tree)


_FULL_HINT = "Make room there and pull again; nothing of it was left behind"
