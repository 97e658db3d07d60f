"""A tree is built so that a crash at any point costs only what was in flight, and nobody else can stand in its way."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.packages import Cut, cut_package, noise
from harness.paths import ROOT
from harness.process import forked
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import platform
from agent.trees import tree as trees
from agent.trees.tree import (
    EXTRA,
    IncomingTree,
    check_tree,
    clear_leftovers,
    damage_in,
    is_whole,
    read_chunk,
    take_from,
)
from relay.errors import LockedError, RefusedError, StoreError
from relay.package.chunk import Chunk
from relay.package.manifest import Manifest

LIB = noise("lib", 150_000)
FILES = {
    "bin/app": b"\x7fELF" + noise("app", 100_000),
    "net8/lib.dll": LIB,
    "net9/lib.dll": LIB,
    "data/big.bin": noise("big", 5_000_000),
    "data/empty": b"",
    "empty-only/nothing": b"",
    "/".join(["deep"] * 20) + "/file.txt": b"deep",
    **{f"text/{n}.txt": noise(n, 3_000) for n in range(30)},
}


@pytest.fixture(scope="module")
def cut() -> Cut:
    return cut_package(FILES)


def build(root: Path, cut: Cut, *, upto: int | None = None, target: str = "1.0.0-A") -> IncomingTree:
    tree = IncomingTree(str(root), cut.manifest, target)
    for index in tree.missing[:upto]:
        tree.write(cut.chunk(index))
    return tree


def finished(root: Path, cut: Cut, target: str = "1.0.0-A") -> str:
    tree = build(root, cut, target=target)
    path = tree.finish()
    tree.clear()
    return path


def content(path: str) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


def descriptors() -> set[str]:
    return {
        os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")
    }


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc: open descriptors are NOT counted")


# --- building


def test_the_tree_is_the_packages_files_without_the_container(tmp_path: Path, cut: Cut) -> None:
    path = finished(tmp_path, cut)

    assert path == str(tmp_path / "releases" / "1.0.0-A")
    assert content(path) == FILES
    assert os.listdir(tmp_path / "releases") == ["1.0.0-A"]


OF_A_PACKAGE_FOLDER = FILES | {"package/start.js": b"run()", "package/help.bin": noise("help", 700)}


def test_files_of_a_package_folder_are_taken_out_of_the_chunk_that_they_share_with_the_container(
    tmp_path: Path,
) -> None:
    shared = cut_package(OF_A_PACKAGE_FOLDER)
    mixed = len(shared.manifest.chunks) - 1
    parts = {shared.manifest.parts[extent.part].path for extent in shared.manifest.extents[mixed]}
    assert {"package/start.js", "_rels/.rels"} < parts
    tree = build(tmp_path, shared)
    tree.close()

    again = IncomingTree(str(tmp_path), shared.manifest, "1.0.0-A")
    assert again.missing == [mixed], "what the tree leaves out cannot be read back"
    again.write(shared.chunk(mixed))
    path = again.finish()
    again.clear()

    assert content(path) == OF_A_PACKAGE_FOLDER
    assert is_whole(path, shared.manifest)
    wanted = set(shared.manifest.chunk_ids())
    assert {chunk.id for chunk in take_from(path, shared.manifest, wanted)} == wanted - {
        shared.manifest.chunk_id(mixed)
    }
    os.remove(os.path.join(path, "package/start.js"))
    assert damage_in(path, shared.manifest) == "package/start.js: missing"


def test_a_chunk_that_stands_in_several_places_is_asked_for_once(tmp_path: Path, cut: Cut) -> None:
    tree = build(tmp_path, cut, upto=0)
    ids = [cut.manifest.chunk_id(i) for i in tree.missing]

    assert len(ids) == len(set(ids)) < len(cut.manifest.tree_chunks)
    tree.close()


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, mask: int) -> None:
    files = {"bin/run": b"#!/bin/sh\n", "bin/data": b"x"}
    cut = executable(cut_package(files), "bin/run")
    before = os.umask(mask)
    try:
        path = finished(tmp_path, cut)
    finally:
        os.umask(before)

    modes = {
        name: stat.S_IMODE(os.stat(os.path.join(path, name)).st_mode) for name in ("bin/run", "bin/data", "bin", ".")
    }
    assert modes == {"bin/run": 0o755, "bin/data": 0o644, "bin": 0o755, ".": 0o755}


def executable(cut: Cut, *paths: str) -> Cut:
    """The same package with x bits."""
    from msgspec.structs import replace

    from relay.package.manifest import encode, parse

    parts = tuple(replace(part, executable=part.path in paths) for part in cut.manifest.parts)
    return Cut(parse(encode(replace(cut.manifest.body, parts=parts))), cut.chunks)


def test_a_package_of_empty_files_needs_no_chunk(tmp_path: Path) -> None:
    cut = cut_package({"a/empty": b"", "b": b""})
    tree = IncomingTree(str(tmp_path), cut.manifest, "1.0.0-A")

    assert tree.missing == []
    assert content(tree.finish()) == {"a/empty": b"", "b": b""}
    tree.clear()


def test_a_package_without_a_tree_gives_an_empty_folder(tmp_path: Path) -> None:
    assert content(finished(tmp_path, cut_package({}))) == {}


def test_a_chunk_of_another_package_cannot_be_written(tmp_path: Path, cut: Cut) -> None:
    tree = build(tmp_path, cut, upto=0)

    with pytest.raises(KeyError):
        tree.write(Chunk.of(b"not of this package"))
    tree.close()


# --- a crash


CRASH = """
import os, signal, sys
sys.path[:0] = {paths!r}
import test_tree
from harness.packages import cut_package
from agent import platform
from agent.trees import tree as trees
from agent.trees.tree import IncomingTree

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

