"""Encoders: what they are known by, what is left out and why, and that none is loaded that was not pinned."""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from harness.nupkgs import ENGINE_FILES, ENGINES, NO_DATA, as_dotnet, as_zlib, mixture, stream, take

from relay.engines import encoders as encoders_module
from relay.engines.encoders import (
    BUILT_IN_PINS,
    FINGERPRINTS,
    EncoderDiedError,
    EncoderMissingError,
    Encoders,
    EnginePin,
    corpus,
    engine_part,
    find_engines,
)
from relay.package.recipe import Feeding

engines = pytest.mark.skipif(
    len(ENGINE_FILES) != 2 or platform.machine() != "x86_64" or sys.platform != "linux", reason=NO_DATA
)
compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build a foreign engine with")
FEEDINGS: tuple[Feeding, ...] = ("whole", "sync", "sync-1024", "sync-6143")


async def encoded(
    encoders: Encoders, name: str, feeding: Feeding, content: bytes | AsyncIterator[bytes], piece: int = 100_000
) -> bytes:
    pieces = stream(content, piece) if isinstance(content, bytes) else content
    async with aclosing(encoders.encode(name, feeding, pieces)) as made:
        return b"".join([data async for data in made])


def compiled(folder: Path, source: str) -> bytes:
    (folder / "engine.c").write_text(source)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "engine.so", "engine.c"], cwd=folder, check=True)
    return (folder / "engine.so").read_bytes()


def pinned(library: bytes, encoder: str = "dotnet-10") -> EnginePin:
    return EnginePin(encoder, hashlib.sha256(library).hexdigest())


# --- who they are


@engines
async def test_all_encoders_prove_themselves_with_the_real_libraries() -> None:
    async with await Encoders.open(ENGINE_FILES, search=False) as encoders:
        assert encoders.names() == ("dotnet-10", "dotnet-9", "zlib")
        assert encoders.missing() == {}


@engines
@pytest.mark.parametrize("name", ["dotnet-10", "dotnet-9"])
def test_the_fingerprints_are_those_of_the_real_libraries(name: str) -> None:
    made = as_dotnet(name, corpus()) + as_dotnet(name, corpus(), "sync-1024")
    assert hashlib.sha256(made).hexdigest() == FINGERPRINTS[name]


@engines
def test_the_corpus_tells_the_encoders_and_another_buffering_apart() -> None:
    made = [as_dotnet(name, corpus(), buffer=size) for name in ENGINES for size in (8192, 1 << 20)]
    assert len({*made, as_zlib(corpus())}) == 5


def test_the_corpus_never_changes() -> None:
    digest = hashlib.sha256(corpus()).hexdigest()
    assert digest == "559dd6147c4183dd7a27e5d5ffe4c28af2932048584bca45b2df219d4edac7dd"


@engines
@pytest.mark.parametrize("feeding", FEEDINGS)
@pytest.mark.parametrize("name", ["dotnet-10", "dotnet-9"])
async def test_a_part_in_pieces_comes_out_as_from_dotnets_own_writes(name: str, feeding: Feeding) -> None:
    async with await Encoders.open(ENGINE_FILES, search=False) as encoders:
        for seed, size in enumerate((0, 1, 1024, 6143, 262_144, 262_145, 3_000_000)):
            content = mixture(seed, size)
            assert await encoded(encoders, name, feeding, content) == as_dotnet(name, content, feeding), size


@engines
async def test_a_part_of_many_megabytes_comes_out_as_from_one_write() -> None:
    content = mixture(9, 25_000_000)
    async with await Encoders.open(ENGINE_FILES, search=False) as encoders:
        for name in ENGINES:
            assert await encoded(encoders, name, "whole", content, 4 << 20) == as_dotnet(name, content)


