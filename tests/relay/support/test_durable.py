"""The durable write of small files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from relay.support import durable
from relay.support.durable import write_durably


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


AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away: owners are NOT looked at")


def look(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


@AS_ROOT
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o2640])
def test_a_file_that_is_rewritten_keeps_owner_group_and_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "relay.yaml"
    path.write_text("old")
    os.chown(path, 4321, 1234)
    path.chmod(mode)
    write_durably(str(path), b"new", mode=0o600)
    assert (look(path), path.read_text()) == ((4321, 1234, mode), "new")


@AS_ROOT
def test_a_link_is_followed_and_what_it_names_keeps_its_owner(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    os.chown(tmp_path / "real", 4321, 1234)
    (tmp_path / "link").symlink_to("real")
    write_durably(str(tmp_path / "link"), b"new")
    assert (tmp_path / "link").is_symlink()
    assert (look(tmp_path / "real")[:2], (tmp_path / "real").read_text()) == ((4321, 1234), "new")


def test_an_owner_that_cannot_be_kept_is_taken_over_or_refused_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    path.chmod(0o640)

    def not_permitted(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(durable.os, "fchown", not_permitted)
    monkeypatch.setattr(durable, "_is_owned_alike", lambda *_: False)
    with pytest.raises(PermissionError, match="cannot be kept"):
        write_durably(str(path), b"new", must_keep_owner=True)
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["state"])
    write_durably(str(path), b"new")
    assert (look(path)[2], path.read_text()) == (0o640, "new")


def test_attributes_stay(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    try:
        os.setxattr(path, "user.note", b"ours")
    except (AttributeError, OSError):
        pytest.skip("no extended attributes here: that they stay is NOT looked at")
    write_durably(str(path), b"new")
    assert os.getxattr(path, "user.note") == b"ours"