cut = cut_package(test_tree.FILES)
tree = IncomingTree({root!r}, cut.manifest, "1.0.0-A")
{plan}
print("survived")
"""
PLANS = {
    "between the target and the tree": ("trees.os.makedirs = die; tree.close(); import shutil;"
                                        "shutil.rmtree(tree.folder); trees.IncomingTree({root!r}, cut.manifest, 'A')"),
    "before anything was written": "die()",
    "between a write and its note": "[tree.write(cut.chunk(i)) for i in tree.missing[:2]]; trees.os.write = die; "
                                    "tree.write(cut.chunk(tree.missing[0]))",
    "in the middle of a chunk": "[tree.write(cut.chunk(i)) for i in tree.missing[:2]]; "
                                "real = platform.write_at; "
                                "platform.write_at = lambda fd, data, at: (real(fd, data[:100], at), die()); "
                                "tree.write(cut.chunk(tree.missing[0]))",
    "with half of it": "[tree.write(cut.chunk(i)) for i in tree.missing[:len(tree.missing) // 2]]; die()",
    "before the sync": "[tree.write(cut.chunk(i)) for i in tree.missing]; platform.sync_tree = die; tree.finish()",
    "before the rename": "[tree.write(cut.chunk(i)) for i in tree.missing]; trees.os.rename = die; tree.finish()",
    "after the rename": "[tree.write(cut.chunk(i)) for i in tree.missing]; trees.sync_folder = die; tree.finish()",
    "before clearing up": "[tree.write(cut.chunk(i)) for i in tree.missing]; tree.finish(); die()",
    "in the middle of clearing up": "[tree.write(cut.chunk(i)) for i in tree.missing]; tree.finish(); "
                                    "trees.os.rename = die; tree.clear()",
}  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_a_crash_anywhere_is_taken_up_again(tmp_path: Path, cut: Cut, plan: str) -> None:
    here = Path(__file__).parent
    script = CRASH.format(
        paths=[str(here), str(ROOT / "tests")], root=str(tmp_path), plan=plan.format(root=str(tmp_path))
    )
    done = forked(tmp_path, script).result()
    assert done.code == -9, f"the crash did not take place: {done}"

    tree = IncomingTree(str(tmp_path), cut.manifest, "1.0.0-B")
    for index in tree.missing:
        tree.write(cut.chunk(index))
    path = tree.finish()
    tree.clear()

    assert content(path) == FILES
    assert is_whole(path, cut.manifest)
    assert os.listdir(tmp_path / "releases") == [os.path.basename(path)]


def test_what_was_written_is_not_asked_for_again_and_the_name_is_kept(tmp_path: Path, cut: Cut) -> None:
    tree = build(tmp_path, cut, upto=4)
    written = set(tree.have)
    tree.close()

    again = IncomingTree(str(tmp_path), cut.manifest, "1.0.0-B")

    assert again.have == written
    assert len(again.have) == 4
    assert again.target == "1.0.0-A"
    again.close()


@pytest.mark.parametrize("torn", [b"\x07", b"\x07\x00", b"\x07\x00\x00"])
def test_a_torn_end_of_the_map_shifts_nothing_after_it(tmp_path: Path, cut: Cut, torn: bytes) -> None:
    tree = build(tmp_path, cut, upto=2)
    tree.close()
    with open(os.path.join(tree.folder, "chunks"), "ab") as map:
        map.write(torn)

    second = IncomingTree(str(tmp_path), cut.manifest, "x")
    assert len(second.have) == 2
    for index in second.missing[:2]:
        second.write(cut.chunk(index))
    second.close()

    third = IncomingTree(str(tmp_path), cut.manifest, "x")
    assert len(third.have) == 4
    third.close()


@given(noted=st.binary(max_size=400))
@settings(max_examples=50, deadline=None)
def test_whatever_the_map_says_only_what_is_there_counts(
    tmp_path_factory: pytest.TempPathFactory, cut: Cut, noted: bytes
) -> None:
    root = tmp_path_factory.mktemp("map")
    tree = build(root, cut, upto=1)
    [written] = tree.have
    tree.close()
    Path(tree.folder, "chunks").write_bytes(noted)

    again = IncomingTree(str(root), cut.manifest, "x")

    assert again.have <= {written}
    again.close()


def test_a_chunk_that_was_damaged_meanwhile_is_asked_for_again(tmp_path: Path, cut: Cut) -> None:
    tree = build(tmp_path, cut)
    tree.close()
    victim = Path(tree.tree, "data/big.bin")
    with victim.open("r+b") as file:
        file.seek(3_000_000)
        file.write(b"\0\0\0\0")

    again = IncomingTree(str(tmp_path), cut.manifest, "x")

    assert len(again.missing) == 1
    again.write(cut.chunk(again.missing[0]))
    assert content(again.finish()) == FILES
    again.clear()


def test_a_chunk_damaged_in_one_of_its_places_is_asked_for_again(tmp_path: Path, cut: Cut) -> None:
    tree = build(tmp_path, cut)
    tree.close()
    Path(tree.tree, "net9/lib.dll").write_bytes(b"edited")

    again = build(tmp_path, cut)

    assert content(again.finish()) == FILES
    again.clear()


def test_a_finished_tree_that_somebody_removed_is_built_again(tmp_path: Path, cut: Cut) -> None:
    import shutil

    tree = build(tmp_path, cut)
    path = tree.finish()
    tree.close()
    shutil.rmtree(path)

    assert content(finished(tmp_path, cut)) == FILES


def test_a_finished_tree_that_a_crash_damaged_before_its_record_is_built_again(tmp_path: Path, cut: Cut) -> None:
    tree = build(tmp_path, cut)
    path = tree.finish()
    tree.close()
    os.truncate(os.path.join(path, "data/big.bin"), 10)

    again = IncomingTree(str(tmp_path), cut.manifest, "x")
    for index in again.missing:
        again.write(cut.chunk(index))

    assert is_whole(again.finish(), cut.manifest)
    again.clear()
    assert os.listdir(tmp_path / "releases") == [os.path.basename(path)]


def test_leftovers_of_a_recorded_build_go(tmp_path: Path, cut: Cut) -> None:
    tree = build(tmp_path, cut)
    tree.finish()
    tree.close()
    assert os.path.isdir(tree.folder)

    clear_leftovers(str(tmp_path), cut.manifest)
    clear_leftovers(str(tmp_path), cut.manifest)

    assert os.listdir(tmp_path / "releases") == ["1.0.0-A"]


def test_leftovers_are_left_to_who_works_on_them(tmp_path: Path, cut: Cut) -> None:
    with_lock = build(tmp_path, cut, upto=1)

    clear_leftovers(str(tmp_path), cut.manifest)

    assert os.path.isdir(with_lock.folder)
    with_lock.close()


# --- one at a time


def test_a_second_build_of_the_same_tree_is_refused(tmp_path: Path, cut: Cut) -> None:
    first = build(tmp_path, cut, upto=1)

    with pytest.raises(LockedError, match=r"Acme\.Web 1\.0\.0"):
        IncomingTree(str(tmp_path), cut.manifest, "x")

    first.close()
    IncomingTree(str(tmp_path), cut.manifest, "x").close()


def test_another_version_may_be_built_meanwhile(tmp_path: Path, cut: Cut) -> None:
    first = build(tmp_path, cut, upto=1)

    IncomingTree(str(tmp_path), cut_package(FILES, version="1.1.0").manifest, "x").close()

    first.close()


def test_a_lock_on_what_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, the one who had the lock removed it."""
    import fcntl

    path = str(tmp_path / "lock")
    real = fcntl.flock

    def remove_first(descriptor: int, how: int) -> None:
        os.unlink(path)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    assert platform.lock_file(path) is None
    monkeypatch.undo()
    lock = platform.lock_file(path)
    assert lock is not None
    os.close(lock)