async def test_classic_zlib_makes_the_same_from_any_pieces() -> None:
    content = mixture(3, 700_000)
    async with await Encoders.open(search=False) as encoders:
        if "zlib" not in encoders.names():
            pytest.skip(f"this Python's zlib is no classic one: {encoders.missing()}")
        assert await encoded(encoders, "zlib", "whole", content, 777) == as_zlib(content)
        flushed = await encoded(encoders, "zlib", "sync", content)
        assert flushed.endswith(b"\0\0\xff\xff\3\0")
        assert zlib.decompress(flushed, -15) == content


@engines
async def test_parts_side_by_side_do_not_mix() -> None:
    contents = [mixture(seed, 300_000) for seed in range(8)]
    async with await Encoders.open(ENGINE_FILES, search=False, workers=3) as encoders:
        made = await asyncio.gather(*(encoded(encoders, "dotnet-10", "whole", content) for content in contents))
    assert made == [as_dotnet("dotnet-10", content) for content in contents]


@engines
async def test_an_encoder_that_was_left_early_begins_anew() -> None:
    content = mixture(1, 2_000_000)
    async with await Encoders.open(ENGINE_FILES, search=False, workers=1) as encoders:
        async with aclosing(encoders.encode("dotnet-10", "whole", stream(content))) as made:
            await anext(made)
        assert await encoded(encoders, "dotnet-10", "whole", content) == as_dotnet("dotnet-10", content)


# --- who is left out


async def test_an_encoder_that_is_not_here_is_named_with_a_reason() -> None:
    async with await Encoders.open(search=False) as encoders:
        assert set(encoders.missing()) >= {"dotnet-9", "dotnet-10"}
        with pytest.raises(EncoderMissingError) as caught:
            await encoded(encoders, "dotnet-10", "whole", b"")
        assert caught.value.encoders == ("dotnet-10",)


async def test_a_zlib_that_makes_other_bytes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = zlib.compressobj
    monkeypatch.setattr(zlib, "compressobj", lambda level, *rest: real(9, *rest))
    async with await Encoders.open(search=False) as encoders:
        assert "zlib" not in encoders.names()
        assert "makes other bytes" in encoders.missing()["zlib"]


@engines
async def test_engines_are_left_out_on_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    async with await Encoders.open(ENGINE_FILES, search=False) as encoders:
        assert "aarch64" in encoders.missing()["dotnet-10"]


@engines
async def test_an_engine_under_anothers_name_is_left_out() -> None:
    library = Path(ENGINE_FILES[1]).read_bytes()
    pins = [pinned(library, "dotnet-10")]
    found, _ = find_engines([library], pins, search=False)
    assert found == {"dotnet-10": library}, "the operator's pin was not taken: this test proves nothing"
    async with await Encoders.open([library], pins=pins, search=False) as encoders:
        assert "makes other bytes" in encoders.missing()["dotnet-10"]


MARKER = """
#include <fcntl.h>
__attribute__((constructor)) static void loaded(void) { open("%s/loaded", O_CREAT | O_WRONLY, 0666); }
int CompressionNative_DeflateInit2_(void *s, int l, int m, int w, int y, int t) { return -1; }
int CompressionNative_Deflate(void *s, int f) { return -1; }
int CompressionNative_DeflateEnd(void *s) { return 0; }
"""


@compiler
@engines
async def test_an_engine_with_a_wrong_hash_is_never_loaded(tmp_path: Path) -> None:
    open_folder = Path("/tmp") / f"engine-{os.getpid()}-{tmp_path.name}"  # where a process without rights may write
    open_folder.mkdir(mode=0o777)
    open_folder.chmod(0o777)
    marker = open_folder / "loaded"
    try:
        library = compiled(tmp_path, MARKER % open_folder)
        other = EnginePin("dotnet-10", hashlib.sha256(library + b"x").hexdigest())
        async with await Encoders.open([library], pins=[other], search=False) as encoders:
            assert "pinned" in encoders.missing()["dotnet-10"]
        assert not marker.exists()
        async with await Encoders.open([library], pins=[pinned(library)], search=False) as encoders:
            assert encoders.missing()["dotnet-10"]
        assert marker.exists(), "loading it leaves no mark: this test proves nothing"
    finally:
        shutil.rmtree(open_folder)


