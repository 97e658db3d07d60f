"""Build a package's tree beside the running one, out of verified chunks, so that a crash costs only what was in flight.

    <root>/releases/.incoming-<manifest digest>/    tree/  manifest.json  target  chunks  lock
    <root>/releases/<label>-<ulid>/                 the finished tree, renamed into place
    <root>/current                                  a link to one of them, moved by `switch`

`chunks` says which chunks were written (their indexes, little-endian u32, appended after each write). It is a hint:
when a build is taken up again, each chunk that it names is read back and hashed.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
from collections.abc import Iterable, Iterator

from agent import platform
from relay.content.chunk import Chunk
from relay.content.identity import ChunkId, chunk_id
from relay.content.manifest import Extent, Manifest
from relay.durable import sync_folder, write_durably
from relay.errors import LockedError, StoreError, UntrustedError

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
            StoreError: `full` where the disk has no room for it; nothing was begun then.
            UntrustedError: somebody else could have written into the build's folder.
        """
        self.manifest = manifest
        self.releases = os.path.join(os.path.abspath(root), "releases")
        self.folder = os.path.join(self.releases, f".incoming-{manifest.id}")
        self.tree = os.path.join(self.folder, "tree")
        os.makedirs(self.releases, exist_ok=True)
        _make_private(self.folder)
        self._lock = platform.lock_file(os.path.join(self.folder, "lock"))
        if self._lock is None:
            raise LockedError(
                f"another process builds {manifest.package} under {root} right now", hint="Wait until it is done"
            )
        self.target = self._begin(target)
        self._map = os.open(os.path.join(self.folder, "chunks"), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.have: set[int] = self._take_up()
        self.resumed = len(self.have)
        self._check_room()

    @property
    def missing(self) -> list[int]:
        """Indexes of the chunks that are still to be written, each chunk once, in tree order."""
        first = self.manifest.index_of
        wanted = {first[self.manifest.chunk_id(i)] for i in range(self.manifest.tree_chunks)}
        return sorted(wanted - self.have)

    @property
    def is_moved(self) -> bool:
        """Whether a crash came between the last rename and the end: the tree stands where it belongs."""
        return not os.path.isdir(self.tree) and os.path.isdir(os.path.join(self.releases, self.target))

    def write(self, chunk: Chunk) -> None:
        """Put a verified chunk everywhere it belongs. Raises `StoreError`."""
        index = self.manifest.index_of[chunk.id]
        try:
            for place in self._places(chunk.id):
                self._write_at(place, chunk.data)
            os.write(self._map, _INDEX.pack(index))
        except OSError as error:
            raise _store_error(error, self.folder) from error
        self.have.add(index)

    def finish(self) -> str:
        """Make the tree durable and rename it into place; its path. All chunks must be written. Raises `StoreError`."""
        assert not self.missing, "finish before all chunks are written"
        final = os.path.join(self.releases, self.target)
        try:
            if not self.is_moved:
                self._make_empty_parts()
                self._set_modes()
                platform.sync_tree(self.tree, self._files(), self._folders())
                os.rename(self.tree, final)
                sync_folder(self.releases)
        except OSError as error:
            raise _store_error(error, self.folder) from error
        return final

    def clear(self) -> None:
        """Remove what the build needed; the tree itself stands elsewhere by now. (Also gives up a build.)"""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let go of it; the build can be taken up again."""
        for descriptor in (self._lock, self._map):
            if descriptor is not None:
                os.close(descriptor)
        self._lock = None
        self._map = None  # type: ignore[assignment] - closed for good

    # --- beginning

    def _begin(self, target: str) -> str:
        named = os.path.join(self.folder, "target")
        if os.path.exists(named):
            with open(named, encoding="utf-8") as file:
                return file.read()
        write_durably(os.path.join(self.folder, "manifest.json"), self.manifest.canonical, mode=0o600)
        os.makedirs(self.tree, mode=0o755, exist_ok=True)
        write_durably(named, target.encode(), mode=0o600)
        return target

    def _take_up(self) -> set[int]:
        noted = os.pread(self._map, os.fstat(self._map).st_size, 0)
        whole = len(noted) - len(noted) % _INDEX.size
        indexes = {index for (index,) in _INDEX.iter_unpack(noted[:whole])}
        os.ftruncate(self._map, whole)
        if self.is_moved:
            return set(self.missing_indexes())
        return {i for i in indexes if i < self.manifest.tree_chunks and self._is_written(i)}

    def missing_indexes(self) -> Iterator[int]:
        """Every tree chunk's first index."""
        for i in range(self.manifest.tree_chunks):
            yield self.manifest.index_of[self.manifest.chunk_id(i)]

    def _is_written(self, index: int) -> bool:
        id = self.manifest.chunk_id(index)
        return all(chunk_id(read_chunk(self.tree, self.manifest, place) or b"") == id for place in self._places(id))

    def _check_room(self) -> None:
        need = sum(self.manifest.chunks[i].size for i in self.missing) + _ROOM_TO_SPARE
        room = os.statvfs(self.folder)
        free = room.f_bavail * room.f_frsize
        if free < need and self.missing:
            if not self.have:
                self.clear()
            raise StoreError(
                f"{self.manifest.package} needs {need >> 20} MiB under {self.releases}, {free >> 20} MiB are free",
                full=True,
                hint="Make room there; what is already there is kept",
            )

    # --- writing

    def _places(self, id: ChunkId) -> list[int]:
        return self._all_places.get(id, [])

    @property
    def _all_places(self) -> dict[ChunkId, list[int]]:
        if not hasattr(self, "_placed"):
            placed: dict[ChunkId, list[int]] = {}
            for i in range(self.manifest.tree_chunks):
                placed.setdefault(self.manifest.chunk_id(i), []).append(i)
            self._placed = placed
        return self._placed

    def _write_at(self, place: int, data: bytes) -> None:
        view = memoryview(data)
        for extent in self.manifest.extents[place]:
            descriptor = self._open_part(extent.part)
            try:
                written = 0
                while written < extent.length:
                    written += os.pwrite(descriptor, view[written : extent.length], extent.offset + written)
            finally:
                os.close(descriptor)
            view = view[extent.length :]

    def _open_part(self, part: int) -> int:
        path = self._path(part)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o644)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
            descriptor = os.open(path, flags, 0o644)
        size = self.manifest.parts[part].size
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, size)
        return descriptor

    # --- finishing

    def _make_empty_parts(self) -> None:
        for part in range(self.manifest.tree_parts):
            if self.manifest.parts[part].size == 0:
                os.close(self._open_part(part))

    def _set_modes(self) -> None:
        for part in range(self.manifest.tree_parts):
            os.chmod(self._path(part), 0o755 if self.manifest.parts[part].executable else 0o644)

    def _path(self, part: int) -> str:
        return os.path.join(self.tree, self.manifest.parts[part].path)

    def _files(self) -> Iterator[str]:
        return (self._path(part) for part in range(self.manifest.tree_parts))

    def _folders(self) -> Iterator[str]:
        return (folder for folder, _, _ in os.walk(self.tree))


