"""The encoders that make a nupkg's deflate bytes again: found, pinned, proved, and run side by side.

What made a part's bytes cannot be told from its name or version, only by making them again. So an encoder's name here
stands for just the bytes it makes, all at level 6, window 15 bits, memory level 8:

- `zlib`: classic zlib (1.2.13 and 1.3.1 agree), Python's own where it is one. Old .NET on Linux, nuget.exe, `zipfile`.
- `dotnet-9`, `dotnet-10`: zlib-ng 2.2.1 and 2.2.5 as they lie in the .NET runtime's
  `libSystem.IO.Compression.Native.so`. It runs in processes without rights: see `relay/engines/engine_process.py`.

An engine file is loaded only if its SHA-256 is pinned here or by the operator. Every encoder makes a fixed corpus first,
and is left out with a reason if that comes out otherwise: a Python may be linked with something that calls itself zlib.
"""

from __future__ import annotations

import asyncio
import glob
import hashlib
import os
import platform
import struct
import sys
import zlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Final, Self

from relay.engines import engine_process
from relay.errors import UnreachableError
from relay.package.manifest import Manifest
from relay.package.part_reader import PIECE
from relay.package.recipe import Feeding

ORDER: Final = ("dotnet-10", "dotnet-9", "zlib")
"""All there are, as they are tried: most bytes of packages are made by the first."""
ENGINE_MAX: Final = 8 << 20
"""Bytes of an engine file. Real ones have 1 MiB."""
_LIBRARY: Final = "libSystem.IO.Compression.Native.so"
_RID: Final = "linux-x64"
_EXCHANGE_SECONDS: Final = 30.0
"""For one piece, which takes some milliseconds."""
_IDLE_SECONDS: Final = 30.0
"""A process without work ends after this: it holds some 12 MB."""
_CONTENT_MAX: Final = 64 << 30
"""Bytes that one process encodes before another takes its place: far below its limit of CPU time."""

_WRITES: Final[dict[Feeding, tuple[int, bool]]] = {
    "whole": (0, False),
    "sync": (0, True),
    "sync-1024": (1024, True),
    "sync-6143": (6143, True),
}
"""Bytes per write (0: all in one), and whether a sync flush comes before the end."""


@dataclass(frozen=True, slots=True)
class EnginePin:
    """An engine file that may be loaded, and the encoder it is said to be. It still has to prove that."""

    encoder: str
    sha256: str


BUILT_IN_PINS: Final = (
    EnginePin("dotnet-10", "93400ac2d71aff81344287eb8133e2680c64550d663bd3d6fca564b242ca3f5c"),
    EnginePin("dotnet-9", "6bc56b3e6d802c4b8cc2a88101ea031df7829b3fdafe8fad2f6967bc2833ac6a"),
)
"""Of the runtimes 10.0.14 and 9.0.22 for linux-x64."""


class EncoderMissingError(UnreachableError):
    """This side has no such encoder. Ask who has it, or take the bytes themselves."""

    def __init__(self, encoders: Iterable[str]) -> None:
        self.encoders = tuple(sorted(encoders))
        super().__init__(f"no encoder {', '.join(self.encoders)} here", hint="Take the nupkg itself")


class EncoderDiedError(UnreachableError):
    """An encoder's process ended or did not answer in time. Another one takes its place: try again."""


# --- finding


def find_engines(
    sources: Iterable[str | bytes], pins: Iterable[EnginePin], *, search: bool
) -> tuple[dict[str, bytes], int]:
    """The pinned engines among what there is, and how many files were looked at. Blocks.

    Args:
        sources: paths of files, or libraries as bytes: looked at first.
        pins: beside the built-in ones.
        search: whether to look where engines lie by custom: `$WAYSTATION_ENGINES`, `$WAYSTATION_HOME/engines`, and the
            .NET runtimes that are installed.
    """
    encoder_of = {pin.sha256: pin.encoder for pin in (*BUILT_IN_PINS, *pins)}
    found: dict[str, bytes] = {}
    looked = 0
    for source in (*sources, *(_customary() if search else ())):
        library = source if isinstance(source, bytes) else _read(source)
        looked += 1
        encoder = encoder_of.get(hashlib.sha256(library).hexdigest())
        if encoder:
            found.setdefault(encoder, library)
    return found, looked


