"""All that differs by operating system stands here, behind plain functions. Linux is tested; elsewhere the portable way.

A test forbids platform questions anywhere else in `agent/`.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Iterable

from relay.durable import sync_folder

IS_LINUX = sys.platform.startswith("linux")

# Windows has none of these three, and no links in their sense to guard against.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_NO_HANG = getattr(os, "O_NONBLOCK", 0)
_NOT_INHERITED = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

# --- files


def open_for_reading(path: str) -> int:
    """A descriptor of the regular file `path`; follows no link in its last name, and hangs on no FIFO.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | _NO_LINK | _NO_HANG | _NOT_INHERITED)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_for_writing(path: str) -> int:
    """A descriptor of the file `path`, made where it is not there; follows no link in its last name. Raises `OSError`."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | _NO_LINK | _NOT_INHERITED, 0o644)


def read_at(descriptor: int, length: int, offset: int) -> bytes:
    """Up to `length` bytes from `offset`; fewer where the file ends. Raises `OSError`."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, length, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, length)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """All of `data` at `offset`. Raises `OSError`."""
    while data:
        if hasattr(os, "pwrite"):
            written = os.pwrite(descriptor, data, offset)
        else:
            os.lseek(descriptor, offset, os.SEEK_SET)
            written = os.write(descriptor, data)
        data, offset = data[written:], offset + written


def set_mode(path: str, *, executable: bool) -> None:
    """Readable by all, writable by the owner; folders count as executable. Raises `OSError`."""
    os.chmod(path, 0o755 if executable else 0o644)


def free_bytes(folder: str) -> int:
    """Bytes that may still be written where `folder` lies. Raises `OSError`."""
    if hasattr(os, "statvfs"):
        room = os.statvfs(folder)
        return room.f_bavail * room.f_frsize
    import shutil

    return shutil.disk_usage(folder).free


def is_private(folder: str) -> bool:
    """Whether `folder` is a real folder (no link) of this user, that nobody else can write to. Raises `OSError`."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        return False
    return not hasattr(os, "geteuid") or (found.st_uid == os.geteuid() and not found.st_mode & 0o077)


def is_open_to_all(folder: str) -> bool:
    """Whether everybody may rename and remove what others put into `folder`. Raises `OSError`."""
    mode = os.stat(folder).st_mode
    return hasattr(os, "geteuid") and bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


# --- durability


def sync_tree(root: str, files: Iterable[str], folders: Iterable[str]) -> None:
    """Make everything below `root` durable: the given files, and the folders that name them.

    On Linux one `syncfs` does it for all (since 5.8 it reports write errors); elsewhere each is synced by itself.

    Raises:
        OSError: something could not be written; the tree must not be used.
    """
    if IS_LINUX and _syncfs is not None:
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if _syncfs(descriptor) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), root)
        finally:
            os.close(descriptor)
        return
    for path in files:
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for folder in folders:
        sync_folder(folder)


# --- the tree in use


def point_current(root: str, target: str) -> None:
    """Let `root/current` name the folder `target` (relative to `root`), in one step: a new link, renamed over the old.

    Raises:
        OSError: it names what it named before.
    """
    temporary = os.path.join(root, f".current-{os.getpid()}")
    if os.path.lexists(temporary):
        os.unlink(temporary)
    os.symlink(target, temporary)
    try:
        os.rename(temporary, os.path.join(root, "current"))
    except OSError:
        os.unlink(temporary)
        raise
    sync_folder(root)


def current_target(root: str) -> str | None:
    """What `root/current` names, or None where there is no such link."""
    try:
        return os.readlink(os.path.join(root, "current"))
    except OSError:
        return None


# --- locks


def lock_file(path: str) -> int | None:
    """Take the exclusive lock on `path` (made where needed), or None where another process has it.

    The lock goes with the returned descriptor, also when its process is killed.
    """
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK | _NOT_INHERITED, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had the lock may have removed the file meanwhile: a lock on what has no name guards nothing.
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _load_syncfs() -> ctypes._NamedFuncPointer | None:
    try:
        return ctypes.CDLL(None, use_errno=True).syncfs
    except (OSError, AttributeError):
        return None


_syncfs = _load_syncfs() if IS_LINUX else None
