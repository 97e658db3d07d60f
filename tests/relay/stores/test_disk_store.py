from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import dataclass, field

import pytest
from harness.store_contract import (
    ABSENT,
    BlobsContract,
    DocumentsContract,
    Subject,
    SweeperContract,
    a_file,
    frame_of,
    some_chunks,
)

from relay.errors import ChunkInvalid, ChunkMissing, LockedError, StoreError, UsageError
from relay.package.chunk import CHUNK_MAX, Chunk
from relay.stores import volume as volume_module
from relay.stores.contract import FORMAT, PIECE
from relay.stores.disk import DiskBlobs, DiskDocuments, DiskStore
from relay.stores.volume import open_disk


@pytest.fixture
async def volume(tmp_path):
    volume = await open_disk(str(tmp_path / "store"), free_floor=0)
    yield volume
    await volume.close()


@pytest.fixture
def store(volume):
    return DiskStore(volume)


@pytest.fixture
def documents(volume):
    return DiskDocuments(volume)


def path_of(volume, id, kind="chunks"):
    return os.path.join(volume.root, kind, id[:2], id)


def change_file(path, change):
    with open(path, "rb") as file:
        data = file.read()
    os.chmod(path, 0o644)
    with open(path, "wb") as file:
        file.write(change(data))


def bytes_in(path):
    with open(path, "rb") as file:
        return file.read()


def files_in(volume, folder):
    return sorted(os.listdir(os.path.join(volume.root, folder)))


class TestDiskStore(SweeperContract):
    @pytest.fixture
    def subject(self, store, volume):
        return Subject(store, store.put_many, lambda id, change: change_file(path_of(volume, id), change))


class TestDiskDocuments(DocumentsContract):
    @pytest.fixture
    def documents(self, volume):
        return DiskDocuments(volume)


class TestDiskBlobs(BlobsContract):
    @pytest.fixture
    def blobs(self, volume):
        return DiskBlobs(volume)

    def damage_blob(self, blobs, sha256, change):
        change_file(path_of(blobs._volume, sha256, "blobs"), change)


# --- layout


async def test_the_layout_is_what_the_design_says(volume, store, documents, tmp_path):
    [chunk] = some_chunks(1)
    sha256, path, data = a_file(tmp_path, 1000)
    await store.put(chunk)
    await DiskBlobs(volume).put_file(sha256, path)
    await documents.write("state/mail/1", b"mail")
    found = set()
    for folder, _, names in os.walk(volume.root):
        found |= {os.path.relpath(os.path.join(folder, name), volume.root) for name in names}
    assert found == {
        "format",
        "lock",
        f"chunks/{chunk.id[:2]}/{chunk.id}",
        f"blobs/{sha256[:2]}/{sha256}",
        "state/mail/1",
    }
    assert bytes_in(path_of(volume, sha256, "blobs")) == data
    assert stat.S_IMODE(os.stat(volume.root).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(path_of(volume, chunk.id)).st_mode) & 0o222 == 0


@pytest.mark.processes
async def test_a_chunk_file_is_read_by_plain_zstd(volume, store):
    if shutil.which("zstd") is None:
        pytest.skip("needs the zstd command line tool")
    [chunk] = some_chunks(1)
    await store.put(chunk)
    with open(path_of(volume, chunk.id), "rb") as file:
        plain = subprocess.run(["zstd", "-dc"], stdin=file, capture_output=True, check=True).stdout
    assert plain == chunk.data


async def test_a_file_that_is_there_is_not_written_again(volume, store):
    chunks = some_chunks(3)
    await store.put_many(chunks)
    before = [os.stat(path_of(volume, chunk.id)).st_ino for chunk in chunks]
    await store.put_many(chunks)
    assert [os.stat(path_of(volume, chunk.id)).st_ino for chunk in chunks] == before


async def test_streaming_a_chunk_takes_a_piece_of_memory_not_a_chunk(store):
    chunk = Chunk.of(os.urandom(CHUNK_MAX))
    await store.put(chunk)
    await store.open(chunk.id)  # threads and modules are there now
    tracemalloc.start()
    try:
        async for _ in (await store.open(chunk.id)).pieces():
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * PIECE < CHUNK_MAX


# --- damage


