"""A store in a folder of a local or shared file system.

    format                        "waystation-store 1"
    chunks/ab/<sha256>            one chunk each, in the stored form of `stored.py`
    blobs/ab/<sha256>             whole files as they are
    manifests/ packages/ …        documents, under their own names
    quarantine/                   damage that was put aside
    tmp/                          files that are still being written
    lock, lock-serve, lock-sweep  held with flock(2), so that the kernel frees them whatever kills the holder

A `Volume` owns the folder: the durable write, the room, the health and the locks. `DiskStore`, `DiskDocuments` and
`DiskBlobs` are its three faces. Files are never changed in place: they appear by a rename, whole, and read-only.
"""

from __future__ import annotations

import asyncio
import builtins
import errno
import fcntl
import hashlib
import logging
import os
import secrets
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Final, ParamSpec, TypeVar

import aiofiles
import xxhash

from relay.content.chunk import Chunk
from relay.content.identity import ChunkId, parse_digest
from relay.errors import ChunkInvalid, ChunkMissing, IdentityError, LockedError, StoreError, UsageError
from relay.stores.contract import (
    PIECE,
    Blobs,
    ChunkSweeper,
    Documents,
    LockName,
    StoredChunk,
    document_folder,
    document_name,
)
from relay.stores.stored import (
    FRAME_MAX,
    HEADER_SIZE,
    STORED_MAX,
    DamageError,
    check_stored,
    decode_stored,
    encode_stored,
    parse_stored_header,
)

FORMAT: Final = b"waystation-store 1\n"

WRITERS: Final = 4
"""Batches that are written at the same time; later ones wait their turn."""

HELPERS: Final = 4
"""Threads that compress, write and sync the files of all batches."""

OPEN_FILES: Final = 64
"""Files of one batch that are open at the same time, before they are synced."""

FLOOR_SHARE: Final = 0.01
FLOOR_BYTES: Final = 1 << 30
"""Chunks and blobs leave this much of the file system free: the larger of the share and the bytes. Documents may use
it, so that leases are renewed and sweeping makes its marks when nothing else fits."""

RETRY_FULL: Final = 30.0
RETRY_SHORT: Final = 2.0
"""Seconds after which asking again makes sense: no space; no descriptors or memory."""

SYNC_FAILURES_MAX: Final = 2
"""Batches in a row whose fsync failed, after which nothing more is written until the store is opened again."""

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
_NOT_A_FILE: Final = frozenset({errno.ELOOP, errno.ENXIO, errno.EISDIR})
_OWN_BEFORE_FORMAT: Final = frozenset({"lock", "tmp", "quarantine", "lost+found"})

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


async def open_disk(root: str, *, free_floor: int | None = None, read_only: bool = False) -> Volume:
    """The store in the folder `root`, made if need be (mode 0700), its dead writers' leavings removed.

    Args:
        root: Absolute path.
        free_floor: Bytes of the file system that are kept free; by default the larger of 1 % and 1 GiB.
        read_only: Only read: take no lock, move nothing, and let the folder appear later (a share that gets mounted).

    Raises:
        UsageError: the folder holds something else, or a store of another format.
        StoreError: the medium failed.
    """
    return await asyncio.to_thread(Volume.open, root, free_floor=free_floor, read_only=read_only)


# --- errors


class SyncError(OSError):
    """An fsync failed: the kernel may have dropped the dirty pages, so asking it again would be told a lie.

    A. Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020.
    """


class NameTakenError(Exception):
    """A document of this name was made in the meantime."""


def translate(error: OSError, what: str) -> StoreError:
    """What the operating system said, as the contract says it; `what` was being tried."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return StoreError(f"no space left to {what}", full=True, retry_after=RETRY_FULL)
    if error.errno in _SHORT:
        return StoreError(f"cannot {what} now: {reason}", retry_after=RETRY_SHORT)
    return StoreError(f"cannot {what}: {reason}")


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise translate(error, what) from error


# --- the durable write


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file to be: its path below the root, and its bytes, made when they are written."""

    path: str
    pieces: Callable[[], Iterable[bytes]]


