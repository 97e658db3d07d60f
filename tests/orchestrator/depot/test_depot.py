"""The depot: what adding a nupkg leaves behind, and what it never does, whatever goes wrong on the way."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.origins import depot_with, trust_keys
from harness.packages import make_nupkg, noise, nuspec
from harness.process import WAYSTATION, Process, environment, run, wait_for
from harness.seed import SOAK

from orchestrator.depot.cut_nupkg import BATCH_BYTES
from orchestrator.depot.depot import Depot, open_depot
from relay.errors import ArchiveError, ConflictError, MetadataError, NotFoundError, UntrustedError, UsageError
from relay.package.identity import NuGetVersion, PackageId, PackageRef
from relay.package.manifest import Manifest
from relay.stores.catalog import Provenance
from relay.trust.envelopes import PackageStatement, verify_package

FILES = {
    "lib/web.dll": noise("web", 150_000),
    "lib/large.dll": noise("large", 5_000_000),
    "content/readme.txt": b"hello\n" * 50,
}
REF = PackageRef(PackageId.parse("Acme.Web"), NuGetVersion.parse("1.0.0"))


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file below `folder`: when it was written, and what it holds."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def chunk_files(depot: Path) -> list[Path]:
    return list((depot / "chunks").glob("*/*"))


def left_beside_chunks(depot: Path) -> list[str]:
    """What a failed adding left, other than chunks that a sweep will take."""
    fixed = {"format", "lock"}
    return sorted(name for name in contents(depot) if name not in fixed and not name.startswith("chunks/"))


async def check_chunks(depot: Depot, manifest: Manifest) -> None:
    """Every chunk is there and whole."""
    for id in manifest.chunk_ids():
        await depot.store.chunks.get(id)


async def check_every_chunk(location: str) -> int:
    """Every chunk that a depot holds, listed or not, is whole; how many there are."""
    seen = 0
    async with open_depot(location) as depot:
        async for id in depot.store.chunks.list():
            await depot.store.chunks.get(id)
            seen += 1
    return seen


def statement_of(manifest: Manifest) -> PackageStatement:
    return PackageStatement(
        id=str(manifest.package.id),
        version=manifest.package.version.normalized,
        manifest=manifest.id,
        nupkg_sha256=manifest.nupkg.sha256,
    )


# --- adding again


async def test_adding_again_changes_nothing(tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, FILES)
    async with depot_with(tmp_path, nupkg) as origin:
        before = contents(tmp_path / "depot")
        again = await origin.add(nupkg)
        assert (again.new, again.chunks_stored) == (False, 0)
        assert again.pointer == origin.added[0].pointer
        assert contents(tmp_path / "depot") == before
    assert origin.added[0].new
    assert any(name.startswith("packages/") for name in before)


async def test_other_bytes_under_the_same_id_and_version_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, FILES)
    other = make_nupkg(tmp_path / "other.nupkg", FILES | {"lib/web.dll": noise("other", 150_000)}, id="ACME.web")
    async with depot_with(tmp_path, nupkg) as origin:
        before = contents(tmp_path / "depot")
        with pytest.raises(ConflictError, match=r"other bytes.*give the new build a new version"):
            await origin.add(other)
        assert contents(tmp_path / "depot") == before


async def test_another_package_than_expected_is_refused_and_nothing_is_stored(tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, FILES)
    async with depot_with(tmp_path) as origin:
        before = contents(tmp_path / "depot")
        expected = PackageRef(PackageId.parse("Acme.Other"), NuGetVersion.parse("1.0.0"))
        with pytest.raises(MetadataError, match=r"Acme\.Web 1\.0\.0, where Acme\.Other 1\.0\.0 was expected"):
            await origin.depot.add(nupkg, origin.keys.signer, Provenance("added"), expected=expected)
        assert contents(tmp_path / "depot") == before


async def test_adding_again_with_another_key_signs_anew(tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, FILES)
    other = trust_keys(tmp_path / "other-keys")
    async with depot_with(tmp_path, nupkg) as origin:
        manifest = origin.added[0].manifest
        first = await origin.signature(manifest)
        before = contents(tmp_path / "depot")
        await origin.depot.add(nupkg, other.signer, Provenance("added"))
        second = await origin.signature(manifest)
        after = contents(tmp_path / "depot")
        wanted = statement_of(manifest)
        assert verify_package(first, origin.keys.pins) == wanted
        assert verify_package(second, other.pins) == wanted
        with pytest.raises(UntrustedError):
            verify_package(second, origin.keys.pins)
    assert {name for name in after if after[name] != before[name]} == {f"signatures/{manifest.id}"}
    assert set(after) == set(before)


@pytest.mark.parametrize("lost", ["chunks", "blobs", "manifests", "signatures", "packages"])
async def test_what_the_depot_lost_is_brought_back_by_adding_again(tmp_path: Path, lost: str) -> None:
    nupkg = make_nupkg(tmp_path, FILES)
    async with depot_with(tmp_path, nupkg) as origin:
        manifest = origin.added[0].manifest
    before = contents(tmp_path / "depot")
    gone = [path for path in (tmp_path / "depot" / lost).rglob("*") if path.is_file()]
    for path in gone[:2]:
        path.unlink()
    assert gone
    async with open_depot(f"disk:{tmp_path / 'depot'}") as depot:
        added = await depot.add(nupkg, origin.keys.signer, Provenance("added", nupkg))
        assert added.chunks_stored == (2 if lost == "chunks" else 0)
        assert added.new == (lost == "packages")
        assert added.manifest.id == manifest.id
        await check_chunks(depot, manifest)
        assert verify_package(await depot.catalog.signature(manifest.id), origin.keys.pins) == statement_of(manifest)
    after = contents(tmp_path / "depot")
    assert set(after) == set(before)
    whole = {name: digest for name, (_, digest) in before.items() if not name.startswith("packages/")}
    assert {name: digest for name, (_, digest) in after.items() if name in whole} == whole


def flip(path: Path) -> None:
    """One bit of a file that is read-only."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["chunks", "blobs"])
