"""The relay as a whole: routes to handlers, handlers to `Transfer`. Composition stands here, decisions elsewhere."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import os
import re
import signal
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import fields, replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from typing import Any

import msgspec
from aiohttp import web

from relay.audit.acts import (
    PackageConflict,
    PackageOffered,
    PackagePublished,
    RelayReady,
    RelayStarted,
    RelayStopped,
    Reloaded,
    ReloadRefused,
)
from relay.audit.event import tell
from relay.config import RelayConfig, TokenRecord, home, split_listen
from relay.errors import ConflictError, UntrustedError, UsageError, WaystationError
from relay.mail.import_documents import import_documents
from relay.mail.mailbox import Mail
from relay.package.identity import ChunkId, ManifestId, PackageId, parse_digest
from relay.package.ranges import count
from relay.protocol import messages
from relay.protocol.connection import MissingChunksError
from relay.protocol.credentials import EndingsTold, words_of
from relay.rebuild.nupkgs import Nupkgs
from relay.server import metrics
from relay.server.http.access import DRAINING, OPEN, Access, Routed, Routes, add, guarded_app, require
from relay.server.http.bodies import (
    IMMUTABLE,
    body_pieces,
    check_media_type,
    digest_of,
    json_answer,
    or_404,
    package_of,
    read_body,
    read_json,
    share_of,
    stream,
)
from relay.server.http.callers import IDENTITY, caller_of, path_of
from relay.server.http.connection import Limits, bytes_for_encoders
from relay.server.http.credentials import certificate_of, endings
from relay.server.http.listen import Running, raise_open_files, start_guarded
from relay.server.http.problems import HttpRefusal, problem
from relay.server.http.tokens import Identity, parse_tokens
from relay.server.line_routes import LineRoutes
from relay.server.mail_routes import MailRoutes, mail_limits_of
from relay.server.nupkg_routes import RebuildRoutes, engines_of, parent_of
from relay.server.packages import Transfer
from relay.server.peers import Peers
from relay.server.replications import Replications
from relay.stores.catalog import Pointer
from relay.stores.open import Store, open_store, parse_location
from relay.stores.watch import StoreWatch
from relay.support.byte_budget import ByteBudget
from relay.support.malloc import give_back_free, tame_malloc
from relay.transfer.cpu_rates import measure_rates

_BUNDLE_MEMORY = 24 << 20
"""Bytes that one incoming bundle may hold: a zstd window, verified chunks that wait to be written, a batch under way."""
_LEASE = re.compile(r"[0-9a-f]{32}", re.ASCII)


_ENDINGS_SECONDS = 3600.0
"""How often a relay looks whether something of its own is about to end."""

_GIVE_BACK_SECONDS = 5.0
"""Between two times that freed memory is given back to the system."""


class Live:
    """What of a relay's configuration can change while it serves: who may call, what it shows, whom it fetches from."""

    def __init__(self, config: RelayConfig) -> None:
        """Raises `UsageError`: something of it cannot be used."""
        self.config = config
        self.access = Access(parse_tokens(config.tokens))
        self.certificate = None if config.tls is None else certificate_of(config.tls)
        self.peers = Peers(config)

    def context(self) -> ssl.SSLContext:
        """What a new connection is shown."""
        assert self.certificate is not None  # noqa: S101 - asked only by a relay that ends TLS
        return self.certificate().context

    def endings(self) -> tuple[messages.Ending, ...]:
        """All that ends, whenever that is."""
        return endings(self.access.tokens.records, None if self.certificate is None else self.certificate())

    def replace(self, config: RelayConfig) -> tuple[str, ...]:
        """Take over what can change, all of it or nothing; what is new, in words.

        Raises:
            UsageError: something of it cannot be used; what was in force stays so.
        """
        other, changes = Live(config), changes_of(self.config, config)
        self.access.replace(other.access.tokens)
        self.peers.replace(other.peers)
        if self.certificate is not None and other.certificate is not None:
            self.certificate = other.certificate
        self.config = config
        return changes


def changes_of(old: RelayConfig, new: RelayConfig) -> tuple[str, ...]:
    """What differs, in words, and what of it waits for the next start: pure. The tokens of both were parsed before."""
    before, after = ({each.id: each for each in parse_tokens(one.tokens).records} for one in (old, new))
    told = [f"token {_named(after[id])} is new" for id in after.keys() - before.keys()]
    told += [f"token {_named(before[id])} is revoked" for id in before.keys() - after.keys()]
    told += [f"token {_named(after[id])} differs" for id in after.keys() & before.keys() if after[id] != before[id]]
    live = {"tokens", "peers", "site"} | ({"tls"} if old.tls and new.tls else set())
    # The parent's token and authority are looked up as a peer's.
    if old.parent and new.parent and old.parent.url == new.parent.url:
        live.add("parent")
    differ = [name for name in new.__struct_fields__ if getattr(old, name) != getattr(new, name) and name != "tokens"]
    told += [f"{name} differs" for name in differ if name in live]
    return (*sorted(told), *(f"{name} differs, and waits for the next start" for name in differ if name not in live))