def test_a_write_that_comes_after_the_end_writes_nothing(tmp_path: Path, cut: Cut) -> None:
    """A thread may still be writing when its pull was cancelled: it must not make the folder again, nor hit another file."""
    tree = build(tmp_path, cut, upto=1)
    late = cut.chunk(tree.missing[0])
    tree.clear()

    with pytest.raises(StoreError, match="given up"):
        tree.write(late)

    assert os.listdir(tmp_path / "releases") == []


def test_threads_may_write_and_clear_at_once(tmp_path: Path, cut: Cut) -> None:
    tree = build(tmp_path, cut, upto=0)
    refused = []

    def write(indexes: list[int]) -> None:
        for index in indexes:
            try:
                tree.write(cut.chunk(index))
            except StoreError as error:
                refused.append(error)

    threads = [threading.Thread(target=write, args=(tree.missing[n::3],)) for n in range(3)]
    for thread in threads:
        thread.start()
    tree.clear()
    for thread in threads:
        thread.join()

    assert os.listdir(tmp_path / "releases") == []


# --- strangers


def test_a_planted_link_in_place_of_the_build_is_refused(tmp_path: Path, cut: Cut) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(0o700)
    (tmp_path / "releases").mkdir()
    (tmp_path / "releases" / f".incoming-{cut.manifest.id}").symlink_to(elsewhere)

    with pytest.raises(RefusedError, match="is a link"):
        IncomingTree(str(tmp_path), cut.manifest, "x")

    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o755, 0o701])