async def test_what_the_disk_damaged_is_brought_back_by_adding_again(tmp_path: Path, kind: str) -> None:
    nupkg = make_nupkg(tmp_path, FILES)
    async with depot_with(tmp_path, nupkg) as origin:
        manifest = origin.added[0].manifest
    before = contents(tmp_path / "depot")
    flip(next(path for path in (tmp_path / "depot" / kind).rglob("*") if path.is_file()))
    async with open_depot(f"disk:{tmp_path / 'depot'}") as depot:
        added = await depot.add(nupkg, origin.keys.signer, Provenance("added", nupkg))
        assert (added.new, added.chunks_stored) == (False, 1 if kind == "chunks" else 0)
        await check_chunks(depot, manifest)
    after = contents(tmp_path / "depot")
    assert {name: after[name][1] for name in before} == {name: digest for name, (_, digest) in before.items()}


async def test_chunks_that_the_disk_damaged_are_made_again_of_the_nupkg(tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, FILES)
    async with depot_with(tmp_path, nupkg) as origin:
        manifest = origin.added[0].manifest
        chunks = [path for path in (tmp_path / "depot" / "chunks").rglob("*") if path.is_file()]
        flip(chunks[0])
        chunks[1].unlink()

        told = await origin.depot.make_whole(manifest)

        assert f"2 of {len(set(manifest.chunk_ids()))} chunks of {manifest.package}" in told
        await check_chunks(origin.depot, manifest)
        assert await origin.depot.make_whole(manifest) == ""


async def test_where_the_nupkg_is_damaged_too_the_next_step_is_named(tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, FILES)
    async with depot_with(tmp_path, nupkg) as origin:
        for kind in ("chunks", "blobs"):
            flip(next(path for path in (tmp_path / "depot" / kind).rglob("*") if path.is_file()))

        with pytest.raises(NotFoundError) as error:
            await origin.depot.make_whole(origin.added[0].manifest)

        assert "waystation package add Acme.Web.1.0.0.nupkg" in error.value.hint


