"""The identical nupkg of a package: the file itself where it is kept, else made of its chunks, else taken from a parent.

NuGet clients compare its SHA-512, so nothing leaves here that was not compared with the manifest's. That is done once:
when the file is made or taken, or when it is first asked for. Afterwards its SHA-256, which names it and is checked each
time that it is read, suffices: bytes with the same SHA-256 are the same bytes, and have the same SHA-512.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import tempfile
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Final

import aiofiles
import msgspec

from relay.audit.acts import NupkgMade
from relay.audit.event import tell
from relay.engines.encoders import EncoderDiedError
from relay.engines.engine_pool import Engines
from relay.errors import (
    ChunkInvalid,
    ChunkMissing,
    RefusedError,
    UntrustedError,
)
from relay.package.manifest import Manifest
from relay.package.part_reader import parts_of_chunks
from relay.package.recipe import Blob, Opaque, Recipe
from relay.package.zip_reader import Entry, walk
from relay.protocol.messages import ExactLacks
from relay.protocol.not_exact import NotExactError
from relay.rebuild.rebuilder import RebuildError, rebuild
from relay.rebuild.recipe_store import Recipes, no_nupkg
from relay.rebuild.zip_layout import verbatim_bytes
from relay.stores.open import Store, parse_location
from relay.stores.volume import translated
from relay.support.together import Flights

if TYPE_CHECKING:
    from relay.protocol.client import RelayClient

AT_ONCE: Final = 2
"""Nupkgs that are made or taken at the same time; later ones wait."""
_CHECKED_MAX: Final = 100_000


class Nupkgs:
    """The nupkgs of one store. `close` it; the engines are the caller's."""

    def __init__(self, store: Store, engines: Engines, parent: Callable[[], RelayClient] | None = None) -> None:
        """Nupkgs of the packages in `store`; `parent` opens the relay to take from what cannot be made here."""
        self.recipes = Recipes(store)
        self.rebuilt = 0
        """How many were made of chunks by this object."""
        self._store = store
        self._engines = engines
        self._parent = parent
        self._folder = _work_folder(store.location)
        self._checked: set[tuple[str, str]] = set()
        self._flights: Flights[tuple[str, str], None] = Flights()
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def close(self) -> None:
        """Stop what is being made. Twice is once."""
        await self._flights.close()

    async def ensure(self, manifest: Manifest) -> None:
        """Have the nupkg among the blobs, its SHA-512 checked. However many ask, it is made once.

        Raises:
            NotExactError: it cannot be made or taken.
            UnreachableError: the parent, or our own medium, cannot serve now.
        """
        key = (manifest.nupkg.sha256, manifest.nupkg.sha512)
        if key not in self._checked or not await self._store.blobs.has(key[0]):
            await self._flights.join(key, lambda: self._bring(manifest))

    async def read(self, manifest: Manifest) -> AsyncGenerator[bytes, None]:
        """The nupkg in pieces, the last one held back until all are known to be right. Raises as `ensure`, and

        ChunkInvalid: it was damaged since; cut the answer off.
        """
        for again in (True, False):
            await self.ensure(manifest)
            begun = False
            try:
                async with aclosing(self._store.blobs.read(manifest.nupkg.sha256)) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
            except (ChunkMissing, ChunkInvalid):
                # Damaged since, and put aside: it is made anew, unless some of it has left already.
                if begun or not again:
                    raise
            else:
                return

    # --- blobs from outside, and for others

    async def blob_size(self, sha256: str, manifest: Manifest) -> int | None:
        """Bytes of a blob that belongs to this package: its nupkg, or what its recipe names; None for any other."""
        if sha256 == manifest.nupkg.sha256:
            return manifest.nupkg.size
        blob = await self._verbatim(manifest)
        return blob.size if blob is not None and blob.id == sha256 else None

    async def take_blob(self, sha256: str, size: int, pieces: AsyncIterator[bytes]) -> None:
        """Keep a blob of `size` bytes. Raises `UntrustedError`, `ChunkInvalid`, `StoreError`, and what `pieces` raises."""
        async with self._spooled(pieces, size) as path:
            await self._store.blobs.put_file(sha256, path)

    async def lacks_blob(self, manifest: Manifest) -> bool:
        """Whether the kept recipe names verbatim bytes that are not here, not even in the nupkg."""
        blob = await self._verbatim(manifest)
        names = [] if blob is None else [manifest.nupkg.sha256, blob.id]
        return bool(names) and not any([await self._store.blobs.has(name) for name in names])

    async def _verbatim(self, manifest: Manifest) -> Blob | None:
        recipe = await self.recipes.find(manifest)
        return None if recipe is None else recipe.verbatim

    async def lacking_encoders(self, manifest: Manifest) -> tuple[str, ...]:
        """The encoders that the kept recipe names and this side has not; none where the nupkg is here."""
        recipe = await self.recipes.find(manifest)
        if recipe is None or not recipe.encoders or await self._store.blobs.has(manifest.nupkg.sha256):
            return ()
        encoders = await self._engines.open(recipe.encoders)
        return tuple(sorted(recipe.encoders - set(encoders.names())))

    async def blob(self, sha256: str, manifest: Manifest | None = None) -> AsyncGenerator[bytes, None]:
        """A blob in pieces: as it is kept, or cut out of the nupkg of `manifest`, whose recipe names it.

        Raises:
            ChunkMissing: not here.
            ChunkInvalid: damaged; cut the answer off.
        """
        if manifest is None or await self._store.blobs.has(sha256):
            pieces = self._store.blobs.read(sha256)
        else:
            pieces = self._cut_out(sha256, manifest)
        async with aclosing(pieces) as all_pieces:
            async for piece in all_pieces:
                yield piece

    @asynccontextmanager
    async def as_file(self, manifest: Manifest) -> AsyncIterator[str]:
        """The kept nupkg as a file of its own, while the context lasts. Raises `ChunkMissing`, `ChunkInvalid`."""
        async with self._spooled(self._store.blobs.read(manifest.nupkg.sha256), manifest.nupkg.size) as path:
            yield path

    async def _cut_out(self, sha256: str, manifest: Manifest) -> AsyncGenerator[bytes, None]:
        recipe = await self.recipes.find(manifest)
        if recipe is None or recipe.verbatim is None or recipe.verbatim.id != sha256:
            raise ChunkMissing(sha256)
        async with self.as_file(manifest) as path:
            with open(path, "rb") as file:  # noqa: ASYNC230 - read in threads below
                entries: tuple[Entry, ...] = ()
                if not isinstance(recipe.records, Opaque):
                    entries = tuple(await asyncio.to_thread(walk, file))
                pieces = verbatim_bytes(file, entries, recipe, manifest)
                while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                    yield piece

    # --- making

    async def _bring(self, manifest: Manifest) -> None:
        key = (manifest.nupkg.sha256, manifest.nupkg.sha512)
        async with self._turns:
            if not await self._is_right(manifest):
                with translated(f"make a nupkg in {self._folder}"):
                    await self._make(manifest)
        if len(self._checked) > _CHECKED_MAX:
            self._checked.clear()
        self._checked.add(key)

    async def _is_right(self, manifest: Manifest) -> bool:
        """Whether the nupkg is here, and is what the manifest says."""
        digest = hashlib.sha512()
        try:
            async for piece in self._store.blobs.read(manifest.nupkg.sha256):
                await asyncio.to_thread(digest.update, piece)
        except (ChunkMissing, ChunkInvalid):
            return False
        return _base64(digest.digest()) == manifest.nupkg.sha512

    async def _make(self, manifest: Manifest) -> None:
        recipe = await self.recipes.find(manifest)
        async with nullcontext() if self._parent is None else self._parent() as parent:
            if recipe is None and parent is not None:
                recipe = await _recipe_of(parent, manifest)
                if recipe is not None:
                    await self.recipes.keep(manifest, recipe)
            lacks = await self._rebuild(manifest, recipe, parent)
            if lacks is None:
                return
            if parent is None:
                raise _not_exact(manifest, lacks)
            await self._take_whole(manifest, lacks, parent)

    async def _rebuild(
        self, manifest: Manifest, recipe: Recipe | None, parent: RelayClient | None
    ) -> ExactLacks | None:
        """Make it of chunks and keep it; what was lacking, or None when it is done."""
        if recipe is None:
            return ExactLacks(recipe=True)
        if isinstance(recipe.records, Opaque):
            return ExactLacks(verbatim_bytes=manifest.nupkg.size)
        encoders, blob = await self._engines.open(recipe.encoders), recipe.verbatim
        lacks = ExactLacks(encoders=tuple(sorted(recipe.encoders - set(encoders.names()))))
        # Without an encoder the bytes are no use: the parent is asked for the whole file, not for them first.
        if blob is not None and not await self._has_verbatim(manifest, blob, None if lacks.encoders else parent):
            lacks = msgspec.structs.replace(lacks, verbatim_bytes=blob.size)
        if lacks != ExactLacks():
            return lacks
        verbatim = None if blob is None else self._store.blobs.read(blob.id)
        read = parts_of_chunks(manifest, lambda index: self._store.chunks.get(manifest.chunk_id(index)))
        try:
            with self._new_path() as output:
                await rebuild(manifest, recipe, read, verbatim, encoders, output)
                await self._store.blobs.put_file(manifest.nupkg.sha256, output)
        except RebuildError as error:
            tell(no_nupkg(manifest.package, f"its recipe lies, and is forgotten: {error}"))
            await self.recipes.forget(manifest.nupkg.sha256)
            return ExactLacks(recipe=True)
        except (ChunkInvalid, ChunkMissing, EncoderDiedError) as error:
            tell(no_nupkg(manifest.package, str(error)))
            if isinstance(error, EncoderDiedError):
                return ExactLacks(encoders=tuple(sorted(recipe.encoders)))
            is_verbatim = blob is not None and error.id == blob.id
            return ExactLacks(verbatim_bytes=blob.size) if blob and is_verbatim else ExactLacks(chunks=True)
        self.rebuilt += 1
        _tell_made(manifest)
        return None

    # --- the parent

    async def _has_verbatim(self, manifest: Manifest, blob: Blob, parent: RelayClient | None) -> bool:
        """Whether the blob is here, in the end."""
        if await self._store.blobs.has(blob.id):
            return True
        if parent is None:
            return False
        try:
            async with aclosing(parent.blob(blob.id, manifest)) as pieces:
                await self.take_blob(blob.id, blob.size, pieces)
        except (RefusedError, UntrustedError) as error:
            # Another recipe is there: the whole file may still be had.
            tell(no_nupkg(manifest.package, f"no verbatim bytes from {parent.url}: {error}"))
            return False
        return True

    async def _take_whole(self, manifest: Manifest, lacks: ExactLacks, parent: RelayClient) -> None:
        """The file itself. Raises `NotExactError`, `UnreachableError`, `StoreError`."""
        try:
            async with (
                aclosing(parent.nupkg(manifest.package)) as pieces,
                self._spooled(pieces, manifest.nupkg.size) as path,
            ):
                await asyncio.to_thread(_check_sha512, path, manifest)
                await self._store.blobs.put_file(manifest.nupkg.sha256, path)
                _tell_made(manifest, parent.url)
        except (RefusedError, UntrustedError) as error:
            tell(no_nupkg(manifest.package, f"not from {parent.url} either: {error}"))
            raise _not_exact(manifest, lacks) from error

    @asynccontextmanager
    async def _spooled(self, pieces: AsyncIterator[bytes], size: int) -> AsyncIterator[str]:
        """`pieces`, which must be `size` bytes, as a file that is gone afterwards."""
        left = size
        with self._new_path() as path:
            with translated(f"write to {self._folder}"):
                async with aiofiles.open(path, "xb") as file:
                    async for piece in pieces:
                        left -= len(piece)
                        if left < 0:
                            break
                        await file.write(piece)
            if left:
                raise UntrustedError(f"{size} bytes were told, {'more' if left < 0 else 'fewer'} came")
            yield path

    @contextmanager
    def _new_path(self) -> Iterator[str]:
        """A name for a file that is gone afterwards."""
        path = os.path.join(self._folder, f".rebuild-{secrets.token_hex(8)}")
        try:
            yield path
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)


def _tell_made(manifest: Manifest, source: str = "") -> None:
    package = manifest.package
    tell(NupkgMade(str(package.id), package.version.normalized, manifest.nupkg.sha256, source))


def _not_exact(manifest: Manifest, lacks: ExactLacks) -> NotExactError:
    return NotExactError(f"the identical nupkg of {manifest.package} cannot be had here", lacks)


async def _recipe_of(parent: RelayClient, manifest: Manifest) -> Recipe | None:
    try:
        return await parent.recipe(manifest)
    except (RefusedError, UntrustedError) as error:
        tell(no_nupkg(manifest.package, f"no recipe from {parent.url}: {error}"))
        return None


def _work_folder(location: str) -> str:
    """Where large files grow: a disk store's own `tmp`, which is swept when the store is opened."""
    parsed = parse_location(location)
    return os.path.join(parsed.path, "tmp") if parsed.kind == "disk" else tempfile.gettempdir()


def _check_sha512(path: str, manifest: Manifest) -> None:
    """Raises `UntrustedError`."""
    with open(path, "rb") as file:
        if _base64(hashlib.file_digest(file, "sha512").digest()) != manifest.nupkg.sha512:
            raise UntrustedError("the nupkg has another SHA-512 than the manifest says")


def _base64(digest: bytes) -> str:
    return b64encode(digest).decode()
