"""Small files and folders of an agent's: read, replaced, removed, and what a failing disk means."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from typing import TypeVar

import msgspec

from relay.errors import StoreError

T = TypeVar("T")
_JSON_MAX = 1 << 20


def store_error(error: OSError, where: str, *, full_hint: str = "") -> StoreError:
    """A disk that failed, in a person's words; `full_hint` where it is full."""
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    return StoreError(f"{where}: {error.strerror or error}", full=full, hint=full_hint if full else "")


def read_json(path: str, type: type[T]) -> T | None:
    """What the file says; None where there is none, or it cannot be read as such."""
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(_JSON_MAX), type=type)
    except (OSError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None


def replace_file(path: str, data: bytes) -> None:
    """Whole or not at all for every reader; durable when the system gets to it. Raises `OSError`."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
    os.replace(temporary, path)


def remove_folder(folder: str, aside: str) -> None:
    """In one step for every reader, by the name `aside` in the same file system: never is it seen half removed."""
    with suppress(OSError):
        os.rename(folder, aside)
    remove_all(aside)


def remove_all(path: str) -> None:
    """A folder with all that is in it, or what somebody put in its place; a link is not followed."""
    with suppress(OSError):
        os.unlink(path)
    shutil.rmtree(path, ignore_errors=True)
