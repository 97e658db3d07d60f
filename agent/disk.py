"""Small files and folders of an agent's: read, replaced, removed, and what a failing disk means."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import msgspec

from relay.errors import StoreError

T = TypeVar("T")
REMOVED = ".removed-"
"""How the name of a folder begins that is being removed, and may be what a crash left."""
_JSON_MAX = 1 << 20
_UNREAD = (OSError, ValueError, RecursionError)  # msgspec's errors are ValueErrors


@contextmanager
def disk_errors(where: str, *, full_hint: str = "") -> Iterator[None]:
    """An `OSError` inside becomes a `StoreError` in a person's words, with `full_hint` where the disk is full."""
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        raise StoreError(f"{where}: {error.strerror or error}", full=full, hint=full_hint if full else "") from error


def read_json(path: str, type: type[T]) -> T | None:
    """What the file says; None where there is none, or it cannot be read as such: `damage_of` tells which."""
    try:
        found: T = _read_json(path, type)
    except _UNREAD:
        return None
    return found


def damage_of(path: str, type: object) -> str:
    """Why a JSON file does not say what it should; empty where it does, and where there is none."""
    try:
        _read_json(path, type)
    except FileNotFoundError:
        return ""
    except _UNREAD as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def _read_json(path: str, type: Any) -> Any:  # noqa: ANN401 - whatever `type` is
    with open(path, "rb") as file:
        return msgspec.json.decode(file.read(_JSON_MAX), type=type)


def replace_file(path: str, data: bytes) -> None:
    """Whole or not at all for every reader; durable when the system gets to it. Raises `OSError`."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
    os.replace(temporary, path)


def remove_folder(folder: str) -> None:
    """Remove it in one step for every reader: it takes another name first, so it is never seen half removed."""
    parent, name = os.path.split(folder)
    aside = os.path.join(parent, f"{REMOVED}{name}")
    # A crash may have left one of the same name, and only an empty folder can be renamed over.
    remove_all(aside)
    with suppress(OSError):
        os.rename(folder, aside)
    remove_all(aside)


def remove_all(path: str) -> None:
    """A folder with all that is in it, or what somebody put in its place; a link is not followed."""
    with suppress(OSError):
        os.unlink(path)
    shutil.rmtree(path, ignore_errors=True)
