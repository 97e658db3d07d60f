"""The only speaker of the /v1 protocol. Timeouts, retries and the translation of errors live here.

What comes back is parsed and bounded; chunks come back verified. Errors follow the roots of `relay.errors`:
the road (`UnreachableError`), the bytes (`UntrustedError`), or a rule of the relay (`RefusedError`).
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import SplitResult, urlsplit

import aiohttp
import msgspec
import stamina
from aiohttp.abc import AbstractResolver, ResolveResult

from relay.encoding.bundle import BundleDecoder, Event, NeedsBases, Tap
from relay.encoding.codecs import ENCODINGS
from relay.encoding.holdings import Holdings, answer, next_events
from relay.errors import (
    ConflictError,
    FrameError,
    ManifestError,
    NotFoundError,
    RefusedError,
    UnreachableError,
    UntrustedError,
    UsageError,
    WaystationError,
)
from relay.package import manifest as manifests
from relay.package.identity import ManifestId, NuGetVersion, PackageId, PackageRef, parse_digest
from relay.package.manifest import Manifest
from relay.package.ranges import Ranges, check, in_order
from relay.package.recipe import Recipe, encode_recipe, from_wire, parse_recipe, to_wire
from relay.protocol import messages
from relay.protocol.http_bytes import Traffic, chunk_bytes, header_bytes
from relay.protocol.packed_envelope import pack_envelope
from relay.support.incompressible import noise
from relay.support.json_bounds import JsonTooDeepError, check_depth

# Its default hooks import a metrics library and log; what is retried here is told by whoever gives up.
stamina.instrumentation.set_on_retry_hooks([])

T = TypeVar("T")

_LINE_MAX = 64 << 10
"""Bytes of one line of progress."""

_BASES_MAX = 64
"""Manifests that one request may name bases of."""

Payload = bytes | AsyncIterator[bytes]
"""What a request carries."""


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """How long a client bears with a relay. Seconds and bytes."""

    connect_seconds: float = 5.0
    answer_seconds: float = 60.0
    """From the request, or the last piece of an upload that was taken, to the head of the answer or the next piece."""
    window_seconds: float = 30.0
    """A body must bring `window_bytes` in every such stretch of time."""
    window_bytes: int = 30 << 10
    attempts: int = 3
    """Tries of a small request."""


class TokenRefusedError(RefusedError):
    """The relay does not take this token, or wants one."""


class MissingChunksError(ConflictError):
    """A publish came too early: these ranges are not at the relay yet."""

    def __init__(self, missing: Ranges) -> None:
        super().__init__("the relay still lacks chunks of this package")
        self.missing = missing


class UnknownPeerError(RefusedError):
    """The relay does not fetch from the other relay that it was told of."""


class NotExactError(NotFoundError):
    """The relay has the package, but neither its nupkg nor all that it takes to make the identical one."""

    def __init__(self, message: str, lacks: messages.ExactLacks) -> None:
        told = [
            "it has no recipe that gives it" if lacks.recipe else "",
            f"it lacks the encoder {', '.join(lacks.encoders)[:200]}" if lacks.encoders else "",
            f"it lacks {lacks.verbatim_bytes:,} bytes that no encoder makes" if lacks.verbatim_bytes else "",
            "chunks are damaged or gone there" if lacks.chunks else "",
        ]
        why = " and ".join(filter(None, told))
        super().__init__(
            f"{message}: {why}" if why else message,
            hint="Send them with 'waystation package replicate --exact', or give that relay a parent",
        )
        self.lacks = lacks


class LeaseLostError(RefusedError):
    """The relay does not know the lease (any more): offer again."""


class TooSlowError(UnreachableError):
    """The relay sends, but below the minimum rate."""


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


class RelayClient:
    """One relay. Use it as an async context manager; safe for many tasks at once."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        connect_to: str | None = None,
        limits: ClientLimits | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Talk to the relay at `url` (`http` or `https`, no path), as bearer of `token`.

        `connect_to` is an address to connect to in place of looking the host up; TLS and Host keep the name.

        Raises:
            UsageError: `url` is not such a URL.
        """
        parts = _split_url(url)
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.traffic = Traffic()
        self.limits = limits or ClientLimits()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._connect_to = connect_to
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    @property
    def name(self) -> str:
        """For people: which relay."""
        return self.url

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    # --- questions

    async def health(self, *, attempts: int | None = None) -> messages.HealthAnswer:
        """How it is; `attempts` in place of the limits' own. Raises `UnreachableError` while it drains, too."""
        return await self._json("GET", messages.HEALTH, messages.HealthAnswer, attempts=attempts)

    async def measure_up(self, size: int) -> float:
        """Send `size` bytes that do not compress; the seconds until the relay said that it has them. Not retried."""
        loop, patience = asyncio.get_running_loop(), asyncio.timeout(self.limits.answer_seconds)

        async def body() -> AsyncIterator[bytes]:
            for piece in noise(size):
                self.traffic.sent += len(piece)
                yield piece
                patience.reschedule(loop.time() + self.limits.answer_seconds)

        began = time.perf_counter()
        try:
            async with patience:
                answer = await self._json(
                    "PUT",
                    messages.LINE,
                    messages.LineAnswer,
                    data=body(),
                    content_type="application/octet-stream",
                    attempts=1,
                    answer_seconds=None,
                )
        except TimeoutError as error:
            raise UnreachableError(f"relay {self.url} takes no more of what it is sent") from error
        if answer.bytes != size:
            raise UntrustedError(f"{self.url} says that {answer.bytes} bytes came where {size} were sent")
        return time.perf_counter() - began

    async def measure_down(self, size: int) -> float:
        """Ask for `size` bytes that do not compress; the seconds until the last has come. Not retried."""
        began, received = time.perf_counter(), 0
        async with self._request("GET", messages.LINE, params={"bytes": str(size)}) as response:
            async for piece in self._pieces(response):
                received += len(piece)
        if received != size:
            raise UntrustedError(f"{self.url} sent {received} bytes where {size} were asked for")
        return time.perf_counter() - began

    async def wait_until_ready(self, patience: float) -> None:
        """Ask for health, with growing pauses, for at most `patience` seconds. Raises `UnreachableError`."""
        async for attempt in stamina.retry_context(
            on=UnreachableError, attempts=None, timeout=patience, wait_initial=0.2, wait_max=2.0
        ):
            with attempt:
                await self._json("GET", messages.HEALTH, messages.HealthAnswer, attempts=1)

    async def packages(self, id: PackageId | None = None) -> list[PackagePointer]:
        """What is published there, of one id or of all."""
        path = messages.PACKAGES if id is None else messages.PACKAGE_ID.format(id=id.key)
        answer = await self._json("GET", path, messages.PackagesAnswer)
        return [_pointer(entry) for entry in answer.packages]

    async def package(self, id: PackageId, version: NuGetVersion) -> PackagePointer:
        """One published package.

        Raises:
            NotFoundError: not published there.
        """
        path = messages.PACKAGE.format(id=id.key, version=version.url)
        try:
            return _pointer(await self._json("GET", path, messages.PackageAnswer))
        except NotFoundError:
            raise NotFoundError(f"{id} {version} is not at {self.url}") from None

    async def manifest(self, id: ManifestId, base: Manifest | None = None) -> ManifestDocument:
        """A manifest by its digest; with `base`, only what differs from it crosses the line.

        Raises:
            NotFoundError: not there.
            ManifestError: what came is not that manifest.
        """
        params = {"base": f"sha256:{base.id}"} if base else {}
        async with self._request("GET", messages.manifest_path(id), params=params) as response:
            body = await self._body(response, messages.DOCUMENT_MAX)
            used_base = base if response.headers.get("Waystation-Base") else None
        try:
            document = msgspec.msgpack.decode(body, type=messages.Document)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ManifestError(f"{self.url} answered with something that is no manifest document") from error
        manifest = await asyncio.to_thread(_open_manifest, document.manifest, used_base, id)
        return ManifestDocument(manifest, document.signature)

    # --- sending

    async def offer(
        self, manifest: Manifest, signature: bytes, base: Manifest | None = None, recipe: bytes = b""
    ) -> messages.OfferAnswer:
        """Hand the manifest over, unlisted; learn what is missing. Chunks that are there stay while the lease lives.

        `recipe` is how to make the nupkg again, as `Recipes.pack` gives it against `base`.
        """
        packed = await asyncio.to_thread(manifests.to_wire, manifest.canonical, base.canonical if base else None)
        document = messages.Document(
            packed, recipe=recipe, packed_signature=pack_envelope(signature, manifest) if signature else b""
        )
        answer = await self._json(
            "PUT",
            messages.manifest_path(manifest.id),
            messages.OfferAnswer,
            data=msgspec.msgpack.encode(document),
            content_type=messages.DOCUMENT_TYPE,
            params={"base": f"sha256:{base.id}"} if base else {},
        )
        check(answer.missing, len(manifest.chunks))
        return answer

    async def missing(self, want: Sequence[messages.ChunkRanges], lease: str | None = None) -> messages.MissingAnswer:
        """Which of the ranges are not there, and which manifests it does not keep; with a lease, the rest stays."""
        request = messages.MissingRequest(want=tuple(want), lease=lease)
        answer = await self._json("POST", messages.MISSING, messages.MissingAnswer, data=msgspec.json.encode(request))
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
        return await self._upload(
            messages.BUNDLE_IN, messages.BundleAnswer, body, messages.BUNDLE_TYPE, {"lease": lease}
        )

    async def _upload(
        self, path: str, answer: type[T], body: AsyncIterator[bytes], content_type: str, params: dict[str, str]
    ) -> T:
        """PUT a body that is made as it goes. Not retried. Raises what `body` raises, too."""
        own: list[WaystationError] = []
        loop, patience = asyncio.get_running_loop(), asyncio.timeout(self.limits.answer_seconds)

        async def counted() -> AsyncIterator[bytes]:
            try:
                async for piece in body:
                    self.traffic.sent += len(piece) + chunk_bytes(len(piece))
                    yield piece
                    patience.reschedule(loop.time() + self.limits.answer_seconds)
                self.traffic.sent += chunk_bytes(0)
            except WaystationError as error:
                # aiohttp tells of it as a broken connection; a damaged depot is no fault of the relay's.
                own.append(error)
                raise

        try:
            async with patience:
                return await self._json(
                    "PUT",
                    path,
                    answer,
                    data=counted(),
                    content_type=content_type,
                    params=params,
                    attempts=1,
                    answer_seconds=None,
                )
        except TimeoutError as error:
            raise UnreachableError(f"relay {self.url} takes no more of what it is sent") from error
        except UnreachableError:
            if own:
                raise own[0] from None
            raise

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
            await self._tell("PUT", path, body, {"Prefer": messages.PREFER_MINIMAL})
        except MissingChunksError as error:
            check(error.missing, len(manifest.chunks))
            raise

    async def replication(
        self, request: messages.ReplicationRequest
    ) -> AsyncGenerator[messages.ReplicationProgress, None]:
        """Have the relay fetch a package from another relay; how far it is, about every second, until it is `done` or
        `failed`. It goes on by itself when nobody listens any more; asking again joins it. Not retried here.

        Raises:
            UnknownPeerError: it does not fetch from there.
            UnreachableError: it is not there, went away, or said nothing for `answer_seconds`.
        """
        async with self._request("POST", messages.REPLICATIONS, data=msgspec.json.encode(request)) as response:
            async for line in self._lines(response):
                progress = self._decode(line, messages.ReplicationProgress)
                yield progress
                if progress.state in {"done", "failed"}:
                    return
            raise UnreachableError(f"relay {self.url} broke off in the middle of a replication")

    async def _lines(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The body line by line, as it comes: little is sent, so that no minimum rate is asked for."""
        buffer = bytearray()
        while True:
            async with asyncio.timeout(self.limits.answer_seconds):
                piece = await response.content.readany()
            if not piece:
                return
            self.traffic.received += len(piece)
            buffer += piece
            *whole, rest = buffer.split(b"\n")
            for line in whole:
                yield bytes(line)
            buffer = rest
            if len(buffer) > _LINE_MAX:
                raise UntrustedError(f"{self.url} answers with a line of more than {_LINE_MAX} bytes")

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
        what is known of this line, bytes per second of payload (0: nothing). `tap` is told of each run when it begins, in
        the decoder's thread.

        Raises:
            FrameError: the relay broke the format, or sent what was not asked for.
            UnreachableError: the road, or a relay below the minimum rate.
            StoreError: a base could not be read.
        """
        held = () if bases is None else bases.held[:_BASES_MAX]
        known = {one.manifest.id: one.manifest for one in held} | {manifest.id: manifest}
        asked = set(indexes)
        decoder = BundleDecoder(
            resolve=known.get,
            wanted=lambda id, index: id == manifest.id and index in asked,
            **({} if tap is None else {"tap": tap}),
        )
        request = messages.BundleRequest(
            want=(messages.ChunkRanges(manifest=manifest.id, ranges=in_order(indexes)),),
            encodings=ENCODINGS if held else ("raw", "zstd"),
            bases=tuple(messages.ChunkRanges(manifest=one.manifest.id, ranges=one.ranges) for one in held),
            goodput=min(float(round(goodput)), 1e12),
        )
        try:
            async with self._request("POST", messages.BUNDLE_OUT, data=msgspec.json.encode(request)) as response:
                if response.content_type != messages.BUNDLE_TYPE:
                    raise FrameError(f"{self.url} answered with {response.content_type[:60]!r} in place of a bundle")
                async for piece in self._pieces(response):
                    batches = decoder.feed(piece)
                    while events := await next_events(batches):
                        for event in events:
                            if isinstance(event, NeedsBases):
                                await answer(event, bases)
                            else:
                                yield event
            decoder.finish()
        finally:
            # Whoever hears of runs learns that one was cut off.
            decoder.abandon()

    async def recipe(self, manifest: Manifest) -> Recipe | None:
        """How to make the identical nupkg of `manifest`; None where the relay keeps none. It proves itself in a rebuild.

        Raises:
            RecipeError: what came is no recipe of this manifest.
        """
        path = messages.REBUILD.format(hex=manifest.nupkg.sha256)
        try:
            async with self._request("GET", path) as response:
                body = await self._body(response, messages.RECIPE_BODY_MAX)
        except NotFoundError:
            return None
        return await asyncio.to_thread(lambda: parse_recipe(from_wire(body), manifest))

    async def put_recipe(self, manifest: Manifest, recipe: Recipe) -> messages.RecipeAnswer:
        """Have the relay keep it, and learn what else it takes to make the identical nupkg there.

        Raises:
            NotFoundError: the relay does not keep the manifest.
        """
        body = await asyncio.to_thread(lambda: to_wire(encode_recipe(recipe)))
        return await self._json(
            "PUT",
            messages.REBUILD.format(hex=manifest.nupkg.sha256),
            messages.RecipeAnswer,
            data=body,
            content_type=messages.RECIPE_TYPE,
            params={"manifest": f"sha256:{manifest.id}"},
        )

    async def blob(self, sha256: str, manifest: Manifest) -> AsyncGenerator[bytes, None]:
        """A blob that the recipe of `manifest` names, or its nupkg. Not checked: compare its SHA-256.

        Raises:
            NotFoundError: not there.
        """
        path, params = messages.BLOB.format(hex=sha256), {"manifest": f"sha256:{manifest.id}"}
        async with self._request("GET", path, params=params) as response:
            async for piece in self._pieces(response):
                yield piece

    async def put_blob(self, sha256: str, manifest: Manifest, body: AsyncIterator[bytes]) -> None:
        """Upload a blob that the kept recipe of `manifest` names, or its nupkg. Not retried here.

        Raises:
            NotFoundError: the relay keeps no recipe that names it.
            WaystationError: whatever `body` raises.
        """
        params = {"manifest": f"sha256:{manifest.id}"}
        await self._upload(messages.BLOB.format(hex=sha256), messages.BlobAnswer, body, messages.NUPKG_TYPE, params)

    async def nupkg(self, package: PackageRef) -> AsyncGenerator[bytes, None]:
        """The identical nupkg, made there if need be. Not checked here: compare its SHA-512.

        Raises:
            NotFoundError: no such package; `NotExactError`: its identical nupkg cannot be had there.
        """
        path = messages.NUPKG.format(id=package.id.key, version=package.version.url)
        async with self._request("GET", path, answer_seconds=messages.NUPKG_SECONDS) as response:
            async for piece in self._pieces(response):
                yield piece

    # --- mail

    async def post_orders(self, orders: Sequence[messages.OrderLetter]) -> messages.TakenAnswer:
        """Hand over signed orders, any number of them; they are durable there on return. Posting again is harmless.

        Raises:
            ConflictError: the relay holds another letter under one of these operations. Nothing of the request with
                that order was taken; orders before it may have been, where there were more than fit into one request.
        """
        answers = [
            await self._post_letters(messages.ORDERS, messages.OrdersRequest(orders=part))
            for part in _requests_of(orders)
        ]
        return messages.TakenAnswer(
            taken=sum(answer.taken for answer in answers), known=sum(answer.known for answer in answers)
        )

    async def poll(self, name: str, request: messages.PollRequest) -> messages.PollAnswer:
        """As the agent `name`: be there, and wait for orders. Not retried here: the next poll is the next try."""
        return await self._json(
            "POST",
            messages.POLL.format(name=name),
            messages.PollAnswer,
            data=msgspec.json.encode(request),
            attempts=1,
            answer_seconds=request.wait + self.limits.answer_seconds,
        )

    async def agents(self) -> tuple[messages.AgentSeen, ...]:
        """Who polls there, or did within a day."""
        return (
            await self._json("GET", messages.AGENTS, messages.AgentsAnswer, answer_max=messages.AGENTS_BODY_MAX)
        ).agents

    async def post_reports(self, name: str, request: messages.ReportsRequest) -> messages.TakenAnswer:
        """As the agent `name`. Durable there on return; posting again is harmless.

        Raises:
            ConflictError: the relay holds another report of this agent under one of these operations and numbers;
                nothing of this request was taken.
        """
        return await self._post_letters(messages.REPORTS_IN.format(name=name), request)

    async def post_logs(self, name: str, request: messages.LogsRequest) -> messages.TakenAnswer:
        """As `post_reports`, for output. Pieces of other lengths at the same offset do not contradict each other."""
        return await self._post_letters(messages.LOGS_IN.format(name=name), request)

    async def reports(
        self, deployment: str, after: messages.Cursor | None = None, wait: float = messages.POLL_SECONDS
    ) -> messages.ReportsAnswer:
        """Reports of a deployment after the cursor, oldest first; none when `wait` seconds brought none. Not retried."""
        return await self._read_letters(messages.REPORTS_OUT, messages.ReportsAnswer, deployment, after, wait)

    async def logs(
        self, deployment: str, after: messages.Cursor | None = None, wait: float = messages.POLL_SECONDS
    ) -> messages.LogsAnswer:
        """As `reports`, for output."""
        return await self._read_letters(messages.LOGS_OUT, messages.LogsAnswer, deployment, after, wait)

    async def _post_letters(
        self, path: str, request: messages.OrdersRequest | messages.ReportsRequest | messages.LogsRequest
    ) -> messages.TakenAnswer:
        try:
            return await self._json("POST", path, messages.TakenAnswer, data=msgspec.json.encode(request))
        except ConflictError:
            raise ConflictError(
                f"relay {self.url} holds another letter of the same operation; nothing of this request was taken"
            ) from None

    async def _read_letters(
        self, path: str, answer: type[T], deployment: str, after: messages.Cursor | None, wait: float
    ) -> T:
        cursor = {} if after is None else {"epoch": after.epoch, "after": str(after.number)}
        return await self._json(
            "GET",
            path,
            answer,
            params={"deployment": deployment, "wait": str(wait), **cursor},
            attempts=1,
            answer_seconds=wait + self.limits.answer_seconds,
        )

    # --- the ground

    async def _json(
        self,
        method: str,
        path: str,
        answer: type[T],
        *,
        data: Payload | None = None,
        content_type: str = messages.JSON,
        params: dict[str, str] | None = None,
        attempts: int | None = None,
        answer_seconds: float | None = 0.0,
        answer_max: int | None = None,
    ) -> T:
        async for attempt in stamina.retry_context(
            on=_may_help, attempts=attempts or self.limits.attempts, timeout=None, wait_initial=0.1, wait_max=2.0
        ):
            with attempt:
                async with self._request(
                    method, path, data=data, content_type=content_type, params=params, answer_seconds=answer_seconds
                ) as response:
                    body = await self._body(response, answer_max or messages.JSON_MAX)
                    return self._decode(body, answer)
        raise AssertionError("unreachable")  # pragma: no cover - the last attempt returns or raises

    async def _tell(self, method: str, path: str, data: bytes, headers: dict[str, str]) -> None:
        """As `_json`, where nothing that is answered matters but that it was."""
        async for attempt in stamina.retry_context(
            on=_may_help, attempts=self.limits.attempts, timeout=None, wait_initial=0.1, wait_max=2.0
        ):
            with attempt:
                async with self._request(method, path, data=data, headers=headers) as response:
                    await self._body(response, messages.JSON_MAX)

    def _decode(self, body: bytes, answer: type[T]) -> T:
        try:
            check_depth(body, messages.JSON_DEPTH)
            return msgspec.json.decode(body, type=answer)
        except (msgspec.DecodeError, JsonTooDeepError, UnicodeDecodeError) as error:
            raise UntrustedError(f"{self.url} answered with something that is not the protocol's") from error

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        *,
        data: Payload | None = None,
        content_type: str = messages.JSON,
        params: dict[str, str] | None = None,
        answer_seconds: float | None = 0.0,
        headers: dict[str, str] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        session = self._open_session()
        headers = ({"Content-Type": content_type} if data is not None else {}) | (headers or {})
        if isinstance(data, bytes):
            self.traffic.sent += len(data)
        wait = self.limits.answer_seconds if answer_seconds == 0.0 else answer_seconds
        try:
            async with asyncio.timeout(wait) as deadline:
                async with session.request(
                    method, path, data=data, headers=headers, params=params, allow_redirects=False
                ) as response:
                    deadline.reschedule(None)
                    self._count_heads(method, response)
                    if response.status >= 300:
                        await self._raise_problem(response)
                    yield response
        except aiohttp.ClientConnectorCertificateError as error:
            raise UntrustedError(
                f"relay {self.url} shows a certificate that is not trusted: {_verdict(error.certificate_error)}",
                hint="Name the authority that signs it with --ca-file, or with ca_file in agent.yaml",
            ) from error
        except aiohttp.ServerDisconnectedError as error:
            hint = "If it speaks TLS, its URL begins with https" if self.url.startswith("http:") else ""
            raise UnreachableError(f"relay {self.url} closed the connection without an answer", hint=hint) from error
        except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError, ConnectionError, socket.gaierror) as error:
            raise UnreachableError(f"relay {self.url} cannot be reached: {_reason(error)}") from error
        except TimeoutError as error:
            raise UnreachableError(f"relay {self.url} did not answer in time") from error
        except aiohttp.ClientError as error:
            raise UntrustedError(f"relay {self.url} does not speak the protocol: {_reason(error)}") from error

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            resolver = _FixedResolver(self._connect_to) if self._connect_to else None
            connector = aiohttp.TCPConnector(
                resolver=resolver, limit=64, ssl=self._tls or True, keepalive_timeout=10.0, ttl_dns_cache=10
            )
            self._session = aiohttp.ClientSession(
                base_url=self.url,
                connector=connector,
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.limits.connect_seconds),
                auto_decompress=False,
                read_bufsize=512 << 10,
                trust_env=True,
                skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept"),
            )
        return self._session

    def _count_heads(self, method: str, response: aiohttp.ClientResponse) -> None:
        sent = ((k.encode(), v.encode()) for k, v in response.request_info.headers.items())
        target = response.request_info.url.raw_path_qs
        self.traffic.sent += header_bytes(f"{method} {target} HTTP/1.1", sent)
        self.traffic.received += header_bytes(f"HTTP/1.1 {response.status} {response.reason}", response.raw_headers)

    async def _pieces(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        # Only time spent waiting for the relay counts: a slow disk on our side is no fault of its.
        waited, in_window = 0.0, 0
        while True:
            asked = time.monotonic()
            try:
                async with asyncio.timeout(self.limits.window_seconds - waited):
                    piece = await response.content.readany()
            except TimeoutError:
                waited = self.limits.window_seconds
            else:
                if not piece:
                    return
                waited += time.monotonic() - asked
                in_window += len(piece)
                self.traffic.received += len(piece)
                yield piece
            if waited >= self.limits.window_seconds:
                if in_window < self.limits.window_bytes:
                    raise TooSlowError(f"relay {self.url} sends too slowly: {in_window} bytes in {waited:.0f} s")
                waited, in_window = 0.0, 0

    async def _body(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        collected = bytearray()
        async for piece in self._pieces(response):
            collected += piece
            if len(collected) > limit:
                raise UntrustedError(f"{self.url} answers with more than {limit} bytes")
        return bytes(collected)

    async def _raise_problem(self, response: aiohttp.ClientResponse) -> None:
        problem = _parse_problem(await self._body(response, 1 << 20))
        code, status = problem.code, response.status
        where = f"relay {self.url}"
        if code == "unknown_peer":
            raise UnknownPeerError(
                f"{where} may not fetch from there", hint="Name the other relay under peers: in its relay.yaml"
            )
        if status in (401, 403):
            raise TokenRefusedError(
                f"{where} refuses this token" if status == 403 else f"{where} wants a token",
                hint="Give one of the right scope with --token-file or WAYSTATION_TOKEN",
            )
        if code == "not_exact":
            raise NotExactError(f"{where} cannot give the identical nupkg", problem.lacks or messages.ExactLacks())
        if status == 404 and code == "unknown_lease":
            raise LeaseLostError(f"{where} does not know the lease")
        if status == 404:
            raise NotFoundError(f"not at {where}")
        if status == 409 and problem.missing:
            raise MissingChunksError(problem.missing)
        if status == 409:
            raise ConflictError(f"{where} holds other bytes under this id and version; nothing was changed")
        if status in (408, 429) or status >= 500:
            retry_after = _retry_after(response.headers.get("Retry-After"))
            trouble = "has no space left" if status == 507 else "cannot serve now"
            raise UnreachableError(f"{where} {trouble} ({status} {code})", retry_after=retry_after)
        raise RefusedError(f"{where} refuses the request ({status} {code})")


def _requests_of(orders: Sequence[messages.OrderLetter]) -> Iterator[tuple[messages.OrderLetter, ...]]:
    """`orders` in their order, in as many requests as they need."""
    part: list[messages.OrderLetter] = []
    size = 0
    for order in orders:
        if part and (len(part) == messages.LETTERS_MAX or size + len(order.envelope) > messages.LETTERS_BYTES_MAX):
            yield tuple(part)
            part, size = [], 0
        part.append(order)
        size += len(order.envelope)
    if part:
        yield tuple(part)


def _split_url(url: str) -> SplitResult:
    """Raises `UsageError`, which never shows credentials."""
    try:
        parts = urlsplit(url)
        plain = parts.scheme in {"http", "https"} and parts.hostname and parts.path in {"", "/"} and parts.port != 0
    except ValueError:
        plain = False
    if "@" in url:
        raise UsageError("a relay's URL carries no credentials", hint="Give the token by file or environment")
    if not plain or parts.query or parts.fragment:
        raise UsageError(f"{url!r} is not a relay's URL", hint="Expected for example https://relay.example:7443")
    return parts


class _FixedResolver(AbstractResolver):
    """Answers every question with the one address that the configured resolver gave."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_INET,  # noqa: ARG002 - aiohttp's signature
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=self._address,
                port=port,
                family=socket.AF_INET6 if ":" in self._address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
        ]

    async def close(self) -> None:
        return


def _open_manifest(data: bytes, base: Manifest | None, id: ManifestId) -> Manifest:
    return manifests.parse_named(manifests.from_wire(data, base.canonical if base else None), id)


def _may_help(error: Exception) -> bool | float:
    """Whether, and after how many seconds, the same request may succeed."""
    if not isinstance(error, UnreachableError):
        return False
    return min(error.retry_after, 30.0) if error.retry_after else True


def _parse_problem(body: bytes) -> messages.ProblemAnswer:
    try:
        return msgspec.json.decode(body, type=messages.ProblemAnswer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return messages.ProblemAnswer()


def _retry_after(text: str | None) -> float | None:
    try:
        return None if text is None else max(0.0, min(float(text), 3600.0))
    except ValueError:
        return None


def _reason(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ssl.SSLError):
        # Its errno is the TLS library's own, which the system would name "Operation not permitted".
        return f"it does not answer in TLS ({error.os_error.reason or error.os_error})"
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno:
        failed = error.os_error
        # A name that cannot be looked up has no errno of the system's, but words of its own.
        return (failed.strerror if isinstance(failed, socket.gaierror) else os.strerror(failed.errno or 0)) or str(
            error
        )
    return str(error) or type(error).__name__


def _verdict(error: Exception) -> str:
    """What is wrong with a certificate, without the library's own framing."""
    return str(getattr(error, "verify_message", "")) or str(error)


def _pointer(answer: messages.PackageAnswer) -> PackagePointer:
    package = PackageRef(PackageId.parse(answer.id), NuGetVersion.parse(answer.version))
    return PackagePointer(package, ManifestId(parse_digest(answer.manifest)), answer.signature, answer.size)


def tls_from(ca_file: str | None) -> ssl.SSLContext | None:
    """How to trust a relay's certificate: by the authorities in `ca_file` (PEM), or None for the system's.

    Raises:
        UsageError: the file cannot be used.
    """
    if ca_file is None:
        return None
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"CA file {ca_file!r} cannot be used: {error}") from error


def token_from(file: str | None, environment: Callable[[str], str | None] = os.environ.get) -> str | None:
    """The bearer token: from `--token-file`, else from WAYSTATION_TOKEN, else none.

    Raises:
        UsageError: the file cannot be read or is empty.
    """
    if file is None:
        return (environment("WAYSTATION_TOKEN") or "").strip() or None
    try:
        with open(file, encoding="utf-8") as handle:
            token = handle.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"token file {file!r} cannot be read: {error}") from error
    if not token:
        raise UsageError(f"token file {file!r} is empty")
    return token