def _named(record: TokenRecord) -> str:
    return f"{record.id} ({record.name})" if record.name else record.id


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
        live: Live | None = None,
        watch: StoreWatch | None = None,
    ) -> None:
        parts: list[Routed | None] = [
            LineRoutes(limits),
            None if mail is None else MailRoutes(mail, limits),
            replications,
            None if nupkgs is None else RebuildRoutes(transfer, nupkgs, limits),
        ]
        self._parts = [part for part in parts if part is not None]
        self._transfer = transfer
        self._live = live or Live(config)
        self._limits = limits
        self._bundle_room = ByteBudget(limits.bundle_bytes_in_flight)
        self._rates = rates
        self._watch = watch or StoreWatch(transfer.store, config.low_space)

    def build(self) -> web.Application:
        """The application, every route with the scope that it asks for."""
        app = guarded_app(self._live.access)
        for route in chain.from_iterable(part.routes() for part in (self, *self._parts)):
            add(app, *route)
        return app

    def routes(self) -> Routes:
        """As `Routed`."""
        return (
            ("GET", messages.HEALTH, self.health, OPEN),
            ("GET", messages.METRICS, self.metrics, "read"),
            ("PUT", messages.MANIFEST, self.offer, "write"),
            ("GET", messages.MANIFEST, self.manifest, "read"),
            ("POST", messages.MISSING, self.missing, "write"),
            ("PUT", messages.BUNDLE_IN, self.take_bundle, "write"),
            ("POST", messages.BUNDLE_OUT, self.give_bundle, "read"),
            ("GET", messages.PACKAGES, self.packages, "read"),
            ("GET", messages.PACKAGE_ID, self.packages, "read"),
            ("GET", messages.PACKAGE, self.package, "read"),
            ("PUT", messages.PACKAGE, self.publish, "write"),
            ("GET", messages.CHUNK, self.chunk, "read"),
        )

    async def metrics(self, request: web.Request) -> web.StreamResponse:  # noqa: ARG002 - the signature of a handler
        return metrics.answer(self._live.endings(), await self._watch.look(), time.time())

    async def health(self, request: web.Request) -> web.StreamResponse:
        """With `?scope=`, whether the caller may do what takes that scope."""
        if scope := request.query.get("scope"):
            require(request, scope)
        draining = request.app[DRAINING].is_set()
        sight = await self._watch.look()
        answer = messages.HealthAnswer(
            status="draining" if draining else "read-only" if sight.takes_nothing else "ok",
            versions=(messages.VERSION,),
            time=time.time(),
            site=self._live.config.site,
            reason="this relay is about to stop" if draining else sight.words,
            cpu=self._rates,
            space=sight.space,
        )
        identity = request.get(IDENTITY)
        if identity is not None or not self._live.access.required:
            answer = msgspec.structs.replace(answer, **self._told_of_endings(identity))
        return json_answer(answer, status=503 if draining else 200)

    def _told_of_endings(self, identity: Identity | None) -> dict[str, Any]:
        """To callers that show a token: what a stranger could make use of is not told."""
        everything, now = self._live.endings(), datetime.now(UTC)
        return {
            "token": next((one for one in everything if identity and one.id == identity.id), None),
            "certificate": next((one for one in everything if one.what == "certificate"), None),
            "endings": tuple(one for one in everything if words_of(one, now)),
        }

    # --- taking

    async def offer(self, request: web.Request) -> web.StreamResponse:
        check_media_type(request, messages.DOCUMENT_TYPE)
        body = await read_body(request, self._limits, messages.DOCUMENT_MAX)
        try:
            document = msgspec.msgpack.decode(body, type=messages.Document)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UntrustedError(f"not a manifest document: {error}") from error
        if len(document.signature) > messages.SIGNATURE_MAX:
            raise HttpRefusal(413, "too_large")
        id = ManifestId(digest_of(request))
        with _conflicts_told(request):
            answer = await self._transfer.offer(id, document, _base(request))
        manifest = await self._transfer.manifest(id)
        ref, missing = manifest.package, count(answer.missing)
        tell(PackageOffered(caller_of(request), str(ref.id), ref.version.normalized, id, len(manifest.chunks), missing))
        return json_answer(answer)

    async def missing(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request, self._limits, messages.MissingRequest, messages.RANGES_BODY_MAX)
        return json_answer(await self._transfer.missing(body))

    async def take_bundle(self, request: web.Request) -> web.StreamResponse:
        check_media_type(request, messages.BUNDLE_TYPE)
        lease = request.query.get("lease", "")
        if not _LEASE.fullmatch(lease):
            raise HttpRefusal(404, "unknown_lease")
        pieces = metrics.counted(body_pieces(request, self._limits, messages.BUNDLE_BODY_MAX), metrics.RECEIVED)
        with self._bundle_room.place() as place:
            place.take(_BUNDLE_MEMORY)
            answer = await self._transfer.take_bundle(lease, pieces)
        metrics.CHUNKS.labels("stored").inc(answer.stored)
        metrics.CHUNKS.labels("held").inc(answer.held)
        metrics.CHUNKS.labels("refused").inc(sum(count(run.ranges) for run in answer.refused))
        return json_answer(answer)

    async def publish(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request, self._limits, messages.PublishRequest, messages.RANGES_BODY_MAX)
        try:
            with _conflicts_told(request):
                pointer = await self._transfer.publish(package_of(request), body)
        except MissingChunksError as error:
            return problem(409, "missing_chunks", extra={"missing": error.missing}, cause=error)
        by, digest = caller_of(request), pointer.nupkg_sha256
        tell(PackagePublished(by, pointer.id, pointer.version, pointer.manifest, digest, pointer.size))
        if request.headers.get("Prefer") == messages.PREFER_MINIMAL:
            # Who publishes brought all that the answer would say, perhaps over a thin line.
            return web.Response(status=204)
        return json_answer(await self._package_answer(pointer))

    # --- giving

    async def packages(self, request: web.Request) -> web.StreamResponse:
        """From the store, not from the cache: another process may have added to it (`package add` into a depot)."""
        text = request.match_info.get("id")
        id = None if text is None else or_404(PackageId.parse, text)
        found = await self._transfer.catalog.look_up_all(id)
        return json_answer(messages.PackagesAnswer(tuple([await self._package_answer(pointer) for pointer in found])))

    async def package(self, request: web.Request) -> web.StreamResponse:
        return json_answer(await self._package_answer(await self._transfer.catalog.look_up(package_of(request))))

    async def manifest(self, request: web.Request) -> web.StreamResponse:
        document, used_base = await self._transfer.document(ManifestId(digest_of(request)), _base(request))
        headers = {"Cache-Control": IMMUTABLE} | ({"Waystation-Base": "1"} if used_base else {})
        return web.Response(body=msgspec.msgpack.encode(document), content_type=messages.DOCUMENT_TYPE, headers=headers)

    async def give_bundle(self, request: web.Request) -> web.StreamResponse:
        body = await read_json(request, self._limits, messages.BundleRequest, messages.RANGES_BODY_MAX)
        if "zstd" not in body.encodings:
            raise HttpRefusal(400, "bad_fields")
        wanted, reader = await self._transfer.wanted(body), await self._transfer.reader(body)
        pieces = metrics.counted(self._transfer.give(wanted, reader, share_of(request, self._limits)), metrics.SENT)
        return await stream(request, pieces, self._limits, {"Content-Type": messages.BUNDLE_TYPE})

    async def chunk(self, request: web.Request) -> web.StreamResponse:
        stored = await self._transfer.chunk(ChunkId(digest_of(request)))
        headers = {"Content-Type": messages.CHUNK_TYPE, "Cache-Control": IMMUTABLE, "ETag": f'"{stored.id}"'}
        pieces = metrics.counted(stored.pieces(share_of(request, self._limits)), metrics.SENT)
        response = await stream(request, pieces, self._limits, headers, stored.length)
        metrics.sent("stored", stored.length, stored.size)
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


