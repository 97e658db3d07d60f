"""Whose a folder must be before Waystation writes into it, and how one is made. One rule, told and checked here alone.

A folder is ours where no other user can put something else into it or into its place:

- it, and every folder above it, belongs to root or to this user;
- not everybody can write to it; above it, sticky folders such as /tmp may be open: an entry of theirs is its owner's;
- a link on the way belongs to root or to this user, and is then followed.

What a group may write is the administrator's affair, but where a folder must be private. The way is walked descriptor by
descriptor, no link is followed unread, and a folder that is missing is made in one that was just checked.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from contextlib import ExitStack, suppress
from functools import cache
from typing import Final

from relay.errors import RefusedError

_LINKS_MAX: Final = 40
"""Links on one way, as many as the kernel follows."""
_LOOK: Final = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_KNOWS_OWNERS: Final = hasattr(os, "geteuid") and os.open in os.supports_dir_fd
"""Windows has neither owners in this sense nor ways to walk by descriptors."""


def make_folder(path: str, *, mode: int = 0o755) -> list[str]:
    """Make the folder `path` and its missing parents with this mode, whatever the umask is; one that is there must be ours.

    Returns those that were missing, `path` first; nothing was synced yet.

    Raises:
        RefusedError: another user can write there.
        OSError: something else has one of these names, or the disk says no.
    """
    if not _KNOWS_OWNERS:
        return _make_plainly(path, mode)
    made: list[str] = []
    _walk(os.path.abspath(path), made, mode=mode)
    return made[::-1]


def make_closed_folder(path: str) -> None:
    """`make_folder` for this user alone: one that is there must be a folder itself, and closed to all others.

    Raises:
        RefusedError: it is a link, or others may enter it.
        OSError: as `make_folder`.
    """
    make_folder(path, mode=0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise RefusedError(f"{path} is a link", hint="Look at where it leads, then remove it")
    if _KNOWS_OWNERS and found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise RefusedError(
            f"others may enter {path} (mode {stat.S_IMODE(found.st_mode):04o})", hint="Look at it, then remove it"
        )


def check_folder(path: str, *, private: bool = False) -> None:
    """Whether the folder `path`, where it is there, is ours; `private`: no group may write to it either.

    Raises:
        RefusedError: another user can write there.
        OSError: it cannot be looked at.
    """
    if not _KNOWS_OWNERS:
        return
    try:
        found = _walk(os.path.abspath(path), None)
    except FileNotFoundError:
        return
    if private and found.st_mode & stat.S_IWGRP:
        raise RefusedError(f"a group can write to {path}", hint=f"Run 'chmod go-w {path}'")


def is_ours(path: str) -> bool:
    """Whether the folder `path` is there, and ours. Raises `OSError`."""
    try:
        check_folder(path)
    except RefusedError:
        return False
    return os.path.isdir(path)


def _make_plainly(path: str, mode: int) -> list[str]:
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        os.mkdir(folder, mode)
    return missing


def _walk(path: str, made: list[str] | None, mode: int = 0) -> os.stat_result:
    """What `path` is, every step to it checked. Where `made` is given, missing ones are made with `mode` and added to it."""
    names, here, links = deque(_names(path)), "/", 0
    with ExitStack() as stack:
        descriptor, found = _enter("/", None, stack)
        while names:
            _check(here, found, is_last=False)
            name = names.popleft()
            there = os.path.join(here, name)
            below = _look_at(name, descriptor) or _make(name, descriptor, mode, there, made)
            if not stat.S_ISLNK(below.st_mode):
                here, (descriptor, found) = there, _enter(name, descriptor, stack)
                continue
            _check_owner(there, below)
            links += 1
            if links > _LINKS_MAX:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            names.extendleft(
                reversed(_names(os.path.normpath(os.path.join(here, os.readlink(name, dir_fd=descriptor)))))
            )
            here, (descriptor, found) = "/", _enter("/", None, stack)
        _check(here, found, is_last=True)
        return found


def _enter(name: str, above: int | None, stack: ExitStack) -> tuple[int, os.stat_result]:
    """The folder `name`, open until the end: few are on one way."""
    descriptor = os.open(name, _LOOK, dir_fd=above)
    stack.callback(os.close, descriptor)
    return descriptor, os.fstat(descriptor)


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name]


def _look_at(name: str, folder: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _make(name: str, folder: int, mode: int, path: str, made: list[str] | None) -> os.stat_result:
    if made is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    # Where another process of ours is first, whose it is shows when it is checked.
    with suppress(FileExistsError):
        os.mkdir(name, mode, dir_fd=folder)
        os.chmod(name, mode, dir_fd=folder)
        made.append(path)
    return os.stat(name, dir_fd=folder, follow_symlinks=False)


def _check(folder: str, found: os.stat_result, *, is_last: bool) -> None:
    """Raises `RefusedError`."""
    _check_owner(folder, found)
    open_to_all = found.st_mode & stat.S_IWOTH
    if open_to_all and (is_last or not found.st_mode & stat.S_ISVTX):
        raise RefusedError(
            f"everybody can write to {folder}, and so replace what Waystation puts there",
            hint=f"Run 'chmod o-w {folder}', or name another folder",
        )


def _check_owner(path: str, found: os.stat_result) -> None:
    """Raises `RefusedError`."""
    if found.st_uid not in _trusted():
        raise RefusedError(
            f"{path} belongs to another user (uid {found.st_uid}), who could replace what Waystation puts there",
            hint=f"Run 'chown {os.geteuid()} {path}', or name another folder",
        )


def _trusted() -> frozenset[int]:
    return frozenset({0, os.geteuid()}) | _unmapped()


@cache
def _unmapped() -> frozenset[int]:
    """As whom the system's root shows in a user namespace that does not map it (user_namespaces(7))."""
    try:
        with open("/proc/self/uid_map", "rb") as map, open("/proc/sys/kernel/overflowuid", "rb") as overflow:
            is_whole = any(int(line.split()[2]) == 0xFFFFFFFF for line in map)
            return frozenset() if is_whole else frozenset({int(overflow.read())})
    except (OSError, ValueError, IndexError):
        return frozenset()
