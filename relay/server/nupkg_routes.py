"""The handlers of the identical nupkg: the file as NuGet clients take it, the recipe, and what no encoder makes."""

from __future__ import annotations

import asyncio
import glob
import os
from collections.abc import AsyncGenerator, Callable

import msgspec
from aiohttp import web

from relay.config import RelayConfig
from relay.engines.engine_pool import Engines, pin_of
from relay.errors import IdentityError
from relay.package.identity import ManifestId, parse_digest
from relay.package.manifest import Manifest
from relay.package.recipe import parse_recipe_wire
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.protocol.not_exact import NotExactError
from relay.rebuild.nupkgs import Nupkgs
from relay.server import metrics
from relay.server.http.access import Routes
from relay.server.http.bodies import (
    IMMUTABLE,
    body_pieces,
    check_media_type,
    digest_of,
    json_answer,
    package_of,
    read_body,
    stream,
)
from relay.server.http.connection import Limits
from relay.server.http.problems import HttpRefusal, problem
from relay.server.packages import Transfer
from relay.server.peers import Peers
from relay.stores.catalog import Catalog
from relay.stores.contract import ChunkReader


class RebuildRoutes:
    """They hold one piece of a file at a time."""

    def __init__(self, transfer: Transfer, nupkgs: Nupkgs, limits: Limits) -> None:
        self._transfer = transfer
        self._nupkgs = nupkgs
        self._limits = limits

    def routes(self) -> Routes:
        """As `Routed`."""
        return (
            ("GET", messages.NUPKG, self.nupkg, "read"),
            ("GET", messages.REBUILD, self.give_recipe, "read"),
            ("PUT", messages.REBUILD, self.take_recipe, "write"),
            ("GET", messages.BLOB, self.give_blob, "read"),
            ("PUT", messages.BLOB, self.take_blob, "write"),
        )

    async def nupkg(self, request: web.Request) -> web.StreamResponse:
        """The identical nupkg, made first where need be."""
        pointer = await self._transfer.catalog.look_up(package_of(request))
        manifest = await self._transfer.manifest(pointer.manifest_id)
        try:
            await self._nupkgs.ensure(manifest)
        except NotExactError as error:
            return problem(404, "not_exact", extra={"lacks": msgspec.to_builtins(error.lacks)}, cause=error)
        return await self._stream(request, self._nupkgs.read(manifest), manifest.nupkg.size, manifest.nupkg.sha256)

    async def give_recipe(self, request: web.Request) -> web.StreamResponse:
        data = await self._nupkgs.recipes.give(digest_of(request))
        if data is None:
            raise HttpRefusal(404, "not_found")
        return web.Response(body=data, content_type=messages.RECIPE_TYPE, headers={"Cache-Control": "no-cache"})

    async def take_recipe(self, request: web.Request) -> web.StreamResponse:
        """Keep a recipe that fits the manifest. Whether it gives the nupkg shows when it is made."""
        check_media_type(request, messages.RECIPE_TYPE)
        manifest = await self._named(request)
        if manifest.nupkg.sha256 != digest_of(request):
            raise HttpRefusal(404, "not_found")
        body = await read_body(request, self._limits, messages.RECIPE_BODY_MAX)
        recipe = await asyncio.to_thread(parse_recipe_wire, body, None, manifest)
        await self._nupkgs.recipes.take(manifest, recipe)
        return json_answer(
            messages.RecipeAnswer(
                await self._nupkgs.lacks_blob(manifest), await self._nupkgs.lacking_encoders(manifest)
            )
        )

    async def give_blob(self, request: web.Request) -> web.StreamResponse:
        sha256, manifest = digest_of(request), await self._named(request)
        size = await self._blob_size(sha256, manifest)
        return await self._stream(request, self._nupkgs.blob(sha256, manifest), size, sha256)

    async def take_blob(self, request: web.Request) -> web.StreamResponse:
        """Keep a blob that a recipe names, of just the size that it names."""
        check_media_type(request, messages.NUPKG_TYPE)
        sha256 = digest_of(request)
        size = await self._blob_size(sha256, await self._named(request))
        pieces = metrics.counted(body_pieces(request, self._limits, size), metrics.RECEIVED)
        await self._nupkgs.take_blob(sha256, size, pieces)
        return json_answer(messages.BlobAnswer(size=size))

    async def _named(self, request: web.Request) -> Manifest:
        """The manifest that the query names. Raises `HttpRefusal`, `UnknownManifestError`."""
        try:
            return await self._transfer.manifest(ManifestId(parse_digest(request.query.get("manifest", ""))))
        except IdentityError as error:
            raise HttpRefusal(400, "bad_request") from error

    async def _blob_size(self, sha256: str, manifest: Manifest) -> int:
        size = await self._nupkgs.blob_size(sha256, manifest)
        if size is None:
            raise HttpRefusal(404, "not_found")
        return size

    async def _stream(
        self, request: web.Request, pieces: AsyncGenerator[bytes, None], size: int, sha256: str
    ) -> web.StreamResponse:
        """A file under its digest."""
        headers = {"Content-Type": messages.NUPKG_TYPE, "Cache-Control": IMMUTABLE, "ETag": f'"{sha256}"'}
        return await stream(request, metrics.counted(pieces, metrics.SENT), self._limits, headers, size)


def engines_of(config: RelayConfig, catalog: Catalog, chunks: ChunkReader) -> Engines:
    """The engines that `engines:` names, those in the customary places, and those in packages that the relay holds.

    Raises:
        UsageError: an entry that cannot be.
    """
    pins = [pin for entry in config.engines if (pin := pin_of(entry.encoder, entry.sha256))]
    paths = [path for entry in config.engines for path in _files(entry.path)]
    return Engines(paths, pins, catalog=catalog, chunks=chunks)


def _files(path: str) -> list[str]:
    """A file, or the libraries in a folder."""
    return sorted(glob.glob(os.path.join(glob.escape(path), "*.so"))) if os.path.isdir(path) else [path]


def parent_of(config: RelayConfig, peers: Peers) -> Callable[[], RelayClient] | None:
    """What opens the relay's parent. Raises `UsageError` for a parent that cannot be used."""
    parent = config.parent
    return None if parent is None else lambda: peers.open(parent.url)