def engine_part(manifest: Manifest, pins: Iterable[EnginePin] = ()) -> tuple[EnginePin, int] | None:
    """The part of a runtime package that is a pinned engine: its pin and index, or None.

    It lies in `Microsoft.NETCore.App.Runtime.<rid>` under `runtimes/<rid>/native/`.
    """
    if manifest.package.id.key != f"microsoft.netcore.app.runtime.{_RID}":
        return None
    pin_of = {pin.sha256: pin for pin in (*BUILT_IN_PINS, *pins)}
    path = f"runtimes/{_RID}/native/{_LIBRARY}".lower()
    for index, part in enumerate(manifest.parts):
        if part.path.lower() == path and manifest.part_sha256(index) in pin_of:
            return pin_of[manifest.part_sha256(index)], index
    return None


def _customary() -> Iterator[str]:
    home = os.environ.get("WAYSTATION_HOME")
    folders = [os.environ.get("WAYSTATION_ENGINES"), home and os.path.join(home, "engines")]
    for folder in filter(None, folders):
        yield from sorted(glob.glob(os.path.join(glob.escape(folder), "*.so")))
    roots = (os.environ.get("DOTNET_ROOT"), "/usr/share/dotnet", "/usr/lib/dotnet", os.path.expanduser("~/.dotnet"))
    for root in filter(None, roots):
        yield from sorted(glob.glob(os.path.join(glob.escape(root), "shared/Microsoft.NETCore.App/*", _LIBRARY)))


def _read(path: str) -> bytes:
    with suppress(OSError), open(path, "rb") as file:
        library = file.read(ENGINE_MAX + 1)
        return library if len(library) <= ENGINE_MAX else b""
    return b""


def _no_engines_here() -> str:
    """Why native engines cannot run on this machine, or ''."""
    machine = f"{sys.platform} {platform.machine()}"
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64" or sys.maxsize < 1 << 32:
        return f"the engines are for {_RID}, this is {machine}"
    return ""


# --- proving


def corpus() -> bytes:
    """Some 290 KB, always the same, that every encoder here, and every other buffering of zlib-ng, deflates otherwise."""
    noise = hashlib.shake_128(b"waystation encoders, corpus 1").digest(60_000)
    picks = struct.unpack("<20000H", noise[:40000])
    words = [noise[i : i + 1 + noise[i] % 12].hex().encode() for i in range(0, 4096, 8)]
    text = b" ".join(words[(p & 511) * (p >> 9) >> 7] for p in picks[:9000])
    letters = noise[40000:50000].translate(bytes(b"abcd"[n & 3] for n in range(256)))
    rows = enumerate(picks[9000:13000])
    records = b"".join(struct.pack("<IHHI", n * 24, p & 15, p >> 10, 0x06000001 + n) for n, p in rows)
    repeats = b"".join(noise[n * 16 : n * 16 + 1 + p % 40] * (p >> 10) for n, p in enumerate(picks[13000:13100]))
    return text + letters + records + repeats + bytes(9000) + noise[50000:] + text[:20000] + letters


FINGERPRINTS: Final = {
    "dotnet-10": "6a0bb5c975b8ff330b24c57c00d70c0b879a168cf34285e31bcce806c5bd0732",
    "dotnet-9": "3cb1929aaedbaba890e2a0cad0de5127d1cd73cb3d3ce0e5e620e2f60b6d9626",
    "zlib": "4dd3fad5607f3bc93681d6a6e0e3d0864a9bd1924a00b3e0cdb8562432a99d0e",
}
"""SHA-256 of the corpus made `whole`, then `sync-1024`; made with the real libraries."""


