"""What is moved in a benchmark: real packages where they lie beside the project, else packs of installed files."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

SHARED = str(Path(__file__).resolve().parents[3] / "shared" / "data")
"""Real packages, where they lie beside the project."""


def real_package(name: str) -> str | None:
    """The path of `packages/NAME` of the shared data, or None."""
    path = os.path.join(SHARED, "packages", name)
    return path if os.path.exists(path) else None


def installed_files(folder: str, limit: int, *roots: str) -> int:
    """Copy installed files of this system into `folder`, about `limit` bytes. Returns bytes.

    They are those below `roots`: by default libraries, then Python's own files.
    """
    copied = 0
    for index, path in enumerate(_candidates(roots or _ROOTS)):
        if copied >= limit:
            break
        target = os.path.join(folder, f"{index % 16:02}", os.path.basename(path))
        if os.path.exists(target):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(path, target)
        copied += os.path.getsize(target)
    return copied


_ROOTS = (
    f"/usr/lib/{os.uname().machine}-linux-gnu",
    sysconfig.get_paths()["stdlib"],
    sysconfig.get_paths()["purelib"],
)


def _candidates(roots: Iterable[str]) -> Iterator[str]:
    for root in roots:
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            for name in sorted(files):
                path = os.path.join(folder, name)
                if not os.path.islink(path) and os.access(path, os.R_OK) and name.isascii() and _is_plain(name):
                    yield path


def _is_plain(name: str) -> bool:
    return not set(name) & set('<>:"|?*\\%') and not name.endswith((".", " ", ".nuspec"))
