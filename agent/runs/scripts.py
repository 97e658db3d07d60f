"""How a script is started, and what of our own environment it sees."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Final

from relay.errors import UsageError

_SHEBANG_BYTES: Final = 256
"""As much of the first line as Linux reads (BINPRM_BUF_SIZE)."""

_INTERPRETERS: Final[Mapping[str, tuple[str, ...]]] = {
    ".sh": ("sh",),
    ".py": ("python3",),
    ".ps1": ("pwsh", "-NoProfile", "-NonInteractive", "-File"),
    ".cmd": ("cmd", "/d", "/c"),
}

_PASSED_ON: Final = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR",
    # Without these no program starts on Windows.
    "SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "COMSPEC", "PATHEXT", "TEMP", "TMP", "USERNAME", "USERPROFILE",
    "PROGRAMDATA", "PROGRAMFILES",
)  # fmt: skip


def command_for(path: str, interpreters: Mapping[str, str]) -> list[str]:
    """The command that runs the script `path`: by its first line (`#!`), else by its extension.

    It needs no execute permission: the interpreter is started with the path as its last argument. As Linux reads a first
    line, all that follows the interpreter's name is one argument; unlike it, a line's end of Windows does not matter.

    Args:
        path: of the script, absolute.
        interpreters: by extension, such as {".ps1": "powershell -File"}; they win over the usual ones.

    Raises:
        UsageError: neither its first line nor its extension says how it is started.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(_SHEBANG_BYTES)
    if start.startswith(b"#!"):
        words = os.fsdecode(start[2:].partition(b"\n")[0].strip()).split(maxsplit=1)
        if words:
            return [*words, path]
    extension = os.path.splitext(path)[1].lower()
    named = {key.lower(): tuple(shlex.split(value)) for key, value in interpreters.items()}
    command = named.get(extension) or _INTERPRETERS.get(extension)
    if command is None:
        known = ", ".join(sorted({*_INTERPRETERS, *named}))
        raise UsageError(
            f"cannot tell how to start {os.path.basename(path)!r}: expected a first line such as #!/bin/sh, or one of "
            f"the extensions {known}"
        )
    return [*command, path]


def base_environment() -> dict[str, str]:
    """What every script sees of our own environment: where programs, home, language and time are, and nothing else."""
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