def make_folder(path):
    os.mkdir(path)
    with open(os.path.join(path, "inside"), "w") as file:
        file.write("x")


def make_link(path):
    target = path + ".target"
    with open(target, "wb") as file:
        file.write(b"secret")
    os.symlink(target, path)


def make_socket(path):
    # AF_UNIX paths are short: bind by a relative name.
    here = os.getcwd()
    os.chdir(os.path.dirname(path))
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind("s")
            os.rename("s", path)
    finally:
        os.chdir(here)


def make_fifo(path):
    os.unlink(path)
    os.mkfifo(path)


NO_FILES = {
    "folder": make_folder,
    "link": make_link,
    "dangling link": lambda path: os.symlink("/nowhere", path),
    "fifo": os.mkfifo,
    "socket": make_socket,
}


@pytest.mark.parametrize("way", ["get", "open"])
@pytest.mark.parametrize("kind", NO_FILES)
async def test_what_is_no_file_is_damage_and_is_put_aside(volume, store, kind, way):
    [chunk] = some_chunks(1)
    await store.put(chunk)
    os.unlink(path_of(volume, chunk.id))
    NO_FILES[kind](path_of(volume, chunk.id))
    assert await store.has_many([chunk.id]) == set()
    with pytest.raises(ChunkInvalid):
        await asyncio.wait_for(getattr(store, way)(chunk.id), 10)
    assert len(files_in(volume, "quarantine")) == 1
    await store.put(chunk)
    assert (await store.get(chunk.id)).data == chunk.data


@pytest.mark.parametrize("kind", NO_FILES)
async def test_what_is_no_file_stands_in_no_ones_way(volume, store, kind):
    first, second = some_chunks(2)
    await store.put_many([first, second])
    for chunk in (first, second):
        os.unlink(path_of(volume, chunk.id))
        NO_FILES[kind](path_of(volume, chunk.id))
    await store.put(first)
    assert (await store.get(first.id)).data == first.data
    await store.remove(second.id)
    with pytest.raises(ChunkMissing):
        await store.get(second.id)


async def test_damage_is_kept_in_quarantine(volume, store):
    [chunk] = some_chunks(1)
    await store.put(chunk)
    change_file(path_of(volume, chunk.id), lambda stored: stored + b"!")
    with pytest.raises(ChunkInvalid):
        await store.open(chunk.id)
    [aside] = files_in(volume, "quarantine")
    assert aside.startswith(chunk.id)
    assert bytes_in(os.path.join(volume.root, "quarantine", aside)).endswith(b"!")


async def test_two_files_with_swapped_names_are_found(volume, store):
    one, other = some_chunks(2)
    await store.put_many([one, other])
    spare = path_of(volume, one.id) + ".spare"
    os.rename(path_of(volume, one.id), spare)
    os.rename(path_of(volume, other.id), path_of(volume, one.id))
    os.rename(spare, path_of(volume, other.id))
    for chunk in (one, other):
        with pytest.raises(ChunkInvalid):
            await store.open(chunk.id)


async def test_a_chunk_that_was_mended_meanwhile_is_not_put_aside(volume, store):
    [chunk] = some_chunks(1)
    await store.put(chunk)
    path = path_of(volume, chunk.id)
    change_file(path, lambda stored: stored[:-1])

    async def judge_late():
        with volume.judging(chunk.id, os.path.relpath(path, volume.root)) as look:
            os.close(look(path, os.O_RDONLY))
            os.unlink(path)
            await store.put(chunk)
            raise ChunkInvalid(chunk.id, "truncated")

    with pytest.raises(ChunkInvalid):
        await judge_late()
    assert (await store.get(chunk.id)).data == chunk.data
    assert files_in(volume, "quarantine") == []


@pytest.mark.parametrize("change", [os.unlink, lambda path: change_file(path, lambda stored: stored[:-1]), make_fifo])
async def test_a_chunk_that_changes_while_it_is_sent_is_an_error_not_other_bytes(volume, store, change):
    chunk = Chunk.of(os.urandom(3 * PIECE))
    await store.put(chunk)
    stored = await store.open(chunk.id)
    change(path_of(volume, chunk.id))
    with pytest.raises(StoreError):
        await frame_of(stored)


# --- opening


