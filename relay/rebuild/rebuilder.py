"""The identical nupkg out of its parts: what clients of NuGet compare by SHA-512, without the file having travelled.

A rebuild encodes parts side by side and writes them in the file's order. Nobody sees the result before its SHA-256 and
SHA-512 were compared with the manifest's: a recipe is a hint of how, never a reason to believe.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
import zlib
from base64 import b64encode
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable
from contextlib import aclosing
from typing import BinaryIO, Final, NamedTuple, cast

from relay.engines.encoders import EncoderDiedError, EncoderMissingError, Encoders
from relay.errors import UntrustedError
from relay.package.manifest import Manifest
from relay.package.part_reader import PIECE, PartReader
from relay.package.recipe import STORED_AS_IS, VERBATIM, Opaque, Recipe, Step, steps
from relay.rebuild.zip_layout import Layout
from relay.support.progress import Progress

_IN_MEMORY: Final = 512 << 10
"""Bytes of a part's deflate that wait in memory for their turn; more wait in a file."""


class RebuildError(UntrustedError):
    """What was rebuilt is not the nupkg. The recipe lies, or the verbatim bytes do; nothing was kept."""


async def rebuild(
    manifest: Manifest,
    recipe: Recipe,
    read: PartReader,
    verbatim: AsyncIterator[bytes] | None,
    encoders: Encoders,
    output: str | os.PathLike[str],
    progress: Progress | None = None,
) -> None:
    """Write the identical nupkg to `output`, which appears whole and checked, or not at all.

    Holds some MB for each worker, whatever the parts' sizes; what must wait longer waits in temporary files beside
    `output`. It is not synced, and its owner's alone (mode 600): who keeps the file sees to that.

    Args:
        manifest: of the nupkg.
        recipe: its, as `parse_recipe` gave it.
        read: the parts' content, each byte of it verified: see `parts_of_chunks`.
        verbatim: the recipe's blob in order (for an opaque recipe, the nupkg); None where it has none.
        encoders: with all that `recipe.encoders` names.
        output: a path; what is there is replaced.
        progress: is told after each part.

    Raises:
        EncoderMissingError: before anything is read.
        RebuildError: the result is not the nupkg.
        EncoderDiedError: twice for the same part.
        WaystationError: whatever `read` and `verbatim` raise.
        OSError: the disk.
    """
    folder = os.path.dirname(os.fspath(output)) or "."
    descriptor, temporary = tempfile.mkstemp(prefix=".rebuild-", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            await _assemble(manifest, recipe, read, verbatim, encoders, _Sink(manifest, file), folder, progress)
        os.replace(temporary, output)
    except BaseException:
        os.unlink(temporary)
        raise


class _Made(NamedTuple):
    """A part that waits for its turn: its content's CRC-32, its bytes in the nupkg, and those, unless verbatim."""

    crc32: int
    size: int
    waiting: _Waiting | None


async def _assemble(
    manifest: Manifest,
    recipe: Recipe,
    read: PartReader,
    verbatim: AsyncIterator[bytes] | None,
    encoders: Encoders,
    sink: _Sink,
    folder: str,
    progress: Progress | None,
) -> None:
    """Make all of the nupkg, and compare its digests."""
    if lacking := recipe.encoders - set(encoders.names()):
        raise EncoderMissingError(lacking)
    source = _Source(recipe, verbatim)
    if isinstance(recipe.records, Opaque):
        await _copy(source, manifest.nupkg.size, sink)
    else:
        layout = Layout(recipe, manifest)
        makers = (_make(step, manifest, read, encoders, folder) for step in steps(recipe, manifest))
        async with aclosing(_ahead(makers, 2 * encoders.workers + 2)) as all_made:
            async for made in all_made:
                await sink.write(layout.before(made.crc32, made.size))
                if made.waiting is None:
                    await _copy(source, made.size, sink)
                else:
                    await made.waiting.pour(sink)
                if progress:
                    progress(sink.size, manifest.nupkg.size)
        await sink.write(layout.after())
    source.check()
    await sink.check()


async def _ahead(makers: Iterable[Awaitable[_Made]], most: int) -> AsyncGenerator[_Made, None]:
    """The results in order, with up to `most` of them under way."""
    tasks: deque[asyncio.Future[_Made]] = deque()
    source = iter(makers)
    try:
        while True:
            while len(tasks) < most and (maker := next(source, None)) is not None:
                tasks.append(asyncio.ensure_future(maker))
            if not tasks:
                return
            made = await tasks[0]
            tasks.popleft()
            try:
                yield made
            finally:
                if made.waiting:
                    made.waiting.close()
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, _Made) and result.waiting:
                result.waiting.close()


