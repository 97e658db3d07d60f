"""The relay as a whole: routes to handlers, handlers to `Transfer`. Composition stands here, decisions elsewhere."""

from __future__ import annotations

import asyncio
import re
import signal
import ssl
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import fields, replace
from typing import TypeVar

import msgspec
from aiohttp import web

from relay.config import RelayConfig, split_listen
from relay.errors import IdentityError, UntrustedError, UsageError
from relay.mail.import_documents import import_documents
from relay.mail.mailbox import Mail
from relay.package.identity import ChunkId, ManifestId, NuGetVersion, PackageId, PackageRef, parse_digest
from relay.package.ranges import count
from relay.protocol import messages
from relay.rebuild.nupkgs import Nupkgs
from relay.server import metrics
from relay.server.http.access import DRAINING, OPEN, Access, add, guarded_app
from relay.server.http.bodies import body_pieces, budget_of, json_answer, read_body, read_json, write_guarded
from relay.server.http.connection import Limits
from relay.server.http.listen import Running, raise_open_files, start_guarded
from relay.server.http.problems import HttpRefusal, problem
from relay.server.http.tokens import parse_tokens
from relay.server.line_routes import LineRoutes
from relay.server.mail_routes import MailRoutes, mail_limits_of
from relay.server.nupkg_routes import RebuildRoutes, engines_of, parent_of
from relay.server.packages import ChunksMissingError, Transfer
from relay.server.peers import Peers
from relay.server.replications import Replications
from relay.stores.catalog import Pointer
from relay.stores.open import Store, open_store
from relay.support.malloc import tame_malloc
from relay.transfer.cpu_rates import measure_rates

T = TypeVar("T")

_IMMUTABLE = "public, max-age=31536000, immutable"
_BUNDLE_MEMORY = 24 << 20
"""Bytes that one incoming bundle may hold: a zstd window, verified chunks that wait to be written, a batch under way."""
_LEASE = re.compile(r"[0-9a-f]{32}", re.ASCII)