async def test_a_store_is_found_again_after_closing(tmp_path):
    root = str(tmp_path / "deep" / "store")
    chunks = some_chunks(5)
    first = await open_disk(root, free_floor=0)
    await DiskStore(first).put_many(chunks)
    await DiskDocuments(first).write("state/x", b"x")
    await first.close()
    second = await open_disk(root, free_floor=0)
    assert {id async for id in DiskStore(second).list()} == {chunk.id for chunk in chunks}
    assert await DiskDocuments(second).read("state/x") == b"x"
    await second.close()


async def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="thesis"):
        await open_disk(str(tmp_path))
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("text", [b"waystation-store 2\n", b"", b"waystation-store 1\nmore", b"x" * 10_000])
async def test_an_unknown_format_is_refused(tmp_path, text):
    (tmp_path / "format").write_bytes(text)
    for read_only in (False, True):
        with pytest.raises(UsageError, match="unknown format"):
            await open_disk(str(tmp_path), read_only=read_only)
    assert os.listdir(tmp_path) == ["format"]


async def test_a_first_opening_that_was_killed_can_be_done_again(tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "1-abc").write_bytes(FORMAT[:3])
    (tmp_path / "lost+found").mkdir()
    volume = await open_disk(str(tmp_path))
    assert (tmp_path / "format").read_bytes() == FORMAT
    assert files_in(volume, "tmp") == []
    assert await DiskDocuments(volume).list("") == []
    await volume.close()


async def test_a_root_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError):
        await open_disk(str(tmp_path / "file"))
    with pytest.raises(StoreError):
        await open_disk(str(tmp_path / "file" / "below"))


async def test_what_dead_writers_left_is_removed_by_whoever_opens_alone(volume, tmp_path):
    left = tmp_path / "store" / "tmp" / "999-dead"
    left.write_bytes(b"half")
    second = await open_disk(volume.root)
    assert left.exists(), "another writer may be at it"
    await second.close()
    await volume.close()
    third = await open_disk(volume.root)
    assert not left.exists()
    await third.close()


async def test_several_writers_share_one_store(volume, store):
    second = await open_disk(volume.root, free_floor=0)
    chunks = some_chunks(40)
    await asyncio.gather(store.put_many(chunks), DiskStore(second).put_many(chunks[::-1]))
    for reader in (store, DiskStore(second)):
        assert await reader.has_many(chunk.id for chunk in chunks) == {chunk.id for chunk in chunks}
    won = await asyncio.gather(
        DiskDocuments(volume).create("state/one", b"1"), DiskDocuments(second).create("state/one", b"2")
    )
    assert sorted(won) == [False, True]
    await second.close()


async def test_a_store_that_is_not_mounted_is_not_a_store_without_chunks(volume, store, documents):
    [chunk] = some_chunks(1)
    await store.put(chunk)
    os.rename(volume.root, volume.root + ".away")
    for ask in (store.get(chunk.id), store.open(chunk.id), store.has_many([chunk.id]), documents.read("state/x")):
        with pytest.raises(StoreError, match="mounted"):
            await ask
    with pytest.raises(StoreError, match="mounted"):
        await documents.list("manifests")
    with pytest.raises(StoreError, match="mounted"):
        [id async for id in store.list()]
    os.rename(volume.root + ".away", volume.root)
    assert (await store.get(chunk.id)).data == chunk.data


async def test_an_unreadable_folder_is_not_an_empty_one(volume, documents, monkeypatch):
    await documents.write("manifests/a", b"x")

    def refuse(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StoreError):
        await documents.list("manifests")


async def test_a_reader_makes_takes_and_moves_nothing(volume, store):
    chunk, bad = some_chunks(2)
    await store.put_many([chunk, bad])
    await volume.close()
    os.unlink(os.path.join(volume.root, "lock"))
    change_file(path_of(volume, bad.id), lambda stored: stored[:-1])
    reader = DiskStore(await open_disk(volume.root, read_only=True))
    assert (await reader.get(chunk.id)).data == chunk.data
    with pytest.raises(ChunkInvalid):
        await reader.get(bad.id)
    assert os.path.exists(path_of(volume, bad.id))
    for change in (reader.put(chunk), reader.remove(chunk.id)):
        with pytest.raises(StoreError, match="reading only"):
            await change
    assert not os.path.exists(os.path.join(volume.root, "lock"))
    await reader.close()


