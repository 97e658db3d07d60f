"""The README's commands are run, in order, in one shell, as a reader would; what it shows of their output is compared.

A reader's folders are a temporary HOME, the relay's port 7400 is a free one here, and `waystation` is the one of this
environment. Nothing else differs: the shell blocks are taken from the page as they stand.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from harness.pages import ROOT, Block, blocks

PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
WALK = PAGE[: PAGE.index("\n## The first release in five minutes\n")].count("\n")
"""The line before it: what stands above only shows."""
STEPS = [one for one in blocks(PAGE) if one.info in {"sh", "text"} and one.line > WALK]
PORT = "7400"
PATIENCE = 60.0
"""Seconds for one block, on a machine that is busy with other things."""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the README's commands are for a POSIX shell")


class Shell:
    """One bash that is given blocks and tells what each printed; it ends at the first command that fails."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash", "-eu"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=dict(environment),
            start_new_session=True,
        )
        self._blocks = 0

    def run(self, commands: str, *, until: Sequence[str] = ()) -> str:
        """Run a block; go on reading after it until its background processes printed each of the lines `until`."""
        self._blocks += 1
        mark = f"--- end of block {self._blocks}"
        assert self._process.stdin is not None
        self._process.stdin.write(f"{commands}\necho {shlex.quote(mark)}\n".encode())
        self._process.stdin.flush()
        printed = self._read([mark, *until])
        return printed.replace(f"{mark}\n", "")

    def _read(self, wanted: list[str]) -> str:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        printed = b""
        deadline = time.monotonic() + PATIENCE
        while not all(f"{one}\n".encode() in printed for one in wanted):
            ready, _, _ = select.select([descriptor], [], [], 0.2)
            if ready:
                printed += os.read(descriptor, 1 << 16)
            elif self._process.poll() is not None:
                # What it left in the background may keep the pipe open.
                pytest.fail(f"the shell ended with {self._process.returncode} after it printed:\n{printed.decode()}")
            elif time.monotonic() > deadline:
                pytest.fail(f"the shell hangs after it printed:\n{printed.decode()}")
        return printed.decode()

    def close(self) -> None:
        """End the shell and what it left in the background; both are in a session of their own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        self._process.communicate(timeout=PATIENCE)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WAYSTATION_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    home = tmp_path / "home"
    folder = tmp_path / "work"
    home.mkdir()
    folder.mkdir()
    found = Shell(folder, kept | {"HOME": str(home), "PATH": path, "NO_PROXY": "*"})
    yield found
    found.close()


def _matches(expected: str, printed: str) -> bool:
    """Whether the lines shown on the page are those printed: … stands for anything in a line, and spaces for any spaces;
    a line with nothing but … stands for any lines, or none.
    """

    def pattern(line: str) -> str:
        return r"[^\S\n]+".join(r"[^\n]*".join(map(re.escape, word.split("…"))) for word in line.split())

    lines = [
        r"(?:[^\n]*\n)*" if line.strip() == "…" else rf"{pattern(line)}\n" for line in expected.strip().splitlines()
    ]
    stripped = "".join(f"{line.strip()}\n" for line in printed.strip().splitlines())
    return re.fullmatch("".join(lines), stripped) is not None


def _pairs() -> list[tuple[Block, str]]:
    """Each shell block with the output that the page shows for it ("" where it shows none)."""
    found: list[tuple[Block, str]] = []
    for step in STEPS:
        if step.info == "sh":
            found.append((step, ""))
        else:
            assert found, "output is shown before any command"
            found[-1] = (found[-1][0], step.text)
    return found


def test_the_commands_of_the_readme_do_what_it_says(shell: Shell) -> None:
    port = _free_port()
    pairs = _pairs()
    assert len(pairs) >= 7, "the blocks of the README are not found any more"
    for step, expected in pairs:
        commands, shown = step.text.replace(PORT, port), expected.replace(PORT, port)
        in_background = re.search(r"&$", commands, re.MULTILINE) is not None
        printed = shell.run(commands, until=shown.strip().splitlines() if in_background else ())
        if in_background:
            # Processes of their own: which of them is ready first is nobody's promise.
            assert sorted(printed.splitlines()) == sorted(shown.strip().splitlines())
        elif shown:
            assert _matches(shown, printed), f"README.md, line {step.line}: it shows\n{shown}\nand this came\n{printed}"


def test_the_comparison_sees_another_output() -> None:
    assert _matches("a  … b\nc", "a  x y b\nc\n")
    assert _matches("…\na\n…\nb\n…", "a\nx\ny\nb\nc")
    assert not _matches("hello, version 2", "hello, version 1")
    assert not _matches("a\nb", "a\nx\nb")
    assert not _matches("a … b", "a x\ny b")
    assert not _matches("…\nb\n…\na", "a\nb")


def test_the_readmes_set_up_is_what_make_test_ran() -> None:
    """`make test` begins with this script, so it has been run where this test runs; here its words are held to it."""
    (setup,) = [one.text.splitlines() for one in blocks(PAGE) if one.info == "sh setup"]
    script, path = setup
    assert os.access(ROOT / script, os.X_OK)
    assert path == 'export PATH="$PWD/.venv/bin:$PATH"'
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^test:\n\t@{re.escape(script)}", makefile, re.MULTILINE)


def test_every_make_target_that_our_pages_name_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set()
    for name in ("README.md", "CONTRIBUTING.md", "docs/architecture.md"):
        named |= set(re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets
