"""What tests of several houses share: small nupkgs, keys, depots and relays. Real ones, small, on free ports."""

from __future__ import annotations

import asyncio
import os
import random
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from orchestrator.depot.depot import Added, Depot, open_depot
from orchestrator.trust.keyring import init_trust, load_signer
from relay.config import RelayConfig
from relay.encoding.codecs import Coding, Encoding, encode
from relay.package import chunking
from relay.package.chunk import Chunk
from relay.package.chunking import PartDigest
from relay.package.identity import ChunkId, NuGetVersion, PackageId, PackageRef
from relay.package.manifest import Manifest, ManifestBuilder, NupkgDigests
from relay.package.zip_reader import Entry
from relay.protocol.client import RelayClient
from relay.protocol.connection import ClientLimits, Connection
from relay.protocol.mail_client import MailClient
from relay.server.app import start
from relay.server.http.connection import Limits
from relay.server.http.tokens import TokenRecord, make_token
from relay.stores.catalog import Provenance

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

    from relay.trust.keys import TrustPins

CLIENT_LIMITS = ClientLimits(connect_seconds=2.0, answer_seconds=20.0, window_seconds=10.0, window_bytes=1)
"""For clients in tests: nobody waits a minute to learn that something hangs."""
RELAY_LIMITS = Limits(linger_seconds=0.2, drain_seconds=2.0)
"""For relays in tests: they stop soon."""

# --- content


def noise(seed: int | str, size: int) -> bytes:
    """`size` bytes that do not compress, the same for the same `seed`."""
    return random.Random(seed).randbytes(size)


def nuspec(id: str = "Acme.Web", version: str = "1.0.0") -> bytes:
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        '<package xmlns="http://schemas.microsoft.com/packaging/2013/05/nuspec.xsd"><metadata>'
        f"<id>{id}</id><version>{version}</version><authors>Acme</authors><description>For tests</description>"
        "</metadata></package>"
    ).encode()


def _parts(files: Mapping[str, bytes], id: str, version: str) -> dict[str, bytes]:
    return {
        f"{id}.nuspec": nuspec(id, version),
        "[Content_Types].xml": b'<?xml version="1.0"?><Types xmlns="x" />',
        "_rels/.rels": b'<?xml version="1.0"?><Relationships xmlns="x" />',
        **files,
    }