async def _make(step: Step, manifest: Manifest, read: PartReader, encoders: Encoders, folder: str) -> _Made:
    try:
        return await _make_once(step, manifest, read, encoders, folder)
    except EncoderDiedError:
        return await _make_once(step, manifest, read, encoders, folder)


async def _make_once(step: Step, manifest: Manifest, read: PartReader, encoders: Encoders, folder: str) -> _Made:
    waiting = _Waiting(folder)
    try:
        async with aclosing(read(step.part)) as pieces:
            content = _Checksum(pieces)
            if step.encoder == VERBATIM:
                async for _ in content:
                    pass
                return _Made(content.crc32, step.verbatim, None)
            async with aclosing(_encode(step, content, encoders)) as made:
                async for data in made:
                    await waiting.add(data)
                    _check_room(waiting.size, manifest)
    except BaseException:
        waiting.close()
        raise
    return _Made(content.crc32, waiting.size, waiting)


async def _encode(step: Step, content: AsyncIterator[bytes], encoders: Encoders) -> AsyncGenerator[bytes, None]:
    if step.encoder == STORED_AS_IS:
        async for data in content:
            yield data
        return
    async with aclosing(encoders.encode(step.encoder, step.feeding, content)) as made:
        async for data in made:
            yield data


def _check_room(size: int, manifest: Manifest) -> None:
    if size > manifest.nupkg.size:
        raise RebuildError(f"the recipe makes more than the {manifest.nupkg.size} bytes of the nupkg")


class _Checksum:
    """Passes a part's content on, and sums it up."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self.crc32 = 0

    def __aiter__(self) -> _Checksum:
        return self

    async def __anext__(self) -> bytes:
        piece = await anext(self._pieces)
        self.crc32 = zlib.crc32(piece, self.crc32)
        return piece


class _Waiting:
    """Bytes that wait for their turn: in memory, and in a file without a name when they are many."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._held = bytearray()
        self._file: BinaryIO | None = None
        self.size = 0

    async def add(self, data: bytes) -> None:
        self._held += data
        self.size += len(data)
        if len(self._held) > _IN_MEMORY:
            await asyncio.to_thread(self._spill)

    def _spill(self) -> None:
        if self._file is None:
            self._file = cast("BinaryIO", tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115 - closed by `close`
        self._file.write(self._held)
        self._held = bytearray()

    async def pour(self, sink: _Sink) -> None:
        if self._file is not None:
            await asyncio.to_thread(self._file.seek, 0)
            while data := await asyncio.to_thread(self._file.read, PIECE):
                await sink.write(data)
        await sink.write(bytes(self._held))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Source:
    """The blob of verbatim bytes, taken in order and checked against its name."""

    def __init__(self, recipe: Recipe, pieces: AsyncIterator[bytes] | None) -> None:
        self._blob = recipe.verbatim
        self._pieces = pieces
        self._left = b""
        self._digest = hashlib.sha256()

    async def take(self, most: int) -> bytes:
        """Some next bytes, at least one."""
        while not self._left:
            piece = await anext(self._pieces, None) if self._pieces is not None else None
            if piece is None:
                raise RebuildError("the verbatim bytes are cut off, or not there")
            self._left = piece
        data, self._left = self._left[:most], self._left[most:]
        self._digest.update(data)
        return data

    def check(self) -> None:
        if self._blob is not None and self._digest.digest() != self._blob.sha256:
            raise RebuildError("the verbatim bytes have another SHA-256 than the recipe names")


async def _copy(source: _Source, size: int, sink: _Sink) -> None:
    while size:
        data = await source.take(min(size, PIECE))
        size -= len(data)
        await sink.write(data)


class _Sink:
    """Where the nupkg grows and is hashed."""

    def __init__(self, manifest: Manifest, file: BinaryIO) -> None:
        self._manifest = manifest
        self._file = file
        self._held = bytearray()
        self._sha256, self._sha512 = hashlib.sha256(), hashlib.sha512()
        self.size = 0

    async def write(self, data: bytes) -> None:
        self.size += len(data)
        _check_room(self.size, self._manifest)
        self._held += data
        if len(self._held) >= PIECE:
            await asyncio.to_thread(self._flush)

    def _flush(self) -> None:
        held, self._held = self._held, bytearray()
        self._sha256.update(held)
        self._sha512.update(held)
        self._file.write(held)

    async def check(self) -> None:
        await asyncio.to_thread(self._flush)
        found = (self.size, self._sha256.hexdigest(), b64encode(self._sha512.digest()).decode())
        said = self._manifest.nupkg
        if found != (said.size, said.sha256, said.sha512):
            raise RebuildError("what was rebuilt has another SHA-512 than the nupkg")
