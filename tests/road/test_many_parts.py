"""95,000 parts whose paths have 150 characters go from `package add` to a machine, each process within its memory."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from harness.process import environment, run
from harness.relays import RelayProcess
from harness.seed import SOAK

PARTS, CHARACTERS = 95_000, 150
MOST = {"add": 400 << 20, "relay": 400 << 20, "pull": 320 << 20}
"""Bytes. Measured: 280, 310 with both versions, and 210 MB."""


def path_of(number: int) -> str:
    name = hashlib.sha256(str(number).encode()).hexdigest()
    folder = f"content/{name[:2]}/node_modules/some-package-of-{name[2:10]}/dist/{number:06}/"
    return f"{folder}{(name * 3)[: CHARACTERS - len(folder) - 3]}.js"


def nupkg_of(folder: Path, version: str) -> Path:
    path = folder / f"Case.Many.{version}.nupkg"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            zipfile.ZipInfo("Case.Many.nuspec"),
            f"<package><metadata><id>Case.Many</id><version>{version}</version><authors>a</authors>"
            "<description>d</description></metadata></package>",
        )
        for number in range(PARTS):
            archive.writestr(zipfile.ZipInfo(path_of(number)), f"{number} {version if number % 1000 == 0 else ''}")
    return path


@pytest.mark.processes
@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="many parts go the whole road in `make soak CHAPTER=road`")
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc: the memory taken is NOT measured")
def test_many_parts_and_their_next_version_reach_a_machine(tmp_path: Path) -> None:
    home, root, agent = tmp_path / "home", tmp_path / "srv", tmp_path / "agent"
    trust = run(home, "trust", "init", "--json").json["trust"]
    run(agent, "agent", "init", "--home", agent, "--name", "m1", "--trust", trust)
    with RelayProcess(tmp_path, "--store", f"disk:{tmp_path / 'store'}") as relay:
        for version in ("1.0.0", "1.0.1"):
            added = measured(home, "package", "add", nupkg_of(tmp_path, version))
            assert added < MOST["add"], f"{added >> 20} MiB"
            run(home, "package", "replicate", "Case.Many", version, "--relay", relay.url)
            words = ("agent", "pull", "Case.Many", version, "--home", agent, "--root", root, "--relay", relay.url)
            pulled = measured(agent, *words)
            assert pulled < MOST["pull"], f"{pulled >> 20} MiB"
        assert peak_of(relay.pid) < MOST["relay"]
    tree = next((root / "releases").glob("1.0.1-*"))
    for number in range(0, PARTS, 500):
        assert (tree / path_of(number)).read_text() == f"{number} {'1.0.1' if number % 1000 == 0 else ''}"
    assert sum(len(files) for _, _, files in os.walk(tree)) == PARTS


def measured(home: Path, *words: object) -> int:
    """Bytes that a command had resident at most. It is a process of its own, as a fork begins with what its parent had."""
    command = [sys.executable, "-c", _MEASURED, *map(str, words)]
    done = subprocess.run(command, env=environment(home), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(re.findall(r"peak (\d+)", done.stdout)[-1])


_MEASURED = """
import atexit, re
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) << 10
atexit.register(lambda: print("peak", peak(), flush=True))
import relay.main
relay.main.main()
"""


def peak_of(pid: int) -> int:
    return int(re.findall(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0]) << 10
