"""The encoders of a relay or depot: opened when they are needed first, and anew where an engine came meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Final

from relay.engines.encoders import ENGINE_MAX, ORDER, Encoders, EnginePin, engine_part, find_engines
from relay.errors import UsageError, WaystationError
from relay.package.manifest import Manifest
from relay.package.part_reader import parts_of_chunks
from relay.stores.catalog import Catalog
from relay.stores.contract import ChunkReader

LOOK_AGAIN_SECONDS: Final = 60.0
"""Age from which on encoders are opened anew for one that they lack: its engine may have been installed, or replicated,
meanwhile.
"""


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
        self._encoders: Encoders | None = None
        self._since = 0.0
        self._opening = asyncio.Lock()

    async def open(self, needed: Iterable[str] = ()) -> Encoders:
        """The encoders that are here; whether all that are `needed` are among them is the caller's to see."""
        async with self._opening:
            before = self._encoders
            is_old = time.monotonic() - self._since > LOOK_AGAIN_SECONDS
            if before is not None and not (is_old and set(needed).difference(before.names())):
                return before
            encoders = self._encoders = await Encoders.open(await self._libraries(), pins=self._pins)
            self._since = time.monotonic()
            if before is not None:
                # Work that is under way goes on: its processes end when they are idle.
                await before.close()
            return encoders

    async def installed(self) -> frozenset[str]:
        """The encoders that should be here; none of them has proved itself yet."""
        found, _ = await asyncio.to_thread(find_engines, await self._libraries(), self._pins, search=True)
        return frozenset(found) | {"zlib"}

    async def close(self) -> None:
        """End all processes. Twice is once."""
        if self._encoders is not None:
            await self._encoders.close()

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
    engines = [name for name in ORDER if name != "zlib"]
    if encoder not in engines:
        raise UsageError(
            f"engines: there is no engine for the encoder {encoder!r}", hint=f"There are: {', '.join(engines)}"
        )
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise UsageError(f"engines: {encoder}: sha256 is not 64 lower-case hex digits")
    return EnginePin(encoder, sha256)
