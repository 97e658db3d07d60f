"""The one rule of whose a folder must be before Waystation writes into it."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relay.errors import RefusedError
from relay.folders import check_folder, is_ours, make_folder

OTHER = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files to another user")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Below /tmp itself: a sticky folder that is open to all."""
    made = tempfile.mkdtemp(prefix="folders-")
    yield Path(made)
    shutil.rmtree(made)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_folders_have_their_modes_whatever_the_umask_is(folder: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        made = make_folder(str(folder / "closed" / "inner"), mode=0o700)
        make_folder(str(folder / "open" / "inner"))
        make_folder(str(folder / "open"), mode=0o700)
    finally:
        os.umask(before)

    assert made == [str(folder / "closed" / "inner"), str(folder / "closed")]
    assert [mode_of(folder / name) for name in ("closed", "closed/inner", "open/inner")] == [0o700, 0o700, 0o755]
    assert mode_of(folder / "open") == 0o755, "a folder that is there stays as it is"


def test_a_file_in_place_of_a_folder_is_told(folder: Path) -> None:
    (folder / "file").write_text("x")
    for path in (folder / "file", folder / "file" / "below"):
        with pytest.raises(NotADirectoryError):
            make_folder(str(path))


def open_to_all(folder: Path) -> None:
    folder.chmod(0o777)


def sticky_and_open_to_all(folder: Path) -> None:
    folder.chmod(0o1777)


def given_away(folder: Path) -> None:
    os.chown(folder, OTHER, OTHER)


def a_link_of_another_user(folder: Path) -> None:
    folder.rmdir()
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    os.lchown(folder, OTHER, OTHER)


@needs_root
@pytest.mark.parametrize(
    "harm", [open_to_all, sticky_and_open_to_all, given_away, a_link_of_another_user], ids=lambda harm: harm.__name__
)
def test_a_folder_that_another_user_can_write_to_is_refused_and_nothing_is_made(
    folder: Path, harm: Callable[[Path], None]
) -> None:
    root = folder / "root"
    root.mkdir()
    harm(root)

    for refuse in (check_folder, make_folder):
        with pytest.raises(RefusedError, match=str(root)):
            refuse(str(root))
    assert not is_ours(str(root))
    if harm is not sticky_and_open_to_all:
        with pytest.raises(RefusedError, match=str(root)):
            make_folder(str(root / "releases"))
    assert list(root.iterdir()) == []


@needs_root
@pytest.mark.parametrize("harm", [open_to_all, given_away, a_link_of_another_user], ids=lambda harm: harm.__name__)
def test_a_folder_is_no_safer_than_those_above_it(folder: Path, harm: Callable[[Path], None]) -> None:
    (folder / "above").mkdir()
    harm(folder / "above")
    (folder / "above" / "root").mkdir()

    with pytest.raises(RefusedError, match="above"):
        check_folder(str(folder / "above" / "root"))


def test_links_of_our_own_are_followed(folder: Path) -> None:
    (folder / "disk" / "data").mkdir(parents=True)
    (folder / "srv").symlink_to("disk/./data")
    (folder / "again").symlink_to(folder / "srv" / ".." / "srv")

    make_folder(str(folder / "again" / "root"))

    assert (folder / "disk" / "data" / "root").is_dir()
    (folder / "round").symlink_to("round")
    with pytest.raises(OSError, match="symbolic"):
        check_folder(str(folder / "round"))


def test_a_private_folder_is_none_that_a_group_can_write_to(folder: Path) -> None:
    folder.chmod(0o770)

    check_folder(str(folder))
    with pytest.raises(RefusedError, match="chmod"):
        check_folder(str(folder), private=True)
    check_folder(str(folder / "missing"), private=True)
