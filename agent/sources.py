"""The relays (and stores that stand in for them) of this agent, in the order in which to ask them."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from agent.discovery import DiscoveryConfig, State, find_sources, load_state, log_changes, probe, save_state
from agent.nearest import (
    UNKNOWN,
    Health,
    Ranking,
    Source,
    known,
    next_probe,
    order_for_pull,
    rank,
    record_failure,
    record_probes,
    record_success,
)
from agent.state import AgentConfig
from relay.catalog import Catalog
from relay.client import ClientLimits, ManifestDocument, PackagePointer, RelayClient, token_from
from relay.content.frames import Event, NotSent, Received
from relay.content.identity import ManifestId, NuGetVersion, PackageId, PackageRef
from relay.content.manifest import Manifest
from relay.errors import ChunkInvalid, ChunkMissing, NotFoundError, StoreError, WaystationError
from relay.fetch import Measured
from relay.stores.locations import Store, open_store

_PROBES = 3
"""Relays measured at the start of a pull, where their time has come."""
_PROBE_SECONDS = 3.0


class StoreSource:
    """A store on a shared file system, read as if it were a relay."""

    def __init__(self, location: str) -> None:
        self.name = location
        self._location = location
        self._store: Store | None = None

    async def package(self, id: PackageId, version: NuGetVersion) -> PackagePointer:
        catalog = await self._catalog()
        pointer = catalog.get(PackageRef(id, version))
        signature = await catalog.signature(pointer.manifest_id)
        return PackagePointer(pointer.ref, pointer.manifest_id, signature, pointer.size)

    async def manifest(self, id: ManifestId, base: Manifest | None = None) -> ManifestDocument:  # noqa: ARG002
        catalog = await self._catalog()
        manifest = await catalog.manifest(id)
        if manifest is None:
            raise NotFoundError(f"not at {self.name}")
        return ManifestDocument(manifest, await catalog.signature(id))

    async def stream(self, manifest: Manifest, indexes: Sequence[int]) -> AsyncGenerator[Event, None]:
        chunks = (await self._open()).chunks
        for index in indexes:
            try:
                chunk = await chunks.get(manifest.chunk_id(index))
            except (ChunkMissing, ChunkInvalid):
                yield NotSent(((manifest.id, index),), "absent")
                continue
            yield Received(manifest.id, index, chunk, chunk.size)

    async def health(self) -> None:
        await self._open()

    async def close(self) -> None:
        if self._store is not None:
            await self._store.close()

    async def _open(self) -> Store:
        if self._store is None:
            self._store = await open_store(self._location)
        return self._store

    async def _catalog(self) -> Catalog:
        catalog = Catalog((await self._open()).documents)
        await catalog.load()
        return catalog


AnySource = RelayClient | StoreSource


class Sources:
    """Finds, ranks and opens sources, and remembers how they did. Use as an async context manager."""

    def __init__(
        self,
        config: AgentConfig,
        state_path: Path,
        *,
        relays: Sequence[str] = (),
        token_file: str | None = None,
        limits: ClientLimits | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`relays`, given by hand, stand in place of everything that the configuration says."""
        self._config = config
        self._path = state_path
        self._only = tuple(relays)
        self._token = token_from(token_file or config.token_file)
        self._limits = limits
        self._rng = rng or random.Random()
        self._kept: State = State()
        self._found: tuple[Source, ...] = ()
        self._open: dict[str, AnySource] = {}
        self._stack = AsyncExitStack()
        self.notes: tuple[str, ...] = ()

    async def __aenter__(self) -> Sources:
        self._kept = await asyncio.to_thread(load_state, self._path)
        found = await find_sources(self._discovery(), self._kept.last_answers, self._rng)
        self._found, self.notes = found.sources, found.notes
        self._kept = State(
            current=self._kept.current,
            healths=known(self._kept.healths, self._found),
            last_answers=found.last,
            saved_at=self._kept.saved_at,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        kept = State(
            current=self._kept.current,
            healths=self._kept.healths,
            last_answers=self._kept.last_answers,
            saved_at=time.time(),
        )
        try:
            await asyncio.to_thread(save_state, self._path, kept)
        except StoreError:
            # What is lost is a preference; the pull itself stands.
            pass

    @property
    def healths(self) -> dict[str, Health]:
        """What is known of each source, by URL."""
        return self._kept.healths

    def ranking(self) -> Ranking:
        return rank(self._found, self._kept.healths, self._kept.current, time.time(), self._config.name)

    def in_order(self) -> list[AnySource]:
        """Every source, the one to ask first in front, opened (which contacts nobody)."""
        return [self._opened(source) for source in order_for_pull(self.ranking(), ())]

    async def measure(self, *, everything: bool = False) -> dict[str, str]:
        """Ask the best few for health where their time has come; returns the failures by URL."""
        now = time.time()
        ranked = [r.source for r in self.ranking()]
        due = [s for s in ranked if everything or self._is_due(s, now)]
        if not due:
            return {}
        results = await probe(due, self._check, _PROBE_SECONDS, limit=len(due) if everything else _PROBES)
        before = self._kept.healths
        self._keep({**before, **record_probes(before, results, time.time())}, self._kept.current)
        return {url: result.reason for url, result in results.items() if not result.ok}

    def succeeded(self, name: str, measured: Measured) -> None:
        url = self._url_of(name)
        health = self._kept.healths.get(url, UNKNOWN)
        healths = {
            **self._kept.healths,
            url: record_success(health, time.time(), measured.first_byte, measured.goodput),
        }
        self._keep(healths, url)

    def failed(self, name: str, error: WaystationError) -> None:
        url = self._url_of(name)
        health = self._kept.healths.get(url, UNKNOWN)
        self._keep({**self._kept.healths, url: record_failure(health, time.time(), error.message)}, self._kept.current)

    def _is_due(self, source: Source, now: float) -> bool:
        health = self._kept.healths.get(source.url, UNKNOWN)
        return health.last_checked == 0.0 or next_probe(health, now, self._rng) <= now

    async def _check(self, source: Source) -> float:
        started = time.monotonic()
        await self._opened(source).health()
        return time.monotonic() - started

    def _keep(self, healths: dict[str, Health], current: str | None) -> None:
        log_changes(self._kept.healths, healths)
        self._kept = State(
            current=current,
            healths=healths,
            last_answers=self._kept.last_answers,
            saved_at=self._kept.saved_at,
        )

    def _opened(self, source: Source) -> AnySource:
        opened = self._open.get(source.url)
        if opened is None:
            if source.is_store:
                opened = StoreSource(source.url)
            else:
                opened = RelayClient(
                    source.url,
                    token=self._token,
                    connect_to=source.address,
                    limits=self._limits,
                    tls=self._tls(),
                )
            self._open[source.url] = opened
            self._stack.push_async_callback(opened.close)
        return opened

    def _tls(self) -> ssl.SSLContext | None:
        return ssl.create_default_context(cafile=self._config.ca_file) if self._config.ca_file else None

    def _url_of(self, name: str) -> str:
        return next((url for url, opened in self._open.items() if opened.name == name), name)

    def _discovery(self) -> DiscoveryConfig:
        if self._only:
            return DiscoveryConfig(relays=self._only)
        c = self._config
        return DiscoveryConfig(
            site=c.site,
            domain=c.domain,
            resolver=c.resolver,
            scheme="http" if c.scheme == "http" else "https",
            site_name=c.srv_site,
            generic_name=c.srv_generic,
            relays=c.relays,
        )
