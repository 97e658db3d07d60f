"""The disk store under kill -9, failing system calls and full file systems, with the real kernel.

Every run proves that its fault was injected. `make soak` runs all points instead of a sample.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.paths import ROOT
from harness.process import forked
from harness.seed import SOAK, chance

from relay.package.chunk import Chunk
from relay.stores.disk import DiskBlobs, DiskDocuments, DiskStore
from relay.stores.volume import open_disk

RUN_LIMIT = 180
"""Seconds after which a run counts as hung."""

# The child says what it did with writev, so that faults in write do not hit its own words. It waits before it starts,
# so that strace counts only the store's calls.
CHILD = """
import asyncio, json, os, random, sys
from relay.package.chunk import Chunk
from relay.errors import ChunkInvalid, StoreError
from relay.stores.disk import DiskBlobs, DiskDocuments, DiskStore
from relay.stores.volume import open_disk

root, source, blob = sys.argv[1:4]

def tell(what, **more):
    os.writev(1, [json.dumps({"what": what, **more}).encode() + b"\\n"])

def batch(number):
    noise = random.Random(number)
    return [Chunk.of(noise.randbytes(noise.randrange(1, 30_000))) for _ in range(12)]

async def until_done(what, act):
    for attempt in range(40):
        try:
            await act(STATE["volume"])
        except StoreError as error:
            tell("failed", at=what, full=error.full, retry_after=error.retry_after, message=str(error))
            if "read-only" in str(error):
                await STATE["volume"].close()
                await opened()
        else:
            tell("done", at=what)
            return
    tell("gave up", at=what)

STATE = {}

async def opened():
    for attempt in range(40):
        try:
            STATE["volume"] = await open_disk(root, free_floor=0)
            return
        except StoreError as error:
            tell("failed", at="open", full=error.full, retry_after=error.retry_after, message=str(error))

async def write():
    for number in range(3):
        await until_done(f"batch {number}", lambda volume: DiskStore(volume).put_many(batch(number)))
    await until_done("blob", lambda volume: DiskBlobs(volume).put_file(blob, source))
    for number in range(3):
        await until_done(f"document {number}", lambda volume: DiskDocuments(volume).write("state/x", b"%d" % number * 9))
    await until_done("created", lambda volume: DiskDocuments(volume).create("packages/a/1.0.0", b"pointer"))
    await until_done("removed", lambda volume: DiskDocuments(volume).remove("state/x"))

async def read():
    async def check(volume, chunk):
        assert (await DiskStore(volume).get(chunk.id)).data == chunk.data
        stored = await DiskStore(volume).open(chunk.id)
        assert sum([len(piece) async for piece in stored.pieces()]) == stored.length
    for number in range(3):
        for chunk in batch(number):
            await until_done("read", lambda volume: check(volume, chunk))

async def mend():
    store = DiskStore(STATE["volume"])
    for number in range(3):
        for chunk in batch(number):
            try:
                await store.get(chunk.id)
            except ChunkInvalid:
                await until_done("mended", lambda volume: DiskStore(volume).put_many([chunk]))

async def main():
    await opened()
    await {"write": write, "read": read, "mend": mend}[sys.argv[4]]()
    tell("end")

