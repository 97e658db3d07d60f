"""What every folder of an agent's needs: its errors told, its files replaced, its folders removed."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress

from relay.errors import StoreError


def store_error(error: OSError, where: str, *, full_hint: str = "") -> StoreError:
    """What a person is told of a disk that failed; `full_hint` where it is full."""
    full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    return StoreError(f"{where}: {error.strerror or error}", full=full, hint=full_hint if full else "")


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
    shutil.rmtree(aside, ignore_errors=True)