def read_chunk(tree: str, manifest: Manifest, index: int) -> bytes | None:
    """The bytes of one chunk out of a tree of `manifest`, not verified; None where the files are not as they should be."""
    pieces = []
    for extent in manifest.extents[index]:
        piece = _read_extent(os.path.join(tree, manifest.parts[extent.part].path), extent)
        if piece is None:
            return None
        pieces.append(piece)
    return b"".join(pieces)


def _read_extent(path: str, extent: Extent) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        piece = os.pread(descriptor, extent.length, extent.offset)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return piece if len(piece) == extent.length else None


def take_from(tree: str, held: Manifest, wanted: set[ChunkId]) -> Iterator[Chunk]:
    """Those of `wanted` that the installed `tree` of `held` still has, hashed as they are read: an edited file is passed over."""
    for index in range(held.tree_chunks):
        id = held.chunk_id(index)
        if id not in wanted or held.index_of[id] != index:
            continue
        data = read_chunk(tree, held, index)
        if data is not None and chunk_id(data) == id:
            yield Chunk.of(data)


def check_tree(tree: str, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Compare an installed tree with its manifest, every byte: (path, what is wrong) for each difference."""
    expected = {part.path for part in manifest.parts[: manifest.tree_parts]}
    bad_chunks: set[str] = set()
    for index in range(manifest.tree_chunks):
        data = read_chunk(tree, manifest, index)
        if data is None or chunk_id(data) != manifest.chunk_id(index):
            bad_chunks.update(_blame(tree, manifest, index))
    for part in manifest.parts[: manifest.tree_parts]:
        path = os.path.join(tree, part.path)
        try:
            found = os.lstat(path)
        except OSError:
            yield part.path, "missing"
            continue
        if not stat.S_ISREG(found.st_mode):
            yield part.path, "not a regular file"
        elif found.st_size != part.size:
            yield part.path, f"{found.st_size} bytes, expected {part.size}"
        elif part.path in bad_chunks:
            yield part.path, "other content"
        elif bool(found.st_mode & 0o111) != part.executable:
            yield part.path, "not executable" if part.executable else "executable"
    for path in _files_below(tree):
        if path not in expected:
            yield path, "not part of the package"


def _blame(tree: str, manifest: Manifest, index: int) -> Iterable[str]:
    """Which parts of a bad chunk are bad: by their own digests, where the chunk gathers several."""
    from hashlib import sha256

    for extent in manifest.extents[index]:
        part = manifest.parts[extent.part]
        if len(manifest.extents[index]) == 1:
            yield part.path
            continue
        data = _read_extent(os.path.join(tree, part.path), Extent(extent.part, 0, part.size))
        if data is None or sha256(data).hexdigest() != manifest.part_sha256(extent.part):
            yield part.path


def _files_below(tree: str) -> Iterator[str]:
    for folder, folders, files in os.walk(tree):
        for name in files + [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            yield os.path.relpath(os.path.join(folder, name), tree)


def _make_private(folder: str) -> None:
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        pass
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise UntrustedError(
            f"{folder} is not a folder that only this user can write to",
            hint="Somebody else made it: look at it, then remove it",
        )


def _store_error(error: OSError, where: str) -> StoreError:
    import errno

    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return StoreError(f"{where}: {error.strerror or error}", full=full, hint="What is already there is kept")
