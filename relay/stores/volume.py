"""The folder under a disk store: the durable write, the room, the health, damage put aside, and the locks.

    format                        "waystation-store 1"
    quarantine/                   damage that was put aside
    tmp/                          files that are still being written
    lock, lock-serve, lock-sweep  held with flock(2), so that the kernel frees them whatever kills the holder

`disk.py` puts chunks, documents and blobs into it. Files are never changed in place: they appear by a rename, whole,
and read-only.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import secrets
import socket
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Final, ParamSpec, TypeVar

from relay.audit.acts import NotQuarantined, Quarantined, SyncFailed
from relay.audit.event import tell
from relay.errors import ChunkInvalid, ChunkMissing, LockedError, StoreError, UsageError
from relay.folders import make_folder
from relay.package.identity import ChunkId, parse_digest
from relay.stores.contract import FORMAT, LockName, check_format
from relay.stores.room import Room
from relay.stores.stored_form import DamageError

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
UNREADABLE: Final = frozenset({errno.EACCES, errno.EPERM, errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA})
"""What the system says where this one file cannot be read: it belongs to another user, or its sectors are gone."""
_NOT_A_FILE: Final = frozenset({errno.ELOOP, errno.ENXIO, errno.EISDIR})
_OWN_BEFORE_FORMAT: Final = frozenset({"lock", "tmp", "quarantine", "lost+found"})

P = ParamSpec("P")
T = TypeVar("T")


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
def translated(what: str) -> Iterator[None]:
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


def link_new(temp: str, path: str) -> None:
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
    for made in make_folder(root, mode=0o700):
        _sync_folder(os.path.dirname(made))


# --- reading with suspicion


class Look:
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


def is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_same(one: os.stat_result, other: os.stat_result) -> bool:
    """The same file with the same bytes, as far as the file system tells."""
    return (one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) == (
        other.st_dev,
        other.st_ino,
        other.st_size,
        other.st_mtime_ns,
    )


def _unreadable(path: str) -> os.stat_result | None:
    """What stands there, if it cannot be opened; another process may have put a good file into its place meanwhile."""
    with suppress(OSError):
        found = os.lstat(path)
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError:
            return found
    return None


def hashed(kind: str, digest: str) -> str:
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
        self._promised = 0
        """Bytes that writers at work may still write."""
        self._turned_away = 0
        self._durable_folders: set[str] = set()
        self._shared_lock: int | None = None
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="disk-batch")
        self._helpers = ThreadPoolExecutor(HELPERS, thread_name_prefix="disk-file")

    @classmethod
    def open(cls, root: str, *, free_floor: int | None = None, read_only: bool = False) -> Volume:
        """As `open_disk`, on this thread."""
        volume = cls(root, free_floor)
        try:
            with translated(f"open the store {root}"):
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

    def closed_to_writes(self) -> str:
        """Why nothing is written any more until the store is opened again; empty while all is well."""
        return self._closed_to_writes

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
            place: Gives a finished file its name: `_rename`, or `link_new` where none may be yet.
            undo: The names are new ones: take them away again if their folder cannot be synced.
            bulk: Bytes that must fit above the floor.
            also_sync: Folders below the root whose entries, made by somebody else, are acknowledged too.

        Raises:
            NameTakenError: by `link_new`.
            StoreError: the medium failed; nothing half-written is visible.
        """
        self._require_writable()
        with translated(f"write to {self.root}"), self._room(bulk), self._counting_sync_failures():
            self._write(files, place, also_sync, undo=undo)

    def present(self, below: str) -> bool:
        """Is a file there? Anything else under its name is put aside."""
        path = self.path(below)
        if is_file(path):
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
        with translated(f"remove from {self.root}"):
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
    def judging(self, id: str, below: str) -> Iterator[Look]:
        """Read the file of the digest `id` in this context: damage found inside puts it aside, and one that cannot be
        read is damaged.

        Raises:
            ChunkMissing, ChunkInvalid, StoreError: as the contract says.
        """
        look, path = Look(), self.path(below)
        try:
            yield look
        except FileNotFoundError as error:
            self.require_here()
            raise ChunkMissing(ChunkId(id)) from error
        except DamageError as damage:
            self._set_aside(path, look.seen)
            raise ChunkInvalid(id, damage.found) from damage
        except ChunkInvalid:
            self._set_aside(path, look.seen)
            raise
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise translate(error, f"read from {self.root}") from error
            self.require_here()
            self._set_aside(path, look.seen or _unreadable(path))
            raise ChunkInvalid(id, "unreadable") from error

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
            make_folder(self.path(folder))
        self._take_shared_lock()
        if not known:
            self.write([NewFile("format", lambda: [FORMAT])])

    def _has_our_format(self) -> bool:
        """True for a store of ours, False for a folder that may become one or is not there.

        Raises:
            UsageError: it is something else.
        """
        try:
            with open(self.path("format"), "rb", opener=Look()) as file:
                found = file.read(len(FORMAT) + 1)
        except FileNotFoundError:
            with suppress(FileNotFoundError):
                self._refuse_foreign()
            return False
        except DamageError as error:
            raise UsageError(f"{self.root} is no store: its `format` is not a file") from error
        check_format(self.root, found)
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
    def exclusive(self, name: LockName) -> Iterator[None]:
        """Hold the lock `name` against every other process and store object until the context ends.

        Raises:
            LockedError: on entering, if it is held; names the holder.
            StoreError: on entering, if the file system cannot lock.
        """
        self._require_open()
        path = self.path(f"lock-{name}")
        with translated(f"lock {path}"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with translated(f"lock {path}"):
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise LockedError(f"{self.root} is locked for {name} by {_holder(fd)}") from error
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
            make_folder(self.path(folder))
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

    @contextmanager
    def _room(self, bulk: int) -> Iterator[None]:
        """Hold room for `bulk` bytes: what several writers are about to write must fit together."""
        with self._health:
            if bulk:
                self._require_room(self._promised + bulk)
            self._promised += bulk
        try:
            yield
        finally:
            with self._health:
                self._promised -= bulk

    def room(self) -> Room:
        """What is free on the file system now, and what of it is kept so. Raises `OSError`."""
        system = os.statvfs(self.root)
        floor = self._free_floor
        if floor is None:
            floor = max(int(system.f_blocks * system.f_frsize * FLOOR_SHARE), FLOOR_BYTES)
        return Room(system.f_bavail * system.f_frsize, floor, self._turned_away)

    def _require_room(self, bulk: int) -> None:
        room = self.room()
        self._turned_away = bulk if room.free - bulk < room.floor else 0
        if self._turned_away:
            raise StoreError(
                f"no space left in {self.root}: {room.free} bytes are free and {room.floor} of them are kept so",
                full=True,
                retry_after=RETRY_FULL,
            )

    @contextmanager
    def _counting_sync_failures(self) -> Iterator[None]:
        try:
            yield
        except SyncError as error:
            if error.errno not in _FULL:
                self._count_sync_failure(error)
            raise
        self._sync_failures = 0

    def _count_sync_failure(self, error: SyncError) -> None:
        with self._health:
            self._sync_failures += 1
            failures = self._sync_failures
        tell(SyncFailed(self.root, error.strerror or str(error), failures))
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
            if is_same(now, seen) if seen else not stat.S_ISREG(now.st_mode):
                os.rename(path, aside)
                tell(Quarantined(path, aside))
        except FileNotFoundError:
            return
        except OSError as error:
            tell(NotQuarantined(path, error.strerror or str(error)))


def _sign(fd: int, text: str) -> None:
    """Write the holder into a lock file. The lock holds without it, so a full disk is no reason to fail."""
    with suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, text.encode(), 0)


def _holder(fd: int) -> str:
    text = os.pread(fd, 200, 0).decode("utf-8", "replace")
    return "".join(char for char in text if char.isprintable()) or "another process"