class RelayApp:
    """The handlers of /v1 over one `Transfer`, and one `Mail` where the relay keeps mail."""

    def __init__(
        self,
        transfer: Transfer,
        config: RelayConfig,
        limits: Limits,
        rates: messages.CpuRates | None,
        mail: Mail | None = None,
        replications: Replications | None = None,
        nupkgs: Nupkgs | None = None,
    ) -> None:
        self._transfer = transfer
        self._mail = None if mail is None else MailRoutes(mail, limits)
        self._replications = replications
        self._rebuilds = None if nupkgs is None else RebuildRoutes(transfer, nupkgs, limits)
        self._config = config
        self._limits = limits
        self._rates = rates

    def build(self) -> web.Application:
        """The application, every route with the scope that it asks for."""
        app = guarded_app(Access(parse_tokens(self._config.tokens)))
        add(app, "GET", messages.HEALTH, self.health, OPEN)
        add(app, "GET", messages.METRICS, metrics.answer, "read")
        add(app, "PUT", messages.MANIFEST, self.offer, "write")
        add(app, "GET", messages.MANIFEST, self.manifest, "read")
        add(app, "POST", messages.MISSING, self.missing, "write")
        add(app, "PUT", messages.BUNDLE_IN, self.take_bundle, "write")
        add(app, "POST", messages.BUNDLE_OUT, self.give_bundle, "read")
        add(app, "GET", messages.PACKAGES, self.packages, "read")
        add(app, "GET", messages.PACKAGE_ID, self.packages, "read")
        add(app, "GET", messages.PACKAGE, self.package, "read")
        add(app, "PUT", messages.PACKAGE, self.publish, "write")
        add(app, "GET", messages.CHUNK, self.chunk, "read")
        LineRoutes(self._limits).add_to(app)
        if self._mail is not None:
            self._mail.add_to(app)
        if self._replications is not None:
            self._replications.add_to(app)
        if self._rebuilds is not None:
            self._rebuilds.add_to(app)
        return app

    async def health(self, request: web.Request) -> web.StreamResponse:
        draining = request.app[DRAINING].is_set()
        read_only = self._transfer.closed_to_writes()
        answer = messages.HealthAnswer(
            status="draining" if draining else "read-only" if read_only else "ok",
            versions=(messages.VERSION,),
            time=time.time(),
            site=self._config.site,
            reason="this relay is about to stop" if draining else read_only,
            cpu=self._rates,
        )
        return json_answer(answer, status=503 if draining else 200)

    # --- taking

    async def offer(self, request: web.Request) -> web.StreamResponse:
        if request.content_type != messages.DOCUMENT_TYPE:
            raise HttpRefusal(415, "media_type")
        body = await read_body(request, self._limits, messages.DOCUMENT_MAX)
        try:
            document = msgspec.msgpack.decode(body, type=messages.Document)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UntrustedError(f"not a manifest document: {error}") from error
        if len(document.signature) > messages.SIGNATURE_MAX:
            raise HttpRefusal(413, "too_large")
        return json_answer(await self._transfer.offer(_manifest_id(request), document, _base(request)))

    async def missing(self, request: web.Request) -> web.StreamResponse:
        return json_answer(
            await self._transfer.missing(await read_json(request, self._limits, messages.MissingRequest))
        )

    async def take_bundle(self, request: web.Request) -> web.StreamResponse:
        if request.content_type != messages.BUNDLE_TYPE:
            raise HttpRefusal(415, "media_type")
        lease = request.query.get("lease", "")
        if not _LEASE.fullmatch(lease):
            raise HttpRefusal(404, "unknown_lease")
        pieces = metrics.counted(body_pieces(request, self._limits, messages.BUNDLE_BODY_MAX), metrics.RECEIVED)
        with budget_of(request, self._limits).place() as place:
            place.take(_BUNDLE_MEMORY)
            answer = await self._transfer.take_bundle(lease, pieces)
        metrics.CHUNKS.labels("stored").inc(answer.stored)
        metrics.CHUNKS.labels("held").inc(answer.held)
        metrics.CHUNKS.labels("refused").inc(sum(count(run.ranges) for run in answer.refused))
        return json_answer(answer)

    async def publish(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request, self._limits, messages.PublishRequest)
        try:
            pointer = await self._transfer.publish(_package_ref(request), body)
        except ChunksMissingError as error:
            return problem(409, "missing_chunks", extra={"missing": error.missing}, cause=error)
        if request.headers.get("Prefer") == messages.PREFER_MINIMAL:
            # Who publishes brought all that the answer would say, perhaps over a thin line.
            return web.Response(status=204)
        return json_answer(await self._package_answer(pointer))

    # --- giving

    async def packages(self, request: web.Request) -> web.StreamResponse:
        """From the store, not from the cache: another process may have added to it (`package add` into a depot)."""
        text = request.match_info.get("id")
        id = None if text is None else _or_404(PackageId.parse, text)
        found = await self._transfer.catalog.look_up_all(id)
        return json_answer(messages.PackagesAnswer(tuple([await self._package_answer(pointer) for pointer in found])))

    async def package(self, request: web.Request) -> web.StreamResponse:
        return json_answer(await self._package_answer(await self._transfer.catalog.look_up(_package_ref(request))))

    async def manifest(self, request: web.Request) -> web.StreamResponse:
        document, used_base = await self._transfer.document(_manifest_id(request), _base(request))
        headers = {"Cache-Control": _IMMUTABLE} | ({"Waystation-Base": "1"} if used_base else {})
        return web.Response(body=msgspec.msgpack.encode(document), content_type=messages.DOCUMENT_TYPE, headers=headers)

    async def give_bundle(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request, self._limits, messages.BundleRequest)
        if "zstd" not in body.encodings:
            raise HttpRefusal(400, "bad_fields")
        wanted, reader = await self._transfer.wanted(body), await self._transfer.reader(body)
        response = web.StreamResponse(headers={"Content-Type": messages.BUNDLE_TYPE})
        await response.prepare(request)
        async with aclosing(self._transfer.give(wanted, reader)) as pieces:
            async for piece in metrics.counted(pieces, metrics.SENT):
                await write_guarded(response, piece, self._limits)
        await response.write_eof()
        return response

    async def chunk(self, request: web.Request) -> web.StreamResponse:
        stored = await self._transfer.chunk(ChunkId(_or_404(parse_digest, request.match_info["hex"])))
        response = web.StreamResponse(
            headers={"Content-Type": messages.CHUNK_TYPE, "Cache-Control": _IMMUTABLE, "ETag": f'"{stored.id}"'}
        )
        response.content_length = stored.length
        await response.prepare(request)
        async for piece in metrics.counted(stored.pieces(), metrics.SENT):
            await write_guarded(response, piece, self._limits)
        metrics.sent("stored", stored.length, stored.size)
        await response.write_eof()
        return response

    async def _package_answer(self, pointer: Pointer) -> messages.PackageAnswer:
        return messages.PackageAnswer(
            id=pointer.id,
            version=pointer.version,
            manifest=pointer.manifest,
            nupkg_sha256=pointer.nupkg_sha256,
            size=pointer.size,
            published=pointer.published,
            signature=await self._transfer.catalog.signature(pointer.manifest_id),
        )