@engines
async def test_what_is_no_library_is_left_out_with_the_loaders_words() -> None:
    rubbish = b"not a library"
    async with await Encoders.open([rubbish], pins=[pinned(rubbish)], search=False) as encoders:
        assert "does not load" in encoders.missing()["dotnet-10"]


@engines
def test_engines_are_found_where_they_lie_by_custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "home" / "engines"
    runtime = tmp_path / "dotnet" / "shared" / "Microsoft.NETCore.App" / "9.0.22"
    for each in (folder, runtime):
        each.mkdir(parents=True)
    shutil.copy(str(ENGINES["dotnet-10"]), folder / "ten.so")
    shutil.copy(str(ENGINES["dotnet-9"]), runtime / "libSystem.IO.Compression.Native.so")
    monkeypatch.delenv("WAYSTATION_ENGINES", raising=False)
    monkeypatch.setenv("WAYSTATION_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DOTNET_ROOT", str(tmp_path / "dotnet"))
    found, looked = find_engines((), (), search=True)
    assert set(found) == {"dotnet-9", "dotnet-10"}
    assert looked >= 2
    assert find_engines((), (), search=False) == ({}, 0)


@engines
def test_the_part_of_a_runtime_package_that_is_an_engine_is_named() -> None:
    import io
    import zipfile

    library = Path(ENGINE_FILES[0]).read_bytes()
    path = "runtimes/linux-x64/native/libSystem.IO.Compression.Native.so"

    def package(data: bytes, id: str) -> tuple[EnginePin, int] | None:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("A.nuspec", b"<package/>")
            archive.writestr(path, data)
        manifest = take(file.getvalue(), id).manifest
        found = engine_part(manifest)
        assert found is None or manifest.parts[found[1]].path == path
        return found

    found = package(library, "Microsoft.NETCore.App.Runtime.linux-x64")
    assert found is not None
    assert found[0] in BUILT_IN_PINS
    assert package(library + b"x", "Microsoft.NETCore.App.Runtime.linux-x64") is None
    assert package(library, "Somebodys.Runtime") is None


# --- faults


async def kill_after(content: bytes, killed: list[int]) -> AsyncIterator[bytes]:
    """The content; when some of it has gone in, the encoder's process is killed."""
    yield content[:600_000]
    for pid in children():
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
    yield content[600_000:]


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
async def test_an_encoder_that_is_killed_says_so_and_the_next_one_works() -> None:
    content = mixture(4, 3_000_000)
    killed: list[int] = []
    async with await Encoders.open(ENGINE_FILES[:1], search=False, workers=1) as encoders:
        with pytest.raises(EncoderDiedError):
            await encoded(encoders, "dotnet-10", "whole", kill_after(content, killed))
        assert killed
        assert await encoded(encoders, "dotnet-10", "whole", content) == as_dotnet("dotnet-10", content)
        assert not set(children()) & set(killed)


@engines
async def test_an_encoder_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with await Encoders.open(ENGINE_FILES[:1], search=False) as encoders:
        monkeypatch.setattr(encoders_module, "_EXCHANGE_SECONDS", 0.3)
        (stopped,) = children()
        os.kill(stopped, signal.SIGSTOP)
        with pytest.raises(EncoderDiedError):
            await encoded(encoders, "dotnet-10", "whole", b"content")
        monkeypatch.undo()
        assert await encoded(encoders, "dotnet-10", "whole", b"content") == as_dotnet("dotnet-10", b"content")


@engines
async def test_idle_processes_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders_module, "_IDLE_SECONDS", 0.05)
    async with await Encoders.open(ENGINE_FILES[:1], search=False) as encoders:
        assert "dotnet-10" in encoders.names()
        async with asyncio.timeout(10):
            while children():
                await asyncio.sleep(0.02)


@engines
async def test_no_process_is_left_behind() -> None:
    async with await Encoders.open(ENGINE_FILES, search=False):
        assert len(children()) == 2
    assert children() == []
