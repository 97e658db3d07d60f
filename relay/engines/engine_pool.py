"""The encoders of a relay or depot: opened when they are needed first, closed when nobody needed them for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from relay.engines.encoders import ENGINE_MAX, ORDER, Encoders, EnginePin, engine_part, find_engines
from relay.errors import UsageError, WaystationError
from relay.package.manifest import Manifest
from relay.package.part_reader import parts_of_chunks
from relay.stores.catalog import Catalog
from relay.stores.contract import ChunkReader

IDLE_SECONDS: Final = 60.0
"""Encoders are closed when nobody used them for so long. Also the age from which on they are opened anew for an encoder
that they lack: its engine may have been installed, or replicated, meanwhile.
"""


@dataclass(slots=True)
class _Opened:
    encoders: Encoders
    since: float
    users: int = 0
    expiry: asyncio.TimerHandle | None = None


class Engines:
    """Where a process's encoders come from. `close` it."""

    def __init__(
        self,
        sources: Sequence[str] = (),
        pins: Sequence[EnginePin] = (),
        *,
        catalog: Catalog | None = None,
        chunks: ChunkReader | None = None,
    ) -> None:
        """Engines in the customary places (see `find_engines`), and in others.

        Args:
            sources: engine files by path.
            pins: engine files to trust beside the built-in ones.
            catalog: of a store whose runtime packages are looked through for pinned engines.
            chunks: of the same store.
        """
        self._sources = tuple(sources)
        self._pins = tuple(pins)
        self._catalog = catalog
        self._chunks = chunks
        self._opened: _Opened | None = None
        self._opening = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def use(self, needed: Iterable[str] = ()) -> AsyncIterator[Encoders]:
        """The encoders that are here; whether all that are `needed` are among them is the caller's to see."""
        opened = await self._open(frozenset(needed))
        opened.users += 1
        if opened.expiry is not None:
            opened.expiry.cancel()
        try:
            yield opened.encoders
        finally:
            opened.users -= 1
            if not opened.users:
                self._rest(opened)

    async def installed(self) -> frozenset[str]:
        """The encoders that should be here; none of them has proved itself yet."""
        found, _ = await asyncio.to_thread(find_engines, await self._libraries(), self._pins, search=True)
        return frozenset(found) | {"zlib"}

    async def close(self) -> None:
        """End all processes. Twice is once."""
        opened, self._opened = self._opened, None
        if opened is not None:
            if opened.expiry is not None:
                opened.expiry.cancel()
            await opened.encoders.close()
        while self._closing:
            await asyncio.wait(self._closing)

    async def _open(self, needed: frozenset[str]) -> _Opened:
        async with self._opening:
            opened = self._opened
            lacks = opened is not None and bool(needed - set(opened.encoders.names()))
            if opened is not None and not (lacks and time.monotonic() - opened.since > IDLE_SECONDS):
                return opened
            fresh = await Encoders.open(await self._libraries(), pins=self._pins)
            self._opened = _Opened(fresh, time.monotonic())
            if opened is not None and not opened.users:
                self._rest(opened)
            return self._opened

    def _rest(self, opened: _Opened) -> None:
        if opened is self._opened:
            opened.expiry = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._expire, opened)
            return
        if opened.expiry is not None:
            opened.expiry.cancel()
        task = asyncio.get_running_loop().create_task(opened.encoders.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _expire(self, opened: _Opened) -> None:
        if opened is self._opened and not opened.users:
            self._opened = None
            self._rest(opened)

    async def _libraries(self) -> list[str | bytes]:
        return [*self._sources, *[library async for library in self._in_packages()]]

    async def _in_packages(self) -> AsyncIterator[bytes]:
        """Pinned engines in the runtime packages of the store."""
        if self._catalog is None or self._chunks is None:
            return
        for pointer in self._catalog.all():
            if not pointer.id.lower().startswith("microsoft.netcore.app.runtime."):
                continue
            manifest = await self._catalog.manifest(pointer.manifest_id)
            found = None if manifest is None else engine_part(manifest, self._pins)
            if manifest is not None and found is not None and manifest.parts[found[1]].size <= ENGINE_MAX:
                library = await _part(manifest, found[1], self._chunks)
                if library:
                    yield library


async def _part(manifest: Manifest, part: int, chunks: ChunkReader) -> bytes:
    """Its content, empty where it cannot be read: another engine may do."""
    read = parts_of_chunks(manifest, lambda index: chunks.get(manifest.chunk_id(index)))
    try:
        return b"".join([piece async for piece in read(part)])
    except WaystationError:
        return b""


def pin_of(encoder: str, sha256: str) -> EnginePin | None:
    """A pin as a configuration names it; None where it names none.

    Raises:
        UsageError: half of one, an encoder that there is not, or no SHA-256.
    """
    if not encoder and not sha256:
        return None
    if encoder not in ORDER or encoder == "zlib":
        raise UsageError(f"engines: there is no engine for the encoder {encoder!r}", hint=f"There are: {_names()}")
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise UsageError(f"engines: {encoder}: sha256 is not 64 lower-case hex digits")
    return EnginePin(encoder, sha256)


def _names() -> str:
    return ", ".join(name for name in ORDER if name != "zlib")
