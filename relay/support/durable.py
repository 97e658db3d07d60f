"""A small file that is there as a whole or not at all, also after a power cut. Told once, used by all."""

from __future__ import annotations

import os
import stat
from contextlib import suppress


def write_durably(path: str, data: bytes, *, mode: int = 0o644, must_keep_owner: bool = False) -> None:
    """Put `data` in place of what `path` holds: temporary file beside it → write → fsync → rename → fsync folder.

    A file that is there keeps its owner, group, mode and attributes (access lists among them); a new one gets `mode`. A
    link is followed. Who may not give files away becomes the owner, unless the old one `must_keep` it.

    Raises:
        OSError: nothing changed, and no temporary file is left.
    """
    path = os.path.realpath(path)
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    # Others may open it only once it is known who they are.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if os.path.exists(path) else mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            take_after(file.fileno(), path, must_keep_owner=must_keep_owner)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    sync_folder(os.path.dirname(path))


def take_after(descriptor: int, path: str, *, must_keep_owner: bool = False) -> bool:
    """Give an open file what the one at `path` has beside its bytes; False where there is none. As `write_durably`.

    Raises:
        OSError: the file at `path` cannot be looked at, or its owner not be kept.
    """
    try:
        old = os.stat(path)
    except FileNotFoundError:
        return False
    if os.name == "nt":  # the rename leaves it what its folder gives
        return True
    if not _is_owned_alike(os.fstat(descriptor), old):
        try:
            os.fchown(descriptor, old.st_uid, old.st_gid)
        except PermissionError as error:
            if must_keep_owner:
                words = "its owner and group cannot be kept: do this as root, or as its owner"
                raise PermissionError(error.errno, words) from error
    _copy_attributes(descriptor, path)
    # Last, as a change of the owner takes bits of it away.
    os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
    return True


def _is_owned_alike(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_uid, one.st_gid) == (other.st_uid, other.st_gid)


def _copy_attributes(descriptor: int, path: str) -> None:
    """As far as the file system has any, and this user may set them."""
    if not hasattr(os, "listxattr"):
        return
    with suppress(OSError):
        for name in os.listxattr(path):
            os.setxattr(descriptor, name, os.getxattr(path, name))


def sync_folder(folder: str) -> None:
    """Make what was renamed, created or removed in `folder` durable."""
    if os.name == "nt":  # it has no handle of a folder to sync; its file system journals renames
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