def test_a_planted_folder_that_others_can_enter_is_refused(tmp_path: Path, cut: Cut, mode: int) -> None:
    folder = tmp_path / "releases" / f".incoming-{cut.manifest.id}"
    folder.mkdir(parents=True)
    folder.chmod(mode)

    with pytest.raises(RefusedError):
        IncomingTree(str(tmp_path), cut.manifest, "x")

    assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a folder of another user is NOT tested")
def test_another_users_folder_is_refused(tmp_path: Path, cut: Cut) -> None:
    folder = tmp_path / "releases" / f".incoming-{cut.manifest.id}"
    folder.mkdir(parents=True, mode=0o700)
    os.chown(folder, 12345, 12345)

    with pytest.raises(RefusedError):
        IncomingTree(str(tmp_path), cut.manifest, "x")


def test_a_file_in_place_of_the_build_is_refused(tmp_path: Path, cut: Cut) -> None:
    (tmp_path / "releases").mkdir()
    (tmp_path / "releases" / f".incoming-{cut.manifest.id}").write_text("mine")

    with pytest.raises(StoreError, match="directory"):
        IncomingTree(str(tmp_path), cut.manifest, "x")


def test_releases_that_everybody_can_write_to_are_refused(tmp_path: Path, cut: Cut) -> None:
    releases = tmp_path / "releases"
    releases.mkdir()
    releases.chmod(0o777)

    with pytest.raises(RefusedError, match="chmod o-w"):
        IncomingTree(str(tmp_path), cut.manifest, "x")


def test_a_link_inside_the_build_is_not_written_through(tmp_path: Path, cut: Cut) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    tree = build(tmp_path, cut, upto=0)
    os.makedirs(os.path.join(tree.tree, "data"))
    os.symlink(victim, os.path.join(tree.tree, "data", "big.bin"))
    index = next(i for i in tree.missing if cut.manifest.parts[cut.manifest.extents[i][0].part].path == "data/big.bin")

    with pytest.raises(StoreError):
        tree.write(cut.chunk(index))

    assert victim.read_bytes() == b"precious"
    tree.close()


