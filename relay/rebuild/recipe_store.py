"""Recipes beside the packages: how to make each nupkg again.

rebuilds/<nupkg sha256>     the canonical recipe
tried/<nupkg sha256>        the encoders that it was found with, where this store's own side found it

A recipe is kept apart from its manifest, so that a better one changes no name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from relay.audit.acts import NupkgNotMade
from relay.audit.event import tell
from relay.package.identity import PackageRef
from relay.package.manifest import Manifest, to_wire
from relay.package.recipe import Recipe, RecipeError, encode_recipe, parse_recipe, parse_recipe_wire
from relay.stores.open import Store


def no_nupkg(package: PackageRef, why: str) -> NupkgNotMade:
    """To be told where a nupkg, or something that it takes, cannot be had."""
    return NupkgNotMade(str(package.id), package.version.normalized, why)


class Recipes:
    """The recipes of one store."""

    def __init__(self, store: Store) -> None:
        self._documents = store.documents
        self._blobs = store.blobs

    async def find(self, manifest: Manifest) -> Recipe | None:
        """The one that is kept; one that is damaged, or does not fit the manifest, counts as absent."""
        data = await self._documents.read(_name(manifest.nupkg.sha256))
        if data is None:
            return None
        try:
            return await asyncio.to_thread(parse_recipe, data, manifest)
        except RecipeError as error:
            tell(no_nupkg(manifest.package, f"the recipe cannot be used: {error}"))
            return None

    async def keep(self, manifest: Manifest, recipe: Recipe, tried: Iterable[str] = ()) -> None:
        """Durable on return; takes the place of the one before. `tried`: the encoders that it was found with."""
        data = encode_recipe(recipe)
        if await self._documents.read(_name(manifest.nupkg.sha256)) != data:
            await self._documents.write(_name(manifest.nupkg.sha256), data)
        names = " ".join(sorted(tried)).encode()
        if names and await self._documents.read(_tried_name(manifest)) != names:
            await self._documents.write(_tried_name(manifest), names)

    async def take(self, manifest: Manifest, recipe: Recipe) -> None:
        """Keep one from outside. The nupkg itself, where it is here, proves the one before: then that stays."""
        if not await self._blobs.has(manifest.nupkg.sha256) or await self.find(manifest) is None:
            await self.keep(manifest, recipe)

    async def tried(self, manifest: Manifest) -> frozenset[str]:
        """The encoders that the kept one was found with."""
        data = await self._documents.read(_tried_name(manifest)) or b""
        return frozenset(data.decode("ascii", "replace").split())

    async def forget(self, nupkg_sha256: str) -> None:
        """It is gone on return."""
        await self._documents.remove(_name(nupkg_sha256))
        await self._documents.remove(f"tried/{nupkg_sha256}")

    # --- the wire

    async def give(self, nupkg_sha256: str) -> bytes | None:
        """For the wire, not looked at: who gets it checks it against the manifest."""
        data = await self._documents.read(_name(nupkg_sha256))
        return None if data is None else await asyncio.to_thread(to_wire, data)

    async def pack(self, manifest: Manifest, base: Manifest | None = None) -> bytes:
        """For an offer: against the recipe of `base`, where both are kept. Empty where there is none."""
        recipe = await self.find(manifest)
        if recipe is None:
            return b""
        prefix = await self._prefix(base) if base is not None and base.id != manifest.id else None
        return await asyncio.to_thread(to_wire, encode_recipe(recipe), prefix)

    async def unpack(self, data: bytes, manifest: Manifest, base: Manifest | None = None) -> Recipe | None:
        """What came with an offer. None where it was made against another recipe of `base` than the one kept here.

        A sender does not know which recipe of the base is here, if any: engines that came later find better ones.
        So one that comes with a base and cannot be read is no lie, but has to be sent plainly.

        Raises:
            RecipeError: it came without a base, and is none, or not of this manifest.
        """
        prefix = await self._prefix(base) if base is not None else None
        for held in (prefix, None) if prefix else (None,):
            try:
                return await asyncio.to_thread(parse_recipe_wire, data, held, manifest)
            except RecipeError:
                if base is None:
                    raise
        return None

    async def _prefix(self, base: Manifest) -> bytes | None:
        recipe = await self.find(base)
        return None if recipe is None else encode_recipe(recipe)


def _name(nupkg_sha256: str) -> str:
    return f"rebuilds/{nupkg_sha256}"


def _tried_name(manifest: Manifest) -> str:
    return f"tried/{manifest.nupkg.sha256}"
