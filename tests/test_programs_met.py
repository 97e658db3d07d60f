from __future__ import annotations

import shutil
from pathlib import Path

import programs_met as met
import pytest


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        ("HAProxy version 2.6.12-1+deb12u4 2026/10/17 - https://haproxy.org/", "2.6.12-1+deb12u4"),
        ("nginx version: nginx/1.22.1", "1.22.1"),
        ("rdiff (librsync 2.3.2)\nCopyright (C) 1997-2016 by Martin Pool", "2.3.2"),
        ("*** Zstandard CLI (64-bit) v1.5.4, by Yann Collet ***", "1.5.4"),
        ("\n7-Zip [64] 26.02 : Copyright (c) 1999-2026 Igor Pavlov", "26.02"),
        ("Copyright (c) 1990-2008 Info-ZIP - Type 'zip \"-L\"'\nThis is Zip 3.0 (July 5th 2008)", "3.0"),
        ("ip utility, iproute2-6.1.0, libbpf 1.1.2", "6.1.0"),
        ("casync 2", "2"),
        ("", "?"),
    ],
)
def test_a_version_is_found_in_what_a_program_prints(printed: str, version: str) -> None:
    assert met.version_in(printed) == version


def test_programs_are_told_with_their_versions_broken_ones_with_a_question_mark_and_missing_ones_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("curl", "#!/bin/sh\necho curl 8.1.2\n"), ("rsync", "#!/nowhere/sh\n"), ("zstd", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(met, "PATH", str(tmp_path))
    _, programs, missing = met.programs_met()
    assert programs == "programs: curl 8.1.2, rsync ?, zstd ?"
    assert "nginx" in missing
    assert "curl" not in missing


def test_the_head_of_a_run_tells_the_programs(pytestconfig: pytest.Config) -> None:
    parts = pytestconfig.hook.pytest_report_header(config=pytestconfig, start_path=Path())
    (told,) = [line for lines in parts for line in lines if line.startswith("programs: ")]
    assert all(f"{name} " in told for name in met.VERSION_OPTIONS if shutil.which(name, path=met.PATH))
