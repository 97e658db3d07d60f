"""The depot: the orchestrator's own store, and where packages enter it. A nupkg becomes parts, chunks and a signed manifest.

Order keeps it safe: chunks durable first, then the nupkg itself, then the manifest, and the name that lists it last.
How the nupkg can be made again is found out afterwards (`recipe`): a listed package needs it for nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from orchestrator.acts import PackageAdded, PackageRemoved
from orchestrator.depot.cut_nupkg import NupkgCutter, digests_of, open_nupkg, read_directory
from orchestrator.paths import operator
from relay.audit.event import tell
from relay.engines.encoders import Encoders
from relay.engines.engine_pool import Engines
from relay.errors import ChunkInvalid, ChunkMissing, MetadataError, NotFoundError, first_of
from relay.package.chunk import Chunk
from relay.package.identity import PackageRef
from relay.package.manifest import Manifest, ManifestBuilder, NupkgDigests
from relay.package.nuspec import NUSPEC_MAX, Nuspec, parse_nuspec
from relay.package.part_reader import parts_of_chunks
from relay.package.recipe import Recipe
from relay.package.zip_reader import DEFAULT_LIMITS, Entry, WalkLimits, is_root_nuspec, walk
from relay.package.zip_records import DEFLATED
from relay.rebuild.find_recipe import find_recipe
from relay.rebuild.nupkgs import Nupkgs
from relay.rebuild.recipe_store import Recipes
from relay.stores.catalog import Catalog, Pointer, Provenance
from relay.stores.open import Store, open_store
from relay.stores.volume import translate
from relay.support.progress import Progress
from relay.trust.envelopes import PackageStatement, sign_package

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner


@dataclass(frozen=True, slots=True)
class Added:
    """What adding a nupkg came to. `new` is False where the same nupkg was there already.

    `unread` says, a line each, what of its nuspec could not be read and is not in the manifest.
    """

    pointer: Pointer
    manifest: Manifest
    new: bool
    chunks_stored: int
    unread: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PackageDetails:
    """All that the depot knows of a package. `recipe` is None where it was not found how its nupkg is made again.

    `unread` as when it was added, read anew.
    """

    pointer: Pointer
    manifest: Manifest
    signed: bool
    recipe: Recipe | None
    unread: tuple[str, ...]


class Depot:
    """Packages of one store, with the manifests and signatures that vouch for them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.catalog = Catalog(store.documents)
        self._engines = Engines(catalog=self.catalog, chunks=store.chunks)
        self.nupkgs = Nupkgs(store, self._engines)
        self.recipes = Recipes(store)
        self.notes: list[str] = []
        """What was brought back since it was opened, in sentences."""

    async def close(self) -> None:
        """End what works for it; the store is the caller's. Twice is once."""
        await self.nupkgs.close()
        await self._engines.close()

    async def add(
        self,
        path: str,
        signer: CryptoSigner,
        provenance: Provenance,
        *,
        progress: Progress | None = None,
        expected: PackageRef | None = None,
        limits: WalkLimits = DEFAULT_LIMITS,
    ) -> Added:
        """Take a nupkg in, chunked and signed: on return it is listed. Adding the same one again changes nothing, but
        brings back what the depot lost, and signs anew where the key is another one.

        How it can be made again is not known by that: `recipe` finds it.

        Raises:
            MetadataError: also where it is another package than `expected`.
            ArchiveError: it is not a nupkg that may enter.
            ConflictError: its id and version stand for other bytes already.
            UsageError: the file cannot be read.
            StoreError: the medium failed.
        """
        with open_nupkg(path) as file:
            digests = await asyncio.to_thread(digests_of, file)
            entries, nuspec = await asyncio.to_thread(read_directory, file, limits)
            ref = PackageRef(nuspec.id, nuspec.version)
            if expected is not None and ref != expected:
                raise MetadataError(f"the file is {ref}, where {expected} was expected")
            there = self.catalog.check_name(ref, digests.sha256)
            if there is not None and await self._is_whole(there):
                manifest = await self.manifest(there)
                await self._sign(manifest, signer)
                _tell_added(there, provenance)
                return Added(there, manifest, new=False, chunks_stored=0, unread=nuspec.left_out)
            whole, show = sum(entry.size for entry in entries), progress or (lambda _done, _whole: None)
            manifest, stored = await self._store_chunks(
                file, entries, ref, nuspec, digests, lambda done: show(done, whole)
            )
        await self.store.blobs.put_file(digests.sha256, path)
        await self._sign(manifest, signer)
        pointer = await self.catalog.publish(manifest, provenance)
        _tell_added(pointer, provenance)
        return Added(pointer, manifest, new=there is None, chunks_stored=stored, unread=nuspec.left_out)

    async def manifest(self, pointer: Pointer) -> Manifest:
        """The manifest behind a pointer. Raises `NotFoundError` where the store lost it."""
        manifest = await self.catalog.manifest(pointer.manifest_id)
        if manifest is None:
            raise NotFoundError(
                f"the manifest of {pointer.ref} is damaged or gone", hint="Remove the package and add it again"
            )
        return manifest

    async def make_whole(self, manifest: Manifest) -> str:
        """Read every chunk of a package, and bring back what was damaged or lost from the depot's own nupkg.

        Returns:
            A sentence about what was brought back; empty where nothing was.

        Raises:
            NotFoundError: the nupkg is damaged or gone, too.
            StoreError: the medium failed.
        """
        ids = set(manifest.chunk_ids())
        lost = len(ids - await self.store.chunks.sound_many(ids))
        if not lost:
            return ""
        what = f"{lost} of {len(ids)} chunks of {manifest.package} were damaged or gone in the depot"
        try:
            async with self.nupkgs.as_file(manifest) as path:
                with open_nupkg(path) as file:
                    entries, nuspec = await asyncio.to_thread(read_directory, file)
                    await self._store_chunks(
                        file, entries, manifest.package, nuspec, manifest.nupkg, lambda _stored: None
                    )
        except (ChunkMissing, ChunkInvalid) as error:
            name = f"{manifest.package.id}.{manifest.package.version.normalized}.nupkg"
            raise NotFoundError(
                f"{what}, and so is its nupkg", hint=f"Add its file again: 'waystation package add {name}'"
            ) from error
        return f"{what}: they were made again of its nupkg"

    async def recipe(self, manifest: Manifest, progress: Progress | None = None) -> Recipe | None:
        """How to make the identical nupkg, proved; None where that cannot be found, as the depot lost its nupkg.

        It is looked for first where none is known yet, and where engines came since the last look that may do better.

        Args:
            manifest: of a listed package.
            progress: hears of the nupkg's bytes whose encoder was looked for.

        Raises:
            ChunkInvalid: the depot's nupkg is damaged.
            StoreError: the medium failed.
        """
        if await self._may_find_better(manifest) and await self.store.blobs.has(manifest.nupkg.sha256):
            async with self.nupkgs.as_file(manifest) as path:
                await self._find_recipe(path, manifest, progress)
        return await self.recipes.find(manifest)

    async def details(self, ref: PackageRef) -> PackageDetails:
        """Raises `NotFoundError`, and as `recipe`."""
        pointer = self.catalog.get(ref)
        manifest = await self.manifest(pointer)
        signature = await self.catalog.signature(manifest.id)
        # The proof of a package that was just added may be under way in another process.
        recipe = await self.recipe(manifest) if await self.recipes.find(manifest) else None
        return PackageDetails(pointer, manifest, bool(signature), recipe, await self._unread(manifest))

    async def _unread(self, manifest: Manifest) -> tuple[str, ...]:
        """What of the nuspec is not in the manifest; nothing where the depot lost it."""
        read = parts_of_chunks(manifest, lambda index: self.store.chunks.get(manifest.chunk_id(index)))
        for index, part in enumerate(manifest.parts):
            if is_root_nuspec(part.path) and part.size <= NUSPEC_MAX:
                with suppress(ChunkMissing, ChunkInvalid, MetadataError):
                    return parse_nuspec(b"".join([piece async for piece in read(index)])).left_out
        return ()

    async def other_versions(self, ref: PackageRef, limit: int = 16) -> list[Manifest]:
        """Manifests of the newest other versions of the same id, newest first."""
        pointers = [p for p in reversed(self.catalog.of_id(ref.id)) if p.ref != ref][:limit]
        found = await self.catalog.manifests_of(p.manifest_id for p in pointers)
        return [found[p.manifest_id] for p in pointers if p.manifest_id in found]

    async def remove(self, ref: PackageRef) -> Pointer:
        """Take a package out of the list, and its nupkg off the disk. Chunks stay until a sweep."""
        pointer = await self.catalog.remove(ref)
        if not any(other.nupkg_sha256 == pointer.nupkg_sha256 for other in self.catalog.all()):
            await self.store.blobs.remove(pointer.nupkg_sha256)
            await self.recipes.forget(pointer.nupkg_sha256)
        tell(PackageRemoved(operator(), pointer.id, pointer.version, pointer.manifest))
        return pointer

    async def _may_find_better(self, manifest: Manifest) -> bool:
        """Whether there is no recipe, or one with verbatim bytes that encoders which are here now were not asked for."""
        kept = await self.recipes.find(manifest)
        if kept is None or kept.verbatim is None:
            return kept is None
        return bool(await self._engines.installed() - await self.recipes.tried(manifest))

    async def _find_recipe(self, path: str, manifest: Manifest, progress: Progress | None) -> None:
        """Find and keep it. No engine is opened for a nupkg without a deflated part."""
        try:
            entries = await asyncio.to_thread(_walk_file, path)
            if all(entry.method != DEFLATED for entry in entries):
                recipe = await find_recipe(path, manifest, Encoders(1), progress)
                tried: tuple[str, ...] = ("zlib",)
            else:
                encoders = await self._engines.open()
                recipe, tried = await find_recipe(path, manifest, encoders, progress), encoders.names()
        except OSError as error:
            raise translate(error, f"read the nupkg of {manifest.package}") from error
        await self.recipes.keep(manifest, recipe, tried)

    async def _is_whole(self, pointer: Pointer) -> bool:
        """Whether the depot still has all of what it lists; adding the nupkg again brings back what it lost."""
        manifest = await self.catalog.manifest(pointer.manifest_id)
        if manifest is None or not await self._has_nupkg(pointer.nupkg_sha256):
            return False
        ids = set(manifest.chunk_ids())
        return await self.store.chunks.sound_many(ids) == ids

    async def _has_nupkg(self, sha256: str) -> bool:
        """Every byte is read: one that is damaged is put aside by that, and so makes room for the next."""
        with suppress(ChunkMissing, ChunkInvalid):
            async for _ in self.store.blobs.read(sha256):
                pass
            return True
        return False

    async def _sign(self, manifest: Manifest, signer: CryptoSigner) -> None:
        statement = PackageStatement(
            id=str(manifest.package.id),
            version=manifest.package.version.normalized,
            manifest=manifest.id,
            nupkg_sha256=manifest.nupkg.sha256,
        )
        await self.catalog.keep_manifest(manifest, await asyncio.to_thread(sign_package, statement, signer))

    async def _store_chunks(
        self,
        file: BinaryIO,
        entries: list[Entry],
        ref: PackageRef,
        nuspec: Nuspec,
        digests: NupkgDigests,
        stored_bytes: Callable[[int], None],
    ) -> tuple[Manifest, int]:
        """Cut, and while one batch is made durable already cut the next."""
        cutter = NupkgCutter(file, entries, ManifestBuilder(ref, digests, dict(nuspec.metadata)))
        done, stored = 0, 0
        batch = await asyncio.to_thread(cutter.next_batch)
        while batch:
            fresh = await self._lacking(batch)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self.store.chunks.put_many(fresh))
                    following = group.create_task(asyncio.to_thread(cutter.next_batch))
            except BaseExceptionGroup as errors:
                raise first_of(errors) from None
            stored += len(fresh)
            done += sum(chunk.size for chunk in batch)
            stored_bytes(done)
            batch = following.result()
        return await asyncio.to_thread(cutter.manifest), stored

    async def _lacking(self, batch: list[Chunk]) -> list[Chunk]:
        here = await self.store.chunks.has_many(chunk.id for chunk in batch)
        return list({chunk.id: chunk for chunk in batch if chunk.id not in here}.values())


def _tell_added(pointer: Pointer, provenance: Provenance) -> None:
    what = pointer.id, pointer.version, pointer.manifest, pointer.nupkg_sha256
    tell(PackageAdded(operator(), *what, provenance.source))


@asynccontextmanager
async def open_depot(location: str) -> AsyncIterator[Depot]:
    """The depot at `location`, its catalog loaded. Raises `UsageError`, `StoreError`."""
    store = await open_store(location)
    try:
        depot = Depot(store)
        await depot.catalog.load()
        try:
            yield depot
        finally:
            await depot.close()
    finally:
        await store.close()


def _walk_file(path: str) -> list[Entry]:
    with open(path, "rb") as file:
        return list(walk(file))