tell("ready")
sys.stdin.readline()
asyncio.run(main())
"""


@dataclass(frozen=True)
class Run:
    """What became of one run under strace."""

    killed: bool
    injected: int
    told: list[dict]

    def done(self):
        return [told["at"] for told in self.told if told["what"] == "done"]

    def failed(self):
        return [told for told in self.told if told["what"] == "failed"]

    def ended(self):
        return self.told[-1]["what"] == "end"


@pytest.fixture
def source(tmp_path):
    """A file and its SHA-256, to be put as a blob."""
    data = random.Random(99).randbytes(300_000)
    (tmp_path / "source").write_bytes(data)
    return str(tmp_path / "source"), Chunk.of(data).id


@pytest.fixture
def root(tmp_path):
    return str(tmp_path / "store")


def run_child(root, source, mode, calls, fault, log):
    """Run the child's `mode` with `fault` injected into the system `calls`."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace to inject faults into system calls")
    begins, begin = os.pipe()
    with forked(Path(root).parent, CHILD, root, *source, mode, stdin=begins) as child:
        os.close(begins)
        child.wait_for_line('{"what": "ready"')
        # No --seccomp-bpf: it turns injection off without a word.
        words = [
            "strace",
            "-f",
            "-p",
            str(child.pid),
            "-o",
            log,
            "-e",
            f"trace={calls}",
            "-e",
            f"inject={calls}:{fault}",
        ]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as strace:
            first = strace.stderr.readline()
            if "attached" not in first:
                pytest.skip(f"strace may not attach to a process here: {first.strip()}")
            with open(begin, "w") as line:
                line.write("go\n")
            done = child.result()
            strace.communicate(timeout=RUN_LIMIT)
    with open(log) as file:
        injected = len(re.findall(r"\(INJECTED\)|\+\+\+ killed by SIGKILL", file.read()))
    return Run(done.code == -signal.SIGKILL, injected, [json.loads(line) for line in done.out.splitlines()])


def batch(number):
    noise = random.Random(number)
    return [Chunk.of(noise.randbytes(noise.randrange(1, 30_000))) for _ in range(12)]


def left_in_tmp(root):
    return os.listdir(os.path.join(root, "tmp"))


async def check_store(root, source, done, failing=None):
    """The store opens, all in it is whole, all that was acknowledged is there, and everything can be put again."""
    volume = await open_disk(root, free_floor=0)
    chunks, documents, blobs = DiskStore(volume), DiskDocuments(volume), DiskBlobs(volume)
    assert left_in_tmp(root) == []
    async for id in chunks.list():
        assert (await chunks.get(id)).id == id
        await chunks.open(id)
    for number in range(3):
        wanted = {chunk.id for chunk in batch(number)}
        if f"batch {number}" in done:
            assert await chunks.has_many(wanted) == wanted
    if "blob" in done or await blobs.has(source[1]):
        assert sum([len(piece) async for piece in blobs.read(source[1])]) == 300_000
    written = [number for number in range(3) if f"document {number}" in done]
    seen = await documents.read("state/x")
    if "removed" in done:
        assert seen is None
    else:
        allowed = {b"%d" % number * 9 for number in range(max(written, default=0), 3)}
        assert seen in allowed | ({None} if not written or "created" in done else set())
    assert await documents.read("packages/a/1.0.0") in ({b"pointer"} if "created" in done else {b"pointer", None})
    for number in range(3):
        await chunks.put_many(batch(number))
    await blobs.put_file(source[1], source[0])
    await documents.write("state/x", b"again")
    for number in range(3):
        for chunk in batch(number):
            assert (await chunks.get(chunk.id)).data == chunk.data
    assert os.listdir(os.path.join(root, "quarantine")) == []
    await volume.close()


# --- kill -9

KILLED_CALLS = [
    "openat",
    "write",
    "fsync",
    "close",
    "/^rename",
    "/^mkdir",
    "/^unlink",
    "/^link",
    "flock",
    "/^newfstatat",
]


def kill_points():
    """(calls, which of a thread's calls). The kernel of strace counts per thread, so small numbers reach far."""
    points = list(itertools.product(KILLED_CALLS, range(1, 41 if SOAK else 9)))
    return points if SOAK else chance("kill points").sample(points, 40)


async def test_a_kill_at_any_system_call_leaves_a_store_that_verifies_and_takes_it_all_again(tmp_path, source):
    killed = 0
    for calls, when in kill_points():
        root = str(tmp_path / f"{calls.strip('/^')}-{when}")
        run = run_child(root, source, "write", calls, f"signal=SIGKILL:when={when}", str(tmp_path / "log"))
        assert run.killed or run.ended(), f"{calls} {when}: neither killed nor done"
        assert run.killed == (run.injected > 0)
        killed += run.killed
        await check_store(root, source, run.done())
        shutil.rmtree(root)
    assert killed > 5, "too few runs were killed to mean anything"