class _Temp:
    """One file under `tmp/` on its way: written, synced and closed, or thrown away."""

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, f"{os.getpid()}-{secrets.token_hex(8)}")
        self._fd = -1

    def write(self, pieces: Callable[[], Iterable[bytes]]) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        for piece in pieces():
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(self._fd, rest) :]

    def sync(self) -> None:
        _fsync(self._fd)
        fd, self._fd = self._fd, -1
        os.close(fd)

    def discard(self) -> None:
        """Leave nothing behind; a temp that was renamed is no longer here."""
        with suppress(OSError):
            if self._fd >= 0:
                os.close(self._fd)
        with suppress(OSError):
            os.unlink(self.path)


def _rename(temp: str, path: str) -> None:
    os.replace(temp, path)


def _link(temp: str, path: str) -> None:
    """Give it a name that nobody has; the temporary name goes later. Raises `NameTakenError`."""
    try:
        os.link(temp, path, follow_symlinks=False)
    except FileExistsError as error:
        raise NameTakenError from error


def _fsync(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        raise SyncError(error.errno, error.strerror) from error


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _fsync(fd)
    finally:
        os.close(fd)


def _make_root(root: str) -> None:
    """Make the folder and its missing parents, so that they survive a power cut."""
    missing = []
    path = root
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    os.makedirs(root, mode=0o700, exist_ok=True)
    for made in missing:
        _sync_folder(os.path.dirname(made))


# --- reading with suspicion


class _Look:
    """An `opener` that takes regular files only, follows no link, hangs on no FIFO, and remembers what it opened."""

    def __init__(self) -> None:
        self.seen: os.stat_result | None = None

    def __call__(self, path: str, flags: int) -> int:
        try:
            fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in _NOT_A_FILE:
                raise DamageError("not a file") from error
            raise
        try:
            seen = os.fstat(fd)
            if not stat.S_ISREG(seen.st_mode):
                raise DamageError("not a file")
        except BaseException:
            os.close(fd)
            raise
        self.seen = seen
        return fd


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    """The same file with the same bytes, as far as the file system tells."""
    return (one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) == (
        other.st_dev,
        other.st_ino,
        other.st_size,
        other.st_mtime_ns,
    )


def _hashed(kind: str, digest: str) -> str:
    """Path below the root. Raises `IdentityError` before a path is built."""
    name = parse_digest(digest)
    return f"{kind}/{name[:2]}/{name}"


# --- the folder as a whole


class Volume:
    """One folder that holds a store: whatever is written in it goes through here."""

    def __init__(self, root: str, free_floor: int | None) -> None:
        """Use `open_disk`: this does nothing on disk."""
        self.root = root
        self._free_floor = free_floor
        self._closed_to_writes = ""
        self._sync_failures = 0
        self._health = threading.Lock()
        self._durable_folders: set[str] = set()
        self._shared_lock: int | None = None
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="disk-batch")
        self._helpers = ThreadPoolExecutor(HELPERS, thread_name_prefix="disk-file")

    @classmethod
    def open(cls, root: str, *, free_floor: int | None = None, read_only: bool = False) -> Volume:
        """As `open_disk`, on this thread."""
        volume = cls(root, free_floor)
        try:
            with _translated(f"open the store {root}"):
                if read_only:
                    volume._closed_to_writes = "it was opened for reading only"
                    volume._has_our_format()
                else:
                    volume._prepare()
        except BaseException:
            volume._close()
            raise
        return volume

    async def close(self) -> None:
        """Let running batches end, then give back threads and locks. Twice is once."""
        await asyncio.to_thread(self._close)

    def exclusive(self, name: LockName) -> AbstractContextManager[None]:
        """Hold the lock `name` against every other process and store object until the context ends.

        Raises:
            LockedError: on entering, if it is held; names the holder.
            StoreError: on entering, if the file system cannot lock.
        """
        return self._exclusive(name)

    async def run(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a job that writes on one of the writers' threads; reads never queue behind it."""
        self._require_open()
        return await asyncio.get_running_loop().run_in_executor(self._writers, partial(job, *args, **kwargs))

    def path(self, below: str) -> str:
        return os.path.join(self.root, below)

    def write(
        self,
        files: Sequence[NewFile],
        *,
        place: Callable[[str, str], None] = _rename,
        undo: bool = True,
        bulk: int = 0,
        also_sync: Iterable[str] = (),
    ) -> None:
        """All `files`, durable on return: write all, sync all, close, rename all, sync each folder once.

        Args:
            files: What to write.
            place: Gives a finished file its name: `_rename`, or `_link` where none may be yet.
            undo: The names are new ones: take them away again if their folder cannot be synced.
            bulk: Bytes that must fit above the floor.
            also_sync: Folders below the root whose entries, made by somebody else, are acknowledged too.

        Raises:
            NameTakenError: by `_link`.
            StoreError: the medium failed; nothing half-written is visible.
        """
        self._require_writable()
        with _translated(f"write to {self.root}"):
            self._require_room(bulk)
            with self._counting_sync_failures():
                self._write(files, place, also_sync, undo=undo)

    def present(self, below: str) -> bool:
        """Is a file there? Anything else under its name is put aside."""
        path = self.path(below)
        if _is_file(path):
            return True
        if os.path.lexists(path):
            self._set_aside(path, None)
        return False

    def remove(self, below: str, *, sync: bool = False) -> None:
        """Unlink what may be there; needs no space, and works when writing has been stopped by failures.

        Args:
            below: Path below the root.
            sync: Make it last through a power cut.

        Raises:
            StoreError: the medium failed.
        """
        self._require_open()
        path = self.path(below)
        with _translated(f"remove from {self.root}"):
            try:
                os.unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except (IsADirectoryError, PermissionError):
                # Linux says EISDIR, POSIX says EPERM when a folder stands in a file's place.
                if not os.path.isdir(path):
                    raise
                self._set_aside(path, None)
            if sync and os.path.isdir(os.path.dirname(path)):
                with self._counting_sync_failures():
                    _sync_folder(os.path.dirname(path))

    @contextmanager
    def judging(self, id: str, below: str) -> Iterator[_Look]:
        """Read the file of the digest `id` in this context: damage found inside puts it aside.

        Raises:
            ChunkMissing, ChunkInvalid, StoreError: as the contract says.
        """
        look = _Look()
        try:
            yield look
        except FileNotFoundError as error:
            self.require_here()
            raise ChunkMissing(ChunkId(id)) from error
        except DamageError as damage:
            self._set_aside(self.path(below), look.seen)
            raise ChunkInvalid(id, damage.found) from damage
        except ChunkInvalid:
            self._set_aside(self.path(below), look.seen)
            raise
        except OSError as error:
            raise translate(error, f"read from {self.root}") from error

    def require_here(self) -> None:
        """A missing file proves nothing where the whole store is missing (a share that is not mounted).

        Raises:
            StoreError: so it is.
        """
        if not os.path.exists(self.path("format")):
            raise StoreError(f"there is no store in {self.root} now", hint="is it mounted?")

    # opening

    def _prepare(self) -> None:
        _make_root(self.root)
        known = self._has_our_format()
        for folder in ("tmp", "quarantine"):
            os.makedirs(self.path(folder), exist_ok=True)
        self._take_shared_lock()
        if not known:
            self.write([NewFile("format", lambda: [FORMAT])])

    def _has_our_format(self) -> bool:
        """True for a store of ours, False for a folder that may become one or is not there.

        Raises:
            UsageError: it is something else.
        """
        try:
            with open(self.path("format"), "rb", opener=_Look()) as file:
                found = file.read(len(FORMAT) + 1)
        except FileNotFoundError:
            with suppress(FileNotFoundError):
                self._refuse_foreign()
            return False
        except DamageError as error:
            raise UsageError(f"{self.root} is no store: its `format` is not a file") from error
        if found != FORMAT:
            raise UsageError(
                f"{self.root} is a store of an unknown format, {found[:40]!r}",
                hint=f"this version knows {FORMAT.decode().strip()!r}",
            )
        return True

    def _refuse_foreign(self) -> None:
        # What a first opening that was killed leaves behind is no stranger.
        foreign = sorted(set(os.listdir(self.root)) - _OWN_BEFORE_FORMAT)
        if foreign:
            raise UsageError(
                f"{self.root} is neither empty nor a store: it holds {foreign[0]!r}", hint="name another folder"
            )

    def _take_shared_lock(self) -> None:
        """Share `lock` with the other writers; whoever is alone for a moment removes what dead ones left in `tmp/`."""
        fd = os.open(self.path("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._shared_lock = fd
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        else:
            for name in os.listdir(self.path("tmp")):
                os.unlink(self.path(f"tmp/{name}"))
        fcntl.flock(fd, fcntl.LOCK_SH)

    # closing

    def _close(self) -> None:
        self._closed_to_writes = self._closed_to_writes or "it was closed"
        fd, self._shared_lock = self._shared_lock, None
        self._writers.shutdown(wait=True)
        self._helpers.shutdown(wait=True)
        if fd is not None:
            os.close(fd)

    # locking

    @contextmanager
    def _exclusive(self, name: LockName) -> Iterator[None]:
        self._require_open()
        path = self.path(f"lock-{name}")
        with _translated(f"lock {path}"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LockedError(f"{self.root} is locked for {name} by {_holder(fd)}") from error
            except OSError as error:
                raise translate(error, f"lock {path}") from error
            _sign(fd, f"pid {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
            yield
            _sign(fd, "")
        finally:
            os.close(fd)

    # writing

    def _write(
        self,
        files: Sequence[NewFile],
        place: Callable[[str, str], None],
        also_sync: Iterable[str],
        *,
        undo: bool,
    ) -> None:
        folders = {os.path.dirname(file.path) for file in files} | set(also_sync)
        temps = [_Temp(self.path("tmp")) for _ in files]
        placed: list[str] = []
        try:
            self._ensure_folders(folders)
            self._stage(files, temps)
            for file, temp in zip(files, temps, strict=True):
                place(temp.path, self.path(file.path))
                placed.append(self.path(file.path))
            self._sync_placed(folders, placed if undo else [])
        except BaseException:
            # Any of them may be why; asking each again costs little.
            self._durable_folders.clear()
            raise
        finally:
            for temp in temps:
                temp.discard()

    def _stage(self, files: Sequence[NewFile], temps: Sequence[_Temp]) -> None:
        """Write all and sync all. Descriptors stay open in between: a reopened file may hide an earlier error."""
        pairs = iter(zip(files, temps, strict=True))
        while group := list(islice(pairs, OPEN_FILES)):
            self._run_all([partial(temp.write, file.pieces) for file, temp in group])
            self._run_all([temp.sync for _, temp in group])

    def _sync_placed(self, folders: Iterable[str], undo: Iterable[str]) -> None:
        try:
            self._run_all([partial(_sync_folder, self.path(folder)) for folder in sorted(folders)])
        except SyncError:
            # Names that stayed would be taken for durable by the next put, whose fsync of the folder may then lie.
            # After other failures they do stay: somebody else may have acknowledged them in the meantime.
            for path in undo:
                with suppress(OSError):
                    os.unlink(path)
            raise

    def _ensure_folders(self, folders: Iterable[str]) -> None:
        """Make them, and sync the way down to each once: another process may have made one and died before it did."""
        new = set(folders) - self._durable_folders - {""}
        above = set()
        for folder in new:
            os.makedirs(self.path(folder), exist_ok=True)
            while folder:
                folder = os.path.dirname(folder)  # noqa: PLW2901
                above.add(folder)
        try:
            self._run_all([partial(_sync_folder, self.path(folder)) for folder in sorted(above)])
        except SyncError:
            # As with names of files: what stayed would be believed. The root is never empty, so it stays.
            for folder in new:
                with suppress(OSError):
                    os.removedirs(self.path(folder))
            raise
        self._durable_folders |= new

    def _run_all(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Run all and wait for all, then raise a failure, the gravest first: nothing goes on behind its back."""
        if len(jobs) == 1:
            jobs[0]()
            return
        futures = [self._helpers.submit(job) for job in jobs]
        wait(futures)
        errors = [error for future in futures if (error := future.exception())]
        for error in sorted(errors, key=lambda error: not isinstance(error, SyncError)):
            raise error

    # health

    def _require_open(self) -> None:
        if self._shared_lock is None:
            raise StoreError(f"the store {self.root} is read-only: {self._closed_to_writes}")

    def _require_writable(self) -> None:
        if self._closed_to_writes:
            raise StoreError(f"the store {self.root} is read-only: {self._closed_to_writes}")

    def _require_room(self, bulk: int) -> None:
        if not bulk:
            return
        system = os.statvfs(self.root)
        floor = self._free_floor
        if floor is None:
            floor = max(int(system.f_blocks * system.f_frsize * FLOOR_SHARE), FLOOR_BYTES)
        free = system.f_bavail * system.f_frsize
        if free - bulk < floor:
            raise StoreError(
                f"no space left in {self.root}: {free} bytes are free and {floor} of them are kept so",
                full=True,
                retry_after=RETRY_FULL,
            )

    @contextmanager
    def _counting_sync_failures(self) -> Iterator[None]:
        try:
            yield
        except SyncError as error:
            self._count_sync_failure(error)
            raise
        self._sync_failures = 0

    def _count_sync_failure(self, error: SyncError) -> None:
        if error.errno in _FULL:
            return
        with self._health:
            self._sync_failures += 1
            failures = self._sync_failures
        _log.error("disk.sync_failed", extra={"root": self.root, "errno": error.errno, "in_a_row": failures})
        if failures >= SYNC_FAILURES_MAX:
            self._closed_to_writes = (
                f"fsync failed {failures} times in a row ({error.strerror}); see to the disk, then start again"
            )

    def _set_aside(self, path: str, seen: os.stat_result | None) -> None:
        """Move what was `seen` under `path` (None: something that is no file) into quarantine; a failure is logged.

        Another process may have put it aside already, and a third one may have written the chunk anew: that stays.
        """
        if self._shared_lock is None:
            return
        aside = os.path.join(self.root, "quarantine", f"{os.path.basename(path)}.{secrets.token_hex(4)}")
        try:
            now = os.lstat(path)
            if _same(now, seen) if seen else not stat.S_ISREG(now.st_mode):
                os.rename(path, aside)
                _log.warning("disk.set_aside", extra={"path": path, "quarantine": aside})
        except FileNotFoundError:
            return
        except OSError as error:
            _log.warning("disk.set_aside_failed", extra={"path": path, "error": str(error)})


def _sign(fd: int, text: str) -> None:
    """Write the holder into a lock file. The lock holds without it, so a full disk is no reason to fail."""
    with suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, text.encode(), 0)


def _holder(fd: int) -> str:
    text = os.pread(fd, 200, 0).decode("utf-8", "replace")
    return "".join(char for char in text if char.isprintable()) or "another process"


# --- chunks


class DiskChunk(StoredChunk):
    """A stored chunk that was checked; it is read again, piece by piece, when it is sent."""

    def __init__(self, id: ChunkId, size: int, length: int, xxh3: int, path: str, seen: os.stat_result) -> None:
        """Use `DiskStore.open`."""
        self.id = id
        self.size = size
        self.length = length
        self.xxh3 = xxh3
        self._path = path
        self._seen = seen

    async def pieces(self) -> AsyncIterator[bytes]:
        look = _Look()
        try:
            async with aiofiles.open(self._path, "rb", buffering=0, opener=look) as file:
                if look.seen is None or not _same(look.seen, self._seen):
                    raise StoreError(f"chunk {self.id[:16]}… changed since it was checked")
                await file.seek(HEADER_SIZE)
                left = self.length
                while left:
                    piece = await file.read(min(PIECE, left))
                    if not piece:
                        raise StoreError(f"chunk {self.id[:16]}… ended early")
                    left -= len(piece)
                    yield piece
        except OSError as error:
            raise translate(error, f"read chunk {self.id[:16]}…") from error
        except DamageError as error:
            raise StoreError(f"chunk {self.id[:16]}… changed since it was checked") from error


class DiskStore(ChunkSweeper):
    """The chunks of a volume."""

    def __init__(self, volume: Volume) -> None:
        """Chunks in `volume`; closing this closes the volume."""
        self._volume = volume
        self.name = f"disk:{volume.root}"

    async def get(self, id: ChunkId) -> Chunk:
        return await asyncio.to_thread(self._get, id)

    async def has_many(self, ids: Iterable[ChunkId]) -> set[ChunkId]:
        return await asyncio.to_thread(self._has_many, tuple(ids))

    async def open(self, id: ChunkId) -> StoredChunk:
        return await asyncio.to_thread(self._open, id)

    async def put_many(self, chunks: Sequence[Chunk]) -> None:
        await self._volume.run(self._put_many, tuple(chunks))

    async def list(self) -> AsyncIterator[ChunkId]:
        for fan in range(256):
            for id in await asyncio.to_thread(self._list, f"{fan:02x}"):
                yield id

    async def remove(self, id: ChunkId) -> None:
        # Not synced: a removed chunk that a power cut brings back is waste, which the next sweep finds.
        await asyncio.to_thread(self._volume.remove, _hashed("chunks", id))

    async def close(self) -> None:
        await self._volume.close()

    def _get(self, id: ChunkId) -> Chunk:
        below = _hashed("chunks", id)
        with self._volume.judging(id, below) as look, open(self._volume.path(below), "rb", opener=look) as file:
            return decode_stored(id, file.read(STORED_MAX + 1))

    def _has_many(self, ids: Sequence[ChunkId]) -> set[ChunkId]:
        with _translated(f"read from {self._volume.root}"):
            here = {id for id in ids if _is_file(self._volume.path(_hashed("chunks", id)))}
        if len(here) < len(ids):
            self._volume.require_here()
        return here

    def _open(self, id: ChunkId) -> DiskChunk:
        below = _hashed("chunks", id)
        path = self._volume.path(below)
        with self._volume.judging(id, below) as look, open(path, "rb", buffering=0, opener=look) as file:
            header = parse_stored_header(file.read(HEADER_SIZE))
            front, length, digest = b"", 0, xxhash.xxh3_64()
            while piece := file.read(PIECE):
                front = front or piece[:18]
                length += len(piece)
                digest.update(piece)
                if length > FRAME_MAX:
                    raise DamageError("too long")
            check_stored(id, header, front, digest.intdigest())
            seen = look.seen
        assert seen is not None  # noqa: S101 - a file was opened
        return DiskChunk(id, header.size, length, header.xxh3, path, seen)

    def _put_many(self, chunks: Sequence[Chunk]) -> None:
        by_path = {_hashed("chunks", chunk.id): chunk for chunk in chunks}
        with _translated(f"write to {self._volume.root}"):
            absent = {path: chunk for path, chunk in by_path.items() if not self._volume.present(path)}
        self._volume.write(
            [NewFile(path, partial(_stored_pieces, chunk)) for path, chunk in absent.items()],
            bulk=sum(chunk.size for chunk in absent.values()),
            # Whoever wrote the others may have died between its rename and its fsync of the folder.
            also_sync={os.path.dirname(path) for path in by_path},
        )

    def _list(self, fan: str) -> builtins.list[ChunkId]:
        try:
            names = os.listdir(self._volume.path(f"chunks/{fan}"))
        except FileNotFoundError:
            self._volume.require_here()
            return []
        except OSError as error:
            raise translate(error, f"list {self._volume.root}") from error
        return [ChunkId(name) for name in names if _is_digest(name) and name.startswith(fan)]


def _stored_pieces(chunk: Chunk) -> Iterable[bytes]:
    return (encode_stored(chunk),)


def _is_digest(name: str) -> bool:
    try:
        return parse_digest(name) == name
    except IdentityError:
        return False


# --- documents


class DiskDocuments(Documents):
    """The documents of a volume, each a file under its own name."""

    def __init__(self, volume: Volume) -> None:
        """Documents in `volume`."""
        self._volume = volume

    async def read(self, name: str) -> bytes | None:
        return await asyncio.to_thread(self._read, document_name(name))

    async def write(self, name: str, data: bytes) -> None:
        await self._volume.run(self._volume.write, [NewFile(document_name(name), lambda: (data,))], undo=False)

    async def create(self, name: str, data: bytes) -> bool:
        return await self._volume.run(self._create, document_name(name), data)

    async def remove(self, name: str) -> None:
        # Synced, because what the document named may be removed next: a manifest goes before its chunks.
        await self._volume.run(self._volume.remove, document_name(name), sync=True)

    async def list(self, prefix: str) -> builtins.list[str]:
        return await asyncio.to_thread(self._list, document_folder(prefix))

    def _read(self, name: str) -> bytes | None:
        path = self._volume.path(name)
        try:
            with open(path, "rb", opener=_Look()) as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            self._volume.require_here()
            return None
        except DamageError as error:
            if stat.S_ISDIR(os.lstat(path).st_mode):
                return None
            raise StoreError(f"{name} in {self._volume.root} is not a file") from error
        except OSError as error:
            raise translate(error, f"read {name} in {self._volume.root}") from error

    def _create(self, name: str, data: bytes) -> bool:
        if not os.path.lexists(self._volume.path(name)):
            with suppress(NameTakenError):
                self._volume.write([NewFile(name, lambda: (data,))], place=_link)
                return True
        # False says "it is there", so let that be true after a power cut, too.
        self._volume.write([], also_sync={os.path.dirname(name)})
        return False

    def _list(self, prefix: str) -> builtins.list[str]:
        with _translated(f"list {self._volume.root}"):
            names = sorted(self._walk(prefix))
        if not names:
            self._volume.require_here()
        return names

    def _walk(self, folder: str) -> Iterator[str]:
        # Unlike os.walk, an unreadable folder is an error: a sweep must not take it for an empty one.
        try:
            entries = tuple(os.scandir(self._volume.path(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                if _is_document_folder(name):
                    yield from self._walk(name)
            elif entry.is_file(follow_symlinks=False) and _is_document(name):
                yield name


def _is_document(name: str) -> bool:
    with suppress(ValueError):
        return bool(document_name(name))
    return False


def _is_document_folder(name: str) -> bool:
    with suppress(ValueError):
        return bool(document_folder(name))
    return False


# --- blobs


class DiskBlobs(Blobs):
    """The whole files of a volume."""

    def __init__(self, volume: Volume) -> None:
        """Blobs in `volume`."""
        self._volume = volume

    async def put_file(self, sha256: str, path: str) -> None:
        await self._volume.run(self._put_file, sha256, path)

    async def has(self, sha256: str) -> bool:
        return await asyncio.to_thread(self._has, _hashed("blobs", sha256))

    async def read(self, sha256: str) -> AsyncIterator[bytes]:
        below = _hashed("blobs", sha256)
        with self._volume.judging(sha256, below) as look:
            async with aiofiles.open(self._volume.path(below), "rb", buffering=0, opener=look) as file:
                digest, held = hashlib.sha256(), b""
                while piece := await file.read(PIECE):
                    await asyncio.to_thread(digest.update, piece)
                    if held:
                        yield held
                    held = piece
            if digest.hexdigest() != parse_digest(sha256):
                raise DamageError(digest.hexdigest())
        if held:
            yield held

    async def remove(self, sha256: str) -> None:
        await asyncio.to_thread(self._volume.remove, _hashed("blobs", sha256))

    def _put_file(self, sha256: str, source: str) -> None:
        below = _hashed("blobs", sha256)
        pieces = partial(_checked_pieces, sha256, source)
        with _translated(f"write to {self._volume.root}"):
            present = self._volume.present(below)
        if present:
            for _ in pieces():
                pass
            self._volume.write([], also_sync={os.path.dirname(below)})
        else:
            self._volume.write([NewFile(below, pieces)], bulk=_size(source))

    def _has(self, below: str) -> bool:
        with _translated(f"read from {self._volume.root}"):
            here = _is_file(self._volume.path(below))
        if not here:
            self._volume.require_here()
        return here


def _size(source: str) -> int:
    try:
        return os.stat(source).st_size
    except OSError as error:
        raise translate(error, f"read {source}") from error


def _checked_pieces(sha256: str, source: str) -> Iterator[bytes]:
    """The file `source` in pieces; raises `ChunkInvalid` after the last one, if they are not what `sha256` names."""
    digest = hashlib.sha256()
    try:
        with open(source, "rb", buffering=0) as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                yield piece
    except OSError as error:
        raise translate(error, f"read {source}") from error
    if digest.hexdigest() != parse_digest(sha256):
        raise ChunkInvalid(sha256, digest.hexdigest())
