"""The script files beside a process or an environment, as planning asks for them; and whether git tracks a file."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from typing import Final, Protocol

from relay.errors import RefusedError
from relay.written.yaml_positions import open_without_waiting

SCRIPT_MAX: Final = 4 << 20
"""Bytes of one script."""
_GIT_SECONDS: Final = 10.0


class ScriptPathError(RefusedError):
    """A script that cannot be taken. The message says why, and what is expected."""


class Files(Protocol):
    """All that planning asks of a file system."""

    def script(self, folder: str, path: str) -> str:
        """SHA-256 (hex) of the script `path` below `folder`. Raises `ScriptPathError`."""

    def is_tracked(self, path: str) -> bool:
        """Whether git tracks the file at the absolute path `path`."""


class OnDisk:
    """This machine's files."""

    def __init__(self) -> None:
        self._hashes: dict[tuple[str, str], str] = {}

    def script(self, folder: str, path: str) -> str:
        """See `Files`. Read once: a plan does not see a script change while it is made."""
        known = self._hashes.get((folder, path))
        if known is None:
            known = self._hashes[folder, path] = hashlib.sha256(read_script(folder, path)).hexdigest()
        return known

    def is_tracked(self, path: str) -> bool:
        """See `Files`. Where git is missing or knows no repository there, nothing is tracked."""
        return any(_git_tracks(one) for one in dict.fromkeys((path, os.path.realpath(path))))


def read_script(folder: str, path: str) -> bytes:
    """The bytes of the script `path` below `folder`.

    Raises:
        ScriptPathError: the path leaves the folder (by itself or by a link), or names no regular file of at most
            `SCRIPT_MAX` bytes.
    """
    check_script_path(path)
    root = os.path.realpath(folder)
    real = os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([root, real]) != root:
        raise ScriptPathError(f"{path!r} is a link that leads out of {folder}: put the script itself there")
    try:
        with open(real, "rb", opener=open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ScriptPathError(f"{path!r} is no regular file: expected a script")
            data = file.read(SCRIPT_MAX + 1)
    except FileNotFoundError as error:
        raise ScriptPathError(f"there is no script {path!r} in {folder}: write it, or correct the path") from error
    except OSError as error:
        raise ScriptPathError(f"{path!r} cannot be read: {error.strerror}") from error
    if len(data) > SCRIPT_MAX:
        raise ScriptPathError(f"{path!r} is larger than {SCRIPT_MAX} bytes: put what is large into a package")
    return data


def check_script_path(path: str) -> None:
    """Raises `ScriptPathError` unless `path` is a plain relative one: no `..`, no `.`, no drive, `/` between parts."""
    parts = path.split("/")
    plain = path.isprintable() and not any(character in path for character in "\\:")
    if not plain or any(part in {"", ".", ".."} for part in parts):
        expected = "expected one below this file's folder, such as ops/check.sh"
        raise ScriptPathError(f"{path!r} is no path of a script: {expected}")


def _git_tracks(path: str) -> bool:
    folder, name = os.path.split(path)
    # Repositories of other owners count too; their hooks must not run for a question.
    settings = ("-c", "safe.directory=*", "-c", "core.fsmonitor=false")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *settings, "ls-files", "--error-unmatch", "--", f":(literal){name}"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