async def test_a_reader_waits_for_a_share_that_is_not_there_yet(tmp_path):
    root = str(tmp_path / "share")
    reader = DiskStore(await open_disk(root, read_only=True))
    with pytest.raises(StoreError, match="mounted"):
        await reader.get(ABSENT)
    assert not os.path.exists(root)
    [chunk] = some_chunks(1)
    owner = await open_disk(root, free_floor=0)
    await DiskStore(owner).put(chunk)
    assert (await reader.get(chunk.id)).data == chunk.data
    await owner.close()
    await reader.close()


async def test_a_closed_store_writes_no_more(store, documents):
    await store.close()
    for change in (store.put_many(some_chunks(1)), documents.write("state/x", b"x"), store.remove(ABSENT)):
        with pytest.raises(StoreError, match="closed"):
            await change


async def test_a_writer_that_is_cancelled_leaves_no_half_file(volume, store):
    chunks = some_chunks(100, seed=9)
    task = asyncio.create_task(store.put_many(chunks))
    await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await volume.close()
    assert files_in(volume, "tmp") == []
    again = await open_disk(volume.root, free_floor=0)
    async for id in DiskStore(again).list():
        await DiskStore(again).get(id)
    await again.close()


# --- locks


async def test_a_second_holder_is_told_who_holds(volume):
    other = await open_disk(volume.root)
    with volume.exclusive("serve"):
        with pytest.raises(LockedError) as locked, other.exclusive("serve"):
            pass
        assert locked.value.exit_code == 4
        assert f"pid {os.getpid()} on {socket.gethostname()} since 20" in str(locked.value)
        with other.exclusive("sweep"):
            pass
    with other.exclusive("serve"):
        pass
    await other.close()


async def test_a_lock_file_cannot_forge_the_terminal(volume):
    with volume.exclusive("serve"):
        with open(os.path.join(volume.root, "lock-serve"), "w") as file:
            file.write("\x1b[2Jroot\r\n\u202e")
        with pytest.raises(LockedError) as locked, volume.exclusive("serve"):
            pass
    assert str(locked.value).isprintable()


HOLDER = """
import asyncio, sys, time
from relay.stores.volume import open_disk
async def main():
    volume = await open_disk(sys.argv[1])
    with volume.exclusive("serve"):
        print("held", flush=True)
        time.sleep(60)
asyncio.run(main())
"""