# --- system calls that fail

FAULTS = [
    ("openat", "EMFILE"),
    ("openat", "ENOMEM"),
    ("openat", "EROFS"),
    ("openat", "ENOSPC"),
    ("write", "ENOSPC"),
    ("write", "EDQUOT"),
    ("write", "EIO"),
    ("fsync", "EIO"),
    ("fsync", "ENOSPC"),
    ("close", "EIO"),
    ("/^rename", "EIO"),
    ("/^rename", "ENOSPC"),
    ("/^mkdir", "ENOSPC"),
    ("/^link", "EIO"),
    ("/^statfs", "EIO"),
]


def fault_times(calls):
    """Which of a thread's calls fail."""
    if SOAK:
        return range(1, 25)
    # There is one link in all, and every thread's first calls of the others come early.
    return (1 if calls == "/^link" else chance(calls).randrange(1, 4),)


@pytest.mark.parametrize(("calls", "error"), FAULTS, ids=lambda value: value.strip("/^"))
async def test_a_failing_system_call_is_told_and_nothing_half_written_is_seen(tmp_path, root, source, calls, error):
    injected = 0
    for when in fault_times(calls):
        await prepared(root)
        run = run_child(root, source, "write", calls, f"error={error}:when={when}", str(tmp_path / "log"))
        assert run.ended(), f"{calls} {error} {when}: {run.told[-3:]}"
        # strace counts per thread: a store that was opened again after two failed fsyncs has new threads, which fail too.
        assert len(run.done()) == 9 or (calls, error) == ("fsync", "EIO")
        assert left_in_tmp(root) == []
        for failed in run.failed():
            assert failed["full"] == (error in {"ENOSPC", "EDQUOT"}) or "read-only" in failed["message"]
            assert failed["retry_after"] or error not in {"ENOSPC", "EDQUOT", "EMFILE", "ENOMEM"}
        if run.injected:
            assert run.failed() or calls == "close", "a failure was swallowed"
        injected += run.injected
        await check_store(root, source, run.done())
        shutil.rmtree(root)
    assert injected, "nothing was injected"


async def prepared(root):
    """A store that is there: its opening is not what this is about."""
    await (await open_disk(root, free_floor=0)).close()


async def filled(root):
    volume = await open_disk(root, free_floor=0)
    for number in range(3):
        await DiskStore(volume).put_many(batch(number))
    await volume.close()


async def test_descriptors_that_are_all_taken_are_the_road_not_damage(tmp_path, root, source):
    await filled(root)
    # Behind the opening of the store, which looks at each folder on the way to it.
    run = run_child(root, source, "read", "openat", "error=EMFILE:when=60+9", str(tmp_path / "log"))
    assert run.ended(), run.told[-3:]
    assert run.injected
    assert run.failed()
    assert os.listdir(os.path.join(root, "quarantine")) == []
    await check_store(root, source, run.done())


async def test_a_chunk_that_the_disk_does_not_give_is_put_aside_and_written_again(tmp_path, root, source):
    await filled(root)
    run = run_child(root, source, "mend", "read", "error=EIO:when=5+9", str(tmp_path / "log"))
    assert run.ended(), run.told[-3:]
    assert run.injected
    mended = run.done().count("mended")
    assert mended
    aside = os.listdir(os.path.join(root, "quarantine"))
    assert len(aside) == mended
    for name in aside:
        os.unlink(os.path.join(root, "quarantine", name))
    await check_store(root, source, run.done())