async def fingerprint(encoders: Encoders, name: str) -> str:
    """What `FINGERPRINTS` says for an encoder that is what its name says."""
    digest = hashlib.sha256()
    for feeding in ("whole", "sync-1024"):
        async with aclosing(encoders.encode(name, feeding, _one(corpus()))) as made:
            async for data in made:
                digest.update(data)
    return digest.hexdigest()


# --- running


class Encoders:
    """The encoders of this process. `open` it, and leave it with `async with` or `close`.

    As many parts as there are workers are encoded at a time: classic zlib in threads, engines in processes of their
    own, which start when they are needed and end when they are idle.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        """How many parts are encoded at a time."""
        self._slots = asyncio.Semaphore(workers)
        self._engines: dict[str, bytes] = {}
        self._names: tuple[str, ...] = ()
        self._missing: dict[str, str] = {}
        self._idle: list[_Worker] = []
        self._ending: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls,
        sources: Iterable[str | bytes] = (),
        *,
        pins: Iterable[EnginePin] = (),
        search: bool = True,
        workers: int = 0,
    ) -> Self:
        """Find engines (see `find_engines`), and let every encoder prove itself.

        Args:
            sources: engine files by path, or as bytes.
            pins: engine files to trust beside the built-in ones.
            search: whether to look for engines in the customary places too.
            workers: parts at a time; 0 for as many as there are CPUs for this process.
        """
        self = cls(workers or _cpus())
        looked = 0
        refusal = _no_engines_here()
        if not refusal:
            self._engines, looked = await asyncio.to_thread(find_engines, tuple(sources), tuple(pins), search=search)
        for name in ORDER:
            if name != "zlib" and name not in self._engines:
                self._missing[name] = refusal or f"none of {looked} engine files has a pinned SHA-256"
            elif fault := await self._fault(name):
                self._missing[name] = fault
            else:
                self._names += (name,)
        return self

    def names(self) -> tuple[str, ...]:
        """The encoders that proved themselves, in the order to try them."""
        return self._names

    def missing(self) -> dict[str, str]:
        """Those that did not, and why."""
        return dict(self._missing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all processes. Twice is once."""
        idle, self._idle = self._idle, []
        for worker in idle:
            self._end(worker)
        while self._ending:
            await asyncio.wait(self._ending)

    async def encode(self, name: str, feeding: Feeding, pieces: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
        """The deflate bytes of a part, as they come. Close it (`aclosing`) if you leave it early.

        Args:
            name: of `names()`.
            feeding: one that encoders have.
            pieces: the content, cut in any way.

        Raises:
            EncoderMissingError: no encoder of this name has proved itself here.
            EncoderDiedError: its process ended or hangs; what came so far is worth nothing.
        """
        if name not in self._names:
            raise EncoderMissingError([name])
        async with self._slots, aclosing(self._encode(name, feeding, pieces)) as made:
            async for data in made:
                yield data

    async def _fault(self, name: str) -> str:
        """Why this encoder cannot be used, or ''."""
        self._names += (name,)
        try:
            found = await fingerprint(self, name)
        except EncoderDiedError as error:
            return error.message
        finally:
            self._names = self._names[:-1]
        if found == FINGERPRINTS[name]:
            return ""
        version = f" (it calls itself {zlib.ZLIB_RUNTIME_VERSION})" if name == "zlib" else ""
        return f"it makes other bytes than {name} should{version}"

    def _encode(self, name: str, feeding: Feeding, pieces: AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
        write, sync = _WRITES[feeding]
        unit = PIECE // write * write if write else PIECE
        if name == "zlib":
            return _classic(_even(pieces, unit), sync=sync)
        start = _frame(b"s", engine_process.START.pack(write, sync))
        return self._native(name, start, _even(pieces, unit))

    async def _native(
        self, name: str, start: bytes, pieces: AsyncGenerator[tuple[bytes, bool], None]
    ) -> AsyncGenerator[bytes, None]:
        worker = await self._take(name)
        try:
            async with aclosing(pieces):
                async for piece, last in pieces:
                    yield await worker.exchange(start + _frame(b"f" if last else b"d", piece))
                    start = b""
        finally:
            self._give_back(worker)

    async def _take(self, name: str) -> _Worker:
        for worker in reversed(self._idle):
            if worker.name == name:
                self._idle.remove(worker)
                worker.stop_waiting()
                return worker
        return await _Worker.start(name, self._engines[name])

    def _give_back(self, worker: _Worker) -> None:
        if not worker.clean or worker.content > _CONTENT_MAX:
            self._end(worker)
            return
        self._idle.append(worker)
        worker.expiry = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._expire, worker)

    def _expire(self, worker: _Worker) -> None:
        self._idle.remove(worker)
        self._end(worker)

    def _end(self, worker: _Worker) -> None:
        task = asyncio.get_running_loop().create_task(worker.end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


class _Worker:
    """One engine's process, and the pipes to it. `clean`: between two requests."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process
        self.clean = True
        self.content = 0
        self.expiry: asyncio.TimerHandle | None = None

    @classmethod
    async def start(cls, name: str, library: bytes) -> _Worker:
        environment = {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-X", "utf8", "-I", "-S", engine_process.__file__,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
                limit=PIECE, cwd="/", env=environment,
            )  # fmt: skip
        except OSError as error:
            raise EncoderDiedError(f"no process for the encoder {name}: {error}") from error
        worker = cls(name, process)
        try:
            refusal = await worker.exchange(_frame(b"e", library))
            if refusal:
                raise EncoderDiedError(f"encoder {name}: {refusal.decode(errors='replace')}")
        except BaseException:
            await asyncio.shield(worker.end())
            raise
        return worker

    async def exchange(self, request: bytes) -> bytes:
        """Send a request, and read its answer. Raises `EncoderDiedError`."""
        self.clean = False
        self.content += len(request)
        into, out = self.process.stdin, self.process.stdout
        if into is None or out is None:
            raise ValueError("a process without pipes")
        try:
            async with asyncio.timeout(_EXCHANGE_SECONDS):
                into.write(request)
                await into.drain()
                (size,) = engine_process.ANSWER.unpack(await out.readexactly(engine_process.ANSWER.size))
                if size > engine_process.FRAME_MAX:
                    raise EncoderDiedError(f"the encoder {self.name} answers {size} bytes")
                answer = await out.readexactly(size)
        except (OSError, EOFError, TimeoutError) as error:
            raise EncoderDiedError(f"the encoder {self.name} ended or hangs", hint="Try again") from error
        self.clean = True
        return answer

    def stop_waiting(self) -> None:
        if self.expiry:
            self.expiry.cancel()

    async def end(self) -> None:
        self.stop_waiting()
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _frame(kind: bytes, payload: bytes) -> bytes:
    return engine_process.REQUEST.pack(kind, len(payload)) + payload


async def _classic(pieces: AsyncGenerator[tuple[bytes, bool], None], *, sync: bool) -> AsyncGenerator[bytes, None]:
    """How classic zlib is fed does not matter, but for the flush."""
    engine = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, 8)
    async with aclosing(pieces):
        async for piece, _ in pieces:
            yield await asyncio.to_thread(engine.compress, piece)
    yield (engine.flush(zlib.Z_SYNC_FLUSH) if sync else b"") + await asyncio.to_thread(engine.flush)


async def _even(pieces: AsyncIterable[bytes], unit: int) -> AsyncGenerator[tuple[bytes, bool], None]:
    """The same bytes in pieces of `unit`, and whether it is the last, which may be shorter or empty."""
    held = bytearray()
    async for piece in pieces:
        held += piece
        while len(held) > unit:
            yield bytes(memoryview(held)[:unit]), False
            del held[:unit]
    yield bytes(held), True


async def _one(data: bytes) -> AsyncIterator[bytes]:
    yield data