@contextmanager
def _conflicts_told(request: web.Request) -> Iterator[None]:
    """Other bytes under a name that is taken are worth an alarm."""
    try:
        yield
    except ConflictError as error:
        tell(PackageConflict(caller_of(request), path_of(request), error.message))
        raise


def _base(request: web.Request) -> ManifestId | None:
    text = request.query.get("base")
    return None if text is None else ManifestId(parse_digest(text))


# --- serving


async def serve(
    config: RelayConfig,
    on_ready: Callable[[str], None],
    *,
    limits: Limits | None = None,
    again: Callable[[], RelayConfig] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `on_ready` is told the URL once requests are answered.

    `again` reads the configuration anew at each SIGHUP; what cannot be used then changes nothing.

    Raises:
        UsageError: the configuration cannot be served.
        LockedError: another relay serves this store.
        StoreError: the store cannot be opened.
    """
    limits = limits or limits_of(config)
    tame_malloc()
    raise_open_files(limits)
    stop, hang_up = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, hang_up.set)
    async with AsyncExitStack() as stack:
        live = Live(config)
        version, tokens = importlib.metadata.version("waystation"), len(live.access.tokens)
        tell(RelayStarted(version, os.getpid(), config.listen, config.store, config.site, tokens))
        running = await start(config, limits, stack, live)
        for task in (_reload(live, hang_up, again or (lambda: config)), _tell_endings(live), _give_back_memory()):
            stack.callback(asyncio.create_task(task).cancel)
        on_ready(running.url)
        tell(RelayReady(running.url, config.site))
        await stop.wait()
        cut = await running.stop()
    tell(RelayStopped(cut))


async def _reload(live: Live, hang_up: asyncio.Event, again: Callable[[], RelayConfig]) -> None:
    """At each SIGHUP. Several that come together are one; requests that run are not touched."""
    while True:
        await hang_up.wait()
        hang_up.clear()
        try:
            config = await asyncio.to_thread(again)
            limits_of(config)
            changes = live.replace(config)
        except (WaystationError, OSError) as error:
            tell(ReloadRefused("; ".join(str(error).splitlines())))
            continue
        except Exception as error:  # a mistake of ours must not be the end of reloading
            tell(ReloadRefused(type(error).__name__), error)
            continue
        tell(Reloaded(changes or ("nothing differs",)))


async def _give_back_memory() -> None:
    """What many peers made a relay hold at one time would stay its own, as holes between what others still hold."""
    while True:
        await asyncio.sleep(_GIVE_BACK_SECONDS)
        await asyncio.to_thread(give_back_free)


async def _tell_endings(live: Live) -> None:
    told = EndingsTold()
    while True:
        told.tell(live.endings(), datetime.now(UTC))
        await asyncio.sleep(_ENDINGS_SECONDS)


async def start(config: RelayConfig, limits: Limits, stack: AsyncExitStack, live: Live | None = None) -> Running:
    """A relay that answers; leaving `stack` drains it and gives everything back. Raises as `serve`."""
    live = live or Live(config)
    host, port = split_listen(config.listen)
    store: Store = await open_store(config.store, free_floor=config.free_floor)
    stack.push_async_callback(store.close)
    stack.enter_context(store.exclusive("serve"))
    transfer = Transfer(store)
    stack.push_async_callback(transfer.close)
    await transfer.load()
    mail = Mail(store.own_folder("state/mail") or bucket_folder(store.location, "mail"), mail_limits_of(limits))
    stack.push_async_callback(mail.close)
    await mail.load()
    await import_documents(store.documents, mail)
    rates = transfer.rates = await asyncio.to_thread(measure_rates)
    replications = Replications(transfer, store, live.peers, limits)
    stack.push_async_callback(replications.close)
    engines = engines_of(config, transfer.catalog, store.chunks)
    stack.push_async_callback(engines.close)
    nupkgs = Nupkgs(store, engines, parent_of(config, live.peers))
    stack.push_async_callback(nupkgs.close)
    watch = StoreWatch(store, config.low_space)
    await watch.look()
    stack.callback(asyncio.create_task(watch.watch()).cancel)
    app = RelayApp(transfer, config, limits, rates, mail, replications, nupkgs, live, watch).build()
    running = await start_guarded(app, host, port, limits, ssl_context=live.context if live.certificate else None)
    running.ledger.left_for_encoders = transfer.payloads.limit_to
    transfer.payloads.limit_to(bytes_for_encoders(limits.memory_bytes, 0))
    stack.push_async_callback(running.stop)
    return running


def bucket_folder(location: str, below: str) -> str | None:
    """Where a relay over a bucket keeps what is this process's alone, unless its location names a folder; None for others."""
    bucket = parse_location(location).bucket
    if bucket is None:
        return None
    mark = hashlib.sha256(location.encode()).hexdigest()[:8]
    return os.path.join(home(), "buckets", f"{bucket.bucket}-{mark}", below)


def wrong_settings(config: RelayConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """What of relay.yaml cannot be used, although it is of the right form: where it stands, and why."""
    uses: list[tuple[tuple[str, ...], Callable[[], object]]] = [
        (("listen",), partial(split_listen, config.listen)),
        (("tokens",), partial(parse_tokens, config.tokens)),
        (("peers",), partial(Peers, RelayConfig(peers=config.peers))),
        (("parent",), partial(Peers, RelayConfig(parent=config.parent))),
    ]
    if config.tls is not None:
        uses.append((("tls",), partial(certificate_of, config.tls)))
    uses += [
        (("limits", name), partial(limits_of, RelayConfig(limits={name: config.limits[name]})))
        for name in config.limits
    ]
    for where, use in uses:
        try:
            use()
        except UsageError as error:
            yield where, str(error).removeprefix(f"{where[0]}: ")


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