@pytest.mark.processes
async def test_a_killed_holder_leaves_no_lock(volume):
    with subprocess.Popen([sys.executable, "-c", HOLDER, volume.root], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"pid {holder.pid} "), volume.exclusive("serve"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with volume.exclusive("serve"):
        pass


# --- durability: what was done before the acknowledgement


@dataclass
class Recorder:
    """The order of what matters for a power cut. `events` are (what, path, second path)."""

    events: list[tuple[str, str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def install(self, monkeypatch):
        def of(fd):
            return os.readlink(f"/proc/self/fd/{fd}")

        def wrap(name, describe):
            real = getattr(os, name)

            def recorded(*args, **kwargs):
                event = (name, *describe(*args))
                result = real(*args, **kwargs)
                with self.lock:
                    self.events.append(event)
                return result

            monkeypatch.setattr(os, name, recorded)

        wrap("write", lambda fd, data: (of(fd), ""))
        wrap("fsync", lambda fd: (of(fd), ""))
        wrap("replace", lambda old, new: (old, new))
        wrap("link", lambda old, new: (old, new))

    def when(self, *event):
        times = [index for index, seen in enumerate(self.events) if seen == event]
        assert times, f"{event} never happened"
        return times

    def check(self, root, path):
        """`path` was written, synced, named, and the way to it synced, in this order."""
        placed, temp = self.placing(path)
        assert max(self.when("write", temp, "")) < min(self.when("fsync", temp, "")) < placed
        assert max(self.when("fsync", os.path.dirname(path), "")) > placed
        folder = os.path.dirname(path)
        while folder != root:
            folder = os.path.dirname(folder)
            self.when("fsync", folder, "")

    def check_all(self, root, paths):
        for path in paths:
            self.check(root, path)

    def placing(self, path):
        [(placed, temp)] = [
            (index, old)
            for index, (what, old, new) in enumerate(self.events)
            if what in {"replace", "link"} and new == path
        ]
        return placed, temp


async def put_all_kinds(volume, tmp_path):
    """Acknowledged writes of every kind; their paths."""
    chunks = some_chunks(5)
    sha256, source, _ = a_file(tmp_path, 3 * PIECE)
    await DiskStore(volume).put_many(chunks)
    await DiskBlobs(volume).put_file(sha256, source)
    await DiskDocuments(volume).write("state/leases/1", b"lease")
    await DiskDocuments(volume).create("packages/a/1.0.0", b"pointer")
    return [
        *(path_of(volume, chunk.id) for chunk in chunks),
        path_of(volume, sha256, "blobs"),
        os.path.join(volume.root, "state/leases/1"),
        os.path.join(volume.root, "packages/a/1.0.0"),
    ]


async def test_what_is_acknowledged_was_synced_before(volume, tmp_path, monkeypatch):
    recorder = Recorder()
    recorder.install(monkeypatch)
    recorder.check_all(volume.root, await put_all_kinds(volume, tmp_path))


async def test_a_batch_writes_all_then_syncs_all_then_renames_all_and_syncs_a_folder_once(volume, monkeypatch):
    chunks = some_chunks(40)
    volume._ensure_folders({f"chunks/{chunk.id[:2]}" for chunk in chunks})
    recorder = Recorder()
    recorder.install(monkeypatch)
    await DiskStore(volume).put_many(chunks)
    kinds = ["folder" if what == "fsync" and os.path.isdir(path) else what for what, path, _ in recorder.events]
    order = ["write", "fsync", "replace", "folder"]
    assert kinds == sorted(kinds, key=order.index)
    assert kinds.count("fsync") == kinds.count("replace") == len(chunks)
    assert kinds.count("folder") == len({chunk.id[:2] for chunk in chunks})


async def test_the_format_file_is_durable_before_anything_else(tmp_path, monkeypatch):
    recorder = Recorder()
    recorder.install(monkeypatch)
    root = str(tmp_path / "new" / "store")
    volume = await open_disk(root)
    recorder.check(root, os.path.join(root, "format"))
    recorder.when("fsync", str(tmp_path), "")
    recorder.when("fsync", str(tmp_path / "new"), "")
    await volume.close()


async def test_a_name_made_by_a_writer_that_died_is_synced_before_it_is_acknowledged(volume, tmp_path, monkeypatch):
    chunks = some_chunks(3)
    await DiskStore(volume).put_many(chunks)
    await DiskDocuments(volume).write("state/x", b"x")
    await volume.close()
    volume = await open_disk(volume.root, free_floor=0)
    recorder = Recorder()
    recorder.install(monkeypatch)
    await DiskStore(volume).put_many(chunks)
    assert await DiskDocuments(volume).create("state/x", b"y") is False
    for path in [path_of(volume, chunk.id) for chunk in chunks] + [os.path.join(volume.root, "state/x")]:
        recorder.when("fsync", os.path.dirname(path), "")
        recorder.when("fsync", os.path.dirname(os.path.dirname(path)), "")
    await volume.close()


async def test_a_removed_document_stays_removed_after_a_power_cut(volume, documents, monkeypatch):
    await documents.write("manifests/a", b"x")
    recorder = Recorder()
    recorder.install(monkeypatch)
    await documents.remove("manifests/a")
    recorder.when("fsync", os.path.join(volume.root, "manifests"), "")


def sync_nothing(monkeypatch):
    monkeypatch.setattr(volume_module, "_fsync", lambda fd: None)


def sync_no_folder(monkeypatch):
    monkeypatch.setattr(volume_module, "_sync_folder", lambda path: None)


def sync_no_way_down(monkeypatch):
    monkeypatch.setattr(
        volume_module.Volume,
        "_ensure_folders",
        lambda self, folders: [os.makedirs(self.path(folder), exist_ok=True) for folder in folders],
    )


def sync_after_the_name(monkeypatch):
    real = volume_module.Volume._sync_placed
    late = []

    def postpone(self):
        late.append(self)

    monkeypatch.setattr(volume_module._Temp, "sync", postpone)
    monkeypatch.setattr(
        volume_module.Volume,
        "_sync_placed",
        lambda self, folders, undo: ([os.fsync(temp._fd) for temp in late], late.clear(), real(self, folders, undo)),
    )


def sync_before_the_bytes(monkeypatch):
    real = volume_module._Temp.write

    def write(self, pieces):
        real(self, lambda: [b"first"])
        os.fsync(self._fd)
        for piece in pieces():
            os.write(self._fd, piece)

    monkeypatch.setattr(volume_module._Temp, "write", write)


@pytest.mark.parametrize(
    "mutant", [sync_nothing, sync_no_folder, sync_no_way_down, sync_after_the_name, sync_before_the_bytes]
)
async def test_the_check_of_durability_has_teeth(volume, tmp_path, monkeypatch, mutant):
    recorder = Recorder()
    recorder.install(monkeypatch)
    mutant(monkeypatch)
    paths = await put_all_kinds(volume, tmp_path)
    with pytest.raises(AssertionError):
        recorder.check_all(volume.root, paths)


# --- an fsync that fails


class FailingSync:
    """`os.fsync` that fails with `error` as long as `count` lasts, for files or for folders."""

    def __init__(self, monkeypatch, *, folders=False, error=errno.EIO):
        self.count = 0
        self.failed = 0
        real = os.fsync
        lock = threading.Lock()  # a batch syncs in several threads

        def fsync(fd):
            if stat.S_ISDIR(os.fstat(fd).st_mode) == folders:
                with lock:
                    fails = self.count > 0
                    self.count -= fails
                    self.failed += fails
                if fails:
                    raise OSError(error, os.strerror(error))
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("folders", [False, True])
async def test_an_fsync_that_fails_is_not_retried_but_written_again_from_the_source(
    volume, store, documents, monkeypatch, folders
):
    [chunk] = some_chunks(1)
    volume._ensure_folders({f"chunks/{chunk.id[:2]}"})  # the next fsync of a folder is the last step
    failing = FailingSync(monkeypatch, folders=folders)
    failing.count = 1
    with pytest.raises(StoreError, match="Input/output error") as failed:
        await store.put(chunk)
    assert failing.failed == 1
    assert not failed.value.full
    assert await store.has_many([chunk.id]) == set()
    assert files_in(volume, "tmp") == []
    recorder = Recorder()
    recorder.install(monkeypatch)
    await store.put(chunk)
    recorder.check(os.path.join(volume.root, "chunks"), path_of(volume, chunk.id))
    assert (await store.get(chunk.id)).data == chunk.data


async def test_a_new_folder_that_cannot_be_synced_is_made_again(volume, store, monkeypatch):
    [chunk] = some_chunks(1)
    failing = FailingSync(monkeypatch, folders=True)
    failing.count = 1
    with pytest.raises(StoreError):
        await store.put(chunk)
    assert failing.failed == 1
    assert not os.path.exists(os.path.join(volume.root, "chunks"))
    recorder = Recorder()
    recorder.install(monkeypatch)
    await store.put(chunk)
    recorder.check(volume.root, path_of(volume, chunk.id))


async def test_one_failed_fsync_among_many_files_fails_the_batch_and_leaves_nothing(volume, store, monkeypatch):
    chunks = some_chunks(30)
    failing = FailingSync(monkeypatch)
    failing.count = 1
    with pytest.raises(StoreError, match="Input/output error"):
        await store.put_many(chunks)
    assert failing.failed == 1
    assert await store.has_many(chunk.id for chunk in chunks) == set()
    assert files_in(volume, "tmp") == []
    await store.put_many(chunks)
    assert len(await store.has_many(chunk.id for chunk in chunks)) == 30


async def test_two_failed_fsyncs_in_a_row_stop_all_writing_until_the_store_is_opened_again(
    volume, store, documents, monkeypatch
):
    held, first, second, third = some_chunks(4)
    await store.put(held)
    failing = FailingSync(monkeypatch)
    failing.count = 2
    for chunk in (first, second):
        with pytest.raises(StoreError):
            await store.put(chunk)
    assert failing.failed == 2
    for change in (store.put(third), documents.write("state/x", b"x"), documents.create("state/x", b"x")):
        with pytest.raises(StoreError, match="read-only: fsync failed 2 times in a row"):
            await change
    assert (await store.get(held.id)).data == held.data
    assert len(await frame_of(await store.open(held.id))) > 0
    await store.remove(held.id)
    await store.close()
    again = DiskStore(await open_disk(volume.root, free_floor=0))
    await again.put(third)
    assert (await again.get(third.id)).data == third.data
    await again.close()


async def test_failed_fsyncs_with_a_good_one_between_do_not_stop_writing(store, monkeypatch):
    failing = FailingSync(monkeypatch)
    for chunk in some_chunks(3):
        failing.count = 1
        with pytest.raises(StoreError):
            await store.put(chunk)
        await store.put(chunk)
    assert failing.failed == 3


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
async def test_an_fsync_that_finds_the_disk_full_does_not_stop_writing_for_good(volume, store, monkeypatch, error):
    [chunk] = some_chunks(1)
    failing = FailingSync(monkeypatch, error=error)
    for _ in range(4):
        failing.count = 1
        with pytest.raises(StoreError) as full:
            await store.put(chunk)
        assert full.value.full
        assert full.value.retry_after
    await store.put(chunk)
    assert files_in(volume, "tmp") == []


async def test_a_document_keeps_its_old_bytes_when_the_new_ones_cannot_be_synced(documents, monkeypatch):
    await documents.write("state/x", b"old")
    failing = FailingSync(monkeypatch)
    failing.count = 1
    with pytest.raises(StoreError):
        await documents.write("state/x", b"new")
    assert await documents.read("state/x") == b"old"


# --- the floor


async def test_the_floor_is_kept_and_only_new_chunks_and_files_are_refused(tmp_path):
    root = str(tmp_path / "store")
    held, new = some_chunks(2)
    first = await open_disk(root, free_floor=0)
    await DiskStore(first).put(held)
    await first.close()
    volume = await open_disk(root, free_floor=1 << 62)
    store = DiskStore(volume)
    with pytest.raises(StoreError) as full:
        await store.put_many([held, new])
    assert full.value.full
    assert full.value.retry_after
    assert await store.has_many([new.id]) == set()
    sha256, path, _ = a_file(tmp_path, 1000)
    with pytest.raises(StoreError, match="no space"):
        await DiskBlobs(volume).put_file(sha256, path)
    await store.put(held)
    assert (await store.get(held.id)).data == held.data
    await DiskDocuments(volume).write("state/leases/1", b"renewed")
    await store.remove(held.id)
    assert files_in(volume, "tmp") == []
    await volume.close()


async def test_the_floor_is_one_percent_or_one_gibibyte(volume, store, monkeypatch):
    volume._free_floor = None
    block = 4096

    def system(size, free):
        fields = [block, block, size // block, free // block, free // block, 1, 1, 1, 0, 255]
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))

    [chunk] = some_chunks(1)
    for size, floor in ((10 << 30, 1 << 30), (1 << 40, (1 << 40) // 100)):
        system(size, floor - block)
        with pytest.raises(StoreError, match="no space"):
            await store.put(chunk)
        system(size, floor + (1 << 20))
        await store.put(chunk)
        await store.remove(chunk.id)


async def test_writers_at_the_same_time_keep_the_floor_together(volume, store, monkeypatch):
    """Each of them would fit, both do not: who comes second is told before a byte of it is written."""
    room = os.statvfs(volume.root)
    there = os.statvfs_result((room.f_bsize, 1, 6 << 20, 6 << 20, 6 << 20, *room[5:]))
    monkeypatch.setattr(volume_module.os, "statvfs", lambda _: there)
    write, writing = volume._write, threading.Event()

    def slowly(*args, **kwargs):
        writing.set()
        time.sleep(0.3)
        write(*args, **kwargs)

    monkeypatch.setattr(volume, "_write", slowly)
    first, second = (Chunk.of(bytes([n]) * (4 << 20)) for n in range(2))
    putting = asyncio.create_task(store.put(first))
    await asyncio.to_thread(writing.wait, 5.0)
    with pytest.raises(StoreError) as refused:
        await store.put(second)
    assert refused.value.full
    await putting
    await store.put(second)
    assert await store.has_many([first.id, second.id]) == {first.id, second.id}