# --- from a request to values


def _or_404(parse: Callable[[str], T], text: str) -> T:
    """A path that names nothing possible names nothing that is here."""
    try:
        return parse(text)
    except IdentityError as error:
        raise HttpRefusal(404, "not_found") from error


def _manifest_id(request: web.Request) -> ManifestId:
    return ManifestId(_or_404(parse_digest, request.match_info["hex"]))


def _base(request: web.Request) -> ManifestId | None:
    text = request.query.get("base")
    return None if text is None else ManifestId(parse_digest(text))


def _package_ref(request: web.Request) -> PackageRef:
    id = _or_404(PackageId.parse, request.match_info["id"])
    return PackageRef(id, _or_404(NuGetVersion.parse, request.match_info["version"]))


# --- serving


async def serve(config: RelayConfig, on_ready: Callable[[str], None], *, limits: Limits | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `on_ready` is told the URL once requests are answered.

    Raises:
        UsageError: the configuration cannot be served.
        LockedError: another relay serves this store.
        StoreError: the store cannot be opened.
    """
    limits = limits or limits_of(config)
    tame_malloc()
    raise_open_files(limits)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        running = await start(config, limits, stack)
        on_ready(running.url)
        await stop.wait()


async def start(config: RelayConfig, limits: Limits, stack: AsyncExitStack) -> Running:
    """A relay that answers; leaving `stack` drains it and gives everything back. Raises as `serve`."""
    host, port = split_listen(config.listen)
    store: Store = await open_store(config.store, free_floor=config.free_floor)
    stack.push_async_callback(store.close)
    stack.enter_context(store.exclusive("serve"))
    transfer = Transfer(store)
    stack.push_async_callback(transfer.close)
    await transfer.load()
    mail = Mail(store.own_folder("state/mail"), mail_limits_of(limits))
    stack.push_async_callback(mail.close)
    await mail.load()
    await import_documents(store.documents, mail)
    rates = transfer.rates = await asyncio.to_thread(measure_rates)
    peers = Peers(config)
    replications = Replications(transfer, store, peers, limits)
    stack.push_async_callback(replications.close)
    engines = engines_of(config, transfer.catalog, store.chunks)
    stack.push_async_callback(engines.close)
    nupkgs = Nupkgs(store, engines, parent_of(config, peers))
    stack.push_async_callback(nupkgs.close)
    app = RelayApp(transfer, config, limits, rates, mail, replications, nupkgs).build()
    running = await start_guarded(app, host, port, limits, ssl_context=_tls(config))
    stack.push_async_callback(running.stop)
    return running


def limits_of(config: RelayConfig) -> Limits:
    """The default limits with what relay.yaml names. Raises `UsageError` for a name or value that cannot be."""
    defaults = Limits()
    names = {field.name: type(getattr(defaults, field.name)) for field in fields(defaults)}
    for name, value in config.limits.items():
        if name not in names or value <= 0:
            raise UsageError(
                f"limits: {name!r}: {value!r} is not one of the limits above 0", hint=f"There are: {', '.join(names)}"
            )
    return replace(defaults, **{name: names[name](value) for name, value in config.limits.items()})


def _tls(config: RelayConfig) -> ssl.SSLContext | None:
    if config.tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(config.tls.certificate, config.tls.key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"tls: certificate or key cannot be used: {error}") from error
    return context
