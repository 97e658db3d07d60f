"""A small file that is there as a whole or not at all, also after a power cut. Told once, used by all."""

from __future__ import annotations

import os


def write_durably(path: str, data: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `data`: temporary file beside it → write → fsync → rename → fsync folder.

    Raises:
        OSError: nothing changed, and no temporary file is left.
    """
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    sync_folder(os.path.dirname(path) or ".")


def make_folder(path: str, *, mode: int = 0o755) -> list[str]:
    """Make the folder `path` with this mode, and its missing parents with 0755: whatever the umask is.

    Returns those that were missing, `path` first; nothing was synced yet.

    Raises:
        OSError: something else has one of these names, or the disk says no.
    """
    path = os.path.abspath(path)
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        wanted = mode if folder == missing[0] else 0o755
        try:
            os.mkdir(folder, wanted)
        except FileExistsError:
            if not os.path.isdir(folder):
                raise
        else:
            os.chmod(folder, wanted)
    return missing


def sync_folder(folder: str) -> None:
    """Make what was renamed, created or removed in `folder` durable."""
    if os.name == "nt":  # it has no handle of a folder to sync; its file system journals renames
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