async def test_lasting_fsync_failure_makes_the_store_read_only_and_reading_goes_on(tmp_path, root, source):
    await prepared(root)
    run = run_child(root, source, "write", "fsync", "error=EIO:when=1+", str(tmp_path / "log"))
    assert run.injected
    # Its folder could not be made durable, so there was nothing to remove.
    assert set(run.done()) <= {"removed"}
    messages = [failed["message"] for failed in run.failed()]
    assert "Input/output error" in messages[0]
    assert "Input/output error" in messages[1]
    assert "read-only: fsync failed 2 times in a row" in messages[2]
    assert left_in_tmp(root) == []
    await check_store(root, source, [])


# --- descriptors

NO_DESCRIPTORS = """
import asyncio, json, os, resource, sys
from harness.store_contract import some_chunks
from relay.errors import StoreError
from relay.stores.disk import DiskStore
from relay.stores.volume import open_disk

async def main():
    volume = await open_disk(sys.argv[1], free_floor=0)
    store = DiskStore(volume)
    held, *chunks = some_chunks(30)
    await store.put(held)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 4, hard))
    try:
        await store.put_many(chunks)
    except StoreError as error:
        failed = error
    assert failed.retry_after and not failed.full, failed
    assert (await store.get(held.id)).data == held.data
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.listdir(os.path.join(sys.argv[1], "tmp")) == []
    await store.put_many(chunks)
    assert len(await store.has_many(chunk.id for chunk in chunks)) == 29
    print(failed)
asyncio.run(main())
"""


def test_out_of_descriptors_is_told_and_passes(root):
    done = forked(Path(root).parent, NO_DESCRIPTORS, root).result()
    assert done.code == 0, done.err
    assert "Too many open files" in done.out


# --- full file systems

FULL = """
import asyncio, os, subprocess, sys
from harness.store_contract import some_chunks
from relay.package.chunk import Chunk
from relay.errors import StoreError
from relay.stores.disk import DiskDocuments, DiskStore
from relay.stores.volume import open_disk

folder, options = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)

async def main():
    volume = await open_disk(os.path.join(folder, "store"), free_floor=0)
    store, documents = DiskStore(volume), DiskDocuments(volume)
    await documents.write("manifests/kept", b"kept")
    held = []
    while True:
        chunks = [Chunk.of(os.urandom(16_000)) for _ in range(8)]
        try:
            await store.put_many(chunks)
        except StoreError as error:
            full = error
            break
        held += chunks
        assert len(held) < 10_000, "the file system was never full"
    assert full.full and full.retry_after, full
    assert held
    filler = os.path.join(folder, "filler")
    try:
        with open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        pass
    try:
        await store.put(Chunk.of(os.urandom(60_000)))
        raise SystemExit("a chunk found room where there is none")
    except StoreError as error:
        assert error.full, error
    assert os.listdir(volume.path("tmp")) == []
    for chunk in held:
        assert (await store.get(chunk.id)).data == chunk.data
        assert [piece async for piece in (await store.open(chunk.id)).pieces()]
    assert await documents.read("manifests/kept") == b"kept"
    await documents.remove("manifests/kept")
    for chunk in held[:10]:
        await store.remove(chunk.id)
    await store.put_many(held[:4])
    assert (await store.get(held[0].id)).data == held[0].data
    assert [id async for id in store.list()]
    await volume.close()
    print("full:", full)

asyncio.run(main())
"""


@pytest.mark.parametrize("options", ["size=2m", "size=64m,nr_inodes=400"], ids=["bytes", "inodes"])
def test_a_full_file_system_is_told_and_reading_and_removing_go_on(tmp_path, options):
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare to mount a small tmpfs of its own")
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"cannot make a mount namespace here: {probe.stderr.decode().strip()}")
    out = run_script(["unshare", "-m", sys.executable, "-c", FULL, str(tmp_path), options])
    assert "full: no space left" in out


def run_script(command):
    """Run it with the tests' helpers in reach; its output, or its error as ours."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=RUN_LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