def make_nupkg(
    path: str | os.PathLike[str], files: Mapping[str, bytes], id: str = "Acme.Web", version: str = "1.0.0"
) -> str:
    """Write a nupkg of `files` and its container parts; its path. The same files give the same bytes.

    Where `path` is a folder, the file in it is named as NuGet names it. Parts are stored, not deflated.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        name = os.path.join(name, f"{id}.{version}.nupkg")
    with zipfile.ZipFile(name, "w") as archive:
        for part, data in _parts(files, id, version).items():
            archive.writestr(zipfile.ZipInfo(part), data)
    return name


@dataclass(frozen=True)
class Cut:
    """A package that was cut without any store: its manifest, and its chunks by id."""

    manifest: Manifest
    chunks: Mapping[ChunkId, Chunk]

    def chunk(self, index: int) -> Chunk:
        return self.chunks[self.manifest.chunk_id(index)]

    @property
    def indexes(self) -> range:
        return range(len(self.manifest.chunks))

    @property
    def stream(self) -> bytes:
        return b"".join(self.chunk(index).data for index in self.indexes)


def cut_package(files: Mapping[str, bytes], id: str = "Acme.Web", version: str = "1.0.0") -> Cut:
    """Manifest and chunks of a package of `files`, as adding it would make them. No file is written, no zip is made."""
    parts = _parts(files, id, version)
    entries = [Entry(path, len(data), len(data), 0, 0, 0, False) for path, data in parts.items()]
    entries.sort(key=lambda entry: chunking.stream_key(entry.path))
    digests = NupkgDigests(sum(map(len, parts.values())), Chunk.of(repr(parts).encode()).id, "A" * 86 + "==")
    builder = ManifestBuilder(PackageRef(PackageId.parse(id), NuGetVersion.parse(version)), digests, {})
    chunks: dict[ChunkId, Chunk] = {}
    for found in chunking.cut(entries, lambda e: e.path, lambda e: e.size, lambda e: [parts[e.path]]):
        if isinstance(found, PartDigest):
            builder.saw_part(found)
        else:
            builder.saw_chunk(found)
            chunks[found.id] = found
    return Cut(builder.build(entries, [False] * len(entries)), chunks)


def encode_run(chunks: Iterable[bytes], coding: str = "zstd", base: bytes = b"") -> tuple[Encoding, bytes]:
    """The payload of a run as a sender sends it, and the encoding it has: `raw` where `coding` makes nothing smaller."""
    run = b"".join(chunks)
    parsed = Coding.parse(coding)
    payload = b"".join(encode(parsed, run, base))
    return (parsed.encoding, payload) if len(payload) < len(run) else ("raw", run)


# --- origin


@dataclass(frozen=True)
class Keys:
    """A trust folder: the package key as a signer, and the pins that agents get."""

    folder: str
    pins: TrustPins
    signer: CryptoSigner

    @property
    def pins_file(self) -> str:
        return os.path.join(self.folder, "trust.json")


def trust_keys(folder: str | os.PathLike[str]) -> Keys:
    """Fresh keys in `folder`, which must not be there yet (or be empty and private)."""
    name = os.fspath(folder)
    pins = init_trust(name)
    return Keys(name, pins, load_signer(name, "package"))


@dataclass(frozen=True)
class Origin:
    """An open depot with keys. `added` are the packages it was made with, in that order."""

    depot: Depot
    keys: Keys
    added: list[Added]

    async def add(self, nupkg: str) -> Added:
        """Listed, and proved that it can be made again."""
        added = await self.depot.add(nupkg, self.keys.signer, Provenance("added", nupkg))
        await self.depot.recipe(added.manifest)
        return added

    async def signature(self, manifest: Manifest) -> bytes:
        return await self.depot.catalog.signature(manifest.id)


@asynccontextmanager
async def depot_with(folder: str | os.PathLike[str], *nupkgs: str) -> AsyncIterator[Origin]:
    """A disk depot in `folder`/depot with keys in `folder`/trust, and `nupkgs` added to it. One origin a folder."""
    name = os.fspath(folder)
    trust = os.path.join(name, "trust")
    if os.path.exists(os.path.join(trust, "trust.json")):
        raise ValueError("this folder has keys already: one origin a folder")
    os.makedirs(name, exist_ok=True)
    async with open_depot(f"disk:{os.path.abspath(os.path.join(name, 'depot'))}") as depot:
        origin = Origin(depot, trust_keys(trust), [])
        for nupkg in nupkgs:
            origin.added.append(await origin.add(nupkg))
        yield origin


# --- relays


@dataclass(frozen=True)
class Relay:
    """A relay that answers in this process."""

    url: str
    port: int
    store: str
    """Its location, to look into it from outside."""

    def client(self, token: str | None = None, limits: ClientLimits = CLIENT_LIMITS) -> RelayClient:
        return RelayClient(self.url, token=token, limits=limits)

    def mail(
        self, token: str | None = None, limits: ClientLimits = CLIENT_LIMITS
    ) -> AbstractAsyncContextManager[MailClient]:
        return mail_client(self.url, token=token, limits=limits)


@asynccontextmanager
async def mail_client(
    url: str, *, token: str | None = None, limits: ClientLimits = CLIENT_LIMITS
) -> AsyncIterator[MailClient]:
    """The mail of a relay, over a connection of its own."""
    async with Connection(url, token=token, limits=limits) as connection:
        yield MailClient(connection)


@asynccontextmanager
async def running_relay(
    store: str | os.PathLike[str],
    *,
    site: str = "",
    tokens: Sequence[TokenRecord] = (),
    limits: Limits | None = None,
    port: int = 0,
) -> AsyncIterator[Relay]:
    """The whole relay, in this process, on loopback: `store` is a folder or a location. Leaving stops it (drained)."""
    name = os.fspath(store)
    location = name if ":" in name else f"disk:{os.path.abspath(name)}"
    config = RelayConfig(
        listen=f"127.0.0.1:{port}", store=location, site=site, tokens=[msgspec.to_builtins(record) for record in tokens]
    )
    async with AsyncExitStack() as stack:
        running = await start(config, limits or RELAY_LIMITS, stack)
        yield Relay(running.url, running.port, location)


def token(*scopes: str) -> tuple[str, TokenRecord]:
    """A bearer token's text, and the record for `running_relay(tokens=[…])`."""
    return make_token(scopes, datetime.now(UTC), name=" ".join(scopes))


@asynccontextmanager
async def small_server(routes: Iterable[web.RouteDef]) -> AsyncIterator[str]:
    """A plain aiohttp server that may misbehave as its handlers like; its URL."""
    app = web.Application(client_max_size=1 << 30)
    app.add_routes(routes)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def eventually(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until the function `holds` says True; an assertion error after `seconds`."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)