def test_a_root_that_cannot_be_one_is_told_in_a_sentence(tmp_path: Path, cut: Cut) -> None:
    (tmp_path / "file").write_text("x")

    with pytest.raises(StoreError, match="file"):
        IncomingTree(str(tmp_path / "file"), cut.manifest, "x")


# --- a full or failing disk


def test_too_little_room_is_told_before_anything_is_written(
    tmp_path: Path, cut: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "free_bytes", lambda folder: 1 << 20)

    with pytest.raises(StoreError, match=r"needs \d+ MiB .* 1 MiB are free") as caught:
        IncomingTree(str(tmp_path), cut.manifest, "x")

    assert caught.value.full
    assert os.listdir(tmp_path / "releases") == []


def test_room_counts_every_place_of_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = noise("same", 1 << 20)
    cut = cut_package({f"{n}/copy.bin": same for n in range(40)})
    monkeypatch.setattr(platform, "free_bytes", lambda folder: 30 << 20)

    with pytest.raises(StoreError, match="needs 5"):
        IncomingTree(str(tmp_path), cut.manifest, "x")


def test_a_build_that_is_all_there_needs_no_room(tmp_path: Path, cut: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, cut).close()
    monkeypatch.setattr(platform, "free_bytes", lambda folder: 0)

    tree = IncomingTree(str(tmp_path), cut.manifest, "x")

    assert tree.missing == []
    tree.close()


@pytest.mark.parametrize(("number", "full"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False)])
@pytest.mark.parametrize("where", ["write_at", "sync_tree"])
def test_what_the_disk_says_is_told(
    tmp_path: Path, cut: Cut, monkeypatch: pytest.MonkeyPatch, number: int, full: bool, where: str
) -> None:
    calls = []

    def fail(*_: object) -> None:
        calls.append(where)
        raise OSError(number, os.strerror(number))

    tree = build(tmp_path, cut, upto=0 if where == "write_at" else None)
    chunk = cut.chunk(0)
    monkeypatch.setattr(platform, where, fail)

    with pytest.raises(StoreError, match=os.strerror(number)) as caught:
        tree.write(chunk) if where == "write_at" else tree.finish()

    assert calls
    assert caught.value.full is full
    tree.clear()
    assert os.listdir(tmp_path / "releases") == []


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a really full file system is NOT tested")
def test_a_really_full_disk_is_told_as_full(tmp_path: Path, cut: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", mount], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here: a really full file system is NOT tested")
    try:
        monkeypatch.setattr(platform, "free_bytes", lambda folder: 1 << 40)
        tree = build(mount, cut, upto=0)
        with pytest.raises(StoreError) as caught:
            deque(map(tree.write, map(cut.chunk, tree.missing)), maxlen=0)
        assert caught.value.full
        tree.clear()
        assert os.listdir(mount / "releases") == []
    finally:
        subprocess.run(["umount", mount], check=True)


