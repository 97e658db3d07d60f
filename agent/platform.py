"""All that differs by operating system stands here, behind plain functions. Linux is tested; elsewhere the portable way.

A test forbids platform questions anywhere else in `agent/`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable

from relay.durable import sync_folder

IS_LINUX = sys.platform.startswith("linux")


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


def point_current(root: str, target: str) -> None:
    """Let `root/current` name the folder `target` (relative to `root`), in one step: a new link, renamed over the old.

    Raises:
        OSError: it names what it named before.
    """
    temporary = os.path.join(root, f".current-{os.getpid()}")
    if os.path.lexists(temporary):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.rename(temporary, os.path.join(root, "current"))
    sync_folder(root)


def current_target(root: str) -> str | None:
    """What `root/current` names, or None where there is no such link."""
    try:
        return os.readlink(os.path.join(root, "current"))
    except OSError:
        return None


def lock_file(path: str) -> int | None:
    """Take the exclusive lock on `path` (made where needed), or None where another process has it.

    The lock goes with the returned descriptor, also when its process is killed.
    """
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _load_syncfs() -> ctypes._NamedFuncPointer | None:
    try:
        return ctypes.CDLL(None, use_errno=True).syncfs
    except (OSError, AttributeError):
        return None


_syncfs = _load_syncfs() if IS_LINUX else None