async def test_a_removed_package_is_gone_from_the_list_and_may_come_back(tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, FILES)
    async with depot_with(tmp_path, nupkg) as origin:
        removed = await origin.depot.remove(REF)
        assert removed == origin.added[0].pointer
        assert origin.depot.catalog.all() == []
        assert not await origin.depot.store.blobs.has(removed.nupkg_sha256)
        with pytest.raises(NotFoundError):
            await origin.depot.remove(REF)
    async with open_depot(f"disk:{tmp_path / 'depot'}") as depot:
        assert depot.catalog.all() == []
        added = await depot.add(nupkg, origin.keys.signer, Provenance("added"))
        assert (added.new, added.chunks_stored) == (True, 0), "its chunks were still there"


async def test_a_removed_version_leaves_the_others_whole(tmp_path: Path) -> None:
    nupkgs = [make_nupkg(tmp_path, FILES, version=version) for version in ("1.0.0", "1.0.1")]
    async with depot_with(tmp_path, *nupkgs) as origin:
        await origin.depot.remove(REF)
        (left,) = origin.depot.catalog.all()
        assert left.version == "1.0.1"
        assert await origin.depot.store.blobs.has(left.nupkg_sha256)
        await check_chunks(origin.depot, origin.added[1].manifest)


# --- what may not enter


def damaged(folder: Path) -> str:
    """One bit of the last part is another one; what stands before it is whole, and more than one batch."""
    path = make_nupkg(folder, FILES | {"lib/a.dll": noise("a", BATCH_BYTES), "lib/z.dll": noise("z", 100_000)})
    data = bytearray(Path(path).read_bytes())
    data[data.index(noise("z", 100_000)) + 50_000] ^= 1
    Path(path).write_bytes(data)
    return path


def cut_short(folder: Path) -> str:
    path = make_nupkg(folder, FILES)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    return path