@needs_proc
@pytest.mark.parametrize("fault", ["lock", "mode", "room", "map", "manifest"])
def test_no_descriptor_is_lost_on_any_way_out(
    tmp_path: Path, cut: Cut, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    holder = build(tmp_path, cut, upto=1) if fault == "lock" else None
    incoming = tmp_path / "releases" / f".incoming-{cut.manifest.id}"
    if fault == "mode":
        incoming.mkdir(parents=True, mode=0o755)
    if fault == "map":
        incoming.mkdir(parents=True, mode=0o700)
        (incoming / "chunks").mkdir()
    if fault == "manifest":
        monkeypatch.setattr(trees, "write_durably", _refuse)
    if fault == "room":
        monkeypatch.setattr(platform, "free_bytes", lambda folder: 0)
    before = descriptors()

    with pytest.raises((LockedError, RefusedError, StoreError)):
        IncomingTree(str(tmp_path), cut.manifest, "x")

    assert {path for path in descriptors() - before if str(tmp_path) in path} == set()
    if holder:
        holder.close()


def _refuse(*_: object, **__: object) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


@needs_proc
def test_closing_twice_is_once(tmp_path: Path, cut: Cut) -> None:
    before = descriptors()
    tree = build(tmp_path, cut, upto=1)
    tree.close()
    tree.close()
    tree.clear()

    assert {path for path in descriptors() - before if str(tmp_path) in path} == set()


# --- what is here already


def held_by(tree: str, manifest: Manifest, wanted: Cut) -> set[str]:
    ids = {wanted.manifest.chunk_id(i) for i in wanted.manifest.tree_chunks}
    return {chunk.id for chunk in take_from(tree, manifest, ids)}


def test_all_that_two_versions_share_is_taken(tmp_path: Path, cut: Cut) -> None:
    path = finished(tmp_path, cut)
    newer = cut_package({**FILES, "bin/app": b"\x7fELF" + noise("new", 100_000)}, version="1.1.0")
    shared = {newer.manifest.chunks[i].id for i in newer.manifest.tree_chunks} & {c.id for c in cut.manifest.chunks}

    assert held_by(path, cut.manifest, newer) == shared
    assert len(shared) >= 3


def test_an_edited_file_is_passed_over(tmp_path: Path, cut: Cut) -> None:
    path = finished(tmp_path, cut)
    all_of_it = held_by(path, cut.manifest, cut)
    Path(path, "bin/app").write_bytes(b"\x7fELF" + noise("edited", 100_000))
    left = held_by(path, cut.manifest, cut)

    assert len(all_of_it - left) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
    ],
    ids=["gone", "emptied", "a folder", "a link", "a FIFO", "cut short"],
)
def test_what_is_no_longer_a_file_is_passed_over(tmp_path: Path, cut: Cut, spoil: Callable[[Path], object]) -> None:
    path = finished(tmp_path, cut)
    before = held_by(path, cut.manifest, cut)
    spoil(Path(path, "bin/app"))

    assert len(before - held_by(path, cut.manifest, cut)) == 1


def test_contents_are_copied_never_linked(tmp_path: Path, cut: Cut) -> None:
    old = finished(tmp_path, cut)
    tree = IncomingTree(str(tmp_path), cut_package(FILES, version="1.1.0").manifest, "1.1.0-B")
    for chunk in take_from(old, cut.manifest, {tree.manifest.chunk_id(i) for i in tree.missing}):
        tree.write(chunk)
    new = tree.finish()
    tree.clear()

    assert content(new) == FILES
    assert all(file.stat().st_nlink == 1 for file in Path(new).rglob("*") if file.is_file())


# --- comparing


def spoilt(what: str, path: Path) -> dict[str, str]:
    """Change an installed tree; the difference that must be told."""
    match what:
        case "content of a large file":
            with (path / "data/big.bin").open("r+b") as file:
                file.seek(2_500_000)
                file.write(b"!")
            return {"data/big.bin": "other content"}
        case "content of a small file":
            (path / "text/7.txt").write_bytes(noise("x", 3_000))
            return {"text/7.txt": "other content"}
        case "longer":
            with (path / "bin/app").open("ab") as file:
                file.write(b"!")
            return {"bin/app": "100005 bytes, expected 100004"}
        case "shorter":
            os.truncate(path / "bin/app", 10)
            return {"bin/app": "10 bytes, expected 100004"}
        case "empty no more":
            (path / "data/empty").write_bytes(b"x")
            return {"data/empty": "1 bytes, expected 0"}
        case "missing":
            (path / "text/7.txt").unlink()
            return {"text/7.txt": "missing"}
        case "an empty file missing":
            (path / "data/empty").unlink()
            return {"data/empty": "missing"}
        case "a link":
            (path / "bin/app").rename(path.parent / "moved")
            (path / "bin/app").symlink_to(path.parent / "moved")
            return {"bin/app": "not a regular file"}
        case "a linked folder":
            (path / "net8").rename(path.parent / "moved")
            (path / "net8").symlink_to(path.parent / "moved")
            return {"net8": "not a folder"}
        case "a folder in place of a file":
            (path / "bin/app").unlink()
            (path / "bin/app").mkdir()
            return {"bin/app": "not a regular file"}
        case "a FIFO in place of a file":
            (path / "bin/app").unlink()
            os.mkfifo(path / "bin/app")
            return {"bin/app": "not a regular file"}
        case "a file in place of a folder":
            shutil.rmtree(path / "net8")
            (path / "net8").write_text("x")
            return {"net8": "not a folder", **{name: "missing" for name in FILES if name.startswith("net8/")}}
        case "linked from elsewhere":
            path.rename(path.parent / "moved")
            path.symlink_to(path.parent / "moved")
            return {".": "not a folder"}
        case "readable by its owner alone":
            (path / "bin/app").chmod(0o600)
            return {"bin/app": "its permissions are 0600, expected 0644"}
        case "everybody may write":
            (path / "bin/app").chmod(0o666)
            return {"bin/app": "its permissions are 0666, expected 0644"}
        case "a closed folder":
            (path / "net8").chmod(0o700)
            return {"net8": "its permissions are 0700, expected 0755"}
        case "a closed tree":
            path.chmod(0o700)
            return {".": "its permissions are 0700, expected 0755"}
        case "executable":
            (path / "data/big.bin").chmod(0o755)
            return {"data/big.bin": "executable"}
        case "added":
            (path / "data/added").write_text("x")
            return {"data/added": EXTRA}
        case "a FIFO added":
            os.mkfifo(path / "data/added")
            return {"data/added": EXTRA}
    raise AssertionError(what)


