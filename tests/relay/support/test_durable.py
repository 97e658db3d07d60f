"""The durable write of small files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from relay.support import durable
from relay.support.durable import make_folder, write_durably


def test_a_file_is_synced_before_its_name_and_its_folder_after(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def recorded_replace(source: str, target: str) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(durable.os, "fsync", recorded_fsync)
    monkeypatch.setattr(durable.os, "replace", recorded_replace)
    write_durably(str(tmp_path / "small"), b"new")
    assert events == ["file", "rename", "folder"]


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    target = tmp_path / "small"
    write_durably(str(target), b"old")
    failed = []

    def no_sync(descriptor: int) -> None:
        failed.append(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", no_sync)
    with pytest.raises(OSError, match="No space"):
        write_durably(str(target), b"new")
    assert failed
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["small"]


def test_the_mode_is_the_one_that_was_asked_for(tmp_path):
    write_durably(str(tmp_path / "key"), b"secret", mode=0o600)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_folders_have_their_modes_whatever_the_umask_is(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        make_folder(str(tmp_path / "open" / "inner" / "closed"), mode=0o700)
        make_folder(str(tmp_path / "open"), mode=0o700)
    finally:
        os.umask(before)

    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("open", "open/inner", "open/inner/closed")]
    assert modes == [0o755, 0o755, 0o700], "a folder that is there stays as it is"


def test_a_file_in_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            make_folder(str(path))