def bomb(folder: Path) -> str:
    """It says that it inflates to 100 bytes."""
    path = folder / "bomb.nupkg"
    zeros = bytes(64 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("Acme.Web.nuspec", nuspec())
        archive.writestr("zeros.bin", zeros)
    path.write_bytes(path.read_bytes().replace(struct.pack("<L", len(zeros)), struct.pack("<L", 100)))
    return str(path)


def two_nuspecs(folder: Path) -> str:
    return make_nupkg(folder, FILES | {"Other.nuspec": nuspec("Other")})


def entities(folder: Path) -> str:
    path = str(folder / "entities.nupkg")
    with zipfile.ZipFile(path, "w") as archive:
        document = nuspec().replace(b"<package ", b'<!DOCTYPE package [<!ENTITY a "b">]><package ', 1)
        assert b"ENTITY" in document
        archive.writestr("Acme.Web.nuspec", document)
        archive.writestr("lib/web.dll", noise("web", 100_000))
    return path


def no_zip(folder: Path) -> str:
    path = folder / "x.nupkg"
    path.write_bytes(b"<html>Log in</html>")
    return str(path)


@pytest.mark.parametrize(
    ("make", "kind", "why"),
    [
        (damaged, ArchiveError, "crc"),
        (cut_short, ArchiveError, "end"),
        (bomb, ArchiveError, "size: holds more than the 100 bytes it says"),
        (two_nuspecs, ArchiveError, "nuspec"),
        (entities, MetadataError, "(?i)dtd|doctype|entit"),
        (no_zip, ArchiveError, "end"),
    ],
)
async def test_what_may_not_enter_leaves_nothing_listed_and_nothing_but_chunks(
    tmp_path: Path, make: Callable[[Path], str], kind: type[Exception], why: str
) -> None:
    nupkg = make(tmp_path)
    async with depot_with(tmp_path) as origin:
        with pytest.raises(kind, match=why):
            await origin.add(nupkg)
        assert origin.depot.catalog.all() == []
    assert left_beside_chunks(tmp_path / "depot") == []
    stored = await check_every_chunk(f"disk:{tmp_path / 'depot'}")
    # Only damage that shows when the bytes are read comes after the first chunks.
    assert bool(stored) == (make is damaged)


async def test_a_refused_nupkg_does_not_bar_the_good_one(tmp_path: Path) -> None:
    async with depot_with(tmp_path) as origin:
        with pytest.raises(ArchiveError):
            await origin.add(damaged(tmp_path))
        added = await origin.add(make_nupkg(tmp_path, FILES))
        assert added.new
        await check_chunks(origin.depot, added.manifest)


async def test_a_file_that_is_not_there_is_told_with_what_was_expected(tmp_path: Path) -> None:
    async with depot_with(tmp_path) as origin:
        with pytest.raises(UsageError, match=r"gone\.nupkg: No such file or directory\. Expected the path"):
            await origin.add(str(tmp_path / "gone.nupkg"))


# --- what is learnt of the parts


async def test_a_part_is_executable_by_its_mode_bit_or_by_how_it_begins(tmp_path: Path) -> None:
    path = str(tmp_path / "x.nupkg")
    marked = zipfile.ZipInfo("tools/marked")
    marked.create_system, marked.external_attr = 3, 0o100755 << 16
    plain = zipfile.ZipInfo("tools/plain")
    plain.create_system, plain.external_attr = 3, 0o100644 << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("Acme.Web.nuspec", nuspec())
        archive.writestr(marked, b"data")
        archive.writestr(plain, b"data")
        archive.writestr("tools/elf", b"\x7fELF" + noise("elf", 5_000_000))
        archive.writestr("tools/script", b"#!/bin/sh\necho\n")
        archive.writestr("tools/empty", b"")
        archive.writestr("tools/one", b"#")
        archive.writestr("tools/late", b" #!/bin/sh\n")
    async with depot_with(tmp_path, path) as origin:
        parts = origin.added[0].manifest.parts
    assert {part.path for part in parts if part.executable} == {"tools/marked", "tools/elf", "tools/script"}
    assert len(parts) == 8


async def test_the_same_nupkg_gives_the_same_manifest_everywhere(tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, FILES | {f"content/{n}.txt": noise(n, 5000 + n) for n in range(100)})
    found = set()
    for name in ("one", "two"):
        async with depot_with(tmp_path / name, nupkg) as origin:
            found.add(origin.added[0].manifest.canonical)
    home = tmp_path / "home"
    assert run(home, "trust", "init").code == 0
    done = run(home, "package", "add", nupkg, "--json", PYTHONHASHSEED="7").json
    assert len(found) == 1
    assert done["packages"][0]["manifest"] == f"sha256:{hashlib.sha256(found.pop()).hexdigest()}"


# --- processes


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with keys."""
    made = tmp_path / "home"
    assert run(made, "trust", "init").code == 0
    return made


async def check_again(home: Path, nupkg: str) -> None:
    """After a kill: nothing is listed, every chunk is whole, and adding again works."""
    assert run(home, "package", "list", "--json").json["packages"] == []
    await check_every_chunk(f"disk:{home / 'depot'}")
    added = run(home, "package", "add", nupkg, "--json").json["packages"][0]
    assert added["new"]
    async with open_depot(f"disk:{home / 'depot'}") as depot:
        manifest = await depot.manifest(depot.catalog.get(REF))
        await check_chunks(depot, manifest)
        assert await depot.store.blobs.has(manifest.nupkg.sha256)
    assert os.listdir(home / "depot/tmp") == []


async def test_a_kill_while_chunks_are_stored_leaves_a_depot_that_takes_it_again(home: Path, tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, {f"lib/{n}.dll": noise(n, 1_000_000) for n in range(80)})
    adding = Process(home, "package", "add", nupkg)
    wait_for(lambda: len(chunk_files(home / "depot")) > 10 or not adding.is_alive)
    adding.kill()
    stored = len(chunk_files(home / "depot"))
    assert 10 < stored <= 80
    assert not (home / "depot/blobs").exists(), "the kill fell behind the chunks"
    await check_again(home, nupkg)


@pytest.mark.parametrize(("calls", "what"), [("/^link", "manifest"), ("/^rename", "chunk")])
async def test_a_kill_at_a_system_call_leaves_a_depot_that_takes_it_again(
    home: Path, tmp_path: Path, calls: str, what: str
) -> None:
    """The first link(2) gives a manifest its name, when all chunks have theirs; the first rename(2) a chunk."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace to kill at a system call")
    nupkg = make_nupkg(tmp_path, FILES)
    assert run(home, "package", "list").code == 0, "the depot is made before"
    log = tmp_path / "strace.log"
    inject = f"inject={calls}:signal=SIGKILL:when=1"
    done = subprocess.run(
        ["strace", "-f", "-o", log, "-e", f"trace={calls}", "-e", inject, WAYSTATION, "package", "add", nupkg],
        env=environment(home),
        capture_output=True,
        text=True,
    )
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    assert "killed by SIGKILL" in log.read_text(), "the fault was not injected"
    assert (home / "depot/blobs").exists() == (what == "manifest")
    await check_again(home, nupkg)


