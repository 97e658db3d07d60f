"""All that differs by operating system stands in `agent/platform.py`: no other module of the agent asks for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

AGENT = Path(__file__).parent.parent / "agent"
WALL = "platform.py"

MODULES = {
    "_winapi", "ctypes", "fcntl", "grp", "msvcrt", "nt", "ntpath", "platform", "posix", "posixpath", "pty", "pwd",
    "resource", "signal", "spwd", "syslog", "termios", "tty", "winreg",
}  # fmt: skip
"""Modules that exist, or mean something, on one system only."""
OS_NAMES = {
    "access", "chmod", "chown", "chroot", "fchmod", "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getpgid",
    "getuid", "kill", "killpg", "lchown", "link", "lockf", "mkfifo", "mknod", "name", "nice", "pread", "pwrite", "readlink",
    "register_at_fork", "sendfile", "setpgid", "setsid", "setuid", "setgid", "startfile", "statvfs", "symlink", "sync",
    "umask", "uname", "wait4", "waitpid",
    "O_BINARY", "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_PATH", "O_TMPFILE",
}  # fmt: skip
"""Of `os`: absent somewhere, or with another meaning there."""
STAT_FIELDS = {"st_uid", "st_gid", "st_blocks", "st_flags"}
METHODS = {"hardlink_to", "symlink_to", "readlink", "lchmod"}
"""Of pathlib."""
QUOTED = {"/proc", "/sys/", "/dev/", "/etc/", "C:\\"}


def violations(source: str) -> Iterator[str]:
    """What in a module's text asks the operating system who it is, with the line."""
    for node in ast.walk(ast.parse(source)):
        found = _violation(node)
        if found:
            yield f"line {getattr(node, 'lineno', 0)}: {found}"


def _violation(node: ast.AST) -> str:
    match node:
        case ast.Import(names=names):
            wrong = [alias.name for alias in names if alias.name.partition(".")[0] in MODULES]
            return f"import {wrong[0]}" if wrong else ""
        case ast.ImportFrom(module=str(module), level=0, names=names):
            if module.partition(".")[0] in MODULES:
                return f"from {module} import …"
            wrong = [alias.name for alias in names if (module, alias.name) in _FORBIDDEN]
            return f"from {module} import {wrong[0]}" if wrong else ""
        case ast.Attribute(value=ast.Name(id=owner), attr=attribute) if (owner, attribute) in _FORBIDDEN:
            return f"{owner}.{attribute}"
        case ast.Attribute(attr=attribute) if attribute in STAT_FIELDS | METHODS:
            return f".{attribute}"
        case ast.Constant(value=str(text)) if any(text.startswith(start) for start in QUOTED):
            return repr(text)
    return ""


_FORBIDDEN = {("sys", name) for name in ("platform", "getwindowsversion")} | {("os", name) for name in OS_NAMES}


@pytest.mark.parametrize(
    "module", sorted(path for path in AGENT.rglob("*.py") if path.name != WALL), ids=lambda path: path.name
)
def test_only_the_platform_module_asks_for_the_platform(module: Path) -> None:
    assert list(violations(module.read_text(encoding="utf-8"))) == []


def test_the_wall_stands_for_something() -> None:
    assert len(list(violations((AGENT / WALL).read_text(encoding="utf-8")))) > 10


@pytest.mark.parametrize(
    "text",
    [
        "import sys\nif sys.platform == 'win32': pass",
        "import os\nif os.name == 'nt': pass",
        "import platform",
        "from platform import system",
        "def f():\n    import fcntl",
        "import ctypes.util",
        "import os\nos.symlink('a', 'b')",
        "from os import readlink",
        "import os\nos.statvfs('.')",
        "import os\nflags = os.O_RDONLY | os.O_NOFOLLOW",
        "import os\nos.stat('.').st_uid",
        "from pathlib import Path\nPath('a').symlink_to('b')",
        "import signal\nsignal.SIGKILL",
        "open('/proc/self/stat')",
    ],
)
def test_the_test_finds_what_it_looks_for(text: str) -> None:
    assert len(list(violations(text))) == 1


@pytest.mark.parametrize(
    "text", ["from agent import platform", "import os\nos.open('x', os.O_RDONLY)", "name = 'os.name'"]
)
def test_the_test_lets_through_what_is_the_same_everywhere(text: str) -> None:
    assert list(violations(text)) == []
