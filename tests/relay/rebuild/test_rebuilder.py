"""The identical nupkg: proved when it is published, rebuilt from parts, and never one byte otherwise."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import platform
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from harness.crafted import Member, craft, descriptor
from harness.nupkgs import (
    ENGINE_FILES,
    NO_DATA,
    NUPKGS,
    NUSPEC,
    Raw,
    Taken,
    as_dotnet,
    as_zlib,
    canonical_zip,
    mixture,
    stream,
    take,
)
from harness.seed import SOAK, chance
from harness.written_zips import WRITTEN

from relay.engines.encoders import EncoderDiedError, EncoderMissingError, Encoders
from relay.errors import ArchiveError
from relay.package.chunk import Chunk
from relay.package.identity import NuGetVersion, PackageId
from relay.package.manifest import to_wire
from relay.package.pack import pack
from relay.package.part_reader import parts_of_chunks
from relay.package.recipe import (
    STORED_AS_IS,
    VERBATIM,
    Canonical,
    LiteralRecords,
    Opaque,
    Recipe,
    Use,
    encode_recipe,
    opaque,
    parse_recipe,
    shares,
)
from relay.rebuild import find_recipe as finding
from relay.rebuild.find_recipe import find_recipe
from relay.rebuild.rebuilder import RebuildError, rebuild
from relay.support.zstd import zstd

engines = pytest.mark.skipif(
    len(ENGINE_FILES) != 2 or platform.machine() != "x86_64" or sys.platform != "linux", reason=NO_DATA
)
TEXT = mixture(7, 300_000)


@pytest.fixture
async def encoders() -> AsyncGenerator[Encoders, None]:
    async with await Encoders.open(ENGINE_FILES, search=False, workers=2) as opened:
        if "zlib" not in opened.names():
            pytest.skip(f"this Python's zlib is no classic one: {opened.missing()}")
        yield opened


async def found(taken: Taken, encoders: Encoders, folder: Path) -> Recipe:
    """The recipe of a nupkg, as it comes out of the wire."""
    path = folder / "original.nupkg"
    path.write_bytes(taken.nupkg)
    return parse_recipe(encode_recipe(await find_recipe(path, taken.manifest, encoders)), taken.manifest)


async def made(taken: Taken, recipe: Recipe, encoders: Encoders, folder: Path) -> bytes:
    output = folder / "made.nupkg"
    await rebuild(
        taken.manifest, recipe, parts_of_chunks(taken.manifest, taken.chunk), taken.verbatim(recipe), encoders, output
    )
    return output.read_bytes()


def compressed(recipe: Recipe, taken: Taken) -> dict[str, int]:
    return {encoder: share.compressed for encoder, share in shares(recipe, taken.manifest).items()}


# --- real packages

INTEL_ERA = {
    "humanizer.core.2.14.1", "microsoft.bcl.timeprovider.8.0.1", "microsoft.build.tasks.git.8.0.0",
    "microsoft.sourcelink.common.8.0.0", "microsoft.sourcelink.github.8.0.0", "newtonsoft.json.13.0.3",
    "newtonsoft.json.13.0.4", "newtonsoft.json.14.0.1-beta2", "polly.core.8.9.0", "system.buffers.4.6.1",
    "system.componentmodel.annotations.5.0.0", "system.formats.asn1.8.0.1",
    "system.io.filesystem.accesscontrol.5.0.0", "system.memory.4.6.3", "system.numerics.vectors.4.6.1",
    "system.runtime.compilerservices.unsafe.6.1.2", "system.security.accesscontrol.5.0.0",
    "system.security.cryptography.cng.5.0.0", "system.security.principal.windows.5.0.0",
    "system.threading.channels.8.0.0", "system.threading.tasks.extensions.4.6.3",
}  # fmt: skip
"""Packed by .NET 8 and before on Windows: their encoder is not to be had. All others come without a verbatim byte."""


@engines
@pytest.mark.skipif(not NUPKGS, reason=NO_DATA)
async def test_every_real_package_comes_back_with_the_same_sha512(encoders: Encoders, tmp_path: Path) -> None:
    assert len(NUPKGS) >= 70
    # Others in each run; all in the long form.
    for path in NUPKGS if SOAK else chance("real packages").sample(NUPKGS, 24):
        taken = take(path)
        recipe = await found(taken, encoders, tmp_path)
        back = await made(taken, recipe, encoders, tmp_path)
        assert hashlib.sha512(back).digest() == hashlib.sha512(taken.nupkg).digest(), path.stem
        assert (recipe.verbatim is not None) == (path.stem in INTEL_ERA), path.stem
        assert isinstance(recipe.records, Opaque | Canonical), path.stem
        assert len(to_wire(encode_recipe(recipe))) < 500, path.stem


@engines
@pytest.mark.skipif(not NUPKGS, reason=NO_DATA)
async def test_the_recipe_of_the_next_version_is_a_few_bytes(encoders: Encoders, tmp_path: Path) -> None:
    old, new = (take(next(path for path in NUPKGS if path.stem == f"Shop.Web.1.0.{n}")) for n in (0, 1))
    before, after = [encode_recipe(await found(taken, encoders, tmp_path)) for taken in (old, new)]
    assert len(to_wire(after, before)) < 60


# --- crafted packages


def zipped(level: int = 6, method: int = zipfile.ZIP_DEFLATED, **options: Any) -> bytes:
    """By Python's zipfile."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method, compresslevel=level) as archive:
        archive.writestr("A.nuspec", NUSPEC)
        with archive.open("lib/a b.dll", "w", **options) as member:
            member.write(TEXT)
        archive.writestr("lib/none.txt", b"")
    return file.getvalue()