DIFFERENCES = [
    "content of a large file", "content of a small file", "longer", "shorter", "empty no more", "missing",
    "an empty file missing", "a link", "a linked folder", "executable", "added", "a FIFO added",
    "a folder in place of a file", "a FIFO in place of a file", "a file in place of a folder", "linked from elsewhere",
    "readable by its owner alone", "everybody may write", "a closed folder", "a closed tree",
]  # fmt: skip


@pytest.mark.parametrize("what", DIFFERENCES)
def test_every_difference_is_found_and_only_that(tmp_path: Path, cut: Cut, what: str) -> None:
    path = finished(tmp_path, cut)
    assert list(check_tree(path, cut.manifest)) == []

    expected = spoilt(what, Path(path))

    assert dict(check_tree(path, cut.manifest)) == expected
    assert is_whole(path, cut.manifest) == (set(expected.values()) == {EXTRA})


def test_a_lost_x_bit_is_found(tmp_path: Path) -> None:
    cut = executable(cut_package({"run": b"#!/bin/sh\n"}), "run")
    path = finished(tmp_path, cut)
    os.chmod(os.path.join(path, "run"), 0o644)

    assert dict(check_tree(path, cut.manifest)) == {"run": "not executable"}


def test_a_tree_that_is_gone_differs_in_every_file(tmp_path: Path, cut: Cut) -> None:
    assert {path for path, _ in check_tree(str(tmp_path / "nowhere"), cut.manifest)} == set(FILES)


def test_reading_a_chunk_hangs_on_no_fifo(tmp_path: Path, cut: Cut) -> None:
    path = finished(tmp_path, cut)
    index = next(i for i, e in enumerate(cut.manifest.extents) if cut.manifest.parts[e[0].part].path == "bin/app")
    (Path(path) / "bin/app").unlink()
    os.mkfifo(Path(path) / "bin/app")

    assert read_chunk(path, cut.manifest, index) is None


# --- property


@st.composite
def packages(draw: st.DrawFn) -> dict[str, bytes]:
    names = st.lists(st.sampled_from("abcde"), min_size=1, max_size=4).map("/".join)
    sizes = st.sampled_from([0, 1, 100, 65_535, 65_536, 300_000, 1_100_000])
    found: dict[str, bytes] = {}
    for name, size, seed in draw(st.lists(st.tuples(names, sizes, st.integers(0, 2)), max_size=12)):
        clashes = any(other.startswith(f"{name}/") or name.startswith(f"{other}/") for other in found)
        if not clashes:
            found[name] = noise(seed, size)
    return found


@pytest.mark.long
@given(files=packages(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_package_in_any_order_with_any_interruption_gives_its_files(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], data: st.DataObject
) -> None:
    root, cut = tmp_path_factory.mktemp("any"), cut_package(files)
    tree = IncomingTree(str(root), cut.manifest, "1.0.0-A")
    order = data.draw(st.permutations(tree.missing))
    stop = data.draw(st.integers(0, len(order)))
    for index in order[:stop]:
        tree.write(cut.chunk(index))
    tree.close()
    tree = IncomingTree(str(root), cut.manifest, "1.0.0-B")
    assert len(tree.have) == stop
    for index in tree.missing:
        tree.write(cut.chunk(index))

    assert content(tree.finish()) == files
    assert list(check_tree(os.path.join(root, "releases", "1.0.0-A"), cut.manifest)) == []
    tree.clear()
