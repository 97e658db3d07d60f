"""A script is started by its first line or its extension, and sees little of us."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from agent.runs.scripts import base_environment, command_for
from relay.errors import UsageError


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.sh", "echo", ["sh"]),
        ("a.py", "print()", ["python3"]),
        ("A.PY", "print()", ["python3"]),
        ("a.ps1", "exit", ["pwsh", "-NoProfile", "-NonInteractive", "-File"]),
        ("a.cmd", "exit", ["cmd", "/d", "/c"]),
        ("a", "#!/bin/sh\necho", ["/bin/sh"]),
        ("a", "#!/bin/sh", ["/bin/sh"]),
        ("a.py", "#!/bin/sh\n", ["/bin/sh"]),
        ("a", "#! /usr/bin/env bash\n", ["/usr/bin/env", "bash"]),
        ("a", "#!/usr/bin/env -S python3 -u\n", ["/usr/bin/env", "-S python3 -u"]),
        ("a", "#!/bin/sh -e\r\necho\r\n", ["/bin/sh", "-e"]),
        ("a.sh", "#!\n/bin/other", ["sh"]),
    ],
)
def test_the_first_line_wins_then_the_extension(tmp_path: Path, name: str, text: str, expected: list[str]) -> None:
    path = tmp_path / name
    path.write_text(text, newline="")
    assert command_for(str(path), {}) == [*expected, str(path)]


def test_interpreters_are_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.ps1"
    path.write_text("exit")
    assert command_for(str(path), {".ps1": "powershell -NoProfile -File"})[:-1] == ["powershell", "-NoProfile", "-File"]
    other = tmp_path / "a.rb"
    other.write_text("exit")
    assert command_for(str(other), {".rb": "'/opt/my ruby/ruby'"}) == ["/opt/my ruby/ruby", str(other)]


@pytest.mark.parametrize("name", ["a", "a.exe", ".sh"])
def test_a_script_that_nobody_can_start_is_refused_with_what_is_expected(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\x7fELF\0")
    with pytest.raises(UsageError, match=r"expected a first line such as #!/bin/sh, or one of the extensions .*\.ps1"):
        command_for(str(path), {})


def test_a_script_that_is_not_there_is_the_systems_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        command_for(str(tmp_path / "a.sh"), {})


def test_a_script_needs_no_execute_permission(tmp_path: Path) -> None:
    path = tmp_path / "a b"
    path.write_text("#!/bin/sh -e\nfalse\necho never\n")
    assert not os.access(path, os.X_OK) or os.geteuid() == 0
    done = subprocess.run(command_for(str(path), {}), capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


def test_scripts_see_where_things_are_and_nothing_that_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setenv("WAYSTATION_TOKEN", "hidden")
    monkeypatch.setenv("LD_PRELOAD", "")
    seen = base_environment()
    assert (seen["PATH"], seen["TZ"]) == ("/bin", "UTC")
    assert not {"TMPDIR", "WAYSTATION_TOKEN", "LD_PRELOAD", "PYTHONPATH"} & set(seen)