class _Unseekable(io.BytesIO):
    def seekable(self) -> bool:
        return False

    def seek(self, *_: Any) -> int:
        raise io.UnsupportedOperation

    def tell(self) -> int:
        raise io.UnsupportedOperation


def with_descriptors() -> bytes:
    file = _Unseekable()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("A.nuspec", NUSPEC)
        archive.writestr("lib/a.dll", TEXT)
    data = file.getvalue()
    assert b"PK\7\x08" in data
    return data


def with_a_zip64_end(monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    data = zipped()
    monkeypatch.undo()
    assert b"PK\6\6" in data
    return data


def by_tool(folder: Path, *command: str) -> bytes:
    """By Info-ZIP or 7-Zip, of a folder with folders in it."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")
    (folder / "in" / "lib").mkdir(parents=True)
    (folder / "in" / "A.nuspec").write_bytes(NUSPEC)
    (folder / "in" / "lib" / "a.dll").write_bytes(TEXT)
    (folder / "in" / "lib" / "b.png").write_bytes(os.urandom(3000))
    subprocess.run([*command, "../out.zip", "."], cwd=folder / "in", check=True, stdout=subprocess.DEVNULL)
    return (folder / "out.zip").read_bytes()


def packed(folder: Path) -> bytes:
    (folder / "in").mkdir()
    (folder / "in" / "a b.dll").write_bytes(TEXT)
    file = io.BytesIO()
    pack(
        str(folder / "in"), file, id=PackageId.parse("A"), version=NuGetVersion.parse("1.0.0"), authors="x", description="y"
    )  # fmt: skip
    return file.getvalue()


@pytest.mark.parametrize(
    ("make", "form", "encoder"),
    [
        (zipped, Canonical, "zlib"),
        (lambda: zipped(method=zipfile.ZIP_STORED), Canonical, STORED_AS_IS),
        (lambda: zipped(force_zip64=True), LiteralRecords, "zlib"),
        (with_descriptors, LiteralRecords, "zlib"),
        (lambda: zipped(level=9), Opaque, VERBATIM),
        (lambda: zipped(level=1), Opaque, VERBATIM),
        (lambda: zipped(method=zipfile.ZIP_STORED, force_zip64=True), LiteralRecords, STORED_AS_IS),
    ],
    ids=["zipfile", "stored", "zip64", "descriptors", "level 9", "level 1", "stored zip64"],
)
async def test_a_crafted_package_comes_back_by_the_encoder_that_made_it(
    make: Callable[[], bytes], form: type, encoder: str, encoders: Encoders, tmp_path: Path
) -> None:
    taken = take(make())
    recipe = await found(taken, encoders, tmp_path)
    assert isinstance(recipe.records, form)
    mostly = compressed(recipe, taken)
    assert mostly[encoder] > 0.99 * sum(mostly.values())
    assert (VERBATIM in mostly) == (encoder == VERBATIM)
    assert await made(taken, recipe, encoders, tmp_path) == taken.nupkg


async def test_a_zip64_end_comes_back(encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = take(with_a_zip64_end(monkeypatch))
    recipe = await found(taken, encoders, tmp_path)
    assert isinstance(recipe.records, LiteralRecords)
    assert VERBATIM not in compressed(recipe, taken)
    assert await made(taken, recipe, encoders, tmp_path) == taken.nupkg


@pytest.mark.parametrize(
    "command", [("zip", "-q", "-r"), ("zip", "-q", "-r", "-0"), ("7z", "a", "-tzip"), ("7z", "a", "-tzip", "-mx=9")], ids=" ".join
)  # fmt: skip
async def test_what_other_tools_zipped_comes_back_by_an_honest_fall_back(
    command: tuple[str, ...], encoders: Encoders, tmp_path: Path
) -> None:
    taken = take(by_tool(tmp_path, *command))
    recipe = await found(taken, encoders, tmp_path)
    assert not isinstance(recipe.records, Canonical)
    mostly = compressed(recipe, taken)
    if "-0" in command:
        assert set(mostly) == {STORED_AS_IS}
    else:
        assert mostly[VERBATIM] > 0.9 * sum(mostly.values())
    assert await made(taken, recipe, encoders, tmp_path) == taken.nupkg


async def test_a_part_in_zstd_is_kept_verbatim_and_nothing_else_is(encoders: Encoders, tmp_path: Path) -> None:
    images, noise = zstd.compress(TEXT[:50_000]), os.urandom(200)
    members = [
        Member("lib/a.dll", TEXT),
        Member("b.bin", TEXT[:50_000], method=93, raw=images, flags=8),
        Member("c", noise),
    ]
    members[1].after = descriptor(members[1])
    taken = take(craft(*members, Member("empty", b"", raw=b"")))
    recipe = await found(taken, encoders, tmp_path)
    assert isinstance(recipe.records, LiteralRecords)
    mostly = compressed(recipe, taken)
    assert mostly[VERBATIM] == len(images)
    assert taken.verbatim_bytes(recipe) == images
    assert mostly["zlib"] > 100_000
    assert await made(taken, recipe, encoders, tmp_path) == taken.nupkg


async def test_a_package_all_in_zstd_is_one_blob(encoders: Encoders, tmp_path: Path) -> None:
    taken = take(WRITTEN["python-zstd"])
    recipe = await found(taken, encoders, tmp_path)
    assert isinstance(recipe.records, Opaque) or compressed(recipe, taken).keys() <= {VERBATIM, STORED_AS_IS}
    assert await made(taken, recipe, encoders, tmp_path) == taken.nupkg


async def test_the_zip_of_every_writer_comes_back(encoders: Encoders, tmp_path: Path) -> None:
    for name, data in WRITTEN.items():
        taken = take(data)
        recipe = await found(taken, encoders, tmp_path)
        assert await made(taken, recipe, encoders, tmp_path) == data, name


async def test_what_package_pack_made_comes_back_without_a_verbatim_byte(encoders: Encoders, tmp_path: Path) -> None:
    taken = take(packed(tmp_path))
    recipe = await found(taken, encoders, tmp_path)
    assert isinstance(recipe.records, Canonical)
    assert set(compressed(recipe, taken)) == {"zlib"}
    assert await made(taken, recipe, encoders, tmp_path) == taken.nupkg


@engines
async def test_a_signed_package_of_many_encoders_and_feedings_comes_back(encoders: Encoders, tmp_path: Path) -> None:
    parts = [Raw("A.nuspec", NUSPEC, as_dotnet("dotnet-10", NUSPEC, "sync"))]
    content = mixture(11, 60_000)
    for name in ("dotnet-10", "dotnet-9"):
        parts += [Raw(f"lib/{name}/{f}", content, as_dotnet(name, content, f)) for f in ("whole", "sync", "sync-1024", "sync-6143")]  # fmt: skip
    parts += [
        Raw("lib/classic", TEXT, as_zlib(TEXT)),
        Raw("lib/foreign", TEXT, as_zlib(TEXT, 3)),
        Raw("lib/stored", TEXT),
    ]
    taken = take(canonical_zip(*parts, Raw(".signature.p7s", b"signed" * 2000)))
    recipe = await found(taken, encoders, tmp_path)
    assert isinstance(recipe.records, Canonical)
    share = compressed(recipe, taken)
    assert share[VERBATIM] == len(as_zlib(TEXT, 3))
    assert share[STORED_AS_IS] == len(TEXT) + 12_000
    assert {(use.encoder, use.feeding) for use in recipe.uses} >= {
        (name, f) for name in ("dotnet-10", "dotnet-9") for f in ("whole", "sync", "sync-1024", "sync-6143")
    }
    assert await made(taken, recipe, encoders, tmp_path) == taken.nupkg


async def test_a_part_of_many_chunks_comes_back_in_little_memory(encoders: Encoders, tmp_path: Path) -> None:
    content = mixture(2, 700_000) * 60
    taken = take(canonical_zip(Raw("A.nuspec", NUSPEC, as_zlib(NUSPEC)), Raw("lib/large", content, as_zlib(content))))
    assert len(taken.chunks) > 9
    recipe = await found(taken, encoders, tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()

    async def get(index: int) -> Chunk:
        return Chunk.of(bytes(bytearray(taken.chunks[index].data)))

    read = parts_of_chunks(taken.manifest, get)
    tracemalloc.start()
    try:
        await rebuild(taken.manifest, recipe, read, None, encoders, folder / "made")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30 << 20 < len(content)
    assert (folder / "made").read_bytes() == taken.nupkg


async def test_chunks_that_small_parts_share_are_asked_for_once(encoders: Encoders, tmp_path: Path) -> None:
    parts = [Raw(f"lib/{n * 7919 % 97}.txt", b"%d" % n * 50, as_zlib(b"%d" % n * 50)) for n in range(97)]
    taken = take(canonical_zip(Raw("A.nuspec", NUSPEC, as_zlib(NUSPEC)), *parts))
    recipe = await found(taken, encoders, tmp_path)
    asked: list[int] = []

    async def get(index: int) -> Chunk:
        asked.append(index)
        await asyncio.sleep(0.001)
        return taken.chunks[index]

    await rebuild(taken.manifest, recipe, parts_of_chunks(taken.manifest, get), None, encoders, tmp_path / "made")
    assert sorted(asked) == list(range(len(taken.chunks)))
    assert (tmp_path / "made").read_bytes() == taken.nupkg


# --- lies and faults


CRAFTED = take(
    canonical_zip(
        Raw("A.nuspec", NUSPEC, as_zlib(NUSPEC)),
        Raw("lib/a.dll", TEXT, as_zlib(TEXT)),
        Raw("lib/b.dll", TEXT + b"!", as_zlib(TEXT + b"!", 9)),
    )
)


def with_use(recipe: Recipe, old: str, new: str) -> Recipe:
    uses = tuple(Use(new, use.feeding, use.compressed) if use.encoder == old else use for use in recipe.uses)
    assert uses != recipe.uses
    return parse_recipe(encode_recipe(msgspec.structs.replace(recipe, uses=uses)), CRAFTED.manifest)


async def refused(
    recipe: Recipe, encoders: Encoders, folder: Path, verbatim: AsyncIterator[bytes] | None, error: type[Exception]
) -> None:
    """The rebuild ends in `error`, and nothing of it is left."""
    before = set(folder.iterdir())
    read = parts_of_chunks(CRAFTED.manifest, CRAFTED.chunk)
    with pytest.raises(error):
        await rebuild(CRAFTED.manifest, recipe, read, verbatim, encoders, folder / "made.nupkg")
    assert set(folder.iterdir()) == before


@engines
async def test_a_wrong_encoder_in_the_recipe_is_caught(encoders: Encoders, tmp_path: Path) -> None:
    recipe = await found(CRAFTED, encoders, tmp_path)
    for encoder in ("dotnet-9", "dotnet-10"):
        lie = with_use(recipe, "zlib", encoder)
        await refused(lie, encoders, tmp_path, CRAFTED.verbatim(recipe), RebuildError)
    assert await made(CRAFTED, recipe, encoders, tmp_path) == CRAFTED.nupkg


async def test_an_encoder_that_is_not_here_is_told_before_anything_is_read(encoders: Encoders, tmp_path: Path) -> None:
    recipe = await found(CRAFTED, encoders, tmp_path)
    await refused(with_use(recipe, "zlib", "dotnet-11"), encoders, tmp_path, None, EncoderMissingError)


async def test_verbatim_bytes_that_lie_are_caught(encoders: Encoders, tmp_path: Path) -> None:
    recipe = await found(CRAFTED, encoders, tmp_path)
    data = CRAFTED.verbatim_bytes(recipe)
    assert len(data) > 1000
    flipped = data[:500] + bytes([data[500] ^ 1]) + data[501:]
    for lie in (stream(flipped), stream(data[:-1]), stream(b""), None):
        await refused(recipe, encoders, tmp_path, lie, RebuildError)
    await refused(opaque(CRAFTED.manifest), encoders, tmp_path, stream(CRAFTED.nupkg[:-1] + b"!"), RebuildError)


async def test_content_that_lies_is_caught(encoders: Encoders, tmp_path: Path) -> None:
    recipe = await found(CRAFTED, encoders, tmp_path)
    right = parts_of_chunks(CRAFTED.manifest, CRAFTED.chunk)

    async def read(part: int) -> AsyncGenerator[bytes, None]:
        async for data in right(part):
            yield data[:-1] + b"?"

    with pytest.raises(RebuildError):
        await rebuild(CRAFTED.manifest, recipe, read, CRAFTED.verbatim(recipe), encoders, tmp_path / "made.nupkg")
    assert not (tmp_path / "made.nupkg").exists()


async def test_a_recipe_that_makes_more_than_the_nupkg_is_stopped(encoders: Encoders, tmp_path: Path) -> None:
    text = mixture(6, 20_000) * 60
    small = take(
        canonical_zip(Raw("A.nuspec", NUSPEC, as_zlib(NUSPEC)), Raw("noise", TEXT), Raw("text", text, as_zlib(text)))
    )
    recipe = await found(small, encoders, tmp_path)
    growing = msgspec.structs.replace(recipe, uses=tuple(Use("stored", "", use.compressed) for use in recipe.uses))
    with pytest.raises(RebuildError, match="more than"):
        await rebuild(
            small.manifest, growing, parts_of_chunks(small.manifest, small.chunk), None, encoders, tmp_path / "made"
        )


_OTHERS: set[int] = set()


@pytest.fixture(autouse=True)
def only_own_children() -> Iterator[None]:
    """What earlier tests of this process left running is no concern of these."""
    _OTHERS.update(children())
    yield
    _OTHERS.clear()


def children() -> list[int]:
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in found if int(pid) not in _OTHERS]


@engines
@pytest.mark.parametrize("times", [1, 2])
async def test_an_encoder_killed_under_way_is_started_again_once(times: int, tmp_path: Path) -> None:
    content = mixture(5, 2_000_000)
    taken = take(
        canonical_zip(Raw("A.nuspec", NUSPEC, as_zlib(NUSPEC)), Raw("x", content, as_dotnet("dotnet-10", content)))
    )
    killed: list[int] = []
    async with await Encoders.open(ENGINE_FILES, search=False, workers=1) as encoders:
        recipe = await found(taken, encoders, tmp_path)
        assert "dotnet-10" in recipe.encoders
        right = parts_of_chunks(taken.manifest, taken.chunk)

        async def read(part: int) -> AsyncGenerator[bytes, None]:
            async for index, data in _numbered(right(part)):
                if index == 3 and len(killed) < times:
                    for pid in children():
                        os.kill(pid, signal.SIGKILL)
                    killed.append(1)
                yield data

        rebuilding = rebuild(taken.manifest, recipe, read, None, encoders, tmp_path / "made.nupkg")
        if times == 1:
            await rebuilding
            assert (tmp_path / "made.nupkg").read_bytes() == taken.nupkg
        else:
            with pytest.raises(EncoderDiedError):
                await rebuilding
            assert not (tmp_path / "made.nupkg").exists()
    assert len(killed) == times


async def _numbered(pieces: AsyncIterator[bytes]) -> AsyncIterator[tuple[int, bytes]]:
    index = 0
    async for piece in pieces:
        yield index, piece
        index += 1


async def test_a_rebuild_that_is_cancelled_leaves_nothing(encoders: Encoders, tmp_path: Path) -> None:
    recipe = await found(CRAFTED, encoders, tmp_path)
    before = set(tmp_path.iterdir())
    waiting = asyncio.Event()

    async def get(index: int) -> Chunk:
        waiting.set()
        await asyncio.Event().wait()
        raise AssertionError

    read = parts_of_chunks(CRAFTED.manifest, get)
    task = asyncio.create_task(
        rebuild(CRAFTED.manifest, recipe, read, CRAFTED.verbatim(recipe), encoders, tmp_path / "made.nupkg")
    )
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert set(tmp_path.iterdir()) == before
    assert await made(CRAFTED, recipe, encoders, tmp_path) == CRAFTED.nupkg


async def test_what_cannot_be_proved_is_opaque(
    encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved: list[type] = []

    def failing(_file: Any, recipe: Recipe, *_: Any) -> bool:
        proved.append(type(recipe.records))
        return False

    monkeypatch.setattr(finding, "_gives", failing)
    assert await found(CRAFTED, encoders, tmp_path) == opaque(CRAFTED.manifest)
    assert proved == [Canonical, LiteralRecords]


@pytest.mark.parametrize("lie", ["records", "order", "encoder"])
async def test_a_recipe_that_says_other_than_what_was_found_is_not_kept(
    lie: str, encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed = finding.compose

    def lying(records: Any, *more: Any) -> Recipe:
        recipe = composed(records, *more)
        if lie == "records" and isinstance(records, Canonical):
            records = msgspec.structs.replace(records, attributes=((7, len(CRAFTED.entries)),))
        elif lie == "records":
            records = msgspec.structs.replace(records, records=bytes(len(records.records)))
        elif lie == "order":
            recipe = msgspec.structs.replace(recipe, order=((len(CRAFTED.entries), 1), (-1, len(CRAFTED.entries) - 1)))
        else:
            names = {"zlib": "dotnet-10", "dotnet-10": "zlib"}
            uses = tuple(
                msgspec.structs.replace(use, encoder=names.get(use.encoder, use.encoder)) for use in recipe.uses
            )
            recipe = msgspec.structs.replace(recipe, uses=uses)
        return msgspec.structs.replace(recipe, records=records)

    monkeypatch.setattr(finding, "compose", lying)
    assert await found(CRAFTED, encoders, tmp_path) == opaque(CRAFTED.manifest)


async def test_progress_reaches_the_last_part(encoders: Encoders, tmp_path: Path) -> None:
    (tmp_path / "a.nupkg").write_bytes(CRAFTED.nupkg)
    told: list[tuple[int, int]] = []
    await find_recipe(tmp_path / "a.nupkg", CRAFTED.manifest, encoders, lambda done, total: told.append((done, total)))
    parts = sum(entry.compressed_size for entry in CRAFTED.entries)
    assert told[-1] == (parts, len(CRAFTED.nupkg))
    assert [done for done, _ in told] == sorted(done for done, _ in told)


async def test_a_damaged_nupkg_is_refused_in_the_walks_words(encoders: Encoders, tmp_path: Path) -> None:
    entry = CRAFTED.entries[1]
    at = entry.data_offset + entry.compressed_size // 2
    (tmp_path / "a.nupkg").write_bytes(CRAFTED.nupkg[:at] + bytes(8) + CRAFTED.nupkg[at + 8 :])
    with pytest.raises(ArchiveError):
        await find_recipe(tmp_path / "a.nupkg", CRAFTED.manifest, encoders)


async def test_a_canonical_zip_of_very_many_parts_needs_no_records(encoders: Encoders, tmp_path: Path) -> None:
    name = "content/" + "long folder/" * 8
    taken = take(
        canonical_zip(
            Raw("A.nuspec", NUSPEC), *(Raw(f"{name}{n:05}".replace(" ", "%20"), b"%d" % n) for n in range(14_000))
        )
    )
    assert len(taken.nupkg) > 4 << 20
    recipe = await found(taken, encoders, tmp_path)
    assert isinstance(recipe.records, Canonical)
    assert len(encode_recipe(recipe)) < 1000
    assert await made(taken, recipe, encoders, tmp_path) == taken.nupkg
