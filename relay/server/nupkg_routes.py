"""The handlers of the identical nupkg: the file as NuGet clients take it, the recipe, and what no encoder makes."""

from __future__ import annotations

import asyncio
import glob
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final, TypeVar

import msgspec
from aiohttp import web

from relay.config import RelayConfig
from relay.engines.engine_pool import Engines, pin_of
from relay.errors import ChunkMissing, IdentityError
from relay.package.identity import ManifestId, NuGetVersion, PackageId, PackageRef, parse_digest
from relay.package.manifest import Manifest
from relay.package.recipe import from_wire, parse_recipe
from relay.protocol import messages
from relay.protocol.client import RelayClient
from relay.protocol.not_exact import NotExactError
from relay.rebuild.nupkgs import Nupkgs
from relay.server import metrics
from relay.server.http.access import add
from relay.server.http.bodies import body_pieces, json_answer, read_body, write_guarded
from relay.server.http.connection import Limits
from relay.server.http.problems import HttpRefusal, problem
from relay.server.packages import Transfer, UnknownManifestError
from relay.server.peers import Peers
from relay.stores.catalog import Catalog
from relay.stores.contract import ChunkReader

T = TypeVar("T")

IMMUTABLE: Final = "public, max-age=31536000, immutable"


class RebuildRoutes:
    """They hold one piece of a file at a time."""

    def __init__(self, transfer: Transfer, nupkgs: Nupkgs, limits: Limits) -> None:
        self._transfer = transfer
        self._nupkgs = nupkgs
        self._limits = limits

    def add_to(self, app: web.Application) -> None:
        """Register every route with its scope."""
        add(app, "GET", messages.NUPKG, self.nupkg, "read")
        add(app, "GET", messages.REBUILD, self.give_recipe, "read")
        add(app, "PUT", messages.REBUILD, self.take_recipe, "write")
        add(app, "GET", messages.BLOB, self.give_blob, "read")
        add(app, "PUT", messages.BLOB, self.take_blob, "write")

    async def nupkg(self, request: web.Request) -> web.StreamResponse:
        """The identical nupkg, made first where need be."""
        id = _or_404(PackageId.parse, request.match_info["id"])
        ref = PackageRef(id, _or_404(NuGetVersion.parse, request.match_info["version"]))
        pointer = await self._transfer.catalog.look_up(ref)
        manifest = await self._manifest(pointer.manifest_id)
        try:
            await self._nupkgs.ensure(manifest)
        except NotExactError as error:
            return problem(404, "not_exact", extra={"lacks": msgspec.to_builtins(error.lacks)}, cause=error)
        sha256, size = manifest.nupkg.sha256, manifest.nupkg.size
        return await self._stream(request, self._nupkgs.read(manifest), size, sha256)

    async def give_recipe(self, request: web.Request) -> web.StreamResponse:
        data = await self._nupkgs.recipes.give(_or_404(parse_digest, request.match_info["hex"]))
        if data is None:
            raise HttpRefusal(404, "not_found")
        return web.Response(body=data, content_type=messages.RECIPE_TYPE, headers={"Cache-Control": "no-cache"})

    async def take_recipe(self, request: web.Request) -> web.StreamResponse:
        """Keep a recipe that fits the manifest. Whether it gives the nupkg shows when it is made."""
        if request.content_type != messages.RECIPE_TYPE:
            raise HttpRefusal(415, "media_type")
        manifest = await self._named(request)
        if manifest.nupkg.sha256 != _or_404(parse_digest, request.match_info["hex"]):
            raise HttpRefusal(404, "not_found")
        body = await read_body(request, self._limits, messages.RECIPE_BODY_MAX)
        recipe = await asyncio.to_thread(lambda: parse_recipe(from_wire(body), manifest))
        await self._nupkgs.recipes.take(manifest, recipe)
        return json_answer(
            messages.RecipeAnswer(
                await self._nupkgs.lacks_blob(manifest), await self._nupkgs.lacking_encoders(manifest)
            )
        )

    async def give_blob(self, request: web.Request) -> web.StreamResponse:
        sha256 = _or_404(parse_digest, request.match_info["hex"])
        manifest = await self._named(request)
        size = await self._nupkgs.blob_size(sha256, manifest)
        if size is None:
            raise HttpRefusal(404, "not_found")
        return await self._stream(request, self._nupkgs.blob(sha256, manifest), size, sha256)

    async def take_blob(self, request: web.Request) -> web.StreamResponse:
        """Keep a blob that a recipe names, of just the size that it names."""
        if request.content_type != messages.NUPKG_TYPE:
            raise HttpRefusal(415, "media_type")
        sha256 = _or_404(parse_digest, request.match_info["hex"])
        size = await self._nupkgs.blob_size(sha256, await self._named(request))
        if size is None:
            raise HttpRefusal(404, "not_found")
        pieces = metrics.counted(body_pieces(request, self._limits, size), metrics.RECEIVED)
        await self._nupkgs.take_blob(sha256, size, pieces)
        return json_answer(messages.BlobAnswer(size=size))

    async def _named(self, request: web.Request) -> Manifest:
        """The manifest that the query names. Raises `HttpRefusal`, `UnknownManifestError`."""
        try:
            return await self._manifest(ManifestId(parse_digest(request.query.get("manifest", ""))))
        except IdentityError as error:
            raise HttpRefusal(400, "bad_request") from error

    async def _manifest(self, id: ManifestId) -> Manifest:
        manifest = await self._transfer.catalog.manifest(id)
        if manifest is None:
            raise UnknownManifestError
        return manifest

    async def _stream(
        self, request: web.Request, pieces: AsyncGenerator[bytes, None], size: int, sha256: str
    ) -> web.StreamResponse:
        """A file under its digest. It is begun when its first piece is there, so that absence is told as a problem."""
        response = web.StreamResponse(
            headers={"Content-Type": messages.NUPKG_TYPE, "Cache-Control": IMMUTABLE, "ETag": f'"{sha256}"'}
        )
        response.content_length = size
        counted = metrics.counted(pieces, metrics.SENT)
        async with aclosing(pieces):
            try:
                piece = await anext(counted, b"")
            except ChunkMissing as error:
                raise HttpRefusal(404, "not_found") from error
            await response.prepare(request)
            await write_guarded(response, piece, self._limits)
            async for piece in counted:
                await write_guarded(response, piece, self._limits)
        await response.write_eof()
        return response


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


def _or_404(parse: Callable[[str], T], text: str) -> T:
    """A path that names nothing possible names nothing that is here."""
    try:
        return parse(text)
    except IdentityError as error:
        raise HttpRefusal(404, "not_found") from error
