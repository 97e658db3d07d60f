"""What packages need of a relay: what is there, offers, bundles in and out, the identical nupkg, and how fast the line is.

Chunks come back verified. How requests travel, and which errors they raise, is `connection.py`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass

import msgspec

from relay.encoding.bundle import BundleDecoder, Event, NeedsBases, Tap
from relay.encoding.choose_bases import Held
from relay.encoding.codecs import ENCODINGS
from relay.encoding.holdings import Holdings, answer, next_events
from relay.errors import FrameError, ManifestError, NotFoundError, UnreachableError, UntrustedError
from relay.package.identity import ManifestId, NuGetVersion, PackageId, PackageRef, parse_digest
from relay.package.manifest import Manifest, parse_wire, to_wire
from relay.package.ranges import check, in_order
from relay.package.ranges import indexes as indexes_of
from relay.package.recipe import Recipe, encode_recipe, parse_recipe_wire
from relay.protocol import messages
from relay.protocol.connection import Connection, MissingChunksError, Request
from relay.protocol.packed_envelope import pack_envelope
from relay.support.incompressible import noise_pieces
from relay.support.persistence import Persistence

_UNTIL_READY = Persistence(first_pause=0.2, longest_pause=2.0, spread=0.5)
_BASES_MAX = 64
"""Manifests that one request may name bases of."""


@dataclass(frozen=True, slots=True)
class PackagePointer:
    """Where an id and version point to at a relay, with the envelope that says so (empty: none)."""

    package: PackageRef
    manifest: ManifestId
    signature: bytes
    size: int
    """Bytes of the nupkg."""


@dataclass(frozen=True, slots=True)
class ManifestDocument:
    """A manifest that has the digest it was asked by, with its envelope (empty: none)."""

    manifest: Manifest
    signature: bytes


class RelayClient(Connection):
    """One relay, for what concerns packages."""

    @property
    def name(self) -> str:
        """For people: which relay."""
        return self.url

    # --- the relay and its line

    async def health(self, *, attempts: int = 0, scope: str = "") -> messages.HealthAnswer:
        """How it is; `attempts` in place of the limits' own. Raises `UnreachableError` while it drains, too.

        Raises:
            TokenRefusedError: it does not let us do what takes `scope`.
        """
        request = Request("GET", messages.HEALTH, attempts=attempts, params={"scope": scope} if scope else {})
        return await self.ask(request, messages.HealthAnswer)

    async def wait_until_ready(self, patience: float) -> None:
        """Ask for health, with growing pauses, until it was away for `patience` seconds, those included in which a
        request waited for it before.

        Raises:
            UnreachableError: it was away for so long.
        """
        # What is left of it, and one try in any case.
        left = max(patience - (time.monotonic() - self.waiting_since), 0.01)
        try:
            async with asyncio.timeout(max(left, 1.0)):
                await _UNTIL_READY.call(lambda: self.health(attempts=1), seconds=left)
        except TimeoutError as error:
            raise UnreachableError(f"relay {self.url} was away for {patience:.0f} s") from error

    async def measure_up(self, size: int) -> float:
        """Send `size` bytes that do not compress; the seconds until the relay said that it has them. Not retried."""
        began = time.perf_counter()
        request = Request("PUT", messages.LINE, content_type="application/octet-stream")
        answer = await self.upload(request, noise_pieces(size), messages.LineAnswer)
        if answer.bytes != size:
            raise UntrustedError(f"{self.url} says that {answer.bytes} bytes came where {size} were sent")
        return time.perf_counter() - began

    async def measure_down(self, size: int) -> float:
        """Ask for `size` bytes that do not compress; the seconds until the last has come. Not retried."""
        began, received = time.perf_counter(), 0
        async with self.open(Request("GET", messages.LINE, params={"bytes": str(size)})) as response:
            async for piece in self.pieces(response):
                received += len(piece)
        if received != size:
            raise UntrustedError(f"{self.url} sent {received} bytes where {size} were asked for")
        return time.perf_counter() - began

    # --- what is there

    async def packages(self, id: PackageId | None = None) -> list[PackagePointer]:
        """What is published there, of one id or of all."""
        path = messages.PACKAGES if id is None else messages.PACKAGE_ID.format(id=id.key)
        answer = await self.ask(Request("GET", path), messages.PackagesAnswer)
        return [_pointer(entry) for entry in answer.packages]

    async def package(self, id: PackageId, version: NuGetVersion) -> PackagePointer:
        """One published package.

        Raises:
            NotFoundError: not published there.
        """
        path = messages.PACKAGE.format(id=id.key, version=version.url)
        try:
            return _pointer(await self.ask(Request("GET", path), messages.PackageAnswer))
        except NotFoundError:
            raise NotFoundError(f"{id} {version} is not at {self.url}") from None

    async def manifest(self, id: ManifestId, base: Manifest | None = None) -> ManifestDocument:
        """A manifest by its digest; with `base`, only what differs from it crosses the line.

        Raises:
            NotFoundError: not there.
            ManifestError: what came is not that manifest.
        """
        async with self.open(Request("GET", messages.manifest_path(id), params=_against(base))) as response:
            body = await self.body(response, messages.DOCUMENT_MAX)
            used_base = base if response.headers.get("Waystation-Base") else None
        try:
            document = msgspec.msgpack.decode(body, type=messages.Document)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ManifestError(f"{self.url} answered with something that is no manifest document") from error
        prefix = used_base.canonical if used_base else None
        with self.reading():
            manifest = await asyncio.to_thread(parse_wire, document.manifest, prefix, id)
        return ManifestDocument(manifest, document.signature)

    # --- sending

    async def offer(
        self, manifest: Manifest, signature: bytes, base: Manifest | None = None, recipe: bytes = b""
    ) -> messages.OfferAnswer:
        """Hand the manifest over, unlisted; learn what is missing. Chunks that are there stay while the lease lives.

        `recipe` is how to make the nupkg again, as `Recipes.pack` gives it against `base`.
        """
        packed = await asyncio.to_thread(to_wire, manifest.canonical, base.canonical if base else None)
        document = messages.Document(
            packed, recipe=recipe, packed_signature=pack_envelope(signature, manifest) if signature else b""
        )
        request = Request(
            "PUT",
            messages.manifest_path(manifest.id),
            msgspec.msgpack.encode(document),
            content_type=messages.DOCUMENT_TYPE,
            params=_against(base),
        )
        answer = await self.ask(request, messages.OfferAnswer)
        check(answer.missing, len(manifest.chunks))
        return answer

    async def missing(self, want: Sequence[messages.ChunkRanges], lease: str | None = None) -> messages.MissingAnswer:
        """Which of the ranges are not there, and which manifests it does not keep; with a lease, the rest stays."""
        body = msgspec.json.encode(messages.MissingRequest(want=tuple(want), lease=lease))
        answer = await self.ask(Request("POST", messages.MISSING, body), messages.MissingAnswer)
        last = {each.manifest: max((stop for _, stop in each.ranges), default=0) for each in want}
        for each in answer.missing:
            check(each.ranges, last.get(each.manifest, 0))
        return answer

    async def put_bundle(self, lease: str, body: AsyncIterator[bytes]) -> messages.BundleAnswer:
        """Upload one bundle. Not retried here: ask what is missing, and send that.

        Raises:
            LeaseLostError: offer again first.
            WaystationError: whatever `body` raises.
        """
        request = Request("PUT", messages.BUNDLE_IN, content_type=messages.BUNDLE_TYPE, params={"lease": lease})
        return await self.upload(request, body, messages.BundleAnswer)

    async def publish(self, manifest: Manifest) -> None:
        """Make the package visible, now that all its chunks are there.

        Raises:
            MissingChunksError: some are not.
            ConflictError: the id and version stand for another nupkg there.
        """
        ref = manifest.package
        path = messages.PACKAGE.format(id=ref.id.key, version=ref.version.url)
        body = msgspec.json.encode(messages.PublishRequest(manifest=manifest.id))
        try:
            await self.fetch(Request("PUT", path, body, headers={"Prefer": messages.PREFER_MINIMAL}))
        except MissingChunksError as error:
            check(error.missing, len(manifest.chunks))
            raise

    async def replication(
        self, request: messages.ReplicationRequest
    ) -> AsyncGenerator[messages.ReplicationProgress, None]:
        """Have the relay fetch a package from another relay; how far it is, about every second, until it is `done` or
        `failed`. It goes on without a listener; asking again joins it. Not retried here.

        Raises:
            UnknownPeerError: it does not fetch from there.
            UnreachableError: it is not there, went away, or said nothing for `answer_seconds`.
        """
        async with self.open(Request("POST", messages.REPLICATIONS, msgspec.json.encode(request))) as response:
            async for line in self.lines(response):
                progress = self.parse(line, messages.ReplicationProgress)
                yield progress
                if progress.state in {"done", "failed"}:
                    return
            raise UnreachableError(f"relay {self.url} broke off in the middle of a replication")

    # --- receiving

    async def stream(
        self,
        manifest: Manifest,
        indexes: Sequence[int],
        *,
        bases: Holdings | None = None,
        goodput: float = 0.0,
        tap: Tap | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Chunks of `manifest`, about in this order, verified, as they come. Closing the iterator ends the request.

        With `bases`, the relay may send differences from them: they are loaded and given to the decoder here. `goodput` is
        what is known of this line, bytes per second of payload (0: nothing). `tap` hears of each run when it begins, in
        the decoder's thread.

        Raises:
            FrameError: the relay broke the format, or sent what was not asked for.
            UnreachableError: the road, or a relay below the minimum rate.
            StoreError: a base could not be read.
        """
        held = () if bases is None else bases.held[:_BASES_MAX]
        known = {one.manifest.id: one.manifest for one in held} | {manifest.id: manifest}
        asked, offered = set(indexes), _places_of(held)
        decoder = BundleDecoder(
            resolve=known.get,
            wanted=lambda id, index: id == manifest.id and index in asked,
            offered=lambda id, index: index in offered.get(id, ()),
            **({} if tap is None else {"tap": tap}),
        )
        request = messages.BundleRequest(
            want=(messages.ChunkRanges(manifest=manifest.id, ranges=in_order(indexes)),),
            encodings=ENCODINGS if held else ("raw", "zstd"),
            bases=tuple(messages.ChunkRanges(manifest=one.manifest.id, ranges=one.ranges) for one in held),
            goodput=min(float(round(goodput)), 1e12),
        )
        try:
            async with self.open(Request("POST", messages.BUNDLE_OUT, msgspec.json.encode(request))) as response:
                if response.content_type != messages.BUNDLE_TYPE:
                    raise FrameError(f"{self.url} answered with {response.content_type[:60]!r} in place of a bundle")
                async for piece in self.pieces(response):
                    batches = decoder.feed(piece)
                    while events := await next_events(batches):
                        for event in events:
                            if isinstance(event, NeedsBases):
                                await answer(event, bases)
                            else:
                                yield event
            decoder.finish()
        finally:
            # The tap learns that a run was cut off.
            decoder.abandon()

    async def recipe(self, manifest: Manifest) -> Recipe | None:
        """How to make the identical nupkg of `manifest`; None where the relay keeps none. It proves itself in a rebuild.

        Raises:
            RecipeError: what came is no recipe of this manifest.
        """
        path = messages.REBUILD.format(hex=manifest.nupkg.sha256)
        try:
            body = await self.fetch(Request("GET", path, answer_max=messages.RECIPE_BODY_MAX, attempts=1))
        except NotFoundError:
            return None
        with self.reading():
            return await asyncio.to_thread(parse_recipe_wire, body, None, manifest)

    async def put_recipe(self, manifest: Manifest, recipe: Recipe) -> messages.RecipeAnswer:
        """Have the relay keep it, and learn what else it takes to make the identical nupkg there.

        Raises:
            NotFoundError: the relay does not keep the manifest.
        """
        body = await asyncio.to_thread(to_wire, encode_recipe(recipe))
        path = messages.REBUILD.format(hex=manifest.nupkg.sha256)
        request = Request("PUT", path, body, content_type=messages.RECIPE_TYPE, params=_of(manifest))
        return await self.ask(request, messages.RecipeAnswer)

    async def blob(self, sha256: str, manifest: Manifest) -> AsyncGenerator[bytes, None]:
        """A blob that the recipe of `manifest` names, or its nupkg. Not checked: compare its SHA-256.

        Raises:
            NotFoundError: not there.
        """
        async with self.open(Request("GET", messages.BLOB.format(hex=sha256), params=_of(manifest))) as response:
            async for piece in self.pieces(response):
                yield piece

    async def put_blob(self, sha256: str, manifest: Manifest, body: AsyncIterator[bytes]) -> None:
        """Upload a blob that the kept recipe of `manifest` names, or its nupkg. Not retried here.

        Raises:
            NotFoundError: the relay keeps no recipe that names it.
            WaystationError: whatever `body` raises.
        """
        path = messages.BLOB.format(hex=sha256)
        request = Request("PUT", path, content_type=messages.NUPKG_TYPE, params=_of(manifest))
        await self.upload(request, body, messages.BlobAnswer)

    async def nupkg(self, package: PackageRef) -> AsyncGenerator[bytes, None]:
        """The identical nupkg, made there if need be. Not checked here: compare its SHA-512.

        Raises:
            NotFoundError: no such package; `NotExactError`: its identical nupkg cannot be had there.
        """
        path = messages.NUPKG.format(id=package.id.key, version=package.version.url)
        async with self.open(Request("GET", path, answer_seconds=messages.NUPKG_SECONDS)) as response:
            async for piece in self.pieces(response):
                yield piece


def _places_of(held: Sequence[Held]) -> dict[ManifestId, set[int]]:
    """What was offered as bases: the relay may name no other, though it knows that there are more."""
    return {one.manifest.id: set(indexes_of(one.ranges)) for one in held}


def _against(base: Manifest | None) -> dict[str, str]:
    return {"base": f"sha256:{base.id}"} if base else {}


def _of(manifest: Manifest) -> dict[str, str]:
    return {"manifest": f"sha256:{manifest.id}"}


def _pointer(answer: messages.PackageAnswer) -> PackagePointer:
    package = PackageRef(PackageId.parse(answer.id), NuGetVersion.parse(answer.version))
    return PackagePointer(package, ManifestId(parse_digest(answer.manifest)), answer.signature, answer.size)