async def test_two_processes_that_add_to_one_depot_at_the_same_time_both_end_well(home: Path, tmp_path: Path) -> None:
    shared = {f"lib/{n}.dll": noise(n, 500_000) for n in range(20)}
    nupkgs = [
        make_nupkg(tmp_path, shared | {"lib/own.dll": noise(f"own {id}", 500_000)}, id=id)
        for id in ("Acme.A", "Acme.B")
    ]
    adding = [Process(home, "package", "add", nupkg, "--json") for nupkg in nupkgs]
    added = [process.result().json["packages"][0] for process in adding]
    assert [one["new"] for one in added] == [True, True]
    async with open_depot(f"disk:{home / 'depot'}") as depot:
        pointers = depot.catalog.all()
        assert [pointer.id for pointer in pointers] == ["Acme.A", "Acme.B"]
        for pointer in pointers:
            await check_chunks(depot, await depot.manifest(pointer))
    assert os.listdir(home / "depot/tmp") == []


def test_two_processes_that_add_the_same_package_at_the_same_time_both_end_well(home: Path, tmp_path: Path) -> None:
    nupkg = make_nupkg(tmp_path, FILES)
    adding = [Process(home, "package", "add", nupkg, "--json") for _ in range(2)]
    assert len({process.result().json["packages"][0]["manifest"] for process in adding}) == 1
    assert len(run(home, "package", "list", "--json").json["packages"]) == 1


# --- memory

PEAK = 200 << 20
MODEL = 300 << 20 if SOAK else 80 << 20
"""Bytes of the largest part."""
"""Bytes that `package add` may have resident, whatever the package."""

# The kernel counts into a new process's peak what its parent had resident when it forked: a small parent is needed.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss)
"""


def heavy_nupkg(path: Path) -> str:
    """More than may be held: one large part, some middle ones, thousands of small ones, that do not compress."""
    rng = random.Random(1)
    block = memoryview(rng.randbytes(16 << 20))

    def pieces(size: int) -> Iterator[memoryview]:
        while size:
            start = rng.randrange(len(block) - 1)
            piece = block[start : start + size]
            size -= len(piece)
            yield piece

    sizes = {"data/model.bin": MODEL}
    sizes |= {f"lib/large{n}.dll": 10 << 20 for n in range(6)}
    sizes |= {f"lib/middle{n}.dll": 1 << 20 for n in range(60)}
    sizes |= {f"content/{n % 50}/{n}.txt": 10_000 for n in range(8000)}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("Acme.Heavy.nuspec", nuspec("Acme.Heavy"))
        for name, size in sizes.items():
            with archive.open(zipfile.ZipInfo(name), "w") as part:
                for piece in pieces(size):
                    part.write(piece)
    assert path.stat().st_size > MODEL + (190 << 20)
    return str(path)


def test_adding_more_than_it_may_hold_stays_under_200_mb_of_memory(home: Path, tmp_path: Path) -> None:
    nupkg = heavy_nupkg(tmp_path / "heavy.nupkg")
    try:
        measured = subprocess.run(
            [sys.executable, "-c", MEASURE, WAYSTATION, "package", "add", nupkg],
            env=environment(home),
            capture_output=True,
            text=True,
            check=True,
        )
        code, peak = map(int, measured.stdout.split())
        assert code == 0, measured.stderr
        # Linux counts in KiB.
        print(f"peak {peak / 1024:.0f} MiB")
        assert peak * 1024 < PEAK
        shown = run(home, "package", "show", "Acme.Heavy", "1.0.0", "--json").json
        assert shown["stream_bytes"] > MODEL + (190 << 20) > PEAK
        assert shown["parts"] == 1 + 1 + 6 + 60 + 8000
    finally:
        os.unlink(nupkg)
        shutil.rmtree(home, ignore_errors=True)
